"""The drawing engine against plain diffusers and against itself, and `gtl generate` on a tiny model."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from gtl.adapters import Card, Registry
from gtl.adapters.card import Base, base_of
from gtl.adapters.formats import LoraExport, write_lora
from gtl.config.objectives import PriorPreservation
from gtl.families import open_family
from gtl.generate.class_images import class_folder
from gtl.generate.command import Adapter, choose_base, run
from gtl.generate.engine import Engine, Output
from gtl.generate.images import generate, load_parts
from gtl.generate.pixels import to_image
from gtl.generate.prompts import Prompt, read_prompts
from gtl.generate.request import Request
from gtl.generate.spread import Model, Order, Origin, cut
from gtl.images import read_recipe
from gtl.storage import Store
from gtl.types import UserError
from tests.tiny import make_sd, write_json

SCHEDULERS = [
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "HeunDiscreteScheduler",
]
DOG = Request("a photo of a dog", 64, 64, negative_prompt="blurry", seed=7, steps=5, guidance=6.0)


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def parts(sd):
    return load_parts(open_family(str(sd)), [], device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline(sd):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_scheduler(sd: Path, folder: Path, name: str) -> Path:
    """The same model with another sampler in its config."""
    shutil.copytree(sd, folder)
    config = json.loads((sd / "scheduler/scheduler_config.json").read_text())
    write_json(folder / "scheduler/scheduler_config.json", {**config, "_class_name": name})
    index = json.loads((sd / "model_index.json").read_text())
    write_json(folder / "model_index.json", {**index, "scheduler": ["diffusers", name]})
    return folder


def plain(pipeline, folder: Path, request: Request) -> torch.Tensor:
    """What the diffusers pipeline draws, [3, H, W] in [0, 1]."""
    import diffusers

    name = json.loads((folder / "model_index.json").read_text())["scheduler"][1]
    pipeline.scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    return pipeline(
        request.prompt, negative_prompt=request.negative_prompt, num_inference_steps=request.steps,
        guidance_scale=request.guidance, height=request.height, width=request.width, output_type="pt",
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]  # fmt: skip


def drain(engine: Engine) -> dict[int, torch.Tensor]:
    """Step until nothing is left; pictures by handle."""
    pictures = {}
    while len(engine):
        finished = engine.step()
        pictures |= zip([item.handle for item in finished], engine.decode(finished), strict=True)
    return pictures


def through(engine: Engine) -> list[Output]:
    """Step until nothing is left; what came of it, in order."""
    outputs = []
    while len(engine):
        outputs += engine.step()
    return outputs


def draw(engine: Engine, *requests: Request) -> list[torch.Tensor]:
    handles = [engine.add(request) for request in requests]
    pictures = drain(engine)
    return [pictures[handle] for handle in handles]


@pytest.fixture
def rows(parts):
    """Rows of every forward pass of the UNet, in order."""
    seen: list[int] = []
    hook = parts["unet"].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    yield seen
    hook.remove()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("change", [{}, {"guidance": 1.0}, {"height": 96, "steps": 3}], ids=["cfg", "no-cfg", "tall"])
def test_picture_equals_plain_diffusers(sd, parts, pipeline, tmp_path, scheduler, change):
    folder = with_scheduler(sd, tmp_path / "model", scheduler)
    request = replace(DOG, **change)
    (picture,) = draw(Engine(open_family(str(folder)), parts), request)
    expected = plain(pipeline, folder, request)
    assert picture.shape == (3, request.height, request.width)
    assert (picture - expected).abs().max() < 1e-4
    assert expected.std() > 0.1, "a flat picture compares nothing"


def test_v_prediction_equals_plain_diffusers(tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = make_sd(tmp_path / "model", prediction_type="v_prediction", scheduler="DDIMScheduler")
    family = open_family(str(folder))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    (picture,) = draw(Engine(family, load_parts(family, [], device="cpu", dtype=torch.float32)), DOG)
    assert (picture - plain(pipeline, folder, DOG)).abs().max() < 1e-4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_batch_of_mixed_requests_equals_each_alone(sd, parts, rows, tmp_path, scheduler):
    family = open_family(str(with_scheduler(sd, tmp_path / "model", scheduler)))
    mixed = [
        DOG,
        replace(DOG, steps=3, guidance=2.0, seed=11),
        replace(DOG, prompt="a red house", negative_prompt="", steps=8, guidance=12.0),
    ]
    together = draw(Engine(family, parts), *mixed)
    assert max(rows) == 2 * len(mixed), "they shared a batch"
    for request, picture in zip(mixed, together, strict=True):
        (alone,) = draw(Engine(family, parts), request)
        assert (picture - alone).abs().max() < 1e-4
    assert all((together[0] - other).abs().mean() > 0.01 for other in together[1:])


def test_requests_join_and_leave_between_steps(sd, parts, rows):
    family = open_family(str(with_ddim(sd)))
    engine = Engine(family, parts, max_batch=3)
    first, second = (engine.add(replace(DOG, steps=steps)) for steps in (4, 2))
    assert engine.step() == []
    late, waiting = (engine.add(replace(DOG, steps=steps, seed=3)) for steps in (3, 1))
    done = [[item.handle for item in engine.step()] for _ in range(5)]
    assert done == [[second], [waiting], [first, late], [], []]
    assert rows == [4, 6, 6, 4], "three at a time; the fourth took the place of the one that was through"


def with_ddim(sd: Path) -> Path:
    """DDIM takes exactly `steps` steps, PNDM one more."""
    folder = sd.with_name(f"{sd.name}-ddim")
    return folder if folder.exists() else with_scheduler(sd, folder, "DDIMScheduler")


def test_what_cannot_share_a_batch_does_not(sd, parts, rows):
    engine = Engine(open_family(str(with_ddim(sd))), parts, max_batch=2)
    two = replace(DOG, steps=2)
    draw(engine, two, replace(two, guidance=1.0), replace(two, width=96), two, two)
    # Each kind has its turn, those with the least work done first: 1 is the unguided, 2 the wide, 4 a pair.
    assert rows == [4, 1, 2, 1, 2, 4, 2, 2]


def test_a_step_has_a_bound_of_pixels(sd, parts, rows):
    engine = Engine(open_family(str(with_ddim(sd))), parts, max_batch=4, max_pixels=2 * 64 * 64)
    one = replace(DOG, steps=1, guidance=1.0)
    draw(engine, one, one, one, replace(one, width=192))
    assert rows == [2, 1, 1], "the third has the next turn, since the wide one alone counts as three"


def test_a_cancelled_request_is_gone(sd, parts, rows):
    engine = Engine(open_family(str(with_ddim(sd))), parts)
    kept, dropped = (engine.add(replace(DOG, steps=2, seed=seed)) for seed in (1, 2))
    engine.step()
    engine.cancel(dropped)
    engine.cancel(dropped)
    assert list(drain(engine)) == [kept]
    assert rows == [4, 2]


def test_previews_come_ever_closer_to_the_picture(sd, parts):
    engine = Engine(open_family(str(with_ddim(sd))), parts)
    handle = engine.add(replace(DOG, steps=8), previews=(2, 4, 7, 8))
    outputs = [output for _ in range(8) for output in engine.step()]
    assert [(output.handle, output.preview) for output in outputs] == [(handle, number) for number in (0, 1, 2, None)]
    *previews, picture = engine.decode(outputs)
    away = [float((preview - picture).abs().mean()) for preview in previews]
    assert away == sorted(away, reverse=True) and 0 < away[2] < away[0] / 2


def test_half_precision_draws_nearly_the_same_from_the_same_noise(sd, parts):
    family = open_family(str(sd))
    half = load_parts(family, [], device="cpu", dtype=torch.bfloat16)
    assert [half[part].dtype for part in ("unet", "text_encoder", "vae")] == [torch.bfloat16] * 2 + [torch.float32]
    (picture,) = draw(Engine(family, half, dtype=torch.bfloat16), DOG)
    (exact,) = draw(Engine(family, parts), DOG)
    assert picture.dtype == torch.float32
    assert 0 < (picture - exact).abs().mean() < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_gpu_draws_the_same_picture(sd, parts, tmp_path, scheduler):
    family = open_family(str(with_scheduler(sd, tmp_path / "model", scheduler)))
    there = load_parts(family, [], device="cuda", dtype=torch.float32)
    (picture,) = draw(Engine(family, there, "cuda"), DOG)
    (exact,) = draw(Engine(family, parts), DOG)
    assert (picture - exact).abs().mean() < 1 / 255


def test_prompts_are_encoded_once(sd, parts):
    encoded = []
    hook = parts["text_encoder"].register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    draw(Engine(open_family(str(sd)), parts), *(replace(DOG, seed=seed, steps=1) for seed in range(4)))
    hook.remove()
    assert encoded == [1, 1], "the prompt and the negative prompt"


def test_decode_keeps_the_order_of_mixed_sizes(sd, parts):
    engine = Engine(open_family(str(sd)), parts)
    rng = torch.Generator().manual_seed(0)
    sides = [8, 8, 8, 8, 8, 4, 8]
    items = [Output(i, DOG, torch.randn(1, 4, side, 8, generator=rng)) for i, side in enumerate(sides)]
    pictures = engine.decode(items)
    assert [tuple(picture.shape) for picture in pictures] == [(3, 8 * side, 64) for side in sides]
    for item, picture in zip(items, pictures, strict=True):
        assert (picture - engine.decode([item])[0]).abs().max() < 1e-5
    assert all(0 <= picture.min() and picture.max() <= 1 for picture in pictures)


def test_generate_yields_every_position_once(sd, parts):
    requests = [replace(DOG, seed=seed, steps=1 + seed % 3) for seed in range(7)]
    progress = []
    results = list(generate(open_family(str(sd)), requests, max_batch=2, progress=lambda *args: progress.append(args)))
    assert sorted(position for position, _ in results) == list(range(7))
    assert progress == [("load", 0, 0), *(("draw", done, 7) for done in range(8))]
    images = dict(results)
    (alone,) = draw(Engine(open_family(str(sd)), parts), requests[4])
    assert channel_difference(images[4], to_image(alone)) <= 1
    assert len({image.tobytes() for image in images.values()}) == 7


def channel_difference(one: Image.Image, other: Image.Image) -> int:
    """The greatest difference of two 8-bit pictures."""
    from PIL import ImageChops

    return max(high for _, high in ImageChops.difference(one, other).getextrema())


def test_no_requests_load_nothing(sd):
    assert list(generate(open_family(str(sd)), [], progress=lambda *args: pytest.fail("it began"))) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: 0: expected 1 to 999"),
        ({"steps": 1000}, "steps: 1000: expected 1 to 999"),
        ({"guidance": -1.0}, "guidance: -1: expected a number >= 0; 1 and below is no guidance"),
        ({"guidance": float("nan")}, "guidance: nan: expected a number >= 0; 1 and below is no guidance"),
        ({"seed": -1}, "seed: -1: expected 0 to 2**63 - 1"),
        ({"seed": 2**63}, "seed: 9223372036854775808: expected 0 to 2**63 - 1"),
        ({"width": 100}, "width: 100: expected a multiple of 16, such as 96 or 112"),
        ({"height": 8}, "height: 8: expected a multiple of 16, such as 16"),
        ({"height": 0}, "height: 0: expected a multiple of 16, such as 16"),
    ],
)
def test_requests_that_cannot_be_drawn_are_refused(sd, parts, change, message):
    engine = Engine(open_family(str(sd)), parts)
    with pytest.raises(UserError) as error:
        engine.add(replace(DOG, **change))
    assert str(error.value) == message
    assert len(engine) == 0


def test_prompts_files(tmp_path):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_bytes("\ufeffa dog\n\n  a cat \r\nein Käfer\n".encode())
    assert read_prompts(None, text) == [Prompt(prompt="a dog"), Prompt(prompt="a cat"), Prompt(prompt="ein Käfer")]
    lines.write_text('{"prompt": "a dog", "seed": 5}\n\n{"prompt": "a cat", "negative_prompt": "dog"}\n')
    assert read_prompts(None, lines) == [Prompt(prompt="a dog", seed=5), Prompt(prompt="a cat", negative_prompt="dog")]
    assert read_prompts("", None) == [Prompt(prompt="")], "the empty prompt can be drawn"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "cannot be read: No such file or directory"),
        ("empty.txt", b" \n\n", "no prompt in it; expected one a line"),
        ("image.txt", b"a\xff", "not UTF-8 text (byte 1)"),
        ("a.jsonl", b'{"prompt": "a"}\n{"promt": "b"}', ":2: prompt: Field required; fields: prompt, negative_prompt"),
        ("b.jsonl", b'{"prompt": "a", "sed": 1}', ":1: sed: Extra inputs are not permitted; fields: prompt, neg"),
        ("c.jsonl", b"a dog", ":1: Invalid JSON: expected value"),
    ],
)
def test_wrong_prompts_files(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"^--prompts ") as error:
        read_prompts(None, file)
    assert str(file) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def published(sd, tmp_path_factory) -> tuple[Registry, str]:
    """A registry with one LoRA, dog@v1, whose picture differs clearly from the base's."""
    folder = tmp_path_factory.mktemp("lora")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    rng = torch.Generator().manual_seed(5)
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(4, 32, generator=rng),
        f"{layer}.lora_B.weight": torch.randn(32, 4, generator=rng),
    }
    write_lora(tensors, folder, config=LoraExport(rank=4, alpha=8))
    registry = Registry(tmp_path_factory.mktemp("registry"))
    card = Card(name="dog", version="v1", base=base_of(open_family(str(sd)), str(sd)), tuner={"type": "lora"})
    registry.publish("dog", "v1", folder, card)
    registry.promote("dog@v1", "prod")
    return registry, registry.store.root


