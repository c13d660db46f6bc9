"""Nearness to training images against plain loops, and what few held-out images can tell."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gtl.evaluate import memorization as module
from gtl.evaluate.estimate import difference
from gtl.evaluate.memorization import Match, Memorization, memorization
from gtl.evaluate.scores import score


def images(number: int, seed: int, width: int = 8) -> Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def copies(train: Tensor, number: int, seed: int, noise: float = 0.05) -> Tensor:
    return train[torch.arange(number) % len(train)] + noise * images(number, seed, train.shape[1])


def loops(samples: Tensor, train: Tensor) -> list[tuple[int, float]]:
    units = [(rows / rows.norm(dim=1, keepdim=True)).numpy() for rows in (samples.double(), train.double())]
    nearest = []
    for sample in units[0]:
        distances = [1 - float(sample @ other) for other in units[1]]
        nearest.append((int(np.argmin(distances)), min(distances)))
    return nearest


def test_matches_are_the_nearest_training_images_the_worst_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 7)
    train = images(40, 0)
    samples = torch.cat([images(20, 1), 3 * train[17:18]])  # a copy, brighter
    found = memorization(samples, train, images(10, 2))
    expected = sorted((distance, i, j) for i, (j, distance) in enumerate(loops(samples, train)))
    assert [(match.sample, match.train) for match in found.matches] == [(i, j) for _, i, j in expected]
    assert [match.distance for match in found.matches] == pytest.approx([d for d, _, _ in expected], abs=1e-12)
    assert found.matches[0] == Match(20, 17, pytest.approx(0, abs=1e-12))


def test_the_rank_is_the_share_of_pairs_with_the_sample_nearer() -> None:
    train, samples, held_out = images(30, 0), images(25, 1), images(12, 2)
    found = memorization(samples, train, held_out)
    own, known = ([distance for _, distance in loops(rows, train)] for rows in (samples, held_out))
    pairs = [[(a < b) + (a == b) / 2 for b in known] for a in own]
    assert found.rank.value == pytest.approx(np.mean(pairs))
    assert found.rank.fake.tolist() == pytest.approx(np.mean(pairs, axis=1))
    assert found.rank.real is not None
    assert found.rank.real.tolist() == pytest.approx(np.mean(pairs, axis=0)[np.argsort(known)])
    # U = 25 * 12 * value, its mean without copying 150 and its deviation sqrt(25 * 12 * 38 / 12).
    assert found.c_t == pytest.approx((150 - np.sum(pairs)) / math.sqrt(25 * 12 * 38 / 12))
    same = memorization(held_out, train, held_out)
    assert same.rank.value == 0.5 and same.c_t == 0


def test_copies_are_found_and_new_images_are_not_accused() -> None:
    train, held_out = images(60, 0), images(50, 1)
    copied = memorization(copies(train, 40, 2), train, held_out)
    assert copied.rank.value > 0.95 and copied.rank.low is not None and copied.rank.low > 0.85 and copied.c_t < -6
    assert copied.rank.note == "samples are nearer to training images than held-out images are"
    assert copied.near is not None and copied.near.value > 0.9
    new = memorization(images(40, 3), train, held_out)
    assert new.rank.note == "samples are as near to training images as held-out images are, as far as 50 of these tell"
    assert new.near is not None and new.near.low is not None and new.near.low <= 0.05
    far = memorization(images(40, 3) - 2, train + 2, held_out + 2)
    assert far.rank.note == "samples are farther from training images than held-out images are"
    partly = memorization(torch.cat([copies(train, 10, 2), images(30, 3)]), train, held_out)
    assert partly.near is not None and partly.near.value == pytest.approx(0.25, abs=0.08)
    assert {match.train for match in partly.matches[:8]} <= set(range(10))
    apart = difference(copied.rank, new.rank)
    assert apart.is_clear and apart.better == 1  # lower is better
    assert score("memorization", {"samples": train, "train": train, "held_out": held_out}).value == 1


def test_few_held_out_images_say_when_they_cannot_tell() -> None:
    train = images(60, 0)
    one = memorization(copies(train, 40, 1, noise=0), train, images(1, 2))
    assert one.rank.value == 1 and one.rank.low is not None and one.rank.low < 0.5
    assert one.rank.note == "cannot tell: of 40 samples and 1 held-out images not even copies would stand out"
    assert one.near is None and len(one.matches) == 40
    three = memorization(copies(train, 40, 1), train, images(3, 2))
    assert three.rank.note == "samples are nearer to training images than held-out images are" and three.near is None
    assert memorization(images(40, 3), train, images(18, 4)).near is None
    assert memorization(images(40, 3), train, images(19, 4)).near is not None


@pytest.mark.parametrize(("num_held_out", "num_samples"), [(3, 40), (8, 100), (40, 40)])
def test_new_images_are_seldom_called_nearer(num_held_out: int, num_samples: int) -> None:
    found: list[Memorization] = []
    for seed in range(300):
        train, held_out = images(25, 3 * seed), images(num_held_out, 3 * seed + 1)
        found.append(memorization(images(num_samples, 3 * seed + 2), train, held_out))
    nearer = np.mean([trial.rank.low > 0.5 for trial in found])  # type: ignore[operator]
    farther = np.mean([trial.rank.high < 0.5 for trial in found])  # type: ignore[operator]
    assert nearer <= 0.055 and farther <= 0.055  # 0.025 and three standard errors of 300 runs
    near = [trial.near.value for trial in found if trial.near is not None]
    assert (len(near) == 0) == (num_held_out < 19)
    assert not near or np.mean(near) <= 0.05
