"""The adapter engine: one adapted layer, a network of them, and how networks are made for a model.

An algorithm (LoRA, ...) is an `Adapter` subclass; a model family is a `NetworkArch` table. `bind` joins the two.
An adapter replaces its layer's `forward`, never the layer: the base model's keys, dtype and block swap see no change.
"""

from __future__ import annotations

import importlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.optimizers import LearningRates, ParamGroup
from library.rng import keyed_generator
from networks.file_formats import own_layers
from networks.network_args import SIZE_ARGS, ArchArgs, NetworkArgs, parse_network_args, split_args
from networks.network_files import by_layer, describe_family, in_dtype, refuse_unread, shorten, with_numbers, writer_of
from networks.network_interface import AdapterNetwork, FileWeights, LayerKind, NetworkModule, NetworkRequest
from networks.network_targets import (
    DENOISER,
    BlockTable,
    Layer,
    LayerSize,
    NetworkArch,
    TargetGroup,
    check_patterns,
    choose_layers,
    every_layer,
    infer_arch,
    plan_sizes,
)

__all__ = [
    "Adapter",
    "AdapterNetwork",
    "AdditiveAdapter",
    "BlockTable",
    "Layer",
    "LayerNetwork",
    "LayerSize",
    "NetworkArch",
    "NetworkFactory",
    "TargetGroup",
    "algorithm_of",
    "bind",
]

logger = logging.getLogger(__name__)


class Adapter(nn.Module, ABC):
    """One adapted layer. Its parameters and buffers are float32 whatever the layer's dtype, and named as in files.

    Several networks may stand on one layer. Those that only add to its output may come in any order; what turns or scales the
    output, or feeds the layer another input, acts on all that was attached before it.
    """

    arguments: ClassVar[type[NetworkArgs]] = NetworkArgs
    """What `--network_args` may hold for this algorithm."""
    plus_parameters: ClassVar[frozenset[str]] = frozenset()
    """Parameters that LoRA+ trains at the higher rate."""
    default_alpha: ClassVar[float] = 1.0
    denoiser_only: ClassVar[bool] = False
    """Whether text encoders are left alone."""
    own_files: ClassVar[bool] = False
    """Whether nothing but the user's word tells that a file is this algorithm's."""
    splits_fused: ClassVar[bool] = False
    """Whether the parts of a fused layer are adapted each for itself, whatever the arguments say."""

    @abstractmethod
    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__()
        self._base = (layer.module,)  # in a tuple: the base layer must not become a submodule
        self._replaced: Callable[[Tensor], Tensor] | None = None
        self.key = layer.key
        self.module_dropout = args.module_dropout or 0.0
        self.multiplier = 1.0

    @property
    def base(self) -> nn.Linear | nn.Conv2d:
        return self._base[0]

    @property
    def file_key(self) -> str:
        """The layer's name in the files that are written."""
        return self.key

    @classmethod
    def adapts(cls, layer: Layer, args: NetworkArgs) -> bool:
        """Whether a layer of the family's table is one for this algorithm, where no pattern names it."""
        return True

    def base_forward(self, x: Tensor) -> Tensor:
        """The layer's own forward, or that of the adapter attached before this one."""
        assert self._replaced is not None
        return self._replaced(x)

    @abstractmethod
    def adapted(self, x: Tensor) -> Tensor:
        """The layer's output for `x` with the adapter at its multiplier."""

    @abstractmethod
    def merged(self, weight: Tensor) -> Tensor:
        """The base's `weight`, float32, with the adapter at its multiplier in it: what gives `adapted` without dropout."""

    @abstractmethod
    def weight_norm(self) -> Tensor:
        """How far the adapter is from changing nothing, a 0-d tensor; of those that add a weight, its Frobenius norm."""

    @abstractmethod
    def rescale(self, ratio: Tensor) -> None:
        """Multiply what `weight_norm` measures by `ratio` (a 0-d tensor) in place, spread evenly over its factors."""

    @classmethod
    @abstractmethod
    def size_in_file(cls, key: str, tensors: Mapping[str, Tensor]) -> LayerSize:
        """Rank and alpha of the layer `key` of a file. Raises `UserError` when another algorithm wrote it."""

    @classmethod
    def size_of_part(cls, in_file: LayerSize, layer: Layer) -> LayerSize:
        """Size of each of a layer's adapters, from what `size_in_file` found."""
        return in_file

    @classmethod
    def like_file(
        cls, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator, tensors: Mapping[str, Tensor]
    ) -> Adapter:
        """An adapter that can take the tensors of a file's layer: what the file decides overrides `args`."""
        return cls(layer, size, args, generator)

    @property
    def frozen_parameters(self) -> frozenset[str]:
        """Parameters that are in files and never learn."""
        return frozenset()

    @property
    def watches_gradients(self) -> bool:
        """Whether `note_gradients` has to be called."""
        return False

    def note_gradients(self) -> None:
        """Called when the parameters' gradients are complete, before the weights are stepped."""
        return

    def file_tensors(self) -> dict[str, Tensor]:
        """Tensors as files hold them, by their name inside the layer."""
        return dict(self.state_dict())

    @abstractmethod
    def load_file_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Take the tensors of this layer from a file. Raises `UserError` naming `source` when they do not fit."""

    def forward(self, x: Tensor) -> Tensor:
        """Stands in for the base layer's forward while attached."""
        if self.multiplier == 0:
            return self.base_forward(x)
        if self.training and self.module_dropout and torch.rand(()).item() < self.module_dropout:
            return self.base_forward(x)
        return self.adapted(x)

    def attach(self) -> None:
        assert self._replaced is None, f"{self.key} is attached already"
        self._replaced = self.base.forward
        self.base.forward = self.forward  # type: ignore[method-assign, assignment]

    def detach(self) -> None:
        """Give the base layer its forward back. Networks stacked on one layer are taken off in reverse order."""
        if self._replaced is None:
            return
        assert self.base.__dict__.get("forward") == self.forward, f"{self.key}: detach what was attached after it first"
        del self.base.forward
        if self.base.forward != self._replaced:  # the replaced one was an instance's too
            self.base.forward = self._replaced  # type: ignore[method-assign, assignment]
        self._replaced = None

    @torch.no_grad()
    def merge_into_base(self) -> None:
        """Put the adapter into the base weight: computed in float32, stored in the base's dtype."""
        change = getattr(self.base, "change_weight", None)
        if change is not None:  # a quantised layer, whose `weight` is a copy
            change(self._merged_anywhere)
            return
        weight = self.base.weight
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise UserError(f"cannot merge {self.key} into a {weight.dtype} weight. Load the base model in fp16, bf16 or fp32.")
        weight.copy_(self._merged_anywhere(weight.float()))

    def _merged_anywhere(self, weight: Tensor) -> Tensor:
        """`merged` where the adapter is, given back where the weight is."""
        place = next(iter(self.state_dict().values())).device
        return self.merged(weight.to(place)).to(weight.device)


