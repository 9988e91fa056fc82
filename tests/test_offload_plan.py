"""The parts of block swap that need no model: the plan, walked; layouts of flat memory; the budget of pinned memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import pytest
import torch
from offload_tools import CPU, PAIRS, EagerPlan, ForwardPlan, LatePlan

from library.custom_offloading_utils import max_swappable
from library.errors import UserError
from library.flux_models import FluxParams
from library.offload_plan import Pass, RingPlan, SwapDivision
from library.offload_transport import FlatLayout, PinnedBudget, absent, make_transport, pinned_like


@dataclass
class Walk:
    """Carries a plan out with bare numbers, and holds it against what a plan has to keep."""

    plan: RingPlan
    slots: dict[int, int] = field(default_factory=dict)
    loads: int = 0

    def load(self, block: int) -> None:
        self.slots[self.plan.slot_of(block)] = block
        self.loads += 1
        assert len(self.slots) <= self.plan.num_blocks - self.plan.num_swapped, "more blocks than slots"

    def run(self, running: Pass) -> None:
        order = range(self.plan.num_blocks)
        blocks = list(reversed(order)) if running is Pass.BACKWARD else list(order)
        for position, block in enumerate(blocks):
            assert self.slots[self.plan.slot_of(block)] == block, f"{block} is used while it is away"
            for coming in blocks[position + 1 : position + 2]:
                assert self.slots[self.plan.slot_of(coming)] == coming, f"{coming} is next and not on its way"
            successor = self.plan.successor(block, running)
            if successor is not None:
                self.load(successor)


def walk(plan: RingPlan) -> None:
    walker = Walk(plan)
    for block in plan.start(Pass.FORWARD):
        walker.load(block)
    for _ in range(2):
        walker.loads = 0
        walker.run(Pass.FORWARD)
        assert sorted(walker.slots.values()) == sorted(plan.start(Pass.BACKWARD)), "the tail stays, where backward begins"
        walker.run(Pass.BACKWARD)
        assert sorted(walker.slots.values()) == sorted(plan.start(Pass.FORWARD))
        assert walker.loads == 2 * plan.num_swapped
        for _ in range(2):
            walker.run(Pass.FORWARD_ONLY)
        assert sorted(walker.slots.values()) == sorted(plan.start(Pass.FORWARD))


@pytest.mark.parametrize(("blocks", "swapped"), PAIRS)
def test_every_plan_has_each_block_there_when_it_is_used_and_the_next_one_on_its_way(blocks: int, swapped: int) -> None:
    walk(RingPlan(blocks, swapped))


@pytest.mark.parametrize("broken", [LatePlan, ForwardPlan, EagerPlan])
@pytest.mark.parametrize(("blocks", "swapped"), [(5, 3), (8, 4), (9, 7)])
def test_the_walk_sees_a_broken_plan(broken: type[RingPlan], blocks: int, swapped: int) -> None:
    with pytest.raises(AssertionError):
        walk(broken(blocks, swapped))


def test_swapping_too_many_blocks_is_an_error_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"cannot swap 7 blocks: single_blocks has 8 blocks, of which 0 to 6"):
        RingPlan(8, 7, "single_blocks")
    with pytest.raises(UserError, match="cannot swap -1"):
        RingPlan(8, -1)
    assert [max_swappable(n) for n in (0, 1, 2, 3, 40)] == [0, 0, 0, 1, 38]


def test_sizes_follow_from_the_plan() -> None:
    plan = RingPlan(5, 2)  # slots: {0, 3}, {1, 4}, {2}
    assert plan.slot_sizes([10, 20, 30, 40, 5]) == [40, 20, 30]
    assert plan.host_size([10, 20, 30, 40, 5]) == 10 + 20 + 40 + 5


# ---- memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_a_flat_buffer_keeps_values_strides_and_shared_memory(dtype: torch.dtype) -> None:
    base = torch.arange(96).view(8, 12).to(dtype)
    tensors = [base[:, 2:7], torch.arange(6).view(2, 3).to(dtype).t(), base[3], torch.tensor(3.0), base[1:2, :1]]
    layout = FlatLayout.of(tensors)
    buffer = torch.empty(layout.num_bytes, dtype=torch.uint8)
    layout.fill(buffer, tensors)
    views = layout.views(buffer, tensors)
    for tensor, view in zip(tensors, views, strict=True):
        assert view.dtype == tensor.dtype and view.stride() == tensor.stride()
        assert torch.equal(view.float(), tensor.float())
    views[0].view(torch.uint8).fill_(0)
    assert (views[2][2:7].float() == 0).all() and (views[4].float() != 0).any() == (tensors[4].float() != 0).any()
    assert all(start % tensor.element_size() == 0 for start, tensor in zip(layout.starts, tensors, strict=True))


def test_views_of_several_dtypes_on_one_memory_stay_aligned() -> None:
    memory = torch.arange(64, dtype=torch.uint8)
    tensors = [memory[2:6].view(torch.bfloat16), memory[4:12].view(torch.float32)]
    layout = FlatLayout.of(tensors)
    buffer = torch.empty(layout.num_bytes, dtype=torch.uint8)
    layout.fill(buffer, tensors)
    for tensor, view in zip(tensors, layout.views(buffer, tensors), strict=True):
        assert torch.equal(view, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_stands_for_an_absent_weight_is_nan_and_cannot_be_written(dtype: torch.dtype) -> None:
    stand_in = absent(torch.zeros(3, 4, dtype=dtype), CPU)
    assert stand_in.shape == (3, 4) and stand_in.float().isnan().all()
    assert stand_in.untyped_storage().nbytes() == 16
    if dtype.itemsize > 1:
        with pytest.raises(RuntimeError, match="single memory location"):
            stand_in.add_(1)


def test_a_spent_pinned_budget_falls_back_with_one_warning_that_says_the_cost(caplog: pytest.LogCaptureFixture) -> None:
    budget = PinnedBudget(1000)
    assert [budget.reserve(600), budget.reserve(600), budget.reserve(400)] == [True, False, True]
    with caplog.at_level(logging.WARNING):
        budget.warn("the swapped weights")
        budget.warn("the swapped weights")
        PinnedBudget(10).warn("nothing")
    assert len(caplog.records) == 1
    assert "half the speed" in caplog.text and "pageable" in caplog.text
    budget.release(600)
    assert budget.reserve(600)
    assert PinnedBudget().limit > 1 << 28


def test_memory_that_cannot_be_pinned_is_pageable_and_counted() -> None:
    budget = PinnedBudget(1000)
    host = pinned_like(torch.zeros(3, 4, dtype=torch.bfloat16).t(), budget)
    assert host.shape == (4, 3) and host.dtype == torch.bfloat16 and host.stride() == (1, 4)
    assert (budget.used, budget.refused) == ((32, 0) if torch.cuda.is_available() else (0, 32)), "the next power of two"
    pinned_like(torch.zeros(1000), budget)
    assert budget.refused >= 4000
    del host
    assert budget.used == 0


def test_processes_of_one_machine_share_the_pinned_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = PinnedBudget().limit
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert PinnedBudget().limit == pytest.approx(alone / 4, rel=0.01)


def test_a_device_that_cannot_swap_is_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match="this run uses 'mps'"):
        make_transport(torch.device("mps"))


@pytest.mark.parametrize(
    ("blocks", "largest"), [((19, 38), 35), ((8, 38), 13), ((19, 8), 6), ((3, 4), 2), ((2, 38), 1), ((2, 2), 0)]
)
def test_the_number_of_blocks_to_swap_divides_as_in_sd_scripts_and_ends_where_two_of_each_group_are_left(
    blocks: tuple[int, int], largest: int
) -> None:
    division = FluxParams(num_double_blocks=blocks[0], num_single_blocks=blocks[1]).swap_division
    assert division.largest == largest
    for number in range(largest + 1):
        double, single = division.plans(number)
        assert (double.num_blocks, single.num_blocks) == blocks
        assert (double.num_swapped, single.num_swapped) == (number // 2, (number - number // 2) * 2)
    with pytest.raises(UserError, match=f"Use {largest} at most" if largest else "Leave --blocks_to_swap out"):
        division.plans(largest + 1)


def test_one_group_of_blocks_takes_the_whole_number() -> None:
    division = SwapDivision((("blocks", 28),))
    assert division.largest == 26
    assert [plan.num_swapped for plan in division.plans(20)] == [20]
