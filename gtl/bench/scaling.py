"""`gtl bench train --workers`: the same batches on one worker, on two and so on, each with a core or a GPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl import __version__
from gtl.bench import predicting
from gtl.bench.models import write_dataset, write_model
from gtl.bench.setting import Setting, settle
from gtl.bench.train import IMAGES, WARM_UP, device_name, device_of, dtype_on
from gtl.storage import Store
from gtl.train.group import process_group
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    from gtl.bench.loops import Ours
    from gtl.config import Recipe
    from gtl.families.base import DiffusionFamily


def bench_scaling(
    setting: Setting, workers: Sequence[int], stage: int, file: Path | None, progress: Progress, *,
    predicts: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Time gtl's loop on several numbers of workers, whose batches together are the same.

    Args:
        setting: What is trained and how; it says nothing of a bare loop.
        workers: How many processes, one measurement after the other.
        stage: Of ZeRO, 0 to 3.
        file: Where the result is written too, as JSON.
        progress: Is called after every measurement.
        predicts: Whether the model of `gtl plan` is put beside it, see `gtl.bench.predicting`.

    Returns:
        Images per second and loss for every number of workers, and what it ran on.

    Raises:
        UserError: an argument is out of range.
    """
    if setting.bare_batch_size is not None or setting.bare_checkpointing:
        raise UserError("--bare-batch-size, --bare-checkpointing: with --workers there is no bare loop; leave them out")
    setting = settle(setting, file)
    if not workers or min(workers) < 1:
        raise UserError(f"--workers: {list(workers)}: each must be 1 or more")
    if stage not in range(4):
        raise UserError(f"--stage: {stage}: must be from 0 to 3")
    if predicts and device_of(0).type != "cpu":
        raise UserError("--predict: measures calls of gloo, between CPUs; hide the GPUs with CUDA_VISIBLE_DEVICES=")
    context = multiprocessing.get_context("forkserver")  # one import for all workers
    context.set_forkserver_preload(["diffusers.models.modeling_utils", "gtl.bench.loops", "gtl.train.engine"])
    load, rows, dtype = os.getloadavg()[0], [], dtype_on(device_of(0))
    with tempfile.TemporaryDirectory() as folder:
        family = write_model(Path(folder, "model"), setting.model, dtype)
        dataset = write_dataset(Store(Path(folder, "cache")), family, IMAGES, dtype)
        dataset.save()
        for done, world in enumerate(workers, 1):
            ours, theirs = context.SimpleQueue(), []
            for rank in range(world):
                arguments = (rank, world, folder, dataset.fingerprint, setting, stage, ours, predicts, done == 1)
                theirs.append(context.Process(target=member, args=arguments, daemon=True))
                theirs[-1].start()
            for process in theirs:
                process.join()
            if any(process.exitcode for process in theirs):
                raise RuntimeError(f"{world} workers: one of them failed")
            rows.append({"workers": world, **ours.get()})
            progress("workers", done, len(workers), f"{world}: {rows[-1]['images_per_second']:.2f} images/s")
        predicted = predictions(setting.recipe(folder, stage), family, dtype, stage, rows) if predicts else None
    about = {name: value for name, value in asdict(setting).items() if not name.startswith("bare_")}
    result = {
        **about, "resolution": list(family.default_size), "stage": stage, "rows": rows, "cores": os.cpu_count(),
        "load_average": load, "gtl": __version__, **({} if predicted is None else {"predicted": predicted}),
    }  # fmt: skip
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def predictions(
    recipe: Recipe, family: DiffusionFamily, dtype: str, stage: int, rows: Sequence[dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """The model's steps beside those of rows, from which it takes what was measured for it; by clock."""
    from gtl.train.assemble import outline
    from gtl.train.footprint import measure

    footprint = measure(recipe, outline(recipe, dtype, family))
    taken = [row.pop("taken") for row in rows]
    found = {}
    for clock in predicting.CLOCKS:
        seen = []
        for row, each in zip(rows, taken, strict=True):
            sent, late = each["shares"]
            step, speeds, fewer = each["steps"][clock], each["speeds"][clock], each["fewer"]
            less = None if fewer is None else (fewer["images"], fewer["steps"][clock])
            seen.append(predicting.Seen(row["workers"], step, sent, late, speeds, less))
        found[clock] = predicting.rows(seen, predicting.predict(footprint, recipe, stage, seen))
    return found


def member(
    rank: int, world: int, folder: str, fingerprint: str, setting: Setting, stage: int, answers: Any, predicts: bool,
    is_first: bool,
) -> None:  # fmt: skip
    """One worker; that of rank 0 answers for all."""
    import torch

    from gtl.bench.loops import Ours
    from gtl.data.dataset import Dataset
    from gtl.train.track import Tracker

    device = device_of(rank)
    dtype = dtype_on(device)
    torch.set_num_threads(1)
    dataset = Dataset.load(Store(f"{folder}/cache"), fingerprint)
    group = f"{folder}/{world}"
    Path(group).mkdir(exist_ok=True)
    with process_group(group, device, rank, world), Tracker(Store(Path(folder, f"run-{world}-{rank}"))) as tracker:
        ours = Ours(setting.recipe(folder, stage), dataset, device, dtype, tracker)
        ours(WARM_UP)
        less = predicting.halved(setting, world, ours.plan) if predicts and is_first else None
        fewer = Ours(less.recipe(folder, stage), dataset, device, dtype, tracker) if less is not None else None
        if fewer is not None:
            fewer(WARM_UP)
        taken, of_fewer, more = [], [], {}
        speeds: dict[str, list[predicting.Speeds]] = {name: [] for name in predicting.CLOCKS}
        for _ in range(setting.rounds):
            for name, clock in predicting.CLOCKS.items() if predicts else ():
                speeds[name].append(predicting.measure_speeds(device, clock))
            losses, seconds = timed(ours, setting.steps)  # on rank 0, which has waited for the others in every step
            taken.append(seconds)
            if fewer is not None:
                of_fewer.append(timed(fewer, setting.steps)[1])
        if predicts:
            more["taken"] = {
                "steps": medians(taken, setting.steps),
                "speeds": {name: predicting.medians(each) for name, each in speeds.items()},
                "shares": predicting.shares_of_calls(lambda: ours(setting.steps)),
                "fewer": None if fewer is None else {
                    "images": fewer.plan.micro_batch, "steps": medians(of_fewer, setting.steps)
                },
            }  # fmt: skip
    if rank == 0:
        step = medians(taken, setting.steps)["wall"]
        rate, loss = setting.batch_size / step, statistics.fmean(losses)
        answers.put({"images_per_second": rate, "step": step, "loss": loss, "device": device_name(device), **more})


def timed(loop: Ours, steps: int) -> tuple[list[float], dict[str, float]]:
    """Losses of some steps, and what they take by each clock."""
    begun = {name: clock() for name, clock in predicting.CLOCKS.items()}
    losses = loop(steps)
    return losses, {name: clock() - begun[name] for name, clock in predicting.CLOCKS.items()}


def medians(rounds: Sequence[Mapping[str, float]], steps: int) -> dict[str, float]:
    """Of a step, by each clock."""
    return {name: statistics.median(one[name] for one in rounds) / steps for name in predicting.CLOCKS}


def table(result: dict[str, Any]) -> str:
    """A result for reading."""
    height, width = result["resolution"]
    first = result["rows"][0]
    lines = [
        f"{result['model']}, {width}x{height}, batches of {result['batch_size']} in all, ZeRO stage {result['stage']}, "
        f"{first['device']}, {result['cores']} cores, load {result['load_average']:.2f} before, gtl {result['gtl']}"
    ]  # fmt: skip
    for row in result["rows"]:
        speedup = row["images_per_second"] / first["images_per_second"]
        lines.append(
            f"{row['workers']:>3} workers  {row['images_per_second']:.2f} images/s  {speedup:.2f} of the first  "
            f"loss {row['loss']:.6f}"
        )
    if "predicted" in result:
        lines += ["", predicting.table(result["predicted"])]
    return "\n".join(lines)
