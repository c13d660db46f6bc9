"""Every family x every verb, at tiny width, against the libraries' own pipelines."""

import copy
import importlib
import inspect
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtl.families import FAMILIES, PIPELINES, family_class, open_family
from gtl.families.base import DiffusionFamily
from gtl.families.loading import parameters_on_meta
from gtl.types import Geometry, UserError
from tests.tiny import (
    absent,
    as_asked,
    make_deepfloyd,
    make_deepfloyd_upscaler,
    make_flux,
    make_flux2,
    make_flux2_klein,
    make_pixart,
    make_qwen_image,
    make_sana,
    make_sd,
    make_sd3,
    make_sdxl,
    make_z_image,
    sana_instruction,
    write_json,
)

MODELS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "sd": ("sd", make_sd),
    "sd-v": ("sd", lambda folder: make_sd(folder, prediction_type="v_prediction")),
    "sdxl": ("sdxl", make_sdxl),
    "sd3": ("sd3", make_sd3),
    # As 3.5 medium is made, and without T5.
    "sd35": ("sd3", lambda folder: make_sd3(
        folder, t5=False, transformer_config={"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
    )),
    "flux-dev": ("flux", make_flux),
    "flux-schnell": ("flux", lambda folder: make_flux(folder, dev=False)),
    "flux2": ("flux2", make_flux2),
    "flux2_klein": ("flux2_klein", make_flux2_klein),
    "qwen_image": ("qwen_image", make_qwen_image),
    "z_image": ("z_image", make_z_image),
    "pixart-alpha": ("pixart", make_pixart),
    "pixart-sigma": ("pixart", lambda folder: make_pixart(folder, sigma=True)),
    "sana": ("sana", make_sana),
    # As 1.5 is made, and with the flow's own scheduler.
    "sana15": ("sana", lambda folder: make_sana(
        folder, transformer_config={"qk_norm": "rms_norm_across_heads"},
        scheduler_config={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    )),
    "deepfloyd": ("deepfloyd", make_deepfloyd),
    "deepfloyd-upscaler": ("deepfloyd_upscaler", make_deepfloyd_upscaler),
}
"""Models under test: family, and what writes one."""
FIRST = {family: model for model, (family, _) in reversed(MODELS.items())}
VARIANTS = MODELS.keys() - FIRST.values()
"""Those made another way than the first of their family: what costs seconds is asked of them once."""


@dataclass(frozen=True)
class Facts:
    """What a family is known to be."""

    units: frozenset[str]
    """Classes of its blocks."""
    head: frozenset[str]
    """What is behind them."""
    before: tuple[str, str, str]
    """Its first layer, and two layers of the embedders in their order."""
    channels: int
    """Of its latents."""
    attention: tuple[str, ...]
    """Endings of the layers of its attentions."""
    feed_forward: tuple[str, ...]
    conditions: tuple[str, ...]
    """Names of its conditions, in the order of its pipeline."""
    attention_to_text: str = "attn"
    """Ending of its attentions that read text."""
    max_size: int | None = None
    default_size: int = 64
    multiple: int = 16
    """Of its sizes in pixels."""
    scale: int = 8
    """Pixels a side of a latent."""
    framed: bool = False
    """Whether its pipeline puts an instruction in front of prompts."""
    variance: bool = False
    """Whether the variance is among its predictions."""
    grouped: bool = False
    """Whether its pipeline returns the prompt's before the negative prompt's, rather than in turns."""


ATTENTION, FEED_FORWARD = (".to_q", ".to_k", ".to_v", ".to_out.0"), (".ff.net.0.proj", ".ff.net.2")
JOINT_ATTENTION = (*ATTENTION, ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
JOINT_FEED_FORWARD = (*FEED_FORWARD, ".ff_context.net.0.proj", ".ff_context.net.2")
UNET = Facts(
    frozenset({"ResnetBlock2D", "BasicTransformerBlock"}), frozenset({"conv_norm_out", "conv_out"}),
    ("conv_in", "conv_in", "time_embedding.linear_1"), 4, ATTENTION, FEED_FORWARD,
    ("encoder_hidden_states", "text_embeds"), attention_to_text="attn2",
)  # fmt: skip
PIXELS = Facts(
    frozenset({"ResnetBlock2D", "Attention"}), UNET.head, UNET.before, 3, (*ATTENTION, ".add_k_proj", ".add_v_proj"),
    (), ("encoder_hidden_states",), attention_to_text="attentions", multiple=2, scale=1, variance=True,
)  # fmt: skip
FLUX2 = Facts(
    frozenset({"Flux2TransformerBlock", "Flux2SingleTransformerBlock"}), frozenset({"norm_out", "proj_out"}),
    ("time_guidance_embed.timestep_embedder.linear_1", "double_stream_modulation_img.linear", "context_embedder"), 16,
    (*JOINT_ATTENTION, ".to_qkv_mlp_proj", ".attn.to_out"),
    tuple(f".{ff}.linear_{way}" for ff in ("ff", "ff_context") for way in ("in", "out")),
    ("encoder_hidden_states",), scale=16,
)  # fmt: skip
FACTS: Mapping[str, Facts] = {
    "flux2": FLUX2,
    "flux2_klein": FLUX2,
    "deepfloyd": PIXELS,
    "deepfloyd_upscaler": replace(PIXELS, multiple=4),
    "sd": UNET,
    "sdxl": UNET,
    "sd3": Facts(
        frozenset({"JointTransformerBlock"}), frozenset({"norm_out", "proj_out"}),
        ("pos_embed.proj", "time_text_embed.timestep_embedder.linear_1", "context_embedder"), 16, JOINT_ATTENTION,
        JOINT_FEED_FORWARD, ("encoder_hidden_states", "pooled_projections"), max_size=128,
    ),
    "flux": Facts(
        frozenset({"FluxTransformerBlock", "FluxSingleTransformerBlock"}), frozenset({"norm_out", "proj_out"}),
        ("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_1",
         "context_embedder"), 16, JOINT_ATTENTION, (*JOINT_FEED_FORWARD, ".proj_mlp", ".proj_out"),
        ("encoder_hidden_states", "pooled_projections"),
    ),
    "qwen_image": Facts(
        frozenset({"QwenImageTransformerBlock"}), frozenset({"norm_out", "proj_out"}),
        ("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_1", "txt_in"), 16,
        JOINT_ATTENTION, tuple(f".{side}_mlp.net.{layer}" for side in ("img", "txt") for layer in ("0.proj", "2")),
        ("encoder_hidden_states",), default_size=1024,
    ),
    "z_image": Facts(
        frozenset({"ZImageTransformerBlock"}), frozenset({"all_final_layer"}),
        ("all_x_embedder.2-1", "t_embedder.mlp.0", "cap_embedder.1"), 16, ATTENTION,
        (".feed_forward.w1", ".feed_forward.w2", ".feed_forward.w3"), ("encoder_hidden_states",), "attention", 256,
    ),
    "pixart": Facts(
        frozenset({"BasicTransformerBlock"}), frozenset({"scale_shift_table", "proj_out"}),
        ("pos_embed.proj", "adaln_single.emb.timestep_embedder.linear_1", "caption_projection.linear_1"), 4, ATTENTION,
        FEED_FORWARD, ("encoder_hidden_states", "encoder_attention_mask"), "attn2", grouped=True,
    ),
    "sana": Facts(
        frozenset({"SanaTransformerBlock"}), frozenset({"scale_shift_table", "proj_out"}),
        ("patch_embed.proj", "time_embed.emb.timestep_embedder.linear_1", "caption_projection.linear_1"), 8, ATTENTION,
        (".ff.conv_inverted", ".ff.conv_point"), ("encoder_hidden_states", "encoder_attention_mask"), "attn2",
        multiple=8, framed=True, grouped=True,
    ),
}  # fmt: skip
SHIFTS = {
    "sd3": 3.0, "sd35": 3.0, "flux-dev": math.exp(1.15), "flux-schnell": 1.0, "flux2": math.exp(1.15),
    "flux2_klein": math.exp(1.15), "qwen_image": math.exp(0.9), "z_image": 6.0, "sana": 3.0, "sana15": 3.0,
}  # fmt: skip
"""Of flow models: towards noise, at the size they were made for."""
SIZE = (64, 64)
"""(height, width) of the pictures here."""


def size_of(family: Any) -> tuple[int, int]:
    """That of pictures that are learned: as wide as latents, or nearly, where there is no codec to make them so."""
    return SIZE if family.codec else (16, 16)


PROMPTS = ["a photo of a dog", "", "Ünïcode 雪, " + "red boat " * 300]


class Case:
    """One model, and diffusers' own pipeline of it."""

    def __init__(self, name: str, folder: Path) -> None:
        from diffusers import DiffusionPipeline

        self.name = name
        self.family_name, maker = MODELS[name]
        self.folder = maker(folder)
        self.family: Any = open_family(str(self.folder))
        self.pipeline: Any = DiffusionPipeline.from_pretrained(self.folder, **absent(self.folder))
        self.parts = {part: self.family.load(part) for part in self.family.classes}

    @property
    def facts(self) -> Facts:
        return FACTS[self.family_name]

    @property
    def main(self) -> nn.Module:
        return self.parts[self.family.main]


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion that stays as it is."""
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def reference(family: Any, part: str, **options: Any) -> nn.Module:
    """The part as its own library loads it."""
    library, name = family.classes[part]
    module: nn.Module = getattr(importlib.import_module(library), name).from_pretrained(family.folder / part, **options)
    return module


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Equal weights and buffers, bit for bit, of one dtype."""
    for mine, other in (
        (ours.state_dict(), theirs.state_dict()),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
    ):
        assert mine.keys() == other.keys()
        for key, tensor in mine.items():
            assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_family_has_a_model_here() -> None:
    assert set(FAMILIES) == set(PIPELINES.values())
    denoise = {name for name in FAMILIES if family_class(name).draws == "by denoising"}
    # See test_gan.py, test_classifiers.py and test_text_heads.py.
    others = {"gan", "classifier", "diffusion_classifier", "text_classifier"}
    assert {family for family, _ in MODELS.values()} == denoise == set(FAMILIES) - others


def test_open_finds_the_family_and_it_travels(case: Case) -> None:
    assert case.family.name == case.family_name
    assert case.family.folder == case.folder
    assert open_family(str(case.folder), case.family_name).fingerprint() == case.family.fingerprint()
    copy = pickle.loads(pickle.dumps(case.family))
    assert copy.folder == case.folder and len(pickle.dumps(case.family)) < 500
    assert case.family.main in case.family.classes and set(case.family.encoders) <= set(case.family.classes)


def test_weights_are_the_state_dict(case: Case) -> None:
    for part in case.family.classes:
        theirs = reference(case.family, part).state_dict()
        streamed = list(case.family.weights(part))
        assert sorted(name for name, _ in streamed) == sorted(theirs)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in streamed)


def test_load_is_from_pretrained(case: Case) -> None:
    for part, module in case.parts.items():
        assert_same(module, reference(case.family, part))
        assert not any(child.training for child in module.modules())
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())


