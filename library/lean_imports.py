"""diffusers' classes, imported without what this project never uses of them.

Importing a diffusers model imports bitsandbytes where it is installed, for quantisers of diffusers' own, and bitsandbytes
imports torch's compiler: a fifth of all that start-up imports. Quantisation and 8-bit optimizers here use bitsandbytes
directly, and import it when a run asks for them.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_UNUSED = "bitsandbytes"


def diffusers_class(name: str) -> Any:
    """`diffusers.<name>`.

    Where this is the first use of diffusers in the process, diffusers and peft take bitsandbytes for not installed from then
    on. Where either has been imported already, this is a plain import: they have decided by then, and hiding it now would
    fail.
    """
    if "diffusers" in sys.modules or _UNUSED in sys.modules:
        return getattr(importlib.import_module("diffusers"), name)
    sys.modules[_UNUSED] = None  # type: ignore[assignment]  # Python's own way to say that a module cannot be imported
    try:
        return getattr(importlib.import_module("diffusers"), name)
    finally:
        del sys.modules[_UNUSED]
