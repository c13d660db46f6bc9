"""Which tuner goes with which objective, what the pair needs and which ZeRO stage it bears: the one table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gtl.types import UserError


@dataclass(frozen=True)
class Needs:
    """What training reads. What is not live is encoded once, into the cache, and never loaded beside training."""

    images: Literal["latents", "pixels", "none"]
    """latents: also the features of a frozen network that sees. none: they are not looked at."""
    text: Literal["embeddings", "tokens", "none"]
    """tokens: the text encoders run inside the training process. none: captions are not looked at."""
    live: tuple[str, ...] = ()
    """Frozen or trained components that must run inside the training process, beside the objective's own part."""
    word: str | None = None
    """What captions have to contain."""
    everywhere: bool = True
    """Every one of them; False: some."""
    originals: bool = False
    """Whether every image has to be an edit of another one, which the model sees in further channels."""
    labels: bool = False
    """Whether it learns what the model's heads are to say, from columns of the data."""


@dataclass(frozen=True)
class Pair:
    """One allowed combination."""

    needs: Needs
    max_zero_stage: int
    """With a quantised base, too."""
    draws: bool = True
    """Whether what is learned draws pictures of prompts alone."""
    frozen_base: bool = False
    """Whether adapters move and the model's own weights stay, so that `model.quantization` may round them."""


PAIRS: dict[tuple[str, str], Pair] = {
    ("lora", "denoise"): Pair(Needs(images="latents", text="embeddings"), max_zero_stage=3, frozen_base=True),
    ("lora", "consistency"): Pair(Needs(images="latents", text="embeddings"), max_zero_stage=3, frozen_base=True),
    ("lora", "instruct"): Pair(
        Needs(images="latents", text="embeddings", originals=True), max_zero_stage=3, draws=False, frozen_base=True
    ),
    ("full", "instruct"): Pair(
        Needs(images="latents", text="embeddings", originals=True), max_zero_stage=3, draws=False
    ),
    ("full", "consistency"): Pair(Needs(images="latents", text="embeddings"), max_zero_stage=3),
    ("full", "distill"): Pair(Needs(images="latents", text="embeddings"), max_zero_stage=3),
    ("full", "denoise"): Pair(Needs(images="latents", text="embeddings"), max_zero_stage=3),
    ("lora", "align"): Pair(Needs(images="latents", text="embeddings"), max_zero_stage=3, frozen_base=True),
    ("full", "align"): Pair(Needs(images="latents", text="embeddings"), max_zero_stage=3),
    ("freeze", "align"): Pair(Needs(images="latents", text="embeddings"), max_zero_stage=3),
    ("full", "autoencode"): Pair(Needs(images="pixels", text="none", live=("vae",)), max_zero_stage=3, draws=False),
    ("freeze", "denoise"): Pair(Needs(images="latents", text="embeddings"), max_zero_stage=3),
    ("full", "adversarial"): Pair(Needs(images="pixels", text="none", live=("discriminator",)), max_zero_stage=2),
    ("freeze", "adversarial"): Pair(Needs(images="pixels", text="none", live=("discriminator",)), max_zero_stage=2),
    # Heads on a text encoder read captions, and no image: see `gtl.data.prepare`.
    ("head", "classify"): Pair(Needs(images="latents", text="none", labels=True), max_zero_stage=2, draws=False),
    ("full", "classify"): Pair(
        Needs(images="pixels", text="none", live=("backbone",), labels=True), max_zero_stage=2, draws=False
    ),
    ("freeze", "classify"): Pair(
        Needs(images="pixels", text="none", live=("backbone",), labels=True), max_zero_stage=2, draws=False
    ),
    ("prompt", "denoise"): Pair(Needs(images="latents", text="tokens"), max_zero_stage=3, frozen_base=True),
}
TEXT_ENCODER = "text_encoder"
"""What the names of text encoders begin with, in every model in diffusers layout."""


def pair(tuner: str, objective: str) -> Pair:
    """The table's row.

    Raises:
        UserError: the two do not go together.
    """
    found = PAIRS.get((tuner, objective))
    if found is None:
        allowed = ", ".join(sorted(o for t, o in PAIRS if t == tuner)) or "none"
        raise UserError(
            f"objective.type: {objective!r} does not go with tuner.type {tuner!r}; allowed with it: {allowed}"
        )
    return found


def with_trained(needs: Needs, parts: Sequence[str]) -> Needs:
    """A row's needs where these parts are trained: a text encoder that learns cannot be replaced by a cache."""
    encodes = needs.text == "embeddings" and any(part.startswith(TEXT_ENCODER) for part in parts)
    return replace(needs, text="tokens") if encodes else needs
