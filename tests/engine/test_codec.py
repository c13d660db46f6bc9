"""A codec that a second player judges: the same in shares, in the same bits after a stop, and what it leaves."""

from __future__ import annotations

import pytest
import torch

from gtl.train.checkpoint import State
from gtl.types import Item
from tests.engine.group import Group
from tests.engine.judged import GEOMETRY, STEPS, Outcome, play, recipe_of, same_after_a_stop, told

OBJECTIVE = {"type": "autoencode", "perceptual": 0.5, "adversarial": 0.1, "adversarial_after": 2}


def picture(rng: torch.Generator) -> Item:
    """Of 16 colours."""
    coarse = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=rng)
    return Item({}, {}, {}, GEOMETRY, pixels=coarse.repeat_interleave(8, 1).repeat_interleave(8, 2))


def run(stage: int, stop: int, states: dict[str, State] | None = None) -> Outcome:
    return play(recipe_of({"type": "full", "train": ["vae"]}, OBJECTIVE, stage), picture, stop, states)


@pytest.mark.parametrize("stage", [0, 2])
def test_both_learn_in_shares_what_they_learn_together(solo: Group, duo: Group, stage: int) -> None:
    ((rows, states, published),) = solo.run(run, 0, STEPS)
    (shared, again, _), _ = duo.run(run, stage, STEPS)
    for row, other in zip(told(rows), told(shared), strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-5)
    losses = [{name for name in row if name.endswith("_loss")} for row in told(rows)]
    # It has its turn after the codec: from the second step's on, and is listened to from the third.
    assert losses == [{"autoencoder_loss"}] + [{"autoencoder_loss", "discriminator_loss"}] * 4
    assert ["autoencoder_adversarial" in row for row in rows] == [False, False, True, True, True]
    assert published and all(name.startswith("vae.") for name in published)
    assert {name.partition(".")[0] for name in states["discriminator"].tensors} == {"network"}
    assert {name.partition(".")[0] for name in states["autoencoder"].tensors} == {"vae", "passed"}
    assert (states["autoencoder"].steps, states["discriminator"].steps) == (5, 4)
    assert all("ema" not in kinds for kinds in again["discriminator"].tensors.values())


def test_a_judged_codec_goes_on_in_the_same_bits(duo: Group) -> None:
    same_after_a_stop(lambda stop, states: duo.run(run, 0, stop, states)[0])
