"""Logs of a run: TensorBoard, wandb, `metrics.csv`, and the progress bar. The GPU is never waited for."""

from __future__ import annotations

import csv
import importlib
import io
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoint import atomic_write_text
from library.errors import UserError
from library.late_copy import LateCopy

if TYPE_CHECKING:
    from library.option_groups import LoggingOptions

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.csv"
CURRENT, AVERAGE, EPOCH_AVERAGE = "loss/current", "loss/average", "loss/epoch_average"
TIME = "time"
"""Column of `metrics.csv`: seconds since 1970 when the row was written."""
LARGEST_WINDOW = 10_000


@dataclass(frozen=True)
class Row:
    """What is logged for one step."""

    step: int
    epoch: int
    values: Mapping[str, float]


class LossLog:
    """Scalars of each step, those on a device one step late: see `LateCopy`."""

    def __init__(self) -> None:
        self._late: LateCopy[tuple[int, int, list[str], dict[str, float]]] = LateCopy()

    def push(self, step: int, epoch: int, values: Mapping[str, Tensor | float]) -> list[Row]:
        """Scalars of one step; returns the rows that are ready, oldest first."""
        on_device = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.is_cuda}
        known = {
            name: float(value.detach() if isinstance(value, Tensor) else value)
            for name, value in values.items()
            if name not in on_device
        }
        if not on_device:
            return [*self.flush(), Row(step, epoch, known)]
        stacked = torch.stack([value.detach().float().reshape(()) for value in on_device.values()])
        return self._rows(self._late.push((step, epoch, list(on_device), known), stacked))

    def flush(self) -> list[Row]:
        """The row still on its way, if any."""
        return self._rows(self._late.flush())

    @staticmethod
    def _rows(ready: Sequence[tuple[tuple[int, int, list[str], dict[str, float]], Sequence[float]]]) -> list[Row]:
        return [
            Row(step, epoch, {**dict(zip(names, numbers, strict=True)), **known})
            for (step, epoch, names, known), numbers in ready
        ]


class MovingAverage:
    """Mean of the last `window` values. The sum is exact, so it does not depend on what was before them."""

    def __init__(self, window: int) -> None:
        self.values: deque[float] = deque(maxlen=max(1, min(window, LARGEST_WINDOW)))

    def add(self, value: float) -> float:
        self.values.append(value)
        return self.mean

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values) if self.values else math.nan


