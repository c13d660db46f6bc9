import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from gtl.config.pairs import Needs
from gtl.config.recipe import Data, Source
from gtl.data.buckets import Variant, cut
from gtl.data.dataset import PIXEL_SPACE, Dataset
from gtl.data.fill import to_pixels
from gtl.data.prepare import prepare
from gtl.families import open_family
from gtl.families.base import DiffusionFamily
from gtl.images import decode, probe
from gtl.storage import Store
from gtl.types import UserError
from tests.tiny import make_sd

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> DiffusionFamily:
    return open_family(str(make_sd(tmp_path_factory.mktemp("models") / "sd")))


@pytest.fixture(scope="module")
def filled(family: DiffusionFamily, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Dataset]:
    """Three pictures and what was made of them: their folder, the cache, the dataset."""
    folder = tmp_path_factory.mktemp("filled")
    source, cache = write_images(folder / "source", "abc"), folder / "cache"
    return source, cache, prepare(data(str(source)), family, str(cache), dtype="fp32")


PIXELS = Needs(images="pixels", text="none", live=("vae",))


class Told:
    """What progress was told: how much was read and encoded."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        self.totals[phase], self.done[phase] = total, done


def write_images(folder: Path, names: str, size: tuple[int, int] = (80, 80)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.linear_gradient("L").resize(size).rotate(13 * (ord(name) - 96)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    return folder


def truncated_jpeg() -> bytes:
    """The header is fine, so that only the decoder fails: a PNG would already be decoded in the scan."""
    sink = io.BytesIO()
    Image.effect_noise((80, 80), 80).save(sink, "JPEG")
    whole = sink.getvalue()
    assert probe(whole[: len(whole) // 2]) == (80, 80)
    return whole[: len(whole) // 2]


def data(source: object, **options: object) -> Data:
    return Data.model_validate({"source": source, "resolution": 64, **options})


def test_images_and_captions_are_encoded_as_the_family_does(
    family: DiffusionFamily, photos: Path, tmp_path: Path
) -> None:
    told = Told()
    made = prepare(data(str(photos / "dog"), flip=True), family, str(tmp_path), dtype="fp32", progress=told)
    captions = {caption for entry in made.entries for caption in entry.record.captions}
    assert len(made.entries) == 5
    assert told.totals == told.done == {"scan": 5, "encode": 5 + len(captions) + 1}
    found = Dataset.load(Store(tmp_path), made.fingerprint)
    assert found.entries == made.entries
    entry, item = made.entries[3], found.item(3, 0, 0)
    vae, encoder = family.load("vae"), family.load("text_encoder")
    with torch.inference_mode():
        image = decode(entry.record.uri)
        pixels = to_pixels([cut(image, entry.bucket, Variant(*item.geometry.crop, False))])
        expected = family.encode_images(vae, pixels)
        mirrored = family.encode_images(vae, pixels.flip(-1))
        prompts = family.encode_prompts({"text_encoder": encoder}, [entry.record.captions[0], ""])
    for name in ("mean", "logvar"):
        torch.testing.assert_close(item.latents[name], expected[name][0])
        torch.testing.assert_close(found.item(3, 1, 0).latents[name], mirrored[name][0])
    torch.testing.assert_close(item.conditions, prompts[0])
    torch.testing.assert_close(item.null_conditions, prompts[1])


def test_for_a_live_text_encoder_no_prompt_is_encoded(family: DiffusionFamily, tmp_path: Path) -> None:
    source, told = write_images(tmp_path / "source", "abc"), Told()
    needs = Needs(images="latents", text="tokens")
    made = prepare(data(str(source)), family, str(tmp_path / "cache"), dtype="fp32", needs=needs, progress=told)
    assert told.totals == {"scan": 6, "encode": 3}
    item = Dataset.load(Store(tmp_path / "cache"), made.fingerprint).item(1, 0, 0)
    assert (item.caption, item.conditions) == ("picture b", {})
    assert [path.name[:7] for path in (tmp_path / "cache" / "tensors").iterdir()] == ["images-"]


def test_ten_more_images_encode_ten_more(family: DiffusionFamily, tmp_path: Path) -> None:
    source, cache = write_images(tmp_path / "source", "abcde"), str(tmp_path / "cache")
    first, again, more = Told(), Told(), Told()
    made = prepare(data(str(source)), family, cache, dtype="fp32", progress=first)
    assert first.totals == {"scan": 10, "encode": 5 + 6}
    assert prepare(data(str(source)), family, cache, dtype="fp32", progress=again).fingerprint == made.fingerprint
    assert again.totals == {}
    write_images(source, "fghijklmno")
    grown = prepare(data(str(source)), family, cache, dtype="fp32", progress=more)
    assert more.totals == {"scan": 20, "encode": 10 + 10}
    assert [e for e in grown.entries if e.record.uri[-5] < "f"] == made.entries


def test_sources_have_weights_and_the_prior_its_prompt(family: DiffusionFamily, tmp_path: Path) -> None:
    a, b = write_images(tmp_path / "a", "ab"), write_images(tmp_path / "b", "b")
    prior = write_images(tmp_path / "class", "z")
    told = Told()
    made = prepare(
        data([Source(source=str(a)), Source(source=str(b), weight=0.5)]), family, str(tmp_path / "cache"), dtype="bf16",
        prior=(str(prior), "a photo of {dog}", 0.25), progress=told,
    )  # fmt: skip
    assert [(e.record.uri, e.record.captions, e.record.weight) for e in made.entries] == [
        (f"{a}/a.png", ("picture a",), 1.0), (f"{a}/b.png", ("picture b",), 1.0), (f"{b}/b.png", ("picture b",), 0.5),
        (f"{prior}/z.png", ("a photo of {dog}",), 0.25),
    ]  # fmt: skip
    assert [e.record.is_class_image for e in made.entries] == [False, False, False, True]
    assert made.entries[1].variants == made.entries[2].variants
    item = made.item(3, 0, 0)
    assert {t.dtype for t in [*item.latents.values(), *item.conditions.values()]} == {torch.bfloat16}
    assert told.totals["encode"] == 3 + 4  # b.png and its caption are there twice and encoded once


def test_broken_files_are_named_counted_and_left_out_with_every_copy(
    family: DiffusionFamily, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = write_images(tmp_path / "source", "abdefgh"), str(tmp_path / "cache")
    for name in ("c.jpg", "i.jpg", "j.jpg"):
        (source / name).write_bytes(truncated_jpeg())
    (source / "x.png").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING, "gtl.data.prepare"):
        made = prepare(data(str(source), max_broken=0.4), family, cache, dtype="fp32", needs=PIXELS)
    assert [e.record.uri[-5] for e in made.entries] == list("abdefgh")
    assert all(key in made.images for entry in made.entries for key in entry.variants)
    named = sorted(record.getMessage().split(": ")[0] for record in caplog.records)
    assert named == [f"{source}/{name}" for name in ("c.jpg", "i.jpg", "j.jpg", "x.png")]
    told = Told()
    assert prepare(
        data(str(source), max_broken=0.4), family, cache, dtype="fp32", needs=PIXELS, progress=told
    ).fingerprint == made.fingerprint
    assert told.totals == {}  # the files that broke in the decoder are remembered too
    with pytest.raises(UserError, match=r"^data\.max_broken: 4 of 11 images can't be read, 10% are allowed; "):
        prepare(data(str(source)), family, cache, dtype="fp32", needs=PIXELS)


def test_a_copy_stands_in_for_an_image_that_is_gone(family: DiffusionFamily, tmp_path: Path) -> None:
    source, cache = write_images(tmp_path / "source", "ac"), str(tmp_path / "cache")
    whole = (source / "a.png").read_bytes()
    (source / "b.png").write_bytes(whole)

    def take_away(phase: str, done: int, total: int, detail: str = "") -> None:
        if phase == "scan" and done == total:
            (source / "a.png").unlink()

    options = data(str(source), max_broken=0.4, captions="folder")
    made = prepare(options, family, cache, dtype="fp32", needs=PIXELS, progress=take_away)
    assert [e.record.uri[-5] for e in made.entries] == list("bc")
    pixels = made.item(0, 0, 0).pixels
    assert pixels is not None and pixels.shape == (3, 64, 64)


@pytest.mark.parametrize("max_broken", [0.1, 1.0])
def test_only_broken_files(family: DiffusionFamily, tmp_path: Path, max_broken: float) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^data\.max_broken: 2 of 2 images can't be read, .*/a\.png: no image in"):
        prepare(data(str(tmp_path), max_broken=max_broken), family, str(tmp_path / "cache"), dtype="fp32")


def test_images_that_the_rule_gives_no_caption_are_named(family: DiffusionFamily, tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", "abc")
    (source / "b.txt").unlink()
    with pytest.raises(UserError, match=r"^data\.captions: sidecar: 1 images have no such caption, .*/b\.png;"):
        prepare(data(str(source), captions="sidecar"), family, str(tmp_path / "cache"), dtype="fp32")


def test_two_fills_at_once(family: DiffusionFamily, tmp_path: Path) -> None:
    source, cache = write_images(tmp_path / "source", "abcdefghijkl"), str(tmp_path / "cache")
    made: list[Dataset] = []
    threads = [
        threading.Thread(target=lambda: made.append(prepare(data(str(source)), family, cache, dtype="fp32")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and made[0].fingerprint == made[1].fingerprint
    assert len(made[0].images) == 12 and len(made[0].prompts) == 13
    for dataset in made:
        for i in range(12):
            assert torch.isfinite(dataset.item(i, 0, 0).latents["mean"]).all()


def test_a_source_and_a_cache_in_a_bucket(
    family: DiffusionFamily, filled: tuple[Path, Path, Dataset], tmp_path: Path, s3: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    local, _, expected = filled
    for file in sorted(local.iterdir()):
        Store(f"{s3}/test_fill/source").upload(file, file.name)
    told, again = Told(), Told()
    made = prepare(data(f"{s3}/test_fill/source"), family, f"{s3}/test_fill/cache", dtype="fp32", progress=told)
    assert told.totals == {"scan": 6, "encode": 3 + 4}
    assert made.fingerprint == expected.fingerprint
    far = Dataset.load(Store(f"{s3}/test_fill/cache"), made.fingerprint).item(2, 0, 0)
    torch.testing.assert_close(far.latents, expected.item(2, 0, 0).latents)
    prepare(data(f"{s3}/test_fill/source"), family, f"{s3}/test_fill/cache", dtype="fp32", progress=again)
    assert again.totals == {}
    with pytest.raises(UserError, match=r"^s3://no-such-bucket/x: there is no such bucket"):
        prepare(data("s3://no-such-bucket/x"), family, str(tmp_path / "cache"), dtype="fp32")


def test_a_full_disk_is_one_line(family: DiffusionFamily, tmp_path: Path, small_disk: Path) -> None:
    source = write_images(tmp_path / "source", "abcdefgh")
    (small_disk / "fills").write_bytes(bytes(1000 * 1024))
    with pytest.raises(UserError, match=r"^.*/tensors/.*: the disk is full") as caught:
        prepare(data(str(source)), family, str(small_disk), dtype="fp32", needs=PIXELS)
    assert "\n" not in str(caught.value)


SCRIPT = """
    import sys
    from gtl.config.pairs import Needs
    from gtl.config.recipe import Data
    from gtl.data.prepare import prepare
    from gtl.families import open_family
    source, model, cache, resolution = sys.argv[1:]
    dataset = prepare(
        Data(source=source, resolution=int(resolution)), open_family(model), cache, dtype="fp32",
        progress=lambda *told: print(*told[:3], flush=True),
    )
    print("modules", sorted({"ray", "ray.data", "torch", "diffusers"} & set(sys.modules)))
    print("entries", len(dataset.entries))
