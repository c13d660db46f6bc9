import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import share
from serve.errors import ApiError
from serve.share import FairShare


class Crowd:
    """Requests on a real event loop that come, enter, and leave when they are told to."""

    def __init__(self, shared: FairShare) -> None:
        self.shared = shared
        self.entered: list[int] = []
        self.refused: list[int] = []
        self.most = 0
        self._inside = 0
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self._leave: dict[int, asyncio.Event] = {}

    def come(self, key: str) -> int:
        number = len(self.tasks)
        self._leave[number] = asyncio.Event()
        self.tasks[number] = asyncio.get_running_loop().create_task(self._request(number, key))
        return number

    async def _request(self, number: int, key: str) -> None:
        try:
            async with self.shared.place(key):
                self.entered.append(number)
                self._inside += 1
                self.most = max(self.most, self._inside)
                try:
                    await self._leave[number].wait()
                finally:
                    self._inside -= 1
        except ApiError as error:
            assert error.code == "overloaded"
            self.refused.append(number)

    def leave(self, number: int) -> None:
        self._leave[number].set()

    async def settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)


class Reference:
    """The same, slowly and without a loop."""

    def __init__(self, places: int, waiting: int) -> None:
        self.places, self.waiting = places, waiting
        self.in_work: dict[int, str] = {}
        self.queue: dict[int, str] = {}
        self.entered: list[int] = []
        self.refused: list[int] = []

    def come(self, number: int, key: str) -> None:
        if len(self.in_work) < self.places:
            self.enter(number, key)
        elif len(self.queue) >= self.waiting:
            self.refused.append(number)
        else:
            self.queue[number] = key
        self.keys = {**getattr(self, "keys", {}), number: key}

    def enter(self, number: int, key: str) -> None:
        self.in_work[number] = key
        self.entered.append(number)
        self.turns = [*getattr(self, "turns", []), key]

    def leave(self, number: int) -> None:
        """Whoever it is, in work or waiting."""
        self.queue.pop(number, None)
        if self.in_work.pop(number, None) is None:
            return
        while self.queue and len(self.in_work) < self.places:
            fewest = min(list(self.in_work.values()).count(key) for key in self.queue.values())
            able = [n for n, key in self.queue.items() if list(self.in_work.values()).count(key) == fewest]
            last = {n: max((i for i, k in enumerate(self.turns) if k == self.queue[n]), default=-1) for n in able}
            number = next(n for n in able if last[n] == min(last.values()))
            self.enter(number, self.queue.pop(number))


ACTS = st.lists(st.tuples(st.sampled_from("ccclxbB"), st.integers(0, 9), st.integers(0, 2)), max_size=60)


@settings(deadline=None, max_examples=200)
@given(places=st.integers(1, 4), waiting=st.integers(0, 8), acts=ACTS)
def test_every_place_goes_to_whom_it_should(places: int, waiting: int, acts: list[tuple[str, int, int]]) -> None:
    """c: somebody comes. l: one in work leaves. x: one of all gives up. b: one leaves, and in the same moment the one
    whose turn it then is gives up. B: the other way round: one that waits gives up just before a place is free."""

    async def run() -> None:
        crowd, reference = Crowd(FairShare(places, waiting)), Reference(places, waiting)
        for act, which, key in acts:
            in_work, queue = list(reference.in_work), list(reference.queue)
            if act == "c":
                reference.come(crowd.come(f"k{key}"), f"k{key}")
            elif act == "l" and in_work:
                crowd.leave(in_work[which % len(in_work)])
                reference.leave(in_work[which % len(in_work)])
            elif act == "x" and in_work + queue:
                number = (in_work + queue)[which % len(in_work + queue)]
                crowd.tasks[number].cancel()
                reference.leave(number)
            elif act == "b" and in_work and queue:
                leaver = in_work[which % len(in_work)]
                entered = len(reference.entered)
                reference.leave(leaver)
                (called,) = reference.entered[entered:]
                crowd.tasks[leaver].cancel()
                await asyncio.sleep(0)  # the leaver runs and calls the next, who has yet to run
                crowd.tasks[called].cancel()
                reference.leave(called)
                reference.entered.remove(called)  # never got in
            elif act == "B" and in_work and queue:
                quitter, leaver = queue[which % len(queue)], in_work[which % len(in_work)]
                crowd.tasks[leaver].cancel()
                crowd.tasks[quitter].cancel()
                reference.leave(quitter)
                reference.leave(leaver)
            await crowd.settle()
            assert crowd.entered == reference.entered
            assert crowd.refused == reference.refused
            assert (crowd.shared.num_in_work, crowd.shared.num_waiting) == (
                len(reference.in_work), len(reference.queue),
            )  # fmt: skip
        assert crowd.most <= places
        for task in crowd.tasks.values():
            task.cancel()
        await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
        assert (crowd.shared.num_in_work, crowd.shared.num_waiting, crowd.shared._in_work) == (0, 0, {})

    asyncio.run(run())


