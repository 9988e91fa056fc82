"""The caching tools of every family make what training then finds."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from runs import CASES, MODES, Mode, Workspace

from library.errors import UserError
from tools import cache_latents, cache_text_encoder_outputs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", params=CASES)
def workspace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(CASES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("mode", MODES)
def test_training_finds_what_the_tools_have_made(
    mode: Mode, workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    frozen = ["--network_train_unet_only"] if mode == "network" else ["--no-train_text_encoder"]
    command = workspace.arguments(mode, tmp_path / "out", f"--cache_dir={tmp_path / 'cache'}", *frozen)
    script = f"{workspace.script(mode)}.py"
    cache_latents.main([script, *command])
    assert "latents: 7 made, 0 found on disk" in caplog.text
    cache_text_encoder_outputs.main([script, *command])
    assert "text encoder outputs: " in caplog.text
    assert not list((tmp_path / "out").iterdir()), "a tool trains nothing"
    caplog.clear()
    both = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    importlib.import_module(workspace.script(mode)).main([*command, *both, "--max_train_steps=1"])
    made = [record.getMessage() for record in caplog.records if " made, " in record.getMessage()]
    assert len(made) == 2 and all(": 0 made, " in line for line in made), made


def test_data_and_model_alone_are_enough_as_for_sd_scripts_tools(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    switch = [] if workspace.case.family == "sd" else [f"--{workspace.case.family}"]
    command = [
        *switch,
        f"--pretrained_model_name_or_path={workspace.model}",
        f"--tokenizer={workspace.tokenizer}",
        f"--train_data_dir={workspace.images}",
        f"--cache_dir={tmp_path / 'cache'}",
        "--resolution=64",
        *workspace.case.arguments(workspace.model.parent),
    ]
    cache_latents.main(command)
    assert "latents: 7 made" in caplog.text
    caplog.clear()
    cache_latents.main([*command, "--skip_existing"])
    assert "latents: 0 made, 7 found on disk" in caplog.text
    named = ["--family", workspace.case.family]
    cache_text_encoder_outputs.main([*named, *command[len(switch) :]])
    assert "text encoder outputs: " in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flux_train_netwrk.py"], r"flux_train_netwrk\.py is not a training script.*flux_train_network"),
        (["--family=flox"], "unknown model family 'flox'.*flux"),
        (["--resolution=64"], "--pretrained_model_name_or_path"),
    ],
)
def test_what_a_tool_cannot_read_is_told(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cache_latents.main(arguments)


@pytest.mark.parametrize("tool", ["cache_latents", "cache_text_encoder_outputs"])
def test_help_says_how_to_use_it_and_loads_nothing(tool: str) -> None:
    command = [sys.executable, "-X", "importtime", f"tools/{tool}.py", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and f"tools/{tool}.py flux_train_network.py" in result.stdout
    assert "| torch\n" not in result.stderr
