"""`gtl bench endpoint`: what an endpoint answers under load, and what becomes of what is too much for it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gtl import __version__
from gtl.bench.setting import check_counts, check_file
from gtl.session import free_port
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    import aiohttp

PATH = "/v1/images/generations"
ROOM = {"max_running": 8, "max_waiting": 16}
"""Of the endpoint that is started here: its whole queue is a few seconds of work."""
START_S = 300.0
"""Until that endpoint is up."""


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    url: str | None = None
    """Of an endpoint; None: one of builtin:tiny, started here."""
    model: str | None = None
    """As a request names it; None: the endpoint's first base."""
    steps: int = 10
    size: str = "64x64"
    loads: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Requests a second, as multiples of what the endpoint draws when it is never idle."""
    seconds: float = 30.0
    """For each of them, and for finding out how much that is."""
    users: int = 16
    """Who ask one thing after the other while that is found out."""
    seed: int = 0
    """Of the moments at which requests are sent."""


class Answer(NamedTuple):
    """One request's."""

    status: int
    """0: the connection broke."""
    seconds: float


def bench_endpoint(load: Load, file: Path | None, progress: Progress) -> dict[str, Any]:
    """Keep an endpoint busy to see what it can do, then send requests at random moments, more and more of them.

    Requests come as from many people who know nothing of each other (a Poisson process): they do not wait for an
    answer before the next is sent, so that what is too much has to go somewhere.

    Args:
        load: What is asked for.
        file: Where the result is written too, as JSON.
        progress: Is called after every part.

    Returns:
        The setting, pictures a second at most, and for every load how many requests were drawn, refused (429) or
        failed, and the percentiles of their seconds.

    Raises:
        UserError: an argument is out of range, or no endpoint answers.
    """
    check(load, file)
    with endpoint(load, progress) as url:
        measured = asyncio.run(measure(load, url, progress))
    room = ROOM if load.url is None else {}
    result = {
        **asdict(load), "url": load.url or "builtin:tiny, started here", **room, **measured,
        "cores": os.cpu_count(), "gtl": __version__,
    }  # fmt: skip
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def check(load: Load, file: Path | None) -> None:
    """Refuse what cannot work.

    Raises:
        UserError: naming the option.
    """
    check_counts({"--steps": load.steps, "--users": load.users})
    for option, value in (("seconds", load.seconds), *(("load", one) for one in load.loads)):
        if not 0 < value < math.inf:
            raise UserError(f"--{option}: {value:g}: must be above 0")
    check_file(file)


@contextmanager
def endpoint(load: Load, progress: Progress) -> Iterator[str]:
    """URL of the endpoint that is asked; one that is started here ends with the block.

    Raises:
        UserError: it does not come up.
    """
    if load.url is not None:
        yield load.url.rstrip("/")
        return
    from serve.command import read_config, run

    up, stop, faults = threading.Event(), threading.Event(), list[BaseException]()

    def keep() -> None:
        try:
            run(config, told, stop)
        except BaseException as error:
            faults.append(error)
        finally:
            up.set()

    def told(phase: str, done: int, total: int, detail: str = "") -> None:
        progress(phase, done, total, detail)
        if phase == "ready":
            up.set()

    with tempfile.TemporaryDirectory() as registry:
        overrides = [f"registry={registry}", *(f"{key}={value}" for key, value in ROOM.items())]
        config = read_config(None, overrides)
        config = config._replace(http=config.http | {"port": free_port()})
        thread = threading.Thread(target=keep)
        thread.start()
        try:
            if not up.wait(START_S):
                raise UserError(f"the endpoint did not come up within {START_S:g} s")
            if faults:
                raise faults[0]
            yield config.url.rstrip("/")
        finally:
            stop.set()
            thread.join()


async def measure(load: Load, url: str, progress: Progress) -> dict[str, Any]:
    """The benchmark itself.

    Raises:
        UserError: no endpoint of ours answers, or it refuses what is to be asked.
    """
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None)
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, headers=headers, connector=connector) as client:
        body = {
            "prompt": "a red circle", "model": load.model or await first_base(client), "size": load.size,
            "num_inference_steps": load.steps,
        }  # fmt: skip
        await warm_up(client, body)
        capacity = await saturate(client, body, load)
        progress("busy", 1, 1, f"{capacity:.2f} pictures/s")
        rows = []
        for number, multiple in enumerate(load.loads, 1):
            rate = multiple * capacity
            answers = await send(client, body, arrivals(rate, load.seconds, random.Random(load.seed)))
            rows.append({"load": multiple, "requests_per_second": rate, **summary(answers)})
            told = f"{multiple:g} times that: {rows[-1]['drawn']} drawn, {rows[-1]['refused']} refused"
            progress("loads", number, len(load.loads), told)
    return {"model": body["model"], "pictures_per_second": capacity, "loads": rows}


