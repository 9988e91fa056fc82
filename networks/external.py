"""Network modules by name: ours, and foreign ones written against sd-scripts' interface (`lycoris.kohya`)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.errors import UserError, suggest
from library.optimizers import LearningRates, ParamGroup
from library.rng import key_to_seed
from networks.file_formats import in_kohya_names
from networks.network_files import by_layer, describe_family, shorten
from networks.network_interface import AdapterNetwork, FileWeights, NetworkModule, NetworkRequest
from networks.network_targets import DENOISER, NetworkArch, infer_arch, same_name

OUR_MODULES = (
    "networks.lora",
    "networks.lora_flux",
    "networks.lora_lumina",
    "networks.lora_sd3",
    "networks.lora_fa",
    "networks.loha",
    "networks.lokr",
    "networks.ia3",
    "networks.dylora",
    "networks.oft",
    "networks.oft_flux",
    "networks.oft_v2",
    "networks.boft",
    "networks.glora",
    "networks.peft_adapter",
)

PIP_NAMES = {"lycoris": "lycoris-lora"}
"""Top-level package -> what to install, where the names differ."""


HIDDEN_CLASSES = {"lycoris": ("TimestepEmbedding",)}
"""Top-level package -> classes of a model's children it must not see. LyCORIS 4.1 lists TimestepEmbedding for another family
and `time_embedding.linear_1` for Stable Diffusion, and stops because it finds the same layer twice."""


def load_network_module(name: str) -> NetworkModule:
    """The network module called `name` in `--network_module`. Raises `UserError` with what to install or to write instead."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        top = missing.partition(".")[0]
        if missing == name or name.startswith(f"{missing}."):
            if top == "networks":
                hint = suggest(name, OUR_MODULES)
                raise UserError(f"there is no network module '{name}'. Known: {', '.join(OUR_MODULES)}.{hint}") from error
            install = f"Install it with: pip install {PIP_NAMES.get(top, top)}"
            raise UserError(f"network module '{name}': the package '{top}' is not installed. {install}") from error
        raise UserError(f"network module '{name}' needs the package '{top}'. Install it with: pip install {top}") from error
    from networks.network_base import NetworkFactory

    factory = getattr(module, "factory", None)
    if isinstance(factory, NetworkFactory):
        return factory
    if not callable(getattr(module, "create_network", None)):
        raise UserError(f"'{name}' is not a network module: it has no create_network. Known: {', '.join(OUR_MODULES)}.")
    return ForeignModule(module)


