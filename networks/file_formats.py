"""Adapter files of other programs: whose names a file has is seen from its content, and any of them can be written.

| format | layers | tensors |
|---|---|---|
| kohya | `lora_unet_double_blocks_0_img_attn_qkv` | `lora_down.weight`, `lora_up.weight`, `alpha`, ... |
| comfy | `diffusion_model.double_blocks.0.img_attn.qkv` | the same |
| diffusers | `transformer.transformer_blocks.0.attn.to_q` | `lora_A.weight`, `lora_B.weight` |
| peft | `base_model.model.transformer_blocks.0.attn.to_q`, a folder for each part of the model | the same |

Where the original checkpoint fuses layers, diffusers has each part by itself. Written, the parts share one `lora_A`; read, they
become one adapter of the fused layer. Under sd-scripts' names diffusers reads FLUX.1's blocks and CLIP, at the published
widths, and drops all else without an error; under its own it reads everything that it has a place for.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError
from library.key_layout import Origin, Rule
from networks.network_files import (
    LayerTensors,
    by_layer,
    in_dtype,
    shorten,
    turned_name,
    under_own_keys,
    with_numbers,
    write_weights,
    writer_of,
)
from networks.network_targets import DENOISER, KNOWN_ARCHS, NetworkArch, TargetGroup
from networks.peft_folders import write_peft
from networks.rotations import BLOCKS, as_one_turn

logger = logging.getLogger(__name__)

KOHYA, COMFY, DIFFUSERS, PEFT = FORMATS = ("kohya", "comfy", "diffusers", "peft")
DOWN, UP, ALPHA, LENGTHS = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
LORA = frozenset({DOWN, UP, ALPHA, LENGTHS})
TOLERANCE = 1e-3
OWN_SIGN = "rank"
"""A tensor of `networks.peft_adapter`, whose files are for itself alone."""


@dataclass(frozen=True)
class Reader:
    """A program, and what it looks for in files of these formats. Every key that is written has to be known by at least one."""

    program: str
    formats: frozenset[str]
    tensors: frozenset[str]
    """Names inside a layer."""
    turned: frozenset[str] = frozenset()
    """Names inside a layer whose own name begins with `oft_`."""


_FACTORS = frozenset((
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
))  # fmt: skip
_DIFFERENCES = frozenset({"diff", "diff_b", "w_norm", "b_norm"})
_GLORA = frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight"})
_OFT = frozenset({"oft_blocks", "alpha"})
_PEFT = frozenset({"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"})
READERS: tuple[Reader, ...] = (
    Reader("sd-scripts", frozenset({KOHYA}), _FACTORS, _OFT | {f"oft_blocks.{part}" for part in range(4)}),
    Reader("ComfyUI", frozenset({KOHYA, COMFY}), _FACTORS | _DIFFERENCES | _GLORA | _OFT),
    Reader("Forge", frozenset({KOHYA, COMFY}), _FACTORS | _DIFFERENCES | _GLORA),
    Reader("LyCORIS", frozenset({KOHYA}), _FACTORS | _DIFFERENCES | _GLORA | _OFT | {"rescale", "scalar", "weight", "bm_t"}),
    Reader("A1111", frozenset({KOHYA}), _FACTORS | _DIFFERENCES | {"on_input", "weight"}, _OFT),
    Reader("OneTrainer", frozenset({KOHYA}), frozenset({"oft_R.weight"})),
    Reader("diffusers", frozenset({DIFFUSERS}), _PEFT),
    Reader("peft", frozenset({PEFT}), _PEFT),
)
"""docs/adapters.md says the same algorithm by algorithm."""


# ---- reading -----------------------------------------------------------------------------------------------------------


@with_numbers()
def own_layers(
    tensors: Mapping[str, Tensor], arch: NetworkArch, source: str, aliases: Mapping[str, str] | None = None
) -> LayerTensors:
    """The layers of a file of any format under sd-scripts' names; layers that no table knows keep theirs.

    aliases: further names of the model's layers. Raises `UserError` naming `source` for a layer that is there twice, and for
    parts of a fused layer that cannot be one adapter. Warns of layers that come back weaker than they were trained.
    """
    renamed: LayerTensors = {}
    parts: dict[str, dict[int, dict[str, Tensor]]] = {}
    rules: dict[str, Rule] = {}
    for name, layer in by_layer(tensors).items():
        key, origin = _kohya_key(name, arch)
        if origin is None or (len(origin.rule.parts) == 1 and LENGTHS not in layer and DOWN not in layer):
            renamed |= under_own_keys({key: layer}, aliases or {}, source, renamed)
            continue
        if len(origin.rule.parts) == 1:
            layer = {inner: origin.rule.join([one]) if inner in (UP, LENGTHS) else one for inner, one in layer.items()}
            renamed |= under_own_keys({key: layer}, {}, source, renamed)
            continue
        rules[key] = origin.rule
        if key in renamed or origin.part in parts.setdefault(key, {}):
            raise UserError(f"{source} has the layer {key} twice, the second time as {name}. It is two files in one.")
        parts[key][origin.part] = layer
    for key, found in parts.items():
        renamed |= under_own_keys({key: _fused(found, rules[key], key, source)}, {}, source, renamed)
    if weak := weak_layers(renamed, arch):
        times = max(weak.values())
        logger.warning(
            "%s: %d fused layers (%s) come back %d times weaker than they were trained, as sd-scripts writes them with "
            "split_qkv: their rank has grown and alpha has not. Write it as it was trained with: "
            "python tools/convert_lora.py FILE OUTPUT --to kohya --mend_split_alpha",
            source, len(weak), shorten(weak), times,
        )  # fmt: skip
    return renamed


def in_kohya_names(tensors: Mapping[str, Tensor], arch: NetworkArch, source: str) -> dict[str, Tensor]:
    """A file's tensors under sd-scripts' names, for who groups them for himself; see `own_layers`."""
    if all("." not in name for name in by_layer(tensors)):
        return dict(tensors)
    return flat(own_layers(tensors, arch, source))


def flat(layers: LayerTensors) -> dict[str, Tensor]:
    return {f"{key}.{name}": tensor for key, layer in layers.items() for name, tensor in layer.items()}


def _kohya_key(name: str, arch: NetworkArch) -> tuple[str, Origin | None]:
    """sd-scripts' name of a layer, and what of that layer `name` is; (name, None) where no table knows it."""
    for group in arch.groups:
        if group.names is None:
            continue
        for path, is_flat in _paths(name, group):
            origin = group.names.to_kohya(path, flat=is_flat)
            if origin is not None:
                return f"{group.prefix}_{origin.key}".replace(".", "_"), origin
    return name, None


