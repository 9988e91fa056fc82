"""Files that cannot be used never stop a run, and odd ones are read right. All files are made here."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import build, make_bundle, make_options, make_strategies, write_folder, write_picture, write_toml
from PIL import Image

from library.caching import cache_latents, cache_text_outputs
from library.dataset import TrainData, make_loader
from library.errors import UserError
from library.image_io import decode, image_extensions, read_size
from library.quarantine import QUARANTINE_FILE, BadFile, Quarantine
from library.strategy_base import Strategies


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Strategies:
    return make_strategies(tmp_path_factory.mktemp("tokenizer"))


def data_of(tmp_path: Path, strategies: Strategies, subset: str = "", **flags: Any) -> TrainData:
    """The pictures in `img`, one in a batch; the list of bad files goes to `out`."""
    (tmp_path / "out").mkdir(exist_ok=True)
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'img'}'\n{subset}"
    flags = {"output_dir": str(tmp_path / "out"), "dataset_config": write_toml(tmp_path / "data.toml", text), **flags}
    return build(make_options(**flags), strategies)


def captions_seen(data: TrainData) -> list[str]:
    loader = make_loader(data.train, epoch=0, start=0, rank=0, world=1, options=data.options, pin=False)
    return sorted(caption for batch in loader for caption in batch.captions)


def listed(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "out" / QUARANTINE_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {Path(entry["path"]).name: entry["reason"] for entry in map(json.loads, lines)}


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is of this size, and has no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\x04IDATdata"


def test_bad_files_are_left_out_and_listed_and_the_rest_is_trained(
    tmp_path: Path, strategies: Strategies, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "img", [(64, 64)] * 3)
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not a picture")
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.webp").symlink_to(folder / "nowhere.webp")
    before = {path.name for path in folder.iterdir()}
    data = data_of(tmp_path, strategies)
    assert captions_seen(data) == [f"picture {index}, tag" for index in range(3)]
    found = listed(tmp_path)
    assert set(found) == {"empty.png", "text.jpg", "bomb.png", "loop.png", "gone.webp"}
    assert "exceeds limit" in found["bomb.png"] and "leads nowhere" in found["loop.png"]
    assert {path.name for path in folder.iterdir()} == before
    assert "5 files cannot be used and are left out" in caplog.text and str(tmp_path / "out" / QUARANTINE_FILE) in caplog.text
    assert data.train.quarantine.total() == 5
    with pytest.raises(UserError, match=r"5 files cannot be used \(--strict_data\)"):
        data_of(tmp_path, strategies, strict_data=True)


# ---- everything at once ----------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
PLAIN = Image.fromarray(PIXELS)


def saved(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_with(name: bytes, body: bytes) -> bytes:
    """The plain picture with one more chunk behind its header."""
    whole = saved(PLAIN, "PNG")
    return whole[:33] + chunk(name, body) + whole[33:]


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 8
    return saved(PLAIN, "JPEG", exif=exif)


def damaged() -> bytes:
    """A byte in the middle of the pixels is another, as on a failing disk."""
    whole = bytearray(saved(PLAIN, "PNG"))
    whole[len(whole) // 2] ^= 0xFF
    return bytes(whole)


GOOD: dict[str, Callable[[], bytes]] = {
    "plain.png": lambda: saved(PLAIN, "PNG"),
    "UPPER.JPG": lambda: saved(PLAIN, "JPEG"),
    "a png by name.jpg": lambda: saved(PLAIN, "PNG"),
    "a gif by name.png": lambda: saved(PLAIN, "GIF"),
    "cmyk.jpg": lambda: saved(PLAIN.convert("CMYK"), "JPEG"),
    "deep grey.png": lambda: saved(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"),
    "grey.png": lambda: saved(PLAIN.convert("L"), "PNG"),
    "grey and clear.png": lambda: saved(PLAIN.convert("LA"), "PNG"),
    "two colours.png": lambda: saved(PLAIN.convert("1"), "PNG"),
    "clear palette.png": lambda: saved(PLAIN.convert("P"), "PNG", transparency=3),
    "clear bytes in a palette.png": lambda: saved(PLAIN.convert("P"), "PNG", transparency=bytes(range(256))),
    "clear.webp": lambda: saved(PLAIN.convert("RGBA"), "WEBP"),
    "moving.png": lambda: saved(PLAIN, "PNG", save_all=True, append_images=[PLAIN.convert("L").convert("RGB")]),
    "animated.webp": lambda: saved(PLAIN, "WEBP", save_all=True, append_images=[PLAIN.rotate(90)]),
    "turned.jpg": turned,
    "strange exif.jpg": lambda: saved(PLAIN, "JPEG", exif=b"Exif\0\0not at all"),
    "windows.bmp": lambda: saved(PLAIN, "BMP"),
    "größe 日本 🐈.png": lambda: saved(PLAIN, "PNG"),
    "'quotes' and, commas #1.png": lambda: saved(PLAIN, "PNG"),
    f"{'long' * 62}.png": lambda: saved(PLAIN, "PNG"),
}
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing.png": (lambda: b"", "not a readable image"),
    "text.jpg": (lambda: b"<html>404 not found</html>", "not a readable image"),
    "zeros.webp": (lambda: bytes(5000), "not a readable image"),
    "cut.png": (lambda: saved(PLAIN, "PNG")[:3000], "not a readable image"),
    "cut.jpg": (lambda: saved(PLAIN, "JPEG")[:1500], "not a readable image"),
    "cut.webp": (lambda: saved(PLAIN, "WEBP", lossless=True)[:1500], "not a readable image"),
    "damaged.png": (damaged, "not a readable image"),
    "bomb.png": (lambda: png_header(60_000, 60_000), "exceeds limit"),
    "text bomb.png": (lambda: png_with(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 1)), "not a readable image"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file of the two tables with its name as its caption, links that lead nowhere, and captions that are none."""
    folder = tmp_path_factory.mktemp("corpus") / "img"
    folder.mkdir()
    for name, make in {**GOOD, **{name: make for name, (make, _) in BAD.items()}}.items():
        (folder / name).write_bytes(make())
        (folder / name).with_suffix(".txt").write_text(name, encoding="utf-8")
    (folder / "no caption.png").write_bytes(saved(PLAIN, "PNG"))
    (folder / "no caption.txt").mkdir()
    (folder / "a folder.png").mkdir()
    for name, target in (("loop.png", "loop.png"), ("gone.png", "nowhere.png"), ("round", ".")):
        (folder / name).symlink_to(folder / target)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".npz"}


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize(
    ("cached", "recursive"), [("", False), ("", True), ("cache_latents", False), ("cache_latents_to_disk", True)]
)
def test_the_whole_corpus_is_trained_but_for_what_cannot_be(
    cached: str, recursive: bool, corpus: Path, tmp_path: Path, strategies: Strategies, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(corpus)
    (tmp_path / "img").symlink_to(corpus)
    flags = {cached: True, "cache_text_encoder_outputs": True} if cached else {}
    subset = f"recursive = {str(recursive).lower()}\n"
    data = data_of(tmp_path, strategies, subset, cache_dir=str(tmp_path / "cache"), **flags)
    if cached:
        cache_latents(data, strategies, make_bundle(), data.options, torch.device("cpu"))
        cache_text_outputs(data, strategies, make_bundle(), data.options, torch.device("cpu"))
    seen = captions_seen(data)
    assert set(seen) == set(GOOD)
    found = listed(tmp_path)
    assert found.keys() == {*BAD, "loop.png", "gone.png", "no caption.png"}
    for name, (_, reason) in BAD.items():
        assert reason in found[name], f"{name}: {found[name]}"
    assert "the caption cannot be read" in found["no caption.png"] and "leads nowhere" in found["loop.png"]
    caplog.clear()
    data.train.quarantine.report()
    assert f"{len(found)} files cannot be used and are left out" in caplog.text
    assert contents(corpus) == before, "nothing of the user's changes"


def broken_at_random(data: bytes, rng: Random) -> bytes:
    """Bytes changed, the end cut off, or a piece cut out; in the header as often as anywhere."""
    body = bytearray(data)
    kind = rng.choice(["changed", "cut", "shortened"])
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    if kind == "shortened":
        start = rng.randrange(len(data))
        return data[:start] + data[start + rng.randint(1, 50) :]
    for _ in range(rng.randint(1, 8)):
        body[rng.randrange(rng.choice([60, len(body)]))] = rng.randrange(256)
    return bytes(body)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF", "JXL"])
def test_whatever_is_broken_is_either_read_or_named(kind: str, tmp_path: Path) -> None:
    image_extensions()  # for the plugins
    rng, path = Random(1), tmp_path / "p.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    settings = {"exif": exif} if kind in ("JPEG", "WEBP", "AVIF") else {}
    whole = saved(PLAIN.convert("P" if kind == "GIF" else "RGB"), kind, **settings)
    named = 0
    for _ in range(60):
        path.write_bytes(broken_at_random(whole, rng))
        for read in (read_size, decode):
            try:
                read(path)
            except BadFile as error:
                named += 1
                assert error.reason.startswith("not a readable image")
    assert named > 20


def test_pictures_of_formats_that_are_not_read_are_counted(
    tmp_path: Path, strategies: Strategies, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "img", [(64, 64)])
    for name in ("a.gif", "b.GIF", "c.tiff"):
        (folder / name).write_bytes(saved(PLAIN, "GIF"))
    assert captions_seen(data_of(tmp_path, strategies)) == ["picture 0, tag"]
    assert "pictures of formats that are not read: 2 .gif, 1 .tiff. Convert them" in caplog.text


def test_formats_of_plugins_are_read_in_a_process_that_starts_afresh(tmp_path: Path, strategies: Strategies) -> None:
    """JPEG XL by the plugin, AVIF by Pillow. What reads pictures may be a worker, which has loaded neither."""
    write_folder(tmp_path / "img", [(64, 64)])
    assert ".jxl" in image_extensions() and ".avif" in image_extensions()
    for extension, settings in ((".jxl", {"lossless": True}), (".avif", {"quality": 100, "subsampling": "4:4:4"})):
        PLAIN.save(tmp_path / "img" / f"x{extension[1:]}{extension}", **settings)
        (tmp_path / "img" / f"x{extension[1:]}.txt").write_text(extension)
    assert captions_seen(data_of(tmp_path, strategies)) == [".avif", ".jxl", "picture 0, tag"]
    code = "import sys, pathlib; from library.image_io import decode; print(decode(pathlib.Path(sys.argv[1]))[0].sum())"
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", code, str(tmp_path / "img" / "xjxl.jxl")]
    assert subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout == f"{PIXELS.sum()}\n"


def test_strictly_the_corpus_trains_nothing(corpus: Path, tmp_path: Path, strategies: Strategies) -> None:
    (tmp_path / "img").symlink_to(corpus)
    with pytest.raises(UserError, match=r"files cannot be used \(--strict_data\)") as caught:
        data_of(tmp_path, strategies, strict_data=True)
    assert all(name in str(caught.value) for name in ("nothing.png", "bomb.png", "loop.png", "no caption.png"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_after_the_start_is_left_out_of_its_batch(
    workers: int, tmp_path: Path, strategies: Strategies
) -> None:
    folder = write_folder(tmp_path / "img", [(64, 64)] * 5)
    data = data_of(tmp_path, strategies, max_data_loader_n_workers=workers)
    (folder / "p1.png").unlink()
    (folder / "p3.png").write_bytes((folder / "p3.png").read_bytes()[:900])
    Image.new("RGB", (96, 64)).save(folder / "p4.png")
    seen = captions_seen(data)
    assert len(seen) == 5 and set(seen) == {"picture 0, tag", "picture 2, tag"}  # the next batch stands in for an empty one
    found = listed(tmp_path)
    assert set(found) == {"p1.png", "p3.png", "p4.png"}
    assert "No such file" in found["p1.png"] and "truncated" in found["p3.png"] and "it is 96x64" in found["p4.png"]
    assert data.train.quarantine.total() == 3


def test_a_batch_is_short_by_its_bad_files(tmp_path: Path, strategies: Strategies) -> None:
    folder = write_folder(tmp_path / "img", [(64, 64)] * 3)
    data = data_of(tmp_path, strategies, train_batch_size=3)
    (folder / "p1.png").unlink()
    batch = data.train[(0, 0)]
    assert set(batch.captions) == {"picture 0, tag", "picture 2, tag"} and batch.loss_weights.shape == (2,)


def test_where_no_picture_is_left_the_run_ends_and_says_why(tmp_path: Path, strategies: Strategies) -> None:
    folder = write_folder(tmp_path / "img", [(64, 64)] * 2)
    data = data_of(tmp_path, strategies)
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"no picture can be used any more; the first: .*No such file"):
        captions_seen(data)


@pytest.mark.parametrize("where", ["cache_latents", "cache_latents_to_disk"])
def test_caching_goes_on_past_a_bad_file(where: str, tmp_path: Path, strategies: Strategies) -> None:
    folder = write_folder(tmp_path / "img", [(64, 64)] * 3)
    data = data_of(tmp_path, strategies, **{where: True})
    (folder / "p1.png").write_bytes((folder / "p1.png").read_bytes()[:900])
    cache_latents(data, strategies, make_bundle(), data.options, torch.device("cpu"))
    seen = captions_seen(data)
    assert set(seen) == {"picture 0, tag", "picture 2, tag"}
    assert set(listed(tmp_path)) == {"p1.png"}


@pytest.mark.parametrize("damage", ["removed", "cut", "another"])
def test_what_a_cache_has_of_a_file_that_is_gone_is_not_trained(damage: str, tmp_path: Path, strategies: Strategies) -> None:
    """It goes between the looking at pictures and the looking at caches."""
    folder = write_folder(tmp_path / "img", [(64, 64)] * 3)

    def cached() -> TrainData:
        data = data_of(tmp_path, strategies, cache_latents_to_disk=True)
        if entries:
            whole = (folder / "p1.png").read_bytes()
            (folder / "p1.png").unlink()
            if damage != "removed":
                (folder / "p1.png").write_bytes(whole[:900] if damage == "cut" else saved(PLAIN.resize((8, 8)), "PNG"))
        cache_latents(data, strategies, make_bundle(), data.options, torch.device("cpu"))
        return data

    entries: list[Path] = []
    cached()
    entries += folder.glob("p1_*.npz")
    assert len(entries) == 1
    assert set(captions_seen(cached())) == {"picture 0, tag", "picture 2, tag"}
    assert set(listed(tmp_path)) == {"p1.png"}


def test_the_list_is_that_of_the_last_run(tmp_path: Path, strategies: Strategies) -> None:
    folder = write_folder(tmp_path / "img", [(64, 64)])
    (folder / "bad.png").touch()
    data_of(tmp_path, strategies)
    assert set(listed(tmp_path)) == {"bad.png"}
    (folder / "bad.png").unlink()
    data_of(tmp_path, strategies)
    assert listed(tmp_path) == {}


def test_a_list_that_cannot_be_written_costs_no_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine(tmp_path / "not there")
    quarantine.add(BadFile(tmp_path / "a.png", "broken"))
    assert quarantine.total() == 1 and "cannot write" in caplog.text


def test_odd_formats_are_read_as_they_look(tmp_path: Path) -> None:
    def pixel(name: str) -> list[int]:
        pixels, _ = decode(tmp_path / name)
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        return [int(value) for value in pixels[1, 1]]

    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    Image.fromarray(np.full((8, 8), 0x8040, dtype=np.uint16)).save(tmp_path / "deep.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=1)
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 200, 0))
    first.save(tmp_path / "animated.webp", save_all=True, append_images=[second], lossless=True)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "really a png.jpg", "PNG")
    assert pixel("cmyk.jpg") == pytest.approx([255, 0, 0], abs=3)
    assert pixel("deep.png") == [0x80, 0x80, 0x80]
    assert pixel("palette.png") == [10, 20, 30]
    assert pixel("animated.webp") == [200, 0, 0]
    assert pixel("really a png.jpg") == [1, 2, 3]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_a_picture_is_turned_as_pillow_turns_it(orientation: int, extension: str, tmp_path: Path) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"p.{extension}"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif, lossless=True)
    expected = np.array(ImageOps.exif_transpose(Image.open(path)))
    decoded, _ = decode(path)
    assert np.array_equal(decoded, expected)
    assert read_size(path) == (expected.shape[1], expected.shape[0])


