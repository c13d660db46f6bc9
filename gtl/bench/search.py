"""`gtl bench search`: trials of a study one by one and several in a forward pass, on one machine in one run."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gtl import __version__
from gtl.bench.models import write_dataset, write_model
from gtl.bench.setting import Setting, settle
from gtl.bench.train import IMAGES, WARM_UP, device_name, device_of, dtype_on, synchronize
from gtl.config import parse_recipe
from gtl.storage import Store
from gtl.train.group import process_group
from gtl.train.job import Job
from gtl.types import Progress, UserError

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RANKS = (4, 8, 16, 32)
"""What trials differ in, in turn."""
STEPS = 500
"""Of a trial, by which trials an hour are reckoned."""


def bench_search(setting: Setting, counts: Sequence[int], file: Path | None, progress: Progress) -> dict[str, Any]:
    """Time rounds of optimizer steps of one trial alone under gtl's loop, and of several in a pack.

    Loading, looks and saves are not part of it.

    Args:
        setting: What is trained and how; it says nothing of a bare loop.
        counts: Trials in a pack, one measurement after the other.
        file: Where the result is written too, as JSON.
        progress: Is called after every round.

    Returns:
        The setting, trials an hour alone and in packs, and what it ran on.

    Raises:
        UserError: an argument is out of range.
    """
    setting = settle(setting, file)
    if setting.tuner != "lora":
        raise UserError(f"--tuner: {setting.tuner}: trials of a pack are of LoRA; take lora")
    if not counts or min(counts) < 2:
        raise UserError(f"--pack: {list(counts)}: each must be 2 or more")
    progress("model", 0, 0, setting.model)
    device = device_of(0)
    with tempfile.TemporaryDirectory() as folder, process_group(folder, device):
        result = measure(setting, counts, folder, device, progress)
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def measure(setting: Setting, counts: Sequence[int], folder: str, device: Any, progress: Progress) -> dict[str, Any]:
    """The benchmark itself, in an empty folder. The process group stands already."""
    import torch

    from gtl.bench.loops import Ours
    from gtl.train.loop import peak_memory
    from gtl.train.pack import Pack
    from gtl.train.track import Tracker

    dtype, load = dtype_on(device), os.getloadavg()[0]
    family = write_model(Path(folder, "model"), setting.model, dtype)
    dataset = write_dataset(Store(Path(folder, "cache")), family, IMAGES, dtype)
    dataset.save()
    jobs = list(trials(setting, folder, dataset.fingerprint, dtype, max(counts)))
    packs = {}
    for count in counts:
        packs[count] = pack = Pack(jobs[0], device, count, max(RANKS))
        for job in jobs[:count]:
            pack.join(replace(job, version=f"packed-{count}"), lambda row: None)
    alone_seconds, packed_seconds = [], {count: list[float]() for count in counts}

    def timed(step: Any) -> float:
        begun = time.perf_counter()
        step()
        synchronize(device)
        return time.perf_counter() - begun

    with Tracker(Store(Path(folder, "run"))) as tracker:
        alone = Ours(setting.recipe(folder), dataset, device, dtype, tracker)
        alone(WARM_UP)
        for pack in packs.values():
            steps_of(pack, WARM_UP)
        for done in range(1, setting.rounds + 1):
            alone_seconds.append(timed(lambda: alone(setting.steps)))
            for count, pack in packs.items():
                packed_seconds[count].append(timed(lambda pack=pack: steps_of(pack, setting.steps)))
            shown = ", ".join(f"{c}: {c * alone_seconds[-1] / packed_seconds[c][-1]:.2f}" for c in counts)
            progress("rounds", done, setting.rounds, f"times the trials an hour: {shown}")
    ratios = {
        count: [count * one / all_ for one, all_ in zip(alone_seconds, packed_seconds[count], strict=True)]
        for count in counts
    }

    def hourly(count: int, seconds: Sequence[float]) -> float:
        return 3600 * count * setting.steps / (statistics.median(seconds) * STEPS)

    return {
        **asdict(setting), "resolution": list(family.default_size), "trial_steps": STEPS,
        "alone_trials_per_hour": hourly(1, alone_seconds),
        "packs": {
            str(count): {
                "trials_per_hour": hourly(count, packed_seconds[count]), "ratios": ratios[count],
                "median_ratio": statistics.median(ratios[count]),
            }
            for count in counts
        },
        "peak_memory_bytes": peak_memory(device), "dtype": dtype, "device": device_name(device),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load_average": load, "torch": torch.__version__,
        "gtl": __version__,
    }  # fmt: skip


def trials(setting: Setting, folder: str, dataset: str, dtype: str, number: int) -> Iterator[Job]:
    """Runs that differ in rate and rank, and look at nothing."""
    values = setting.recipe(folder).model_dump(mode="json")
    values["train"]["steps"], values["train"]["epochs"] = 1_000_000, None
    values["evaluate"] |= {"every": 1_000_000, "prompts": []}
    values["train"]["checkpoints"]["every"] = 1_000_000
    for turn in range(number):
        tuner = {**values["tuner"], "rank": RANKS[turn % len(RANKS)]}
        train = {**values["train"], "learning_rate": RATES[turn % len(RATES)]}
        recipe = parse_recipe({**values, "tuner": tuner, "train": train})
        yield Job(recipe.model_dump(mode="json"), f"trial{turn}", "v", dataset, "random", dtype)


def steps_of(pack: Any, steps: int) -> None:
    """Make steps of all members.

    Raises:
        Exception: what one of them met.
    """
    for _ in range(steps):
        for member in pack.step():
            raise member.error or RuntimeError("a trial ended early")


def table(result: dict[str, Any]) -> str:
    """A result for reading."""
    height, width = result["resolution"]
    rows = {
        "model": f"{result['model']}, {width}x{height}, {result['dtype']}, LoRA of ranks "
                 f"{', '.join(map(str, RANKS))} in turn, batch {result['batch_size']}",
        "hardware": f"{result['device']}, {result['cores']} cores, {result['threads']} threads, "
                    f"load {result['load_average']:.2f} before",
        "one by one": f"{result['alone_trials_per_hour']:.2f} trials of {result['trial_steps']} steps an hour",
    }  # fmt: skip
    for count, pack in result["packs"].items():
        ratios = " ".join(f"{ratio:.2f}" for ratio in pack["ratios"])
        rows[f"{count} in a pass"] = (
            f"{pack['trials_per_hour']:.2f} an hour, {pack['median_ratio']:.2f} times as many, median of {ratios} "
            f"({result['steps']} steps each)"
        )
    rows["memory"] = f"{result['peak_memory_bytes'] / 2**20:.0f} MiB at most, all of them together"
    rows["software"] = f"gtl {result['gtl']}, torch {result['torch']}"
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items())
