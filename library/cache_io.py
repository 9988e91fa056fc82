"""Cache files: sd-scripts' npz layout, with a fingerprint of everything the content depends on, written atomically.

A file without a fingerprint was written by sd-scripts. It is used when its shapes fit, and said so once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from library.compact import Lookup, PathBuilder, Paths, SharedArray
from library.errors import UserError, is_disk_full
from library.image_io import content_hash, content_seed
from library.strategy_base import LATENT_DTYPE, Conditioning, TextEncoderOutputsCachingStrategy

if TYPE_CHECKING:
    from library.cache_formats import LatentFormat

FORMAT_VERSION = "1"

_LONGEST_NAME = 255
"""Bytes in a file's name, on nearly every file system."""

_DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile)
"""What reading a file raises that is not there, or not what it should be."""

_SMALL = 4096
"""Bytes of an array that is read whole when a file is checked, such as its fingerprint."""

TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.npz\.tmp")
"""Names of files that are being written."""

PART_NAMES = {
    "format": "the cache format",
    "image": "the image's content",
    "recipe": "the image's size, bucket or resizing",
    "vae": "the VAE",
    "precision": "the precision",
    "strategy": "how latents are encoded",
    "caption": "the caption",
    "tokenizer": "the tokenizer or its length",
    "encoding": "how captions are encoded",
    "denoiser": "the base model",
    "prior": "the views, noises or times that it is asked about",
}
"""Part of a fingerprint -> what it is called when it differs; a text encoder's own part is named after it."""


def short_hash(text: str, digits: int = 16) -> str:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()[:digits]


# Files


def cache_path(beside: Path, cache_dir: str | None) -> Path:
    """Where a cache file that sd-scripts would put at `beside` is kept: there, or under `cache_dir`.

    There it lies in a folder named by a hash of its absolute folder, so that equal names from two folders stay apart.
    """
    if not cache_dir:
        return _short_enough(beside)
    return _short_enough(Path(cache_dir) / short_hash(str(beside.absolute().parent)) / beside.name)


def own_path(wanted: Path, content: str) -> Path:
    """A name beside `wanted` for another entry (`content` tells which) that would have had the same one."""
    return _short_enough(wanted.with_name(f"{wanted.stem}_{short_hash(content, 8)}{wanted.suffix}"))


def _short_enough(path: Path) -> Path:
    """`path`; where its name is too long for a file, one that is cut, with a hash of the whole: pictures may have any name."""
    if len(os.fsencode(path.name)) <= _LONGEST_NAME:
        return path
    tail = f"_{short_hash(path.name)}{path.suffix}"
    head = os.fsencode(path.stem)[: _LONGEST_NAME - len(tail)].decode(errors="ignore")
    return path.with_name(head + tail)


class CacheDiskFull(UserError):
    """There is no room for a cache file."""


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the whole file or nothing: a temporary file in the same folder takes its place when it is complete.

    Raises `UserError`; `CacheDiskFull` where that is why.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.npz.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError as error:
        kind = CacheDiskFull if is_disk_full(error) else UserError
        raise kind(
            f"cannot write the cache file {path}: {error.strerror or error}. "
            "Free some space, or name another folder with --cache_dir."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # not there when all went well; nothing more can be done when all went wrong
            temporary.unlink()


def read_npz(path: Path) -> dict[str, np.ndarray] | None:
    """Every array of the file; None when it is not there or is damaged (cut short by another program)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _DAMAGE:
        return None


def read_array(path: Path, name: str) -> np.ndarray | None:
    """One array of the file; None as in `read_npz`, and where there is none of that name."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name] if name in archive.files else None
    except _DAMAGE:
        return None


def describe_npz(path: Path) -> dict[str, np.ndarray] | None:
    """`read_npz` without reading more than a few kilobytes: a large array is zeros of its shape, which take no memory.

    So a damaged byte within one is not found here, but when the array is used.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _described(archive, info) for info in archive.infolist()}
    except _DAMAGE:
        return None


def _described(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        data = file.read(_SMALL if info.file_size > _SMALL else -1)  # to its end, so that its checksum is looked at
    start = 10 if data[:8] == b"\x93NUMPY\x01\x00" else 12
    end = start + int.from_bytes(data[8:start], "little")
    shape, fortran, dtype = _header(data[:end])
    if info.file_size > _SMALL or 0 in shape:
        return np.broadcast_to(np.zeros((), dtype), shape)
    return np.frombuffer(data, dtype, offset=end).reshape(shape, order="F" if fortran else "C")


@lru_cache(1000)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether columns come first, dtype) of an array's file. Parsed once for all files that begin alike."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("pickled objects")
    return shape, fortran, dtype


def _unfit(path: Path, problem: str) -> UserError:
    return UserError(f"the cache file {path} does not fit ({problem}). Remove it, or --skip_cache_check.")


class LostEntry(UserError):
    """A cache file that was there when training began, and cannot be read now."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"the cache file {path} was removed or damaged while training. Remove what is left of it, and start again: then it "
            "is made anew."
        )


