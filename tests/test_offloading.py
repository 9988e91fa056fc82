"""Training with block swap and activation offload is bit-equal to training without.

The CPU transport fills memory that has not arrived with NaN, so a block that is used while it is away shows in every result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from offload_tools import (
    CHECKPOINTING,
    CPU,
    PAIRS,
    UPDATES,
    WIDTH,
    EagerPlan,
    ForwardPlan,
    LatePlan,
    Made,
    Model,
    Trace,
    adamw,
    adapters_on,
    batch,
    blocks_of,
    learners,
    make,
    offloading,
    same,
    sgd,
    swapped,
    train,
    train_fused,
)
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from library.activation_offload import ActivationOffload
from library.custom_offloading_utils import BlockGroup, BlockSwap
from library.errors import UserError
from library.offload_plan import RingPlan
from library.offload_transport import CpuTransport, PinnedBudget, Slot
from networks.lora import LoRA

# ---- equality ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("update", UPDATES)
def test_training_with_swap_is_bit_equal_to_training_without(update: str, checkpointing: str, offload: bool) -> None:
    learning, loop = UPDATES[update]
    for optimizer, num_swapped in ((sgd, 2), (adamw, 3)):
        expected = loop(make(learning=learning, checkpointing=checkpointing, num_blocks=5), None, optimizer)
        made = make(learning=learning, checkpointing=checkpointing, num_blocks=5)
        swap = swapped(made, num_swapped, learning=learning)
        with offloading(made[0], offload):
            found = loop(made, swap, optimizer)
        assert same(found, expected)
        assert swap.misses == 0


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_weights_of_several_dtypes_travel_unchanged(checkpointing: str) -> None:
    expected = train(make(learning=False, checkpointing=checkpointing, mixed=True), None, adamw)
    made = make(learning=False, checkpointing=checkpointing, mixed=True)
    swap = swapped(made, 4, learning=False)
    assert same(train(made, swap, adamw), expected)


@pytest.mark.parametrize(("blocks", "number"), [pair for pair in PAIRS if pair[0] <= 7])
def test_every_number_of_swapped_blocks_is_exact_and_never_late(blocks: int, number: int) -> None:
    expected = train(make(learning=True, num_blocks=blocks), None, sgd, steps=2)
    made = make(learning=True, num_blocks=blocks)
    swap = swapped(made, number, learning=True)
    assert same(train(made, swap, sgd, steps=2), expected)
    assert swap.misses == 0


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_previews_between_steps_and_accumulated_gradients_change_nothing(learning: bool, checkpointing: str) -> None:
    options: dict[str, Any] = {"steps": 3, "micro": 2, "previews": True}
    expected = train(make(learning=learning, checkpointing=checkpointing), None, adamw, **options)
    made = make(learning=learning, checkpointing=checkpointing)
    swap = swapped(made, 4, learning=learning)
    assert same(train(made, swap, adamw, **options), expected)
    assert swap.misses == 0


def test_two_groups_of_blocks_swap_side_by_side() -> None:
    expected = train(make(learning=True, num_blocks=9), None, sgd)
    made = make(learning=True, num_blocks=9)
    blocks = blocks_of(made[0])
    groups = [BlockGroup(blocks[:4], 2, "double"), BlockGroup(blocks[4:], 3, "single")]
    swap = BlockSwap(made[0], groups, CPU, learning=True)
    assert same(train(made, swap, sgd), expected)
    assert swap.misses == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_several_blocks_together_is_exact(use_reentrant: bool) -> None:
    def run(swap_it: bool) -> list[Tensor]:
        model, _ = make(learning=True)
        if swap_it:
            swapped((model, model), 4, learning=True)
        blocks = blocks_of(model)

        def pair(first: nn.Module, second: nn.Module) -> Callable[[Tensor, Tensor], Any]:
            return lambda x, vec: second(first(x, vec=vec)[0], vec=vec)

        x = batch(0)
        hidden, vec = x * 1, torch.tanh(x)
        for first, second in zip(blocks[::2], blocks[1::2], strict=True):
            hidden, vec = checkpoint(pair(first, second), hidden, vec, use_reentrant=use_reentrant)
        hidden.sum().backward()
        assert x.grad is not None
        return [hidden, x.grad]

    assert all(map(torch.equal, run(True), run(False)))


def test_blocks_that_are_skipped_repeated_or_out_of_order_are_fetched_when_needed() -> None:
    def run(swap_it: bool) -> tuple[list[Tensor], int]:
        model, _ = make(learning=False)
        swap = swapped((model, model), 4, learning=False) if swap_it else None
        blocks, x = blocks_of(model), batch(0)
        hidden, vec = x * 1, torch.tanh(x)
        for index in (0, 3, 3, 1, 5, 2):
            hidden, vec = blocks[index](hidden, vec=vec)
        hidden.sum().backward()
        assert x.grad is not None
        return [hidden, x.grad], swap.misses if swap else 0

    (found, misses), (expected, _) = run(True), run(False)
    assert all(map(torch.equal, found, expected))
    assert misses > 0


def test_a_gradient_that_enters_in_the_middle_of_a_block_finds_its_weights() -> None:
    """A loss on an inner activation: backward reaches the block's weights, but not through its outputs."""

    def run(swap_it: bool) -> Tensor:
        model, _ = make(learning=False)
        if swap_it:
            swapped((model, model), 4, learning=False)
        inner: list[Tensor] = []
        handle = blocks_of(model)[1].get_submodule("again").register_forward_hook(lambda module, args, out: inner.append(out))
        x = batch(0)
        model(x)
        handle.remove()
        inner[0].square().sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(run(True), run(False))


