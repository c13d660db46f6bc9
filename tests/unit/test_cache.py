import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from torch import Tensor

from gtl.data import cache
from gtl.data.buckets import variant_key, variants
from gtl.data.cache import Space, prompt_key
from gtl.data.dataset import PIXEL_SPACE, Cuts, Dataset
from gtl.data.garbage import collect_garbage
from gtl.data.loader import Loader
from gtl.data.plan import Plan
from gtl.storage import Store
from gtl.types import Batch, Entry, Geometry, Item, Record, UserError

CUTS = Cuts(crops=2, flip=True, seed=3)


def moments(i: int) -> dict[str, Tensor]:
    return {"mean": torch.full((4, 2, 2), float(i)), "logvar": torch.zeros(4, 2, 2, dtype=torch.bfloat16)}


def reader(store: Store, name: str = "images-x-fp32") -> Space:
    space = Space(store, name)
    space.refresh()
    return space


def make_dataset(
    store: Store, sizes: list[tuple[int, int]], captions: tuple[str, ...] = ("a", "b"), first: int = 0
) -> Dataset:
    """Latents of image i are i; embeddings of a caption have as many rows as the caption has letters."""
    bucket = (16, 16)
    entries, latents = [], {}
    for i, size in enumerate(sizes, first):
        keys = [variant_key(str(i), bucket, v) for v in variants(str(i), size, bucket, **vars(CUTS))]
        entries.append(Entry(Record(f"{i}.png", str(i), size, captions), bucket, tuple(keys)))
        latents |= {key: moments(i) for key in keys}
    Space(store, "images-x-fp32").write(latents)
    Space(store, "prompts-x-fp32").write({prompt_key(c): {"states": torch.ones(len(c), 3)} for c in ("", *captions)})
    dataset = Dataset(store, entries, "images-x-fp32", "prompts-x-fp32", CUTS)
    dataset.refresh()
    return dataset


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    Space(store, "images-x-fp32").write({"a": moments(1), "b": moments(2)})
    space = reader(store)
    assert ("a" in space, "c" in space, len(space)) == (True, False, 2)
    for key, value in [("a", 1), ("b", 2)]:
        found = space.read(key)
        assert found.keys() == {"mean", "logvar"}
        assert all(torch.equal(found[name], tensor) for name, tensor in moments(value).items())
        assert found["logvar"].dtype == torch.bfloat16
    with pytest.raises(KeyError):
        space.read("c")
    assert len(reader(store, "images-y-fp32")) == 0


def test_a_dataset_of_pixels_has_neither_latents_nor_conditions(tmp_path: Path) -> None:
    store, bucket = Store(tmp_path), (16, 16)
    (cut,) = variants("0", (16, 24), bucket, crops=1)
    key = variant_key("0", bucket, cut)
    pixels = torch.arange(3 * 16 * 16).reshape(3, 16, 16).to(torch.uint8)
    Space(store, PIXEL_SPACE).write({key: {"pixels": pixels}})
    entry = Entry(Record("0.png", "0", (16, 24), ()), bucket, (key,))
    made = Dataset(store, [entry], PIXEL_SPACE, None, Cuts(crops=1, flip=False, seed=0))
    made.save()
    found = Dataset.load(store, made.fingerprint)
    item = found.item(0, 0, 0)
    assert (item.latents, item.conditions, item.null_conditions) == ({}, {}, {})
    assert item.geometry == Geometry((16, 24), (0, 4), bucket)
    assert item.pixels is not None and item.pixels.dtype == torch.uint8
    assert torch.equal(item.pixels, pixels)
    assert [i.caption for i in Plan(found.entries, 2, seed=0).batch(0)] == [0, 0]
    assert collect_garbage(store, keep_days=30, grace_days=0) == (0, 0)
    assert key in reader(store, PIXEL_SPACE)


def test_a_shard_without_its_manifest_is_not_seen(tmp_path: Path) -> None:
    store = Store(tmp_path)
    space = Space(store, "images-x-fp32")
    first, second = space.write({"a": moments(1)}), space.write({"b": moments(2)})
    (tmp_path / f"tensors/images-x-fp32/{second}.jsonl").unlink()
    assert ("a" in reader(store), "b" in reader(store)) == (True, False)
    (tmp_path / f"tensors/images-x-fp32/{first}.safetensors").unlink()
    assert len(reader(store)) == 0


def test_an_open_reader_learns_of_new_shards(tmp_path: Path) -> None:
    store = Store(tmp_path)
    space = reader(store)
    Space(store, "images-x-fp32").write({"a": moments(1)})
    assert "a" not in space
    space.refresh()
    assert torch.equal(space.read("a")["mean"], moments(1)["mean"])


