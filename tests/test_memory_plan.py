"""Plans of runs against runs: memory as torch's profiler saw it, block swap as it is, and what `--auto_fit` chooses."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import memory_measure
import pytest
import runs
import tiny_flux
import torch
from runs import CASES, SHALLOW_CASES, FamilyCase, Mode, Workspace
from torch import nn

from library.auto_fit import fit_to_memory, needed
from library.custom_offloading_utils import BlockGroup, BlockSwap
from library.errors import UserError
from library.memory_plan import SimulatedOffload, forecast, forecasts, largest_batch, swap_footprint
from library.memory_tracker import MemoryTracker, simulated, stored_bytes
from library.model_io import empty_module
from library.offload_plan import RingPlan
from library.plan_report import PLAN_FILE

if TYPE_CHECKING:
    from library.train_util import PreparedRun, Trainer

TOLERANCE = 0.1
CACHED = (
    "--cache_latents",
    "--cache_text_encoder_outputs",
    "--resolution=128",
    "--no_half_vae",
)
FROZEN_TEXT: dict[Mode, str] = {"network": "--network_train_unet_only", "full": "--stop_text_encoder_training=-1"}
DEEP = FamilyCase(
    family="flux",
    write_model=lambda folder: tiny_flux.write_flux_files(folder, blocks=tiny_flux.SWAPPABLE),
    scripts=CASES["flux"].scripts,
    arguments=tiny_flux.arguments,
)
"""A FLUX.1 of which one double and two single blocks can be swapped."""


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    cases = {**CASES, "deep": DEEP} | {f"shallow {name}": SHALLOW_CASES[name] for name in ("sd", "sdxl")}
    return runs.Workspaces(cases, tmp_path_factory.mktemp)


def built(run: PreparedRun) -> Trainer:
    from library.train_util import finish_building

    return finish_building(run)


# ---- the tracker -------------------------------------------------------------------------------------------------------


def test_memory_is_counted_while_it_is_in_use_and_views_take_none() -> None:
    tracker = MemoryTracker()
    with simulated(), tracker:
        first = torch.empty(1000)
        second = first.view(10, 100).T + 1
        assert tracker.in_use("cpu") == 8000
        del first
        assert tracker.in_use("cpu") == 4000
        third = second.sum()
        del second, third
    assert tracker.in_use("cpu") == 0
    assert tracker.peak("cpu").total == 8000


def test_a_kind_can_be_given_to_memory_and_the_peak_keeps_what_there_was() -> None:
    tracker = MemoryTracker()
    with simulated(), tracker:
        weight = torch.empty(100)
        tracker.mark("weights", [weight, None])
        tracker.reset_peaks()
        product = weight * 2
        tracker.mark("other", [product])
    assert tracker.peak("cpu").kinds == {"weights": 400, "activations": 400}
    assert tracker.live["cpu"] == {"weights": 400, "activations": 0, "other": 400}


def test_matrix_products_count_as_operations_and_the_rest_by_its_bytes() -> None:
    tracker = MemoryTracker()
    with simulated(), tracker:
        product = torch.empty(3, 4) @ torch.empty(4, 5)
        assert (tracker.work.flops, tracker.work.moved_bytes) == (2 * 3 * 4 * 5, 4 * (12 + 20))  # two results of `empty`
        product += 1
    assert tracker.work.moved_bytes == 4 * (12 + 20) + 2 * 4 * 15


def test_a_value_that_is_read_out_stands_for_one_unless_it_is_known() -> None:
    with simulated(), MemoryTracker():
        assert torch.empty(()).item() == 1
        assert bool(torch.empty((), dtype=torch.bool))
        assert torch.tensor(3.0).item() == 3


def test_a_model_that_is_made_without_memory_takes_none_and_can_be_moved() -> None:
    tracker = MemoryTracker()
    with simulated(), tracker:
        module = empty_module(lambda: nn.Linear(100, 100))
        assert tracker.in_use("cpu") == 0
        module.to_empty(device="cpu")
        assert tracker.in_use("cpu") == 4 * (100 * 100 + 100)


def test_allocations_on_a_gpu_are_rounded_as_its_allocator_does() -> None:
    assert [stored_bytes(size, "cuda") for size in (1, 512, 513)] == [512, 512, 1024]
    assert stored_bytes(513, "cpu") == 513


# ---- plans against runs ------------------------------------------------------------------------------------------------


def measured(trainer: Trainer, before: int) -> int:
    """Bytes of an update with the batch that has the most pixels."""
    data = trainer.data.train
    size = largest_batch(data)[1]
    batches = [data[(0, index)] for index in range(data.num_batches)]
    largest = next(
        batch for batch in batches if batch.target_sizes[0].tolist() == [size.height, size.width] and len(batch) == size.images
    )
    del batches
    return memory_measure.peak_of_update(trainer, [largest] * trainer.length.accumulation, before)


def assert_accurate(run: PreparedRun) -> None:
    plan = forecast(run).training.device.total
    before = memory_measure.bytes_of_all_tensors()
    actual = measured(built(run), before)
    assert plan == pytest.approx(actual, rel=TOLERANCE), f"planned {plan:,}, measured {actual:,}"


def flags(mode: Mode, recomputes: bool, precision: str, batch: int) -> list[str]:
    recompute = ["--gradient_checkpointing"] if recomputes else []
    return [*CACHED, FROZEN_TEXT[mode], f"--mixed_precision={precision}", f"--train_batch_size={batch}", *recompute]


PAIRWISE: Sequence[tuple[str, Mode, bool, str, int]] = (
    ("flux", "network", False, "no", 1),
    ("shallow sd", "full", True, "no", 1),
    ("shallow sdxl", "network", True, "no", 2),
    ("shallow sd", "network", False, "bf16", 1),
    ("flux", "full", True, "bf16", 2),
    ("flux", "full", False, "bf16", 2),
)
"""Any two values of two columns stand together in a row; fewer rows cannot have that. SD and SDXL stand for each other: all but
their text encoders and the size conditions is one code."""
EVERYTHING = [
    (family, mode, recomputes, precision, batch)
    for family, mode, recomputes, precision, batch in itertools.product(
        ("sd", "sdxl", "flux", "chroma", "lumina"), runs.MODES, (False, True), ("no", "bf16"), (1, 2)
    )
]


@pytest.mark.parametrize(
    ("family", "mode", "recomputes", "precision", "batch"),
    [
        *PAIRWISE,
        *(pytest.param(*row, marks=pytest.mark.slow) for row in EVERYTHING if row not in PAIRWISE),
    ],
)
def test_the_plan_is_within_ten_percent_of_what_training_takes(
    family: str, mode: Mode, recomputes: bool, precision: str, batch: int, workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    assert_accurate(workspaces[family].prepared(mode, tmp_path, *flags(mode, recomputes, precision, batch)))


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(["--gradient_accumulation_steps=2", "--optimizer_type=Adafactor"], id="accumulating Adafactor"),
        pytest.param(["--fused_backward_pass", "--max_grad_norm=0"], id="fused"),
    ],
)
def test_the_plan_follows_the_way_weights_are_stepped(
    extra: list[str], workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    """All of them with everything live: pictures and captions are encoded in the step."""
    assert_accurate(workspaces["shallow sd"].prepared("full", tmp_path, *extra))


def test_caching_has_its_own_phases_and_they_leave_no_trace(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    run = workspaces["flux"].prepared("network", tmp_path, *CACHED, FROZEN_TEXT["network"])
    plan = forecast(run)
    assert [phase.name for phase in plan.phases] == ["caching latents", "caching text encoder outputs", "training"]
    assert all(dataset.latent_cache is dataset.text_cache is None for dataset in run.data.image_datasets)
    trainer = built(run)
    cache = trainer.data.train.latent_cache
    text = trainer.data.train.text_cache
    assert cache is not None and text is not None
    kept = sum(entry.latents.nbytes for entry in cache.memory.values())
    kept += sum(tensor.nbytes for entry in text.memory.values() for tensor in entry.tensors().values())
    assert plan.caches == kept
    groups = {group.name: group.num_parameters for group in plan.groups}
    assert groups == {"unet": sum(parameter.numel() for parameter in trainer.parameters)}


# ---- what is added: swapped blocks and offloaded activations ---------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "num_swapped"), [(4, 1), (4, 2), (5, 2), (6, 4)])
@pytest.mark.parametrize("learning", [False, True])
def test_swap_takes_the_slots_and_host_buffers_that_the_plan_says(num_blocks: int, num_swapped: int, learning: bool) -> None:
    blocks = [nn.Sequential(nn.Linear(8, 8 + index), nn.Linear(8 + index, 8)) for index in range(num_blocks)]
    model = nn.Sequential(*blocks).requires_grad_(learning)
    planned = swap_footprint([RingPlan(num_blocks, num_swapped)], [blocks])
    swap = BlockSwap(model, [BlockGroup(blocks, num_swapped)], torch.device("cpu"), learning=learning)
    (ring,) = swap.rings
    streamed = sum(slot.flat.numel() for slot in ring.slots.values())
    assert planned.host == sum(block.host.flat.numel() for block in ring.blocks.values())
    staying = [block for index, block in enumerate(blocks) if index not in ring.blocks]
    resting = sum(swap_footprint([RingPlan(3, 1)], [[block] * 3]).slots // 2 for block in staying)  # one block's aligned size
    assert planned.slots == streamed + resting
    assert (planned.away_learning > 0) == learning


def test_offloaded_activations_are_those_that_offloading_moves(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    extra = (*CACHED, FROZEN_TEXT["network"], "--cpu_offload_checkpointing", "--gradient_checkpointing")
    trainer = built(workspaces["flux"].prepared("network", tmp_path, *extra))
    offload = trainer.memory.offload
    assert offload is not None
    batch = trainer.data.train[(0, 0)]
    trainer.trainable.train()
    trainer.loss(batch)
    moved = offload.offloaded_bytes
    offload.close()
    simulation = SimulatedOffload(trainer.bundle.denoiser, min_bytes=0)
    trainer.loss(batch)
    assert simulation.host_bytes == moved > 0


def test_what_is_swapped_or_offloaded_leaves_the_device(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    base = (*CACHED, "--gradient_checkpointing")
    plain = forecast(workspaces["deep"].prepared("full", tmp_path, *base))
    swapped = forecast(workspaces["deep"].prepared("full", tmp_path, *base, "--blocks_to_swap=2"))
    assert swapped.training.device.total < plain.training.device.total
    assert swapped.swapped > 0 == plain.swapped


# ---- the flags -----------------------------------------------------------------------------------------------------------


def test_plan_tells_everything_and_trains_nothing(
    workspaces: dict[str, Workspace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = workspaces["flux"]
    targets = (
        "--network_args",
        "exclude_patterns=_mod_,modulation",
        "network_reg_lrs=img_attn_qkv=0.5",
        "network_reg_dims=txt_mlp_2=3",
    )
    output = workspace.train("network", tmp_path / "out", *CACHED, FROZEN_TEXT["network"], "--plan", *targets)
    assert [path.name for path in output.iterdir()] == [PLAN_FILE]
    plan = json.loads((output / PLAN_FILE).read_text())
    assert plan["data"]["images"] == 7
    assert plan["data"]["updates"] == 4
    assert sum(plan["data"]["buckets"].values()) == plan["data"]["images_with_repeats"] == 14
    assert plan["memory"]["device_peak"] == max(phase["device"] for phase in plan["memory"]["phases"])
    assert all(sum(phase["kinds"].values()) == phase["device"] for phase in plan["memory"]["phases"])
    assert plan["time"]["seconds_in_all"] == pytest.approx(4 * plan["time"]["seconds_per_update"])
    layers = {kind["name"].removeprefix("lora_unet_"): kind for kind in plan["adapted_layers"]}
    assert not any("mod" in name for name in layers)
    assert layers["double_blocks_*_img_attn_qkv"] == {
        "name": "lora_unet_double_blocks_*_img_attn_qkv",
        "layers": 2,
        "size": "lora_down.weight 4x64, lora_up.weight 192x4",
        "parameters": 2 * 4 * (64 + 192),
        "rate": 0.5,
    }
    assert layers["double_blocks_*_txt_mlp_2"]["size"] == "lora_down.weight 3x256, lora_up.weight 64x3"
    assert sum(kind["parameters"] for kind in layers.values()) == sum(group["num_parameters"] for group in plan["learning"])
    shown = capsys.readouterr().out
    for words in ("caching latents", "optimizer state", "updates", "in all", "adapted layers", str(output / PLAN_FILE)):
        assert words in shown


def unreadable(model: Path) -> None:
    """The header stays; every weight becomes NaN, so that nothing that read them could go on."""
    content = bytearray(model.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)
    model.write_bytes(content)


def test_plan_reads_no_weights(tmp_path: Path) -> None:
    """Caching latents with this VAE would end in an error."""
    workspace = runs.make_workspace(SHALLOW_CASES["sd"], tmp_path)
    for path in workspace.model.rglob("*.safetensors"):
        unreadable(path)
    workspace.train("network", tmp_path / "out", FROZEN_TEXT["network"], "--cache_latents", "--plan")
    assert (tmp_path / "out" / PLAN_FILE).is_file()


# ---- auto_fit --------------------------------------------------------------------------------------------------------------

ROOMY = "--auto_fit_memory=12GB"
LARGE_STEP = (
    "--cache_latents", "--cache_text_encoder_outputs", "--text_encoder_batch_size=1", "--t5xxl_max_token_length=256",
    "--network_train_unet_only", "--train_batch_size=3", "--auto_fit",
)  # fmt: skip
"""So that training takes more than caching."""


def in_gigabytes(num_bytes: float) -> str:
    return f"--auto_fit_memory={num_bytes / 2**30:.9f}GB"


def test_what_fits_is_left_as_it_is(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    run = workspaces["shallow sd"].prepared("network", tmp_path, *CACHED, FROZEN_TEXT["network"], "--auto_fit", ROOMY)
    assert fit_to_memory(run) == run.options


@pytest.fixture(scope="module")
def swapped_needs(workspaces: dict[str, Workspace], tmp_path_factory: pytest.TempPathFactory) -> tuple[int, ...]:
    """Of the deep model with one block swapped and with two, recomputing."""
    flags = (*LARGE_STEP, ROOMY, "--gradient_checkpointing")
    run = workspaces["deep"].prepared("network", tmp_path_factory.mktemp("needs"), *flags)
    division = run.family.swap_division(run.options)
    assert division is not None
    return tuple(needed(run, found) for found in forecasts(run, [division.plans(number) for number in (1, 2)]))


def test_checkpointing_comes_first_and_then_the_fewest_blocks(
    workspaces: dict[str, Workspace], swapped_needs: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = swapped_needs
    assert one > two
    limited = workspaces["deep"].prepared("network", tmp_path, *LARGE_STEP, in_gigabytes(two + 1))
    with caplog.at_level(logging.INFO):
        found = fit_to_memory(limited)
    assert (found.memory.gradient_checkpointing, found.family.blocks_to_swap) == (True, 2)
    tried = [message.split(":")[0] for message in caplog.messages if " MiB of " in message and "needs" not in message]
    assert tried == ["as asked", "--gradient_checkpointing", "--gradient_checkpointing --blocks_to_swap 2"]


def test_quantising_comes_last_and_is_named(
    workspaces: dict[str, Workspace], swapped_needs: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of more pictures a batch, what a quantised layer adds to the activations is more than its weights were."""
    flags = ["--gradient_checkpointing", "--blocks_to_swap=2", "--no-cpu_offload_checkpointing"]
    limit = in_gigabytes(swapped_needs[1] - 1)
    with caplog.at_level(logging.INFO):
        found = fit_to_memory(workspaces["deep"].prepared("network", tmp_path, *LARGE_STEP, *flags, limit))
    assert found.denoiser_scheme == "fp8"
    assert "WHAT IS LEARNED CHANGES" in caplog.text


