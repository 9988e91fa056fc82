"""Every attention back end against the definition, what each refuses, and models that use one."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny_sdxl
import torch
from runs import CASES
from test_flux_parity import inputs, native
from torch import Tensor

from library.attention import BACKENDS, Attention, attend_packed, pack_keys, use_attention
from library.compiling import check_attention
from library.errors import UserError
from library.option_groups_attention import ATTENTION_BACKENDS
from library.rng import keyed_generator

ON_CPU = [mode for mode in BACKENDS if not ATTENTION_BACKENDS[mode].cuda_only]
ON_GPU = [mode for mode in BACKENDS if ATTENTION_BACKENDS[mode].cuda_only]
MASKS = {"none": None, "ragged": [4, 17, 9], "holes": "holes"}


def randn(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=keyed_generator("attention", key))


def key_mask(kind: Any, length: int) -> Tensor | None:
    """Keys that are attended to, of three rows: the first ones; or here and there, and text before a picture."""
    if kind is None:
        return None
    if kind == "holes":
        keys = torch.arange(length)
        return torch.stack([keys % 2 == 0, keys > 5, (keys < 3) | (keys >= length - 4)])
    return torch.arange(length) < torch.tensor(kind)[:, None]


def attended(mode: str, mask: Tensor | None, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and gradients of q, k, v of three rows of 17 tokens; two heads of width 16."""
    q, k, v = (randn(3, 17, 2, 16, key=name).to(device, dtype).requires_grad_() for name in "qkv")
    mask = None if mask is None else mask.to(device)
    out = Attention.of(mode, mask)(q, k, v)
    (out * randn(*out.shape, key="weight").to(device, dtype)).sum().backward()
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("mode", ON_CPU)
def test_back_ends_give_what_the_definition_gives(mode: str, kind: str) -> None:
    mask = key_mask(MASKS[kind], 17)
    found = attended(mode, mask)
    assert found[0].shape == (3, 17, 32)
    assert_close(found, attended("math", mask), 1e-5)
    if mask is not None:
        hidden = found[2][~mask]
        assert len(hidden) and not hidden.any(), "a key that is hidden has a gradient"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", MASKS)
def test_flex_attention_gives_what_the_definition_gives(kind: str) -> None:
    """Forward alone: torch has no backward pass of it for CPUs."""
    mask = key_mask(MASKS[kind], 17)
    q, k, v = (randn(3, 17, 2, 16, key=name) for name in "qkv")
    torch.testing.assert_close(Attention.of("flex", mask)(q, k, v), Attention.of("math", mask)(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("mode", [*ON_GPU, "sdpa"])
def test_back_ends_of_a_gpu_give_what_the_definition_gives(mode: str, kind: str) -> None:
    package = ATTENTION_BACKENDS[mode].package
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    mask = key_mask(MASKS[kind], 17)
    found = attended(mode, mask, device="cuda", dtype=torch.bfloat16)
    assert_close([x.float().cpu() for x in found], attended("math", mask), 0.05)


def varlen_by_definition(
    q: Tensor, k: Tensor, v: Tensor, query_starts: Tensor, key_starts: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    """What flash-attention's `flash_attn_varlen_func` is documented to compute: each sequence attends to its own keys."""
    out = []
    queries, keys = query_starts.tolist(), key_starts.tolist()
    for n in range(len(queries) - 1):
        q_n, k_n = slice(*queries[n : n + 2]), slice(*keys[n : n + 2])
        assert q_n.stop - q_n.start <= longest_q and k_n.stop - k_n.start <= longest_k
        out.append(BACKENDS["math"].compute(q[q_n][None], k[k_n][None], v[k_n][None], None)[0])
    return torch.cat(out)


@pytest.mark.parametrize("kind", ["ragged", "holes"])
def test_packed_keys_are_those_that_the_mask_lets_through(kind: str) -> None:
    mask = key_mask(MASKS[kind], 17)
    assert mask is not None
    q, k, v = (randn(3, 17, 2, 16, key=name).requires_grad_() for name in "qkv")
    packing = pack_keys(mask)
    assert packing.query_starts.dtype == packing.key_starts.dtype == torch.int32
    out = attend_packed(varlen_by_definition, q, k, v, packing).flatten(2)
    (out * randn(*out.shape, key="weight")).sum().backward()
    expected = attended("math", mask)
    found = [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]
    assert_close(found, expected, 1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mode", ["math", "flex"])
@pytest.mark.parametrize("variant", ["dev", "chroma"])
def test_a_transformer_gives_the_same_by_every_back_end(variant: str, mode: str) -> None:
    """The mask of the call reaches every block, in the form that the back end takes."""
    txt_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    outputs = []
    for chosen in ("sdpa", mode):
        model, given = native(variant), inputs(variant)
        use_attention(model, chosen)
        with torch.no_grad():
            outputs.append(model(**given, txt_mask=txt_mask))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["dev", "chroma"])
def test_text_cut_to_the_longest_caption_that_is_attended_to_changes_nothing(variant: str) -> None:
    txt_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    model, given = native(variant), inputs(variant)
    cut = given | {"txt": given["txt"][:, :3], "txt_ids": given["txt_ids"][:, :3]}
    with torch.no_grad():
        whole, short = model(**given, txt_mask=txt_mask), model(**cut, txt_mask=txt_mask[:, :3])
    torch.testing.assert_close(short, whole, atol=1e-5, rtol=1e-5)


def test_a_unet_gives_the_same_by_our_attention_as_by_its_own(tmp_path: Path) -> None:
    workspace = runs.make_workspace(CASES["sd"], tmp_path)
    losses = []
    for chosen in ("sdpa", "math"):
        trainer = workspace.trainer("full", tmp_path / chosen, f"--attn_mode={chosen}")
        used = {type(p).__name__ for p in trainer.bundle.denoiser.attn_processors.values()}  # type: ignore[union-attr, operator]
        assert used == {"AttnProcessor2_0" if chosen == "sdpa" else "UnetAttention"}
        loss = trainer.loss(trainer.data.train[(0, 0)])
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in trainer.parameters if p.grad is not None)])
    assert len(losses[0]) == len(losses[1]) > 100
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_so_does_sdxls(tmp_path: Path) -> None:
    """Which has linear projections, and heads of one width at all levels."""
    outputs = []
    for chosen in ("sdpa", "math"):
        unet: Any = tiny_sdxl.modules()["denoiser"]
        use_attention(unet, chosen)
        added = {"text_embeds": randn(2, 64, key="pool"), "time_ids": torch.ones(2, 6)}
        given = randn(2, 4, 8, 8, key="x"), torch.tensor([3, 700]), randn(2, 77, 128, key="context")
        with torch.no_grad():
            outputs.append(unet(*given, added_cond_kwargs=added).sample)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "device", "widths", "says"),
    [
        ("xformers", "cpu", [64], "needs a CUDA device, and this run uses 'cpu'"),
        ("flash", "cuda", [320], "takes heads 8 to 256 wide, multiples of 8, and this model has 320"),
        ("flash3", "cuda", [64, 36], "and this model has 36"),
        ("flex", "cuda", [8], "takes heads 16 to 65536 wide, and this model has 8"),
    ],
)
def test_what_a_back_end_cannot_do_is_told(mode: str, device: str, widths: list[int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_attention(mode, torch.device(device), widths)


def test_every_back_end_that_trains_is_there() -> None:
    assert {name for name, needs in ATTENTION_BACKENDS.items() if needs.learns} == BACKENDS.keys()
