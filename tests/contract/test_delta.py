"""A delta on a model: what its file holds, how it scales, what it goes together with, and a pipeline made of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gtl.adapters import Card, Registry, apply
from gtl.adapters.apply import kind_of, moved
from gtl.adapters.card import base_of
from gtl.adapters.commands import export_adapter, export_pipeline
from gtl.adapters.delta import write_delta
from gtl.adapters.formats import LoraExport, write_lora
from gtl.families import open_family
from gtl.generate.command import run
from gtl.types import UserError
from tests.loras import TO_Q, close, load_text_encoder, load_unet, random_lora, run_text_encoder, run_unet
from tests.tiny import make_sd

CONV, NORM = "unet.conv_out.weight", "unet.mid_block.resnets.0.norm1.bias"
ENCODER = "text_encoder.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    return make_sd(tmp_path_factory.mktemp("sd"))


def new_values(parts, *names: str, seed: int = 1):
    """The parts' own values of these parameters, disturbed."""
    rng = torch.Generator().manual_seed(seed)
    values = {}
    for name in names:
        part, _, own = name.partition(".")
        value = parts[part].get_parameter(own)
        values[name] = value + 0.3 * torch.randn(value.shape, generator=rng)
    return values


@pytest.mark.parametrize("scale", [1.0, 0.0, 0.5, -2.0])
def test_scale_goes_from_the_base_to_the_new_value(sd, tmp_path, scale):
    base, unet = load_unet(sd), load_unet(sd)
    values = new_values({"unet": base}, CONV, NORM)
    write_delta(values, tmp_path)
    assert load_file(tmp_path / "delta.safetensors").keys() == values.keys()
    apply({"unet": unet}, tmp_path, scale=scale)
    for name, parameter in unet.named_parameters():
        old = base.get_parameter(name)
        expected = old + scale * (values.get(f"unet.{name}", old) - old)
        exact = scale == 1.0 or f"unet.{name}" not in values
        assert torch.equal(parameter, values.get(f"unet.{name}", old)) if exact else close(parameter, expected, 1e-6)
        assert not parameter.requires_grad


def test_it_takes_the_dtype_of_the_model(sd, tmp_path):
    unet = load_unet(sd)
    values = new_values({"unet": unet}, CONV)
    write_delta(values, tmp_path)
    unet = torch.nn.Module.to(unet, torch.bfloat16)
    apply({"unet": unet}, tmp_path)
    assert torch.equal(unet.conv_out.weight, values[CONV].bfloat16())


def test_deltas_of_different_weights_add_up_and_others_are_refused(sd, tmp_path):
    unet = load_unet(sd)
    first, second = new_values({"unet": unet}, CONV), new_values({"unet": unet}, NORM)
    write_delta(first, tmp_path / "a")
    write_delta(second, tmp_path / "b")
    write_delta(new_values({"unet": unet}, CONV, "unet.conv_in.weight", seed=2), tmp_path / "c")
    apply({"unet": unet}, tmp_path / "a", "a")
    apply({"unet": unet}, tmp_path / "b", "b")
    with pytest.raises(UserError) as caught:
        apply({"unet": unet}, tmp_path / "c", "c")
    assert str(caught.value) == f"{tmp_path / 'c'}: {CONV} is moved by another delta already; take one of the two"
    assert torch.equal(unet.conv_in.weight, load_unet(sd).conv_in.weight)
    assert torch.equal(unet.conv_out.weight, first[CONV])
    assert torch.equal(unet.get_parameter(NORM.removeprefix("unet.")), second[NORM])


def test_a_lora_and_a_delta_go_together_in_either_order(sd, tmp_path):
    base = load_unet(sd)
    write_lora(random_lora(base, "unet", only="attn1"), tmp_path / "lora", config=LoraExport(rank=4, alpha=4.0))
    write_delta(new_values({"unet": base}, f"unet.{TO_Q}.weight", CONV), tmp_path / "delta")
    outputs = []
    for order in (("lora", "delta"), ("delta", "lora")):
        unet = load_unet(sd)
        for name in order:
            apply({"unet": unet}, tmp_path / name, name)
        outputs.append(run_unet(unet))
    assert close(outputs[0], outputs[1])
    unet = load_unet(sd)
    apply({"unet": unet}, tmp_path / "lora")
    assert not close(run_unet(unet), outputs[0], 1e-2)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_text_encoder_of_another_version_of_transformers(sd, tmp_path, prefix):
    encoder = load_text_encoder(sd)
    values = new_values({"text_encoder": encoder}, ENCODER)
    write_delta({ENCODER.replace("encoder.layers", f"{prefix}encoder.layers", 1): values[ENCODER]}, tmp_path)
    apply({"unet": load_unet(sd), "text_encoder": encoder}, tmp_path)
    assert torch.equal(encoder.get_parameter(ENCODER.removeprefix("text_encoder.")), values[ENCODER])
    assert not close(run_text_encoder(encoder), run_text_encoder(load_text_encoder(sd)), 1e-3)


