"""The recipe: everything that decides a run, in one frozen value."""

import os
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from gtl.config.base import ModelSource, Place, Section
from gtl.config.evaluate import Evaluate
from gtl.config.metrics import METRICS, MetricName, check_metrics, check_objective, of_pictures
from gtl.config.objectives import AdversarialObjective, AlignObjective, DenoiseObjective, Objective, is_judged, rate_of
from gtl.config.pairs import Needs, Pair, pair, with_trained
from gtl.config.tuners import FreezeTuner, FullTuner, LoraTuner, PromptTuner, Tuner
from gtl.types import Sampler


class Model(Section):
    """The pretrained model."""

    source: ModelSource
    """A hub id, a local folder in diffusers layout, or a bucket URL of one."""
    family: str = "auto"
    """auto: read from model_index.json. A name is only checked against it."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Weight-file variant, for example fp16."""
    weights: Literal["stored", "random"] = "stored"
    """random: the parts that move begin at fresh weights, drawn by train.seed, and not at those that they had learned:
    what transfer is compared with. For tuner.type: full."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of frozen weights and of the arithmetic; what is trained stays fp32. auto: bf16 on a GPU, fp32 on a CPU."""
    quantization: Literal["nf4", "int8", "fp8"] | None = None
    """Of the frozen linear layers in the denoiser's blocks while adapters train over them: 4 bits a weight (QLoRA,
    Dettmers et al. 2023, arXiv 2305.14314) or 8. Less memory, slower steps. Needs bitsandbytes: gtl[quantized]."""


class Source(Section):
    """One of several data sources."""

    source: Place
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of its images' loss."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Times that an epoch has each of its images."""


class Data(Section):
    """The images and their captions."""

    source: Place | Annotated[list[Source], Field(min_length=1)]
    """A folder, Parquet, WebDataset (.tar) or bucket URL, or a list of {source, weight, repeats}."""
    captions: Literal["auto", "metadata", "sidecar", "folder", "template"] = "auto"
    """auto: metadata.jsonl, then a .txt beside the image, then caption_template, then the folder's name."""
    caption_template: str | None = None
    """One caption for every image; {folder} and {file} are filled in. For example `a photo of sks {folder}`."""
    resolution: Annotated[int, Field(ge=8)] = 512
    """Side of a square crop, in pixels; buckets keep its area."""
    buckets: bool = True
    """Group images by aspect ratio instead of cropping all to a square."""
    flip: bool = False
    """Also cache each image mirrored."""
    crops: Annotated[int, Field(ge=1)] = 1
    """Crop variants an image; the first is the centre crop."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the images that is held out, by their bytes, to measure val_loss on; above 0 it is at least one."""
    max_broken: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Fail when more than this share of the files can't be read."""
    gpus_per_encoder: Annotated[int, Field(ge=1)] = 1
    """GPUs of one machine for each process that encodes into the cache, where there are GPUs. A text encoder that is
    larger than one is spread over them; what is left over stays in the machine's memory."""
    seed: int = 0
    """Order of the images, crops, and the noise drawn for them."""


class Optimizer(Section):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101)."""

    type: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit needs bitsandbytes."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2


class Schedule(Section):
    """The learning rate over the run, as a factor of train.learning_rate."""

    type: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to zero at the last step."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""


def check_absolute(folder: str) -> str:
    """Refuse a folder that would be another one for every process."""
    if not os.path.isabs(folder):
        raise ValueError("should be an absolute path, since workers have other working folders")
    return folder


class Zero(Section):
    """DeepSpeed ZeRO sharding (Rajbhandari et al. 2020, arXiv 1910.02054)."""

    stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """0 none, 1 optimizer, 2 and gradients, 3 and weights. auto: what fits without sharding runs unsharded."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """cpu: the machine's memory instead of the GPU's holds, from stage 1 on, the optimizer's state, which is stepped
    there, and at stage 3 the weights too (arXiv 2101.06840). nvme: the same in files of a local disk, mapped, of which
    the machine's memory holds as much as it has room for (for the idea see arXiv 2104.07857)."""
    offload_folder: Annotated[str, AfterValidator(check_absolute)] | None = None
    """Where offload: nvme keeps them, on every machine. null: the machine's folder for temporary files (TMPDIR). It has
    to be on a disk; nothing is left there when the run ends, however it ends."""
    hpz: Annotated[int, Field(ge=1)] = 1
    """So many workers in a row hold all weights among them a second time, and the backward pass gathers from there (hpZ
    of ZeRO++, arXiv 2306.10209): faster between machines, for so many as each has, and more memory. 1: off. Stage 3
    only."""


