"""DeepFloyd IF: pictures of both stages, and what each of them learns, against diffusers and the papers."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gtl.adapters.formats import LoraExport, write_lora
from gtl.config import parse_recipe
from gtl.config.objectives import ConsistencyObjective, DenoiseObjective
from gtl.data.cache import Space, prompt_key
from gtl.data.dataset import BYTE_SPACE, Cuts, Dataset
from gtl.data.prepare import ENCODED, spaces
from gtl.diffusion.variance import variance_loss
from gtl.families import open_family
from gtl.generate.cascade import Upscaler, check_cascade, open_cascade
from gtl.generate.command import Enlarged, run
from gtl.generate.edit import Edit
from gtl.generate.engine import Engine
from gtl.generate.images import generate, load_parts
from gtl.generate.request import Request, check
from gtl.images import cells, decode, read_recipe
from gtl.objectives import make_objective
from gtl.storage import Store
from gtl.train.assemble import assemble
from gtl.train.enlarged import enlarged_of
from gtl.train.look import Pictures
from gtl.train.prepare import check_drawn
from gtl.types import Batch, Entry, Geometry, Item, Record, UserError
from tests.tiny import make_deepfloyd, make_deepfloyd_upscaler, make_sd, write_json
from tests.unit.test_edit import picture, right_half

SAME = 1e-5
LARGE = Request("A photo of a Dog ", 64, 64, "blurry", seed=3, steps=4, guidance=3.0)


class Stages:
    """Both, and diffusers' own pipelines of them; the second has no text encoder of its own."""

    def __init__(self, folder: Path) -> None:
        from diffusers import IFPipeline, IFSuperResolutionPipeline

        small = {"sample_size": 16}
        self.first, self.second = (
            make_deepfloyd(folder / "first", unet_config=small),
            make_deepfloyd_upscaler(folder / "second", reader=False),
        )
        self.family: Any = open_family(str(self.first))
        self.parts = load_parts(self.family, [], device="cpu", dtype=torch.float32)
        self.upscaler = Upscaler(open_family(str(self.second)), steps=5, guidance=2.0)
        self.base: Any = IFPipeline.from_pretrained(self.first)
        self.larger: Any = IFSuperResolutionPipeline.from_pretrained(self.second, text_encoder=None, tokenizer=None)
        for pipeline in (self.base, self.larger):
            pipeline.set_progress_bar_config(disable=True)

    def theirs(self, request: Request, guidance: float = 2.0, steps: int = 5) -> tuple[Tensor, Tensor]:
        """The small picture and the large one, [3, h, w] in [0, 1], as the guide of diffusers has it."""
        rng = torch.Generator().manual_seed(request.seed)
        prompt, negative = self.base.encode_prompt(request.prompt, negative_prompt=request.negative_prompt)
        told = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "generator": rng, "output_type": "pt"}
        small = self.base(
            **told, height=request.height // 4, width=request.width // 4, num_inference_steps=request.steps,
            guidance_scale=request.guidance,
        ).images  # fmt: skip
        large = self.larger(
            **told, image=small, height=request.height, width=request.width, num_inference_steps=steps,
            guidance_scale=guidance,
        ).images  # fmt: skip
        return small[0] / 2 + 0.5, large[0] / 2 + 0.5


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp("stages"))


def drawn(engine: Any, *requests: Request, **options: Any) -> list[Tensor]:
    handles = [engine.add(request, **options) for request in requests]
    found: dict[int, Tensor] = {}
    while len(engine):
        outputs = engine.step()
        found |= {output.handle: pixels for output, pixels in zip(outputs, engine.decode(outputs), strict=True)}
    return [found[handle] for handle in handles]


def test_a_cascade_draws_what_the_pipelines_do(stages: Stages) -> None:
    """Requests of one batch, each with the noise of its own generator, which goes on from stage to stage."""
    requests = [LARGE, dataclasses.replace(LARGE, seed=4), dataclasses.replace(LARGE, seed=5, width=96, guidance=1.0)]
    cascade = open_cascade(stages.family, stages.parts, stages.upscaler, "cpu", torch.float32, 4)
    ours = drawn(cascade, *requests)
    for request, found in zip(requests, ours, strict=True):
        expected = stages.theirs(request)[1].clamp(0, 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=SAME)
        assert found.shape == (3, request.height, request.width) and expected.std() > 0.05
    assert (ours[0] - ours[1]).abs().mean() > 0.05