def test_captions_of_any_usual_encoding_are_read(
    tmp_path: Path, strategies: Strategies, caplog: pytest.LogCaptureFixture
) -> None:
    encoded = {
        "bom": "café".encode("utf-8-sig"),
        "wide": "café".encode("utf-16"),
        "unmarked": "café".encode("utf-16-le"),
        "unmarked, the other way round": "café".encode("utf-16-be"),
        "latin": "café".encode("latin-1"),
        "windows": "café\r\nsecond".encode(),
        "empty": b"",
    }
    for name, data in encoded.items():
        write_picture(tmp_path / "img" / f"{name}.png")
        (tmp_path / "img" / f"{name}.txt").write_bytes(data)
    read = {record.path.stem: record.caption for record in data_of(tmp_path, strategies).train.records}
    assert read == {**dict.fromkeys(encoded, "café"), "empty": ""}
    assert "1 caption files are not UTF-8 and were read as Latin-1. First: latin.txt" in caplog.text


def test_odd_names_are_names(tmp_path: Path, strategies: Strategies) -> None:
    names = ["with space", "größe 日本", "x" * 240, "a.b.c", "#{}'[1]"]
    for number, name in enumerate(names):
        write_picture(tmp_path / "img" / f"{name}.png", key=number, caption=name[:20])
    data = data_of(tmp_path, strategies)
    assert captions_seen(data) == sorted(name[:20] for name in names) and not listed(tmp_path)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