def test_what_the_user_chose_stays_and_nothing_that_fits_is_an_error(workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    left = ["--no-gradient_checkpointing", "--blocks_to_swap=0", "--no-cpu_offload_checkpointing", "--no-quantize_base"]
    run = workspaces["flux"].prepared("network", tmp_path, *left, "--auto_fit", "--auto_fit_memory=1MB")
    with pytest.raises(UserError, match=r"nothing fits in 1 MiB\. The least is .* with the options as they are"):
        fit_to_memory(run)


def test_a_run_that_was_fitted_learns_what_its_flags_would_and_says_that_a_resumed_one_had_others(
    workspaces: dict[str, Workspace], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tuple(flag for flag in LARGE_STEP if flag != "--auto_fit")
    run = workspaces["flux"].prepared("network", tmp_path, *base, ROOMY, "--gradient_checkpointing")
    limit = needed(run, forecast(run)) + 1
    begun = workspaces["flux"].train("network", tmp_path / "begun", *base, "--max_train_steps=1", "--save_state")
    base = (*base, f"--resume={begun / 'tiny-state'}", "--max_train_steps=3")
    with caplog.at_level(logging.WARNING):
        fitted = workspaces["flux"].train("network", tmp_path / "fitted", *base, "--auto_fit", in_gigabytes(limit))
    assert "not the run that was saved: --gradient_checkpointing was False and is now True" in caplog.text
    named = workspaces["flux"].train("network", tmp_path / "named", *base, "--gradient_checkpointing")
    assert runs.losses(fitted) == runs.losses(named)
