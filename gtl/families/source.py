"""From what a recipe names as its model to a local folder."""

from __future__ import annotations

import hashlib
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

from gtl.families.files import EXTRAS, INDEX, cache_home, components, patterns, read_json
from gtl.storage import Store, replacing
from gtl.types import UserError

BUILTIN = "builtin:"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(source: str, revision: str | None = None, variant: str | None = None, weights: bool = True) -> Path:
    """The local folder of a hub id, a local folder or a bucket URL; downloads what is not there yet.

    Without `weights` only configs and tokenizers are sure to be in it.

    Raises:
        UserError: there is no such model, it can't be reached, or it is not in diffusers layout.
    """
    path = Path(source).expanduser()
    if source.startswith(BUILTIN):
        folder = _builtin(source.removeprefix(BUILTIN))
    elif "://" in source:
        folder = fetch(source, variant, weights)
    elif path.exists() or source.startswith((".", "/", "~")):
        folder = _local(path)
    elif HUB_ID.fullmatch(source):
        return download(source, revision, variant, weights)
    else:
        raise UserError(f"model.source: {source!r}: neither a folder here, nor a hub id (owner/name), nor a bucket URL")
    if revision is not None:
        raise UserError(f"model.revision: {revision!r}: only a hub id has revisions; model.source is {source}")
    return folder


def builtin_folder(name: str) -> Path:
    """Where a model that comes with gtl lies."""
    return Path(__file__).parent / "builtin" / name


def _builtin(name: str) -> Path:
    folder = builtin_folder(name)
    if not HUB_ID.fullmatch(name) or not (folder / INDEX).is_file():
        known = sorted(index.parent.name for index in builtin_folder("").glob(f"*/{INDEX}"))
        there = ", ".join(known) or "none yet; `make builtin` makes tiny"
        raise UserError(f"model.source: {BUILTIN}{name}: no such model; built in: {there}")
    return folder


def _local(path: Path) -> Path:
    path = path.absolute()
    if not path.exists():
        raise UserError(f"model.source: {path}: no such folder")
    if path.is_file():
        raise UserError(f"model.source: {path}: a file; a folder in diffusers layout is needed (it holds {INDEX})")
    if not (path / INDEX).is_file():
        raise UserError(f"model.source: {path}: no {INDEX} in it; a folder in diffusers layout is needed")
    return path


def download(repository: str, revision: str | None, variant: str | None, weights: bool = True) -> Path:
    """The snapshot of a hub repository in the hub's own cache; only the files that are read."""
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    where = f"model.source: {repository!r}"
    try:
        index = Path(hf_hub_download(repository, INDEX, revision=revision))
        wanted = [name for name in components(read_json(index)) if name not in EXTRAS]
        allowed = patterns(wanted, variant, weights)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=allowed))
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{where}: not in the local cache, and the hub is off-line or can't be reached; nor is it a folder here"
        ) from None
    except errors.GatedRepoError:
        raise UserError(f"{where}: its owner wants your consent first; give it on the hub and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{where}: neither a folder here nor on the hub (a private one needs HF_TOKEN)") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"model.revision: {revision!r}: {repository} has no such branch, tag or commit") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{where}: no {INDEX} in it; a model in diffusers layout is needed") from None
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise UserError(f"{where}: the hub refuses: {' '.join(str(error).split())[:200]}") from error
    except OSError as error:
        raise UserError(f"{where}: not downloaded: {error.strerror or error}") from error


def fetch(url: str, variant: str | None, weights: bool = True) -> Path:
    """A local copy of a model in a bucket, fetched once per machine; again when the bucket's files have changed."""
    from filelock import FileLock
    store = Store(url)
    try:
        data = store.read(INDEX)
    except FileNotFoundError:
        raise UserError(f"model.source: {store.url(INDEX)}: missing; a folder in diffusers layout has it") from None
    try:
        index = json.loads(data)
    except ValueError as error:
        raise UserError(f"model.source: {store.url(INDEX)}: not readable as JSON: {error}") from error
    if not isinstance(index, dict):
        raise UserError(f"model.source: {store.url(INDEX)}: expected a JSON object, found {type(index).__name__}")
    wanted = patterns([name for name in components(index) if name not in EXTRAS], variant, weights)
    listing = {
        key: [size, mtime] for key, size, mtime in store.list() if any(fnmatchcase(key, pattern) for pattern in wanted)
    }
    # Apart from a copy with weights, which would be removed as files that are gone there.
    identity = f"{store.url()} {variant}{'' if weights else ' configs'}"
    folder = cache_home() / "models" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / ".complete.json"
    with FileLock(folder.with_suffix(".lock")):
        have = json.loads(stamp.read_text()) if stamp.is_file() else {}
        for key in (key for key in listing if have.get(key) != listing[key]):
            store.download(key, folder / key)
        for key in have.keys() - listing.keys():  # else an index that is gone there would still be followed here
            (folder / key).unlink(missing_ok=True)
        with replacing(stamp) as temporary:
            temporary.write_text(json.dumps(listing))
    return folder
