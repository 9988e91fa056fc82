"""Ten-step losses of every family and mode, as numbers in `tests/golden/`.

A change that should not alter results shows these unchanged. One that should rewrites them, and the difference is reviewed:
`python -m pytest tests/test_golden.py --rewrite-golden`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
from runs import CASES, MODES, Mode

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", CASES)
def test_ten_losses_are_the_recorded_ones(family: str, mode: Mode, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    workspace = runs.make_workspace(CASES[family], tmp_path / "inputs")
    losses = runs.losses(workspace.train(mode, tmp_path / "out", "--max_train_steps=10", "--min_snr_gamma=5"))
    assert len(losses) == 10
    golden = GOLDEN / f"{family}_{mode}.txt"
    if request.config.getoption("--rewrite-golden"):
        golden.write_text("".join(f"{loss:.6f}\n" for loss in losses))
    recorded = [float(line) for line in golden.read_text().split()]
    # other processors and library builds sum in another order; a change of meaning is far larger
    assert losses == pytest.approx(recorded, rel=1e-3)