def test_two_passes_before_one_backward_are_exact() -> None:
    def run(swap_it: bool) -> list[Tensor | None]:
        made = make(learning=False)
        if swap_it:
            swapped(made, 4, learning=False)
        chosen, rejected = made[0](batch(0)), made[0](batch(1))
        (chosen - 2 * rejected).square().sum().backward()
        return [parameter.grad for parameter in learners(made[1])]

    for found, expected in zip(run(True), run(False), strict=True):
        assert found is not None and expected is not None
        assert torch.equal(found, expected)


def test_only_the_blocks_in_slots_are_in_device_memory() -> None:
    model, _ = make(learning=True)
    swap = swapped((model, model), 4, learning=True)
    used: list[int] = []

    def count(*_: object) -> None:
        storages = {p.untyped_storage().data_ptr() for block in model.list for p in block.parameters() if p.stride()[-1]}
        used.append(len(storages))

    for block in model.list:
        block.register_forward_hook(count)
    model(batch(0)).sum().backward()
    assert used and max(used) <= 2
    assert len(swap.rings[0].slots) == 2
    sizes = {slot.flat.numel() for slot in swap.rings[0].slots.values()}
    assert len(sizes) == 1


# ---- the tests can fail ------------------------------------------------------------------------------------------------


class DeafTransport(CpuTransport):
    """Never waits for what was loaded."""

    def wait(self, slot: Slot) -> None:
        return


class ForgetfulSwap(BlockSwap):
    """Knows forward only, as diffusers' group offloading does."""

    def _enter_backward(self, ring: Any, index: int) -> None:
        return

    def _guard(self) -> Any:
        return None


def backward_is_finite(made: Made) -> bool:
    model, learns = made
    model(batch(0)).square().mean().backward()
    gradients = [parameter.grad for parameter in learners(learns)]
    return all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_missing_wait_shows_as_nan() -> None:
    made = make(learning=False)
    swapped(made, 4, learning=False, transport=DeafTransport(CPU, PinnedBudget(0)))
    assert made[0](batch(0)).isnan().all()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_swapper_that_forgets_backward_shows_as_nan(checkpointing: str) -> None:
    made = make(learning=False, checkpointing=checkpointing)
    ForgetfulSwap(made[0], [BlockGroup(blocks_of(made[0]), 4)], CPU)
    assert not backward_is_finite(made)
    whole = make(learning=False, checkpointing=checkpointing)
    swapped(whole, 4, learning=False)
    assert backward_is_finite(whole)


def test_a_block_used_behind_the_swappers_back_gives_nan() -> None:
    made = make(learning=False)
    swapped(made, 4, learning=False)
    block = made[0].list[5]
    assert block.compute(batch(0), batch(1))[0].isnan().all()


@pytest.mark.parametrize("broken", [LatePlan, ForwardPlan, EagerPlan])
def test_a_broken_plan_costs_time_and_not_correctness(broken: type[RingPlan]) -> None:
    expected = train(make(learning=True), None, sgd, steps=2)
    made = make(learning=True)
    swap = swapped(made, 3, learning=True)
    swap.rings[0].plan = broken(6, 3)
    assert same(train(made, swap, sgd, steps=2), expected)
    assert swap.misses > 0


