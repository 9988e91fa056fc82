"""What the loop and the tools know of an adapter network and of what makes it, ours or a foreign package's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.optimizers import LearningRates, ParamGroup
from networks.network_files import read_weights, write_weights
from networks.network_targets import NetworkArch


class LayerKind(NamedTuple):
    """Adapted layers that differ in their number alone, for `--plan`."""

    name: str
    """Of their keys, with `*` for numbers."""
    layers: int
    size: str
    """The shapes of a layer's parameters."""
    parameters: int
    """Of all these layers together."""
    rate: float
    """Learning rate; 0: they do not learn."""


class AdapterNetwork(nn.Module, ABC):
    """Adapters on the layers of a model, which stays frozen.

    The module's ordinary `state_dict` holds all that an exact resume needs; `file_state_dict` is what other programs read.
    """

    parts: frozenset[str]
    """Model parts that have adapters: "denoiser" and text encoders by their name in the bundle."""

    def __init__(self, parts: Collection[str]) -> None:
        super().__init__()
        self.parts = frozenset(parts)
        self._multiplier = 1.0

    @property
    def multiplier(self) -> float:
        return self._multiplier

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of all adapters; 0 is exactly the base model."""
        self._multiplier = multiplier

    def set_layer_weights(self, weights: Mapping[str, float]) -> None:
        """Factor on the multiplier by layer key; 1 for a layer that is not named (`block_weights.layer_weights`)."""
        raise UserError(f"{type(self).__name__}: a network of this module has no strengths by block. Remove the block weights.")

    @abstractmethod
    def attach(self) -> None:
        """Put the adapters into the model's forward."""

    @abstractmethod
    def detach(self) -> None:
        """Leave the model as it was before `attach`."""

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen model inside the block."""
        multiplier = self.multiplier
        self.set_multiplier(0.0)
        try:
            yield
        finally:
            self.set_multiplier(multiplier)

    @abstractmethod
    def param_groups(self, rates: LearningRates) -> list[ParamGroup]:
        """What learns, at which rate, named as sd-scripts logs it. A part whose rate is 0 is left out and frozen."""

    @property
    def on_gradients(self) -> Callable[[], None] | None:
        """To be called when the gradients of an update are complete, averaged and clipped, before the weights are stepped."""
        return None

    def layer_kinds(self) -> list[LayerKind]:
        """What is adapted, after `param_groups`; empty where the network does not tell."""
        return []

    def leave_untrained(self, modules: Collection[nn.Module]) -> None:
        """Adapters of layers inside these modules stay as they are: nothing depends on them. They are in files all the same."""
        return

    def after_step(self, max_norm: float | None) -> dict[str, Tensor]:
        """`--scale_weight_norms`: shrink adapters whose weight norm exceeds `max_norm`. Returns 0-d tensors to log."""
        return self.limit_norms(max_norm) if max_norm else {}

    @abstractmethod
    def limit_norms(self, max_norm: float) -> dict[str, Tensor]:
        """Shrink every adapter to a weight norm of at most `max_norm`; sd-scripts' `max_norm/...` log rows."""

    def key_norms(self) -> dict[str, Tensor]:
        """0-d tensors to log: how large the adapters have become. Empty where they do not tell."""
        return {}

    def prepare_for_training(self, mode: bool = True) -> None:
        """Float32 master weights, and training or evaluation mode (dropout)."""
        self.float()
        self.train(mode)

    @abstractmethod
    def file_state_dict(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Tensors under their names in files, on the CPU; in `dtype`, or as they are for None."""

    @abstractmethod
    def load_file_state_dict(self, tensors: Mapping[str, Tensor], source: str, strict: bool = True) -> None:
        """Take a file's tensors. A part the file does not have keeps its weights, and keys of parts without adapters are
        ignored; otherwise `strict` wants every layer on both sides. Raises `UserError` naming `source`."""

    def save_weights(self, path: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None) -> None:
        """Write `.safetensors` (with `metadata` and hashes), `.ckpt` or `.pt` to `path` itself; the caller makes it atomic."""
        write_weights(path, self.file_state_dict(dtype), metadata or {})

    def load_weights(self, path: str | Path, strict: bool = True) -> None:
        self.load_file_state_dict(read_weights(path), Path(path).name, strict)

    @abstractmethod
    def merge_into_base(self) -> None:
        """Add the adapters, at the present multiplier, to the base model's weights, and detach."""

    # sd-scripts' names for the same things, for scripts written against its networks.

    @abstractmethod
    def apply_to(
        self, text_encoder: object, unet: object, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None: ...

    def prepare_optimizer_params(
        self, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Torch parameter groups and their names."""
        encoders = tuple(text_encoder_lr) if isinstance(text_encoder_lr, Sequence) else (text_encoder_lr,)
        groups = self.param_groups(LearningRates(default_lr or 0.0, unet_lr, encoders))
        return [{"params": g.params, "lr": g.learning_rate} for g in groups], [g.name for g in groups]

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def is_mergeable(self) -> bool:
        return True

    def merge_to(
        self, text_encoder: object, unet: object, weights_sd: Mapping[str, Tensor], dtype: object = None, device: object = None
    ) -> None:
        """Merge `weights_sd` into the base. Computed in float32 where the base weights are; the last two are not needed."""
        self.load_file_state_dict(weights_sd, "the given weights")
        self.merge_into_base()


NetworkT = TypeVar("NetworkT", bound=AdapterNetwork)


@dataclass(frozen=True)
class NetworkRequest:
    """The model a network is made for, and how."""

    multiplier: float
    vae: object
    text_encoder: object
    """A module, a list in table order, a dict by part name, or None."""
    unet: nn.Module | None
    dropout: float | None = None
    """`--network_dropout`; `arguments` may hold it under its other name."""
    init_seed: int = 0
    """With a layer's key it decides the layer's initial weights."""
    parts: Collection[str] | None = None
    """Adapt only these of the given parts."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """`--network_args`."""
    for_inference: bool = False
    """No dropout."""


@dataclass(frozen=True)
class FileWeights:
    """The tensors of a network's file."""

    file: str | Path | None
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, file: str | Path | None, tensors: Mapping[str, Tensor] | None) -> FileWeights:
        """`tensors` where they are given, else those of `file`."""
        return cls(file, dict(tensors) if tensors is not None else read_weights(file or ""))

    @property
    def source(self) -> str:
        """For messages."""
        return Path(self.file).name if self.file else "the given weights"


class NetworkModule(ABC, Generic[NetworkT]):
    """What makes networks. Its calls are sd-scripts', beside `init_seed` and `parts`. A network is not attached yet."""

    merges_into_quantized: ClassVar[bool] = True
    """Whether `merge` knows of weights in 8 or 4 bits."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For messages and metadata: `networks.lora`."""

    @abstractmethod
    def for_arch(self, arch: NetworkArch) -> NetworkModule[NetworkT]:
        """The same module for the models of one family; otherwise the model's classes decide which it is."""

    @abstractmethod
    def text_parts(self, names: Sequence[str], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        """Which of the text encoders `names` are adapted, where text encoders are."""

    @abstractmethod
    def make(self, request: NetworkRequest, dim: int | None, alpha: float | None) -> NetworkT:
        """An untrained network, which changes nothing."""

    @abstractmethod
    def make_from_weights(self, request: NetworkRequest, weights: FileWeights) -> NetworkT:
        """The network of a file, with its weights."""

    @abstractmethod
    def merge(self, request: NetworkRequest, weights: FileWeights) -> None:
        """Add a file's network, at the request's multiplier, to the model's weights (`--base_weights`)."""

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: object,
        text_encoder: object,
        unet: nn.Module | None,
        neuron_dropout: float | None = None,
        *,
        init_seed: int = 0,
        parts: Collection[str] | None = None,
        **kwargs: Any,
    ) -> NetworkT:
        """See `make`; the arguments are those of `NetworkRequest`. Defaults are sd-scripts': dim 4, alpha 1 (0: the rank).

        Raises `UserError` for unknown or wrong network arguments and for a table group that matches no layer.
        """
        request = NetworkRequest(multiplier, vae, text_encoder, unet, neuron_dropout, init_seed, parts, kwargs)
        return self.make(request, network_dim, network_alpha)

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | Path | None,
        vae: object,
        text_encoder: object,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        *,
        neuron_dropout: float | None = None,
        init_seed: int = 0,
        parts: Collection[str] | None = None,
        **kwargs: Any,
    ) -> tuple[NetworkT, dict[str, Tensor]]:
        """The network of a file (or of its tensors `weights_sd`), and the tensors."""
        weights = FileWeights.of(file, weights_sd)
        model = (vae, text_encoder, unet)
        request = NetworkRequest(multiplier, *model, neuron_dropout, init_seed, parts, kwargs, for_inference)
        network = self.make_from_weights(request, weights)
        network.train(not for_inference)
        return network, weights.tensors

    def merge_weights(
        self,
        multiplier: float,
        file: str | Path | None,
        text_encoder: object,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor] | None = None,
    ) -> None:
        """See `merge`."""
        request = NetworkRequest(multiplier, None, text_encoder, unet, for_inference=True)
        self.merge(request, FileWeights.of(file, weights_sd))
