"""`alpha`, a number that files hold as a tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ExactAlpha(nn.Module):
    """Keeps `alpha` in float32 through `.to(dtype)` and the like, so that a resumed run computes with the very same number, and
    as a plain number read once per load, so that no step waits for the device."""

    alpha: Tensor
    _alpha: float

    def _set_alpha(self, alpha: float) -> None:
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_load_state_dict_post_hook(_read)
        _read(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactAlpha:
        super()._apply(fn, recurse)
        self.alpha = torch.tensor(self._alpha, device=self.alpha.device)
        return self


def _read(module: nn.Module, _keys: object = None) -> None:
    assert isinstance(module, ExactAlpha)
    module._alpha = float(module.alpha)