def _paths(name: str, group: TargetGroup) -> list[tuple[str, bool]]:
    """What `name` may say as a path in the group's part, and whether it has underscores for dots."""
    if name.startswith(f"{group.prefix}_"):
        return [(name.removeprefix(f"{group.prefix}_"), True)]
    assert group.names is not None
    starts = {group.names.diffusers, group.names.comfy, *group.aliases} - {""}
    found = [(name.removeprefix(f"{start}."), False) for start in starts if name.startswith(f"{start}.")]
    return found or ([(name, False)] if group.part == DENOISER and "." in name else [])  # peft's names are of one part


def _fused(parts: Mapping[int, Mapping[str, Tensor]], rule: Rule, key: str, source: str) -> dict[str, Tensor]:
    """One LoRA of the whole layer from those of its parts; rows of absent parts are 0.

    The parts share `lora_down` where it is the same for all; otherwise each keeps its ranks, and `lora_up` is block-diagonal.
    """
    for layer in parts.values():
        if not {DOWN, UP} <= layer.keys() or layer.keys() - LORA:
            raise UserError(
                f"{source}: {key} is one layer here, and only LoRA's parts of it can be joined, not {shorten(layer)}."
            )
    if any(LENGTHS in layer for layer in parts.values()) and len(parts) < len(rule.parts):
        raise UserError(f"{source}: only some parts of {key} have DoRA's lengths, and it is one layer here.")
    widths = rule.widths or (1,) * len(rule.parts)
    unit = next(layer[UP].shape[0] // widths[part] for part, layer in parts.items())
    sizes = [parts[part][UP].shape[0] if part in parts else widths[part] * unit for part in range(len(widths))]
    scales = {part: _scale(layer) for part, layer in parts.items()}
    ups = {part: layer[UP].float().flatten(1) for part, layer in parts.items()}
    scale = next(iter(scales.values()))
    if len(set(scales.values())) > 1:
        scale, ups = 1.0, {part: up * scales[part] for part, up in ups.items()}
    downs = [layer[DOWN] for layer in parts.values()]
    if all(torch.equal(down, downs[0]) for down in downs[1:]):
        down, columns = downs[0], {part: slice(None) for part in parts}
    else:
        down, columns, end = torch.cat(downs), {}, 0
        for part, layer in parts.items():
            columns[part], end = slice(end, end + len(layer[DOWN])), end + len(layer[DOWN])
    rank = len(down)
    up = down.new_zeros(sum(sizes), rank, dtype=torch.float32)
    for part, rows in enumerate(up.split(sizes)):
        if part in parts:
            rows[:, columns[part]] = ups[part]
    joined = {DOWN: down, UP: up, ALPHA: torch.tensor(scale * rank)}
    if all(LENGTHS in layer for layer in parts.values()):
        joined[LENGTHS] = torch.cat([parts[part][LENGTHS].float() for part in range(len(widths))])
    return joined


def _scale(layer: Mapping[str, Tensor]) -> float:
    """alpha / rank of a LoRA's layer."""
    rank = layer[DOWN].shape[0]
    alpha = float(layer[ALPHA]) if ALPHA in layer else rank
    return (alpha or rank) / rank


def weak_layers(layers: LayerTensors, arch: NetworkArch) -> dict[str, int]:
    """Fused layers whose alpha / rank is too small, and how many times, as sd-scripts writes them with `split_qkv`.

    Their `lora_up` is block-diagonal over n parts, and their alpha / rank is that of the other layers divided by n.
    """
    parts = {key: count for key, layer in layers.items() if (count := _diagonal_parts(key, layer, arch)) > 1}
    others = {round(_scale(layer), 6) for key, layer in layers.items() if key not in parts and {DOWN, UP} <= layer.keys()}
    if len(others) != 1:
        return {}
    usual = others.pop()
    return {key: count for key, count in parts.items() if abs(_scale(layers[key]) * count / usual - 1) < TOLERANCE}


def _diagonal_parts(key: str, layer: Mapping[str, Tensor], arch: NetworkArch) -> int:
    """Number of a fused layer's parts where each has ranks of its own; 1 otherwise."""
    if not {DOWN, UP} <= layer.keys():
        return 1
    origins = _places(key, arch)
    rule = next((origin.rule for _, origin in origins[1].values()), None) if origins else None
    count = 1 if rule is None else len(rule.parts)
    unit = 1 if rule is None else sum(rule.widths or (1,) * count)
    if rule is None or count == 1 or layer[UP].shape[1] % count or layer[UP].shape[0] % unit or not layer[UP].any():
        return 1
    blocks = [rule.split(layer[UP], part).chunk(count, dim=1)[part] for part in range(count)]
    return count if torch.equal(torch.block_diag(*blocks), layer[UP].flatten(1)) else 1


def mended(layers: LayerTensors, weak: Mapping[str, int]) -> LayerTensors:
    """The layers with alphas that give what sd-scripts trained with `split_qkv`. weak: as `weak_layers` finds them."""
    alphas = {key: torch.tensor(_scale(layers[key]) * len(layers[key][DOWN]) * count) for key, count in weak.items()}
    return {key: {**layer, ALPHA: alphas[key]} if key in alphas else layer for key, layer in layers.items()}


def arch_of(layers: LayerTensors, source: str, metadata: Mapping[str, str] | None = None) -> NetworkArch:
    """The family's table that knows the most layers of a file. Of several that know as many, the one that the file's metadata
    names, or whose published models have layers of this width. Raises `UserError` where nothing tells."""
    found = {name: arch_named(name) for name in KNOWN_ARCHS}
    known = {name: [(key, *_kohya_key(key, arch)) for key in layers] for name, arch in found.items()}
    counts = {  # names that a family's files have count more than those it understands
        name: (sum(origin is not None for *_, origin in keys), sum(key == own for key, own, origin in keys if origin))
        for name, keys in known.items()
    }
    best = max(counts.values())
    names = [name for name, count in counts.items() if count == best]
    if not best[0]:
        raise UserError(f"{source} is an adapter of no family that is known here. It has {shorten(layers)}.")
    candidates = [found[name] for name in names]
    told = _described(candidates, metadata or {}) or _of_own_width(candidates, layers) or candidates
    if len(told) > 1:
        raise UserError(
            f"{source} may be for {' or '.join(names)}: its names fit both, its metadata tell neither, and its layers are as "
            "wide as those of no published model. Say it with --family."
        )
    return told[0]


def _described(candidates: Sequence[NetworkArch], metadata: Mapping[str, str]) -> list[NetworkArch]:
    said = [metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "").removesuffix("/lora")]
    return [arch for arch in candidates if any(arch.described.fullmatch(text) for text in said)]


