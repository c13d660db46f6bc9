"""What an earlier run was: whether another one is the same, and whether it can go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gtl.adapters import Registry
from gtl.adapters.card import parse_card
from gtl.config import Recipe, load_recipe
from gtl.config.load import dump_recipe, read_yaml
from gtl.config.metrics import of_pictures
from gtl.config.names import parse_reference
from gtl.storage import Store
from gtl.train.checkpoint import latest, read_manifest
from gtl.train.job import CHECKPOINTS, Job
from gtl.types import Progress, UserError, quiet

HARMLESS = {
    "storage", "evaluate", "data.gpus_per_encoder", "train.workers", "train.gpus_per_worker", "train.cpus_per_worker",
    "train.micro_batch", "train.zero", "train.checkpoints", "train.activation_checkpointing", "train.compile",
    "train.max_failures",
}  # fmt: skip
"""Keys that may change between a run and its resumption without changing what is learned."""
AFTERWARDS = ("evaluate.metrics", "evaluate.samples")
"""What `gtl evaluate` goes by, and no look at a run."""
PUBLISHED = "adapter.json"
"""In a run's folder: the card under which the registry has its adapter."""


def pin_init(recipe: Recipe, begun: str | None = None) -> Recipe:
    """The recipe with the version that `tuner.init` means, since an alias may move while the run lasts.

    Of a run that `begun` was pinned for, a bare name or an alias of the same adapter means what it did then.

    Raises:
        UserError: there is no such adapter.
    """
    if recipe.tuner.init is None:
        return recipe
    card, version = Registry(recipe.storage.registry).resolve(recipe.tuner.init)
    pinned = f"{card.name}@{version}"
    if begun is not None and parse_reference(begun).name == card.name:
        names_version = parse_reference(recipe.tuner.init).version == version
        pinned = pinned if names_version else begun
    tuner = recipe.tuner.model_copy(update={"init": pinned})
    return recipe.model_copy(update={"tuner": tuner})


def was_of(runs: Store, version: str, recipe: Recipe, base: str) -> bool:
    """Whether a run was started with exactly this recipe, and has learned nothing on another model than `base`.

    Args:
        runs: The folder of the runs of one name.
        version: Of the run.
        recipe: With `tuner.init` as the user wrote it.
        base: Fingerprint of what `model.source` is now.
    """
    key = f"{version}/recipe.yaml"
    if not runs.exists(key):
        return False
    text = runs.read(key).decode()
    same = text == dump_recipe(pin_init(recipe, read_yaml(text).get("tuner", {}).get("init")))
    return same and learned_on(runs.sub(version)) in (None, base)


def learned_on(run: Store) -> str | None:
    """Fingerprint of the model that a run has trained, None before its first checkpoint."""
    if run.exists(PUBLISHED):
        return parse_card(run.read(PUBLISHED), run.url(PUBLISHED)).base.fingerprint
    key = latest(run, CHECKPOINTS)
    return None if key is None else str(read_manifest(run, key)["base"])


def unfinished(runs: Store) -> str:
    """The newest version of a run whose adapter has not been published, if any has saved the newest of those.

    Raises:
        UserError: there is none.
    """
    versions = [v for v in runs.folders() if runs.exists(f"{v}/recipe.yaml") and not runs.exists(f"{v}/{PUBLISHED}")]
    if not versions:
        raise UserError(f"--resume: no unfinished run under {runs.url()}")
    newest_first = reversed(versions)
    return next((v for v in newest_first if latest(runs.sub(v), CHECKPOINTS) is not None), versions[-1])


def go_on(runs: Store, version: str, recipe: Recipe, progress: Progress = quiet) -> Recipe:
    """The recipe to go on with a run by: `tuner.init` is pinned as the run has it.

    What differs from the run's recipe and changes nothing that is learned is told as progress.

    Raises:
        UserError: what it learns has changed since it was started.
    """
    old = load_recipe(runs.url(f"{version}/recipe.yaml"))
    recipe = pin_init(recipe, old.tuner.init)
    changed = sorted(differing(old.model_dump(mode="json"), recipe.model_dump(mode="json")))
    harmful = [key for key in changed if not is_harmless(key, recipe)]
    harmless = ", ".join(key for key in changed if key not in harmful)
    if harmful:
        beside = f" ({harmless} may differ)" if harmless else ""
        raise UserError(
            f"--resume: {runs.url(version)} was started with other values of {', '.join(harmful)}; "
            f"put them back{beside}, or start a new run without --resume"
        )
    if harmless:
        progress("resume", 0, 0, f"with other values of {harmless}, which change nothing that is learned")
    return recipe


def is_harmless(key: str, recipe: Recipe) -> bool:
    """Whether a key may change without changing what is learned and which weights of it are published."""
    if key == "train.checkpoints.best":
        return False
    if key == "evaluate.every" and recipe.judged_by is not None:
        return False
    if key.startswith("evaluate.") and recipe.judged_by is not None and of_pictures([recipe.judged_by]):
        return key in AFTERWARDS
    return any(key == harmless or key.startswith(harmless + ".") for harmless in HARMLESS)


def check_unchanged(job: Job) -> None:
    """Compare what the run's newest checkpoint was trained on with what is there now.

    Raises:
        UserError: the images, their captions or the model are others.
    """
    if (key := latest(job.run, CHECKPOINTS)) is None:
        return
    manifest = read_manifest(job.run, key)
    for kind, now, what in (
        ("base", job.base, "model.source: its files"),
        ("dataset", job.dataset, "data.source: its images or captions, or the model's dtype"),
    ):
        if manifest[kind] != now:
            raise UserError(
                f"{what} changed since {job.run.url(key)} was saved ({kind} {manifest[kind][:12]}, now {now[:12]}); "
                "put them back, or start a new run without --resume"
            )


def differing(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values differ."""
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differing(a, b, f"{prefix}{key}.")
        elif a != b:
            yield prefix + key