def on_a_loop(test: Callable[[], object]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def test_who_floods_the_queue_makes_nobody_else_wait() -> None:
    async def run() -> None:
        crowd = Crowd(FairShare(places=1, waiting=100))
        flood = [crowd.come("flood") for _ in range(50)]
        other, third = crowd.come("other"), crowd.come("third")
        second = crowd.come("other")
        for _ in range(5):
            await crowd.settle()
            crowd.leave(crowd.entered[-1])
        await crowd.settle()
        assert crowd.entered == [flood[0], other, third, flood[1], second, flood[2]]
        for task in crowd.tasks.values():
            task.cancel()

    on_a_loop(run)


def test_a_key_may_have_all_places_while_nobody_else_asks() -> None:
    async def run() -> None:
        crowd = Crowd(FairShare(places=3, waiting=4))
        mine = [crowd.come("a") for _ in range(5)]
        yours = crowd.come("b")
        await crowd.settle()
        assert crowd.entered == mine[:3]
        crowd.leave(mine[0])
        await crowd.settle()
        assert crowd.entered[-1] == yours
        crowd.leave(mine[1])
        await crowd.settle()
        assert crowd.entered[-1] == mine[3]
        for task in crowd.tasks.values():
            task.cancel()

    on_a_loop(run)


def test_fewest_in_work_comes_before_the_longest_wait() -> None:
    async def run() -> None:
        crowd = Crowd(FairShare(places=3, waiting=4))
        crowd.come("a"), crowd.come("a")
        b = crowd.come("b")
        crowd.come("a")  # came before the next one, and its key's last turn is longer ago
        more = crowd.come("b")
        await crowd.settle()
        crowd.leave(b)
        await crowd.settle()
        assert crowd.entered[-1] == more
        for task in crowd.tasks.values():
            task.cancel()

    on_a_loop(run)


def test_an_error_inside_gives_the_place_back() -> None:
    async def run() -> None:
        shared = FairShare(places=1, waiting=0)
        for _ in range(3):
            with pytest.raises(KeyError):
                async with shared.place("a"):
                    raise KeyError
        assert shared.num_in_work == 0

    on_a_loop(run)


def test_beyond_the_queue_one_is_told_how_long() -> None:
    now = 0.0

    async def run() -> None:
        nonlocal now
        shared = FairShare(places=2, waiting=1, clock=lambda: now)
        for _ in range(200):
            async with shared.place("a"):
                now += 30
        crowd = Crowd(shared)
        for _ in range(3):
            crowd.come("a")
        await crowd.settle()
        with pytest.raises(ApiError) as caught:
            await shared.place("b").__aenter__()
        assert (caught.value.status_code, caught.value.code) == (429, "overloaded")
        assert caught.value.headers == {"Retry-After": "30"}  # two before it, 30 s each, in two places
        for task in crowd.tasks.values():
            task.cancel()

    on_a_loop(run)


def test_keys_that_are_gone_are_forgotten() -> None:
    async def run() -> None:
        shared = FairShare(places=2, waiting=0)
        async with shared.place("stays"):
            for i in range(3 * share.REMEMBERED):
                async with shared.place(f"k{i}"):
                    pass
            assert len(shared._last_turn) <= share.REMEMBERED + 1
            assert "stays" in shared._last_turn
            assert shared._in_work == {"stays": 1}

    on_a_loop(run)
