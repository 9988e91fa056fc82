"""The caption pipeline: its order, its rules, and that a reading depends on its key alone."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from library.captions import CaptionMoment, CaptionOptions, final_caption, is_dropped, read_lines, static_caption


def reading(caption: str, options: CaptionOptions, *, key: str = "k", **moment: int) -> str:
    return final_caption(caption, options, CaptionMoment(**moment), key)


def readings(caption: str, options: CaptionOptions, count: int = 200) -> list[str]:
    return [reading(caption, options, key=str(number)) for number in range(count)]


def test_a_plain_caption_is_left_as_it_is() -> None:
    assert reading("a cat ,  b", CaptionOptions()) == "a cat ,  b"


def test_the_same_moment_and_key_give_the_same_caption_and_others_do_not() -> None:
    options = CaptionOptions(shuffle=True)
    tags = ", ".join(str(number) for number in range(20))
    assert reading(tags, options, epoch=3) == reading(tags, options, epoch=3)
    seen = {reading(tags, options, seed=s, epoch=e, key=k) for s in (0, 1) for e in (0, 1) for k in "ab"}
    assert len(seen) == 8


def test_shuffling_keeps_every_tag_and_the_kept_ones_in_front() -> None:
    for result in readings("one, two, three, four, five", CaptionOptions(shuffle=True, keep_tokens=2)):
        tags = result.split(", ")
        assert tags[:2] == ["one", "two"]
        assert sorted(tags[2:]) == ["five", "four", "three"]


def test_tags_are_joined_with_the_separator_they_were_split_at() -> None:
    assert reading("a. b", CaptionOptions(shuffle=True, separator=".")) in ("a. b", "b. a")
    assert set(readings("a; b", CaptionOptions(shuffle=True, separator=";"))) == {"a; b", "b; a"}


def test_keep_tokens_separator_fixes_a_front_and_a_back() -> None:
    options = CaptionOptions(shuffle=True, keep_tokens_separator="|||")
    results = readings("one, two ||| a, b, c ||| end", options)
    assert len(set(results)) == 6
    assert all(result.startswith("one, two, ") and result.endswith(", end") for result in results)


def test_the_keep_tokens_mark_is_never_trained() -> None:
    assert reading("one ||| two", CaptionOptions(keep_tokens_separator="|||")) == "one, two"


def test_tag_dropout_drops_about_its_share_and_never_a_kept_tag() -> None:
    options = CaptionOptions(tag_dropout_rate=0.25, keep_tokens=1)
    results = readings("keep, " + ", ".join("abcdefgh"), options)
    assert all(result.split(", ")[0] == "keep" for result in results)
    dropped = sum(9 - len(result.split(", ")) for result in results) / (8 * len(results))
    assert 0.2 < dropped < 0.3


def test_caption_dropout_empties_about_its_share() -> None:
    results = readings("a, b", CaptionOptions(dropout_rate=0.3), count=1000)
    assert set(results) == {"", "a, b"}
    assert 0.25 < results.count("") / 1000 < 0.35


def test_every_nth_epoch_drops_all_captions_counting_from_one() -> None:
    options = CaptionOptions(dropout_every_n_epochs=3)
    assert [is_dropped(options, CaptionMoment(epoch=epoch), "k") for epoch in range(6)] == [False, False, True] * 2


def test_wildcards_choose_a_line_and_an_alternative_and_braces_can_be_written() -> None:
    options = CaptionOptions(wildcard=True)
    assert set(readings("a {red|blue} cat\na dog", options)) == {"a red cat", "a blue cat", "a dog"}
    assert set(readings("{{x}} {1|2}", options)) == {"{x} 1", "{x} 2"}


def test_without_wildcards_only_the_first_line_is_used_and_braces_stay() -> None:
    assert reading("{a|b}\nsecond", CaptionOptions()) == "{a|b}"
    assert read_lines("\ufefffirst \n\nsecond\n".lstrip("\ufeff"), CaptionOptions()) == "first"
    assert read_lines("first \n\n second\n", CaptionOptions(wildcard=True)) == "first\nsecond"


def test_prefix_and_suffix_stand_around_every_line() -> None:
    options = CaptionOptions(wildcard=True, prefix="P", suffix="S")
    assert set(readings("one\ntwo", options)) == {"P one S", "P two S"}
    assert reading("one", CaptionOptions(prefix="P", suffix="S")) == "P one S"


def test_a_dropped_caption_has_no_prefix() -> None:
    assert reading("a", CaptionOptions(prefix="P", dropout_rate=1.0)) == ""


def test_token_warmup_shows_more_tags_from_step_to_step() -> None:
    options = CaptionOptions(token_warmup_min=2, token_warmup_step=10)
    shown = [len(reading("a, b, c, d, e, f", options, step=step).split(", ")) for step in (0, 5, 9, 10, 99)]
    assert shown == [2, 4, 5, 6, 6]


def test_token_warmup_below_one_is_a_share_of_the_run() -> None:
    options = CaptionOptions(token_warmup_min=1, token_warmup_step=0.5)
    shown = [len(reading("a, b, c, d, e", options, step=step, max_steps=8).split(", ")) for step in (0, 2, 4)]
    assert shown == [1, 3, 5]


def test_the_secondary_separator_becomes_the_first_one_after_shuffling() -> None:
    options = CaptionOptions(shuffle=True, secondary_separator=";")
    assert set(readings("a;b, c", options)) == {"a,b, c", "c, a,b"}


def test_only_captions_that_never_change_count_as_static() -> None:
    assert CaptionOptions(dropout_rate=0.5, prefix="P", keep_tokens=3).is_static
    for change in ({"shuffle": True}, {"wildcard": True}, {"token_warmup_step": 1.0}, {"tag_dropout_rate": 0.1}):
        assert not CaptionOptions(**change).is_static  # type: ignore[arg-type]


def test_the_static_caption_is_what_is_trained_when_nothing_is_dropped() -> None:
    options = CaptionOptions(prefix="P", secondary_separator=";", dropout_rate=0.5)
    assert static_caption("a;b", options) == "P a,b"
    assert set(readings("a;b", options)) == {"", "P a,b"}


# ---- every option, as recorded ---------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden" / "captions.json"
CAPTION = "1girl, {red|blue} hair ||| smiling, a;b, under a tree, looking at viewer ||| masterpiece\nsecond line, x, y"
RECORDED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "shuffle_caption": {"shuffle": True},
    "keep_tokens": {"shuffle": True, "keep_tokens": 2},
    "keep_tokens_separator": {"shuffle": True, "keep_tokens_separator": "|||"},
    "keep_tokens_separator alone": {"keep_tokens_separator": "|||"},
    "caption_separator": {"shuffle": True, "separator": ";"},
    "secondary_separator": {"shuffle": True, "secondary_separator": ";"},
    "enable_wildcard": {"wildcard": True},
    "several captions": {"several": True},
    "caption_prefix and caption_suffix": {"prefix": "photo of", "suffix": "by me"},
    "token_warmup": {"token_warmup_min": 1, "token_warmup_step": 6},
    "token_warmup as a share": {"token_warmup_min": 2, "token_warmup_step": 0.5},
    "caption_dropout_rate": {"dropout_rate": 0.5},
    "caption_dropout_every_n_epochs": {"dropout_every_n_epochs": 2},
    "caption_tag_dropout_rate": {"tag_dropout_rate": 0.5},
    "all of it": {
        "shuffle": True, "keep_tokens_separator": "|||", "secondary_separator": ";", "wildcard": True, "prefix": "photo of",
        "suffix": "by me", "token_warmup_min": 1, "token_warmup_step": 6, "dropout_rate": 0.2, "tag_dropout_rate": 0.3,
    },
}  # fmt: skip


def test_every_option_reads_as_recorded(request: pytest.FixtureRequest) -> None:
    """Two pictures over four epochs of two steps each. Caches and resumed runs rely on these very texts."""
    found = {
        name: [
            final_caption(CAPTION, CaptionOptions(**options), CaptionMoment(7, epoch, 2 * epoch, 8), key)
            for epoch in range(4)
            for key in ("0/0/a.png#0", "0/0/b.png#0")
        ]
        for name, options in RECORDED.items()
    }
    if request.config.getoption("--rewrite-golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))
    tried = {name for options in RECORDED.values() for name in options}
    assert tried == {f.name for f in fields(CaptionOptions)}
