"""Objectives: what the moving weights learn."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from gtl.config.base import ModelSource, Place, Section, type_of

PERCEPTUAL = r"^(builtin:backbone|vgg19:.+)$"
"""Networks that a distance of pictures can be taken in."""


class Timesteps(Section):
    """How training times are drawn, one per sample."""

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """logit_normal: Esser et al. 2024, arXiv 2403.03206, section 3.1."""
    mean: float = 0.0
    """Location of logit_normal."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Scale of logit_normal."""
    shift: Annotated[float, Field(gt=0)] | Literal["model"] = 1.0
    """t' = s t / (1 + (s - 1) t), towards noise for s > 1; `model` takes the scheduler's own shift."""


class PriorPreservation(Section):
    """Class images made once by the base model and learned beside the subject (DreamBooth, arXiv 2208.12242).

    An epoch has as many of them as images of the subject, and the next one goes on with those that follow.
    """

    prompt: Annotated[str, Field(min_length=1)]
    """What the base model draws, for example `a photo of a dog`."""
    images: Annotated[int, Field(ge=1)] = 100
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of a class image's loss beside a subject image's 1."""
    steps: Annotated[int, Field(ge=1, le=999)] = 25
    """Denoising steps of the class images."""
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance of the class images."""


class Noising(Section):
    """What noise is added to images, and when, and what the error weighs."""

    type: Any
    """Of each objective its own; the first of its keys."""
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """Loss weight min(SNR, gamma) (Hang et al. 2023, arXiv 2303.09556); not for flow matching."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of samples trained on the empty caption, for classifier-free guidance."""
    offset_noise: Annotated[float, Field(ge=0)] = 0.0
    """Adds offset_noise * N(0, 1) per sample and channel to the noise."""
    timesteps: Timesteps = Timesteps()


class DenoiseObjective(Noising):
    """Predict what the model's own noise path asks for: noise, velocity or flow."""

    type: Literal["denoise"] = "denoise"
    prior: PriorPreservation | None = None


class InstructObjective(Noising):
    """Edit an image as an instruction says: InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800).

    The model sees the latents of the image in further channels of its input. Of the data every image has to be an edit
    of another one, and its caption the instruction.
    """

    type: Literal["instruct"]
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of samples trained without the instruction alone, for its guidance."""
    image_dropout: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of samples trained without the image alone, for its own guidance."""
    both_dropout: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of samples trained without either."""

    @model_validator(mode="after")
    def _check_dropout(self) -> "InstructObjective":
        total = self.caption_dropout + self.image_dropout + self.both_dropout
        if total > 1:
            raise ValueError(f"caption_dropout, image_dropout and both_dropout add up to {total:g}; at most 1")
        return self


class DistillObjective(Noising):
    """Denoise as a larger model of the same kind does (BK-SDM, Kim et al. 2023, arXiv 2305.15798).

    Both see the same latents and prompts: codec and text encoders have to be the same. `gtl shrink` makes a student.
    """

    type: Literal["distill"]
    teacher: ModelSource
    """A hub id, a local folder in diffusers layout, or a bucket URL of one. It has room of its own beside the student,
    and does not move."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Weight-file variant, for example fp16."""
    task: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the error that objective.type: denoise is about."""
    output: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the mean squared distance from the teacher's output."""
    features: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the same of what the sections of a UNet, or the blocks of a transformer, put out, over all added up;
    each in mean squares of the teacher's own, since some are a hundred times as large as others."""

    @model_validator(mode="after")
    def _check_teaching(self) -> "DistillObjective":
        if self.output == self.features == 0:
            raise ValueError("output and features are both 0; one of them has to be above, or the teacher says nothing")
        return self


