"""The networks (LoRAs and other adapters) of pictures: which are asked for, whether they fit, and putting them on the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from library.adapter_tools import adapter_metadata
from library.errors import UserError
from library.family_base import ModelBundle, ModelFamily
from library.model_io import open_checkpoint
from library.picture_metadata import NetworkUse
from library.quantized_layers import end_merging
from library.trainable import DENOISER, split_pairs
from networks.block_weights import layer_weights, parse_weights
from networks.external import load_network_module
from networks.network_base import NetworkFactory
from networks.network_files import read_weights
from networks.network_interface import AdapterNetwork, NetworkModule

if TYPE_CHECKING:
    from library.generation_options import PictureNetworkOptions

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

OUR_MODULE = "networks.lora"
"""Reads the files of every algorithm of ours."""
BLOCK_ARGUMENT = "lbw"


@dataclass(frozen=True)
class AskedNetwork:
    """A network, as the flags have it."""

    path: Path
    strength: float
    module: str
    arguments: Mapping[str, Any]
    block_weights: tuple[float, ...] | None
    merged: bool

    @property
    def name(self) -> str:
        return self.path.stem


def asked_networks(options: PictureNetworkOptions) -> list[AskedNetwork]:
    """In the order of the flags. Raises `UserError` for what cannot be read."""
    if options.lora_weights:
        files, strengths = zip(*(_with_strength(text) for text in options.lora_weights), strict=True)
    else:
        files, strengths = options.network_weights or (), options.network_mul or ()
    modules = options.network_module or (OUR_MODULE,)
    if 1 < len(modules) < len(files):
        raise UserError(
            f"--network_module: {len(modules)} modules for {len(files)} networks. Give one for all, or one for each."
        )
    merged = len(files) if options.network_merge else options.network_merge_n_models or 0
    found = []
    for index, file in enumerate(files):
        arguments = split_pairs([pair for pair in _item(options.network_args, index, "").split(";") if pair], "--network_args")
        listed = _item(options.lbw, index, arguments.pop(BLOCK_ARGUMENT, ""))
        found.append(
            AskedNetwork(
                path=Path(file),
                strength=_item(strengths, index, 1.0),
                module=_item(modules, index, modules[0]),
                arguments=arguments,
                block_weights=parse_weights(listed) if listed else None,
                merged=index < merged,
            )
        )
    return found


def _item(values: Sequence[Value] | None, index: int, otherwise: Value) -> Value:
    return values[index] if values and index < len(values) else otherwise


def _with_strength(text: str) -> tuple[str, float]:
    """`file;0.8`, or a file alone."""
    file, semicolon, strength = text.rpartition(";")
    if not semicolon:
        return text, 1.0
    try:
        return file, float(strength)
    except ValueError:
        raise UserError(f"--lora_weights {text}: expected file;strength, such as style.safetensors;0.8.") from None


@dataclass(frozen=True)
class FittingNetwork:
    """A network whose file has been read and found to be for the model."""

    asked: AskedNetwork
    module: NetworkModule
    tensors: dict[str, Tensor]
    parts: frozenset[str]
    """Of the model, that it has something for."""
    weights: Mapping[str, float] | None
    """By layer."""
    use: NetworkUse

    def put_on(self, bundle: ModelBundle) -> AdapterNetwork:
        """Made for the model, and merged into it or attached. Once."""
        asked = self.asked
        encoders = {name: bundle.part(name) for name in bundle.text_encoder_names if name in self.parts}
        denoiser = bundle.denoiser if DENOISER in self.parts else None
        network, _ = self.module.create_network_from_weights(
            asked.strength, asked.path, None, encoders, denoiser, self.tensors, for_inference=True, **asked.arguments
        )
        if self.weights is not None:
            network.set_layer_weights(self.weights)
        self.tensors.clear()  # the network has its own
        network.to(bundle.device)
        if asked.merged:
            network.merge_into_base()
            bundle.changed |= network.parts
        else:
            network.attach()
        logger.info("%s at %g, %s", asked.path, asked.strength, "merged" if asked.merged else "live")
        return network


def fitting_networks(
    asked: Sequence[AskedNetwork], family: ModelFamily, bundle: ModelBundle, *, quantized: bool
) -> list[FittingNetwork]:
    """The files, held against the model before it is loaded. Raises `UserError` for one that is not for it."""
    if not asked:
        return []
    names = (DENOISER, *bundle.text_encoder_names)
    empty = {name: bundle.facts["model"].parts[name].empty() for name in names}
    return [_fitting(one, family, empty, quantized=quantized) for one in asked]


def _fitting(asked: AskedNetwork, family: ModelFamily, empty: Mapping[str, nn.Module], *, quantized: bool) -> FittingNetwork:
    module: NetworkModule = load_network_module(asked.module).for_arch(family.arch)
    if asked.merged and quantized and not module.merges_into_quantized:
        raise UserError(
            f"--network_merge: {asked.module} merges into whole weights, which a quantised model has not. Leave it out."
        )
    tensors = read_weights(asked.path)
    parts = frozenset(empty)
    if isinstance(module, NetworkFactory):  # what foreign modules do with an empty model is not known
        encoders = {name: part for name, part in empty.items() if name != DENOISER}
        made, _ = module.create_network_from_weights(
            1.0, asked.path, None, encoders, empty[DENOISER], tensors, for_inference=True, **asked.arguments
        )
        parts = made.parts
    weights = None if asked.block_weights is None else layer_weights(asked.block_weights, family.arch, empty)
    told = open_checkpoint(asked.path).metadata if asked.path.suffix == ".safetensors" else {}
    use = NetworkUse(asked.name, asked.strength, str(told.get("sshs_model_hash", ""))[:12] or None)
    return FittingNetwork(asked, module, tensors, parts, weights, use)


def show_metadata(asked: Sequence[AskedNetwork]) -> None:
    """`--network_show_meta`."""
    for one in asked:
        logger.info("%s: %s", one.path, json.dumps(adapter_metadata(one.path), indent=1))


@dataclass
class PictureNetworks:
    """The networks of one run, first those that are merged."""

    fitting: list[FittingNetwork]
    live: list[AdapterNetwork] = field(default_factory=list)
    """Once they are on the model."""

    @property
    def parts(self) -> frozenset[str]:
        """Parts of the model that any of them changes."""
        return frozenset(part for one in self.fitting for part in one.parts)

    @property
    def live_parts(self) -> frozenset[str]:
        return frozenset(part for one in self.fitting if not one.asked.merged for part in one.parts)

    @property
    def merged_uses(self) -> list[NetworkUse]:
        return [one.use for one in self.fitting if one.asked.merged]

    @property
    def live_uses(self) -> list[NetworkUse]:
        return [one.use for one in self.fitting if not one.asked.merged]

    @property
    def strengths(self) -> tuple[float, ...]:
        """Of those that are live, as they were asked for."""
        return tuple(use.strength for use in self.live_uses)

    def put_on(self, bundle: ModelBundle) -> None:
        for one in self.fitting:
            network = one.put_on(bundle)
            if not one.asked.merged:
                self.live.append(network)
        for part in bundle.changed:
            end_merging(bundle.part(part))

    def set_strengths(self, strengths: Sequence[float]) -> None:
        for network, strength in zip(self.live, strengths, strict=True):
            network.set_multiplier(strength)
