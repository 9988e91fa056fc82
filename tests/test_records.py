"""Records in little memory: what goes in comes out, and none of it is copied for each worker."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing  # teaches multiprocessing to hand tensors over without a copy
from hypothesis import given
from hypothesis import strategies as st

from library.buckets import Placement
from library.compact import Chained, Lookup, Texts
from library.config_util import SubsetConfig
from library.records import Record, RecordTable

FIRST, SECOND = SubsetConfig(image_dir=Path("a")), SubsetConfig(image_dir=Path("b"), is_reg=True, loss_weight=0.1)


def record(number: int, subset: SubsetConfig = FIRST, caption: str = "a caption, a tag") -> Record:
    placement = Placement((64, 64 + 32 * (number % 3)), (70, 64 + 40 * (number % 3)))
    paired = Path(f"/masks/{number}.png") if number % 2 else None
    path = Path(f"/data/{number % 2}/ü {number}.png")
    return Record(f"0/0/{number}", path, (640, 480), caption, placement, subset, 1 + number, 0.1, paired, caption)


@given(st.lists(st.text(st.characters(exclude_categories=[]), max_size=20), max_size=20))
def test_any_texts_come_back(texts: list[str]) -> None:
    assert list(Texts.of(texts)) == texts


@given(st.lists(st.text(max_size=20), max_size=20, unique=True), st.text(max_size=20))
def test_a_text_is_found_under_its_number_and_no_other_is(texts: list[str], other: str) -> None:
    lookup = pickle.loads(ForkingPickler.dumps(Lookup.of(texts)))
    assert [lookup.find(text) for text in texts] == list(range(len(texts)))
    assert lookup.find(other) == (texts.index(other) if other in texts else None)
    if texts:
        with pytest.raises(ValueError, match="the same"):
            Lookup.of([*texts, texts[0]])


def test_records_come_back() -> None:
    records = [record(number, subset, f"caption {number}\nanother") for subset in (FIRST, SECOND) for number in range(5)]
    table = RecordTable.of(iter(records))
    assert list(table) == records
    assert (table[-1], table[2:4]) == (records[-1], records[2:4])
    assert list(pickle.loads(pickle.dumps(table))) == records
    with pytest.raises(IndexError):
        table[10]


def test_tables_are_taken_from_and_joined() -> None:
    records = [record(number, SECOND if number > 3 else FIRST) for number in range(6)]
    table = RecordTable.of(records)
    assert table.where(lambda subset: subset.is_reg).tolist() == [False] * 4 + [True] * 2
    assert table.numbers_of(FIRST) == [0, 1, 2, 3]
    assert table.among({records[1].path, records[5].path}).tolist() == [False, True, False, False, False, True]
    odd = table.take(np.array([1, 5]), {"repeats": 9})
    assert [(each.path, each.repeats) for each in odd.joined(table.take(np.arange(6) == 0))] == [
        (records[1].path, 9), (records[5].path, 9), (records[0].path, 1),
    ]  # fmt: skip
    assert [each.repeats for each in table] == [1, 2, 3, 4, 5, 6], "what is taken is a copy"
    assert {size: numbers.tolist() for size, numbers in table.by_bucket()} == {
        (64, 64): [0, 3], (64, 96): [1, 4], (64, 128): [2, 5],
    }  # fmt: skip


def test_an_empty_table_is_one() -> None:
    table = RecordTable.of([])
    assert (len(table), list(table), list(table.by_bucket()), table.numbers_of(FIRST)) == (0, [], [], [])
    assert len(table.take(np.zeros(0, bool)).joined(table)) == 0


def test_several_sequences_are_one() -> None:
    chained = Chained([1, 2], [], [3])
    assert (list(chained), len(chained), chained[2], chained[-3]) == ([1, 2, 3], 3, 3, 1)


def test_a_picture_takes_little_and_a_worker_is_sent_none_of_it() -> None:
    """A spawned worker is sent handles of shared memory; a forked one shares it anyhow."""
    table = RecordTable.of(record(number) for number in range(5000))
    assert len(pickle.dumps(table)) / len(table) < 200
    assert torch.multiprocessing.get_sharing_strategy()
    assert len(ForkingPickler.dumps(table)) < 20_000
