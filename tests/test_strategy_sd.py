"""Captions to ids and conditioning for Stable Diffusion, as sd-scripts makes them."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from library.clip_text import ClipCaptions, clip_chunks, join_chunks
from library.clip_tokenizer import ClipTokenizer, load_clip_tokenizer
from library.prompt_weights import parse_weights
from library.strategy_sd import (
    SdConditioning,
    SdLatentsCachingStrategy,
    SdTextEncoderOutputsCachingStrategy,
    SdTextEncodingStrategy,
    SdTokenizeStrategy,
)
from tests import tiny


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> ClipTokenizer:
    return load_clip_tokenizer(tiny.write_clip_tokenizer(tmp_path_factory.mktemp("v1")))


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> ClipTokenizer:
    return load_clip_tokenizer(tiny.write_clip_tokenizer(tmp_path_factory.mktemp("v2"), version="v2"))


@pytest.fixture(scope="module")
def encoders() -> dict[str, Any]:
    return {"text_encoder": tiny.sd_modules("v1")["text_encoder"]}


def test_ids_equal_those_of_the_transformers_tokenizer(v1: ClipTokenizer, v2: ClipTokenizer):
    from transformers import CLIPTokenizer

    texts = ["a Red  circle, on a (blue) square!", "", "x " * 200]
    for ours in (v1, v2):
        theirs = CLIPTokenizer.from_pretrained(str(ours.folder))
        expected = theirs(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        assert torch.equal(SdTokenizeStrategy(ClipCaptions(ours)).tokenize(texts)["text_encoder"][:, 0], expected)


def test_padding_is_eos_for_sd1_and_zero_for_sd2(v1: ClipTokenizer, v2: ClipTokenizer):
    assert (v1.pad, v2.pad) == (v1.eos, 0)


def test_a_long_caption_of_sd1_stands_in_chunks_between_bos_and_eos():
    bos, eos = 90, 91
    assert clip_chunks([1, 2, 3, 4], bos, eos, eos, body=3, num_chunks=2) == [[90, 1, 2, 3, 91], [90, 4, 91, 91, 91]]
    assert clip_chunks(range(1, 9), bos, eos, eos, body=3, num_chunks=2) == [[90, 1, 2, 3, 91], [90, 4, 5, 6, 91]]
    assert clip_chunks([1], bos, eos, eos, body=3, num_chunks=2) == [[90, 1, 91, 91, 91], [90, 91, 91, 91, 91]]


def test_a_long_caption_of_sd2_ends_each_chunk_as_its_text_does():
    bos, eos, pad = 90, 91, 0
    assert clip_chunks([1, 2, 3, 4], bos, eos, pad, body=3, num_chunks=2) == [[90, 1, 2, 3, 91], [90, 4, 91, 0, 0]]
    assert clip_chunks([1, 2], bos, eos, pad, body=3, num_chunks=2) == [[90, 1, 2, 91, 0], [90, 91, 0, 0, 0]]
    assert clip_chunks(range(1, 9), bos, eos, pad, body=3, num_chunks=2) == [[90, 1, 2, 3, 91], [90, 4, 5, 6, 91]]
    assert clip_chunks([1, 2, 3], bos, eos, pad, body=3, num_chunks=1) == [[90, 1, 2, 3, 91]]


@pytest.mark.parametrize(("length", "chunks", "tokens"), [(75, 1, 77), (150, 2, 152), (225, 3, 227)])
def test_captions_of_each_length_give_conditioning_of_that_length(
    length: int, chunks: int, tokens: int, v1: ClipTokenizer, encoders: dict[str, Any]
):
    ids = SdTokenizeStrategy(ClipCaptions(v1, max_length=length)).tokenize(["a red circle", "word " * 300])
    assert ids["text_encoder"].shape == (2, chunks, 77)
    context = SdTextEncodingStrategy().encode(encoders, ids).context
    assert context.shape == (2, tokens, 64)
    hidden = encoders["text_encoder"](input_ids=ids["text_encoder"].flatten(0, 1)).last_hidden_state.view(2, chunks, 77, 64)
    expected = torch.cat([hidden[:, 0, :1], *(hidden[:, n, 1:76] for n in range(chunks)), hidden[:, -1, -1:]], dim=1)
    torch.testing.assert_close(context, expected)


def test_clip_skip_takes_an_earlier_layer_through_the_final_norm(v1: ClipTokenizer, encoders: dict[str, Any]):
    tokens = SdTokenizeStrategy(ClipCaptions(v1)).tokenize(["a red circle"])
    encoder = encoders["text_encoder"]
    plain, one, two = (SdTextEncodingStrategy(clip_skip=n).encode(encoders, tokens).context for n in (None, 1, 2))
    torch.testing.assert_close(plain, one)
    kept: list[torch.Tensor] = []
    hook = encoder.encoder.layers[0].register_forward_hook(lambda module, args, out: kept.append(out))
    encoder(input_ids=tokens["text_encoder"][0])
    hook.remove()
    torch.testing.assert_close(two, encoder.final_layer_norm(kept[0]))
    assert not torch.allclose(one, two)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("((x))", [("x", 1.21)]),
        ("[x]", [("x", 1 / 1.1)]),
        ("(a (b:0.5))", [("a ", 1.1), ("b", 0.55)]),
        (r"\(plain\)", [("(plain)", 1.0)]),
        ("(never closed", [("never closed", 1.1)]),
        ("never opened) 12:30", [("never opened) 12:30", 1.0)]),
        ("", [("", 1.0)]),
    ],
)
def test_weights_are_read_from_prompts(prompt: str, expected: list[tuple[str, float]]):
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("length", [75, 150])
def test_weights_stand_beside_the_ids_and_multiply_the_conditioning(length: int, v1: ClipTokenizer, encoders: dict[str, Any]):
    weighted = SdTokenizeStrategy(ClipCaptions(v1, max_length=length, weighted=True)).tokenize(["red (circle:1.5) on"])
    plain = SdTokenizeStrategy(ClipCaptions(v1, max_length=length)).tokenize(["red circle on"])
    assert torch.equal(weighted["text_encoder"], plain["text_encoder"])
    strategy = SdTextEncodingStrategy()
    ratio = strategy.encode(encoders, weighted).context / strategy.encode(encoders, plain).context
    expected = torch.ones(ratio.shape[1])
    expected[2] = 1.5  # BOS, red, circle
    torch.testing.assert_close(ratio.mean(dim=(0, 2)), expected)


def test_an_encoder_that_is_not_asked_for_does_not_run(v1: ClipTokenizer):
    tokens = SdTokenizeStrategy(ClipCaptions(v1)).tokenize(["a"])
    assert SdTextEncodingStrategy().encode({}, tokens, only=frozenset()).missing() == {"text_encoder"}
    assert SdConditioning.sources() == {"text_encoder"}


def test_strategies_pickle_to_workers_and_stay_equal(v1: ClipTokenizer):
    strategy = SdTokenizeStrategy(ClipCaptions(v1, max_length=150, weighted=True))
    copy = pickle.loads(pickle.dumps(strategy))
    text = ["a (red:1.2) circle"]
    assert all(torch.equal(copy.tokenize(text)[key], value) for key, value in strategy.tokenize(text).items())
    assert copy.fingerprint() == strategy.fingerprint()


def test_fingerprints_change_with_what_they_stand_for(v1: ClipTokenizer, v2: ClipTokenizer):
    strategies = [
        SdTokenizeStrategy(ClipCaptions(v1)),
        SdTokenizeStrategy(ClipCaptions(v2)),
        SdTokenizeStrategy(ClipCaptions(v1, max_length=150)),
        SdTokenizeStrategy(ClipCaptions(v1, weighted=True)),
    ]
    assert len({strategy.fingerprint() for strategy in strategies}) == 4
    assert SdTextEncodingStrategy().fingerprint() != SdTextEncodingStrategy(clip_skip=2).fingerprint()


def test_cache_files_are_named_as_sd_scripts_names_them():
    image = Path("data/10_cat/a.b.png")
    assert SdLatentsCachingStrategy().format.path_for(image, (640, 480)) == Path("data/10_cat/a.b_0640x0480_sd.npz")
    assert SdTextEncoderOutputsCachingStrategy().format.path_for(image) == Path("data/10_cat/a.b_sd_te.npz")


def test_joined_chunks_keep_the_first_bos_the_bodies_and_the_last_token():
    chunks = torch.arange(10).view(1, 2, 5)
    assert join_chunks(chunks).tolist() == [[0, 1, 2, 3, 6, 7, 8, 9]]
