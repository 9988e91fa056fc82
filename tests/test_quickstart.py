"""quickstart.py in a temporary copy of the project: what it installs, what it skips, and how it fails. Needs no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quickstart
from quickstart import DEVELOPMENT, RUNTIME, Environment, SetupError

SCRIPT = Path(quickstart.__file__)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with no requirements, set up by the real script: a virtual environment costs seconds, so it is made once, over
    one that is broken, as after the base Python was removed."""
    root = tmp_path_factory.mktemp("project with a space")
    shutil.copy(SCRIPT, root)
    (root / RUNTIME).write_text("# nothing\n")
    (root / DEVELOPMENT).write_text(f"-r {RUNTIME}\n")
    (root / "examples").mkdir()
    (root / "examples" / "demo.py").write_text("import sys; print('demo', sys.argv[1:], sys.prefix); sys.exit(7)\n")
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("no Python")
    assert Environment(root).version() is None
    result = call(root, "setup")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "again" in result.stdout
    return root


@pytest.fixture
def project(made: Path) -> Path:
    """The project as `made` left it."""
    environment = Environment(made)
    (made / RUNTIME).write_text("# nothing\n")
    environment.write_stamp(RUNTIME)
    return made


def call(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "quickstart.py"), *arguments]
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_RETRIES": "0"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_setup_makes_an_environment_that_works_over_a_broken_one_and_stamps_it(made: Path) -> None:
    environment = Environment(made)
    assert environment.version() == sys.version_info[:2]
    assert environment.up_to_date(RUNTIME)
    assert list(environment.stamped()) == [RUNTIME]


def test_a_second_setup_runs_neither_venv_nor_pip(project: Path) -> None:
    environment = Environment(project)
    environment.log.write_text("untouched")
    result = call(project, "setup")
    assert result.returncode == 0
    assert environment.log.read_text() == "untouched"
    assert "installing" not in result.stdout


def test_an_edited_requirements_file_is_installed_again(project: Path) -> None:
    (project / RUNTIME).write_text("# nothing, but said differently\n")
    assert not Environment(project).up_to_date(RUNTIME)
    assert "installing requirements.txt" in call(project, "setup").stdout
    assert Environment(project).up_to_date(RUNTIME)


def test_line_endings_do_not_count_as_a_change(project: Path) -> None:
    (project / RUNTIME).write_bytes(b"# nothing\r\n")
    assert Environment(project).up_to_date(RUNTIME)


def test_the_development_set_covers_the_file_it_includes_but_not_the_other_way(project: Path) -> None:
    environment = Environment(project)
    assert not environment.up_to_date(DEVELOPMENT)
    environment.write_stamp(DEVELOPMENT)
    assert environment.up_to_date(RUNTIME) and environment.up_to_date(DEVELOPMENT)
    (project / RUNTIME).write_text("# changed\n")
    assert not environment.up_to_date(DEVELOPMENT)


def test_an_interrupted_setup_is_not_taken_for_a_finished_one(project: Path) -> None:
    (project / RUNTIME).write_text("./missing-package\n")
    assert call(project, "setup").returncode == 1
    (project / RUNTIME).write_text("# nothing\n")
    assert not Environment(project).up_to_date(RUNTIME), "the stamp of before the failed set-up is still there"


def test_an_environment_of_another_python_is_not_up_to_date(project: Path) -> None:
    config = Environment(project).folder / "pyvenv.cfg"
    before = config.read_text()
    try:
        config.write_text(before.replace(".".join(str(part) for part in sys.version_info[:3]), "3.99.0"))
        assert not Environment(project).up_to_date(RUNTIME)
    finally:
        config.write_text(before)


def test_a_new_installer_format_is_not_up_to_date(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "FORMAT", quickstart.FORMAT + 1)
    assert not Environment(project).up_to_date(RUNTIME)


def test_a_damaged_stamp_means_not_set_up(project: Path) -> None:
    Environment(project).stamp.write_text('{"requirements.txt": ')
    assert not Environment(project).up_to_date(RUNTIME)


def test_a_requirement_that_cannot_be_installed_is_one_line_with_the_log(project: Path) -> None:
    (project / RUNTIME).write_text("./missing-package\n")
    result = call(project, "setup")
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1
    assert len(lines) == 1
    assert "installing requirements.txt failed" in lines[0]
    assert "missing-package" in lines[0]
    log = Environment(project).log
    assert str(log) in lines[0]
    assert "ERROR" in log.read_text()
    assert "Traceback" not in result.stdout + result.stderr


