"""LoRAs made by others: kohya's, diffusers' and PEFT's files give the delta they mean, or are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gtl.adapters import Registry, apply
from gtl.adapters.commands import import_adapter
from gtl.adapters.foreign import import_lora, read_lora
from gtl.adapters.formats import LoraExport, write_lora
from gtl.families import open_family
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
from tests.tiny import make_sd, make_sdxl

FLAT = TO_Q.replace(".", "_")


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion; its projections are 1x1 convolutions."""
    return make_sd(tmp_path_factory.mktemp("sd"))


def kohya(tensors, alpha: float | None) -> dict[str, torch.Tensor]:
    """The same LoRA as sd-scripts saves it."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    ends = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    saved = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        module, _, end = rest.partition(".lora_")
        stem = prefixes[part] + module.removeprefix("text_model.").replace(".", "_")
        saved[f"{stem}.{ends[f'lora_{end}']}"] = tensor
        if alpha is not None:
            saved[f"{stem}.alpha"] = torch.tensor(alpha)
    return saved


def old_diffusers(tensors) -> dict[str, torch.Tensor]:
    """Attention LoRA as diffusers saved it through attention processors."""
    saved = {}
    for key, tensor in tensors.items():
        module, _, end = key.partition(".lora_")
        parent, _, last = module.removesuffix(".0").rpartition(".")
        saved[f"{parent}.processor.{last}_lora.{'down' if end == 'A.weight' else 'up'}.weight"] = tensor
    return saved


def published(weights, parts, folder: Path):
    """The parts with an imported LoRA written and applied."""
    write_lora(weights.tensors, folder, config=weights.config)
    apply(parts, folder)
    return parts


@pytest.mark.parametrize("alpha", [1.0, 4.0, None])
def test_kohya_file_gives_the_known_delta(sd, tmp_path, alpha):
    """W + alpha / rank * B A for linear and convolution layers of the UNet and the text encoder."""
    unet, encoder = load_unet(sd), load_text_encoder(sd)
    tensors = random_lora(unet, "unet") | random_lora(encoder, "text_encoder")
    save_file(kohya(tensors, alpha), tmp_path / "them.safetensors")
    with torch.device("meta"):
        meta = {"unet": type(unet).from_config(unet.config), "text_encoder": type(encoder)(encoder.config)}
    weights = import_lora(tmp_path / "them.safetensors", meta)
    assert set(weights.tensors) == set(tensors)
    published(weights, {"unet": unet, "text_encoder": encoder}, tmp_path / "out")
    merged, scale = load_unet(sd), 1.0 if alpha is None else alpha / 4
    for module in {key.removeprefix("unet.").partition(".lora_")[0] for key in tensors if key.startswith("unet.")}:
        merged.get_submodule(module).weight.data += scale * merged_delta(tensors, module)
    assert close(run_unet(unet), run_unet(merged))

    pipeline = load_pipeline(sd)
    pipeline.load_lora_weights(str(tmp_path / "out"))
    assert close(run_text_encoder(pipeline.text_encoder), run_text_encoder(encoder))


def test_kohya_file_as_diffusers_reads_it(sd, tmp_path):
    """diffusers' own converter agrees on the same file (attention and feed-forward)."""
    tensors = random_lora(load_unet(sd), "unet", only="attn1")
    save_file(kohya(tensors, 2.0), tmp_path / "them.safetensors")
    pipeline = load_pipeline(sd)
    pipeline.load_lora_weights(str(tmp_path / "them.safetensors"))
    unet = load_unet(sd)
    published(import_lora(tmp_path / "them.safetensors", {"unet": unet}), {"unet": unet}, tmp_path / "out")
    assert close(run_unet(unet), run_unet(pipeline.unet))


SGM_LAYERS = {"conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "conv2": "out_layers_3",
              "conv_shortcut": "skip_connection"}  # fmt: skip