"""


def start(source: Path, family: DiffusionFamily, cache: Path, resolution: int = 64) -> "subprocess.Popen[str]":
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    arguments = [str(source), str(family.folder), str(cache), str(resolution)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_a_killed_fill_goes_on_where_it_was(family: DiffusionFamily, tmp_path: Path) -> None:
    source, cache, told = tmp_path / "source", tmp_path / "cache", Told()
    source.mkdir()
    for i in range(60):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(source / f"{i:03d}.png")
    process = start(source, family, cache, resolution=256)
    assert process.stdout is not None
    lines = iter(process.stdout)
    assert any(line == "encode 1 62\n" for line in lines)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = sum(len(file.read_text().splitlines()) for file in cache.glob("tensors/*/*.jsonl"))
    made = prepare(data(str(source), resolution=256), family, str(cache), dtype="fp32", progress=told)
    assert stored >= 16
    # Its actors may have written a little more before Ray ended them.
    assert 0 < told.totals["encode"] <= 62 - stored
    assert "scan" not in told.totals
    assert all(key in made.images for entry in made.entries for key in entry.variants)


def test_a_warm_start_imports_no_ray_and_no_torch(
    family: DiffusionFamily, filled: tuple[Path, Path, Dataset]
) -> None:
    source, cache, _ = filled
    process = start(source, family, cache)
    output, _ = process.communicate(timeout=120)
    assert output.splitlines() == ["modules []", "entries 3"]


def test_pixels_are_cached_as_they_are_for_every_model(family: DiffusionFamily, tmp_path: Path) -> None:
    """Captions play no part: none is needed, none is encoded, and other captions are no other dataset."""
    source, cache = write_images(tmp_path / "source", "ab", size=(96, 80)), str(tmp_path / "cache")
    (source / "b.txt").unlink()
    told, again = Told(), Told()
    made = prepare(
        data(str(source), captions="sidecar", flip=True), family, cache, dtype="fp32", needs=PIXELS, progress=told
    )
    assert told.totals["encode"] == told.done["encode"] == 2
    assert (made.images.name, made.prompts) == (PIXEL_SPACE, None)
    for number, entry in enumerate(made.entries):
        image = cut(decode(entry.record.uri), entry.bucket, Variant(*made.item(number, 0, 0).geometry.crop, False))
        straight, mirrored = (made.item(number, variant, 0).pixels for variant in (0, 1))
        assert straight is not None and mirrored is not None
        assert torch.equal(straight, torch.from_numpy(np.array(image)).permute(2, 0, 1))
        assert torch.equal(mirrored, straight.flip(-1))
    (source / "a.txt").write_text("another caption")
    (source / "b.txt").write_text("a caption")
    other = open_family(str(make_sd(tmp_path / "other", seed=1)))
    same = prepare(data(str(source), flip=True), other, cache, dtype="bf16", needs=PIXELS, progress=again)
    assert same.fingerprint == made.fingerprint
    assert "encode" not in again.totals


ON_GPUS = """
import ray
from gtl.data.stream import pack, run_actors, unpack

class Doubler:
    def __call__(self, batch):
        values = unpack(batch)
        yield pack([[2 * value, len(values)] for value in values])

ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
print(sorted(run_actors(list(range(7)), Doubler, (), calls=3, actors=1, gpus=1)))
"""


def test_actors_on_gpus_get_the_parts_that_were_cut() -> None:
    """On a cluster that only says it has one: what Ray Data asks of work with GPUs differs from that without."""
    done = subprocess.run([sys.executable, "-c", ON_GPUS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[0, 2], [2, 2], [4, 2], [6, 2], [8, 3], [10, 3], [12, 3]]"
