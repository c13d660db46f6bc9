"""What is known to be wrong before pictures are drawn, and which number stands for few of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gtl.config.evaluate import Evaluate
from gtl.data.reference import Reference
from gtl.evaluate.extract import Drawn, Facts, load_drawn
from gtl.evaluate.measure import Found, check_extractors, score_all
from gtl.types import UserError

NO_IMAGES = Reference((64, 64), (), (), ())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"backbone": "/nowhere"}, "/nowhere: no such folder; a backbone is builtin:backbone, inception:FILE, or"),
        ({"backbone": "inception:/nowhere"}, "inception:/nowhere: no such file; give the path of pt_inception-2015"),
        ({"backbone": "builtin:x"}, "builtin:x: no such built-in backbone; there is builtin:backbone"),
        ({"metrics": ["cmmd"], "clip": "/nowhere"}, "/nowhere: no such folder"),
        ({"metrics": ["prompt_accuracy"]}, "evaluate.metrics: prompt_accuracy: 'a portrait': no caption of the built"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_drawn(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_extractors(Evaluate(**asked), ["a large red circle on a white background", "a portrait"])
    assert str(caught.value).startswith(message)


def test_what_is_there_or_may_be_on_the_hub_is_not_refused(tmp_path: Path) -> None:
    for spec in ("builtin:backbone", "facebook/dinov2-small", str(tmp_path)):
        check_extractors(Evaluate(backbone=spec), ["a portrait"])
    check_extractors(Evaluate(metrics=["diversity"], clip="/nowhere"), ["a portrait"])  # which nothing looks at


@pytest.mark.parametrize(
    ("metrics", "samples", "expected"),
    [
        (["diversity", "fid"], 1999, ["diversity", "kid", "fid"]),
        (["fid", "kid"], 1999, ["fid", "kid"]),
        (["fid", "diversity"], 2000, ["fid", "diversity"]),
    ],
)
def test_kid_stands_before_a_fid_of_few_samples(metrics: list[str], samples: int, expected: list[str]) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = {"real": torch.randn(2000, 2, generator=rng), "fake": torch.randn(samples, 2, generator=rng)}
    asked = Evaluate(metrics=metrics, samples=samples)
    scores, _ = score_all(asked, {"backbone": Found(rows, Facts("x", "as it is"))}, NO_IMAGES)
    assert list(scores) == expected
    assert ("kid is the number to read" in scores["fid"].note) == (samples < 2000)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n cut off"])
def test_a_damaged_sample_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "000001.png").write_bytes(data)
    with pytest.raises(UserError, match=rf"^{tmp_path}/000001\.png: damaged \(.*\); remove it, and it is drawn again$"):
        load_drawn(Drawn(str(tmp_path), "000001.png"))
