"""`gen_img.py` on tiny models: the pictures of previews, networks on them, sheets, names and what is refused."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from network_models import fill
from PIL import Image
from runs import CASES, Workspace
from safetensors.torch import load_file, save_file

import gen_img
import lumina_minimal_inference
import sdxl_gen_img
from library.errors import UserError
from library.family_base import FAMILIES as ALL_FAMILIES
from library.family_base import family_class
from library.generation import generate, prepare
from library.generation_options import FAMILY_OPTIONS, family_group, model_options
from library.picture_grid import draw_grid
from library.picture_metadata import NetworkUse, parameters_text
from library.sampling import PreviewWriter
from networks.lora import factory

CPU = torch.device("cpu")
FAMILIES = ("sd", "sdxl", "chroma")
FEW_LAYERS = "(attn[12]_to_q|mlp_fc1|img_attn_qkv|_linear1)$"
PROMPT = "a red circle --w 64 --h 64 --s 2 --d 5 --l 3"


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workspace]:
    made: dict[str, Workspace] = {}

    def get(case: str) -> Workspace:
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            found = CASES[case]
            model = (found.write_swappable or found.write_model)(folder)
            tokenizer = runs.tiny.write_clip_tokenizer(folder / "tokenizer")
            made[case] = Workspace(found, model, tokenizer, folder)
        return made[case]

    return get


def arguments(workspace: Workspace, out: Path, *extra: str) -> list[str]:
    model = [
        f"--ckpt={workspace.model}",
        f"--tokenizer={workspace.tokenizer}",
        *workspace.case.arguments(workspace.model.parent),
    ]
    return [*model, f"--outdir={out}", *extra]


def make(workspace: Workspace, out: Path, *extra: str) -> list[Path]:
    return generate(*gen_img.parse_options(arguments(workspace, out, *extra)))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def farthest(one: Path, other: Path) -> int:
    """Levels of 255 between two pictures, where they differ most."""
    return int(np.abs(pixels(one) - pixels(other)).max())


@pytest.fixture(scope="module")
def lora(workspaces: Callable[[str], Workspace], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A LoRA on some layers of every part of a family's model, which changes its pictures."""
    folder = tmp_path_factory.mktemp("loras")

    def get(case: str, seed: int = 3) -> Path:
        path = folder / f"{case}{seed}.safetensors"
        if not path.exists():
            name, options = gen_img.parse_options(arguments(workspaces(case), folder, f"--prompt={PROMPT}"))
            family = family_class(name)()
            bundle = family.load(model_options(name, options), device=CPU, dtype=torch.float32)
            network = factory.for_arch(family.arch).create_network(
                1.0, 2, 2, None, bundle.text_encoders, bundle.denoiser, exclude_patterns=".*", include_patterns=FEW_LAYERS
            )
            fill(network, seed, scale=0.3)
            network.save_weights(path, None)
        return path

    return get


