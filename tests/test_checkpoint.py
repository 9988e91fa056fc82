"""Atomic writes, what is kept, and states to resume from."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.checkpoint import (
    CheckpointPolicy,
    CheckpointWriter,
    atomic_write,
    check_output,
    settle_leftovers,
)
from library.errors import UserError
from library.optimizers import ParamGroup, create_optimizer
from library.option_groups import (
    NetworkTrainOptions,
    OptimizerOptions,
    OutputOptions,
    SamplingOptions,
    ScheduleOptions,
    StateOptions,
    TrainingOptions,
)
from library.saved_state import changed_options, load_state, newest_state, result_options, save_state
from library.schedulers import create_scheduler


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- atomic writes ---------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    target = tmp_path / "new folder" / "model.safetensors"
    for value in (1.0, 2.0):
        atomic_write(target, lambda path, value=value: save_file({"a": torch.tensor([value])}, path))
    assert load_file(target)["a"].item() == 2.0
    assert names(target.parent) == ["model.safetensors"]


def test_a_folder_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    def write(path: Path, name: str) -> None:
        path.mkdir()
        (path / name).write_text(name)

    for name in ("first", "second"):
        atomic_write(tmp_path / "state", lambda path, name=name: write(path, name))
    assert names(tmp_path) == ["state"]
    assert names(tmp_path / "state") == ["second"]


def test_what_a_killed_run_left_is_removed_an_hour_later_and_what_it_was_replacing_is_put_back(tmp_path):
    (tmp_path / "tiny-2-state").mkdir()
    left = [".tmp-7-tiny-1-state", ".old-7-tiny-2-state", ".old-7-tiny-3-state"]
    for name in [*left, ".tmp-7-tiny-4-state", ".tmp-7-others-state", "tiny-5-state"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").write_text(name)
        for path in (tmp_path / name / "optimizer.pt", tmp_path / name):
            os.utime(path, (time.time() - 7200,) * 2)
    os.utime(tmp_path / ".tmp-7-tiny-4-state" / "optimizer.pt")  # it is being written
    settle_leftovers(tmp_path, "tiny")
    kept = [".tmp-7-others-state", ".tmp-7-tiny-4-state", "tiny-2-state", "tiny-3-state", "tiny-5-state"]
    assert names(tmp_path) == kept
    assert (tmp_path / "tiny-3-state" / "optimizer.pt").read_text() == ".old-7-tiny-3-state"


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_failed_write_leaves_the_old_one_and_no_temporary_file(tmp_path, is_folder):
    target = tmp_path / "x.bin"
    atomic_write(target, lambda path: path.write_text("old"))

    def fail(path: Path) -> None:
        if is_folder:
            path.mkdir()
            path = path / "part"
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, fail)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x.bin"]


def test_the_temporary_name_has_the_suffix_of_the_target(tmp_path):
    seen = []
    atomic_write(tmp_path / "a.ckpt", lambda path: seen.append(path.suffix) or path.write_text(""))
    assert seen == [".ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("writer", ["python", "safetensors", "torch"])
def test_a_full_disk_says_where_how_much_is_free_and_that_nothing_is_lost(tmp_path, writer):
    target = tmp_path / "model.safetensors"
    target.write_text("old")
    big = {"a": torch.zeros(100_000)}

    def write(path: Path) -> None:
        with open("/dev/full", "wb") as full:
            if writer == "safetensors":
                from safetensors.torch import save

                full.write(save(big))
            elif writer == "torch":
                torch.save(big, full)
            else:
                full.write(b"0" * 100_000)

    with pytest.raises(UserError, match=r"no space left while writing .*model.*[\d,]+ bytes are free. Nothing was overwritten"):
        atomic_write(target, write)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["model.safetensors"]


def test_the_library_error_of_a_full_disk_is_recognised(tmp_path):
    from safetensors import SafetensorError

    def write(path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match="no space left"):
        atomic_write(tmp_path / "a", write)


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    def write(path: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    with pytest.raises(OSError, match="Permission denied"):
        atomic_write(tmp_path / "a", write)


def test_the_output_folder_is_made_and_tried(tmp_path):
    assert check_output(str(tmp_path / "a" / "b")).is_dir()
    assert names(tmp_path / "a" / "b") == []
    with pytest.raises(UserError, match="--output_dir is missing"):
        check_output(None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        check_output(str(tmp_path / "file"))


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="nothing is read-only for this user")
def test_a_read_only_output_folder_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot be written to"):
            check_output(str(tmp_path))
    finally:
        tmp_path.chmod(0o700)


# ---- what is saved when ------------------------------------------------------------------------------------------------


def policy(num_epochs: int = 10, state: StateOptions | None = None, **output: object) -> CheckpointPolicy:
    return CheckpointPolicy.of(OutputOptions(**output), state or StateOptions(), num_epochs)  # type: ignore[arg-type]


def test_file_names_are_those_of_sd_scripts():
    named, unnamed = policy(output_name="cat"), policy()
    assert (named.epoch_name(3), named.step_name(1200), named.last_name) == ("cat-000003", "cat-step00001200", "cat")
    assert (unnamed.epoch_name(3), unnamed.step_name(1200), unnamed.last_name) == ("epoch-000003", "at-step00001200", "last")


def test_epochs_are_saved_every_n_but_the_last_only_as_the_final_file():
    every = policy(save_every_n_epochs=2)
    assert [epoch for epoch in range(11) if every.due_at_epoch(epoch)] == [2, 4, 6, 8]
    assert not any(policy().due_at_epoch(epoch) for epoch in range(11))


def test_a_ratio_means_at_least_so_many_files():
    assert policy(10, save_n_epoch_ratio=3).every_n_epochs == 3
    assert policy(2, save_n_epoch_ratio=5).every_n_epochs == 1
    assert policy(10, save_n_epoch_ratio=5, save_every_n_epochs=7).every_n_epochs == 2


def test_steps_are_saved_every_n_the_last_included():
    every = policy(save_every_n_steps=5)
    assert [step for step in range(11) if every.due_at_step(step)] == [5, 10]
    assert not policy().due_at_step(5)


def test_epochs_beyond_the_last_n_are_stale():
    kept = policy(save_every_n_epochs=2, save_last_n_epochs=2, output_name="cat")
    assert [kept.stale_at_epoch(epoch) for epoch in (2, 4, 6, 8)] == [None, None, "cat-000002", "cat-000004"]
    assert kept.stale_at_epoch(6, state=True) == "cat-000002"
    longer = policy(save_every_n_epochs=2, save_last_n_epochs=1, save_last_n_epochs_state=3)
    assert (longer.stale_at_epoch(8), longer.stale_at_epoch(8, state=True)) == ("epoch-000006", "epoch-000002")
    assert policy(save_every_n_epochs=2).stale_at_epoch(8) is None


def test_files_of_the_last_n_steps_are_kept():
    kept = policy(save_every_n_steps=10, save_last_n_steps=30)
    # at step 50 the last 30 steps begin at 20: 10 goes
    assert [kept.stale_at_step(step) for step in (10, 40, 50, 60)] == [None, None, "at-step00000010", "at-step00000020"]
    uneven = policy(save_every_n_steps=10, save_last_n_steps=25)
    assert uneven.stale_at_step(50) == "at-step00000020"
    states = policy(save_every_n_steps=10, save_last_n_steps=10, save_last_n_steps_state=20)
    assert (states.stale_at_step(50), states.stale_at_step(50, state=True)) == ("at-step00000030", "at-step00000020")


def test_a_state_goes_with_each_model_or_only_with_the_last():
    both = policy(state=StateOptions(save_state=True))
    last = policy(state=StateOptions(save_state_on_train_end=True))
    assert (both.save_state, both.save_state_at_end, last.save_state, last.save_state_at_end) == (True, True, False, True)


@pytest.mark.parametrize("is_folder", [False, True])
def test_the_writer_keeps_exactly_the_last_files(tmp_path, is_folder):
    kept = policy(save_every_n_steps=1, save_last_n_steps=2, output_name="cat")
    writer = CheckpointWriter(tmp_path, kept, "" if is_folder else ".safetensors")
    for step in range(1, 7):
        writer.save_model(kept.step_name(step), lambda path: path.mkdir() if is_folder else path.write_text(""))
        (tmp_path / f"{kept.step_name(step)}-state").mkdir()
        writer.prune(step=step)
        writer.prune(step=step, state=True)
    assert [name for name in names(tmp_path) if "state" not in name] == [
        f"cat-step0000000{step}{writer.suffix}" for step in (4, 5, 6)
    ]
    assert [name for name in names(tmp_path) if "state" in name] == [f"cat-step0000000{step}-state" for step in (4, 5, 6)]


# ---- states ------------------------------------------------------------------------------------------------------------


def trained(kind: str = "AdamW") -> tuple[nn.Linear, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = create_optimizer(OptimizerOptions(optimizer_type=kind), [ParamGroup("unet", list(model.parameters()), 0.1)])
    scheduler = create_scheduler(ScheduleOptions(lr_scheduler="cosine"), optimizer, 10)
    for _ in range(3):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer, scheduler


def write_state(folder: Path, **changes: object) -> None:
    model, optimizer, scheduler = trained()
    parts = {
        "trainable": model.state_dict(),
        "averages": {},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": None,
        "train_state": {"step": 3, "epoch": 1, "position": 2, "seed": 7},
    }
    save_state(folder, **{**parts, **changes})  # type: ignore[arg-type]


def test_a_state_comes_back_bit_for_bit(tmp_path):
    model, optimizer, scheduler = trained()
    write_state(tmp_path / "cat-state")
    saved = load_state(tmp_path / "cat-state")
    assert saved.trainable.keys() == model.state_dict().keys()
    assert all(torch.equal(saved.trainable[name], tensor) for name, tensor in model.state_dict().items())
    assert saved.optimizer["state"][0].keys() == optimizer.state_dict()["state"][0].keys()
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(saved.optimizer["state"][index][name], value) for name, value in entry.items())
    assert saved.optimizer["param_groups"] == optimizer.state_dict()["param_groups"]
    assert saved.scheduler["last_epoch"] == scheduler.state_dict()["last_epoch"] == 3
    assert saved.scaler is None
    assert {key: saved.train_state[key] for key in ("step", "epoch", "position", "seed")} == {
        "step": 3, "epoch": 1, "position": 2, "seed": 7,
    }  # fmt: skip


def test_the_record_has_sd_scripts_names_for_step_and_epoch_too(tmp_path):
    write_state(tmp_path / "s")
    record = json.loads((tmp_path / "s" / "train_state.json").read_text())
    assert (record["current_epoch"], record["current_step"]) == (1, 3)


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    write_state(tmp_path / "s", trainable={"a": whole, "b": whole, "c": whole[1:], "d": whole.t()})
    saved = load_state(tmp_path / "s").trainable
    assert torch.equal(saved["b"], whole) and torch.equal(saved["c"], whole[1:]) and torch.equal(saved["d"], whole.t())


def test_a_value_that_could_not_be_read_safely_is_refused_when_saving(tmp_path):
    with pytest.raises(UserError, match=r"keeps a builtins.object in state\['optimizer'\]\['x'\]\[0\]"):
        write_state(tmp_path / "s", optimizer={"x": [object()]})
    assert names(tmp_path) == []


def test_reading_a_state_runs_no_code_in_it(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("echo run > ran",)

    write_state(tmp_path / "s")
    torch.save({"optimizer": Evil()}, tmp_path / "s" / "optimizer.pt")
    manifest = tmp_path / "s" / "manifest.json"
    manifest.write_text("{}")  # whoever wrote the one could write the other
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_state(tmp_path / "s")
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "train_state.json", "manifest.json"])
def test_a_half_written_or_missing_part_is_named(tmp_path, name):
    write_state(tmp_path / "s")
    file = tmp_path / "s" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        load_state(tmp_path / "s")
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_state(tmp_path / "s")


def test_one_flipped_bit_is_found(tmp_path):
    write_state(tmp_path / "s")
    file = tmp_path / "s" / "trainable.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="trainable.safetensors is damaged: it is not what was saved"):
        load_state(tmp_path / "s")


def test_the_newest_whole_state_is_found_and_others_are_named(tmp_path, caplog):
    for step, stem in ((3, "cat-000001"), (9, "cat"), (6, "cat-step00000006"), (99, "dog-000002")):
        write_state(tmp_path / f"{stem}-state", train_state={"step": step, "epoch": 1})
    assert newest_state(tmp_path, "cat") == tmp_path / "cat-state"
    (tmp_path / "cat-state" / "optimizer.pt").write_bytes(b"cut")
    assert newest_state(tmp_path, "cat") == tmp_path / "cat-step00000006-state"
    assert "passes over" in caplog.text and "optimizer.pt is damaged" in caplog.text
    assert newest_state(tmp_path, "bird") is None


def test_the_newest_state_is_of_the_run_that_saved_last_however_far_another_one_got(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for order, (run, step) in enumerate([("old", 50), ("new", 10), ("new", 20), ("old", 100)]):
        path = tmp_path / f"cat-step{step:08d}-state"
        write_state(path, train_state={"step": step, "epoch": 1, "run": run})
        os.utime(path, (0, 1000 - 500 * (run == "old") - order))  # a clock that goes backwards says nothing within a run
    assert newest_state(tmp_path, "cat") == tmp_path / "cat-step00000020-state"
    assert "cat-step00000050-state is further, but of an earlier run" in caplog.text


def test_a_missing_folder_lists_the_states_beside_it(tmp_path):
    write_state(tmp_path / "cat-000002-state")
    with pytest.raises(UserError, match="no such folder. There are: cat-000002-state"):
        load_state(tmp_path / "cat-000003-state")


def test_a_state_of_sd_scripts_says_how_to_go_on_instead(tmp_path):
    folder = tmp_path / "cat-state"
    folder.mkdir()
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "model.safetensors"):
        (folder / name).write_bytes(b"")
    (folder / "train_state.json").write_text('{"current_epoch": 1, "current_step": 10}')
    with pytest.raises(
        UserError, match="written by sd-scripts or accelerate after step 10.*--network_weights.*--initial_step 10"
    ):
        load_state(folder)
    (folder / "train_state.json").unlink()
    with pytest.raises(UserError, match="--initial_step N"):
        load_state(folder)


def test_a_state_of_another_format_says_both_versions(tmp_path):
    write_state(tmp_path / "s")
    record = tmp_path / "s" / "train_state.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99, and this program reads 2"):
        load_state(tmp_path / "s")


def test_options_that_change_the_result_are_told_apart_from_those_that_do_not():
    before = NetworkTrainOptions(training=TrainingOptions(seed=1), output=OutputOptions(output_dir="a"))
    same = NetworkTrainOptions(
        training=TrainingOptions(seed=1), output=OutputOptions(output_dir="b"), sampling=SamplingOptions(sample_at_first=True)
    )
    other = NetworkTrainOptions(training=TrainingOptions(seed=2))
    saved = json.loads(json.dumps({"options": result_options(before)}))
    assert changed_options(saved, same) == {}
    assert list(changed_options(saved, other).values()) == ["--seed was 1 and is now 2"]


def test_a_state_can_replace_one_of_the_same_name(tmp_path):
    write_state(tmp_path / "s")
    write_state(tmp_path / "s", train_state={"step": 9, "epoch": 2})
    assert load_state(tmp_path / "s").train_state["step"] == 9
    assert names(tmp_path) == ["s"]
    shutil.rmtree(tmp_path / "s")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_saved_files_have_the_permissions_of_any_new_file(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "usual").write_text("")
    atomic_write(tmp_path / "saved.safetensors", lambda path: save_file({"a": torch.zeros(1)}, path))
    assert (tmp_path / "saved.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode
