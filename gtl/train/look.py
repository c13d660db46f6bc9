"""What a run shows of itself as it goes on: loss on held-out images, a grid of pictures, scores of pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from gtl.config.evaluate import Evaluate
from gtl.config.metrics import OF_OUTCOMES
from gtl.data.cache import prompt_key
from gtl.evaluate.measure import pairs
from gtl.evaluate.result import Evaluation
from gtl.evaluate.samples import draw_share, gather
from gtl.families import denoising
from gtl.generate.request import Request, sampled_by
from gtl.images import grid, save_png
from gtl.storage import Store
from gtl.train.best import Best
from gtl.train.scores import write_scores
from gtl.types import Sampler

if TYPE_CHECKING:
    from torch import nn

    from gtl.data.dataset import Dataset
    from gtl.evaluate.turn import Turn
    from gtl.evaluate.validation import Validation
    from gtl.families.base import Conditions, Family
    from gtl.train.assemble import Trainee
    from gtl.train.loop import Learner

SAMPLES = "samples"
"""In a run's folder: grids by the steps made before them."""
AUTO_PROMPTS = 4
UNPROMPTED = 16
"""Pictures of a grid where there are no prompts."""
COLUMNS = 4


@dataclass
class Pictures:
    """Draws with the model that is being trained."""

    asked: Evaluate
    """How, and what is measured of what."""
    sampler: Sampler
    """That the model is taught for."""
    trainee: Trainee
    dataset: Dataset
    """Holds the conditions of the prompts, unless the text encoders are trained."""
    device: torch.device
    dtype: torch.dtype
    """Of the arithmetic."""

    def parts(self) -> dict[str, nn.Module]:
        """What drawing takes: also the codec, which training may have no use for, so its memory is given back."""
        family, parts = self.trainee.family, dict(self.trainee.parts)
        if family.codec and family.codec not in parts:
            parts[family.codec] = family.load(family.codec, torch.float32, str(self.device))
        return parts

    def encoded(self, prompts: Iterable[str]) -> dict[str, Conditions] | None:
        """Conditions of prompts; None where the text encoders are among the parts."""
        if self.dataset.prompts is None:
            return None
        texts = {*prompts, denoising(self.trainee.family).negative_text(self.asked.negative_prompt)}
        return {text: self.dataset.prompts.read(prompt_key(text)) for text in sorted(texts)}


class Drawing(Protocol):
    """What a look draws."""

    @property
    def pictures(self) -> Pictures:
        """With what."""
        ...

    def draw(self, parts: Mapping[str, nn.Module], run: Store, done: int) -> None:
        """Draw and keep it under `samples/`. Collective; rank 0 writes."""
        ...


@dataclass
class Grid:
    """The pictures of one look."""

    pictures: Pictures
    prompts: list[str]
    size: int
    """Height and width in pixels."""

    def draw(self, parts: Mapping[str, nn.Module], run: Store, done: int) -> None:
        """Draw and keep them under `samples/`. Collective; rank 0 writes."""
        shown, how = self.pictures.asked, self.pictures
        asked = (
            Request(
                prompt, self.size, self.size, negative_prompt=shown.negative_prompt, seed=shown.seed + i,
                steps=shown.steps, guidance=shown.guidance,
            )
            for i, prompt in enumerate(self.prompts)
        )  # fmt: skip
        requests = [sampled_by(request, how.sampler, how.trainee.family) for request in asked]
        encoded = how.encoded(self.prompts)
        mine = draw_share(how.trainee.family, parts, requests, encoded=encoded, device=how.device, dtype=how.dtype)
        if images := gather(mine, len(requests)):
            prompts = [prompt for prompt in self.prompts if prompt]
            recipe = {"prompts": prompts, "seed": shown.seed, "steps": done}
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "grid.png")
                save_png(grid(images, COLUMNS), file, recipe)
                run.upload(file, f"{SAMPLES}/{done:08d}.png")


@dataclass
class InTurn:
    """The scores of one look, which training waits for."""

    pictures: Pictures
    turn: Turn
    title: str
    """NAME@VERSION of the run."""
    base: dict[str, Any]
    """The model's source and fingerprint."""

    def score(self, parts: Mapping[str, nn.Module], run: Store, done: int) -> dict[str, float]:
        """Measure, keep the evaluation under `scores/`, return the values on every rank. Collective."""
        turn = self.turn
        scores, nearest, sample = turn.score(parts, self.pictures.encoded(turn.sampling.prompts))
        if dist.get_rank() == 0:
            evaluation = Evaluation(
                adapter=self.title, step=done, base=self.base, dataset=turn.images.fingerprint,
                images=turn.images.number, held_out=len(turn.images.held_out), sampling=turn.sampling, scores=scores,
                nearest=nearest, samples=None,
            )  # fmt: skip
            write_scores(run, evaluation, pairs(nearest, sample, turn.images) if nearest else None)
        values = [{name: score.value for name, score in scores.items()}]
        dist.broadcast_object_list(values, src=0, device=turn.device)
        return values[0]


@dataclass
class Watch:
    """Looks at the model before the first step, every so often and after the last."""

    every: int
    last: int
    """Steps of the whole run."""
    run: Store
    engines: Mapping[str, Learner]
    validation: Validation
    device: torch.device
    grid: Drawing | None
    scoring: InTurn | None
    best: Best | None
    """What is judged at once; what others measure meanwhile they judge too."""
    keep: Callable[[int, bool], None]
    """Keeps the weights after that many steps, as the best ones or for others to measure. Called on every rank."""
    beside: bool
    """Whether others measure every look's weights."""
    seen: dict[str, float] = field(default_factory=dict)
    """What the newest look measured; of a run that is resumed, that of the step it goes on from."""

    def __call__(self, done: int) -> Mapping[str, float]:
        """What was measured, when it is time for that. Collective."""
        if done % self.every and done != self.last:
            return {}
        player = next(iter(self.engines.values()))
        with ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.evaluating())
            self.seen = self.validation.run(player, self.device)
            drawing = self.scoring or self.grid
            parts = drawing.pictures.parts() if drawing is not None else {}
            if self.grid is not None:
                self.grid.draw(parts, self.run, done)
            if self.scoring is not None:
                self.seen |= self.scoring.score(parts, self.run, done)
        if self.beside:
            self.keep(done, False)
        if self.best is not None and self.best.take(done, self.seen[self.best.metric]):
            self.keep(done, True)
        return self.seen

    @property
    def verdict(self) -> dict[str, Any]:
        """For the card: how good the weights that are published were."""
        if self.best is not None and self.best.step:
            return self.best.verdict
        scores = {name: self.seen[name] for name in OF_OUTCOMES if name in self.seen}
        told = {"scores": scores} if scores else {}
        return {"val_loss": self.seen["val_loss"], **told} if "val_loss" in self.seen else {}

    @property
    def enough(self) -> bool:
        """Whether the run is to end early."""
        return self.best is not None and self.best.enough


def auto_prompts(held_out: Dataset, trained: Dataset, family: Family) -> list[str]:
    """Captions of a few images, of held-out ones first, each once; empty ones for a model that reads none."""
    if not family.encoders:
        return [""] * UNPROMPTED
    captions = (entry.record.captions[0] for side in (held_out, trained) for entry in side.entries)
    return list(islice(dict.fromkeys(captions), AUTO_PROMPTS))
