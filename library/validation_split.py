"""Which pictures are held out for validation: a function of their content, so that no copy of one is trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from library.rng import key_to_seed

logger = logging.getLogger(__name__)


def chosen(digests: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """`share` of the distinct `digests`, rounded. The same whatever their order, and however often one occurs."""
    order = sorted(set(digests), key=lambda digest: (key_to_seed(seed, "validation", digest), digest))
    return frozenset(order[: round(len(order) * share)])


def held_out(subsets: Sequence[tuple[str, float, int, Sequence[Path]]], digests: Mapping[Path, str]) -> frozenset[Path]:
    """Every picture whose content is held out by some subset: (name, share, seed, pictures).

    digests: content hashes of all pictures, also of those subsets of which nothing is held out.
    """
    contents: set[str] = set()
    for name, share, seed, paths in subsets:
        if not share:
            continue
        taken = chosen((digests[path] for path in paths), share, seed)
        if not taken:
            logger.warning("%s: validation_split %g of %d images is none", name, share, len(paths))
        contents |= taken
    return frozenset(path for path, digest in digests.items() if digest in contents)