@pytest.fixture(scope="module")
def base(workspaces: Callable[[str], Workspace], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The picture of `PROMPT` without networks."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            [made[case]] = make(workspaces(case), tmp_path_factory.mktemp("base"), f"--prompt={PROMPT}")
        return made[case]

    return get


# ---- starting from a picture -------------------------------------------------------------------------------------------


def test_a_picture_to_start_from_gives_its_size_and_is_told(
    workspaces: Callable[[str], Workspace], base: Callable[[str], Path], tmp_path: Path
) -> None:
    workspace, source = workspaces("chroma"), tmp_path / "source.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 130, 3), np.uint8)).save(source)
    prompt = "--prompt=a red circle --s 4 --d 5 --l 3"
    made = {}
    for strength in ("0.25", "0.75"):
        [made[strength]] = make(workspace, tmp_path / strength, prompt, f"--image_path={source}", f"--strength={strength}")
    assert Image.open(made["0.25"]).size == (128, 64)
    assert "Denoising strength: 0.25" in Image.open(made["0.25"]).text["parameters"]
    assert farthest(*made.values()) > 0
    [whole] = make(workspace, tmp_path / "whole", f"--prompt={PROMPT} --i {source} --t 1")
    assert farthest(whole, base("chroma")) == 0  # at strength 1 a flow begins with noise alone


def test_a_picture_is_made_small_first(workspaces: Callable[[str], Workspace], tmp_path: Path) -> None:
    fix = ("--highres_fix_scale=0.5", "--highres_fix_steps=2", "--highres_fix_save_1st", "--sequential_file_name")
    [path] = make(workspaces("sd"), tmp_path / "out", "--prompt=a circle --w 64 --h 128 --s 3 --d 5 --t 0.5", *fix)
    small = path.with_name(f"{path.stem}_1st.png")
    assert Image.open(path).size == (64, 128) and Image.open(small).size == (32, 64)
    told = "Steps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 5, Size: 32x64"
    assert f"{told}, Model" in Image.open(small).text["parameters"]
    hires = "Hires upscale: 2, Hires steps: 3, Hires upscaler: Lanczos"
    assert f"{told}, Denoising strength: 0.5, {hires}" in Image.open(path).text["parameters"]
    flags = ("--prompt=a circle --w 32 --h 64 --s 2 --d 5", "--sequential_file_name")
    [alone] = make(workspaces("sd"), tmp_path / "alone", *flags)
    assert farthest(alone, small) == 0
    again = f"--prompt=a circle --w 64 --h 128 --s 3 --d 5 --t 0.5 --i {small}"
    [second] = make(workspaces("sd"), tmp_path / "second", again)
    assert farthest(second, path) == 0


# ---- the same pictures as previews -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", (*FAMILIES, "lumina", "sd3"))
def test_a_picture_is_the_preview_of_its_prompt_and_seed(
    case: str, workspaces: Callable[[str], Workspace], base: Callable[[str], Path], tmp_path: Path
) -> None:
    picture = base(case)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPT)
    workspace, family = workspaces(case), family_class(CASES[case].family)()
    flags = workspace.arguments("network", tmp_path / "run", f"--sample_prompts={prompts}", "--sample_at_first")
    training = importlib.import_module(workspace.script("network")).parse_options(flags)
    bundle = family.load(training, device=CPU, dtype=torch.float32)
    previews = PreviewWriter.of(family, family.strategies(training), training, CPU)
    [preview] = previews.write(bundle, bundle.denoiser, step=0).values()
    assert pixels(picture).std() > 1
    assert farthest(picture, preview) == 0


