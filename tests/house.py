"""The rules of the house: which room may import which, and which outside library comes in by which door."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

ROOMS = {
    "gtl/__init__.py": 10,
    "gtl/__main__.py": 10,
    "gtl/cli": 10,
    "gtl/builtin.py": 9,
    "gtl/builtin_backbone.py": 9,
    "gtl/demo.py": 9,
    "gtl/doctor.py": 9,
    "gtl/bench": 9,
    "gtl/search": 8,
    "gtl/jobs": 8,
    "gtl/train": 7,
    "gtl/evaluate": 6,
    "gtl/features": 6,
    "serve": 6,
    "gtl/tuners": 5,
    "gtl/objectives": 5,
    "gtl/data": 5,
    "gtl/generate": 5,
    "gtl/adapters": 4,
    "gtl/families": 3,
    "gtl/backbones": 2,
    "gtl/diffusion": 2,
    "gtl/report": 2,
    "gtl/session.py": 2,
    "gtl/config": 1,
    "gtl/storage.py": 1,
    "gtl/types.py": 1,
    "gtl/verb.py": 1,
    "gtl/images.py": 1,
    "gtl/imports.py": 1,
}
"""Room -> floor. Floor 1 is open to all; from the others one imports downward only, and never one's neighbours."""

CLOSED = {("serve", "gtl/data"), ("serve", "gtl/tuners"), ("serve", "gtl/objectives")}
"""(room, room): what the floors would allow and is not."""

RAY = (
    "gtl/session.py", "gtl/data", "gtl/generate/crew.py", "gtl/generate/spread.py", "gtl/train", "gtl/evaluate",
    "gtl/search", "gtl/jobs", "serve",
)  # fmt: skip
ABOVE_TORCH = tuple(room for room, floor in ROOMS.items() if 2 <= floor <= 9 and room not in ("gtl/report", "gtl/jobs"))

DOORS: dict[str, tuple[str, ...]] = {
    "torch": ABOVE_TORCH,
    "deepspeed": ("gtl/train/engine.py", "gtl/train/place.py"),
    "safetensors": (
        "gtl/adapters", "gtl/families/loading.py", "gtl/data/cache.py", "gtl/train/checkpoint.py",
        "gtl/bench/models.py", "gtl/backbones",
    ),
    "filelock": ("gtl/adapters/disk.py", "gtl/families/source.py", "gtl/data/cache.py"),
    "peft": ("gtl/tuners", "gtl/adapters"),
    "accelerate": ("gtl/data/spread.py",),
    "diffusers": ("gtl/families", "gtl/backbones", "gtl/diffusion/path.py", "gtl/bench/swapping.py"),
    "diffusers.schedulers": ("gtl/families", "gtl/diffusion"),
    "transformers": ("gtl/families", "gtl/backbones", "gtl/imports.py"),
    "huggingface_hub": ("gtl/families", "gtl/backbones", "gtl/doctor.py"),
    "ray": RAY,
    "ray.data": ("gtl/data",),
    "ray.train": ("gtl/train/launch.py", "gtl/train/worker.py"),
    "ray.tune": ("gtl/search",),
    "optuna": ("gtl/search",),
    "ray.job_submission": ("gtl/jobs",),
    "ray.serve": ("serve",),
    "fastapi": ("serve",),
    "starlette": ("serve",),
    "uvicorn": ("serve",),
    "torchmetrics": ("gtl/evaluate", "gtl/objectives/autoencode.py"),
    "matplotlib": ("gtl/report",),
    "jinja2": ("gtl/report",),
    "tensorboardX": ("gtl/train/track.py",),
    "bitsandbytes": ("gtl/train/optimizer.py", "gtl/train/quantize.py"),
    "wandb": ("gtl/train/services.py",),
    "mlflow": ("gtl/train/services.py",),
    "typer": ("gtl/cli",),
    "rich": ("gtl/cli",),
    "pydantic": ("gtl/config", "gtl/adapters/card.py", "gtl/evaluate/result.py", "gtl/generate/prompts.py", "serve"),
    "pydantic_core": ("gtl/config",),
    "yaml": ("gtl/config", "gtl/cli"),
    "pyarrow.fs": ("gtl/storage.py",),
    "fsspec": ("gtl/storage.py",),
    "boto3": ("gtl/storage.py", "serve/links.py"),
    "botocore": ("gtl/storage.py",),
    "faiss": ("gtl/features/index.py",),
    "PIL": ("gtl/images.py", "gtl/data", "gtl/generate"),
    "torchvision": (),
}  # fmt: skip
"""Library -> the only places that import it; the longest name that fits decides."""