# Fingerprints


@dataclass(frozen=True)
class Stamp:
    """The picture a cache entry was made from. Size and time are looked at first: reading every picture would take long."""

    path: Path
    known: str | None = None
    """The content hash, where the file has been read already."""
    seen: tuple[int, int] | None = None
    """Size and time before it was read: had the file changed meanwhile, the entry would not be taken for the new picture's."""

    @classmethod
    def before_reading(cls, path: Path) -> Stamp:
        status = path.stat()
        return cls(path, seen=(status.st_size, status.st_mtime_ns))

    @cached_property
    def digest(self) -> str:
        if self.known is not None:
            return self.known
        try:
            return content_hash(self.path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read the image {self.path}: {error.strerror or error}.") from error

    @cached_property
    def stat(self) -> list[int]:
        if self.seen is not None:
            return list(self.seen)
        status = self.path.stat()
        return [status.st_size, status.st_mtime_ns]

    def is_same(self, digest: str, stat: object) -> bool:
        """Not where it cannot be read: whoever makes the entry again will say so."""
        try:
            return self.stat == stat or self.digest == digest
        except (OSError, UserError):
            return False


@dataclass(frozen=True)
class Fingerprint:
    """What an entry depends on, as short texts by part. Kept as JSON in the array named `fingerprint`."""

    parts: Mapping[str, str]
    image: Stamp | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Written beside the parts and not compared."""

    def to_array(self) -> np.ndarray:
        content: dict[str, Any] = {"parts": {"format": FORMAT_VERSION, **self.parts}, **self.extra}
        if self.image is not None:
            content |= {"image": self.image.digest, "stat": self.image.stat}
        return np.array(json.dumps(content))

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """Names of the parts in which the entry that `stored` describes differs from what is wanted now.

        What the entry depends on beside that (another encoder, whose outputs are not wanted now) makes no difference.
        """
        wanted = {"format": FORMAT_VERSION, **self.parts}
        found = stored.get("parts", {})
        differing = [name for name in wanted if wanted[name] != found.get(name)]
        if self.image is not None and not self.image.is_same(stored.get("image", ""), stored.get("stat")):
            differing.append("image")
        return [PART_NAMES.get(name, name) for name in differing]


def stored_fingerprint(arrays: Mapping[str, np.ndarray], suffix: str = "") -> dict[str, Any] | None:
    """The content of the `fingerprint` array; None for a file by sd-scripts, empty when it cannot be read."""
    array = arrays.get(f"fingerprint{suffix}")
    if array is None:
        return None
    try:
        content = json.loads(str(array))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Verdict:
    """Whether an entry can be used; `stale` says why not ("" where there is none), `foreign` that it has no fingerprint."""

    usable: bool
    stale: str = ""
    foreign: bool = False


# Latents


@dataclass(frozen=True)
class CachedLatents:
    """One picture's entry: stored latents [C, h, w] in `LATENT_DTYPE`, those of its mirror image if it needs them, and the key
    of its sample."""

    latents: Tensor
    flipped: Tensor | None
    seed: int
    crop_ltrb: tuple[float, ...] | None = None
    """What the file says was cut: ours what was cut, sd-scripts' what it trained with. None where no file says."""


@dataclass(frozen=True)
class LatentFile:
    """Where the latents of one picture in one bucket are kept, and under which keys."""

    path: Path
    suffix: str
    """Behind every key: `_{h}x{w}` of the latents where a file holds several resolutions, else empty."""
    shape: tuple[int, int, int]
    original: tuple[int, int]
    needs_flipped: bool
    format: LatentFormat

    @property
    def _names(self) -> list[str]:
        return ["latents", "latents_flipped"] if self.needs_flipped else ["latents"]

    def _found_suffix(self, arrays: Mapping[str, np.ndarray]) -> str | None:
        """The suffix this entry has in the file: its own, or that of the other layout (sd-scripts has used both)."""
        other = f"_{self.shape[1]}x{self.shape[2]}" if not self.suffix else ""
        return next((suffix for suffix in (self.suffix, other) if f"latents{suffix}" in arrays), None)

    def check(self, fingerprint: Fingerprint) -> Verdict:
        """Whether the file's entry is what encoding the picture now would give."""
        if not self.path.exists():
            return Verdict(False)
        arrays = describe_npz(self.path)
        if arrays is None:
            return Verdict(False, "unreadable file")
        suffix = self._found_suffix(arrays)
        if suffix is None:
            return Verdict(False)
        stored = stored_fingerprint(arrays, suffix)
        if stored is not None:
            differing = fingerprint.differences(stored)
            if differing:
                return Verdict(False, " and ".join(differing))
        problem = self._problem(arrays, suffix)
        return Verdict(not problem, problem, foreign=stored is None and not problem)

    def fits(self) -> bool:
        """Whether the file has this entry, whatever it was made from. Not said of files without one."""
        arrays = describe_npz(self.path)
        suffix = None if arrays is None else self._found_suffix(arrays)
        return arrays is not None and suffix is not None and not self._problem(arrays, suffix)

    def _problem(self, arrays: Mapping[str, np.ndarray], suffix: str) -> str:
        for name in self._names:
            array = arrays.get(name + suffix)
            if array is None:
                return "no mirrored latents"
            if self.format.latents(array).shape != self.shape:
                return f"{name} of another shape"
        size = arrays.get(f"original_size{suffix}")
        if size is not None and tuple(int(side) for side in size) != self.original:
            return "the image's size"
        return ""

    def _not_finite(self, arrays: Mapping[str, np.ndarray], suffix: str) -> str:
        bad = [name for name in self._names if not np.isfinite(arrays[name + suffix]).all()]
        return f"{bad[0]} with NaN or infinite values" if bad else ""

    def save(
        self, latents: Tensor, flipped: Tensor | None, crop_ltrb: tuple[int, int, int, int], fingerprint: Fingerprint
    ) -> None:
        """Replace this entry; those of other resolutions in the same file are kept."""
        arrays = (read_npz(self.path) or {}) if self.suffix else {}
        entry: dict[str, Any] = {
            "latents": latents.cpu().numpy(),
            "original_size": np.array(self.original),
            "crop_ltrb": np.array(crop_ltrb),
            "fingerprint": fingerprint.to_array(),
        }
        arrays.pop(f"latents_flipped{self.suffix}", None)
        if flipped is not None:
            entry["latents_flipped"] = flipped.cpu().numpy()
        write_npz(self.path, arrays | {name + self.suffix: array for name, array in entry.items()})

    def load(self) -> CachedLatents:
        """The entry; it has been checked, so what is wrong now happened since."""
        arrays = read_npz(self.path)
        suffix = self._found_suffix(arrays) if arrays is not None else None
        if arrays is None or suffix is None:
            raise LostEntry(self.path)
        problem = self._problem(arrays, suffix) or self._not_finite(arrays, suffix)
        if problem:
            raise _unfit(self.path, problem)
        flipped = self._latents(arrays, f"latents_flipped{suffix}") if self.needs_flipped else None
        stored = stored_fingerprint(arrays, suffix) or {}
        crop = arrays.get(f"crop_ltrb{suffix}")
        return CachedLatents(
            self._latents(arrays, f"latents{suffix}"),
            flipped,
            content_seed(stored["image"]) if stored.get("image") else 0,
            None if crop is None else tuple(float(side) for side in crop),
        )

    def _latents(self, arrays: Mapping[str, np.ndarray], name: str) -> Tensor:
        """sd-scripts stores float32, and so did we once: rounded now, they are what a new entry would hold."""
        return torch.from_numpy(self.format.latents(arrays[name])).to(LATENT_DTYPE)


_LATENT_ROW = np.dtype([("suffix", np.int32), ("shape", np.int32, 3), ("original", np.int32, 2), ("needs_flipped", np.bool_)])


@dataclass(frozen=True, eq=False)
class LatentFiles:
    """`LatentFile`s by entry key, in about a hundred bytes each."""

    keys: Lookup
    paths: Paths
    rows: SharedArray  # [N] of _LATENT_ROW
    suffixes: tuple[str, ...]
    format: LatentFormat

    @classmethod
    def of(cls, files: Mapping[str, LatentFile], format: LatentFormat) -> LatentFiles:
        paths, suffixes = PathBuilder(), dict[str, int]()
        rows = np.zeros(len(files), _LATENT_ROW)
        for number, file in enumerate(files.values()):
            paths.add(str(file.path))
            suffix = suffixes.setdefault(file.suffix, len(suffixes))
            rows[number] = suffix, file.shape, file.original, file.needs_flipped
        return cls(Lookup.of(files), paths.done(), SharedArray(rows), tuple(suffixes), format)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, key: str) -> LatentFile:
        number = self.keys.find(key)
        if number is None:
            raise KeyError(key)
        suffix, shape, original, needs_flipped = self.rows.values[number].tolist()
        return LatentFile(self.paths[number], self.suffixes[suffix], tuple(shape), tuple(original), needs_flipped, self.format)


