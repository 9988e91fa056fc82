"""Families whose text is padded: it is as long as it has to be, and what is left out changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import CASES


@pytest.mark.parametrize(
    ("family", "flags"), [("chroma", []), ("flux", ["--apply_t5_attn_mask"]), ("flux", []), ("lumina", [])]
)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "live"])
def test_hidden_padding_is_left_out_and_changes_nothing(family: str, flags: list[str], cached: bool, tmp_path: Path) -> None:
    """Text is as long as the batch's longest caption, Chroma's one token of padding included; FLUX.1's shown padding stays."""
    workspace = runs.make_workspace(CASES[family], tmp_path)
    captions = ["a", "a much longer one", "short", "tiny"]
    for path, caption in zip(sorted(workspace.images.rglob("*.txt")), captions, strict=False):
        path.write_text(caption)
    extra = ["--network_train_unet_only", *flags, *(["--cache_text_encoder_outputs"] if cached else [])]
    trainer = workspace.trainer("network", tmp_path / "out", *extra)
    tokenize = trainer.strategies.tokenize
    seen = set()
    for batch in runs.first_batches(trainer, 7):
        cond: Any = trainer.conditioning(batch)
        lengths = tokenize.lengths(batch.captions)
        assert (lengths is not None) == (family != "flux" or bool(flags))
        assert cond.context.shape[1] == cond.mask.shape[1] == (32 if lengths is None else max(lengths))
        encoders = {name: trainer.bundle.part(name) for name in sorted(cond.sources())}
        with torch.no_grad():
            whole = trainer.strategies.text_encoding.encode(encoders, tokenize.tokenize(batch.captions))
            x, t = torch.randn(len(batch), 4, 8, 8), torch.full((len(batch),), 0.4)
            found, expected = (
                trainer.family.predict(trainer.bundle.denoiser, x, t, each, None, trainer.options) for each in (cond, whole)
            )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        seen.add(cond.whole)
    assert seen == ({True, False} if cached and lengths is not None else {False}), "batches with and without padding"