def test_load_casts_and_draws_nothing(case: Case) -> None:
    before = torch.get_rng_state()
    for part, module in case.parts.items():
        cast = case.family.load(part, torch.bfloat16)
        for key, tensor in module.state_dict().items():
            expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
            assert torch.equal(cast.state_dict()[key], expected), key
    assert torch.equal(torch.get_rng_state(), before)


def test_build_takes_the_device_around_it(case: Case) -> None:
    for part, module in case.parts.items():
        config = json.dumps(case.family.config(part))
        with torch.device("meta"):
            built = case.family.build(part)
        shapes = {key: tensor.shape for key, tensor in built.state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in module.state_dict().items()}
        assert all(parameter.is_meta for parameter in built.parameters())
        assert json.dumps(case.family.config(part)) == config


def inputs(case: Case, num: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Noisy latents, times and conditions of a batch."""
    family = case.family
    shape = family.latent_shape(*SIZE)
    conditions = family.encode_prompts(case.parts, PROMPTS)
    geometry = Geometry(SIZE, (0, 0), SIZE)
    more = {**family.size_conditions(geometry), **family.guidance_conditions(3.5)}
    rng = torch.Generator().manual_seed(1)
    conditions = [{**c, **more, **family.picture_conditions(random(*shape, seed=2), rng)} for c in conditions]
    t = family.path.time(torch.tensor([0.0, 0.4, 0.99]))
    return random(num, *shape), t, family.collate([conditions[i % 3] for i in range(num)])


def test_blocks_are_in_execution_order(case: Case) -> None:
    blocks = case.family.blocks(case.main)
    main_prefix = [block[0] for block in blocks]
    seen: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: seen.append(name))
        for name, module in case.main.named_modules()
        if any(name == prefix for block in blocks for prefix in block)
    ]
    noisy, t, conditions = inputs(case)
    case.family.predict(case.main, noisy, t, conditions)
    for handle in handles:
        handle.remove()
    assert seen == [prefix for block in blocks for prefix in block]
    assert len(set(main_prefix)) == len(blocks)


def test_a_block_is_one_resnet_or_transformer_block(case: Case) -> None:
    units = {name for name, module in case.main.named_modules() if type(module).__name__ in case.facts.units}
    assert {block[0] for block in case.family.blocks(case.main)} == units


def test_embedders_blocks_and_head_cover_each_parameter_once(case: Case) -> None:
    blocks = [prefix for block in case.family.blocks(case.main) for prefix in block]
    prefixes = [*case.family.embedders(case.main), *blocks]
    names = [name for name, _ in case.main.named_parameters()]
    owners = {name: [prefix for prefix in prefixes if f"{name}.".startswith(f"{prefix}.")] for name in names}
    assert all(len(found) <= 1 for found in owners.values())
    head = {name.partition(".")[0] for name, found in owners.items() if not found}
    assert head == case.facts.head


def test_images_encode_as_in_the_pipeline(case: Case) -> None:
    family = case.family
    pixels = random(2, 3, *SIZE).clamp(-1, 1)
    if family.codec is None:
        check_pixels(family, pixels)
        return
    vae = case.pipeline.vae
    moments = family.encode_images(case.parts["vae"], pixels)
    if case.family_name == "sana":
        latents = vae.encode(pixels).latent
        assert moments.keys() == {"mean"} and torch.equal(moments["mean"], latents)
        assert torch.equal(family.sample_latents(moments, latents), latents * vae.config.scaling_factor)
        return
    posterior = vae.encode(pixels.unsqueeze(2) if case.family_name == "qwen_image" else pixels).latent_dist
    assert torch.equal(moments["mean"], from_vae(case, posterior.mean))
    assert torch.equal(moments["logvar"], from_vae(case, posterior.logvar))
    assert moments["mean"].shape[1:] == family.latent_shape(*SIZE)
    noise = from_vae(case, random(*posterior.mean.shape, seed=1))
    theirs = from_vae(case, posterior.sample(generator=torch.Generator().manual_seed(1)))
    shift, scaling = statistics(case)
    torch.testing.assert_close(family.sample_latents(moments, noise), (theirs - shift) * scaling)


def check_pixels(family: Any, pixels: Tensor) -> None:
    """Every byte comes back as what diffusers' pipelines make of it, in bf16 too, in which the cache is filled."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    exact = torch.from_numpy(values.numpy().astype("float32") / 127.5 - 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        moments = family.encode_images(None, exact.to(dtype))
        assert moments.keys() == {"mean"} and torch.equal(moments["mean"], values)
    assert torch.equal(family.sample_latents(moments, torch.full(exact.shape, torch.nan)), exact)
    assert torch.equal(family.decode(None, exact), exact)
    assert family.encode_images(None, pixels)["mean"].shape[1:] == family.latent_shape(*SIZE)


def from_vae(case: Case, latents: Tensor) -> Tensor:
    """A VAE's latents as pictures': without Qwen-Image's one frame, and in FLUX.2's patches."""
    if case.family_name == "qwen_image":
        return latents[:, :, 0]
    return case.pipeline._patchify_latents(latents) if case.facts is FLUX2 else latents


def statistics(case: Case) -> tuple[Any, Any]:
    """What latents are shifted and then scaled by, as the pipeline takes it back."""
    vae, config = case.pipeline.vae, case.pipeline.vae.config
    if case.family_name == "qwen_image":
        mean, deviation = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        return mean.view(1, -1, 1, 1), 1 / deviation.view(1, -1, 1, 1)
    if case.facts is FLUX2:
        deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
        return vae.bn.running_mean.view(1, -1, 1, 1), 1 / deviation
    return config.get("shift_factor") or 0, config.scaling_factor


def test_latents_decode_as_in_the_pipeline(case: Case) -> None:
    """In double precision: what the order of sums rounds differs from one processor to the next."""
    if case.family.codec is None:
        return  # see `check_pixels`
    latents = random(2, *case.family.latent_shape(*SIZE)).double()
    ours, their = (copy.deepcopy(vae).double() for vae in (case.parts["vae"], case.pipeline.vae))
    shift, scaling = statistics(case)
    raw = latents / scaling + shift
    if case.family_name == "qwen_image":
        raw = raw.unsqueeze(2)
    elif case.facts is FLUX2:
        raw = case.pipeline._unpatchify_latents(raw)
    theirs = their.decode(raw, return_dict=False)[0]
    pixels = case.family.decode(ours, latents)
    torch.testing.assert_close(pixels, theirs[:, :, 0] if theirs.ndim == 5 else theirs, rtol=0, atol=1e-5)
    assert pixels.shape == (2, 3, *SIZE)


def pipelines_conditions(case: Case, prompts: list[str], guided: bool = False) -> list[dict[str, Tensor]]:
    """What its pipeline makes of prompts, and of no negative prompt where guidance leads away from one."""
    encode = case.pipeline.encode_prompt
    if case.family_name == "z_image":
        with torch.no_grad():
            encoded = encode(list(prompts), "cpu", do_classifier_free_guidance=guided)  # it changes the list
        return [padded(states) for states in encoded if states]
    if case.facts is FLUX2:
        with torch.no_grad():
            return [{"encoder_hidden_states": encode(texts, "cpu")[0]} for texts in (prompts, [""])]
    if case.family_name == "qwen_image":
        with torch.no_grad():
            encoded = [encode(texts, "cpu", max_sequence_length=512) for texts in (prompts, [""])]
        masks = [torch.ones(states.shape[:2]) if mask is None else mask for states, mask in encoded]
        return [
            padded([each[kept.bool()] for each, kept in zip(states, mask, strict=True)])
            for (states, _), mask in zip(encoded, masks, strict=True)
        ]
    options: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1}
    if case.family.classifier_free:
        options["do_classifier_free_guidance"] = guided
    if case.family_name == "sd3":
        options |= {"prompt_2": None, "prompt_3": None}
    if case.facts.framed:
        options["complex_human_instruction"] = sana_instruction()
    with torch.no_grad():  # as the pipeline's own call; attention takes another kernel where gradients are wanted
        encoded = encode(prompts, **options)
    if case.facts.grouped or not case.family.classifier_free:
        each = [encoded[:2], encoded[2:4]]
    else:  # the states and the negative prompt's, then the pooled ones where the model reads them
        each = [encoded[::2], encoded[1::2]]
    return [dict(zip(case.facts.conditions, values, strict=False)) for values in each]


