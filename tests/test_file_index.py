"""The index of data files: what it saves reading, and that it is never believed against the files."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_tools import write_picture
from PIL import Image

from library.cache_io import read_npz
from library.file_index import INDEX_FILE, KnownFiles, in_threads, in_turn
from library.image_io import content_hash
from library.near_duplicates import near_duplicates
from library.quarantine import BadFile

HOUR = 3600 * 10**9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of an hour ago, with captions."""
    for key in range(3):
        settle(write_picture(tmp_path / "img" / f"p{key}.png", (40 + key, 30), key, caption=f"caption {key}"))
        settle(tmp_path / "img" / f"p{key}.txt")
    return tmp_path / "img"


def settle(path: Path, at: int | None = None) -> Path:
    """Its time an hour ago, or `at`."""
    at = time.time_ns() - HOUR if at is None else at
    os.utime(path, ns=(at, at))
    return path


def spoil(path: Path) -> None:
    """Other content, and nothing shows it: whoever does not tell has not read it."""
    status = path.stat()
    path.write_bytes(b"?" * status.st_size)
    settle(path, status.st_mtime_ns)


def known(folder: Path) -> KnownFiles:
    files = KnownFiles(folder.parent / "cache")
    files.open(folder)
    return files


def ask(folder: Path) -> dict[str, object]:
    """Everything that can be asked, as a run asks it; kept for the next one."""
    files = known(folder)
    found: dict[str, object] = {}
    for path in sorted(folder.iterdir()):
        found[path.name] = files.caption(path) if path.suffix == ".txt" else (files.size(path), files.digest(path))
    files.save(complete=True)
    return found


def index_of(folder: Path) -> Path:
    (path,) = (folder.parent / "cache").glob(f"*/{INDEX_FILE}")
    return path


def test_a_second_run_reads_no_file_that_has_not_changed(folder: Path) -> None:
    first = ask(folder)
    assert first["p1.png"] == ((41, 30), content_hash((folder / "p1.png").read_bytes()))
    assert first["p1.txt"] == ("caption 1", False)
    for path in folder.iterdir():
        spoil(path)
    assert ask(folder) == first
    index_of(folder).unlink()
    with pytest.raises(BadFile):
        ask(folder)


def test_processes_that_read_other_files_keep_each_other_s_notes(folder: Path) -> None:
    """As those that fill a cache together: each asks for all sizes, and reads its share."""
    paths = [folder / f"p{key}.png" for key in range(3)]
    processes = [known(folder) for _ in paths]
    expected = []
    for files, own in zip(processes, paths, strict=True):
        assert all(files.size(path) for path in paths)
        expected.append(files.digest(own))
    for files in processes:
        files.save(complete=True)
    for path in paths:
        spoil(path)
    later = known(folder)
    assert [later.digest(path) for path in paths] == expected


def test_pictures_are_compared_without_being_decoded_again(folder: Path) -> None:
    (folder.parent / "held").mkdir()
    Image.open(folder / "p0.png").resize((80, 60)).save(other := folder.parent / "held" / "p9.png")
    settle(other)
    trained = [folder / f"p{key}.png" for key in range(3)]
    first = near_duplicates([other], trained, known(folder))
    assert [pair.trained.name for pair in first] == ["p0.png"]
    for path in (other, *trained):
        spoil(path)
    assert near_duplicates([other], trained, known(folder)) == first


@pytest.mark.parametrize("by", ["time", "length"])
def test_a_file_that_has_changed_is_read_again(by: str, folder: Path) -> None:
    ask(folder)
    text = folder / "p0.txt"
    before = text.stat().st_mtime_ns
    text.write_text("caption X" if by == "time" else "another one")
    settle(text, before + (1 if by == "time" else 0))
    write_picture(folder / "p0.png", (64, 64))
    again = ask(folder)
    assert again["p0.txt"] == (text.read_text(), False)
    assert again["p0.png"] == ((64, 64), content_hash((folder / "p0.png").read_bytes()))
    assert again["p1.png"] == ask(folder)["p1.png"]


