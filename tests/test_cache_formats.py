"""Cache files: those of every family that sd-scripts has, made by hand in its layout, are read; ours are what it reads."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from library.cache_formats import LATENT_FORMATS, TEXT_FORMATS, TextFormat
from library.cache_io import Fingerprint, LatentFile, Stamp, TextFile, read_npz
from library.strategy_base import Conditioning, TextEncoderOutputsCachingStrategy, tensor_field
from library.strategy_flux import ChromaConditioning, FluxConditioning, FluxTextEncoderOutputsCachingStrategy
from library.strategy_lumina import LuminaConditioning, LuminaTextEncoderOutputsCachingStrategy
from library.strategy_sd import SdConditioning, SdTextEncoderOutputsCachingStrategy
from library.strategy_sd3 import Sd3Conditioning, Sd3TextEncoderOutputsCachingStrategy
from library.strategy_sdxl import SdxlConditioning, SdxlTextEncoderOutputsCachingStrategy

SHAPES = {"sd3": (16, 6, 8), "flux": (16, 6, 8), "lumina": (16, 6, 8), "hunyuan_image": (64, 2, 3), "anima": (16, 6, 8)}
"""Latents of one bucket; four channels for the others."""

NAMES = {
    "sd": "a.b_0640x0480_sd.npz",
    "sdxl": "a.b_0640x0480_sdxl.npz",
    "sd3": "a.b_0640x0480_sd3.npz",
    "flux": "a.b_0640x0480_flux.npz",
    "lumina": "a.b_0640x0480_lumina.npz",
    "hunyuan_image": "a.b_0640x0480_hi.npz",
    "anima": "a.b_0640x0480_anima.npz",
}
TEXT_NAMES = {
    "sd": "a.b_sd_te.npz",
    "sdxl": "a.b_te_outputs.npz",
    "sd3": "a.b_sd3_te.npz",
    "flux": "a.b_flux_te.npz",
    "lumina": "a.b_lumina_te.npz",
    "hunyuan_image": "a.b_hi_te.npz",
    "anima": "a.b_anima_te.npz",
}


def latents_of(family: str, key: int = 0) -> np.ndarray:
    """float32, as sd-scripts stores them."""
    shape = SHAPES.get(family, (4, 6, 8))
    return np.random.default_rng(key).standard_normal(shape).astype(np.float32)


def file_of(family: str, folder: Path, shape: tuple[int, ...], flipped: bool = True) -> LatentFile:
    row = LATENT_FORMATS[family]
    path = row.path_for(folder / "a.b.png", (640, 480))
    channels, height, width = shape
    return LatentFile(path, row.key_suffix(height, width), (channels, height, width), (640, 480), flipped, row)


# ---- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LATENT_FORMATS)
def test_latents_by_sd_scripts_are_read(family: str, tmp_path: Path) -> None:
    one, mirrored = latents_of(family), latents_of(family, 1)
    file = file_of(family, tmp_path, one.shape)
    assert file.path.name == NAMES[family]
    suffix = f"_{one.shape[1]}x{one.shape[2]}" if family in SHAPES else ""
    arrays = {"latents": one, "latents_flipped": mirrored, "original_size": (640, 480), "crop_ltrb": (3, 0, 61, 48)}
    np.savez(file.path, **{name + suffix: np.array(value) for name, value in arrays.items()})
    verdict = file.check(Fingerprint({"vae": "any"}))
    assert verdict.usable and verdict.foreign
    entry = file.load()
    np.testing.assert_allclose(entry.latents.float(), one, rtol=2**-11)
    np.testing.assert_allclose(entry.flipped.float(), mirrored, rtol=2**-11)  # type: ignore[union-attr]
    assert entry.crop_ltrb == (3, 0, 61, 48)
    other = file_of(family, tmp_path, (one.shape[0], one.shape[1] + 1, one.shape[2]))
    assert not other.check(Fingerprint({})).usable, "another bucket"


def test_old_latents_with_a_frame_axis_are_read_where_there_were_such(tmp_path: Path) -> None:
    for family in ("anima", "flux"):
        one = latents_of(family)
        file = file_of(family, tmp_path, one.shape, flipped=False)
        np.savez(file.path, **{f"latents{file.suffix}": one[:, None]})
        assert file.check(Fingerprint({})).usable == (family == "anima")
    assert file_of("anima", tmp_path, one.shape, flipped=False).load().latents.shape == one.shape


@pytest.mark.parametrize("family", LATENT_FORMATS)
def test_latents_come_back_as_they_were_stored_and_sd_scripts_reads_them(family: str, tmp_path: Path) -> None:
    one, mirrored = (torch.from_numpy(latents_of(family, key)).half() for key in (0, 1))
    image = tmp_path / "a.b.png"
    image.write_bytes(b"anything")
    fingerprint = Fingerprint({"vae": "v"}, Stamp(image))
    file = file_of(family, tmp_path, tuple(one.shape))
    file.save(one, mirrored, (3, 0, 61, 48), fingerprint)
    assert file.check(fingerprint).usable and not file.check(fingerprint).foreign
    assert file.check(Fingerprint({"vae": "w"}, Stamp(image))).stale == "the VAE"
    entry = file.load()
    assert torch.equal(entry.latents, one) and torch.equal(entry.flipped, mirrored)  # type: ignore[arg-type]
    arrays, suffix = np.load(file.path), file.suffix  # from here on as sd-scripts does it
    assert torch.equal(torch.FloatTensor(arrays[f"latents{suffix}"]), one.float())
    assert torch.equal(torch.FloatTensor(arrays[f"latents_flipped{suffix}"]), mirrored.float())
    assert arrays[f"original_size{suffix}"].tolist() == [640, 480] and arrays[f"crop_ltrb{suffix}"].tolist() == [3, 0, 61, 48]


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_resolutions_share_a_file_and_do_not_lose_each_other(family: str, tmp_path: Path) -> None:
    """The first by sd-scripts, the second by us, the first once more by us."""
    large = latents_of(family)
    small = torch.zeros(large.shape[0], 1, 1, dtype=torch.float16)
    theirs, ours = file_of(family, tmp_path, large.shape, False), file_of(family, tmp_path, tuple(small.shape), False)
    np.savez(theirs.path, **{f"latents{theirs.suffix}": large})
    ours.save(small, None, (0, 0, 0, 0), Fingerprint({"vae": "v"}))
    assert theirs.path == ours.path and theirs.check(Fingerprint({})).foreign
    theirs.save(torch.from_numpy(large).half(), None, (0, 0, 0, 0), Fingerprint({"vae": "v"}))
    assert ours.check(Fingerprint({"vae": "v"})).usable and torch.equal(ours.load().latents, small)


# ---- text encoder outputs --------------------------------------------------------------------------------------------


def strategy_for(row: TextFormat) -> TextEncoderOutputsCachingStrategy:
    """What a family of this row would have: a field for each array."""
    fields: list[Any] = [(name, torch.Tensor, tensor_field(source="encoder")) for name in row.arrays]
    kind = make_dataclass("RowConditioning", fields, bases=(Conditioning,), frozen=True)

    @dataclass(frozen=True)
    class RowStrategy(TextEncoderOutputsCachingStrategy):
        format: ClassVar[TextFormat] = row

    return RowStrategy(kind)


@pytest.mark.parametrize("family", TEXT_FORMATS)
def test_text_encoder_outputs_by_sd_scripts_are_read(family: str, tmp_path: Path) -> None:
    row = TEXT_FORMATS[family]
    path = row.path_for(tmp_path / "a.b.png")
    assert path.name == TEXT_NAMES[family]
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((5, 3)).astype(np.float32) for name in row.arrays}
    arrays |= {name: rng.integers(0, 2, 5) for name in row.arrays if "mask" in name or name.endswith("_ids")}
    settings = {name: np.array(False) for name in row.settings}
    np.savez(path, **arrays, **settings)
    file = TextFile(path, strategy_for(row), frozenset({"encoder"}))
    verdict = file.check(Fingerprint({"caption": "any"}))
    assert verdict.usable and verdict.foreign
    for name, tensor in file.load().tensors().items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name])
    del arrays[row.arrays[-1]]
    np.savez(path, **arrays, **settings)
    assert file.check(Fingerprint({})).stale == f"no {row.arrays[-1]}"


OURS: dict[str, tuple[TextEncoderOutputsCachingStrategy, Conditioning]] = {
    "sd": (SdTextEncoderOutputsCachingStrategy(), SdConditioning(context=torch.randn(77, 4))),
    "sdxl": (
        SdxlTextEncoderOutputsCachingStrategy(),
        SdxlConditioning(hidden_state1=torch.randn(77, 4), hidden_state2=torch.randn(77, 6), pool2=torch.randn(6)),
    ),
    "flux": (
        FluxTextEncoderOutputsCachingStrategy(FluxConditioning, mask_t5=True),
        FluxConditioning(context=torch.randn(8, 4), mask=torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]), pooled=torch.randn(3)),
    ),
    "lumina": (
        LuminaTextEncoderOutputsCachingStrategy(),
        LuminaConditioning(context=torch.randn(8, 4), mask=torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])),
    ),
    "sd3": (
        Sd3TextEncoderOutputsCachingStrategy(
            Sd3Conditioning, mask_clip=False, mask_t5=True, shapes={"l_out": (77, 4), "l_pooled": (4,)}
        ),
        Sd3Conditioning(
            l_out=torch.randn(77, 4),
            l_pooled=torch.randn(4),
            l_mask=torch.ones(77, dtype=torch.long),
            g_out=torch.randn(77, 6),
            g_pooled=torch.randn(6),
            g_mask=torch.ones(77, dtype=torch.long),
            t5_out=torch.randn(8, 16),
            t5_attn_mask=torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]),
        ),
    ),
    "chroma": (
        FluxTextEncoderOutputsCachingStrategy(ChromaConditioning, mask_t5=True),
        ChromaConditioning(context=torch.randn(8, 4), mask=torch.tensor([1, 1, 1, 0, 0, 0, 0, 0])),
    ),
}
"""A strategy of each family that there is, and an entry of one caption."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("family", OURS)
def test_text_encoder_outputs_come_back_bit_for_bit_and_sd_scripts_misses_nothing(
    family: str, compact: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    strategy, entry = OURS[family]
    entry = entry._map(lambda value: value.to(dtype) if value.is_floating_point() else value)
    file = TextFile(strategy.format.path_for(tmp_path / "a.png"), strategy, strategy.conditioning.sources(), compact)
    fingerprint = Fingerprint({"caption": "c", "clip_l": "one"})
    file.save(entry, fingerprint)
    assert file.check(fingerprint).usable
    assert file.check(Fingerprint({"caption": "d"})).stale == "the caption"
    for name, tensor in file.load().tensors().items():
        expected = entry.tensors()[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    arrays = read_npz(file.path)
    assert arrays is not None and not strategy.format.missing(arrays)
    floats = [array for name, array in arrays.items() if name in strategy.format.arrays and array.dtype.kind == "f"]
    if not compact:
        assert all(torch.from_numpy(array).is_floating_point() for array in floats)


def test_flux_files_say_how_they_were_made(tmp_path: Path) -> None:
    for mask in (False, True):
        strategy = FluxTextEncoderOutputsCachingStrategy(FluxConditioning, mask_t5=mask)
        file = TextFile(tmp_path / "a_flux_te.npz", strategy, strategy.conditioning.sources())
        file.save(OURS["flux"][1], Fingerprint({}))
        arrays = read_npz(file.path)
        assert arrays is not None
        assert bool(arrays["apply_t5_attn_mask"]) == mask and arrays["txt_ids"].shape == (8, 3) and not arrays["txt_ids"].any()


@pytest.mark.parametrize("kind", ["latents", "text"])
@pytest.mark.parametrize("damage", ["cut", "empty", "not a zip", "pickled"])
def test_a_damaged_file_is_made_again(kind: str, damage: str, tmp_path: Path) -> None:
    strategy, entry = OURS["sd"]
    file: LatentFile | TextFile
    if kind == "latents":
        file = file_of("sd", tmp_path, (4, 6, 8), flipped=False)
        file.save(torch.zeros(4, 6, 8).half(), None, (0, 0, 0, 0), Fingerprint({}))
    else:
        file = TextFile(tmp_path / "a_sd_te.npz", strategy, strategy.conditioning.sources())
        file.save(entry, Fingerprint({}))
    assert file.check(Fingerprint({})).usable
    whole = file.path.read_bytes()
    if damage == "pickled":
        np.savez(file.path, latents=np.array([{"a": 1}], dtype=object), context=np.array([{"a": 1}], dtype=object))
    else:
        file.path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "not a zip": b"x" * len(whole)}[damage])
    assert file.check(Fingerprint({})).stale == "unreadable file"
