"""Models and data for benchmarks, made from their configs with random values; nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.bench.configs import BUILTIN, MODELS, Config
from gtl.storage import Store
from gtl.types import DTYPES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gtl.data.dataset import Dataset
    from gtl.families.base import Conditions, DiffusionFamily

SHARD_BYTES = 2**31
"""Of a file of weights; what is drawn is in memory for one of them."""
STD = 0.02
"""Of weights that are matrices or kernels."""
WEIGHTS = "diffusion_pytorch_model"
CAPTION = "a picture"


def write_model(
    folder: Path, name: str, dtype: str = "fp32", overrides: Mapping[str, Config] | None = None
) -> DiffusionFamily:
    """A model in diffusers layout whose main part has random weights; its other parts are configs and tokenizers.

    Matrices are normal with a standard deviation of 0.02, biases 0, scales of norms 1. They are drawn on the GPU where
    there is one: a CPU takes minutes for twelve billion. The disk holds two bytes a parameter in bf16, four in fp32.

    Args:
        folder: Is made.
        name: In `gtl.bench.configs.MODELS`, or a built-in model, which is there already.
        dtype: Of the weights in the files, fp32 or bf16.
        overrides: Other values in the configs of some parts.
    """
    import torch

    from gtl.families import denoising, open_family

    if name.startswith(BUILTIN):
        return denoising(open_family(name))
    write_configs(folder, name, overrides)
    family = denoising(open_family(str(folder)))
    write_weights(family, getattr(torch, DTYPES[dtype]))
    return family


def write_configs(folder: Path, name: str, overrides: Mapping[str, Config] | None = None) -> None:
    """All of a model but its weights; see `write_model`."""
    model = MODELS[name]
    for part, config in model.parts.items():
        write_json(folder / part / "config.json", {**config, **(overrides or {}).get(part, {})})
    write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler)
    for part, (_, kind) in model.classes.items():
        if part not in model.parts:
            TOKENIZERS[kind](folder / part)
    classes = {part: list(kind) for part, kind in model.classes.items()}
    sampler = ["diffusers", model.scheduler["_class_name"]]
    write_json(folder / "model_index.json", {"_class_name": model.pipeline, **classes, "scheduler": sampler})


def write_clip_tokenizer(folder: Path) -> None:
    """A tokenizer in CLIP's files that knows no word, and reads 77 tokens as CLIP does."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    write_json(folder / "vocab.json", {start: 0, end: 1})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": start, "eos_token": end,
        "unk_token": end, "pad_token": end,
    })  # fmt: skip


def write_t5_tokenizer(folder: Path) -> None:
    """A tokenizer in T5's files that knows no word."""
    vocabulary = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": None, "truncation": None, "padding": None,
        "model": {"type": "Unigram", "unk_id": 2, "byte_fallback": False, "vocab": vocabulary},
    })  # fmt: skip
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0})


TOKENIZERS = {"CLIPTokenizer": write_clip_tokenizer, "T5TokenizerFast": write_t5_tokenizer}


def write_json(path: Path, value: Any) -> None:
    """Write JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_weights(family: DiffusionFamily, dtype: torch.dtype) -> None:
    """Random weights of the main part, a file at a time; several files have an index as diffusers writes it."""
    import torch
    from safetensors.torch import save_file

    tensors = family.load(family.main, device="meta").state_dict()
    shards: list[list[str]] = [[]]
    folder, size = family.folder / family.main, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        of = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        drawn = {name: draw(name, tensors[name].shape, dtype, rng).cpu() for name in names}
        save_file(drawn, folder / f"{WEIGHTS}{of}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(names, f"{WEIGHTS}{of}.safetensors")
    if len(shards) > 1:
        write_json(folder / f"{WEIGHTS}.safetensors.index.json", {"weight_map": weight_map})


def draw(name: str, shape: torch.Size, dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """A parameter's values, where the generator is."""
    import torch

    if len(shape) > 1:
        return torch.empty(shape, dtype=dtype, device=rng.device).normal_(0.0, STD, generator=rng)
    return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=rng.device)


def write_dataset(cache: Store, family: DiffusionFamily, images: int, dtype: str = "fp32") -> Dataset:
    """As many random images of the family's own size with one caption, as its encoders would leave them in a cache."""
    import torch

    from gtl.data.buckets import variant_key, variants
    from gtl.data.cache import Space, prompt_key
    from gtl.data.dataset import Cuts, Dataset
    from gtl.types import Entry, Record

    rng, stored = torch.Generator().manual_seed(0), getattr(torch, DTYPES[dtype])
    size = family.default_size
    shape = family.latent_shape(*size)
    entries, latents = [], {}
    for i in range(images):
        sha256 = hashlib.sha256(str(i).encode()).hexdigest()
        key = variant_key(sha256, size, variants(sha256, size, size)[0])
        mean, logvar = torch.randn(shape, generator=rng), torch.full(shape, -10.0)
        latents[key] = {"mean": mean.to(stored), "logvar": logvar.to(stored)}
        entries.append(Entry(Record(f"{i}", sha256, size, (CAPTION,)), size, (key,)))
    prompts = {prompt_key(caption): found for caption, found in encoded(family, stored, rng).items()}
    dataset = Dataset(cache, entries, "images-bench", "prompts-bench", Cuts(crops=1, flip=False, seed=0))
    Space(cache, "images-bench").write(latents)
    Space(cache, "prompts-bench").write(prompts)
    dataset.refresh()
    return dataset


def encoded(family: DiffusionFamily, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Conditions]:
    """Random conditions of the empty prompt and of a caption.

    What they are called and how large they are is asked of the encoders, which run on shapes alone.
    """
    import torch

    from gtl.train.footprint import embeddings

    conditions = embeddings(family)
    return {
        caption: {
            # What are no numbers are masks; nothing is masked.
            name: (torch.randn(like.shape, generator=rng).to(dtype) if like.is_floating_point()
                   else torch.ones(like.shape, dtype=like.dtype))
            for name, like in conditions.items()
        }
        for caption in ("", CAPTION)
    }  # fmt: skip


def random_part(family: DiffusionFamily, part: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A part with random weights, whether its files are there or not; frozen."""
    import torch

    module = family.load(part, dtype, "meta").to_empty(device=device)
    rng = torch.Generator(device).manual_seed(0)
    for name, tensor in module.state_dict().items():
        tensor.copy_(draw(name, tensor.shape, dtype, rng))
    return module


def write_adapter(main: nn.Module, part: str, targets: Sequence[str], rank: int, seed: int, folder: Path) -> Path:
    """A published LoRA of these layers with random weights, as large as a trained one's, in the layers' dtype."""
    import torch

    from gtl.adapters.formats import LoraExport, write_lora

    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for target in targets:
        weight = main.get_parameter(f"{target}.weight")
        out, *given = weight.shape
        a = torch.randn(rank, *given, generator=rng) / math.prod(given) ** 0.5
        b = torch.randn(out, rank, *(1 for _ in given[1:]), generator=rng) * STD
        tensors[f"{part}.{target}.lora_A.weight"] = a.to(weight.dtype)
        tensors[f"{part}.{target}.lora_B.weight"] = b.to(weight.dtype)
    write_lora(tensors, folder, config=LoraExport(rank, rank))
    return folder
