"""Which layers of a model are adapted, under which names, at which rank. Everything a model family says here is a table."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from library.errors import UserError
from library.key_layout import KeyMap, Origin, Rule
from networks.network_args import RATE_PRESETS, ArchArgs, NetworkArgs, fits

logger = logging.getLogger(__name__)

DENOISER = "denoiser"

KNOWN_ARCHS: dict[str, str] = {
    "sdxl": "networks.lora_sdxl:ARCH",
    "sd": "networks.lora_sd:ARCH",
    "flux": "networks.lora_flux:ARCH",
    "lumina": "networks.lora_lumina:ARCH",
    "sd3": "networks.lora_sd3:ARCH",
}
"""Arch name -> where its table is; used only where nobody says which family the model belongs to. The first that fits."""


def same_name(path: str) -> str:
    return path


@dataclass(frozen=True)
class PartNames:
    """What programs call the layers of one part; every layer is in it that an adapter may stand on."""

    layers: KeyMap
    """Names in the original checkpoint <-> diffusers'; several of theirs where the original is fused."""
    diffusers: str = ""
    """The first name of diffusers' and peft's dotted paths: "transformer". Empty: they have no place for the part."""
    comfy: str = ""
    """The first names of ComfyUI's dotted paths: "diffusion_model". Empty: it has sd-scripts' names alone."""
    spells_diffusers: bool = False
    """Whether sd-scripts' names spell diffusers' paths; otherwise the original ones."""

    def of_kohya(self, flat: str) -> tuple[str, dict[str, Origin]] | None:
        """(original path, diffusers' paths and what of the layer each is) of a layer by its path with underscores for dots."""
        if self.spells_diffusers:
            origin = self.layers.origin_of(flat, flat=True)
            names = None if origin is None else self.layers.our_names(origin.key)
            return None if origin is None or names is None else (origin.key, {names[0]: origin})
        path = self.layers.dotted(flat)
        return None if path is None else (path, self.layers.flat_origins(flat))

    def to_kohya(self, path: str, *, flat: bool = False) -> Origin | None:
        """Path in sd-scripts' names, and what of that layer `path` is, which is in anyone's; None for a name of nobody's."""
        original = self.layers.dotted(path) if flat else path if self.layers.our_names(path) else None
        if original is None:
            origin = self.layers.origin_of(path, flat=flat)
            original = None if origin is None else origin.key
        else:
            origin = Origin(original, WHOLE, 0)
        if origin is None or original is None or not self.spells_diffusers:
            return origin
        names = self.layers.our_names(original)
        return None if names is None else Origin(names[0], WHOLE, 0)


WHOLE = Rule("", "")
"""Of a layer that is not taken apart."""

