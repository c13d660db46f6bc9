"""Adapters in a model that draws for many: everyone's picture is the one it gets alone."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from PIL import Image
from torch import Tensor

from gtl.adapters.delta import write_delta
from gtl.adapters.formats import LoraExport, write_lora
from gtl.adapters.residents import BASE, Adapters, Residents, Seat
from gtl.families import open_family
from gtl.generate.edit import Edit
from gtl.generate.engine import Engine
from gtl.generate.images import generate, load_parts
from gtl.generate.pixels import pixels_of
from gtl.generate.request import Request
from gtl.types import UserError
from tests.loras import random_lora
from tests.tiny import make_sd

DOG = Request("a photo of a dog", 64, 64, seed=3, steps=3, guidance=5.0)
RANK = 4
SAME = 2e-4
"""Of a channel in [0, 1]; sums of batches of other sizes are rounded in another order."""


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def folders(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter of every kind."""
    place, parts = tmp_path_factory.mktemp("adapters"), load(sd)
    unet, encoder = parts["unet"], parts["text_encoder"]
    config = LoraExport(rank=RANK, alpha=2.0)
    write_lora(random_lora(unet, "unet", seed=1, only="attn"), place / "a", config=config)
    write_lora(random_lora(unet, "unet", seed=2, only="conv1"), place / "b", config=config)
    write_lora(random_lora(unet, "unet", seed=7, only="attn"), place / "all", config=config)
    both = random_lora(unet, "unet", seed=3, only="attn") | random_lora(encoder, "text_encoder", seed=4)
    write_lora(both, place / "words", config=config)
    write_lora(random_lora(unet, "unet", seed=5, rank=9, only="attn"), place / "wide", config=LoraExport(9, 2.0))
    dora = random_lora(unet, "unet", seed=6, only="attn2", dora=True)
    write_lora(dora, place / "dora", config=LoraExport(rank=RANK, alpha=2.0, dora=True))
    moved = {f"unet.{name}": value * 1.3 for name, value in unet.named_parameters() if name.startswith("up_blocks")}
    write_delta(moved, place / "delta")
    codec = {f"vae.{name}": value * 1.1 for name, value in parts["vae"].named_parameters() if value.ndim > 1}
    write_delta(codec, place / "codec")
    return {folder.name: folder for folder in place.iterdir()}


def load(sd: Path) -> dict[str, Any]:
    return load_parts(open_family(str(sd)), [], device="cpu", dtype=torch.float32)


def make_engine(sd: Path, slots: int = 8, max_batch: int = 16, **options: Any) -> Engine:
    family, parts = open_family(str(sd)), load(sd)
    targets = {"unet": family.lora_targets(parts["unet"], "all-linear+conv")}
    targets |= {part: family.encoder_targets(parts[part], "all-linear") for part in family.encoders}
    return Engine(family, parts, max_batch=max_batch, residents=Residents(parts, targets, slots, 2 * RANK, **options))


def take(engine: Engine, adapters: Adapters, **options: Any) -> Seat:
    """A seat that is there."""
    assert engine.residents is not None
    seat = engine.residents.seat(adapters, engine.residents.read(adapters, **options)) if adapters else BASE
    assert seat is not None
    return seat


def drain(engine: Engine) -> dict[int, Tensor]:
    pictures: dict[int, Tensor] = {}
    while len(engine):
        outputs = engine.step()
        pictures |= zip([output.handle for output in outputs], engine.decode(outputs), strict=True)
    return pictures