def _of_own_width(candidates: Sequence[NetworkArch], layers: LayerTensors) -> list[NetworkArch]:
    inputs = {layer[DOWN].shape[1] for layer in layers.values() if DOWN in layer and layer[DOWN].ndim > 1}
    return [arch for arch in candidates if arch.own_widths & inputs]


def arch_named(name: str) -> NetworkArch:
    """The table of a family."""
    module, _, attribute = KNOWN_ARCHS[name].partition(":")
    arch: NetworkArch = getattr(importlib.import_module(module), attribute)
    return arch


# ---- writing -----------------------------------------------------------------------------------------------------------


def _places(key: str, arch: NetworkArch) -> tuple[TargetGroup, dict[str, tuple[str, Origin]]] | None:
    """The group of a layer in sd-scripts' names; of each part of it by diffusers' path the original path, and what it is."""
    for group in arch.groups:
        if group.names is not None and key.startswith(f"{group.prefix}_"):
            found = group.names.of_kohya(key.removeprefix(f"{group.prefix}_"))
            return None if found is None else (group, {path: (found[0], origin) for path, origin in found[1].items()})
    return None


def in_format(tensors: Mapping[str, Tensor], arch: NetworkArch, format: str, source: str) -> dict[str, Tensor]:
    """`tensors` of a file in sd-scripts' names under those of `format`, each key checked: see the module's text.

    For diffusers and peft alpha / rank is multiplied into `lora_B`, as not every reader looks for it elsewhere, and the names
    of peft begin with the part they are a folder of. For ComfyUI layers that are turned are limited already, as it takes their
    alpha for another limit. Raises `UserError` naming `source` and keys that no program would read.
    """
    if format in (DIFFUSERS, PEFT):
        found = _in_diffusers_names(tensors, arch, source)
        known = frozenset[str]().union(*(reader.tensors for reader in READERS if format in reader.formats))
        lost = [key for key in found if not key.endswith(tuple(f".{name}" for name in known))]  # layers are told above
    else:
        layers = by_layer(tensors)
        if format == COMFY:
            layers = {key: as_one_turn(key, layer) if _is_turned(layer) else layer for key, layer in layers.items()}
            tensors = flat(layers)
        names = {key: _name(key, layer, arch, format) for key, layer in layers.items()}
        found = {}
        for name, tensor in tensors.items():
            key, dot, inner = name.partition(".")
            found[f"{names.get(key, key)}{dot}{inner}"] = tensor
        lost = _unread(layers, arch, format)
    if lost:
        programs = ", ".join(reader.program for reader in READERS if format in reader.formats)
        raise UserError(
            f"{source}: {len(lost)} keys ({shorten(lost)}) are none that {programs} would find in a file for {arch.name} in "
            f"{format}'s names, so they would be ignored without a word. Leave those layers out (exclude_patterns), or write "
            "another --save_format."
        )
    return found


