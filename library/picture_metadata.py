"""What a picture says of how it was made: the `parameters` text that A1111-style interfaces show and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SAMPLER_TITLES = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "dpmsolver": "DPM-Solver",
    "dpmsolver++": "DPM++ 2M",
    "dpmsingle": "DPM++ 2S",
}
"""sd-scripts' names of samplers -> those interfaces show."""


@dataclass(frozen=True)
class NetworkUse:
    """A network on one picture."""

    name: str
    strength: float
    sha: str | None = None
    """By which interfaces know the file again: the first 12 digits of `sshs_model_hash`."""

    @property
    def tag(self) -> str:
        return f"<lora:{self.name}:{self.strength:g}>"


def parameters_text(prompt: str, negative: str, facts: Mapping[str, Any], networks: list[NetworkUse]) -> str:
    """Prompt, negative prompt and settings as A1111 writes them, a line each. Networks that are on are tags after the prompt,
    as they are asked for there. A fact that is None is left out; text with a comma, colon or newline in it is quoted."""
    used = [network for network in networks if network.strength]
    lines = [" ".join([prompt, *(network.tag for network in used)])]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    hashes = ", ".join(f"{network.name}: {network.sha}" for network in used if network.sha)
    all_facts = {**facts, "Lora hashes": hashes or None}
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in all_facts.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if not any(sign in text for sign in ',:\n"'):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
