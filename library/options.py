"""Option groups: one line says a flag's name, type, default and help, and everything else follows from it.

A *group* is a frozen dataclass whose fields are made by `opt`; a *container* is a frozen dataclass whose fields are groups,
made by `group`. From these come the command line (`build_parser`), configuration files in TOML, YAML and JSON (`parse`), the
printed configuration (`to_toml`) and the documentation. Nothing here imports torch: `--help` has to answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from library.errors import UserError, suggest

logger = logging.getLogger(__name__)

Container = TypeVar("Container")
_FLAG_KEY = "flag"
EXPECTED: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_EXPECTED_EACH: Mapping[type, str] = {bool: "true or false", int: "whole numbers", float: "numbers", str: "texts"}


@dataclass(frozen=True)
class _Declared:
    """What `opt` was told beyond the default; kept in the dataclass field's metadata."""

    help: str
    choices: tuple[Any, ...] = ()
    convert: Callable[[Any], Any] | None = None
    nargs: str | None = None
    aliases: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    planned: bool = False
    instead: str = ""
    inert: str | None = None
    secret: bool = False
    cli_only: bool = False


def opt(
    default: Any,
    help: str,
    *,
    choices: Iterable[Any] | None = None,
    type: Callable[[Any], Any] | None = None,
    nargs: str | None = None,
    aliases: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    planned: bool = False,
    instead: str = "",
    inert: str | None = None,
    secret: bool = False,
    cli_only: bool = False,
) -> Any:
    """A field of an option group. The flag's name is the field's, its type the field's annotation (`tuple[...]`: a list).

    type: converts one value, as text from the command line or as the value in a file; raises ValueError with what it expects.
    nargs: how many values a list takes, `*` unless told. aliases: further spellings, without dashes.
    minimum, maximum: inclusive; looked at by `check_rules`, with the rules, so that all problems are told at once.
    planned: known, but the trainer does not do it yet; any value but the default is an error. instead: what
    that error says to do; to remove it unless told.
    inert: accepted for the sake of existing commands, without effect; says why, and is told once when the flag is set.
    secret: left out of everything that is printed or written. cli_only: has no meaning inside a configuration file.
    """
    declared = _Declared(
        help, tuple(choices or ()), type, nargs, aliases, minimum, maximum, planned, instead, inert, secret,
        cli_only,
    )  # fmt: skip
    return field(default=default, metadata={_FLAG_KEY: declared})


def group(group_class: type) -> Any:
    """A field of a container: a group, with its defaults."""
    return field(default_factory=group_class)


@dataclass(frozen=True, kw_only=True)
class NoFamilyOptions:
    """The group of a family that has no options of its own; the base of those that have."""

    rules: ClassVar[tuple[Any, ...]] = ()
    """The family's own `option_rules.Rule`s."""
    several_text_encoders: ClassVar[bool] = False
    """Whether some text encoders may learn while the outputs of others are cached."""
    model_tells_v: ClassVar[bool] = False
    """Whether v prediction is taken from the model where no flag says, so that flags alone do not tell."""
    is_flow: ClassVar[bool] = False
    """Whether the model is a flow: without a choice of samplers, and without weights in prompts."""
    bounds_guidance: ClassVar[bool] = False
    """Whether guidance by the negative prompt ends early and goes only so far: `--ctr` and `--rcfg` in prompt lines."""
    model_group: ClassVar[type]
    """The part of the group that says what the model is: all that a program that does not train takes of it."""

    def text_encoder_rates(self, shared: float | None) -> tuple[float | None, ...]:
        """Learning rates of the text encoders in full fine-tuning, in the family's order; `shared`: the one given for all.
        None stands for the default rate, 0 for one that does not learn."""
        return () if shared is None else (shared,)

    def denoiser_learns(self, rate: float) -> bool:
        """Whether any of the denoiser has a rate above 0 in full fine-tuning. rate: of what has none of its own."""
        return rate > 0

    @property
    def time_density(self) -> dict[str, Any]:
        """Of a diffusion's times, as arguments of `objectives.DiscreteDDPM`."""
        return {}

    @property
    def chances(self) -> tuple[str, ...]:
        """What is drawn for every picture that is trained: see `ImageDataset.chances`."""
        return ()

    @property
    def swapped_blocks(self) -> int:
        """`--blocks_to_swap`, in families that have it."""
        return 0

    @property
    def attention_modes(self) -> frozenset[str]:
        """The attention back ends that flags of the family's own name."""
        return frozenset()

    @property
    def fused_backward(self) -> bool:
        """Whether a flag of the family's own asks for weights to be stepped during the backward pass."""
        return False


