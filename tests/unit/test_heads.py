"""Heads: labels of images, objects as points, metrics of what is said, and the commands that use them."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from gtl.adapters import Card, Registry
from gtl.adapters.card import base_of
from gtl.adapters.delta import write_delta
from gtl.cli import main
from gtl.config import parse_recipe
from gtl.data.captions import CaptionRule
from gtl.data.check import inspect_here
from gtl.data.labels import check_labels, check_turned, find_tasks
from gtl.data.scenes.sets import SceneSet
from gtl.data.sources import Scan, scan
from gtl.evaluate.outcomes import average_precision, measure, values_of
from gtl.families import open_family, seeing
from gtl.families.boxes import Found, decode, losses, matched, overlaps
from gtl.families.classifier_blank import write_classifier
from gtl.features.heads import make_heads
from gtl.features.network import Reader
from gtl.objectives.classify import boxes_in_crop
from gtl.storage import Store
from gtl.types import Geometry, Item, Task, UserError
from tests.tiny import make_vision, write_pictures

BOX = {"bbox": [[4, 6, 10, 8]], "categories": ["cup"]}


def look(source: Path | str, *columns: str, captions: bool = False) -> Scan:
    rule = CaptionRule("auto" if captions else "folder")
    return scan(str(source), rule, 1.0, Store("/tmp/none") if captions else None, inspect_here, None, columns)


def labels_of(found: Scan) -> list[dict[str, Any]]:
    return [json.loads(located.record.labels or "{}") for located in found.images]


def folder_of(place: Path, *rows: dict[str, Any]) -> Path:
    """As many pictures of 32 x 24 as rows, and what those say of them."""
    write_pictures(place, [(32, 24)] * len(rows))
    names = sorted(path.name for path in place.glob("*.png"))
    lines = [json.dumps({"file_name": name, **row}) for name, row in zip(names, rows, strict=True)]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    return place


def test_labels_come_from_folders_metadata_and_tables(tmp_path: Path) -> None:
    (tmp_path / "animals").mkdir()
    for name in ("cat", "dog"):
        write_pictures(tmp_path / "animals" / name, [(24, 32)])
        (tmp_path / "animals" / name / "metadata.jsonl").unlink()
    assert labels_of(look(tmp_path / "animals", "folder")) == [{"folder": "cat"}, {"folder": "dog"}]

    place = folder_of(tmp_path / "rows", {"label": 3, "boxes": BOX}, {"label": None}, {"text": "no label"})
    assert labels_of(look(place, "label", "boxes")) == [{"label": "3", "boxes": BOX}, {}, {}]

    data = [path.read_bytes() for path in sorted(place.iterdir()) if path.suffix == ".png"]
    table = pa.table({"image": data, "label": ["a", None, "b"], "boxes": [BOX, None, BOX], "text": ["x", "y", "z"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    found = labels_of(look(tmp_path / "t.parquet", "label", "boxes"))
    assert found == [{"label": "a", "boxes": BOX}, {}, {"label": "b", "boxes": BOX}]
    assert labels_of(look(tmp_path / "t.parquet", "caption", captions=True))[2] == {"caption": "z"}
    assert all(located.record.labels == "" for located in look(place).images)


def test_tasks_are_what_columns_are_good_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = folder_of(tmp_path / "rows", {"label": "b", "boxes": BOX}, {"label": "a"}, {"other": 1})
    found = look(place, "label", "boxes")
    tasks = find_tasks(found, {"kind": "label", "things": "boxes"}, "rows")
    assert tasks == {"kind": Task("label", "class", ("a", "b")), "things": Task("boxes", "boxes", ("cup",))}
    with caplog.at_level(logging.WARNING):
        check_labels(found, tasks)
    assert len(found.images) == 2 and "1 of 3 images have no boxes or label; left out" in caplog.text


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{}, {}], "--task kind: no image of .* has a column 'label'"),
        ([{"label": "a"}, {"label": "a"}], "--task kind: 2 images of .* all have 'a'; there have to be two classes"),
        ([{"label": "a"}, {"label": BOX}], "other images have one class there"),
        ([{"label": {"bbox": 1}}], 'expected {"bbox": '),
        ([{"label": {"bbox": [[1, 2, 3]], "categories": ["a"]}}], 'expected {"bbox": '),
        ([{"label": {"bbox": [[1, 2, 3, 4]], "categories": []}}], 'expected {"bbox": '),
        ([{"label": {"bbox": [], "categories": []}}], "there is no object"),
    ],
)
def test_columns_that_are_good_for_nothing(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    place = folder_of(tmp_path / "rows", *rows)
    with pytest.raises(UserError, match=said):
        make_heads("builtin:pixels", str(place), ["kind=label"], tmp_path / "out", str(tmp_path / "cache"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"label": "a"}, {"label": "c"}], "label: 'c': the model's head kind knows a, b"),
        ([{"other": "a"}], "data.source: no image has a label, which the model's head kind learns to say"),
        ([{"label": "a", "boxes": {"bbox": [[30, 0, 4, 4]], "categories": ["cup"]}}],
         r"boxes: box \[30, 0, 4, 4\]: expected x, y, width, height inside 32 x 24"),
        ([{"label": "a", "boxes": {"bbox": [[3, 3, 0, 4]], "categories": ["cup"]}}], "expected x, y, width, height"),
        ([{"label": "a", "boxes": {"bbox": [[3, 3, 4, 4]], "categories": ["jug"]}}], "'jug': the model's head things"),
    ],
)  # fmt: skip
def test_labels_that_heads_do_not_know(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    tasks = {"kind": Task("label", "class", ("a", "b")), "things": Task("boxes", "boxes", ("cup",))}
    with pytest.raises(UserError, match=said):
        check_labels(look(folder_of(tmp_path / "rows", *rows), "label", "boxes"), tasks)


def test_the_built_in_scenes_say_what_they_show() -> None:
    scenes = SceneSet(seed=4)
    rows = [scenes.labels(i) for i in range(40)]
    assert {row["objects"] for row in rows} == {"one", "two"}
    for i, row in enumerate(rows):
        scene, _ = scenes.scene(i)
        assert row["boxes"]["categories"] == [thing.shape for thing in scene.things]
        assert ("shape" in row) == (row["objects"] == "one") and row["background"] == scene.background.colour
        for left, top, width, height in row["boxes"]["bbox"]:
            assert 0 <= left < left + width <= 64 and 0 <= top < top + height <= 64 and min(width, height) > 12


def perfect(boxes: torch.Tensor, classes: torch.Tensor, side: int, kinds: int) -> torch.Tensor:
    """What a head would put out that has found them all."""
    output = torch.zeros(1, kinds + 4, side, side)
    output[:, :kinds] = -20
    for box, kind in zip(boxes, classes.tolist(), strict=True):
        x, y = (box[:2] * side).floor().long().tolist()
        output[0, kind, y, x] = 20
        output[0, kinds:, y, x] = torch.cat([box[:2] * side - torch.tensor([x, y]), box[2:] * side])
    return output


def test_what_a_perfect_head_says_is_there_and_costs_nothing() -> None:
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.71, 0.62, 0.1, 0.5]])
    classes = torch.tensor([1, 0])
    output = perfect(boxes, classes, 16, 3)
    (found,) = decode(output, 2)
    order = found.classes.argsort(descending=True)
    assert found.classes[order].tolist() == [1, 0] and found.scores.min() > 0.99
    torch.testing.assert_close(found.boxes[order], boxes)
    padded = torch.cat([boxes, torch.zeros(3, 4)])[None]
    truth = torch.tensor([[1, 0, -1, -1, -1]])
    assert losses(output, padded, truth, 0.1).tolist() == pytest.approx([0], abs=1e-4)
    assert losses(output, padded, torch.tensor([[1, 2, -1, -1, -1]]), 0.1).item() > 5  # one is taken for another
    nothing = torch.full((1, 5), -1)
    assert losses(output, padded, nothing, 0.1).item() > 5  # and here both are too many
    moved = output.clone()
    moved[:, 3:5] += 0.25
    assert losses(moved, padded, truth, 0.1).item() == pytest.approx(0.5, abs=1e-3)
    bigger = output.clone()
    bigger[:, 5:] += 1
    assert losses(bigger, padded, truth, 0.1).item() == pytest.approx(0.2, abs=1e-3)


def test_overlap_is_of_intersection_and_union() -> None:
    one = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    others = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.7, 0.5, 0.4, 0.4], [0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]])
    assert overlaps(one, others)[0].tolist() == pytest.approx([1, 1 / 3, 1 / 4, 0])
    found = Found(one.expand(3, 4), torch.tensor([1, 0, 1]), torch.tensor([0.9, 0.8, 0.7]))
    assert matched(found, one, torch.tensor([1])).tolist() == [True, False, False]  # each counts once
    assert matched(found, one[:0], torch.zeros(0)).tolist() == [False] * 3


def test_boxes_go_with_the_crop() -> None:
    task = Task("boxes", "boxes", ("cup",))
    # 40 x 20 pixels become 64 x 32, of which the middle 32 are kept.
    item = Item({}, {}, {}, Geometry(original=(20, 40), crop=(0, 16), target=(32, 32)))
    boxes = {"bbox": [[15, 5, 10, 10], [8, 0, 6, 20], [0, 0, 4, 4]], "categories": ["cup"] * 3}
    rows = boxes_in_crop(boxes, task, item)
    assert rows[:3, 0].tolist() == [0, 0, -1]
    assert rows[0, 1:].tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5])
    left, right = 0.0, (14 * 1.6 - 16) / 32
    assert rows[1, 1:].tolist() == pytest.approx([(left + right) / 2, 0.5, right, 1.0])
    assert boxes_in_crop(None, task, item)[0, 0] == -2


def test_accuracy_is_a_share_with_wilsons_interval() -> None:
    right = torch.tensor([True] * 80 + [False] * 20)
    found = measure({"right.kind": right, "labelled.kind": torch.ones(100, dtype=torch.bool)})
    score = found["accuracy"].whole
    assert score.value == 0.8 and score.num_fake == 0 and score.num_real == 100
    assert (score.low, score.high) == (pytest.approx(0.711, abs=1e-3), pytest.approx(0.867, abs=1e-3))
    some = torch.tensor([True] * 50 + [False] * 50)
    found = measure({"right.a": right, "labelled.a": torch.ones(100), "right.b": right & some, "labelled.b": some})
    assert values_of(found) == {"accuracy": pytest.approx(0.9), "accuracy_a": 0.8, "accuracy_b": 1.0}
    assert measure({"right.a": right, "labelled.a": torch.zeros(100)}) == {}


def test_boxes_and_mirrored_pictures_do_not_go_together() -> None:
    tasks = {"shape": Task("shape", "class", ("a", "b")), "things": Task("boxes", "boxes", ("a", "b"))}
    check_turned(tasks, False)
    check_turned({"shape": tasks["shape"]}, True)
    with pytest.raises(UserError, match="data.flip: true: the boxes of the model's head things are not mirrored"):
        check_turned(tasks, True)


def test_average_precision_is_that_of_the_definition() -> None:
    hits = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    # Precision 1 up to recall 1/2, then 2/3: 51 of 101 recalls and 50.
    assert average_precision(hits, 2) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert average_precision(hits[:1], 2) == pytest.approx(51 / 101)
    assert average_precision(hits[:0], 2) == 0


def test_mean_precision_tells_how_sure_it_is() -> None:
    images, rng = 60, torch.Generator().manual_seed(0)
    said = torch.zeros(images, 2, 3)
    said[..., 1] = torch.rand(images, 2, generator=rng)
    said[:, 0, 2] = (torch.rand(images, generator=rng) < 0.7).float()
    said[:, 1, 1] = -1
    there = torch.zeros(images, 2)
    there[:, 0] = 1
    score = measure({"said.x": said, "there.x": there})["map_50"].whole
    assert 0.4 < score.value < 0.8 and score.low is not None and score.low < score.value < (score.high or 0)
    without = [i for i in range(images) if i != 7]
    less = measure({"said.x": said[without], "there.x": there[without]})["map_50"].whole.value
    assert score.real is not None
    assert float(score.real[7]) == pytest.approx((images - 1) * (score.value - less), abs=1e-6)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"evaluate": {"metrics": ["accuracy"]}, "objective": {"type": "denoise"}, "tuner": {"type": "lora"}},
         "evaluate.metrics: accuracy: comes of objective.type: classify, and not of denoise"),
        ({"train": {"checkpoints": {"best": "kid"}}, "data": {"source": "x", "validation": 0.1}},
         "kid: classify draws no pictures"),
        ({"train": {"checkpoints": {"best": "accuracy"}}}, "there is nothing to judge by; set data.validation"),
        ({"tuner": {"type": "lora"}}, "objective.type: 'classify' does not go with tuner.type 'lora'"),
        ({"tuner": {"type": "full"}, "train": {"activation_checkpointing": True}}, "statistics of a batch twice"),
        ({"model": {"source": "m", "weights": "random"}}, "model.weights: random: leaves nothing to build upon"),
        ({"tuner": {"type": "full"}, "train": {"zero": {"stage": 3}}}, "train.zero.stage: 3: full with classify bears"),
    ],
)  # fmt: skip
def test_recipes_that_ask_for_what_is_not_there(sections: dict[str, Any], said: str) -> None:
    given = {"model": {"source": "m"}, "tuner": {"type": "head"}, "objective": {"type": "classify"},
             "data": {"source": "x"}, **sections}  # fmt: skip
    with pytest.raises(UserError, match=said):
        parse_recipe(given)


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["gtl", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out if not ended.value.code else out.err.splitlines()[-1]


def publish(place: Path) -> Path:
    """A model whose heads say left or right by a picture's own pixels, and see a dot at its bright place."""
    tasks = {"side": Task("side", "class", ("left", "right"))}
    write_classifier("builtin:pixels", tasks, place / "model")
    family: Any = seeing(open_family(str(place / "model")))
    head = family.load("head")
    weight = torch.zeros(2, 3, 16, 16)
    weight[0, :, :, :8], weight[1, :, :, 8:] = 1, 1
    write_delta({"head.heads.side.weight": weight.flatten(1), "head.heads.side.bias": torch.zeros(2)}, place / "delta")
    assert head.heads["side"].weight.shape == (2, 768)
    card = Card(name="sides", version="v1", kind="delta", base=base_of(family, str(place / "model")), tuner={})
    Registry(place / "registry").publish("sides", "v1", place / "delta", card)
    return place


