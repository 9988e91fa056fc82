"""What the loop holds in memory, in which order a model is prepared, and what it makes of the world around it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import runs
import torch
from runs import SHALLOW_CASES, Workspace
from safetensors.torch import load_file

from library import interrupts, run_requests, trainable
from library.errors import Interrupted, UserError
from library.interrupts import InterruptFlag
from library.run_writer import RunWriter
from library.train_util import Trainer

CACHED = ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(SHALLOW_CASES["sd"], tmp_path_factory.mktemp("trainer"))


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text("a thing --w 64 --h 64 --s 1\n")
    return [f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=1"]


def test_frozen_parts_leave_the_device_once_everything_they_give_is_cached(workspace: Workspace, tmp_path: Path) -> None:
    bundle = workspace.trainer("network", tmp_path, *CACHED).bundle
    assert [name for name in ("denoiser", "vae", "text_encoder") if bundle.loaded(name)] == ["denoiser"]
    bundle = workspace.trainer("network", tmp_path, "--cache_latents").bundle
    assert bundle.loaded("text_encoder"), "it learns"


def test_previews_of_a_cached_run_leave_nothing_behind(workspace: Workspace, tmp_path: Path, prompts: list[str]) -> None:
    from library.run_writer import RunWriter

    trainer = workspace.trainer("network", tmp_path / "out", *CACHED, *prompts, "--max_train_steps=2")
    assert not trainer.bundle.loaded("text_encoder"), "the prompts were encoded while it was there"
    trainer.fit(RunWriter(trainer))
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 2
    assert not trainer.bundle.loaded("vae")
    assert not trainer.bundle.loaded("text_encoder")


def context(trainer: Trainer) -> torch.Tensor:
    return trainer.conditioning(trainer.data.train[(0, 0)]).tensors()["context"]


def test_base_weights_are_in_the_cached_captions(workspace: Workspace, tmp_path: Path) -> None:
    """Merged first, encoded then; and what another run cached of the unmerged text encoder is not used."""
    learned = workspace.train("network", tmp_path / "base", "--max_train_steps=2", "--learning_rate=1")
    disk = ["--cache_text_encoder_outputs_to_disk", f"--cache_dir={tmp_path / 'cache'}", "--network_train_unet_only"]
    unmerged = context(workspace.trainer("network", tmp_path / "plain", *disk))
    base = f"--base_weights={learned / 'tiny.safetensors'}"
    cached = workspace.trainer("network", tmp_path / "cached", *disk, base)
    live = workspace.trainer("network", tmp_path / "live", "--network_train_unet_only", base)
    torch.testing.assert_close(context(cached), context(live), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(context(cached), unmerged, rtol=1e-2, atol=1e-2)
    weights = {name: value.clone() for name, value in cached.bundle.part("text_encoder").state_dict().items()}
    cached.bundle.release("text_encoder")
    runs.assert_same_tensors(dict(cached.bundle.part("text_encoder").state_dict()), weights)


def test_an_accumulation_count_of_the_launcher_changes_nothing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = workspace.train("network", tmp_path / "plain", "--max_train_steps=2", "--optimizer_type=SGD")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    counted = workspace.train("network", tmp_path / "counted", "--max_train_steps=2", "--optimizer_type=SGD")
    assert runs.losses(plain) == runs.losses(counted)


def test_the_reference_stays_the_frozen_model_whatever_a_batch_multiplies(workspace: Workspace, tmp_path: Path) -> None:
    trainer = workspace.trainer("network", tmp_path)
    for parameter in trainer.parameters:
        torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = trainer.data.train[(0, 0)]
    with torch.no_grad():
        with trainer.trainable.reference():
            frozen = trainer.loss(batch)
        adapted = trainer.loss(batch)
        trainer.trainable.network.detach()  # type: ignore[attr-defined]
        assert torch.equal(trainer.loss(batch), frozen)
    assert not torch.allclose(adapted, frozen, rtol=1e-3)


def test_gradient_checkpointing_reaches_a_frozen_denoiser_that_gradients_pass_through(
    workspace: Workspace, tmp_path: Path
) -> None:
    trainer = workspace.trainer("network", tmp_path, "--network_train_text_encoder_only", "--gradient_checkpointing")
    trainer.trainable.train()
    assert trainer.bundle.denoiser.training
    trainer.trainable.train(False)
    assert not trainer.bundle.denoiser.training


def test_the_size_of_adapters_is_logged_now_and_then(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainable, "KEY_NORMS_EVERY", 2)
    output = workspace.train("network", tmp_path, "--max_train_steps=4", "--network_train_unet_only")
    means, most = (runs.rows(output, f"norm/{name}_key_norm") for name in ("avg", "max"))
    assert len(means) == len(most) == 2 and 0 < means[0] < means[1]
    network = load_file(output / "tiny.safetensors")
    layers = {name.removesuffix(".alpha") for name in network if name.endswith(".alpha")}
    norms = [
        float((network[f"{layer}.lora_up.weight"].flatten(1) @ network[f"{layer}.lora_down.weight"].flatten(1)).norm())
        * float(network[f"{layer}.alpha"]) / len(network[f"{layer}.lora_down.weight"])
        for layer in layers
    ]  # fmt: skip
    assert most[-1] == pytest.approx(max(norms), rel=1e-4)
    assert means[-1] == pytest.approx(sum(norms) / len(norms), rel=1e-4)


def test_two_signals_at_once_are_one_request_and_a_later_one_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes on what the terminal gave to its processes already."""
    monkeypatch.setattr(interrupts, "SAME_REQUEST_SECONDS", 0.05)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
    with pytest.raises(KeyboardInterrupt), InterruptFlag() as flag:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.requested
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(200):  # on a busy machine it may be a while until it arrives
            time.sleep(0.1)
        pytest.fail("the third signal did nothing")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_files_in_the_output_folder_ask_a_running_run(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each acts once, after the step that saw it; what lay there before the start does nothing."""
    monkeypatch.setattr(run_requests, "SECONDS_BETWEEN_LOOKS", 0.0)
    (tmp_path / "stop").touch()
    trainer = workspace.trainer("network", tmp_path)
    take = trainer.trainable.before_step

    def before_step(step: int) -> None:
        if step in (1, 2):
            (tmp_path / {1: "save_now", 2: "stop"}[step]).touch()
        take(step)

    trainer.trainable.before_step = before_step  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="stopped after step 3"):
        trainer.fit(RunWriter(trainer))
    saved = {path.name for path in tmp_path.iterdir()}
    states = {"tiny-step00000002-state", "tiny-step00000003-state"}
    assert saved == states | {"tiny-step00000002.safetensors", "metrics.csv", "image_losses.csv"}


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_would_share_out_the_weights_is_refused(
    kind: str, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU accelerate itself would train in plain processes."""
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(UserError, match=f"the launch asks for {kind}.*--shard_weights"):
        workspace.prepared("network", tmp_path)
