"""What a safety checker flags, through the whole endpoint."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.endpoint import serving
from tests.ports import free_port
from tests.tiny import make_checker

DRAW = {"prompt": "a red circle", "seed": 1}


@pytest.mark.parametrize("action", ["refuse", "blur"])
def test_what_is_flagged_does_not_leave(ray_cluster: None, shelf: Path, tmp_path: Path, action: str) -> None:
    safety = {"checker": str(make_checker(tmp_path / "checker", [-1.1])), "action": action}
    with serving(shelf, free_port(), safety=safety) as url:
        asked: dict[str, Any] = {**DRAW, "num_inference_steps": 2}
        answer = httpx.post(f"{url}/v1/images/generations", json=asked, timeout=60)
        events = httpx.post(
            f"{url}/v1/images/generations", json={**asked, "stream": True, "partial_images": 1}, timeout=60
        )
    if action == "refuse":
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (
            400, "image_generation_user_error", "moderation_blocked",
        )  # fmt: skip
        assert "moderation_blocked" in events.text and "b64_json" not in events.text
    else:
        assert [one["flagged"] for one in answer.json()["data"]] == [True]
        told = [json.loads(line[6:]) for line in events.text.splitlines() if line.startswith("data: ")]
        assert [one["flagged"] for one in told] == [True, True]
