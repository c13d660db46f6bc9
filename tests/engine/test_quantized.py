"""A quantised base under every ZeRO stage: the losses of an unsharded run, and the bytes that were planned."""

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from torch import Tensor, nn

from gtl.train.engine import Engine
from gtl.train.quantize import FORMATS, quantize
from gtl.tuners.lora import adapt
from gtl.types import Batch, Losses
from tests.engine.group import Group
from tests.engine.toy import descend, make_train

WIDTH, BLOCKS, SAMPLES, STEPS = 601, 3, 6, 4
"""So wide that ZeRO-3 shares out the codes, in nf4 too: what has fewer than 100,000 elements stays whole."""


class Tower(nn.Module):
    """Blocks with an adapter over their first layer, between an embedder and an output layer that stay whole."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(BLOCKS)
        )
        self.requires_grad_(False)
        for seed, block in enumerate(self.blocks):
            assert isinstance(block, nn.Sequential)
            block[0] = adapt(block[0], LoraConfig(r=4, target_modules=["layer"]), seed)
        quantize(self, [f"blocks.{index}" for index in range(BLOCKS)], kind, torch.float32)

    def forward(self, batch: Batch) -> Losses:
        """Something to descend."""
        hidden = self.embed(batch.tensors["x"])
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return Losses((batch.weight * (self.out(hidden) - 1).square().mean(1)).sum(), {})


def steps(kind: str, stage: int) -> tuple[list[float], dict[str, Tensor], int, int]:
    """Global losses, the trained weights, bytes of the frozen ones, and how many of these this process holds."""
    player = Tower(kind)
    trained = {name: p for name, p in player.named_parameters() if p.requires_grad}
    frozen = [p for p in player.parameters() if not p.requires_grad]
    nbytes = sum(p.nbytes for p in frozen)
    rank, share = dist.get_rank(), SAMPLES // dist.get_world_size()
    engine = Engine(
        player, trained, make_train(), stage=stage, micro_batch=share, accumulation=1, device="cpu", total_steps=STEPS
    )

    def batch(step: int) -> Batch:
        whole = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(step))
        return Batch({"x": whole[rank * share : (rank + 1) * share]}, torch.full((share,), 1 / SAMPLES))

    losses = [loss for loss, _ in descend(engine, ([batch(step)] for step in range(STEPS)))]
    held = sum((p.ds_tensor if stage == 3 else p).nbytes for p in frozen)  # type: ignore[attr-defined]  # DeepSpeed's
    return losses, engine.weights(), nbytes, held


def planned(kind: str) -> int:
    """Bytes of the frozen weights: of the layers in blocks by their format, with biases, of the others in fp32."""
    layer = FORMATS[kind].nbytes(WIDTH**2) + 4 * WIDTH
    return 2 * BLOCKS * layer + 4 * (8 * WIDTH + WIDTH) + 4 * (3 * WIDTH + 3)


@pytest.fixture(scope="module")
def unsharded(solo: Group) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    return {kind: solo.run(steps, kind, 0)[0][:2] for kind in FORMATS}


@pytest.mark.parametrize(("kind", "stage"), [("nf4", 0), ("nf4", 1), ("nf4", 2), ("nf4", 3), ("int8", 3), ("fp8", 3)])
def test_two_workers_learn_what_one_does_and_share_what_was_planned(
    duo: Group, unsharded: dict[str, tuple[list[float], dict[str, Tensor]]], kind: str, stage: int
) -> None:
    expected, expected_weights = unsharded[kind]
    assert expected[-1] < expected[0]
    shares = 2 if stage == 3 else 1
    for losses, weights, nbytes, held in duo.run(steps, kind, stage):
        assert losses == pytest.approx(expected, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, expected_weights[name], rtol=1e-3, atol=1e-5)
        assert nbytes == planned(kind)
        assert nbytes / shares <= held <= nbytes / shares + 100  # a share is rounded up in every parameter
