"""`gtl bench train`: this loop beside a bare PyTorch loop; same model, data and optimizer, in one process."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl import __version__
from gtl.bench.models import UNETS, write_dataset, write_model
from gtl.config import Recipe, parse_recipe
from gtl.storage import Store
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    import torch

IMAGES = 64
"""In the data set."""
WARM_UP = 3
"""Steps of each loop before the clock runs."""


def bench_train(
    model: str, batch_size: int, steps: int, rounds: int, file: Path | None, progress: Progress
) -> dict[str, Any]:
    """Time rounds of `steps` optimizer steps, in turn with gtl's loop and a bare one; LoRA rank 16, ZeRO-0.

    Args:
        model: A name in `gtl.bench.models.UNETS`.
        batch_size: Images per step.
        steps: Optimizer steps of each loop in a round.
        rounds: How often the loops take turns.
        file: Where the result is written too, as JSON.
        progress: Is called after every round.

    Returns:
        Images per second of both (medians over rounds), the ratio of their times round by round, the share of gtl's
        time that waited for data, the mean losses of the last round, and what it ran on.

    Raises:
        UserError: an argument is out of range.
    """
    check(model, file, {"--batch-size": batch_size, "--steps": steps, "--rounds": rounds})
    progress("model", 0, 0, model)
    result = measure(model, batch_size, steps, rounds, progress)
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def check(model: str, file: Path | None, counts: dict[str, int]) -> None:
    """Refuse arguments that can't work.

    Raises:
        UserError: naming the option.
    """
    if model not in UNETS:
        raise UserError(f"--model: {model!r}: choose from {', '.join(UNETS)}")
    for option, count in counts.items():
        if count < 1:
            raise UserError(f"{option}: {count}: must be 1 or more")
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"--json: {file}: its folder does not exist")


def measure(model: str, batch_size: int, steps: int, rounds: int, progress: Progress) -> dict[str, Any]:
    """The benchmark itself, on arguments that are right."""
    import torch

    from gtl.bench.loops import Bare, Ours
    from gtl.train.loop import peak_memory
    from gtl.train.track import Tracker

    device = device_of(0)
    dtype = "bf16" if device.type == "cuda" else "fp32"
    load, taken = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as folder, process_group(folder, device):
        family = write_model(Path(folder, "model"), model)
        dataset = write_dataset(Store(Path(folder, "cache")), family, IMAGES)
        recipe = make_recipe(folder, batch_size)
        with Tracker(Store(Path(folder, "run"))) as tracker:
            ours, bare = Ours(recipe, dataset, device, dtype, tracker), Bare(recipe, dataset, device, dtype)
            ours(WARM_UP), bare(WARM_UP)
            for done in range(1, rounds + 1):
                first, second = timed(ours, steps, device), timed(bare, steps, device)
                taken.append(Round(*first, *second, ours.data_wait))
                progress("rounds", done, rounds, f"gtl / bare {taken[-1].ratio:.3f}")
        memory = peak_memory(device)
    return {
        "model": model, "resolution": list(family.default_size), "batch_size": batch_size, "steps": steps,
        "rounds": rounds, **summary(taken, batch_size * steps), "peak_memory_bytes": memory, "dtype": dtype,
        "device": device_name(device), "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "load_average": load, "torch": torch.__version__, "gtl": __version__,
    }  # fmt: skip


class Round(NamedTuple):
    """What one round of both loops came to."""

    gtl_seconds: float
    gtl_loss: float
    bare_seconds: float
    bare_loss: float
    data_wait: float

    @property
    def ratio(self) -> float:
        """Of the times; above 1 the bare loop is faster."""
        return self.gtl_seconds / self.bare_seconds


def summary(rounds: Sequence[Round], images: int) -> dict[str, Any]:
    """The figures of rounds of so many images each."""
    return {
        "gtl_images_per_second": images / statistics.median(r.gtl_seconds for r in rounds),
        "bare_images_per_second": images / statistics.median(r.bare_seconds for r in rounds),
        "ratios": [r.ratio for r in rounds],
        "median_ratio": statistics.median(r.ratio for r in rounds),
        "data_wait": statistics.median(r.data_wait for r in rounds),
        "gtl_loss": rounds[-1].gtl_loss,
        "bare_loss": rounds[-1].bare_loss,
    }


def timed(loop: Callable[[int], list[float]], steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds that a loop takes for its steps, and their mean loss."""
    import torch

    begun = time.perf_counter()
    losses = loop(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun, statistics.fmean(losses)


@contextmanager
def process_group(folder: str, device: torch.device, rank: int = 0, world: int = 1) -> Iterator[None]:
    """The group of a run's workers, which meet in a folder; of this process alone when there is one."""
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=Path(folder, "rendezvous").as_uri(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def device_of(rank: int) -> torch.device:
    """A GPU of its own where there are any."""
    import torch

    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def make_recipe(folder: str, batch_size: int, stage: int = 0) -> Recipe:
    """LoRA of rank 16 in the attention, one micro-batch a step; everything else as it is by default."""
    return parse_recipe(
        {
            "model": {"source": f"{folder}/model"},
            "tuner": {"type": "lora", "rank": 16, "targets": "attention"},
            "data": {"source": f"{folder}/images"},
            "train": {"batch_size": batch_size, "micro_batch": batch_size, "zero": {"stage": stage}},
            "storage": {place: f"{folder}/{place}" for place in ("runs", "cache", "registry")},
        }
    )


def device_name(device: torch.device) -> str:
    """The hardware, as it calls itself."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(result: dict[str, Any]) -> str:
    """A result for reading."""
    height, width = result["resolution"]
    ratios = " ".join(f"{ratio:.3f}" for ratio in result["ratios"])
    rows = {
        "model": f"{result['model']}, {width}x{height}, {result['dtype']}, batch {result['batch_size']}",
        "hardware": f"{result['device']}, {result['cores']} cores, {result['threads']} threads, "
                    f"load {result['load_average']:.2f} before",
        "gtl": f"{result['gtl_images_per_second']:.2f} images/s, {result['data_wait']:.1%} waiting for data",
        "bare": f"{result['bare_images_per_second']:.2f} images/s",
        "gtl / bare": f"{result['median_ratio']:.3f} of the time, median of {ratios} ({result['steps']} steps each)",
        "memory": f"{result['peak_memory_bytes'] / 2**20:.0f} MiB at most, both loops together",
        "software": f"gtl {result['gtl']}, torch {result['torch']}",
    }  # fmt: skip
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items())