def test_a_name_that_is_no_text_is_a_name(tmp_path: Path, strategies: Strategies) -> None:
    """Written on another system long ago. What is cached of it is found again, and it is named when it breaks."""
    folder = os.fsencode(write_folder(tmp_path / "img", [(64, 64)] * 2))
    for extension in (b".png", b".txt"):
        os.rename(folder + b"/p0" + extension, folder + b"/caf\xe9" + extension)
    caches = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    for expected in ({"picture 0, tag", "tag, picture 0"}, set()):
        data = data_of(tmp_path, strategies, "shuffle_caption = true\n", **caches)
        cache_latents(data, strategies, make_bundle(), data.options, torch.device("cpu"))
        cache_text_outputs(data, strategies, make_bundle(), data.options, torch.device("cpu"))
        seen = captions_seen(data)
        assert bool(expected & set(seen)) == bool(expected) and {"picture 1, tag", "tag, picture 1"} & set(seen)
        os.truncate(folder + b"/caf\xe9.png", 900)
    assert list(listed(tmp_path)) == [os.fsdecode(b"caf\xe9.png")]


def test_keys_of_a_metadata_file_that_can_be_no_name_are_listed(tmp_path: Path, strategies: Strategies) -> None:
    write_folder(tmp_path / "img", [(64, 64)])
    keys = ["", ".", "..", "a\0b", "x" * 5000, "p0"]
    (tmp_path / "meta.json").write_text(json.dumps({key: {"caption": f"caption {key[:3]}"} for key in keys}))
    assert captions_seen(data_of(tmp_path, strategies, f"metadata_file = '{tmp_path / 'meta.json'}'\n")) == ["caption p0"]
    assert all("names it, but it does not exist" in reason for reason in listed(tmp_path).values())


