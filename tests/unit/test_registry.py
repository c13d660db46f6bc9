"""The registry, on a local disk and in a real S3-speaking server."""

import datetime
import json
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gtl.adapters import Card, Registry
from gtl.adapters.card import Base, DatasetInfo, File, Lineage, Training, parse_card
from gtl.adapters.commands import list_adapters, promote_adapter, remove_adapter, show_adapter
from gtl.storage import Store
from gtl.types import UserError

V1, V2 = "20260101-000000-000-aaaaaa", "20260102-000000-000-bbbbbb"


@pytest.fixture(params=["local", "s3", "gs"])
def url(request, tmp_path, monkeypatch):
    """A fresh registry, and a home folder for what is downloaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    if request.param == "local":
        return str(tmp_path / "registry")
    return f"{request.getfixturevalue(request.param)}/{tmp_path.name}"


def make_card(**changes) -> Card:
    """A card as a run fills it in."""
    return Card(**{
        "name": "x", "version": "x", "tuner": {"type": "lora", "rank": 4}, "objective": {"type": "denoise"},
        "base": Base(source="some/model", revision="main", fingerprint="f" * 64, family="sd"),
        "dataset": DatasetInfo(fingerprint="d" * 64, images=12), "lineage": Lineage(run="./runs/animals/1"),
        "training": Training(steps=20, device="cpu", device_hours=0.5, final_loss=0.25), **changes,
    })  # fmt: skip


def make_files(folder: Path, content: bytes = b"weights") -> Path:
    """Two files, one in a subfolder."""
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "text_encoder" / "adapter_model.safetensors").write_bytes(b"more " + content)
    return folder


def test_publish_and_fetch(url, tmp_path):
    registry = Registry(url)
    published = registry.publish("animals", V1, make_files(tmp_path / "a"), make_card())
    assert (published.name, published.version) == ("animals", V1)
    assert {key: file.bytes for key, file in published.files.items()} == {
        "adapter_model.safetensors": 7, "text_encoder/adapter_model.safetensors": 12}  # fmt: skip
    # sha256 of b"weights"
    assert published.files["adapter_model.safetensors"].sha256.startswith("9a129038")
    assert registry.show("animals") == published
    folder = registry.fetch(f"animals@{V1}:0.5")
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert (folder / "text_encoder" / "adapter_model.safetensors").read_bytes() == b"more weights"
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "adapter.json", "adapter_model.safetensors", "text_encoder/adapter_model.safetensors"]  # fmt: skip
    assert registry.fetch("animals") == folder


def test_card_on_disk_is_schema_1(url, tmp_path):
    registry = Registry(url)
    registry.publish("animals", V1, make_files(tmp_path / "a"), make_card())
    values = json.loads(registry.store.read(f"animals/{V1}/adapter.json"))
    assert set(values) == {"schema", "name", "version", "kind", "base", "tuner", "objective", "sampler", "dataset",
                           "lineage", "training", "code", "libraries", "files", "created"}  # fmt: skip
    assert (values["schema"], values["kind"]) == (1, "lora")
    assert values["base"] == {
        "source": "some/model", "revision": "main", "variant": None, "fingerprint": "f" * 64, "family": "sd",
    }  # fmt: skip
    assert values["training"] == {"steps": 20, "device": "cpu", "device_hours": 0.5, "final_loss": 0.25,
                                  "val_loss": None, "scores": {}, "best_step": None}  # fmt: skip
    assert {"torch", "diffusers", "peft", "ray"} <= set(values["libraries"])
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(values["created"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)


def test_references(url, tmp_path):
    registry = Registry(url)
    files = make_files(tmp_path / "a")
    for version in (V2, V1):
        registry.publish("animals", version, files, make_card())
    assert registry.resolve("animals")[1] == V2
    assert registry.promote(f"animals@{V1}", "prod") == V1
    assert registry.resolve("animals@prod:0.3")[1] == V1
    assert registry.promote("animals", "prod") == V2
    assert registry.resolve("animals@prod")[1] == V2
    assert registry.aliases("animals") == {"prod": V2}
    assert registry.list() == (("animals", V1, ()), ("animals", V2, ("prod",)))
    with pytest.raises(UserError, match=rf"^adapter 'animals@dev': .* it has: @prod, {V2}, {V1}$"):
        registry.resolve("animals@dev")
    with pytest.raises(UserError, match="^adapter 'plants': not in the registry .*; adapters there: animals$"):
        registry.resolve("plants")
    with pytest.raises(UserError, match="^alias .*: animals has a version of that name"):
        registry.promote("animals", V1)


def test_versions_never_change(url, tmp_path):
    registry = Registry(url)
    registry.publish("animals", V1, make_files(tmp_path / "a"), make_card())
    with pytest.raises(UserError, match=f"^adapter animals@{V1}: already published in "):
        registry.publish("animals", V1, make_files(tmp_path / "b", b"other"), make_card())
    assert (registry.fetch("animals") / "adapter_model.safetensors").read_bytes() == b"weights"


def test_remove(url, tmp_path):
    registry = Registry(url)
    for version in (V1, V2):
        registry.publish("animals", version, make_files(tmp_path / version), make_card())
    registry.promote(f"animals@{V1}", "prod")
    with pytest.raises(UserError, match=f"^adapter animals@{V1}: @prod points at it; "):
        registry.remove("animals@prod")
    with pytest.raises(UserError, match="^adapter 'animals': name the version to remove"):
        registry.remove("animals")
    assert registry.remove(f"animals@{V2}") == V2
    assert registry.versions("animals") == (V1,)
    assert registry.remove("animals@prod", force=True) == V1
    assert registry.list() == ()
    assert registry.aliases("animals") == {}
    assert [key for key, _, _ in registry.store.list()] == []


def test_weights_without_a_card_are_no_version(url, tmp_path):
    registry = Registry(url)
    registry.publish("animals", V1, make_files(tmp_path / "a"), make_card())
    registry.store.write(f"animals/{V2}/adapter_model.safetensors", b"half")
    assert registry.versions("animals") == (V1,)
    assert registry.resolve("animals")[1] == V1


class DyingCard(Card):
    """A card whose publisher is killed after the weights, when it comes to the card."""

    def to_json(self) -> bytes:
        """Die as by the kernel's hand."""
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def publish_and_die(url: str, folder: str) -> None:
    """Publish up to the card."""
    Registry(url).publish("animals", V1, Path(folder), DyingCard(**make_card().model_dump()))