SHUT = {("gtl/train/loop.py", "ray"), ("gtl/train/engine.py", "ray"), ("gtl/train/checkpoint.py", "ray")}
"""(place, library) that the doors would allow: the loop and the engine run in plain processes."""


@dataclass(frozen=True)
class Import:
    """One imported name, as a dotted path that ends with it."""

    name: str
    line: int
    typing_only: bool


def within(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}/")


def imports(tree: ast.AST, path: str, typing_only: bool = False) -> Iterator[Import]:
    """Every import below a node, in functions too, with relative ones and import_module("...") resolved."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folders = PurePosixPath(path).parts[: -node.level] if node.level else ()
            module = ".".join([*folders, *([node.module] if node.module else [])])
            yield from (Import(f"{module}.{alias.name}", node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            yield from (Import(a.value, node.lineno, typing_only) for a in node.args[:1] if isinstance(a, ast.Constant))
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        if guarded:
            yield from imports(ast.Module(node.body, []), path, True)
            yield from imports(ast.Module(node.orelse, []), path, typing_only)
        else:
            yield from imports(node, path, typing_only)


def room_of(path: str) -> str | None:
    """The room that a file is in; None for a file outside all rooms."""
    return next((room for room in ROOMS if within(path, room)), None)


def room_of_import(name: str) -> str | None:
    """The room that a dotted name is in; None for what is not ours, and for the version in gtl/__init__.py."""
    parts = name.split(".")
    if parts[0] not in ("gtl", "serve") or name == "gtl.__version__":
        return None
    if parts[0] == "serve":
        return "serve"
    inner = f"gtl/{parts[1]}" if len(parts) > 1 else ""
    return next((room for room in (inner, f"{inner}.py") if room in ROOMS), "gtl/__init__.py")


def may_enter(room: str, other: str) -> bool:
    """Whether a room may import another."""
    open_to_all = ROOMS[other] == 1 or room == other
    return open_to_all or (ROOMS[other] < ROOMS[room] and (room, other) not in CLOSED)


def door_of(name: str) -> str | None:
    """The library of the table that a dotted name belongs to, by the longest fit."""
    parts = name.split(".")
    return next((door for n in range(len(parts), 0, -1) if (door := ".".join(parts[:n])) in DOORS), None)


def offences(path: str, source: str) -> list[str]:
    """What a file of gtl/ or serve/ does against the rules, a line each; `path` is relative to the repository."""
    tree = ast.parse(source)
    return [*wrong_imports(tree, path), *wrong_shape(tree, path, source)]


def wrong_imports(tree: ast.AST, path: str) -> Iterator[str]:
    room = room_of(path)
    if room is None:
        yield f"{path}: in no room of the house"
        return
    for found in imports(tree, path):
        other, door = room_of_import(found.name), door_of(found.name)
        if other is not None and not may_enter(room, other):
            yield f"{path}:{found.line}: {found.name}: {room} (floor {ROOMS[room]}) may not import {other}"
        if door is None or found.typing_only:
            continue
        shut = any(path == place and door.split(".")[0] == library for place, library in SHUT)
        if shut or not any(within(path, place) for place in DOORS[door]):
            yield f"{path}:{found.line}: {found.name}: only {', '.join(DOORS[door]) or 'nobody'} may import {door}"


def wrong_shape(tree: ast.AST, path: str, source: str) -> Iterator[str]:
    name = PurePosixPath(path).name
    if name in ("utils.py", "common.py", "helpers.py") or "manager" in name:
        yield f"{path}: a name that says nothing of what is inside"
    if (lines := len(source.splitlines())) > 400:
        yield f"{path}: {lines} lines, at most 400"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > 80:
                yield f"{path}:{node.lineno}: {node.name}: {length} lines, at most 80"
