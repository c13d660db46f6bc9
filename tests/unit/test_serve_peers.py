"""Work that many ask for at once: done for all of them together, and never for one who came after it had begun."""

import asyncio

from serve.peers import Together


def test_a_crowd_costs_two_turns_and_each_is_told_of_a_turn_that_began_after_it_came() -> None:
    async def run() -> None:
        begun, running, may = 0, 0, asyncio.Event()

        async def work() -> int:
            nonlocal begun, running
            begun, running = begun + 1, running + 1
            assert running == 1
            number = begun
            await may.wait()
            running -= 1
            return number

        together = Together(work)
        first = [asyncio.ensure_future(together()) for _ in range(3)]
        await asyncio.sleep(0.01)
        later = [asyncio.ensure_future(together()) for _ in range(50)]
        await asyncio.sleep(0.01)
        assert begun == 1
        later[0].cancel()  # one who leaves takes nothing from the others
        may.set()
        assert await asyncio.gather(*first) == [1] * 3
        assert await asyncio.gather(*later[1:]) == [2] * 49
        assert await together() == 3

    asyncio.run(run())


def test_a_fault_is_told_to_all_and_the_next_turn_is_a_turn() -> None:
    async def run() -> None:
        faults = [ValueError("once")]

        async def work() -> str:
            if faults:
                raise faults.pop()
            return "done"

        together = Together(work)
        told = await asyncio.gather(together(), together(), return_exceptions=True)
        assert [str(one) for one in told] == ["once"] * 2
        assert await together() == "done"

    asyncio.run(run())
