"""The parts of a model on disk as a `ModelBundle`, each read when it is first used."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from library.family_base import ModelBundle
from library.memory_policy import read_to
from library.model_parts import Component
from library.quantized_layers import Quantizer

if TYPE_CHECKING:
    from library.option_groups import TrainOptions


class ModelOnDisk(Protocol):
    """What a family's description of a model has in any case."""

    @property
    def path(self) -> Path: ...

    @property
    def format(self) -> str: ...

    @property
    def parts(self) -> Mapping[str, Component]:
        """denoiser, vae, and the text encoders by name, in the family's order."""


def lazy_bundle(
    model: ModelOnDisk,
    options: TrainOptions,
    *,
    device: torch.device,
    dtype: torch.dtype,
    learning: Mapping[str, torch.dtype] | None,
    quantizers: Mapping[str, Quantizer] | None,
    facts: Mapping[str, Any],
) -> ModelBundle:
    """See `ModelFamily.load`. facts: beside source, format and model. Raises `UserError` for a part whose tensors do not fit:
    it may be read after hours of caching."""
    for part in model.parts.values():
        part.check()
    dtypes, chosen = {name: dtype for name in model.parts} | dict(learning or {}), quantizers or {}
    if options.precision.no_half_vae:
        dtypes["vae"] = torch.float32
    loaders = {
        name: partial(part.load, dtype=dtypes[name], device=read_to(name, options, device), quantizer=chosen.get(name))
        for name, part in model.parts.items()
    }
    frozen = [name for name in model.parts if name != "denoiser"]
    return ModelBundle(
        loaders=loaders,
        text_encoder_names=tuple(name for name in frozen if name != "vae"),
        device=device,
        dtype=dtype,
        identity={name: model.parts[name].identity_as(dtypes[name], chosen.get(name)) for name in frozen},
        facts={"source": model.path, "format": model.format, "model": model, **facts},
    )