def test_captions_may_hold_what_is_no_character(tmp_path: Path, strategies: Strategies) -> None:
    folder = write_folder(tmp_path / "img", [(64, 64)] * 2)
    (folder / "captions.json").write_text('{"p0": "a \\ud83d cat"}')
    assert captions_seen(data_of(tmp_path, strategies)) == ["a ? cat", "picture 1, tag"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_folders_below_are_searched_on_request_and_a_loop_of_links_ends(tmp_path: Path, strategies: Strategies) -> None:
    root = write_folder(tmp_path / "img", [(64, 64)])
    write_picture(root / "b" / "p0.png", key=1, caption="below")
    write_picture(root / ".hidden" / "p0.png", key=2, caption="hidden")
    (root / "b" / "loop").symlink_to(root)
    assert captions_seen(data_of(tmp_path, strategies)) == ["picture 0, tag"]
    data = data_of(tmp_path, strategies, "recursive = true\n")
    assert captions_seen(data) == ["below", "picture 0, tag"]
    assert {record.key for record in data.train.records} == {"0/0/b/p0.png", "0/0/p0.png"}


def test_a_listed_picture_has_several_captions_of_which_each_reading_picks_one(
    tmp_path: Path, strategies: Strategies, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "img", [(64, 64)] * 2)
    (folder / "captions.json").write_text(json.dumps({"p0": ["one", "two", "three"], "p7": "typing error"}), encoding="utf-8")
    data = data_of(tmp_path, strategies, "caption_prefix = 'a'\n")
    seen = {caption for epoch in range(20) for index in range(2) for caption in data.train[(epoch, index)].captions}
    assert seen == {"a one", "a two", "a three", "a picture 1, tag"}
    assert "1 entries of captions.json belong to no image. First: p7." in caplog.text
    (folder / "captions.json").write_text(json.dumps({"p0": 3}), encoding="utf-8")
    with pytest.raises(UserError, match=r"captions\.json: the entry of 'p0' is 3"):
        data_of(tmp_path, strategies)


def test_a_subsets_loss_weight_multiplies_that_of_regularisation(tmp_path: Path, strategies: Strategies) -> None:
    write_folder(tmp_path / "img", [(64, 64)])
    write_folder(tmp_path / "reg", [(64, 64)])
    more = f"loss_weight = 0.5\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'reg'}'\nis_reg = true\nloss_weight = 3\n"
    data = data_of(tmp_path, strategies, more, prior_loss_weight=0.25)
    assert {record.path.parent.name: record.loss_weight for record in data.train.records} == {"img": 0.5, "reg": 0.75}
