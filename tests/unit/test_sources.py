import io
import json
import math
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from gtl.config.recipe import Data
from gtl.data.captions import CaptionRule
from gtl.data.check import check, inspect_here, render
from gtl.data.containers import Place, fetch
from gtl.data.index import CHANGED, GONE, Index, Seen, SeenFile
from gtl.data.prepare import check_usable
from gtl.data.sources import Broken, File, Located, Scan, scan
from gtl.storage import Store
from gtl.types import Record, UserError


def picture(size: tuple[int, int] = (8, 6), color: str = "red", kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, color).save(sink, kind)
    return sink.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_tar(path: Path, members: dict[str, bytes | str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def look(source: Path, rule: CaptionRule | None = None, **options: Any) -> Scan:
    return scan(str(source), rule or CaptionRule(), options.get("weight", 1.0), None, inspect_here)


def captions(found: Scan, root: Path) -> dict[str, tuple[str, ...]]:
    return {image.record.uri.removeprefix(f"{root}/"): image.record.captions for image in found.images}


def test_a_folder_is_read_recursively_in_order(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", {"b/2.png": picture((5, 9)), "a.jpg": picture(kind="JPEG"), "b/notes.md": "x",
                                    ".hidden/c.png": picture(), "b/._2.png": b"junk"})  # fmt: skip
    found = look(folder, weight=0.5)
    assert [(i.record.uri, i.record.size, i.record.weight) for i in found.images] == [
        (f"{folder}/a.jpg", (6, 8), 0.5), (f"{folder}/b/2.png", (9, 5), 0.5),
    ]  # fmt: skip
    assert [fetch(image.place) for image in found.images] == [
        (folder / "a.jpg").read_bytes(), (folder / "b/2.png").read_bytes(),
    ]  # fmt: skip


def test_metadata_comes_first_then_sidecar_then_template_then_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "my_dogs", {
        "1.png": picture(), "1.txt": "not read", "2.png": picture(), "2.txt": "a dog\n\n  two dogs \n",
        "3.png": picture(),
        "sub/4.png": picture(), "sub/metadata.jsonl": '{"file_name": "4.png", "text": ["four", "4"]}\n',
        "metadata.jsonl": '{"file_name": "1.png", "text": "one"}\n\n{"file_name": "./1.png", "text": "uno"}\n',
    })  # fmt: skip
    assert captions(look(folder), folder) == {
        "1.png": ("one", "uno"), "2.png": ("a dog", "two dogs"), "3.png": ("my dogs",), "sub/4.png": ("four", "4"),
    }  # fmt: skip
    templated = captions(look(folder, CaptionRule("auto", "a {folder}: {file}")), folder)
    assert templated["3.png"] == ("a my dogs: 3",)
    assert templated["2.png"] == ("a dog", "two dogs")


def test_each_rule_by_itself(tmp_path: Path) -> None:
    folder = write(tmp_path / "red_cat", {
        "a.png": picture(), "a.txt": "side", "metadata.csv": 'file_name,text\na.png,"meta, data"\n',
    })  # fmt: skip
    rules = {
        CaptionRule("metadata"): ("meta, data",), CaptionRule("sidecar"): ("side",),
        CaptionRule("folder"): ("red cat",),
        CaptionRule("template", "sks {folder}"): ("sks red cat",), CaptionRule.fixed("a {x} dog"): ("a {x} dog",),
    }  # fmt: skip
    assert {rule: look(folder, rule).images[0].record.captions for rule in rules} == rules
    (folder / "a.txt").unlink()
    assert look(folder, CaptionRule("sidecar")).images[0].record.captions == ()


