"""The four strategies of a family, and the conditioning they produce.

Strategies are values: frozen dataclasses without models, held by whoever uses them and pickled to data loader workers.
A family's `Conditioning` is a frozen dataclass whose tensor fields are tagged with the encoder that makes them. Cache keys,
collation, device moves, dropout and the mixing of cached with live fields all follow from those tags.

Shapes: B batch, M text tokens, N text chunks, D width, C latent channels, H x W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from library.cache_formats import LatentFormat, TextFormat

Tokens = Mapping[str, Tensor]
"""Token ids by encoder name, each [B, N, M]; `<encoder>.weights` beside them when prompts are weighted."""

ConditioningT = TypeVar("ConditioningT", bound="Conditioning")

LATENT_DTYPE = torch.float16
"""Of stored latents: half of float32, with a rounding error of at most 2^-11 of each value (bfloat16: 2^-8), read by numpy and
so by sd-scripts. Latents lie far within its range (65504); one that does not is reported as not finite."""


def tensor_field(*, source: str, pad: bool = False) -> Any:
    """A tensor of a `Conditioning`, made by the encoder named `source`.

    `pad`: rows may differ in their first dimension (tokens) and are zero-padded to the longest when collated.
    """
    return field(default=None, kw_only=True, metadata={"source": source, "pad": pad})


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is conditioned on. A field is [B, ...]; None where its encoder has not run (or runs live)."""

    @classmethod
    def tensor_fields(cls) -> tuple[Field[Any], ...]:
        return tuple(f for f in fields(cls) if "source" in f.metadata)

    @classmethod
    def sources(cls) -> frozenset[str]:
        """Names of all encoders this conditioning needs."""
        return frozenset(f.metadata["source"] for f in cls.tensor_fields())

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present, by name."""
        return {f.name: value for f in self.tensor_fields() if (value := getattr(self, f.name)) is not None}

    def _map(self: ConditioningT, change: Any) -> ConditioningT:
        return replace(self, **{name: change(value) for name, value in self.tensors().items()})

    def to(self: ConditioningT, device: torch.device | str) -> ConditioningT:
        """On `device`. Only copies to a device are left running: one to the CPU could be read before it is complete."""
        return self._map(lambda value: value.to(device, non_blocking=torch.device(device).type != "cpu"))

    def rows(self: ConditioningT, index: Any) -> ConditioningT:
        """The rows `index` selects: an int gives one unbatched entry (a cache entry), a slice or tensor a batch."""
        return self._map(lambda value: value[index])

    def only(self: ConditioningT, sources: Iterable[str]) -> ConditioningT:
        """A copy in which only the fields of the named encoders are kept."""
        kept = set(sources)
        return replace(self, **{f.name: None for f in self.tensor_fields() if f.metadata["source"] not in kept})

    def missing(self) -> frozenset[str]:
        """Encoders whose fields are absent and must run live."""
        return frozenset(f.metadata["source"] for f in self.tensor_fields() if getattr(self, f.name) is None)

    def merged(self: ConditioningT, live: ConditioningT) -> ConditioningT:
        """This (cached) conditioning, with every field that `live` has taken from `live`."""
        return replace(self, **live.tensors())

    def without(self: ConditioningT, source: str, rows: Tensor) -> ConditioningT:
        """Zeros for all that the encoder named `source` gave in the rows where `rows` ([B] bool) is set."""
        given = self.only({source}).tensors()
        return replace(self, **{n: v.masked_fill(rows.view(-1, *[1] * (v.ndim - 1)), 0) for n, v in given.items()})

    def fitted(self: ConditioningT, lengths: Sequence[int]) -> ConditioningT:
        """Padded fields without the tokens that no row needs: row i needs the first `lengths[i]`."""
        longest = max(lengths)
        padded = {f.name for f in self.tensor_fields() if f.metadata["pad"]}
        return replace(self, **{name: value[:, :longest] for name, value in self.tensors().items() if name in padded})

    @classmethod
    def collate(cls: type[ConditioningT], entries: Sequence[ConditioningT]) -> ConditioningT:
        """Unbatched entries -> one batch; padded fields to the longest entry."""
        batch: dict[str, Tensor] = {}
        for f in cls.tensor_fields():
            values = [getattr(entry, f.name) for entry in entries]
            if any(value is None for value in values):
                continue
            batch[f.name] = nn.utils.rnn.pad_sequence(values, batch_first=True) if f.metadata["pad"] else torch.stack(values)
        return cls(**batch)


@dataclass(frozen=True)
class TokenizeStrategy(ABC):
    """Captions to token ids. Has the tokenizer, no model and no device; runs in data loader workers."""

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> Tokens: ...

    def lengths(self, captions: Sequence[str]) -> Sequence[int] | None:
        """How many tokens the denoiser sees of each caption. None: all that there are, padding too."""
        return None

    def fitted(self, tokens: Tokens, lengths: Sequence[int]) -> Tokens:
        """`tokens` without those that none of the captions needs, which have these `lengths`."""
        return tokens

    def for_negatives(self) -> TokenizeStrategy:
        """For what pictures are led away from, where that is told otherwise than what they should show."""
        return self

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the ids for a caption could (vocabulary, length, prompt template, weighting)."""


@dataclass(frozen=True)
class TextEncodingStrategy(ABC):
    """Token ids to conditioning."""

    @abstractmethod
    def encode(self, encoders: Mapping[str, nn.Module], tokens: Tokens, only: frozenset[str] | None = None) -> Conditioning:
        """Run the encoders named by `only` (all of them when None). Fields of the others are None. Grad follows the caller."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the outputs for given ids and weights could (layer taken, normalisation, masks)."""


@dataclass(frozen=True)
class LatentsCachingStrategy(ABC):
    """Images to latents as sd-scripts stores them, and the names of its cache files."""

    format: ClassVar[LatentFormat]

    @abstractmethod
    def encode(self, vae: nn.Module, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> stored latents [B, C, H/stride, W/stride], float32.

        Row i's posterior sample is drawn with `keyed_generator("vae", seeds[i])`, so an image has the same latent
        whatever batch it stands in, cached or live.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the stored latents of an image could, beyond the VAE's own weights."""

    def stored(self, vae: nn.Module, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """What `encode` gives, rounded to `LATENT_DTYPE`: what a cache keeps and, so that it is the same, what is trained
        without one."""
        return self.encode(vae, images, seeds).to(LATENT_DTYPE)


@dataclass(frozen=True)
class TextEncoderOutputsCachingStrategy(ABC):
    """Which conditioning is cached, and under which names. Loading and saving are generic over the tagged fields."""

    format: ClassVar[TextFormat]
    conditioning: type[Conditioning]
    legacy_keys: ClassVar[Mapping[str, str]] = {}
    """Field name -> key in sd-scripts' npz, where the two differ."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, kw_only=True)
    """Field name -> its shape in an entry: what was cached for another model, or for captions of another length, differs."""

    def in_file(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Our arrays as sd-scripts has them, and what it looks for beside them: it makes files without that again."""
        return dict(arrays)

    def from_file(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse; what stands beside our arrays may stay."""
        return dict(arrays)

    def foreign_problem(self, arrays: Mapping[str, np.ndarray]) -> str:
        """Why sd-scripts' file, which has all keys, cannot be used ("" if it can): it has no fingerprint that would say."""
        return ""


@dataclass(frozen=True)
class Strategies:
    """The four strategies of one family, wired together by its script."""

    tokenize: TokenizeStrategy
    text_encoding: TextEncodingStrategy
    latents_caching: LatentsCachingStrategy
    text_caching: TextEncoderOutputsCachingStrategy
