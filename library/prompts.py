"""Prompts from .txt, .toml and .json files, with sd-scripts' inline options. Imports nothing heavy.

`PromptLine` is a line of previews. Programs that know more options have a class of their own that is derived from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from library.errors import UserError, suggest
from library.options import EXPECTED


def line_option(flag: str, kind: Callable[[Any], Any], default: Any = None) -> Any:
    """A field of `PromptLine` that `--flag value` sets inline; kind: its type, also checked in .toml and .json files,
    or what makes it of a text or such a file's value and raises ValueError with what it expects."""
    return field(default=default, metadata={"flag": flag, "kind": kind})


class Side(NamedTuple):
    """What a picture is led toward or, negative, away from."""

    text: str
    negative: bool = False


@dataclass(frozen=True)
class PromptLine:
    """One preview picture. Field names are the keys in .toml and .json files."""

    prompt: str
    negative_prompt: str | None = line_option("n", str)
    width: int = line_option("w", int, 512)
    height: int = line_option("h", int, 512)
    seed: int | None = line_option("d", int)
    sample_steps: int = line_option("s", int, 30)
    scale: float | None = line_option("l", float)
    """Classifier-free guidance; the family's usual one unless given."""
    guidance_scale: float | None = line_option("g", float)
    """Guidance that is an input of the network (FLUX)."""
    sample_sampler: str | None = line_option("ss", str)
    controlnet_image: str | None = line_option("cn", str)
    cfg_trunc_ratio: float | None = line_option("ctr", float)
    renorm_cfg: float | None = line_option("rcfg", float)
    flow_shift: float | None = line_option("fs", float)

    @property
    def texts(self) -> tuple[str, str]:
        """The prompt, and what it leads away from."""
        return self.prompt, self.negative_prompt or ""

    @property
    def sides(self) -> tuple[Side, Side]:
        prompt, negative = self.texts
        return Side(prompt), Side(negative, negative=True)

    def extra(self) -> dict[str, Any]:
        """Options that only some families know, where given."""
        names = ("guidance_scale", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


LineT = TypeVar("LineT", bound=PromptLine)
_PREVIEW = PromptLine("")
_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
_POSITIVE = ("width", "height", "sample_steps")


def _by_flag(line_class: type[PromptLine]) -> dict[str, Field[Any]]:
    """Inline option -> field. A derived class may give an option to a field of its own."""
    return {f.metadata["flag"]: f for f in fields(line_class) if "flag" in f.metadata}


def parse_prompts(path: Path | str, flag: str = "--sample_prompts", base: LineT = _PREVIEW) -> list[LineT]:  # type: ignore[assignment]
    """Every prompt of the file; at least one. `base` has the values of what a prompt does not say, and the class of line.

    A `UserError` names the file, given as `flag`, the entry, and what was expected.
    """
    path, where = Path(path), f"{flag} {path}"
    readers: Mapping[str, Callable[[str, Path, str, LineT], Iterable[LineT]]] = {
        ".txt": _read_text,
        ".toml": _read_toml,
        ".json": _read_json,
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"{where}: the file name has to end in {', '.join(readers)}, not '{path.suffix}'.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read as UTF-8 text: {error}") from error
    lines = list(readers[path.suffix.lower()](text, path, where, base))
    if not lines:
        raise UserError(f"{where} has no prompt in it.")
    return lines


def parse_line(line: str, where: str, base: LineT = _PREVIEW) -> LineT:  # type: ignore[assignment]
    """`a cat --w 640 --h 512 --d 1 --n blurry`. `where` (file and line) is named in errors."""
    prompt, *options = _OPTION.split(line.strip())
    values: dict[str, Any] = {"prompt": prompt.strip()}
    by_flag = _by_flag(type(base))
    for option in options:
        flag, _, text = option.strip().partition(" ")
        found = by_flag.get(flag.lower())
        if found is None:
            known = ", ".join(f"--{name}" for name in by_flag)
            raise UserError(f"{where}: unknown option --{flag}. Known: {known}.{suggest(flag, by_flag)}")
        kind, text = found.metadata["kind"], text.strip()
        try:
            values[found.name] = kind(text)
        except ValueError as error:
            raise UserError(f"{where}: --{flag} is '{text}', expected {EXPECTED.get(kind) or error}.") from error
    return _checked(values, where, base)


def _from_mapping(values: Mapping[str, Any], where: str, base: LineT) -> LineT:
    known = {f.name: f for f in fields(base)}
    found = dict(values)
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{where}: unknown key '{name}'. Known: {', '.join(known)}.{suggest(name, known)}")
        kind = known[name].metadata.get("kind", str)
        if kind not in (int, float, str):
            try:
                found[name] = kind(value)
            except ValueError as error:
                raise UserError(f"{where}: {name} is {value!r}, expected {error}.") from error
            continue
        accepted = (int, float) if kind is float else (kind,)
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise UserError(
                f"{where}: {name} is {value!r}, expected {EXPECTED.get(kind, kind.__name__)}, got {type(value).__name__}."
            )
    if "prompt" not in found:
        raise UserError(f"{where}: the key 'prompt' is missing.")
    return _checked(found, where, base)


def _checked(values: dict[str, Any], where: str, base: LineT) -> LineT:
    for name in _POSITIVE:
        if values.get(name, 1) < 1:
            raise UserError(f"{where}: {name} is {values[name]}, expected at least 1.")
    return replace(base, **values)


def _read_text(text: str, path: Path, where: str, base: LineT) -> Iterable[LineT]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield parse_line(line, f"{path}, line {number}", base)


def _read_toml(text: str, path: Path, where: str, base: LineT) -> Iterable[LineT]:
    """`[prompt]` holds defaults; each `[[prompt.subset]]` is a picture."""
    import toml

    try:
        table = toml.loads(text).get("prompt")
    except toml.TomlDecodeError as error:
        raise UserError(f"{where} is not valid TOML: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{where}: the table [prompt] is missing.")
    defaults = {key: value for key, value in table.items() if key != "subset"}
    for number, subset in enumerate(table.get("subset", [{}]), 1):
        yield _from_mapping({**defaults, **subset}, f"{path}, subset {number}", base)


def _read_json(text: str, path: Path, where: str, base: LineT) -> Iterable[LineT]:
    """A list whose entries are objects, or lines as in a .txt file."""
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise UserError(f"{where}: expected a list of prompts, got {type(entries).__name__}.")
    for number, entry in enumerate(entries, 1):
        place = f"{path}, entry {number}"
        if isinstance(entry, str):
            yield parse_line(entry, place, base)
        elif isinstance(entry, dict):
            yield _from_mapping(entry, place, base)
        else:
            raise UserError(f"{place}: expected an object or a string, got {type(entry).__name__}.")
