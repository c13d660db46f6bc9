"""What a recipe takes of memory, from config files alone: its model runs once forward without weights or numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gtl.families import denoising, seeing
from gtl.train.quantize import FORMATS, frozen_linears
from gtl.train.work import Work, count
from gtl.tuners.depth import is_under
from gtl.types import Batch, Geometry, Item, UserError

if TYPE_CHECKING:
    from gtl.config import Recipe
    from gtl.families.base import DiffusionFamily, Family, SeeingFamily
    from gtl.train.assemble import Trainee

CPU = torch.device("cpu")
CUDA_FP32 = {
    "layer_norm", "group_norm", "rms_norm", "interpolate", "softmax", "log_softmax", "pow", "__pow__", "__rpow__",
    "exp", "log", "reciprocal", "rsqrt", "softplus", "mse_loss",
}  # fmt: skip
"""Of AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE in torch's ATen/autocast_mode.h what models use."""
CAPTION = "photo " * 2048
"""More than any text encoder reads."""


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass."""

    whole: float
    checkpointed: float
    """With train.activation_checkpointing: what goes into the blocks, what is kept outside of them, and the most that
    is kept inside of one."""


@dataclass(frozen=True)
class Block:
    """One block of the main part."""

    name: str
    parameters: int
    """Adapters not counted."""
    trained: int
    """Adapters counted."""
    nbytes: int
    """Of all its weights."""


@dataclass(frozen=True)
class Footprint:
    """The sizes of a model under a recipe."""

    parts: dict[str, int]
    """Parameters of every part that is in the training process, without adapters."""
    blocks: tuple[Block, ...]
    """Of the main part in execution order; () where it is not trained."""
    frozen_bytes: int
    """Of weights that do not move, and of buffers."""
    trained: int
    """Parameters that move."""
    fixed: Activations
    """Whatever the number of images: such as weights in the dtype of the arithmetic."""
    per_image: Activations
    decoded_bytes: int = 0
    """Of the largest quantised weight, which is there in the dtype of the arithmetic while its layer runs."""
    work: Work = Work()
    """What is computed for an image."""
    modules: int = 0
    """That have weights of their own: each is gathered by itself where weights are sharded."""

    @property
    def largest_bytes(self) -> int:
        """Of the largest block, which a worker holds whole for a moment where weights are sharded."""
        return max((block.nbytes for block in self.blocks), default=0)

    def activations(self, images: int, checkpointing: bool) -> float:
        """Bytes that a forward pass of so many images keeps."""
        fixed, each = self.fixed, self.per_image
        if checkpointing:
            return fixed.checkpointed + images * each.checkpointed
        return fixed.whole + images * each.whole


def measure(recipe: Recipe, trainee: Trainee, device: str = "cpu") -> Footprint:
    """Run an `outline` forward with two images and with three; its modules can do nothing else afterwards.

    Args:
        recipe: What it was assembled from.
        trainee: Is changed.
        device: cpu or cuda, which keeps more in bf16.

    Raises:
        UserError: the parts' configs do not fit together.
    """
    family, parts, whole = trainee.family, trainee.parts, nn.ModuleList(trainee.players.values())
    moving = {id(parameter) for parameter in whole.parameters() if parameter.requires_grad}  # a player's own, too
    adapters = moving if recipe.pair.frozen_base else set()
    parameters = {name: dict(part.named_parameters()) for name, part in parts.items()}

    def numel(chosen: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() for parameter in chosen if id(parameter) not in adapters)

    def nbytes(tensor: Tensor) -> int:
        return quantized.get(id(tensor), tensor.nbytes)

    def block(prefixes: tuple[str, ...]) -> Block:
        inside = [p for key, p in parameters[family.main].items() if is_under(key, prefixes)]
        trained = sum(p.numel() for p in inside if id(p) in moving)
        return Block(prefixes[0], numel(inside), trained, sum(map(nbytes, inside)))

    main = parts.get(family.main)
    blocks = [] if main is None else family.blocks(main)
    quantized, decoded = sizes_quantized(main, chain.from_iterable(blocks), recipe.model.quantization)
    modules = {} if main is None else {name: main.get_submodule(name) for names in blocks for name in names}
    tensors = {id(t): t for t in chain(whole.parameters(), whole.buffers())}
    # All that is asked of the weights themselves comes first: they are replaced below.
    counts = {name: numel(own.values()) for name, own in parameters.items()}
    listed = tuple(block(names) for names in blocks)
    frozen = sum(nbytes(tensor) for key, tensor in tensors.items() if key not in moving)
    trained = sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad)
    holders = sum(bool(module._parameters) for module in whole.modules())
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # such as the noise path's tables
    pretend(whole, mode)
    try:
        item = make_item(recipe, family)
        # Not with one image: a dimension of one saves copies.
        batches = [make_batch(trainee, item, images, mode) for images in (2, 3)]
        two, three = (run(trainee, batch, modules, mode, device) for batch in batches)
        work = count(trainee.players, batches[0], modules, mode)
    except Exception as error:  # shapes that do not fit, above all
        reason = " ".join(str(error).split())
        raise UserError(f"{recipe.model.source}: its parts do not run as their config.json say: {reason}") from error
    each = Activations(three.whole - two.whole, three.checkpointed - two.checkpointed)
    fixed = Activations(two.whole - 2 * each.whole, two.checkpointed - 2 * each.checkpointed)
    return Footprint(counts, listed, frozen, trained, fixed, each, decoded, work, holders)


def sizes_quantized(main: nn.Module | None, blocks: Iterable[str], kind: str | None) -> tuple[dict[int, int], int]:
    """Bytes of the weights that `quantize` would replace, by their ids, and of the largest one whole.

    An outline has them whole: they run in the same shapes and keep the same activations, and a plan needs no library.
    """
    if main is None or kind is None:
        return {}, 0
    weights = [layer.weight for _, layer in frozen_linears(main, blocks)]
    sizes = {id(weight): FORMATS[kind].nbytes(weight.numel()) for weight in weights}
    return sizes, max((weight.nbytes for weight in weights), default=0)


def pretend(module: nn.Module, mode: FakeTensorMode) -> None:
    """Put a module on meta onto a CPU that computes shapes only, in place.

    Libraries choose their kernels by the device, and meta has neither autocast nor attention that keeps no scores.
    """
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                fake = FakeTensor(mode, parameter.data, CPU)
                child._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = FakeTensor(mode, buffer.to("meta"), CPU)


class CudaAutocast(TorchFunctionMode):
    """Has a CPU's autocast run in fp32 what CUDA's does."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The call, on fp32 copies where it is one of those."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in CUDA_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs))
        return func(*args, **kwargs)


