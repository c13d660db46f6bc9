"""AdamW in full or 8-bit precision, and its moments as plain fp32 tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gtl.config.recipe import Train
from gtl.types import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256
"""Elements that share one scale in bitsandbytes' 8-bit moments."""


def make_optimizer(parameters: Sequence[nn.Parameter], train: Train) -> torch.optim.Optimizer:
    """AdamW as the recipe says, fused.

    Raises:
        UserError: adamw_8bit without bitsandbytes.
    """
    asked = train.optimizer
    if asked.type == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise UserError(
                "train.optimizer.type: 'adamw_8bit' needs bitsandbytes, which is not installed: "
                "pip install bitsandbytes, or use adamw"
            ) from None
        return AdamW8bit(
            parameters, train.learning_rate, betas=asked.betas, eps=asked.eps, weight_decay=asked.weight_decay
        )
    return torch.optim.AdamW(
        parameters, train.learning_rate, betas=asked.betas, eps=asked.eps, weight_decay=asked.weight_decay,
        fused=True,
    )  # fmt: skip


def read_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """`exp_avg` and `exp_avg_sq` of a parameter or flat partition, fp32; zeros before the first step.

    8-bit moments come dequantised.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return [torch.zeros_like(parameter) for _ in MOMENTS]
    if "exp_avg" in state:
        return [state[name] for name in MOMENTS]
    return [dequantise(state, number) for number in (1, 2)]


def write_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, moments: Sequence[Tensor], steps: int) -> None:
    """Set the moments and the step count of a parameter or flat partition, as if it had made `steps` steps.

    8-bit moments are quantised again: a run goes on from them as closely as 8 bits tell, not bit for bit.
    """
    if not hasattr(optimizer, "init_state"):
        step = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = {"step": step, **dict(zip(MOMENTS, moments, strict=True))}
        return
    group = optimizer.param_groups[0]
    members, group["params"] = group["params"], [parameter]  # stage 3 leaves the group empty between steps
    optimizer.init_state(group, parameter, 0, 0)
    group["params"] = members
    state = optimizer.state[parameter]
    state["step"] = steps
    for number, values in enumerate(moments, start=1):
        quantise(state, number, values)


def dequantise(state: dict[str, Tensor], number: int) -> Tensor:
    """The first or second moment in a bitsandbytes state; small tensors are kept in fp32 there."""
    stored = state[f"state{number}"]
    if stored.dtype == torch.float32:
        return stored
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(
        stored, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=BLOCK
    ).view(stored.shape)


def quantise(state: dict[str, Tensor], number: int, values: Tensor) -> None:
    """Put the first or second moment into a bitsandbytes state."""
    stored = state[f"state{number}"]
    if stored.dtype == torch.float32:
        stored.copy_(values)
        return
    from bitsandbytes.functional import quantize_blockwise

    codes, scales = quantize_blockwise(values, code=state[f"qmap{number}"], blocksize=BLOCK)
    stored.copy_(codes)
    state[f"absmax{number}"].copy_(scales.absmax)
