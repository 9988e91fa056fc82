"""Look at an adapter file: numbers that are not finite, layers that do nothing, how much each changes; a picture of it.

python tools/check_lora_weights.py lora.safetensors --picture norms.png

The norm of a LoRA's layer is that of alpha / rank * up @ down; of other algorithms that of all their numbers. It is an error
where numbers are not finite.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from torch import Tensor  # noqa: E402

from library.adapter_tools import add_family, read_adapter, tool_parser  # noqa: E402
from library.cli import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402
from networks.lora import DOWN, UP  # noqa: E402
from networks.low_rank import LENGTHS  # noqa: E402
from networks.merging import ALPHA, factors_of, is_finite  # noqa: E402

_NUMBER = re.compile(r"_(\d+)(?=_)")


def layer_norm(key: str, tensors: Mapping[str, Tensor]) -> float:
    """How much the layer does: 0 for nothing."""
    if {DOWN, UP} <= tensors.keys() and LENGTHS not in tensors:
        return factors_of(key, tensors).norm()
    return float(sum(tensor.float().square().sum() for name, tensor in tensors.items() if name != ALPHA)) ** 0.5


def block_of(key: str) -> str:
    """`lora_unet_down_blocks_1_attentions_0`: a key up to its second number, by which a picture is grouped."""
    numbers = list(_NUMBER.finditer(key))
    return key if not numbers else key[: numbers[min(1, len(numbers) - 1)].end()]


def draw(norms: Mapping[str, float], path: Path) -> None:
    """A bar for each block: the mean norm of its layers, and the largest."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("--picture needs the package matplotlib. Install it with: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks: dict[str, list[float]] = {}
    for key, norm in norms.items():
        blocks.setdefault(block_of(key), []).append(norm)
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.2 * len(blocks)))
    names = list(blocks)
    axes.barh(names, [max(blocks[name]) for name in names], color="lightgrey", label="largest norm")
    axes.barh(names, [sum(blocks[name]) / len(blocks[name]) for name in names], label="mean norm of the block's layers")
    axes.invert_yaxis()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def show(name: str, tensor: Tensor) -> None:
    numbers = tensor.float()
    size, low, high = numbers.abs().mean(), numbers.min(), numbers.max()
    print(f"  {name} {tuple(tensor.shape)}: mean size {size:.4g}, {low:.4g} to {high:.4g}")


def main(arguments: list[str] | None = None) -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("file", type=Path, help="an adapter file in any program's names")
    parser.add_argument("--show_all_keys", "-s", action="store_true", help="show every tensor")
    parser.add_argument("--picture", type=Path, help="a PNG of the norms by block")
    add_family(parser)
    given = parser.parse_args(arguments)
    file = read_adapter(given.file, given.family)
    norms, broken, dead = {}, [], []
    for key, tensors in file.layers.items():
        if not is_finite(tensors):
            broken.append(key)
            continue
        norms[key] = layer_norm(key, tensors)
        if norms[key] == 0:
            dead.append(key)
        print(f"{key}: norm {norms[key]:.4g}")
        for name, tensor in tensors.items() if given.show_all_keys else ():
            show(name, tensor)
    if given.picture is not None:
        draw(norms, given.picture)
    for title, keys in (("does nothing", dead), ("not finite", broken)):
        for key in keys:
            print(f"{title}: {key}")
    largest = max(norms, key=lambda key: norms[key], default="none")
    print(
        f"{given.file}: {len(file.layers)} layers for {file.arch.name}; largest norm {norms.get(largest, 0):.4g} ({largest}); "
        f"{len(dead)} do nothing; {len(broken)} with numbers that are not finite"
    )
    if broken:
        raise UserError(f"{given.file}: {len(broken)} layers have numbers that are not finite. Use an earlier save.")


if __name__ == "__main__":
    run_script(main)
