"""What keeps the start of a run short: imports that are left out, and memory that is not given back and asked for again."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from library.lean_imports import diffusers_class

ROOT = Path(__file__).resolve().parent.parent


def said(code: str) -> list[str]:
    """The lines a fresh process prints: this one has imported everything already."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="nothing to leave out")
def test_making_models_leaves_out_bitsandbytes_which_can_be_imported_afterwards() -> None:
    code = """
import sys
from library.lean_imports import diffusers_class
print(diffusers_class("AutoencoderKL").__name__, diffusers_class("UNet2DConditionModel").__name__)
print("bitsandbytes" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
import bitsandbytes
print(bitsandbytes.__name__)
"""
    assert said(code) == ["AutoencoderKL", "UNet2DConditionModel", "False", "False", "bitsandbytes"]


def test_where_diffusers_was_imported_before_nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers has decided by then that bitsandbytes is there: hiding it would make its import fail."""
    before = sys.modules.pop("bitsandbytes", None)

    class Imported(ModuleType):
        def __getattr__(self, name: str) -> tuple[str, bool]:
            return name, "bitsandbytes" in sys.modules

    try:
        monkeypatch.setitem(sys.modules, "diffusers", Imported("diffusers"))
        assert diffusers_class("AutoencoderKL") == ("AutoencoderKL", False)
        assert "bitsandbytes" not in sys.modules
    finally:
        if before is not None:
            sys.modules["bitsandbytes"] = before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's way of keeping memory")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    """In what an encoder does: tensors of many sizes, made and freed."""
    code = """
import resource, torch
from torch import nn
from library.run_setup import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
convolutions = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4)).requires_grad_(False)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(1, 32, 256, 256)  # 8 MiB
    for convolution in convolutions:
        x = nn.functional.avg_pool2d(x + convolution(nn.functional.silu(x)), 2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults() for _ in range(5)))
"""
    _, *later = (int(word) for word in said(code))
    assert sum(later) < 15_000, "more than 30,000 where freed memory is given back each time"