NoFamilyOptions.model_group = NoFamilyOptions


@dataclass(frozen=True)
class Flag:
    """One option, as the command line, the files and the documentation see it."""

    name: str
    group: str
    default: Any
    element: type
    """bool, int, float or str: the type of one value."""
    repeated: bool
    optional: bool
    declared: _Declared

    @property
    def help(self) -> str:
        return self.declared.help

    @property
    def planned(self) -> bool:
        return self.declared.planned

    @property
    def inert(self) -> str | None:
        return self.declared.inert

    @property
    def type_name(self) -> str:
        return f"list of {self.element.__name__}" if self.repeated else self.element.__name__

    def convert(self, value: Any) -> Any:
        """`value`, as a file or a Python caller gives it, in this flag's type. ValueError says what was expected.

        An empty string or list unsets an optional flag, as it does in sd-scripts; a single value is a list of one.
        """
        if self.optional and (value is None or value == "" or value == [] or value == ()):
            return None
        if self.repeated:
            return tuple(self._one(item) for item in (value if isinstance(value, list | tuple) else [value]))
        return self._one(value)

    def convert_text(self, text: str) -> Any:
        """One value from the command line. ValueError says what was expected."""
        if self.optional and text == "":
            return None
        if self.declared.convert or self.element not in (int, float):
            return self._one(text)
        try:
            number = self.element(text)
        except ValueError:
            raise ValueError(f"expected {EXPECTED[self.element]}, got {text!r}") from None
        return self._one(number)

    def _one(self, value: Any) -> Any:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if self.declared.convert:
            value = self.declared.convert(value)
        elif self.element is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif self.element is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        elif self.element is bool and isinstance(value, int) and value in (0, 1):
            value = bool(value)  # how programs that make such files write a switch
        elif type(value) is not self.element:
            expected = f"a list of {_EXPECTED_EACH[self.element]}" if self.repeated else EXPECTED[self.element]
            raise ValueError(f"expected {expected}, got {value!r} ({_type_word(value)})")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"expected a finite number, got {value!r}")
        choices = self.declared.choices
        if choices and value is not None and value not in choices:
            known = [str(choice) for choice in choices]
            raise ValueError(f"{value!r} is not one of {', '.join(known)}.{suggest(str(value), known)}")
        return value

    def out_of_range(self, value: Any) -> str | None:
        """What is wrong with the size of `value`, or None."""
        low, high = self.declared.minimum, self.declared.maximum
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if low is not None and number < low:
                return f"--{self.name} {number}: must be at least {low:g}."
            if high is not None and number > high:
                return f"--{self.name} {number}: must be at most {high:g}."
        return None


def _type_word(value: Any) -> str:
    return {dict: "a section", list: "list", type(None): "nothing"}.get(type(value), type(value).__name__)


def _read_annotation(annotation: Any) -> tuple[type, bool, bool]:
    """(element type, repeated, optional) of a field's annotation; `int | float` counts as float."""
    optional = False
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        optional = type(None) in typing.get_args(annotation)
        annotation = members[0] if len(members) == 1 else float
    repeated = typing.get_origin(annotation) is tuple
    element = typing.get_args(annotation)[0] if repeated else annotation
    assert element in EXPECTED, f"an option cannot have the type {annotation}"
    return element, repeated, optional


def groups_of(container_class: type, family_group: type = NoFamilyOptions) -> dict[str, type]:
    """Group name -> group class: first what a kind of training adds, then what all have. `family` is the family's own."""
    hints = typing.get_type_hints(container_class)
    names = [entry.name for entry in dataclasses.fields(container_class) if entry.name != "explicit"]
    root = [base for base in container_class.__mro__ if dataclasses.is_dataclass(base)][-1]
    shared = {entry.name for entry in dataclasses.fields(root)}
    return {name: family_group if name == "family" else hints[name] for name in sorted(names, key=shared.__contains__)}


_FLAGS: dict[tuple[type, type], Mapping[str, Flag]] = {}  # reading annotations takes milliseconds, and `flat` is called often


def flags_of(container_class: type, family_group: type = NoFamilyOptions) -> Mapping[str, Flag]:
    """Flag name -> flag, in the order of `groups_of`, for everything the container and the family's group declare."""
    if (container_class, family_group) not in _FLAGS:
        _FLAGS[container_class, family_group] = types.MappingProxyType(_read_flags(container_class, family_group))
    return _FLAGS[container_class, family_group]


