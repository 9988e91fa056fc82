"""How attention is computed and whether blocks are compiled: the flags, and what each attention back end needs.

Imports nothing heavy; `library.attention` computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from library.options import opt


@dataclass(frozen=True)
class BackendNeeds:
    """What has to be there for a back end; looked at before a model is loaded."""

    package: str = ""
    """The module that is imported."""
    install: str = ""
    half_only: bool = False
    """Computes in fp16 and bf16 alone."""
    cuda_only: bool = False
    width_step: int = 1
    """A head's width has to be a multiple of this."""
    widths: tuple[int, int] = (1, 65536)
    """The narrowest and widest head."""
    learns: bool = True
    """Has a backward pass."""


ATTENTION_BACKENDS: dict[str, BackendNeeds] = {
    "sdpa": BackendNeeds(),
    "math": BackendNeeds(),
    "xformers": BackendNeeds("xformers", "pip install xformers", cuda_only=True, width_step=8),
    "flash": BackendNeeds(
        "flash_attn", "pip install flash-attn",
        half_only=True, cuda_only=True, width_step=8, widths=(8, 256),
    ),
    "flash3": BackendNeeds(
        "flash_attn_interface", "built from the folder hopper/ of flash-attention's repository",
        half_only=True, cuda_only=True, width_step=8, widths=(8, 256),
    ),
    "flex": BackendNeeds(cuda_only=True, widths=(16, 65536)),  # on a CPU it has no backward pass
    "sageattn": BackendNeeds(learns=False),
}  # fmt: skip
_OTHER_NAMES = {"torch": "sdpa"}
"""sd-scripts' names for the same."""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How attention is computed."""

    attn_mode: str | None = opt(
        None,
        "how the denoiser computes attention: sdpa (or torch), torch's own, unless given; xformers, flash and flash3 with "
        "these packages; flex, torch's flex_attention; math, step by step",
        choices=("torch", *ATTENTION_BACKENDS),
    )
    xformers: bool = opt(False, "the same as --attn_mode xformers")
    sdpa: bool = opt(False, "the same as --attn_mode sdpa")
    mem_eff_attn: bool = opt(False, "the same as --attn_mode sdpa, which needs no more memory")
    split_attn: bool = opt(
        False, "compute attention picture by picture", inert="captions of other lengths are masked or packed, not padded apart"
    )
    torch_compile: bool = opt(False, "compile the denoiser's blocks")
    dynamo_backend: str = opt(
        "inductor",
        "compiler of --torch_compile",
        choices=(
            "no", "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt",
            "onnxrt", "tensort", "ipex", "tvm",
        ),
    )  # fmt: skip

    @property
    def chosen(self) -> frozenset[str]:
        """The back ends that the flags name, through whichever of them."""
        named = {"xformers": self.xformers, "sdpa": self.sdpa or self.mem_eff_attn}
        mode = {_OTHER_NAMES.get(self.attn_mode, self.attn_mode)} if self.attn_mode else set()
        return frozenset(mode | {name for name, given in named.items() if given})

    @property
    def compiler(self) -> str | None:
        """What compiles the blocks; None where nothing does."""
        return self.dynamo_backend if self.torch_compile and self.dynamo_backend != "no" else None
