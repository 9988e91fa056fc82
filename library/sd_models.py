"""What Stable Diffusion 2.x takes of its OpenCLIP text encoder; other sizes are told by `unet_parts` and `clip_parts`."""

from __future__ import annotations

from typing import Any

from library.clip_parts import open_clip_config
from library.model_io import Shapes, count_indices


def sd2_clip_layers(shapes: Shapes) -> int:
    """How many of the file's layers SD2 uses.

    SD2 conditions on the output of OpenCLIP's last layer but one. A whole OpenCLIP tower (it has a text projection) has one
    layer that is never run; a file with 23 layers, or without the projection, was cut to those that are.
    """
    in_file = count_indices(shapes, r"transformer\.resblocks\.(\d+)\.")
    return in_file - 1 if "text_projection" in shapes and in_file != 23 else in_file


def sd2_clip_config(shapes: Shapes) -> dict[str, Any]:
    """CLIPTextModel's configuration, from SD2's OpenCLIP tower."""
    return open_clip_config(shapes, sd2_clip_layers(shapes))
