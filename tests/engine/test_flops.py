"""Floating-point operations of training are those of the formulas, at every stage."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from gtl.train.blocks import checkpoint_blocks
from gtl.train.flops import FlopMeter, peak_flops
from gtl.train.gpus import find_gpu
from gtl.train.loop import utilisation
from gtl.types import Batch
from tests.engine.group import Group
from tests.engine.test_blocks import Stack
from tests.engine.toy import Toy, batches, make_engine, make_train

ROWS = 3 * 6
"""Of an image: what a linear layer runs over."""
BASE, CONV, HEAD = 2 * ROWS * 6 * 6, 2 * 5 * 6 * 6 * 3 * 9, 2 * 5 * 6 * 6 * 3
"""Forward operations of an image: a multiplication and an addition count as two."""


def counted(stage: int, player: str, recompute: bool = False) -> list[float]:
    model = Toy() if player == "toy" else Stack()
    if recompute:
        checkpoint_blocks(model, [f"blocks.{index}" for index in range(4)])
    engine = make_engine(model, make_train(), stage)  # type: ignore[arg-type]
    taken = []
    for _, (batch,) in batches(0, 3):
        engine.backward(engine(batch).total)
        engine.step()
        taken.append(engine.take_flops())
    return taken


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_frozen_goes_forward_only(duo: Group, stage: int) -> None:
    # The frozen layer comes first, so there is no backward pass through it, and the convolution's has no input part.
    expected = 3 * (BASE + 2 * CONV + 3 * HEAD)
    for taken in duo.run(counted, stage, "toy"):
        assert taken == [expected] * 3


@pytest.mark.parametrize("stage", [0, 3])
def test_what_is_recomputed_does_not_count(duo: Group, stage: int) -> None:
    block = 2 * ROWS * 6 * 31 * 2
    # Forward four; backward two: weights of four layers, inputs of all but the first.
    expected = 3 * (4 * block + 2 * block + 2 * block - block // 2)
    for recompute in (False, True):
        for taken in duo.run(counted, stage, "stack", recompute):
            assert taken == [expected] * 3


def test_attention_on_a_cpu_counts() -> None:
    query = torch.randn(1, 2, 8, 4, requires_grad=True)
    meter, batch = FlopMeter(), Batch({"query": query}, torch.ones(1))
    with meter.forward(batch):
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    with meter.backward():
        out.sum().backward()
    product = 2 * 2 * 8 * 8 * 4
    # Two products forward; backward the scores again and four for the three gradients.
    assert meter.take() == 2 * product + 5 * product
    assert meter.take() == 0


def test_what_is_counted_computes_the_same_bits() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(33, 33), torch.nn.SiLU(), torch.nn.GroupNorm(3, 33), torch.nn.GELU())
    batch = Batch({"x": torch.randn(7, 33)}, torch.ones(1))

    def gradients(meter: FlopMeter | None) -> list[torch.Tensor]:
        model.zero_grad()
        with meter.forward(batch) if meter else nullcontext():
            out = model(batch.tensors["x"])
        with meter.backward() if meter else nullcontext():
            out.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    meter = FlopMeter()
    for plain, counted in zip(gradients(None), gradients(meter), strict=True):
        assert torch.equal(plain, counted)
    assert meter.take() == 2 * 2 * 7 * 33 * 33


def test_utilisation_is_a_share_of_the_peak() -> None:
    assert utilisation(3e12, 12e12) == {"tflops": 3.0, "mfu": 0.25}
    assert utilisation(3e12, None) == {"tflops": 3.0}
    assert utilisation(0.0, 12e12) == {}
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA B200", 2250), ("NVIDIA H200", 989), ("NVIDIA GH200 480GB", 989), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10G", 70), ("NVIDIA L40S", 362), ("NVIDIA L40", 181),
        ("NVIDIA L4", 121), ("NVIDIA A40", 150), ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA RTX A4000", None), ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA A10", None), ("NVIDIA GeForce RTX 4080", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_whole_words(name: str, tflops: int | None) -> None:
    gpu = find_gpu(name)
    assert (gpu and gpu.flops) == (None if tflops is None else tflops * 1e12)