CLIP_LAYERS = KeyMap(
    tuple(
        Rule(path, path)
        for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
        for path in [f"text_model.encoder.layers.{{i}}.{layer}"]
    )
    + (Rule("text_projection", "text_projection"),)
)
T5_LAYERS = KeyMap(
    tuple(
        Rule(path, path)
        for layer in (
            *(f"0.SelfAttention.{name}" for name in "qkvo"),
            *(f"1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
        )
        for path in [f"encoder.block.{{i}}.layer.{layer}"]
    )
)


@dataclass(frozen=True)
class TargetGroup:
    """Layers of one model part: every Linear and Conv2d inside modules of the named classes."""

    part: str
    """Name in the model bundle: "denoiser", or a text encoder's."""
    prefix: str
    """Of the file's keys: `lora_unet`, `lora_te`."""
    containers: tuple[str, ...]
    """Class names. Convolutions larger than 1x1 inside them count only when `conv_dim` is set."""
    conv_containers: tuple[str, ...] = ()
    """Class names searched as well when `conv_dim` is set."""
    canonical: Callable[[str], str] = field(default=same_name)
    """Module path in our class -> path in sd-scripts' class, which the file's keys spell."""
    aliases: tuple[str, ...] = ()
    """What diffusers and peft call the part: the first name of the dotted paths in their files."""
    names: PartNames | None = None
    """For `networks.file_formats`."""

    def key(self, path: str) -> str:
        """The file's name of the layer at `path`."""
        return f"{self.prefix}_{self.canonical(path)}".replace(".", "_")

    def other_names(self, path: str) -> tuple[str, ...]:
        """Names of the same layer in other programs' files: diffusers' path in our form, and dotted paths."""
        dotted = [f"{alias}.{spelt}" for alias in self.aliases for spelt in dict.fromkeys((path, self.canonical(path)))]
        own = f"{self.prefix}_{path}".replace(".", "_")
        return (*dotted, *([own] if own != self.key(path) else []))

    def holds(self, key: str) -> bool:
        return key.startswith((f"{self.prefix}_", *(f"{alias}." for alias in self.aliases)))


def clip_text_name(path: str) -> str:
    """transformers 5 dropped CLIPTextModel's `text_model.`; files keep it. CLIPTextModelWithProjection still has it."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def unet_targets(names: PartNames, canonical: Callable[[str], str] = same_name) -> TargetGroup:
    """The transformers, and on request the convolutions, of diffusers' UNet."""
    return TargetGroup(
        part=DENOISER,
        prefix="lora_unet",
        containers=("Transformer2DModel",),
        conv_containers=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
        canonical=canonical,
        aliases=("unet",),
        names=names,
    )


def clip_targets(part: str, prefix: str, *aliases: str, diffusers: str, comfy: str = "") -> TargetGroup:
    """A CLIP text encoder's attention and MLP layers. diffusers, comfy: see `PartNames`."""
    containers = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
    names = PartNames(CLIP_LAYERS, diffusers, comfy)
    return TargetGroup(part, prefix, containers, canonical=clip_text_name, aliases=aliases, names=names)


def t5_targets(part: str, prefix: str, *, comfy: str) -> TargetGroup:
    """The layers of T5's encoder, for which diffusers has no place."""
    return TargetGroup(part, prefix, ("T5Attention", "T5DenseGatedActDense"), names=PartNames(T5_LAYERS, comfy=comfy))


@dataclass(frozen=True)
class BlockTable:
    """How the denoiser's blocks are counted for block-wise ranks and rates."""

    index: Callable[[str], int | None]
    """Layer key -> block number; None for a layer outside every block."""
    lead: int
    down: int
    mid: int
    up: int
    tail: int
    """Number of blocks of each kind, in counting order. `lead` and `tail` have no learning rate factor of their own."""
    short_lists: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Length of a list of block weights -> the blocks that each number after the first stands for. See `block_weights`."""

    def of(self, key: str) -> int | None:
        """Block number of a layer, checked against the table's size."""
        index = self.index(key)
        if index is not None and index >= self.count:
            raise UserError(f"{key} is in block {index}, block arguments know {self.count} blocks: another model layout.")
        return index

    @property
    def count(self) -> int:
        return self.lead + self.down + self.mid + self.up + self.tail

    def rate_weights(self, args: NetworkArgs) -> tuple[float, ...] | None:
        """Learning rate factor per block, or None when no factors were given."""
        if not args.has_block_rates:
            return None
        threshold = args.block_lr_zero_threshold or 0.0
        weights = [1.0] * self.lead
        for name, count in (("down", self.down), ("mid", self.mid), ("up", self.up)):
            given = getattr(args, f"{name}_lr_weight")
            factors = [1.0] * count if given is None else _expand(f"{name}_lr_weight", given, count)
            weights += [factor if given is None or factor > threshold else 0.0 for factor in factors]
        return tuple(weights + [1.0] * self.tail)


def _expand(name: str, given: tuple[float, ...] | str, count: int) -> list[float]:
    """A preset or a list as `count` factors. As in sd-scripts a short list is filled with 1 and a long one cut; both warn."""
    if isinstance(given, str):
        preset, _, offset = given.partition("+")
        depth = [i / max(count - 1, 1) for i in range(count)]
        return [RATE_PRESETS[preset.strip()](d) + float(offset or 0) for d in depth]
    if len(given) != count:
        logger.warning("%s has %d values for %d blocks: missing ones are 1, further ones unused", name, len(given), count)
    return (list(given) + [1.0] * count)[:count]


@dataclass(frozen=True)
class Layer:
    """One layer that can be adapted. `key` is its name in files."""

    key: str
    part: str
    module: nn.Linear | nn.Conv2d
    rows: tuple[int, ...] = ()
    """Output rows of the parts that get an adapter each; empty: one for the whole layer."""
    aliases: tuple[str, ...] = ()
    """Its names in other programs' files."""
    path: str = ""
    """In sd-scripts' class, with dots."""

    @property
    def is_spatial(self) -> bool:
        """A convolution larger than 1x1: it takes `conv_dim`."""
        return isinstance(self.module, nn.Conv2d) and self.module.kernel_size != (1, 1)


def unfused(layer: Layer) -> tuple[int, ...]:
    return ()


@dataclass(frozen=True)
class NetworkArch:
    """All that adapters must know about a model family."""

    name: str
    groups: tuple[TargetGroup, ...]
    blocks: BlockTable | None = None
    arguments: type[ArchArgs] = ArchArgs
    """What `--network_args` may hold for this family beside the algorithm's own."""
    fused_rows: Callable[[Layer], tuple[int, ...]] = field(default=unfused)
    """Rows of the parts of a fused layer, such as q, k and v; empty for all others."""
    marker: str = ""
    """Module that tells the family's denoiser from others of the same class; none needed where empty."""
    block_number: Callable[[str], int | None] | None = None
    """Number of the block that a layer is in, by its key (None outside), where there is no table of blocks."""
    diffusers_reads_kohya: bool = True
    """Whether diffusers reads files in sd-scripts' names, in part at least."""
    described: re.Pattern[str] = field(kw_only=True)
    """What `ss_base_model_version` and, without `/lora`, `modelspec.architecture` are in files for this family."""
    own_widths: frozenset[int] = frozenset()
    """Inputs that layers of the published denoisers have, and none of a family whose layers have the same names."""

    def block_of(self, key: str) -> int | None:
        """Number of the block that a layer is in; None outside. Raises `UserError` where blocks are not counted."""
        if self.blocks is not None:
            return self.blocks.of(key)
        if self.block_number is None:
            raise UserError(
                f"train_block_indices: the '{self.name}' network table does not count blocks. Use exclude_patterns."
            )
        return self.block_number(key)

    @property
    def text_parts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group.part for group in self.groups if group.part != DENOISER))

    def parts_of(self, text_encoder: object, unet: nn.Module | None) -> dict[str, nn.Module]:
        """sd-scripts' arguments as modules by part name. text_encoder: a module, list in table order, dict by name, or None."""
        parts: dict[str, nn.Module] = {} if unet is None else {DENOISER: unet}
        if isinstance(text_encoder, Mapping):
            named = dict(text_encoder)
        else:
            listed = list(text_encoder) if isinstance(text_encoder, (list, tuple)) else [text_encoder]
            if len(listed) > len(self.text_parts):
                raise UserError(
                    f"{len(listed)} text encoders given, the '{self.name}' network table has {len(self.text_parts)}."
                )
            named = dict(zip(self.text_parts, listed))  # noqa: B905 (fewer encoders than the table names are allowed)
        unknown = sorted(named.keys() - set(self.text_parts))
        if unknown:
            raise UserError(f"the '{self.name}' network table has no part '{unknown[0]}', only {', '.join(self.text_parts)}.")
        return parts | {name: module for name, module in named.items() if module is not None}


