"""Prompt files, samplers against a known answer, and previews of a tiny model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor, nn

from library.errors import UserError
from library.family_base import ModelBundle, SampleStart, family_class
from library.objectives import DiscreteDDPM
from library.option_groups import ModelOptions, NetworkTrainOptions, OutputOptions, SamplingOptions, TrainingOptions
from library.picture_maker import evaluation_mode
from library.prompts import PromptLine, parse_line, parse_prompts
from library.sampling import (
    SCHEDULERS,
    PreviewWriter,
    flow_levels,
    guided,
    guided_pair,
    make_scheduler,
    preview_due,
    sample_diffusion,
    sample_flow,
)

# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_a_line_has_every_inline_option_in_its_type():
    line = parse_line(
        "a cat, sitting --w 640 --h 384 --d 7 --s 12 --l 5.5 --g 3.5 --n blurry, low quality --ss euler_a --cn c.png "
        "--ctr 0.25 --rcfg 1 --fs 3",
        "file, line 1",
    )
    assert line == PromptLine(
        prompt="a cat, sitting", negative_prompt="blurry, low quality", width=640, height=384, seed=7, sample_steps=12,
        scale=5.5, guidance_scale=3.5, sample_sampler="euler_a", controlnet_image="c.png", cfg_trunc_ratio=0.25,
        renorm_cfg=1.0, flow_shift=3.0,
    )  # fmt: skip
    assert isinstance(line.flow_shift, float) and isinstance(line.renorm_cfg, float)
    assert line.extra() == {
        "guidance_scale": 3.5, "controlnet_image": "c.png", "cfg_trunc_ratio": 0.25, "renorm_cfg": 1.0, "flow_shift": 3.0,
    }  # fmt: skip


def test_defaults_are_those_of_sd_scripts():
    line = parse_line("a cat", "")
    assert (line.width, line.height, line.sample_steps, line.scale, line.seed) == (512, 512, 30, None, None)
    assert line.negative_prompt is None and line.extra() == {}


def test_dashes_inside_a_prompt_are_text():
    assert parse_line("a well-known -- very -- old 1--2 cat --d 3", "").prompt == "a well-known -- very -- old 1--2 cat"


def test_a_line_may_begin_with_an_option():
    assert parse_line("--n ugly --d 4", "") == PromptLine(prompt="", negative_prompt="ugly", seed=4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --w wide", "p.txt, line 2: --w is 'wide', expected a whole number"),
        ("a cat --fs fast", "--fs is 'fast', expected a number"),
        ("a cat --rcgf 1", r"unknown option --rcgf.*Did you mean 'rcfg'"),
        ("a cat --s 0", "sample_steps is 0, expected at least 1"),
    ],
)
def test_a_wrong_inline_option_names_file_line_and_value(tmp_path, line, message):
    path = tmp_path / "p.txt"
    path.write_text(f"fine\n{line}\n")
    with pytest.raises(UserError, match=message):
        parse_prompts(path)


def test_text_files_skip_comments_and_empty_lines(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\ufeff# comment\n\n  red cat --d 1  \nblue cat\n", encoding="utf-8")
    assert [(line.prompt, line.seed) for line in parse_prompts(path)] == [("red cat", 1), ("blue cat", None)]


def test_toml_subsets_have_the_defaults_of_prompt(tmp_path):
    path = tmp_path / "p.toml"
    subsets = '[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\nwidth = 128\nseed = 2\n'
    path.write_text("[prompt]\nwidth = 256\nscale = 4\n" + subsets)
    assert parse_prompts(path) == [
        PromptLine(prompt="a", width=256, scale=4),
        PromptLine(prompt="b", width=128, scale=4, seed=2),
    ]


def test_json_lists_hold_objects_and_lines(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt": "a", "negative_prompt": "b", "flow_shift": 3}, "c --d 5"]))
    assert parse_prompts(path) == [PromptLine("a", negative_prompt="b", flow_shift=3), PromptLine("c", seed=5)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "a", r"has to end in .txt, .toml, .json, not '.csv'"),
        ("p.txt", "# only a comment", "has no prompt in it"),
        ("p.json", "[", "not valid JSON"),
        ("p.json", '{"prompt": "a"}', "expected a list of prompts, got dict"),
        ("p.json", "[3]", "entry 1: expected an object or a string, got int"),
        ("p.json", '[{"prompt": "a", "widht": 64}]', "unknown key 'widht'.*Did you mean 'width'"),
        ("p.json", '[{"prompt": "a", "width": "64"}]', "width is '64', expected a whole number, got str"),
        ("p.json", '[{"width": 64}]', "the key 'prompt' is missing"),
        ("p.toml", "[[prompts]]\nprompt = 'a'", r"the table \[prompt\] is missing"),
        ("p.toml", "= 3", "not valid TOML"),
    ],
)
def test_a_wrong_file_says_what_is_expected(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        parse_prompts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="missing.txt: no such file"):
        parse_prompts(tmp_path / "missing.txt")


# ---- samplers --------------------------------------------------------------------------------------------------------


def perfect_model(objective: DiscreteDDPM, x0: Tensor):
    """Predicts what a model would that knows x0 exactly, at whole and fractional times."""
    table = objective.alphas_cumprod.double()
    table = torch.cat([table[:-1], table[-1:].clamp(min=2.0**-24)])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        t = t.double().view(-1)
        low, high = t.floor().long(), t.ceil().long()
        # samplers interpolate the noise level between whole times in its logarithm
        sigma = ((1 - table) / table).sqrt().log()
        level = torch.lerp(sigma[low], sigma[high], t - low).exp().view(-1, 1, 1, 1)
        alpha = 1 / (1 + level**2).sqrt()
        noise = (x.double() - alpha * x0) / (alpha * level)
        return (alpha * noise - alpha * level * x0 if objective.v_prediction else noise).float()

    return predict


def needs(name: str) -> None:
    if name == "lms":
        pytest.importorskip("scipy")


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_reaches_the_picture_a_perfect_model_knows(name, zero_terminal_snr):
    needs(name)
    objective = DiscreteDDPM(v_prediction=zero_terminal_snr, zero_terminal_snr=zero_terminal_snr)
    x0 = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8)
    scheduler = make_scheduler(name, objective)
    latents = sample_diffusion(perfect_model(objective, x0), scheduler, (1, 1, 8, 8), steps=20, seed=3, device="cpu")
    assert latents.dtype == torch.float32
    assert (latents - x0).abs().max() < 0.12, (latents - x0).abs().max()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_to_start_from_is_noised_as_much_as_the_steps_that_are_left_begin_at(name):
    needs(name)
    objective, shape = DiscreteDDPM(), (1, 1, 8, 8)
    x0 = torch.linspace(-2, 2, 64, dtype=torch.float64).view(shape)
    model, seen = perfect_model(objective, x0), []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(model(x, t))
        return seen[-1]

    scheduler = make_scheduler(name, objective)
    start = SampleStart(x0.float(), 0.3)
    latents = sample_diffusion(predict, scheduler, shape, steps=20, seed=3, device="cpu", start=start)
    torch.testing.assert_close(seen[0], torch.randn(shape, generator=torch.Generator().manual_seed(3)), atol=0.05, rtol=0.05)
    assert 6 <= len(seen) <= 6 * scheduler.order + 1  # PNDM makes one of its steps twice
    assert (latents - x0).abs().max() < 0.12


@pytest.mark.parametrize(("strength", "calls"), [(0.05, 1), (0.1, 3), (0.3, 7), (1.0, 21)])
def test_pndm_makes_its_second_step_twice_and_none_more_wherever_it_begins(strength, calls):
    objective, shape = DiscreteDDPM(), (1, 1, 8, 8)
    x0 = torch.linspace(-2, 2, 64, dtype=torch.float64).view(shape)
    model, seen = perfect_model(objective, x0), []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append((int(t), model(x, t)))
        return seen[-1][1]

    scheduler = make_scheduler("pndm", objective)
    sample_diffusion(predict, scheduler, shape, steps=20, seed=3, device="cpu", start=SampleStart(x0.float(), strength))
    left = [951 - 50 * step for step in range(20)][20 - max(calls - 1, 1) :]
    assert [time for time, _ in seen] == [*left[:2], *left[1:]] and len(seen) == calls
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for _, found in seen:  # latents are as noisy as the time says
        torch.testing.assert_close(found, noise, atol=0.05, rtol=0.05)


def test_a_flow_goes_on_from_a_picture():
    x0, seen = torch.linspace(-2, 2, 64).view(1, 1, 8, 8), []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x - (1 - t) * x0) / t)
        return (x - x0) / t

    levels = flow_levels(10, 3.0)
    latents = sample_flow(velocity, levels, (1, 1, 8, 8), seed=3, device="cpu", start=SampleStart(x0, 0.4))
    noise = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    assert len(seen) == 4
    torch.testing.assert_close(seen[0], noise, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latents, x0, atol=1e-5, rtol=1e-5)


def test_k_names_are_the_same_samplers_and_unknown_ones_get_a_suggestion():
    objective = DiscreteDDPM()
    assert type(make_scheduler("k_euler", objective)) is type(make_scheduler("euler", objective))
    with pytest.raises(UserError, match="unknown sampler 'eulr'.*Did you mean 'euler'"):
        make_scheduler("eulr", objective)


def test_the_flag_offers_exactly_the_table():
    declared = SamplingOptions.__dataclass_fields__["sample_sampler"].metadata["flag"]
    assert {name.removeprefix("k_") for name in declared.choices} == SCHEDULERS.keys()


def test_a_sampler_whose_package_is_missing_names_it():
    try:
        import scipy  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install scipy"):
            make_scheduler("lms", DiscreteDDPM())


def test_a_sampler_uses_the_schedule_that_is_trained():
    objective = DiscreteDDPM(v_prediction=True, zero_terminal_snr=True)
    for name in ("ddim", "euler"):
        scheduler = make_scheduler(name, objective)
        assert scheduler.config.prediction_type == "v_prediction"
        torch.testing.assert_close(scheduler.alphas_cumprod[:-1], objective.alphas_cumprod[:-1], rtol=1e-3, atol=1e-7)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[0] == 999  # the noisiest time is really sampled
    plain = make_scheduler("ddim", DiscreteDDPM())
    plain.set_timesteps(10)
    assert plain.config.prediction_type == "epsilon" and plain.timesteps[0] < 999


def test_a_seed_is_the_picture_and_batches_share_a_time():
    objective = DiscreteDDPM()
    shapes = set()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        shapes.add((tuple(x.shape), tuple(t.shape)))
        return torch.tanh(x)

    def run(name: str, seed: int) -> Tensor:
        return sample_diffusion(predict, make_scheduler(name, objective), (2, 4, 8, 8), steps=4, seed=seed, device="cpu")

    for name in ("ddim", "euler_a"):
        assert torch.equal(run(name, 1), run(name, 1))
        assert not torch.equal(run(name, 1), run(name, 2))
    assert shapes == {((2, 4, 8, 8), (2,))}


def test_guidance_moves_away_from_the_negative_prediction():
    x, t = torch.randn(1, 4, 2, 2), torch.tensor([5])
    expected = -x + 3.0 * (2 * x - -x)
    torch.testing.assert_close(guided(lambda x, t: 2 * x, lambda x, t: -x, 3.0)(x, t), expected)
    sign = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(guided_pair(lambda x, t: x * sign, 3.0)(x, t), expected)


def test_without_guidance_the_negative_prompt_is_not_run():
    def fail(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError

    x = torch.ones(1, 1, 1, 1)
    assert guided(lambda x, t: x, fail, 1.0)(x, torch.zeros(1)) is x


# ---- when ------------------------------------------------------------------------------------------------------------


def due(options: SamplingOptions) -> list[tuple[int, int | None]]:
    """Over two epochs of three steps; an epoch's end comes with its last step."""
    moments = [(0, None), (1, None), (2, None), (3, 1), (4, None), (5, None), (6, 2)]
    return [moment for moment in moments if preview_due(options, *moment)]


