"""What is compared in the table of kinds of transfer: each method beside its proper baseline."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gtl.bench.choosing import Choose, best_alone, best_kind, best_wording, in_one, worded
from gtl.bench.editing import BEGUN, INSTRUCTED, INVERTED, Way
from gtl.data.scenes.vocabulary import SHAPES
from gtl.data.scenes.words import vocabulary
from gtl.families.blank import forget
from gtl.families.deepfloyd_blank import write_cascade
from gtl.families.files import write_once
from gtl.families.shrink import shrink
from gtl.features.heads import make_heads

SCENES = "builtin:scenes?count=1000"
"""That recipes/demo/heads.yaml learns from."""


@dataclass(frozen=True)
class Arm:
    """One side of a comparison."""

    title: str
    overrides: tuple[str, ...] = ()
    """`key=value` for the recipe."""
    model: Callable[[Path], None] | None = None
    """Makes what is trained, in a folder; None: what the recipe says."""
    before: str | None = None
    """In gtl/recipes/demo: what the model learns first, of the data that stands there."""
    is_trained: bool = True
    """False: the recipe's model as it is."""
    recipes: tuple[str, ...] = ()
    """In gtl/recipes/demo: trained apart in place of the comparison's, their adapters all active at once."""
    choose: Choose | None = None
    """What of the trained is measured, and in which words; None: all of them at once, the prompts as they are."""


@dataclass(frozen=True)
class Comparison:
    """A kind of transfer, and what it has to be better than."""

    name: str
    recipe: str
    """In gtl/recipes/demo."""
    metric: str
    method: Arm
    baseline: Arm
    measured: tuple[str, ...] = ()
    """`key=value` for the recipe when its pictures are measured, where that is not on the images of training."""
    ways: tuple[Way, Way] | None = None
    """How pairs of scenes are edited by the method and by its baseline, where that is what is compared."""


FROM_NOTHING = ("model.weights=random", "tuner={type: full, train: [unet, text_encoder]}")


BOTH = (
    "data.source=builtin:scenes?concept=blick&style=neon&count=128&seed=1", "evaluate.samples=128",
    "evaluate.guidance=3.0",
)  # fmt: skip
"""Prompts of both, in nobody's training pictures: the concept's are in no style, and the style's of no concept."""
WORD = (
    "evaluate.samples=128", "evaluate.steps=12", "evaluate.guidance=3.0",
    "evaluate.prompts=" + json.dumps([
        "on a white background: a large red", "gradient green background, a large pink", "white background, a cyan",
        "yellow background, a large blue", "on a gradient blue background: a yellow", "gray background, a small orange",
        "on a green background: a small purple", "on a black background: a green",
    ]),
)  # fmt: skip
"""Prompts to which the name of a thing is missing."""
FRAMES = ("a large {}", "a small {}", "{} on a white background", "{} in the centre")
FOUND_WORDS = Arm(
    "words around prompts, as a search finds them", is_trained=False,
    choose=best_wording(FRAMES, [" on a black background", ", centre"], 16),
)  # fmt: skip
KNOWN_WORD = Arm(
    "the known word for it that draws best", WORD, is_trained=False,
    choose=best_wording([f"{{}} {shape}" for shape in SHAPES]),
)  # fmt: skip
THINGS = ("data.source=builtin:scenes?concept=blick&count=256&seed=1",)
"""Pictures of it that nothing was learned from."""


NEON_STAGE = (
    "data.source=builtin:scenes?style=neon&count=32", "data.validation=0.25", "train.steps=80",
    "train.checkpoints.every=80", "evaluate.every=80",
)  # fmt: skip
"""Of which a quarter is held out."""


def first_stage(folder: Path) -> None:
    """The first stage of the demo's cascade, which has learned nothing."""
    with tempfile.TemporaryDirectory() as both:
        write_cascade(Path(both), vocabulary())
        shutil.copytree(Path(both) / "first", folder, dirs_exist_ok=True)


def cut(folder: Path) -> None:
    """The built-in model without the middle of its UNet."""
    shrink("builtin:tiny", folder, drop_middle=True)


def heads_on(
    source: str, forgets: bool = False, task: str = "shape", part: str | None = None
) -> Callable[[Path], None]:
    """A model with a head for the shapes of the built-in scenes, or the same with random weights under it.

    `part`: a text encoder of it, whose head reads their captions.
    """

    def make(folder: Path) -> None:
        beside = folder.with_name(f"{folder.name}-base")
        if forgets:
            write_once(beside, lambda blank: forget(source, blank))
        base, cache = str(beside) if forgets else source, str(folder.parents[1] / "cache")
        make_heads(base, SCENES, [task], folder, cache, part=part)

    return make