@dataclass(frozen=True)
class ForeignModule(NetworkModule["ForeignNetwork"]):
    """A package's network module. Its networks start from `init_seed` and leave torch's global generator as it was."""

    merges_into_quantized: ClassVar[bool] = False

    module: ModuleType
    arch: NetworkArch | None = None

    @property
    def name(self) -> str:
        return self.module.__name__

    def for_arch(self, arch: NetworkArch) -> ForeignModule:
        return replace(self, arch=arch)

    def text_parts(self, names: Sequence[str], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        """All: what a foreign module leaves out is not known before it has made its network."""
        return tuple(names)

    def _model(self, text_encoder: object, unet: nn.Module | None) -> _Model:
        return _Model.of(self.arch, text_encoder, unet, hidden=HIDDEN_CLASSES.get(self.name.partition(".")[0], ()))

    def make(self, request: NetworkRequest, dim: int | None, alpha: float | None) -> ForeignNetwork:
        """The dropout is passed as `dropout` too, LyCORIS' name for it."""
        given = {"dropout": request.dropout, **request.arguments}
        model = self._model(request.text_encoder, request.unet)
        with seeded(request.init_seed):
            network = self.module.create_network(
                request.multiplier,
                dim,
                alpha,
                request.vae,
                model.encoders,
                model.unet,
                neuron_dropout=request.dropout,
                **given,
            )
        return ForeignNetwork(network, model, request.parts, self, request.multiplier)

    def make_from_weights(self, request: NetworkRequest, weights: FileWeights) -> ForeignNetwork:
        model = self._model(request.text_encoder, request.unet)
        with seeded(request.init_seed):
            made = self._from_weights(model, request, weights)
        network = ForeignNetwork(made, model, request.parts, self, request.multiplier)
        network.load_file_state_dict(weights.tensors, weights.source, strict=False)
        return network

    def _from_weights(self, model: _Model, request: NetworkRequest, weights: FileWeights) -> Any:
        create = getattr(self.module, "create_network_from_weights", None)
        if create is None:
            raise UserError(f"{self.name} cannot make a network from a file: do not use --dim_from_weights or --base_weights.")
        path = None if weights.file is None else str(weights.file)
        model_parts = (request.vae, model.encoders, model.unet)
        tensors = model.from_file(weights.tensors, weights.source)
        made = create(request.multiplier, path, *model_parts, tensors, request.for_inference, **request.arguments)
        return made[0] if isinstance(made, tuple) else made

    @torch.no_grad()
    def merge(self, request: NetworkRequest, weights: FileWeights) -> None:
        """Merged at 1 and scaled here, since not every module heeds its multiplier."""
        model = self._model(request.text_encoder, request.unet)
        network = self._from_weights(model, replace(request, multiplier=1.0), weights)
        if not hasattr(network, "merge_to"):
            raise UserError(f"{self.name} cannot merge its networks into the model: do not use --base_weights.")
        parameters = [parameter for module in model.modules.values() for parameter in module.parameters()]
        before = [parameter.clone() for parameter in parameters]
        network.merge_to(
            model.encoders,
            model.unet,
            model.from_file(weights.tensors, weights.source),
            parameters[0].dtype,
            parameters[0].device,
        )
        if all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True)):
            keys = shorten(by_layer(weights.tensors))
            raise UserError(f"{weights.source} changes nothing in this model. It has {keys}.{describe_family(weights.tensors)}")
        if request.multiplier != 1.0:
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(torch.lerp(old.float(), parameter.float(), request.multiplier))


def wrap(
    network: nn.Module,
    module: ModuleType,
    *,
    text_encoder: object,
    unet: nn.Module,
    arch: NetworkArch | None = None,
    parts: Collection[str] | None = None,
    multiplier: float = 1.0,
) -> ForeignNetwork:
    """A network that `module` made through sd-scripts' interface, not applied yet, as an `AdapterNetwork`."""
    owner = ForeignModule(module, arch)
    return ForeignNetwork(network, owner._model(text_encoder, unet), parts, owner, multiplier)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Foreign initialisation draws from torch's global generator: seeded inside, and put back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_to_seed("network", seed))
        yield


@dataclass(frozen=True)
class _Model:
    """The base model, and what a foreign module is shown of it."""

    modules: dict[str, nn.Module]
    text_parts: tuple[str, ...]
    encoders: object
    unet: nn.Module
    arch: NetworkArch
    file_names: Mapping[str, str]
    """Layer of the denoiser as a foreign module names it, after its path -> its name in files, where the two differ."""

    @classmethod
    def of(cls, arch: NetworkArch | None, text_encoder: object, unet: nn.Module | None, hidden: Collection[str] = ()) -> _Model:
        if unet is None:
            raise UserError("a foreign network module needs the denoiser, even where only text encoders learn.")
        arch = arch or infer_arch(text_encoder, unet)
        modules = arch.parts_of(text_encoder, unet)
        # a denoiser is shown under its own names: its names in files need not even have the same tree
        names = {group.part: same_name if group.part == DENOISER else group.canonical for group in arch.groups}
        views = {part: _view(module, names[part], hidden) for part, module in modules.items()}
        file_names = {
            own: group.key(path)
            for group in arch.groups
            if group.part == DENOISER
            for path, _ in unet.named_modules()
            if (own := f"{group.prefix}_{path}".replace(".", "_")) != group.key(path)
        }
        encoders = [views[part] for part in arch.text_parts if part in views]
        # sd-scripts passes one encoder bare; a list makes foreign modules count: lora_te1_, lora_te2_
        shown = encoders if len(arch.text_parts) > 1 else next(iter(encoders), None)
        return cls(modules, arch.text_parts, shown, views[DENOISER], arch, file_names)

    def to_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A foreign module's tensors under the family's names."""
        return _renamed(tensors, self.file_names)

    def from_file(self, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        tensors = in_kohya_names(tensors, self.arch, source)
        return _renamed(tensors, {theirs: own for own, theirs in self.file_names.items()})


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """`names`: of layers, which stand before a key's first dot."""
    parts = ((key.partition("."), tensor) for key, tensor in tensors.items())
    return {f"{names.get(layer, layer)}{dot}{inner}": tensor for (layer, dot, inner), tensor in parts}


