"""Checkpoints: one format for every ZeRO stage and world size; only what is trained is in them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from gtl import __version__
from gtl.adapters.card import library_versions
from gtl.storage import Store
from gtl.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
MAX_SHARD_BYTES = 1 << 29
"""Of which a process that goes on from a checkpoint has one in memory."""
MANIFEST = "manifest.json"

KEYS = {"step": int, "players": dict, "files": dict}
"""What every manifest of this schema has."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every trained parameter of one player, by name."""


class State(NamedTuple):
    """What one player's engine keeps between steps, whole and independent of sharding."""

    steps: int
    """Optimizer steps made."""
    tensors: dict[str, dict[str, Tensor]]
    """By parameter name: `weight`, `exp_avg`, `exp_avg_sq` and, with an EMA, `ema`; fp32 in CPU memory."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest was read and fits; its files are checked as they are read."""

    store: Store
    key: str
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps made, which is also the data position: the next step to plan."""
        return int(self.manifest["step"])

    def steps(self, player: str) -> int:
        """Optimizer steps made of one player."""
        return int(self.manifest["players"][player]["steps"])

    def tensors(self, player: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """A player's parameters with their tensors by kind, as in `State`, in CPU memory; one file's are there at once.

        Raises:
            UserError: a file is missing, cut off or changed.
        """
        entry, files = self.manifest["players"][player], self.manifest["files"]
        position = {name: number for number, name in enumerate(entry["parameters"])}
        found: dict[str, dict[str, Tensor]] = {}
        for file in entry["files"]:
            for label, tensor in read_tensors(self.store, f"{self.key}/{file}", files[file]).items():
                kind, _, name = label.partition("/")
                found.setdefault(name, {})[kind] = tensor
            last = max(found, key=position.__getitem__)  # may go on in the next file
            for name in [name for name in found if name != last]:
                yield name, found.pop(name)
        yield from found.items()


def step_key(prefix: str, step: int) -> str:
    """Where the checkpoint after `step` optimizer steps belongs; keys sort by step."""
    return f"{prefix}/{step:08d}" if prefix else f"{step:08d}"


def save(
    store: Store,
    key: str,
    states: Mapping[str, State],
    manifest: Mapping[str, Any],
    shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint. The manifest goes last: a checkpoint exists if and only if its manifest does.

    One process calls this, with the states of rank 0; nothing in it is collective and the tensors are copies, so a
    thread may do it while training goes on. An unfinished checkpoint under the same key is overwritten.

    Args:
        store: Where the run keeps things.
        key: Folder of this checkpoint, see `step_key`.
        states: By player.
        manifest: What else is to be known: at least `step`; recipe hash, world size, stage.
        shard_bytes: Largest file, unless one tensor is larger.
    """
    from safetensors.torch import save as serialize

    store.delete(f"{key}/{MANIFEST}")
    files: dict[str, dict[str, Any]] = {}
    players: dict[str, dict[str, Any]] = {}
    for player, state in states.items():
        shards = list(split(state, shard_bytes))
        names = []
        for number, tensors in enumerate(shards, start=1):
            suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            name = f"{player}{suffix}.safetensors"
            data = serialize(tensors)
            store.write(f"{key}/{name}", data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            names.append(name)
        shapes = {name: list(kinds["weight"].shape) for name, kinds in state.tensors.items()}
        players[player] = {"steps": state.steps, "files": names, "parameters": shapes}
    versions = {"python": platform.python_version(), "gtl": __version__, **library_versions()}
    content = {"schema": SCHEMA, **manifest, "versions": versions, "players": players, "files": files}
    store.write(f"{key}/{MANIFEST}", json.dumps(content, indent=1).encode())


def split(state: State, shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Tensors of one player in files of at most `shard_bytes`, named `kind/parameter`."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, kinds in state.tensors.items():
        for kind, tensor in kinds.items():
            if shard and size + tensor.nbytes > shard_bytes:
                yield shard
                shard, size = {}, 0
            shard[f"{kind}/{name}"] = tensor
            size += tensor.nbytes
    yield shard


def load(store: Store, key: str, shapes: Mapping[str, Shapes]) -> Checkpoint:
    """Find a checkpoint that fits the model at hand; any process may.

    Args:
        store: Where the run keeps things.
        key: Folder of the checkpoint.
        shapes: By player, what the model at hand trains.

    Raises:
        UserError: its manifest is missing or damaged, or the checkpoint belongs to another model.
    """
    manifest = read_manifest(store, key)
    check_shapes(manifest, shapes, store.url(f"{key}/{MANIFEST}"))
    return Checkpoint(store, key, manifest)


def read_manifest(store: Store, key: str) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        UserError: there is none, it can't be read, or it is of another schema.
    """
    place = store.url(f"{key}/{MANIFEST}")
    try:
        manifest = parse_manifest(store.read(f"{key}/{MANIFEST}")) or parse_manifest(store.read(f"{key}/{MANIFEST}"))
    except FileNotFoundError:
        raise UserError(f"{place}: not found; a checkpoint without its manifest was never finished") from None
    if manifest is None:
        raise UserError(f"{place}: damaged; remove this checkpoint to go on from the one before")
    if manifest["schema"] != SCHEMA:
        raise UserError(f"{place}: schema {manifest['schema']}; this version of gtl reads schema {SCHEMA}")
    return manifest


def parse_manifest(data: bytes) -> dict[str, Any] | None:
    """What is in it; None if it is damaged."""
    try:
        manifest = json.loads(data)
    except ValueError:
        return None
    if not isinstance(manifest, dict) or "schema" not in manifest:
        return None
    is_whole = manifest["schema"] != SCHEMA or all(isinstance(manifest.get(key), kind) for key, kind in KEYS.items())
    return manifest if is_whole else None


def read_tensors(store: Store, key: str, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """One file's tensors, after its size and hash were found right.

    Raises:
        UserError: the file is missing, cut off or changed.
    """
    from safetensors.torch import load as deserialize

    problem = ""
    for _ in range(2):  # a bucket that returned half of it may do better; a damaged file stays damaged
        try:
            data = store.read(key)
        except FileNotFoundError:
            problem = "not found"
            break
        if not (problem := damage(data, entry)):
            return deserialize(data)
    raise UserError(f"{store.url(key)}: {problem}; remove this checkpoint to go on from the one before")


def damage(data: bytes, entry: Mapping[str, Any]) -> str:
    """How a file differs from what the manifest says of it; nothing if it does not."""
    if len(data) != entry["bytes"]:
        return f"{len(data)} bytes, its manifest says {entry['bytes']}"
    return "" if hashlib.sha256(data).hexdigest() == entry["sha256"] else "changed since it was written"


def check_shapes(manifest: Mapping[str, Any], shapes: Mapping[str, Shapes], place: str) -> None:
    """Compare a manifest with what is trained.

    Raises:
        UserError: players, names or shapes differ.
    """
    saved = {player: entry["parameters"] for player, entry in manifest["players"].items()}
    if saved.keys() != shapes.keys():
        raise UserError(f"{place}: of players {', '.join(saved)}; the recipe trains {', '.join(shapes)}")
    for player, wanted in shapes.items():
        have = {name: tuple(shape) for name, shape in saved[player].items()}
        for name in sorted(have.keys() | wanted.keys()):
            if have.get(name) != wanted.get(name):
                raise UserError(
                    f"{place}: of another model or tuner: {name} has {describe(have.get(name))} there and "
                    f"{describe(wanted.get(name))} in the recipe's model"
                )


def describe(shape: tuple[int, ...] | None) -> str:
    """A shape for a message."""
    return "no entry" if shape is None else f"shape {list(shape)}"


def complete(store: Store, prefix: str) -> list[str]:
    """Keys of the finished checkpoints under a folder, oldest first."""
    keys = [f"{prefix}/{name}" if prefix else name for name in store.folders(prefix)]
    return [key for key in keys if store.exists(f"{key}/{MANIFEST}")]


def latest(store: Store, prefix: str) -> str | None:
    """Key of the newest finished checkpoint under a folder; None if there is none."""
    return next(reversed(complete(store, prefix)), None)


def prune(store: Store, prefix: str, keep: int) -> None:
    """Remove all but the newest `keep` finished checkpoints, and what crashes left before the newest."""
    finished = complete(store, prefix)
    kept = finished[-keep:]
    for name in store.folders(prefix):
        key = f"{prefix}/{name}" if prefix else name
        if kept and key < kept[-1] and key not in kept:
            store.delete(f"{key}/{MANIFEST}")
            store.delete_folder(key)
