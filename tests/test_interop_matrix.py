"""Who reads whose files: ours, diffusers, peft, the LyCORIS package and names typed by hand as sd-scripts has them, in every
family; the reader's outputs are the writer's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_flux
import tiny_lumina
import tiny_sd3
import torch
from safetensors.torch import load_file, save_file
from test_file_formats import few_layers
from tiny_denoisers import DENOISERS, randn
from torch import Tensor, nn

from library.dit_layers import image_ids
from library.flux_names import FLUX_DIFFUSERS
from library.flux_saving import transformer_config
from library.lumina_names import LUMINA_DIFFUSERS
from library.lumina_saving import transformer_config as lumina_config
from library.sd3_names import sd3_key_map
from library.sd3_saving import transformer_config as sd3_config
from networks import lora
from networks.external import load_network_module
from networks.file_formats import write_adapter


def flux_class(family: str, kind: tiny_flux.Kind) -> Any:
    """diffusers' class with the weights of `DENOISERS[family]`."""
    import diffusers

    config = transformer_config(tiny_flux.PARAMS[kind])
    theirs = getattr(diffusers, config["_class_name"])(**{key: value for key, value in config.items() if key[0] != "_"})
    theirs.load_state_dict(FLUX_DIFFUSERS.to_ours(DENOISERS[family].make().state_dict()), strict=True)
    for norm in theirs.distilled_guidance_layer.norms if kind == "chroma" else ():
        norm.eps = 1e-6  # the original's, which diffusers leaves out
    return theirs.eval().requires_grad_(False)


def flux_class_output(model: Any) -> Tensor:
    """What `tiny_denoisers.flux_output` gives of ours."""
    params = tiny_flux.DEV
    known = {"pooled_projections": randn(1, params.pooled_width, key="pooled"), "guidance": torch.tensor([3.0])}
    out: Tensor = model(
        hidden_states=randn(1, 12, params.in_channels, key="x"),
        encoder_hidden_states=randn(1, 5, params.context_width, key="context"),
        timestep=torch.tensor([0.4]),
        img_ids=image_ids(8, 6, "cpu")[0],
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
        **(known if hasattr(model.config, "guidance_embeds") else {}),
    )[0]
    return out


def lumina_class() -> Any:
    """diffusers' class with the weights of `DENOISERS["lumina"]`."""
    import diffusers

    config = {key: value for key, value in lumina_config(tiny_lumina.PARAMS).items() if key[0] != "_"}
    theirs = diffusers.Lumina2Transformer2DModel(**config)
    theirs.load_state_dict(LUMINA_DIFFUSERS.to_ours(DENOISERS["lumina"].make().state_dict()), strict=True)
    return theirs.eval().requires_grad_(False)


def lumina_class_output(model: Any) -> Tensor:
    """What `tiny_denoisers.lumina_output` gives of ours."""
    out: Tensor = model(
        hidden_states=randn(1, tiny_lumina.PARAMS.in_channels, 8, 6, key="x"),
        timestep=torch.tensor([0.4]),
        encoder_hidden_states=randn(1, 5, tiny_lumina.PARAMS.context_width, key="context"),
        encoder_attention_mask=torch.ones(1, 5, dtype=torch.int32),
        return_dict=False,
    )[0]
    return out


def sd3_class() -> Any:
    """The same of `DENOISERS["sd3"]`."""
    import diffusers

    config = {key: value for key, value in sd3_config(tiny_sd3.PARAMS["5-medium"]).items() if key[0] != "_"}
    theirs = diffusers.SD3Transformer2DModel(**config)
    theirs.load_state_dict(sd3_key_map(2).to_ours(dict(DENOISERS["sd3"].make().state_dict())), strict=True)
    return theirs.eval().requires_grad_(False)


def sd3_class_output(model: Any) -> Tensor:
    """What `tiny_denoisers.sd3_output` gives of ours."""
    context, pooled = (randn(1, *shape, key=str(shape)) for shape in ((5, tiny_sd3.T5_WIDTH), (96,)))
    out: Tensor = model(
        hidden_states=randn(1, 4, 8, 6, key="x"),
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=torch.tensor([400.0]),
        return_dict=False,
    )[0]
    return out


@dataclass(frozen=True)
class Theirs:
    """A family in diffusers: its class, and three layers by their names everywhere, typed by hand."""

    make: Callable[[], Any]
    output: Callable[[Any], Tensor]
    pipeline: str
    part: str
    targets: tuple[str, ...]
    """Layers for peft, by diffusers' paths."""
    hand: dict[str, str]
    """sd-scripts' key -> path in our module."""


_BLOCK = "attentions.0.transformer_blocks.0"
_UNET_TARGETS = tuple(f"mid_block.{_BLOCK}.{layer}" for layer in ("attn1.to_q", "attn2.to_k", "ff.net.2"))
_FLUX_TARGETS = (
    "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "single_transformer_blocks.1.proj_mlp",
    "transformer_blocks.1.ff_context.net.0.proj",
)  # fmt: skip
_FLUX_HAND = {
    "lora_unet_double_blocks_0_img_attn_qkv": "double_blocks.0.img_attn.qkv",
    "lora_unet_single_blocks_1_linear1": "single_blocks.1.linear1",
    "lora_unet_double_blocks_1_txt_mlp_0": "double_blocks.1.txt_mlp.0",
}
_FLAT = ("attn1_to_q", "attn2_to_k", "ff_net_2")
pytestmark = pytest.mark.usefixtures("quiet_lycoris")

