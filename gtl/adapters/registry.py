"""Published versions: `<name>/<version>/` with a card, and aliases `<name>/@<alias>`; on a disk or in a bucket."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from gtl.adapters import disk
from gtl.adapters.card import Card, File, parse_card
from gtl.config.names import NAME, check_name, parse_reference
from gtl.storage import Store
from gtl.types import UserError

CARD = "adapter.json"
EVALUATIONS = "evaluations"
"""In a version's folder: what was measured of it later."""


class Listing(NamedTuple):
    """One published version."""

    name: str
    version: str
    aliases: tuple[str, ...]


class Registry:
    """Named, versioned, immutable adapters under a folder or bucket URL."""

    def __init__(self, url: str | os.PathLike[str], *, disk_bytes: int | None = None) -> None:
        """Nothing is contacted until the first call.

        Args:
            url: Of the folder or bucket.
            disk_bytes: What this machine keeps of buckets' adapters; a fetch beyond that removes the longest unused.
                None: no bound.
        """
        self.store = Store(url)
        self._disk_bytes = disk_bytes

    def publish(self, name: str, version: str, folder: Path, card: Card) -> Card:
        """Publish a folder's files as NAME@VERSION: weights first, the card last. Returns the card with its files.

        Of two publishers of one version exactly one wins: on a local disk the version appears by one rename, in a
        bucket by creating the card (see `Store.create`), where the loser's files may have replaced the winner's: those
        of one run are the same, and others are found damaged by `fetch`.

        Raises:
            UserError: a name is malformed, the folder is empty, or the version exists.
        """
        check_name(name, "adapter name")
        check_name(version, "adapter version")
        self._refuse_existing(name, version)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if not paths:
            raise UserError(f"{folder}: nothing to publish as {name}@{version}; expected adapter files")
        local = {path.relative_to(folder).as_posix(): path for path in paths}
        files = {key: File(sha256=sha256(path), bytes=path.stat().st_size) for key, path in local.items()}
        card = card.model_copy(update={"name": name, "version": version, "files": files})
        if self.store.is_local:
            self._publish_local(local, card)
        else:
            for key, path in local.items():
                self.store.upload(path, f"{name}/{version}/{key}")
            if not self.store.create(f"{name}/{version}/{CARD}", card.to_json()):
                raise self._taken(name, version)
        return card

    def list(self, name: str | None = None) -> tuple[Listing, ...]:
        """Every published version, or those of one name, sorted by name and version."""
        names = [n for n in self.store.folders() if NAME.fullmatch(n)] if name is None else [check_name(name)]
        found = []
        for each in names:
            aliases = self.aliases(each)
            for version in self.versions(each):
                pointing = tuple(alias for alias, target in aliases.items() if target == version)
                found.append(Listing(each, version, pointing))
        return tuple(found)

    def versions(self, name: str) -> tuple[str, ...]:
        """Published versions of a name, oldest first."""
        keys = (key.split("/") for key, _, _ in self.store.list(name))
        return tuple(sorted(key[1] for key in keys if len(key) == 3 and key[2] == CARD and NAME.fullmatch(key[1])))

    def aliases(self, name: str) -> dict[str, str]:
        """Alias -> version, sorted by alias."""
        keys = [key for key, _, _ in self.store.list(name, recursive=False) if key.rpartition("/")[2].startswith("@")]
        return {key.rpartition("@")[2]: self.store.read(key).decode(errors="replace").strip() for key in keys}

    def resolve(self, reference: str) -> tuple[Card, str]:
        """The card and version of NAME (the newest), NAME@VERSION or NAME@ALIAS; a :SCALE is skipped.

        Raises:
            UserError: there is no such adapter; the message lists what there is.
        """
        name, version = self.locate(reference)
        return self._card(name, version), version

    def locate(self, reference: str) -> tuple[str, str]:
        """The name and version of a reference, without a look at the card; see `resolve`."""
        name, wanted, _ = parse_reference(reference)
        versions = self.versions(name)
        if not versions:
            known = ", ".join(n for n in self.store.folders() if NAME.fullmatch(n) and self.versions(n)) or "none"
            raise UserError(f"adapter {name!r}: not in the registry {self.store.root}; adapters there: {known}")
        version = wanted or versions[-1]
        if version not in versions:
            aliases = self.aliases(name)
            version = aliases.get(version, version)
            if version not in versions:
                known = ", ".join([*(f"@{alias}" for alias in aliases), *reversed(versions)][:10])
                raise UserError(f"adapter {reference!r}: {name} has no such version or alias; it has: {known}")
        return name, version

    def show(self, reference: str) -> Card:
        """The card of a reference; see `resolve`."""
        return self.resolve(reference)[0]

    def fetch(self, reference: str, until: ExitStack | None = None) -> Path:
        """A local folder with the version's files, checked against the card.

        A local registry's own folder; a bucket's version is downloaded once, into gtl's cache on this machine.

        Args:
            reference: See `resolve`.
            until: The folder stays until this is closed, whatever else is fetched; None: where there is no bound.

        Raises:
            UserError: there is no such adapter, or a file is missing or damaged.
        """
        card, version = self.resolve(reference)
        key = f"{card.name}/{version}"
        if self.store.is_local:
            folder = Path(self.store.url(key))
            check_files(folder, card.files)
            return folder
        folder = disk.place_of(self.store.root, key)
        with disk.changing(folder):
            disk.use(folder, until)
            if folder.is_dir():
                try:
                    check_files(folder, card.files)
                    return folder
                except UserError:  # an earlier version of that name, or a damaged copy: the bucket's is the truth
                    shutil.rmtree(folder)
            self._download(key, folder, card)
        if self._disk_bytes is not None:
            disk.trim(self._disk_bytes)
        return folder

    def hold(self, name: str, version: str, until: ExitStack) -> Path | None:
        """The folder that `fetch` gave of a version before, not looked into again; None if it is gone.

        It stays until the stack is closed, as for `fetch`. What asks again and again for the same versions, which never
        change, need not read and hash them each time.
        """
        if self.store.is_local:
            folder = Path(self.store.url(f"{name}/{version}"))
        else:
            folder = disk.place_of(self.store.root, f"{name}/{version}")
            with disk.changing(folder):
                disk.use(folder, until)
        return folder if folder.is_dir() else None

    def add_evaluation(self, reference: str, file: str, data: bytes) -> str:
        """Keep a file of an evaluation of a version beside it, in place of one with that name; returns where it is.

        Raises:
            UserError: there is no such adapter, or the registry cannot be written.
        """
        name, version = self.locate(reference)
        place = f"{name}/{version}/{EVALUATIONS}/{file}"
        self.store.write(place, data)
        return self.store.url(place)

    def promote(self, reference: str, alias: str) -> str:
        """Point an alias at a version, replacing where it pointed; returns the version.

        Raises:
            UserError: the alias is malformed or is itself a version, or there is no such adapter.
        """
        check_name(alias, "alias")
        card, version = self.resolve(reference)
        if alias in self.versions(card.name):
            raise UserError(f"alias {alias!r}: {card.name} has a version of that name; choose another alias")
        self.store.write(f"{card.name}/@{alias}", f"{version}\n".encode())
        return version

    def remove(self, reference: str, force: bool = False) -> str:
        """Delete one version, which must be named; with `force` also the aliases that point at it. Returns the version.

        Raises:
            UserError: no version is named, there is none such, or an alias points at it.
        """
        if parse_reference(reference).version is None:
            raise UserError(f"adapter {reference!r}: name the version to remove, for example {reference}@VERSION")
        name, version = self.locate(reference)  # also of a version whose card is damaged
        pointing = [alias for alias, target in self.aliases(name).items() if target == version]
        if pointing and not force:
            names = ", ".join(f"@{alias}" for alias in pointing)
            raise UserError(f"adapter {name}@{version}: {names} points at it; promote another or use --force")
        for alias in pointing:
            self.store.delete(f"{name}/@{alias}")
        key = f"{name}/{version}"
        if self.store.is_local:  # one rename, so that a removal that is cut off leaves no half version
            hidden = self._hidden(name, version)
            os.rename(self.store.url(key), hidden.root)
            hidden.delete_folder("")
        else:
            self.store.delete(f"{key}/{CARD}")
            self.store.delete_folder(key)
        return version

    def _card(self, name: str, version: str) -> Card:
        key = f"{name}/{version}/{CARD}"
        return parse_card(self.store.read(key), self.store.url(key))

    def _refuse_existing(self, name: str, version: str) -> None:
        if self.store.exists(f"{name}/{version}/{CARD}"):
            raise self._taken(name, version)

    def _taken(self, name: str, version: str) -> UserError:
        return UserError(f"adapter {name}@{version}: already published in {self.store.root}; versions never change")

    def _hidden(self, name: str, version: str) -> Store:
        return self.store.sub(f"{name}/.{version}.{os.getpid()}.{os.urandom(4).hex()}")

    def _publish_local(self, local: Mapping[str, Path], card: Card) -> None:
        target = Path(self.store.url(f"{card.name}/{card.version}"))
        staging = self._hidden(card.name, card.version)
        try:
            for key, path in local.items():
                staging.upload(path, key)
            staging.write(CARD, card.to_json())
            os.rename(staging.root, target)
        except OSError as error:
            self._refuse_existing(card.name, card.version)
            raise UserError(f"{target}: cannot be published to: {error.strerror}") from error
        finally:
            staging.delete_folder("")

    def _download(self, key: str, folder: Path, card: Card) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
            staging = Path(temporary, "version")
            for path in [*card.files, CARD]:
                try:
                    self.store.download(f"{key}/{path}", staging / path)
                except FileNotFoundError:
                    raise UserError(f"{self.store.url(key)}/{path}: missing, though the card lists it") from None
            check_files(staging, card.files, self.store.url(key))
            os.rename(staging, folder)


def check_files(folder: Path, files: Mapping[str, File], where: str | None = None) -> None:
    """Compare files with their card.

    Raises:
        UserError: one is missing, or its size or hash differs; it is named, under `where` or the folder.
    """
    for key, expected in files.items():
        path, shown = folder / key, f"{where or folder}/{key}"
        if not path.is_file():
            raise UserError(f"{shown}: missing, though the card lists it")
        size = path.stat().st_size
        if size != expected.bytes:
            raise UserError(f"{shown}: damaged: {size} bytes, the card says {expected.bytes}")
        if (found := sha256(path)) != expected.sha256:
            raise UserError(f"{shown}: damaged: sha256 {found[:12]}, the card says {expected.sha256[:12]}")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
