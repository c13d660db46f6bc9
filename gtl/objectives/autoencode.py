"""Autoencoding: what the codec encodes, it decodes to the same picture (Kingma & Welling 2013, arXiv 1312.6114)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gtl.config.objectives import AutoencodeObjective
from gtl.objectives.judge import Judge, Judged, Seen
from gtl.objectives.patches import Patches
from gtl.objectives.perceptual import Perceptual, open_perceptual
from gtl.types import Batch, Item, Losses, UserError

if TYPE_CHECKING:
    from gtl.families.base import DiffusionFamily

WINDOW = 11
"""Of structural similarity, in pixels."""


class Autoencode:
    """Trains the codec of a family: reconstruction in pixels and divergence in latents."""

    def __init__(self, config: AutoencodeObjective, family: DiffusionFamily) -> None:
        """Nothing is loaded.

        Raises:
            UserError: the model works on pixels and has no codec.
        """
        if family.codec is None:
            raise UserError(f"objective.type: autoencode: models of family {family.name} have no codec to train")
        self.config = config
        self.family = family
        self.codec = family.codec

    @property
    def parts(self) -> tuple[str, ...]:
        """The codec."""
        return (self.codec,)

    @property
    def strata(self) -> int:
        """There is no time."""
        return 1

    @property
    def judged(self) -> str:
        """The error of the pictures."""
        return "l1"

    def draw(self, item: Item, rng: torch.Generator, stratum: int | None = None) -> dict[str, Tensor]:
        """One sample: pixels [3, H, W] in [-1, 1], and the posterior's noise [C, h, w]."""
        assert item.pixels is not None
        height, width = item.pixels.shape[-2:]
        return {
            "pixels": item.pixels.float().div(127.5).sub(1),
            "noise": torch.randn(self.family.latent_shape(height, width), generator=rng),
        }

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack draws to a batch; all are of one bucket."""
        return {name: torch.stack([sample[name] for sample in samples]) for name in ("pixels", "noise")}

    def players(self, parts: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
        """`autoencoder`, over the codec; and `discriminator`, where one judges what it makes.

        Raises:
            UserError: the network that sees is not where it is said to be.
        """
        codec, config = parts[self.codec], self.config
        device = next(codec.parameters()).device
        eyes = open_perceptual(config.perceptual_network).to(device) if config.perceptual else None
        player = Autoencoder(codec, self.family, config, dtype, eyes)
        if not config.adversarial:
            return {"autoencoder": player}
        judge = Judge(Patches().to(device), player, dtype)
        player.heed(judge)
        return {"autoencoder": player, "discriminator": judge}


class Autoencoder(Judged):
    """A codec and its loss."""

    def __init__(
        self, codec: nn.Module, family: DiffusionFamily, config: AutoencodeObjective, dtype: torch.dtype,
        eyes: Perceptual | None = None,
    ) -> None:  # fmt: skip
        """Trained weights are fp32 whatever the arithmetic's dtype; other than fp32 it runs under autocast."""
        super().__init__(config.adversarial_after if config.adversarial else None)
        self.codec = codec
        self.family = family
        self.weights = {
            "l1": config.l1, "l2": config.l2, "kl": config.kl, "perceptual": config.perceptual,
            "adversarial": config.adversarial,
        }  # fmt: skip
        self.dtype = dtype
        self.eyes = eyes

    def decoded(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What the codec makes of the batch's pictures, [B, 3, H, W] in fp32, and the moments in between."""
        pixels = batch.tensors["pixels"]
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            moments = self.family.encode_images(self.codec, pixels)
            # The model's shift and scale, which `decode` takes back, cancel out.
            decoded = self.family.decode(self.codec, self.family.sample_latents(moments, batch.tensors["noise"]))
        return decoded.float(), moments

    def shown(self, batch: Batch) -> tuple[Seen, Seen]:
        """The batch's pictures, and what the codec makes of them."""
        return (batch.tensors["pixels"],), (self.decoded(batch)[0],)

    def forward(self, batch: Batch) -> Losses:
        """The batch's share of the mean loss; its parts, `l1`, `l2`, `kl` and so on, are without their weights."""
        pixels = batch.tensors["pixels"]
        decoded, moments = self.decoded(batch)
        error = (decoded - pixels).flatten(1)
        losses = {"l1": error.abs().mean(1), "l2": error.square().mean(1), "kl": divergence(moments)}
        if self.eyes is not None:
            losses["perceptual"] = self.eyes(decoded, pixels)
        if self.is_judged:
            losses["adversarial"] = -self._judge[0].judge(decoded)
        shares = {name: batch.share(loss) for name, loss in losses.items()}
        total = torch.stack([self.weights[name] * share for name, share in shares.items()]).sum(0)
        outcomes = {} if torch.is_grad_enabled() else reconstruction(decoded, pixels)
        return Losses(total, {name: share.detach() for name, share in shares.items()}, outcomes)


def reconstruction(decoded: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """How like pictures [B, 3, H, W] in [-1, 1] what was made of them is, as it is shown: `psnr` in decibels and `ssim`
    (Wang et al. 2004, with its window of 11 pixels, which smaller pictures have no room for), each [B]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    shown = decoded.clamp(-1, 1)
    noise = (shown - pixels).square().flatten(1).mean(1).clamp(min=torch.finfo(torch.float32).eps)
    found = {"psnr": 10 * (4 / noise).log10()}
    if min(pixels.shape[-2:]) >= WINDOW:
        # Of brightness, which is never negative.
        mine, theirs = shown / 2 + 0.5, pixels / 2 + 0.5
        similarity = structural_similarity_index_measure(mine, theirs, data_range=1.0, reduction="none")
        assert isinstance(similarity, Tensor)
        found["ssim"] = similarity.view(-1)
    return found


def divergence(moments: Mapping[str, Tensor]) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each sample in nats, [B], fp32 (arXiv 1312.6114, appendix B).

    0 for a codec that encodes to a point, which has none.
    """
    if "logvar" not in moments:
        return torch.zeros(len(moments["mean"]), device=moments["mean"].device)
    mean, logvar = moments["mean"].float(), moments["logvar"].float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