def test_published_heads_say_what_is_in_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    place = publish(tmp_path)
    for side in ("left", "right"):
        image = Image.new("RGB", (100, 60), (20, 20, 20))
        image.paste((250, 250, 250), (20, 0, 50, 60) if side == "left" else (50, 0, 80, 60))
        image.save(tmp_path / f"{side}.png")
    names = [str(tmp_path / f"{side}.png") for side in ("left", "right")]
    asked = ["classify", *names, "--adapter", "sides", "--registry", str(place / "registry")]
    status, text = command(monkeypatch, capsys, *asked, "--json", "--top", "2")
    said = json.loads(text)
    assert status == 0 and [each["answers"][0]["label"] for each in said] == ["left", "right"]
    assert all(each["answers"][0]["score"] > 0.9 and len(each["answers"]) == 2 for each in said)
    _, text = command(monkeypatch, capsys, *asked)
    assert text.splitlines()[0].startswith(f"{names[0]}  side: left 1.00")
    for words, line in (
        (["nowhere.png"], "error: nowhere.png: no such file"),
        ([str(place / "model" / "model_index.json")], "no image in a known format"),
    ):
        status, text = command(monkeypatch, capsys, "classify", *words, *asked[3:])
        assert status == 2 and line in text


def test_pictures_are_found_by_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GTL_CACHE", str(tmp_path / "cache"))
    index, wanted = str(tmp_path / "index"), tmp_path / "wanted.png"
    status, text = command(monkeypatch, capsys, "features", "index", "builtin:scenes?count=12", "--out", index)
    assert (status, text) == (0, f"{index}: 12 images\n")
    SceneSet().picture(7)[0].save(wanted)
    status, text = command(monkeypatch, capsys, "features", "find", index, str(wanted), "--count", "3", "--json")
    matches = json.loads(text)
    assert status == 0 and len(matches) == 3 and matches[0]["uri"].endswith("/000007.png")
    assert math.isclose(matches[0]["cosine"], 1, abs_tol=1e-3)
    assert [match["cosine"] for match in matches] == sorted((match["cosine"] for match in matches), reverse=True)
    for words, line in (
        ([index, "--text", "a cat"], "builtin:backbone reads no words; make the index by --backbone of a CLIP model"),
        ([index], "IMAGE, --text: give one of the two"),
        ([str(tmp_path / "none"), str(wanted)], "no index; `gtl features index FOLDER --out"),
        ([index, "nowhere.png"], "nowhere.png: no such file"),
    ):
        status, text = command(monkeypatch, capsys, "features", "find", *words)
        assert status == 2 and line in text
    facts = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps({**facts, "fingerprint": "0"}))
    status, text = command(monkeypatch, capsys, "features", "find", index, str(wanted))
    assert status == 2 and "was made by another builtin:backbone than there is now; make the index again" in text


