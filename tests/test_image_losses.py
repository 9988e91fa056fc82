"""The running loss of each picture, and what watches a run."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest
import runs
import torch
from runs import SHALLOW_CASES, Workspace

from library import watchdog
from library.image_losses import ImageLoss, ImageLosses, SeenImages, merged, worst, write_table
from library.losses import image_means
from library.watchdog import DeviceMemory, Watchdog, spill_message


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(SHALLOW_CASES["sd"], tmp_path_factory.mktemp("sd"))


def test_a_bad_picture_stands_out_whatever_times_it_is_seen_at() -> None:
    table, rng = ImageLosses(1000.0), torch.Generator().manual_seed(0)
    for _ in range(300):
        times = torch.rand(4, generator=rng) * 1000
        losses = 1.001 - times / 1000  # early times are hard
        losses[2] *= 1.5
        table.push([SeenImages(("a", "b"), losses[:2], times[:2]), SeenImages(("bad", "c"), losses[2:], times[2:])])
    shown = worst(merged([table.state()["images"]]), 2)
    assert shown[0][0] == "bad" and shown[0][1].ratio == pytest.approx(1.35, abs=0.15)
    assert all(image.ratio == pytest.approx(0.9, abs=0.15) for name, image in table.images.items() if name != "bad")


def test_the_table_goes_on_where_it_was() -> None:
    parts, whole = ImageLosses(1.0), ImageLosses(1.0)
    for step in range(6):
        batch = SeenImages((f"picture {step % 3}",), torch.tensor([1.0 + step]), torch.tensor([step / 6]))
        if step == 3:
            saved, parts = parts.state(), ImageLosses(1.0)
            parts.restore([saved])
        parts.push([batch])
        whole.push([batch])
    assert parts.state() == whole.state()


def test_a_table_goes_on_though_there_are_not_as_many_processes() -> None:
    saved = [
        {"means": [0.5], "images": {"a": [4, 4.0, 2.0]}},
        {"means": [0.7], "images": {"a": [1, 2.0, 1.0], "b": [2, 3.0, 1.0]}},
    ]
    tables = [ImageLosses(1.0) for _ in range(3)]
    for rank, table in enumerate(tables):
        table.restore(saved, rank, len(tables))
    assert tables[0].images == {"a": ImageLoss(5, 6.0, 3.0), "b": ImageLoss(2, 3.0, 1.0)}
    assert not tables[1].images and not tables[2].images and {table.means[0] for table in tables} == {0.5}


def test_tables_of_processes_are_added_and_rarely_seen_pictures_do_not_lead(tmp_path: Path) -> None:
    images = merged([{"a": [4, 4.0, 2.0], "rare": [1, 9.0, 9.0]}, {"a": [4, 6.0, 2.0], "b": [8, 16.0, 8.0]}])
    assert images["a"] == ImageLoss(8, 10.0, 4.0)
    assert [name for name, _ in worst(images, 5)] == ["b", "a"]
    write_table(images, tmp_path / "t.csv")
    rows = list(csv.reader((tmp_path / "t.csv").open(newline="")))
    assert rows == [["file", "ratio", "loss", "seen"], ["rare", "9.0000", "9.000000", "1"], ["b", "2.0000", "1.000000", "8"],
                    ["a", "1.2500", "0.500000", "8"]]  # fmt: skip


def test_a_run_leaves_a_table_of_every_picture(workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output = workspace.train("network", tmp_path, "--max_train_epochs=1", "--gradient_accumulation_steps=2")
    rows = list(csv.DictReader((output / "image_losses.csv").open(newline="")))
    assert sorted(row["file"] for row in rows) == sorted(str(path) for path in workspace.images.rglob("*.png"))
    assert {row["seen"] for row in rows} == {"2"}
    assert rows[0]["file"] in caplog.text


def test_masked_means_can_be_over_what_the_mask_leaves() -> None:
    error = torch.full((2, 1, 2, 2), 3.0)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    assert image_means(error, mask).tolist() == [0.75, 0.0]
    assert image_means(error, mask, by_mask=True).tolist() == [3.0, 0.0]


def test_a_run_that_becomes_slow_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    dog = Watchdog(torch.device("cpu"))
    dog.pause()
    for lap in range(3 * watchdog.WINDOW):
        clock[0] += 1.0 if lap < watchdog.WINDOW else 2.0
        logs = dog.lap(8)
        clock[0] += 60.0  # a save
        dog.pause()
    assert 0.1 < logs.pop("memory/peak_gib") < 100
    assert logs == {"speed/steps_per_second": 0.5, "speed/images_per_second": 4.0}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "updates take 2.00 s now and took 1.00 s before" in caplog.text


GIB = 2**30


@pytest.mark.parametrize(
    ("reserved", "free", "spilled"),
    [(20.0, 3.5, 0), (23.7, 0.0, 0), (26.0, 0.1, 2.1), (24.0, 0.5, 0.5), (0.0, 24.0, 0)],
)
def test_memory_has_spilled_where_torch_holds_more_than_is_in_use(reserved: float, free: float, spilled: float) -> None:
    """Of a GPU of 24 GiB."""
    memory = DeviceMemory(int(reserved * GIB), int(free * GIB), 24 * GIB, 0)
    assert memory.spilled == pytest.approx(spilled * GIB, abs=2)
    message = spill_message(memory)
    assert (message is not None) == (spilled > 0)
    if message is not None:
        assert f"{spilled} GiB at least" in message
        assert "--blocks_to_swap" in message


def test_a_spill_is_told_once_as_soon_as_it_is_seen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: 0.0)
    readings = iter([DeviceMemory(20 * GIB, 2 * GIB, 24 * GIB, 0), *[DeviceMemory(30 * GIB, 0, 24 * GIB, 1)] * 2])
    dog = Watchdog(torch.device("cpu"), lambda: next(readings))
    for _ in range(watchdog.FIRST_LOOK + watchdog.WINDOW - 1):
        dog.lap(1)
    assert not caplog.records
    for _ in range(watchdog.WINDOW + 1):
        dog.lap(1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "spilled into main memory, 6.0 GiB at least" in caplog.text


def test_code_that_is_compiled_again_late_in_a_run_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo import utils

    stats = utils.counters["stats"]
    monkeypatch.setitem(stats, "unique_graphs", 3)
    dog = Watchdog(torch.device("cpu"))
    for _ in range(watchdog.SETTLED):
        stats["unique_graphs"] += 1  # a graph for each bucket, at first
        dog.lap(1)
    dog.lap(1)
    assert not caplog.records
    for _ in range(2):
        stats["unique_graphs"] += 1
        dog.lap(1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"compiled again after {watchdog.SETTLED + 2} updates" in caplog.text
