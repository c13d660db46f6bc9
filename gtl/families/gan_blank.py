"""A GAN that has learned nothing, at a size that two CPU cores can train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOISE_SIZE = 64
CHANNELS = (128, 64, 32, 16)
"""At 4, 8, 16 and 32 pixels."""
INDEX: dict[str, Any] = {
    "_class_name": "GanPipeline",
    "generator": ["gtl", "ConvGenerator"], "discriminator": ["gtl", "ConvDiscriminator"],
}  # fmt: skip


def write_blank(folder: Path, seed: int = 0) -> None:
    """Write generator and discriminator with random weights (fp32, about half a million); the index comes last."""
    import torch

    from gtl.families.gan_conv import ConvDiscriminator, ConvGenerator

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        ConvGenerator(NOISE_SIZE, CHANNELS, normalization="pixel").save_pretrained(folder / "generator")
        ConvDiscriminator(CHANNELS[::-1], normalization="none").save_pretrained(folder / "discriminator")
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n", encoding="utf-8")