def run(
    trainee: Trainee, batch: Batch, blocks: Mapping[str, nn.Module], mode: FakeTensorMode, device: str
) -> Activations:
    """What the forward pass of every player keeps of a batch; the largest counts."""
    found = []
    for player in trainee.players.values():
        with mode, CudaAutocast() if device == "cuda" else nullcontext(), saved_by(player, blocks) as saved:
            player(batch)
        found.append(saved.activations())
    return Activations(max(each.whole for each in found), max(each.checkpointed for each in found))


def make_item(recipe: Recipe, family: Family) -> Item:
    """An image of the recipe's resolution with a caption at its longest, as the data set would give it."""
    side = max(recipe.data.resolution // family.multiple, 1) * family.multiple
    latents, conditions, pixels = {}, {}, None
    if recipe.needs.images == "pixels":
        pixels = torch.zeros(3, side, side, dtype=torch.uint8)
    else:
        latents = features(seeing(family), side) if family.heads else moments(denoising(family), side)
    if recipe.needs.text == "embeddings":
        conditions = embeddings(denoising(family))
    geometry = Geometry((side, side), (0, 0), (side, side))
    original = latents if recipe.needs.originals else None
    return Item(latents, conditions, conditions, geometry, CAPTION, pixels, original=original)


def make_batch(trainee: Trainee, item: Item, images: int, mode: FakeTensorMode) -> Batch:
    """A batch of copies of an image, as the loader would make it."""
    objective = trainee.objective
    # In a stratum, where no caption is dropped.
    samples = [objective.draw(item, torch.Generator().manual_seed(0), stratum=0) for _ in range(images)]
    tensors: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in objective.collate(samples).items()}
    return Batch(tensors, mode.from_tensor(torch.full((images,), 1 / images)))


