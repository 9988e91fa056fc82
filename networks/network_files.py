"""Adapter files: reading, writing, the two hashes in them, and what to say when a file does not fit."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from library.errors import UserError
from networks.peft_folders import PREFIX, by_pattern, read_peft

LayerTensors = dict[str, dict[str, Tensor]]
"""Tensors by layer key and by their name in the layer: {"lora_unet_...": {"lora_down.weight": ...}}."""

FAMILY_SIGNS: dict[str, str] = {
    "lora_unet_input_blocks_": "SDXL",
    "lora_unet_double_blocks_": "FLUX.1, Chroma or HunyuanImage",
    "lora_unet_joint_blocks_": "Stable Diffusion 3",
    "lora_unet_noise_refiner_": "Lumina-Image 2.0",
    "lora_unet_blocks_": "Anima",
    "lora_unet_down_blocks_": "Stable Diffusion 1.x/2.x, or SDXL with diffusers' names",
    "unet.": "diffusers or peft",
    "transformer.": "diffusers or peft",
    "diffusion_model.": "a family with original names",
}
"""Start of a key -> what such a file is for."""


@dataclass(frozen=True)
class Writer:
    """Of a layer of a file."""

    algorithm: str
    module: str = "lycoris.kohya"
    """What reads it."""


ALGORITHM_SIGNS: dict[str, Writer] = {
    "lora_down.weight": Writer("plain LoRA", "networks.lora"),
    "hada_w1_a": Writer("LoHa", "networks.loha"),
    "lokr_w1": Writer("LoKr", "networks.lokr"),
    "lokr_w1_a": Writer("LoKr", "networks.lokr"),
    "on_input": Writer("(IA)^3", "networks.ia3"),
    "oft_blocks": Writer("OFT", "networks.oft"),
    "oft_blocks.0": Writer("OFT", "networks.oft_flux"),
    "oft_R.weight": Writer("OFTv2", "networks.oft_v2"),
    "a1.weight": Writer("GLoRA", "networks.glora"),
    "diff": Writer("LyCORIS' full fine-tuning"),
    "diff_b": Writer("LyCORIS' training of biases"),
    "w_norm": Writer("LyCORIS' training of norms (train_norm)"),
    "b_norm": Writer("LyCORIS' training of norms (train_norm)"),
    "rescale": Writer("LyCORIS' OFT or BOFT with rescaled=true"),
}
"""Tensor name in a layer -> what writes it."""


def writer_of(tensors: Mapping[str, Tensor]) -> Writer | None:
    """What wrote a layer with these tensors; None where no name tells."""
    if "oft_blocks" in tensors and tensors["oft_blocks"].ndim == 4:
        return Writer("BOFT", "networks.boft")
    return next((ALGORITHM_SIGNS[name] for name in tensors if name in ALGORITHM_SIGNS), None)


@contextmanager
def with_numbers() -> Iterator[None]:
    """In here tensors that are made have numbers, even where a run is simulated on tensors without (`--plan`): ranks, alphas
    and formats are told from a file's numbers."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


