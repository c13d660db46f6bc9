"""Models from a hub: the real client against a small server on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": [None, None],
}
FILES = {
    "model_index.json": json.dumps(INDEX).encode(),
    "v1-5-pruned.ckpt": b"all in one",
    "v1-5-pruned.safetensors": b"all in one",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "unet/diffusion_pytorch_model.safetensors": b"plain",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"raw",
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"",
    "safety_checker/model.safetensors": b"checker",
}
CONFIGS = ["model_index.json", "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json"]


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub's protocol that a download needs, for one repository."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/owner/name/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            self.reply(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif self.path.startswith("/api/models/owner/name/tree/"):
            files = [{"path": name, "size": len(data), "oid": sha1(data)} for name, data in FILES.items()]
            self.reply(200, json.dumps([{"type": "file", **file} for file in files]).encode())
        else:
            self.resolve()

    do_HEAD = do_GET

    def resolve(self) -> None:
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repository == "owner/gated":
            return self.reply(403, b"", "GatedRepo")
        if repository not in ("owner/name", "owner/other"):
            return self.reply(401, b"", "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.reply(404, b"", "RevisionNotFound")
        if repository == "owner/other" or name not in FILES:
            return self.reply(404, b"", "EntryNotFound")
        return self.reply(200, FILES[name])

    def reply(self, status: int, body: bytes, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sha1(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def resolve(home: Path, endpoint: str, *arguments: str | bool | None) -> tuple[list[str], str]:
    """Names of the files that `resolve` downloads, or its error; in a fresh process, which reads its settings anew."""
    code = (
        "import json, sys\n"
        "from gtl.families.source import resolve\n"
        "from gtl.types import UserError\n"
        "try:\n"
        "    folder = resolve(*json.loads(sys.argv[1]))\n"
        "    print(json.dumps(sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())))\n"
        "except UserError as error:\n"
        "    sys.exit(f'UserError: {error}')\n"
    )
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"
    }
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout or "[]"), done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_only_what_is_read_is_downloaded(hub: str, tmp_path: Path, variant: str | None) -> None:
    names, _ = resolve(tmp_path, hub, "owner/name", None, variant)
    middle = f".{variant}" if variant else ""
    assert names == sorted([*CONFIGS, f"unet/diffusion_pytorch_model{middle}.safetensors"])


def test_a_plan_downloads_no_weights(hub: str, tmp_path: Path) -> None:
    assert resolve(tmp_path, hub, "owner/name", None, None, False)[0] == CONFIGS


def test_a_hub_that_is_gone_leaves_what_was_downloaded(hub: str, tmp_path: Path) -> None:
    names, _ = resolve(tmp_path, hub, "owner/name", COMMIT, None)
    assert resolve(tmp_path, "http://127.0.0.1:9", "owner/name", COMMIT, None)[0] == names != []


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("owner/nothing", None, "model.source: 'owner/nothing': neither a folder here nor on the hub (a private one"),
        ("owner/gated", None, "model.source: 'owner/gated': its owner wants your consent first; give it on the hub"),
        ("owner/other", None, "model.source: 'owner/other': no model_index.json in it; a model in diffusers layout"),
        ("owner/name", "v9", "model.revision: 'v9': owner/name has no such branch, tag or commit"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: str, tmp_path: Path, source: str, revision: str | None, message: str
) -> None:
    names, error = resolve(tmp_path, hub, source, revision, None)
    assert names == [] and error.startswith(f"UserError: {message}")


@pytest.mark.soak  # the client tries for 23 seconds
def test_a_hub_out_of_reach_is_one_line(tmp_path: Path) -> None:
    names, error = resolve(tmp_path, "http://127.0.0.1:9", "owner/name", None, None)
    assert names == []
    assert error.startswith("UserError: model.source: 'owner/name': not in the local cache, and the hub is off-line or")
