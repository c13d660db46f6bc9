"""The command of a job: what it reads and writes, settled here, so that it means there what it means here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtl.config import Recipe, Study, load_recipe, load_study
from gtl.config.base import absolute, absolute_if_local, is_url
from gtl.config.load import dump_recipe, dump_study
from gtl.config.names import check_name
from gtl.types import UserError

VERBS = ("train", "tune", "evaluate", "generate", "cache")
"""What is worth a job. The others are over in seconds, or serve: `serve deploy` takes an endpoint to a cluster."""
RESUMABLE = ("train", "tune")


@dataclass(frozen=True)
class Work:
    """A command that is ready to be sent."""

    verb: str
    values: Mapping[str, Any]
    """Of its parameters, by their names, as they are in the job."""
    files: Mapping[str, bytes]
    """What it reads from its working directory, by relative path: the recipe or study with all that `--set` and
    relative paths mean here, prompts."""
    writes: Mapping[str, str]
    """Key or option -> folder or URL that it writes to."""
    reads: Mapping[str, str]
    """Key or option -> local folder that it reads and that is not sent."""
    recipe: Recipe | None = None
    """What its workers are chosen by, if it has workers of a recipe's."""
    name: str | None = None
    """Of the run or study."""


def check_verb(verb: str) -> None:
    """Refuse what is no job.

    Raises:
        UserError: it is none.
    """
    if verb not in VERBS:
        raise UserError(f"gtl submit: {verb!r}: a job is one of {', '.join(VERBS)}, after --")


def read_work(verb: str, values: Mapping[str, Any], tree: Path | None) -> Work:
    """Read and check what a command names, as the command itself would.

    Args:
        verb: One of VERBS.
        values: Of its parameters, by their names in Python.
        tree: The folder that is sent; None: only what the command names is.

    Raises:
        UserError: a file, a key or a value is wrong, or a file is outside the tree.
    """
    if verb == "generate":
        return read_generate(values, tree)
    kind = "study" if verb == "tune" else "recipe"
    path = values[kind]
    if verb == "cache" and path == "gc":
        raise UserError("gtl submit -- cache gc: no job; run it where the cache is, with GTL_CACHE")
    overrides = values.get("set_") or ()
    read: Recipe | Study = load_study(path, overrides) if verb == "tune" else load_recipe(path, overrides)
    text = dump_study(read) if isinstance(read, Study) else dump_recipe(read)
    recipe = read.base if isinstance(read, Study) else read
    name = None
    if verb in ("train", "tune"):
        given = values.get("name")
        name = check_name(given or Path(path).stem.lower(), "--name" if given else f"--name, left out, of {path}")
    sent = place_of(path, kind, tree)
    writes = {f"storage.{key}": place for key, place in recipe.storage.model_dump().items()}
    changed = {**values, kind: sent, "set_": None}
    if values.get("json_"):
        changed["json_"] = absolute(str(values["json_"]))
        writes["--json"] = os.path.dirname(changed["json_"])
    work = Work(verb, changed, {sent: text.encode()}, writes, inputs_of(recipe), recipe, name)
    return work


def read_generate(values: Mapping[str, Any], tree: Path | None) -> Work:
    """`read_work` of a command without a recipe."""
    changed, files, reads = dict(values), {}, {}
    if values["model"] is not None:
        changed["model"] = absolute_if_local(values["model"])
        if os.path.isabs(changed["model"]):
            reads["--model"] = changed["model"]
    changed["registry"], changed["out"] = absolute(values["registry"]), absolute(str(values["out"]))
    if values["prompts"] is not None:
        sent = place_of(str(values["prompts"]), "--prompts", tree)
        try:
            files[sent] = Path(values["prompts"]).read_bytes()
        except OSError as error:
            raise UserError(f"--prompts {values['prompts']}: cannot be read: {error.strerror}") from error
        changed["prompts"] = sent
    writes = {"--registry": changed["registry"], "--out": changed["out"]}
    return Work("generate", changed, files, writes, reads)


def inputs_of(recipe: Recipe) -> dict[str, str]:
    """The local folders that a recipe reads, by their keys."""
    sources = recipe.data.source
    listed = [sources] if isinstance(sources, str) else [one.source for one in sources]
    keys = ["data.source"] if isinstance(sources, str) else [f"data.source[{i}].source" for i in range(len(listed))]
    models = {
        "model.source": recipe.model.source, "objective.teacher": getattr(recipe.objective, "teacher", None),
        "evaluate.backbone": recipe.evaluate.backbone, "evaluate.clip": recipe.evaluate.clip,
    }  # fmt: skip
    places = dict(zip(keys, listed, strict=True)) | models
    return {key: place for key, place in places.items() if place and os.path.isabs(place) and not is_url(place)}


def place_of(path: str, what: str, tree: Path | None) -> str:
    """Where in the package a file is: its path in the tree, or its name where no tree is sent.

    Raises:
        UserError: it is outside the tree.
    """
    if tree is None or is_url(path):
        return path.rstrip("/").rpartition("/")[2]
    whole = Path(os.path.abspath(os.path.expanduser(path)))
    if not whole.is_relative_to(tree):
        raise UserError(
            f"{what} {path}: outside {tree}, the tree that is sent; submit from a folder that it is in, or send it "
            "alone with --recipe-only"
        )
    return whole.relative_to(tree).as_posix()
