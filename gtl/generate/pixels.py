"""Pictures as tensors, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def to_image(pixels: Tensor) -> Image:
    """Pixels [3, H, W] in [0, 1] as an 8-bit picture, rounded as diffusers does."""
    import torch
    from PIL import Image as Images

    return Images.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def pixels_of(image: Image) -> Tensor:
    """[3, H, W] in [0, 1], fp32."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) / 255