SGM_ENDS = {"conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding.linear_1": "time_embed_0",
            "time_embedding.linear_2": "time_embed_2", "add_embedding.linear_1": "label_emb_0_0",
            "add_embedding.linear_2": "label_emb_0_2"}  # fmt: skip


def sgm_name(module: str, num: int) -> str:
    """A layer of a UNet with `num` layers a block, as Stability's own code names it, with `_` for every dot."""
    if module in SGM_ENDS:
        return SGM_ENDS[module]
    section, *names = module.split(".")
    block = "0" if section == "mid_block" else names.pop(0)
    kind, layer, *rest = names
    rest = [SGM_LAYERS.get(name, name) for name in rest]
    if section == "mid_block":
        return "_".join(["middle_block", "1" if kind == "attentions" else str(2 * int(layer)), *rest])
    if kind == "downsamplers":
        return f"input_blocks_{(int(block) + 1) * (num + 1)}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{int(block) * (num + 1) + num}_2_conv"
    place = int(block) * (num + 1) + int(layer) + (section == "down_blocks")
    side = "input" if section == "down_blocks" else "output"
    return "_".join([f"{side}_blocks_{place}", "1" if kind == "attentions" else "0", *rest])


def kohya_xl(tensors, alpha: float, num: int) -> dict[str, torch.Tensor]:
    """A LoRA for Stable Diffusion XL as sd-scripts saves it."""
    prefixes = {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}
    saved = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        module, _, end = rest.partition(".lora_")
        stem = (f"lora_unet_{sgm_name(module, num)}" if part == "unet"
                else prefixes[part] + module.replace(".", "_"))  # fmt: skip
        saved[f"{stem}.lora_{'down' if end == 'A.weight' else 'up'}.weight"] = tensor
        saved[f"{stem}.alpha"] = torch.tensor(alpha)
    return saved


def test_names_of_sdxl_as_sd_scripts_writes_them():
    """Keys of real files, with 2 layers a block."""
    assert sgm_name("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k", 2) == (
        "input_blocks_4_1_transformer_blocks_0_attn1_to_k")  # fmt: skip
    assert sgm_name("down_blocks.0.downsamplers.0.conv", 2) == "input_blocks_3_0_op"
    assert sgm_name("mid_block.attentions.0.proj_in", 2) == "middle_block_1_proj_in"
    assert sgm_name("up_blocks.1.attentions.2.proj_out", 2) == "output_blocks_5_1_proj_out"
    assert sgm_name("up_blocks.2.resnets.2.conv1", 2) == "output_blocks_8_0_in_layers_2"


@pytest.mark.parametrize("num", [1, 2])
def test_kohya_file_for_sdxl(tmp_path, num):
    """Every layer of the UNet and of both text encoders, alpha 2 at rank 4: each finds its place."""
    family = open_family(str(make_sdxl(tmp_path / "sdxl", unet_config={"layers_per_block": num})))
    parts = {part: family.load(part) for part in (family.main, *family.encoders)}
    tensors = {k: t for part, module in parts.items() for k, t in random_lora(module, part).items()}
    save_file(kohya_xl(tensors, 2.0, num), tmp_path / "them.safetensors")
    weights = import_lora(tmp_path / "them.safetensors", parts)
    assert weights.tensors.keys() == tensors.keys()
    assert all(torch.equal(weights.tensors[key], tensors[key]) for key in tensors)
    assert (weights.config.rank, weights.config.alpha, weights.config.alphas) == (4, 2.0, {})


