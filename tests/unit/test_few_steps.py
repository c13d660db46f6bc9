"""Drawing with an adapter for few steps: the sampler that its card names, from import to picture."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gtl.adapters import Card, Registry
from gtl.adapters.card import base_of
from gtl.adapters.commands import import_adapter
from gtl.adapters.formats import LoraExport, write_lora
from gtl.adapters.fuse import fuse
from gtl.families import open_family
from gtl.families.base import DiffusionFamily
from gtl.generate.command import run
from gtl.generate.engine import Engine
from gtl.generate.images import load_parts
from gtl.generate.request import Request
from gtl.images import read_recipe
from gtl.types import UserError
from serve.catalog import Catalog
from serve.schema import Adapter
from serve.settings import Base, Settings
from tests.tiny import make_sd

FAST = Request("a photo of a dog", 64, 64, seed=7, steps=4, guidance=1.0, sampler="lcm")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def family(sd: Path) -> DiffusionFamily:
    return open_family(str(sd))


@pytest.fixture(scope="module")
def registry(family: DiffusionFamily, sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two LoRAs: dog, and fast, which is for few steps."""
    found = Registry(tmp_path_factory.mktemp("registry"))
    for seed, (name, sampler) in enumerate((("dog", "model"), ("fast", "lcm"))):
        folder, rng = tmp_path_factory.mktemp(name), torch.Generator().manual_seed(seed)
        layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
        tensors = {f"{layer}.lora_{side}.weight": torch.randn(shape, generator=rng)
                   for side, shape in (("A", (4, 32)), ("B", (32, 4)))}  # fmt: skip
        write_lora(tensors, folder, config=LoraExport(rank=4, alpha=4))
        card = Card(name=name, version="v1", base=base_of(family, str(sd)), tuner={"type": "lora"}, sampler=sampler)
        found.publish(name, "v1", folder, card)
    return found


def draw(engine: Engine, *requests: Request) -> list[Tensor]:
    handles = [engine.add(request) for request in requests]
    pictures = {}
    while len(engine):
        finished = engine.step()
        pictures |= zip([item.handle for item in finished], engine.decode(finished), strict=True)
    return [pictures[handle] for handle in handles]


def engine(family: DiffusionFamily) -> Engine:
    return Engine(family, load_parts(family, [], device="cpu", dtype=torch.float32))


@pytest.mark.parametrize("change", [{}, {"guidance": 2.0}, {"steps": 1}, {"steps": 8, "height": 96}])
def test_a_picture_in_few_steps_equals_plain_diffusers(
    sd: Path, family: DiffusionFamily, change: dict[str, float]
) -> None:
    from diffusers import LCMScheduler, StableDiffusionPipeline

    request = replace(FAST, **change)
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    wanted = pipeline(
        request.prompt, num_inference_steps=request.steps, guidance_scale=request.guidance, height=request.height,
        width=request.width, output_type="pt", generator=torch.Generator().manual_seed(request.seed),
    ).images[0]  # fmt: skip
    (picture,) = draw(engine(family), request)
    assert (picture - wanted).abs().max() < 1e-4
    assert wanted.std() > 0.05, "a flat picture compares nothing"


def test_few_steps_and_many_share_a_batch(family: DiffusionFamily) -> None:
    many = Request("a cat", 64, 64, seed=3, steps=6, guidance=1.0)
    both = engine(family)
    first, second = (both.add(request) for request in (FAST, many))
    both.step()
    assert set(both.batch) == {first, second}
    for request, picture in zip((FAST, many), draw(engine(family), FAST, many), strict=True):
        (alone,) = draw(engine(family), request)
        assert (picture - alone).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("adapters", "given", "told"),
    [
        (["dog"], {}, ("model", 25, 7.5)),
        (["fast"], {}, ("lcm", 4, 1.0)),
        (["dog:0.5", "fast"], {}, ("lcm", 4, 1.0)),
        (["fast"], {"steps": 2, "guidance": 1.5}, ("lcm", 2, 1.5)),
    ],
)
def test_an_adapter_decides_how_it_is_drawn(
    registry: Registry, tmp_path: Path, adapters: list[str], given: dict[str, float], told: tuple[str, int, float]
) -> None:
    (path,) = run(out=tmp_path, prompt="a dog", registry=registry.store.root, adapters=adapters, **given)
    recipe = read_recipe(path)
    assert (recipe["sampler"], recipe["steps"], recipe["guidance"]) == told


def test_more_steps_than_its_sampler_knows_are_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--steps: 51: expected 1 to 50"):
        run(out=tmp_path, prompt="a dog", registry=registry.store.root, adapters=["fast"], steps=51)


def test_what_is_fused_with_it_and_what_is_imported_says_so(registry: Registry, sd: Path) -> None:
    assert registry.show(str(fuse(registry, [("dog", 1.0), ("fast", 1.0)], name="both"))).sampler == "lcm"
    file = registry.fetch("fast@v1") / "pytorch_lora_weights.safetensors"
    root = registry.store.root
    assert import_adapter(root, file, str(sd), "theirs", sampler="lcm").sampler == "lcm"
    assert import_adapter(root, file, str(sd), "plain").sampler == "model"


def test_an_endpoint_draws_it_in_few_steps(registry: Registry, sd: Path) -> None:
    base = Base(name="tiny", source=str(sd), steps=30, guidance=5.0)
    catalog = Catalog(Settings(registry=registry.store.root, bases=(base,)))
    found = {}
    for model, beside in (("tiny", []), ("tiny:dog", []), ("tiny:fast", []), ("tiny:dog", [Adapter(name="fast")])):
        chosen = catalog.choose(model, beside)
        found[model, len(beside)] = (chosen.sampler, *chosen.base.sampling(chosen.sampler))
    assert found == {
        ("tiny", 0): ("model", 30, 5.0), ("tiny:dog", 0): ("model", 30, 5.0), ("tiny:fast", 0): ("lcm", 4, 1.0),
        ("tiny:dog", 1): ("lcm", 4, 1.0),
    }  # fmt: skip