class AdditiveAdapter(Adapter):
    """An adapter whose output is added to its layer's."""

    @abstractmethod
    def delta(self, x: Tensor, multiplier: float = 1.0) -> Tensor:
        """What is added to the layer's output for `x`, in the dtype that is computed in."""

    @abstractmethod
    def delta_weight(self, multiplier: float = 1.0) -> Tensor:
        """The same as a weight of the base's shape, float32, without dropout."""

    def adapted(self, x: Tensor) -> Tensor:
        return self.add_to(self.base_forward(x), x)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """The layer's output `out` for `x` with `delta` on it."""
        return out + self.delta(x, self.multiplier).to(out.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.delta_weight(self.multiplier)

    def weight_norm(self) -> Tensor:
        return self.delta_weight().norm()


class LayerNetwork(AdapterNetwork):
    """Our networks: adapters by file key. Children are named by key, so `state_dict` has the file's names."""

    def __init__(
        self,
        arch: NetworkArch,
        args: NetworkArgs,
        layers: Sequence[Layer],
        adapters: Sequence[Adapter],
    ) -> None:
        super().__init__({layer.part for layer in layers})
        self.arch, self.args = arch, args
        self._own_rates = {layer.key: rate for layer in layers if (rate := args.rate(layer)) is not None}
        self._rates: dict[str, float] = {}
        self._weights: Mapping[str, float] = {}
        self._part_of = {layer.key: layer.part for layer in layers}
        self._alias_of = {alias: layer.key for layer in layers for alias in layer.aliases}
        self._untrained: frozenset[str] = frozenset()
        for adapter in adapters:
            self.add_module(adapter.key, adapter)

    def adapters(self) -> Iterator[Adapter]:
        for child in self.children():
            assert isinstance(child, Adapter)
            yield child

    def set_multiplier(self, multiplier: float) -> None:
        super().set_multiplier(multiplier)
        for adapter in self.adapters():
            adapter.multiplier = multiplier * self._weights.get(adapter.key, 1.0)

    def set_layer_weights(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self.set_multiplier(self.multiplier)

    def attach(self) -> None:
        for adapter in self.adapters():
            adapter.attach()

    def detach(self) -> None:
        for adapter in self.adapters():
            adapter.detach()

    def keep_parts(self, parts: Collection[str]) -> None:
        """Drop the adapters of all other parts. Only while detached."""
        for adapter in list(self.adapters()):
            if self._part_of[adapter.key] not in parts:
                delattr(self, adapter.key)
                del self._part_of[adapter.key]
        self.parts = frozenset(self._part_of.values())

    def leave_untrained(self, modules: Collection[nn.Module]) -> None:
        inside = {id(inner) for module in modules for inner in module.modules()}
        self._untrained |= {adapter.key for adapter in self.adapters() if id(adapter.base) in inside}

    def param_groups(self, rates: LearningRates) -> list[ParamGroup]:
        groups: dict[str, ParamGroup] = {}
        self.requires_grad_(False)
        block_weights = self.arch.blocks.rate_weights(self.args) if self.arch.blocks else None
        for adapter in self.adapters():
            name, rate = self._group_of(adapter.key, rates, block_weights)
            self._rates[adapter.key] = 0.0 if adapter.key in self._untrained else rate
            ratio = self.args.plus_ratio(self._part_of[adapter.key] == DENOISER)
            for inner, parameter in adapter.named_parameters():
                plus = ratio is not None and inner in adapter.plus_parameters
                own_name, own_rate = (f"{name} plus", rate * (ratio or 0.0)) if plus else (name, rate)
                if own_rate and adapter.key not in self._untrained and inner not in adapter.frozen_parameters:
                    parameter.requires_grad_(True)
                    groups.setdefault(own_name, ParamGroup(own_name, [], own_rate)).params.append(parameter)
        if not groups:
            raise UserError(
                "every learning rate of the network is 0, so nothing would learn. Set --learning_rate or --unet_lr."
            )
        return list(groups.values())

    def _group_of(self, key: str, rates: LearningRates, block_weights: Sequence[float] | None) -> tuple[str, float]:
        """Name and rate of the parameter group of the layer `key`."""
        part, own = self._part_of[key], self._own_rates.get(key)
        if part != DENOISER:
            name, rate = rates.of_text_encoder(part, self.arch.text_parts)
            return (name, rate) if own is None else (f"{name}_lr{own:g}", own)
        rate = rates.of_denoiser
        if own is not None:
            return f"unet_lr{own:g}", own
        if block_weights is None or self.arch.blocks is None:
            return "unet", rate
        block = self.arch.blocks.of(key)
        return ("unet", rate) if block is None else (f"unet_block{block}", rate * block_weights[block])

    def layer_kinds(self) -> list[LayerKind]:
        kinds: dict[tuple[str, str, float], list[Adapter]] = {}
        for adapter in self.adapters():
            name = re.sub(r"(?<=_)\d+(?=_)", "*", adapter.file_key)
            shapes = ", ".join(f"{key} {'x'.join(map(str, one.shape))}" for key, one in adapter.named_parameters())
            kinds.setdefault((name, shapes, self._rates.get(adapter.key, 0.0)), []).append(adapter)
        return [
            LayerKind(name, len(found), shapes, sum(one.numel() for adapter in found for one in adapter.parameters()), rate)
            for (name, shapes, rate), found in kinds.items()
        ]

    @property
    def on_gradients(self) -> Callable[[], None] | None:
        return self._note_gradients if any(adapter.watches_gradients for adapter in self.adapters()) else None

    def _note_gradients(self) -> None:
        for adapter in self.adapters():
            adapter.note_gradients()

    @torch.no_grad()
    def limit_norms(self, max_norm: float) -> dict[str, Tensor]:
        """Stays on the device: nothing waits for the result."""
        norms, ratios = [], []
        for adapter in self.adapters():
            norm = adapter.weight_norm()
            ratio = max_norm / norm.clamp(min=max_norm)
            adapter.rescale(ratio)
            norms.append(norm * ratio)
            ratios.append(ratio)
        limited = torch.stack(norms)
        return {
            "max_norm/keys_scaled": (torch.stack(ratios) < 1).sum(),
            "norm/avg_key_norm": limited.mean(),
            "max_norm/max_key_norm": limited.max(),
        }

    @torch.no_grad()
    def key_norms(self) -> dict[str, Tensor]:
        norms = torch.stack([adapter.weight_norm() for adapter in self.adapters()])
        return {"norm/avg_key_norm": norms.mean(), "norm/max_key_norm": norms.max()}

    def file_state_dict(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            f"{adapter.file_key}.{name}": in_dtype(tensor.detach().to("cpu"), dtype).contiguous()
            for adapter in self.adapters()
            for name, tensor in adapter.file_tensors().items()
        }

    @with_numbers()
    def load_file_state_dict(self, tensors: Mapping[str, Tensor], source: str, strict: bool = True) -> None:
        file_layers = own_layers(tensors, self.arch, source, self._alias_of)
        refuse_unread(file_layers, source)
        own = {adapter.key: adapter for adapter in self.adapters()}
        shared = [key for key in own if key in file_layers]
        if not shared:
            raise UserError(_no_match(source, by_layer(tensors), own))
        absent_parts = [g.part for g in self.arch.groups if g.part in self.parts and not any(map(g.holds, file_layers))]
        if absent_parts:
            logger.info("%s has nothing for %s, which starts untrained", source, ", ".join(absent_parts))
        prefixes = [group for group in self.arch.groups if group.part not in self.parts]
        extra = [key for key in file_layers if key not in own and not any(group.holds(key) for group in prefixes)]
        missing = [key for key in own if key not in file_layers and self._part_of[key] not in absent_parts]
        if strict and (extra or missing):
            text = f"{source} does not fit this network:"
            text += f" it has {len(extra)} layers more ({shorten(extra)})." if extra else ""
            text += f" it lacks {len(missing)} layers ({shorten(missing)})." if missing else ""
            raise UserError(f"{text} Use --dim_from_weights to train exactly the file's layers.")
        for key in shared:
            own[key].load_file_tensors(file_layers[key], source)

    def merge_into_base(self) -> None:
        self.detach()
        for adapter in self.adapters():
            adapter.merge_into_base()

    def apply_to(self, text_encoder: object, unet: object, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        self.keep_parts({part for part in self.parts if (apply_unet if part == DENOISER else apply_text_encoder)})
        self.attach()


def _no_match(source: str, found: Collection[str], wanted: Collection[str]) -> str:
    return (
        f"{source} has no weights for this model. It has {shorten(found) or 'no keys'}; expected keys such as "
        f"{shorten(wanted)}.{describe_family(found)}"
    )


def _modules(arch: NetworkArch, arch_args: ArchArgs, request: NetworkRequest) -> dict[str, nn.Module]:
    """The model parts that are adapted."""
    modules = {
        part: module
        for part, module in arch.parts_of(request.text_encoder, request.unet).items()
        if (request.parts is None or part in request.parts) and arch_args.learns(part)
    }
    if not modules:
        raise UserError("no model part is left to adapt: both the denoiser and the text encoders are excluded.")
    return modules


def _split(arch: NetworkArch, layers: Sequence[Layer]) -> list[Layer]:
    """Fused layers with their parts."""
    return [replace(layer, rows=arch.fused_rows(layer)) for layer in layers]


def algorithm_of(key: str, tensors: Mapping[str, Tensor]) -> type[Adapter]:
    """What wrote the layer `key` of a file. Raises `UserError` for what none of our algorithms writes."""
    writer = writer_of(tensors)
    if writer is None or not writer.module.startswith("networks."):
        name = "an unknown algorithm" if writer is None else writer.algorithm
        raise UserError(f"{key} holds {shorten(tensors)}: the file was made by {name}, which only lycoris.kohya may know.")
    factory: NetworkFactory = importlib.import_module(writer.module).factory
    return factory.algorithm


@dataclass(frozen=True)
class NetworkFactory(NetworkModule[LayerNetwork]):
    """Makes networks of one algorithm; a trainer binds it to its family's table, otherwise the model's classes decide."""

    algorithm: type[Adapter]
    arch: NetworkArch | None = None

    @property
    def name(self) -> str:
        return self.algorithm.__module__

    def for_arch(self, arch: NetworkArch) -> NetworkFactory:
        return replace(self, arch=arch)

    def __call__(self, *args: Any, **kwargs: Any) -> LayerNetwork:
        return self.create_network(*args, **kwargs)

    def make(self, request: NetworkRequest, dim: int | None, alpha: float | None) -> LayerNetwork:
        arch = self.arch or infer_arch(request.text_encoder, request.unet)
        args, arch_args = self.for_arch(arch).parse(request.arguments, request.dropout)
        dim = 4 if dim is None else dim
        if dim < 1:
            raise UserError(f"--network_dim {dim}: a rank of at least 1 is needed.")
        modules = _modules(arch, arch_args, request)
        layers = choose_layers(arch, modules, args, arch_args, lambda layer: self.algorithm.adapts(layer, args))
        sizes = plan_sizes(
            layers, arch, args, arch_args, dim=dim, alpha=self.algorithm.default_alpha if alpha is None else alpha
        )
        if not sizes:
            raise UserError("every block's rank or learning rate factor is 0, so there is nothing to train.")
        chosen, layers = layers, [layer for layer in layers if layer.key in sizes]
        check_patterns(args, chosen, layers)
        if self.algorithm.splits_fused or arch_args.splits_fused():
            layers = _split(arch, layers)
        return self._build(arch, args, layers, request, lambda layer, rng: self.algorithm(layer, sizes[layer.key], args, rng))

    def make_from_weights(self, request: NetworkRequest, weights: FileWeights) -> LayerNetwork:
        """With the file's layers, ranks, alphas and weights. Layers are found by name anywhere in the model.

        For inference every layer may be of another algorithm; to train on, all are of this module's.
        """
        arch = self.arch or infer_arch(request.text_encoder, request.unet)
        args, arch_args = self.for_arch(arch).parse(request.arguments, request.dropout)
        unused = [name for name in SIZE_ARGS if getattr(args, name) is not None]
        unused += [name for name in arch_args.size_args if getattr(arch_args, name) is not None]
        if unused:
            logger.warning("network_args %s have no effect: ranks come from %s", ", ".join(unused), weights.source)
        known = every_layer(arch, _modules(arch, arch_args, request))
        aliases = {alias: key for key, layer in known.items() for alias in layer.aliases}
        file_layers = own_layers(weights.tensors, arch, weights.source, aliases)
        refuse_unread(file_layers, weights.source)
        matched = [layer for key, layer in known.items() if key in file_layers]
        if arch_args.splits_fused():
            matched = _split(arch, matched)
        if not matched:
            raise UserError(_no_match(weights.source, by_layer(weights.tensors), known))

        by_content = request.for_inference and not self.algorithm.own_files

        def make(layer: Layer, generator: torch.Generator) -> Adapter:
            tensors = file_layers[layer.key]
            algorithm = algorithm_of(layer.key, tensors) if by_content else self.algorithm
            size = algorithm.size_of_part(algorithm.size_in_file(layer.key, tensors), layer)
            own = args if isinstance(args, algorithm.arguments) else algorithm.arguments()
            return algorithm.like_file(layer, size, own, generator, tensors)

        network = self._build(arch, args, matched, request, make)
        network.load_file_state_dict(weights.tensors, weights.source)
        return network

    def merge(self, request: NetworkRequest, weights: FileWeights) -> None:
        self.make_from_weights(request, weights).merge_into_base()

    def parse(self, kwargs: Mapping[str, Any], neuron_dropout: float | None = None) -> tuple[NetworkArgs, ArchArgs]:
        """`--network_args` for the algorithm and for the family; one dropout from the two names for it."""
        known = self.arch.arguments if self.arch is not None else ArchArgs
        family, others = split_args(known, kwargs)
        arch_args = parse_network_args(known, family, module=self.name)
        args = parse_network_args(self.algorithm.arguments, others, module=self.name, also=known)
        if not self.algorithm.plus_parameters and (args.plus_ratio(True) or args.plus_ratio(False)):
            raise UserError(f"{self.name} has no pair of matrices: the loraplus arguments have no meaning for it. Remove them.")
        if neuron_dropout is None or args.dropout == neuron_dropout:
            return args, arch_args
        if args.dropout is not None:
            raise UserError(f"--network_dropout {neuron_dropout} and --network_args dropout={args.dropout} differ. Give one.")
        return replace(args, dropout=neuron_dropout), arch_args

    def text_parts(self, names: Sequence[str], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        arch_args = self.parse(kwargs)[1]
        return () if self.algorithm.denoiser_only else tuple(name for name in names if arch_args.learns(name))

    def _build(
        self,
        arch: NetworkArch,
        args: NetworkArgs,
        layers: Sequence[Layer],
        request: NetworkRequest,
        make: Callable[[Layer, torch.Generator], Adapter],
    ) -> LayerNetwork:
        adapters = [make(layer, keyed_generator("network", request.init_seed, layer.key)) for layer in layers]
        network = LayerNetwork(arch, args, layers, adapters)
        network.set_multiplier(request.multiplier)
        counts = {part: sum(layer.part == part for layer in layers) for part in dict.fromkeys(layer.part for layer in layers)}
        logger.info("%s: adapted layers: %s", self.name, ", ".join(f"{part} {count}" for part, count in counts.items()))
        return network


def bind(algorithm: type[Adapter], arch: NetworkArch | None = None) -> NetworkFactory:
    """A network module's factory: `factory = bind(LoRA)`; its two methods are the module's `create_network...` functions."""
    return NetworkFactory(algorithm, arch)
