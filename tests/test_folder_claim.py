"""Two runs and one output folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import runs
from runs import SHALLOW_CASES

from library.errors import UserError
from library.folder_claim import claimed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@contextmanager
def another_run(folder: Path, name: str) -> Iterator[None]:
    """A process that has claimed `folder`, killed at the end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with claimed(folder, name):
            os.write(writing, b"x")
            os.read(os.pipe()[0], 1)  # for ever
        os._exit(0)
    assert os.read(reading, 1) == b"x"
    try:
        yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_of_two_runs_the_second_has_logs_of_its_own_and_none_has_the_files_of_the_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = runs.make_workspace(SHALLOW_CASES["sd"], tmp_path)
    output = tmp_path / "out"
    output.mkdir()
    (output / "metrics.csv").write_text("of the other run")
    with another_run(output, "other"):
        with pytest.raises(UserError, match="another run called other is writing"), claimed(output, "other"):
            pass
        workspace.train("network", output, "--max_train_steps=2", "--save_state_on_train_end")
    assert "another run (other) is writing to" in caplog.text
    assert (output / "metrics.csv").read_text() == "of the other run"
    assert {path.name for path in output.iterdir() if not path.is_dir()} == {
        ".other.running", "metrics.csv", "tiny-metrics.csv", "tiny-image_losses.csv", "tiny.safetensors",
    }  # fmt: skip
    workspace.train("network", output, "--max_train_steps=3", "--resume=auto")
    assert (output / "tiny-metrics.csv").read_text().count("\n") == 4
    assert (output / "metrics.csv").read_text() == "of the other run"
    assert not list(output.glob(".*"))  # a killed run holds nobody up


def test_a_run_alone_is_told_so(tmp_path: Path) -> None:
    (tmp_path / ".killed.running").touch()
    with claimed(tmp_path, "a/b") as alone:
        assert alone and [path.name for path in tmp_path.iterdir()] == [".a_b.running"]
    assert not list(tmp_path.iterdir())
