"""Models that learned a flow: their loss, schedules, LoRA files and pictures against the papers and diffusers."""

import copy
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from gtl.adapters import Card, Registry, apply
from gtl.adapters.card import base_of
from gtl.adapters.formats import DIFFUSERS_WEIGHTS
from gtl.config.objectives import DenoiseObjective, Timesteps
from gtl.config.tuners import FreezeTuner, LoraTuner
from gtl.evaluate.samples import encode
from gtl.families import open_family
from gtl.families.flux import image_ids
from gtl.families.latent_transformer import pack, unpack
from gtl.generate.command import run
from gtl.generate.engine import Engine
from gtl.generate.images import load_parts
from gtl.generate.request import Request, check
from gtl.objectives import make_objective
from gtl.objectives.denoise import conditions_of
from gtl.tuners import make_tuner
from gtl.tuners.depth import is_under
from gtl.types import Batch, Geometry, Item, UserError
from tests.contract.test_families import guidance_of
from tests.tiny import (
    absent,
    as_asked,
    make_flux,
    make_flux2,
    make_flux2_klein,
    make_qwen_image,
    make_sana,
    make_sd3,
    make_z_image,
    sana_instruction,
    write_json,
)

MODELS: dict[str, Callable[[Path], Path]] = {
    "sd3": make_sd3,
    "sd35": lambda folder: make_sd3(
        folder, t5=False, transformer_config={"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
    ),
    "flux-dev": make_flux,
    "flux-schnell": lambda folder: make_flux(folder, dev=False),
    "flux2": make_flux2,
    "flux2_klein": make_flux2_klein,
    "flux2_klein-distilled": lambda folder: make_flux2_klein(folder, distilled=True),
    "qwen_image": make_qwen_image,
    "z_image": make_z_image,
    "sana": make_sana,
    "sana15": lambda folder: make_sana(
        folder, transformer_config={"qk_norm": "rms_norm_across_heads"},
        scheduler_config={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    ),
}
SAME = 0.1 / 255
"""Mean absolute difference of pixels in [0, 1]."""
DIFFERENT = 5 / 255
SIZES = [(64, 64), (96, 64)]


class Model:
    """A model, its parts, and diffusers' own pipeline of it."""

    def __init__(self, name: str, folder: Path) -> None:
        from diffusers import DiffusionPipeline

        self.name, self.folder = name, folder
        self.family: Any = open_family(str(self.folder))
        self.parts = load_parts(self.family, [], device="cpu", dtype=torch.float32)
        self.pipeline: Any = DiffusionPipeline.from_pretrained(self.folder, **absent(self.folder))
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def negative(self) -> str:
        return "blurry" if self.family.classifier_free else ""


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, MODELS[request.param](tmp_path_factory.mktemp(request.param)))


def plain_output(model: Model, noisy: Tensor, sigma: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The transformer's output, by diffusers' own calls and helpers; `sigma` is the share of noise."""
    transformer = model.parts["transformer"]
    states = conditions["encoder_hidden_states"]
    masks = conditions.get("encoder_hidden_states_mask", torch.ones(states.shape[:2], dtype=torch.bool))
    if model.family.name == "z_image":
        texts = [each[mask] for each, mask in zip(states, masks, strict=True)]
        # Its time runs towards the picture, and so does its flow.
        return -torch.stack(transformer(list(noisy[:, :, None]), 1 - sigma, texts).sample)[:, :, 0]
    pipeline, (batch, channels, height, width) = model.pipeline, noisy.shape
    if model.family.name.startswith("flux2"):
        packed = transformer(
            pipeline._pack_latents(noisy), timestep=sigma, encoder_hidden_states=states,
            guidance=torch.ones(batch) if model.name == "flux2" else None,
            img_ids=pipeline._prepare_latent_ids(noisy), txt_ids=pipeline._prepare_text_ids(states),
        ).sample  # fmt: skip
        return packed.mT.reshape(noisy.shape)
    if model.family.name == "qwen_image":
        packed = transformer(
            pipeline._pack_latents(noisy, batch, channels, height, width), timestep=sigma,
            encoder_hidden_states=states, encoder_hidden_states_mask=masks,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
        ).sample  # fmt: skip
        return pipeline._unpack_latents(packed, 8 * height, 8 * width, 8)[:, :, 0]
    texts = {name: value for name, value in conditions.items() if name != "guidance"}
    if model.family.name in ("sd3", "sana"):
        return transformer(noisy, timestep=1000 * sigma, **texts).sample
    packed = transformer(
        pipeline._pack_latents(noisy, batch, channels, height, width), timestep=sigma, **texts,
        guidance=torch.ones(batch) if model.name == "flux-dev" else None,
        img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(states.shape[1], 3),
    ).sample  # fmt: skip
    return pipeline._unpack_latents(packed, 8 * height, 8 * width, 8)


def flow_batch(model: Model, config: DenoiseObjective) -> Batch:
    """Three draws of one picture."""
    family = model.family
    rng = torch.Generator().manual_seed(0)
    shape = family.latent_shape(64, 64)
    moments = {"mean": torch.randn(shape, generator=rng), "logvar": torch.randn(shape, generator=rng) - 4}
    encoders = {part: model.parts[part] for part in family.encoders}
    with torch.no_grad():
        dog, null = family.encode_prompts(encoders, ["a photo of a dog", ""])
    item = Item(moments, dog, null, Geometry((64, 64), (0, 0), (64, 64)))
    objective = make_objective(config, family)
    draws = [objective.draw(item, torch.Generator().manual_seed(seed)) for seed in range(3)]
    return Batch(objective.collate(draws), torch.tensor([0.5, 0.25, 0.25]))


def test_the_loss_is_that_of_the_paper(model: Model) -> None:
    """E |v(z_s, s) - (noise - x_0)|^2 with z_s = (1 - s) x_0 + s noise (arXiv 2403.03206, section 3)."""
    config = DenoiseObjective(timesteps=Timesteps(distribution="logit_normal", shift="model"))
    batch = flow_batch(model, config)
    player = make_objective(config, model.family).players(model.parts, torch.float32)["denoiser"]
    losses = player(batch)
    clean, noise, t = (batch.tensors[name] for name in ("clean", "noise", "t"))
    assert len(set(t.tolist())) == 3 and t.min() > 0 and t.max() < 1000
    sigma = (t / 1000)[:, None, None, None]
    conditions = conditions_of(batch.tensors)
    velocity = plain_output(model, (1 - sigma) * clean + sigma * noise, t / 1000, conditions)
    each = (velocity - (noise - clean)).pow(2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.total, (each * batch.weight).sum())
    assert losses.parts["mse"] == losses.total.detach()


def test_times_are_shifted_as_the_scheduler_shifts(model: Model) -> None:
    """Half of the logit-normal times are below the shifted middle: s / (1 + s) (section 5.3.2)."""
    shift = model.family.path.shift
    config = DenoiseObjective(timesteps=Timesteps(distribution="logit_normal", shift="model"))
    objective = make_objective(config, model.family)
    text = {"encoder_hidden_states": torch.ones(1)}
    moments = {"mean": torch.zeros(1, 1, 1), "logvar": torch.zeros(1, 1, 1)}
    item = Item(moments, text, text, Geometry((8, 8), (0, 0), (8, 8)))
    times = torch.stack([objective.draw(item, torch.Generator().manual_seed(seed))["t"] for seed in range(2000)])
    assert float((times / 1000 < shift / (1 + shift)).float().mean()) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_pictures_are_the_pipelines(model: Model, size: tuple[int, int], guidance: float) -> None:
    request = request_of(model, size, guidance)
    assert distance(ours(model, request), theirs(model.pipeline, request)) < SAME


def test_pictures_of_texts_encoded_before_are_the_same(model: Model) -> None:
    request = request_of(model, (64, 64), 3.5)
    known = encode(model.family, model.parts, [request])
    parts = {part: module for part, module in model.parts.items() if part not in model.family.encoders}
    assert torch.equal(draw(Engine(model.family, parts, encoded=known), request), ours(model, request))


def test_requests_of_other_guidance_share_a_batch(model: Model) -> None:
    requests = [request_of(model, (64, 64), guidance) for guidance in (2.0, 5.0)]
    engine = Engine(model.family, model.parts)
    handles = [engine.add(request) for request in requests]
    seen: list[int] = []
    hook = model.parts["transformer"].register_forward_pre_hook(
        lambda _, args, given: seen.append(len(args[0])), with_kwargs=True
    )
    finished = {}
    while len(engine):
        finished |= {item.handle: item for item in engine.step()}
    hook.remove()
    assert set(seen) == {4 if model.family.classifier_free else 2}
    for handle, request in zip(handles, requests, strict=True):
        (picture,) = engine.decode([finished[handle]])
        assert distance(picture, ours(model, request)) < SAME


def test_an_adapter_is_in_diffusers_files_what_diffusers_would_write(model: Model, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    tensors = publish(model, tmp_path / "ours", ["transformer"])
    pipeline: Any = DiffusionPipeline.from_pretrained(model.folder, **absent(model.folder))
    names = [name.removeprefix("transformer.").removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name]
    pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names))
    own = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    set_peft_model_state_dict(pipeline.transformer, own)
    layers = get_peft_model_state_dict(pipeline.transformer)
    pipeline.save_lora_weights(tmp_path / "theirs", transformer_lora_layers=layers)
    mine, other = (load_file(tmp_path / who / DIFFUSERS_WEIGHTS) for who in ("ours", "theirs"))
    assert mine.keys() == other.keys() and all(name.startswith("transformer.") for name in mine)
    for name, tensor in mine.items():
        # alpha / rank is 2, and in the weights, since readers do not ask for alpha.
        torch.testing.assert_close(tensor, other[name] * (2 if "lora_B" in name else 1))


@pytest.mark.parametrize("trained", ["transformer", "all"])
def test_pictures_with_an_adapter_are_the_pipelines(model: Model, trained: str, tmp_path: Path) -> None:
    """T5 and language models stay as they are: diffusers reads no adapter for them."""
    from diffusers import DiffusionPipeline

    encoders = [part for part in model.family.encoders if part in model.pipeline._lora_loadable_modules]
    publish(model, tmp_path / "adapter", ["transformer", *(encoders if trained == "all" else ())])
    registry = Registry(tmp_path / "registry")
    base = base_of(model.family, str(model.folder))
    registry.publish("a", "v1", tmp_path / "adapter", Card(name="a", version="v1", base=base, tuner={}))
    request = request_of(model, (64, 64), 3.5)
    (file,) = run(
        out=tmp_path / "out", prompt=request.prompt, negative_prompt=request.negative_prompt, seed=request.seed,
        steps=request.steps, guidance=request.guidance, height=request.height, width=request.width, adapters=["a"],
        registry=registry.store.root,
    )  # fmt: skip
    picture = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 255
    pipeline: Any = DiffusionPipeline.from_pretrained(model.folder, **absent(model.folder))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(registry.fetch("a"))
    expected = theirs(pipeline, request)
    assert distance(picture, expected) < 0.6 / 255  # of which half a level is rounding
    assert distance(picture, ours(model, request)) > DIFFERENT
    fresh = copy.deepcopy(model.parts)
    apply({part: fresh[part] for part in ("transformer", *encoders)}, tmp_path / "adapter")
    assert distance(draw(Engine(model.family, fresh), request), expected) < SAME


def publish(model: Model, folder: Path, trained: list[str]) -> dict[str, Tensor]:
    """Write a LoRA with random weights on the parts, as the tuner does; its tensors."""
    config = LoraTuner(rank=4, alpha=8, targets="attention+ff", train=trained)
    tuner = make_tuner(config, model.family)
    parameters = tuner.apply({part: model.family.load(part) for part in trained}, seed=0)
    rng = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(value.shape, generator=rng) * 0.2 for name, value in parameters.items()}
    tuner.export(tensors, folder)
    return tensors


def request_of(model: Model, size: tuple[int, int], guidance: float) -> Request:
    return Request("a photo of a dog", *size, negative_prompt=model.negative, seed=7, steps=5, guidance=guidance)


@lru_cache
def ours(model: Model, request: Request) -> Tensor:
    return draw(Engine(model.family, model.parts), request)


def draw(engine: Engine, request: Request) -> Tensor:
    engine.add(request)
    while len(engine):
        finished = engine.step()
    (picture,) = engine.decode(finished)
    return picture


def theirs(pipeline: Any, request: Request) -> Tensor:
    """What the pipeline draws when it is told no more than gtl is."""
    guidance = guidance_of(pipeline, request.guidance, request.negative_prompt)
    return pipeline(
        prompt=request.prompt, **guidance, num_inference_steps=request.steps, height=request.height,
        width=request.width, output_type="pt", generator=torch.Generator().manual_seed(request.seed),
        **as_asked(pipeline),
    ).images[0]  # fmt: skip


def distance(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().mean())


def test_tied_weights_are_one_parameter_under_either_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = make_sd3(tmp_path)
    family: Any = open_family(str(folder))
    t5 = family.load("text_encoder_3")
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    assert sum(name.startswith(("shared", "encoder.embed")) for name, _ in t5.named_parameters()) == 1
    file = folder / "text_encoder_3" / "model.safetensors"
    stored = load_file(file)
    expected = stored.pop("shared.weight")
    save_file({**stored, "encoder.embed_tokens.weight": expected}, file, {"format": "pt"})
    again: Any = open_family(str(folder))
    assert torch.equal(again.load("text_encoder_3").shared.weight, expected)
    assert torch.equal(dict(again.weights("text_encoder_3"))["shared.weight"], expected)
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"2 of \d+ tensors are missing, the first is encoder.embed_tokens.weight$"):
        open_family(str(folder)).load("text_encoder_3")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd3", {"height": 144}, "height: 144: expected at most 128"),
        ("flux-dev", {"negative_prompt": "blurry"},
         "negative_prompt: 'blurry': a model of family flux is guided without one; leave it out"),
    ],
)
def test_a_picture_that_a_model_cannot_draw_is_refused(
    tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    family = open_family(str(MODELS[name](tmp_path)))
    with pytest.raises(UserError) as caught:
        check(Request(**{"prompt": "a dog", "height": 64, "width": 64, **change}), family)
    assert str(caught.value) == message


def test_guidance_is_read_by_the_model_that_embeds_it(model: Model) -> None:
    """The pipeline's `guidance_scale` of schnell does nothing, nor does distilled klein's, and so does gtl's."""
    one, other = (ours(model, request_of(model, (64, 64), guidance)) for guidance in (1.5, 6.0))
    assert torch.equal(one, other) == (model.name in ("flux-schnell", "flux2_klein-distilled"))
    training = make_objective(DenoiseObjective(), model.family)
    item = Item({"mean": torch.zeros(1, 1, 1), "logvar": torch.zeros(1, 1, 1)}, {}, {},
                Geometry((8, 8), (0, 0), (8, 8)), caption="a dog")  # fmt: skip
    drawn = training.draw(item, torch.Generator().manual_seed(0))
    assert drawn.get("condition.guidance") == (torch.tensor(1.0) if model.name in ("flux-dev", "flux2") else None)


def test_an_instruction_is_in_front_of_prompts_and_of_nothing_else(tmp_path: Path) -> None:
    family: Any = open_family(str(make_sana(tmp_path)))
    tokenizer, instruction = family.tokenizers["text_encoder"], "\n".join(sana_instruction())
    prompt, negative, empty = family.tokenize(["A photo of a Dog ", family.negative_text("A photo of a Dog "), ""])
    text = "a photo of a dog"
    for tokens, expected in ((prompt, instruction + text), (negative, text), (empty, "")):
        ids = tokenizer(expected).input_ids
        assert tokens["input_ids"][: len(ids)].tolist() == ids and tokens["attention_mask"].sum() == len(ids)
        assert tokens["positions"][0] == 0 and len(tokens["positions"]) == 300
    # What is read of the instruction is its first token, and the last, which the tokenizer may merge with the prompt.
    num = len(tokenizer.encode(instruction))
    assert prompt["positions"][1] == num - 1 and prompt["positions"][-1] == len(prompt["input_ids"]) - 1
    assert negative["positions"].tolist() == empty["positions"].tolist() == list(range(300))
    assert family.negative_text("") == ""


BLOCKS = {
    "flux-dev": [
        "transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1",
    ],
    "flux2": [
        "transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1",
    ],
    "z_image": ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"],
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_freeze_depth_begins_with_the_blocks_of_the_first_stack(tmp_path: Path, name: str) -> None:
    family = open_family(str(MODELS[name](tmp_path)))
    tuner = make_tuner(LoraTuner(rank=2, targets="all-linear", freeze_depth=0.5), family)
    transformer = family.load("transformer")
    names = list(tuner.apply({"transformer": transformer}, seed=0))
    assert [block for (block,) in family.blocks(transformer)] == BLOCKS[name]
    assert {".".join(name.split(".")[1:3]) for name in names} == set(BLOCKS[name][2:])
    freeze = make_tuner(FreezeTuner(freeze_depth=0.5), family)
    moving = freeze.apply({"transformer": family.load("transformer")}, seed=0)
    frozen = [f"transformer.{prefix}" for prefix in (*family.embedders(transformer), *BLOCKS[name][:2])]
    assert not any(is_under(name, frozen) for name in moving)
    assert len(moving) < sum(1 for _ in transformer.parameters())


def test_tokens_are_packed_as_in_the_pipeline() -> None:
    from diffusers import FluxPipeline

    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack(packed, 2, 3), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32)
    assert torch.equal(image_ids(2, 3, torch.device("cpu")), ids)


@pytest.mark.parametrize("name", ["sd35", "flux2", "qwen_image", "z_image"])
def test_a_shift_that_depends_on_the_size_is_the_pipelines(tmp_path: Path, name: str) -> None:
    from diffusers import DiffusionPipeline

    folder = MODELS[name](tmp_path)
    file = folder / "scheduler" / "scheduler_config.json"
    write_json(file, json.loads(file.read_text()) | {"use_dynamic_shifting": True, "base_image_seq_len": 4})
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, **absent(folder))
    pipeline.set_progress_bar_config(disable=True)
    pipeline(prompt="a dog", num_inference_steps=3, height=96, width=64, output_type="latent")
    family = open_family(str(folder))
    torch.testing.assert_close(family.sampler(3, 96, 64).timesteps, pipeline.scheduler.timesteps)
    assert not torch.allclose(family.sampler(3, 64, 64).timesteps, pipeline.scheduler.timesteps)


def test_a_sampler_that_cannot_be_told_the_shift_is_refused(tmp_path: Path) -> None:
    folder = make_sd3(tmp_path, t5=False)
    file = folder / "scheduler" / "scheduler_config.json"
    config = {"_class_name": "FlowMatchHeunDiscreteScheduler", "use_dynamic_shifting": True}
    write_json(file, json.loads(file.read_text()) | config)
    with pytest.raises(UserError, match="^scheduler_config.json: _class_name: 'FlowMatchHeun.*': takes no mu$"):
        open_family(str(folder)).sampler(3, 64, 64)