def test_killed_publisher_leaves_no_version(url, tmp_path):
    folder = make_files(tmp_path / "a")
    process = multiprocessing.get_context("spawn").Process(target=publish_and_die, args=(url, str(folder)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    registry = Registry(url)
    left = [key.rpartition("/")[2] for key, _, _ in registry.store.list("animals")]
    assert left == ["adapter_model.safetensors"] * 2
    assert registry.list() == ()
    with pytest.raises(UserError, match="^adapter 'animals': not in the registry .*; adapters there: none$"):
        registry.fetch("animals")
    registry.publish("animals", V1, folder, make_card())
    assert registry.versions("animals") == (V1,)
    assert (registry.fetch("animals") / "adapter_model.safetensors").read_bytes() == b"weights"


def publish_when_told(url: str, folder: str, version: str, start, results) -> None:
    """Publish at the same moment as others; report who it was."""
    start.wait()
    try:
        Registry(url).publish("animals", version, Path(folder), make_card())
        results.put((version, folder, "published"))
    except UserError as error:
        results.put((version, folder, str(error)))


@pytest.mark.parametrize("same_version", [True, False])
def test_concurrent_publishers(tmp_path, same_version):
    url = str(tmp_path / "registry")
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    folders = [make_files(tmp_path / str(i), bytes([i]) * (1 << 20)) for i in range(4)]
    versions = [V1 if same_version else f"2026010{i}-x" for i in range(4)]
    processes = [
        context.Process(target=publish_when_told, args=(url, str(f), v, start, results))
        for f, v in zip(folders, versions, strict=True)
    ]
    for process in processes:
        process.start()
    start.set()
    said = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    winners = [(version, folder) for version, folder, what in said if what == "published"]
    assert len(winners) == (1 if same_version else 4)
    assert all("already published in" in what for _, _, what in said if what != "published")
    for version, folder in winners:
        name = "adapter_model.safetensors"
        fetched = Registry(url).fetch(f"animals@{version}") / name
        assert fetched.read_bytes() == (Path(folder) / name).read_bytes()
    assert [p.name for p in Path(url, "animals").iterdir() if p.name.startswith(".")] == []


def test_a_publisher_that_is_overtaken_is_refused(url, tmp_path):
    registry, files = Registry(url), make_files(tmp_path / "a")

    class OvertakenCard(Card):
        """A card that comes second, after its publisher has looked whether there is one."""

        def to_json(self) -> bytes:
            registry.publish("animals", V1, files, make_card(tuner={"type": "lora", "rank": 1}))
            return super().to_json()

    with pytest.raises(UserError, match=f"^adapter animals@{V1}: already published in "):
        registry.publish("animals", V1, files, OvertakenCard(**make_card().model_dump()))
    assert registry.show("animals").tuner["rank"] == 1


def test_damaged_files_are_named(tmp_path):
    registry = Registry(tmp_path / "registry")
    registry.publish("animals", V1, make_files(tmp_path / "a"), make_card())
    file = tmp_path / "registry" / "animals" / V1 / "adapter_model.safetensors"
    file.write_bytes(b"weightz")
    with pytest.raises(UserError, match=rf"^{file}: damaged: sha256 \w{{12}}, the card says 9a129038"):
        registry.fetch("animals")
    file.write_bytes(b"weigh")
    with pytest.raises(UserError, match=f"^{file}: damaged: 5 bytes, the card says 7$"):
        registry.fetch("animals")
    file.unlink()
    with pytest.raises(UserError, match=f"^{file}: missing, though the card lists it$"):
        registry.fetch("animals")


def test_bucket_copy_is_downloaded_once_and_mended(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    registry = Registry(f"{s3}/{tmp_path.name}")
    registry.publish("animals", V1, make_files(tmp_path / "a"), make_card())
    folder = registry.fetch("animals")
    assert folder.is_relative_to(tmp_path / "home" / "gtl" / "adapters")
    file = folder / "adapter_model.safetensors"
    before = file.stat().st_ino, file.stat().st_mtime_ns
    assert registry.fetch("animals") == folder
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before
    file.write_bytes(b"weightz")
    assert (registry.fetch("animals") / "adapter_model.safetensors").read_bytes() == b"weights"
    registry.store.write(f"animals/{V1}/adapter_model.safetensors", b"weightz")
    file.unlink()
    with pytest.raises(UserError, match=rf"^s3://.*/animals/{V1}/adapter_model.safetensors: damaged: sha256 "):
        registry.fetch("animals")
    assert not folder.exists()


def test_a_bucket_copy_is_downloaded_once_by_all_workers_of_a_machine(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    url = f"{s3}/{tmp_path.name}"
    Registry(url).publish("animals", V1, make_files(tmp_path / "a"), make_card())
    loaded, download = [], Store.download

    def count(store, key, target):
        loaded.append(key)
        return download(store, key, target)

    monkeypatch.setattr(Store, "download", count)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: Registry(url).fetch("animals"), range(4)))
    assert len(folders) == 1
    files = ("adapter.json", "adapter_model.safetensors", "text_encoder/adapter_model.safetensors")
    assert sorted(loaded) == [f"animals/{V1}/{file}" for file in files]


def test_refused_names(tmp_path):
    registry, files = Registry(tmp_path / "registry"), make_files(tmp_path / "a")
    with pytest.raises(UserError, match="^adapter name: 'Animals': "):
        registry.publish("Animals", V1, files, make_card())
    with pytest.raises(UserError, match="^adapter version: '../up': "):
        registry.publish("animals", "../up", files, make_card())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: nothing to publish as animals@"):
        registry.publish("animals", V1, tmp_path / "empty", make_card())
    assert registry.list() == ()


def test_cards_of_other_schemas():
    good = json.loads(make_card(files={"f": File(sha256="0", bytes=1)}).to_json())
    assert parse_card(json.dumps({**good, "added_later": 1}).encode(), "x").files["f"].bytes == 1
    with pytest.raises(UserError, match="^x/adapter.json: not a card that gtl .* reads: schema: "):
        parse_card(json.dumps({**good, "schema": 2}).encode(), "x/adapter.json")
    with pytest.raises(UserError, match="^x/adapter.json: not a card that gtl .* reads: the file: "):
        parse_card(b"{", "x/adapter.json")


def test_a_version_with_a_damaged_card_is_listed_and_can_be_removed(url, tmp_path):
    registry = Registry(url)
    for version in (V1, V2):
        registry.publish("animals", version, make_files(tmp_path / version), make_card())
    registry.store.write(f"animals/{V1}/adapter.json", b"{")
    damaged, good = list_adapters(url)
    assert (damaged["version"], damaged["kind"], good["kind"]) == (V1, "damaged", "lora")
    assert damaged["base"].startswith(f"{url}/animals/{V1}/adapter.json: not a card that gtl ")
    assert remove_adapter(url, f"animals@{V1}") == f"animals@{V1}"
    assert [row["version"] for row in list_adapters(url)] == [V2]


def test_commands_return_plain_values(url, tmp_path):
    Registry(url).publish("animals", V1, make_files(tmp_path / "a"), make_card())
    assert promote_adapter(url, "animals", "prod") == f"animals@{V1}"
    (row,) = list_adapters(url)
    assert {key: row[key] for key in ("name", "version", "aliases", "kind", "base")} == {
        "name": "animals", "version": V1, "aliases": ["prod"], "kind": "lora", "base": "some/model"}  # fmt: skip
    shown = show_adapter(url, "animals@prod")
    assert (shown["aliases"], shown["url"]) == (["prod"], f"{url}/animals/{V1}")
    assert json.loads(json.dumps(shown))["dataset"] == {"fingerprint": "d" * 64, "images": 12}
    assert remove_adapter(url, f"animals@{V1}", force=True) == f"animals@{V1}"
    assert list_adapters(url) == []
