"""CLIP tokenizers: where they are looked for, and a small value that can be sent to data loader workers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.model_io import looks_like_hub_id, read_json
from library.model_parts import write_json

logger = logging.getLogger(__name__)

SD1_TOKENIZER = "openai/clip-vit-large-patch14"
SD2_TOKENIZER = "stabilityai/stable-diffusion-2"


@dataclass(frozen=True)
class TokenizerKind:
    """Which files make a tokenizer, and where they are."""

    title: str
    vocabulary: tuple[str, ...]
    """Files any one of which is enough."""
    files: tuple[str, ...]
    """All there are, for downloading."""
    inside: str = "tokenizer"
    """Its folder in a diffusers model."""
    flag: str | None = "--tokenizer"

    def is_in(self, folder: Path) -> bool:
        return any((folder / name).is_file() for name in self.vocabulary)

    @property
    def expected(self) -> str:
        return " or ".join(self.vocabulary)


_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
CLIP = TokenizerKind("CLIP", ("tokenizer.json", "vocab.json"), ("vocab.json", "merges.txt", *_SETTINGS))
FIRST_WORD = "!"
"""Entry 0 of CLIP's vocabulary, with which SDXL's and Stable Diffusion 3's second tokenizers pad."""
COPIED_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "added_tokens.json", *_SETTINGS)
"""All that a tokenizer of any kind may consist of."""


@dataclass(frozen=True)
class ClipTokenizer:
    """Words to ids. Holds the `tokenizers` library's object alone: workers unpickle it without importing transformers."""

    backend: Any  # tokenizers.Tokenizer
    bos: int
    eos: int
    pad: int
    folder: Path

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS, EOS and padding, not cut."""
        found: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return found

    @property
    def vocabulary_size(self) -> int:
        size: int = self.backend.get_vocab_size(with_added_tokens=True)
        return size

    def fingerprint(self) -> str:
        digest = blake2b(self.backend.to_str().encode(), digest_size=8)
        return f"{digest.hexdigest()}-{self.bos}-{self.eos}-{self.pad}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClipTokenizer) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())


@lru_cache(maxsize=8)
def load_clip_tokenizer(folder: Path) -> ClipTokenizer:
    """The tokenizer in `folder` (vocab.json and merges.txt, or tokenizer.json)."""
    from transformers import CLIPTokenizer

    if not CLIP.is_in(folder):
        raise UserError(f"{folder} has no CLIP tokenizer (vocab.json with merges.txt, or tokenizer.json).")
    loaded = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    backend = loaded.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return ClipTokenizer(backend, int(loaded.bos_token_id), int(loaded.eos_token_id), int(loaded.pad_token_id), folder)


def find_tokenizer(
    *,
    flag: str | None,
    model_folder: Path | None,
    cache_dir: str | None,
    hub_id: str,
    subfolder: str | None = None,
    kind: TokenizerKind = CLIP,
) -> Path:
    """The folder of the tokenizer to use: --tokenizer, else the model folder's, else --tokenizer_cache_dir's, else the hub's.

    flag: value of --tokenizer, where `kind` has that flag. hub_id and subfolder: the family's published tokenizer. A download
    is kept in `cache_dir` under sd-scripts' name, the hub id with `/` as `_`. Raises `UserError`, listing the ways, when there
    is none.
    """
    if flag:
        return _given(flag, kind)
    if model_folder is not None and kind.is_in(model_folder / kind.inside):
        return model_folder / kind.inside
    cached = Path(cache_dir).expanduser() / hub_id.replace("/", "_") if cache_dir else None
    if cached is not None and kind.is_in(cached):
        return cached
    downloaded = _download(hub_id, subfolder, kind)
    if downloaded is None:
        raise UserError(_ways(kind, hub_id, model_folder, cached))
    if cached is not None:
        copy_tokenizer(downloaded, cached)
        logger.info("kept the tokenizer %s in %s", hub_id, cached)
        return cached
    return downloaded


def _given(flag: str, kind: TokenizerKind) -> Path:
    path = Path(flag).expanduser()
    for folder in (path, path / "tokenizer"):
        if kind.is_in(folder):
            return folder
    if path.exists() or not looks_like_hub_id(flag):
        raise UserError(f"--tokenizer {flag}: no {kind.title} tokenizer there ({kind.expected}).")
    found = _download(flag, None, kind)
    if found is None:
        raise UserError(
            f"--tokenizer {flag} is not a folder here, is not in the hub's cache, and the hub cannot be reached. "
            f"Give a folder with {kind.expected}."
        )
    return found


def _download(hub_id: str, subfolder: str | None, kind: TokenizerKind) -> Path | None:
    """The tokenizer's local folder, or None when the hub (and its cache) cannot give it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[f"{subfolder}/{n}" if subfolder else n for n in kind.files]))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        return None
    folder = folder / subfolder if subfolder else folder
    return folder if kind.is_in(folder) else None


def copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's own files: a folder of the hub's cache may hold its model's weights beside them."""
    import shutil

    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def set_padding(folder: Path, token: str) -> None:
    """Say in the files of the CLIP tokenizer in `folder` that it pads with `token`."""
    config = folder / "tokenizer_config.json"
    for file in (config, folder / "special_tokens_map.json"):
        if file is config or file.is_file():
            write_json(file, (read_json(file) if file.is_file() else {}) | {"pad_token": token})


def _ways(kind: TokenizerKind, hub_id: str, model_folder: Path | None, cached: Path | None) -> str:
    ways = [f"{kind.flag} FOLDER, with {kind.expected}"] if kind.flag else []
    ways.append(
        f"a diffusers model folder with a {kind.inside}/ folder in it as --pretrained_model_name_or_path"
        + (f" ({model_folder} has none)" if model_folder else "")
    )
    ways.append(
        f"--tokenizer_cache_dir DIR, with the files in DIR/{hub_id.replace('/', '_')}"
        + (f" ({cached} has none)" if cached else "")
    )
    ways.append("run once with a connection to the hub, which keeps it for later")
    return (
        f"no {kind.title} tokenizer found, and {hub_id} cannot be downloaded now. Give it in one of {len(ways)} ways:\n"
        + "\n".join(f"  {number}. {way}" for number, way in enumerate(ways, start=1))
    )
