"""Filling a module with the tensors of a file, strictly: what is missing, left over or of another shape is an error."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.key_layout import RENAME, KeyMap, Origin
from library.model_io import TensorSource
from library.quantization import StoredWeight
from library.quantized_layers import Quantizer, kept_fp8, quantize


def load_into(
    module: nn.Module,
    source: TensorSource,
    key_map: KeyMap,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    optional: tuple[str, ...] = (),
    quantizer: Quantizer | None = None,
) -> nn.Module:
    """Fill `module`, whose parameters are on the meta device, with `source`'s tensors; frozen and in eval mode.

    Strict: missing and unexpected keys, and shapes that differ, are one `UserError`. Names of `source` that match a
    pattern of `optional` may be there without being used. Returns `module`.

    With a `quantizer`, each weight it takes is quantised on `device` as soon as it is read, from what the file has, never from
    a rounded copy. Where fp8 is asked for, what is in fp8 already stays as it is.
    """
    origins = _matched(module, source, key_map, optional)
    expected = module.state_dict(keep_vars=True)
    quantized = quantizer.replace_layers(module, dtype or torch.float32) if quantizer is not None else {}
    tensors: dict[str, Tensor] = {}
    for name, parameter in expected.items():
        read = functools.partial(_take, source, origins[name], parameter.shape, type(module).__name__)
        if name in quantized:
            layer, scheme = quantized[name]
            assert quantizer is not None
            key = origins[name].key
            kept = source.entries[key].as_fp8() if quantizer.keeps_fp8 and _is_renamed(origins[name]) else None
            weight = kept_fp8(kept, key) if kept else quantize(read(None).to(quantizer.device or device), scheme, key)
            layer.fill(StoredWeight(*(part.to(device) for part in weight)), functools.partial(read, None))
            tensors |= {f"{name.removesuffix('weight')}{kind}": buffer for kind, buffer in layer.named_buffers()}
        else:
            tensors[name] = read(dtype).to(device)
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.to(device).requires_grad_(False).eval()


def _matched(module: nn.Module, source: TensorSource, key_map: KeyMap, optional: tuple[str, ...]) -> dict[str, Origin]:
    """Where each tensor of `module` is in `source`."""
    origins, unknown = key_map.origins(source.keys())
    expected = module.state_dict(keep_vars=True).keys()
    missing = sorted({source.name_in_file(name, key_map) for name in expected - origins.keys()})
    unexpected = sorted({*unknown, *(origins[name].key for name in origins.keys() - expected)})
    unexpected = [source.prefix + key for key in unexpected if not any(re.fullmatch(pattern, key) for pattern in optional)]
    if missing or unexpected:
        kinds = (("missing", missing), ("unexpected", unexpected))
        listed = [f"{len(keys)} {kind}: {', '.join(keys[:8])}" for kind, keys in kinds if keys]
        raise UserError(f"{source.path} does not fit {type(module).__name__}. {'; '.join(listed)}.")
    return origins


def check_fit(module: nn.Module, source: TensorSource, key_map: KeyMap, optional: tuple[str, ...] = ()) -> None:
    """Raise the `UserError`s that `load_into` would, from names and shapes alone."""
    origins = _matched(module, source, key_map, optional)
    for name, parameter in module.state_dict(keep_vars=True).items():
        origin = origins[name]
        try:
            taken = origin.take(torch.empty(source.shape(origin.key), device="meta"))
        except ValueError as error:  # rows that do not divide into the parts they should hold
            raise UserError(f"{source.path}: {error}.") from error
        _check_shape(taken, source, origin, parameter.shape, type(module).__name__)


def _check_shape(tensor: Tensor, source: TensorSource, origin: Origin, shape: torch.Size, owner: str) -> None:
    if tensor.shape != shape:
        key = source.prefix + origin.key
        raise UserError(f"{source.path}: '{key}' has shape {tuple(tensor.shape)}, and {owner} needs {tuple(shape)}.")


def _take(source: TensorSource, origin: Origin, shape: torch.Size, owner: str, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor of a module of class `owner`, in memory of its own."""
    tensor = origin.take(source.get(origin.key, dtype)).contiguous()
    _check_shape(tensor, source, origin, shape, owner)
    if tensor.untyped_storage().nbytes() > tensor.nbytes:
        return tensor.clone()  # a part of a fused tensor, which would keep the whole of it in memory
    return tensor


def _is_renamed(origin: Origin) -> bool:
    """Whether the tensor is the file's, under another name at most."""
    return origin.rule.op is RENAME and len(origin.rule.parts) == 1
