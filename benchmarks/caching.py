"""Pictures per second into the latent cache, against a plain loop that reads, resizes, encodes and saves one after the other.

    python benchmarks/caching.py [--images 24] [--rounds 5] [--out benchmarks/results.jsonl]

Both use the same tiny VAE with one thread and write npz files; pictures have the size of a camera's. The two take turns; the
row has the median of their ratios. `limit` is what overlapping could give at most, by the processor time that the plain loop
takes for reading and for encoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SIZE, RESOLUTION = (4000, 3000), 256


def write_pictures(folder: Path, count: int) -> None:
    """JPEG files of photographs' size and smoothness."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for key in range(count):
        noise = np.random.default_rng(key).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{key}.jpg", quality=92)
        (folder / f"{key}.txt").write_text("a picture")


def plain_loop(folder: Path, out: Path) -> tuple[float, float]:
    """(seconds, what overlapping could give): decode, resize, encode, save, one picture after the other."""
    import cv2
    import numpy as np
    import torch
    from data_tools import make_bundle
    from PIL import Image

    vae = make_bundle().vae
    out.mkdir(parents=True)
    start = time.perf_counter()
    reading = encoding = 0.0
    with torch.no_grad():
        for path in sorted(folder.glob("*.jpg")):
            before = time.thread_time()
            pixels = np.array(Image.open(path).convert("RGB"))
            pixels = cv2.resize(pixels, (RESOLUTION, RESOLUTION), interpolation=cv2.INTER_AREA)
            read = time.thread_time()
            image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
            latents = vae.encode(image).latent_dist.sample()
            np.savez(out / f"{path.stem}.npz", latents=latents[0].numpy())
            reading, encoding = reading + read - before, encoding + time.thread_time() - read
    return time.perf_counter() - start, (reading + encoding) / max(reading, encoding)


def ours(folder: Path, out: Path) -> float:
    import torch
    from data_tools import build, make_bundle, make_options, make_strategies, write_toml

    from library.caching import cache_latents

    strategies = make_strategies(out)
    toml = f"[[datasets]]\nresolution = {RESOLUTION}\n[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
    config = write_toml(out / "data.toml", toml)
    data = build(make_options(dataset_config=config, cache_latents_to_disk=True, cache_dir=str(out / "cache")), strategies)
    bundle = make_bundle()
    assert bundle.vae is not None  # read before the clock starts, as the other's is
    start = time.perf_counter()
    cache_latents(data, strategies, bundle, data.options, torch.device("cpu"))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="append the row to this file, too")
    arguments = parser.parse_args()
    import cv2
    import torch
    from facts import commit, machine

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    plain, own, limits = [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pictures(folder / "images", arguments.images)
        ours(folder / "images", folder / "warm")
        for number in range(arguments.rounds):
            seconds, limit = plain_loop(folder / "images", folder / f"plain{number}")
            plain.append(seconds)
            limits.append(limit)
            own.append(ours(folder / "images", folder / f"ours{number}"))
    ratios = [p / o for p, o in zip(plain, own, strict=True)]
    row = {
        "commit": commit(),
        "machine": machine(),
        "scenario": "caching_latents",
        "pictures": f"{arguments.images} JPEG files of {SIZE[0]}x{SIZE[1]}",
        "images_per_second": round(arguments.images / statistics.median(own), 2),
        "plain_images_per_second": round(arguments.images / statistics.median(plain), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "limit": round(statistics.median(limits), 2),
    }
    line = json.dumps(row) + "\n"
    sys.stdout.write(line)
    if arguments.out:
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.write(line)


if __name__ == "__main__":
    main()
