"""What every feature extractor answers to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from typing_extensions import Self


@runtime_checkable
class Backbone(Protocol):
    """Turns pictures into features, and some into logits of classes."""

    name: str
    """What a result names: "builtin:backbone", "inception", "openai/clip-vit-base-patch32"."""
    resize: str
    """How pictures are resized and normalised, for people."""
    dimensions: int
    """Of a feature."""

    def fingerprint(self) -> str:
        """SHA-256 of the weights' bytes, the network's config and the preprocessing: the cache key of features."""
        ...

    def to(self, device: str) -> Self:
        """This backbone, moved to a device."""
        ...

    def __call__(self, images: Sequence[Image]) -> tuple[Tensor, Tensor | None]:
        """Features [N, dimensions] and, of a classifier, logits [N, classes]; fp32 on the CPU.

        Pictures may be of any size and mode, transparency counts as white (`gtl.images.to_rgb`). Up to rounding a
        picture's features do not depend on the others of the call; the same call gives the same bits.

        Raises:
            ValueError: no images.
            BrokenImage: a mode without a defined range of values.
        """
        ...


@runtime_checkable
class TextBackbone(Backbone, Protocol):
    """Also turns texts into features of the same space, so that pictures and captions can be compared.

    `isinstance(backbone, TextBackbone)` tells whether one does.

    Features of both kinds have unit length: their dot product is the cosine that CLIP is trained on (Radford et al.
    2021, arXiv 2103.00020). Distances of distributions are those of unit vectors, too, as in CMMD (Jayasumana et al.
    2023, arXiv 2401.09603), and do not compare with figures of vectors that keep their length.
    """

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, dimensions] of unit length, fp32 on the CPU; texts are cut where the model ends (77 tokens).

        Raises:
            ValueError: no texts.
        """
        ...
