"""Reading checkpoints lazily and thriftily: one tensor at a time, never the model twice.

Every format becomes a `TensorSource`: a table of names, shapes and places in files. Only names and shapes are read when it is
opened. Tensors are read into fresh memory rather than mapped, so a file that has been read does not count against this
process's memory, and can be replaced while it is open.
"""

from __future__ import annotations

import functools
import json
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from library.errors import UserError
from library.key_layout import IDENTITY, KeyMap, Rule
from library.quantization import E4M3, StoredWeight, as_grid, dequantize

if TYPE_CHECKING:
    from collections.abc import Callable

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Shapes = Mapping[str, tuple[int, ...]]
"""Tensor shapes by name, without the file's prefix."""

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)

INERT_GLOBALS = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)
"""Classes that published checkpoints name beside their weights, as keys of a table nobody reads. They are read as an empty
class of ours, so nothing of theirs is imported or run."""

SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
SCALED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_BESIDE_SCALES = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_MAX_HEADER = 100 * 2**20  # safetensors' own limit
_PIECE = 2**16  # elements read at a time while casting; larger pieces fragment the heap
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>(\.\w+)+)")


class _Inert:
    """What stands in for a class of `INERT_GLOBALS`."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file. `stride` and `offset` of its elements within the storage that begins at byte `start`."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0
    stride: tuple[int, ...] | None = None  # None: contiguous
    held: Tensor | None = field(default=None, compare=False, repr=False)
    """The tensor itself, for formats that can only be read whole."""

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, contiguous, in memory of its own; floating-point ones in `dtype`.

        A cast is made in small pieces: the tensor is never in memory in both precisions, and freed buffers leave no holes.
        """
        target = dtype if dtype is not None and self.dtype.is_floating_point else self.dtype
        if self.held is not None:
            return self.held.to(target, copy=True).contiguous()
        span = self.num_elements
        if self.stride is not None and span:
            span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        flat = torch.empty(span, dtype=target)
        if type(flat) is Tensor:  # not so in `memory_tracker.simulated`, where tensors have no memory to read into
            self._read_into(flat)
        if self.stride is None:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.stride).contiguous()

    def _read_into(self, flat: Tensor) -> None:
        with self.file.open("rb") as stream:
            stream.seek(self.start + self.offset * self.dtype.itemsize)
            if flat.dtype == self.dtype:
                self._fill(stream, flat)
                return
            piece = torch.empty(min(len(flat), _PIECE), dtype=self.dtype)
            for begin in range(0, len(flat), _PIECE):
                part = flat[begin : begin + _PIECE]
                self._fill(stream, piece[: len(part)])
                part.copy_(piece[: len(part)])

    def as_fp8(self) -> StoredWeight | None:
        """The tensor as it is in the file with its scale, where the file has it in e4m3; None otherwise."""
        return StoredWeight(self.read().flatten(1), torch.ones(1, 1)) if self.dtype == E4M3 and len(self.shape) > 1 else None

    def _fill(self, stream: BufferedReader, flat: Tensor) -> None:
        view = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        if stream.readinto(view) != len(view):
            raise UserError(f"{self.file} ended while it was read: it has been changed or replaced. Start again.")

    def sample(self, count: int = 256) -> bytes:
        """Bytes from the middle of the tensor: enough to tell one set of weights from another."""
        if self.held is not None:
            middle = self.held.reshape(-1)[self.num_elements // 2 :][:count].contiguous()
            return middle.view(torch.uint8).numpy().tobytes()
        with self.file.open("rb") as stream:
            stream.seek(self.start + (self.offset + self.num_elements // 2) * self.dtype.itemsize)
            return stream.read(min(count, self.num_elements - self.num_elements // 2) * self.dtype.itemsize)


@dataclass(frozen=True)
class JoinedEntry(TensorEntry):
    """Several tensors that are one in another layout."""

    parts: tuple[TensorEntry, ...] = ()
    rule: Rule | None = None

    @classmethod
    def of(cls, parts: tuple[TensorEntry, ...], rule: Rule) -> JoinedEntry:
        first = parts[0]
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
        return cls(first.file, first.start, first.dtype, shape, parts=parts, rule=rule)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        assert self.rule is not None
        return self.rule.join([part.read(dtype) for part in self.parts])

    def as_fp8(self) -> StoredWeight | None:
        """None: the parts may have scales of their own."""
        return None

    def sample(self, count: int = 256) -> bytes:
        return b"".join(part.sample(count) for part in self.parts)


@dataclass(frozen=True)
class ScaledEntry(TensorEntry):
    """A weight that the file has in 8 bits beside its scale. Read as what it stands for, in float32 unless told otherwise."""

    stored: TensorEntry | None = None
    scale: TensorEntry | None = None
    scale_key: str = ""

    @classmethod
    def of(cls, stored: TensorEntry, scale: TensorEntry, scale_key: str) -> ScaledEntry:
        return cls(stored.file, stored.start, torch.float32, stored.shape, stored=stored, scale=scale, scale_key=scale_key)

    def _read_both(self) -> StoredWeight:
        assert self.stored is not None and self.scale is not None
        weight = self.stored.read().flatten(1)
        grid = as_grid(self.scale.read(), weight.shape[0], weight.shape[1])
        if grid is None:
            raise UserError(
                f"{self.file}: '{self.scale_key}' has shape {self.scale.shape}, which is no scale of a weight of shape "
                f"{self.shape}. Give the fp16 or bf16 file."
            )
        return StoredWeight(weight, grid)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        return dequantize(self._read_both(), self.shape, dtype or self.dtype)

    def as_fp8(self) -> StoredWeight | None:
        return self._read_both() if self.stored is not None and self.stored.dtype == E4M3 else None

    def sample(self, count: int = 256) -> bytes:
        assert self.stored is not None and self.scale is not None
        return self.stored.sample(count) + self.scale.sample(count)


@dataclass(frozen=True)
class TensorSource:
    """Named tensors on disk. `prefix`: what their names in the file have before those here."""

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def keys(self) -> list[str]:
        return list(self.entries)

    def shapes(self, key_map: KeyMap = IDENTITY) -> ShapeTable:
        """Of all tensors that `key_map` knows, under our names; each part of a concatenation has the whole's."""
        origins, _ = key_map.origins(self.entries)
        return ShapeTable(self, key_map, {name: self.shape(origin.key) for name, origin in origins.items()})

    def name_in_file(self, name: str, key_map: KeyMap = IDENTITY) -> str:
        """What the tensor that is ours by `name` is called there."""
        return self.prefix + (key_map.their_name(name) or name)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self.entries[key].dtype

    def get(self, key: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """One tensor, read now. `dtype` casts floating-point tensors only; None keeps what the file has."""
        return self.entries[key].read(dtype).to(device)

    def under(self, prefix: str) -> TensorSource:
        """The tensors whose names begin with `prefix`, without it."""
        kept = {key[len(prefix) :]: entry for key, entry in self.entries.items() if key.startswith(prefix)}
        return replace(self, entries=kept, prefix=self.prefix + prefix)

    def only(self, keys: Iterable[str]) -> TensorSource:
        return replace(self, entries={key: self.entries[key] for key in keys})

    def under_their_names(self, key_map: KeyMap) -> TensorSource:
        """The same tensors under the other names of `key_map`, joined when read; those it does not know keep theirs."""
        found, unknown = key_map.assemblies(self.entries)
        joined: dict[str, TensorEntry] = {
            name: JoinedEntry.of(tuple(self.entries[key] for key in made.keys), made.rule) for name, made in found.items()
        }
        return replace(self, entries=joined | {key: self.entries[key] for key in unknown})

    def fingerprint(self) -> str:
        """A hash of names, shapes, dtypes and a sample of every tensor. Moving or copying a file does not change it."""
        digest = blake2b(digest_size=12)
        for key in sorted(self.entries):
            entry = self.entries[key]
            digest.update(f"{key} {entry.shape} {entry.dtype}".encode())
            digest.update(entry.sample())
        return digest.hexdigest()


class ShapeTable(dict[str, tuple[int, ...]]):
    """Shapes by name. To ask for one that is not there is a `UserError`: the sizes of the model are told from it."""

    def __init__(self, source: TensorSource, key_map: KeyMap, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.source, self.key_map = source, key_map

    def __missing__(self, name: str) -> tuple[int, ...]:
        lacking = self.source.name_in_file(name, self.key_map)
        raise UserError(f"{self.source.path} is incomplete: it lacks {lacking}. Get a whole file.")


def count_indices(shapes: Shapes, pattern: str) -> int:
    """How many different numbers `pattern`'s group takes at the start of the names."""
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


# ---- opening -------------------------------------------------------------------------------------------------------


def open_checkpoint(path: Path | str) -> TensorSource:
    """A .safetensors, .ckpt, .pt, .pth or .bin file, or any file of an N-of-M shard set.

    Weights that the file has in 8 bits beside their scales are read as what they stand for. Raises `UserError` for a missing,
    half-written, foreign or unsafe file.
    """
    return _with_scales(_open_files(Path(path)))


def _open_files(path: Path) -> TensorSource:
    shards = _shard_set(path)
    if len(shards) == 1:
        return _open_file(shards[0])
    opened = [_open_file(shard) for shard in shards]
    entries: dict[str, TensorEntry] = {}
    for shard in opened:
        twice = entries.keys() & shard.entries.keys()
        if twice:
            raise UserError(f"'{min(twice)}' is in more than one shard of {path}: the set is mixed up. Download it again.")
        entries.update(shard.entries)
    return TensorSource(path, entries, opened[0].metadata)


def _with_scales(source: TensorSource) -> TensorSource:
    """ComfyUI's scaled fp8 (`x.scale_weight`, or later `x.weight_scale`, beside `x.weight`) as one entry for each weight."""
    entries = dict(source.entries)
    found = False
    for key, entry in source.entries.items():
        for suffix in SCALE_SUFFIXES:
            weight = f"{key.removesuffix(suffix)}.weight"
            if key.endswith(suffix) and weight in entries and entries[weight].dtype in SCALED_DTYPES:
                entries[weight] = ScaledEntry.of(source.entries[weight], entry, key)
                del entries[key]
                found = True
    if not found:
        return source
    # ComfyUI's notes beside them: the kind of fp8, scales of activations
    return replace(source, entries={key: entry for key, entry in entries.items() if not key.endswith(_BESIDE_SCALES)})


def _shard_set(path: Path) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    shards = [path.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}{match['suffix']}") for n in range(1, count + 1)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{path.parent} lacks {len(missing)} of {count} shards: {', '.join(missing[:4])}. Download them again.")
    return shards


def _open_file(path: Path) -> TensorSource:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in WEIGHT_SUFFIXES) if path.parent.is_dir() else []
        raise UserError(f"no such file: {path}." + (f" {path.parent} has: {', '.join(near[:6])}." if near else ""))
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _open_pickle(path)
    raise UserError(f"{path}: unknown kind of file '{path.suffix}'. Known: {', '.join(WEIGHT_SUFFIXES)}.")


def _open_safetensors(path: Path) -> TensorSource:
    """Eight bytes give the length of a JSON table of names, dtypes, shapes and byte ranges; the data follows it."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise UserError(f"{path} is not a safetensors file ({size} bytes). Download or save it again.")
        if size < 8 + length:
            raise UserError(f"{path} is cut off: {size} bytes, and its header alone needs {8 + length}. Download it again.")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError as error:
            raise UserError(f"{path}: the header is not readable ({error}). Download or save the file again.") from error
    metadata = header.pop("__metadata__", {}) or {}
    entries: dict[str, TensorEntry] = {}
    needed = 8 + length
    for key, item in header.items():
        if item["dtype"] not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: '{key}' has dtype {item['dtype']}. Known: {', '.join(SAFETENSORS_DTYPES)}.")
        begin, end = item["data_offsets"]
        entry = TensorEntry(path, 8 + length + begin, SAFETENSORS_DTYPES[item["dtype"]], tuple(item["shape"]))
        if end - begin != entry.num_elements * entry.dtype.itemsize:
            raise UserError(f"{path}: the size of '{key}' does not fit its shape. The file is damaged; download it again.")
        entries[key] = entry
        needed = max(needed, 8 + length + end)
    if size < needed:
        raise UserError(
            f"{path} is cut off: it has {size:,} bytes and needs {needed:,}. "
            "A download or a save was interrupted; get the file again."
        )
    return TensorSource(path, entries, metadata)


def _open_pickle(path: Path) -> TensorSource:
    """A torch file. Only tensors and plain containers are accepted: nothing in the file is ever run."""
    zipped = zipfile.is_zipfile(path)
    if not zipped and path.open("rb").read(2) == b"PK":
        raise UserError(f"{path} is cut off ({path.stat().st_size:,} bytes): its end is missing. Get the file again.")
    # on the meta device torch only notes where in the file each tensor is; files older than torch 1.6 are read whole
    loaded = _load_weights_only(path, "meta" if zipped else "cpu")
    while isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise UserError(f"{path} holds no named tensors. Is it a model checkpoint?")
    return TensorSource(path, {key: _pickle_entry(path, value) for key, value in tensors.items()})


def _load_weights_only(path: Path, device: str) -> Any:
    import pickle

    inert: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(_Inert, name) for name in INERT_GLOBALS]
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = _unsafe_globals(path) or re.findall(r"GLOBAL (\S+)", str(error))
        if unsafe:
            raise UserError(
                f"{path} needs code that a checkpoint should not need ({', '.join(unsafe[:4])}), so it was not opened: "
                "such a file can do anything to this computer. Convert it to safetensors with a tool and on a machine "
                "you trust it on, and use that."
            ) from error
        # torch's own message is left out: it advises to load the file unsafely
        raise UserError(f"{path} ({path.stat().st_size:,} bytes) is not a readable checkpoint. Get it again.") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} ({path.stat().st_size:,} bytes) is damaged or cut off: {error}. Get it again.") from error


def _unsafe_globals(path: Path) -> list[str]:
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, EOFError, KeyError):
        return []
    return sorted(set(found) - set(INERT_GLOBALS))


def _pickle_entry(path: Path, tensor: Tensor) -> TensorEntry:
    if not tensor.is_meta:
        return TensorEntry(path, 0, tensor.dtype, tuple(tensor.shape), held=tensor.detach())
    start: Any = tensor.untyped_storage()._checkpoint_offset
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return TensorEntry(path, start, tensor.dtype, tuple(tensor.shape), int(tensor.storage_offset()), stride)


# ---- where a model is ----------------------------------------------------------------------------------------------


def empty_module(make: Callable[[], nn.Module]) -> nn.Module:
    """`make()` with its parameters on the meta device (no memory, no initialisation) and its buffers real."""
    from accelerate import init_empty_weights
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    # accelerate would give a simulated parameter (`memory_tracker.simulated`) back as one on the CPU
    with unset_fake_temporarily(), init_empty_weights(include_buffers=False), _NothingDrawn():
        return make()


class _NothingDrawn(TorchFunctionMode):
    """Leaves out the random start of what has no memory: torch has a slow way of its own to draw no numbers."""

    _DRAWS = frozenset(
        ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_")
    )
    """By name: transformers puts functions of its own in the place of torch's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._DRAWS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


_COMPONENT_FILES = ("*.safetensors", "*pytorch_model*.bin", "*.bin")


def has_weights(folder: Path) -> bool:
    """Whether `open_component` finds any."""
    return any(path for pattern in _COMPONENT_FILES for path in folder.glob(pattern))


def open_component(folder: Path) -> TensorSource:
    """The weights of one diffusers or transformers component folder: safetensors before pickles, plain before variants."""
    for pattern in _COMPONENT_FILES:
        if found := sorted(folder.glob(pattern), key=_preference):
            return open_checkpoint(found[0])
    raise UserError(f"{folder} has no weights (*.safetensors or *.bin). Is the model downloaded completely?")


def _preference(path: Path) -> tuple[bool, bool, bool, str]:
    """Variants (`model.fp16.safetensors`) come after plain files, averaged weights last, shards after whole files."""
    shard = _SHARD.fullmatch(path.name)
    name = path.name if shard is None else f"{shard['stem']}{shard['suffix']}"
    return name.count(".") > 1, "ema" in name, shard is not None, path.name


def read_json(path: Path) -> dict[str, Any]:
    """A component's config. Raises `UserError` when it is missing or not JSON."""
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {path.parent} is not a complete model folder.") from error
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    return loaded


def looks_like_hub_id(name: str) -> bool:
    """`owner/name`, and nothing on disk by that name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and Path(name).suffix not in WEIGHT_SUFFIXES


def find_model(name: str, flag: str, *, allow_patterns: tuple[str, ...] | None = None) -> Path:
    """The local file or folder that `name` (given as `flag`) means, downloading a hub id's snapshot when it is one."""
    path = Path(name).expanduser()
    if path.exists():
        return _file_in(path)
    if not looks_like_hub_id(name):
        raise UserError(f"{flag}: no such file or folder: {name}. Give a file, a diffusers folder or a hub id (owner/name).")
    return download_snapshot(name, flag, allow_patterns=allow_patterns)


def _file_in(path: Path) -> Path:
    """Of a folder that holds nothing but a model saved with `--max_shard_size`, the (first) file; any other path as it is."""
    if not path.is_dir() or any((path / name).exists() for name in ("model_index.json", "config.json")):
        return path
    found = [*path.glob("model.safetensors"), *path.glob("model-00001-of-*.safetensors")]
    return found[0] if len(found) == 1 else path


@functools.lru_cache(maxsize=16)
def download_snapshot(
    name: str, flag: str, *, allow_patterns: tuple[str, ...] | None = None, ignore_patterns: tuple[str, ...] | None = None
) -> Path:
    """The local snapshot of a hub repository, from the hub's cache when it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        allow, ignore = (list(patterns) if patterns else None for patterns in (allow_patterns, ignore_patterns))
        return Path(snapshot_download(name, allow_patterns=allow, ignore_patterns=ignore))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{flag}: {name} is neither a path here nor a repository of the hub that you may read. "
            "Check the spelling; for a private or gated one, log in first (hf auth login)."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{flag}: {name} is not a path here, is not in the hub's cache, and the hub cannot be reached. Ways out:\n"
            "  1. if it was meant as a path, correct it: nothing is there, seen from the current folder\n"
            "  2. start once with a connection to the hub (and without HF_HUB_OFFLINE), which keeps the files for later\n"
            f"  3. on a connected machine: hf download {name} --local-dir FOLDER; then give FOLDER here\n"
            "  4. set HF_HOME to where the cache of an earlier download is"
        ) from error
