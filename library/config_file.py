"""Configuration files: TOML, YAML (OmegaConf, with interpolation) and JSON, read into one flat table of keys."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from library.errors import UserError, suggest

SUFFIXES = (".toml", ".yaml", ".yml", ".json")

UNREAD_KEYS = frozenset({
    "epoch", "noise_offset_type", "lowvram", "stop_text_encoder_training",
    "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio",
})  # fmt: skip
"""Keys that the kohya_ss interface writes into every file, whether or not the script reads them: told, and left out."""


def find_config(name: str) -> Path:
    """The file `--config_file` means. The suffix may be left out, as in sd-scripts."""
    path = Path(name)
    candidates = [path] if path.suffix.lower() in SUFFIXES else [Path(name + suffix) for suffix in SUFFIXES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_file():
        raise UserError(f"--config_file {name}: cannot tell its format. Name it {' or '.join(SUFFIXES)}.")
    near = [entry.name for entry in path.parent.glob("*") if entry.suffix.lower() in SUFFIXES] if path.parent.is_dir() else []
    tried = ", ".join(str(candidate) for candidate in candidates)
    raise UserError(f"--config_file: file not found: {tried}.{suggest(candidates[0].name, near)}")


def read_config(path: Path) -> dict[str, Any]:
    """Key -> value. A section is a title only: its keys count as if they stood at the top level, as in sd-scripts.

    A top-level key or section whose name begins with `_` is no option: it holds values that others interpolate.
    """
    flattened: dict[str, Any] = {}
    where: dict[str, str] = {}
    for title, content in read_table(path).items():
        if title.startswith("_"):
            continue
        for key, value in content.items() if isinstance(content, dict) else [(title, content)]:
            section = f"[{title}]" if isinstance(content, dict) else "the top level"
            if key in flattened and flattened[key] != value:
                raise UserError(
                    f"{path}: {key} is given twice: {flattened[key]!r} in {where[key]}, {value!r} in {section}. Remove one."
                )
            flattened[key], where[key] = value, section
    return flattened


def read_table(path: Path) -> dict[str, Any]:
    """The file's content as nested tables, by its suffix. `UserError` names the file and the place of a syntax error."""
    parse = _PARSERS[path.suffix.lower()]
    try:
        table = parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except (ValueError, IndexError, TypeError) as error:  # the last two: what toml raises for some broken files
        raise UserError(f"{path}: is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected keys with values at the top level, got {type(table).__name__}.")
    return table


def parse_toml(text: str) -> dict[str, Any]:
    """TOML, by the standard library where it can (Python 3.11): `toml` drops the end of an unclosed list without a word."""
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads(text)
    import toml

    return toml.loads(text)


def _parse_yaml(text: str) -> Any:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(text or "{}"), resolve=True, throw_on_missing=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _parse_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
        return table

    return json.loads(text, object_pairs_hook=once)


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".toml": parse_toml,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
    ".json": _parse_json,
}


def toml_value(value: Any) -> str:
    """A bool, number, string or tuple of these, written as TOML."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that TOML also wants DEL escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
