"""Tuners: which weights move."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, StrictFloat, StrictInt, Tag, model_validator

from gtl.config.base import Section, type_of
from gtl.config.names import NAME

LoraTargets = Literal["attention", "attention+ff", "all-linear", "all-linear+conv"]


def check_freeze_depth(value: int | float) -> int | float:
    """Refuse a depth whose meaning would depend on how YAML spells the number."""
    if value < 0:
        raise ValueError("should be a whole number of blocks from 0, or a fraction in [0, 1)")
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"should be a fraction in [0, 1), or a whole number of blocks, which is written {value:.0f}")
    return value


FreezeDepth = Annotated[StrictInt | StrictFloat, AfterValidator(check_freeze_depth)]
"""The first k blocks: a whole number of them, or a fraction of their count in [0, 1)."""


def check_init(text: str) -> str:
    """Refuse what is no adapter's name, and a scale: one continues from the whole of an adapter."""
    name, at, version = text.partition("@")
    if not all(NAME.fullmatch(part) for part in ([name, version] if at else [name])):
        raise ValueError("should be NAME, NAME@VERSION or NAME@ALIAS of a published adapter, without a scale")
    return text


Init = Annotated[str, AfterValidator(check_init)]
"""A published adapter: NAME (its newest version), NAME@VERSION or NAME@ALIAS."""


def check_parts(parts: list[str]) -> list[str]:
    """Refuse a part that is named twice."""
    if len(set(parts)) < len(parts):
        raise ValueError("should name each part once")
    return parts


Token = Annotated[str, Field(max_length=64, pattern=r"^[^\sA-Z]+$")]
"""A word, for example <dog>, in lower case and without spaces. The model must not know it yet."""
Vectors = Annotated[int, Field(ge=1, le=32)]
"""Of a word; a prompt has room for as many tokens fewer."""
Initializer = Annotated[str, Field(pattern=r"\S")]
"""A text of at most as many tokens as a word has vectors, whose vectors it starts from, in order, over and over."""


def check_start(init: str | None, initializer: str | None) -> None:
    """Refuse a word that begins nowhere, or at two places."""
    if init is None and initializer is None:
        raise ValueError("initializer: missing; say in known words what it is, such as dog")
    if init is not None and initializer is not None:
        raise ValueError(f"initializer: {initializer!r}: gives the initial vectors, and so does init: {init}; keep one")


Parts = Annotated[list[str], Field(min_length=1), AfterValidator(check_parts)]
"""Parts of the model by their folders' names, such as unet and text_encoder."""


class LoraTuner(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), with DoRA and rsLoRA."""

    type: Literal["lora"] = "lora"
    train: Parts | None = None
    """Parts that get adapters, for example [unet, text_encoder]. null: the one the objective is about."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Rank r of every update B A."""
    alpha: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora). auto: alpha = rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input."""
    targets: LoraTargets | Annotated[list[str], Field(min_length=1)] = "attention"
    """Which layers get an adapter: a named set, or a list of module-name endings such as `to_q`."""
    freeze_depth: FreezeDepth = 0
    """The first k blocks get no adapter: a whole number, or a fraction of the block count in [0, 1)."""
    dora: bool = False
    """Weight-decomposed adapters (Liu et al. 2024, arXiv 2402.09353)."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732)."""
    initialization: (
        Literal["default", "gaussian", "orthogonal", "random_b", "pissa", "olora"]
        | Annotated[str, Field(pattern=r"^pissa_niter_[1-9]\d*$")]
    ) = "default"
    """How A and B start. default: Kaiming A, zero B. random_b: zero A, and normal B of variance 1 / rank (Init[A] and
    Init[B] of Hayou et al. 2024, arXiv 2406.08447); with alpha auto the first step of Adam then moves every weight by
    about the learning rate, whatever the rank, as full tuning does. pissa and olora start from the base weight's
    principal part, which pissa_niter_16 finds by 16 rounds of subspace iteration, much faster in large layers."""
    init: Init | None = None
    """Continue from a published LoRA of the same rank and layers, which has the same word if there is one."""
    token: Token | None = None
    """A new word that is learned with the adapters (pivotal tuning, for GANs Roich et al. 2021, arXiv 2106.05744): of
    the text encoders its vectors move, beside train. Some captions have to contain it. null: none."""
    vectors: Vectors = 1
    """Of the word."""
    initializer: Initializer | None = None
    """Of the word: a text of at most as many tokens as vectors, whose vectors it starts from, over and over."""

    @model_validator(mode="after")
    def _check_word(self) -> "LoraTuner":
        if self.token is not None:
            check_start(self.init, self.initializer)
        elif self.vectors != 1 or self.initializer is not None:
            raise ValueError("token: missing; vectors and initializer are of the word that it names")
        return self

    @model_validator(mode="after")
    def _check_rank(self) -> "LoraTuner":
        if self.initialization == "orthogonal" and self.rank % 2:
            raise ValueError(f"rank: {self.rank}: initialization orthogonal halves it; take an even rank")
        return self

    @model_validator(mode="after")
    def _check_scale(self) -> "LoraTuner":
        if self.initialization == "random_b" and self.rslora:
            raise ValueError(
                "rslora: True: is a scale for a random A; with initialization random_b the rank is in B already, so "
                "leave rslora out"
            )
        return self

    @model_validator(mode="after")
    def _check_init(self) -> "LoraTuner":
        if self.init is not None and self.initialization != "default":
            raise ValueError(
                f"init: {self.init!r}: gives the initial weights, and so does initialization: {self.initialization}; "
                "keep one"
            )
        return self

    @model_validator(mode="after")
    def _check_depth(self) -> "LoraTuner":
        if self.freeze_depth and self.train and all(part.startswith("text_encoder") for part in self.train):
            raise ValueError(
                f"freeze_depth: {self.freeze_depth}: is of blocks of the denoiser, which train: "
                f"[{', '.join(self.train)}] leaves as it is; leave one of the two out"
            )
        return self

    @property
    def resolved_alpha(self) -> float:
        """alpha as a number."""
        return float(self.rank) if self.alpha == "auto" else self.alpha

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.resolved_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def step_size(self) -> float | None:
        """How far Adam's first step at rate 1 moves a layer's output, up to a factor that is the same at all ranks.

        Adam moves every element by about the rate. Behind a random A each of the rank hidden values then adds to the
        output in the gradient's direction: rank times as much as one of them (PEFT's gaussian A is itself as 1 / rank).
        Behind a random B they add as random numbers of variance 1 / rank: as much as one. Where this is the same at
        all ranks, so may the best rate be. That there are such settings, and others whose best rate falls as 1 / rank,
        is of arXiv 2602.06204; the argument here is our own, and of the first step only: later both
        matrices have moved, and what their changes do together grows as scale * rank. On the built-in model the best
        rate stayed with a random A and a number for alpha, under which this too is the same at all ranks; with alpha =
        rank, and with random_b, it fell as 1 / sqrt(rank).
        None: of initialisations from the base weight or orthogonal ones, of which it tells nothing.
        """
        moved = {"default": float(self.rank), "gaussian": 1.0, "random_b": 1.0}.get(self.initialization)
        return None if moved is None else self.scale * moved