def test_previews_come_every_n_steps_or_epochs_and_first_when_asked():
    assert due(SamplingOptions(sample_prompts="p", sample_every_n_steps=2)) == [(2, None), (4, None), (6, 2)]
    assert due(SamplingOptions(sample_prompts="p", sample_every_n_epochs=2)) == [(6, 2)]
    assert due(SamplingOptions(sample_prompts="p", sample_every_n_epochs=1, sample_every_n_steps=1)) == [(3, 1), (6, 2)]
    assert due(SamplingOptions(sample_prompts="p", sample_at_first=True)) == [(0, None)]
    assert due(SamplingOptions(sample_prompts="p")) == []
    assert due(SamplingOptions(sample_every_n_steps=1, sample_at_first=True)) == []


def test_evaluation_mode_puts_every_module_back_as_it_was():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with evaluation_mode([model]):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, False]


# ---- previews of a tiny model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("model")
    return tiny.write_sd_checkpoint(folder / "sd.safetensors", version="v1"), tiny.write_clip_tokenizer(folder / "tokenizer")


PROMPTS = "a red circle --w 70 --h 64 --s 2 --d 5\na blue square --n red --w 64 --h 96 --s 2 --ss euler_a --l 3\n"


def make_options(model: tuple[Path, Path], folder: Path, text: str = PROMPTS, **changes: object) -> NetworkTrainOptions:
    (folder / "prompts.txt").write_text(text)
    return NetworkTrainOptions(
        model=ModelOptions(pretrained_model_name_or_path=str(model[0]), tokenizer=str(model[1])),
        training=TrainingOptions(seed=1),
        output=OutputOptions(output_dir=str(folder / "out"), output_name="tiny"),
        sampling=SamplingOptions(sample_prompts=str(folder / "prompts.txt"), sample_every_n_steps=1, **changes),
    )


