"""`--plan`: what a run would take, as a table for people and as `plan.json`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.cache_plan import caches_of_run, disk_of_run, leaks
from library.checkpoint import atomic_write
from library.device_rates import DeviceRates, measure_rates, own_memory, process_memory
from library.memory_plan import Forecast, Phase, forecast
from library.model_parts import write_json
from library.run_setup import compute_dtype

if TYPE_CHECKING:
    from library.dataset import ImageDataset
    from library.train_util import PreparedRun

PLAN_FILE = "plan.json"
Rows = list[tuple[str, str]]
_SHOWN, _WIDTH = 5, 100
"""Files of a list that the table has, and characters of a line of it."""


def write_plan(prepared: PreparedRun) -> None:
    """Print the plan of `prepared`, and write it to the output folder. Loads no weights, trains nothing."""
    found = forecast(prepared)
    accelerator = prepared.accelerator
    rates = measure_rates(accelerator.device, compute_dtype(prepared.options.precision))
    content = plan_of_run(prepared, found, rates)
    if not accelerator.is_main_process:
        return
    sys.stdout.write(as_table(content) + "\n")
    path = Path(prepared.options.output.output_dir or ".") / PLAN_FILE
    atomic_write(path, lambda temporary: write_json(temporary, content))
    sys.stdout.write(f"wrote {path}\n")


def plan_of_run(prepared: PreparedRun, found: Forecast, rates: DeviceRates) -> dict[str, Any]:
    """The content of `plan.json`: bytes, seconds, counts."""
    caches = caches_of_run(prepared, found.caption)
    return {
        "data": _data(prepared),
        "caches": caches,
        "disk": disk_of_run(prepared, caches),
        "held_out_lookalikes": leaks(prepared.data),
        "learning": [group._asdict() for group in found.groups],
        "adapted_layers": [kind._asdict() for kind in found.layers],
        "memory": _memory(prepared, found),
        "time": _time(prepared, found, rates),
    }


def _buckets(dataset: ImageDataset) -> dict[str, int]:
    """Pictures by bucket, counting repeats."""
    found: dict[str, int] = {}
    for part in dataset.parts:
        for (width, height), items in part.buckets.items():
            found[f"{width}x{height}"] = found.get(f"{width}x{height}", 0) + len(items)
    return found


def _data(prepared: PreparedRun) -> dict[str, Any]:
    data, length = prepared.data, prepared.length
    train = data.train
    return {
        "images": len(train.records),
        "left_out": {str(path): reason for path, reason in train.quarantine.found.items()},
        "subsets": [
            {"name": one.config.name, "images": one.num_images, "repeats": one.config.num_repeats, "is_reg": one.config.is_reg}
            for dataset in data.datasets
            for one in dataset.counts
        ],
        "images_with_repeats": train.num_images,
        "buckets": _buckets(train),
        "held_out": data.validation.num_images if data.validation else 0,
        "held_out_buckets": _buckets(data.validation) if data.validation else {},
        "batches_per_epoch": length.batches_per_epoch,
        "updates_per_epoch": length.updates_per_epoch,
        "epochs": length.num_epochs,
        "updates": length.total_updates,
        "processes": prepared.accelerator.num_processes,
    }


def _memory(prepared: PreparedRun, found: Forecast) -> dict[str, Any]:
    own = own_memory(prepared.accelerator.device)
    return {
        "device": found.device,
        "largest_batch": found.batch._asdict(),
        "phases": [
            {"name": phase.name, "device": phase.device.total, "kinds": phase.device.kinds, "host": phase.host.total}
            for phase in found.phases
        ],
        "device_libraries": own,
        "device_peak": found.device_peak + own,
        "host": {
            "process": process_memory(),
            "caches": found.caches,
            "swapped_weights": found.swapped,
            "offloaded_activations": found.offloaded,
            "peak": found.host_peak,
        },
    }


def mean_size(prepared: PreparedRun, found: Forecast) -> float:
    """Pixels of the average batch over those of the batch that was simulated."""
    pixels = batches = 0
    for part in prepared.data.train.parts:
        for (width, height), items in part.buckets.items():
            pixels += width * height * len(items)
            batches += -(-len(items) // part.batch_size)
    batch = found.batch
    return pixels / batches / (batch.width * batch.height * batch.images)


def _time(prepared: PreparedRun, found: Forecast, rates: DeviceRates) -> dict[str, Any]:
    length = prepared.length
    batch, step = rates.seconds(found.forward_backward), rates.seconds(found.step)
    micro_batches = length.batches_per_epoch / length.updates_per_epoch
    update = micro_batches * batch * mean_size(prepared, found) + step
    return {
        "flops_of_largest_batch": found.forward_backward.flops,
        "moved_bytes_of_largest_batch": found.forward_backward.moved_bytes,
        "matmul_flops_per_second": rates.flops,
        "bytes_per_second": rates.bytes,
        "seconds_largest_batch": batch,
        "seconds_per_update": update,
        "seconds_in_all": update * length.total_updates,
        "note": "estimated from a measured matrix product and a measured copy; without caching, previews, saving and waiting "
        "for pictures or for swapped blocks",
    }


# ---- for people ------------------------------------------------------------------------------------------------------


def readable(num_bytes: float) -> str:
    """`1.23 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def as_table(content: dict[str, Any]) -> str:
    data, memory, timing = content["data"], content["memory"], content["time"]
    sections = {
        "data": [
            *_data_rows(data),
            *_cache_rows(content["caches"]),
            *_disk_rows(content["disk"]),
            *_lookalike_rows(content["held_out_lookalikes"]),
        ],
        "what learns": [
            (group["name"], f"{group['num_parameters']:,} parameters, learning rate {_rate(group['rate'])}")
            for group in content["learning"]
        ],
        "adapted layers (* stands for numbers)": _layer_rows(content["adapted_layers"]),
        f"memory of the {memory['device']} device": _memory_rows(memory),
        "main memory": [(name.replace("_", " "), readable(value)) for name, value in memory["host"].items() if value],
        "time (an estimate)": [
            ("largest batch", duration(timing["seconds_largest_batch"])),
            ("an update", duration(timing["seconds_per_update"])),
            ("in all", duration(timing["seconds_in_all"])),
        ],
    }
    return "\n".join(_lines(sections.items()))


def _data_rows(data: dict[str, Any]) -> Rows:
    rows = [
        (f"folder {one['name']}", f"{one['images']} {'regularisation ' if one['is_reg'] else ''}images, {one['repeats']} times")
        for one in data["subsets"]
    ]
    rows += [("left out", f"{path}: {reason}") for path, reason in list(data["left_out"].items())[:_SHOWN]]
    rows += _more(len(data["left_out"]))
    rows += [
        ("trained", f"{data['images']} images, {data['images_with_repeats']} with repeats"),
        ("buckets", ", ".join(f"{size}: {count}" for size, count in data["buckets"].items())),
    ]
    if data["held_out"]:
        sizes = ", ".join(f"{size}: {count}" for size, count in data["held_out_buckets"].items())
        rows.append(("held out", f"{data['held_out']} images; {sizes}"))
    updates = f"{data['updates']} ({data['updates_per_epoch']} an epoch, {data['epochs']} epochs)"
    return [*rows, ("batches an epoch", str(data["batches_per_epoch"])), ("updates", updates)]


def _more(total: int) -> Rows:
    return [("", f"... and {total - _SHOWN} more, see {PLAN_FILE}")] if total > _SHOWN else []


def _cache_rows(caches: dict[str, Any]) -> Rows:
    rows = []
    for name, cache in caches.items():
        where = f"in memory, {readable(cache['bytes'])}"
        if cache["where"] == "disk":
            where = f"{cache['found']} found, {cache['to_make']} to be made, {readable(cache['new_bytes'])} more disk"
        rows.append((f"cached {name.replace('_', ' ')}", f"{cache['entries']}: {where}"))
    return rows


def _disk_rows(disk: dict[str, int]) -> Rows:
    return [("disk", f"{readable(disk['new_bytes'])} more for caches, {readable(disk['free_bytes'])} free")] if disk else []


def _lookalike_rows(pairs: list[dict[str, Any]]) -> Rows:
    """The first few; all are in the file."""
    rows = [("trained and held out", f"{pair['held_out']} looks like {pair['trained']}") for pair in pairs[:_SHOWN]]
    return rows + _more(len(pairs))


def _layer_rows(kinds: list[dict[str, Any]]) -> Rows:
    return [
        (
            kind["name"],
            f"{kind['layers']} of {kind['size']}: {kind['parameters']:,} parameters, learning rate {_rate(kind['rate'])}",
        )
        for kind in kinds
    ]


def _rate(rate: float | None) -> str:
    return "its own" if rate is None else f"{rate:g}"


def _memory_rows(memory: dict[str, Any]) -> Rows:
    rows: Rows = []
    batch = memory["largest_batch"]
    for phase in memory["phases"]:
        note = f" (batch of {batch['images']} of {batch['width']}x{batch['height']})" if phase["name"] == "training" else ""
        rows.append((phase["name"] + note, readable(phase["device"])))
        rows += [(f"  {kind}", readable(size)) for kind, size in phase["kinds"].items() if size]
    if memory["device_libraries"]:
        rows.append(("libraries and driver", readable(memory["device_libraries"])))
    return [*rows, ("peak", readable(memory["device_peak"]))]


def _lines(sections: Iterable[tuple[str, Rows]]) -> Iterator[str]:
    sections = list(sections)
    width = max(len(name) for _, rows in sections for name, _ in rows)
    for title, rows in sections:
        if not rows:
            continue
        yield title
        for name, value in rows:
            first, *rest = textwrap.wrap(value, _WIDTH, break_long_words=False, break_on_hyphens=False) or [""]
            yield f"  {name:<{width}}  {first}"
            yield from (f"  {'':<{width}}  {line}" for line in rest)


__all__ = ["PLAN_FILE", "Phase", "as_table", "duration", "plan_of_run", "readable", "write_plan"]