def test_the_first_stage_alone_is_its_pipeline_with_a_request_beside_it(stages: Stages) -> None:
    request = dataclasses.replace(LARGE, height=16, width=16)
    ours = drawn(Engine(stages.family, stages.parts), request, dataclasses.replace(request, seed=9))[0]
    torch.testing.assert_close(ours, stages.theirs(LARGE)[0].clamp(0, 1), rtol=0, atol=SAME)


def test_a_fixed_variance_leaves_the_learned_one_out(tmp_path: Path) -> None:
    """As diffusers' own training scripts set it, which do not train the variance."""
    from diffusers import IFPipeline

    folder = make_deepfloyd(
        tmp_path, unet_config={"sample_size": 16}, scheduler_config={"variance_type": "fixed_small"}
    )
    pipeline: Any = IFPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    family: Any = open_family(str(folder))
    assert not family.path.ranges_variance
    request = Request("a dog", 16, 16, seed=1, steps=3, guidance=2.0)
    parts = load_parts(family, [], device="cpu", dtype=torch.float32)
    (ours,) = drawn(Engine(family, parts), request)
    theirs = pipeline(
        "a dog", num_inference_steps=3, guidance_scale=2.0, output_type="pt", clean_caption=False,
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    torch.testing.assert_close(ours, (theirs / 2 + 0.5).clamp(0, 1), rtol=0, atol=SAME)


def test_each_stage_has_adapters_of_its_own(stages: Stages, tmp_path: Path) -> None:
    """PEFT's files, on either stage; both pictures are those of diffusers with the same adapters."""
    folders = {}
    for name, family in (("first", stages.family), ("second", stages.upscaler.family)):
        unet = family.load("unet")
        rng = torch.Generator().manual_seed(len(name))
        tensors = {}
        for target in family.lora_targets(unet, "attention"):
            out, width = unet.get_submodule(target).weight.shape
            tensors[f"unet.{target}.lora_A.weight"] = torch.randn(2, width, generator=rng) / width**0.5
            tensors[f"unet.{target}.lora_B.weight"] = torch.randn(out, 2, generator=rng)
        folders[name] = tmp_path / name
        write_lora(tensors, folders[name], config=LoraExport(rank=2, alpha=2.0))
    upscaler = dataclasses.replace(stages.upscaler, adapters=((folders["second"], 1.0),))
    ((_, image),) = generate(stages.family, [LARGE], [(folders["first"], 1.0)], upscaler=upscaler)
    plain = stages.theirs(LARGE)[1]
    stages.base.load_lora_weights(folders["first"])
    stages.larger.load_lora_weights(folders["second"])
    expected = stages.theirs(LARGE)[1].clamp(0, 1)
    stages.base.unload_lora_weights()
    stages.larger.unload_lora_weights()
    pixels = torch.tensor(list(image.tobytes())).view(64, 64, 3).permute(2, 0, 1)
    assert (pixels - expected * 255).abs().max() <= 0.55  # rounded to bytes
    assert (expected - plain).abs().mean() > 0.02


def item_of(family: Any, parts: dict[str, Any], side: int) -> Item:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 2, 2, generator=rng).repeat_interleave(side // 2, 2).repeat_interleave(side // 2, 3)
    moments = {name: value[0] for name, value in family.encode_images(None, pixels * 2 - 1).items()}
    with torch.no_grad():
        dog, null = family.encode_prompts(parts, ["a dog", ""])
    return Item(moments, dog, null, Geometry((side, side), (0, 0), (side, side)))


def test_the_second_stage_learns_from_small_pictures_with_noise_of_their_own(tmp_path: Path) -> None:
    """The UNet sees the noisy picture beside the small one, and the level; all of it comes of the sample's draw."""
    family: Any = open_family(str(make_deepfloyd_upscaler(tmp_path)))
    parts = load_parts(family, [], device="cpu", dtype=torch.float32)
    objective = make_objective(DenoiseObjective(caption_dropout=0), family)
    item = item_of(family, parts, 16)
    draws = [objective.draw(item, torch.Generator().manual_seed(seed)) for seed in (0, 1, 2)]
    again = objective.draw(item, torch.Generator().manual_seed(1))
    assert draws[1].keys() == again.keys() and all(torch.equal(draws[1][name], again[name]) for name in again)
    levels = {int(draw["condition.noised"]) for draw in draws}
    assert len(levels) == 3 and all(0 <= level < 1000 for level in levels)
    batch = Batch(objective.collate(draws), torch.tensor([0.5, 0.25, 0.25]))
    loss = objective.players(parts, torch.float32)["denoiser"](batch)
    clean, noise, t = (batch.tensors[name] for name in ("clean", "noise", "t"))
    noisy = family.path.add_noise(clean, noise, t)
    seen, level = batch.tensors["condition.small"], batch.tensors["condition.noised"]
    both = parts["unet"](
        torch.cat([noisy, seen], 1), t, batch.tensors["condition.encoder_hidden_states"], class_labels=level
    ).sample  # fmt: skip
    each = (both[:, :3] - noise).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(loss.parts["mse"], (each * batch.weight).sum())
    each = each + variance_loss(family.path, clean, noisy, both[:, :3], both[:, 3:], t)
    torch.testing.assert_close(loss.total, (each * batch.weight).sum())


def test_the_cache_of_pixels_is_one_for_both_stages_and_every_dtype(stages: Stages, tmp_path: Path) -> None:
    """Other than texts: bytes say all there is of an 8-bit picture."""
    second = open_family(str(make_deepfloyd_upscaler(tmp_path)))
    found = {spaces(family, dtype, ENCODED) for family in (stages.family, second) for dtype in ("fp32", "bf16")}
    assert {images for images, _ in found} == {BYTE_SPACE}
    assert len({texts for _, texts in found}) == 2, "they share their text encoder"
    with pytest.raises(UserError, match="has no text_encoder, so that it can only be drawn with, as the upscaler"):
        spaces(stages.upscaler.family, "fp32", ENCODED)


def test_a_small_picture_holds_what_its_level_leaves_of_it(tmp_path: Path) -> None:
    family: Any = open_family(str(make_deepfloyd_upscaler(tmp_path)))
    rng = torch.Generator().manual_seed(0)
    clean = torch.full((3, 32, 32), 0.5)
    found = [family.picture_conditions(clean, rng) for _ in range(200)]
    for each in (found[0], min(found, key=lambda one: int(one["noised"]))):
        alpha = float(family.noising.alphas_cumprod[int(each["noised"])])
        assert float(each["small"].mean()) == pytest.approx(0.5 * alpha**0.5, abs=0.1)
        assert float(each["small"].std()) == pytest.approx((1 - alpha) ** 0.5, abs=0.05)
    levels = torch.tensor([float(each["noised"]) for each in found])
    assert float(levels.mean()) == pytest.approx(500, abs=70) and levels.min() < 50 and levels.max() > 950


def test_the_variance_is_learned_and_the_noise_is_not_moved_by_it(tmp_path: Path) -> None:
    """Where the noise is predicted exactly the divergence is least at the lower bound, where it is nothing."""
    path: Any = open_family(str(make_deepfloyd(tmp_path))).path  # type: ignore[attr-defined]
    rng = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 256, (3, 3, 8, 8), generator=rng) / 127.5 - 1
    noise, t = torch.randn(clean.shape, generator=rng), torch.tensor([3, 30, 300])
    noisy = path.add_noise(clean, noise, t)

    def at(share: float, predicted: Tensor) -> Tensor:
        return variance_loss(path, clean, noisy, predicted, torch.full_like(clean, share), t)

    assert at(-1, noise).abs().max() < 1e-3 < float(at(1, noise).min()) + 1e-3
    assert (at(0, noise) < at(1, noise)).all() and (at(-1, noise) < at(0, noise)).all()
    # A wrong guess of the noise asks for more variance.
    wrong = noise + 3 * torch.randn(clean.shape, generator=rng)
    assert (at(1, wrong) < at(-1, wrong)).all()
    predicted, share = wrong.clone().requires_grad_(True), torch.zeros_like(clean).requires_grad_(True)
    variance_loss(path, clean, noisy, predicted, share, t).sum().backward()
    assert predicted.grad is None and share.grad is not None and (share.grad.abs() > 0).any()


