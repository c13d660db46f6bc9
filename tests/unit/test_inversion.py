"""Edits by inversion: the way up is the way down backwards, and what both prompts say stays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gtl.data.scenes.sets import SceneSet
from gtl.diffusion.path import NoisePath, RectifiedFlow, VariancePreserving
from gtl.diffusion.solver import PASSES, Rising, Solver, step
from gtl.families import open_family
from gtl.generate.colours import match_colours, palette_of
from gtl.generate.edit import Edit, first_step
from gtl.generate.edit_command import run
from gtl.generate.engine import Engine
from gtl.generate.images import load_parts
from gtl.generate.pixels import to_image
from gtl.generate.request import Request
from gtl.images import read_recipe
from gtl.types import UserError
from tests.unit.test_generate import drain, through

ALPHAS = torch.linspace(0.9991, 0.0047, 1000)
PATHS: dict[str, NoisePath] = {
    "epsilon": VariancePreserving(ALPHAS, "epsilon"), "v": VariancePreserving(ALPHAS, "v_prediction"),
    "sample": VariancePreserving(ALPHAS, "sample"), "flow": RectifiedFlow(), "shifted": RectifiedFlow(shift=3.0),
}  # fmt: skip


def go(scheduler: Any, latents: torch.Tensor, model: Any) -> torch.Tensor:
    for t in scheduler.timesteps:
        (latents,) = scheduler.step(model(latents, t), t, latents)
    return latents


@pytest.mark.parametrize("name", PATHS)
def test_a_model_that_says_the_same_everywhere_is_inverted_exactly(name: str) -> None:
    """And at any height: what a step up leads to, the step down leads back from."""
    path = PATHS[name]
    clean, said = (torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for rises in (1, 4, 10):
        up = go(Rising(path, 10, rises), clean, lambda latents, t: said)
        down = Solver(path, 10)
        down.timesteps = down.timesteps[10 - rises :]
        assert (up - clean).abs().max() > 0.01
        torch.testing.assert_close(go(down, up, lambda latents, t: said), clean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["epsilon", "v", "flow"])
def test_a_model_that_looks_comes_nearer_with_every_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, clean = PATHS[name], torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))

    def model(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.2 * latents + 0.1 * latents.flip(-1))

    away = []
    for passes in (1, PASSES, 8):
        monkeypatch.setattr("gtl.diffusion.solver.PASSES", passes)
        up = go(Rising(path, 20, 20), clean, model)
        away.append(float((go(Solver(path, 20), up, model) - clean).abs().max()))
    assert away[1] < 0.2 * away[0] and away[2] < 0.2 * away[1] + 1e-4


def test_a_step_to_the_same_time_stays() -> None:
    path, x = PATHS["epsilon"], torch.randn(2, 4, 3, 3)
    t = torch.tensor([300, 700])
    torch.testing.assert_close(step(path, x, torch.randn_like(x), t, t), x, rtol=1e-4, atol=1e-4)


def up(engine: Engine, handle: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the image of an engine's only request, and those that it begins at on its way down."""
    clean = engine._states[handle].latents
    while engine._states[handle].down is not None:
        assert engine.step() == []
    return clean, engine._states[handle].latents


@pytest.fixture(scope="module")
def engine() -> Engine:
    family: Any = open_family("builtin:tiny")
    return Engine(family, load_parts(family, [], device="cpu", dtype=torch.float32))


def test_the_same_prompt_gives_the_image_back(engine: Engine) -> None:
    """Within 4 % of the latents and 0.01 of the decoded picture, of a model that has learned something."""
    image, caption = SceneSet(seed=5).picture(0)
    request = Request(caption, 64, 64, steps=20, guidance=1.0)
    edit = Edit(image, strength=1.0, shows=caption)
    clean, inverted = up(engine, engine.add(request, edit=edit))
    assert (inverted - clean).norm() > 0.5 * clean.norm(), "it went somewhere"
    (drawn,) = engine.decode(through(engine))
    decoded = (engine.family.decode(engine.parts["vae"], clean)[0] / 2 + 0.5).clamp(0, 1)
    assert (drawn - decoded).abs().mean() < 0.01
    other = engine.add(replace(request, seed=1), edit=edit)
    assert torch.equal(drain(engine)[other], drawn), "no noise is drawn"


def test_less_strength_takes_fewer_steps_up_and_down(engine: Engine) -> None:
    image, caption = SceneSet(seed=5).picture(1)
    request = Request(caption, 64, 64, steps=10, guidance=1.0)
    looks: list[int] = []
    handle = engine.parts["unet"].register_forward_pre_hook(lambda module, args: looks.append(len(args[0])))
    edit = Edit(image, strength=0.3, shows=caption)
    assert first_step(edit, 10, engine.family.path) == 7
    taken = engine.add(request, edit=edit, previews=(1, 2))
    assert not looks, "it is looked at in its turn"
    while engine.steps_done(taken) < 3 * PASSES:
        assert engine.step() == []
    assert len(looks) == 3 * PASSES
    shown = [output.preview for output in through(engine)]
    handle.remove()
    assert shown == [0, 1, None] and len(looks) == 3 * PASSES + 3