@with_numbers()
def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors`, `.ckpt` or `.pt` file, or of peft's folder, on the CPU. Never runs pickled code."""
    path = Path(path)
    if path.is_dir():
        return read_peft(path)
    if not path.is_file():
        raise UserError(f"network weights not found: {path}. Check --network_weights / --base_weights.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                settings = (file.metadata() or {}).get(_PEFT_SETTINGS)
            loaded = load_file(path)
            return _peft_alphas(loaded, settings) | loaded if settings else loaded
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"cannot read {path}: {error}. The file is damaged or incomplete; copy or download it again."
        ) from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds no network weights: expected a dict of tensors, found {type(loaded).__name__}.")
    return dict(tensors)


def in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As a file in `dtype` has it; single numbers, such as alpha, in `dtype` only where it holds them exactly."""
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    return tensor if tensor.ndim == 0 and float(cast) != float(tensor) else cast


def write_weights(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to `path`, with `metadata` and the two hashes where the format has room for them (`.safetensors`).

    Writes to `path` itself; the caller makes that atomic.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        torch.save(dict(tensors), path)
        return
    save_file(dict(tensors), path, {**metadata, **weights_hashes(tensors, metadata)})


def weights_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash`, by which A1111-style UIs know a network again.

    Both are taken from the file as it would be with the `ss_` metadata alone, since tools rewrite the rest:
    SHA-256 of everything after the header, and the first 8 digits of that of the 64 KiB at 1 MiB (the Additional
    Networks extension's old hash; of nothing for a smaller file).
    """
    kept = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    data = memoryview(save(dict(tensors), kept))
    start = 8 + int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


_DOTTED = re.compile(
    r"(?P<layer>.+\..+)\.(?P<inner>lora_[AB](\.default)?\.weight|lora(_linear_layer\.|[._])(down|up|mid)\.weight|alpha"
    r"|lora_magnitude_vector(\.default)?(\.weight)?|dora_scale|hada_\w+|lokr_\w+|[ab][12]\.weight|oft_blocks|oft_R\.weight"
    r"|diff(_b)?|[wb]_norm|on_input)"
)
_DOTTED_NAMES = {"lora_A": "lora_down", "lora_B": "lora_up", "lora.": "lora_", "lora_linear_layer.": "lora_"}
_MAGNITUDE = "lora_magnitude_vector"
_PEFT_SETTINGS = "lora_adapter_metadata"
"""Where diffusers writes alphas and ranks, as JSON, into the metadata of a file in peft's names."""


_TURNED = "oft_"
"""What sd-scripts' names of layers begin with, in place of `lora_`, where they are turned."""


def turned_name(key: str) -> str:
    """sd-scripts' name of a layer that OFT turns, by its usual one."""
    return f"{_TURNED}{key.removeprefix('lora_')}"


def by_layer(tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Flat file keys grouped by layer: what stands before the first dot, or the dotted path of peft's and diffusers' files."""
    layers: LayerTensors = {}
    for name, tensor in tensors.items():
        dotted = _DOTTED.fullmatch(name)
        if dotted is None:
            layer, _, inner = name.partition(".")
            layer = f"lora_{layer.removeprefix(_TURNED)}" if layer.startswith(_TURNED) else layer
        else:
            layer = dotted["layer"].removeprefix(PREFIX)
            inner = dotted["inner"].replace(".default", "")
            for theirs, ours in _DOTTED_NAMES.items():
                inner = inner.replace(theirs, ours)
            if inner.startswith(_MAGNITUDE):  # peft's are [o], or [1, o, 1, 1] of a convolution
                inner, tensor = "dora_scale", tensor.reshape(-1, *[1] * (tensor.ndim - 1 or 1))
        layers.setdefault(layer, {})[inner] = tensor
    return layers


def under_own_keys(layers: LayerTensors, aliases: Mapping[str, str], source: str, others: Collection[str] = ()) -> LayerTensors:
    """Layers under the family's own keys; `aliases` has the names other programs give them. Raises `UserError` naming `source`
    for a layer that is there twice, or among `others`."""
    renamed: LayerTensors = {}
    for name, tensors in layers.items():
        key = aliases.get(name, name)
        if key in renamed or key in others:
            raise UserError(f"{source} has the layer {key} twice, the second time as {name}. It is two files in one.")
        renamed[key] = tensors
    return renamed


def _peft_alphas(tensors: Mapping[str, Tensor], settings: str) -> dict[str, Tensor]:
    """`alpha` of each layer, from what diffusers wrote beside the weights. Raises ValueError for what is not its JSON."""
    values: dict[str, Any] = json.loads(settings)
    alphas = {}
    for layer in by_layer(tensors):
        part, _, path = layer.partition(".")
        alpha = by_pattern(values.get(f"{part}.alpha_pattern"), path, values.get(f"{part}.lora_alpha"))
        if alpha is not None:
            alphas[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return alphas


def check_names(
    key: str, tensors: Mapping[str, Tensor], *, required: Collection[str], known: Collection[str], algorithm: str
) -> None:
    """Raise `UserError` unless the layer `key` of a file has all `required` tensors and beside them only `known` ones."""
    if foreign := [name for name in tensors if name not in required and name not in known]:
        writer = writer_of({name: tensors[name] for name in foreign}) or Writer("another algorithm")
        raise UserError(
            f"{key} holds {foreign[0]}: the file was made by {writer.algorithm}, not by {algorithm}. "
            f"Use --network_module {writer.module}, which may know it."
        )
    if absent := [name for name in required if name not in tensors]:
        raise UserError(f"{key} lacks {absent[0]}: the file is incomplete.")


def refuse_unread(layers: LayerTensors, source: str) -> None:
    """Raise `UserError` naming `source` and keys for layers that nothing here reads, as of norms and biases."""
    unread = {f"{key}.{name}": writer for key, layer in layers.items() for name, writer in _unread(layer)}
    if unread:
        writers = ", ".join(dict.fromkeys(writer.algorithm for writer in unread.values()))
        raise UserError(
            f"{source} holds {len(unread)} tensors of {writers}, which are not read here: {shorten(unread)}. To train on or to "
            "merge, use --network_module lycoris.kohya; or train anew without."
        )


def _unread(layer: Mapping[str, Tensor]) -> list[tuple[str, Writer]]:
    signs = ((name, ALGORITHM_SIGNS.get(name)) for name in layer)
    return [(name, writer) for name, writer in signs if writer is not None and not writer.module.startswith("networks.")]


def shorten(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def describe_family(keys: Iterable[str]) -> str:
    """`" It looks like a network for SDXL."`, or an empty string where the keys say nothing."""
    keys = list(keys)
    for sign, family in FAMILY_SIGNS.items():
        if any(key.startswith(sign) for key in keys):
            return f" It looks like a network for {family}."
    return ""
