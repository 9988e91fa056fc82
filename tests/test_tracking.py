"""Logs: what is written where, under which names, and how a resumed run goes on."""

from __future__ import annotations

import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.option_groups import DreamBoothOptions, FineTuneOptions, LoggingOptions, NetworkTrainOptions
from library.options import from_flags
from library.tracking import (
    LossLog,
    MetricsFile,
    MovingAverage,
    Row,
    Tracker,
    check_trackers,
    read_metrics,
)


def tracker(folder: Path, options: LoggingOptions | None = None, **changes: object) -> Tracker:
    return Tracker(options or LoggingOptions(), folder, total_steps=6, steps_per_epoch=3, **changes)  # type: ignore[arg-type]


def logs(step: int) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(float(step)), "max_norm/keys_scaled": torch.tensor(2)}


def run(target: Tracker, steps: range) -> None:
    """Losses 1, 2, 3, ... as the loop logs them, three updates an epoch."""
    for step in steps:
        target.push(step, step // 3, logs(step), {"unet": 0.5})
        if step % 3 == 0:
            target.end_epoch(step, step // 3)
    target.close()


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_metrics(folder / "metrics.csv") if name in row]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_on_the_cpu_a_row_comes_back_at_once():
    log = LossLog()
    rows = log.push(3, 1, {"loss": torch.tensor(0.25, requires_grad=True), "lr/unet": 0.1})
    assert rows == [Row(3, 1, {"loss": 0.25, "lr/unet": 0.1})]
    assert log.flush() == []


@pytest.mark.gpu
def test_on_a_gpu_a_row_comes_back_one_step_later():
    log = LossLog()
    assert log.push(1, 0, {"loss": torch.tensor(0.25, device="cuda"), "lr/unet": 0.1}) == []
    assert log.push(2, 0, {"loss": torch.tensor(0.5, device="cuda")}) == [Row(1, 0, {"loss": 0.25, "lr/unet": 0.1})]
    assert log.flush() == [Row(2, 0, {"loss": 0.5})]


def test_the_average_is_over_one_epochs_worth_of_steps_and_bounded():
    average = MovingAverage(3)
    assert math.isnan(average.mean)
    assert [average.add(value) for value in (1.0, 2.0, 3.0, 4.0)] == [1.0, 1.5, 2.0, 3.0]
    assert MovingAverage(10**9).values.maxlen == 10_000


def test_the_average_does_not_depend_on_what_left_it():
    long = MovingAverage(3)
    for value in (1e16, 0.1, 0.2, 0.3):
        long.add(value)
    short = MovingAverage(3)
    for value in (0.1, 0.2, 0.3):
        short.add(value)
    assert long.mean == short.mean


# ---- metrics.csv -----------------------------------------------------------------------------------------------------


def timeless(folder):
    """All rows without the time they were written."""
    return [{name: value for name, value in row.items() if name != "time"} for row in read_metrics(folder / "metrics.csv")]


def test_rows_have_sd_scripts_tags_and_exact_values(tmp_path):
    run(tracker(tmp_path), range(1, 7))
    rows = read_metrics(tmp_path / "metrics.csv")
    assert abs(float(rows[0].pop("time")) - time.time()) < 60
    assert rows[0] == {
        "step": "1", "epoch": "0", "loss/current": "1.0", "loss/average": "1.0", "max_norm/keys_scaled": "2.0",
        "lr/unet": "0.5",
    }  # fmt: skip
    assert column(tmp_path, "loss/current") == [1, 2, 3, 4, 5, 6]
    assert column(tmp_path, "loss/average") == [1, 1.5, 2, 3, 4, 5]
    assert column(tmp_path, "loss/epoch_average") == [2, 5]


def test_numbers_are_written_so_that_they_read_back_equal(tmp_path):
    target = tracker(tmp_path)
    value = torch.tensor(0.1) * 3
    target.push(1, 0, {"loss": value}, {"unet": 1e-4 / 3})
    target.close()
    assert column(tmp_path, "loss/current") == [value.item()]
    assert column(tmp_path, "lr/unet") == [1e-4 / 3]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    target = tracker(tmp_path)
    target.push(1, 0, {"loss": torch.tensor(1.0)}, {})
    assert column(tmp_path, "loss/current") == [1.0]
    target.close()


def test_a_new_name_adds_a_column_and_keeps_what_was_there(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv", resume_step=None)
    file.add(Row(1, 0, {"loss/current": 1.0}))
    file.add(Row(2, 0, {"loss/current": 2.0, "new": 7.0}))
    file.add(Row(3, 0, {"loss/current": 3.0}))
    assert column(tmp_path, "loss/current") == [1, 2, 3]
    assert column(tmp_path, "new") == [7]


def test_a_resumed_run_goes_on_where_its_state_was_and_equals_one_that_was_not_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tracker(whole), range(1, 7))
    first = tracker(parts)
    for step in range(1, 5):
        first.push(step, step // 3, logs(step), {"unet": 0.5})
        if step == 3:
            first.end_epoch(3, 1)
        if step == 4:
            kept = first.losses()
    first.push(5, 1, {"loss": torch.tensor(99.0)}, {"unet": 0.5})  # after the state was saved: made again
    first.close()
    with (parts / "metrics.csv").open("a") as file:
        file.write("6,1,7")  # cut short by a crash
    run(tracker(parts, resume_step=4, recent_losses=kept), range(5, 7))
    assert timeless(parts) == timeless(whole)


def test_rows_wait_while_another_program_has_the_file_open(tmp_path, monkeypatch, caplog):
    """On Windows a spreadsheet program keeps everybody else from writing."""
    file = MetricsFile(tmp_path / "metrics.csv", resume_step=None)
    file.add(Row(1, 0, {"loss/current": 1.0}))
    really_open = Path.open

    def locked(path: Path, mode: str = "r", *args, **kwargs):
        if mode != "r" and path == tmp_path / "metrics.csv":
            raise PermissionError(13, "in use", str(path))
        return really_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", locked)
    for step in (2, 3):
        file.add(Row(step, 0, {"loss/current": float(step)}))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == ["1"]
    monkeypatch.undo()
    file.add(Row(4, 0, {"loss/current": 4.0}))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == ["1", "2", "3", "4"]
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


def test_a_new_run_sets_the_metrics_of_an_earlier_one_aside(tmp_path):
    run(tracker(tmp_path), range(1, 4))
    run(tracker(tmp_path), range(1, 2))
    assert column(tmp_path, "loss/current") == [1.0]
    (old,) = tmp_path.glob("metrics-*.csv")
    assert len(read_metrics(old)) == 4


def test_other_processes_write_nothing(tmp_path):
    run(tracker(tmp_path, enabled=False), range(1, 4))
    assert list(tmp_path.iterdir()) == []


# ---- trackers --------------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_same_rows_as_the_file(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = LoggingOptions(logging_dir=str(tmp_path / "logs"), log_prefix="cat_", log_config=True)
    run(tracker(tmp_path, options, config={"training.seed": "1"}), range(1, 7))
    (folder,) = (tmp_path / "logs").iterdir()
    assert re.fullmatch(r"cat_\d{14}", folder.name)
    (run_folder,) = folder.iterdir()
    assert run_folder.name == "network_train"
    events = EventAccumulator(str(run_folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/current", "loss/average", "loss/epoch_average", "max_norm/keys_scaled", "lr/unet",
    }  # fmt: skip
    for name in ("loss/current", "loss/average", "lr/unet"):
        assert [event.value for event in events.Scalars(name)] == column(tmp_path, name)
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4, 5, 6]
    assert [(event.step, event.value) for event in events.Scalars("loss/epoch_average")] == [(1, 2.0), (2, 5.0)]


def test_tensorboard_shows_previews_by_prompt_and_step(tmp_path):
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    target = tracker(tmp_path, LoggingOptions(logging_dir=str(tmp_path / "logs")))
    for step, color in ((2, "red"), (4, "blue")):
        Image.new("RGB", (6, 4), color).save(tmp_path / f"{step}.png")
        target.show_pictures(step, {"sample_0": tmp_path / f"{step}.png"})
    target.close()
    (file,) = (tmp_path / "logs").rglob("events.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    shown = events.Images("sample_0")
    assert [(event.step, event.width, event.height) for event in shown] == [(2, 6, 4), (4, 6, 4)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (LoggingOptions(), []),
        (LoggingOptions(logging_dir="logs"), ["tensorboard"]),
        (LoggingOptions(logging_dir="logs", log_with="tensorboard"), ["tensorboard"]),
    ],
)
def test_a_logging_folder_turns_tensorboard_on(options, expected):
    assert check_trackers(options) == expected


def test_a_tracker_that_cannot_work_is_an_error():
    with pytest.raises(UserError, match="needs --logging_dir"):
        check_trackers(LoggingOptions(log_with="tensorboard"))
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install wandb"):
            check_trackers(LoggingOptions(log_with="wandb"))


def test_a_tracker_that_is_there_and_broken_says_what_it_misses(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="wandb is installed but cannot be imported: .*a_package_that_nobody_has"):
        check_trackers(LoggingOptions(log_with="wandb"))


def test_rates_that_are_named_already_keep_their_name_and_unknown_ones_are_left_out(tmp_path):
    target = tracker(tmp_path)
    target.push(1, 0, {"loss": 1.0}, {"lr/unet": 0.1, "lr/d*lr/unet": 0.05, "te": None})
    target.close()
    assert set(read_metrics(tmp_path / "metrics.csv")[0]) == {
        "step", "epoch", "time", "loss/current", "loss/average", "lr/unet", "lr/d*lr/unet",
    }  # fmt: skip


def test_the_progress_bar_shows_loss_and_rate_and_reaches_the_end(tmp_path, capsys):
    run(tracker(tmp_path), range(1, 7))
    shown = capsys.readouterr().err
    assert "6/6" in shown and "avr_loss=" in shown and "lr=5.00e-01" in shown


def test_the_time_left_is_logged(tmp_path):
    target = tracker(tmp_path)
    for step in range(4, 7):
        time.sleep(0.12)  # the bar takes a rate at most every tenth of a second
        target.push(step, 1, logs(step), {})
    target.close()
    one_left, none_left = column(tmp_path, "speed/minutes_left")
    assert none_left == 0 and 0.001 < one_left < 0.1


def test_runs_are_logged_under_sd_scripts_names() -> None:
    named = {NetworkTrainOptions: "network_train", DreamBoothOptions: "dreambooth", FineTuneOptions: "finetuning"}
    assert {container: from_flags(container).log_name for container in named} == named
