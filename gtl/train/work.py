"""What a recipe computes for an image, counted on shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gtl.train.flops import Counter

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gtl.types import Batch


@dataclass(frozen=True)
class Work:
    """Floating-point operations of an image, as `gtl.train.flops` counts them."""

    forward: float = 0.0
    backward: float = 0.0
    """Frozen weights take no gradient, and what is before the first trained one is not reached."""
    again: float = 0.0
    """Forward once more with train.activation_checkpointing: the blocks that the backward pass reaches."""
    unreached: tuple[str, ...] = ()
    """Blocks that it does not reach."""

    def of_image(self, checkpointing: bool) -> float:
        """All that is executed."""
        return self.forward + self.backward + (self.again if checkpointing else 0.0)


def count(
    players: Mapping[str, nn.Module], batch: Batch, blocks: Mapping[str, nn.Module], mode: FakeTensorMode
) -> Work:
    """Run players forward and backward on a batch whose tensors have no numbers.

    Args:
        players: Their parameters are in the mode.
        batch: In the mode too.
        blocks: What checkpointing would run twice, by name.
        mode: Makes shapes of all operations.
    """
    images = len(batch.weight)
    forward = backward = again = 0.0
    reached: set[str] = set()
    for player in players.values():
        with mode, Counter() as counter, timed(blocks, counter) as inside:
            losses = player(batch)
        forward += counter.total
        if losses is None:
            continue
        with mode, Counter() as counter:
            losses.total.backward()
        backward += counter.total
        again += sum(inside.values())
        reached |= inside.keys()
    unreached = tuple(name for name in blocks if name not in reached)
    return Work(forward / images, backward / images, again / images, unreached)


@contextmanager
def timed(blocks: Mapping[str, nn.Module], counter: Counter) -> Iterator[dict[str, float]]:
    """Within it the operations of each block are kept, if what comes out of it takes a gradient."""
    inside: dict[str, float] = {}
    begun: dict[str, float] = {}

    def entering(name: str) -> Any:
        def enter(*_: object) -> None:
            begun[name] = counter.total

        return enter

    def leaving(name: str) -> Any:
        def leave(module: nn.Module, args: object, outputs: object) -> None:
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(outputs)):
                inside[name] = inside.get(name, 0.0) + counter.total - begun[name]

        return leave

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.callback(block.register_forward_pre_hook(entering(name)).remove)
            stack.callback(block.register_forward_hook(leaving(name)).remove)
        yield inside