def infer_arch(text_encoder: object, unet: nn.Module | None) -> NetworkArch:
    """The known arch whose container classes stand in the model. Raises `UserError` when none fits."""
    given = text_encoder.values() if isinstance(text_encoder, Mapping) else text_encoder
    modules: list[object] = [unet] if unet is not None else list(given) if isinstance(given, Iterable) else [given]
    classes = {type(m).__name__ for module in modules if isinstance(module, nn.Module) for m in module.modules()}
    for place in KNOWN_ARCHS.values():
        module_name, _, attribute = place.partition(":")
        arch: NetworkArch = getattr(importlib.import_module(module_name), attribute)
        if arch.marker and not hasattr(unet, arch.marker):
            continue
        if any(classes & set(g.containers) for g in arch.groups if (g.part == DENOISER) == (unet is not None)):
            return arch
    names = ", ".join(type(module).__name__ for module in modules)
    raise UserError(f"no network table fits this model ({names}). Known: {', '.join(KNOWN_ARCHS)}. Pass the arch explicitly.")


def _linear_and_conv(group: TargetGroup, root: nn.Module) -> Iterator[tuple[str, Layer]]:
    for path, module in root.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            own = Layer(group.key(path), group.part, module, aliases=group.other_names(path), path=group.canonical(path))
            yield path, own


