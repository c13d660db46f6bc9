"""Makes the built-in models from nothing: random weights, the recipes of `gtl/recipes/builtin/`, the package's files.

    python -m gtl.builtin
    python -m gtl.builtin gan
    python -m gtl.builtin cascade       # untrained: what the recipes gtl/recipes/demo/cascade*.yaml begin at

Every stage leaves its result in the work folder and a run saves as it goes, so the same command goes on after an
interruption at any moment.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gtl.adapters import Registry, apply
from gtl.adapters.base import model_parts
from gtl.config import load_recipe
from gtl.data.scenes.sets import SceneSet
from gtl.data.scenes.words import captions, vocabulary
from gtl.families import denoising, open_family
from gtl.families.files import INDEX, write_once
from gtl.families.source import builtin_folder
from gtl.types import Progress, UserError

if TYPE_CHECKING:
    from torch import nn

    from gtl.families.base import DiffusionFamily, Family

RECIPES = Path(__file__).parent / "recipes" / "builtin"
MEASURED = 512
"""Pictures whose latents say how the model has to scale them."""
TELL_SECONDS = 5.0

Trained = tuple["Family", dict[str, "nn.Module"]]
"""A model, and its parts after a recipe."""


def make(work: Path, out: Path, overrides: Sequence[str], progress: Progress) -> Path:
    """Do what is not done yet of `builtin:tiny`; the folder of the finished model, stored in half precision.

    Args:
        work: Keeps runs, cache, registry and the model after each stage.
        out: Where the model goes, over an older one.
        overrides: `key=value` for all recipes.
        progress: Is called as it goes on.

    Raises:
        UserError: a recipe, or a file that an earlier call left, is not what it has to be.
        KeyboardInterrupt: it was stopped; the same call goes on.
    """
    from gtl.families.blank import write_blank

    model = write_once(work / "blank", lambda folder: write_blank(folder, vocabulary()))
    for name, learn in (("autoencoder", learn_codec), ("denoiser", learn_drawing), ("finish", learn_drawing)):
        train = partial(trained, name, model, work, overrides, progress)
        model = write_once(work / name, partial(learn, train))
    return replace(out, lambda folder: pack(model, folder))


def make_gan(work: Path, out: Path, overrides: Sequence[str], progress: Progress) -> Path:
    """`make` for `builtin:gan`, which is stored in full precision."""
    from gtl.families.gan_blank import write_blank

    blank = write_once(work / "gan-blank", write_blank)
    train = partial(trained, "gan", blank, work, overrides, progress)
    model = write_once(work / "gan", partial(learn_drawing, train))
    return replace(out, lambda folder: open_family(str(model)).export({}, folder))


def replace(out: Path, write: Callable[[Path], None]) -> Path:
    """Write a model over an older one, such as the one that is shipped."""
    if (out / INDEX).is_file():
        shutil.rmtree(out)
    return write_once(out, write)


def make_cascade(work: Path, out: Path, overrides: Sequence[str], progress: Progress) -> Path:
    """`make` for the two stages of a cascade with random weights, which no package has: that is all there is of it."""
    from gtl.families.deepfloyd_blank import write_cascade

    write_cascade(out, vocabulary())
    return out


MODELS = {"tiny": make, "gan": make_gan, "cascade": make_cascade}


def learn_codec(train: Callable[[], Trained], folder: Path) -> None:
    """Train the codec, and write the model with it and with the scale of its latents."""
    family, parts = train()
    codec = cast(Any, parts["vae"])
    codec.register_to_config(scaling_factor=round(1 / latent_std(denoising(family), codec), 5))
    family.export({"vae": codec}, folder)


def learn_drawing(train: Callable[[], Trained], folder: Path) -> None:
    """Train a model, and write it with the weights that it learned."""
    family, parts = train()
    family.export(parts, folder)


def trained(name: str, model: Path, work: Path, overrides: Sequence[str], progress: Progress) -> Trained:
    """A model's parts after a recipe; trains, or goes on with a run that was stopped, unless that is done."""
    import torch

    from gtl.train.launch import train_once

    places = [f"storage.{place}={json.dumps(str(work / place))}" for place in ("runs", "cache", "registry")]
    source = f"model.source={json.dumps(str(model))}"
    recipe = load_recipe(RECIPES / f"{name}.yaml", [source, *places, *overrides])
    published = train_once(recipe, f"builtin-{name}", progress=progress)
    family = open_family(str(model))
    parts = {part: family.load(part, torch.float32) for part in model_parts(family)}
    apply(parts, Registry(recipe.storage.registry).fetch(str(published)))
    return family, parts


def latent_std(family: DiffusionFamily, codec: nn.Module) -> float:
    """Standard deviation of latents over pictures of the training set, as the codec draws them; its scale undone."""
    import torch

    from gtl.data.fill import to_pixels

    scenes = SceneSet()
    pictures = to_pixels([scenes.picture(i)[0] for i in range(MEASURED)])
    with torch.inference_mode():
        moments = family.encode_images(codec, pictures)
    variance = moments["mean"].var() + moments["logvar"].exp().mean()
    return float(variance.sqrt())


def pack(model: Path, folder: Path) -> None:
    """Write a model with its weights in half precision, ready for words that it has not met."""
    import torch

    family = denoising(open_family(str(model)))
    parts = {part: family.load(part, torch.float32) for part in ("vae", "unet", "text_encoder")}
    draw_unmet_tokens(family, parts["text_encoder"])
    family.export({part: module.half() for part, module in parts.items()}, folder)


def draw_unmet_tokens(family: DiffusionFamily, encoder: nn.Module) -> None:
    """Give the tokens that are in no training caption embeddings of the size of the others, in place.

    Random weights are a fifth as large as learned ones, so a new word would hardly be seen beside its position, and an
    adapter could not tell the captions that have it from those that have not.
    """
    import torch

    met = torch.cat([tokens["input_ids"] for tokens in family.tokenize(captions())]).unique()
    table = cast(Any, encoder).get_input_embeddings().weight.data
    unmet = torch.ones(len(table), dtype=torch.bool)
    unmet[met] = False
    drawn = torch.randn(int(unmet.sum()), table.shape[1], generator=torch.Generator().manual_seed(0))
    table[unmet] = table[met].mean(0) + table[met].std(0) * drawn


class Lines:
    """Progress as lines of text, one every few seconds and one at the end of each phase, for a log that is kept."""

    def __init__(self) -> None:
        self._last = ("", 0.0)

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """See `Progress`."""
        before, when = self._last
        now = time.monotonic()
        if phase != before or now - when >= TELL_SECONDS or (total and done == total):
            self._last = phase, now
            print(f"{phase} {done}/{total} {detail}" if total else f"{phase} {detail}", file=sys.stderr, flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m gtl.builtin", description="Make a built-in model from nothing.")
    parser.add_argument("model", choices=MODELS, nargs="?", default="tiny")
    parser.add_argument("--work", type=Path, default=Path("out/builtin"), help="keeps what is done (%(default)s)")
    parser.add_argument("--out", type=Path, help="the model (where the package has it; a cascade: ./cascade)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all recipes")
    given = parser.parse_args()
    try:
        out = given.out or (Path("cascade") if given.model == "cascade" else builtin_folder(given.model))
        print(MODELS[given.model](given.work.absolute(), out.absolute(), given.set, Lines()))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        sys.exit(str(error) or "interrupted; the same command goes on")


if __name__ == "__main__":
    main()
