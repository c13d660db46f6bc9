"""Classification: heads say what is in a picture, several of them at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gtl.config.objectives import ClassifyObjective
from gtl.families.boxes import MOST, decode, losses, matched
from gtl.objectives.adversarial import autocast
from gtl.types import Batch, Item, Losses, Task, UserError

if TYPE_CHECKING:
    from gtl.families.base import SeeingFamily

FEATURE, TRUTH = "feature.", "truth."
"""Prefixes of features among a batch's tensors, and of what is true of a task."""
SAID = 30
"""Objects of a picture that evaluation looks at, the surest."""


class Classify:
    """One player over the heads, and over the network under them where it moves."""

    def __init__(self, config: ClassifyObjective, family: SeeingFamily) -> None:
        """Nothing is loaded.

        Raises:
            UserError: a weight is of a task that the model has no head for.
        """
        if unknown := sorted(config.weights.keys() - family.tasks.keys()):
            known = ", ".join(family.tasks)
            raise UserError(f"objective.weights: {unknown[0]}: the model has heads for {known}")
        self.config = config
        self.family = family

    @property
    def parts(self) -> tuple[str, ...]:
        """The heads, and the network under them."""
        return *self.family.heads, self.family.main

    @property
    def strata(self) -> int:
        """There is no time."""
        return 1

    @property
    def judged(self) -> str:
        """The sum of all tasks' losses, each with weight 1."""
        return "error"

    def draw(self, item: Item, rng: torch.Generator, stratum: int | None = None) -> dict[str, Tensor]:
        """One sample: pixels [3, H, W] in [-1, 1] or features, which may be of the caption, and of each task what is
        true."""
        seen = {FEATURE + name: value.float() for name, value in (item.latents | item.conditions).items()}
        if item.pixels is not None:
            seen = {"pixels": item.pixels.float().div(127.5).sub(1)}
        labels = json.loads(item.labels or "{}")
        for name, task in self.family.tasks.items():
            value = labels.get(task.column)
            if task.kind == "class":
                seen[TRUTH + name] = torch.tensor(-1 if value is None else task.values.index(value))
            else:
                seen[TRUTH + name] = boxes_in_crop(value, task, item)
        return seen

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack draws to a batch."""
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def players(self, parts: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
        """One player, `classifier`.

        Raises:
            UserError: the network under the heads cannot move, and is to.
        """
        (head,) = self.family.heads
        if self.family.main in parts and self.family.is_frozen:
            seen = "captions" if self.family.encoders else "pictures"
            raise UserError(f"tuner.type: what {self.family.folder} makes of {seen} is frozen; take head")
        return {"classifier": Classifier(parts[head], parts.get(self.family.main), self.family, self.config, dtype)}


def boxes_in_crop(value: Mapping[str, list[list[float]]] | None, task: Task, item: Item) -> Tensor:
    """[MOST, 5]: class, and the box as `gtl.families.boxes` has them; classes are -1 where there is no object, and -2
    in a picture of which it is not said which objects it has. Those whose centre was cut off are not there."""
    found = torch.zeros(MOST, 5)
    found[:, 0] = -1 if value is not None else -2
    if value is None:
        return found
    (rows, columns), (top, left), (height, width) = item.geometry.original, item.geometry.crop, item.geometry.target
    scale = max(height / rows, width / columns)
    kinds = value.get("categories", value.get("category")) or []
    number = 0
    for kind, (x, y, w, h) in zip(kinds, value["bbox"], strict=True):
        low = max(x * scale - left, 0.0), max(y * scale - top, 0.0)
        high = min((x + w) * scale - left, float(width)), min((y + h) * scale - top, float(height))
        centre = (x + w / 2) * scale - left, (y + h / 2) * scale - top
        if not (0 <= centre[0] < width and 0 <= centre[1] < height) or number == MOST:
            continue
        box = [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, high[0] - low[0], high[1] - low[1]]
        share = [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
        found[number] = torch.tensor([task.values.index(str(kind)), *share])
        number += 1
    return found


class Classifier(nn.Module):
    """A model that sees, and the losses of its heads."""

    def __init__(
        self, head: nn.Module, backbone: nn.Module | None, family: SeeingFamily, config: ClassifyObjective,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Trained weights are fp32 whatever the arithmetic's dtype; other than fp32 it runs under autocast."""
        super().__init__()
        self.head = head
        self.backbone = backbone
        self.family = family
        self.config = config
        self.dtype = dtype

    def forward(self, batch: Batch) -> Losses:
        """The batch's share of the mean loss. Part `error` is the same without weights, those of several tasks are
        named by them."""
        outputs = self.outputs(batch.tensors)
        found = {name: self.loss(name, output, batch.tensors[TRUTH + name]) for name, output in outputs.items()}
        total = torch.stack([self.config.weights.get(name, 1.0) * loss for name, loss in found.items()]).sum(0)
        parts = {"error": torch.stack(list(found.values())).sum(0)}
        if len(found) > 1:
            parts |= {f"{name}_error": loss for name, loss in found.items()}
        outcomes: dict[str, Tensor] = {}
        if not self.training and not torch.is_grad_enabled():
            for name, output in outputs.items():
                outcomes |= self.outcomes(name, output, batch.tensors[TRUTH + name])
        shares = {name: batch.share(value).detach() for name, value in parts.items()}
        return Losses(batch.share(total), shares, outcomes)

    def outcomes(self, name: str, output: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """What came of each picture; see `gtl.evaluate.outcomes`."""
        task = self.family.tasks[name]
        if task.kind == "class":
            return {f"right.{name}": output.argmax(1) == truth, f"labelled.{name}": truth >= 0}
        said, there = torch.zeros(len(truth), SAID, 3), torch.zeros(len(truth), len(task.values))
        said[..., 1] = -1
        for i, (found, objects) in enumerate(zip(decode(output, SAID), truth, strict=True)):
            own = objects[objects[:, 0] >= 0]
            if objects[0, 0] > -2:
                hits = matched(found, own[:, 1:], own[:, 0])
                rows = torch.stack([found.classes.float().cpu(), found.scores.cpu(), hits.float()], 1)
                said[i, : len(rows)] = rows
                there[i] = torch.bincount(own[:, 0].long().cpu(), minlength=len(task.values))
        return {f"said.{name}": said, f"there.{name}": there}

    def outputs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the heads, by task."""
        like = next(iter(tensors.values()))
        with autocast(like, self.dtype):
            if self.backbone is not None:
                features = self.family.encode_images(self.backbone, tensors["pixels"])
            else:
                features = {k.removeprefix(FEATURE): v for k, v in tensors.items() if k.startswith(FEATURE)}
            outputs: dict[str, Tensor] = self.head(features)
        return {name: output.float() for name, output in outputs.items()}

    def loss(self, name: str, output: Tensor, truth: Tensor) -> Tensor:
        """Of a task, [B]; 0 where it is not said what is true."""
        if self.family.tasks[name].kind == "class":
            smoothing = self.config.smoothing
            return cross_entropy(output, truth, ignore_index=-1, reduction="none", label_smoothing=smoothing)
        classes = truth[..., 0].long()
        loss = losses(output, truth[..., 1:], classes, self.config.size_weight)
        return loss.masked_fill(classes[:, 0] == -2, 0.0)

    def after_step(self, done: int, total: int) -> None:
        """Let all ranks have the same statistics of batches, the mean of what each has seen. Collective."""
        normal = nn.modules.batchnorm._BatchNorm
        own = [module for module in self.modules() if isinstance(module, normal) and module.training]
        moving = [
            value for module in own for value in (module.running_mean, module.running_var) if value is not None
        ]  # fmt: skip
        if moving and dist.get_world_size() > 1:
            together = torch.cat([value.flatten() for value in moving])
            dist.all_reduce(together)
            means = (together / dist.get_world_size()).split([value.numel() for value in moving])
            for value, mean in zip(moving, means, strict=True):
                value.copy_(mean.view_as(value))
