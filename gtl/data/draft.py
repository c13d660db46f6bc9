"""A first recipe for images at hand: `gtl init FOLDER`."""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gtl.config import load_recipe
from gtl.config.base import absolute
from gtl.config.names import NAME
from gtl.data.check import Report, check
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from gtl.families.base import DiffusionFamily

LAPTOP_MODEL = "builtin:tiny"
GPU_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
BATCH_SIZE = 4
PASSES = 100
"""Over the images, within STEPS: what a LoRA of a subject or a style usually takes."""
STEPS = (400, 4000)
FEWEST_TO_HOLD_OUT = 40
"""Images; of fewer, what is held out would be missed."""

TEMPLATE = """\
# {images} images of {source}.
#
#   {command}
#   gtl generate --adapter {name} --prompt {prompt} --out pictures
#
# Every key: gtl/config/recipe.py. One for this run only: --set train.steps=100
model:
  source: {model:<23} # {model_note}
tuner:
  type: lora                      # full: all weights; freeze: the last blocks only
  rank: 16
objective:
  type: denoise
  caption_dropout: {dropout:<14} # share of captions left out, so that guidance keeps working
data:
  source: {folder}
{captions}
  resolution: {resolution:<19} # side of a crop in pixels; {sizes}
  buckets: {buckets:<22} # crops of other shapes for images that are not square
  flip: false                     # true also shows mirror images; not with writing or faces that you know
{validation}
train:
  steps: {steps:<24} # about {passes} times every image
  batch_size: {batch_size:<19} # of all workers together
  learning_rate: 1.0e-4
  ema: {ema:<26} # average of the last weights, which is what gets published
  checkpoints: {{every: {every}, keep: 3}}
evaluate:
  every: {every:<24} # steps between pictures, in runs/{name}/VERSION/samples
# What it makes goes to ./runs, ./cache and ./registry, or to where GTL_RUNS, GTL_CACHE and GTL_REGISTRY say; with
# several machines to a bucket:
# storage: {{runs: s3://bucket/runs, cache: s3://bucket/cache, registry: s3://bucket/adapters}}
"""


class Draft(NamedTuple):
    """A recipe file that was written."""

    file: Path
    name: str
    """Of the run and the adapter."""
    command: str
    """To train it with."""
    prompt: str
    """To try it with."""
    report: Report


def write_draft(folder: str, model: str | None = None, out: Path | None = None, progress: Progress = quiet) -> Draft:
    """Look at images and write a commented recipe for them.

    Args:
        folder: A folder, .parquet or .tar file, or a bucket URL of one.
        model: What to fine-tune; without one, Stable Diffusion 1.5 where a GPU is, else the built-in model.
        out: The file; without one, the folder's name in the working directory.
        progress: Is called as it goes on.

    Raises:
        UserError: there are no images, the model is not to be had, or the file exists.
    """
    from gtl.families import denoising, open_family

    title = posixpath.basename(absolute(folder).rstrip("/"))  # of `.` and `..` too
    file = out or Path(f"{name_after(title)}.yaml")
    if file.exists():
        raise UserError(f"--out {file}: is there already; remove it, or name another file")
    source = model or choose_model()
    family = denoising(open_family(source))
    report = check(folder, min(family.default_size), family.multiple, progress)
    if not report.num_images:
        raise UserError(f"data.source: {folder}: none of the images there can be read; gtl data check {folder}")
    name, prompt = name_after(file.stem), subject(report, title)
    command = f"gtl train {shlex.quote(str(file))}" + ("" if name == file.stem.lower() else f" --name {name}")
    text = fill(report, family, source, command=command, name=name, prompt=prompt)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {file}: cannot be written: {error.strerror or error}") from error
    load_recipe(file)
    return Draft(file, name, command, prompt, report)


def name_after(text: str) -> str:
    """A text as a name that the registry takes."""
    name = text.lower()
    return name if NAME.fullmatch(name) else re.sub(r"[^a-z0-9._-]+", "-", name).strip("-._") or "images"


def choose_model() -> str:
    """What this machine can train in a sensible time."""
    import torch

    return GPU_MODEL if torch.cuda.is_available() else LAPTOP_MODEL


def subject(report: Report, folder: str) -> str:
    """A prompt of the kind that the images will be captioned with."""
    if report.captions:
        return next(iter(report.captions))
    if has_classes(report):
        return posixpath.basename(posixpath.dirname(report.captionless[0]))
    return f"a photo of sks {folder}"


def has_classes(report: Report) -> bool:
    """Whether images without captions are in several folders, whose names then say what they show."""
    return len({posixpath.dirname(uri) for uri in report.captionless}) > 1


def fill(report: Report, family: DiffusionFamily, source: str, *, command: str, name: str, prompt: str) -> str:
    """The recipe."""
    images, resolution = report.num_images, min(family.default_size)
    wished = PASSES * images / BATCH_SIZE
    steps = round(min(max(wished, STEPS[0]), STEPS[1]), -2)
    small = len(report.too_small)
    other = f"on a GPU: {GPU_MODEL}" if source == LAPTOP_MODEL else "a hub id, or a folder in diffusers layout"
    return TEMPLATE.format(
        images=images, source=report.source, command=command, name=name, prompt=shlex.quote(one_line(prompt)),
        folder=scalar(report.source), model=scalar(source), model_note=other,
        dropout="0.1" if report.captions else "0.0", captions=captions(report), resolution=resolution,
        sizes=f"{small} images are smaller and are enlarged" if small else "no image is smaller",
        buckets=str(len(report.buckets) > 1).lower(), validation=validation(images), steps=int(steps),
        passes=max(1, round(steps * BATCH_SIZE / images)), batch_size=BATCH_SIZE,
        ema="0.99" if steps < 1000 else "0.999", every=max(50, int(steps) // 5),
    )  # fmt: skip


def captions(report: Report) -> str:
    """The lines that say where captions come from."""
    missing = len(report.captionless)
    if not missing:
        return "  captions: auto                  # from metadata.jsonl or the .txt beside each image: all have one"
    if report.captions or has_classes(report):
        return f"  captions: auto                  # {missing} images have none and get their folder's name"
    return (
        "  captions: auto                  # no image has one; a .txt beside each could say more than\n"
        "  caption_template: a photo of sks {folder}   # where sks, a rare word, comes to mean what the images show"
    )


def validation(images: int) -> str:
    """The line on held-out images."""
    if images < FEWEST_TO_HOLD_OUT:
        return "  # validation: 0.05              # share held out for val_loss; worth it from 40 images on"
    return "  validation: 0.05                # share held out, for val_loss"


def one_line(text: str) -> str:
    """A text that a comment can hold, where a line break would end it."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def scalar(text: str) -> str:
    """A string as YAML, quoted where it has to be."""
    return text if re.fullmatch(r"[\w./~][\w./:@~-]*", text) and not text.endswith(":") else json.dumps(text)
