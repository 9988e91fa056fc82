"""The example pictures and their checker; marked slow, what the example model and the demo's LoRA have learned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from examples.shapes import BASE_SHAPES, HELD_OUT, NEW_SHAPE, NEW_TOKEN, SHAPES, SIZE, Found, Scene, check, draw, scenes

ROOT = Path(__file__).resolve().parent.parent
TINY_SD = ROOT / "examples" / "tiny-sd"
DEMO = ROOT / "examples" / "demo"


def test_checker_names_clean_drawings() -> None:
    every_third = list(scenes(SHAPES))[::3]
    right = sum(check(draw(scene, "test")).matches(scene) for scene in every_third)
    assert right / len(every_third) >= 0.99


def test_checker_says_nothing_about_pictures_without_a_shape() -> None:
    plain = Image.new("RGB", (SIZE, SIZE), (215, 45, 45))
    assert check(plain) == Found(None, None, "red")
    noise = Image.effect_noise((SIZE, SIZE), 120).convert("RGB")
    assert check(noise).shape is None


def test_checker_does_not_take_two_shapes_for_one() -> None:
    picture = Image.new("RGB", (SIZE, SIZE), (245, 245, 245))
    small = draw(Scene("circle", "red", "white", "small"), "two").resize((SIZE // 2, SIZE // 2))
    picture.paste(small, (0, 0))
    picture.paste(small, (SIZE // 2, SIZE // 2))
    assert check(picture).shape is None


def test_checker_does_not_take_a_crop_or_a_distorted_shape_for_the_whole() -> None:
    star = draw(Scene("star", "black", "yellow"), "distorted")
    assert check(star.resize((SIZE, SIZE // 2)).crop((0, 0, SIZE, SIZE))).shape != "star"
    assert check(star.crop((0, 0, SIZE // 2, SIZE))).shape != "star"


def test_checker_forgives_slight_blur() -> None:
    every_seventh = list(scenes(SHAPES))[::7]
    right = sum(check(draw(scene, 3).filter(ImageFilter.GaussianBlur(1.5))).matches(scene) for scene in every_seventh)
    assert right / len(every_seventh) >= 0.97


def test_a_drawing_depends_on_its_key_alone() -> None:
    scene = Scene("triangle", "blue", "white")
    assert draw(scene, 1).tobytes() == draw(scene, 1).tobytes()
    assert draw(scene, 1).tobytes() != draw(scene, 2).tobytes()


def test_there_are_200_held_out_prompts() -> None:
    prompts = {scene.prompt() for scene in scenes() if scene.combination in HELD_OUT}
    assert len(prompts) == 200
    assert {shape for shape, _, _ in HELD_OUT} == set(BASE_SHAPES)


def test_every_word_of_a_prompt_is_one_token() -> None:
    from library.clip_tokenizer import load_clip_tokenizer

    tokenizer = load_clip_tokenizer(TINY_SD / "tokenizer")
    for scene in scenes(SHAPES):
        for prompt in (scene.prompt(), scene.prompt(NEW_TOKEN)):
            assert len(tokenizer.ids(prompt)) == len(prompt.split())


def test_the_example_model_is_small_half_precision_and_a_diffusers_pipeline() -> None:
    import torch
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    assert sum(path.stat().st_size for path in TINY_SD.rglob("*") if path.is_file()) <= 15e6
    files = list(TINY_SD.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()} == {torch.float16}
    pipeline = StableDiffusionPipeline.from_pretrained(str(TINY_SD), torch_dtype=torch.float16)
    assert pipeline.vae_scale_factor == 8
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_the_demo_pictures_show_the_new_shape_under_the_new_word() -> None:
    pictures = sorted((DEMO / "pictures").glob("*.png"))
    assert len(pictures) >= 20
    for path in pictures:
        size, colour, background = path.stem.split("-")[1].split("_")
        scene = Scene(NEW_SHAPE, colour, background, size)
        assert check(Image.open(path)).matches(scene)
        assert path.with_suffix(".txt").read_text(encoding="utf-8").strip() == scene.prompt(NEW_TOKEN)


@pytest.mark.slow
def test_the_base_model_draws_80_percent_of_held_out_prompts_right() -> None:
    from examples.gallery import Model, score

    wanted = [scene for scene in scenes() if scene.combination in HELD_OUT]
    pictures = Model(TINY_SD).draw([scene.prompt() for scene in wanted])
    assert score(pictures, wanted) >= 0.8


@pytest.mark.slow
def test_the_demo_lora_teaches_the_new_shape_and_keeps_the_others() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, str(ROOT / "examples" / "demo.py")], check=True, cwd=ROOT, env=environment)
    from examples.demo import NAME, OUTPUT, evaluate

    shares = evaluate(OUTPUT / f"{NAME}.safetensors")
    assert shares["new shape, base"] <= 0.2
    assert shares["new shape, with LoRA"] >= 0.7
    assert shares["other shapes, with LoRA"] >= shares["other shapes, base"] - 0.1
