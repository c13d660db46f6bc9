"""What `gtl bench train` is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gtl.bench.configs import BUILTIN, MODELS
from gtl.config import Recipe, parse_recipe
from gtl.types import UserError

TUNERS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 16, "targets": "attention"},
    "full": {"type": "full"},
}
"""What moves, by name."""


@dataclass(frozen=True)
class Setting:
    """The model, what moves in it, and how both loops go through their steps."""

    model: str = "small"
    """In `gtl.bench.configs.MODELS`, or builtin:tiny."""
    batch_size: int = 4
    """Images per optimizer step; of all workers together."""
    steps: int = 20
    """Optimizer steps of each loop in a round."""
    rounds: int = 9
    """How often the loops take turns; the median counts."""
    tuner: str = "lora"
    """In `TUNERS`."""
    compile: bool = False
    """Of gtl's loop; the bare one stays eager."""
    checkpointing: bool = False
    """Of activations, in gtl's loop."""
    micro_batch: int | None = None
    """Images per forward pass of gtl's loop; None: the batch, shared out among workers."""
    bare_batch_size: int | None = None
    """Images per optimizer step of the bare loop; None: as many as gtl's."""
    bare_checkpointing: bool = False
    """Of activations, in the bare loop."""

    def recipe(self, folder: str, stage: int = 0) -> Recipe:
        """Of gtl's loop, on a model in a folder; what is not said here is as it is by default."""
        return self._recipe(folder, {
            "batch_size": self.batch_size, "micro_batch": self.micro_batch or self.batch_size,
            "zero": {"stage": stage}, "compile": self.compile, "activation_checkpointing": self.checkpointing,
        })  # fmt: skip

    def bare_recipe(self, folder: str) -> Recipe:
        """Of the bare loop."""
        return self._recipe(folder, {
            "batch_size": self.bare_batch_size or self.batch_size, "zero": {"stage": 0},
            "activation_checkpointing": self.bare_checkpointing,
        })  # fmt: skip

    def _recipe(self, folder: str, train: dict[str, Any]) -> Recipe:
        return parse_recipe({
            "model": {"source": self.model if self.model.startswith(BUILTIN) else f"{folder}/model"},
            "tuner": TUNERS[self.tuner],
            "data": {"source": f"{folder}/images", "buckets": False},
            "train": train,
            "storage": {place: f"{folder}/{place}" for place in ("runs", "cache", "registry")},
        })  # fmt: skip


def settle(setting: Setting, file: Path | None) -> Setting:
    """The setting with its numbers filled in, if it can work and its result can be written.

    Raises:
        UserError: naming the option.
    """
    models = (*MODELS, f"{BUILTIN}tiny")
    for option, value, known in (("--model", setting.model, models), ("--tuner", setting.tuner, TUNERS)):
        if value not in known:
            raise UserError(f"{option}: {value!r}: choose from {', '.join(known)}")
    batch_size = setting.batch_size
    micro_batch, bare = (batch_size if n is None else n for n in (setting.micro_batch, setting.bare_batch_size))
    counts = {
        "--batch-size": batch_size, "--steps": setting.steps, "--rounds": setting.rounds, "--micro-batch": micro_batch,
        "--bare-batch-size": bare,
    }  # fmt: skip
    check_counts(counts)
    if micro_batch > batch_size:
        raise UserError(f"--micro-batch: {micro_batch}: must be at most --batch-size, which is {batch_size}")
    check_file(file)
    if setting.compile:  # before the model is written
        from gtl.train.blocks import find_compiler

        if find_compiler() is None:
            raise UserError("--compile: no C++ compiler on this machine; install one, such as the package g++")
    return replace(setting, micro_batch=micro_batch, bare_batch_size=bare)


def check_counts(counts: Mapping[str, int]) -> None:
    """Refuse what is to be 1 or more, by option.

    Raises:
        UserError: naming the option.
    """
    for option, count in counts.items():
        if count < 1:
            raise UserError(f"{option}: {count}: must be 1 or more")


def check_file(file: Path | None) -> None:
    """Refuse a file that could not be written when all is measured.

    Raises:
        UserError: its folder does not exist.
    """
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"--json: {file}: its folder does not exist")
