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


@dataclass(frozen=True)
class Making:
    """How one picture was made."""

    line: PictureLine
    seed: int
    request: SampleRequest
    networks: list[NetworkUse]
    first: SampleRequest | None = None
    """For the small picture that it was started from."""

    def told(self, sampler: str | None) -> dict[str, Any]:
        """As A1111 says it, where the size and steps are those of the small picture. sampler: a flow's."""
        shown, start = self.first or self.request, self.request.start
        facts = {
            "Steps": shown.steps,
            "Sampler": sampler or SAMPLER_TITLES[shown.sampler.lower().removeprefix("k_")],
            "CFG scale": float(shown.guidance),
            "Distilled CFG Scale": shown.extra.get("guidance_scale"),
            "Seed": self.seed,
            "Size": f"{shown.width}x{shown.height}",
            "Denoising strength": None if start is None else float(start.strength),
        }
        if self.first is not None:
            facts |= {
                "Hires upscale": round(self.request.width / shown.width, 3),
                "Hires steps": self.request.steps,
                "Hires upscaler": "Lanczos",
            }
        return facts


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

    def write(self, picture: Image, making: Making, *, place: tuple[int, int], number: int) -> Path:
        """Save one. number: among all pictures of the run; place: on the sheet."""
        path = self.folder / self._name(number, making.seed)
        self._save(picture, making, path)
        self.written += 1
        if self.options.files.draws_grid:
            self._on_sheet[place] = picture
        return path

    def write_small(self, picture: Image, making: Making, large: Path) -> None:
        """What the picture at `large` was started from, beside it."""
        self._save(picture, making, large.with_name(f"{large.stem}_1st.png"))

    def _save(self, picture: Image, making: Making, path: Path) -> None:
        info = PngInfo()
        facts = {**making.told(FLOW_SAMPLER if self.is_flow else None), **self._facts}
        info.add_text("parameters", parameters_text(*making.line.texts, facts, making.networks))
        atomic_write(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=info))

    def write_sheet(self, plan: SheetPlan) -> Path:
        rows = [
            (label, [self._on_sheet[row, column] for column in range(len(plan.columns))]) for row, label in enumerate(plan.rows)
        ]
        sheet = draw_grid(rows, plan.columns)
        path = self.folder / f"grid_{time.strftime('%Y%m%d%H%M%S')}.png"
        atomic_write(path, lambda temporary: sheet.save(temporary, format="PNG"))
        return path

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
