"""The package: which files of the working tree go to the cluster, and the archive of them."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

from gtl.types import UserError

IGNORES = (".gitignore", ".rayignore")
"""As Ray reads them for a working directory: each is about its own folder, and either of them can leave a file out."""
SKIPPED = (
    ".git/", ".venv/", "venv/", "__pycache__/",  # Ray leaves these out too
    ".env", "/runs/", "/cache/", "/registry/",
)  # fmt: skip
"""Left out of every tree. What a recipe reads and writes is left out as well, wherever it is."""
LIMIT = 100 * 2**20
"""Bytes of a tree. Ray holds packages in the memory of the head node and bears 500 MiB at most; code is far below."""
MOSTLY = 0.8
"""Of a folder's bytes: so many in one thing in it, and that is what is named."""


def list_files(tree: Path, without: Sequence[str] = ()) -> dict[str, Path]:
    """The files to send, by their path in the package, sorted.

    Args:
        tree: The working tree.
        without: Absolute paths of files and folders that stay here.
    """
    rules = GitIgnoreSpec.from_lines(SKIPPED)
    found = walk(tree, "", [("", rules)], frozenset(map(os.path.realpath, without)), ())
    return dict(sorted(found))


def walk(
    folder: Path, prefix: str, rules: Sequence[tuple[str, GitIgnoreSpec]], without: frozenset[str],
    above: Sequence[str],
) -> Iterator[tuple[str, Path]]:  # fmt: skip
    """Files below a folder; links are followed, as Ray does, but not in circles.

    Args:
        folder: To look into.
        prefix: Its path in the package, empty or with a slash at its end.
        rules: What is left out, each with the prefix of the folder that it is about.
        without: Real paths that are left out.
        above: Real paths of the folders that this one is in.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    own = [(prefix, read_rules(folder / name)) for name in IGNORES if (folder / name).is_file()]
    rules = [*rules, *own]
    for entry in os.scandir(folder):
        path = prefix + entry.name
        is_folder = entry.is_dir()
        named = f"{path}/" if is_folder else path
        if os.path.realpath(entry.path) in without:
            continue
        if any(rule.match_file(named.removeprefix(at)) for at, rule in rules):
            continue
        if is_folder:
            yield from walk(Path(entry.path), f"{path}/", rules, without, (*above, real))
        elif entry.is_file():
            yield path, Path(entry.path)


def read_rules(file: Path) -> GitIgnoreSpec:
    """The rules of an ignore file.

    Raises:
        UserError: they are none.
    """
    try:
        return GitIgnoreSpec.from_lines(file.read_text().splitlines())
    except ValueError as error:
        raise UserError(f"{file}: cannot be read as a .gitignore file ({error})") from error


def check_size(tree: Path, sizes: Mapping[str, int], limit: int = LIMIT) -> None:
    """Refuse a tree that is too large to send.

    Args:
        tree: For the message.
        sizes: Bytes by path in the package.
        limit: Bytes.

    Raises:
        UserError: it is; the message names what is large.
    """
    total = sum(sizes.values())
    if total <= limit:
        return
    named = ", ".join(f"{name} {megabytes(size)}" for name, size in largest(sizes))
    raise UserError(
        f"{tree}: {megabytes(total)} to send, at most {megabytes(limit)}; most of it is {named}: name it in .gitignore "
        "or .rayignore, or send the recipe alone with --recipe-only"
    )


def largest(sizes: Mapping[str, int], count: int = 3) -> list[tuple[str, int]]:
    """The largest things in a tree, files or folders (with a slash at the end), as deep as one thing is most of it."""
    totals: dict[str, int] = dict(sizes)
    inside: dict[str, set[str]] = {}
    for path, size in sizes.items():
        child = path
        for parent in PurePosixPath(path).parents:
            folder = "" if str(parent) == "." else f"{parent}/"
            inside.setdefault(folder, set()).add(child)
            totals[folder] = totals.get(folder, 0) + size
            child = folder
    found = []
    for name in sorted(inside.get("", ()), key=lambda name: (-totals[name], name))[:count]:
        deepest = name
        while one := next((n for n in inside.get(deepest, ()) if totals[n] >= MOSTLY * totals[deepest]), None):
            deepest = one
        found.append((deepest, totals[deepest]))
    return found


def megabytes(size: int) -> str:
    """Bytes for a message."""
    return f"{size / 2**20:.1f} MiB"


def read_tree(tree: Path, without: Sequence[str] = (), limit: int = LIMIT) -> dict[str, bytes]:
    """What is in the files to send, by their path in the package.

    Raises:
        UserError: they are too large, or one cannot be read.
    """
    files = list_files(tree, without)
    check_size(tree, {path: file.stat().st_size for path, file in files.items()}, limit)
    try:
        return {path: file.read_bytes() for path, file in files.items()}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be sent: {error.strerror}; name it in .rayignore") from error


def digest(files: Mapping[str, bytes]) -> str:
    """Hash of the files' names and contents."""
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(f"{path}\0{hashlib.sha256(files[path]).hexdigest()}\n".encode())
    return total.hexdigest()


def write_archive(files: Mapping[str, bytes], target: Path) -> None:
    """A zip whose bytes depend on the files alone, so that Ray, which names it by them, takes it once."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(files):
            entry = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[path])
