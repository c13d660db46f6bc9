"""A model larger than any process holds: mapped from its files, cast and cut one weight at a time."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from gtl.config import Recipe, parse_recipe
from gtl.families import open_family
from gtl.train.assemble import Trainee, assemble, outline
from gtl.train.engine import Engine
from gtl.train.footprint import measure
from gtl.train.plan import need
from gtl.train.quantize import QuantizedLinear
from tests.engine.group import Group
from tests.engine.toy import make_train
from tests.tiny import make_flux

MIB = 2**20
SOAK = pytest.mark.soak
SLACK = 8 * MIB
"""What Python, the allocator and the group's own buffers may take."""
NOTES = 64 * 2**10
"""Bytes of what DeepSpeed notes down of every parameter, and of what its memory is rounded up to."""
LORA = {"type": "lora", "rank": 4}


def write_wide(folder: Path, heads: int, single_blocks: int) -> Path:
    """FLUX with a wide transformer of two double blocks and so many single ones, in two files, each weight constant."""
    make_flux(folder)
    part = folder / "transformer"
    (part / "diffusion_pytorch_model.safetensors").unlink()
    config = json.loads((part / "config.json").read_text())
    config |= {"num_attention_heads": heads, "num_layers": 2, "num_single_layers": single_blocks}
    (part / "config.json").write_text(json.dumps(config))
    shapes = open_family(str(folder), weights=False).load("transformer", device="meta").state_dict()
    names, files = list(shapes), {}
    for number, own in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: torch.full(shapes[name].shape, constant(names.index(name))) for name in own}, part / file)
        files |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": files}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def constant(number: int) -> float:
    """A value that bf16 holds, another for each of the first 120 weights."""
    return (number % 120 - 60) / 64


def anonymous() -> int:
    """Bytes of this process that are in no file."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@contextmanager
def highest() -> Iterator[list[int]]:
    """Within it the most anonymous bytes above those at its beginning are looked for; they are there after it."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
    begun, most, done = anonymous(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], anonymous() - begun)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


@dataclass(frozen=True)
class Found:
    """What one rank saw of a load, in bytes."""

    mapped: int
    """Most while the model was opened."""
    placed: int
    """Most while the engine took its weights in."""
    share: int
    """Of this rank."""
    largest: int
    """Weight of the model."""
    num: int
    """Of parameters."""
    learning: float
    """What training adds by then, as `gtl plan` has it: masters, gradients, optimizer, and the buffer of gradients."""
    is_right: bool
    """Whether all of the model is there, on all ranks together."""


def wrap(trainee: Trainee) -> Engine:
    """An engine around a trainee's only player."""
    return Engine(
        trainee.players["denoiser"], trainee.parameters, make_train(), stage=3, micro_batch=1, accumulation=1,
        device="cpu", total_steps=1, dtype=trainee.dtype,
    )  # fmt: skip


def load(folder: Path, small: Path, tuner: dict[str, Any], dtype: str, quantization: str | None = None) -> Found:
    """Load a model after a small one, for which all that is imported and set up once was."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    def recipe(source: Path) -> Recipe:
        model = {"source": str(source), "quantization": quantization}
        return parse_recipe({"model": model, "data": {"source": "s3://b"}, "tuner": tuner})

    wrap(assemble(recipe(small), dtype))
    family = open_family(str(folder))
    footprint = measure(recipe(folder), outline(recipe(folder), dtype, family))
    plan = need(footprint, recipe(folder), stage=3, workers=dist.get_world_size(), micro_batch=1)
    gc.collect()
    with highest() as mapped:
        trainee = assemble(recipe(folder), dtype)
    with highest() as placed:
        engine = wrap(trainee)
    main = trainee.parts["transformer"]
    names = list(family.load("transformer", device="meta").state_dict())
    right = True
    for name, parameter in main.named_parameters():
        if ".lora_" not in name and not name.endswith((".codes", ".scales")):
            with GatheredParameters([parameter]):
                expected = constant(names.index(name.replace(".base_layer", "")))
                right = right and bool((parameter == expected).all())
    for name, layer in main.named_modules():
        if isinstance(layer, QuantizedLinear):
            with GatheredParameters([layer.codes, layer.scales]):
                expected = constant(names.index(f"{name.replace('.base_layer', '')}.weight"))
                right = right and bool((layer.weight == expected).all())
    sizes = [(p.ds_tensor.nbytes, p.ds_numel * p.ds_tensor.element_size()) for p in main.parameters()]
    del engine
    shares, whole = zip(*sizes, strict=True)
    learning = plan.total - plan.activations - footprint.largest_bytes - sum(shares)
    return Found(mapped[0], placed[0], sum(shares), max(whole), len(sizes), learning, right)


@pytest.mark.parametrize(
    "cases", [[(LORA, "fp32", None), (LORA, "bf16", None), ({"type": "full"}, "fp32", None)], [(LORA, "fp32", "nf4")]]
)
@pytest.mark.parametrize(("heads", "single_blocks", "size"), [(32, 1, 80), pytest.param(64, 13, 1024, marks=SOAK)])
def test_a_rank_holds_its_share_and_one_weight(
    tmp_path: Path, heads: int, single_blocks: int, size: int, cases: list[tuple[dict[str, Any], str, str | None]]
) -> None:
    folder, small = write_wide(tmp_path / "wide", heads, single_blocks), make_flux(tmp_path / "small")
    assert sum(path.stat().st_size for path in folder.glob("transformer/*.safetensors")) > size * MIB
    with Group(2) as fresh:  # in processes with a past, allocators keep what they were given before
        for case in cases:
            for found in fresh.run(load, folder, small, *case):
                assert found.is_right
                assert found.mapped < SLACK
                assert found.placed < found.share + found.largest + found.learning + SLACK + found.num * NOTES
    shutil.rmtree(folder)  # pytest keeps the folders of its last runs