THEIRS = {
    "sd": Theirs(
        DENOISERS["sd"].make, DENOISERS["sd"].output, "StableDiffusionPipeline", "unet", _UNET_TARGETS,
        {f"lora_unet_mid_block_attentions_0_transformer_blocks_0_{n}": p for n, p in zip(_FLAT, _UNET_TARGETS, strict=True)},
    ),
    "sdxl": Theirs(
        DENOISERS["sdxl"].make, DENOISERS["sdxl"].output, "StableDiffusionXLPipeline", "unet", _UNET_TARGETS,
        {f"lora_unet_middle_block_1_transformer_blocks_0_{name}": p for name, p in zip(_FLAT, _UNET_TARGETS, strict=True)},
    ),
    "flux": Theirs(
        lambda: flux_class("flux", "dev"), flux_class_output, "FluxPipeline", "transformer", _FLUX_TARGETS, _FLUX_HAND
    ),
    "chroma": Theirs(
        lambda: flux_class("chroma", "chroma"), flux_class_output, "ChromaPipeline", "transformer", _FLUX_TARGETS, _FLUX_HAND
    ),
    "lumina": Theirs(
        lumina_class, lumina_class_output, "Lumina2Pipeline", "transformer",
        ("layers.0.attn.to_q", "layers.0.attn.to_v", "layers.1.feed_forward.linear_1", "noise_refiner.0.norm1.linear"),
        {
            "lora_unet_layers_0_attention_qkv": "layers.0.attention.qkv",
            "lora_unet_layers_1_feed_forward_w1": "layers.1.feed_forward.w1",
            "lora_unet_noise_refiner_0_adaLN_modulation_1": "noise_refiner.0.adaLN_modulation.1",
        },
    ),
    "sd3": Theirs(
        sd3_class, sd3_class_output, "StableDiffusion3Pipeline", "transformer",
        (
            "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "transformer_blocks.1.norm1_context.linear",
            "transformer_blocks.1.ff.net.0.proj",
        ),
        {
            "lora_unet_joint_blocks_0_x_block_attn_qkv": "joint_blocks.0.x_block.attn.qkv",
            "lora_unet_joint_blocks_1_context_block_adaLN_modulation_1": "joint_blocks.1.context_block.adaLN_modulation.1",
            "lora_unet_joint_blocks_1_x_block_mlp_fc1": "joint_blocks.1.x_block.mlp.fc1",
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def denoisers() -> dict[str, nn.Module]:
    return {name: DENOISERS[name].make() for name in THEIRS}


def randomise(module: nn.Module, sign: str = "", scale: float = 0.6) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if sign in name:
                parameter.copy_(randn(*parameter.shape, key=name) * scale)


def merged(model: nn.Module, tensors: dict[str, Tensor], names: dict[str, str]) -> nn.Module:
    """A copy with W + alpha / rank * up @ down, as sd-scripts' formula is, found by names typed by hand."""
    twin = copy.deepcopy(model)
    for key, path in names.items():
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        scale = float(tensors[f"{key}.alpha"]) / len(down)
        twin.get_submodule(path).weight.data.add_(up @ down, alpha=scale)
    assert {key.partition(".")[0] for key in tensors} == names.keys()
    return twin


def pipeline_of(theirs: Theirs, model: Any) -> Any:
    import diffusers

    flow = ("scheduler", "vae", "text_encoder", "tokenizer")
    two = (*flow, "text_encoder_2", "tokenizer_2")
    three = (*two, "text_encoder_3", "tokenizer_3")
    names = {"FluxPipeline": two, "StableDiffusion3Pipeline": three}
    names |= {"ChromaPipeline": flow, "Lumina2Pipeline": flow}
    unet = ("vae", "text_encoder", "tokenizer", "scheduler")
    own = names.get(theirs.pipeline, unet + (("text_encoder_2", "tokenizer_2") if "XL" in theirs.pipeline else ()))
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    arguments = {**dict.fromkeys(own), **(extra if theirs.pipeline == "StableDiffusionPipeline" else {})}
    if theirs.part == "unet":
        arguments["scheduler"] = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return getattr(diffusers, theirs.pipeline)(**arguments, **{theirs.part: model})


# ---- they write, we read -----------------------------------------------------------------------------------------------


def write_by_hand(family: str, model: nn.Module, folder: Path) -> tuple[Path, Tensor]:
    tensors = {}
    for key, path in THEIRS[family].hand.items():
        out, width = model.get_submodule(path).weight.shape
        tensors[f"{key}.lora_down.weight"] = randn(3, width, key=f"{key}down") * 0.3
        tensors[f"{key}.lora_up.weight"] = randn(out, 3, key=f"{key}up") * 0.3
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, folder / "hand.safetensors")
    return folder / "hand.safetensors", DENOISERS[family].output(merged(model, tensors, THEIRS[family].hand))


def write_by_peft(family: str, model: nn.Module, folder: Path) -> tuple[Path, Tensor]:
    from peft import LoraConfig, get_peft_model

    theirs = THEIRS[family]
    ranks = {theirs.targets[0]: 2}
    config = LoraConfig(r=3, lora_alpha=2, target_modules=list(theirs.targets), rank_pattern=ranks, use_rslora=True)
    wrapped: Any = get_peft_model(theirs.make(), config)
    randomise(wrapped, "lora_")
    wrapped.save_pretrained(folder / "peft")
    return folder / "peft", theirs.output(wrapped)


def write_by_diffusers(family: str, model: nn.Module, folder: Path) -> tuple[Path, Tensor]:
    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    theirs = THEIRS[family]
    made = theirs.make()
    config = LoraConfig(r=3, lora_alpha=2, target_modules=list(theirs.targets))
    made.add_adapter(config)
    randomise(made, "lora_")
    metadata = config.to_dict() | {"target_modules": list(theirs.targets)}
    arguments = {f"{theirs.part}_lora_layers": get_peft_model_state_dict(made, adapter_name="default")}
    getattr(diffusers, theirs.pipeline).save_lora_weights(
        folder, **arguments, **{f"{theirs.part}_lora_adapter_metadata": metadata}
    )
    return folder / "pytorch_lora_weights.safetensors", theirs.output(made)


def write_by_lycoris(family: str, model: nn.Module, folder: Path) -> tuple[Path, Tensor]:
    module: Any = load_network_module("lycoris.kohya").for_arch(DENOISERS[family].arch)
    network = module.create_network(1.0, 3, 2.0, None, None, model, algo="lokr", factor=2, parts={"denoiser"})
    randomise(network, scale=0.3)  # it adapts every layer
    network.attach()
    expected = DENOISERS[family].output(model)
    network.detach()
    network.save_weights(folder / "lycoris.safetensors", torch.float32)
    return folder / "lycoris.safetensors", expected


@pytest.mark.parametrize("write", [write_by_hand, write_by_peft, write_by_diffusers, write_by_lycoris])
@pytest.mark.parametrize("family", THEIRS)
def test_we_read_what_others_write(
    family: str, write: Callable[..., tuple[Path, Tensor]], denoisers: dict[str, nn.Module], tmp_path: Path
) -> None:
    kind, model = DENOISERS[family], denoisers[family]
    base = kind.output(model)
    path, expected = write(family, model, tmp_path)
    assert (expected - base).abs().max() > 1e-2
    factory = lora.factory.for_arch(kind.arch)
    network, _ = factory.create_network_from_weights(1.0, path, None, None, model, for_inference=True)
    network.attach()
    ours = kind.output(model)
    network.detach()
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    twin = copy.deepcopy(model)
    factory.merge_weights(1.0, path, None, twin)
    torch.testing.assert_close(kind.output(twin), expected, atol=2e-5, rtol=1e-4)


# ---- we write, they read -----------------------------------------------------------------------------------------------


def read_by_hand(family: str, model: nn.Module, folder: Path) -> Tensor:
    return DENOISERS[family].output(merged(model, load_file(folder / "kohya.safetensors"), THEIRS[family].hand))


def read_by_peft(family: str, model: nn.Module, folder: Path) -> Tensor:
    from peft import PeftModel

    theirs = THEIRS[family]
    return theirs.output(PeftModel.from_pretrained(theirs.make(), folder / "peft", subfolder=theirs.part))


def read_by_diffusers(family: str, model: nn.Module, folder: Path) -> Tensor:
    theirs = THEIRS[family]
    made = theirs.make()
    pipeline_of(theirs, made).load_lora_weights(folder, weight_name="diffusers.safetensors")
    return theirs.output(made)


def read_by_lycoris(family: str, model: nn.Module, folder: Path) -> Tensor:
    module: Any = load_network_module("lycoris.kohya").for_arch(DENOISERS[family].arch)
    network, _ = module.create_network_from_weights(1.0, folder / "kohya.safetensors", None, None, model, for_inference=True)
    network.attach()
    out = DENOISERS[family].output(model)
    network.detach()
    return out


@pytest.mark.parametrize("read", [read_by_hand, read_by_peft, read_by_diffusers, read_by_lycoris])
@pytest.mark.parametrize("family", THEIRS)
def test_others_read_what_we_write(
    family: str, read: Callable[..., Tensor], denoisers: dict[str, nn.Module], tmp_path: Path
) -> None:
    kind, model = DENOISERS[family], denoisers[family]
    network = few_layers(family, model)
    randomise(network)
    for format in ("kohya", "diffusers", "peft"):
        path = tmp_path / ("peft" if format == "peft" else f"{format}.safetensors")
        write_adapter(path, network.file_state_dict(None), {}, kind.arch, format, None)
    base = kind.output(model)
    network.attach()
    expected = kind.output(model)
    network.detach()
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(read(family, model, tmp_path), expected, atol=2e-5, rtol=1e-4)