def padded(states: list[Tensor]) -> dict[str, Tensor]:
    """Texts of several lengths as a batch, with a mask where one is padded."""
    batch = {"encoder_hidden_states": nn.utils.rnn.pad_sequence(states, batch_first=True)}
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(each), dtype=torch.bool) for each in states], batch_first=True)
    return batch if mask.all() else {**batch, "encoder_hidden_states_mask": mask}


def test_prompts_encode_as_in_the_pipeline(case: Case) -> None:
    # An instruction is not put in front of no prompt: that is what guidance leads away from.
    prompts = [prompt for prompt in PROMPTS if prompt or not case.facts.framed]
    conditions = case.family.encode_prompts(case.parts, prompts)
    theirs = pipelines_conditions(case, prompts)[0]
    assert [c.keys() for c in conditions] == [conditions[0].keys()] * len(prompts)
    stacked = case.family.collate(conditions)
    assert stacked.keys() == theirs.keys()
    (alone,) = case.family.encode_prompts(case.parts, PROMPTS[:1])
    for name, value in theirs.items():
        # Padding that nobody reads is not run here.
        exact = {"rtol": 0, "atol": 0} if "encoder_hidden_states_mask" not in theirs else {}
        torch.testing.assert_close(stacked[name], value, **exact)
    for name, value in alone.items():
        torch.testing.assert_close(value, theirs[name][0][: len(value)])


