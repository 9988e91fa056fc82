"""sd-scripts' cache files: one row for each family that it has them of, with names, keys and what else stands in them.

Strategies take their names from here. A row is enough to read that family's files, also before the family itself is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.buckets import Size


@dataclass(frozen=True)
class LatentFormat:
    """Latents of one picture: `{stem}_{W:04d}x{H:04d}_{suffix}.npz`, W x H the size of the picture."""

    suffix: str
    by_resolution: bool
    """Whether `_{h}x{w}` of the latents stands behind every key, so that a file holds several resolutions."""
    nameless: bool = False
    """Whether older files are called `{stem}.npz`."""
    framed: bool = False
    """Whether older files hold [C, 1, h, w], as of a video of one frame."""

    def path_for(self, image: Path, size: Size) -> Path:
        """sd-scripts' file name beside the image. size: (width, height) of the image."""
        return image.with_name(f"{image.stem}_{size[0]:04d}x{size[1]:04d}_{self.suffix}.npz")

    def key_suffix(self, height: int, width: int) -> str:
        """What stands behind each key for latents of this size."""
        return f"_{height}x{width}" if self.by_resolution else ""

    def latents(self, stored: np.ndarray) -> np.ndarray:
        """[C, h, w], from either layout."""
        return stored[:, 0] if self.framed and stored.ndim == 4 and stored.shape[1] == 1 else stored


@dataclass(frozen=True)
class TextFormat:
    """Text encoder outputs of one caption: `{stem}{suffix}`.

    arrays: what the model is given. settings: single values that say how those were made, where the file says it.
    """

    suffix: str
    arrays: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def path_for(self, image: Path) -> Path:
        return image.with_name(image.stem + self.suffix)

    def missing(self, arrays: Mapping[str, np.ndarray]) -> list[str]:
        """Keys that sd-scripts itself would miss."""
        return [name for name in (*self.arrays, *self.settings) if name not in arrays]


LATENT_FORMATS: Mapping[str, LatentFormat] = {
    "sd": LatentFormat("sd", by_resolution=False, nameless=True),
    "sdxl": LatentFormat("sdxl", by_resolution=False, nameless=True),
    "sd3": LatentFormat("sd3", by_resolution=True),
    "flux": LatentFormat("flux", by_resolution=True),
    "lumina": LatentFormat("lumina", by_resolution=True),
    "hunyuan_image": LatentFormat("hi", by_resolution=True),
    "anima": LatentFormat("anima", by_resolution=True, framed=True),
}

TEXT_FORMATS: Mapping[str, TextFormat] = {
    "sd": TextFormat("_sd_te.npz", ("context",)),  # ours: sd-scripts has none
    "sdxl": TextFormat("_te_outputs.npz", ("hidden_state1", "hidden_state2", "pool2")),
    "sd3": TextFormat(
        "_sd3_te.npz",
        ("lg_out", "lg_pooled", "t5_out", "clip_l_attn_mask", "clip_g_attn_mask", "t5_attn_mask"),
        ("apply_lg_attn_mask", "apply_t5_attn_mask"),
    ),
    "flux": TextFormat("_flux_te.npz", ("l_pooled", "t5_out", "txt_ids", "t5_attn_mask"), ("apply_t5_attn_mask",)),
    "lumina": TextFormat("_lumina_te.npz", ("hidden_state", "attention_mask", "input_ids")),
    "hunyuan_image": TextFormat("_hi_te.npz", ("vlm_embed", "vlm_mask", "byt5_embed", "byt5_mask", "ocr_mask")),
    "anima": TextFormat(
        "_anima_te.npz", ("prompt_embeds", "attn_mask", "t5_input_ids", "t5_attn_mask"), ("caption_dropout_rate",)
    ),
}