def _read_flags(container_class: type, family_group: type) -> dict[str, Flag]:
    flags: dict[str, Flag] = {}
    for group_name, group_class in groups_of(container_class, family_group).items():
        hints = typing.get_type_hints(group_class)
        for entry in dataclasses.fields(group_class):
            element, repeated, optional = _read_annotation(hints[entry.name])
            assert entry.name not in flags, f"--{entry.name} is declared twice"
            flags[entry.name] = Flag(
                entry.name, group_name, entry.default, element, repeated, optional, entry.metadata[_FLAG_KEY]
            )
    return flags


def _spellings(flags: Mapping[str, Flag]) -> dict[str, str]:
    """Every accepted key -> the flag's name."""
    return {spelling: name for name, flag in flags.items() for spelling in (name, *flag.declared.aliases)}


# Making options


def _build(
    container_class: type[Container], family_group: type, values: Mapping[str, Any], explicit: Iterable[str]
) -> Container:
    flags = flags_of(container_class, family_group)
    groups: dict[str, Any] = {}
    for name, group_class in groups_of(container_class, family_group).items():
        groups[name] = group_class(**{key: value for key, value in values.items() if flags[key].group == name})
    make: Callable[..., Container] = container_class
    return make(**groups, explicit=frozenset(explicit))


