"""Which files of a diffusers-layout folder a model is read from, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gtl.storage import explained, replacing
from gtl.types import UserError

INDEX = "model_index.json"
STEMS = ("diffusion_pytorch_model", "model")
"""Names of weight files: diffusers' and transformers'."""
EXTRAS = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
"""Components that take no part in training or drawing."""
WEIGHTS = re.compile(rf"({'|'.join(STEMS)})(-\d+-of-\d+)?(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.safetensors")


def cache_home() -> Path:
    """Where gtl keeps what can be made again on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gtl"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file is missing or is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; a model folder in diffusers layout has it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def components(index: dict[str, Any]) -> list[str]:
    """Folder names of a pipeline's components, as its model_index.json lists them."""
    return [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]


def patterns(names: Iterable[str], variant: str | None, weights: bool = True) -> list[str]:
    """Glob patterns of the files to read of these components: configs, tokenizers, safetensors of one variant."""
    number = "?????-of-?????"
    result = [INDEX]
    for name in names:
        result += [f"{name}/{kind}" for kind in ("*.json", "*.txt", "*.model", "*.jinja")]
        for stem in STEMS if weights else ():
            middles = [f".{variant}", f".{variant}-{number}", f"-{number}.{variant}"] if variant else ["", f"-{number}"]
            result += [f"{name}/{stem}{middle}.safetensors" for middle in middles]
    return result


def write_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """The model folder, written if it is not there; what was only half written is written again.

    Raises:
        UserError: the folder holds something else, or cannot be made.
    """
    if (folder / INDEX).is_file():
        return folder
    with explained(str(folder)):
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: holds something that is not a model; name another folder, or empty this one")
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    write(partial)
    partial.rename(folder)  # over an empty folder, too
    return folder


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one component, all shards, in the index's order.

    Raises:
        UserError: one is missing, or there are none of this variant.
    """
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index}: it has no weight_map; the index of a sharded model needs one")
            if odd := [name for name in weight_map.values() if not isinstance(name, str)]:
                raise UserError(f"{index}: weight_map: {odd[0]!r}: expected the name of a file")
            shards = [folder / name for name in dict.fromkeys(weight_map.values())]
            if missing := [shard for shard in shards if not shard.is_file()]:
                raise UserError(f"{missing[0]}: missing; {index.name} lists it, one of {len(shards)} shards")
            return shards
        single = folder / f"{stem}{f'.{variant}' if variant else ''}.safetensors"
        if single.is_file():
            return [single]
    raise UserError(_why_none(folder, variant))


def _why_none(folder: Path, variant: str | None) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; the model is incomplete"
    names = sorted(path.name for path in folder.iterdir())
    matches = [match for name in names if (match := WEIGHTS.fullmatch(name))]
    if matches:
        found = sorted({match["variant"] or "null" for match in matches})
        return f"model.variant: {variant or 'null'}: no such weights in {folder}; found: {', '.join(found)}"
    pickles = [name for name in names if name.endswith((".bin", ".ckpt", ".pt"))]
    if pickles:
        return f"{folder / pickles[0]}: a pickle, which can run code when it is read; save the model as safetensors"
    expected = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    return f"{folder}: no {expected} in it; found: {', '.join(names) or 'nothing'}"


def hash_files(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of each file's bytes. Remembered by (path, size, modification time), so that a model is read once."""
    memo = cache_home() / "hashes.json"
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):
        known = {}  # not there yet, or damaged: it only saves time
    stats = {str(path.resolve()): path.stat() for path in paths}
    stamps = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
    new = [path for path, stamp in stamps.items() if known.get(path, [])[:2] != stamp]
    if new:
        with ThreadPoolExecutor(4) as pool:
            digests = dict(zip(new, pool.map(_sha256, new), strict=True))
        known |= {path: [*stamps[path], digest] for path, digest in digests.items()}
        # A home that can't be written: hash again next time.
        with contextlib.suppress(OSError), replacing(memo) as temporary:
            temporary.write_text(json.dumps(known))
    return [known[path][2] for path in stamps]


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
