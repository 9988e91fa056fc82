"""Train a LoRA on the example pictures and show what it learned: python examples/demo.py [--steps N] [--evaluate]

The base model in examples/tiny-sd knows five shapes. The LoRA teaches it one that it has never seen, a heart, under the word
"zorb".
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.cli import run_script  # noqa: E402

if TYPE_CHECKING:
    from examples.shapes import Scene

CONFIG = "examples/demo/config.toml"
BASE = ROOT / "examples" / "tiny-sd"
OUTPUT = ROOT / "demo_output"
NAME = "zorb"


def new_shape_scenes() -> list[Scene]:
    """The new shape in combinations that none of the training pictures shows."""
    from examples.shapes import NEW_SHAPE, scenes

    shown = {path.stem.split("-")[1] for path in (ROOT / "examples" / "demo" / "pictures").glob("*.png")}
    return [scene for scene in scenes((NEW_SHAPE,)) if f"{scene.size}_{scene.colour}_{scene.background}" not in shown]


def other_scenes() -> list[Scene]:
    """The base model's own shapes in combinations that neither model was trained on; a third of them."""
    from examples.shapes import HELD_OUT, scenes

    return [scene for scene in scenes() if scene.combination in HELD_OUT][::3]


def prompt_of(scene: Scene) -> str:
    from examples.shapes import NEW_SHAPE, NEW_TOKEN

    return scene.prompt(NEW_TOKEN if scene.shape == NEW_SHAPE else None)


def before_after(lora: Path, target: Path) -> None:
    """The same prompts and seeds without and with the LoRA."""
    from examples.gallery import Model
    from library.picture_grid import draw_grid

    new, other = new_shape_scenes(), other_scenes()
    prompts = [prompt_of(scene) for scene in [*new[3 :: len(new) // 5][:5], *other[5 :: len(other) // 3][:3]]]
    model = Model(BASE)
    base = model.draw(prompts)
    with model.with_lora(lora):
        changed = model.draw(prompts)
    draw_grid([("base", base), ("with LoRA", changed)], prompts).save(target)


def evaluate(lora: Path) -> dict[str, float]:
    """Shares of pictures in which the checker finds shape, colour and background as asked."""
    from examples.gallery import Model, score

    model, shares = Model(BASE), {}

    def measure(label: str) -> None:
        for kind, wanted in (("new shape", new_shape_scenes()), ("other shapes", other_scenes())):
            shares[f"{kind}, {label}"] = score(model.draw([prompt_of(scene) for scene in wanted]), wanted)

    measure("base")
    with model.with_lora(lora):
        measure("with LoRA")
    return shares


def train(steps: int | None) -> Path:
    """Runs train_network.py's main with the demo's configuration; gives the LoRA's path."""
    import train_network

    arguments = ["--config_file", CONFIG, "--output_dir", str(OUTPUT), "--output_name", NAME]
    train_network.main(arguments + (["--max_train_steps", str(steps)] if steps else []))
    return OUTPUT / f"{NAME}.safetensors"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="train only so many steps")
    parser.add_argument("--evaluate", action="store_true", help="also measure what was learned (a few minutes)")
    parser.add_argument("--debug", action="store_true", help="show Python tracebacks of errors")
    options = parser.parse_args(argv)

    os.chdir(ROOT)  # the configuration names its files from here
    started = time.monotonic()
    lora = train(options.steps)
    trained = time.monotonic()
    before_after(lora, OUTPUT / "before_after.png")

    from library.curves import PICTURE_FILE, draw_curves
    from library.tracking import METRICS_FILE

    draw_curves(OUTPUT / METRICS_FILE, OUTPUT / PICTURE_FILE)
    if options.evaluate:
        for label, share in evaluate(lora).items():
            print(f"{label}: {share:.0%} right")
    print(f"trained in {trained - started:.0f} s")
    for label, path in (("LoRA", lora), ("before and after", OUTPUT / "before_after.png"), ("loss", OUTPUT / PICTURE_FILE)):
        print(f"{label}: {path}")


if __name__ == "__main__":
    run_script(main)