def _convert_all(flags: Mapping[str, Flag], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Flag name -> value in its type. One `UserError` lists every unknown key and every wrong value of `given`."""
    spellings, values, problems = _spellings(flags), {}, []
    for key, value in given.items():
        if key not in spellings:
            problems.append(f"{where}: unknown key '{key}'.{suggest(key, spellings)}")
            continue
        try:
            values[spellings[key]] = flags[spellings[key]].convert(value)
        except ValueError as error:
            problems.append(f"{where}: {key}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return values


def from_flags(container_class: type[Container], family_group: type = NoFamilyOptions, **given: Any) -> Container:
    """Options from flag names and Python values: `from_flags(NetworkTrainOptions, network_dim=8)`. Raises `UserError`."""
    values = _convert_all(flags_of(container_class, family_group), given, "options")
    return _build(container_class, family_group, values, values)


def with_flags(options: Container, **given: Any) -> Container:
    """A copy of `options` with some flags set. Raises `UserError` for an unknown flag or a wrong type."""
    container: Any = options
    flags = flags_of(type(container), type(container.family))
    values = _convert_all(flags, given, "options")
    return _build(type(options), type(container.family), {**flat(options), **values}, container.explicit | set(values))


def flat(options: Any, *, secrets: bool = True) -> dict[str, Any]:
    """Flag name -> value. `secrets=False` leaves tokens and keys out, for anything that is logged or stored."""
    flags = flags_of(type(options), type(options.family))
    return {
        name: getattr(getattr(options, flag.group), name) for name, flag in flags.items() if secrets or not flag.declared.secret
    }


# The command line


class OptionParser(argparse.ArgumentParser):
    """argparse, with one-line errors raised as `UserError`: all wrong values and unknown flags at once, with suggestions."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.problems: list[str] = []
        """Of the values read so far."""

    def error(self, message: str) -> NoReturn:
        if "ignored explicit argument" in message:
            message = message.split(": ignored")[0] + ": a switch takes no value"
        raise UserError(message.removeprefix("argument "))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.problems.clear()
        found, unknown = self.parse_known_args(args, namespace)
        unknown_flags = [word for word in unknown if word.startswith("--")]
        # the values behind an unknown flag are no news
        if problems := [*self.problems, *map(self._unknown, unknown_flags or unknown)]:
            raise UserError("\n".join(problems))
        return found

    def _unknown(self, word: str) -> str:
        if not word.startswith("--"):
            return f"unexpected value {word!r}: no option takes it. A switch takes no value: --flag or --no-flag."
        flag = word.split("=", 1)[0]
        return f"unknown option '{flag}'.{suggest(flag, self._option_string_actions)}"


class _Switch(argparse.Action):
    """`--name` and `--no-name`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__([*option_strings, f"--no-{dest}"], dest, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not str(option_string).startswith("--no-"))


def _add_flag(target: Any, flag: Flag, problems: list[str]) -> None:
    """problems: takes what is wrong with values."""

    def convert(text: str) -> Any:
        try:
            return flag.convert_text(text)
        except ValueError as error:
            problems.append(f"--{flag.name}: {error}")
            return None

    names = [f"--{spelling}" for spelling in (flag.name, *flag.declared.aliases)]
    settings: dict[str, Any] = {"dest": flag.name, "default": argparse.SUPPRESS, "help": _help_line(flag)}
    if flag.element is bool:
        target.add_argument(*names, action=_Switch, **settings)
        return
    choices = flag.declared.choices
    settings["metavar"] = "{" + ",".join(map(str, choices)) + "}" if choices else flag.element.__name__.upper()
    if flag.repeated:
        settings["nargs"] = flag.declared.nargs or "*"
    if flag.optional:  # undoes what a file says; not worth a line of help for each flag
        target.add_argument(
            f"--no-{flag.name}",
            dest=flag.name,
            action="store_const",
            const=None,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    target.add_argument(*names, type=convert, **settings)


def _help_line(flag: Flag) -> str:
    notes = [] if flag.default in (None, False, "") else [f"default {flag.default}"]
    notes += ["not implemented yet"] if flag.planned else []
    notes += ["no effect"] if flag.inert else []
    return (flag.help + (f" ({'; '.join(notes)})" if notes else "")).replace("%", "%%")


def build_parser(
    container_class: type, family_group: type = NoFamilyOptions, description: str | None = None
) -> argparse.ArgumentParser:
    """The command line of a container. Only flags that were given appear in the parsed namespace."""
    parser = OptionParser(
        description=description,
        usage="%(prog)s [--config_file FILE] [--flag VALUE] [--switch | --no-switch] ...",
        epilog="--no-FLAG turns a switch off, and unsets any other option that has no default.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags = flags_of(container_class, family_group)
    for name, group_class in groups_of(container_class, family_group).items():
        members = [flag for flag in flags.values() if flag.group == name]
        if members:
            section = parser.add_argument_group(name, (group_class.__doc__ or "").strip().split("\n")[0])
            for flag in members:
                _add_flag(section, flag, parser.problems)
    return parser


def parse(
    container_class: type[Container],
    argv: Sequence[str] | None = None,
    family_group: type = NoFamilyOptions,
    description: str | None = None,
) -> Container:
    """Options from the command line (`sys.argv` when `argv` is None), over `--config_file`, over the defaults.

    `--print_config` prints the result and `--output_config` writes it to `--config_file`; both end the program with code 0.
    Raises `UserError` for anything the user can put right.
    """
    from library.config_file import UNREAD_KEYS, find_config, read_config

    flags = flags_of(container_class, family_group)
    given = vars(build_parser(container_class, family_group, description).parse_args(argv))
    values = {name: flags[name].convert(value) for name, value in given.items()}
    writes = values.get("output_config", False)
    file_values: dict[str, Any] = {}
    if values.get("config_file") and not writes:
        path = find_config(values["config_file"])
        in_file = read_config(path)
        if unread := sorted(key for key in in_file if key in UNREAD_KEYS and key not in flags):
            logger.warning("%s: no effect, as in sd-scripts: %s", path, ", ".join(unread))
            in_file = {key: value for key, value in in_file.items() if key not in unread}
        misplaced = [key for key in in_file if key in flags and flags[key].declared.cli_only]
        if misplaced:
            raise UserError(f"{path}: {', '.join(misplaced)}: only on the command line. Remove from the file.")
        file_values = _convert_all(flags, in_file, str(path))
    merged = {**file_values, **values}
    options = _build(container_class, family_group, merged, merged)
    if writes:
        _write_config(options, values.get("config_file"))
    if writes or values.get("print_config"):
        if not writes:
            sys.stdout.write(to_toml(options))
        raise SystemExit(0)
    return options


# Writing options


def to_toml(options: Any) -> str:
    """Every option that has a value, as TOML, one section a group; reading it back gives equal options.

    Left out: secrets, what belongs on the command line only, and planned options at their default.
    """
    from library.config_file import toml_value

    sections: dict[str, list[str]] = {}
    values = flat(options, secrets=False)
    for name, flag in flags_of(type(options), type(options.family)).items():
        value = values.get(name)
        if value is None or flag.declared.cli_only or (flag.planned and value == flag.default):
            continue
        sections.setdefault(flag.group, []).append(f"{name} = {toml_value(value)}")
    return "\n\n".join("\n".join([f"[{section}]", *lines]) for section, lines in sections.items()) + "\n"


def _write_config(options: Any, target: str | None) -> None:
    if not target:
        raise UserError("--output_config needs --config_file, the name of the file to write.")
    path = Path(target if target.endswith(".toml") else f"{target}.toml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(to_toml(options))
    except FileExistsError:
        raise UserError(f"--output_config: {path} exists and is not overwritten. Give another name or remove it.") from None
    except OSError as error:
        raise UserError(f"--output_config: cannot write {path}: {error.strerror}.") from None
    sys.stdout.write(f"wrote {path}\n")
