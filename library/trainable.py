"""What learns, how it attaches to the model, and what is written: an adapter network, or parts of the model itself."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.family_base import ModelBundle, ModelFamily
from library.memory_policy import MemoryPolicy
from library.model_io import open_checkpoint
from library.model_parts import SaveSettings
from library.optimizers import LearningRates, ParamGroup
from library.quantized_layers import end_merging
from library.run_setup import learning_dtype

if TYPE_CHECKING:
    from library.option_groups import FullOptions, FullTrainOptions, NetworkOptions, NetworkTrainOptions
    from networks.external import NetworkModule
    from networks.network_interface import AdapterNetwork, LayerKind
    from networks.network_targets import NetworkArch

logger = logging.getLogger(__name__)

DENOISER = "denoiser"

KEY_NORMS_EVERY = 20
"""Updates between which adapters' norms are logged: they change slowly, and it takes a product for each of hundreds."""


class Trainable(ABC):
    """The learning tensors of one run."""

    bundle: ModelBundle
    parts: frozenset[str]
    """Parts of the bundle whose outputs change as training goes on; the others may be cached."""
    memory: MemoryPolicy = MemoryPolicy()

    @property
    def denoiser(self) -> nn.Module:
        return self.bundle.denoiser

    @abstractmethod
    def param_groups(self, rates: LearningRates) -> list[ParamGroup]: ...

    def layer_kinds(self) -> Sequence[LayerKind]:
        """Of an adapter network, what it adapts; after `param_groups`."""
        return ()

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Every learning tensor of every part; restoring it restores the run."""

    @abstractmethod
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """The frozen model, for prior preservation. Raises `UserError` where there is none."""

    @abstractmethod
    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode of everything that learns."""

    @abstractmethod
    def save(self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write what other programs read to `path`; the caller makes that atomic."""

    def check_savable(self) -> None:
        """Raise the `UserError`s that `save` would, before training."""
        return

    @property
    @abstractmethod
    def suffix(self) -> str:
        """Of the saved file; empty for a folder."""

    def before_step(self, step: int) -> None:
        """Called before update number `step`, counted from 0."""
        return

    def set_multiplier(self, multiplier: float) -> None:
        """`network_multiplier` of the batch's data set."""
        if multiplier != 1:
            raise UserError(f"network_multiplier = {multiplier} in a data set has no meaning without a network. Remove it.")

    @property
    def on_gradients(self) -> Callable[[], None] | None:
        """To be called when the gradients of an update are complete, averaged and clipped, before the weights are stepped."""
        return None

    def after_step(self) -> dict[str, Tensor]:
        """Called after every update; returns tensors to log."""
        return {}


def check_same_tensors(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise `UserError` where a saved state is not one of what learns here."""
    different = sorted(own.keys() ^ saved.keys())
    different += [name for name in own if name in saved and own[name].shape != saved[name].shape]
    if not different:
        return
    name = different[0]
    then, now = (tuple(tensors[name].shape) if name in tensors else "not there" for tensors in (saved, own))
    raise UserError(
        f"the saved state is of another run: {len(different)} parameters differ, first {name}, which was {then} and is now "
        f"{now}. Resume with the base model and the training flags it was saved with."
    )


def split_pairs(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """`key=value` texts to a dict. Raises `UserError` for a text without `=` and for a key that is given twice."""
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key in values:
            problem = "is given twice" if equals else "is not of the form key=value"
            raise UserError(f"{flag}: '{pair}' {problem}.")
        values[key] = value
    return values


def make_network(module: NetworkModule, bundle: ModelBundle, options: NetworkOptions, seed: int) -> AdapterNetwork:
    """The network that `--network_...` describe, on the parts that learn; not attached yet."""
    arguments = split_pairs(options.network_args or (), "--network_args")
    parts = {DENOISER} if options.trains_denoiser else set()
    encoders: dict[str, nn.Module] = {}
    if options.trains_text_encoder:
        encoders = {name: bundle.part(name) for name in module.text_parts(bundle.text_encoder_names, arguments)}
        parts |= encoders.keys()
    weights = options.network_weights
    shared: dict[str, Any] = {"neuron_dropout": options.network_dropout, "init_seed": seed, "parts": parts, **arguments}
    if weights and options.dim_from_weights:
        return module.create_network_from_weights(1.0, weights, None, encoders, bundle.denoiser, **shared)[0]
    network = module.create_network(1.0, options.network_dim, options.network_alpha, None, encoders, bundle.denoiser, **shared)
    if weights:
        network.load_weights(weights)
    return network


def merge_base_weights(module: NetworkModule, bundle: ModelBundle, options: NetworkOptions) -> None:
    """Merge `--base_weights` into the model, each at its multiplier (1 where none is given).

    From then on the parts have another identity: what is cached of the unmerged model is not theirs.
    """
    files, multipliers = options.base_weights or (), options.base_weights_multiplier or ()
    merged: list[str] = []
    for index, file in enumerate(files):
        multiplier = multipliers[index] if index < len(multipliers) else 1.0
        module.merge_weights(multiplier, file, bundle.text_encoders, bundle.denoiser)
        merged.extend(f"{open_checkpoint(one).fingerprint()}*{multiplier:g}" for one in _weight_files(Path(file)))
        logger.info("merged %s at %g", file, multiplier)
    for part in (DENOISER, *bundle.text_encoder_names):
        end_merging(bundle.part(part))
    if merged:
        bundle.changed |= {DENOISER, *bundle.text_encoder_names}
        bundle.identity = {
            part: "+".join([identity, *merged]) if part in bundle.changed else identity
            for part, identity in bundle.identity.items()
        }


def _weight_files(path: Path) -> list[Path]:
    """`path` itself, or the files of peft's folder."""
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


class AdapterTrainable(Trainable):
    """An adapter network on a frozen model."""

    def __init__(self, bundle: ModelBundle, network: AdapterNetwork, options: NetworkTrainOptions, arch: NetworkArch) -> None:
        self.bundle = bundle
        self.network = network
        self.arch = arch
        self.options = options
        self.parts = network.parts
        self._frozen = False  # inside `reference`, which no batch's multiplier may undo
        self._step = 0

    @classmethod
    def create(cls, family: ModelFamily, bundle: ModelBundle, options: NetworkTrainOptions) -> AdapterTrainable:
        """The network made and attached."""
        from networks.external import load_network_module

        module = load_network_module(options.network.network_module or "").for_arch(family.arch)
        network = make_network(module, bundle, options.network, options.training.seed or 0)
        for part in sorted(network.parts):
            network.leave_untrained(family.unused_modules(part, bundle.part(part)))
        network.to(bundle.device, learning_dtype(options.precision))
        network.attach()
        return cls(bundle, network, options, family.arch)

    def param_groups(self, rates: LearningRates) -> list[ParamGroup]:
        return self.network.param_groups(rates)

    def layer_kinds(self) -> Sequence[LayerKind]:
        return self.network.layer_kinds()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        check_same_tensors(self.state_dict(), tensors)
        self.network.load_state_dict(dict(tensors))

    @contextmanager
    def reference(self) -> Iterator[None]:
        self._frozen = True
        try:
            with self.network.reference():
                yield
        finally:
            self._frozen = False

    def train(self, mode: bool = True) -> None:
        self.network.train(mode)
        # frozen parts too, if gradients pass through them: their gradient checkpointing works in training mode only
        for part in self.parts | {DENOISER}:
            self.bundle.part(part).train(mode)

    def save(self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        from networks.file_formats import write_adapter

        tensors = self.network.file_state_dict(None)
        write_adapter(path, tensors, metadata, self.arch, self.options.network.save_format, dtype)

    def check_savable(self) -> None:
        from networks.file_formats import in_format

        format = self.options.network.save_format
        in_format(self.network.file_state_dict(None), self.arch, format, f"--save_format {format}")

    @property
    def suffix(self) -> str:
        return "" if self.options.network.save_format == "peft" else f".{self.options.network.save_model_as}"

    def set_multiplier(self, multiplier: float) -> None:
        if multiplier != self.network.multiplier and not self._frozen:
            self.network.set_multiplier(multiplier)

    @property
    def on_gradients(self) -> Callable[[], None] | None:
        return self.network.on_gradients

    def before_step(self, step: int) -> None:
        self._step = step

    def after_step(self) -> dict[str, Tensor]:
        limited = self.network.after_step(self.options.network.scale_weight_norms)
        return limited if limited or (self._step + 1) % KEY_NORMS_EVERY else self.network.key_norms()


def saved_format(options: FullOptions, source: str) -> str:
    """`source`'s format unless `--save_model_as` names one; `--use_safetensors` keeps its layout without pickles."""
    if options.use_safetensors:
        source = {"ckpt": "safetensors", "diffusers": "diffusers_safetensors"}.get(source, source)
    return options.save_model_as or source


class FullTrainable(Trainable):
    """Parts of the model itself. The weights learn in float32 unless `--full_bf16` or `--full_fp16` says otherwise."""

    def __init__(self, family: ModelFamily, bundle: ModelBundle, parts: Iterable[str], options: FullTrainOptions) -> None:
        self.family = family
        self.bundle = bundle
        self.options = options
        self.parts = frozenset(parts)
        self._stopped = False
        for part in sorted(self.parts):
            bundle.part(part).requires_grad_(True).train()
            for module in family.unused_modules(part, bundle.part(part)):
                module.requires_grad_(False)

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What this process has of them."""
        for part in sorted(self.parts):
            for name, parameter in self.bundle.part(part).named_parameters():
                yield f"{part}.{name}", self.memory.own(parameter)

    def param_groups(self, rates: LearningRates) -> list[ParamGroup]:
        groups: dict[str, ParamGroup] = {}
        for part, part_name, part_rate in self._rates(rates):
            for key, parameter in self.bundle.part(part).named_parameters():
                name, rate = self.family.own_group(part, key, self.options) or (part_name, part_rate)
                if rate == 0:
                    parameter.requires_grad_(False)
                if parameter.requires_grad:
                    groups.setdefault(name, ParamGroup(name, [], rate)).params.append(self.memory.own(parameter))
        return list(groups.values())

    def _rates(self, rates: LearningRates) -> Iterator[tuple[str, str, float]]:
        """(part, log name, rate) of every learning part, the denoiser first."""
        if DENOISER in self.parts:
            yield DENOISER, "unet", rates.of_denoiser
        for part in self.bundle.text_encoder_names:
            if part in self.parts:
                yield part, *rates.of_text_encoder(part, self.family.arch.text_parts)

    def state_dict(self) -> dict[str, Tensor]:
        with self.memory.host_weights():
            return {name: parameter.detach() for name, parameter in self._named_parameters()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        own = dict(self._named_parameters())
        check_same_tensors(own, tensors)
        with self.memory.host_weights(), torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def reference(self) -> AbstractContextManager[None]:
        raise UserError(
            "the model itself learns, so there is no frozen one: what it predicts has to be stored before training."
        )

    def train(self, mode: bool = True) -> None:
        for part in self.parts | {DENOISER}:  # a frozen one, too: see `AdapterTrainable.train`
            self.bundle.part(part).train(mode)

    def before_step(self, step: int) -> None:
        """From `--stop_text_encoder_training` on, the text encoders stay as they are."""
        stop = self.options.full.stop_text_encoder_training
        if stop is None or step < stop or self._stopped:
            return
        self._stopped = True
        for part in self.parts - {DENOISER}:
            self.bundle.part(part).requires_grad_(False)

    @property
    def format(self) -> str:
        return saved_format(self.options.full, str(self.bundle.facts["format"]))

    @property
    def suffix(self) -> str:
        if self.options.full.max_shard_size is not None:
            return ""
        return {"safetensors": ".safetensors", "ckpt": ".ckpt"}.get(self.format, "")

    def save(self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        with self.memory.host_weights():
            settings = SaveSettings(self.format, dtype, metadata, self.options.full.max_shard_size)
            self.family.save_checkpoint(self.bundle, path, settings)