def test_the_variance_term_is_the_bound_of_the_chain(tmp_path: Path) -> None:
    """KL of two normal distributions whose means and variances are diffusers' own, and the likelihood of bytes."""
    from diffusers import DDPMScheduler

    folder = make_deepfloyd(tmp_path)
    path: Any = open_family(str(folder)).path  # type: ignore[attr-defined]
    ddpm: Any = DDPMScheduler.from_pretrained(folder / "scheduler", thresholding=False, clip_sample=False)
    rng = torch.Generator().manual_seed(1)
    clean = torch.randint(0, 256, (1, 3, 4, 4), generator=rng) / 127.5 - 1
    noise = torch.randn(clean.shape, generator=rng)
    predicted, share = noise + 0.3, torch.full_like(clean, 0.2)
    for step in (700, 40, 0):
        t = torch.tensor([step])
        noisy = path.add_noise(clean, noise, t)
        found = variance_loss(path, clean, noisy, predicted, share, t)
        true, guess = (path.denoised(noisy, each, t) for each in (noise, predicted))
        now, before = ddpm.alphas_cumprod[step], ddpm.alphas_cumprod[step - 1] if step else torch.tensor(1.0)
        beta = 1 - now / before
        means = [before.sqrt() * beta / (1 - now) * each + (now / before).sqrt() * (1 - before) / (1 - now) * noisy
                 for each in (true, guess)]  # fmt: skip
        low = (
            float(((1 - before) / (1 - now) * beta).log()) if step else float(ddpm._get_variance(1, torch.tensor(-1.0)))
        )
        log_variance = 0.6 * math.log(float(beta)) + 0.4 * low
        if step:
            assert log_variance == pytest.approx(float(ddpm._get_variance(step, torch.tensor(0.2))), rel=1e-4)
            one = torch.distributions.Normal(means[0].double(), math.exp(low / 2))
            other = torch.distributions.Normal(means[1].double(), math.exp(log_variance / 2))
            nats = torch.distributions.kl_divergence(one, other).mean()
        else:
            normal = torch.distributions.Normal(means[1].double(), math.exp(log_variance / 2))
            above = torch.where(clean > 0.999, 1.0, normal.cdf(clean.double() + 1 / 255))
            below = torch.where(clean < -0.999, 0.0, normal.cdf(clean.double() - 1 / 255))
            nats = -(above - below).clamp(min=1e-12).log().mean()
        torch.testing.assert_close(found[0].double(), nats / math.log(2), rtol=2e-3, atol=1e-4)