def test_a_file_that_was_changed_just_now_is_not_kept(folder: Path) -> None:
    """Another change within the same tick of the clock would not show."""
    settle(folder / "p0.txt", time.time_ns())
    ask(folder)
    spoil(folder / "p0.txt")
    spoil(folder / "p1.txt")
    again = ask(folder)
    assert again["p0.txt"] == ("?" * 9, False)
    assert again["p1.txt"] == ("caption 1", False)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "version"])
def test_a_damaged_index_is_made_anew_and_said_so(damage: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = ask(folder)
    path = index_of(folder)
    data = bytearray(path.read_bytes())
    if damage == "version":
        arrays = read_npz(path)
        assert arrays is not None
        np.savez(path, **{**arrays, "version": np.array(0)})  # type: ignore[arg-type]
    else:
        place = data.index(b"caption 1")
        data[place] ^= 1
        path.write_bytes({"cut": bytes(data[: len(data) // 2]), "flipped": bytes(data), "emptied": b""}[damage])
    assert ask(folder) == first
    assert [record.levelno for record in caplog.records if "made anew" in record.message] == [logging.WARNING]
    caplog.clear()
    assert ask(folder) == first
    assert not caplog.records


def test_the_picture_folder_is_left_alone_and_an_index_that_cannot_be_kept_costs_no_picture(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = sorted(folder.iterdir())
    first = ask(folder)
    assert sorted(folder.iterdir()) == before
    (folder.parent / "no folder").write_text("")
    files = KnownFiles(folder.parent / "no folder")
    assert files.caption(folder / "p0.txt") == first["p0.txt"]
    files.save()
    assert "is not kept" in caplog.text


def test_files_that_one_run_does_not_use_stay_known_while_they_are_few(folder: Path) -> None:
    ask(folder)
    for path in folder.glob("*.txt"):
        spoil(path)
    files = known(folder)
    for key in range(3):
        files.digest(settle(folder / f"p{key}.png"))  # all six are met or not, three each
    files.save(complete=True)
    assert known(folder).caption(folder / "p2.txt") == ("caption 2", False)
    files = known(folder)
    files.digest(settle(folder / "p0.png"))
    files.save()
    assert known(folder).caption(folder / "p2.txt") == ("caption 2", False), "it was not a look at all files"
    files = known(folder)
    files.digest(settle(folder / "p0.png", time.time_ns() - 2 * HOUR))
    files.save(complete=True)
    assert known(folder).caption(folder / "p2.txt") == ("?" * 9, False), "five of six were not met"


def test_content_that_was_read_elsewhere_is_kept_if_it_is_still_the_file_s(folder: Path) -> None:
    first = ask(folder)
    index_of(folder).unlink()
    files, (path, changed, gone) = known(folder), [folder / f"p{key}.png" for key in range(3)]
    for one in (path, changed, gone):
        status = one.stat()
        if one == changed:
            settle(one, status.st_mtime_ns + 1)
        if one == gone:
            one.unlink()
        files.note_digest(one, content_hash(path.read_bytes()), status.st_size, status.st_mtime_ns)
    files.save()
    spoil(path)
    spoil(changed)
    assert known(folder).digest(path) == first["p0.png"][1]  # type: ignore[index]
    assert known(folder).digest(changed) == content_hash(changed.read_bytes())


def test_folders_whose_names_begin_alike_are_two(folder: Path) -> None:
    other = settle(write_picture(folder.parent / "img2" / "p0.png", (10, 20)))
    files = known(folder)
    assert files.size(other) == (10, 20)
    assert files.size(folder / "p0.png") == (40, 30)
    files.save()
    assert len(list((folder.parent / "cache").glob(f"*/{INDEX_FILE}"))) == 2


def test_a_file_that_is_gone_is_a_bad_file(folder: Path) -> None:
    with pytest.raises(BadFile, match="No such file"):
        known(folder).size(folder / "p9.png")


@pytest.mark.parametrize("each", [in_threads, in_turn])
@pytest.mark.parametrize("count", [0, 10, 1000])
def test_answers_are_in_the_order_of_questions(each: Callable, count: int) -> None:
    assert each(lambda number: number * 2, range(count)) == list(range(0, 2 * count, 2))


def test_what_waits_is_asked_several_at_a_time() -> None:
    began = time.perf_counter()
    assert in_turn(lambda number: time.sleep(0.002) or number, range(400)) == list(range(400))
    assert time.perf_counter() - began < 0.7, "0.8 seconds one after the other"