# ---- errors in the middle ----------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop(*_: object) -> None:
    raise Stop


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("learning", [False, True])
def test_an_error_in_the_middle_of_a_step_leaves_everything_usable(when: str, checkpointing: str, learning: bool) -> None:
    def broken_step(made: Made, swap: BlockSwap | None) -> None:
        model, learns = made
        block = blocks_of(model)[2]
        handles = []
        if when == "forward":
            handles.append(block.get_submodule("down").register_forward_hook(stop))
        else:
            handles.append(block.get_submodule("norm").register_full_backward_hook(stop))
        with pytest.raises(Stop):
            model(batch(77)).sum().backward()
        for handle in handles:
            handle.remove()
        if swap is not None:
            swap.drop_gradients()
        learns.zero_grad(set_to_none=True)

    plain = make(learning=learning, checkpointing=checkpointing)
    for block in plain[0].list:
        block.calls.fill_(0)
    broken_step(plain, None)
    expected = train(plain, None, adamw, steps=2)
    made = make(learning=learning, checkpointing=checkpointing)
    swap = swapped(made, 4, learning=learning)
    broken_step(made, swap)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert same(train(made, swap, adamw, steps=2), expected)


# ---- what travels and what stays ---------------------------------------------------------------------------------------


def test_weights_shared_with_other_blocks_or_the_rest_of_the_model_stay() -> None:
    def build() -> Model:
        model = Model()
        blocks = blocks_of(model)
        blocks[4].get_submodule("down").weight = blocks[0].get_submodule("down").weight
        blocks[1].get_submodule("vec").bias = model.embed.bias
        fused = nn.Parameter(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5)))
        blocks[2].get_submodule("norm").weight.data = fused.data[0]  # two blocks look into one memory
        blocks[5].get_submodule("norm").weight.data = fused.data[0]
        return model

    expected = train((plain := build(), plain), None, sgd)
    model = build()
    swap = swapped((model, model), 4, learning=True)
    travelling = {id(tensor) for block in swap.rings[0].blocks.values() for tensor in block.tensors}
    blocks = blocks_of(model)
    assert id(blocks[0].get_submodule("down").weight) not in travelling
    assert id(model.embed.bias) not in travelling
    assert id(blocks[5].get_submodule("norm").weight) not in travelling
    assert id(blocks[0].get_submodule("up").weight) in travelling
    assert same(train((model, model), swap, sgd), expected)


def test_what_learns_inside_the_blocks_of_a_frozen_model_stays() -> None:
    def build() -> Made:
        model = Model()
        model.requires_grad_(False)
        for block in blocks_of(model):
            block.get_submodule("norm").requires_grad_(True)
        return model, model

    expected = train(build(), None, adamw)
    made = build()
    swap = swapped(made, 4, learning=False)
    assert same(train(made, swap, adamw), expected)


def test_a_weight_made_of_several_tensors_is_refused() -> None:
    model = Model()
    block = blocks_of(model)[0].get_submodule("up")
    block.weight = nn.Parameter(TwoTensor(block.weight.detach(), block.weight.detach().clone()), requires_grad=False)
    with pytest.raises(UserError, match="a weight is a TwoTensor"):
        swapped((model, model), 4, learning=False)


def test_a_swapped_weight_that_begins_to_learn_is_an_error() -> None:
    made = make(learning=False)
    swapped(made, 4, learning=False)
    made[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match="learning=False"):
        made[0](batch(0)).sum().backward()
        made[0](batch(0))


def test_moving_the_model_leaves_swapped_blocks_where_they_are() -> None:
    made = make(learning=False)
    swap = swapped(made, 4, learning=False)
    travelling = [tensor for block in swap.rings[0].blocks.values() for tensor in block.tensors]
    before = [tensor.data_ptr() for tensor in travelling]
    swap.place(torch.device("meta"))
    assert made[0].embed.weight.is_meta and made[0].head.bias.is_meta
    assert [tensor.data_ptr() for tensor in travelling] == before
    assert not any(tensor.is_meta for tensor in travelling)