def _view(module: nn.Module, canonical: Callable[[str], str], hidden: Collection[str]) -> nn.Module:
    """`module` itself where its names are sd-scripts'; else a shell whose `named_modules` spells them.

    Foreign modules name their keys after `named_modules()`, and transformers 5 dropped CLIPTextModel's `text_model.`.
    Children of `hidden` classes are shown as shells around their own children.
    """
    children = dict(module.named_children())
    conceal = {name for name, child in children.items() if type(child).__name__ in hidden}
    if not conceal and all(canonical(name) == name for name in children):
        return module
    shell = nn.Module()
    for name, child in children.items():
        *folders, last = canonical(name).split(".")
        place = shell
        for folder in folders:
            if not hasattr(place, folder):
                place.add_module(folder, nn.Module())
            place = getattr(place, folder)
        place.add_module(last, _shell_around(child) if name in conceal else child)
    return shell


def _shell_around(module: nn.Module) -> nn.Module:
    shell = nn.Module()
    for name, child in module.named_children():
        shell.add_module(name, child)
    return shell


class ForeignNetwork(AdapterNetwork):
    """A foreign network. It is applied once, and the forwards it put into the model are recorded: attaching, detaching and
    the frozen reference put those or the original ones in place, whatever the algorithm does inside."""

    def __init__(
        self, network: Any, model: _Model, parts: Collection[str] | None, owner: ForeignModule, multiplier: float
    ) -> None:
        wanted = set(model.modules) if parts is None else set(parts)
        super().__init__(wanted)
        self.network = network
        self.name = owner.name
        self._owner = owner
        self._model = (model,)  # in a tuple: the base model must not become a submodule
        self._attached = False
        before = _forwards(model.modules)
        apply_text = bool(wanted - {DENOISER})
        network.apply_to(model.encoders, model.unet, apply_text_encoder=apply_text, apply_unet=DENOISER in wanted)
        after = _forwards(model.modules)
        self._changes = [(part, m, before[part, m], f) for (part, m), f in after.items() if f != before[part, m]]
        self.parts = frozenset(part for part, *_ in self._changes)
        self._put(adapted=False)
        if not self._changes:
            raise UserError(f"{self.name} adapted no layer of {', '.join(sorted(wanted))}. Check its --network_args.")
        self.set_multiplier(multiplier)

    def set_multiplier(self, multiplier: float) -> None:
        super().set_multiplier(multiplier)
        if hasattr(self.network, "set_multiplier"):
            self.network.set_multiplier(multiplier)
        elif multiplier != 1.0:
            raise UserError(f"{self.name} has no multiplier: network_multiplier must stay 1.")

    def _put(self, *, adapted: bool) -> None:
        for _, module, original, replaced in self._changes:
            forward = replaced if adapted else original
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward

    def attach(self) -> None:
        self._attached = True
        self._put(adapted=True)

    def detach(self) -> None:
        self._attached = False
        self._put(adapted=False)

    @contextmanager
    def reference(self) -> Iterator[None]:
        self._put(adapted=False)
        try:
            yield
        finally:
            self._put(adapted=self._attached)

    def param_groups(self, rates: LearningRates) -> list[ParamGroup]:
        """As the foreign module groups them; a rate it returns none for is the default rate."""
        unet_rate = rates.default if rates.denoiser is None else rates.denoiser
        text_parts = [part for part in self._model[0].text_parts if part in self.parts]
        text_rates = [rates.of_text_encoder(part, self._model[0].text_parts)[1] for part in text_parts]
        several = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        prepare: Any = several or self.network.prepare_optimizer_params
        if several is None and len(set(text_rates)) > 1:
            raise UserError(f"{self.name} takes one learning rate for all text encoders, got {text_rates}.")
        text_rate: Any = text_rates if several else next(iter(text_rates), None)
        arguments = [text_rate, unet_rate, rates.default][: len(inspect.signature(prepare).parameters)]
        made = prepare(*arguments)
        groups, names = made if isinstance(made, tuple) else (made, None)
        result = []
        for index, group in enumerate(groups):
            given = {"params": group} if not isinstance(group, dict) else group
            rate = given.get("lr")
            name = names[index] if names else f"group{index}"
            result.append(ParamGroup(name, list(given["params"]), rates.default if rate is None else float(rate)))
        result = [group for group in result if group.learning_rate and group.params]
        learning = {id(parameter) for group in result for parameter in group.params}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in learning)
        if not result:
            raise UserError("every learning rate of the network is 0, so nothing would learn. Set --learning_rate.")
        return result

    def limit_norms(self, max_norm: float) -> dict[str, Tensor]:
        limit = getattr(self.network, "apply_max_norm_regularization", None)
        if limit is None:
            raise UserError(f"{self.name} does not support --scale_weight_norms. Remove it.")
        device = next(self.parameters()).device
        scaled, average, maximum = limit(max_norm, device)
        return {
            "max_norm/keys_scaled": torch.as_tensor(scaled),
            "norm/avg_key_norm": torch.as_tensor(average),
            "max_norm/max_key_norm": torch.as_tensor(maximum),
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Every parameter and buffer as it is: foreign `state_dict`s may fold values for the file, which no resume undoes."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        own = self._tensors()
        if own.keys() != state_dict.keys():
            different = shorten(sorted(own.keys() ^ state_dict.keys()))
            raise UserError(f"the saved state is of another network ({different} differ). Resume with the same network flags.")
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])

    def file_state_dict(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        return {
            name: tensor.detach().to("cpu", dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
            for name, tensor in self._model[0].to_file(self.network.state_dict()).items()
        }

    def load_file_state_dict(self, tensors: Mapping[str, Tensor], source: str, strict: bool = True) -> None:
        tensors = self._model[0].from_file(tensors, source)
        own, given = by_layer(self.network.state_dict()), by_layer(tensors)
        shared = own.keys() & given.keys()
        if not shared:
            keys = f"It has {shorten(given)}; expected keys such as {shorten(own)}."
            raise UserError(f"{source} has no weights for this model. {keys}{describe_family(given)}")
        extra, missing = [key for key in given if key not in own], [key for key in own if key not in given]
        if strict and extra:
            raise UserError(
                f"{source} has {len(extra)} layers this network has not ({shorten(extra)}). Use --dim_from_weights."
            )
        wanted = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in shared}
        try:
            result = self.network.load_state_dict(wanted, strict=False)
        except RuntimeError as error:
            raise UserError(f"{source} does not fit this network: {error} Use --dim_from_weights.") from error
        unknown = list(result.unexpected_keys) if result else []
        if strict and unknown:
            raise UserError(f"{source} holds tensors {self.name} does not know here: {shorten(unknown)}. Check the algorithm.")
        if strict and missing and {_prefix(key) for key in missing} & {_prefix(key) for key in shared}:
            raise UserError(f"{source} lacks {len(missing)} layers ({shorten(missing)}). Use --dim_from_weights.")

    def merge_into_base(self) -> None:
        self.detach()
        modules = self._model[0].modules
        encoders = {part: module for part, module in modules.items() if part != DENOISER}
        self._owner.merge_weights(self.multiplier, None, encoders, modules[DENOISER], self.file_state_dict(None))

    def apply_to(self, text_encoder: object, unet: object, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        if (apply_unet, apply_text_encoder) != (DENOISER in self.parts, bool(self.parts - {DENOISER})):
            raise UserError("a foreign network's parts are chosen when it is made: pass `parts`.")
        self.attach()


def _prefix(key: str) -> str:
    """`lora_unet`, `lora_te1`: the part of the model a layer key belongs to."""
    return "_".join(key.split("_")[:2])


def _forwards(modules: Mapping[str, nn.Module]) -> dict[tuple[str, nn.Module], Any]:
    """The forward an instance was given in place of its class's, or None; by part and module."""
    return {(part, m): m.__dict__.get("forward") for part, root in modules.items() for m in root.modules()}