def test_many_writers_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def write(writer: int) -> None:
        space = Space(store, "images-x-fp32")
        for i in range(8):
            space.write({f"{writer}-{i}": moments(writer), "shared": moments(0)})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    space = reader(store)
    assert len(space) == 6 * 8 + 1
    assert all(space.read(f"{w}-{i}")["mean"][0, 0, 0] == w for w in range(6) for i in range(8))
    assert torch.equal(space.read("shared")["mean"], moments(0)["mean"])


def test_threads_read_at_once_while_shards_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, before = Store(tmp_path), sys.getswitchinterval()
    for i in range(6):
        Space(store, "images-x-fp32").write({f"{i}": moments(i)})
    monkeypatch.setattr(cache, "OPEN_SHARDS", 2)
    space = reader(store)

    def read(first: int) -> set[tuple[int, float]]:
        turns = (turn % 6 for turn in range(first, first + 1500))
        return {(i, float(space.read(f"{i}")["mean"][0, 0, 0])) for i in turns}

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(read, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert found == [{(i, float(i)) for i in range(6)}] * 4
    assert len(space._open) == 2


def test_a_view_is_stored_alone(tmp_path: Path) -> None:
    store, big = Store(tmp_path), torch.arange(10000.0).view(100, 100)
    name = Space(store, "images-x-fp32").write({"a": {"row": big[3], "column": big[:, 2]}})
    assert (tmp_path / f"tensors/images-x-fp32/{name}.safetensors").stat().st_size < 2000
    assert torch.equal(reader(store).read("a")["column"], big[:, 2])


def test_a_full_disk_is_named_and_what_stands_is_kept(small_disk: Path) -> None:
    store = Store(small_disk)
    space = Space(store, "images-x-fp32")
    space.write({"a": moments(1)})
    with pytest.raises(UserError, match=r"images-x-fp32/.*: the disk is full"):
        space.write({"b": {"mean": torch.zeros(1 << 20)}})
    assert ("a" in reader(store), "b" in reader(store)) == (True, False)


def test_a_shard_in_a_bucket_is_fetched_once_a_machine(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = Store(f"{s3}/test_cache")
    name = Space(store, "images-x-fp32").write({"a": moments(1), "b": moments(2)})
    assert torch.equal(reader(store).read("b")["mean"], moments(2)["mean"])
    store.delete(f"tensors/images-x-fp32/{name}.safetensors")
    space = Space(store, "images-x-fp32")
    store.write(f"tensors/images-x-fp32/{name}.safetensors", b"not read again")
    space.refresh()
    assert torch.equal(space.read("a")["mean"], moments(1)["mean"])


def test_a_dataset_is_read_back_by_its_fingerprint(tmp_path: Path) -> None:
    made = make_dataset(Store(tmp_path), [(16, 40), (32, 16)])
    made.save()
    found = Dataset.load(Store(tmp_path), made.fingerprint)
    assert found.entries == made.entries
    assert (found.cuts, found.images.name, found.prompts.name) == (CUTS, "images-x-fp32", "prompts-x-fp32")
    assert found.fingerprint == made.fingerprint
    item = found.item(0, 1, 1)
    assert torch.equal(item.latents["mean"], torch.zeros(4, 2, 2))
    assert item.conditions["states"].shape == (1, 3) and item.null_conditions["states"].shape == (0, 3)
    assert item.geometry == Geometry((16, 40), (0, 12), (16, 16))


def test_a_dataset_whose_text_encoder_is_live_has_captions_and_no_prompts(tmp_path: Path) -> None:
    encoded = make_dataset(Store(tmp_path), [(16, 40)])
    made = Dataset(Store(tmp_path), encoded.entries, "images-x-fp32", None, CUTS)
    made.save()
    found = Dataset.load(Store(tmp_path), made.fingerprint)
    assert found.prompts is None and found.fingerprint != encoded.fingerprint
    item = found.item(0, 0, 1)
    assert (item.caption, item.conditions, item.null_conditions) == (made.entries[0].record.captions[1], {}, {})
    assert torch.equal(item.latents["mean"], encoded.item(0, 0, 1).latents["mean"])
    assert item.caption == encoded.item(0, 0, 1).caption


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(uri: str = "u", sha: str = "s", caption: str = "c", weight: float = 1.0, images: str = "i") -> str:
        entry = Entry(Record(uri, sha, (4, 4), (caption,), weight), (4, 4), ("k",))
        return Dataset(Store(tmp_path), [entry], images, "p", CUTS).fingerprint

    different = [fingerprint(), fingerprint(sha="t"), fingerprint(caption="d"), fingerprint(weight=2.0),
                 fingerprint(images="j")]  # fmt: skip
    assert len(set(different)) == 5
    assert fingerprint(uri="elsewhere") == fingerprint()


def test_class_images_are_kept_apart_and_make_another_dataset(tmp_path: Path) -> None:
    made = make_dataset(Store(tmp_path), [(16, 16), (16, 17)])
    plain = Dataset(Store(tmp_path), made.entries, "images-x-fp32", None, CUTS)
    made.entries[1] = replace(made.entries[1], record=replace(made.entries[1].record, is_class_image=True))
    made.save()
    found = Dataset.load(Store(tmp_path), made.fingerprint)
    assert [entry.record.is_class_image for entry in found.entries] == [False, True]
    marked = Dataset(Store(tmp_path), made.entries, "images-x-fp32", None, CUTS)
    assert marked.fingerprint != plain.fingerprint


def test_a_dataset_that_an_older_version_saved_is_still_read(tmp_path: Path) -> None:
    entry = Entry(Record("u", "s", (4, 4), ("c",)), (4, 4), ("k",))
    made = Dataset(Store(tmp_path), [entry], "i", "p", CUTS)
    assert made.fingerprint == "35b7594e95519264a24ffbe36b4dfcf65864083e4dbe039c4bac02b1128a44eb"
    made.save()
    file = tmp_path / f"datasets/{made.fingerprint}.parquet"
    table = parquet.read_table(file)
    parquet.write_table(table.drop_columns(["is_class_image"]), file)
    assert Dataset.load(Store(tmp_path), made.fingerprint).entries == [entry]


def test_a_dataset_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^storage\.cache: .*datasets/abc\.parquet: not there"):
        Dataset.load(Store(tmp_path), "abc")


def test_garbage_is_what_no_recent_dataset_needs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept, gone = make_dataset(store, [(16, 16)]), make_dataset(store, [(16, 16), (16, 17)], ("other",), first=10)
    kept.save()
    gone.save()
    orphan = Space(store, "images-x-fp32").write({"nobody": moments(1)})
    unfinished = Space(store, "images-x-fp32").write({"half": moments(1)})
    (tmp_path / f"tensors/images-x-fp32/{unfinished}.jsonl").unlink()
    size = (tmp_path / f"tensors/images-x-fp32/{orphan}.safetensors").stat().st_size
    assert collect_garbage(store) == (0, 0)  # too fresh: a running fill may have written them
    assert collect_garbage(store, grace_days=0) == (2, 2 * size)
    old = time.time() - 31 * 86400
    for name in (f"{gone.fingerprint}.parquet", f"{gone.fingerprint}.used"):
        os.utime(tmp_path / "datasets" / name, (old, old))
    # Its images go; the shard with its captions holds the empty one too, which every dataset needs.
    assert collect_garbage(store, grace_days=0)[0] == 1
    assert Dataset.load(store, kept.fingerprint).item(0, 0, 0).latents.keys() == {"mean", "logvar"}
    with pytest.raises(UserError, match="not there"):
        Dataset.load(store, gone.fingerprint)


def test_samples_and_features_stay_for_a_while(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in ("samples/a/000000.png", "samples/a/000001.png", "features/b/c.safetensors"):
        store.write(key, b"1234")
    assert collect_garbage(store, grace_days=0) == (0, 0)
    old = time.time() - 31 * 86400
    for key in ("samples/a/000001.png", "features/b/c.safetensors"):
        os.utime(tmp_path / key, (old, old))
    assert collect_garbage(store) == (2, 8)
    assert [key for key, _, _ in store.list("samples")] == ["samples/a/000000.png"]


def test_prompts_that_a_run_asked_for_are_no_garbage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    dataset = make_dataset(store, [(16, 16)])
    assert dataset.prompts is not None
    for prompt in ("a dog", "a cat", "a bird"):
        dataset.prompts.write({prompt_key(prompt): {"embeds": torch.zeros(2)}})
    dataset.save(["a dog"])
    dataset.save(["a cat"])  # another run on the same images
    assert collect_garbage(store, grace_days=0)[0] == 1
    dataset.prompts.refresh()
    assert [prompt_key(p) in dataset.prompts for p in ("a dog", "a cat", "a bird")] == [True, True, False]


def draw(item: Item, rng: torch.Generator) -> dict[str, Tensor]:
    return {"latents": item.latents["mean"], "noise": torch.randn(2, generator=rng)}


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def load(
    dataset: Dataset, world: int, micro_batch: int, steps: tuple[int, int] = (0, 6), pin: bool = False
) -> dict[int, list[Batch]]:
    plan = Plan(dataset.entries, 5, seed=1)
    found: dict[int, list[Batch]] = {}
    for rank in range(world):
        loader = Loader(dataset, plan, draw, collate, rank=rank, world=world, micro_batch=micro_batch,
                        first_step=steps[0], last_step=steps[1], seed=1, pin=pin)  # fmt: skip
        for step, batches in loader:
            found.setdefault(step, []).extend(batches)
    return found


def real_rows(batches: list[Batch]) -> list[tuple[float, ...]]:
    return [
        (float(weight), *batch.tensors["noise"][i].tolist(), float(batch.tensors["latents"][i].mean()))
        for batch in batches
        for i, weight in enumerate(batch.weight)
        if weight > 0
    ]


def test_what_is_drawn_does_not_depend_on_ranks_and_micro_batches(tmp_path: Path) -> None:
    dataset = make_dataset(Store(tmp_path), [(16, 16)] * 12)
    alone = load(dataset, world=1, micro_batch=5)
    assert list(alone) == list(range(6))
    assert all(sum(float(b.weight.sum()) for b in batches) == pytest.approx(1) for batches in alone.values())
    for world, micro_batch in [(1, 2), (2, 2), (3, 1), (7, 4)]:
        other = load(dataset, world, micro_batch)
        assert {s: real_rows(b) for s, b in other.items()} == {s: real_rows(b) for s, b in alone.items()}
    noises = [row[1:3] for batches in alone.values() for row in real_rows(batches)]
    assert len(set(noises)) == len(noises)


def test_a_loader_starts_anywhere(tmp_path: Path) -> None:
    dataset = make_dataset(Store(tmp_path), [(16, 16)] * 12)
    whole, rest = load(dataset, 2, 2), load(dataset, 2, 2, (4, 6))
    assert {s: real_rows(b) for s, b in rest.items()} == {s: real_rows(whole[s]) for s in (4, 5)}


@pytest.mark.gpu
def test_what_is_pinned_for_a_gpu_is_the_same(tmp_path: Path) -> None:
    dataset = make_dataset(Store(tmp_path), [(16, 16)] * 12)
    plain, pinned = load(dataset, 1, 2), load(dataset, 1, 2, pin=True)
    assert {s: real_rows(b) for s, b in pinned.items()} == {s: real_rows(b) for s, b in plain.items()}
    for batch in (batch for batches in pinned.values() for batch in batches):
        assert all(tensor.is_pinned() for tensor in (*batch.tensors.values(), batch.weight))


def test_a_batch_names_its_images(tmp_path: Path) -> None:
    dataset = make_dataset(Store(tmp_path), [(16, 16)] * 3)
    (batch,) = load(dataset, 1, 5, (0, 1))[0]
    owners = [next(i for i, e in enumerate(dataset.entries) if key in e.variants) for key in batch.keys]
    assert owners == batch.tensors["latents"].mean((1, 2, 3)).int().tolist()
    assert batch.weight.tolist() == pytest.approx([1 / 3] * 3 + [0, 0])


def test_a_failure_in_the_background_reaches_the_consumer(tmp_path: Path) -> None:
    dataset = make_dataset(Store(tmp_path), [(16, 16)] * 3)

    def fail(item: Item, rng: torch.Generator) -> dict[str, Tensor]:
        raise ZeroDivisionError("drawn")

    loader = Loader(dataset, Plan(dataset.entries, 2, 0), fail, collate, rank=0, world=1, micro_batch=2,
                    first_step=0, last_step=9, seed=0)  # fmt: skip
    with pytest.raises(ZeroDivisionError, match="drawn"):
        next(iter(loader))


def test_a_consumer_may_leave_early_and_waiting_is_measured(tmp_path: Path) -> None:
    dataset = make_dataset(Store(tmp_path), [(16, 16)] * 3)

    def slow(item: Item, rng: torch.Generator) -> dict[str, Tensor]:
        time.sleep(0.02)
        return draw(item, rng)

    loader = Loader(dataset, Plan(dataset.entries, 2, 0), slow, collate, rank=0, world=1, micro_batch=2,
                    first_step=0, last_step=10**6, seed=0)  # fmt: skip
    iterator = iter(loader)
    assert [next(iterator)[0] for _ in range(3)] == [0, 1, 2]
    assert loader.waited >= 0.1
    iterator.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "gtl-loader"]