def _is_turned(layer: Mapping[str, Tensor]) -> bool:
    """By OFT or BOFT."""
    return any(name.partition(".")[0] == BLOCKS for name in layer)


def _name(key: str, layer: Mapping[str, Tensor], arch: NetworkArch, format: str) -> str:
    """Of a layer, in sd-scripts' or ComfyUI's files."""
    if format == KOHYA:
        writer = writer_of(layer)
        return turned_name(key) if writer is not None and writer.algorithm == "OFT" else key
    place = _places(key, arch)
    known = place is not None and place[0].names is not None and place[0].names.comfy
    return f"{known}.{next(iter(place[1].values()))[0]}" if place is not None and known else key


def _unread(layers: LayerTensors, arch: NetworkArch, format: str) -> list[str]:
    """Keys that no program resolves."""
    readers = [reader for reader in READERS if format in reader.formats]
    plain = frozenset[str]().union(*(reader.tensors for reader in readers))
    turned = frozenset[str]().union(*(reader.turned for reader in readers))
    unnamed = tuple(f"{group.prefix}_" for group in arch.groups if group.names is None)
    lost = []
    for key, layer in layers.items():
        name = _name(key, layer, arch, format)
        known = turned if name == turned_name(key) else plain
        homeless = _places(key, arch) is None and not key.startswith(unnamed)
        own = format == KOHYA and OWN_SIGN in layer
        lost += [f"{name}.{inner}" for inner in layer if homeless or (inner not in known and not own)]
    return lost


