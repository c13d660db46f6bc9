import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve.order import until


async def told(*pauses: float) -> AsyncIterator[Any]:
    for number, pause in enumerate(pauses):
        await asyncio.sleep(pause)
        yield number


def test_a_stream_is_heard_until_its_time_is_up() -> None:
    heard: list[Any] = []

    async def listen(seconds: float, *pauses: float) -> None:
        async for one in until(time.monotonic() + seconds, told(*pauses)):
            heard.append(one)

    asyncio.run(listen(30, 0, 0, 0))
    assert heard == [0, 1, 2]
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(listen(0.3, 0, 30))
    assert heard == [0, 1, 2, 0]