def test_kohya_file_for_sdxl_as_diffusers_reads_it(tmp_path):
    """diffusers' own reading of the same file, and of what is published of it."""
    from diffusers import StableDiffusionXLPipeline

    folder = make_sdxl(tmp_path / "sdxl")
    family = open_family(str(folder))
    parts = {part: family.load(part) for part in (family.main, *family.encoders)}
    tensors = random_lora(parts["unet"], "unet", only="attn")
    for part in family.encoders:
        tensors |= random_lora(parts[part], part, only="self_attn")
    save_file(kohya_xl(tensors, 2.0, 1), tmp_path / "them.safetensors")
    published(import_lora(tmp_path / "them.safetensors", parts), parts, tmp_path / "out")
    base = StableDiffusionXLPipeline.from_pretrained(folder)
    assert not close(run_unet(base.unet), run_unet(parts["unet"]), 1e-2)
    for source in ("them.safetensors", "out"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
        pipeline.load_lora_weights(str(tmp_path / source))
        assert close(run_unet(pipeline.unet), run_unet(parts["unet"]))
        for part in family.encoders:
            ours = run_text_encoder(parts[part])
            assert close(run_text_encoder(getattr(pipeline, part)), ours), (source, part)
            assert not close(run_text_encoder(getattr(base, part)), ours, 1e-2)


def test_sdxl_blocks_under_two_names_are_read_once(tmp_path):
    """As in diffusers, its own names win; a place that no UNet has is one line."""
    family = open_family(str(make_sdxl(tmp_path / "sdxl")))
    parts = {"unet": family.load("unet")}
    tensors = random_lora(parts["unet"], "unet", only="mid_block")
    file = tmp_path / "them.safetensors"
    save_file(kohya_xl({key: -value for key, value in tensors.items()}, 2.0, 1) | kohya(tensors, 2.0), file)
    weights = import_lora(file, parts)
    assert all(torch.equal(weights.tensors[key], tensors[key]) for key in tensors)
    save_file({"lora_unet_middle_block_7_proj_in.lora_down.weight": torch.zeros(4, 32)}, file)
    with pytest.raises(UserError, match=f"^{file}: its keys of input_blocks, middle_block, output_blocks are not "):
        import_lora(file, parts)


def test_kohya_dora(sd, tmp_path):
    """dora_scale is the magnitude, stored as a column; convolutions too."""
    unet, expected = load_unet(sd), load_unet(sd)
    tensors = random_lora(unet, "unet", dora=True)
    magnitudes = {key: value for key, value in tensors.items() if "magnitude" in key}
    saved = kohya({key: value for key, value in tensors.items() if key not in magnitudes}, 4.0)
    for key, value in magnitudes.items():
        stem = "lora_unet_" + key.removeprefix("unet.").partition(".lora_")[0].replace(".", "_")
        saved[f"{stem}.dora_scale"] = value.reshape(-1, *[1] * (3 if value.ndim == 4 else 1))
    save_file(saved, tmp_path / "them.safetensors")
    published(import_lora(tmp_path / "them.safetensors", {"unet": unet}), {"unet": unet}, tmp_path / "out")
    assert torch.equal(run_unet(unet), run_unet(peft_reference(expected, tensors, rank=4, alpha=4.0, dora=True)))


@pytest.mark.parametrize("prefixed", [True, False])
def test_old_diffusers_keys(sd, tmp_path, prefixed):
    tensors = random_lora(load_unet(sd), "unet", only="attn1.to_")
    saved = {key if prefixed else key.removeprefix("unet."): value for key, value in old_diffusers(tensors).items()}
    assert any(key.endswith("attn1.processor.to_out_lora.up.weight") for key in saved)
    save_file(saved, tmp_path / "them.safetensors")
    weights = import_lora(tmp_path / "them.safetensors", {"unet": load_unet(sd)})
    assert set(weights.tensors) == set(tensors)
    assert all(torch.equal(weights.tensors[key], tensors[key]) for key in tensors)
    assert (weights.config.rank, weights.config.alpha, weights.config.alphas) == (4, 4, {})


def test_text_encoder_keys_of_every_age(sd, tmp_path):
    """Attention as to_q_lora and as q_proj.lora_linear_layer, with and without `text_model.`."""
    encoder = load_text_encoder(sd)
    tensors = random_lora(encoder, "text_encoder", only="q_proj")
    inner = next(iter(tensors)).removeprefix("text_encoder.").removeprefix("text_model.").partition(".q_proj")[0]
    layouts = ("text_model.{}.to_q_lora.{}.weight", "text_model.{}.q_proj.lora_linear_layer.{}.weight",
               "{}.q_proj.lora_linear_layer.{}.weight")  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 32, generator=rng), torch.randn(32, 4, generator=rng)
    for layout in layouts:
        save_file({f"text_encoder.{layout.format(inner, end)}": t for end, t in (("down", a), ("up", b))},
                  tmp_path / "them.safetensors")  # fmt: skip
        weights = import_lora(tmp_path / "them.safetensors", {"text_encoder": encoder})
        assert set(weights.tensors) == {key for key in tensors if f"{inner}." in key}
        assert all(torch.equal(t, a if "lora_A" in key else b) for key, t in weights.tensors.items())


