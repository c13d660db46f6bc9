"""One player under DeepSpeed: forward, backward, step, and a state that depends neither on stage nor on world size."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gtl.config.recipe import Train
from gtl.imports import absent, uncollected
from gtl.train.checkpoint import State
from gtl.train.disk import Disk, open_disk
from gtl.train.flops import FlopMeter
from gtl.train.fragments import distinct, find_fragments, gather, refresh, whole_shape
from gtl.train.optimizer import MOMENTS, make_optimizer, read_moments, write_moments
from gtl.train.place import place, shard
from gtl.train.plan import BUCKET, REUSE
from gtl.train.schedule import ema_decay, learning_rate
from gtl.types import Batch, Losses

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Engine:
    """Trains what a tuner marked, under ZeRO 0, 1, 2 or 3.

    DeepSpeed runs in its fp32 mode at every stage and casts nothing: trained parameters are fp32, frozen ones of the
    dtype asked for, and the player's own autocast decides the arithmetic. Gradients accumulate in fp32.
    """

    def __init__(
        self,
        player: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        train: Train,
        *,
        stage: int,
        micro_batch: int,
        accumulation: int,
        device: torch.device | str,
        total_steps: int,
        dtype: torch.dtype = torch.float32,
        buffers: Mapping[str, Tensor] | None = None,
        memory: Mapping[str, Tensor] | None = None,
        aids: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        """Wrap a player. Collective; `torch.distributed` is initialised.

        Args:
            player: The module whose forward takes a `Batch` and returns `Losses` or None.
            parameters: What is trained of the model, by the names that checkpoints use.
            train: The recipe's section.
            stage: ZeRO stage, 0 to 3.
            micro_batch: Samples of one forward pass.
            accumulation: Forward passes of one optimizer step.
            device: Where the player runs.
            total_steps: Length of the run, for the learning rate.
            dtype: Of the weights that do not move; what is trained becomes fp32.
            buffers: What else of the model changes in training, the same on every rank, by the names that checkpoints
                use. Not at stage 3.
            memory: The same of the player itself, which is no part of the model.
            aids: What is trained of the player itself: it is in every state and not among the weights.

        Raises:
            UserError: the optimizer needs a library that isn't installed, or the disk for train.zero.offload: nvme is
                none, or too small.
        """
        self.steps = 0
        self.grad_norm = math.nan
        self.learning_rate = math.nan
        self._parameters = {**parameters, **(aids or {})}
        self._published = list(parameters)
        self._buffers, self._memory = dict(buffers or {}), dict(memory or {})
        self._after_step: Callable[[int, int], None] = getattr(player, "after_step", lambda done, total: None)
        self._train = train
        self._stage = stage
        self._accumulation = accumulation
        self._total_steps = total_steps
        self._device = torch.device(device)
        self._meter = None if train.compile else FlopMeter()
        self._micro_steps = 0
        self.shapes = {name: whole_shape(parameter) for name, parameter in self._parameters.items()}
        numel = sum(math.prod(shape) for shape in self.shapes.values())
        self.shapes |= {name: tuple(buffer.shape) for name, buffer in self._changing.items()}
        config = make_config(train, stage, micro_batch, accumulation, numel, self._device)
        self._disk = open_disk(train.zero.offload_folder) if train.zero.offload == "nvme" else None
        prepare_deepspeed(self._device)
        with offloading(self._disk):
            if stage == 3:
                shard(player, dtype, self._device, config)
            else:
                place(player, dtype, self._device, self._changing.values())
        self._optimizer = make_optimizer(list(self._parameters.values()), train)
        with offloading(self._disk, all_large=True):
            self._engine = initialize(player, self._optimizer, config)
        if stage == 0:
            spare_walks(self._engine, self._optimizer, list(self._parameters.values()))
        self._fragments = find_fragments(self._parameters, self._engine.optimizer, stage)
        self._partitions = distinct(self._fragments)
        if self._disk is not None:  # else the first step makes them, elsewhere
            for partition in self._partitions:
                moments = [self._disk.zeros(partition.shape, partition.dtype) for _ in MOMENTS]
                write_moments(self._optimizer, partition, moments, steps=0)
        copy = Tensor.clone if self._disk is None else self._disk.copy
        self._ema = [copy(partition.detach()) for partition in self._partitions] if train.ema else []

    @property
    def _changing(self) -> dict[str, Tensor]:
        """All that changes and has no gradient."""
        return {**self._buffers, **self._memory}

    def __call__(self, batch: Batch) -> Losses | None:
        """Run the player forward."""
        with self._meter.forward(batch) if self._meter else nullcontext():
            return self._engine(batch.to(self._device))

    def backward(self, total: Tensor) -> None:
        """Add the gradient of a micro-batch's share of the global mean."""
        # DeepSpeed averages over ranks; shares are to be summed. They also add up over micro-batches as they are.
        with self._meter.backward() if self._meter else nullcontext(), offloading(self._disk):
            self._engine.backward(total * dist.get_world_size(), scale_wrt_gas=False)
        self._micro_steps += 1
        if self._micro_steps % self._accumulation:
            self._engine.step()

    def take_flops(self) -> float:
        """Floating-point operations on this rank since the last call; 0 of compiled blocks, which can't be counted."""
        return self._meter.take() if self._meter else 0.0

    def step(self) -> None:
        """Make the optimizer step, once all micro-batches went backward. Skipped when the gradient isn't finite."""
        assert self._micro_steps and self._micro_steps % self._accumulation == 0
        train = self._train
        self.learning_rate = learning_rate(train.schedule, train.learning_rate, self.steps, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        if self._stage == 0:
            limit = train.max_grad_norm or math.inf
            self.grad_norm = float(nn.utils.clip_grad_norm_(self._parameters.values(), limit))
            if not math.isfinite(self.grad_norm):
                self._optimizer.zero_grad()
        self._engine.step()
        if self._stage > 0:
            self.grad_norm = float(self._engine.get_global_grad_norm())
        self.steps += 1
        if self._ema and math.isfinite(self.grad_norm):
            weight = 1.0 - ema_decay(train.ema or 0.0, self.steps)
            with torch.no_grad():
                torch._foreach_lerp_(self._ema, self._partitions, weight)
        self._after_step(self.steps, self._total_steps)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the player is in evaluation mode, without gradients, and has its averaged weights. Collective."""
        with in_evaluation(self._engine.module), self._averaged(), self._discovering():
            yield

    @contextmanager
    def _discovering(self) -> Iterator[None]:
        """Within it ZeRO-3 gathers what a module reads of its children's weights, as it does in the engine's forward.

        A grid may be the first to run a text encoder, whose embeddings look at the shape of such a weight.
        """
        tables: list[Any] = [module._parameters for module in self._engine.module.modules()]
        tables = [table for table in tables if hasattr(table, "_in_forward")]
        for table in tables:
            table._in_forward = True
        try:
            yield
        finally:
            for table in tables:
                table._in_forward = False

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within it the weights of the forward pass are the moving average's, if there is one. Collective."""
        if not self._train.ema:
            yield
        elif self._stage == 0:  # where the partitions are what the forward pass reads
            kept = [partition.detach().clone() for partition in self._partitions]
            torch._foreach_copy_(self._partitions, self._ema)
            yield
            torch._foreach_copy_(self._partitions, kept)
        else:
            self._expose(self._ema)
            yield
            self._expose(self._partitions)

    def _expose(self, values: Sequence[Tensor]) -> None:
        """Let the forward pass read other values than the partitions'. Collective."""
        whole = self._gather({"weight": values})
        for name, parameter in self._parameters.items():
            shape = self.shapes[name]
            value = whole[name]["weight"].to(self._device) if whole else torch.empty(shape, device=self._device)
            dist.broadcast(value, src=0)
            refresh(parameter, value)

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Whole trained weights by name, fp32 in CPU memory, on rank 0; {} elsewhere. Collective.

        With the model's buffers that change as it trains.
        """
        averaged = ema and bool(self._train.ema)
        kind = "ema" if averaged else "weight"
        values = self._ema if averaged else self._partitions
        weights = {name: kinds[kind] for name, kinds in self._gather({kind: values}, self._published).items()}
        return weights | copies(self._buffers)

    def state(self) -> State:
        """Everything that the next step depends on; its tensors on rank 0 only. Collective."""
        moments = [read_moments(self._optimizer, partition) for partition in self._partitions]
        values: dict[str, Sequence[Tensor]] = {"weight": self._partitions}
        for number, kind in enumerate(MOMENTS):
            values[kind] = [pair[number] for pair in moments]
        if self._train.ema:
            values["ema"] = self._ema
        buffers = {name: {"weight": value} for name, value in copies(self._changing).items()}
        return State(self.steps, self._gather(values) | buffers)

    def load_state(self, steps: int, tensors: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        """Go on from a state, of any stage and world size; every rank is given all of it, one parameter at a time.

        A state without EMA starts the average at its weights.
        """
        # Where they are, as far as they are there already.
        moments = [[each.zero_() for each in read_moments(self._optimizer, part)] for part in self._partitions]
        position = {id(partition): index for index, partition in enumerate(self._partitions)}
        given = set()
        for name, values in tensors:
            if name in self._changing:
                given.add(name)
                self._changing[name].copy_(values["weight"])
                continue
            parameter = self._parameters[name]
            assert tuple(values["weight"].shape) == self.shapes[name]
            given.add(name)
            refresh(parameter, values["weight"])
            if (fragment := self._fragments.get(name)) is None:
                continue
            index = position[id(fragment.partition)]
            fragment.write(fragment.partition, values["weight"])
            for moment, kind in zip(moments[index], MOMENTS, strict=True):
                fragment.write(moment, values[kind])
            if self._train.ema:
                fragment.write(self._ema[index], values.get("ema", values["weight"]))
        assert given == self.shapes.keys()
        for partition, pair in zip(self._partitions, moments, strict=True):
            write_moments(self._optimizer, partition, pair, steps)
        self.steps = steps

    def _gather(
        self, values: Mapping[str, Sequence[Tensor]], names: Iterable[str] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Whole tensors by name and kind on rank 0, from one tensor per kind and partition. Collective.

        Of some parameters, or of all.
        """
        position = {id(partition): index for index, partition in enumerate(self._partitions)}
        gathered: dict[str, dict[str, Tensor]] = {}
        for name in self._parameters if names is None else names:
            shape, fragment = self.shapes[name], self._fragments.get(name)
            index = None if fragment is None else position[id(fragment.partition)]
            own = [] if index is None else [column[index] for column in values.values()]
            whole = gather(fragment, own, len(values), shape, self._device, sharded=self._stage > 0)
            if whole:
                gathered[name] = dict(zip(values, whole, strict=True))
        return gathered


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory, on rank 0; {} elsewhere. All ranks have the same."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items() if dist.get_rank() == 0}


@contextmanager
def in_evaluation(player: nn.Module) -> Iterator[None]:
    """Within it a player is in evaluation mode, without gradients."""
    modes = {module: module.training for module in player.modules()}
    player.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def make_config(
    train: Train, stage: int, micro_batch: int, accumulation: int, numel: int, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's configuration: fp32 mode, and buffers no larger than the `numel` trained elements need."""
    bucket = min(max(numel + numel % 2, 2), BUCKET)  # DeepSpeed refuses odd ones
    # Pinned, so that copies overlap with arithmetic. To a disk nothing else leads, see `Disk.pinning`.
    pinned = device.type == "cuda" or train.zero.offload == "nvme"
    host = None if train.zero.offload == "none" else {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # Stage 0 leaves the norm to DeepSpeed unreported, so the engine clips there itself.
        "gradient_clipping": (train.max_grad_norm or 0.0) if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast on a CPU, and is compiled already
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": device.type == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # In elements. The defaults keep a whole 1B model live, which is what stage 3 is there to avoid.
            "stage3_max_live_parameters": REUSE,
            "stage3_max_reuse_distance": REUSE,
            "stage3_prefetch_bucket_size": 20_000_000,
            "offload_optimizer": host,
            "offload_param": host if stage == 3 else None,
            "zero_hpz_partition_size": train.zero.hpz,
        },
    }


def prepare_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed, for a device, into a process whose group stands already."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed takes the device by this number, whichever launcher set it before.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    with uncollected(), absent("mlflow"):  # the autotuner imports it, which takes four times as long as all the rest
        import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch 2.13 renamed; nobody else can mend that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Shared-memory collectives for CPUs are compiled on first use, for 12 s; gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def offloading(disk: Disk | None, all_large: bool = False) -> Iterator[None]:
    """Within it DeepSpeed offloads to a disk, if there is one; with `all_large` also what it makes without pinning."""
    if disk is None:
        yield
        return
    from deepspeed.accelerator import get_accelerator

    with (disk.making if all_large else disk.pinning)(get_accelerator()):
        yield


def initialize(player: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> DeepSpeedEngine:
    """`deepspeed.initialize` after `prepare_deepspeed`. Collective."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=player, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def spare_walks(engine: DeepSpeedEngine, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Let ZeRO-0 reduce and clear the gradients of what is trained, without a search of all modules for each.

    For an adapter in a large model the two searches take longer than the optimizer does.
    """

    def gradients() -> tuple[list[Tensor | None], dict[str, Tensor]]:
        for parameter in parameters:
            if parameter.grad is None:  # on this rank; the others reduce theirs
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in parameters], {}

    # DeepSpeed asks its own bf16 optimizer the same question.
    optimizer.get_grads_for_reduction = gradients  # type: ignore[attr-defined]
    engine.zero_grad = optimizer.zero_grad
