"""Preview prompts from .txt, .toml and .json files, with sd-scripts' inline options. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from library.errors import UserError, suggest


def _option(flag: str, kind: Callable[[str], Any], default: Any = None) -> Any:
    """A field of `PromptLine` that `--flag value` sets inline; kind: its type, also checked in .toml and .json files."""
    return field(default=default, metadata={"flag": flag, "kind": kind})


@dataclass(frozen=True)
class PromptLine:
    """One preview picture. Field names are the keys in .toml and .json files."""

    prompt: str
    negative_prompt: str | None = _option("n", str)
    width: int = _option("w", int, 512)
    height: int = _option("h", int, 512)
    seed: int | None = _option("d", int)
    sample_steps: int = _option("s", int, 30)
    scale: float | None = _option("l", float)
    """Classifier-free guidance; the family's usual one unless given."""
    guidance_scale: float | None = _option("g", float)
    """Guidance that is an input of the network (FLUX)."""
    sample_sampler: str | None = _option("ss", str)
    controlnet_image: str | None = _option("cn", str)
    cfg_trunc_ratio: float | None = _option("ctr", float)
    renorm_cfg: float | None = _option("rcfg", float)
    flow_shift: float | None = _option("fs", float)

    def extra(self) -> dict[str, Any]:
        """Options that only some families know, where given."""
        names = ("guidance_scale", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


_FIELDS = {f.name: f for f in fields(PromptLine)}
_BY_FLAG = {f.metadata["flag"]: f for f in _FIELDS.values() if "flag" in f.metadata}
_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
_POSITIVE = ("width", "height", "sample_steps")


def parse_prompts(path: Path | str) -> list[PromptLine]:
    """Every prompt of the file; at least one. A `UserError` names the file, the entry, and what was expected."""
    path = Path(path)
    readers = {".txt": _read_text, ".toml": _read_toml, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"--sample_prompts {path}: the file name has to end in {', '.join(readers)}, not '{path.suffix}'.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"--sample_prompts {path}: no such file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sample_prompts {path} cannot be read as UTF-8 text: {error}") from error
    lines = list(readers[path.suffix.lower()](text, path))
    if not lines:
        raise UserError(f"--sample_prompts {path} has no prompt in it.")
    return lines


def parse_line(line: str, where: str) -> PromptLine:
    """`a cat --w 640 --h 512 --d 1 --n blurry`. `where` (file and line) is named in errors."""
    prompt, *options = _OPTION.split(line.strip())
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for option in options:
        flag, _, text = option.strip().partition(" ")
        found = _BY_FLAG.get(flag.lower())
        if found is None:
            known = ", ".join(f"--{name}" for name in _BY_FLAG)
            raise UserError(f"{where}: unknown option --{flag}. Known: {known}.{suggest(flag, _BY_FLAG)}")
        values[found.name] = _parsed(found.metadata["kind"], text.strip(), f"{where}: --{flag}")
    return _checked(values, where)


def _parsed(kind: Callable[[str], Any], text: str, where: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        expected = {int: "a whole number", float: "a number"}[kind]  # type: ignore[index]
        raise UserError(f"{where} is '{text}', expected {expected}.") from error


def _from_mapping(values: Mapping[str, Any], where: str) -> PromptLine:
    for name, value in values.items():
        if name not in _FIELDS:
            raise UserError(f"{where}: unknown key '{name}'. Known: {', '.join(_FIELDS)}.{suggest(name, _FIELDS)}")
        kind = _FIELDS[name].metadata.get("kind", str)
        accepted = (int, float) if kind is float else (kind,)
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise UserError(f"{where}: {name} is {value!r}, expected {kind.__name__}, got {type(value).__name__}.")
    if "prompt" not in values:
        raise UserError(f"{where}: the key 'prompt' is missing.")
    return _checked(dict(values), where)


def _checked(values: dict[str, Any], where: str) -> PromptLine:
    for name in _POSITIVE:
        if values.get(name, 1) < 1:
            raise UserError(f"{where}: {name} is {values[name]}, expected at least 1.")
    return PromptLine(**values)


def _read_text(text: str, path: Path) -> Iterable[PromptLine]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield parse_line(line, f"{path}, line {number}")


def _read_toml(text: str, path: Path) -> Iterable[PromptLine]:
    """`[prompt]` holds defaults; each `[[prompt.subset]]` is a picture."""
    import toml

    try:
        table = toml.loads(text).get("prompt")
    except toml.TomlDecodeError as error:
        raise UserError(f"--sample_prompts {path} is not valid TOML: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"--sample_prompts {path}: the table [prompt] is missing.")
    defaults = {key: value for key, value in table.items() if key != "subset"}
    for number, subset in enumerate(table.get("subset", [{}]), 1):
        yield _from_mapping({**defaults, **subset}, f"{path}, subset {number}")


def _read_json(text: str, path: Path) -> Iterable[PromptLine]:
    """A list whose entries are objects, or lines as in a .txt file."""
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--sample_prompts {path} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise UserError(f"--sample_prompts {path}: expected a list of prompts, got {type(entries).__name__}.")
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        if isinstance(entry, str):
            yield parse_line(entry, where)
        elif isinstance(entry, dict):
            yield _from_mapping(entry, where)
        else:
            raise UserError(f"{where}: expected an object or a string, got {type(entry).__name__}.")