def moments(family: DiffusionFamily, side: int) -> dict[str, Tensor]:
    """Zeros in the shape of a square image's moments."""
    if family.codec is None:
        shape = family.latent_shape(side, side)
        return {name: torch.zeros(shape) for name in ("mean", "logvar")}
    codec = family.load(family.codec, device="meta")
    with torch.no_grad():
        found = family.encode_images(codec, torch.empty(1, 3, side, side, device="meta"))
    return {name: torch.zeros(value.shape[1:]) for name, value in found.items()}


def features(family: SeeingFamily, side: int) -> dict[str, Tensor]:
    """Zeros in the shape of a square image's features."""
    return {name: torch.zeros(shape) for name, shape in family.feature_shapes(side, side).items()}


def embeddings(family: DiffusionFamily) -> dict[str, Tensor]:
    """Zeros in the shape of a prompt's conditions at their longest."""
    encoders = {name: family.load(name, device="meta") for name in family.encoders}
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # meta will not do: language models look at masks
    for encoder in encoders.values():
        pretend(encoder, mode)
    tokens = {name: mode.from_tensor(ids) for name, ids in family.collate(family.tokenize([CAPTION])).items()}
    with mode, torch.no_grad():
        found = family.encode_tokens(encoders, tokens)
    return {name: torch.zeros(value.shape[1:], dtype=value.dtype) for name, value in found.items()}


class Saved:
    """Tensors that autograd keeps, each storage once, by the block that made it do so."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        """Nothing is kept yet; parameters are there anyway."""
        self._seen = {storage_of(parameter) for parameter in parameters}
        self._inside: dict[str, dict[int, int]] = {}
        self._outside = 0.0
        self._inputs: dict[int, int] = {}
        self._block: str | None = None
        self._alive: list[Tensor] = []
        """So that no two storages get the same address."""

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor."""
        self._alive.append(tensor)
        if (storage := storage_of(tensor)) in self._seen:
            return tensor
        self._seen.add(storage)
        size = tensor.untyped_storage().nbytes()
        if self._block is None:
            self._outside += size
        else:
            self._inside.setdefault(self._block, {})[storage] = size
        return tensor

    def enter(self, block: str) -> None:
        """What follows is inside a block."""
        self._block = block

    def leave(self, inputs: object, outputs: object) -> None:
        """The block is through."""
        self._block = None
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(outputs)):
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
            self._alive += tensors
            self._inputs |= {storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}

    def activations(self) -> Activations:
        """The sums."""
        whole = self._outside + sum(sum(kept.values()) for kept in self._inside.values())
        # What goes into a block is there anyway while it is recomputed.
        again = (sum(kept[each] for each in kept.keys() - self._inputs) for kept in self._inside.values())
        return Activations(whole, self._outside + sum(self._inputs.values()) + max(again, default=0.0))


def storage_of(tensor: Tensor) -> int:
    """Address of what a tensor, or a view of it, lies in."""
    address: int = tensor.untyped_storage()._cdata
    return address


@contextmanager
def saved_by(player: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[Saved]:
    """Counts what autograd keeps of a forward pass within it."""
    saved = Saved(player.parameters())

    def entering(name: str) -> Any:
        return lambda *_: saved.enter(name)

    def leaving(module: nn.Module, args: object, kwargs: object, outputs: object) -> None:
        saved.leave((args, kwargs), outputs)

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.callback(block.register_forward_pre_hook(entering(name)).remove)
            stack.callback(block.register_forward_hook(leaving, with_kwargs=True).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor))
        yield saved