class FullTuner(Section):
    """Every weight of the named parts."""

    type: Literal["full"] = "full"
    train: Parts | None = None
    """Parts whose weights all move, for example [unet, text_encoder]. null: those the objective is about."""
    init: Init | None = None
    """Continue from a published adapter; a LoRA is merged into the weights first."""


class FreezeTuner(Section):
    """The weights behind the first blocks of the main part, or some kinds of them; of a GAN those of both networks."""

    train: ClassVar[None] = None
    type: Literal["freeze"] = "freeze"
    freeze_depth: FreezeDepth
    """The first k blocks do not move: a whole number, or a fraction of the block count in [0, 1)."""
    only: Annotated[list[Literal["norm", "bias", "cross_attention"]], Field(min_length=1)] | None = None
    """Of what is not frozen only these move: normalisation layers, biases, attention to the condition. This is of the
    main part."""
    discriminator_depth: FreezeDepth = 0
    """Of a GAN: the first k blocks of its discriminator, those nearest to the picture, do not move (FreezeD, Mo et al.
    2020, arXiv 2002.10964)."""
    init: Init | None = None
    """Continue from a published adapter; a LoRA is merged into the weights first."""


class PromptTuner(Section):
    """A new word of the text encoders (textual inversion, Gal et al. 2022, arXiv 2208.01618).

    Nothing of the model moves. Every caption has to contain the word, for example by data.caption_template: a photo of
    <dog>; a caption without it would teach nothing, and is refused. Prompts that contain it draw what was learned.
    """

    train: ClassVar[None] = None
    type: Literal["prompt"] = "prompt"
    token: Token
    """The word, for example <dog>, in lower case and without spaces. The model must not know it yet."""
    vectors: Vectors = 1
    """How many vectors it has; a prompt has room for as many tokens fewer."""
    initializer: Initializer | None = None
    """A text of at most as many tokens as vectors, whose vectors it starts from, in order, over and over."""
    init: Init | None = None
    """Continue from a published word of the same name and number of vectors."""

    @model_validator(mode="after")
    def _check_start(self) -> "PromptTuner":
        check_start(self.init, self.initializer)
        return self


class HeadTuner(Section):
    """The heads of a model that sees, or of one that reads captions. The network under them stays, and what it makes of
    the images or captions is made once."""

    train: ClassVar[None] = None
    type: Literal["head"] = "head"
    init: Init | None = None
    """Continue from published heads of the same tasks."""


Tuner = Annotated[
    Annotated[LoraTuner, Tag("lora")]
    | Annotated[FullTuner, Tag("full")]
    | Annotated[FreezeTuner, Tag("freeze")]
    | Annotated[PromptTuner, Tag("prompt")]
    | Annotated[HeadTuner, Tag("head")],
    Discriminator(type_of("lora")),
]
