"""One run over several data sets of every kind, as TOML and as JSON, through a real script."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs
import toml
from data_tools import LATENT, make_options, make_strategies, write_folder, write_picture
from runs import SHALLOW_CASES, Workspace
from safetensors import safe_open

from library.dataset import TrainData, build_train_data
from library.strategy_base import Strategies


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Strategies:
    return make_strategies(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(SHALLOW_CASES["sd"], tmp_path_factory.mktemp("several"))


def document(folder: Path) -> dict[str, Any]:
    """Folders with regularisation, a metadata file at two sizes, chosen buckets, and a set that is for validation alone."""
    write_folder(folder / "cats", [(64, 64), (96, 32)])
    write_folder(folder / "animals", [(64, 64)] * 2, captions=False)
    write_folder(folder / "drawn", [(64, 64)] * 3)
    write_folder(folder / "tall", [(32, 96), (80, 40)])
    for number in range(2):
        write_picture(folder / "held" / f"h{number}.png", key=50 + number, caption=f"held {number}")
    entries = {f"p{number}": {"tags": f"drawn {number}, style", "image_size": [64, 64]} for number in range(3)}
    (folder / "meta.json").write_text(json.dumps(entries))
    return {
        "general": {"shuffle_caption": True, "keep_tokens": 1, "caption_extension": ".txt"},
        "datasets": [
            {
                "resolution": [64, 64],
                "batch_size": 2,
                "enable_bucket": True,
                "min_bucket_reso": 32,
                "max_bucket_reso": 128,
                "bucket_reso_steps": 32,
                "subsets": [
                    {"image_dir": str(folder / "cats"), "num_repeats": 2, "flip_aug": True, "class_tokens": "sks cat"},
                    {
                        "image_dir": str(folder / "animals"),
                        "is_reg": True,
                        "class_tokens": "animal",
                        "custom_attributes": {"diff_output_preservation": True},
                    },
                ],
            },
            {
                "resolutions": [[32], [96, 64]],
                "enable_bucket": False,
                "batch_size": 3,
                "network_multiplier": 0.5,
                "subsets": [
                    {"metadata_file": str(folder / "meta.json"), "image_dir": str(folder / "drawn"), "loss_weight": 0.25}
                ],
            },
            {"buckets": [[32, 64], [64, 32]], "batch_size": 1, "subsets": [{"image_dir": str(folder / "tall")}]},
            {"resolution": 32, "validation_split": 1.0, "subsets": [{"image_dir": str(folder / "held")}]},
        ],
    }


def written(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    content = document(folder)
    path.write_text(json.dumps(content) if kind == "json" else toml.dumps(content), encoding="utf-8")
    return path


def built(folder: Path, kind: str, strategies: Strategies) -> TrainData:
    options = make_options(dataset_config=str(written(folder, kind)), prior_loss_weight=0.5)
    return build_train_data(options, LATENT, strategies, mode="network")


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_each_data_set_keeps_its_sizes_batches_weights_and_captions(kind: str, tmp_path: Path, strategies: Strategies) -> None:
    data = built(tmp_path, kind, strategies)
    seen: Counter[tuple[Any, ...]] = Counter()
    for index in range(data.train.num_batches):
        batch = data.train[(0, index)]
        size = tuple(batch.target_sizes[0].tolist()[::-1])
        keeps = batch.preserve.tolist() if batch.preserve is not None else [False] * len(batch)
        for caption, weight, kept in zip(batch.captions, batch.loss_weights.tolist(), keeps, strict=True):
            seen[size, caption, weight, kept, batch.multiplier] += 1
        assert len(batch) <= {1.0: 2, 0.5: 3}[batch.multiplier]
    assert seen == {
        ((64, 64), "picture 0, tag", 1.0, False, 1.0): 2,
        ((96, 32), "picture 1, tag", 1.0, False, 1.0): 2,
        ((64, 64), "animal", 0.5, True, 1.0): 4,
        **{(size, f"drawn {n}, style", 0.25, False, 0.5): 1 for size in ((32, 32), (96, 64)) for n in range(3)},
        ((32, 64), "picture 0, tag", 1.0, False, 1.0): 1,
        ((64, 32), "picture 1, tag", 1.0, False, 1.0): 1,
    }
    assert data.validation is not None
    held_out = [data.validation[(0, index)] for index in range(data.validation.num_batches)]
    assert {caption for batch in held_out for caption in batch.captions} == {"held 0", "held 1"}


def test_toml_and_json_are_the_same_run(tmp_path: Path, strategies: Strategies) -> None:
    one, other = (built(tmp_path / kind, kind, strategies) for kind in ("toml", "json"))
    for epoch in range(2):
        assert list(one.train.plan(epoch)) == list(other.train.plan(epoch))
    assert [batch.captions for batch in map(one.train.__getitem__, [(0, 0), (1, 3)])] == [
        batch.captions for batch in map(other.train.__getitem__, [(0, 0), (1, 3)])
    ]
    assert one.metadata() == other.metadata()


def test_a_script_trains_them_with_caches_and_says_what_it_had(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = written(tmp_path / "data", "json")
    (tmp_path / "data" / "cats" / "broken.png").write_bytes(b"no picture")
    flags = ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only", "--max_train_steps=3"]
    if sys.platform == "linux":  # a name that is no text goes into every list and page
        (tmp_path / "data" / "cats" / "p1.png").rename(tmp_path / "data" / "cats" / os.fsdecode(b"p\xe9.png"))
        (tmp_path / "data" / "cats" / "p1.txt").rename(tmp_path / "data" / "cats" / os.fsdecode(b"p\xe9.txt"))
    out = workspace.train("network", tmp_path / "out", f"--dataset_config={config}", *flags)
    assert len(runs.losses(out)) == 3
    told = [
        record.getMessage() for record in caplog.records if "1 files cannot be used and are left out" in record.getMessage()
    ]
    assert len(told) == 2, "at the start and at the end"
    assert "broken.png" in (out / "quarantine.jsonl").read_text()
    with safe_open(out / "tiny.safetensors", "pt") as file:
        metadata = file.metadata()
    entries = json.loads(metadata["ss_datasets"])
    assert [entry["resolution"] for entry in entries] == [[64, 64], [32, 32], [96, 64], [64, 64], [32, 32]]
    assert [entry["batch_size_per_device"] for entry in entries] == [2, 3, 3, 1, 2]
    assert [entry["is_dreambooth"] for entry in entries] == [True, False, False, True, True]
    assert metadata["ss_num_train_images"] == "12" and metadata["ss_num_validation_images"] == "2"
    workspace.train("network", out, f"--dataset_config={config}", "--show_batches=6", f"--console_log_file={tmp_path / 'log'}")