def alone(sd: Path, adapters: Adapters, request: Request) -> Tensor:
    ((_, image),) = generate(open_family(str(sd)), [request], adapters)
    return torch.tensor(list(image.tobytes())).view(request.height, request.width, 3).permute(2, 0, 1) / 255


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture
def rows() -> Iterator[list[int]]:
    """Rows of every forward pass of a UNet, in order."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    seen: list[int] = []

    def watch(module: Any, args: Any, kwargs: Any) -> None:
        if isinstance(module, UNet2DConditionModel):
            seen.append(len(args[0] if args else kwargs["sample"]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: watch(module, args, {}))
    yield seen
    hook.remove()


def test_one_batch_has_everything_that_shares(sd: Path, folders: dict[str, Path], rows: list[int]) -> None:
    """The base, two LoRAs, one at another scale, one of the text encoder too, and a sum of two: one pass a step."""
    a, b, words = folders["a"], folders["b"], folders["words"]
    asked: list[Adapters] = [(), ((a, 1.0),), ((b, 1.0),), ((a, -0.5),), ((words, 0.7),), ((a, 0.5), (b, 0.8))]
    engine = make_engine(sd)
    handles = [
        engine.add(replace(DOG, seed=seed), take(engine, adapters)) for seed, adapters in enumerate(asked)
    ]  # fmt: skip
    pictures = drain(engine)
    assert set(rows) == {2 * len(asked)}
    expected = [alone(sd, adapters, replace(DOG, seed=seed)) for seed, adapters in enumerate(asked)]
    base = alone(sd, (), replace(DOG, seed=4))
    for handle, picture in zip(handles, expected, strict=True):
        assert distance(pictures[handle], picture) < SAME + 0.5 / 255
    assert distance(expected[4], base) > 0.02


@pytest.mark.parametrize("kind", ["dora", "delta", "wide"])
def test_what_cannot_share_has_batches_of_its_own(
    sd: Path, folders: dict[str, Path], rows: list[int], kind: str
) -> None:
    adapters: Adapters = ((folders[kind], 0.8),)
    engine = make_engine(sd)
    assert engine.residents is not None
    before = {name: value.clone() for name, value in engine.parts["unet"].state_dict().items()}
    reason = engine.residents.read(adapters).reason
    assert reason is not None and {"dora": "DoRA", "delta": "delta", "wide": "rank 9"}[kind] in reason
    asked: list[Adapters] = [((folders["a"], 1.0),), adapters, (), adapters]
    handles = [engine.add(replace(DOG, seed=seed), take(engine, each)) for seed, each in enumerate(asked)]
    pictures = drain(engine)
    assert rows == [4] * 2 * DOG.steps or rows == [4] * 2 * (DOG.steps + 1), "two and two, in turns"
    for seed, (handle, each) in enumerate(zip(handles, asked, strict=True)):
        assert distance(pictures[handle], alone(sd, each, replace(DOG, seed=seed))) < SAME + 0.5 / 255
    after = engine.parts["unet"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("names", [("b", "delta"), ("delta", "b"), ("all", "delta"), ("a", "dora"), ("dora", "all")])
def test_what_cannot_share_adds_up_with_what_can(sd: Path, folders: dict[str, Path], names: tuple[str, str]) -> None:
    """In either order, also where both change the same weights."""
    adapters: Adapters = tuple((folders[name], scale) for name, scale in zip(names, (1.0, 0.5), strict=True))
    engine = make_engine(sd)
    seat = take(engine, adapters)
    assert seat.company == adapters
    (picture,) = (engine.add(DOG, seat), drain(engine))[1].values()
    assert distance(picture, alone(sd, adapters, DOG)) < SAME + 0.5 / 255


def test_a_codec_of_its_own_is_that_of_its_pictures_alone(sd: Path, folders: dict[str, Path]) -> None:
    """The pictures of a step are decoded together, and an edit begins at what its own codec makes of the image."""
    codec, edit = (folders["codec"], 1.0), Edit(Image.new("RGB", (64, 64), (200, 80, 20)), strength=0.7)
    asked: list[tuple[Adapters, Edit | None]] = [
        ((), None), ((codec,), None), ((codec,), None), ((codec, (folders["a"], 0.5)), None), ((codec,), edit),
        ((), edit),
    ]  # fmt: skip
    engine = make_engine(sd, max_alone=2)
    before = {name: value.clone() for name, value in engine.parts["vae"].state_dict().items()}
    handles = [engine.add(DOG, take(engine, adapters), edit=edit) for adapters, edit in asked]
    outputs = []
    while len(engine):
        outputs += engine.step()
    pictures = dict(zip([output.handle for output in outputs], engine.decode(outputs), strict=True))
    for handle, (adapters, edit) in zip(handles, asked, strict=True):
        ((_, image),) = generate(open_family(str(sd)), [DOG], adapters, edit=edit)
        assert distance(pictures[handle], pixels_of(image)) < SAME + 0.5 / 255
    assert distance(pictures[handles[0]], pictures[handles[1]]) > 0.02
    assert distance(pictures[handles[4]], pictures[handles[5]]) > 0.02
    after = engine.parts["vae"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_lora_can_be_merged(sd: Path, folders: dict[str, Path]) -> None:
    adapters: Adapters = ((folders["words"], 0.5),)
    engine = make_engine(sd)
    seat = take(engine, adapters, alone=True)
    assert (seat.slot, seat.company, seat.encoding) == (0, adapters, adapters)
    (picture,) = (engine.add(DOG, seat), drain(engine))[1].values()
    assert distance(picture, alone(sd, adapters, DOG)) < SAME + 0.5 / 255


def test_a_compiled_model_has_one_graph_for_a_size(
    sd: Path, folders: dict[str, Path], rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever adapters are in the batch; one of three is filled up to four."""
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    family, parts = open_family(str(sd)), load(sd)
    targets = {"unet": family.lora_targets(parts["unet"], "all-linear+conv")}
    residents = Residents(parts, targets, 4, 2 * RANK, steady=True)
    engine = Engine(family, parts, max_batch=4, residents=residents, compile=True)
    a, b = ((folders["a"], 0.5),), ((folders["b"], 1.0),)
    for asked in ([(), a, b], [b, b, a], [(), (), ()]):
        requests = [replace(DOG, seed=seed) for seed in range(3)]
        handles = [engine.add(one, take(engine, each)) for one, each in zip(requests, asked, strict=True)]
        pictures = drain(engine)
        for handle, one, each in zip(handles, requests, asked, strict=True):
            assert distance(pictures[handle], alone(sd, each, one)) < SAME + 0.5 / 255
    assert 8 in rows and graphs.frame_count == 1


