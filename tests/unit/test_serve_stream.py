"""Streams whose clients leave, at whatever moment: what is drawn for them ends."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest

from serve.errors import ApiError, overloaded
from serve.ingress import told


class Drawing:
    """Events that come when they are let, and whether they are over."""

    def __init__(self) -> None:
        self.go, self.has_begun, self.is_over = asyncio.Event(), False, False

    async def events(self) -> AsyncIterator[bytes]:
        self.has_begun = True
        try:
            await self.go.wait()
            yield b"picture"
            await asyncio.Event().wait()
        finally:
            self.is_over = True


async def leaves_at_once(drawing: Drawing) -> None:
    """While it is still waited whether there is an error."""
    asking = asyncio.ensure_future(anext(told(drawing.events(), "1")))
    await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def is_sent_nothing(drawing: Drawing) -> None:
    """It left before the answer begins."""
    drawing.go.set()
    assert await anext(told(drawing.events(), "1")) == b""


async def leaves_in_the_midst(drawing: Drawing) -> None:
    drawing.go.set()
    lines = told(drawing.events(), "1")
    assert [await anext(lines), await anext(lines)] == [b"", b"picture"]
    asking = asyncio.ensure_future(anext(lines))
    await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


@pytest.mark.parametrize("leave", [leaves_at_once, is_sent_nothing, leaves_in_the_midst])
def test_who_leaves_is_drawn_no_further(leave: Callable[[Drawing], Coroutine[None, None, None]]) -> None:
    async def run() -> None:
        drawing = Drawing()
        await leave(drawing)
        for _ in range(100):
            await asyncio.sleep(0.01)
            if drawing.is_over:
                break
        assert (drawing.has_begun, drawing.is_over) == (True, True)

    asyncio.run(run())


def test_an_error_has_its_own_status_while_nothing_is_sent_and_is_an_event_after() -> None:
    async def events(number: int) -> AsyncIterator[bytes]:
        for _ in range(number):
            yield b"preview"
        raise overloaded(5.0)

    async def hear(number: int) -> list[bytes]:
        return [line async for line in told(events(number), "1")]

    with pytest.raises(ApiError) as caught:
        asyncio.run(hear(0))
    assert caught.value.status_code == 429
    nothing, preview, error = asyncio.run(hear(1))
    assert (nothing, preview) == (b"", b"preview") and error.startswith(b"event: error\ndata: ")
