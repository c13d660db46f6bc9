"""Wilson's interval, against values from the literature."""

import pytest

from gtl.evaluate.intervals import wilson


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
