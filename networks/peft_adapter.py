"""peft's tuners, for the algorithms that are not here: `--network_args tuner=hra config={"r":8}` (`pip install peft`).

Every layer gets a tuner of its own, which computes around the layer's own forward, so the model's modules and keys stay as they
are. `--network_dim` and `--network_alpha` are the tuner's `r` and `alpha` where it has such; `config` has the rest of its
configuration as JSON. Files hold its tensors under peft's names, and `rank` and `alpha`; only this module reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from peft import inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from library.errors import UserError, suggest
from networks.external import seeded
from networks.network_args import NO_RANK, Kind, NetworkArgs, arg
from networks.network_base import Adapter, Layer, LayerSize, bind

NAME = "default"
TUNERS = {getattr(kind, "value", str(kind)).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _object(value: Any) -> dict[str, Any]:
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise ValueError(value)
    return found


@dataclass(frozen=True, kw_only=True)
class PeftArgs(NetworkArgs):
    """Arguments of every network but dropout, and what peft is told."""

    unused: ClassVar[tuple[str, ...]] = NO_RANK
    tuner: str | None = arg(Kind("text", str), "peft's type of tuner: hra, randlora, delora, ...")
    config: dict[str, Any] | None = arg(Kind("a JSON object", _object), "its configuration")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuner is None or self.tuner.lower() not in TUNERS:
            hint = suggest(self.tuner or "", TUNERS)
            known = ", ".join(sorted(TUNERS))
            raise UserError(f"--network_args tuner={self.tuner}: one of peft's tuners is needed, {known}.{hint}")

    def tuner_config(self, size: LayerSize) -> Any:
        assert self.tuner is not None
        kind, own = TUNERS[self.tuner.lower()], self.config or {}
        known = {field.name for field in fields(kind)}
        if unknown := [name for name in own if name not in known]:
            raise UserError(f"--network_args config: {self.tuner} has no '{unknown[0]}'.{suggest(unknown[0], known)}")
        sizes = {"r": size.rank, "alpha": size.alpha or size.rank, "lora_alpha": size.alpha or size.rank}
        return kind(**{name: value for name, value in sizes.items() if name in known} | own | {"target_modules": ["layer"]})


class _Shell(nn.Module):
    """Where peft looks for the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class PeftAdapter(Adapter):
    """One layer's tuner, whose parameters have peft's names."""

    arguments = PeftArgs
    own_files = True

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        assert isinstance(args, PeftArgs)
        self.size = size
        seed = int(torch.randint(2**62, (), generator=generator))
        try:
            with seeded(seed):
                tuner: Any = inject_adapter_in_model(args.tuner_config(size), _Shell(layer.module)).layer
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"peft's {args.tuner} cannot adapt {layer.key}: {error}") from error
        layer.module.requires_grad_(False)
        self._tuner = (tuner,)  # in a tuple: it holds the base layer, which must not become a submodule
        for name, child in tuner.named_children():
            if name != "base_layer":
                self.add_module(name, child)
        self._inside = False

    def forward(self, x: Tensor) -> Tensor:
        """The tuner calls the base layer, and that is attached to this adapter."""
        return self.base_forward(x) if self._inside else super().forward(x)

    def adapted(self, x: Tensor) -> Tensor:
        tuner = self._tuner[0]
        tuner.training, self._inside = self.training, True
        try:
            out: Tensor = tuner(x)
        finally:
            self._inside = False
        if self.multiplier == 1:
            return out
        base = self.base_forward(x)
        return base + self.multiplier * (out.to(base.dtype) - base)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """By peft, into a layer of its own with a copy of the weight."""
        base, tuner, twin = self.base, self._tuner[0], self._twin(weight)
        bias: Tensor | None = twin.bias
        before = None if bias is None else bias.clone()
        tuner.base_layer = twin
        try:
            tuner.merge(adapter_names=[NAME])
        finally:
            tuner.base_layer = base
            tuner.merged_adapters.clear()
        if bias is not None and before is not None and not torch.equal(bias, before):
            raise UserError(f"{self.key}: this tuner of peft's changes the bias as well, and cannot be merged into the weight.")
        return weight + self.multiplier * (twin.weight.detach() - weight)

    def _twin(self, weight: Tensor) -> nn.Linear | nn.Conv2d:
        """A layer like the base, of its own, with `weight`."""
        base, bias = self.base, self.base.bias
        twin: nn.Linear | nn.Conv2d
        if isinstance(base, nn.Conv2d):
            sizes: Any = (base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding, base.dilation)
            twin = nn.utils.skip_init(nn.Conv2d, *sizes, groups=base.groups, bias=bias is not None)
        else:
            twin = nn.utils.skip_init(nn.Linear, base.in_features, base.out_features, bias=bias is not None)
        twin.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if bias is not None:
            twin.bias = nn.Parameter(bias.detach().to(weight).clone(), requires_grad=False)
        return twin

    def weight_norm(self) -> Tensor:
        weight = self.base.weight.detach().float()
        return (self.merged(weight) - weight).norm()

    def rescale(self, ratio: Tensor) -> None:
        raise UserError("networks.peft_adapter does not support --scale_weight_norms. Remove it.")

    def file_tensors(self) -> dict[str, Tensor]:
        own = {name.replace(f".{NAME}", ""): tensor for name, tensor in self.state_dict().items()}
        return {**own, "rank": torch.tensor(float(self.size.rank)), "alpha": torch.tensor(float(self.size.alpha))}

    @classmethod
    def size_in_file(cls, key: str, tensors: Mapping[str, Tensor]) -> LayerSize:
        if absent := [name for name in ("rank", "alpha") if name not in tensors]:
            raise UserError(f"{key} lacks {absent[0]}: the file was not made by networks.peft_adapter.")
        return LayerSize(int(tensors["rank"]), float(tensors["alpha"]))

    def load_file_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.size_in_file(self.key, tensors)
        own = self.state_dict()
        given = {name: tensors.get(name.replace(f".{NAME}", "")) for name in own}
        if wrong := [name for name, tensor in given.items() if tensor is None or tensor.shape != own[name].shape]:
            raise UserError(
                f"{self.key}.{wrong[0]} is absent or of another shape in {source}: another tuner or config made it."
            )
        self.load_state_dict(given)


factory = bind(PeftAdapter)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
