"""One suite over every family and everything that can be trained: a new family is a row in `runs.CASES`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import runs
import torch
from runs import CASES, MODES, SHALLOW_CASES, Mode, Workspace
from safetensors import safe_open
from safetensors.torch import load_file

from library.train_util import Trainer

PRODUCT = [(family, mode) for family in CASES for mode in MODES]


@pytest.fixture(scope="session")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    return runs.Workspaces(SHALLOW_CASES, tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def built(workspaces: dict[str, Workspace], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Mode], Trainer]:
    """A trainer of a family and mode, made once for all tests that only look at what it computes."""
    return cache(lambda family, mode: workspaces[family].trainer(mode, tmp_path_factory.mktemp(f"{family}_{mode}")))


@pytest.mark.parametrize(("family", "mode"), PRODUCT)
def test_every_learning_tensor_gets_a_gradient_and_nothing_else_does(
    family: str, mode: Mode, workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    trainer = workspaces[family].trainer(mode, tmp_path)
    if mode == "network":  # at the start the up matrices are zero, which hides the down matrices' gradients
        for parameter in trainer.parameters:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(1))
    trainer.loss(trainer.data.train[(0, 0)]).backward()
    silent = [p.shape for p in trainer.parameters if p.grad is None or not p.grad.abs().any()]
    assert trainer.parameters
    assert not silent, f"{len(silent)} of {len(trainer.parameters)} parameters learn nothing"
    learning = {id(p) for p in trainer.parameters}
    for part in ("denoiser", *trainer.bundle.text_encoder_names):
        for name, parameter in trainer.bundle.part(part).named_parameters():
            assert id(parameter) in learning or parameter.grad is None, name


@pytest.mark.parametrize(("family", "mode"), PRODUCT)
def test_predict_gives_the_shape_of_the_latents(family: str, mode: Mode, built: Callable[[str, Mode], Trainer]) -> None:
    trainer = built(family, mode)
    batch = trainer.data.train[(0, 0)]
    x0 = trainer.latent.normalize(trainer.latents(batch))
    t = trainer.objective.sample_times(x0, trainer.rng("time"))
    noised = trainer.objective.corrupt(x0, torch.ones_like(x0), t)
    assert trainer.predict(noised, t, trainer.conditioning(batch), batch).shape == x0.shape


@pytest.mark.parametrize(("family", "mode"), PRODUCT)
def test_caches_change_nothing(family: str, mode: Mode, workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    """On disk and in memory: what learns is nothing to either."""
    disk = "_to_disk" if mode == "network" else ""
    frozen_text = ["--network_train_unet_only"] if mode == "network" else ["--stop_text_encoder_training=-1"]
    cached = workspaces[family].trainer(
        mode,
        tmp_path / "cached",
        *frozen_text,
        f"--cache_latents{disk}",
        f"--cache_text_encoder_outputs{disk}",
        f"--cache_dir={tmp_path / 'cache'}",
    )
    live = workspaces[family].trainer(mode, tmp_path / "live", *frozen_text)
    for one, other in zip(runs.first_batches(cached, 3), runs.first_batches(live, 3), strict=True):
        assert one.images is None
        assert other.images is not None
        # encoded in other batches, so sums run in another order; a few values are then rounded to the neighbour
        torch.testing.assert_close(cached.latents(one), live.latents(other), atol=1e-4, rtol=2**-10)
        assert (cached.latents(one) != live.latents(other)).float().mean() < 0.03
        with torch.no_grad():
            torch.testing.assert_close(cached.loss(one), live.loss(other), atol=0, rtol=1e-4)


@pytest.mark.parametrize("family", CASES)
def test_what_loader_workers_need_can_be_sent_to_them(family: str, workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    """Where workers start afresh (Windows, macOS) the data set reaches them pickled, its tokenizers and caches with it."""
    caches = ["--cache_latents_to_disk", "--cache_text_encoder_outputs", "--network_train_unet_only"]
    for flags in ([], [*caches, f"--cache_dir={tmp_path / 'cache'}"]):
        data = workspaces[family].trainer("network", tmp_path / "out", *flags).data.train
        here, there = data[(0, 0)], pickle.loads(pickle.dumps(data))[(0, 0)]
        assert here.captions == there.captions and (here.images is None) == bool(flags)
        for one, other in ((here.tokens, there.tokens), (vars(here), vars(there))):
            tensors = {name: value for name, value in (one or {}).items() if isinstance(value, torch.Tensor)}
            runs.assert_same_tensors(tensors, {name: (other or {})[name] for name in tensors})
        if flags:
            assert here.conditioning is not None and there.conditioning is not None
            runs.assert_same_tensors(here.conditioning.tensors(), there.conditioning.tensors())


@pytest.mark.parametrize("family", CASES)
def test_an_adapter_changes_nothing_until_it_learns(family: str, built: Callable[[str, Mode], Trainer]) -> None:
    trainer = built(family, "network")
    batch = trainer.data.train[(0, 0)]
    with torch.no_grad():
        with trainer.trainable.reference():
            expected = trainer.loss(batch)
        assert torch.equal(trainer.loss(batch), expected)


def _randomised(trainer: object) -> None:
    for parameter in trainer.parameters:  # type: ignore[attr-defined]
        torch.nn.init.normal_(parameter.data, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))


@pytest.mark.parametrize("family", CASES)
def test_merging_an_adapter_gives_what_it_gave(family: str, workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    trainer = workspaces[family].trainer("network", tmp_path)
    _randomised(trainer)
    batch = trainer.data.train[(0, 0)]
    network = trainer.trainable.network  # type: ignore[attr-defined]
    with torch.no_grad():
        with trainer.trainable.reference():
            untrained = trainer.loss(batch)
        expected = trainer.loss(batch)
        network.merge_into_base()
        network.detach()
        merged = trainer.loss(batch)
    assert not torch.allclose(untrained, expected, rtol=1e-3)
    assert torch.allclose(merged, expected, rtol=1e-4)


@pytest.mark.parametrize("family", CASES)
def test_a_saved_adapter_loads_to_the_same_output(family: str, workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    trainer = workspaces[family].trainer("network", tmp_path / "first")
    _randomised(trainer)
    path = tmp_path / "adapter.safetensors"
    trainer.trainable.save(path, dtype=None, metadata={})
    again = workspaces[family].trainer("network", tmp_path / "again", f"--network_weights={path}", "--dim_from_weights")
    batch = trainer.data.train[(0, 0)]
    with torch.no_grad():
        assert torch.allclose(again.loss(batch), trainer.loss(batch), rtol=1e-5)


@pytest.mark.parametrize("family", CASES)
def test_adapter_key_names_are_the_published_ones(family: str, tmp_path: Path) -> None:
    trainer = runs.make_workspace(CASES[family], tmp_path).trainer(
        "network", tmp_path, "--network_args", "conv_dim=2", "conv_alpha=1"
    )
    path = tmp_path / "adapter.safetensors"
    trainer.trainable.save(path, dtype=torch.float16, metadata={})
    names = "\n".join(sorted(load_file(path))) + "\n"
    golden = Path(__file__).parent / "golden" / f"{family}_lora_keys.txt"
    assert names == golden.read_text(), f"if this is intended, write the new names to {golden}"


@pytest.mark.parametrize(("family", "mode"), PRODUCT)
def test_gradient_checkpointing_changes_nothing(
    family: str, mode: Mode, workspaces: dict[str, Workspace], tmp_path: Path
) -> None:
    few = "--max_train_steps=3"
    plain = workspaces[family].train(mode, tmp_path / "plain", few)
    saving = workspaces[family].train(mode, tmp_path / "saving", few, "--gradient_checkpointing")
    assert runs.losses(plain) == pytest.approx(runs.losses(saving), rel=1e-5)
    offloading = workspaces[family].train(mode, tmp_path / "offloading", few, "--cpu_offload_checkpointing")
    assert runs.losses(offloading) == runs.losses(saving)
    runs.assert_same_tensors(load_file(offloading / "tiny.safetensors"), load_file(saving / "tiny.safetensors"))


MEMORY: dict[str, tuple[list[str], list[str]]] = {
    "swap": ([], ["--blocks_to_swap=2"]),
    "recomputing": (["--gradient_checkpointing"], ["--blocks_to_swap=2"]),
    "bf16": (["--gradient_checkpointing", "--mixed_precision=bf16", "--no_half_vae"], ["--blocks_to_swap=2"]),
    "offloading": (["--gradient_checkpointing"], ["--blocks_to_swap=2", "--cpu_offload_checkpointing"]),
    "fused": (["--gradient_checkpointing", "--fused_backward_pass"], ["--blocks_to_swap=2"]),
}
"""What is done without a swap, too, and what is added."""
SWAPPING = [
    (memory, family, mode)
    for memory in MEMORY
    for family, case in CASES.items()
    for mode in MODES
    if case.write_swappable
    and memory in case.memory
    and not (memory == "fused" and mode == "network")  # an adapter's weights are not swapped
]


@pytest.fixture(scope="session")
def swappable(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    cases = {name: replace(case, write_model=case.write_swappable) for name, case in CASES.items() if case.write_swappable}
    return runs.Workspaces(cases, lambda name: tmp_path_factory.mktemp(f"{name}_swappable"))


@pytest.mark.parametrize(("memory", "family", "mode"), SWAPPING)
def test_swapping_blocks_changes_nothing(
    memory: str, family: str, mode: Mode, swappable: dict[str, Workspace], tmp_path: Path
) -> None:
    """Nor do previews and a saved state in the middle of the swapped run."""
    same, added = MEMORY[memory]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing --w 64 --h 64 --s 1\n")
    flags = ["--gradient_accumulation_steps=2", "--max_train_steps=2", "--save_state", *same]
    looked_at = [f"--sample_prompts={prompts}", "--sample_every_n_steps=1", "--save_every_n_steps=1"]
    plain = swappable[family].train(mode, tmp_path / "plain", *flags)
    swapped = swappable[family].train(mode, tmp_path / "swapped", *flags, *looked_at, *added)
    resume = f"--resume={swapped / 'tiny-step00000001-state'}"
    resumed = swappable[family].train(mode, tmp_path / "resumed", *flags, *added, resume)
    assert runs.losses(swapped) == runs.losses(plain)
    for output in (swapped, resumed):
        for file in ("tiny.safetensors", "tiny-state/trainable.safetensors"):
            runs.assert_same_tensors(load_file(output / file), load_file(plain / file))


@pytest.mark.parametrize(("family", "mode"), PRODUCT)
def test_a_validation_quantile_fixes_the_time(family: str, mode: Mode, built: Callable[[str, Mode], Trainer]) -> None:
    trainer = built(family, mode)
    x0 = torch.zeros(3, trainer.latent.channels, 8, 8)
    early, late = (trainer.objective.sample_times(x0, trainer.rng("time"), quantile) for quantile in (0.1, 0.9))
    assert early.unique().numel() == late.unique().numel() == 1
    assert early[0] < late[0]


@pytest.mark.parametrize(("family", "mode"), PRODUCT)
def test_the_saved_file_describes_itself(family: str, mode: Mode, workspaces: dict[str, Workspace], tmp_path: Path) -> None:
    output = workspaces[family].train(mode, tmp_path, "--max_train_steps=2", "--save_precision=fp16")
    with safe_open(output / "tiny.safetensors", "pt") as file:
        metadata = file.metadata()
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert metadata["modelspec.architecture"]
    assert torch.float16 in dtypes
    if mode == "network":
        assert metadata["ss_network_dim"] == "4"
        assert metadata["ss_steps"] == "2"
        assert metadata["ss_seed"] == "7"


@pytest.mark.parametrize("family", CASES)
def test_rows_that_preserve_the_prior_teach_an_untrained_adapter_nothing(
    family: str, built: Callable[[str, Mode], Trainer]
) -> None:
    trainer = built(family, "network")
    batch = trainer.data.train[(0, 0)]
    preserved = replace(batch, preserve=torch.ones(len(batch), dtype=torch.bool))
    with torch.no_grad():
        assert trainer.loss(batch) > 0
        assert trainer.loss(preserved) == 0