def _in_diffusers_names(tensors: Mapping[str, Tensor], arch: NetworkArch, source: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    homeless = []
    for key, layer in by_layer(tensors).items():
        if not {DOWN, UP} <= layer.keys() or layer.keys() - LORA:
            raise UserError(
                f"{source}: {key} holds {shorten(sorted(layer.keys() - LORA))}. diffusers and peft read LoRA alone under their "
                "names. Use sd-scripts' or ComfyUI's."
            )
        place = _places(key, arch)
        group = None if place is None else place[0]
        if place is None or group is None or group.names is None or not group.names.diffusers:
            homeless.append(key)
            continue
        up, lengths = layer[UP].float() * _scale(layer), layer.get(LENGTHS)
        if lengths is not None and lengths.shape[0] == 1 != up.shape[0]:
            raise UserError(f"{source}: {key} has DoRA's lengths of columns, and peft knows those of rows alone.")
        for path, (_, origin) in place[1].items():
            start = f"{group.names.diffusers}.{path}"
            found[f"{start}.lora_A.weight"] = layer[DOWN].clone()
            found[f"{start}.lora_B.weight"] = origin.take(up).to(layer[UP].dtype).contiguous()
            if lengths is not None:
                rows = origin.take(lengths.reshape(-1, 1)).flatten().contiguous()
                found[f"{start}.lora_magnitude_vector"] = rows if layer[DOWN].ndim == 2 else rows.view(1, -1, 1, 1)
    if homeless:
        raise UserError(
            f"{source} has {len(homeless)} layers that diffusers has no place for or no name here ({shorten(homeless)}). "
            "It can be used in sd-scripts' names."
        )
    return found


def write_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    arch: NetworkArch,
    format: str,
    dtype: torch.dtype | None,
) -> None:
    """Write `tensors`, in sd-scripts' names, under those of `format` in `dtype` to `path`: a folder for peft, else a file.

    Writes to `path` itself; the caller makes that atomic. Raises the `UserError`s of `in_format`.
    """
    found = {name: in_dtype(tensor, dtype) for name, tensor in in_format(tensors, arch, format, path.name).items()}
    if format == KOHYA and not arch.diffusers_reads_kohya:
        logger.info(
            "%s has sd-scripts' names, of which diffusers reads none for this family. For diffusers: --save_format diffusers, "
            "or python tools/convert_lora.py FILE OUTPUT --to diffusers",
            path.name,
        )
    if format == PEFT:
        write_peft(path, found, metadata)
    else:
        write_weights(path, found, metadata)