COMPARISONS = (
    Comparison(
        "freeze", "frozen", "prompt_accuracy",
        Arm("early blocks and text encoder frozen"), Arm("the same network from random weights", FROM_NOTHING),
    ),
    Comparison(
        "freeze-or-all", "frozen", "prompt_accuracy",
        Arm("early blocks and text encoder frozen"),
        Arm("every weight moves", ("tuner={type: full, train: [unet, text_encoder]}",)),
    ),
    Comparison(
        "lora", "study", "prompt_accuracy",
        Arm("LoRA of a new concept"), Arm("the same network from random weights", FROM_NOTHING),
    ),
    Comparison(
        "strategy", "study", "prompt_accuracy",
        Arm("the kind of transfer that a study chooses", is_trained=False, choose=best_kind),
        Arm("LoRA, as the recipe says"),
    ),
    Comparison(
        "few-steps", "few_steps", "prompt_accuracy",
        Arm("drawn in 2 steps, consistency LoRA"), Arm("the model alone in 2 steps", is_trained=False),
    ),
    Comparison(
        "one-step", "one_step", "prompt_accuracy",
        Arm("drawn in 1 step, consistency LoRA that is judged"),
        Arm("the same one that nobody judges", ("objective.adversarial=0",)),
    ),
    Comparison(
        "student", "student", "prompt_accuracy",
        Arm("distilled into three quarters of the weights", model=cut),
        Arm("the same one from random weights", ("objective={type: denoise}", "model.weights=random"), cut),
    ),
    Comparison(
        "adapt", "adapt", "prompt_accuracy",
        Arm("a style of 12 pictures, domains aligned"),
        Arm("plain fine-tuning on the same pictures", ("objective={type: denoise}",)),
    ),
    Comparison(
        "codec", "codec", "val_loss",
        Arm("a codec taught to keep chalk lines"), Arm("the same one from random weights", ("model.weights=random",)),
    ),
    Comparison(
        "cascade", "cascade", "val_loss",
        Arm("a cascade's first stage, taught a style of 24 pictures", NEON_STAGE, first_stage, before="cascade"),
        Arm("the same one from random weights", NEON_STAGE, first_stage),
    ),
    Comparison(
        "gan", "gan", "kid",
        Arm("a GAN fine-tuned to 100 pictures"), Arm("the same one from random weights", ("model.weights=random",)),
        ("data.source=builtin:scenes?style=neon&count=256&size=32&seed=1",),
    ),
    Comparison(
        "with-style", "concept", "prompt_accuracy",
        Arm("a concept and a style, trained apart", recipes=("concept", "style")),
        Arm("the concept alone", recipes=("concept",)), BOTH,
    ),
    Comparison(
        "with-concept", "style", "prompt_accuracy",
        Arm("a style and a concept, trained apart", recipes=("concept", "style")),
        Arm("the style alone", recipes=("style",)), BOTH,
    ),
    Comparison(
        "fusion", "concept", "prompt_accuracy",
        Arm("both in one LoRA of their rank", recipes=("concept", "style"), choose=in_one),
        Arm("the better of the two alone", recipes=("concept", "style"), choose=best_alone), BOTH,
    ),
    Comparison(
        "wording", "wording", "prompt_accuracy",
        FOUND_WORDS, Arm("the plain prompts", is_trained=False),
    ),
    Comparison(
        "wording-search", "wording", "prompt_accuracy",
        FOUND_WORDS, Arm("the best words that it began with", is_trained=False, choose=best_wording(FRAMES)),
    ),
    Comparison(
        "words", "word", "kid",
        Arm("a learned word for a thing", WORD, choose=worded("{} <blick>")), KNOWN_WORD, THINGS,
    ),
    Comparison(
        "words-and-weights", "pivotal", "kid",
        Arm("a word for a thing and a LoRA, learned at once", WORD, choose=worded("{} <blick>")), KNOWN_WORD, THINGS,
    ),
    Comparison(
        "instruct", "instruct", "prompt_accuracy",
        Arm("edits, told what to change"), Arm("image to image, told all that is to be seen", is_trained=False),
        ways=(INSTRUCTED, BEGUN),
    ),
    Comparison(
        "inversion", "instruct", "prompt_accuracy",
        Arm("edits by inversion", is_trained=False), Arm("image to image, of the same strength", is_trained=False),
        ways=(INVERTED, BEGUN),
    ),
    Comparison(
        "features", "heads", "accuracy",
        Arm("a head on features of the frozen diffusion model", model=heads_on("builtin:tiny")),
        Arm("a head on the same model with random weights", model=heads_on("builtin:tiny", forgets=True)),
    ),
    Comparison(
        "fine-tuned", "heads", "accuracy",
        Arm("a network that has learned to see, fine-tuned", ("tuner.type=full",), heads_on("builtin:backbone")),
        Arm("the same from random weights", ("tuner.type=full", "model.weights=random"), heads_on("builtin:backbone")),
    ),
    Comparison(
        "captions", "text_heads", "accuracy",
        Arm("a head on the frozen text encoder", model=heads_on("builtin:tiny", False, "colour", "text_encoder")),
        Arm("a head on it with random weights", model=heads_on("builtin:tiny", True, "colour", "text_encoder")),
    ),
    Comparison(
        "pixels", "heads", "accuracy",
        Arm("a head on features of the frozen diffusion model", model=heads_on("builtin:tiny")),
        Arm("a head on a picture's own pixels", model=heads_on("builtin:pixels")),
    ),
)  # fmt: skip
