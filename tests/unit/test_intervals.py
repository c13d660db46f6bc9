"""Intervals, against values from the literature."""

import pytest

from gtl.evaluate.intervals import rank_interval, student_t, wilson


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_newcombe_1998_table_1(hits: int, total: int, low: float, high: float) -> None:
    assert wilson(hits, total) == pytest.approx((low, high), abs=5e-5)


def test_it_mirrors_and_refuses_nonsense() -> None:
    low, high = wilson(3, 10)
    assert wilson(7, 10) == pytest.approx((1 - high, 1 - low))
    for hits, total in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            wilson(hits, total)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (3, 3.1824), (5.9, 2.5706), (6, 2.4469), (7, 2.3646), (10, 2.2281), (29, 2.0452), (1e9, 1.9600)],
)
def test_students_t_is_the_tables(freedom: float, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, abs=1e-4)


def test_a_rank_interval_holds_where_the_error_at_the_limit_says() -> None:
    for value, first, second in ((0.75, 40, 50), (1.0, 100, 3), (0.0, 4, 9)):
        for limit in rank_interval(value, first, second):
            if limit in (0, 1):
                continue
            others = (first + second) / 2 - 1
            spread = 1 + others * ((1 - limit) / (2 - limit) + limit / (1 + limit))
            error = (limit * (1 - limit) * spread / (first * second)) ** 0.5
            assert abs(limit - value) / error == pytest.approx(1.959964, rel=1e-6)
    low, high = rank_interval(0.3, 10, 20)
    assert rank_interval(0.7, 20, 10) == pytest.approx((1 - high, 1 - low))
    for wrong in ((1.1, 3, 3), (0.5, 0, 3), (0.5, 3, 0)):
        with pytest.raises(ValueError):
            rank_interval(*wrong)
