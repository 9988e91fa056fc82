"""How finding and checking pictures grows with their number: seconds, and bytes of memory for each picture.

    python benchmarks/data_scale.py [--counts 1000 10000 100000] [--out benchmarks/results.jsonl]

One row for each number of pictures. The files are small, so that reading headers and captions is measured and not the disk.
Cold: no index; warm: the index of the run before; each in a process of its own, and the files in the system's cache both
times. Memory is what the data set keeps, beyond that of the same run with 64 pictures; resident memory beside it, which has
what finding the pictures took for a moment, and what the process uses again afterwards. A worker's is what it does not share
after it has asked for every picture of an epoch (spawned ones start afresh, as on Windows and macOS).
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FEW = 64


def write_pictures(folder: Path, count: int) -> None:
    """The same few kilobytes under `count` names, with captions, an hour old."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    first = folder / "0.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(first)
    data, before = first.read_bytes(), time.time() - 3600
    for key in range(count):
        for path, content in (
            (folder / f"{key}.jpg", data),
            (folder / f"{key}.txt", f"picture {key}, a tag, another tag, and what else may stand in a caption".encode()),
        ):
            path.write_bytes(content)
            os.utime(path, (before, before))


def memory(name: str) -> int:
    """Bytes of this process: `Rss`, or `Private_Dirty`, which it shares with no other."""
    gc.collect()
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def work(dataset: Any, answers: Any) -> None:
    """A worker: every picture of an epoch is asked for, as far as it is known without being read."""
    before = memory("Private_Dirty")
    plan = dataset.plan(0)
    for number, items in plan:
        for index, _ in items:
            _ = dataset.parts[number].records[index].caption
    answers.put(memory("Private_Dirty") - before)


def of_worker(dataset: Any, start: str) -> int:
    import torch.multiprocessing as processes

    context = processes.get_context(start)
    answers = context.Queue()
    worker = context.Process(target=work, args=(dataset, answers))
    worker.start()
    found = int(answers.get(timeout=300))
    worker.join()
    return found


def measure(folder: Path) -> dict[str, float]:
    """In a process of its own: the data set is built, and what it keeps."""
    from data_tools import build, make_options, make_strategies, write_toml

    strategies = make_strategies(folder)
    toml = f"[[datasets]]\nresolution = 64\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = '{folder / 'images'}'\n"
    options = make_options(dataset_config=write_toml(folder / "data.toml", toml), cache_dir=str(folder / "cache"))
    start, used = time.perf_counter(), time.process_time()
    data = build(options, strategies)
    seconds, used, kept = time.perf_counter() - start, time.process_time() - used, memory("Rss")
    start = time.perf_counter()
    data.train.plan(0)
    planned = time.perf_counter() - start
    tracemalloc.start()
    again = build(options, strategies)
    gc.collect()
    live = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert again.train.num_images == data.train.num_images
    return {
        "seconds": seconds,
        "live": live,
        "processor": used,
        "memory": kept,
        "plan": planned,
        **{start: of_worker(data.train, start) for start in ("fork", "spawn")},
    }


def measured(folder: Path) -> dict[str, float]:
    result = subprocess.run([sys.executable, __file__, f"--folder={folder}"], capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def row_of(count: int) -> dict[str, Any]:
    from facts import commit, machine

    found: dict[int, list[dict[str, float]]] = {}
    for number in (FEW, count):
        with tempfile.TemporaryDirectory() as temporary:
            write_pictures(Path(temporary) / "images", number)
            found[number] = [measured(Path(temporary)) for _ in range(2)]
            size = sum(path.stat().st_size for path in Path(temporary).glob("cache/*/*"))
    few, many = found[FEW], found[count]

    def per_image(run: int, name: str) -> int:
        return round((many[run][name] - few[run][name]) / (count - FEW))

    return {
        "commit": commit(),
        "machine": machine(),
        "scenario": f"data_scale_{count}",
        "seconds_cold": round(many[0]["seconds"], 2),
        "seconds_warm": round(many[1]["seconds"], 2),
        "processor_seconds_cold": round(many[0]["processor"], 2),
        "processor_seconds_warm": round(many[1]["processor"], 2),
        "seconds_epoch_order": round(many[1]["plan"], 3),
        "bytes_per_image": per_image(1, "live"),
        "resident_bytes_per_image": per_image(1, "memory"),
        "bytes_per_image_in_forked_worker": per_image(1, "fork"),
        "bytes_per_image_in_spawned_worker": per_image(1, "spawn"),
        "index_bytes_per_image": round(size / count),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--out", help="append the rows to this file, too")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        sys.stdout.write(json.dumps(measure(Path(arguments.folder))) + "\n")
        return
    for count in arguments.counts:
        line = json.dumps(row_of(count)) + "\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        if arguments.out:
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(line)


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
