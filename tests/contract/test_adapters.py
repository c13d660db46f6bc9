"""What gtl publishes, against the real readers: PEFT's layers, PeftModel, plain diffusers and `apply` agree."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gtl.adapters import apply
from gtl.adapters.apply import adapter_key
from gtl.adapters.formats import LoraExport, write_lora
from gtl.types import UserError
from tests.loras import (
    TO_Q,
    close,
    load_pipeline,
    load_text_encoder,
    load_unet,
    merged_delta,
    peft_reference,
    random_lora,
    run_text_encoder,
    run_unet,
)
from tests.tiny import make_sd

VARIANTS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora+rslora": {"dora": True, "rslora": True},
}
CONV = "mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion; its projections are 1x1 convolutions."""
    return make_sd(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_delta_in_every_reader(sd, tmp_path, variant):
    """Alpha 7 at rank 4, every linear and convolution layer: PEFT's layers, apply, PeftModel and diffusers agree."""
    from peft import PeftModel

    flags = VARIANTS[variant]
    tensors = random_lora(load_unet(sd), "unet", dora=flags.get("dora", False))
    write_lora(tensors, tmp_path, config=LoraExport(rank=4, alpha=7.0, **flags))
    reference = run_unet(peft_reference(load_unet(sd), tensors, rank=4, alpha=7.0, **flags))
    base = run_unet(load_unet(sd))
    assert (reference - base).abs().max() > 0.5 * base.abs().max()

    unet = load_unet(sd)
    apply({"unet": unet}, tmp_path)
    assert torch.equal(run_unet(unet), reference)
    assert torch.equal(run_unet(PeftModel.from_pretrained(load_unet(sd), str(tmp_path))), reference)
    pipeline = load_pipeline(sd)
    pipeline.load_lora_weights(str(tmp_path))
    assert close(run_unet(pipeline.unet), reference)


def test_dropout_ends_with_training(sd, tmp_path):
    tensors = random_lora(load_unet(sd), "unet")
    outputs = []
    for dropout in (0.0, 0.5):
        write_lora(tensors, tmp_path / str(dropout), config=LoraExport(rank=4, alpha=7.0, dropout=dropout))
        unet = load_unet(sd)
        apply({"unet": unet}, tmp_path / str(dropout))
        outputs += [run_unet(unet), run_unet(unet)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_linear_projections(tmp_path):
    """The layout of 2.x, whose projections are linear layers."""
    sd = make_sd(tmp_path / "sd", prediction_type="v_prediction")
    tensors = random_lora(load_unet(sd), "unet", only="proj_")
    assert tensors["unet.mid_block.attentions.0.proj_in.lora_A.weight"].ndim == 2
    write_lora(tensors, tmp_path / "lora", config=LoraExport(rank=4, alpha=1.0))
    unet, pipeline = load_unet(sd), load_pipeline(sd)
    apply({"unet": unet}, tmp_path / "lora")
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    assert close(run_unet(pipeline.unet), run_unet(unet))
    assert not close(run_unet(unet), run_unet(load_unet(sd)), 1e-3)


def test_files_and_their_keys(sd, tmp_path):
    tensors = random_lora(load_unet(sd), "unet", only="attn2.to_q", dora=True)
    write_lora(tensors, tmp_path, config=LoraExport(rank=4, alpha=2.0, dora=True, dropout=0.1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]  # fmt: skip
    blocks = ("down_blocks.0", "mid_block", "up_blocks.1")
    modules = [f"{block}.attentions.0.transformer_blocks.0.attn2.to_q" for block in blocks]
    modules.append("up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q")
    ends = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{module}.{end}" for module in modules for end in ends}  # fmt: skip
    folded = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert set(folded) == {f"unet.{module}.{end}" for module in modules for end in ends}
    b = f"unet.{modules[0]}.lora_B.weight"
    assert torch.equal(folded[b], tensors[b] * 0.5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == modules
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "use_dora": True, "use_rslora": False,
                "lora_dropout": 0.1, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_writing_twice_gives_the_same_bytes(sd, tmp_path):
    tensors = random_lora(load_unet(sd), "unet", only="attn1")
    for name, given in (("a", tensors), ("b", dict(reversed(tensors.items())))):
        write_lora(given, tmp_path / name, config=LoraExport(rank=4, alpha=4.0))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_that_differ_by_layer(sd, tmp_path, rslora):
    """Scales alpha / rank (or its root): 2/4 where nothing is said, 6/2 and 5/4 where the layer has its own."""
    unet = load_unet(sd)
    tensors = random_lora(unet, "unet", only="attn1") | random_lora(unet, "unet", rank=2, only="conv1")
    config = LoraExport(rank=4, alpha=2.0, rslora=rslora, alphas={f"unet.{CONV}": 6.0, f"unet.{TO_Q}": 5.0})
    write_lora(tensors, tmp_path, config=config)
    apply({"unet": unet}, tmp_path)
    power = 0.5 if rslora else 1.0
    assert unet.get_submodule(CONV).scaling["default"] == pytest.approx(6 / 2**power)
    assert unet.get_submodule(TO_Q).scaling["default"] == pytest.approx(5 / 4**power)
    assert unet.get_submodule(TO_Q.replace("to_q", "to_k")).scaling["default"] == pytest.approx(2 / 4**power)
    pipeline = load_pipeline(sd)
    pipeline.load_lora_weights(str(tmp_path))
    assert close(run_unet(pipeline.unet), run_unet(unet))


def test_two_adapters_add_up_with_their_scales(sd, tmp_path):
    """Overlapping adapters at scales 0.5 and -2: the sum of their deltas on the base weights."""
    unet = load_unet(sd)
    first, second = random_lora(unet, "unet", only="attn"), random_lora(unet, "unet", rank=2, seed=2, only=".conv")
    both = random_lora(unet, "unet", rank=2, seed=3, only="attn1.to_q")
    write_lora(first, tmp_path / "first", config=LoraExport(rank=4, alpha=8.0))
    write_lora(second | both, tmp_path / "second", config=LoraExport(rank=2, alpha=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply({"unet": unet}, tmp_path / "first", "cats.v1", 0.5)
        apply({"unet": unet}, tmp_path / "second", "dogs", -2.0)

    merged = load_unet(sd)
    for tensors, factor in ((first, 0.5 * 8 / 4), (second | both, -2.0 * 1 / 2)):
        for module in {key.removeprefix("unet.").partition(".lora_")[0] for key in tensors}:
            merged.get_submodule(module).weight.data += factor * merged_delta(tensors, module)
    assert close(run_unet(unet), run_unet(merged))
    assert unet.get_submodule(TO_Q).active_adapters == [adapter_key("cats.v1"), "dogs"]

    plain = load_pipeline(sd)
    plain.load_lora_weights(str(tmp_path / "first"), adapter_name="a")
    plain.load_lora_weights(str(tmp_path / "second"), adapter_name="b")
    plain.set_adapters(["a", "b"], [0.5, -2.0])
    assert close(run_unet(plain.unet), run_unet(unet))


def test_an_adapter_may_be_named_like_a_module(sd, tmp_path):
    """Names such as 0 are also parts of module names; every layer still finds its own tensors."""
    tensors = random_lora(load_unet(sd), "unet", dora=True)
    write_lora(tensors, tmp_path, config=LoraExport(rank=4, alpha=4.0, dora=True))
    expected = run_unet(peft_reference(load_unet(sd), tensors, rank=4, alpha=4.0, dora=True))
    for name in ("0", "to_q", "lora_A", "weight"):
        unet = load_unet(sd)
        apply({"unet": unet}, tmp_path, name)
        assert torch.equal(run_unet(unet), expected)


def test_a_name_is_applied_once(sd, tmp_path):
    unet = load_unet(sd)
    write_lora(random_lora(unet, "unet", only="attn1"), tmp_path, config=LoraExport(rank=4, alpha=4.0))
    apply({"unet": unet}, tmp_path, "a")
    with pytest.raises(ValueError, match="an adapter named 'a' is on unet already"):
        apply({"unet": unet}, tmp_path, "a")


def test_applied_tensors_are_frozen_in_the_base_dtype(sd, tmp_path):
    unet = load_unet(sd).to(torch.bfloat16)
    write_lora(random_lora(unet.float(), "unet", dora=True), tmp_path, config=LoraExport(rank=4, alpha=4.0, dora=True))
    unet = unet.to(torch.bfloat16)
    apply({"unet": unet}, tmp_path)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert [name for name, p in unet.named_parameters() if p.requires_grad] == []
    assert run_unet(unet).dtype == torch.bfloat16


def test_text_encoder_and_unet(sd, tmp_path):
    """A LoRA of two parts: PEFT files of the text encoder in a subfolder, one diffusers file for both."""
    unet, encoder = load_unet(sd), load_text_encoder(sd)
    tensors = random_lora(unet, "unet", only="attn2") | random_lora(encoder, "text_encoder")
    write_lora(tensors, tmp_path, config=LoraExport(rank=4, alpha=6.0))
    assert sorted(path.name for path in (tmp_path / "text_encoder").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]  # fmt: skip
    with pytest.raises(UserError, match="it is for text_encoder too; the parts given are unet$"):
        apply({"unet": unet}, tmp_path)
    with pytest.raises(UserError, match="json: for a part that is not given; it would be one of unet, transformer$"):
        apply({"text_encoder": encoder}, tmp_path)
    apply({"unet": unet, "text_encoder": encoder}, tmp_path)
    assert not close(run_text_encoder(encoder), run_text_encoder(load_text_encoder(sd)), 1e-2)
    pipeline = load_pipeline(sd)
    pipeline.load_lora_weights(str(tmp_path))
    assert close(run_unet(pipeline.unet), run_unet(unet))
    assert close(run_text_encoder(pipeline.text_encoder), run_text_encoder(encoder))


def test_text_encoder_alone(sd, tmp_path):
    encoder = load_text_encoder(sd)
    tensors = random_lora(encoder, "text_encoder", only="q_proj")
    write_lora(tensors, tmp_path, config=LoraExport(rank=4, alpha=6.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pytorch_lora_weights.safetensors", "text_encoder"]
    apply({"unet": load_unet(sd), "text_encoder": encoder}, tmp_path)
    assert not close(run_text_encoder(encoder), run_text_encoder(load_text_encoder(sd)), 1e-2)


def test_half_precision_is_kept_where_nothing_is_lost(sd, tmp_path):
    tensors = {k: v.half() for k, v in random_lora(load_unet(sd), "unet", only="attn1").items()}
    for alpha, dtype in ((2.0, torch.float16), (3.0, torch.float32)):
        write_lora(tensors, tmp_path / str(alpha), config=LoraExport(rank=4, alpha=alpha))
        written = load_file(tmp_path / str(alpha) / "pytorch_lora_weights.safetensors")
        assert {tensor.dtype for tensor in written.values()} == {dtype}
        kept = load_file(tmp_path / str(alpha) / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in kept.values()} == {torch.float16}


def test_damaged_files_are_named(sd, tmp_path):
    unet = load_unet(sd)
    write_lora(random_lora(unet, "unet", only="attn1"), tmp_path / "a", config=LoraExport(rank=4, alpha=4.0))
    file = tmp_path / "a" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=rf"^{file}: not a readable safetensors file "):
        apply({"unet": unet}, tmp_path / "a")
    file.unlink()
    with pytest.raises(UserError, match=rf"^{file}: missing; expected a safetensors file$"):
        apply({"unet": unet}, tmp_path / "a")
    file.write_bytes(whole)
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(UserError, match=r"adapter_config.json: peft_type is 'LOHA'; only LORA can be used$"):
        apply({"unet": unet}, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA", "modules_to_save": ["conv_in"]}')
    with pytest.raises(UserError, match=r"modules_to_save is \['conv_in'\], which is not supported"):
        apply({"unet": unet}, tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match=rf"^{tmp_path / 'a'}: no adapter in it; expected one of adapter_config"):
        apply({"unet": unet}, tmp_path / "a")
