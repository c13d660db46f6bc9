"""Scores of a model that is being trained, by all ranks together while training waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from gtl.backbones import open_backbone
from gtl.backbones.features import features_of
from gtl.config.evaluate import Evaluate
from gtl.data.reference import Reference, keys_of
from gtl.evaluate.extract import Facts, encode_texts, load_square
from gtl.evaluate.measure import MAX_REAL, READER_FACTS, Found, Need, is_right, named, needs_of, score_all
from gtl.evaluate.result import Copy, Sampling, Score
from gtl.evaluate.samples import draw_share, gather, share
from gtl.evaluate.sampling import requests
from gtl.storage import Store
from gtl.types import Sampler

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from gtl.data.fill import ImageWork
    from gtl.families.base import Conditions, Family


@dataclass(frozen=True)
class Turn:
    """What a look measures of pictures."""

    asked: Evaluate
    family: Family
    images: Reference
    sampling: Sampling
    sampler: Sampler
    """That the model is taught for."""
    cache: Store
    """Its root, which has the features of real images."""
    device: torch.device
    dtype: torch.dtype
    """Of the arithmetic."""

    def score(
        self, parts: Mapping[str, nn.Module], encoded: Mapping[str, Conditions] | None
    ) -> tuple[dict[str, Score], list[Copy], Callable[[int], Image]]:
        """The scores, the samples nearest to images trained on, and any sample, on rank 0. Collective.

        Args:
            parts: See `draw_share`.
            encoded: Conditions of every prompt, or None.

        Raises:
            UserError: a backbone or a prompt is not what it has to be, an image is gone, or features are not finite.
        """
        number = self.asked.samples
        asked = requests(self.sampling, number, self.family, self.sampler)
        drawn = draw_share(self.family, parts, asked, encoded=encoded, device=self.device, dtype=self.dtype)
        found = {need.extractor: self._find(need, drawn) for need in needs_of(self.asked)}
        pictures = gather(drawn, number) if "memorization" in self.asked.metrics else []
        if dist.get_rank() != 0:
            return {}, [], pictures.__getitem__
        return (*score_all(self.asked, found, self.images), pictures.__getitem__)

    def _find(self, need: Need, drawn: Sequence[Image]) -> Found:
        """What an extractor makes of all pictures, on rank 0; nothing elsewhere. Collective."""
        prompts = self.sampling.prompts_of(self.asked.samples)
        if need.extractor == "reader":
            right = (is_right(*pair) for pair in zip(drawn, share(prompts), strict=True))
            return Found({"right": torch.tensor(gather(right, len(prompts))).unsqueeze(-1)}, READER_FACTS)
        backbone = open_backbone(need.spec).to(str(self.device))
        trained, held_out = self.images.trained[:MAX_REAL], self.images.held_out[:MAX_REAL]

        def real(works: Sequence[ImageWork]) -> Tensor:
            mine = share(works)
            if not mine:
                return stack(gather((), len(works)))
            rows, _ = features_of(backbone, keys_of(mine), lambda at: load_square(mine[at]), self.cache)
            return stack(gather(rows, len(works)))

        features, logits = backbone(drawn) if drawn else ((), None)
        classes = gather(() if logits is None else logits, len(prompts)) if "logits" in need.parts else []
        rows = named(stack(gather(features, len(prompts))), stack(classes) if classes else None)
        if "real" in need.parts:
            rows["real"] = real([*self.images.trained, *self.images.held_out][:MAX_REAL])
        if "train" in need.parts:
            rows["train"], rows["held_out"] = real(trained), real(held_out)
        if "text_features" in need.parts:
            mine = share(prompts)
            rows["text_features"] = stack(gather(encode_texts(backbone, mine) if mine else (), len(prompts)))
        return Found(rows, Facts(backbone.name, backbone.resize))


def stack(rows: Sequence[Tensor]) -> Tensor:
    """Rows as one tensor; an empty one of none."""
    return torch.stack(list(rows)) if rows else torch.empty(0)
