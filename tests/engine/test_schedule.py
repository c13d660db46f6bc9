"""The learning rate and the EMA decay, step by step."""

import pytest

from gtl.config.recipe import Schedule
from gtl.train.schedule import ema_decay, learning_rate


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_rate_climbs_then_follows_its_type(type_: str, expected: list[float]) -> None:
    schedule = Schedule.model_validate({"type": type_, "warmup": 2})
    rates = [learning_rate(schedule, 2e-4, step, 6) for step in range(6)]
    assert rates == pytest.approx([2e-4 * factor for factor in expected], rel=1e-12)


def test_decaying_types_are_zero_at_the_end_and_beyond() -> None:
    for type_ in ("linear", "cosine"):
        schedule = Schedule.model_validate({"type": type_})
        assert learning_rate(schedule, 1.0, 10, 10) == 0.0
        assert learning_rate(schedule, 1.0, 12, 10) == 0.0


def test_warmup_longer_than_the_run_keeps_climbing() -> None:
    schedule = Schedule.model_validate({"type": "cosine", "warmup": 8})
    assert [learning_rate(schedule, 1.0, step, 4) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]


def test_ema_decay_warms_up_to_its_limit() -> None:
    assert [ema_decay(0.9, steps) for steps in (1, 8, 80, 1000)] == [2 / 11, 0.5, 0.9, 0.9]
    assert ema_decay(0.999, 1000) == 1001 / 1010