def test_a_picture_is_edited_in_pixels(stages: Stages) -> None:
    """What a mask keeps is kept, and half of the steps keep more of the image than all of them."""
    image = picture(16, 16)
    request = dataclasses.replace(LARGE, height=16, width=16)
    kept = drawn(Engine(stages.family, stages.parts), request, edit=Edit(image, right_half(16, 16), 0.5))[0]
    given = torch.tensor(list(image.tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(kept[:, :, :8], given[:, :, :8])
    assert not torch.allclose(kept[:, :, 8:], given[:, :, 8:], atol=0.1)


def test_what_stages_cannot_do_is_one_line(stages: Stages, tmp_path: Path) -> None:
    second = stages.upscaler.family
    with pytest.raises(UserError, match="^model: a model of family deepfloyd_upscaler only enlarges pictures; draw "):
        check(LARGE, second)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="^upscaler: .*: a model of family deepfloyd enlarges nothing$"):
        check_cascade(LARGE, stages.family, Upscaler(stages.family))
    with pytest.raises(UserError, match="^width: 66: expected a multiple of 4, such as 64 or 68$"):
        check_cascade(dataclasses.replace(LARGE, width=66), stages.family, stages.upscaler)
    with pytest.raises(
        UserError, match="^width: 17: expected a multiple of 2, such as 16 or 18; it is enlarged 4 times$"
    ):
        check_cascade(dataclasses.replace(LARGE, width=68), stages.family, stages.upscaler)
    other = open_family(str(make_sd(tmp_path / "sd")))
    with pytest.raises(UserError, match="^upscaler: .* enlarges what a model of family deepfloyd draws, not sd$"):
        check_cascade(LARGE, other, stages.upscaler)
    with pytest.raises(UserError, match="has no text_encoder, so that it can only be drawn with"):
        _ = second.encoders
    with pytest.raises(UserError, match="^objective.type: consistency: a model of family deepfloyd learns denoise or "):
        make_objective(ConsistencyObjective(), stages.family)


@pytest.mark.parametrize(("broken", "message"), [
    ("scheduler", "{folder}/scheduler/scheduler_config.json: missing; a model folder in diffusers layout has it"),
    ("noising", "{folder}/image_noising_scheduler/scheduler_config.json: missing; a model folder in diffusers layout"),
    ("scale", "{folder}/model_index.json: scale: 1.5: expected a whole number from 2 on"),
])  # fmt: skip
def test_a_damaged_second_stage_is_one_line(stages: Stages, tmp_path: Path, broken: str, message: str) -> None:
    folder = shutil.copytree(stages.second, tmp_path / "second")
    if broken == "scale":
        index = json.loads((folder / "model_index.json").read_text())
        write_json(folder / "model_index.json", index | {"scale": 1.5})
    else:
        shutil.rmtree(folder / {"scheduler": "scheduler", "noising": "image_noising_scheduler"}[broken])
    with pytest.raises(UserError) as caught:
        family: Any = open_family(str(folder))
        family.fingerprint()
        _ = family.path
    assert str(caught.value).startswith(message.format(folder=folder))


def test_an_upscaler_for_another_encoder_is_refused(stages: Stages, tmp_path: Path) -> None:
    other: Any = open_family(str(make_deepfloyd_upscaler(tmp_path, reader=False, unet_config={"encoder_hid_dim": 24})))
    with pytest.raises(UserError, match="reads 24 numbers a token; the text_encoder of .* has 48$"):
        other.lent(stages.family)


def test_the_command_draws_through_both_stages(stages: Stages, tmp_path: Path) -> None:
    """Width and height, the model's own here, are those of the large picture; its file says what enlarged it."""
    (path,) = run(
        out=tmp_path / "out", model=str(stages.first), upscaler=Enlarged(str(stages.second), guidance=2.0),
        prompt=LARGE.prompt, negative_prompt="blurry", seed=3, steps=4, guidance=3.0, registry=str(tmp_path),
    )  # fmt: skip
    image = decode(path)
    pixels = torch.tensor(list(image.tobytes())).view(64, 64, 3).permute(2, 0, 1)
    assert (pixels - stages.theirs(LARGE, steps=4)[1].clamp(0, 1) * 255).abs().max() <= 0.55  # rounded to bytes
    found = read_recipe(path)
    assert found["model"]["source"] == str(stages.first) and (found["width"], found["height"]) == (64, 64)
    assert found["upscaler"]["model"]["source"] == str(stages.second)
    assert found["upscaler"]["guidance"] == 2.0 and found["upscaler"]["adapters"] == []


@pytest.mark.parametrize(("options", "message"), [
    ({"model": "second"}, "--model: a model of family deepfloyd_upscaler only enlarges pictures; draw with its "),
    ({"upscaler": "nowhere"}, "--upscaler {tmp}/nowhere: model.source: {tmp}/nowhere: no such folder"),
    ({"upscaler": "first"}, "--upscaler: {tmp}/first: a model of family deepfloyd enlarges nothing"),
    ({"upscaler": "second", "width": 66}, "--width: 66: expected a multiple of 4, such as 64 or 68"),
    ({"upscaler": "second", "workers": 2}, "--workers: 2: a cascade is drawn here; leave it out"),
    ({"upscaler": None, "upscaler_adapter": ["x"]}, "--upscaler-adapter: x: there is no --upscaler that it would be"),
])  # fmt: skip
def test_a_wrong_cascade_is_one_line(stages: Stages, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    from gtl.cli.drawing import generate as command

    where = stages.first.parent
    given = {key: str(where / v) if key in ("model", "upscaler") and v else v for key, v in options.items()}
    with pytest.raises(UserError) as caught:
        command(tmp_path / "out", **{"model": str(stages.first), "prompt": "a dog", **given})
    assert str(caught.value).startswith(message.format(tmp=where)) and "\n" not in str(caught.value)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_run_of_the_second_stage_shows_what_it_makes_of_small_pictures(tmp_path: Path) -> None:
    """Three rows: as seen, as enlarged, as they are; captions are those of the cache."""
    folder = make_deepfloyd_upscaler(tmp_path / "model")
    recipe = parse_recipe(
        {
            "model": {"source": str(folder), "dtype": "fp32"},
            "data": {"source": str(tmp_path), "resolution": 16},
            "evaluate": {"steps": 2, "guidance": 2.0},
        }
    )
    trainee = assemble(recipe, "fp32")
    family: Any = trainee.family
    encoder = {"text_encoder": family.load("text_encoder")}
    texts = ["a dog", "a cat", ""]
    known = dict(zip(map(prompt_key, texts), family.encode_prompts(encoder, texts), strict=True))
    cache = Store(str(tmp_path / "cache"))
    Space(cache, "texts").write(known)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Space(cache, BYTE_SPACE).write({f"{i}": {"mean": each} for i, each in enumerate(pixels)})
    entries = [Entry(Record(f"{i}", f"{i}", (16, 16), (texts[i],)), (16, 16), (f"{i}",)) for i in range(2)]
    dataset = Dataset(cache, entries, BYTE_SPACE, "texts", Cuts(crops=1, flip=False, seed=0))
    dataset.refresh()
    pictures = Pictures(recipe.evaluate, "model", trainee, dataset, torch.device("cpu"), torch.float32)
    shown = enlarged_of(pictures, Dataset(cache, [], BYTE_SPACE, "texts", dataset.cuts), dataset)
    with torch.no_grad():
        shown.draw(pictures.parts(), Store(str(tmp_path / "run")), 7)
    images = cells(decode(tmp_path / "run" / "samples" / "00000007.png"), 2, 6)
    found = torch.stack([torch.tensor(list(image.tobytes())).view(16, 16, 3).permute(2, 0, 1) for image in images])
    assert torch.equal(found[4:], pixels)
    seen = found[:2, :, ::4, ::4]
    assert torch.equal(found[:2], seen.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert all(found[2 + i].float().std() > 5 and not torch.equal(found[2 + i], found[4 + i]) for i in range(2))


@pytest.mark.parametrize(("told", "message"), [
    ({"evaluate": {"beside": {"metrics": ["kid"]}}}, "evaluate.beside.metrics: kid: a model of family deepfloyd_upsca"),
    ({"objective": {"prior": {"prompt": "a dog"}}}, "objective.prior: 'a dog': a model of family deepfloyd_upscaler "),
])  # fmt: skip
def test_a_run_of_the_second_stage_measures_no_pictures(
    stages: Stages, tmp_path: Path, told: dict[str, Any], message: str
) -> None:
    recipe = parse_recipe(
        {
            "model": {"source": str(stages.second)},
            "data": {"source": str(tmp_path), "validation": 0.1},
            **told,
        }
    )
    with pytest.raises(UserError) as caught:
        check_drawn(recipe, stages.upscaler.family)
    assert str(caught.value).startswith(message)
    check_drawn(recipe, stages.family)


def test_a_server_has_the_first_stage_and_not_the_second(stages: Stages) -> None:
    from gtl.adapters.card import Base as CardBase
    from gtl.adapters.card import Card
    from serve.catalog import bases_of, find_here
    from serve.settings import Base

    sources = {"deepfloyd": stages.first, "deepfloyd_upscaler": stages.second}
    cards = [
        Card(name="a", version="1", base=CardBase(source=str(folder), fingerprint="0", family=family), tuner={})
        for family, folder in sources.items()
    ]
    assert [base.source for base in bases_of(cards)] == [str(stages.first)]
    assert find_here(Base(name="first", source=str(stages.first))).name == "deepfloyd"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="^bases: second: .*: a model of family deepfloyd_upscaler only enlarges pictu"):
        find_here(Base(name="second", source=str(stages.second)))