class MetricsFile:
    """`metrics.csv`: a line per row, on disk at once; a new name adds a column."""

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        """`resume_step`: keep the rows of an earlier run up to that step; None: a new run, an earlier file is set aside."""
        self.path = path
        self._waiting: list[dict[str, str]] = []
        """Rows that could not be written yet."""
        self.columns = ["step", "epoch", TIME, CURRENT, AVERAGE, EPOCH_AVERAGE]
        kept: list[dict[str, str]] = []
        if path.exists() and resume_step is None:
            stamp = time.strftime("%Y%m%d%H%M%S", time.localtime(path.stat().st_mtime))
            path.rename(path.with_name(f"{path.stem}-{stamp}{path.suffix}"))
        elif path.exists():
            kept = [row for row in read_metrics(path) if int(row["step"]) <= (resume_step or 0)]
        self._rewrite(kept)

    def add(self, row: Row) -> None:
        line = {"step": str(row.step), "epoch": str(row.epoch), TIME: f"{time.time():.3f}"}
        line |= {name: repr(value) for name, value in row.values.items()}
        self._waiting.append(line)
        try:
            self._write_waiting()
        except PermissionError:  # on Windows, while a spreadsheet program has the file open
            if len(self._waiting) == 1:
                logger.warning("%s is open in another program, so its new rows wait. Close it there", self.path)

    def _write_waiting(self) -> None:
        if all(line.keys() <= set(self.columns) for line in self._waiting):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerows(self._waiting)
        else:
            self._rewrite([*read_metrics(self.path), *self._waiting])
        self._waiting = []

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.columns = list(dict.fromkeys([*self.columns, *(name for row in rows for name in row)]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_text(self.path, text.getvalue())


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Every whole row of a `metrics.csv`, without its empty cells. A last line cut short by a crash is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        whole = [cells for cells in reader if len(cells) == len(header) and cells[0].isdigit()]
    return [{name: cell for name, cell in zip(header, cells, strict=True) if cell} for cells in whole]


def check_trackers(options: LoggingOptions) -> list[str]:
    """The trackers that are asked for, "tensorboard" and "wandb"; a `UserError` where one cannot work."""
    wanted = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"]}
    names = wanted[options.log_with] if options.log_with else ["tensorboard"] if options.logging_dir else []
    if "tensorboard" in names and not options.logging_dir:
        raise UserError(f"--log_with {options.log_with} needs --logging_dir: say where TensorBoard's files go.")
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                raise UserError(f"--log_with: the package {name} is not installed. Install it: pip install {name}") from error
            raise UserError(f"--log_with: the package {name} is installed but cannot be imported: {error}") from error
    return names


@dataclass
class Tracker:
    """Everything a run logs, through one door. Only the main process logs; the others' trackers do nothing."""

    options: LoggingOptions
    folder: Path
    """Where `file_name` goes: the output folder."""
    total_steps: int
    steps_per_epoch: int
    resume_step: int | None = None
    """Updates already made, when a run is continued; None for a new one."""
    recent_losses: Sequence[float] = ()
    """As the tracker of the run that is continued had them, so that `loss/average` goes on as if it had not been stopped."""
    name: str = "network_train"
    """Of the run, unless `--log_tracker_name` gives one."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Options to send to the trackers, where `--log_config` asks for it."""
    enabled: bool = True
    file_name: str = METRICS_FILE

    def __post_init__(self) -> None:
        self.log = LossLog()
        self.average = MovingAverage(self.steps_per_epoch)
        self.average.values.extend(self.recent_losses)
        self.tensorboard: Any = None
        self.wandb: Any = None
        self.bar: Any = None
        if not self.enabled:
            return
        self.metrics = MetricsFile(self.folder / self.file_name, resume_step=self.resume_step)
        trackers = check_trackers(self.options)
        if "tensorboard" in trackers:
            self._start_tensorboard()
        if "wandb" in trackers:
            self._start_wandb()

    # ---- what the loop calls ---------------------------------------------------------------------------------------

    def push(
        self,
        step: int,
        epoch: int,
        logs: Mapping[str, Tensor | float],
        rates: Mapping[str, float | None],
    ) -> None:
        """Log update `step`. `logs` has "loss" and further tags; `rates` the learning rate of each parameter group by name."""
        if not self.enabled:
            return
        values: dict[str, Tensor | float] = {CURRENT if name == "loss" else name: value for name, value in logs.items()}
        for name, rate in rates.items():
            if rate is not None:
                values[name if name.startswith("lr/") else f"lr/{name}"] = rate
        self._show_step(step)
        if (left := self._minutes_left()) is not None:
            values["speed/minutes_left"] = left
        for row in self.log.push(step, epoch, values):
            self._write_step(row)

    def flush(self) -> None:
        """Write what is still on its way from the device. To be called before a state is saved and at the end."""
        for row in self.log.flush():
            self._write_step(row)

    def losses(self) -> list[float]:
        """What `recent_losses` of a run that continues this one has to be: goes into its state."""
        self.flush()
        return list(self.average.values)

    def end_epoch(self, step: int, epoch: int) -> None:
        """Log the mean loss of the epoch that update `step` completed; `epoch` counts from 1."""
        if self.enabled:
            self.flush()
            self._write(Row(step, epoch, {EPOCH_AVERAGE: self.average.mean}), at=epoch)

    def add(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log numbers that are known already, such as those of a validation."""
        if self.enabled:
            self.flush()
            self._write(Row(step, epoch, values), at=step)

    def show_pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Picture files, by the name that each has at every step, in TensorBoard and wandb."""
        if self.tensorboard is not None:
            import numpy as np
            from PIL import Image

            for name, path in pictures.items():
                with Image.open(path) as picture:
                    self.tensorboard.add_image(name, np.array(picture.convert("RGB")), step, dataformats="HWC")
        if self.wandb is not None and pictures:
            image = importlib.import_module("wandb").Image
            self.wandb.log({**{name: image(str(path)) for name, path in pictures.items()}, "global_step": step})

    def close(self) -> None:
        self.flush()
        if self.bar is not None:
            self.bar.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()

    # ---- where it goes ---------------------------------------------------------------------------------------------

    def _write_step(self, row: Row) -> None:
        values = dict(row.values)
        if CURRENT in values:
            values = {CURRENT: values.pop(CURRENT), AVERAGE: self.average.add(row.values[CURRENT]), **values}
        self._write(Row(row.step, row.epoch, values), at=row.step)
        rate = next((value for name, value in values.items() if name.startswith("lr/")), None)
        if self.bar is not None and AVERAGE in values:
            shown = {"avr_loss": f"{values[AVERAGE]:.4f}"} | ({"lr": f"{rate:.2e}"} if rate is not None else {})
            self.bar.set_postfix(shown, refresh=False)

    def _write(self, row: Row, *, at: int) -> None:
        """`at`: the position on TensorBoard's axis, which counts epochs for their averages, as in sd-scripts."""
        self.metrics.add(row)
        if self.tensorboard is not None:
            for name, value in row.values.items():
                self.tensorboard.add_scalar(name, value, at)
        if self.wandb is not None:
            self.wandb.log({**row.values, "global_step": row.step, "epoch": row.epoch})

    def _show_step(self, step: int) -> None:
        """Steps done, rate and time left; the bar starts with the first step so that loading does not count."""
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=self.total_steps, initial=step - 1, desc="steps", smoothing=0.1, dynamic_ncols=True)
        self.bar.update(1)

    def _minutes_left(self) -> float | None:
        """As the progress bar has it; None while it has no rate yet."""
        shown = self.bar.format_dict
        return (shown["total"] - shown["n"]) / shown["rate"] / 60 if shown.get("rate") else None

    def _start_tensorboard(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        assert self.options.logging_dir is not None
        run = f"{self.options.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
        folder = Path(self.options.logging_dir) / run / (self.options.log_tracker_name or self.name)
        self.tensorboard = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]
        if self.options.log_config:
            lines = "\n".join(f"    {key} = {value}" for key, value in self.config.items())
            self.tensorboard.add_text("config", lines)

    def _start_wandb(self) -> None:
        wandb = importlib.import_module("wandb")
        if self.options.wandb_api_key:
            wandb.login(key=self.options.wandb_api_key)
        self.wandb = wandb.init(
            project=self.options.log_tracker_name or self.name,
            name=self.options.wandb_run_name,
            config=dict(self.config) if self.options.log_config else None,
            **_tracker_config(self.options.log_tracker_config).get("wandb", {}),
        )
        self.wandb.define_metric("*", step_metric="global_step")  # its own axis counts calls


def _tracker_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    import toml

    try:
        return toml.load(path)
    except (OSError, toml.TomlDecodeError) as error:
        raise UserError(f"--log_tracker_config {path} cannot be read: {error}") from error
