"""Make examples/tiny-sd from nothing: python -m examples.make_tiny_sd [--work FOLDER]

A tokenizer and a text encoder, an autoencoder, then a UNet trained by this project's own `fine_tune.py` on drawings of shapes.
Each stage leaves a folder in the work folder and is skipped when that is there, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.shapes import BASE_SHAPES, HELD_OUT, NEW_SHAPE, NEW_TOKEN, SIZE, draw, scenes
from library.rng import keyed_random
from tools import average_models

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "examples" / "tiny-sd"
NUM_PICTURES = 5000
UNCAPTIONED = 0.1  # share of pictures without caption, for guidance
NAME = "tiny-sd"


def make_text_encoder(folder: Path) -> None:
    from transformers import CLIPTokenizer

    from examples.tiny_text import build_text_encoder, train_text_encoder, write_tokenizer

    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = build_text_encoder(tokenizer)
    share = train_text_encoder(encoder, tokenizer)
    print(f"text encoder: {share:.1%} of new captions named right")
    encoder.save_pretrained(folder / "text_encoder")


def make_vae(folder: Path) -> None:
    from examples.tiny_vae import build_vae, train_vae

    vae = build_vae()
    train_vae(vae)
    vae.save_pretrained(folder)


def sharpen_vae(start: Path, folder: Path) -> None:
    from diffusers import AutoencoderKL

    from examples.shapes import check
    from examples.tiny_vae import round_trip, sharpen_decoder

    vae: Any = AutoencoderKL.from_pretrained(start)
    error = sharpen_decoder(vae)
    wanted = list(scenes())[::5]
    right = sum(check(picture).matches(scene) for picture, scene in zip(round_trip(vae, wanted), wanted, strict=True))
    print(f"autoencoder: mean absolute error {error:.4f}, {right} of {len(wanted)} drawings still recognised")
    vae.save_pretrained(folder)


def build_unet() -> Any:
    """SD 1.x's UNet with three levels, one ResNet block each; heads and groups as in every SD 1.x."""
    import torch
    from diffusers import UNet2DConditionModel

    from examples.tiny_text import WIDTH

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=32,
    )