@dataclass(frozen=True)
class LatentCache:
    """Latents by entry key (`entry_key`), in memory or in files."""

    memory: Mapping[str, CachedLatents] = field(default_factory=dict)
    files: LatentFiles | None = None

    def get(self, key: str) -> CachedLatents:
        """Raises `KeyError` where there never was an entry, `LostEntry` where its file is not there any more."""
        return self.memory[key] if self.files is None or key in self.memory else self.files[key].load()

    @property
    def in_memory(self) -> bool:
        return self.files is None


def entry_key(path: Path, recipe: str) -> str:
    return f"{path}|{recipe}"


# Text encoder outputs


@dataclass(frozen=True)
class TextFile:
    """Where the encoder outputs of one caption are kept."""

    path: Path
    strategy: TextEncoderOutputsCachingStrategy
    sources: frozenset[str]
    """Encoders whose fields are cached."""
    compact: bool = False
    """Whether bfloat16 is stored in its two bytes. sd-scripts reads four only, so not under a name that it would read."""

    def _keys(self) -> dict[str, str]:
        """Field -> key in the file."""
        fields = [f for f in self.strategy.conditioning.tensor_fields() if f.metadata["source"] in self.sources]
        return {f.name: self.strategy.legacy_keys.get(f.name, f.name) for f in fields}

    def check(self, fingerprint: Fingerprint) -> Verdict:
        if not self.path.exists():
            return Verdict(False)
        arrays = describe_npz(self.path)
        if arrays is None:
            return Verdict(False, "unreadable file")
        stored = stored_fingerprint(arrays)
        if stored is not None:
            differing = fingerprint.differences(stored)
            if differing:
                return Verdict(False, " and ".join(differing))
        problem = self._problem(arrays)
        if not problem and stored is None:
            problem = self.strategy.foreign_problem(arrays)
        return Verdict(not problem, problem, foreign=stored is None and not problem)

    def _problem(self, arrays: Mapping[str, np.ndarray]) -> str:
        """Of the file's arrays, whoever wrote them ("" if there is none)."""
        arrays = self.strategy.from_file(arrays)
        for name, key in self._keys().items():
            if key not in arrays:
                return f"no {key}"
            found, wanted = arrays[key].shape, self.strategy.shapes.get(name)
            if wanted is not None and found != wanted:
                return f"{key} of the shape {found}, not {wanted}: another text encoder's, or of another length"
        return ""

    def save(self, entry: Conditioning, fingerprint: Fingerprint) -> None:
        """One unbatched entry. numpy has no bfloat16: it is stored as float32 or as its bits, and its name beside it."""
        tensors = entry.tensors()
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        keys = self._keys()
        arrays = {keys[name]: self._to_numpy(tensor) for name, tensor in tensors.items() if name in keys}
        arrays = self.strategy.in_file(arrays)
        described = Fingerprint(fingerprint.parts, fingerprint.image, {"dtypes": dtypes})
        write_npz(self.path, arrays | {"fingerprint": described.to_array()})

    def _to_numpy(self, tensor: Tensor) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.int16) if self.compact else tensor.float()
        return tensor.cpu().numpy()

    def load(self) -> Conditioning:
        stored = read_npz(self.path)
        keys = self._keys()
        arrays = {} if stored is None else self.strategy.from_file(stored)
        if any(key not in arrays for key in keys.values()):
            raise LostEntry(self.path)
        if problem := self._problem(arrays):
            raise _unfit(self.path, problem)
        dtypes = (stored_fingerprint(arrays) or {}).get("dtypes", {})
        tensors = {}
        for name, key in keys.items():
            tensor = torch.from_numpy(arrays[key])
            if dtypes.get(name) == "bfloat16" and tensor.dtype == torch.int16:
                tensor = tensor.view(torch.bfloat16)
            tensors[name] = tensor.to(getattr(torch, dtypes[name])) if name in dtypes else tensor
        return self.strategy.conditioning(**tensors)


