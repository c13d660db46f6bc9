"""An Idempotency-Key: drawn once, answered as often as it is asked, within bounds."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request

from serve.errors import ApiError
from serve.replay import Answers, digest_of, name_of, seed_of
from serve.schema import Edit, Generation
from serve.uploads import Uploads


class Painter:
    """Draws when it is let, and counts how often it is asked."""

    def __init__(self, size: int = 10) -> None:
        self.begun, self.done, self.size = 0, 0, size
        self.may = asyncio.Event()
        self.fault: Exception | None = None

    async def draw(self) -> bytes:
        self.begun += 1
        number = self.begun
        await self.may.wait()
        if self.fault is not None:
            raise self.fault
        self.done += 1
        return bytes([number]) * self.size


def with_painter(test: Callable[[Painter], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def inside() -> None:
            await test(Painter())

        asyncio.run(inside())

    run.__name__ = test.__name__
    return run


@with_painter
async def test_who_asks_again_waits_for_the_same_and_is_answered_from_memory(painter: Painter) -> None:
    answers = Answers()
    asking = [asyncio.ensure_future(answers.once(b"key", b"body", painter.draw)) for _ in range(3)]
    await asyncio.sleep(0)
    painter.may.set()
    first = bytes([1]) * 10
    assert await asyncio.gather(*asking) == [(first, False), (first, True), (first, True)]
    assert await answers.once(b"key", b"body", painter.draw) == (first, True)
    assert await answers.once(b"other", b"body", painter.draw) == (bytes([2]) * 10, False)
    assert await answers.once(None, b"body", painter.draw) == (bytes([3]) * 10, False)
    assert await answers.once(None, b"body", painter.draw) == (bytes([4]) * 10, False)


@with_painter
async def test_another_request_with_the_same_key_is_refused(painter: Painter) -> None:
    answers = Answers()
    first = asyncio.ensure_future(answers.once(b"key", b"body", painter.draw))
    await asyncio.sleep(0)
    for _ in range(2):  # while it is being drawn, and afterwards
        with pytest.raises(ApiError) as caught:
            await answers.once(b"key", b"other body", painter.draw)
        assert (caught.value.status_code, caught.value.code) == (422, "idempotency_key_reused")
        painter.may.set()
        await first
    assert painter.begun == 1


@with_painter
async def test_who_leaves_finds_the_picture_when_he_comes_back(painter: Painter) -> None:
    answers = Answers()
    left = asyncio.ensure_future(answers.once(b"key", b"body", painter.draw))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    painter.may.set()
    assert await answers.once(b"key", b"body", painter.draw) == (bytes([1]) * 10, True)
    assert (painter.begun, painter.done) == (1, 1)


@with_painter
async def test_an_error_is_for_all_who_wait_and_the_next_try_is_a_try(painter: Painter) -> None:
    answers, fault = Answers(), ValueError("no room")
    painter.fault = fault
    asking = [asyncio.ensure_future(answers.once(b"key", b"body", painter.draw)) for _ in range(2)]
    await asyncio.sleep(0)
    painter.may.set()
    assert await asyncio.gather(*asking, return_exceptions=True) == [fault, fault]
    painter.fault = None
    assert await answers.once(b"key", b"another body", painter.draw) == (bytes([2]) * 10, False)


@with_painter
async def test_an_answer_is_kept_for_its_time(painter: Painter) -> None:
    now = 1000.0
    answers = Answers(seconds=60, clock=lambda: now)
    painter.may.set()
    await answers.once(b"key", b"body", painter.draw)
    now += 59
    assert (await answers.once(b"key", b"body", painter.draw))[1]
    now += 1
    assert await answers.once(b"key", b"body", painter.draw) == (bytes([2]) * 10, False)


@with_painter
async def test_answers_have_so_many_bytes_together_and_the_oldest_go_first(painter: Painter) -> None:
    answers = Answers(most=25)
    slow = Painter()
    waits = asyncio.ensure_future(answers.once(b"slow", b"body", slow.draw))  # the first to begin, the last to be done
    await asyncio.sleep(0)
    painter.may.set()
    for name in (b"a", b"b", b"c"):
        await answers.once(name, b"body", painter.draw)
    kept = [(await answers.once(name, b"body", painter.draw))[1] for name in (b"b", b"c")]
    assert kept == [True, True] and answers._bytes == 20
    slow.may.set()
    await waits
    assert [(await answers.once(name, b"body", painter.draw))[1] for name in (b"slow", b"c")] == [True, True]
    assert not (await answers.once(b"a", b"body", painter.draw))[1]
    painter.size = 26  # one that is too large by itself is answered, and kept not at all
    assert len((await answers.once(b"large", b"body", painter.draw))[0]) == 26
    assert answers._bytes == 0 and answers._entries == {}


def request(path: str = "/v1/images/generations", **headers: str) -> Request:
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": sent})


def test_a_key_is_its_sender_s_and_its_route_s() -> None:
    assert name_of(request()) is None
    names = [
        name_of(request(idempotency_key="a")), name_of(request(idempotency_key="b")),
        name_of(request("/v1/images/edits", idempotency_key="a")), name_of(request(idempotency_key="")),
        name_of(request(idempotency_key="a", authorization="Bearer x")),
        name_of(request(idempotency_key="xa", authorization="Bearer ")),
    ]  # fmt: skip
    assert None not in names and len(set(names)) == len(names)
    assert name_of(request(idempotency_key="a")) == names[0]
    seeds = {seed_of(request(idempotency_key=key), 10) for key in "ab"}
    assert len(seeds) == 2 and seed_of(request(idempotency_key="a"), 10) in seeds
    assert len({seed_of(request(), 1) for _ in range(5)}) == 5


def test_a_request_is_the_same_however_it_was_written() -> None:
    one = Generation.model_validate_json('{"prompt": "a dog", "n": 1}')
    other = Generation.model_validate_json('{ "n":1, "size": null,"prompt":"a dog"}')
    assert digest_of(one, None) == digest_of(other, None)
    fields: list[dict[str, Any]] = [{}, {"n": 2}, {"prompt": "a cat"}, {"model": "tiny"}]
    assert len({digest_of(Generation(**{"prompt": "a dog", **more}), None) for more in fields}) == 4
    edit = Edit(prompt="a dog")
    files = [Uploads(b"ab"), Uploads(b"a", b"b"), Uploads(b"", b"ab"), Uploads(b"ab", b"b"), Uploads(b"ab", None, b"b")]
    assert len({digest_of(edit, one) for one in files}) == 5
