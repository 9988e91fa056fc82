"""The files of pictures: their names, what is written into them, and the sheet of all."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from library.checkpoint import atomic_write
from library.family_base import SampleRequest
from library.generation_options import GenerateOptions, PictureLine
from library.metadata import legacy_hash
from library.picture_grid import draw_grid
from library.picture_metadata import SAMPLER_TITLES, NetworkUse, parameters_text

FLOW_SAMPLER = "Euler"


@dataclass(frozen=True)
class SheetPlan:
    """The labels of a sheet of pictures."""

    rows: Sequence[str]
    columns: Sequence[str]


@dataclass
class PictureFiles:
    """Writes a run's pictures into `folder`."""

    folder: Path
    options: GenerateOptions
    is_flow: bool
    written: int = field(default=0, init=False)
    _on_sheet: dict[tuple[int, int], Image] = field(default_factory=dict, init=False)
    """By row and column; only where there will be a sheet."""
    _facts: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        model = Path(self.options.model.pretrained_model_name_or_path or "")
        vae = self.options.model.vae
        self._facts = {
            "Model hash": legacy_hash(model) if model.is_file() else None,
            "Model": model.stem if model.is_file() else model.name,
            "VAE": Path(vae).name if vae else None,
            "Clip skip": self.options.model.clip_skip,
        }
        self._first = self._highest() + 1 if self.options.files.sequential_file_name else 0

    def write(
        self,
        picture: Image,
        line: PictureLine,
        seed: int,
        request: SampleRequest,
        networks: list[NetworkUse],
        *,
        place: tuple[int, int],
        number: int,
    ) -> Path:
        """Save one. number: among all pictures of the run; place: on the sheet."""
        info = PngInfo()
        info.add_text("parameters", parameters_text(*line.texts, self._told(seed, request), networks))
        path = self.folder / self._name(number, seed)
        atomic_write(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=info))
        self.written += 1
        if self.options.files.draws_grid:
            self._on_sheet[place] = picture
        return path

    def write_small(self, picture: Image, number: int, seed: int) -> None:
        """What a picture was started from, beside it."""
        path = self.folder / f"{Path(self._name(number, seed)).stem}_1st.png"
        atomic_write(path, lambda temporary: picture.save(temporary, format="PNG"))

    def write_sheet(self, plan: SheetPlan) -> Path:
        rows = [
            (label, [self._on_sheet[row, column] for column in range(len(plan.columns))]) for row, label in enumerate(plan.rows)
        ]
        sheet = draw_grid(rows, plan.columns)
        path = self.folder / f"grid_{time.strftime('%Y%m%d%H%M%S')}.png"
        atomic_write(path, lambda temporary: sheet.save(temporary, format="PNG"))
        return path

    def _told(self, seed: int, request: SampleRequest) -> dict[str, Any]:
        name = request.sampler.lower().removeprefix("k_")
        return {
            "Steps": request.steps,
            "Sampler": FLOW_SAMPLER if self.is_flow else SAMPLER_TITLES[name],
            "CFG scale": float(request.guidance),
            "Distilled CFG Scale": request.extra.get("guidance_scale"),
            "Seed": seed,
            "Size": f"{request.width}x{request.height}",
            "Denoising strength": None if request.start is None else float(request.start.strength),
            **self._facts,
        }

    def _name(self, number: int, seed: int) -> str:
        """sd-scripts' names."""
        if self.options.files.sequential_file_name:
            return f"im_{self._first + number:06d}.png"
        return f"im_{time.strftime('%Y%m%d%H%M%S')}_{number:03d}_{seed}.png"

    def _highest(self) -> int:
        numbers = [
            int(found[1]) for path in self.folder.glob("im_*.png") if (found := re.fullmatch(r"im_(\d{6,})\.png", path.name))
        ]
        return max(numbers, default=0)