def test_predict_row_by_row(case: Case) -> None:
    noisy, t, conditions = inputs(case)
    together = case.family.predict(case.main, noisy, t, conditions)
    assert together.shape == (3, noisy.shape[1] * (1 + case.facts.variance), *noisy.shape[2:])
    for i in range(3):
        row = {name: value[i : i + 1] for name, value in conditions.items()}
        alone = case.family.predict(case.main, noisy[i : i + 1], t[i : i + 1], row)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    other = case.family.predict(case.main, noisy, t.flip(0), conditions)
    assert not torch.allclose(together[0], other[0], atol=1e-3)


def test_the_path_is_that_of_the_models_scheduler(case: Case) -> None:
    from diffusers import DDPMScheduler

    if case.family.path.prediction == "flow":
        check_flow(case)
        return
    ddpm: Any = DDPMScheduler.from_pretrained(case.folder / "scheduler")
    clean, noise, t = random(3, 4, 2, 2), random(3, 4, 2, 2, seed=1), torch.tensor([0, 500, 999])
    path = case.family.path
    assert torch.equal(path.add_noise(clean, noise, t), ddpm.add_noise(clean, noise, t))
    velocity = ddpm.config.prediction_type == "v_prediction"
    assert torch.equal(path.target(clean, noise, t), ddpm.get_velocity(clean, noise, t) if velocity else noise)


def check_flow(case: Case) -> None:
    scheduler = case.pipeline.scheduler
    if hasattr(scheduler, "scale_noise"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.01], mu=1.15)
    else:
        scheduler.set_timesteps(3)
    clean, noise, t = random(3, 4, 2, 2), random(3, 4, 2, 2, seed=1), scheduler.timesteps
    path = case.family.path
    if hasattr(scheduler, "scale_noise"):
        torch.testing.assert_close(path.add_noise(clean, noise, t), scheduler.scale_noise(clean, t, noise))
    else:  # its whole times are rounded down from 1000 times the share of noise
        shares = 1000 * scheduler.sigmas[:-1]
        assert torch.equal(shares.long(), t)
        torch.testing.assert_close(path.add_noise(clean, noise, shares), scheduler.add_noise(clean, noise, t))
    assert torch.equal(path.target(clean, noise, t), noise - clean)
    assert path.num_train_timesteps == scheduler.config.num_train_timesteps
    assert path.shift == pytest.approx(SHIFTS[case.name])


def test_drawing_by_the_verbs_is_the_pipeline(case: Case) -> None:
    family = case.family
    height, width = SIZE
    sampler = family.sampler(4, height, width)
    generator = torch.Generator().manual_seed(0)  # also of what some samplers draw at every step
    start = torch.randn(1, *family.latent_shape(height, width), generator=generator)
    latents = start * getattr(sampler, "init_noise_sigma", 1.0)
    sizes = family.size_conditions(Geometry((height, width), (0, 0), (height, width)))
    conditions = {**family.encode_prompts(case.parts, PROMPTS[:1])[0], **sizes, **family.guidance_conditions(1.0)}
    small = random(3, 16, 16, seed=3)
    if not family.draws_alone:
        conditions |= family.enlarging(small, height, width, generator)
    conditions = family.collate([conditions])
    for t in sampler.timesteps:
        scaled = sampler.scale_model_input(latents, t) if hasattr(sampler, "scale_model_input") else latents
        prediction = family.predict(case.main, scaled, t[None], conditions)
        draws = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
        latents = sampler.step(prediction, t, latents, **draws).prev_sample
    pixels = family.decode(case.parts.get("vae"), latents)
    case.pipeline.set_progress_bar_config(disable=True)
    # The same noise as `start`, in whichever shape the pipeline keeps it.
    image = case.pipeline(
        prompt=PROMPTS[0], **guidance_of(case.pipeline, 1.0), num_inference_steps=4, height=height, width=width,
        generator=torch.Generator().manual_seed(0), output_type="pt", **as_asked(case.pipeline),
        **({} if family.draws_alone else {"image": small[None]}),
    ).images
    image = image if family.codec else (image / 2 + 0.5).clamp(0, 1)  # theirs for pixels leaves them as they are
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), image, rtol=0, atol=1e-5)
    assert family.sampler(4, height, width) is not sampler


def guidance_of(pipeline: Any, scale: float, negative: str = "") -> dict[str, Any]:
    """How a pipeline is told of guidance.

    For Z-Image's, 0 is none; Qwen-Image's needs a negative prompt, if an empty one; klein's takes it encoded.
    """
    family = PIPELINES[type(pipeline).__name__]
    if family == "qwen_image":
        return {"negative_prompt": negative, "true_cfg_scale": scale}
    if family == "flux2_klein":
        return {"negative_prompt_embeds": pipeline.encode_prompt(negative)[0], "guidance_scale": scale}
    told = {"negative_prompt": negative} if negative else {}
    return {**told, "guidance_scale": scale - 1 if family == "z_image" else scale}