def write_pipeline(folder: Path, *, text: Path, vae: Path, unet: Any, half: bool) -> None:
    """A diffusers folder; `half` in fp16."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae),
        text_encoder=CLIPTextModel.from_pretrained(text / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(text / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="epsilon",
        ),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16 if half else torch.float32).save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(text / "tokenizer", folder / "tokenizer")  # as we wrote it: vocab.json and merges.txt


def draw_pictures(folder: Path) -> None:
    """Pictures of all scenes that are not held out, and meta.json with their captions, some of them empty."""
    rng = keyed_random("tiny-sd pictures")
    known = [scene for scene in scenes() if scene.combination not in HELD_OUT]
    entries = {}
    (folder / "pictures").mkdir(parents=True)
    for index in range(NUM_PICTURES):
        scene = rng.choice(known)
        name = f"{index:05d}.png"
        draw(scene, "train", index).save(folder / "pictures" / name)
        caption = "" if rng.random() < UNCAPTIONED else scene.prompt()
        entries[name] = {"caption": caption, "train_resolution": [SIZE, SIZE]}
    (folder / "meta.json").write_text(json.dumps(entries, indent=0), encoding="utf-8")


def draw_demo(folder: Path, count: int = 32) -> None:
    """The demo's training pictures and captions: the new shape, and as many of the known ones."""
    for name, shapes, noun in (("pictures", (NEW_SHAPE,), NEW_TOKEN), ("regularization", BASE_SHAPES, None)):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        known = [scene for scene in scenes(shapes) if scene.combination not in HELD_OUT]
        for index, scene in enumerate(keyed_random("demo", name).sample(known, count)):
            stem = f"{index:02d}-{scene.size}_{scene.colour}_{scene.background}"
            draw(scene, "demo", index).save(folder / name / f"{stem}.png", optimize=True)
            (folder / name / f"{stem}.txt").write_text(scene.prompt(noun) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Run:
    """One run of fine_tune.py."""

    name: str
    steps: int
    learning_rate: float
    flags: tuple[str, ...]
    averaged_from: int | None = None
    """The weights it gives are the mean of those saved from this step on; None: the last ones."""


SAVE_EVERY = 100
RUNS = (
    Run("first", 1600, 1e-3, ("--debiased_estimation_loss", "--lr_scheduler=cosine")),
    Run("second", 2800, 5e-4, ("--lr_scheduler=constant_with_warmup",), averaged_from=1600),
    Run("third", 500, 4e-4, ("--lr_scheduler=cosine",)),
)
"""Each starts from what the one before made. Debiased weights favour much noise: colours and places are learned first,
outlines in the last run. The mean of weights along a constant rate draws cleaner outlines than any one of them."""


def fine_tune_arguments(work: Path, start: Path, run: Run) -> list[str]:
    """The command line of one run of the UNet's training.

    Without a noise offset a picture's overall colours shine through the noise even at the last time, so that the UNet hardly
    learns to take them from the caption (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    return [
        *("--pretrained_model_name_or_path", str(start), "--seed", str(RUNS.index(run) + 1)),
        *("--in_json", str(work / "data" / "meta.json"), "--train_data_dir", str(work / "data" / "pictures")),
        *("--resolution", str(SIZE), "--train_batch_size", "16", "--max_train_steps", str(run.steps)),
        *("--learning_rate", str(run.learning_rate), "--optimizer_args", "betas=0.9,0.99", "weight_decay=0.01"),
        *("--lr_warmup_steps", "50", "--min_snr_gamma", "5", "--noise_offset", "0.3", *run.flags),
        *("--cache_latents", "--vae_batch_size", "16", "--cache_text_encoder_outputs", "--max_data_loader_n_workers", "0"),
        *("--output_dir", str(work / run.name), "--output_name", NAME, "--save_model_as", "diffusers_safetensors"),
        *("--save_every_n_steps", str(SAVE_EVERY), "--save_state", "--save_last_n_steps_state", str(SAVE_EVERY)),
    ]


def train_unet(work: Path) -> Path:
    """Runs fine_tune.py for each run, from its last saved state if there is one; gives the last model's folder."""
    model = work / "start"
    for run in RUNS:
        start, folder = model, work / run.name
        model = folder / NAME
        if not model.is_dir():
            command = [sys.executable, str(ROOT / "fine_tune.py"), *fine_tune_arguments(work, start, run)]
            states = sorted(folder.glob("*-state"), key=lambda path: path.stat().st_mtime)
            if states:
                command += ["--resume", str(states[-1])]
            subprocess.run(command, check=True, cwd=ROOT)
        if run.averaged_from is not None:
            saves = [folder / f"{NAME}-step{step:08d}" for step in range(run.averaged_from, run.steps, SAVE_EVERY)]
            model = folder / "mean"
            average_models.main([*map(str, saves), str(folder / NAME), "--output", str(model)])
    return model


def make(work: Path) -> None:
    from diffusers import UNet2DConditionModel

    text, rough, vae, start, data = (work / name for name in ("text", "vae-rough", "vae", "start", "data"))
    if not (text / "text_encoder").is_dir():
        make_text_encoder(text)
    if not rough.is_dir():
        make_vae(rough)
    if not vae.is_dir():
        sharpen_vae(rough, vae)
    if not start.is_dir():
        write_pipeline(start, text=text, vae=vae, unet=build_unet(), half=False)
    if not data.is_dir():
        draw_pictures(data)
    trained = train_unet(work)
    shutil.rmtree(TARGET, ignore_errors=True)
    write_pipeline(TARGET, text=text, vae=vae, unet=UNet2DConditionModel.from_pretrained(trained / "unet"), half=True)
    draw_demo(ROOT / "examples" / "demo")
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{TARGET}: {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "work-tiny-sd", help="folder for the stages")
    arguments = parser.parse_args()
    make(arguments.work)


if __name__ == "__main__":
    main()
