"""What a run shows of itself as it goes on: loss on held-out images, a grid of pictures, when to stop early."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.config.recipe import EarlyStopping, Evaluate
from gtl.storage import Store

if TYPE_CHECKING:
    import torch

    from gtl.data.dataset import Dataset
    from gtl.evaluate.validation import Validation
    from gtl.train.assemble import Trainee
    from gtl.train.engine import Engine

SAMPLES = "samples"
"""In a run's folder: grids by the steps made before them."""
AUTO_PROMPTS = 4
COLUMNS = 4


@dataclass
class Stopping:
    """Counts validations since the best one."""

    config: EarlyStopping
    best: float = math.inf
    step: int = 0
    """Of the best."""
    waited: int = 0

    def replay(self, rows: Iterable[Mapping[str, Any]], done: int, kept: Collection[int]) -> None:
        """Take in what a run that is resumed after `done` steps had measured, and `kept` checkpoints of which steps.

        A best one without its checkpoint is forgotten, since it could not be published: a later one took its place
        before the run was cut off, and will not come again if it was after the last save.
        """
        for row in rows:
            if row["step"] <= done and self.config.metric in row:
                self.take(int(row["step"]), row[self.config.metric])
        if self.step not in kept:
            self.best, self.step = math.inf, 0

    def take(self, step: int, value: float) -> bool:
        """Whether the value is a new best. A model that has learned nothing yet, at step 0, does not count."""
        if step == 0:
            return False
        if value < self.best - self.config.min_delta:
            self.best, self.step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    @property
    def enough(self) -> bool:
        """Whether patience is used up."""
        return self.waited >= self.config.patience


@dataclass
class Grid:
    """The pictures of one look."""

    config: Evaluate
    prompts: list[str]
    size: int
    """Height and width in pixels."""
    trainee: Trainee
    dataset: Dataset
    """Holds the conditions of the prompts, unless the text encoders are trained."""
    device: torch.device
    dtype: torch.dtype
    """Of the arithmetic."""

    def draw(self, run: Store, done: int) -> None:
        """Draw and keep them under `samples/`. Collective; rank 0 writes."""
        import torch

        from gtl.data.cache import prompt_key
        from gtl.evaluate.samples import draw_shares
        from gtl.generate.engine import Request
        from gtl.images import grid, save_png

        shown, family, encoded = self.config, self.trainee.family, None
        parts = dict(self.trainee.parts)
        if family.codec and family.codec not in parts:  # which training has no use for, so its memory is given back
            parts[family.codec] = family.load(family.codec, torch.float32, str(self.device))
        if self.dataset.prompts is not None:
            texts = {*self.prompts, family.negative_text(shown.negative_prompt)}
            encoded = {text: self.dataset.prompts.read(prompt_key(text)) for text in sorted(texts)}
        requests = [
            Request(
                prompt, self.size, self.size, negative_prompt=shown.negative_prompt, seed=shown.seed + i,
                steps=shown.steps, guidance=shown.guidance,
            )
            for i, prompt in enumerate(self.prompts)
        ]  # fmt: skip
        images = draw_shares(family, parts, requests, encoded=encoded, device=self.device, dtype=self.dtype)
        if images:
            recipe = {"prompts": self.prompts, "seed": shown.seed, "steps": done}
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "grid.png")
                save_png(grid(images, COLUMNS), file, recipe)
                run.upload(file, f"{SAMPLES}/{done:08d}.png")


@dataclass
class Watch:
    """Looks at the model before the first step, every so often and after the last."""

    every: int
    last: int
    """Steps of the whole run."""
    run: Store
    engines: Mapping[str, Engine]
    validation: Validation
    device: torch.device
    grid: Grid | None
    stopping: Stopping | None
    keep_best: Callable[[int], None]
    """Saves the state after that many steps as the best one. Called on every rank."""
    seen: dict[str, float] = field(default_factory=dict)
    """The newest validation; of a run that is resumed, that of the step it goes on from."""

    def __call__(self, done: int) -> Mapping[str, float]:
        """Validation losses, when it is time for them. Collective."""
        if done % self.every and done != self.last:
            return {}
        player = next(iter(self.engines.values()))
        with ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.evaluating())
            self.seen = self.validation.run(player, self.device)
            if self.grid is not None:
                self.grid.draw(self.run, done)
        if self.stopping is not None and self.stopping.take(done, self.seen[self.stopping.config.metric]):
            self.keep_best(done)
        return self.seen

    @property
    def verdict(self) -> dict[str, float]:
        """For the card: how good the weights that are published were on the held-out images."""
        if self.stopping is not None and self.stopping.step:
            return {"val_loss": self.stopping.best, "best_step": self.stopping.step}
        return {name: self.seen[name] for name in ("val_loss",) if name in self.seen}

    @property
    def enough(self) -> bool:
        """Whether the run is to end early."""
        return self.stopping is not None and self.stopping.enough


def auto_prompts(held_out: Dataset, trained: Dataset) -> list[str]:
    """Captions of a few images, of held-out ones first, each once."""
    captions = (entry.record.captions[0] for side in (held_out, trained) for entry in side.entries)
    return list(islice(dict.fromkeys(captions), AUTO_PROMPTS))
