"""What the loop and the tools know of an adapter network, ours or a foreign package's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.optimizers import LearningRates, ParamGroup
from networks.network_files import read_weights, write_weights


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

    def after_step(self, max_norm: float | None) -> dict[str, Tensor]:
        """`--scale_weight_norms`: shrink adapters whose weight norm exceeds `max_norm`. Returns 0-d tensors to log."""
        return self.limit_norms(max_norm) if max_norm else {}

    @abstractmethod
    def limit_norms(self, max_norm: float) -> dict[str, Tensor]:
        """Shrink every adapter to a weight norm of at most `max_norm`; sd-scripts' `max_norm/...` log rows."""

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


def text_encoder_rate(rates: LearningRates, part: str, text_parts: Sequence[str]) -> tuple[str, float]:
    """Log name and learning rate of one text encoder. One given rate is for all of them; None is the default rate."""
    given = rates.text_encoders or (None,)
    if len(given) not in (1, len(text_parts)):
        raise UserError(
            f"--text_encoder_lr has {len(given)} values, this model has {len(text_parts)} text encoders "
            f"({', '.join(text_parts)}). Give one for all, or one each."
        )
    index = text_parts.index(part)
    rate = given[index if len(given) > 1 else 0]
    return "textencoder" if len(text_parts) == 1 else f"textencoder{index + 1}", rates.default if rate is None else rate