def test_what_does_not_fit_is_refused_and_changes_nothing(sd, tmp_path):
    unet = load_unet(sd)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    good = new_values({"unet": unet}, CONV)
    for values, message in (
        ({ENCODER: torch.zeros(3)}, "it is for text_encoder too; the parts given are unet"),
        ({"unet.conv_zzz.weight": torch.zeros(3)},
         "1 of 2 tensors match no weight of the model's unet; first: unet.conv_zzz.weight"),
        ({NORM: torch.zeros(3)}, f"{NORM} has shape [3]; the model's has [32]"),
    ):  # fmt: skip
        write_delta({**good, **values}, tmp_path)
        with pytest.raises(UserError) as caught:
            apply({"unet": unet}, tmp_path)
        assert str(caught.value) == f"{tmp_path}: {message}"
    file = tmp_path / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"^{file}: not a readable safetensors file "):
        apply({"unet": unet}, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_kinds_and_what_they_move(sd, tmp_path):
    unet = load_unet(sd)
    write_delta(new_values({"unet": unet}, CONV, NORM), tmp_path / "delta")
    write_lora(random_lora(unet, "unet", only="attn2.to_q"), tmp_path / "lora", config=LoraExport(rank=4, alpha=4.0))
    assert [kind_of(tmp_path / name) for name in ("delta", "lora")] == ["delta", "lora"]
    assert moved({"unet": unet}, tmp_path / "delta") == {CONV, NORM}
    found = moved({"unet": unet}, tmp_path / "lora")
    assert len(found) == 4 and all(name.endswith(".attn2.to_q.weight") for name in found)


@pytest.fixture(scope="module")
def published(sd, tmp_path_factory) -> str:
    """A registry with a delta of UNet, text encoder and VAE, a LoRA and a DoRA."""
    family = open_family(str(sd))
    parts = {part: family.load(part) for part in ("unet", "text_encoder", "vae")}
    folder, root = tmp_path_factory.mktemp("adapters"), tmp_path_factory.mktemp("registry")
    write_delta(new_values(parts, CONV, ENCODER, "vae.decoder.conv_out.weight"), folder / "delta")
    lora = random_lora(parts["unet"], "unet", only="attn") | random_lora(parts["text_encoder"], "text_encoder")
    write_lora(lora, folder / "lora", config=LoraExport(rank=4, alpha=6.0))
    dora = random_lora(parts["unet"], "unet", only="attn", dora=True)
    write_lora(dora, folder / "dora", config=LoraExport(rank=4, alpha=4.0, dora=True))
    for name in ("delta", "lora", "dora"):
        kind = "delta" if name == "delta" else "lora"
        card = Card(name=name, version="v1", kind=kind, base=base_of(family, str(sd)), tuner={})
        Registry(root).publish(name, "v1", folder / name, card)
    return str(root)


def picture(out: Path, **options) -> np.ndarray:
    (path,) = run(out=out, prompt="a photo of a dog", seed=3, steps=6, guidance=4.0, **options)
    return np.asarray(Image.open(path), dtype=float)


@pytest.mark.parametrize("adapter", ["delta", "delta:0.5", "lora", "dora"])
def test_an_exported_pipeline_draws_the_same_in_plain_diffusers(sd, published, tmp_path, adapter):
    from diffusers import StableDiffusionPipeline

    assert export_pipeline(published, adapter, tmp_path / "sd") == f"{adapter.partition(':')[0]}@v1"
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "sd", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 6, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(3)}
    theirs = np.asarray(pipe("a photo of a dog", **options).images[0], dtype=float)
    ours = picture(tmp_path / "ours", adapters=[adapter], registry=published)
    assert np.abs(ours - theirs).max() <= 1 and np.abs(ours - theirs).mean() < 0.1
    assert np.abs(picture(tmp_path / "base", model=str(sd)) - theirs).mean() > 3
    assert np.array_equal(picture(tmp_path / "again", model=str(tmp_path / "sd")), theirs)


def test_an_exported_pipeline_in_another_dtype(published, tmp_path):
    export_pipeline(published, "lora", tmp_path, "bf16")
    for file in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert {tensor.dtype for tensor in load_file(tmp_path / f"{file}.safetensors").values()} == {torch.bfloat16}


def test_an_adapter_is_exported_as_it_was_published(published, tmp_path):
    assert export_adapter(published, "delta", tmp_path / "new") == "delta@v1"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["adapter.json", "delta.safetensors"]


def test_a_wrong_export_is_one_line(sd, published, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^--out {tmp_path}: not empty; give a new folder$"):
        export_pipeline(published, "lora", tmp_path)
    with pytest.raises(UserError, match=rf"^--out {tmp_path / 'file'}: cannot be written to: File exists$"):
        export_adapter(published, "lora", tmp_path / "file")
    with pytest.raises(UserError, match=r"^--dtype: 'fp8': expected one of fp32, bf16, fp16$"):
        export_pipeline(published, "lora", tmp_path / "new", "fp8")
    with pytest.raises(UserError, match=r"^adapter 'cat': not in the registry "):
        export_pipeline(published, "cat", tmp_path / "new")


def test_a_pipeline_of_another_base_is_refused(tmp_path):
    model = make_sd(tmp_path / "sd")
    base = base_of(open_family(str(model)), str(model))
    write_delta(new_values({"unet": load_unet(model)}, CONV), tmp_path / "delta")
    Registry(tmp_path / "r").publish("a", "v1", tmp_path / "delta", Card(name="a", version="v1", base=base, tuner={}))
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"^adapter a@v1: was made for {model} \(\w+\); the model there is another"):
        export_pipeline(str(tmp_path / "r"), "a", tmp_path / "out")