class AlignObjective(Noising):
    """Denoise images of two domains, many of one and few of another, so that what the model makes of them half-way
    through can't be told apart: what it learns of the many then holds for the few."""

    type: Literal["align"]
    target: Place
    """The one of data.source's list that has the images of the domain to adapt to; all others are the source domain.
    Every batch has both, in the shares that repeats gives them."""
    method: Literal["dann", "mmd", "coral"] = "dann"
    """What is small when the domains are alike. dann: how well a small network, which learns too, tells their features
    apart; its gradient reaches the model reversed (Ganin et al. 2016, arXiv 1505.07818). mmd: the maximum mean
    discrepancy under five Gaussian kernels (Long et al. 2015, arXiv 1502.02791). coral: how far their covariances are
    apart (Sun & Saenko 2016, arXiv 1607.01719)."""
    weight: Annotated[float, Field(gt=0)] = 0.01
    """Of it beside the denoising loss; of dann that of the reversed gradient at the end of the run, to which it rises
    from 0 as 2 / (1 + exp(-10 p)) - 1, with p the share of the run that is done."""

    @property
    def fewest(self) -> int:
        """Images of each domain that a forward pass has to hold: 0 where each image counts by itself, in a batch 1."""
        return 0 if self.method == "dann" else 2

    def check_sources(self, given: Sequence[str]) -> None:
        """Refuse a target that none of the sources is, or all are."""
        if self.target not in given:
            raise ValueError(f"objective.target: {self.target}: is none of data.source: {', '.join(given)}")
        if set(given) == {self.target}:
            raise ValueError(f"objective.target: {self.target}: is all there is; add the source domain to data.source")


class AutoencodeObjective(Section):
    """Encode pixels, decode them again, stay near the standard normal (Kingma & Welling 2013, arXiv 1312.6114)."""

    type: Literal["autoencode"] = "autoencode"
    l1: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the mean absolute error, with pixels in [-1, 1]."""
    l2: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean squared error."""
    kl: Annotated[float, Field(ge=0)] = 1e-6
    """Weight of the divergence of the posterior from the standard normal, in nats an image: beta (Higgins et al. 2017)
    over the values of a picture."""
    perceptual: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the distance of features at several depths of a network that sees (Zhang et al. 2018, arXiv 1801.03924,
    without their learned weights of channels)."""
    perceptual_network: Annotated[str, Field(pattern=PERCEPTUAL)] = "builtin:backbone"
    """builtin:backbone knows drawn scenes only. vgg19:FILE: VGG19 with the weights that torchvision publishes."""
    adversarial: Annotated[float, Field(ge=0)] = 0.0
    """Weight of what a second network says of the decoded picture, patch by patch, which learns meanwhile to tell them
    from those of the data (hinge loss, PatchGAN; Esser et al. 2021, arXiv 2012.09841): it makes them sharp."""
    adversarial_after: Annotated[int, Field(ge=0)] = 0
    """Steps of the codec before that network begins to learn and to be listened to: it has to draw something first."""

    @model_validator(mode="after")
    def _check_reconstruction(self) -> "AutoencodeObjective":
        if self.l1 == self.l2 == 0:
            raise ValueError("l1 and l2 are both 0; one of them has to be above, or nothing asks for the picture back")
        return self


class ConsistencyObjective(Section):
    """Draw in a few steps what the model draws in many: latent consistency distillation (Luo et al. 2023, arXiv
    2310.04378; Song et al. 2023, arXiv 2303.01469), and beside it adversarial distillation.

    The teacher is the model itself, without what is trained: of an adapter what is under it, of tuner.type: full a
    second copy. What is learned is drawn by the sampler of consistency
    models, in 2 to 8 steps and without guidance: that is learned too.
    """

    type: Literal["consistency"] = "consistency"
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Scale of the teacher's classifier-free guidance, 1 and below is off; of a distilled model the scale that it is
    told, and has to be told again when it draws."""
    solver_steps: Annotated[int, Field(ge=2, le=999)] = 50
    """Steps that the teacher would take from noise to a picture; the student learns to skip them."""
    huber: Annotated[float, Field(gt=0)] = 1e-3
    """c of the pseudo-Huber loss sqrt(d^2 + c^2) - c (arXiv 2310.14189, section 3.3)."""
    adversarial: Annotated[float, Field(ge=0)] = 0.0
    """Weight of what a second network says of what the student draws at once, which learns meanwhile to tell it from
    the data (adversarial diffusion distillation, Sauer et al. 2023, arXiv 2311.17042; in latents, by heads on what the
    teacher's sections put out, arXiv 2403.12015; hinge loss): it is for one step and two, where the mean of all that
    could be drawn is a blur."""
    adversarial_after: Annotated[int, Field(ge=0)] = 0
    """Steps of the student before that network begins to learn and to be listened to."""
    adversarial_steps: Annotated[int, Field(ge=1, le=999)] = 4
    """What it judges is drawn from one of so many times, which are those of the sampler for as many steps; 1: from
    noise alone."""
    r1: Annotated[float, Field(ge=0)] = 0.0
    """gamma of gamma/2 times the squared gradient of its logits in the teacher's features of the data (arXiv
    2311.17042, section 3.2)."""
    discriminator_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of that network. null: train.learning_rate."""


class ClassifyObjective(Section):
    """Say what is in a picture, or what a caption is about: what the heads of the model are for, learned from columns
    of the data. `gtl heads` makes such a model; several heads learn together."""

    type: Literal["classify"] = "classify"
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Of a task's loss, by the task's name, where it is not 1."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the truth that all classes have alike (label smoothing, Szegedy et al. 2015, arXiv 1512.00567)."""
    size_weight: Annotated[float, Field(ge=0)] = 0.1
    """Of the error of an object's size beside that of where it is, both in widths of the picture's places."""