def make_writer(options: NetworkTrainOptions, **kwargs: object) -> tuple[PreviewWriter, ModelBundle]:
    family = family_class("sd")()
    bundle = family.load(options, device=torch.device("cpu"), dtype=torch.float32)
    return PreviewWriter.of(family, family.strategies(options), options, torch.device("cpu"), **kwargs), bundle


def test_previews_have_sd_scripts_names_the_asked_size_and_the_same_pixels_each_time(model, tmp_path):
    writer, bundle = make_writer(make_options(model, tmp_path))
    first = list(writer.write(bundle, bundle.denoiser, step=12).values())
    assert [path.parent for path in first] == [tmp_path / "out" / "sample"] * 2
    assert re.fullmatch(r"tiny_000012_00_\d{14}_5\.png", first[0].name)
    assert re.fullmatch(r"tiny_000012_01_\d{14}_\d+\.png", first[1].name)
    pictures = [np.asarray(Image.open(path)) for path in first]
    assert [picture.shape for picture in pictures] == [(64, 64, 3), (96, 64, 3)]  # 70 is no multiple of the latent's 8
    assert pictures[0].std() > 1

    again, other = make_writer(make_options(model, tmp_path, sample_every_n_epochs=2))
    second = list(again.write(other, other.denoiser, step=12, epoch=2).values())
    assert re.fullmatch(r"tiny_e000002_00_\d{14}_5\.png", second[0].name)
    assert writer.path(0, 12, epoch=2).name.startswith("tiny_000012_")  # every n steps, at an epoch's end
    assert writer.path(0, 0, epoch=None).name.startswith("tiny_e000000_")
    assert all(np.array_equal(np.asarray(Image.open(path)), picture) for path, picture in zip(second, pictures, strict=True))