@dataclass(frozen=True, eq=False)
class TextFiles:
    """`TextFile`s by caption, in a few dozen bytes each."""

    captions: Lookup
    paths: Paths
    compact: SharedArray  # bool [N]
    strategy: TextEncoderOutputsCachingStrategy
    sources: frozenset[str]

    @classmethod
    def of(
        cls, files: Mapping[str, TextFile], strategy: TextEncoderOutputsCachingStrategy, sources: frozenset[str]
    ) -> TextFiles:
        paths = PathBuilder()
        for file in files.values():
            paths.add(str(file.path))
        compact = np.fromiter((file.compact for file in files.values()), np.bool_)
        return cls(Lookup.of(files), paths.done(), SharedArray(compact), strategy, sources)

    def get(self, caption: str) -> TextFile | None:
        number = self.captions.find(caption)
        if number is None:
            return None
        return TextFile(self.paths[number], self.strategy, self.sources, bool(self.compact.values[number]))


@dataclass(frozen=True)
class TextCache:
    """Unbatched conditioning by caption, in memory or in files."""

    conditioning: type[Conditioning]
    complete: bool
    """Whether the fields of every encoder are cached, so that nothing has to be tokenized."""
    memory: Mapping[str, Conditioning] = field(default_factory=dict)
    files: TextFiles | None = None

    def get(self, caption: str) -> Conditioning:
        """Raises `LostEntry` where its file is not there any more."""
        if caption in self.memory:
            return self.memory[caption]
        file = None if self.files is None else self.files.get(caption)
        if file is not None:
            return file.load()
        raise UserError(f"the caption {caption!r} is not in the text encoder cache: captions must not change while it is used.")