def test_run_writes_pictures_with_recipes_and_a_grid(sd, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a dog"}\n{"prompt": "a cat", "negative_prompt": "red", "seed": 40}\n')
    options = {"prompts": file, "model": str(sd), "negative_prompt": "blurry", "seed": 3, "steps": 2, "count": 2}
    paths = run(out=tmp_path / "a", **options)
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png", "0003.png", "grid.png"]
    recipes = [read_recipe(path) for path in paths[:-1]]
    fingerprint = open_family(str(sd)).fingerprint()
    assert recipes[2] == {
        "prompt": "a cat",
        "negative_prompt": "red",
        "seed": 40,
        "steps": 2,
        "guidance": 7.5,
        "sampler": "model",
        "height": 64,
        "width": 64,
        "model": {"source": str(sd), "revision": None, "variant": None, "fingerprint": fingerprint},
        "adapters": [],
        "dtype": "float32",
        "gtl": "0.1.0",
    }
    assert [(r["prompt"], r["negative_prompt"], r["seed"]) for r in recipes] == [
        ("a dog", "blurry", 3), ("a dog", "blurry", 4), ("a cat", "red", 40), ("a cat", "red", 41),
    ]  # fmt: skip
    grid = Image.open(paths[-1])
    assert grid.size == (128, 128)
    made_of = read_recipe(paths[-1])
    assert [{**picture, **made_of, "pictures": None} for picture in made_of["pictures"]] == [
        {**recipe, "pictures": None} for recipe in recipes
    ]
    for index, corner in enumerate([(0, 0), (64, 0), (0, 64), (64, 64)]):
        cell = grid.crop((*corner, corner[0] + 64, corner[1] + 64))
        assert cell.tobytes() == Image.open(paths[index]).tobytes()
    again = run(out=tmp_path / "b", **options)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_a_model_that_has_one_variant_only_is_drawn_with(tmp_path):
    folder = make_sd(tmp_path / "sd", variant="fp16")
    options = {"out": tmp_path / "out", "prompt": "a dog", "steps": 2, "model": str(folder)}
    with pytest.raises(UserError, match=r"^model\.variant: null: no such weights in .*; found: fp16$"):
        run(**options)
    (path,) = run(**options, variant="fp16")
    assert read_recipe(path)["model"]["variant"] == "fp16"


def test_a_picture_that_is_nan_is_no_black_one(sd, published, tmp_path):
    _, registry = published
    with pytest.raises(UserError, match=r"^'a dog', seed 4: the model draws NaN, no picture; weights are damaged"):
        run(out=tmp_path / "out", prompt="a dog", seed=4, steps=2, registry=registry, adapters=["dog:1e38"])
    assert list((tmp_path / "out").iterdir()) == []


def test_run_takes_the_base_from_the_adapter(sd, published, tmp_path):
    _, registry = published
    common = {"prompt": "a dog", "seed": 1, "steps": 3, "registry": registry}

    def picture(name: str, **options) -> Path:
        (path,) = run(out=tmp_path / name, **common, **options)
        return path

    base = picture("base", model=str(sd))
    full = picture("full", adapters=["dog"])
    half = picture("half", adapters=["dog@prod:0.5"])
    none = picture("none", adapters=["dog@v1:0"], model=str(sd))
    assert read_recipe(full)["adapters"] == ["dog@v1:1"]
    assert read_recipe(half)["adapters"] == ["dog@v1:0.5"]
    assert read_recipe(full)["model"] == read_recipe(base)["model"]
    images = {path: Image.open(path) for path in (base, full, half, none)}
    assert images[none].tobytes() == images[base].tobytes()
    assert channel_difference(images[base], images[full]) > channel_difference(images[base], images[half]) > 5


def test_a_relative_path_is_the_model_of_the_card(tmp_path, monkeypatch):
    base = Base(source=str(tmp_path / "sd"), variant="fp16", fingerprint="f" * 64, family="sd")
    (tmp_path / "sd").mkdir()
    monkeypatch.chdir(tmp_path)
    adapter = Adapter("dog@v1", tmp_path, 1.0, base)
    for written in ("sd", "./sd", str(tmp_path / "sd")):
        assert choose_base(written, [adapter]) == (base.source, None, "fp16")
    assert choose_base("org/other", [adapter]) == ("org/other", None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--prompt: neither of --prompt and --prompts given; expected one of them"),
        ({"prompt": "a", "prompts": Path("x")}, "--prompt: both of --prompt and --prompts given; expected one of them"),
        ({"prompt": "a", "model": None}, "--model: missing; give a model, or an --adapter whose card names its base"),
        ({"prompt": "a", "count": 0}, "--count: 0: expected 1 or more"),
        ({"prompt": "a", "workers": 0}, "--workers: 0: expected 1 or more, or auto"),
        ({"prompt": "a", "workers": "many"}, "--workers: many: expected 1 or more, or auto"),
        ({"prompt": "a", "steps": 0}, "--steps: 0: expected 1 to 999"),
        ({"prompt": "a", "guidance": -2.0}, "--guidance: -2: expected a number >= 0; 1 and below is no guidance"),
        ({"prompt": "a", "width": 60}, "--width: 60: expected a multiple of 16, such as 48 or 64"),
        ({"prompt": "a", "height": 60}, "--height: 60: expected a multiple of 16, such as 48 or 64"),
        ({"prompt": "a", "adapters": ["dog", "dog@prod:2"]}, "--adapter dog@prod:2: dog@v1 is given twice; "),
        ({"prompt": "a", "adapters": ["cat"]}, "adapter 'cat': not in the registry "),
        ({"prompt": "a", "adapters": ["dog:strong"]}, "adapter 'dog:strong': the part after ':' is its scale"),
    ],
)
def test_run_names_the_wrong_option(sd, published, tmp_path, options, message):
    with pytest.raises(UserError) as error:
        run(**{"model": str(sd), "out": tmp_path / "out", "registry": published[1], **options})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/*"))


def test_run_refuses_an_adapter_of_another_base(sd, published, tmp_path):
    other = make_sd(tmp_path / "other", seed=1)
    with pytest.raises(UserError) as error:
        run(out=tmp_path / "out", prompt="a", model=str(other), adapters=["dog"], registry=published[1])
    ours, theirs = (open_family(str(folder)).fingerprint()[:12] for folder in (sd, other))
    assert str(error.value) == f"--adapter dog@v1: was made for {sd} ({ours}); the model is {other} ({theirs})"


def test_run_refuses_an_unknown_sampler(sd, tmp_path):
    folder = with_scheduler(sd, tmp_path / "model", "FancyScheduler")
    with pytest.raises(UserError, match=r"scheduler_config.json: _class_name: 'FancyScheduler': .*no such scheduler$"):
        run(out=tmp_path / "out", prompt="a", model=str(folder))


def test_run_refuses_a_folder_it_cannot_write_to(sd, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for out, reason in ((file, "File exists"), (file / "out", "Not a directory")):
        with pytest.raises(UserError) as error:
            run(out=out, prompt="a", model=str(sd))
        assert str(error.value) == f"--out {out}: cannot be written to: {reason}"


def test_run_on_a_full_disk_keeps_what_is_saved(sd, small_disk):
    (small_disk / "ballast").write_bytes(bytes(2**20 - 32 * 2**10))
    with pytest.raises(UserError) as error:
        run(out=small_disk, prompt="a dog", model=str(sd), steps=1, count=8)
    assert str(error.value) == f"--out {small_disk}: cannot be written to: No space left on device"
    assert Image.open(small_disk / "0000.png").size == (64, 64)


def test_the_command_is_imported_without_torch():
    program = "import sys, gtl.generate.command; print(sorted({'torch', 'ray', 'diffusers'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_batches_are_of_one_model_and_leave_no_worker_without():
    base, other = (Model(Origin(source), "f" * 64) for source in ("base", "other"))
    orders = [Order(model, DOG) for model in (base, base, other, base, other, base, base)]

    def positions(workers: int, max_batch: int) -> list[list[int]]:
        return [batch.positions for batch in cut(orders, workers, max_batch)]

    assert positions(1, 4) == [[0, 1, 3, 5], [6], [2, 4]]
    assert positions(4, 4) == [[0, 1], [3, 5], [6], [2, 4]]
    assert positions(7, 4) == [[0], [1], [3], [5], [6], [2], [4]]


def test_class_images_of_another_prior_are_others(sd, tmp_path):
    family, prior = open_family(str(sd)), PriorPreservation(prompt="a photo of a dog", images=3, steps=2)

    def folder(dtype: str = "fp32", **changes: object) -> str:
        return class_folder(family, prior.model_copy(update=changes), Store(tmp_path), dtype).root

    assert folder(weight=0.5) == folder(), "the weight draws no other pictures"
    assert len({folder(), folder("bf16"), folder(steps=1), folder(images=4), folder(prompt="a dog")}) == 5
