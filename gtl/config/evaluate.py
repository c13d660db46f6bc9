"""What a recipe measures and draws."""

from typing import Annotated, Literal

from pydantic import Field

from gtl.config.base import ModelSource, Section
from gtl.config.metrics import MetricName


class Beside(Section):
    """What is measured of a run at every look beside its loss on held-out images: on GPUs or CPUs that training leaves
    free, while it goes on, or by the workers themselves, while it waits."""

    metrics: list[MetricName] = []
    """What train.early_stopping and train.checkpoints.best go by is always among them."""
    samples: Annotated[int, Field(ge=1)] = 64
    """Pictures that are drawn for that."""


class Evaluate(Section):
    """What is measured and drawn: while a run goes on, every so often, and by `gtl evaluate`."""

    every: Annotated[int, Field(ge=1)] = 200
    """Steps between two looks at a run."""
    prompts: Literal["auto"] | list[Annotated[str, Field(min_length=1)]] = "auto"
    """A grid of them is drawn at every look, and `gtl evaluate` draws its samples of them in turn. auto: captions of
    the images, held-out ones first, for a grid four; []: no grid."""
    metrics: Annotated[list[MetricName], Field(min_length=1)] = ["kid", "diversity"]
    """What `gtl evaluate` measures; val_loss needs data.validation."""
    samples: Annotated[int, Field(ge=1)] = 256
    """Pictures that it draws for that."""
    beside: Beside = Beside()
    backbone: ModelSource = "builtin:backbone"
    """What makes features of pictures. The built-in one knows drawn scenes; for photographs give
    inception:FILE (FID's own network, with the weights of pytorch-fid), or a hub id or folder of a vision model such as
    DINOv2."""
    clip: ModelSource | None = None
    """A hub id or folder of a CLIP model, for clip_score and cmmd."""
    negative_prompt: str = ""
    steps: Annotated[int, Field(ge=1, le=999)] = 25
    """Denoising steps of a picture."""
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance of a picture."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Of the first prompt's picture; the next has the next."""
