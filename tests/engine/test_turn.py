"""Scores of a model that is being trained: those of two ranks are those of one, however few pictures there are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gtl.config.evaluate import Evaluate
from gtl.data.buckets import Variant
from gtl.data.containers import Place
from gtl.data.fill import ImageWork
from gtl.data.reference import Reference
from gtl.evaluate.result import Score
from gtl.evaluate.sampling import plan
from gtl.evaluate.turn import Turn
from gtl.families import open_family
from gtl.storage import Store
from tests.engine.group import Group
from tests.tiny import make_clip, write_pictures

EXTRACTORS = {
    "kid": "builtin:backbone", "memorization": "builtin:backbone", "clip_score": "clip", "cmmd": "clip",
    "prompt_accuracy": "builtin:reader",
}  # fmt: skip
PROMPTS = ["a large red circle on a white background", "a small blue square", "a green triangle on a black background"]
IMAGES = 5
Found = tuple[dict[str, Score], list[tuple[int, str]], tuple[int, int] | None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and a CLIP."""
    folder = tmp_path_factory.mktemp("turn")
    write_pictures(folder / "images", [(64, 64)] * IMAGES)
    make_clip(folder / "clip", seed=3)  # whose cosines are positive, which a score is only then told by
    return folder


def make_images(folder: Path) -> Reference:
    """The last picture is held out."""
    works = []
    for i in range(IMAGES):
        digest = hashlib.sha256((folder / f"{i}.png").read_bytes()).hexdigest()
        whole = {digest: Variant(0, 0, False)}
        works.append(ImageWork(f"{folder}/{i}.png", digest, Place(str(folder), f"{i}.png", 0, -1, -1), (64, 64), whole))
    return Reference((64, 64), tuple(works[:-1]), tuple(works[-1:]), ())


def score(place: str, metrics: list[str], samples: int) -> Found:
    """What a rank gets: scores, nearest training images, and the size of a sample."""
    asked = Evaluate.model_validate({
        "metrics": metrics, "samples": samples, "prompts": PROMPTS, "clip": f"{place}/clip", "steps": 6, "guidance": 3,
        "seed": 1,
    })  # fmt: skip
    family, images = open_family("builtin:tiny"), make_images(Path(place, "images"))
    parts = {part: family.load(part, torch.float32) for part in (family.main, *family.encoders, family.codec) if part}
    cache, device = Store(f"{place}/cache{dist.get_world_size()}"), torch.device("cpu")
    turn = Turn(asked, family, images, plan(asked, images, "fp32"), "model", cache, device, torch.float32)
    with torch.no_grad():
        scores, nearest, sample = turn.score(parts, None)
    size = sample(samples - 1).size if nearest else None
    return scores, [(copy.sample, copy.uri) for copy in nearest], size


def close(score: Score) -> Any:
    """Pictures that are drawn in batches of another size differ by rounding."""
    return {
        "value": pytest.approx(score.value, rel=1e-3, abs=1e-6), "fake": pytest.approx(score.fake, rel=1e-2, abs=1e-3),
        "num_fake": score.num_fake, "num_real": score.num_real, "extractor": score.extractor, "note": score.note,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "samples"),
    [
        (list(EXTRACTORS), 5),
        (["clip_score", "prompt_accuracy", "memorization"], 1),  # the second rank has neither a picture nor a prompt
    ],
    ids=["five", "one"],
)
def test_two_ranks_score_what_one_does(solo: Group, duo: Group, place: Path, metrics: list[str], samples: int) -> None:
    ((alone, copies, size),) = solo.run(score, str(place), metrics, samples)
    (together, others, other_size), (nothing, no_copies, _) = duo.run(score, str(place), metrics, samples)
    assert (nothing, no_copies) == ({}, []), "the first rank alone is told"
    assert list(together) == list(alone) == metrics
    for name, found in together.items():
        assert {key: getattr(found, key) for key in close(found)} == close(alone[name]), name
        assert found.num_fake == samples
        assert found.extractor.endswith(EXTRACTORS[name])
    assert others == copies and sorted(sample for sample, _ in copies) == list(range(samples))
    assert other_size == size == (64, 64)
    assert min(together["clip_score"].fake) > 5
    if samples > 1:  # so that one prompt's picture in the place of another's is noticed
        assert set(together["prompt_accuracy"].fake) == {0, 1}
        assert len(set(together["clip_score"].fake)) == samples
