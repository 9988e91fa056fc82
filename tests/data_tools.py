"""Pictures, options and a tiny model for the data tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image

from library.caching import cache_latents, cache_text_outputs
from library.clip_text import ClipCaptions
from library.clip_tokenizer import load_clip_tokenizer
from library.dataset import TrainData, build_train_data
from library.family_base import LatentSpec, ModelBundle
from library.option_groups import NetworkTrainOptions
from library.options import from_flags
from library.strategy_base import Strategies
from library.strategy_sd import (
    SdLatentsCachingStrategy,
    SdTextEncoderOutputsCachingStrategy,
    SdTextEncodingStrategy,
    SdTokenizeStrategy,
)

CPU = torch.device("cpu")
LATENT = LatentSpec(channels=4, stride=8, scale=0.18215)


def write_picture(path: Path, size: tuple[int, int] = (64, 64), key: int = 0, caption: str | None = None) -> Path:
    """A picture of noise, different for each key, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(key).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def write_folder(folder: Path, sizes: list[tuple[int, int]], captions: bool = True) -> Path:
    for index, size in enumerate(sizes):
        write_picture(folder / f"p{index}.png", size, index, f"picture {index}, tag" if captions else None)
    return folder


def make_options(**flags: Any) -> NetworkTrainOptions:
    return from_flags(NetworkTrainOptions, **{"seed": 7, "max_data_loader_n_workers": 0, **flags})


def write_toml(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def make_strategies(folder: Path) -> Strategies:
    tokenizer = load_clip_tokenizer(tiny.write_clip_tokenizer(folder / "tokenizer"))
    return Strategies(
        SdTokenizeStrategy(ClipCaptions(tokenizer)),
        SdTextEncodingStrategy(),
        SdLatentsCachingStrategy(),
        SdTextEncoderOutputsCachingStrategy(),
    )


class Loads:
    """Which parts of the model were read, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []


@lru_cache(maxsize=1)
def _parts() -> dict[str, torch.nn.Module]:
    return tiny.sd_modules()


def make_bundle(vae_identity: str = "vae-1", text_identity: str = "text-1", loads: Loads | None = None) -> ModelBundle:
    """A tiny real VAE and text encoder, the same each time; `loads` is told what is read."""

    def loader(name: str) -> torch.nn.Module:
        if loads is not None:
            loads.names.append(name)
        return copy.deepcopy(_parts()[name])

    return ModelBundle(
        loaders={name: (lambda name=name: loader(name)) for name in ("vae", "text_encoder")},
        text_encoder_names=("text_encoder",),
        device=torch.device("cpu"),
        dtype=torch.float32,
        identity={"vae": vae_identity, "text_encoder": text_identity},
    )


def build(options: NetworkTrainOptions, strategies: Strategies, latent: LatentSpec = LATENT) -> TrainData:
    return build_train_data(options, latent, strategies, mode="network")


@dataclass
class Case:
    """A folder of four pictures of two shapes, and the datasets over it."""

    folder: Path
    strategies: Strategies

    def data(self, *, dataset: str = "", subset: str = "", more: str = "", **flags: Any) -> TrainData:
        text = (
            "[general]\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32\n"
            f"[[datasets]]\nresolution = 64\nbatch_size = 2\n{dataset}[[datasets.subsets]]\n"
            f"image_dir = '{self.folder / 'img'}'\n{subset}{more}"
        )
        return build(make_options(dataset_config=write_toml(self.folder / "data.toml", text), **flags), self.strategies)

    def latents(self, data: TrainData, bundle: ModelBundle | None = None, strategies: Strategies | None = None) -> list[str]:
        """Cache them; gives the parts of the model that had to be read."""
        loads = Loads()
        bundle = bundle or make_bundle()
        counted = make_bundle(bundle.identity["vae"], bundle.identity["text_encoder"], loads)
        cache_latents(data, strategies or self.strategies, counted, data.options, CPU)
        return loads.names

    def text(self, data: TrainData, bundle: ModelBundle | None = None, sources: frozenset[str] | None = None) -> list[str]:
        loads = Loads()
        bundle = bundle or make_bundle()
        counted = make_bundle(bundle.identity["vae"], bundle.identity["text_encoder"], loads)
        cache_text_outputs(data, self.strategies, counted, data.options, CPU, sources)
        return loads.names
