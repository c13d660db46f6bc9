"""`builtin:backbone`: what it says of pictures that it has not seen, what its features tell apart, how it is made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gtl.backbones import open_backbone
from gtl.backbones.extractor import Extractor
from gtl.backbones.scenes import builtin_folder, open_scenes
from gtl.builtin_backbone import HEADS, Examples, accuracy, damage, draw, facts_of, make, select
from gtl.data.scenes.sets import SceneSet
from gtl.data.scenes.vocabulary import Background, Scene, Thing

SEED = 3
"""Neither that of the pictures that it has learned from, nor of those that its figures are of."""


@pytest.fixture(scope="module")
def backbone() -> Extractor:
    opened = open_backbone("builtin:backbone")
    assert isinstance(opened, Extractor)
    return opened


@pytest.fixture(scope="module")
def examples() -> Examples:
    return draw(400, SEED)


def features_of(backbone: Extractor, scenes: SceneSet, count: int) -> Tensor:
    return backbone([scenes.picture(i)[0] for i in range(count)])[0]


def test_it_is_small_and_says_what_it_is(backbone: Extractor) -> None:
    assert sum(file.stat().st_size for file in builtin_folder().iterdir()) <= 1_000_000
    assert (backbone.name, backbone.dimensions) == ("builtin:backbone", 128)
    assert backbone.resize == "bicubic to 64 x 64, antialiased, not rounded; (x - 128) / 128"


def test_it_reads_pictures_that_it_has_not_seen(backbone: Extractor, examples: Examples) -> None:
    shares = accuracy(backbone.network, examples)  # type: ignore[arg-type]
    assert shares.keys() == HEADS.keys()
    assert {head: round(share, 3) for head, share in shares.items() if share < 0.9} == {}


def test_its_logits_are_of_shape_and_colour(backbone: Extractor) -> None:
    scenes = SceneSet(seed=SEED, style="mosaic")  # one object each
    _, logits = backbone([scenes.picture(i)[0] for i in range(60)])
    assert logits is not None
    assert logits.shape == (60, 13 * 9)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(60), atol=1e-4, rtol=0)
    right = 0
    for i, best in enumerate(logits.argmax(1).tolist()):
        (thing,) = scenes.scene(i)[0].things
        right += (HEADS["shape"][best // 9], HEADS["colour"][best % 9]) == (thing.shape, thing.colour)
    assert right >= 54


def test_its_features_tell_other_pictures_from_the_same_kind(backbone: Extractor) -> None:
    real = features_of(backbone, SceneSet(seed=SEED), 300)

    def distance(scenes: SceneSet) -> float:
        other = features_of(backbone, scenes, 100)
        return float(((other.mean(0) - real.mean(0)) / real.std(0)).norm())

    others = [SceneSet(style="neon"), SceneSet(style="chalk"), SceneSet(concept="wug"), SceneSet("marks")]
    assert min(map(distance, others)) > 3 * distance(SceneSet(seed=SEED + 1))


def test_facts_are_what_the_scene_says() -> None:
    things = (Thing("star", "red", "small", "left"), Thing("moon", "red", "small", "right"))
    assert facts_of(Scene(things, Background("blue", "striped"))) == {
        "shape": ["star", "moon"], "colour": ["red", "red"], "size": ["small", "small"], "place": ["left", "right"],
        "background": ["blue"], "pattern": ["striped"], "style": ["plain"], "objects": ["two"], "damage": ["none"],
    }  # fmt: skip
    assert facts_of(Scene(things[:1], None, "neon"))["background"] == ["of the style"]
    assert facts_of(None) == {"objects": ["none"]}


def test_half_of_a_batch_is_damaged_and_marked_so(examples: Examples) -> None:
    pixels, truth = select(examples, torch.arange(400))
    damaged, marked = damage(pixels, truth, torch.Generator().manual_seed(0))
    known = truth["damage"].sum(1) > 0
    kinds = marked["damage"]
    assert kinds[known].sum(0).tolist() == pytest.approx([190, 95, 95], abs=30)
    assert kinds[~known].sum() == 0  # of marks nobody knows
    clean, blurred, noisy = (kinds[:, i] > 0 for i in range(3))
    torch.testing.assert_close(damaged[clean], pixels[clean])

    def edges(x: Tensor) -> Tensor:
        return (x[..., 1:] - x[..., :-1]).abs().mean()

    assert edges(damaged[blurred]) < 0.8 * edges(pixels[blurred])
    assert edges(damaged[noisy]) > 1.5 * edges(pixels[noisy])


def test_it_is_made_to_the_same_bits_again(tmp_path: Path) -> None:
    made = []
    for name in ("first", "second"):
        make(tmp_path / name, count=60, epochs=1)
        made.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / name).iterdir()})
    assert made[0] == made[1]
    assert made[0].keys() == {"config.json", "model.safetensors"}
    other = open_scenes(tmp_path / "first")
    assert other.fingerprint() != open_backbone("builtin:backbone").fingerprint()
