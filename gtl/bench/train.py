"""`gtl bench train`: this loop beside a bare PyTorch loop; same model, data and optimizer, in one process."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl import __version__
from gtl.bench.matrices import matmul_flops, utilisation
from gtl.bench.models import write_dataset, write_model
from gtl.bench.setting import Setting, settle
from gtl.storage import Store
from gtl.train.group import process_group
from gtl.types import DTYPES, Progress

if TYPE_CHECKING:
    import torch

    from gtl.bench.configs import Config

IMAGES = 64
"""In the data set."""
WARM_UP = 3
"""Steps of each loop before the clock runs."""


def bench_train(setting: Setting, file: Path | None, progress: Progress) -> dict[str, Any]:
    """Time rounds of optimizer steps, in turn with gtl's loop under ZeRO-0 and with a bare one.

    Args:
        setting: What is trained and how.
        file: Where the result is written too, as JSON.
        progress: Is called after every round.

    Returns:
        The setting, see `summary` for what was measured, and what it ran on.

    Raises:
        UserError: an argument is out of range.
    """
    setting = settle(setting, file)
    progress("model", 0, 0, setting.model)
    device = device_of(0)
    with tempfile.TemporaryDirectory() as folder, process_group(folder, device):
        result = measure(setting, folder, device, progress)
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def measure(
    setting: Setting, folder: str, device: torch.device, progress: Progress,
    overrides: Mapping[str, Config] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The benchmark itself, on a setting that can work, in an empty folder. The process group stands already.

    Args:
        setting: See `gtl.bench.setting.settle`.
        folder: For the model, its data and the run.
        device: Where both loops run.
        progress: See `bench_train`.
        overrides: Of the model's configs, see `gtl.bench.models.write_model`.
    """
    import torch

    from gtl.bench.loops import Bare, Ours
    from gtl.train.loop import peak_memory
    from gtl.train.track import Tracker

    dtype = dtype_on(device)
    load, taken = os.getloadavg()[0], []
    precision = getattr(torch, DTYPES[dtype])
    rate = matmul_flops(device, precision)
    family = write_model(Path(folder, "model"), setting.model, dtype, overrides)
    dataset = write_dataset(Store(Path(folder, "cache")), family, IMAGES, dtype)
    with Tracker(Store(Path(folder, "run"))) as tracker:
        ours = Ours(setting.recipe(folder), dataset, device, dtype, tracker)
        bare = Bare(setting.bare_recipe(folder), dataset, device, dtype, ours.trainee)
        flops = bare.count()  # not of gtl's loop: compiled blocks can't be counted
        ours(WARM_UP), bare(WARM_UP)
        for done in range(1, setting.rounds + 1):
            first = timed(ours, setting.steps, ours.batches.batch_size, device)
            second = timed(bare, setting.steps, bare.batch_size, device)
            taken.append(Round(*first, *second, ours.data_wait))
            progress("rounds", done, setting.rounds, f"gtl / bare {taken[-1].ratio:.3f}")
    rate = max(rate, matmul_flops(device, precision))  # the other may have been when somebody else was at work
    return {
        **asdict(setting), "resolution": list(family.default_size), **summary(taken, flops, rate),
        "peak_memory_bytes": peak_memory(device), "dtype": dtype, "device": device_name(device),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load_average": load, "torch": torch.__version__,
        "gtl": __version__,
    }  # fmt: skip


class Round(NamedTuple):
    """What one round of both loops came to."""

    gtl_rate: float
    """Images a second."""
    gtl_loss: float
    bare_rate: float
    bare_loss: float
    data_wait: float
    """Share of gtl's time."""

    @property
    def ratio(self) -> float:
        """Of the times an image takes; above 1 the bare loop is faster."""
        return self.bare_rate / self.gtl_rate


def summary(rounds: Sequence[Round], flops_per_image: float, rate: float) -> dict[str, Any]:
    """Medians over rounds, and the losses of the last one.

    Args:
        rounds: At least one.
        flops_per_image: Operations that an image needs in training.
        rate: Operations a second that the device makes in matrix products; utilisation is the share of it.
    """
    ours, bare = (statistics.median(rates) for rates in ([r.gtl_rate for r in rounds], [r.bare_rate for r in rounds]))
    return {
        "gtl_images_per_second": ours,
        "bare_images_per_second": bare,
        "speedup": ours / bare,
        "ratios": [r.ratio for r in rounds],
        "median_ratio": statistics.median(r.ratio for r in rounds),
        "matmul_flops": rate,
        "flops_per_image": flops_per_image,
        "gtl_utilisation": utilisation(flops_per_image, ours, rate),
        "bare_utilisation": utilisation(flops_per_image, bare, rate),
        "data_wait": statistics.median(r.data_wait for r in rounds),
        "gtl_loss": rounds[-1].gtl_loss,
        "bare_loss": rounds[-1].bare_loss,
    }


def timed(loop: Callable[[int], list[float]], steps: int, batch_size: int, device: torch.device) -> tuple[float, float]:
    """Images a second of a loop that makes steps of so many, and their mean loss."""
    begun = time.perf_counter()
    losses = loop(steps)
    synchronize(device)
    return steps * batch_size / (time.perf_counter() - begun), statistics.fmean(losses)


def synchronize(device: torch.device) -> None:
    """Wait for what was begun on a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_of(rank: int) -> torch.device:
    """A GPU of its own where there are any."""
    import torch

    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def dtype_on(device: torch.device) -> str:
    """That of the arithmetic: bf16 on a GPU, else fp32."""
    return "bf16" if device.type == "cuda" else "fp32"


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
    switched = "".join(f", {name}" for name in ("compile", "checkpointing") if result[name])
    rows = {
        "model": f"{result['model']}, {width}x{height}, {result['dtype']}, {result['tuner']}",
        "hardware": f"{result['device']}, {result['cores']} cores, {result['threads']} threads, "
                    f"load {result['load_average']:.2f} before",
        "matrices": f"{result['matmul_flops'] / 1e12:.2f} TFLOP/s; an image takes "
                    f"{result['flops_per_image'] / 1e12:.4g} TFLOP",
        "gtl": f"{result['gtl_images_per_second']:.2f} images/s, {result['gtl_utilisation']:.1%} of that rate, "
               f"{result['data_wait']:.1%} waiting for data; batch {result['batch_size']}, "
               f"{result['micro_batch']} at a time{switched}",
        "bare": f"{result['bare_images_per_second']:.2f} images/s, {result['bare_utilisation']:.1%} of that rate; "
                f"batch {result['bare_batch_size']}{', checkpointing' if result['bare_checkpointing'] else ''}",
        "speedup": f"{result['speedup']:.2f}",
        "gtl / bare": f"{result['median_ratio']:.3f} of the time an image, median of {ratios} "
                      f"({result['steps']} steps each)",
        "memory": f"{result['peak_memory_bytes'] / 2**20:.0f} MiB at most, both loops together",
        "software": f"gtl {result['gtl']}, torch {result['torch']}",
    }  # fmt: skip
    return "\n".join(f"{name:<12}{text}" for name, text in rows.items())
