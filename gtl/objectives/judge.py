"""A second player: a network that tells what is drawn from what is in the data, and whoever draws listens to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call

from gtl.objectives.adversarial import autocast, critic_loss, slope
from gtl.types import Batch, Losses

Seen = tuple[Tensor, ...]
"""What the network is given of some pictures: the pictures themselves, or several features of them; [B, ...] each."""


class Judged(nn.Module):
    """A player that heeds a second one, from some step on."""

    passed: Tensor

    def __init__(self, after: int | None) -> None:
        """`after` so many steps the second player begins; None: there is none."""
        super().__init__()
        self._after = after
        self._judge: tuple[Judge, ...] = ()
        if after is not None:
            self.register_buffer("passed", torch.zeros((), dtype=torch.long))
            """Steps made."""

    def heed(self, judge: Judge) -> None:
        """Listen to a second player; not as a submodule, which this player's engine would take for its own."""
        self._judge = (judge,)

    @property
    def is_judged(self) -> bool:
        """Whether the second player has begun."""
        if not self._judge:
            return False
        # A plan has shapes alone, and has to have room for the run as it will be.
        return isinstance(self.passed, FakeTensor) or int(self.passed) >= (self._after or 0)

    def shown(self, batch: Batch) -> tuple[Seen, Seen]:
        """What the second player is to see of the batch's pictures, and the same of what is drawn; no gradient."""
        raise NotImplementedError

    def after_step(self, done: int, total: int) -> None:
        """Count."""
        if self._judge:
            self.passed.fill_(done)


class Judge(nn.Module):
    """Tells what is in the data from what the first player draws, place by place."""

    def __init__(self, network: nn.Module, player: Judged, dtype: torch.dtype, r1: float = 0.0) -> None:
        """Trained weights are fp32 whatever the arithmetic's dtype; other than fp32 it runs under autocast.

        Args:
            network: From what it is shown to logits [B, ...], or several of them, which then count alike; above 0 for
                places of what is in the data.
            player: Whom it judges.
            dtype: Of the arithmetic.
            r1: gamma of gamma/2 times the squared gradient of a place's logit in what the network is shown of the data
                (arXiv 1801.04406; of features as in arXiv 2311.17042, section 3.2).
        """
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.r1 = r1
        self._player = (player,)  # not as a submodule, which this player's engine would take for its own

    def forward(self, batch: Batch) -> Losses | None:
        """The batch's share of the mean hinge loss; None until something is drawn."""
        player = self._player[0]
        if not player.is_judged:
            return None
        with torch.no_grad():
            real, drawn = player.shown(batch)
        if self.r1:
            real = tuple(each.detach().requires_grad_() for each in real)
        with autocast(real[0], self.dtype):
            # In one pass, as an engine's gradients need it.
            logits = rows(self.network(*(torch.cat(both) for both in zip(real, drawn, strict=True))))
        of_real, of_drawn = zip(*(each.chunk(2) for each in logits), strict=True)
        losses = [critic_loss("hinge", *both).mean(1) for both in zip(of_real, of_drawn, strict=True)]
        loss, parts = mean_of(losses), {"real_logit": overall(of_real), "drawn_logit": overall(of_drawn)}
        if self.r1:
            # Each is of all that is shown; what a logit is not made of adds nothing.
            slopes = [slope(each.sum(1), seen) / each.shape[1] for each, seen in zip(of_real, real, strict=True)]
            parts["r1"] = mean_of(slopes)
            loss = loss + self.r1 / 2 * parts["r1"]
        return Losses(batch.share(loss), {name: batch.share(value).detach() for name, value in parts.items()})

    def judge(self, *drawn: Tensor) -> Tensor:
        """Mean logit of each of what is drawn, [B], differentiable in it and not in the weights."""
        weights = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        with autocast(drawn[0], self.dtype):
            logits = functional_call(self.network, weights, drawn)
        return overall(rows(logits))


def rows(logits: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Logits as [B, places] each, fp32."""
    return [each.float().flatten(1) for each in (logits if isinstance(logits, tuple) else (logits,))]


def mean_of(values: list[Tensor]) -> Tensor:
    """Of several [B], [B]."""
    return torch.stack(values).mean(0)


def overall(logits: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Mean of each sample's logits, [B]; those of fewer places count as much as those of many."""
    return mean_of([each.mean(1) for each in logits])
