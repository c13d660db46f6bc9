"""Activation checkpointing and compilation change what is kept and how it runs, not what comes out."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gtl.bench.models import write_configs
from gtl.families import open_family
from gtl.train.blocks import checkpoint_blocks, compile_blocks, without_text
from gtl.types import Batch, Losses, UserError
from tests.engine.group import Group
from tests.engine.toy import Toy, batches, make_engine, make_train
from tests.twins import TWINS


class Stack(nn.Module):
    """Blocks 0 and 1 are frozen in front, 2 and 3 are trained, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 31), nn.Tanh(), nn.Dropout(0.5), nn.Linear(31, 6)) for _ in range(4)
        )
        self.blocks[:2].requires_grad_(False)
        self.runs = [0] * 4
        for index, block in enumerate(self.blocks):
            block[0].register_forward_hook(lambda *_, index=index: self.count(index))

    def count(self, index: int) -> None:
        """Note that a block ran."""
        self.runs[index] += 1

    def trained(self) -> dict[str, nn.Parameter]:
        """What moves."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(self, batch: Batch) -> Losses:
        """Weighted squared output."""
        hidden = batch.tensors["images"]
        for block in self.blocks:
            hidden = block(hidden)
        return Losses((batch.weight * hidden.square().mean((1, 2, 3))).sum(), {})


def steps(stage: int, recompute: bool) -> tuple[list[float], dict[str, torch.Tensor], list[int]]:
    player = Stack()
    if recompute:
        checkpoint_blocks(player, [f"blocks.{index}" for index in range(4)])
    engine = make_engine(player, make_train(), stage)  # type: ignore[arg-type]
    losses = []
    for step, (batch,) in batches(0, 3):
        torch.manual_seed(step)
        total = engine(batch).total
        engine.backward(total)
        engine.step()
        losses.append(total.item())
    return losses, engine.weights(), player.runs


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_recomputing_gives_the_same_run_with_dropout(duo: Group, stage: int) -> None:
    kept, kept_weights, once = duo.run(steps, stage, False)[0]
    recomputed, weights, runs = duo.run(steps, stage, True)[0]
    assert recomputed == kept
    assert all(torch.equal(weights[name], value) for name, value in kept_weights.items())
    assert once == [3, 3, 3, 3]
    assert runs == [3, 3, 6, 6]  # what is frozen in front is not run again


def saved_bytes(recompute: bool) -> int:
    """Bytes that autograd keeps for the backward pass of one forward pass."""
    player = Stack()
    if recompute:
        checkpoint_blocks(player, ["blocks.2", "blocks.3"])
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += 0 if isinstance(tensor, nn.Parameter) or tensor._base is not None else tensor.nbytes
        return tensor

    batch = Batch({"images": torch.randn(50, 3, 6, 6)}, torch.full((50,), 0.02))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        player(batch)
    return total


def test_recomputing_keeps_less() -> None:
    assert saved_bytes(recompute=True) < 0.5 * saved_bytes(recompute=False)


def test_compiled_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    player, reference = Toy(), Toy()
    # Graph capture is what can go wrong here; code generation would cost a C++ compiler's time.
    compiled: list[nn.Module] = []
    compile_ = nn.Module.compile

    def compile_eagerly(module: nn.Module, **more: bool | None) -> None:
        compiled.append(module)
        compile_(module, backend="eager", **more)

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    compile_blocks(player, ["conv", "head"])
    assert compiled == [player.conv, player.head]
    assert list(player.trained()) == list(reference.trained())
    batch = Batch({"images": torch.randn(2, 3, 6, 6), "target": torch.randn(2, 3)}, torch.tensor([0.5, 0.5]))
    assert torch.equal(player(batch).total, reference(batch).total)


class Level(nn.Module):
    """A block of one class of many kinds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).tanh()


@pytest.mark.parametrize("fixed", [True, False])
def test_every_kind_of_block_is_compiled_and_for_one_size_where_there_is_one(
    fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()  # it remembers what sizes the class has seen
    levels = nn.ModuleList(Level(channels) for channels in range(1, 13))
    inputs = [torch.randn(2, level.conv.in_channels, 2 * i + 4, 2 * i + 4) for i, level in enumerate(levels)]
    expected = [level(images) for level, images in zip(levels, inputs, strict=True)]
    any_size: list[bool] = []

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        any_size.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return graph

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **more: compile_(self, backend=note, **more))
    names = [name for name, _ in levels.named_children()]
    compile_blocks(levels, names, names if fixed else ())
    found = [level(images) for level, images in zip(levels, inputs, strict=True)]
    assert all(map(torch.equal, found, expected))
    assert any_size == ([False] * 12 if fixed else [False] + [True] * 11)


def test_blocks_that_read_no_text_see_one_size(tmp_path: Path) -> None:
    write_configs(tmp_path / "model", "sdxl", TWINS["sdxl"])
    family = open_family(str(tmp_path / "model"))
    unet = family.load("unet", device="meta")
    names = list(chain.from_iterable(family.blocks(unet)))
    fixed = without_text(names, family.cross_attentions(unet))
    assert [name for name in names if name not in fixed] == [name for name in names if ".transformer_blocks." in name]
    assert "down_blocks.1.resnets.0" in fixed


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"^train\.compile: true: no C\+\+ compiler .* \(looked for no-such-compiler\)"):
        compile_blocks(Stack(), ["blocks.0"])