class Augmentation(Section):
    """What both real and drawn pictures go through before the discriminator sees them (Zhao et al. 2020, arXiv
    2006.10738). With few pictures it is what keeps the discriminator from knowing them by heart."""

    kinds: Annotated[list[Literal["color", "translation", "cutout"]], Field(min_length=1)] = [
        "color", "translation", "cutout"
    ]  # fmt: skip
    probability: Annotated[float, Field(ge=0, le=1)] | Literal["adaptive"] = 1.0
    """Of each kind for each picture. adaptive: as much as keeps the discriminator from being sure of the pictures that
    it learns from (ADA, Karras et al. 2020, arXiv 2006.06676)."""
    target: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Of adaptive: the mean sign of the logits of real pictures, above which the probability rises."""
    images: Annotated[int, Field(ge=1)] = 500_000
    """Of adaptive: in so many it can rise from 0 to 1."""


class AdversarialObjective(Section):
    """Draw pictures that a second network, which learns too, can't tell from those of the data (Goodfellow et al. 2014,
    arXiv 1406.2661). train.learning_rate, train.ema and what the tuner says of the main part are the generator's."""

    type: Literal["adversarial"] = "adversarial"
    loss: Literal["bce", "hinge", "wasserstein"] = "bce"
    """bce: the non-saturating loss. hinge: Lim & Ye 2017, arXiv 1705.02894. wasserstein: the difference of the logits'
    means (Arjovsky et al. 2017, arXiv 1701.07875), which needs gradient_penalty or a discriminator whose spectra are
    normalised."""
    r1: Annotated[float, Field(ge=0)] = 0.0
    """gamma of gamma/2 times the squared gradient at real pictures (Mescheder et al. 2018, arXiv 1801.04406)."""
    gradient_penalty: Annotated[float, Field(ge=0)] = 0.0
    """lambda of how far the gradient's norm is from 1 between real and drawn pictures (WGAN-GP, Gulrajani et al. 2017,
    arXiv 1704.00028, which has 10)."""
    augmentation: Augmentation | None = Augmentation()
    discriminator_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """null: train.learning_rate (Heusel et al. 2017, arXiv 1706.08500, have a higher one)."""
    collapse: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """A run warns when the drawn pictures of a batch are less different from each other than this share of what real
    ones are, over some steps; 0: never."""


Objective = Annotated[
    Annotated[DenoiseObjective, Tag("denoise")]
    | Annotated[AutoencodeObjective, Tag("autoencode")]
    | Annotated[ConsistencyObjective, Tag("consistency")]
    | Annotated[DistillObjective, Tag("distill")]
    | Annotated[AlignObjective, Tag("align")]
    | Annotated[InstructObjective, Tag("instruct")]
    | Annotated[AdversarialObjective, Tag("adversarial")]
    | Annotated[ClassifyObjective, Tag("classify")],
    Discriminator(type_of("denoise")),
]


def is_judged(objective: Objective) -> bool:
    """Whether a second network judges what the first one makes of the data itself, beside its other losses."""
    return isinstance(objective, AutoencodeObjective | ConsistencyObjective) and objective.adversarial > 0


def rate_of(objective: Objective) -> float | None:
    """The learning rate of a discriminator, where it has one of its own."""
    if isinstance(objective, AdversarialObjective | ConsistencyObjective):
        return objective.discriminator_learning_rate
    return None
