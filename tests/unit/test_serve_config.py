"""Configs of the endpoint: what they mean, and one line for what is wrong, before anything is started."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from gtl.adapters import Registry
from gtl.types import UserError
from serve.command import check, describe, last_error, read_config, run
from tests.endpoint import BASE
from tests.tiny import make_sd

PRODUCTION = Path(__file__).parents[2] / "serve" / "production.yaml"


def write(folder: Path, **changes: Any) -> Path:
    """A config with an application of ours."""
    args = {"registry": str(folder / "registry"), **changes.pop("args", {})}
    values = {"applications": [{"name": "gtl", "import_path": "serve.app:build", "args": args}], **changes}
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_the_config_for_this_machine() -> None:
    config = read_config(None, ["registry=s3://bucket/adapters", "limits.max_steps=50"])
    assert config.url == "http://127.0.0.1:8000/"
    assert (config.settings.registry, config.settings.limits.max_steps) == ("s3://bucket/adapters", 50)
    assert config.settings.bases == "auto" and config.settings.keys is None


def test_the_config_for_a_cluster_is_one_of_ours() -> None:
    config = read_config(PRODUCTION)
    assert [(base.name, base.replicas.min, base.replicas.max) for base in config.settings.bases] == [
        ("sdxl", 1, 8), ("flux", 0, 4),
    ]  # fmt: skip
    assert config.proxy_location == "EveryNode" and config.settings.keys == "/etc/gtl/keys"


def test_a_check_says_what_would_be_served(shelf: Path, tmp_path: Path) -> None:
    lines = describe(check(read_config(write(tmp_path, args={"registry": str(shelf)})))).splitlines()
    assert lines == [
        "tiny: builtin:tiny (sd), 1 to 1 replicas, pictures of up to 16384 pixels", "tiny:dog@v1", "tiny:dog@prod",
        "tiny:dog@v2", "tiny:frozen@v1", "tiny:star@v1", "tiny:words@v1",
    ]  # fmt: skip
    (only,) = describe(check(read_config(write(tmp_path)))).splitlines()
    assert only.startswith("tiny: builtin:tiny (sd), 1 to 1 replicas"), "where there is nothing else"


BASES = [{"name": "tiny", "source": BASE}]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"args": {"slotz": 3}}, "slotz: unknown key"),
    "base": ({"args": {"bases": [{"name": "x", "source": "./nowhere"}]}}, "nowhere"),
    "name": ({"args": {"bases": [{"name": "A B", "source": BASE}]}}, "bases.0.name: 'A B'"),
    "twice": ({"args": {"bases": BASES * 2}}, "bases: 'tiny': should be the name of one base"),
    "pixels": ({"args": {"limits": {"max_pixels": 4095}}}, "limits.max_pixels: 4095: should be at least 4096"),
    "base's pixels": (
        {"args": {"bases": [{**BASES[0], "max_picture_pixels": 1}]}},
        "bases: tiny: max_picture_pixels: 1: should be at least 4096, of the model's own 64x64",
    ),
    "replicas": ({"args": {"bases": [{**BASES[0], "replicas": {"min": 2}}]}}, "max: 1: should be at least min, 2"),
    "keys": ({"args": {"keys": "/nowhere/keys"}}, "keys /nowhere/keys: cannot be read"),
    "host": ({"http_options": {"host": "0.0.0.0"}}, "http_options.host: 0.0.0.0: others reach it"),
    "port": ({"http_options": {"port": "many"}}, "http_options.port"),
    "port beyond": ({"http_options": {"port": 65536}}, "http_options.port: 65536: expected 1 to 65535"),
    "option": (
        {"http_options": {"hots": "127.0.0.1"}},
        "http_options.hots: unknown key; did you mean",
    ),
    "time": ({"http_options": {"request_timeout_s": 300}}, "request_timeout_s: 300: should be above timeout_s, 300"),
    "section": ({"http_option": {}}, "http_option: unknown key; did you mean http_options?"),
    "output": ({"args": {"output": "s3://"}}, "output: s3://: names no bucket"),
    "nowhere to write": ({"args": {"output": "/proc/pictures"}}, "output: /proc/pictures: nothing can be"),
    "steps": ({"args": {"bases": [{**BASES[0], "steps": 5000}]}}, "bases: tiny: steps: 5000: expected 1 to 999"),
    "merged": ({"args": {"bases": [{**BASES[0], "merged": ["cat"]}]}}, "bases: tiny: merged: 'cat': no adapter of it"),
    "no denoiser": ({"args": {"bases": [{"name": "x", "source": "builtin:gan"}]}}, "this is for models that draw by"),
    "none of ours": ({"applications": []}, "applications: 0 with import_path serve.app:build; expected one"),
    "ray's": ({"proxy_location": "Nowhere"}, "proxy_location"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case: str, tmp_path: Path) -> None:
    changes, message = WRONG[case]
    with pytest.raises(UserError) as caught:
        check(read_config(write(tmp_path, **changes)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"route_prefix": "x/"}, "route_prefix: 'x/': expected / or a path"),
        (
            {"deployments": [{"name": "Generator"}]},
            "deployments: 'Generator': there is none; expected Gen",
        ),
        ({"deployments": [{"name": "Ingress", "num_replica": 3}]}, "num_replica: unknown key; did you mean"),
    ],
    ids=["route", "deployment", "its option"],
)
def test_what_is_wrong_with_the_application(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write(tmp_path)
    values = yaml.safe_load(file.read_text())
    values["applications"][0] |= more
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as caught:
        check(read_config(file))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_found_before_anything_is_started(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("serve.command.begins_one", lambda: True)  # whatever other tests have begun here
    told: list[str] = []
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config = read_config(write(tmp_path, http_options={"port": port}))
        with pytest.raises(UserError, match=f"^http_options: 127.0.0.1:{port}: cannot be listened at: Addr"):
            run(config, lambda phase, *_: told.append(phase))
    assert told == ["check"]


def test_what_a_replica_says_when_it_does_not_start_is_one_line() -> None:
    message = (
        "The deployment failed to start 3 times in a row. See controller logs for details. Error:\n"
        "\x1b[36mray::ServeReplica:gtl:Generator:tiny.initialize_and_get_metadata()\x1b[39m (pid=1, ip=127.0.0.1)\n"
        '  File "replica.py", line 1928, in initialize\n    raise RuntimeError(traceback.format_exc()) from None\n'
        'RuntimeError: Traceback (most recent call last):\n  File "generator.py", line 61, in __init__\n'
        "gtl.types.UserError: /models/unet: damaged: 12 bytes, 24 are told\n"
    )
    assert last_error(message) == "/models/unet: damaged: 12 bytes, 24 are told"
    assert last_error("CUDA out of memory") == "CUDA out of memory"


def test_a_check_leaves_nothing_where_pictures_go(tmp_path: Path) -> None:
    check(read_config(write(tmp_path, args={"output": str(tmp_path / "out")})))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_whose_download_was_cut_off_is_found(tmp_path: Path) -> None:
    make_sd(tmp_path / "model")
    file = write(tmp_path, args={"bases": [{"name": "mine", "source": str(tmp_path / "model")}]})
    check(read_config(file))
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(UserError, match=f"^{weights}: damaged \\(.*\\); get the file again$"):
        check(read_config(file))


def test_what_is_no_file_or_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^serve config .*nothing\.yaml: No such file"):
        read_config(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match="expected sections such as `http_options:` and `applications:`, found list"):
        read_config(tmp_path / "list.yaml")


def test_two_bases_of_one_name_have_to_be_named(shelf: Path, tmp_path: Path) -> None:
    """A registry with adapters for models whose last part is the same."""
    import json
    import shutil

    shutil.copytree(shelf, tmp_path / "registry")
    card = tmp_path / "registry" / "star" / "v1" / "adapter.json"
    values = json.loads(card.read_text())
    values["base"]["source"] = "somebody/tiny"
    card.write_text(json.dumps(values))
    assert Registry(tmp_path / "registry").show("star").base.source == "somebody/tiny"
    with pytest.raises(UserError, match=r"bases: auto: .* would both be 'tiny'; name them"):
        check(read_config(write(tmp_path)))
