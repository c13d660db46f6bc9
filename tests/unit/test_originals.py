"""Images that are edits of others: how a folder and a table say so, what is kept of it, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from gtl.config.recipe import Data
from gtl.data.cache import Space
from gtl.data.captions import CaptionRule
from gtl.data.check import inspect_here
from gtl.data.containers import fetch
from gtl.data.dataset import Cuts, Dataset
from gtl.data.garbage import collect_garbage
from gtl.data.index import SeenFile
from gtl.data.prepare import check_captioned, check_usable, make_entry, missing_images, paired, unpaired
from gtl.data.scenes.edits import choose_edit
from gtl.data.scenes.reader import compare, read_picture
from gtl.data.scenes.sets import SceneSet, draw_set
from gtl.data.scenes.vocabulary import HELD_OUT
from gtl.data.sources import scan
from gtl.storage import Store
from gtl.types import UserError
from tests.unit.test_sources import look, picture, write

CUTS = Cuts(1, True, 0)
SIZES = ((8, 6),)


def folder_of(tmp_path: Path, *lines: dict[str, str], **files: bytes) -> Path:
    files = {"after.png": picture(color="red"), "before/a.png": picture(color="blue"), **files}
    told = [{"file_name": "after.png", "text": "make it red", **line} for line in lines]
    return write(tmp_path / "s", {**files, "metadata.jsonl": "\n".join(map(json.dumps, told))})


def test_a_folder_says_what_an_image_is_an_edit_of(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"source_file_name": "before/a.png"})
    found = look(folder)
    (one,) = found.images
    assert one.record.captions == ("make it red",) and one.record.original is None and one.beginning is not None
    assert fetch(one.beginning.place) == picture(color="blue")
    (pair,) = paired(found).images
    assert pair.record.original is not None
    assert pair.record.original.uri == f"{folder}/before/a.png" and pair.record.original.sha256 != pair.record.sha256
    (alone,) = unpaired(found).images
    assert (alone.record, alone.beginning) == (one.record, None)


def test_an_image_can_be_both(tmp_path: Path) -> None:
    """Whatever has a line of its own is an image of its own, too."""
    lines = [{"source_file_name": "before/a.png"}, {"file_name": "before/a.png", "source_file_name": "after.png"}]
    found = paired(look(folder_of(tmp_path, *lines)))
    one, two = found.images
    assert one.record.original is not None and two.record.original is not None
    assert (one.record.original.sha256, two.record.original.sha256) == (two.record.sha256, one.record.sha256)


@pytest.mark.parametrize("column", ["original_image", "input_image", "source_image"])
def test_a_table_has_a_column_for_it(tmp_path: Path, column: str) -> None:
    """As published sets of instructions have it, in whichever order."""
    rows = [
        {
            column: {"bytes": picture(color=a)},
            "edit_prompt": f"make it {b}",
            "edited_image": {"bytes": picture(color=b)},
        }
        for a, b in (("red", "blue"), ("white", "green"))
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "edits.parquet", row_group_size=1)
    found = paired(look(tmp_path / "edits.parquet"))
    assert [one.record.captions for one in found.images] == [("make it blue",), ("make it green",)]
    for one, row in zip(found.images, rows, strict=True):
        assert one.beginning is not None
        assert fetch(one.place) == row["edited_image"]["bytes"] and fetch(one.beginning.place) == row[column]["bytes"]
    (seen,) = inspect_here(str(tmp_path), [(parquet_file := _listed(tmp_path))])
    assert SeenFile.parse(seen.dump()) == seen and parquet_file is not None
    older = json.loads(seen.dump())
    older["images"] = [image[:9] for image in older["images"]]
    assert [image.row for image in SeenFile.parse(json.dumps(older)).images] == [0, 0, 1, 1]


def _listed(folder: Path):  # type: ignore[no-untyped-def]
    from gtl.data.sources import list_source

    return list_source(str(folder / "edits.parquet")).containers["edits.parquet"]


def test_what_is_no_edit_is_refused_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        paired(look(folder_of(tmp_path, {}, **{"more.png": picture((3, 3))})))
    assert str(error.value).startswith(
        "data.source: 3 of 3 images say not which image they are an edit of, the first: "
    )
    assert str(error.value).endswith(
        "give source_file_name beside file_name and text in metadata.jsonl, or a column original_image in a table"
    )


def test_another_size_and_a_broken_file_leave_an_image_out(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, {"source_file_name": "before/a.png"}, **{"before/a.png": picture((16, 6))}
    )  # fmt: skip
    found = paired(look(folder))
    assert not found.images
    with pytest.raises(UserError, match=r"what it is an edit of, .*a\.png: 16x6 pixels, and its edit has 8x6; both"):
        check_usable(found, Data(source=str(folder)))
    (folder / "before/a.png").write_bytes(b"junk")
    assert paired(look(folder)).broken[0].reason.startswith("what it is an edit of, ")
    assert unpaired(look(folder)).images, "of no matter where edits are not learned"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"source_file_name": "nowhere.png"}, ":1: source_file_name 'nowhere.png': no such image"),
        ({"source_file_name": 5}, ":1: source_file_name: 5: expected the name of an image file"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        look(folder_of(tmp_path, line))
    assert str(error.value).endswith(message)


def test_both_are_encoded_cut_alike_and_stay_in_the_cache(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"source_file_name": "before/a.png"})
    (one,) = paired(look(folder)).images
    entry = make_entry(one, SIZES, CUTS)
    assert len(entry.originals) == len(entry.variants) == 2 and not {*entry.originals} & {*entry.variants}
    store = Store(tmp_path / "cache")
    dataset = Dataset(store, [entry], "images-x-fp32", None, CUTS)
    after, before = missing_images(dataset, [one], every_copy=False)
    assert (after.sha256, before.sha256) == (one.record.sha256, one.record.original and one.record.original.sha256)
    assert list(after.variants.values()) == list(before.variants.values())
    keys = [*entry.variants, *entry.originals]
    dataset.images.write({key: {"mean": torch.full((4, 1, 1), float(i))} for i, key in enumerate(keys)})
    dataset.save()
    found = Dataset.load(store, dataset.fingerprint)
    assert found.entries == dataset.entries
    item = found.item(0, 1, 0)
    assert item.original is not None and item.latents["mean"].max() == 1 and item.original["mean"].max() == 3
    plain = Dataset(store, [replace(entry, originals=(), record=replace(entry.record, original=None))],
                    "images-x-fp32", None, CUTS)  # fmt: skip
    plain.refresh()
    assert plain.fingerprint != dataset.fingerprint and plain.item(0, 0, 0).original is None
    assert collect_garbage(store, keep_days=30, grace_days=0) == (0, 0)
    assert all(key in _reread(store) for key in keys)


def _reread(store: Store) -> Space:
    space = Space(store, "images-x-fp32")
    space.refresh()
    return space


def test_built_in_edits_change_what_they_say_and_nothing_else(tmp_path: Path) -> None:
    scenes = SceneSet.parse("builtin:scenes?split=edits&count=40&seed=3")
    changed, right = 0, 0
    for index in range(scenes.count):
        edit, _ = scenes.edit(index)
        (old,), (new,) = edit.before.things, edit.after.things
        differing = [name for name in ("shape", "colour", "size", "place") if getattr(old, name) != getattr(new, name)]
        assert differing in (["shape"], ["colour"]) and getattr(new, differing[0]) in edit.instruction
        assert edit.before.background == edit.after.background
        assert not {(old.shape, old.colour), (new.shape, new.colour)} & {*HELD_OUT}
        before, after = scenes.before(index), scenes.picture(index)[0]
        away = np.abs(np.asarray(before).astype(int) - np.asarray(after)).max(-1)
        changed += int((away > 0).sum() < away.size / 2)
        right += all(compare(read_picture(after).scene, edit.after).values())
        right += all(compare(read_picture(before).scene, edit.before).values())
    assert changed == scenes.count, "most of a picture stays in every value"
    assert right >= 2 * scenes.count - 4, "the reader sees both"
    folder = draw_set(replace(scenes, count=3), Store(tmp_path))
    found = paired(scan(folder.root, CaptionRule(), 1.0, None, inspect_here))
    assert [one.record.captions[0] for one in found.images] == [scenes.caption(i) for i in range(3)]
    check_captioned(found, Data(source="builtin:scenes"), _needs())


def _needs():  # type: ignore[no-untyped-def]
    from gtl.config.pairs import pair

    return pair("lora", "instruct").needs


def test_an_edit_depends_on_its_place_alone() -> None:
    import random

    assert choose_edit(random.Random("a")) == choose_edit(random.Random("a"))
    one, two = (SceneSet(split="edits", count=count, size=64) for count in (5, 50))
    assert one.edit(4) == two.edit(4) and one.before(4).tobytes() == two.before(4).tobytes()
    with pytest.raises(UserError, match="split=edits with style=neon: leave one out"):
        SceneSet(split="edits", style="neon")


def test_pairs_arrive_in_a_batch_and_are_learned(tmp_path: Path) -> None:
    """Drawn, encoded by the actor that fills the cache, loaded and trained on, as a run does it."""
    from gtl.config import parse_recipe
    from gtl.data.fill import Encoder
    from gtl.data.loader import Loader
    from gtl.data.plan import Plan
    from gtl.data.prepare import missing_texts, spaces
    from gtl.data.stream import COLUMN
    from gtl.evaluate.held_out import HeldOut, load
    from gtl.families import open_family
    from gtl.generate.spread import Model, Origin
    from gtl.train.assemble import assemble
    from gtl.train.place import place

    recipe = parse_recipe({
        "model": {"source": "builtin:tiny"}, "tuner": {"type": "lora", "rank": 4}, "objective": {"type": "instruct"},
        "data": {"source": "builtin:scenes?split=edits&count=4", "resolution": 64},
    })  # fmt: skip
    cache, family = Store(tmp_path), open_family("builtin:tiny")
    folder = draw_set(SceneSet.parse(str(recipe.data.source)), cache)
    located = paired(scan(folder.root, CaptionRule(), 1.0, None, inspect_here)).images
    cuts = Cuts(1, False, 0)
    images, prompts = spaces(family, "fp32", recipe.needs)
    dataset = Dataset(cache, [make_entry(one, ((64, 64),), cuts) for one in located], images, prompts, cuts)
    rows = [{"caption": text, "key": key} for key, text in missing_texts(dataset, []).items()]
    rows += [vars(work) for work in missing_images(dataset, located, every_copy=False)]
    assert len(rows) == 5 + 8
    told = json.loads(json.dumps(rows))
    results = [each for batch in Encoder(family, cache, images, prompts, "fp32")({COLUMN: [json.dumps(told)]})
               for text in batch[COLUMN] for each in [json.loads(text)]]  # fmt: skip
    assert len(results) == 13 and not any(result["error"] for result in results)
    dataset.refresh()
    trainee = assemble(recipe, "fp32")
    for part in trainee.parts.values():
        place(part, trainee.dtype, "cpu")
    loader = Loader(
        dataset, Plan(dataset.entries, 4, 0), trainee.objective.draw, trainee.objective.collate, rank=0, world=1,
        micro_batch=4, first_step=0, last_step=8, seed=0,
    )  # fmt: skip
    (player,) = trainee.players.values()
    optimizer = torch.optim.Adam(trainee.parameters.values(), lr=1e-2)
    before = trainee.parameters["unet.conv_in.added"].clone()
    losses = []
    for _, (batch,) in loader:
        shown = batch.tensors["original"]
        assert shown.shape == batch.tensors["clean"].shape
        loss = player(batch).total
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (trainee.parameters["unet.conv_in.added"] - before).abs().max() > 1e-3
    assert all(np.isfinite(losses))
    dataset.save()
    held_out = HeldOut(cache.url(), dataset.fingerprint, recipe.objective, recipe.needs, 0)
    alone = load(Model(Origin("builtin:tiny"), family.fingerprint()), held_out, "cpu")
    with torch.no_grad():
        seen = alone(0).losses
        assert len(seen) == 4 and all(np.isfinite(seen)), "val_loss of the model alone, which sees nothing yet"
