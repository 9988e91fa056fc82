"""Write docs/options.md, and the list of flags the tests compare with, from the option groups.

python tools/make_options_page.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.flux_options import FluxFullOptions, FluxOptions  # noqa: E402
from library.generation_options import GenerateOptions  # noqa: E402
from library.lumina_options import LuminaFullOptions, LuminaOptions  # noqa: E402
from library.option_groups import (  # noqa: E402
    DreamBoothOptions,
    FineTuneOptions,
    FullTrainOptions,
    NetworkTrainOptions,
    TrainOptions,
)
from library.options import Flag, NoFamilyOptions, flags_of, groups_of  # noqa: E402
from library.sd3_options import Sd3FullOptions, Sd3Options  # noqa: E402
from library.sdxl_options import SdxlFullOptions, SdxlOptions  # noqa: E402
from library.unet_options import UnetOptions  # noqa: E402

SCRIPTS: dict[str, type[TrainOptions]] = {
    "train_network.py": NetworkTrainOptions,
    "train_db.py": DreamBoothOptions,
    "fine_tune.py": FineTuneOptions,
    "sdxl_train_network.py": NetworkTrainOptions,
    "sdxl_train.py": FullTrainOptions,
    "flux_train_network.py": NetworkTrainOptions,
    "flux_train.py": FullTrainOptions,
    "lumina_train_network.py": NetworkTrainOptions,
    "lumina_train.py": FullTrainOptions,
    "sd3_train_network.py": NetworkTrainOptions,
    "sd3_train.py": FullTrainOptions,
}
FAMILY_GROUPS: dict[str, type] = {
    "train_network.py": UnetOptions,
    "train_db.py": UnetOptions,
    "fine_tune.py": UnetOptions,
    "sdxl_train_network.py": SdxlOptions,
    "sdxl_train.py": SdxlFullOptions,
    "flux_train_network.py": FluxOptions,
    "flux_train.py": FluxFullOptions,
    "lumina_train_network.py": LuminaOptions,
    "lumina_train.py": LuminaFullOptions,
    "sd3_train_network.py": Sd3Options,
    "sd3_train.py": Sd3FullOptions,
}
"""Script -> its family's own group, where it has one."""
PICTURES = "gen_img.py"
"""It has options of its own; only a few are training's."""
PAGE, SNAPSHOT = ROOT / "docs" / "options.md", ROOT / "tests" / "snapshots" / "flags.json"

_INTRODUCTION = """# Options

Made by `tools/make_options_page.py` from `library/option_groups*.py`; change the options there.

Options come from the command line, else from `--config_file`, else they have the default given here. A file is TOML, YAML (with
`${interpolation}`) or JSON; its sections are titles only, so a key may stand in any section or in none. What begins with `_` at
the top level is no option and may hold values to interpolate. `--print_config` shows what a command line and a file add up to.
A switch is turned off by `--no-switch`; an option without default is unset by `--no-option`, or by an empty value.

`not yet`: known, refused until it is implemented. `no effect`: accepted for the sake of existing commands.
"""


def script_flags(script: str) -> Mapping[str, Flag]:
    return flags_of(SCRIPTS[script], FAMILY_GROUPS.get(script, NoFamilyOptions))


def script_groups(script: str) -> dict[str, type]:
    return groups_of(SCRIPTS[script], FAMILY_GROUPS.get(script, NoFamilyOptions))


def section(script: str, group: str) -> str:
    """Where the page has the flags of a group: those of a family stand under its name."""
    family, named, _ = script.partition("_train")
    return group if group != "family" else family if named else "sd"


def flags_by_script() -> dict[str, dict[str, Any]]:
    """Script -> flag -> default."""
    return {script: {name: flag.default for name, flag in script_flags(script).items()} for script in SCRIPTS}


def snapshot() -> str:
    pictures = {name: flag.default for name, flag in flags_of(GenerateOptions).items()}
    return json.dumps({**flags_by_script(), PICTURES: pictures}, indent=1) + "\n"


def _scripts_of(name: str, group: str) -> dict[str, Flag]:
    """The scripts that have this flag in this group, with their own version of it."""
    found = {script: script_flags(script).get(name) for script in SCRIPTS}
    return {script: flag for script, flag in found.items() if flag is not None and section(script, flag.group) == group}


def _code(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value)}`"


def _row(name: str, group: str) -> str:
    versions = _scripts_of(name, group)
    flag = next(iter(versions.values()))
    defaults = {script: _code(version.default) for script, version in versions.items()}
    if len(set(defaults.values())) == 1:
        default = next(iter(defaults.values()))
    else:
        default = ", ".join(f"{value} ({script})" for script, value in defaults.items())
    return _line(flag, default)


def _line(flag: Flag, default: str) -> str:
    notes = [flag.help]
    if flag.declared.choices:
        notes.append("one of " + ", ".join(f"`{choice}`" for choice in flag.declared.choices))
    if flag.declared.aliases:
        notes.append("also " + ", ".join(f"`--{alias}`" for alias in flag.declared.aliases))
    if flag.planned:
        notes.append("**not yet**")
    if flag.inert:
        notes.append(f"**no effect**: {flag.inert}")
    text = "; ".join(notes).replace("|", "\\|")
    return f"| `--{flag.name}` | {flag.type_name} | {default} | {text} |"


def _section(title: str, purpose: str, rows: Iterable[str]) -> str:
    lines = "\n".join(rows)
    return f"## {title}\n\n{purpose}\n\n| option | type | default | |\n| --- | --- | --- | --- |\n{lines}\n"


def _purpose(group_class: type) -> str:
    return (group_class.__doc__ or "").strip().split("\n")[0]


def _picture_sections() -> Iterator[str]:
    """What `gen_img.py` has of its own."""
    yield (
        f"# {PICTURES}\n\nBeside these it has the groups attention and logging, and of the model's family the options that say "
        f"what the model is and where: `python {PICTURES} --family NAME --help`.\n"
    )
    trained = {found for script in SCRIPTS for found in script_groups(script).values()}
    for name, group_class in groups_of(GenerateOptions).items():
        flags = [flag for flag in flags_of(GenerateOptions).values() if flag.group == name]
        if flags and group_class not in trained:
            yield _section(name, _purpose(group_class), (_line(flag, _code(flag.default)) for flag in flags))


def page() -> str:
    """The whole of docs/options.md."""
    groups: dict[str, dict[str, type]] = {}  # group -> script -> its class
    for script in SCRIPTS:
        for group, group_class in script_groups(script).items():
            groups.setdefault(section(script, group), {})[script] = group_class
    parts = [_INTRODUCTION]
    shared_last = sorted(groups.items(), key=lambda item: len(item[1]) == len(SCRIPTS))
    for group, classes in shared_last:
        names = dict.fromkeys(
            name for script in classes for name, flag in script_flags(script).items() if section(script, flag.group) == group
        )
        if not names:
            continue
        only = "" if len(classes) == len(SCRIPTS) else f" Only {', '.join(f'`{script}`' for script in classes)}."
        purpose = _purpose(next(iter(classes.values())))
        parts.append(_section(group, f"{purpose}{only}", (_row(name, group) for name in names)))
    return "\n".join([*parts, *_picture_sections()])


def main() -> None:
    for path, text in ((PAGE, page()), (SNAPSHOT, snapshot())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
