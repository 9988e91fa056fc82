"""How finding and checking pictures grows with their number: seconds, and bytes of memory for each picture in the trainer.

    python benchmarks/data_scale.py [--counts 1000 10000 100000]

One row for each number of pictures; each is measured in a process of its own. The files are small, so that reading headers,
not the disk, is what is measured; the second figure is with the files in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def write_pictures(folder: Path, count: int) -> None:
    """The same few kilobytes under `count` names, with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    first = folder / "0.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(first)
    data = first.read_bytes()
    for key in range(count):
        (folder / f"{key}.jpg").write_bytes(data)
        (folder / f"{key}.txt").write_text(f"picture {key}, tag, another tag")


def resident() -> int:
    """Bytes of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measure(folder: Path) -> dict[str, float]:
    """In a process of its own: two builds of the data set, and what the second one keeps."""
    from data_tools import build, make_options, make_strategies, write_toml

    strategies = make_strategies(folder)
    toml = f"[[datasets]]\nresolution = 64\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = '{folder / 'images'}'\n"
    options = make_options(dataset_config=write_toml(folder / "data.toml", toml))
    start = time.perf_counter()
    first = build(options, strategies)
    cold, start, before = time.perf_counter() - start, time.perf_counter(), resident()
    second = build(options, strategies)
    warm, kept = time.perf_counter() - start, resident() - before
    start = time.perf_counter()
    second.train.plan(0)
    assert first.train.num_images == second.train.num_images
    return {"first": cold, "second": warm, "bytes": kept / second.train.num_images, "plan": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        sys.stdout.write(json.dumps(measure(Path(arguments.folder))) + "\n")
        return
    from facts import commit, machine

    for count in arguments.counts:
        with tempfile.TemporaryDirectory() as temporary:
            write_pictures(Path(temporary) / "images", count)
            command = [sys.executable, __file__, f"--folder={temporary}"]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(result.stdout.splitlines()[-1])
        row = {
            "scenario": f"data_scale_{count}",
            "seconds_first": round(found["first"], 2),
            "seconds_again": round(found["second"], 2),
            "seconds_epoch_order": round(found["plan"], 3),
            "bytes_per_image": round(found["bytes"]),
            "commit": commit(),
            "machine": machine(),
        }
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