class Checkpoints(Section):
    """Saved states of a run."""

    every: Annotated[int, Field(ge=1)] = 200
    """Most steps between two, and most that a kill at any moment costs: a write that takes longer than a step begins
    earlier."""
    keep: Annotated[int, Field(ge=1)] = 3
    """The newest that stay."""
    best: MetricName | None = None
    """Publish the weights that were best by this metric at a look (evaluate.every), instead of the last ones."""


class EarlyStopping(Section):
    """End a run that no longer gets better by a metric, and publish its best weights (Prechelt 1998)."""

    metric: MetricName = "val_loss"
    """val_loss needs data.validation; others are measured of pictures, as evaluate.beside says."""
    patience: Annotated[int, Field(ge=1)] = 5
    """Looks without a new best before the run ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """By how much a new best has to be better."""


def default_steps(given: dict[str, Any]) -> int | None:
    """train.steps when it is left out."""
    return 1000 if given.get("epochs") is None else None


def check_elastic(bounds: tuple[int, int]) -> tuple[int, int]:
    """Refuse a range that holds nothing."""
    if bounds[0] > bounds[1]:
        raise ValueError("should be [fewest, most], the smaller one first")
    return bounds


Elastic = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], AfterValidator(check_elastic)]
"""The fewest and the most."""


class Train(Section):
    """The optimisation and where it runs."""

    epochs: Annotated[int, Field(ge=1)] | None = None
    """Passes over the images of data.source; give this or steps."""
    steps: Annotated[int, Field(ge=1)] | None = Field(default_factory=default_steps)
    """Optimizer steps; give this or epochs. 1000 when neither is given."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Images per optimizer step, over all workers."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Images per forward pass of one worker; accumulation follows."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] | Elastic = "auto"
    """Training processes. auto: one per GPU of the cluster, else one. [1, 4]: as many as there is room for, of at least
    1 and at most 4, fewer when machines are lost and more when they come back."""
    gpus_per_worker: Literal["auto", 0, 1] = "auto"
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    zero: Zero = Zero()
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the trained weights, which is then what is published."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    compile: bool = False
    """torch.compile the model's blocks."""
    checkpoints: Checkpoints = Checkpoints()
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times that the run goes on by itself, from its newest checkpoint, after a worker or its machine died. Machines
    that are taken away with notice do not count."""
    early_stopping: EarlyStopping | None = None
    seed: int = 0
    """Initial adapter weights and dropout."""

    @model_validator(mode="after")
    def _check_length(self) -> "Train":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps is {self.steps} and epochs is {self.epochs}; keep one and set the other to null")
        if self.steps is None and self.epochs is None:
            raise ValueError("steps and epochs are both null; give one")
        return self


class Storage(Section):
    """Where things are kept: local folders or bucket URLs."""

    runs: Place = Field(default_factory=lambda: os.environ.get("GTL_RUNS", "./runs"), validate_default=True)
    cache: Place = Field(default_factory=lambda: os.environ.get("GTL_CACHE", "./cache"), validate_default=True)
    registry: Place = Field(default_factory=lambda: os.environ.get("GTL_REGISTRY", "./registry"), validate_default=True)


class Recipe(Section):
    """A training run."""

    model: Model
    tuner: Tuner = LoraTuner()
    objective: Objective = DenoiseObjective()
    data: Data
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    storage: Storage = Field(default_factory=Storage)

    @property
    def pair(self) -> Pair:
        """The table's row of this tuner and this objective."""
        return pair(self.tuner.type, self.objective.type)

    @property
    def max_zero_stage(self) -> int:
        """The highest ZeRO stage that the pair bears, with what this objective asks for."""
        # Where a player is judged, its network runs within the turn of the other, on whole weights.
        return min(self.pair.max_zero_stage, 2 if is_judged(self.objective) else 3)

    @property
    def needs(self) -> Needs:
        """What training reads, with the parts that the tuner moves."""
        needs, tuner = with_trained(self.pair.needs, self.tuner.train or ()), self.tuner
        if isinstance(tuner, LoraTuner) and tuner.token is not None:
            return replace(needs, text="tokens", word=tuner.token, everywhere=False)
        return replace(needs, word=tuner.token) if isinstance(tuner, PromptTuner) else needs

    def train_of(self, player: str) -> Train:
        """`train` as it is for one of the objective's players."""
        if player != "discriminator":
            return self.train
        rate = rate_of(self.objective) or self.train.learning_rate
        return self.train.model_copy(update={"learning_rate": rate, "ema": None})

    @property
    def sampler(self) -> Sampler:
        """That what is trained is drawn by."""
        return "lcm" if self.objective.type == "consistency" else "model"

    @property
    def judged_by(self) -> str | None:
        """The metric that says which weights of a run are published; None: the last ones are."""
        stopping = self.train.early_stopping
        return self.train.checkpoints.best if stopping is None else stopping.metric

    @property
    def at_looks(self) -> Evaluate:
        """What a look at the run draws and measures, without the loss on held-out images."""
        beside = self.evaluate.beside
        names = dict.fromkeys([*beside.metrics, *([self.judged_by] if self.judged_by else [])])
        return self.evaluate.model_copy(update={"metrics": of_pictures(names), "samples": beside.samples})

    @model_validator(mode="after")
    def _check_pair(self) -> "Recipe":
        stage, limit = self.train.zero.stage, self.max_zero_stage
        if stage != "auto" and stage > limit:
            raise ValueError(
                f"train.zero.stage: {stage}: {self.tuner.type} with {self.objective.type} bears at most {limit}"
            )
        return self

    @model_validator(mode="after")
    def _check_zero(self) -> "Recipe":
        zero, optimizer = self.train.zero, self.train.optimizer.type
        asked = f"train.zero.offload: {zero.offload}"
        if zero.offload != "none" and zero.stage == 0:
            raise ValueError(f"{asked}: moves what is sharded, and stage 0 shards nothing; take 1 to 3")
        if zero.offload != "none" and optimizer != "adamw":
            raise ValueError(f"{asked}: {optimizer} steps on a GPU only; take adamw")
        if zero.offload == "nvme" and zero.hpz > 1:
            raise ValueError(
                f"{asked}: train.zero.hpz: {zero.hpz} keeps the weights a second time in memory; take one of the two"
            )
        if zero.hpz > 1 and zero.stage != 3:
            raise ValueError(f"train.zero.hpz: {zero.hpz}: it is about weights in shares; set train.zero.stage: 3")
        return self

    @model_validator(mode="after")
    def _check_quantization(self) -> "Recipe":
        if self.model.quantization is not None and not self.pair.frozen_base:
            raise ValueError(
                f"model.quantization: {self.model.quantization!r}: {self.tuner.type} moves the model's own weights, "
                "which have to be whole for that; take tuner.type: lora, or null"
            )
        return self

    @model_validator(mode="after")
    def _check_teacher(self) -> "Recipe":
        if self.objective.type == "consistency" and isinstance(self.tuner, LoraTuner):
            if self.tuner.token is not None:
                raise ValueError(f"tuner.token: {self.tuner.token!r}: the teacher of consistency can't read it")
            start = self.tuner.initialization
            if start.startswith(("pissa", "olora")):
                raise ValueError(
                    f"tuner.initialization: {start}: takes a part of the model's weights, which objective.type: "
                    "consistency has for its teacher; take default"
                )
        return self

    @model_validator(mode="after")
    def _check_domains(self) -> "Recipe":
        if isinstance(self.objective, AlignObjective):
            source = self.data.source
            self.objective.check_sources([source] if isinstance(source, str) else [each.source for each in source])
        return self

    @model_validator(mode="after")
    def _check_judge(self) -> "Recipe":
        stopping, best = self.train.early_stopping, self.train.checkpoints.best
        if stopping is not None and best not in (None, stopping.metric):
            raise ValueError(
                f"train.checkpoints.best: {best!r}: train.early_stopping publishes what is best by {stopping.metric}; "
                "leave one of the two out"
            )
        if self.judged_by and not of_pictures([self.judged_by]) and not self.data.validation:
            key = "early_stopping" if stopping is not None else "checkpoints.best"
            raise ValueError(f"train.{key}: there is nothing to judge by; set data.validation, such as 0.05")
        return self

    @model_validator(mode="after")
    def _check_beside(self) -> "Recipe":
        asked = self.at_looks
        if not asked.metrics:
            return self
        first, beside = asked.metrics[0], self.evaluate.beside
        if not self.pair.draws:
            raise ValueError(f"evaluate.beside.metrics: {first}: {self.objective.type} draws no pictures of prompts")
        if asked.prompts == []:
            raise ValueError(f"evaluate.prompts: []: there is nothing to draw for {first}; give prompts, or auto")
        check_metrics(asked.metrics, beside.samples, asked.clip, "evaluate.beside.samples")
        if not self.data.validation:
            for name in asked.metrics:
                if "held_out" in METRICS[name].needs:
                    raise ValueError(f"evaluate.beside.metrics: {name}: set data.validation, such as 0.05")
        return self

    @model_validator(mode="after")
    def _check_blocks(self) -> "Recipe":
        whole = {
            "autoencode": "which an autoencoder is not divided into", "adversarial": "and a GAN's blocks are too small",
            "classify": "which would count the statistics of a batch twice",
        }  # fmt: skip
        for key in ("activation_checkpointing", "compile"):
            if self.objective.type in whole and getattr(self.train, key):
                raise ValueError(f"train.{key}: true: goes block by block, {whole[self.objective.type]}")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> "Recipe":
        if self.model.weights == "random" and not (isinstance(self.tuner, FullTuner) and self.tuner.init is None):
            raise ValueError(
                "model.weights: random: leaves nothing to build upon; take tuner.type: full without init, or stored"
            )
        return self

    @model_validator(mode="after")
    def _check_outcomes(self) -> "Recipe":
        judged = "train.early_stopping.metric or train.checkpoints.best"
        given = {"evaluate.metrics": self.evaluate.metrics, "evaluate.beside.metrics": self.evaluate.beside.metrics}
        check_objective({**given, judged: [self.judged_by] if self.judged_by else []}, self.objective.type)
        return self

    @model_validator(mode="after")
    def _check_players(self) -> "Recipe":
        if not isinstance(self.objective, AdversarialObjective):
            if isinstance(self.tuner, FreezeTuner) and self.tuner.discriminator_depth:
                raise ValueError(
                    f"tuner.discriminator_depth: {self.tuner.discriminator_depth}: {self.objective.type} has no "
                    "discriminator; leave it out"
                )
            return self
        if isinstance(self.tuner, FullTuner) and self.tuner.train and len(self.tuner.train) < 2:
            raise ValueError(f"tuner.train: {self.tuner.train}: both networks learn from each other; leave it out")
        asked = {"evaluate.metrics": self.evaluate.metrics, "evaluate.beside.metrics": self.evaluate.beside.metrics}
        asked["train.early_stopping.metric or train.checkpoints.best"] = [self.judged_by] if self.judged_by else []
        for key, names in asked.items():
            if wrong := [name for name in names if name in ("val_loss", "clip_score", "prompt_accuracy")]:
                raise ValueError(f"{key}: {wrong[0]}: adversarial has no such number; take kid, diversity or the like")
        if self.evaluate.prompts not in ("auto", []):
            raise ValueError("evaluate.prompts: adversarial draws from noise alone; leave it out, or [] for no grid")
        return self