def test_prompts_encoded_once_give_the_same_request_and_free_the_encoder(model, tmp_path):
    writer, bundle = make_writer(make_options(model, tmp_path))
    live = writer.request(bundle, 1)
    writer.encode_frozen(bundle)
    for name in bundle.text_encoder_names:
        bundle.release(name)
    kept = writer.request(bundle, 1)
    assert not any(bundle.loaded(name) for name in bundle.text_encoder_names)
    for side in ("positive", "negative"):
        ours, theirs = getattr(kept, side).tensors(), getattr(live, side).tensors()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (kept.guidance, kept.sampler, kept.steps, kept.width, kept.height) == (3.0, "euler_a", 2, 64, 96)


def test_encoders_that_learn_are_run_at_every_preview(model, tmp_path):
    writer, bundle = make_writer(make_options(model, tmp_path))
    writer.encode_frozen(bundle, frozenset(bundle.text_encoder_names))
    before = writer.request(bundle, 0).positive.tensors()
    with torch.no_grad():
        for parameter in bundle.text_encoders["text_encoder"].parameters():
            parameter.add_(0.1)
    after = writer.request(bundle, 0).positive.tensors()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_processes_share_the_prompts_and_nobody_else_is_disturbed(model, tmp_path):
    options = make_options(model, tmp_path)
    state = torch.get_rng_state()
    paths = []
    for rank in range(2):
        writer, bundle = make_writer(options, rank=rank, world=2)
        denoiser = bundle.denoiser.train()
        own = writer.write(bundle, denoiser, step=1)
        assert list(own) == [rank]
        paths += own.values()
        assert denoiser.training and not bundle.loaded("vae")
    assert [path.name[:14] for path in paths] == ["tiny_000001_00", "tiny_000001_01"]
    assert torch.equal(state, torch.get_rng_state())


def test_a_line_without_a_seed_keeps_its_picture_over_the_run_but_not_over_runs(model, tmp_path):
    options = make_options(model, tmp_path)
    other = replace(options, training=TrainingOptions(seed=2))
    assert make_writer(options)[0].seed(1) == make_writer(options)[0].seed(1)
    assert make_writer(options)[0].seed(1) != make_writer(other)[0].seed(1)


def test_an_unknown_sampler_in_a_prompt_is_found_before_training(model, tmp_path):
    with pytest.raises(UserError, match="unknown sampler 'eulr_a'"):
        make_writer(make_options(model, tmp_path, "a cat --ss eulr_a"))
