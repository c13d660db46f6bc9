"""How sure a measured number is."""

from __future__ import annotations

import math
from collections.abc import Callable

NORMAL = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""
SMALL_T = (math.inf, 12.706205, 4.302653, 3.182446, 2.776445, 2.570582)


def wilson(hits: float, total: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927, JASA 22), of 95 % unless `z` says otherwise.

    Both numbers may be fractions: those of the count of independent tries that is as sure as what was measured.

    Raises:
        ValueError: nothing was counted, or more hits than tries.
    """
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"{hits} of {total}")
    share, spread = hits / total, z * z / total
    middle = share + spread / 2
    margin = z * math.sqrt((share * (1 - share) + spread / 4) / total)
    return max(0.0, (middle - margin) / (1 + spread)), min(1.0, (middle + margin) / (1 + spread))


def student_t(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, to four digits.

    From a table below 6 degrees of freedom, with fractions rounded down; else by the expansion of Abramowitz and
    Stegun, 26.7.5.
    """
    if freedom < len(SMALL_T):
        return SMALL_T[int(freedom)]
    z = NORMAL
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * freedom**4)
    )


def rank_interval(value: float, num_first: int, num_second: int, z: float = NORMAL) -> tuple[float, float]:
    """95 % interval of the chance that one of the first is below one of the second, as the Mann-Whitney U gives it.

    The limits are where the value is `z` standard errors away, each with the error at the limit (Newcombe 2006,
    Statistics in Medicine 25, part 2, method 5), so that they hold for few and at 0 and 1 too.

    Raises:
        ValueError: one side is empty, or the value is no chance.
    """
    if num_first < 1 or num_second < 1 or not 0 <= value <= 1:
        raise ValueError(f"{value} of {num_first} and {num_second}")
    others = (num_first + num_second) / 2 - 1

    def is_near(chance: float) -> bool:
        spread = 1 + others * ((1 - chance) / (2 - chance) + chance / (1 + chance))
        variance = chance * (1 - chance) * spread / (num_first * num_second)
        return abs(chance - value) <= z * math.sqrt(variance)

    return _last_near(value, 0.0, is_near), _last_near(value, 1.0, is_near)


def _last_near(near: float, far: float, is_near: Callable[[float], bool]) -> float:
    # Halving: 50 steps leave no more than the rounding of a float. At 0 and 1 the error is 0, so `far` is never near.
    for _ in range(50):
        middle = (near + far) / 2
        near, far = (middle, far) if is_near(middle) else (near, middle)
    return near