@pytest.mark.parametrize("steps", [3, 30, 334, 600, 999])
def test_all_numbers_of_steps_begin_at_noise_and_are_steps(steps: int) -> None:
    for path in PATHS.values():
        times = path.solver_times(steps)
        assert len(times) == steps + 1 and (times.diff() > 0).all()
        assert (times[0], times[-1]) == (0, 1000 if path.prediction == "flow" else 999)


def test_a_prompt_that_cannot_be_read_is_refused_before_its_image_rises(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """What others draw with is not at stake: no step reads a prompt."""
    image, caption = SceneSet(seed=5).picture(2)
    request = Request(caption, 64, 64, steps=4, guidance=3.0, negative_prompt="a dog of no colour")
    engine.add(request, edit=Edit(image, strength=0.5, shows=caption))

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.family, "encode_prompts", fail)
    assert len(through(engine)) == 1
    with pytest.raises(RuntimeError):
        engine.add(replace(request, prompt="a cat nobody has seen"), edit=Edit(image, strength=0.5, shows=caption))
    assert len(engine) == 0


def test_an_inversion_shares_its_steps_with_others(engine: Engine) -> None:
    """The way up is rows of the same batches; each comes out as it would alone, and can be given up on the way."""
    image, caption = SceneSet(seed=5).picture(2)
    request = Request(caption, 64, 64, steps=6, guidance=1.0)
    edit = Edit(image, strength=0.5, shows=caption)
    handle = engine.add(request, edit=edit)
    alone = drain(engine)[handle]
    engine.add(replace(request, seed=4))
    (plain,) = drain(engine).values()
    asked = (request, edit), (replace(request, seed=4), None), (request, edit)
    first, second, dropped = (engine.add(each, edit=begun) for each, begun in asked)
    assert engine.step() == [] and engine.batch == (first, second, dropped)
    engine.cancel(dropped)
    drawn = drain(engine)
    assert set(drawn) == {first, second}
    torch.testing.assert_close(drawn[first], alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn[second], plain, rtol=0, atol=1e-4)


def test_a_picture_by_inversion_has_the_colours_that_are_asked_for(engine: Engine) -> None:
    image, caption = SceneSet(seed=5).picture(3)
    other = SceneSet(seed=9).picture(0)[0]
    request = Request(caption, 64, 64, steps=4, guidance=1.0)
    edit = Edit(image, strength=0.5, shows=caption, palette=palette_of(other))
    engine.add(request, edit=replace(edit, palette=None))
    engine.add(request, edit=edit, previews=(1,))
    outputs = through(engine)
    assert [output.preview for output in outputs] == [0, None, None]
    shown, plain, drawn = (to_image(pixels) for pixels in engine.decode(outputs))
    assert drawn.tobytes() == match_colours(plain, palette_of(other)).tobytes() != plain.tobytes()
    assert np.allclose(palette_of(shown).mean, palette_of(other).mean, atol=3), "the estimate too"


def test_what_both_prompts_say_stays(tmp_path: Path) -> None:
    """Nearer to the image than image to image of the same strength."""
    scenes = SceneSet(split="edits", seed=1)
    edit, _ = scenes.edit(0)
    scenes.before(0).save(tmp_path / "before.png")
    from gtl.bench.editing import describe, describe_before

    options: dict[str, Any] = {
        "model": "builtin:tiny", "steps": 12, "guidance": 3.0, "strength": 0.8, "prompt": describe(edit),
    }  # fmt: skip
    (inverted,) = run(tmp_path / "before.png", out=tmp_path / "a", invert=describe_before(edit), **options)
    (begun,) = run(tmp_path / "before.png", out=tmp_path / "b", **options)
    away = [
        np.abs(np.asarray(Image.open(file)).astype(int) - np.asarray(scenes.before(0))).mean()
        for file in (inverted, begun)
    ]
    assert 0.5 < away[0] < away[1]
    assert read_recipe(inverted)["edit"]["invert"] == describe_before(edit)
    assert "invert" not in read_recipe(begun)["edit"]


KEEPS = (
    "--invert: keeps by itself what is not said to change; it goes with no mask, and with nothing that is transparent "
    "or added"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 3}, "--count: 3: an edit by --invert draws no noise: all would be one picture; expected 1"),
        ({"mask": "mask.png"}, KEEPS),
        ({"extend": "16"}, KEEPS),
        ({"strength": 0.0}, "--strength: 0: expected a number above 0 and up to 1"),
    ],
)
def test_what_it_does_not_go_with_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    SceneSet().picture(0)[0].save("photo.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    with pytest.raises(UserError) as error:
        run("photo.png", out="out", prompt="a dog", invert="a cat", model="builtin:tiny", **options)
    assert str(error.value) == message


def test_few_steps_and_instructions_are_not_inverted(engine: Engine) -> None:
    image = SceneSet().picture(0)[0]
    request = Request("a dog", 64, 64, steps=4)
    with pytest.raises(UserError, match="^invert: an adapter for few steps adds new noise"):
        engine.add(replace(request, sampler="lcm"), edit=Edit(image, shows="a cat"))
    with pytest.raises(UserError, match="^invert: an adapter that was taught to edit sees the image itself"):
        engine.add(request, edit=Edit(image, shows="a cat", image_guidance=1.5))