def test_alpha_in_a_diffusers_header(sd, tmp_path):
    """diffusers honours the LoraConfig in the file's header; so does the import."""
    tensors = random_lora(load_unet(sd), "unet", only="attn1.to_")
    modules = sorted({key.removeprefix("unet.").partition(".lora_")[0] for key in tensors})
    header = {"unet.r": 4, "unet.lora_alpha": 6, "unet.use_rslora": True, "unet.target_modules": modules}
    save_file(tensors, tmp_path / "them.safetensors", metadata={"lora_adapter_metadata": json.dumps(header)})
    pipeline, unet = load_pipeline(sd), load_unet(sd)
    pipeline.load_lora_weights(str(tmp_path / "them.safetensors"))
    assert pipeline.unet.get_submodule(TO_Q).scaling == {"default_0": 3.0}
    published(import_lora(tmp_path / "them.safetensors", {"unet": unet}), {"unet": unet}, tmp_path / "out")
    assert unet.get_submodule(TO_Q).scaling == {"default": 3.0}
    assert close(run_unet(unet), run_unet(pipeline.unet))


def test_peft_folder_of_somebody_else(sd, tmp_path):
    """Saved by PeftModel with suffix targets and patterns by suffix."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 2},
                        alpha_pattern={"to_k": 1}, init_lora_weights=False)  # fmt: skip
    theirs = get_peft_model(load_unet(sd), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs", tmp_path / "theirs" / "adapter_model.safetensors"):
        unet = load_unet(sd)
        published(import_lora(path, {"unet": unet}), {"unet": unet}, tmp_path / path.name)
        assert unet.get_submodule(TO_Q).scaling["default"] == 1.5
        assert unet.get_submodule(TO_Q.replace("to_q", "to_k")).scaling["default"] == 0.5
        assert torch.equal(run_unet(unet), run_unet(theirs))


def test_unmatched_keys_are_refused(sd, tmp_path):
    unet = load_unet(sd)
    tensors = random_lora(unet, "unet", only="attn1")
    strange = {key.replace("mid_block", "mid_blocks"): value for key, value in tensors.items()}
    file = tmp_path / "them.safetensors"
    save_file(kohya(strange, 1.0), file)
    with pytest.raises(UserError, match=(
        rf"^{file}: 8 of 32 keys match no layer of the model's unet; first: "
        r"lora_unet_mid_blocks_attentions_0_transformer_blocks_0_attn1_to_k.lora_down.weight$"
    )):  # fmt: skip
        import_lora(file, {"unet": unet})
    write_lora(strange, tmp_path / "out", config=LoraExport(rank=4, alpha=4.0))
    before = list(unet.state_dict())
    with pytest.raises(UserError, match=r"8 of 32 keys match no layer .*; first: base_model.model.mid_blocks"):
        apply({"unet": unet}, tmp_path / "out")
    assert list(unet.state_dict()) == before


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(f"unet.{TO_Q}.lora_B.weight"), rf"unet.{TO_Q}.lora_B.weight is missing; a layer needs lora_A"),
    (lambda t: t.update({f"unet.{TO_Q}.lora_A.weight": torch.zeros(4, 5)}),
     rf"them.safetensors: unet.{TO_Q}.lora_A.weight: shape \[4, 5\] does not fit the layer, which takes \[4, 16\]$"),
    (lambda t: t.update({f"unet.{TO_Q}.lora_B.weight": torch.zeros(16, 3)}),
     rf"unet.{TO_Q}.lora_B.weight: shape \[16, 3\] does not fit the layer, which takes \[16, 4\]$"),
    (lambda t: t.update({f"unet.{TO_Q}.bias": torch.zeros(4)}), r"attn1.to_q.bias: not a LoRA key"),
    (lambda t: t.update({"lora_unet_x.hada_w1_a": torch.zeros(4)}), r"lora_unet_x.hada_w1_a: this is LoHa; only LoRA"),
    (lambda t: t.update({"lora_unet_x.lokr_w1": torch.zeros(4)}), r"lora_unet_x.lokr_w1: this is LoKr; only LoRA"),
    (lambda t: t.update({"lora_unet_x.alpha": torch.tensor(1.0)}), r"1 alphas have no weights .*; first: unet.x$"),
    (lambda t: t.update({"lora_unet_x.alpha": torch.ones(2)}), r"lora_unet_x.alpha: expected one number, found shape"),
    (lambda t: t.update({f"unet.{TO_Q}.dora_scale": torch.ones(1, 16)}), r"dora_scale: a DoRA with a magnitude per in"),
    (lambda t: t.update({f"unet.{TO_Q}.dora_scale": torch.tensor(1.0)}), r"dora_scale: a DoRA with a magnitude per in"),
    (lambda t: t.update({f"unet.{TO_Q}.lora_A.weight": torch.tensor(1.0)}),
     r"has shape \[\]; expected \[rank, inputs\]$"),
    (lambda t: t.update({f"unet.{TO_Q}.lora_A.weight": torch.ones(0, 16),
                         f"unet.{TO_Q}.lora_B.weight": torch.ones(16, 0)}),
     r"has shape \[0, 16\]; expected \[rank, inputs\]$"),
    (lambda t: t.update({f"unet.{TO_Q}.alpha": torch.tensor(float("nan"))}), r"alpha: nan: expected a finite number$"),
    (lambda t: t[f"unet.{TO_Q}.lora_A.weight"].fill_(float("inf")), r"lora_A.weight: holds values that are not finite"),
    (lambda t: t.update({f"unet.{TO_Q}.lora_A.weight": torch.ones(4, 16, dtype=torch.int8)}),
     r"lora_A.weight: holds int8; expected real numbers$"),
    (lambda t: t.update({f"unet.{TO_Q}.dora_scale": torch.ones(16, 1)}), r"lora_magnitude_vector.weight is missing;"),
    (lambda t: t.update({f"lora_unet_{FLAT}.lora_down.weight": torch.ones(4, 16),
                         f"lora_unet_{FLAT}.lora_up.weight": torch.ones(16, 4)}),
     rf"lora_unet_{FLAT}.lora_down.weight and unet.{TO_Q}.lora_A.weight are both for unet.{TO_Q}$"),
])  # fmt: skip
def test_files_that_do_not_fit_are_refused(sd, tmp_path, change, message):
    unet = load_unet(sd)
    tensors = random_lora(unet, "unet", only="attn1")
    change(tensors)
    save_file(tensors, tmp_path / "them.safetensors")
    with pytest.raises(UserError, match=message):
        import_lora(tmp_path / "them.safetensors", {"unet": unet})


@pytest.mark.parametrize(
    "metadata", ["5", "null", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}']
)
def test_a_damaged_header_is_one_line(sd, tmp_path, metadata):
    tensors = random_lora(load_unet(sd), "unet", only="attn1")
    save_file(tensors, tmp_path / "them.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match=r"them.*: lora_adapter_metadata in its header is not that of diffusers"):
        read_lora(tmp_path / "them.safetensors")


@pytest.mark.parametrize(("change", "message"), [
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4': its weights are for "),
    ({"lora_alpha": "8"}, "lora_alpha: '8': expected a int$"),
    ({"alpha_pattern": ["x"]}, r"alpha_pattern: \['x'\]: expected a dict$"),
    ({"alpha_pattern": {"(": 3}}, r"alpha_pattern: '\(': not a regular expression"),
    ({"alpha_pattern": {"x": "3"}}, "alpha_pattern: 'x': '3': expected a number$"),
    ({"use_dora": True}, "use_dora is True in adapter_config.json; the weights say otherwise$"),
])  # fmt: skip
def test_a_damaged_peft_config_is_one_line(sd, tmp_path, change, message):
    write_lora(random_lora(load_unet(sd), "unet", only="attn1"), tmp_path, config=LoraExport(rank=4, alpha=4.0))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message) as caught:
        read_lora(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_peft_folders_as_trainers_leave_them(sd, tmp_path):
    """Checkpoints in subfolders are not parts, and a folder of parts needs nothing at its root."""
    unet, encoder = load_unet(sd), load_text_encoder(sd)
    tensors = random_lora(unet, "unet", only="attn1")
    write_lora(tensors, tmp_path / "root", config=LoraExport(rank=4, alpha=4.0))
    shutil.copytree(tmp_path / "root", tmp_path / "root" / "checkpoint-500")
    assert import_lora(tmp_path / "root", {"unet": unet}).tensors.keys() == tensors.keys()
    both = tmp_path / "both"
    shutil.copytree(tmp_path / "root" / "checkpoint-500", both / "unet")
    texts = random_lora(encoder, "text_encoder", only="mlp")
    write_lora(texts, tmp_path / "texts", config=LoraExport(rank=4, alpha=4.0))
    shutil.copytree(tmp_path / "texts" / "text_encoder", both / "text_encoder")
    found = import_lora(both, {"unet": unet, "text_encoder": encoder})
    assert found.tensors.keys() == tensors.keys() | texts.keys()


def test_paths_that_are_no_lora(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file; expected a LoRA's safetensors file or folder$"):
        read_lora(tmp_path / "nowhere")
    with pytest.raises(UserError, match="0 safetensors files in it; name the file of the LoRA$"):
        read_lora(tmp_path)
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="lora.bin: only safetensors files are read, found .bin$"):
        read_lora(tmp_path / "lora.bin")


def test_import_command(sd, tmp_path):
    """A kohya file becomes a version whose card names the base, and which loads."""
    unet = load_unet(sd)
    tensors = random_lora(unet, "unet", only="attn1") | random_lora(load_text_encoder(sd), "text_encoder", only="mlp")
    save_file(kohya(tensors, 2.0), tmp_path / "them.safetensors")
    url = str(tmp_path / "registry")
    card = import_adapter(url, tmp_path / "them.safetensors", str(sd), "theirs")
    assert card == Registry(url).show("theirs")
    assert card.tuner == {"type": "lora", "rank": 4, "alpha": 2.0, "dora": False, "rslora": False}
    assert (card.base.family, card.base.fingerprint) == ("sd", open_family(str(sd)).fingerprint())
    assert card.lineage.file == "them.safetensors"
    apply({"unet": unet, "text_encoder": load_text_encoder(sd)}, Registry(url).fetch("theirs"))
    assert unet.get_submodule(TO_Q).scaling["default"] == 0.5

    save_file(kohya({key.replace("mid_block", "mid"): value for key, value in tensors.items()}, 2.0),
              tmp_path / "misfit.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="misfit.safetensors: 8 of 40 keys match no layer of the model's unet, text"):
        import_adapter(url, tmp_path / "misfit.safetensors", str(sd), "misfit")
    assert [listing.name for listing in Registry(url).list()] == ["theirs"]


def test_the_card_of_a_local_model_names_its_whole_path(sd, tmp_path, monkeypatch):
    save_file(kohya(random_lora(load_unet(sd), "unet", only="attn1"), 2.0), tmp_path / "them.safetensors")
    monkeypatch.chdir(sd.parent)
    card = import_adapter(str(tmp_path / "registry"), tmp_path / "them.safetensors", f"./{sd.name}", "theirs")
    assert card.base.source == str(sd)
