"""Floating-point operations of training, counted as they are executed, and what a GPU could do at most.

Utilisation is that of Chowdhery et al. 2022 (arXiv 2204.02311, appendix B) with the operations that are really needed:
forward and backward, where frozen weights take no gradient, without what activation checkpointing does twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from gtl.train.gpus import find_gpu
from gtl.types import Batch

Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


FORMULAS = {
    **flop_registry,
    # What torch's own counter knows of GPUs only.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
    # What adds a slot's update in place, see `gtl.adapters.slot_layers`.
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
}
"""Operator -> operations of a call."""


class Counter(TorchDispatchMode):
    """Operations within it.

    Not torch's `FlopCounterMode`: that takes apart operators that have a kernel (`silu_backward`), which rounds
    differently, so that a run which measures after a resume would end in other bits.
    """

    def __init__(self) -> None:
        """Nothing is counted."""
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operator as it is, and count it."""
        result = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class FlopMeter:
    """Operations of one player's micro-batches. Each shape of a batch is measured once: counting costs time."""

    _measuring: FlopMeter | None = None
    """The one that counts at this moment; what is recomputed is found out about from within the model."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._known: dict[tuple[Any, ...], float] = {}
        self._key: tuple[Any, ...] = ()
        self._sum = 0.0

    @contextmanager
    def forward(self, batch: Batch) -> Iterator[None]:
        """Around a forward pass."""
        self._key = tuple((name, tuple(tensor.shape)) for name, tensor in batch.tensors.items())
        self._is_new = self._key not in self._known and torch.is_grad_enabled()
        if self._is_new:
            self._known[self._key] = 0.0
        with self._count():
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around the backward pass that belongs to it; the pair is then added to the sum."""
        with self._count():
            yield
        self._sum += self._known[self._key]

    def take(self) -> float:
        """The sum since the last call."""
        taken, self._sum = self._sum, 0.0
        return taken

    @contextmanager
    def _count(self) -> Iterator[None]:
        if not self._is_new:
            yield
            return
        FlopMeter._measuring = self
        try:
            with Counter() as counter:
                yield
        finally:
            FlopMeter._measuring = None
        self._known[self._key] += counter.total

    @contextmanager
    def _discount(self) -> Iterator[None]:
        counter = Counter()
        try:
            with counter:
                yield
        finally:  # torch leaves a recomputation by an exception, once it has what it needs
            self._known[self._key] -= counter.total


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: what is recomputed while somebody counts is taken off again."""
    meter = FlopMeter._measuring
    return nullcontext(), nullcontext() if meter is None else meter._discount()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that a GPU can do at most in bf16; None for what is not in the table."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.flops if gpu else None
