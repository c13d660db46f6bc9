"""Activation checkpointing and compilation, block by block, before the engine wraps the model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gtl.train.flops import checkpoint_contexts
from gtl.tuners.depth import is_under
from gtl.types import UserError

COMPILERS = ("c++", "g++", "clang++")
"""What torch.compile makes its kernels with, on CPUs and around those of GPUs; CXX names another."""
RECOMPILATIONS = 128
"""Of one class of blocks: a UNet has a dozen kinds of ResNets, and each may see several sizes of batches."""


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


def compile_blocks(model: nn.Module, names: Iterable[str], fixed: Collection[str] = ()) -> None:
    """torch.compile the named submodules one by one, in place; equal blocks share the work.

    After `checkpoint_blocks`, when both are wanted.

    Args:
        model: Is changed.
        names: Of the submodules.
        fixed: Those of them that see images of one size and nothing else. torch takes blocks of one class for one
            function, so it would think that sizes change from level to level of a UNet, and compile the others for
            any size; on GPUs convolutions of any size keep the slower layout.

    Raises:
        UserError: there is no C++ compiler here.
    """
    if find_compiler() is None:
        tried = os.environ.get("CXX") or ", ".join(COMPILERS)
        raise UserError(
            f"train.compile: true: no C++ compiler on this machine (looked for {tried}); install one, such as the "
            "package g++, on every machine that trains, or leave train.compile at false"
        )
    # At the default of 8 the other kinds of blocks would stay as they are, with a warning.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS)
    for name in names:
        model.get_submodule(name).compile(dynamic=False if name in fixed else None)


def without_text(names: Iterable[str], readers: Collection[str]) -> list[str]:
    """Those of the blocks in which no module reads the text, whose length may change; see `Family.cross_attentions`."""
    return [name for name in names if not any(is_under(reader, (name,)) for reader in readers)]


def find_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile will use."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next((path for name in candidates if (path := shutil.which(name))), None)