def test_an_empty_sidecar_is_the_empty_caption(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", {"a.png": picture(), "a.txt": "\n"})
    assert look(folder).images[0].record.captions == ("",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": "x"}',
         r"metadata.jsonl:2: file_name 'b.png': no such image"),
        ("metadata.csv", "file_name,text\na.png,x\nb.png,x\n", r"metadata.csv:3: file_name 'b.png': no such image"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name"', "metadata.jsonl:2: not valid JSON"),
        ("metadata.jsonl", '{"text": "x"}', "metadata.jsonl:1: no file_name in it"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "\\ud83d"}', "metadata.jsonl:1: half a character"),
        ("metadata.csv", f"file_name,text\na.png,\"{'x' * 140000}", r"metadata.csv:.*: not valid CSV \(field larger"),
        ("metadata.jsonl", '{"file_name": "a.png", "txt": "x"}', "metadata.jsonl:1: no text in it"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', "metadata.jsonl:1: no text in it"),
        ("metadata.csv", b"file_name,text\na.png,\xff\n", "metadata.csv: not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_wrong_line_of_metadata_is_named(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    folder = write(tmp_path / "s", {"a.png": picture(), name: content})
    with pytest.raises(UserError, match=message) as caught:
        look(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("template", None), "data.caption_template: missing"),
        (("auto", "a {dog}"), r"data.caption_template: 'a \{dog\}': unknown field \{dog\}"),
        (("auto", "a {folder.__class__}"), "unknown field"),
        (("auto", "a {"), "data.caption_template: 'a {': "),
        (("auto", "a {folder:d}"), "data.caption_template: 'a {folder:d}': Unknown format code 'd'"),
    ],
)
def test_a_wrong_template_is_named(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CaptionRule(*arguments)


def test_a_wrong_path_and_a_folder_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.source: .*/nowhere: no such folder or file$"):
        look(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^data\.source: .*: no images there; looked for \.avif"):
        look(write(tmp_path / "s", {"a.txt": "x"}))
    with pytest.raises(UserError, match=r"a\.png: neither a folder nor a \.parquet or \.tar file$"):
        look(write(tmp_path / "t", {"a.png": picture()}) / "a.png")


def test_a_file_name_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(picture())
    with pytest.raises(UserError, match=r"a file name in it is not UTF-8: .*xff\.png"):
        look(tmp_path)


def test_a_resolution_of_nothing_is_refused(tmp_path: Path) -> None:
    for resolution in (0, -64):
        message = rf"^data\.resolution: {resolution}: this model needs a multiple of 64, such as 64$"
        with pytest.raises(UserError, match=message):
            check(str(write(tmp_path, {"a.png": picture()})), resolution)


def test_a_broken_image_is_set_aside_with_the_reason(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", {"a.png": picture(), "b.png": b"nothing", "c.png": b""})
    found = look(folder)
    assert [image.record.uri for image in found.images] == [f"{folder}/a.png"]
    assert [(b.uri, b.reason.split(" (")[0]) for b in found.broken] == [
        (f"{folder}/b.png", "no image in a known format"), (f"{folder}/c.png", "the file is empty"),
    ]  # fmt: skip


def test_class_images_do_not_make_up_for_photographs_that_are_broken() -> None:
    drawn = Located(Record("1.png", "1", (4, 4), (), is_class_image=True), Place("", "1.png", 0, -1, -1))
    photograph = drawn._replace(record=Record("0.png", "0", (4, 4), ()))
    settings = Data(source="s", max_broken=0.5)
    check_usable(Scan([drawn] * 100 + [photograph], [Broken("a.png", "x")]), settings)
    with pytest.raises(UserError, match=r"^data\.max_broken: 2 of 3 images can't be read, 50% are allowed"):
        check_usable(Scan([drawn] * 100 + [photograph], [Broken("a.png", "x"), Broken("b.png", "x")]), settings)
    with pytest.raises(UserError, match=r"^data\.source: .*/s: no image in it$"):
        check_usable(Scan([drawn] * 100), settings)


def test_tar_shards(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    red, blue, lime = picture(), picture((3, 4), "blue"), picture((2, 2), "lime")
    write_tar(folder / "0.tar", {"x/1.png": red, "x/1.txt": "one\nuno", "x/2.json": json.dumps({"caption": "two"}),
                                 "x/2.png": blue, "x/2.cls": "7"})  # fmt: skip
    write_tar(folder / "1.tar", {"3.seg.png": red, "3.png": lime})
    found = look(folder)
    assert captions(found, folder) == {
        "0.tar#x/1.png": ("one", "uno"), "0.tar#x/2.png": ("two",), "1.tar#3.png": ("shards",),
    }  # fmt: skip
    assert [fetch(image.place) for image in found.images] == [red, blue, lime]
    assert [image.record.size for image in found.images] == [(6, 8), (4, 3), (2, 2)]
    assert captions(look(folder / "0.tar"), folder) == {"0.tar#x/1.png": ("one", "uno"), "0.tar#x/2.png": ("two",)}


def test_names_in_a_tar_may_have_dots_and_share_a_stem(tmp_path: Path) -> None:
    red, lime = picture(), picture((9, 9))
    write_tar(tmp_path / "a.tar", {
        "my.photo.png": red, "my.photo.txt": "mine", "b.png": red, "b.jpg": lime, "b.txt": "both",
        "c.png": red, "c.txt": b"\xff\xfea\0", "d.png": red, "d.json": '{"text": "\\ud83d"}', "e.mask.png": lime,
        "e.png": red,
    })  # fmt: skip
    found = look(tmp_path / "a.tar", CaptionRule("auto", "none"))
    assert captions(found, tmp_path) == {
        "a.tar#my.photo.png": ("mine",), "a.tar#b.png": ("both",), "a.tar#b.jpg": ("both",), "a.tar#d.png": ("none",),
        "a.tar#e.png": ("none",),
    }  # fmt: skip
    ((uri, reason),) = found.broken
    assert uri == f"{tmp_path}/a.tar#c.png"
    assert reason == "c.txt: not UTF-8 text (invalid start byte at byte 0)"


def test_a_sidecar_that_is_no_text_sets_its_image_aside(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", {"a.png": picture(), "a.txt": b"\xff\xfea\0", "b.png": picture(), "b.txt": "b"})
    found = look(folder)
    assert captions(found, folder) == {"b.png": ("b",)}
    assert found.broken == [(f"{folder}/a.txt", "not UTF-8 text (invalid start byte at byte 0)")]


def test_a_link_into_its_own_folder_multiplies_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", {"a.png": picture(), "loop/b.png": picture((9, 9))})
    (folder / "loop" / "self").symlink_to(folder)
    (folder / "c.png").symlink_to(folder / "a.png")
    found = look(folder)
    assert [image.record.uri.removeprefix(f"{folder}/") for image in found.images] == ["a.png", "c.png", "loop/b.png"]


def test_a_tar_cut_short_keeps_what_is_whole(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": picture(), "2.png": picture((64, 64)) + bytes(4000)})
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:2000])
    found = look(tmp_path / "a.tar")
    assert [image.record.uri for image in found.images] == [f"{tmp_path}/a.tar#1.png"]
    assert [(b.uri, b.reason.split(" (")[0]) for b in found.broken] == [(f"{tmp_path}/a.tar", "not a whole tar file")]


@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path: Path, struct: bool) -> None:
    data = [picture((n, 4)) for n in (3, 5, 7)]
    column: list[Any] = [{"bytes": d, "path": None} for d in data] if struct else list(data)
    column.insert(1, None)
    table = pa.table({"id": [0, 1, 2, 3], "image": column, "text": ["a", "b", "c", None]})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    found = look(tmp_path / "t.parquet")
    name = f"{tmp_path}/t.parquet"
    assert [(i.record.uri, i.record.size, i.record.captions) for i in found.images] == [
        (f"{name}#row 0", (4, 3), ("a",)), (f"{name}#row 2", (4, 5), ("c",)),
        (f"{name}#row 3", (4, 7), (tmp_path.name.replace("_", " "),)),
    ]  # fmt: skip
    assert [fetch(image.place) for image in found.images] == data
    assert found.broken == [(f"{name}#row 1", "no bytes in this row")]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_arrays([pa.array([picture()]), pa.array([picture()])], names=["image", "image"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: two columns of one name among image, image$"):
        look(tmp_path / "a.parquet")


def test_a_table_without_images_is_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"id": [1], "text": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: no column of images .* only id, text$"):
        look(tmp_path / "t.parquet")


def test_only_what_changed_is_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", {"a.png": picture(), "b.png": picture((4, 4)), "b.txt": "bee", "c.png": b"broken"})
    cache, read = Store(tmp_path / "cache"), []

    def inspect(root: str, files: list[File]) -> Iterator[SeenFile]:
        read.append([file.key for file in files])
        return inspect_here(root, files)

    first = scan(str(folder), CaptionRule(), 1.0, cache, inspect)
    again = scan(str(folder), CaptionRule(), 1.0, cache, inspect)
    assert again == first
    assert read == [["a.png", "b.png", "c.png", "b.txt"]]
    write(folder, {"b.png": picture((40, 40)), "d.png": picture()})
    changed = scan(str(folder), CaptionRule(), 1.0, cache, inspect)
    assert read[1:] == [["b.png", "d.png"]]
    assert [image.record.size for image in changed.images] == [(6, 8), (40, 40), (6, 8)]
    assert [image.record.captions for image in changed.images] == [("s",), ("bee",), ("s",)]


def test_a_file_that_was_away_for_a_moment_is_looked_into_again(tmp_path: Path) -> None:
    folder, cache = write(tmp_path / "s", {"a.png": picture(), "b.png": picture((4, 4))}), Store(tmp_path / "cache")

    def inspect(root: str, files: list[File]) -> Iterator[SeenFile]:
        (folder / "b.png").rename(tmp_path / "b.png")
        yield from inspect_here(root, files)
        (tmp_path / "b.png").rename(folder / "b.png")

    first = scan(str(folder), CaptionRule(), 1.0, cache, inspect)
    assert first.broken == [(f"{folder}/b.png", GONE)]
    again = scan(str(folder), CaptionRule(), 1.0, cache, inspect_here)
    assert [image.record.uri for image in again.images] == [f"{folder}/a.png", f"{folder}/b.png"]


def test_the_index_forgets_faults_that_pass(tmp_path: Path) -> None:
    index, whole = Index(Store(tmp_path), "u"), Seen("", "00", 4, 5, "", None)
    known = [SeenFile("u/a", 3, 5, (whole,)), SeenFile("u/b", 3, 5, (whole, whole))]
    index.add(known)
    index.add([SeenFile("u/a", 3, 5, (whole._replace(error=GONE),))])
    index.add([SeenFile("u/b", 3, 5, (whole, whole._replace(error=CHANGED)))])
    assert index.load() == {file.url: file for file in known}
    broken = SeenFile("u/a", 3, 5, (whole._replace(error="OSError: image file is truncated"),))
    index.add([broken])
    assert index.load()["u/a"] == broken


def test_the_index_keeps_every_field(tmp_path: Path) -> None:
    files = [
        SeenFile("u/a", 3, 5, (Seen("m\u2028", "00", 4, 5, "", ("x\ny", "ü"), 7, 9), Seen("", "", 0, 0, "bad", None))),
        SeenFile("u/a.txt", 1, 2, text="one\ntwo"),
    ]
    index = Index(Store(tmp_path), "u")
    index.add(files)
    index.add([SeenFile("u/b", 1, 1)])
    assert Index(Store(tmp_path), "u").load() == {f.url: f for f in [*files, SeenFile("u/b", 1, 1)]}
    assert Index(Store(tmp_path), "other").load() == {}


def test_check_reports_everything(tmp_path: Path) -> None:
    waves = Image.new("L", (96, 64))
    waves.putdata([int(127 + 100 * math.sin(x / 9 + y / 17)) for y in range(64) for x in range(96)])
    sink, again = io.BytesIO(), io.BytesIO()
    waves.save(sink, "PNG")
    waves.convert("RGB").save(again, "JPEG", quality=90)
    folder = write(tmp_path / "s", {
        "a.png": sink.getvalue(), "b.png": sink.getvalue(), "c.jpg": again.getvalue(), "d.png": picture((64, 64)),
        "e.png": picture((64, 64), "blue"), "f.png": picture((60, 60), "lime"), "g.png": b"x",
        "h.png": sink.getvalue()[:300],
        "metadata.jsonl": "\n".join(json.dumps({"file_name": f"{n}.png", "text": "waves"}) for n in "ab"),
    })  # fmt: skip
    report = check(str(folder), resolution=64, multiple=16)
    names = {letter: f"{folder}/{letter}.{'jpg' if letter == 'c' else 'png'}" for letter in "abcdefgh"}
    assert report.num_images == 6
    assert report.captions == {"waves": 2}
    assert report.captionless == tuple(names[n] for n in "cdef")
    assert report.buckets == {(48, 80): 3, (64, 64): 3}
    assert report.too_small == (names["f"],)
    assert [item.uri for item in report.broken] == [names["g"], names["h"]]
    assert report.duplicates == ((names["a"], names["b"]),)
    assert report.near_duplicates == ((names["a"], names["c"]),)
    text = render(report)
    assert text.splitlines()[:4] == [f"{folder}: 6 images", "", "captions: 1 distinct", "      2 x waves"]
    assert "     80 x 48    3" in text
    assert f"  {names['a']} = {names['b']}" in text


def test_check_of_the_photographs(photos: Path) -> None:
    report = check(str(photos))
    assert report.num_images == 21
    assert sum(report.captions.values()) == 21
    assert (report.captionless, report.broken, report.duplicates, report.near_duplicates) == ((), (), (), ())