def test_pictures_are_found_by_what_heads_stand_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The middle of a diffusion model, and its text encoder, which goes by captions."""
    monkeypatch.setenv("GTL_CACHE", str(tmp_path / "cache"))
    source, wanted = "builtin:scenes?count=12", tmp_path / "wanted.png"
    image, caption = SceneSet().picture(7)
    image.save(wanted)
    found: dict[str, list[str]] = {}
    for name, part, asked in (("middle", [], [str(wanted)]), ("text", ["--part", "text_encoder"], ["--text", caption])):
        model, index = str(tmp_path / name), str(tmp_path / f"{name}-index")
        made = ["heads", "builtin:tiny", "--data", source, "--task", "shape", "--out", model, *part]
        assert command(monkeypatch, capsys, *made)[0] == 0
        made = ["features", "index", source, "--out", index, "--backbone", model]
        assert command(monkeypatch, capsys, *made) == (0, f"{index}: 12 images\n")
        status, text = command(monkeypatch, capsys, "features", "find", index, *asked, "--count", "12", "--json")
        matches = json.loads(text)
        assert status == 0 and math.isclose(matches[0]["cosine"], 1, abs_tol=1e-3) and matches[1]["cosine"] < 0.999
        found[name] = [match["uri"].rpartition("/")[2] for match in matches]
        assert found[name][0] == "000007.png" and len(set(found[name])) == 12
    assert found["middle"] != found["text"]
    for words, line in (
        (["find", str(tmp_path / "text-index"), str(wanted)], "reads captions, and sees no pictures; give --text"),
        (["find", str(tmp_path / "middle-index"), "--text", "a"], "reads no words; make the index by --backbone of"),
        (["index", source, "--out", "x", "--backbone", "builtin:tiny"], "gtl heads builtin:tiny --block --time"),
        (["index", source, "--out", "x", "--backbone", "builtin:nope"], "no such built-in backbone; there is"),
        (["index", source, "--out", "x", "--backbone", "builtin:gan"], "no such built-in backbone; there is"),
    ):
        status, text = command(monkeypatch, capsys, "features", *words)
        assert status == 2 and line in text, text
    told = tmp_path / "middle" / "features.json"
    good = json.loads(told.read_text())
    for change, line in (
        ({"time": "late"}, "time: 'late': expected a number from 0 to 1"),
        ({"time": 9}, "time: 9: expected a number"),
        ({"block": None}, "block: None: expected the name of a block"),
        ({"block": "nope"}, "block: 'nope': the model has no such block"),
    ):
        told.write_text(json.dumps(good | change))
        status, text = command(monkeypatch, capsys, "features", "find", str(tmp_path / "middle-index"), str(wanted))
        assert status == 2 and line in text, text


def test_an_index_of_captions_has_all_that_pictures_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture with two is found by either, once; one without, or with an empty one, by none."""
    monkeypatch.setenv("GTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    rows = [["a red ring", "a large blue star"], ["a green moon"], [" "]]
    for number in range(4):
        SceneSet().picture(number)[0].save(photos / f"{number}.png")
    told = [{"file_name": f"{number}.png", "text": texts} for number, texts in enumerate(rows)]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    made = ["heads", "builtin:tiny", "--data", "builtin:scenes?count=12", "--task", "shape", "--out", "reader"]
    assert command(monkeypatch, capsys, *made, "--part", "text_encoder")[0] == 0
    made = ["features", "index", "photos", "--out", "index", "--backbone", "reader"]
    assert command(monkeypatch, capsys, *made) == (0, "index: 2 images\n")
    with monkeypatch.context() as patch:  # captions that were read once are not read again
        patch.setattr(Reader, "__call__", None)
        assert command(monkeypatch, capsys, *made) == (0, "index: 2 images\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for asked, name in (("a red ring", "0.png"), ("a large blue star", "0.png"), ("a green moon", "1.png")):
        _, text = command(monkeypatch, capsys, "features", "find", "../index", "--text", asked, "--json")
        matches = json.loads(text)
        assert [len(matches), matches[0]["uri"].rpartition("/")[2]] == [2, name]
        assert math.isclose(matches[0]["cosine"], 1, abs_tol=1e-3)
    (photos / "metadata.jsonl").unlink()
    asked = ["index", str(photos), "--out", "x", "--backbone", "../reader"]
    status, text = command(monkeypatch, capsys, "features", *asked)
    assert status == 2 and text.endswith("none of 4 images has a caption of its own")
    vectors = tmp_path / "index" / "vectors.faiss"
    vectors.write_bytes(vectors.read_bytes()[:-9])
    status, text = command(monkeypatch, capsys, "features", "find", "../index", "--text", "a cat")
    assert (status, text) == (2, "error: ../index: damaged; make the index again")


def test_heads_are_put_on_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GTL_CACHE", str(tmp_path / "cache"))
    data, out = ["--data", "builtin:scenes?count=60&seed=2"], tmp_path / "out"
    resnet = str(make_vision(tmp_path / "resnet", "resnet"))
    capsys.readouterr()
    status, text = command(
        monkeypatch, capsys, "heads", resnet, *data, "--task", "size", "--task", "things=boxes", "--out", str(out)
    )
    assert status == 0 and text.splitlines()[0] == "size: class of large, small"
    assert seeing(open_family(str(out))).tasks["things"].column == "boxes"
    for words, line in (
        ([resnet, *data, "--task", "size", "--out", str(out)], "is not empty; give a new folder"),
        ([resnet, *data, "--task", "a b", "--out", "x"], "--task a b: expected NAME or NAME=COLUMN"),
        ([resnet, *data, "--task", "size", "--task", "size", "--out", "x"], "size is given twice; keep one"),
        ([str(tmp_path / "no"), *data, "--task", "size", "--out", str(tmp_path / "y")], "no: no such folder"),
        (["builtin:gan", *data, "--task", "size", "--out", str(tmp_path / "z")], "draws at once; this is for models"),
    ):
        status, text = command(monkeypatch, capsys, "heads", *words)
        assert status == 2 and line in text
