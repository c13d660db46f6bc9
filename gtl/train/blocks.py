"""Activation checkpointing and compilation, block by block, before the engine wraps the model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from gtl.train.flops import checkpoint_contexts


def checkpoint_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Recompute the named submodules in the backward pass instead of keeping what happens inside them.

    Changes the modules in place; no parameter is renamed. A block without gradients is not run twice.
    """
    for name in names:
        block = model.get_submodule(name)
        # ZeRO-3 gives parameters back between forward and recomputation, so their saved shapes differ on purpose.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, determinism_check="none", context_fn=checkpoint_contexts
        )


def compile_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """torch.compile the named submodules one by one, in place; equal blocks share the work.

    After `checkpoint_blocks`, when both are wanted.
    """
    for name in names:
        model.get_submodule(name).compile()
