"""How much of a model is lost when its denoiser is kept in 8 or 4 bits: a table of its layers, a summary, and a picture.

python tools/quantization_error.py MODEL [--quantize_base fp8 int8 nf4] [--quantized_compute 8bit] [--output errors.png]

MODEL: a checkpoint file or a diffusers folder. One tensor is read at a time. Errors are relative to the weight as the file has
it, ||kept - weight|| / ||weight||, and the same of what the layer gives for normally distributed inputs, computed in bf16. The
column bf16 is what keeping the weight in bf16 loses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from library.checkpoint import atomic_write  # noqa: E402
from library.cli import run_script  # noqa: E402
from library.errors import UserError  # noqa: E402
from library.family_base import FAMILIES, ModelFamily, family_class  # noqa: E402
from library.model_io import open_checkpoint  # noqa: E402
from library.model_parts import Component  # noqa: E402
from library.model_signatures import detect_family, detect_folder  # noqa: E402
from library.option_groups import SCHEME_NAMES  # noqa: E402
from library.quantized_layers import QuantizedLinear, Quantizer, quantize  # noqa: E402
from library.rng import keyed_generator  # noqa: E402

PLAIN = "bf16"
NUM_INPUTS = 64


@dataclass(frozen=True)
class Row:
    """One layer."""

    path: str
    shape: tuple[int, ...]
    weight: dict[str, float]
    """Scheme -> relative error of the weight."""
    output: dict[str, float]
    num_bytes: dict[str, int]


def find_family(path: Path) -> ModelFamily:
    """The family of the model at `path`, told from its files."""
    detected = detect_folder(path) if path.is_dir() else detect_family(open_checkpoint(path))
    script = detected.script if detected is not None else ""
    for name in FAMILIES:
        family = family_class(name)()
        if script in family.scripts.values():
            return family
    known = ", ".join(family_class(name).title for name in FAMILIES)
    raise UserError(f"{path} is {detected.title if detected else 'not a model this program knows'}. Known: {known}.")


def measure(component: Component, family: ModelFamily, schemes: Sequence[str], *, eight_bit: bool) -> Iterator[Row]:
    """A row for every layer that can be quantised, in the order of the module."""
    if family.quantized_layers is None:
        raise UserError(f"nobody has chosen yet which layers of {family.title} are quantised.")
    quantizers = {
        scheme: Quantizer(scheme, family.quantized_layers, eight_bit=eight_bit and scheme != "nf4") for scheme in schemes
    }
    for name, layer in component.make(component.config).named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and family.quantized_layers.scheme(name, "fp8") is not None:
            weight = component.tensor(f"{name}.weight").float().flatten(1)
            yield measure_layer(name, tuple(layer.weight.shape), weight, quantizers)


def measure_layer(path: str, shape: tuple[int, ...], weight: Tensor, quantizers: dict[str, Quantizer]) -> Row:
    inputs = torch.randn(NUM_INPUTS, weight.shape[1], generator=keyed_generator("quantization_error", path)).bfloat16()
    exact = inputs.float() @ weight.t()
    plain = weight.bfloat16()
    row = Row(
        path,
        shape,
        weight={PLAIN: _relative(plain, weight)},
        output={PLAIN: _relative(inputs @ plain.t(), exact)},
        num_bytes={PLAIN: plain.nbytes},
    )
    for name, quantizer in quantizers.items():
        scheme = quantizer.layers.scheme(path, quantizer.scheme)
        assert scheme is not None
        with torch.device("meta"):
            base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer = QuantizedLinear(base, torch.float32, eight_bit=quantizer.eight_bit)
        layer.fill(quantize(weight, quantizer.stored_scheme(scheme), path), lambda: weight)
        row.weight[name] = _relative(layer.weight, weight)
        row.output[name] = _relative(layer(inputs), exact)
        row.num_bytes[name] = layer.stored.nbytes + layer.scale.nbytes
    return row


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny))


def table(rows: Sequence[Row], schemes: Sequence[str]) -> Iterator[str]:
    width = max(len(row.path) for row in rows)
    yield f"{'layer':{width}}  {'shape':>18}" + "".join(f"  {name + ' weight':>15} {'output':>9}" for name in schemes)
    for row in rows:
        errors = "".join(f"  {row.weight[name]:15.3%} {row.output[name]:9.3%}" for name in schemes)
        yield f"{row.path:{width}}  {'x'.join(map(str, row.shape)):>18}{errors}"


def summary(rows: Sequence[Row], schemes: Sequence[str]) -> Iterator[str]:
    for name in schemes:
        worst = max(rows, key=lambda row: row.output[name])
        mean = sum(row.output[name] for row in rows) / len(rows)
        size = sum(row.num_bytes[name] for row in rows) / 2**30
        yield f"{name}: {size:.2f} GiB, output error {mean:.3%} in the mean, at most {worst.output[name]:.3%} ({worst.path})"


def draw(rows: Sequence[Row], schemes: Sequence[str], title: str, path: Path) -> None:
    """The output's error of every layer, a line for each scheme."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    for name in schemes:
        axes.plot([row.output[name] for row in rows], linewidth=1, marker=".", markersize=3, label=name)
    axes.set(xlabel="layer, in the order of the model", ylabel="relative error of the output", yscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a checkpoint file or a diffusers folder")
    parser.add_argument("--quantize_base", nargs="+", choices=SCHEME_NAMES, default=["fp8", "int8", "nf4"])
    parser.add_argument("--quantized_compute", choices=("dequantize", "8bit"), default="dequantize")
    parser.add_argument("--output", type=Path, default=Path("quantization_error.png"), help="the picture")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)
    if not given.model.exists():
        raise UserError(f"{given.model} does not exist.")
    family = find_family(given.model)
    component, schemes = family.open_denoiser(given.model), [PLAIN, *given.quantize_base]
    rows = list(measure(component, family, given.quantize_base, eight_bit=given.quantized_compute == "8bit"))
    print("\n".join([*table(rows, schemes), "", *summary(rows, schemes)]))
    draw(rows, schemes, f"{given.model.name}: {len(rows)} quantised layers", given.output)
    print(f"drawn to {given.output}")


if __name__ == "__main__":
    run_script(main)