# ---- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learning", [False, True])
def test_the_state_of_a_swapped_model_is_saved_and_loaded_from_main_memory(learning: bool) -> None:
    plain, made = make(learning=learning), make(learning=learning)
    swap = swapped(made, 4, learning=learning)
    loop = train_fused if learning else train
    loop(plain, None, sgd)
    loop(made, swap, sgd)
    expected = copy.deepcopy(plain[0].state_dict())
    with swap.host_weights():
        state = copy.deepcopy(made[0].state_dict())
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)

    fresh = make(learning=learning)
    with torch.no_grad():
        for parameter in fresh[0].parameters():
            parameter.zero_()
    again = swapped(fresh, 4, learning=learning)
    with again.host_weights():
        fresh[0].load_state_dict(state)
    for mine, other in zip(learners(fresh[1]), learners(plain[1]), strict=True):
        if not learning:
            mine.data.copy_(other.data)
    with torch.no_grad():
        assert torch.equal(fresh[0](batch(3)), plain[0](batch(3)))


def test_a_state_dict_with_absent_weights_is_an_error() -> None:
    made = make(learning=False)
    swapped(made, 4, learning=False)
    with pytest.raises(RuntimeError, match="host_weights"):
        made[0].state_dict()


def test_adapters_merge_into_weights_in_main_memory() -> None:
    made, plain = make(learning=False), make(learning=False)
    swap = swapped(made, 4, learning=False)
    for adapters, context in ((made[1], swap.host_weights()), (plain[1], nullcontext())):
        with context:
            for adapter in reversed(list(adapters.children())):
                assert isinstance(adapter, LoRA)
                adapter.detach()
                adapter.merge_into_base()
    with torch.no_grad():
        assert torch.equal(made[0](batch(0)), plain[0](batch(0)))


def test_a_frozen_model_is_never_written_back() -> None:
    class ReadOnly(CpuTransport):
        def store(self, slot: Slot, host: Any) -> None:
            raise AssertionError("written back")

    model = Model()
    for block in model.list:
        block.compute = lambda x, vec, block=block: (x + block.down(torch.tanh(block.up(block.norm(x)))), vec)
    made = model, adapters_on(model)
    train(made, swapped(made, 4, learning=False, transport=ReadOnly(CPU, PinnedBudget(0))), sgd)


def test_a_closed_swap_leaves_an_ordinary_model() -> None:
    expected = train(make(learning=True), None, sgd, steps=4)
    made = make(learning=True)
    swap = swapped(made, 4, learning=True)
    train(made, swap, lambda parameters: torch.optim.SGD(parameters, lr=0.0), steps=1)
    swap.close()
    for block in made[0].list:
        block.calls.fill_(0)
    assert all(not parameter.isnan().any() and parameter.is_leaf for parameter in made[0].parameters())
    assert same(train(made, None, sgd, steps=4), expected)


# ---- around it ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["none", "plain"])
@pytest.mark.parametrize("learning", [False, True])
def test_blocks_with_a_compiled_forward_swap_and_share_one_graph(checkpointing: str, learning: bool) -> None:
    graphs = []

    def backend(module: Any, examples: Any) -> Any:
        graphs.append(module)
        return module

    def run(swap_it: bool) -> Trace:
        torch._dynamo.reset()
        made = make(learning=learning, checkpointing=checkpointing)
        for block in made[0].list:
            block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)  # type: ignore[method-assign]
        swap = swapped(made, 4, learning=learning) if swap_it else None
        return train(made, swap, sgd, steps=3)

    expected = run(False)
    count = len(graphs)
    assert same(run(True), expected)
    assert 0 < len(graphs) - count <= count, "swapping compiled more graphs"


def test_a_block_whose_call_is_compiled_is_refused() -> None:
    made = make(learning=False)
    made[0].list[0].compile(backend="eager")
    with pytest.raises(ValueError, match="compile its `forward`"):
        swapped(made, 4, learning=False)


def test_activation_offload_stores_what_blocks_share_once_and_keeps_weights_where_they_are() -> None:
    model, _ = make(learning=True, checkpointing="plain")
    offload = ActivationOffload(model, CPU, min_bytes=0)
    model(batch(0)).sum().backward()
    row = 3 * WIDTH * 4
    # embed's input, tanh's output, the input of each of 6 blocks after the first's... vec is tanh's output under one address
    assert offload.offloaded_bytes <= row * (1 + 1 + 6 + 1 + 6)
    with torch.no_grad():
        model(batch(0))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    offload.close()


def test_activation_offload_leaves_small_tensors_alone_and_outlives_an_error() -> None:
    model, _ = make(learning=True)
    offload = ActivationOffload(model, CPU)
    model(batch(0)).sum().backward()
    assert offload.offloaded_bytes == 0
    handle = model.list[3].register_forward_hook(stop)
    with pytest.raises(Stop):
        model(batch(0))
    handle.remove()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
