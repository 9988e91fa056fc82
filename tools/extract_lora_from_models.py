"""Take a LoRA out of a fine-tuned model: the best approximation of what it has learned.

python tools/extract_lora_from_models.py --model_org base.safetensors --model_tuned tuned.safetensors --save_to lora.safetensors

The models may be of different layouts (a file and a folder). A layer's rank is --dim, or with --energy as many ranks as hold
that share of the change's squared norm, at most --dim. --conv_dim takes convolutions larger than 1x1 as well (LoCon).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from library.adapter_tools import (  # noqa: E402
    add_device,
    add_ignored,
    add_saving,
    network_facts,
    precision,
    report_ignored,
    tool_parser,
    write_adapter_file,
)
from library.cli import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.model_layers import ModelOnDisk, open_model  # noqa: E402
from networks.lora import LoRAArgs  # noqa: E402
from networks.merging import LayerWeights, RankRule, clamped, extracted  # noqa: E402
from networks.network_targets import DENOISER, Layer, choose_layers  # noqa: E402


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument("--model_org", type=Path, required=True, help="the model before fine-tuning: a file or a folder")
    parser.add_argument("--model_tuned", type=Path, required=True, help="the fine-tuned model")
    parser.add_argument("--save_to", type=Path, required=True, help="the file to write")
    parser.add_argument("--dim", type=int, default=4, help="the rank, or the most of it with --energy")
    parser.add_argument("--conv_dim", type=int, help="the same of convolutions larger than 1x1, which are left out without")
    parser.add_argument("--energy", type=float, help="a rank for each layer: the share of the change's squared norm to keep")
    parser.add_argument("--exact", action="store_true", help="all singular values for a fixed rank, too, which is slow")
    parser.add_argument("--clamp_quantile", type=float, default=1.0, help="cut numbers beyond this quantile; 1: none")
    parser.add_argument("--min_diff", type=float, default=0.0, help="leave out parts where no number differs by more")
    add_saving(parser)
    add_device(parser)
    places = ("load_precision", "load_original_model_to", "load_tuned_model_to")
    add_ignored(parser, ("v2", "sdxl", "v_parameterization", "mem_eff_safe_open"), places)
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = setup_parser().parse_args(arguments)
    report_ignored(given)
    original, tuned = open_model(given.model_org), open_model(given.model_tuned)
    if original.family.name != tuned.family.name:
        told = f"{given.model_org} is {original.family.title}, {given.model_tuned} {tuned.family.title}"
        raise UserError(f"{told}: these are not a model before and after its fine-tuning.")
    method, share = ("fixed", 0.0) if given.energy is None else ("energy", given.energy)
    rules = RankRule(given.dim, method, share), RankRule(given.conv_dim or given.dim, method, share)
    made: dict[str, LayerWeights] = {}
    largest: dict[str, float] = {}
    parts = {}
    for layer in _layers(original, tuned, given.conv_dim):
        change = _change(original, tuned, layer, torch.device(given.device))
        parts[layer.key] = layer.part
        largest[layer.part] = max(largest.get(layer.part, 0.0), float(torch.linalg.vector_norm(change, torch.inf)))
        found = extracted(change, rules[layer.is_spatial], layer.key, exact=given.exact)
        made[layer.key] = (clamped(found, given.clamp_quantile) if given.clamp_quantile < 1 else found).tensors()
    differ = {part for part, most in largest.items() if most > (0.0 if part == DENOISER else given.min_diff)}
    made = {key: layer for key, layer in made.items() if parts[key] in differ}
    if not made:
        raise UserError(f"{given.model_org} and {given.model_tuned} do not differ in any layer. Are they the same model?")
    facts = {} if given.no_metadata else {"modelspec.title": given.save_to.stem}
    metadata = {"format": "pt", **facts, **network_facts("networks.lora", given.dim, given.conv_dim)}
    dtype = precision(given.save_precision) or torch.float32
    write_adapter_file(given.save_to, made, original.family.arch, metadata, dtype=dtype)
    ranks = [len(layer["lora_down.weight"]) for layer in made.values()]
    print(f"{given.save_to}: {len(made)} layers of {original.family.title}, ranks {min(ranks)} to {max(ranks)}")


def _layers(original: ModelOnDisk, tuned: ModelOnDisk, conv_dim: int | None) -> list[Layer]:
    """Those that a LoRA of this family adapts and both models have."""
    arch = original.family.arch
    arch_args = arch.arguments()
    modules = {part: module for part, module in original.modules().items() if part in tuned.parts and arch_args.learns(part)}
    layers = choose_layers(arch, modules, LoRAArgs(conv_dim=conv_dim), arch_args)
    return [layer for layer in layers if layer.key in original.layers and layer.key in tuned.layers]


def _change(original: ModelOnDisk, tuned: ModelOnDisk, layer: Layer, device: torch.device) -> Tensor:
    before, after = (model.weight(layer.key, device) for model in (original, tuned))
    if before.numel() != after.numel():
        shapes = f"{tuple(before.shape)} in {original.path} and {tuple(after.shape)} in {tuned.path}"
        raise UserError(f"{layer.key} is {shapes}: another model.")
    # in place: the tuned weight is read once, and a third one of this size would not be "a tensor at a time"
    return after.view(before.shape).sub_(before).view(layer.module.weight.shape)


if __name__ == "__main__":
    run_script(main)