def test_the_longest_unused_gives_way(sd: Path, folders: dict[str, Path]) -> None:
    engine = make_engine(sd, slots=3)
    residents = engine.residents
    assert residents is not None
    keys: dict[str, Adapters] = {name: ((folders[name], 1.0),) for name in ("a", "b", "words")}
    seats = {name: take(engine, keys[name]) for name in ("a", "b")}
    assert residents.seat(keys["words"], residents.read(keys["words"])) is None, "both are in use"
    again = take(engine, keys["a"])
    assert again.slot == seats["a"].slot
    for seat in (seats["b"], seats["a"]):
        residents.leave(seat)
    assert take(engine, keys["words"]).slot == seats["b"].slot, "a is used by one more"
    assert residents.resident() == (keys["words"], keys["a"])
    residents.leave(again)
    assert take(engine, keys["b"]).slot == again.slot
    (picture,) = (engine.add(DOG, take(engine, keys["b"])), drain(engine))[1].values()
    assert distance(picture, alone(sd, keys["b"], DOG)) < SAME + 0.5 / 255


def test_one_set_of_whole_weights_at_a_time(sd: Path, folders: dict[str, Path]) -> None:
    engine = make_engine(sd)
    assert engine.residents is not None
    dora, delta = ((folders["dora"], 1.0),), ((folders["delta"], 1.0),)
    first = take(engine, dora)
    assert engine.residents.seat(delta, engine.residents.read(delta)) is None
    engine.residents.leave(first)
    assert take(engine, delta).company == delta


def test_host_memory_has_a_bound(sd: Path, folders: dict[str, Path]) -> None:
    engine = make_engine(sd, host_bytes=1)
    assert engine.residents is not None
    a, b = ((folders["a"], 1.0),), ((folders["b"], 1.0),)
    first = engine.residents.read(a)
    assert engine.residents.read(((folders["a"], 0.3),)) is first, "a scale is the row's"
    engine.residents.read(b)
    assert engine.residents.read(a) is not first


def test_a_damaged_adapter_is_refused_and_nothing_is_seated(sd: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    engine = make_engine(sd)
    assert engine.residents is not None
    with pytest.raises(UserError, match="no adapter in it"):
        engine.residents.read(((tmp_path, 1.0),))
    assert engine.residents.resident() == ()
    with pytest.raises(UserError, match="steps: 0"):
        engine.add(replace(DOG, steps=0), take(engine, ((folders["a"], 1.0),)))
    assert engine.residents._users == [0] * 8, "who is refused leaves the seat"