def test_a_missing_requirements_file_is_one_line(project: Path) -> None:
    (project / RUNTIME).unlink()
    result = call(project, "setup")
    assert result.returncode == 1
    assert result.stderr.startswith("quickstart: cannot read ") and result.stderr.count("\n") == 1
    assert "No such file" in result.stderr


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "Collecting x\nERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "disk is full",
        ),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(... name resolution')': /simple/x/\n"
            "ERROR: Could not find a version that satisfies the requirement x==1 (from versions: none)\n"
            "ERROR: No matching distribution found for x==1",
            "the package index could not be reached",
        ),
        ("ERROR: Exception:\nTraceback\n  File\nReadTimeoutError: Read timed out.", "a download broke off"),
        (
            "ERROR: Could not find a version that satisfies the requirement x==9 (from versions: 1, 2)\n"
            "ERROR: No matching distribution found for x==9",
            "there is no x==9 for Python",
        ),
        (
            "WARNING: Retrying after connection broken by 'ReadTimeoutError'\n"
            "ERROR: Cannot install a and b because these package versions have conflicting dependencies.\n"
            "ERROR: ResolutionImpossible: for help",
            "Cannot install a and b",
        ),
        ("ERROR: Exception:\nTraceback\nValueError: something new", "ValueError: something new"),
        ("", "it printed nothing"),
    ],
)
def test_pips_failures_are_explained(output: str, reason: str) -> None:
    assert reason in quickstart.explain(output)


def test_pips_output_becomes_short_progress() -> None:
    shown = quickstart.pip_progress("  Downloading torch-2.13.0-cp311.whl (190.2 MB)\n", "")
    assert shown == "downloading torch-2.13.0-cp311.whl (190.2 MB)"
    shown = quickstart.pip_progress("Progress 50000000 of 190200000\n", shown)
    shown = quickstart.pip_progress("Progress 60000000 of 190200000\n", shown)
    assert shown == "downloading torch-2.13.0-cp311.whl (190.2 MB), 60 of 190 MB"
    assert quickstart.pip_progress("Requirement already satisfied: x\n", shown) == shown
    assert quickstart.pip_progress("Installing collected packages: a, b, c\n", shown) == "unpacking 3 packages"


def test_a_python_that_is_too_old_is_told_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(SystemExit) as stopped:
        quickstart.main(["setup"])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.count("\n") == 1
    assert "Python 3.10 or newer is needed" in message and "3.9.18" in message


def test_the_file_parses_as_python_3_6() -> None:
    import ast

    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    assert "from __future__ import annotations" not in SCRIPT.read_text()


def test_a_python_without_ensurepip_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SetupError, match=r"apt install python3\.\d+-venv"):
        quickstart.make_environment(Environment(tmp_path))


def test_the_demo_gets_its_options_and_its_exit_code_comes_back(project: Path) -> None:
    result = call(project, "demo", "--steps", "4", "--evaluate", "--help")
    assert result.returncode == 7
    assert f"demo {['--steps', '4', '--evaluate', '--help']} {project / '.venv'}" in result.stdout


def test_test_runs_pytest_of_the_environment_with_the_options(project: Path) -> None:
    Environment(project).write_stamp(DEVELOPMENT)
    site = next(Environment(project).folder.glob("[Ll]ib/**/site-packages"))
    (site / "pytest.py").write_text("import sys; print('pytest', sys.argv[1:]); sys.exit(3)\n")
    result = call(project, "test", "tests/a.py", "-k", "name", "-x")
    assert result.returncode == 3
    spread = ["-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert str([*spread, "tests/a.py", "-k", "name", "-x"]) in result.stdout


@pytest.mark.parametrize("arguments", [(), ("install",), ("setup", "--fast")])
def test_an_unknown_command_is_refused_with_the_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    shutil.copy(SCRIPT, tmp_path)
    result = call(tmp_path, *arguments)
    assert result.returncode == 2
    assert "usage: quickstart.py setup" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_every_requirement_is_pinned_exactly() -> None:
    for name in (RUNTIME, DEVELOPMENT):
        for line in (SCRIPT.parent / name).read_text().splitlines():
            requirement = line.partition("#")[0].strip()
            assert not requirement or requirement.startswith("-r ") or "==" in requirement.partition(";")[0], line


def test_the_stamp_is_readable_json(project: Path) -> None:
    assert json.loads(Environment(project).stamp.read_text()) == {RUNTIME: Environment(project).fingerprint(RUNTIME)}
