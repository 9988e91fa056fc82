"""One part of a model on disk: its tensors, and how they become a module."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.key_layout import KeyMap, Origin
from library.model_io import TensorSource
from library.module_loading import check_fit, load_into
from library.quantized_layers import Quantizer
from library.sharding import write_weights


@dataclass(frozen=True)
class Component:
    """One part of a model on disk: its tensors, without the file's prefix, and how they become a module."""

    source: TensorSource
    key_map: KeyMap
    config: Mapping[str, Any]
    make: Callable[[Mapping[str, Any]], nn.Module]
    optional: tuple[str, ...] = ()
    """Patterns of names that may be there without being used."""
    folder: Path | None = None
    _checked: list[nn.Module] = field(default_factory=list, init=False, repr=False, compare=False)
    """A module without weights, for `load` to fill: making it takes its time."""

    def check(self) -> None:
        """Raise the `UserError`s that `load` would, from names and shapes alone."""
        module = self.make(self.config)
        check_fit(module, self.source, self.key_map, self.optional)
        self._checked[:] = [module]

    def empty(self) -> nn.Module:
        """The module without weights, to look at and not to be changed."""
        if not self._checked:
            self._checked.append(self.make(self.config))
        return self._checked[0]

    def load(self, *, dtype: torch.dtype, device: torch.device | str, quantizer: Quantizer | None = None) -> nn.Module:
        """The module, frozen, in eval mode; the layers that `quantizer` takes in few bits."""
        return load_into(
            self._checked.pop() if self._checked else self.make(self.config),
            self.source,
            self.key_map,
            dtype=dtype,
            device=device,
            optional=self.optional,
            quantizer=quantizer,
        )

    @functools.cached_property
    def _origins(self) -> Mapping[str, Origin]:
        return self.key_map.origins(self.source.keys())[0]

    def names(self) -> list[str]:
        """Names of the module's tensors."""
        return list(self.make(self.config).state_dict(keep_vars=True))

    def tensor(self, key: str) -> Tensor:
        """One tensor of the module, by its name there, as the file has it."""
        origin = self._origins[key]
        return origin.take(self.source.get(origin.key))

    def identity(self) -> str:
        """Changes when the part's weights do, not when the file is moved."""
        return self.source.fingerprint()

    def identity_as(self, dtype: torch.dtype, quantizer: Quantizer | None = None) -> str:
        """Of the part as it is loaded: what it gives depends on that, too."""
        quantized = f"-{quantizer.name}" if quantizer is not None else ""
        return f"{self.identity()}-{str(dtype).removeprefix('torch.')}{quantized}"


def stamp(path: Path | None) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files at `path`: changes when they do."""
    if path is None:
        return ()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)


def enable_encoder_checkpointing(encoder: nn.Module) -> None:
    """Gradient checkpointing of a transformers text encoder."""
    module: Any = encoder
    if hasattr(module, "activation_checkpointing_enable"):  # its name since transformers 5.22
        module.activation_checkpointing_enable({"use_reentrant": False})
    else:
        module.gradient_checkpointing_enable({"use_reentrant": False})


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SaveSettings:
    """How a checkpoint is written."""

    format: str
    """safetensors, ckpt, diffusers or diffusers_safetensors."""
    dtype: torch.dtype | None = None
    """Of the parts' tensors; None keeps what they have."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    max_shard_size: int | None = None
    """Most bytes of tensors in a file; larger parts become several."""

    @property
    def safe(self) -> bool:
        """Whether the weights of a folder are safetensors."""
        return self.format == "diffusers_safetensors"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_config(module: Any, folder: Path) -> None:
    """The configuration of a diffusers or transformers module, as its library writes it."""
    if hasattr(module, "save_config"):
        module.save_config(str(folder))
    else:
        module.config.architectures = [type(module).__name__]
        module.config.save_pretrained(str(folder))


_OF_THE_FILE = ("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path")


def settings_alone(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformers configuration without what it says of where it is from, as the arguments of its class."""
    return {key: value for key, value in config.items() if key not in _OF_THE_FILE}


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def write_tensors(
    tensors: Mapping[str, Tensor],
    stem: Path,
    *,
    safe: bool,
    metadata: Mapping[str, str],
    max_shard_size: int | None = None,
) -> None:
    """One component's weights as diffusers and transformers read them: `{stem}.safetensors` or `.bin`, or shards of it."""
    path = stem.with_suffix(".safetensors" if safe else ".bin")
    write_weights(tensors, path, metadata={"format": "pt", **metadata}, max_shard_size=max_shard_size)