def every_layer(arch: NetworkArch, parts: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """Every Linear and Conv2d of the arch's parts by key, inside containers or not: what a file may name."""
    groups = [group for group in arch.groups if group.part in parts]
    return {layer.key: layer for group in groups for _, layer in _linear_and_conv(group, parts[group.part])}


def choose_layers(
    arch: NetworkArch,
    parts: Mapping[str, nn.Module],
    args: NetworkArgs,
    arch_args: ArchArgs,
    adapts: Callable[[Layer], bool] = lambda layer: True,
) -> list[Layer]:
    """The layers that the arch's table and the arguments name in the given parts. adapts: what the algorithm says of a layer of
    the table. Raises `UserError` for a group of the table, a pattern or a block number that fits no layer."""
    table = [layer for layer in target_layers(arch, parts, args, arch_args) if adapts(layer)]
    known = every_layer(arch, parts)
    excluded, included = args.exclude_patterns or (), args.include_patterns or ()
    _check_fit("exclude_patterns", excluded, table)
    _check_fit("include_patterns", included, known.values())
    wanted = {layer.key for layer in table if not any(fits(pattern, layer) for pattern in excluded)}
    wanted |= {layer.key for layer in known.values() if any(fits(pattern, layer) for pattern in included)}
    if args.train_block_indices is not None:
        wanted = _in_blocks(arch, [known[key] for key in wanted], args.train_block_indices)
    chosen = [layer for layer in known.values() if layer.key in wanted]
    if not chosen:
        raise UserError("no layer is left to adapt: --network_args exclude every one of them.")
    has_rank = args.conv_size(1, 1.0)[0] or args.conv_block_dims is not None
    if spatial := [layer.key for layer in chosen if layer.is_spatial and not has_rank and args.rank(layer) is None]:
        raise UserError(f"include_patterns names {spatial[0]}, a convolution larger than 1x1. Give such ones a rank: conv_dim.")
    return chosen


def _check_fit(name: str, patterns: Iterable[re.Pattern[str]], layers: Iterable[Layer]) -> None:
    """Raise `UserError` for a pattern that fits no layer."""
    layers = list(layers)
    for pattern in patterns:
        if not any(fits(pattern, layer) for layer in layers):
            some = ", ".join(layer.key for layer in layers[:3])
            raise UserError(
                f"--network_args {name}: '{pattern.pattern}' fits no layer. It is looked for in names such as {some}, "
                f"or has to be the whole of a path such as {layers[0].path if layers else 'those of the model'}."
            )


def check_patterns(args: NetworkArgs, chosen: Sequence[Layer], adapted: Sequence[Layer]) -> None:
    """Raise `UserError` for a rank by pattern that fits no chosen layer, and a rate that fits none whose rank is not 0."""
    _check_fit("network_reg_dims", [pattern for pattern, _ in args.network_reg_dims or ()], chosen)
    _check_fit("network_reg_lrs", [pattern for pattern, _ in args.network_reg_lrs or ()], adapted)


def _in_blocks(arch: NetworkArch, layers: Sequence[Layer], numbers: Collection[int]) -> set[str]:
    """Keys of the layers in these blocks of the denoiser, and of all layers of text encoders."""
    blocks = {layer.key: arch.block_of(layer.key) for layer in layers if layer.part == DENOISER}
    if absent := sorted(set(numbers) - set(blocks.values())):
        raise UserError(
            f"--network_args train_block_indices: no layer is adapted in block {absent[0]}. Blocks with layers: "
            f"{', '.join(str(number) for number in sorted({n for n in blocks.values() if n is not None}))}."
        )
    wanted = {*numbers, None} if arch.blocks is None else set(numbers)  # a table counts what is outside, too
    return {layer.key for layer in layers if layer.part != DENOISER or blocks[layer.key] in wanted}


def target_layers(arch: NetworkArch, parts: Mapping[str, nn.Module], args: NetworkArgs, arch_args: ArchArgs) -> list[Layer]:
    """The layers the arch's table and arguments name in the given parts. Raises `UserError` for a group that matches none."""
    extra, spatial = arch_args.extra_modules(), args.adapts_spatial_convs
    found = []
    for group in arch.groups:
        if group.part not in parts:
            continue
        root = parts[group.part]
        wanted = group.containers + (group.conv_containers if spatial else ())
        inside = {
            f"{path}.{inner}".strip(".")
            for path, module in root.named_modules()
            if type(module).__name__ in wanted
            for inner, _ in module.named_modules()
        }
        if group.part == DENOISER:
            inside |= {
                path for path, _ in root.named_modules() if path in extra or path.startswith(tuple(f"{e}." for e in extra))
            }
        layers = [
            layer for path, layer in _linear_and_conv(group, root) if path in inside and (spatial or not layer.is_spatial)
        ]
        if not layers:
            raise UserError(
                f"no layer to adapt in {group.part} ({type(root).__name__}): the '{arch.name}' network table looks inside "
                f"{', '.join(wanted)}, and finds none there. Is this the model family's own script and network module?"
            )
        found += layers
    return found


@dataclass(frozen=True)
class LayerSize:
    """Rank and alpha of one adapter; its output is scaled by alpha / rank."""

    rank: int
    alpha: float


def plan_sizes(
    layers: Sequence[Layer],
    arch: NetworkArch,
    args: NetworkArgs,
    arch_args: ArchArgs | None = None,
    *,
    dim: int,
    alpha: float,
) -> dict[str, LayerSize]:
    """Rank and alpha by layer key. A layer of rank 0, or in a block whose learning rate factor is 0, is left out."""
    plain, spatial = LayerSize(dim, alpha), LayerSize(*args.conv_size(dim, alpha))
    blocks = _block_sizes(arch, args, plain, spatial)
    sizes = {}
    for layer in layers:
        index = arch.blocks.of(layer.key) if blocks and arch.blocks and layer.part == DENOISER else None
        if blocks and index is not None:
            size = blocks[index][layer.is_spatial]
        else:
            size = spatial if layer.is_spatial else plain
        own = args.rank(layer)
        if own is not None:
            size = LayerSize(own, size.alpha)
        elif arch_args is not None and not layer.is_spatial:
            size = LayerSize(arch_args.rank(layer.key, size.rank), size.alpha)
        if size.rank and (arch_args is None or arch_args.chooses(layer.key)):
            sizes[layer.key] = size
    return sizes


def _block_sizes(
    arch: NetworkArch, args: NetworkArgs, plain: LayerSize, spatial: LayerSize
) -> list[tuple[LayerSize, LayerSize]] | None:
    """(size, size of larger convolutions) per block, or None when nothing was given per block."""
    lists = {name: getattr(args, name) for name in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")}
    given = {name: values for name, values in lists.items() if values is not None}
    if not given and not args.has_block_rates:
        return None
    if arch.blocks is None:
        raise UserError(
            f"the '{arch.name}' network table has no blocks: remove {', '.join(given) or 'the *_lr_weight'} arguments."
        )
    count = arch.blocks.count
    for name, values in given.items():
        if len(values) != count:
            raise UserError(
                f"--network_args {name} has {len(values)} values, this model has {count} blocks. Give one per block."
            )
    defaults: dict[str, float] = {
        "block_dims": plain.rank,
        "block_alphas": plain.alpha,
        "conv_block_dims": spatial.rank,
        "conv_block_alphas": spatial.alpha,
    }
    columns = [given.get(name, [default] * count) for name, default in defaults.items()]
    weights = arch.blocks.rate_weights(args) or (1.0,) * count
    return [
        (LayerSize(dim if weight else 0, alpha), LayerSize(conv_dim if weight else 0, conv_alpha))
        for dim, alpha, conv_dim, conv_alpha, weight in zip(*columns, weights)  # noqa: B905 (all have `count` values)
    ]
