"""A network with its preprocessing: what all backbones are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from gtl.images import to_rgb
from gtl.types import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn
    from typing_extensions import Self

BATCH = 32
"""Pictures or texts of one forward pass."""


class Extractor:
    """A `Backbone` from a network whose forward maps pixels [N, 3, H, W] to features and logits or None."""

    def __init__(
        self,
        name: str,
        resize: str,
        dimensions: int,
        network: nn.Module,
        prepare: Callable[[Image], Tensor],
        config: Mapping[str, Any],
    ) -> None:
        """Put together.

        Args:
            name: See `Backbone`.
            resize: See `Backbone`.
            dimensions: See `Backbone`.
            network: With its weights, in fp32.
            prepare: From an RGB picture to pixels [3, H, W].
            config: What decides features beside weights and `resize`.
        """
        self.name, self.resize, self.dimensions = name, resize, dimensions
        self.network = network.eval().requires_grad_(False)
        self._prepare, self._config = prepare, config
        self._device = "cpu"
        self._fingerprint = ""

    @property
    def config(self) -> Mapping[str, Any]:
        """What decides features beside weights and `resize`."""
        return self._config

    def fingerprint(self) -> str:
        """See `Backbone`."""
        if not self._fingerprint:
            self._fingerprint = hash_weights(self.network, {"resize": self.resize, **self._config})
        return self._fingerprint

    def to(self, device: str) -> Self:
        """See `Backbone`."""
        self.network.to(device)
        self._device = device
        return self

    def __call__(self, images: Sequence[Image]) -> tuple[Tensor, Tensor | None]:
        """See `Backbone`."""
        if not images:
            raise ValueError("no images")
        features, logits = [], []
        for start in range(0, len(images), BATCH):
            pixels = [self._prepare(to_rgb(image)) for image in images[start : start + BATCH]]
            # Of one size, unless a model's preprocessing keeps the ratio of the sides.
            for _, group in groupby(pixels, lambda tensor: tensor.shape):
                with exact():
                    found, classes = self.network(torch.stack(list(group)).to(self._device))
                features.append(found.cpu())
                if classes is not None:
                    logits.append(classes.cpu())
        return torch.cat(features), torch.cat(logits) if logits else None


@contextmanager
def exact() -> Iterator[None]:
    """Within it there are no gradients, and a GPU's convolutions are in full fp32 and give the same bits every time."""
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def square(image: Image, side: int) -> Tensor:
    """An RGB picture as pixels [3, side, side] from -1 to 1: bicubic, antialiased, not rounded, (x - 128) / 128.

    This is the resize of clean-fid (Parmar et al. 2021, arXiv 2104.11222): the filters of other evaluation codes sample
    without antialiasing when they shrink, which makes metrics depend on the resize more than on the pictures. To within
    0.01 of 255 it is Pillow's resize of floating-point channels.
    """
    import numpy as np

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return (resized[0].clamp(0, 255) - 128) / 128


def square_text(side: int) -> str:
    """What `square` does, for people."""
    return f"bicubic to {side} x {side}, antialiased, not rounded; (x - 128) / 128"


def hash_weights(network: nn.Module, config: Mapping[str, Any]) -> str:
    """SHA-256 of a config and of the names, types, shapes and bytes of a network's weights, on whatever device."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(network: nn.Module, tensors: object, where: str) -> None:
    """Give a network that is on meta its weights, in fp32 on the CPU.

    Raises:
        UserError: they are not exactly the network's; the counters of batch norms, which only training reads, may be
            missing.
    """
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{where}: holds no weights by name; a state dict is needed")
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    counters = {name for name in expected if name.endswith(".num_batches_tracked")}
    if missing := sorted(expected.keys() - counters - tensors.keys()):
        raise UserError(f"{where}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(map(str, tensors.keys() - expected.keys())):
        raise UserError(f"{where}: {len(extra)} tensors too many, the first is {extra[0]}; these are other weights")
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise UserError(f"{where}: {name} has shape {list(tensors[name].shape)}; the network's is {list(shape)}")
    network.to_empty(device="cpu")
    for name, tensor in network.state_dict().items():
        tensor.copy_(tensors[name]) if name in tensors else tensor.zero_()
