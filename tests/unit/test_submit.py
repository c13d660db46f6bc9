"""What `gtl submit` decides before a cluster is there: what is sent, what it is called, what an end means."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer

from gtl.cli import app, main
from gtl.cli.jobs import arguments_of
from gtl.config import load_recipe
from gtl.config.load import dump_recipe, parse_recipe, read_yaml
from gtl.jobs import pack
from gtl.jobs.checks import Site, check_places, check_room, site_of
from gtl.jobs.follow import Output
from gtl.jobs.inside import LOST
from gtl.jobs.parcel import Parcel
from gtl.jobs.probe import DRAINED_IDLE, lost, refused, sees
from gtl.jobs.resume import Left, left_of, stamp
from gtl.jobs.submit import read_secrets
from gtl.jobs.verdict import End, exit_status, is_tried_again, meaning
from gtl.jobs.work import Work, read_work
from gtl.session import Cluster
from gtl.storage import Store
from gtl.types import UserError

RECIPE = """
model: {source: builtin:tiny}
data: {source: %s, resolution: 64}
train: {steps: 4}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe in a folder of it, images, and more."""
    tree = tmp_path / "tree"
    for folder in ("recipes", "photos", "src", "runs/dog", "other/runs", ".git", "src/__pycache__"):
        (tree / folder).mkdir(parents=True)
    (tree / "recipes/dog.yaml").write_text(RECIPE % "./photos")
    for file in ("photos/a.png", "src/a.py", "src/b.log", "src/__pycache__/a.pyc", "runs/dog/x", "other/runs/y",
                 ".git/HEAD", ".env", "src/secret.key", "kept.log"):  # fmt: skip
        (tree / file).write_text(file)
    (tree / ".gitignore").write_text("*.log\n!kept.log\n")
    (tree / "src/.rayignore").write_text("*.key\n")
    monkeypatch.chdir(tree)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tree


def params(*command: str) -> dict[str, Any]:
    """Of a command line of gtl."""
    return typer.main.get_command(app).commands[command[0]].make_context(command[0], list(command[1:])).params


def work_of(*command: str, tree: Path | None) -> tuple[Work, list[str]]:
    work = read_work(command[0], params(*command), tree)
    return work, arguments_of(typer.main.get_command(app).commands[command[0]], work.values)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of a command."""
    monkeypatch.setattr(sys, "argv", ["gtl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_tree_goes_without_what_is_ignored_read_or_written(here: Path) -> None:
    sent = {".gitignore", "kept.log", "other/runs/y", "recipes/dog.yaml", "src/.rayignore", "src/a.py"}
    assert set(pack.list_files(here, [str(here / "photos")])) == sent
    assert set(pack.list_files(here)) == sent | {"photos/a.png"}


def test_the_ignore_files_mean_what_they_mean_to_ray(here: Path, tmp_path: Path) -> None:
    """Ray's own packing of the folder, told to leave out what we always leave out."""
    from ray._private.runtime_env.packaging import create_package

    (here / "src/deep/er").mkdir(parents=True)
    (here / "src/deep/er/c.txt").write_text("c")
    (here / "src/deep/.gitignore").write_text("/er/\n")
    target = tmp_path / "ray.zip"
    create_package(str(here), target, include_gitignore=True, include_parent_dir=False, excludes=list(pack.SKIPPED))
    theirs = {name for name in zipfile.ZipFile(target).namelist() if not name.endswith("/")}
    assert set(pack.list_files(here)) == theirs
    assert "src/deep/.gitignore" in theirs and "src/deep/er/c.txt" not in theirs


def test_links_are_followed_but_not_in_circles(here: Path) -> None:
    (here / "src/again").symlink_to(here / "src")
    (here / "linked").symlink_to(here / "other")
    assert [path for path in pack.list_files(here) if "again" in path or "linked" in path] == ["linked/runs/y"]


def test_a_large_tree_is_refused_by_what_is_large_in_it() -> None:
    sizes = {"a/b/model.bin": 90, "a/b/c.txt": 1, "data/1": 20, "data/2": 20, "code.py": 2}
    assert pack.largest(sizes) == [("a/b/model.bin", 90), ("data/", 40), ("code.py", 2)]
    pack.check_size(Path("/tree"), sizes, limit=133)
    with pytest.raises(UserError, match=r"^/tree: 0.0 MiB to send, at most 0.0 MiB; .*a/b/model.bin 0.0 MiB, data/ "):
        pack.check_size(Path("/tree"), sizes, limit=132)


def test_the_archive_is_the_same_whenever_its_files_are(tmp_path: Path) -> None:
    pack.write_archive({"b": b"2", "a/c": b"1"}, tmp_path / "1.zip")
    pack.write_archive({"a/c": b"1", "b": b"2"}, tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert zipfile.ZipFile(tmp_path / "1.zip").read("a/c") == b"1"


def test_a_recipe_is_sent_as_it_is_read_here_and_named_by_its_place_in_the_tree(here: Path) -> None:
    work, arguments = work_of(
        "train", str(here / "recipes/dog.yaml"), "--set", "train.steps=9", "--resume", tree=here
    )  # fmt: skip
    assert arguments == ["recipes/dog.yaml", "--resume"]
    assert list(work.files) == ["recipes/dog.yaml"]
    sent = parse_recipe(read_yaml(work.files["recipes/dog.yaml"].decode()))
    assert sent == load_recipe("recipes/dog.yaml", ["train.steps=9"])
    assert sent.train.steps == 9 and sent.data.source == str(here / "photos")
    assert work.reads == {"data.source": str(here / "photos")}
    assert work.writes == {f"storage.{name}": str(here / name) for name in ("runs", "cache", "registry")}
    assert work.name == "dog"
    assert work_of("train", "recipes/dog.yaml", tree=None)[1] == ["dog.yaml"]


def test_a_study_is_sent_with_its_recipe_inside(here: Path) -> None:
    study = """
recipe: dog.yaml
set: {data.validation: 0.5, evaluate.every: 1}
space: {tuner.rank: {choice: [2, 4]}}
metric: val_loss
"""
    Path("recipes/ranks.yaml").write_text(study)
    work, arguments = work_of("tune", "recipes/ranks.yaml", "--name", "ranks2", tree=here)
    assert arguments == ["recipes/ranks.yaml", "--name", "ranks2"]
    assert b"builtin:tiny" in work.files["recipes/ranks.yaml"]
    assert work.name == "ranks2"


def test_prompts_go_along_and_pictures_have_an_absolute_folder(here: Path) -> None:
    Path("prompts.txt").write_text("a cat\n")
    work, arguments = work_of("generate", "--prompts", "prompts.txt", "--out", "drawn", "--adapter", "a", "--adapter",
                              "b:0.5", "--steps", "3", tree=here)  # fmt: skip
    assert work.files == {"prompts.txt": b"a cat\n"}
    assert params("generate", *arguments) == {
        **params("generate", "--prompts", "prompts.txt", "--adapter", "a", "--adapter", "b:0.5", "--steps", "3",
                 "--out", str(here / "drawn")), "registry": str(here / "registry"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "-- adapters list",
            "gtl submit: 'adapters': a job is one of train, tune, evaluate, generate, cache, after --",
        ),
        ("-- serve", "gtl submit: 'serve': a job is one of "),
        ("-- train nowhere.yaml", "recipe nowhere.yaml: No such file or directory; expected a YAML file"),
        ("-- train recipes/dog.yaml --set tuner.rank=0", "tuner.rank: 0: should be greater than or equal to 1"),
        ("-- train recipes/dog.yaml --name Dog", "--name: 'Dog': a name starts with a-z or 0-9"),
        ("-- train ../dog.yaml", "recipe ../dog.yaml: outside {here}, the tree that is sent; "),
        ("-- cache gc", "gtl submit -- cache gc: no job; "),
        ("--retries 2 -- train recipes/dog.yaml", "--retries 2: only with --follow: "),
        ("--secret NOT_SET -- train recipes/dog.yaml", "--secret NOT_SET: not set in the environment here; "),
        ("-- train recipes/dog.yaml", "--address: which cluster? give the URL of its dashboard, "),
        ("--address http://127.0.0.1:9 -- train recipes/dog.yaml", "--address http://127.0.0.1:9: no dashboard of a "),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_sent(
    command: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here.parent / "dog.yaml").write_text(RECIPE % "./photos")
    assert run(monkeypatch, "submit", *command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [err.strip()]
    assert err.startswith(f"error: {message.format(here=here)}")


def test_what_the_command_itself_would_not_parse_is_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "submit", "--", "train", "recipes/dog.yaml", "--nonsense") == 2
    assert "No such option: --nonsense" in capsys.readouterr().err


def parcel(**changes: Any) -> Parcel:
    values: dict[str, Any] = {
        "verb": "train", "arguments": ("train", "dog.yaml"), "files": {"dog.yaml": b"1", "a.py": b"2"},
        "sends_tree": True, "name": "dog", "writes": {"storage.runs": "s3://b/runs"},
    }  # fmt: skip
    return Parcel(**{**values, **changes})


def test_an_id_is_of_the_content_and_of_no_secret() -> None:
    one = parcel()
    assert one.id(1) == f"gtl-train-{one.content[:12]}" and one.id(2) == f"{one.id(1)}-2"
    assert parcel(secrets={"TOKEN": "x"}).id(1) == one.id(1)
    assert parcel(files={"a.py": b"2", "dog.yaml": b"1"}).id(1) == one.id(1)
    others = [
        parcel(files={"dog.yaml": b"1", "a.py": b"3"}), parcel(files={"dog.yaml": b"1", "b.py": b"2"}),
        parcel(arguments=("train", "dog.yaml", "--name", "cat")),
    ]  # fmt: skip
    assert len({one.id(1), *(other.id(1) for other in others)}) == 4
    assert "hunter2" not in repr(parcel(secrets={"TOKEN": "hunter2"}))


def test_secrets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "value")
    assert read_secrets(["A_TOKEN"]) == {"A_TOKEN": "value"}


@pytest.mark.parametrize(
    ("end", "what", "status"),
    [
        (End("SUCCEEDED", 0), "done", 0),
        (End("STOPPED"), "stopped", 1),
        (End("FAILED", 2, "JOB_ENTRYPOINT_COMMAND_ERROR"), "mistake", 2),
        (End("FAILED", 1, "JOB_ENTRYPOINT_COMMAND_ERROR"), "failed", 1),
        (End("FAILED", 127, "JOB_ENTRYPOINT_COMMAND_ERROR"), "failed", 1),
        (End("FAILED", LOST, "JOB_ENTRYPOINT_COMMAND_ERROR"), "lost", 1),
        (End("FAILED", 137, "JOB_ENTRYPOINT_COMMAND_ERROR"), "lost", 1),
        (End("FAILED", 130, "JOB_ENTRYPOINT_COMMAND_ERROR"), "lost", 1),
        (End("FAILED", -9, "JOB_ENTRYPOINT_COMMAND_ERROR"), "lost", 1),
        (End("FAILED", None, "JOB_SUPERVISOR_ACTOR_DIED"), "lost", 1),
        (End("FAILED", None, "RUNTIME_ENV_SETUP_FAILURE"), "lost", 1),
    ],
)
def test_what_an_end_means(end: End, what: str, status: int) -> None:
    assert (meaning(end), exit_status(end)) == (what, status)
    assert is_tried_again(end, 1) is (what == "lost")
    assert not is_tried_again(end, 0)


def site(nodes: int = 1, cpus: float = 4, gpus: float = 0, grows: bool = False) -> Site:
    return Site("2.60.0", nodes, Cluster(cpus, gpus, gpus), grows)


def test_folders_of_the_tree_are_refused_where_there_are_several_machines(here: Path) -> None:
    work, _ = work_of("train", "recipes/dog.yaml", "--set", "storage.runs=s3://b/runs", "--set",
                      "storage.cache=/mnt/cache", tree=here)  # fmt: skip
    with pytest.raises(UserError, match=f"^storage.registry: {here}/registry: a folder of this machine, and the "
                                        "cluster has 3 nodes; set storage.registry to a bucket, "):  # fmt: skip
        check_places(work, 3, here)
    warned = "storage.cache, storage.registry: on the disk of the cluster's one node; a bucket would outlive it"
    assert check_places(work, 1, here) == warned
    mounted = {"storage.runs": "s3://b/runs", "storage.registry": "/mnt/registry"}
    assert check_places(Work("train", {}, {}, mounted, {}), 3, here) is None
    with pytest.raises(UserError, match=f"^data.source: {here}/photos: "):
        check_places(Work("train", {}, {}, mounted, work.reads), 3, here)


def test_every_model_that_a_recipe_reads_from_a_folder_stays_here(here: Path) -> None:
    named = ("objective.teacher", "evaluate.backbone", "evaluate.clip")
    for number, key in enumerate(named):
        (here / f"models/{number}").mkdir(parents=True)
        (here / f"models/{number}/weights").write_text(key)
    settings = [word for n, key in enumerate(named) for word in ("--set", f"{key}=./models/{n}")]
    work, _ = work_of("train", "recipes/dog.yaml", "--set", "tuner.type=full", "--set", "objective.type=distill",
                      *settings, tree=here)  # fmt: skip
    models = {key: f"{here}/models/{number}" for number, key in enumerate(named)}
    assert work.reads == {"data.source": f"{here}/photos", **models}
    assert not [path for path in pack.list_files(here, list(work.reads.values())) if path.startswith("models/")]
    with pytest.raises(UserError, match=f"^objective.teacher: {here}/models/0: a folder of this machine, and the "):
        check_places(Work("train", {}, {}, {}, {"objective.teacher": models["objective.teacher"]}), 3, here)


def test_workers_that_never_fit_are_refused_unless_the_cluster_grows() -> None:
    recipe = load_recipe("recipes/dog.yaml", ["train.workers=2", "train.gpus_per_worker=1"])
    assert check_room(recipe, site(gpus=2)) == []
    with pytest.raises(UserError, match="^train.workers: 2 workers with 1 GPU each need 2 GPUs; the cluster has 0"):
        check_room(recipe, site())
    assert check_room(recipe, site(grows=True)) == [{"CPU": 1.0, "GPU": 1.0}] * 2
    elastic = load_recipe("recipes/dog.yaml", ["train.workers=[6, 9]"])
    assert check_room(elastic, site(grows=True)) == [{"CPU": 1.0}] * 6


def test_what_an_autoscaler_says_of_another_request_is_no_refusal() -> None:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    bundles = [{"CPU": 2.0, "GPU": 1.0}] * 3
    status = GetClusterStatusReply()
    assert not refused(status.SerializeToString(), bundles)
    said = status.autoscaling_state.infeasible_cluster_resource_constraints.add().resource_requests.add()
    said.request.resources_bundle.update({"GPU": 1.0, "CPU": 2.0})
    for count, is_refused in ((2, False), (3, True), (4, False)):
        said.count = count
        assert refused(status.SerializeToString(), bundles) is is_refused
    assert not refused(status.SerializeToString(), [{"CPU": 2.0}] * 4)


def test_a_machine_that_an_autoscaler_found_idle_is_not_lost() -> None:
    nodes = [
        {"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": False, "DeathReason": 2},
        {"NodeID": "c", "Alive": False, "DeathReason": DRAINED_IDLE}, {"NodeID": "d", "Alive": False, "DeathReason": 3},
        {"NodeID": "e", "Alive": False, "DeathReason": 2},
    ]  # fmt: skip
    assert lost(nodes, ["e"]) == {"b", "d"}, "whether they were there when the command began or came later"
    assert lost(nodes) == {"b", "d", "e"}


def test_a_place_that_another_machine_does_not_see_has_a_reason(tmp_path: Path) -> None:
    Store(tmp_path).write("token", b"token")
    assert [sees(str(tmp_path), "token"), sees(str(tmp_path), "other"), sees(str(tmp_path / "nowhere"), "token")] == [
        "", "no such file", "no such file",
    ]  # fmt: skip


def test_the_cluster_is_what_its_living_nodes_have() -> None:
    nodes = [
        {"state": "ALIVE", "resources_total": {"CPU": 4.0}, "labels": {}},
        {"state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": 2.0}, "labels": {}},
        {"state": "DEAD", "resources_total": {"CPU": 8.0, "GPU": 8.0}, "labels": {}},
    ]
    assert site_of("2.60.0", nodes, {}) == Site("2.60.0", 2, Cluster(12, 2, 2), False)
    by_hand = {"autoscalerReport": {"nodeTypeMapping": {"0" * 56: "node_" + "0" * 56}}}
    assert not site_of("2.60.0", nodes, by_hand).grows
    assert site_of("2.60.0", nodes, {"autoscalerReport": {"nodeTypeMapping": {"10.0.0.1": "ray.head.default"}}}).grows
    assert site_of("2.60.0", [{**nodes[0], "labels": {"ray.io/node-group": "head"}}], {}).grows


def test_an_attempt_goes_on_only_from_a_checkpoint_of_its_own(here: Path) -> None:
    recipe = load_recipe("recipes/dog.yaml")
    runs = Store(here / "runs" / "dog")
    text = dump_recipe(recipe).encode()
    since = stamp(1_800_000_000_123)
    assert since == "20270115-080000-123"

    def left() -> Left:
        return left_of("train", runs, "dog", since, recipe)

    runs.write("20270115-075959-000-aaaaaa/recipe.yaml", text)
    runs.write("20270115-075959-000-aaaaaa/checkpoints/00000001/manifest.json", b"{}")
    assert left() == Left()
    runs.write("20270115-080001-000-bbbbbb/recipe.yaml", text)
    assert left() == Left()
    runs.write("20270115-080001-000-bbbbbb/checkpoints/00000001/manifest.json", b"{}")
    assert left() == Left(can_resume=True)
    runs.write(
        "20270115-080002-000-cccccc/recipe.yaml",
        dump_recipe(load_recipe("recipes/dog.yaml", ["train.steps=9"])).encode(),
    )
    assert left() == Left(can_resume=True)
    runs.write("20270115-080001-000-bbbbbb/adapter.json", b"{}")
    assert left() == Left(("dog@20270115-080001-000-bbbbbb",))


def test_a_study_goes_on_until_it_has_ended(here: Path) -> None:
    recipe, runs = load_recipe("recipes/dog.yaml"), Store(here / "runs" / "ranks")
    left = [left_of("tune", runs, "ranks", "2027", recipe)]
    runs.write("20270115-080001-000-bbbbbb/study.yaml", b"")
    left.append(left_of("tune", runs, "ranks", "2027", recipe))
    runs.write("20270115-080001-000-bbbbbb/study.json", json.dumps({"ended": "now", "published": ["a@1"]}).encode())
    left.append(left_of("tune", runs, "ranks", "2027", recipe))
    assert left == [Left(), Left(can_resume=True), Left(("a@1",))]


def test_output_is_whole_lines_and_ends_with_the_results() -> None:
    out = io.StringIO()
    show = Output(out)
    for piece in ("Running entrypoint for job x: python\ntra", "in 1/2\nreport /r\nadapter d@1\n", "a warning"):
        show(piece)
    show.close()
    assert out.getvalue() == "train 1/2\nreport /r\nadapter d@1\na warning\nreport /r\nadapter d@1\n"


def test_ids_of_paths_do_not_depend_on_where_one_stands(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recipe by a relative and by an absolute path is the same job."""
    relative = work_of("train", "recipes/dog.yaml", tree=here)
    absolute = work_of("train", os.path.abspath("recipes/dog.yaml"), tree=here)
    assert relative == absolute
