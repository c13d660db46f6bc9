"""Tensors in files of a local disk, which the operating system writes out and reads ahead (train.zero.offload: nvme).

Each stays an ordinary tensor of the CPU, mapped and shared with its file: what is not being used costs no memory once
it was written, and what is costs pages that the system can take back. The files lose their names as soon as they are
mapped, so that none is left when a process is killed.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gtl.types import UserError

KEY = "train.zero.offload_folder"
IN_MEMORY = ("tmpfs", "ramfs")
"""Kinds of file systems that are no disk."""
LARGE = 1 << 20
"""Bytes from which on a tensor has a file of its own; smaller ones share one."""
SHARED = 16 * LARGE
"""Bytes of a file that small tensors share."""
ALIGNMENT = 64


def open_disk(folder: str | None) -> Disk:
    """A folder as a place for tensors; None is the machine's folder for temporary files.

    Raises:
        UserError: there is no such folder on this machine, nothing can be written there, or it is in memory.
    """
    place = Path(folder or tempfile.gettempdir())
    found = f"{KEY}: {str(place)!r} on {socket.gethostname()}"
    if not place.is_dir():
        raise UserError(f"{found}: no such folder; give one on a local disk, which every machine has")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{found}: not to be written to by this user")
    if (kind := file_system(place)) in IN_MEMORY:
        raise UserError(f"{found}: is {kind}, which is memory itself; give a folder on a local disk")
    return Disk(place)


def file_system(folder: Path) -> str | None:
    """Of which kind the one is that a folder is on; None if the system does not say."""
    number = folder.stat().st_dev
    device, found = f"{os.major(number)}:{os.minor(number)}", None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        if fields.split()[2] == device:
            found = kind.split()[0]
    return found


class Disk:
    """Makes tensors in files of a folder, and lets DeepSpeed make them there."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written yet."""
        self._prefix = str(folder / f"gtl-offload-{os.getpid()}-")
        self._shared = torch.UntypedStorage(0)
        self._taken = 0
        self._nbytes = 0

    def zeros(self, shape: int | torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor of zeros, which lies on the disk.

        Raises:
            UserError: the disk is full, or fails.
        """
        outline = torch.empty(shape, dtype=dtype, device="meta")
        if not outline.nbytes:
            return torch.zeros(shape, dtype=dtype)
        storage, offset = self._room(outline.nbytes)
        # Not a view, which would keep the file when DeepSpeed gives the tensor other memory.
        made = torch.empty(0, dtype=dtype)
        return made.set_(storage, offset // dtype.itemsize, outline.shape, outline.stride())

    def copy(self, tensor: Tensor) -> Tensor:
        """A tensor's values in another one, which lies on the disk.

        Raises:
            UserError: the disk is full, or fails.
        """
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies there."""
        file = tensor.untyped_storage().filename if tensor.device.type == "cpu" else None
        return file is not None and file.startswith(self._prefix)

    @contextmanager
    def pinning(self, accelerator: Any) -> Iterator[None]:
        """Within it the tensors that DeepSpeed has its accelerator pin, which are those it offloads, come here."""

        def pin_memory(tensor: Tensor, make_copy: bool = True, match_shape: bool = True) -> Tensor:
            return tensor if self.holds(tensor) else self.copy(tensor)

        accelerator.pin_memory = pin_memory
        try:
            yield
        finally:
            del accelerator.pin_memory

    @contextmanager
    def making(self, accelerator: Any) -> Iterator[None]:
        """As `pinning`; also large tensors come here as they are made, and copies of those that are here.

        They are never in other memory then, not for a moment.
        """
        with self.pinning(accelerator), Making(self):
            yield

    def _room(self, nbytes: int) -> tuple[torch.UntypedStorage, int]:
        """Where so many bytes are, and behind how many others."""
        if nbytes >= LARGE:
            return self._map(nbytes), 0
        offset = -(-self._taken // ALIGNMENT) * ALIGNMENT
        if offset + nbytes > self._shared.nbytes():
            self._shared, offset = self._map(SHARED), 0
        self._taken = offset + nbytes
        return self._shared, offset

    def _map(self, nbytes: int) -> torch.UntypedStorage:
        """A new file, with all its bytes on the disk already: else a full one would kill the process later."""
        folder, prefix = os.path.split(self._prefix)
        try:
            descriptor, file = tempfile.mkstemp(prefix=prefix, dir=folder)
            try:
                os.posix_fallocate(descriptor, 0, nbytes)
                mapped = torch.from_file(file, shared=True, size=nbytes, dtype=torch.uint8)
            finally:
                os.close(descriptor)
                os.unlink(file)
        except OSError as error:
            raise UserError(
                f"{KEY}: {folder!r} on {socket.gethostname()}: {os.strerror(error.errno or 0)}: "
                f"no {nbytes / 2**20:.0f} MiB more go there, after {self._nbytes / 2**20:.0f} MiB of this worker"
            ) from error
        self._nbytes += nbytes
        return mapped.untyped_storage()


class Making(TorchFunctionMode):
    """Has a disk hold what is made."""

    def __init__(self, disk: Disk) -> None:
        """On a disk."""
        super().__init__()
        self._disk = disk

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The call, or what it would have made, on the disk."""
        kwargs = kwargs or {}
        if func is Tensor.clone and self._disk.holds(args[0]):
            return self._disk.copy(args[0])
        if func in (torch.zeros, torch.empty) and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            outline = func(*args, **kwargs | {"device": "meta"})
            if outline.nbytes >= LARGE:
                return self._disk.zeros(outline.shape, outline.dtype)
        return func(*args, **kwargs)
