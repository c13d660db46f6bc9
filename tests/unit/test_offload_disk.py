"""Tensors in files: they are ordinary, nothing is left of them, and a folder that will not do is refused."""

import os
import socket
from pathlib import Path

import pytest
import torch

from gtl.train.disk import LARGE, Disk, file_system, open_disk
from gtl.types import UserError

HERE = socket.gethostname()


def mapped(folder: Path) -> int:
    """Files of a folder that this process has mapped."""
    return len({line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/" in line})


@pytest.mark.parametrize("size", [3, LARGE // 4 - 1, LARGE // 4, (7, 5), (512, 1024), 0])
def test_a_tensor_is_ordinary_but_for_its_place(tmp_path: Path, size: int | tuple[int, ...]) -> None:
    disk = Disk(tmp_path)
    shape = size if isinstance(size, int) else torch.Size(size)
    zeros = disk.zeros(shape, torch.float32)
    assert torch.equal(zeros, torch.zeros(size))
    values = torch.randn(zeros.shape)
    kept = disk.copy(values)
    assert torch.equal(kept, values)
    assert kept.data_ptr() % 64 == 0
    zeros.add_(1)
    assert torch.equal(kept, values)
    assert (disk.holds(kept), disk.holds(kept[:1]), disk.holds(values)) == (size != 0, size != 0, False)
    assert list(tmp_path.iterdir()) == []


def test_small_tensors_share_a_file_and_space_is_given_back(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    small = [disk.copy(torch.full((1000,), float(number))) for number in range(100)]
    assert mapped(tmp_path) == 1
    assert [float(each.sum()) for each in small] == [1000.0 * number for number in range(100)]
    large = [disk.zeros(LARGE, torch.uint8) for _ in range(5)]
    assert mapped(tmp_path) == 6
    large[0].data = torch.zeros(0, dtype=torch.uint8)  # as DeepSpeed moves a tensor elsewhere
    assert mapped(tmp_path) == 5
    del large
    assert mapped(tmp_path) == 1


def test_what_is_made_goes_there_if_it_is_large(tmp_path: Path) -> None:
    class Accelerator:
        """As far as it is asked."""

        def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    disk, accelerator = Disk(tmp_path), Accelerator()
    with disk.making(accelerator):
        made = [torch.zeros(LARGE), torch.empty((2, LARGE), dtype=torch.bfloat16, device="cpu"), torch.zeros(LARGE, 2)]
        other = [torch.zeros(3), torch.empty(LARGE, device="meta"), torch.ones(LARGE), torch.ones(LARGE).clone()]
        copied, pinned = made[0].clone(), accelerator.pin_memory(torch.ones(3))
        assert accelerator.pin_memory(pinned) is pinned
    assert [disk.holds(each) for each in [*made, copied, pinned]] == [True] * 5
    assert [tuple(each.shape) for each in made] == [(LARGE,), (2, LARGE), (LARGE, 2)]
    assert (made[1].dtype, made[0].abs().sum(), pinned.sum()) == (torch.bfloat16, 0, 3)
    assert not any(disk.holds(each) for each in [*other, torch.zeros(LARGE), accelerator.pin_memory(torch.ones(3))])


def test_a_full_disk_ends_in_one_line(small_disk: Path) -> None:
    disk = Disk(small_disk)
    with pytest.raises(UserError) as refused:
        disk.zeros(3 * LARGE, torch.uint8)
    assert str(refused.value) == (
        f"train.zero.offload_folder: {str(small_disk)!r} on {HERE}: No space left on device: no 3 MiB more go there, "
        "after 0 MiB of this worker"
    )
    assert list(small_disk.iterdir()) == []


def test_memory_is_no_disk(small_disk: Path) -> None:
    assert file_system(small_disk) == "tmpfs"
    with pytest.raises(UserError) as refused:
        open_disk(str(small_disk))
    assert str(refused.value) == (
        f"train.zero.offload_folder: {str(small_disk)!r} on {HERE}: is tmpfs, which is memory itself; give a folder on "
        "a local disk"
    )


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "missing"):
        with pytest.raises(UserError) as refused:
            open_disk(str(tmp_path / name))
        assert str(refused.value) == (
            f"train.zero.offload_folder: {str(tmp_path / name)!r} on {HERE}: no such folder; give one on a local disk, "
            "which every machine has"
        )


def test_the_machines_own_folder_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert (
        open_disk(None)
        .copy(torch.ones(3))
        .untyped_storage()
        .filename.startswith(str(tmp_path / f"gtl-offload-{os.getpid()}-"))
    )