async def first_base(client: aiohttp.ClientSession) -> str:
    """What the endpoint lists first.

    Raises:
        UserError: nothing answers there as an endpoint does.
    """
    import aiohttp

    try:
        async with client.get("/v1/models") as answer:
            told = await answer.json()
            return str(told["data"][0]["id"])
    except (aiohttp.ClientError, LookupError, ValueError, TypeError) as error:
        raise UserError(f"--url: no endpoint answers there: {type(error).__name__}: {error}") from None


async def warm_up(client: aiohttp.ClientSession, body: dict[str, Any]) -> None:
    """Draw one picture that does not count.

    Raises:
        UserError: the endpoint's own word on why it does not.
    """
    async with client.post(PATH, json=body) as answer:
        if answer.status != 200:
            raise UserError(f"the endpoint answers {answer.status}: {(await answer.text())[:300]}")


async def saturate(client: aiohttp.ClientSession, body: dict[str, Any], load: Load) -> float:
    """Pictures a second when there is always something to do."""
    end = time.monotonic() + load.seconds
    done: list[float] = []

    async def use() -> None:
        while time.monotonic() < end:
            answer = await ask(client, body)
            if answer.status == 200:
                done.append(time.monotonic())
            else:  # more users than it has room for
                await asyncio.sleep(0.1)

    began = time.monotonic()
    await asyncio.gather(*(use() for _ in range(load.users)))
    # Those that were still in work at the end came when there was less and less to do.
    counted = sum(one <= end for one in done)
    if not counted:
        raise UserError(f"--seconds: {load.seconds:g}: not one picture was done by then")
    return counted / (end - began)


def arrivals(rate: float, seconds: float, chance: random.Random) -> list[float]:
    """Moments of a Poisson process, in seconds from its begin."""
    moments, moment = list[float](), chance.expovariate(rate)
    while moment < seconds:
        moments.append(moment)
        moment += chance.expovariate(rate)
    return moments


async def send(client: aiohttp.ClientSession, body: dict[str, Any], moments: Sequence[float]) -> list[Answer]:
    """Send a request at every one of these moments, and wait for all answers."""
    began = time.monotonic()

    async def one(moment: float) -> Answer:
        await asyncio.sleep(moment - (time.monotonic() - began))
        return await ask(client, body)

    return list(await asyncio.gather(*(one(moment) for moment in moments)))


async def ask(client: aiohttp.ClientSession, body: dict[str, Any]) -> Answer:
    """One request to its end."""
    import aiohttp

    began = time.monotonic()
    try:
        async with client.post(PATH, json=body) as answer:
            await answer.read()
            return Answer(answer.status, time.monotonic() - began)
    except aiohttp.ClientError:
        return Answer(0, time.monotonic() - began)


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts by what became of requests, and seconds that they took."""
    drawn = [one.seconds for one in answers if one.status == 200]
    refused = [one.seconds for one in answers if one.status == 429]
    return {
        "sent": len(answers), "drawn": len(drawn), "refused": len(refused),
        "failed": len(answers) - len(drawn) - len(refused),
        "statuses": {str(status): count for status, count in sorted(Counter(a.status for a in answers).items())},
        "median_s": statistics.median(drawn) if drawn else None,
        "p99_s": percentile(drawn, 99), "worst_s": max(drawn, default=None),
        "refused_p99_s": percentile(refused, 99),
    }  # fmt: skip


def percentile(values: Sequence[float], share: int) -> float | None:
    """The smallest value that so many of 100 do not exceed (nearest rank); None of none."""
    return float(np.percentile(values, share, method="inverted_cdf")) if values else None


def table(result: dict[str, Any]) -> str:
    """A result for reading."""
    capacity = result["pictures_per_second"]
    lines = [
        f"{result['model']}, {result['size']}, {result['steps']} steps, at {result['url']}; {result['cores']} cores",
        f"busy: {capacity:.2f} pictures/s ({result['users']} users, one request after the other)",
    ]
    if "max_waiting" in result:
        room = result["max_running"] + result["max_waiting"]
        lines.append(f"its whole queue, {room} pictures, is {room / capacity:.1f} s of work")
    for row in result["loads"]:
        over = max(0.0, row["load"] - 1) * result["seconds"]
        late = f"; taken in without end, the last would wait {over:.0f} s" if over else ""
        lines.append(
            f"{row['load']:g} times: {row['sent']} sent, {row['drawn']} drawn (median {seconds(row['median_s'])}, "
            f"p99 {seconds(row['p99_s'])}), {row['refused']} refused with 429 (p99 {seconds(row['refused_p99_s'])}), "
            f"{row['failed']} failed{late}"
        )
    return "\n".join(lines)


def seconds(value: float | None) -> str:
    """For reading."""
    return "-" if value is None else f"{value:.2f} s"
