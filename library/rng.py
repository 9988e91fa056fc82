"""Keyed randomness: a generator is a function of its key, so nothing has to be saved for an exact resume."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from random import Random

import torch


def key_to_seed(*key: object) -> int:
    """A 56-bit seed that depends on every part of `key` and on nothing else (56 bits fit every generator)."""
    text = "/".join(str(part) for part in key).encode(errors="surrogatepass")  # names of files may be no UTF-8
    return int.from_bytes(blake2b(text, digest_size=7).digest(), "big")


def keyed_generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device` for `key`."""
    return torch.Generator(device).manual_seed(key_to_seed(*key))


def keyed_random(*key: object) -> Random:
    """A Python generator for `key`, for captions, crops and orders: work that happens without tensors."""
    return Random(key_to_seed(*key))


@dataclass(frozen=True)
class StepRng:
    """Generators for one micro-batch. `step`: its number in the run, over all processes in turn, so that several processes
    draw what one would draw that accumulates as many batches."""

    seed: int
    step: int = 0

    def at(self, step: int) -> StepRng:
        return replace(self, step=step)

    def seed_of(self, stream: str) -> int:
        """Depends on (seed, step, stream) and on nothing else."""
        return key_to_seed(self.seed, 0, self.step, stream)  # the 0 was once the process's number

    def __call__(self, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(self.seed_of(stream))
