"""Requests of many threads on one engine: each has its picture or its reason, and exactly one of the two."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from gtl.families import open_family
from gtl.generate.images import generate
from gtl.generate.loop import Closed, Course, EngineLoop, Late
from gtl.generate.request import Request
from gtl.types import UserError
from tests.tiny import make_sd
from tests.unit.test_residents import folders, make_engine  # noqa: F401  (a fixture)
from tests.waiting import eventually

DOG = Request("a photo of a dog", 64, 64, seed=3, steps=4, guidance=5.0)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def loop(sd: Path) -> Iterator[EngineLoop]:
    loop = EngineLoop(make_engine(sd, max_batch=3))
    yield loop
    loop.close()


@dataclass
class Told:
    """A listener that remembers."""

    previews: list[int] = field(default_factory=list)
    picture: Image.Image | None = None
    course: Course | None = None
    errors: list[Exception] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def preview(self, number: int, image: Image.Image) -> None:
        assert not self.over.is_set()
        self.previews.append(number)

    def finish(self, image: Image.Image, course: Course) -> None:
        assert not self.over.is_set()
        self.picture, self.course = image, course
        self.over.set()

    def fail(self, error: Exception) -> None:
        assert not self.over.is_set()
        self.errors.append(error)
        self.over.set()

    def wait(self) -> Image.Image:
        assert self.over.wait(60)
        assert not self.errors and self.picture is not None
        return self.picture


def same(one: Image.Image, other: Image.Image) -> bool:
    """Up to one of 255 in a channel: sums of batches of other sizes are rounded in another order."""
    return max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1


def assert_in_time(event: threading.Event) -> None:
    assert event.wait(60)


def test_everyone_of_a_crowd_gets_the_own_picture(loop: EngineLoop, sd: Path, folders: dict[str, Path]) -> None:  # noqa: F811
    kinds = [
        (),
        ((folders["a"], 1.0),),
        ((folders["words"], 0.6),),
        ((folders["delta"], 1.0),),
        ((folders["dora"], 1.0),),
    ]
    asked = [(replace(DOG, seed=seed, steps=3 + seed % 3), kinds[seed % 5]) for seed in range(15)]
    told = [Told() for _ in asked]
    all_are_there = threading.Event()
    loop.engine.parts["unet"].register_forward_pre_hook(lambda module, args: assert_in_time(all_are_there))
    loop.submit(asked[0][0], told[0], asked[0][1])
    with ThreadPoolExecutor(5) as pool:
        rest = list(zip(asked, told, strict=True))[1:]
        list(pool.map(lambda item: loop.submit(item[0][0], item[1], item[0][1]), rest))
    assert eventually(lambda: len(loop._waiting) == len(rest))
    with loop._wake:  # those of an adapter after each other: else who comes first decides how often it is loaded
        loop._waiting = deque(sorted(loop._waiting, key=lambda ticket: (ticket.request.seed % 5, ticket.request.seed)))
    all_are_there.set()
    pictures = [each.wait() for each in told]
    for (request, adapters), picture in zip(asked, pictures, strict=True):
        ((_, expected),) = generate(open_family(str(sd)), [request], adapters)
        assert same(picture, expected)
    assert loop.load() == (0, 0, 0.0)
    assert max(step.rows for step in loop.steps) == 3
    courses = [each.course for each in told if each.course is not None]
    assert len(courses) == 15 and 4 <= sum(not course.was_there for course in courses) <= 6
    assert all(1 <= course.batch <= 3 and course.step_s > 0 and course.waited_s > 0 for course in courses)


def test_previews_come_in_their_order(loop: EngineLoop) -> None:
    told = Told()
    loop.submit(replace(DOG, steps=8), told, previews=3)
    told.wait()
    assert told.previews == [0, 1, 2]
    told = Told()
    loop.submit(replace(DOG, steps=1), told, previews=3)
    told.wait()
    assert told.previews == [], "there is nothing between"


def test_who_is_cancelled_is_told_nothing(loop: EngineLoop) -> None:
    kept, dropped = Told(), Told()
    ticket = loop.submit(replace(DOG, steps=500), dropped)
    loop.submit(DOG, kept)
    loop.cancel(ticket)
    kept.wait()
    deadline = time.monotonic() + 10
    while loop.load().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loop.load() == (0, 0, 0.0)
    assert not dropped.over.is_set()


def test_who_is_late_is_told_so(loop: EngineLoop) -> None:
    late, on_time = Told(), Told()
    loop.submit(replace(DOG, steps=900), late, timeout=0.5)
    loop.submit(DOG, on_time, timeout=60)
    on_time.wait()
    assert late.over.wait(60) and isinstance(late.errors[0], Late)


def test_a_pass_of_its_own_is_not_put_off_by_those_that_came_later(loop: EngineLoop, folders: dict[str, Path]) -> None:  # noqa: F811
    """They would have it for as long as they come."""
    order: list[str] = []

    @dataclass
    class Noting(Told):
        name: str = ""

        def finish(self, image: Image.Image, course: Course) -> None:
            order.append(self.name)
            super().finish(image, course)

    dora, delta = ((folders["dora"], 1.0),), ((folders["delta"], 1.0),)
    long = replace(DOG, steps=60)
    tolds = [Noting(name=name) for name in ("first", "other", "later", "last")]
    loop.submit(long, tolds[0], dora)
    assert eventually(lambda: len(loop._running) == 1, 30, 0.001)
    loop.submit(long, tolds[1], delta)
    assert eventually(lambda: len(loop._waiting) == 1, 30, 0.001)
    for told in tolds[2:]:
        loop.submit(long, told, dora)
    for told in tolds:
        told.wait()
    assert order.index("other") < min(order.index("later"), order.index("last")), order


def test_mistakes_are_told(loop: EngineLoop, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="steps: 0"):
        loop.submit(replace(DOG, steps=0), Told())
    told = Told()
    loop.submit(DOG, told, ((tmp_path, 1.0),))
    assert told.over.wait(60) and "no adapter in it" in str(told.errors[0])
    assert loop.load() == (0, 0, 0.0)


def test_what_breaks_a_step_fails_those_in_it_and_nobody_after(loop: EngineLoop) -> None:
    unet = loop.engine.parts["unet"]
    hook = unet.register_forward_pre_hook(lambda module, args: 1 / 0)
    told = [Told(), Told()]
    for each in told:
        loop.submit(DOG, each)
        assert each.over.wait(60) and isinstance(each.errors[0], ZeroDivisionError)
    hook.remove()
    after = Told()
    loop.submit(DOG, after)
    after.wait()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_loop_leaves_nobody_waiting(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_sweep", lambda: 1 / 0)
    told = Told()
    loop.submit(DOG, told)
    assert told.over.wait(60) and isinstance(told.errors[0], ZeroDivisionError)
    with pytest.raises(Closed):
        loop.submit(DOG, Told())
    loop.close()
    assert not loop.is_alive()


def test_less_memory_means_smaller_batches(loop: EngineLoop, sd: Path) -> None:
    def refuse(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("too many rows")

    loop.engine.parts["unet"].register_forward_pre_hook(refuse)
    told = [Told() for _ in range(3)]
    for seed, each in enumerate(told):
        loop.submit(replace(DOG, seed=seed), each)
    for seed, each in enumerate(told):
        ((_, expected),) = generate(open_family(str(sd)), [replace(DOG, seed=seed)])
        assert same(each.wait(), expected)
    assert loop.engine.max_batch == 1


def test_a_picture_that_is_too_large_by_itself_fails_alone(loop: EngineLoop, sd: Path) -> None:
    def refuse(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[-1] > DOG.width // 2:
            raise torch.OutOfMemoryError("too many pixels")

    most = loop.engine.max_batch
    loop.engine.parts["unet"].register_forward_pre_hook(refuse)
    large, small = Told(), [Told() for _ in range(3)]
    for seed, each in enumerate(small):
        loop.submit(replace(DOG, seed=seed), each)
    loop.submit(replace(DOG, width=DOG.width * 16), large)
    for seed, each in enumerate(small):
        ((_, expected),) = generate(open_family(str(sd)), [replace(DOG, seed=seed)])
        assert same(each.wait(), expected)
    assert large.over.wait(60) and isinstance(large.errors[0], torch.OutOfMemoryError)
    assert loop.engine.max_batch == most, "nothing is wrong with its batches"


def test_a_picture_that_is_nan_is_refused(loop: EngineLoop, folders: dict[str, Path]) -> None:  # noqa: F811
    told = Told()
    loop.submit(DOG, told, ((folders["a"], 1e38),))
    assert told.over.wait(60) and "draws NaN" in str(told.errors[0])


def test_the_end_lets_finish_who_is_through_in_time(sd: Path) -> None:
    loop = EngineLoop(make_engine(sd, max_batch=1))
    short, long = Told(), Told()
    loop.submit(DOG, short)
    loop.submit(replace(DOG, steps=900), long)
    loop.close(timeout=3)
    assert short.picture is not None
    assert isinstance(long.errors[0], Closed)
    with pytest.raises(Closed):
        loop.submit(DOG, Told())
