"""Merge adapters into a model, or with one another.

python tools/merge_lora.py --model model.safetensors --save_to merged.safetensors --models a.safetensors --ratios 0.8
python tools/merge_lora.py --save_to both.safetensors --models a.safetensors b.safetensors --ratios 1 0.5 --method concat

Into a model (a file or a diffusers folder of any family, which is written in its own layout) adapters of every algorithm go one
after the other. With one another LoRAs are joined: `concat` is exact and of the ranks' sum, `svd` the best of `--new_rank`,
`blend` (sd-scripts' way without --concat) adds factors up, which is not the sum of what they do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from library.adapter_tools import (  # noqa: E402
    AdapterFile,
    add_device,
    add_family,
    add_ignored,
    add_saving,
    named_files,
    network_facts,
    one_family,
    precision,
    read_adapter,
    report_ignored,
    strengths,
    tool_parser,
    write_adapter_file,
)
from library.cli import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.model_layers import ModelOnDisk, open_model, write_changed  # noqa: E402
from networks.block_weights import layer_weights, parse_weights, table_weights  # noqa: E402
from networks.merging import (  # noqa: E402
    Factors,
    RankRule,
    blended,
    concatenated,
    factors_of,
    merged_weight,
    reduced,
    shuffled,
)
from networks.network_files import shorten  # noqa: E402

Part = tuple[Mapping[str, Tensor], float]


def setup_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    parser.add_argument("--model", "--sd_model", "--flux_model", type=Path, help="a model to merge into: a file or a folder")
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="adapter files in any program's names")
    parser.add_argument("--ratios", type=float, nargs="*", help="strength of each; 1 unless given")
    parser.add_argument("--lbws", nargs="*", help="strengths by block, a list for each file: [1,0,0.5*10]")
    parser.add_argument("--save_to", type=Path, required=True, help="the file or folder to write")
    parser.add_argument(
        "--text_encoder", nargs="*", metavar="NAME=FILE", help="text encoders in files of their own: clip_l=..."
    )
    parser.add_argument("--text_encoder_save_to", nargs="*", metavar="NAME=FILE", help="where each of them goes")
    parser.add_argument("--method", choices=("concat", "svd", "blend"), help="how adapters are joined; blend unless given")
    parser.add_argument("--concat", action="store_true", help="--method concat")
    parser.add_argument("--shuffle", action="store_true", help="put ranks in another order")
    parser.add_argument("--new_rank", type=int, default=4, help="rank for --method svd")
    parser.add_argument("--new_conv_rank", type=int, help="the same of convolutions larger than 1x1; --new_rank unless given")
    add_saving(parser)
    add_device(parser)
    add_family(parser)
    for name in ("clip_l", "t5xxl"):  # sd-scripts' for FLUX.1
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
        parser.add_argument(f"--{name}_save_to", help=argparse.SUPPRESS)
    parser.add_argument("--working_device", dest="device", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_ignored(parser, ("v2", "mem_eff_load_save", "diffusers"), ("precision", "loading_device"))
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = setup_parser().parse_args(arguments)
    report_ignored(given)
    ratios = strengths(given.ratios, len(given.models))
    if given.lbws is not None and len(given.lbws) != len(given.models):
        raise UserError(f"{len(given.lbws)} --lbws for {len(given.models)} --models. Give one list for each.")
    lists = [parse_weights(text, "--lbws") for text in given.lbws] if given.lbws else [None] * len(given.models)
    if given.model is None:
        join(given, ratios, lists)
    else:
        merge_into_model(given, ratios, lists)


# ---- into a model ------------------------------------------------------------------------------------------------------


def merge_into_model(given: argparse.Namespace, ratios: Sequence[float], lists: Sequence[tuple[float, ...] | None]) -> None:
    others = named_files(given.text_encoder, "--text_encoder")
    outputs = named_files(given.text_encoder_save_to, "--text_encoder_save_to")
    for name in ("clip_l", "t5xxl"):
        others |= {name: Path(value)} if (value := getattr(given, name)) else {}
        outputs |= {name: Path(value)} if (value := getattr(given, f"{name}_save_to")) else {}
    if others.keys() != outputs.keys():
        lone = min(others.keys() ^ outputs.keys())
        raise UserError(
            f"the text encoder {lone} needs both --text_encoder {lone}=FILE and --text_encoder_save_to {lone}=FILE."
        )
    model = open_model(given.model, others)
    files = [read_adapter(path, model.family.arch) for path in given.models]
    parts = _by_layer(model, files, ratios, lists)
    changed = [key for key in parts if key in model.layers]

    def change(key: str, weight: Tensor) -> Tensor:
        return merged_weight(weight, key, model.layers[key][0].part, parts[key]) if key in parts else weight

    names = ", ".join(path.stem for path in given.models)
    metadata = {} if given.no_metadata else {"modelspec.title": given.save_to.stem, "modelspec.merged_from": names}
    for source, output in ((None, given.save_to), *((others[name], outputs[name]) for name in others)):
        write_changed(
            model, output, changed, change, dtype=precision(given.save_precision), device=given.device, metadata=metadata,
            source=source,
        )  # fmt: skip
        print(f"{output}: {model.family.title}, {len(changed)} layers changed in all")


def _by_layer(
    model: ModelOnDisk, files: Sequence[AdapterFile], ratios: Sequence[float], lists: Sequence[tuple[float, ...] | None]
) -> dict[str, list[Part]]:
    """Adapters and strengths by layer. Raises `UserError` for layers that the model has not."""
    arch, modules = model.family.arch, model.modules()
    found: dict[str, list[Part]] = {}
    for file, ratio, weights in zip(files, ratios, lists, strict=True):
        by_block = {} if weights is None else layer_weights(weights, arch, modules)
        unknown = [key for key in file.layers if key not in model.layers]
        absent = [group.part for group in arch.groups if group.part not in model.parts and any(map(group.holds, unknown))]
        elsewhere = [key for key in unknown if any(g.part in absent and g.holds(key) for g in arch.groups)]
        if wrong := [key for key in unknown if key not in elsewhere]:
            raise UserError(f"{file.path} has {len(wrong)} layers that {model.path} has not: {shorten(wrong)}.")
        if elsewhere:
            print(f"{file.path}: {len(elsewhere)} layers are for {', '.join(absent)}, not in {model.path} (--text_encoder)")
        for key, tensors in file.layers.items():
            if key in model.layers:
                found.setdefault(key, []).append((tensors, ratio * by_block.get(key, 1.0)))
    return found


# ---- with one another --------------------------------------------------------------------------------------------------


def join(given: argparse.Namespace, ratios: Sequence[float], lists: Sequence[tuple[float, ...] | None]) -> None:
    files = [read_adapter(path, given.family) for path in given.models]
    arch = one_family(files)
    parts: dict[str, list[Part]] = {}
    for file, ratio, weights in zip(files, ratios, lists, strict=True):
        by_block = {} if weights is None else table_weights(weights, arch, list(file.layers))
        for key, tensors in file.layers.items():
            parts.setdefault(key, []).append((tensors, ratio * by_block.get(key, 1.0)))
    method = given.method or ("concat" if given.concat else "blend")
    rules = RankRule(given.new_rank), RankRule(given.new_conv_rank or given.new_rank)
    made = {}
    for key, layers in parts.items():
        joined = _joined(key, layers, method, rules, torch.device(given.device))
        made[key] = (shuffled(joined, key) if given.shuffle else joined).tensors()
    rank = max(len(layer["lora_down.weight"]) for layer in made.values())
    metadata = files[0].kept_metadata(given)
    metadata |= network_facts("networks.lora", rank)
    if not given.no_metadata:
        metadata |= {"modelspec.title": given.save_to.stem, "modelspec.merged_from": ", ".join(p.stem for p in given.models)}
    dtype = precision(given.save_precision) or files[0].dtype
    write_adapter_file(given.save_to, made, arch, metadata, dtype=dtype)
    print(f"{given.save_to}: {len(made)} layers of {len(files)} adapters, rank up to {rank}")


def _joined(key: str, layers: Sequence[Part], method: str, rules: tuple[RankRule, RankRule], device: torch.device) -> Factors:
    parts = [(factors_of(key, tensors, device), strength) for tensors, strength in layers]
    if method == "blend":
        return blended(key, parts)
    together = concatenated(parts)
    return reduced(together, rules[together.is_spatial]) if method == "svd" else together


if __name__ == "__main__":
    run_script(main)
