"""Learning rate and EMA decay as pure functions of the step."""

import math

from gtl.config.recipe import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0.

    The warm-up climbs linearly and reaches `peak` at step `warmup - 1`. Linear and cosine fall from there and are
    zero at `total_steps`, the first step that is not made.
    """
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.type == "constant":
        return peak
    progress = min((step - schedule.warmup) / max(total_steps - schedule.warmup, 1), 1.0)
    if schedule.type == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def ema_decay(limit: float, steps: int) -> float:
    """The decay of the moving average after `steps` optimizer steps: min(limit, (1 + steps) / (10 + steps)).

    Without this warm-up the average of a short run would still hold mostly the initial weights.
    """
    return min(limit, (1 + steps) / (10 + steps))