def test_sizes(case: Case) -> None:
    assert case.family.default_size == (case.facts.default_size,) * 2
    assert case.family.multiple == case.facts.multiple
    assert case.family.latent_shape(64, 128) == (case.facts.channels, 64 // case.facts.scale, 128 // case.facts.scale)
    assert case.family.max_size == case.facts.max_size


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all-linear", "all-linear+conv"])
def test_lora_target_sets(case: Case, targets: str) -> None:
    modules = dict(case.main.named_modules())
    blocks = [prefix for block in case.family.blocks(case.main) for prefix in block]
    found = case.family.lora_targets(case.main, targets)
    kinds: tuple[type, ...] = (nn.Linear,) if targets == "all-linear" else (nn.Linear, nn.Conv2d)
    inside = [
        name for prefix in blocks for name, module in modules.items()
        if isinstance(module, kinds) and (name == prefix or name.startswith(f"{prefix}."))
        and getattr(module, "groups", 1) == 1
    ]
    endings = case.facts.attention + (case.facts.feed_forward if targets == "attention+ff" else ())
    if not targets.startswith("all"):
        inside = [name for name in inside if name.endswith(endings)]
    assert found == inside
    assert len(found) == number_of_targets(case)[targets]


def number_of_targets(case: Case) -> dict[str, int]:
    if case.family_name == "sd3":
        # 8 layers of joint attention and 4 of feed-forward, 2 modulations; the last block has no output for text (1 and
        # 2 layers); 3.5 has 4 layers more of attention in some blocks.
        more = 4 * len(case.family.config("transformer")["dual_attention_layers"])
        every = 3 * 14 - 3 + more
        return {
            "attention": 3 * 8 - 1 + more, "attention+ff": 3 * 12 - 3 + more, "all-linear": every,
            "all-linear+conv": every,
        }  # fmt: skip
    if case.family_name == "flux":
        # 8 layers of joint attention, 4 of feed-forward and 2 modulations in each of 2 double blocks; 3 of attention, 2
        # of feed-forward and a modulation in each of 2 single ones.
        return {"attention": 22, "attention+ff": 34, "all-linear": 40, "all-linear+conv": 40}
    if case.facts is FLUX2:
        # 8 layers of joint attention and 4 of feed-forward in each of 2 double blocks; a layer into both and one out of
        # both in each of 2 single ones. All modulations are in front of the blocks.
        return {"attention": 20, "attention+ff": 28, "all-linear": 28, "all-linear+conv": 28}
    if case.family_name == "qwen_image":
        # 8 layers of joint attention, 4 of feed-forward and 2 modulations in each of 2 blocks.
        return {"attention": 16, "attention+ff": 24, "all-linear": 28, "all-linear+conv": 28}
    if case.family_name == "z_image":
        # 4 layers of attention and 3 of feed-forward in each of 4 blocks; a modulation in all but the text's refiner.
        return {"attention": 16, "attention+ff": 28, "all-linear": 31, "all-linear+conv": 31}
    if case.family_name == "pixart":
        # 2 attentions of 4 layers and a feed-forward of 2 in each of 3 blocks.
        return {"attention": 24, "attention+ff": 30, "all-linear": 30, "all-linear+conv": 30}
    if case.facts.variance:
        # 4 attentions of 6 layers, or of 4 where they see the text alone; 10 ResNets, of which 2 are samplers, with a
        # time projection, two convolutions and 5 shortcuts in all.
        num = 4 * (4 if case.family.config("unet").get("only_cross_attention") else 6)
        return {"attention": num, "attention+ff": num, "all-linear": num + 10, "all-linear+conv": num + 35}
    if case.family_name == "sana":
        # 2 attentions of 4 layers in each of 3 blocks, and a feed-forward of 2 convolutions and one by channels.
        return {"attention": 24, "attention+ff": 30, "all-linear": 24, "all-linear+conv": 30}
    # Transformer blocks with 2 attentions of 4 layers and a feed-forward of 2; 8 ResNets with a time projection, two
    # convolutions and 5 shortcuts in all; 2 samplers; 2 projections at each of 4 transformers, which 1.5 has as
    # convolutions.
    num = {"sd": 4, "sdxl": 8}[case.family_name]
    linear = 10 * num + 8 + (8 if case.family.config("unet")["use_linear_projection"] else 0)
    return {"attention": 8 * num, "attention+ff": 10 * num, "all-linear": linear, "all-linear+conv": 10 * num + 39}


def test_explicit_lora_targets(case: Case) -> None:
    _, one, two = case.facts.before
    readers = case.family.cross_attentions(case.main)
    # Where they have no name but a number, they go by that of their list.
    assert {re.sub(r"\.\d+$", "", name).rpartition(".")[2] for name in readers} == {case.facts.attention_to_text}
    ending = rf"{case.facts.attention_to_text}(\.\d+)?\.to_q$"
    queries = [name for name, _ in case.main.named_modules() if re.search(ending, name)]
    # Z-Image's refiners attend, too, and FLUX.2's single blocks have one layer for queries and all else.
    assert {f"{name}.to_q" for name in readers} == set(queries) or case.family_name.startswith(("z_image", "flux2"))
    asked = sorted({re.search(ending, name)[0] for name in queries})  # type: ignore[index]
    found = case.family.lora_targets(case.main, [one, *asked, two])
    assert found[:2] == [one, two] and set(found[2:]) == set(queries)


@pytest.mark.parametrize(
    ("ending", "hint"),
    [("to_qq", "close: to_q, "), ("to_out.1", "close: "), ("_q", "close: "), ("zzz", "the first layers are {first}, ")],
)
def test_a_target_that_matches_nothing_is_named(case: Case, ending: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        case.family.lora_targets(case.main, ["to_q", ending])
    message = str(caught.value)
    hint = hint.format(first=case.facts.before[0])
    assert message.startswith(f"tuner.targets: {ending!r}: no linear or convolution layer's name ends so; {hint}")


def test_export_loads_in_the_pipeline(case: Case, tmp_path: Path) -> None:
    main = case.family.load(case.family.main)
    with torch.no_grad():
        next(main.parameters()).add_(1)
    case.family.export({case.family.main: main}, tmp_path)
    pipeline: Any = type(case.pipeline).from_pretrained(tmp_path, **absent(tmp_path))
    assert_same(getattr(pipeline, case.family.main), main)
    for part in set(case.family.classes) - {case.family.main}:
        assert_same(getattr(pipeline, part), case.parts[part])
    assert pipeline.scheduler.config == case.pipeline.scheduler.config
    codec = [case.family.codec] if case.family.codec else []
    for part in (*codec, *case.family.encoders):  # tokenizers and their templates of chats are beside the encoders
        assert open_family(str(tmp_path)).fingerprint(part) == case.family.fingerprint(part)


# From here on: the files of a model, which are the same for every family.


def opened(folder: Path, **options: Any) -> Any:
    family: DiffusionFamily = open_family(str(folder), **options)
    return family


@pytest.mark.parametrize(
    ("options", "variant"),
    [({"shards": True}, None), ({"legacy": True}, None), ({"variant": "fp16"}, "fp16"),
     ({"variant": "fp16", "shards": True}, "fp16")],
    ids=["shards", "legacy", "variant", "variant-shards"],
)
def test_stored_forms(sd: Path, tmp_path: Path, options: dict[str, Any], variant: str | None) -> None:
    stored = opened(make_sd(tmp_path / "stored", **options), variant=variant)
    files = len(list((stored.folder / "unet").glob("*.safetensors")))
    assert files == {(True, None): 3, (True, "fp16"): 2}.get((options.get("shards", False), variant), 1)
    for part in stored.classes:
        theirs = reference(stored, part, variant=variant, dtype=torch.float16 if variant else torch.float32)
        assert_same(stored.load(part), theirs)
        plain = opened(sd).load(part).state_dict()
        expected = {key: tensor.half() if variant else tensor for key, tensor in plain.items()}
        streamed = dict(stored.weights(part))
        assert streamed.keys() == expected.keys()
        assert all(torch.equal(streamed[key], tensor) for key, tensor in expected.items())
    stored.export({}, tmp_path / "exported")
    assert not list((tmp_path / "exported").rglob("*fp16*"))
    for part in stored.classes:
        assert_same(opened(tmp_path / "exported").load(part), stored.load(part))


def with_head(key: str) -> str:
    """Where a language model was stored together with its head."""
    return f"model.{key}"


def as_in_the_module(key: str) -> str:
    """Models that see are stored with the names that they had before they were one model."""
    return key


@pytest.mark.parametrize(("maker", "rename"), [(make_z_image, with_head), (make_qwen_image, as_in_the_module),
                                              (make_flux2, as_in_the_module)])  # fmt: skip
def test_a_language_model_has_several_names_for_its_tensors(
    tmp_path: Path, maker: Callable[[Path], Path], rename: Callable[[str], str]
) -> None:
    from safetensors.torch import load_file, save_file

    family = opened(maker(tmp_path))
    expected = family.load("text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    stored = {rename(key): tensor for key, tensor in expected.state_dict().items()}
    assert load_file(file).keys() != stored.keys()
    save_file({**stored, "lm_head.weight": stored.get("lm_head.weight", torch.zeros(1))}, file, {"format": "pt"})
    assert_same(family.load("text_encoder"), expected)


def test_an_export_leaves_out_what_is_not_there(sd: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": False}
    write_json(folder / "model_index.json", index | checker)
    (folder / "v1-5-pruned.safetensors").write_bytes(b"all in one file")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"the same as a pickle")
    (folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"another variant")
    opened(folder).export({}, tmp_path / "exported")
    names = sorted(p.relative_to(tmp_path / "exported").as_posix() for p in (tmp_path / "exported").rglob("*.*"))
    assert names == sorted(p.relative_to(sd).as_posix() for p in sd.rglob("*.*"))
    assert json.loads((tmp_path / "exported" / "model_index.json").read_text()) == index


def damage(folder: Path, how: str) -> None:
    """Break a sharded model in one way."""
    unet = folder / "unet"
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    shard = unet / "diffusion_pytorch_model-00002-of-00003.safetensors"
    if how == "missing shard":
        shard.unlink()
    elif how == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "no weights":
        for path in (*unet.glob("*.safetensors"), index):
            path.unlink()
    elif how == "only a pickle":
        damage(folder, "no weights")
        (unet / "diffusion_pytorch_model.bin").write_bytes(b"")
    elif how == "damaged index":
        index.write_text("{")
    elif how == "empty index":
        index.write_text("{}")
    elif how == "missing tensors":
        value = json.loads(index.read_text())
        write_json(index, {"weight_map": {k: v for k, v in value["weight_map"].items() if v != shard.name}})
    elif how == "another width":
        config = json.loads((unet / "config.json").read_text())
        write_json(unet / "config.json", config | {"cross_attention_dim": 48})
    elif how == "unknown block":
        config = json.loads((unet / "config.json").read_text())
        write_json(unet / "config.json", config | {"down_block_types": ["X", "Y"]})
    elif how == "no config":
        (unet / "config.json").unlink()
    elif how == "no folder":
        shutil.rmtree(unet)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing shard", "/diffusion_pytorch_model-00002-of-00003.safetensors: missing; diffusion_pytorch_model"),
        ("truncated shard", "/diffusion_pytorch_model-00002-of-00003.safetensors: damaged ("),
        ("no weights", ": no diffusion_pytorch_model.safetensors or model.safetensors in it; found: config.json"),
        ("only a pickle", "/diffusion_pytorch_model.bin: a pickle, which can run code when it is read"),
        ("damaged index", "/diffusion_pytorch_model.safetensors.index.json: not readable as JSON: "),
        ("empty index", "/diffusion_pytorch_model.safetensors.index.json: it has no weight_map"),
        ("missing tensors", ": 101 of 208 tensors are missing, the first is "),
        ("another width", ": down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight has shape [16, 32]; "
                          "config.json describes [16, 48]"),
        ("unknown block", "/config.json: not that of a UNet2DConditionModel: "),
        ("no config", "/config.json: missing; "),
        ("no folder", ": no such folder; the model is incomplete"),
    ],
)
def test_a_damaged_model_is_one_line(tmp_path: Path, how: str, message: str) -> None:
    folder = make_sd(tmp_path, shards=True)
    damage(folder, how)
    with pytest.raises(UserError) as caught:
        opened(folder).load("unet")
    assert str(caught.value).startswith(f"{folder / 'unet'}{message}")
    assert "\n" not in str(caught.value)


def test_a_model_without_its_tokenizer_is_one_line(tmp_path: Path) -> None:
    folder = make_sd(tmp_path / "sd")
    (folder / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(UserError, match=rf"^{folder}/tokenizer: not a CLIPTokenizer that can be read: "):
        _ = opened(folder).tokenizers
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match=rf"^{folder}/tokenizer: no such folder; the model is incomplete$"):
        opened(folder).fingerprint()


def test_a_missing_variant_is_named(sd: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        opened(sd, variant="fp16").load("unet")
    assert str(caught.value) == f"model.variant: fp16: no such weights in {sd / 'unet'}; found: null"
    half = make_sd(tmp_path, variant="fp16")
    with pytest.raises(UserError) as caught:
        opened(half).load("unet")
    assert str(caught.value) == f"model.variant: null: no such weights in {half / 'unet'}; found: fp16"


def test_parameters_on_meta_keeps_buffers_and_other_threads() -> None:
    import threading

    built: list[nn.Module] = []
    with parameters_on_meta():
        inside = nn.BatchNorm1d(2)
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert inside.weight.is_meta and not inside.running_var.is_meta
    assert not built[0].weight.is_meta and not nn.Linear(2, 2).weight.is_meta


def test_fingerprints(sd: Path, tmp_path: Path) -> None:
    family = opened(sd)
    copy = opened(shutil.copytree(sd, tmp_path / "copy"))
    whole, parts = family.fingerprint(), {part: family.fingerprint(part) for part in family.classes}
    assert len(whole) == 64 and len({whole, *parts.values()}) == 4
    assert copy.fingerprint() == whole

    config = copy.folder / "vae" / "config.json"
    write_json(config, json.loads(config.read_text()) | {"_diffusers_version": "9", "_name_or_path": "elsewhere"})
    assert opened(copy.folder).fingerprint("vae") == parts["vae"]
    write_json(config, json.loads(config.read_text()) | {"scaling_factor": 1.0})
    changed = opened(copy.folder)
    assert changed.fingerprint("vae") != parts["vae"] and changed.fingerprint("unet") == parts["unet"]

    (copy.folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert changed.fingerprint("text_encoder") != parts["text_encoder"]

    scheduler = tmp_path / "scheduled"
    shutil.copytree(sd, scheduler)
    write_json(scheduler / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler"})
    assert {part: opened(scheduler).fingerprint(part) for part in parts} == parts
    assert opened(scheduler).fingerprint() != whole


def test_opening_and_hashing_import_no_torch(sd: Path) -> None:
    code = (
        "import sys; from gtl.families import open_family; family = open_family(sys.argv[1])\n"
        "family.fingerprint(), family.multiple, family.default_size, family.latent_shape(64, 64)\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sd)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_a_file_is_hashed_once(tmp_path: Path) -> None:
    import os

    folder = make_sd(tmp_path)
    before = opened(folder).fingerprint("vae")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert opened(folder).fingerprint("vae") == before  # not read again: same size and modification time
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert opened(folder).fingerprint("vae") != before


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("{tmp}/nowhere", {}, "model.source: {tmp}/nowhere: no such folder"),
        ("{tmp}", {}, "model.source: {tmp}: no model_index.json in it; a folder in diffusers layout is needed"),
        ("{sd}/model_index.json", {}, "model.source: {sd}/model_index.json: a file; a folder in diffusers layout is"),
        ("a/b/c", {}, "model.source: 'a/b/c': neither a folder here, nor a hub id (owner/name), nor a bucket URL"),
        ("nobody/nothing", {}, "model.source: 'nobody/nothing': not in the local cache, and the hub is off-line"),
        ("{sd}", {"revision": "main"}, "model.revision: 'main': only a hub id has revisions; model.source is {sd}"),
        ("{sd}", {"family": "flux9"}, "model.family: 'flux9': known families: auto, sd, sdxl"),
        ("s3://gtl-tests/nothing", {}, "model.source: s3://gtl-tests/nothing/model_index.json: missing"),
    ],
)
def test_a_wrong_source_is_one_line(
    source: str, options: dict[str, Any], message: str, sd: Path, tmp_path: Path, s3: str
) -> None:
    with pytest.raises(UserError) as caught:
        open_family(source.format(tmp=tmp_path, sd=sd), **options)
    assert str(caught.value).startswith(message.format(tmp=tmp_path, sd=sd))


def test_another_familys_model_is_refused(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = json.loads((sd / "model_index.json").read_text())
    write_json(tmp_path / "model_index.json", index | {"_class_name": "KandinskyPipeline"})
    with pytest.raises(UserError) as caught:
        open_family(str(tmp_path))
    assert str(caught.value) == (
        f"model.source: {tmp_path}: model_index.json names a KandinskyPipeline; supported: {', '.join(PIPELINES)}"
    )
    monkeypatch.setitem(FAMILIES, "other", "gtl.families.other:Other")
    with pytest.raises(UserError) as caught:
        open_family(str(sd), "other")
    assert str(caught.value) == f"model.family: 'other': the model at {sd} is of family 'sd' (StableDiffusionPipeline)"
    write_json(tmp_path / "model_index.json", index | {"unet": ["diffusers", "UNet2DModel"]})
    with pytest.raises(UserError) as caught:
        open_family(str(tmp_path))
    assert str(caught.value) == f"{tmp_path / 'model_index.json'}: unet: UNet2DModel; expected UNet2DConditionModel"


def test_a_bucket_is_fetched_once_and_again_when_it_changes(s3: str, sd: Path, tmp_path: Path) -> None:
    from gtl.storage import Store

    url = f"{s3}/models/{tmp_path.name}"
    store = Store(url)
    for path in sd.rglob("*.*"):
        store.upload(path, path.relative_to(sd).as_posix())
    store.write("v1-5-pruned.safetensors", b"left out")
    family = opened(url)  # type: ignore[arg-type]
    assert family.fingerprint() == opened(sd).fingerprint()
    file = family.folder / "unet" / "diffusion_pytorch_model.safetensors"
    stamp = file.stat().st_mtime_ns
    assert not (family.folder / "v1-5-pruned.safetensors").exists()
    assert open_family(url).folder == family.folder and file.stat().st_mtime_ns == stamp
    store.write("unet/diffusion_pytorch_model.safetensors", b"changed")
    with pytest.raises(UserError, match="damaged"):
        open_family(url).load("unet")
    store.delete("unet/diffusion_pytorch_model.safetensors")
    assert open_family(url).folder == family.folder
    assert not file.exists(), "what is gone there would still be read here"


def test_a_family_that_travels_fetches_its_model_there(
    s3: str, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gtl.storage import Store

    url = f"{s3}/travels/{tmp_path.name}"
    for path in sd.rglob("*.*"):
        Store(url).upload(path, path.relative_to(sd).as_posix())
    sent = pickle.dumps(opened(url))  # type: ignore[arg-type]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    arrived = pickle.loads(sent)
    assert arrived.folder.is_relative_to(tmp_path / "elsewhere")
    assert arrived.fingerprint() == opened(sd).fingerprint()


def test_a_hub_id_is_read_from_the_local_cache(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    shutil.copytree(sd, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert open_family("owner/name").folder == repository / "snapshots" / commit
    assert open_family("owner/name", revision=commit).fingerprint() == opened(sd).fingerprint()
    with pytest.raises(UserError, match="^model.source: 'owner/name': not in the local cache"):
        open_family("owner/name", revision="v2")


def test_prompts_are_tokens_and_then_conditions(case: Case) -> None:
    """A batch of tokens gives what each prompt alone gives, and gradients reach every encoder; in double precision."""
    family = case.family
    tokens = family.tokenize(PROMPTS)
    assert [token.keys() for token in tokens] == [tokens[0].keys()] * len(PROMPTS)
    encoders = {part: family.load(part).double().requires_grad_(True) for part in family.encoders}
    batch = family.encode_tokens(encoders, family.collate(tokens))
    expected = family.encode_prompts({part: copy.deepcopy(case.parts[part]).double() for part in encoders}, PROMPTS)
    torch.testing.assert_close(batch, family.collate(expected), rtol=1e-4, atol=1e-5)
    sum(value.square().sum() for value in batch.values()).backward()
    assert all(any(p.grad is not None for p in encoder.parameters()) for encoder in encoders.values())


def test_cross_attentions_and_only_they_read_the_condition(case: Case) -> None:
    found = case.family.cross_attentions(case.main)
    assert found and len(set(found)) == len(found)
    assert set(found) == attentions_that_read_text(case)
    if case.family.main != "unet":
        return
    key = "add_k_proj" if case.facts is not UNET else "to_k"
    width = {case.main.get_submodule(f"{name}.{key}").in_features for name in found}
    assert width == {case.main.config.cross_attention_dim}
    if case.facts is not UNET:
        return  # they attend to the image too, or to the text alone
    others = [name for name, _ in case.main.named_modules() if name.endswith("attn1")]
    assert len(others) == len(found) and not set(others) & set(found)


def attentions_that_read_text(case: Case) -> set[str]:
    """Of the main part: attention modules that get the text beside the image, or both in one, longer sequence."""
    found: set[str] = set()
    lengths: dict[str, int] = {}
    noisy, t, conditions = inputs(case)

    def note(name: str, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        states = given["hidden_states"] if "hidden_states" in given else args[0]
        lengths[name] = states.shape[1]
        if given.get("encoder_hidden_states") is not None:
            found.add(name)

    handles = [
        module.register_forward_pre_hook(lambda _, args, given, name=name: note(name, args, given), with_kwargs=True)
        for name, module in case.main.named_modules() if type(module).__name__.endswith("Attention")
    ]  # fmt: skip
    case.family.predict(case.main, noisy, t, conditions)
    for handle in handles:
        handle.remove()
    longest = max(lengths.values())
    joint = case.family.main != "unet" and longest > noisy[0, 0].numel() // case.family.patch_size**2
    return found | {name for name, length in lengths.items() if joint and length == longest}


CLIP_LAYERS = ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}, "fc1")
T5_LAYERS = ({"q", "k", "v", "o"}, {"wi_0", "wi_1", "wo"}, "wi_1")
LANGUAGE_LAYERS = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}, "up_proj")
ENCODER_LAYERS = {
    "T5EncoderModel": T5_LAYERS, "Mistral3ForConditionalGeneration": LANGUAGE_LAYERS,
    "Qwen2_5_VLForConditionalGeneration": LANGUAGE_LAYERS, "Qwen3ForCausalLM": LANGUAGE_LAYERS,
    "Qwen3Model": LANGUAGE_LAYERS, "Gemma2Model": LANGUAGE_LAYERS,
}  # fmt: skip
"""Endings of attention and feed-forward, and one of them."""


@pytest.mark.parametrize("targets", ["attention", "attention+ff", "all-linear", "all-linear+conv", "one"])
def test_targets_in_a_text_encoder(case: Case, targets: str) -> None:
    for part in case.family.encoders:
        encoder = case.parts[part]
        attention, feed_forward, one = ENCODER_LAYERS.get(type(encoder).__name__, CLIP_LAYERS)
        endings = {"attention": attention, "one": {one}}.get(targets, attention | feed_forward)
        found = case.family.encoder_targets(encoder, [one] if targets == "one" else targets)
        assert {name.rpartition(".")[2] for name in found} == endings
        assert len(found) == len(endings) * encoder.config.get_text_config().num_hidden_layers
        with pytest.raises(UserError, match=rf"^tuner\.targets: '{one}9': .*close: "):
            case.family.encoder_targets(encoder, [f"{one}9"])


def test_guidance_without_a_negative_prompt_leads_away_from_what_the_pipeline_does(case: Case) -> None:
    """Stable Diffusion XL can have zeros there; "" as a prompt of its own is the encoded empty prompt everywhere."""
    (empty,) = case.family.encode_prompts(case.parts, [""])
    ours = case.family.unconditional(empty)
    if not case.family.classifier_free:
        assert ours is empty
        return
    _, theirs = pipelines_conditions(case, PROMPTS[:1], guided=True)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value[0])
    assert ours.keys() == empty.keys() and any(value.any() for value in empty.values())


def test_empty_prompts_of_sdxl_are_zeros_only_if_its_index_says_so(tmp_path: Path) -> None:
    encoded = {"text_embeds": torch.ones(3), "encoder_hidden_states": torch.ones(2, 3)}
    folder = make_sdxl(tmp_path / "zeros")
    assert not any(value.any() for value in opened(folder).unconditional(encoded).values())
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", index | {"force_zeros_for_empty_prompt": False})
    assert opened(folder).unconditional(encoded) is encoded


@pytest.mark.parametrize("index", [{"requires_aesthetics_score": True}, {"text_encoder": [None, None]}])
def test_a_refiner_is_refused(tmp_path: Path, index: dict[str, Any]) -> None:
    folder = make_sdxl(tmp_path, _class_name="StableDiffusionXLImg2ImgPipeline", **index)
    with pytest.raises(UserError) as caught:
        opened(folder)
    assert str(caught.value) == (
        f"{folder / 'model_index.json'}: a refiner, which only finishes what a base model began; "
        "use a base model, such as stabilityai/stable-diffusion-xl-base-1.0"
    )


def test_sizes_of_sdxl_are_in_the_order_of_its_pipeline(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    folder = make_sdxl(tmp_path)
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    ours = opened(folder).size_conditions(Geometry(original=(80, 100), crop=(3, 5), target=(64, 48)))
    theirs = pipeline._get_add_time_ids((80, 100), (3, 5), (64, 48), torch.float32, 24)
    assert torch.equal(ours["time_ids"][None], theirs)
