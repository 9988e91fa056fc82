"""Write a LoRA at another rank: the best approximation of what it adds.

python tools/resize_lora.py --model lora.safetensors --save_to small.safetensors --new_rank 8
python tools/resize_lora.py --model a.safetensors --save_to b.safetensors --dynamic_method sv_fro --dynamic_param 0.9

With a dynamic method every layer gets the rank it needs, at most --new_rank: sv_ratio keeps singular values above the first one
divided by the parameter, sv_cumulative that share of their sum, sv_fro that share of the Frobenius norm.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.adapter_tools import (  # noqa: E402
    add_device,
    add_family,
    add_saving,
    network_facts,
    precision,
    read_adapter,
    tool_parser,
    write_adapter_file,
)
from library.cli import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402
from networks.merging import RankRule, factors_of, reduced, scale_of  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a LoRA file in any program's names")
    parser.add_argument("--save_to", type=Path, required=True, help="the file to write")
    parser.add_argument("--new_rank", type=int, default=4, help="the rank, or the most of it with --dynamic_method")
    parser.add_argument("--new_conv_rank", type=int, help="the same of convolutions larger than 1x1; --new_rank unless given")
    parser.add_argument("--dynamic_method", choices=("sv_ratio", "sv_fro", "sv_cumulative"), help="a rank for each layer")
    parser.add_argument("--dynamic_param", type=float, help="the ratio or share of --dynamic_method")
    parser.add_argument("--verbose", action="store_true", help="show every layer")
    add_saving(parser)
    add_device(parser)
    add_family(parser)
    given = parser.parse_args(arguments)
    if (given.dynamic_method is None) != (given.dynamic_param is None):
        raise UserError("--dynamic_method and --dynamic_param go together.")
    most = given.new_rank, given.new_conv_rank or given.new_rank
    rules = [RankRule(rank, given.dynamic_method or "fixed", given.dynamic_param or 0.0) for rank in most]
    file = read_adapter(given.model, given.family)
    made, ranks, kept = {}, [], []
    for key, tensors in file.layers.items():
        before = factors_of(key, tensors, given.device)
        after = reduced(before, rules[before.is_spatial])
        made[key] = after.tensors(scale_of(key, tensors))
        whole = before.norm()
        ranks.append(after.rank)
        kept.append(after.norm() / whole if whole else 1.0)
        if given.verbose:
            print(f"{key}: rank {before.rank} -> {after.rank}, {kept[-1]:.1%} of the norm")
    metadata = file.kept_metadata(given)
    metadata |= network_facts(metadata.get("ss_network_module", "networks.lora"), max(ranks))
    if given.dynamic_method:
        metadata |= {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    dtype = precision(given.save_precision) or file.dtype
    write_adapter_file(given.save_to, made, file.arch, metadata, dtype=dtype)
    print(
        f"{given.save_to}: {len(made)} layers, ranks {min(ranks)} to {max(ranks)}, on average {sum(ranks) / len(ranks):.1f}; "
        f"{sum(kept) / len(kept):.1%} of their norms kept"
    )


if __name__ == "__main__":
    run_script(main)