@pytest.mark.parametrize(("case", "sampler"), [("sd", "euler_a"), ("chroma", "ddim")])
def test_a_seed_is_the_same_picture_whatever_is_made_beside_it(
    case: str, sampler: str, workspaces: Callable[[str], Workspace], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na much longer prompt about a blue square --n red --d 9,4\n")
    flags = [f"--from_file={prompts}", "--W=64", "--H=64", "--steps=2", "--scale=3", "--seed=4", "--images_per_prompt=2"]
    flags += [] if case == "chroma" else [f"--sampler={sampler}"]
    alone = make(workspaces(case), tmp_path / "alone", *flags)
    together = make(workspaces(case), tmp_path / "together", *flags, "--batch_size=4")
    assert [path.stem.rpartition("_")[2] for path in alone] == ["4", "5", "9", "4"]
    assert max(map(farthest, alone, together)) <= 1
    assert farthest(alone[0], alone[1]) > 1 and farthest(alone[0], alone[3]) > 1


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sd", "chroma"])
def test_a_network_is_the_same_live_and_merged_and_nothing_at_strength_0(
    case: str, workspaces: Callable[[str], Workspace], lora: Callable[..., Path], base: Callable[[str], Path], tmp_path: Path
) -> None:
    workspace, flags = workspaces(case), [f"--prompt={PROMPT}", f"--network_weights={lora(case)}"]
    [live] = make(workspace, tmp_path / "live", *flags, "--network_mul=0.7")
    [merged] = make(workspace, tmp_path / "merged", *flags, "--network_mul=0.7", "--network_merge")
    [off] = make(workspace, tmp_path / "off", *flags, "--network_mul=0")
    assert farthest(live, base(case)) > 3
    assert farthest(live, merged) <= 1
    assert farthest(off, base(case)) == 0


def joined(*files: Path, to: Path) -> Path:
    """LoRAs of one kind as one that is their sum: of the sum of their ranks."""
    found = [load_file(file) for file in files]
    keys = {key.removesuffix(".alpha") for key in found[0] if key.endswith(".alpha")}
    tensors = {}
    for key in keys:
        tensors[f"{key}.lora_down.weight"] = torch.cat([one[f"{key}.lora_down.weight"] for one in found], dim=0)
        tensors[f"{key}.lora_up.weight"] = torch.cat([one[f"{key}.lora_up.weight"] for one in found], dim=1)
        tensors[f"{key}.alpha"] = torch.tensor(sum(float(one[f"{key}.alpha"]) for one in found))
    save_file(tensors, to)
    return to


def test_stacked_networks_add_up_live_merged_or_both(
    workspaces: Callable[[str], Workspace], lora: Callable[..., Path], tmp_path: Path
) -> None:
    pair = [lora("chroma", 3), lora("chroma", 4)]
    [expected] = make(
        workspaces("chroma"),
        tmp_path / "sum",
        f"--prompt={PROMPT}",
        f"--network_weights={joined(*pair, to=tmp_path / 'sum.safetensors')}",
    )
    for name, flags in {"live": [], "merged": ["--network_merge"], "both": ["--network_merge_n_models=1"]}.items():
        [stacked] = make(
            workspaces("chroma"), tmp_path / name, f"--prompt={PROMPT}", "--network_weights", *map(str, pair), *flags
        )
        assert farthest(stacked, expected) <= 1, name
    [one] = make(workspaces("chroma"), tmp_path / "one", f"--prompt={PROMPT}", f"--lora_weights={pair[0]};1")
    assert farthest(one, expected) > 3


def test_a_prompt_has_strengths_of_its_own(
    workspaces: Callable[[str], Workspace], lora: Callable[..., Path], base: Callable[[str], Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT} --am 0\n{PROMPT}\n{PROMPT} --am 0.5\n")
    weights = f"--network_weights={lora('sd')}"
    zero, one, half = make(workspaces("sd"), tmp_path / "own", f"--from_file={prompts}", weights)
    [expected] = make(workspaces("sd"), tmp_path / "half", f"--prompt={PROMPT}", weights, "--network_mul=0.5")
    assert farthest(zero, base("sd")) == 0 and farthest(half, expected) == 0
    assert farthest(one, half) > 1


def test_block_weights_leave_blocks_out_live_and_merged(
    workspaces: Callable[[str], Workspace], lora: Callable[..., Path], base: Callable[[str], Path], tmp_path: Path
) -> None:
    weights = f"--network_weights={lora('chroma')}"
    blocks = "0," + ",".join(["0"] * 3 + ["1"] * 4)  # the base and three double blocks off, four single ones on
    [off] = make(workspaces("chroma"), tmp_path / "off", f"--prompt={PROMPT}", weights, "--lbw=0*8")
    [live] = make(workspaces("chroma"), tmp_path / "live", f"--prompt={PROMPT}", weights, f"--lbw={blocks}")
    merged = [weights, f"--network_args=lbw={blocks}", "--network_merge"]
    [merged_picture] = make(workspaces("chroma"), tmp_path / "merged", f"--prompt={PROMPT}", *merged)
    kept = {key: value for key, value in load_file(lora("chroma")).items() if "single_blocks" in key}
    save_file(kept, tmp_path / "single.safetensors")
    only = f"--network_weights={tmp_path / 'single.safetensors'}"
    [expected] = make(workspaces("chroma"), tmp_path / "only", f"--prompt={PROMPT}", only)
    assert farthest(off, base("chroma")) == 0
    assert farthest(live, base("chroma")) > 1
    assert farthest(live, expected) == 0
    assert farthest(merged_picture, expected) <= 1


def test_swapped_blocks_and_a_quantised_base_make_pictures(
    workspaces: Callable[[str], Workspace], lora: Callable[..., Path], tmp_path: Path
) -> None:
    flags = [f"--prompt={PROMPT}", f"--network_weights={lora('chroma')}"]
    [plain] = make(workspaces("chroma"), tmp_path / "plain", *flags)
    [swapped] = make(workspaces("chroma"), tmp_path / "swapped", *flags, "--blocks_to_swap=2")
    [quantised] = make(workspaces("chroma"), tmp_path / "int8", *flags, "--quantize_base=int8", "--network_merge")
    assert farthest(plain, swapped) == 0
    assert 0 < np.abs(pixels(plain) - pixels(quantised)).mean() < 5


# ---- sheets, names and metadata --------------------------------------------------------------------------------------


def test_a_sheet_has_a_labelled_row_for_each_prompt_and_a_column_for_each_seed(
    workspaces: Callable[[str], Workspace], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square with many words that have to be wrapped\n")
    flags = [f"--from_file={prompts}", "--W=64", "--H=96", "--steps=1", "--seed=4", "--images_per_prompt=3", "--grid"]
    *pictures, sheet = make(workspaces("sd"), tmp_path / "out", *flags)
    assert sheet.name.startswith("grid_") and len(pictures) == 6
    labels = ["a red circle", "a blue square with many words that have to be wrapped"]
    rows = [(label, [Image.open(path) for path in pictures[3 * row : 3 * row + 3]]) for row, label in enumerate(labels)]
    expected = draw_grid(rows, ["seed 4", "seed 5", "seed 6"])
    assert np.array_equal(pixels(sheet), np.asarray(expected).astype(int))


def test_a_grid_places_pictures_beside_labels_that_fit() -> None:
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    sheet = draw_grid([("first", [red, blue]), ("a second label that is far too long for a single line", [blue])], ["a", "b"])
    found = np.asarray(sheet).astype(int)
    coloured = np.abs(found - found.mean(axis=2, keepdims=True)).max(axis=2) > 50
    rows, columns = np.flatnonzero(coloured.any(axis=1)), np.flatnonzero(coloured.any(axis=0))
    left, top = columns[0], rows[0]
    assert coloured.sum() == 3 * 40 * 30
    assert tuple(found[top, left]) == (255, 0, 0) and tuple(found[top, columns[-1]]) == (0, 0, 255)
    assert columns[-1] - left + 1 == 2 * 40 + 6
    assert sheet.size == (left + 2 * 46, top + 36 + sheet.size[1] - top - 36)
    inked = (found[:, :left] < 128).any(axis=2)
    assert inked[top : top + 30].any() and inked[top + 36 :].any() and not inked[:, :6].any()
    assert (found[:top, left:] < 128).any()


def test_networks_are_compared_side_by_side(
    workspaces: Callable[[str], Workspace], lora: Callable[..., Path], base: Callable[[str], Path], tmp_path: Path
) -> None:
    weights = ["--network_weights", str(lora("chroma", 3)), str(lora("chroma", 4)), "--grid_networks"]
    *pictures, sheet = make(workspaces("chroma"), tmp_path / "all", f"--prompt={PROMPT}", *weights)
    by_number = {int(path.stem.split("_")[2]): path for path in pictures}
    [second] = make(workspaces("chroma"), tmp_path / "second", f"--prompt={PROMPT}", f"--network_weights={lora('chroma', 4)}")
    assert farthest(by_number[0], base("chroma")) == 0 and farthest(by_number[2], second) == 0
    assert Image.open(sheet).size[0] > 4 * 64
    told = [Image.open(by_number[number]).text["parameters"].splitlines()[0] for number in range(4)]
    assert told == [
        "a red circle",
        "a red circle <lora:chroma3:1>",
        "a red circle <lora:chroma4:1>",
        "a red circle <lora:chroma3:1> <lora:chroma4:1>",
    ]


def test_files_tell_how_they_were_made_and_can_be_numbered(
    workspaces: Callable[[str], Workspace], lora: Callable[..., Path], tmp_path: Path
) -> None:
    flags = [f"--prompt={PROMPT} --n blurry --ss k_euler_a", f"--network_weights={lora('sd')}", "--network_mul=0.7"]
    (tmp_path / "im_000041.png").touch()
    [path] = make(workspaces("sd"), tmp_path, *flags, "--sequential_file_name", "--clip_skip=2")
    assert path.name == "im_000042.png"
    prompt, negative, facts = Image.open(path).text["parameters"].splitlines()
    assert prompt == "a red circle <lora:sd3:0.7>"
    assert negative == "Negative prompt: blurry"
    assert facts.startswith("Steps: 2, Sampler: Euler a, CFG scale: 3, Seed: 5, Size: 64x64, Model hash: ")
    assert ", Model: sd, Clip skip: 2, Lora hashes: " in facts


def test_the_text_of_interfaces_quotes_what_would_be_taken_apart() -> None:
    text = parameters_text("a", "", {"Steps": 3, "Model": 'a, b: "c"', "VAE": None}, [NetworkUse("x", 0.0, "12")])
    assert text == 'a\nSteps: 3, Model: "a, b: \\"c\\""'


def test_prompts_are_asked_for_until_an_empty_one_and_a_wrong_one_is_told(
    workspaces: Callable[[str], Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    typed = "a red circle --d 1\na red circle --w 70\na red circle --foo 1\na blue square --d 2\n\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    made = make(workspaces("sd"), tmp_path, "--interactive", "--W=64", "--H=64", "--steps=1")
    assert [path.stem.split("_")[2:] for path in made] == [["000", "1"], ["001", "2"]]
    assert "width 70 is not a multiple of 8" in caplog.text and "unknown option --foo" in caplog.text


def test_lumina_is_drawn_with_the_flags_of_sd_scripts_and_bounds_its_guidance(
    workspaces: Callable[[str], Workspace], base: Callable[[str], Path], tmp_path: Path
) -> None:
    """Bounds that change nothing at two steps give the usual picture, others another one."""
    folder = workspaces("lumina").model.parent
    size = ["--image_width=64", "--image_height=64", "--steps=2", "--seed=5", "--guidance_scale=3", "--discrete_flow_shift=6"]
    pictures = []
    for number, bounds in enumerate((["--cfg_trunc_ratio=0.25", "--renorm_cfg=1"], ["--cfg_trunc_ratio=1", "--renorm_cfg=0"])):
        lumina_minimal_inference.main([
            f"--pretrained_model_name_or_path={workspaces('lumina').model}", f"--gemma2_path={folder / 'gemma2.safetensors'}",
            f"--ae_path={folder / 'ae.safetensors'}", f"--tokenizer={folder / 'gemma_tokenizer'}", "--system_prompt=re",
            "--gemma2_max_token_length=32", "--prompt=a red circle", *size, *bounds, f"--output_dir={tmp_path / str(number)}",
        ])  # fmt: skip
        pictures += (tmp_path / str(number)).glob("*.png")
    assert farthest(pictures[0], base("lumina")) == 0
    assert farthest(pictures[1], base("lumina")) > 1


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], str]] = {
    "no prompt": ([], "say what to draw"),
    "two sources of prompts": (["--prompt=a", "--interactive"], "in one of three ways"),
    "no such file": (["--from_file=missing.txt"], "--from_file missing.txt: does not exist"),
    "a size between steps": (["--prompt=a --w 70"], r"prompt 1: width 70 is not a multiple of 8.*Use 64 or 72"),
    "an unknown inline option": (["--prompt=a --foo 3"], "--prompt: unknown option --foo"),
    "an unknown sampler": (["--prompt=a --ss eulr"], "prompt 1: unknown sampler 'eulr'.*Did you mean 'euler'"),
    "a seed that is none": (["--prompt=a --d 1,x"], r"--d is '1,x', expected whole numbers separated by commas"),
    "a ControlNet": (["--prompt=a --cn x.png"], "no ControlNets here yet"),
    "nothing to start from": (["--prompt=a --i absent.png"], "absent.png: no such picture to start from"),
    "too strong": (["--prompt=a --t 1.5"], "strength 1.5: the share of the steps, more than 0 and at most 1"),
    "a larger first picture": (["--prompt=a", "--highres_fix_scale=2"], "--highres_fix_scale 2.0: the share of the size"),
    "strengths without networks": (["--prompt=a --am 1"], "--am has 1 strengths for 0 networks"),
    "more strengths than networks": (["--prompt=a", "--network_mul=1"], "--network_mul has more values than there are"),
    "a network that is not there": (["--prompt=a", "--network_weights=missing.safetensors"], "does not exist"),
    "a strength that is none": (["--prompt=a", "--lora_weights=x.safetensors;y"], "expected file;strength"),
    "grid of nothing": (["--prompt=a", "--grid_networks"], "compares networks. Give some"),
    "two formats": (["--prompt=a", "--fp16", "--dtype=bf16"], "say the same. Keep one"),
    "a mask": (["--prompt=a", "--mask_path=a.png"], "not implemented here yet. Pictures are made from a prompt alone"),
    "another family": (
        ["--prompt=a", "--family=flux"],
        "is Stable Diffusion 1.x, and this is to be a model of the family flux",
    ),
    "options of another family": (["--prompt=a", "--t5xxl=x"], "unknown option '--t5xxl'"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_be_made_is_told_before_anything_is_loaded(
    row: str, workspaces: Callable[[str], Workspace], tmp_path: Path
) -> None:
    flags, message = REFUSED[row]
    with pytest.raises(UserError, match=message):
        prepare(*gen_img.parse_options(arguments(workspaces("sd"), tmp_path, *flags)))


def test_networks_of_another_family_or_with_another_number_of_blocks_are_told_before_anything_is_loaded(
    workspaces: Callable[[str], Workspace], lora: Callable[..., Path], tmp_path: Path
) -> None:
    def prepared(*flags: str) -> Any:
        return prepare(*gen_img.parse_options(arguments(workspaces("sd"), tmp_path, "--prompt=a", *flags)))

    with pytest.raises(UserError, match=r"chroma3.safetensors has no weights for this model.*looks like a network for FLUX"):
        prepared(f"--network_weights={lora('chroma')}")
    with pytest.raises(UserError, match="3 block weights: this model takes 17, 25 or 26"):
        prepared(f"--network_weights={lora('sd')}", "--lbw=1,1,1")
    fitting = prepared(f"--network_weights={lora('sd')}")
    assert not any(fitting.bundle.loaded(part) for part in ("denoiser", "vae", "text_encoder"))


def test_a_script_for_one_family_names_that_of_the_model(workspaces: Callable[[str], Workspace], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is Stable Diffusion 1.x, and this is to be a model of the family sdxl. Use gen_img.py"
    ):
        sdxl_gen_img.parse_options(arguments(workspaces("sd"), tmp_path, "--prompt=a"))
    with pytest.raises(UserError, match="--ckpt is missing"):
        gen_img.parse_options(["--prompt=a"])


def test_a_device_without_room_says_what_takes_less(workspaces: Callable[[str], Workspace], tmp_path: Path) -> None:
    run = prepare(*gen_img.parse_options(arguments(workspaces("chroma"), tmp_path, f"--prompt={PROMPT}")))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    run.bundle.denoiser.register_forward_pre_hook(full)
    with pytest.raises(UserError, match="1 pictures of 64 x 64 at a time. Lower --batch_size.*9 GiB"):
        run.run()


def test_every_family_makes_pictures() -> None:
    assert FAMILY_OPTIONS.keys() == ALL_FAMILIES.keys()
    for name in ALL_FAMILIES:
        assert issubclass(family_group(name), family_group(name).model_group), name
