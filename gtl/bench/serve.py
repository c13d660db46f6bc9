"""`gtl bench serve`: many adapters in a batch, beside one merged into the weights, one in a slot, and swapping."""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from gtl import __version__
from gtl.bench.configs import BUILTIN, MODELS
from gtl.bench.setting import check_counts, check_file
from gtl.bench.train import device_name, device_of, dtype_on
from gtl.config.tuners import LoraTargets
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    import torch

    from gtl.bench.configs import Config
    from gtl.bench.drawing import Seconds

BARS = {"merged": 0.8, "single": 0.95, "swapping": 2.0}
"""How many times as fast as these a mixed batch is to be at least."""
JOIN_BAR = 2.0
"""Steps until a request that joins has done its first one, at most."""
JOINS = 4
"""Requests that join, a round."""


@dataclass(frozen=True)
class Serving:
    """What is drawn, and how."""

    model: str = "small"
    """In `gtl.bench.configs.MODELS`, or builtin:tiny."""
    adapters: int = 8
    """LoRAs of the main part with random weights; requests take them in turn."""
    requests: int = 16
    """Pictures of a round."""
    batch: int = 16
    """Pictures of the engine's steps at most."""
    rank: int = 16
    """Of the adapters."""
    targets: str = "attention"
    """Layers that have adapters, as a recipe's `tuner.targets` names them."""
    steps: int = 10
    """Of a picture."""
    rounds: int = 5
    """How often all take turns; the median counts."""
    size: int | None = None
    """Height and width in pixels; None: what the model was made for."""


def bench_serve(serving: Serving, file: Path | None, progress: Progress) -> dict[str, Any]:
    """Draw the same requests in four ways, in turn, and let requests join a batch.

    Encoding of prompts, decoding of pictures and reading of adapters that are to be in slots are not part of it.

    Args:
        serving: What is drawn.
        file: Where the result is written too, as JSON.
        progress: Is called after every round.

    Returns:
        The setting, pictures a second of every arm, their ratios, and what it ran on.

    Raises:
        UserError: an argument is out of range.
    """
    check(serving, file)
    progress("model", 0, 0, serving.model)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(serving, Path(folder), device_of(0), progress)
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def check(serving: Serving, file: Path | None) -> None:
    """Refuse what cannot work.

    Raises:
        UserError: naming the option.
    """
    models = (*MODELS, f"{BUILTIN}tiny")
    for option, value, known in (
        ("--model", serving.model, models),
        ("--targets", serving.targets, get_args(LoraTargets)),
    ):
        if value not in known:
            raise UserError(f"{option}: {value!r}: choose from {', '.join(known)}")
    check_counts({f"--{option}": getattr(serving, option) for option in ("adapters", "rank", "steps", "rounds")})
    for option in ("requests", "batch"):
        if (count := getattr(serving, option)) < 2:
            raise UserError(f"--{option}: {count}: must be 2 or more, so that one can join another")
    check_file(file)


def measure(
    serving: Serving, folder: Path, device: torch.device, progress: Progress,
    overrides: Mapping[str, Config] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The benchmark itself, in an empty folder; see `gtl.bench.models.write_model` for `overrides`."""
    import torch

    from gtl.bench.drawing import Arms
    from gtl.train.loop import peak_memory

    load = os.getloadavg()[0]
    arms = Arms(serving, folder, device, overrides)
    rounds: list[dict[str, Seconds]] = []
    joins, loading, rng = list[list[float]](), list[float](), random.Random(0)
    for done in range(serving.rounds + 1):  # the first is none: first passes are slower
        before = arms.swapping.loading
        taken = {arm: arms.draw(arm) for arm in ("mixed", "merged", "single")}
        taken["swapping"] = arms.swap(serving.requests if done else 1)
        taken["decoding"] = arms.decode()
        waits = arms.join(JOINS if done else 1, rng)
        if done:
            rounds.append(taken)
            joins.append(waits)
            loading.append(arms.swapping.loading - before)
            shown = ", ".join(f"{name} {taken[name].clock / taken['mixed'].clock:.2f}" for name in BARS)
            progress("rounds", done, serving.rounds, f"as fast as {shown}; joined in {max(waits):.2f} steps")
    return {
        **asdict(serving), "resolution": list(arms.size),
        **summary(serving.requests, rounds, joins, loading),
        "peak_memory_bytes": peak_memory(device), "dtype": dtype_on(device), "device": device_name(device),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load_average": load, "torch": torch.__version__,
        "gtl": __version__,
    }  # fmt: skip


def summary(
    requests: int, rounds: Sequence[Mapping[str, Seconds]], joins: Sequence[Sequence[float]], loading: Sequence[float]
) -> dict[str, Any]:
    """Medians over rounds.

    Args:
        requests: Pictures of a round.
        rounds: What every arm took, and decoding.
        joins: Steps that requests waited, by round.
        loading: Seconds of swapping that went into putting adapters on and off, by round.
    """
    waits = [wait for one in joins for wait in one]
    return {
        "pictures_per_second": {
            name: requests / statistics.median(one[name].clock for one in rounds) for name in rounds[0]
        },
        "mixed_to": {
            name: {
                "ratios": (ratios := [one[name].clock / one["mixed"].clock for one in rounds]),
                "median": statistics.median(ratios),
                "processor": statistics.median(one[name].processor / one["mixed"].processor for one in rounds),
                "bar": bar,
            }
            for name, bar in BARS.items()
        },
        "loading_share": statistics.median(
            seconds / one["swapping"].clock for seconds, one in zip(loading, rounds, strict=True)
        ),
        "join": {"steps": waits, "median": statistics.median(waits), "worst": max(waits), "bar": JOIN_BAR},
    }


def table(result: dict[str, Any]) -> str:
    """A result for reading."""
    height, width = result["resolution"]
    speeds = result["pictures_per_second"]
    rows = {
        "model": f"{result['model']}, {width}x{height}, {result['dtype']}, {result['steps']} steps",
        "requests": f"{result['requests']} over {result['adapters']} LoRAs of rank {result['rank']} on "
                    f"{result['targets']}, at most {result['batch']} in a step",
        "hardware": f"{result['device']}, {result['cores']} cores, {result['threads']} threads, "
                    f"load {result['load_average']:.2f} before",
        "mixed": f"{speeds['mixed']:.3g} pictures/s; decoding, which is not part of it, {speeds['decoding']:.3g}",
    }  # fmt: skip
    for name, found in result["mixed_to"].items():
        ratios = " ".join(f"{ratio:.2f}" for ratio in found["ratios"])
        processor = "" if result["dtype"] != "fp32" else f", by processor time {found['processor']:.2f}"
        rows[name] = (
            f"{speeds[name]:.3g} pictures/s; mixed is {found['median']:.2f} times as fast, median of {ratios}"
            f"{processor}; the bar is {found['bar']}"
        )
    rows["swapping"] += f"; {result['loading_share']:.0%} of its time are changes of adapters"
    join = result["join"]
    rows["join"] = (
        f"{join['median']:.2f} steps until the first one is done, {join['worst']:.2f} at most of {len(join['steps'])}; "
        f"the bar is {join['bar']}"
    )
    rows["memory"] = f"{result['peak_memory_bytes'] / 2**20:.0f} MiB at most, all of them together"
    rows["software"] = f"gtl {result['gtl']}, torch {result['torch']}"
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items())
