"""Block swap: a model larger than the device, its blocks travelling between main memory and the device while it computes.

    swap = BlockSwap(model, [BlockGroup(list(model.blocks), num_swapped=20)], device)

loads what has to be loaded, moves the rest of the model, and hooks the blocks from the outside: the model is called as before.
`offload_plan` says which block travels when, `offload_transport` how. Results do not depend on either: a block that is used
is there, or is fetched on the spot. What that leaves to the caller:

- A frozen model (`learning=False`): nothing. Its weights only ever travel to the device. Weights to be changed, merged or
  saved are so inside `host_weights()`.
- A model that learns (`learning=True`): the optimizer steps inside `updating()`, and clears the gradients there. Blocks that
  have left the device by then have their weights and gradients, and so their optimizer state, in main memory. Better: step
  each parameter as soon as it has its gradient (a post-accumulate-grad hook), and clear it: its block is still on the device,
  and goes back to main memory with its new weights. `updating()` may then be empty.
- To compile blocks, give each a compiled `forward`, not a compiled call: the hooks stay outside of it.

Recomputation is told from a forward pass by asking autograd whether a backward pass is running.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from library.errors import UserError
from library.offload_plan import Pass, RingPlan, max_swappable
from library.offload_transport import FlatLayout, Slot, Transport, absent, make_transport, overlapping

__all__ = ["BlockGroup", "BlockSwap", "Pass", "RingPlan", "max_swappable"]


def in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread: what is computed now is a recomputation."""
    return torch._C._current_graph_task_id() != -1


@dataclass(frozen=True)
class BlockGroup:
    """Blocks in order of use, best of equal size: a slot on the device is as large as the largest block it takes."""

    blocks: Sequence[nn.Module]
    num_swapped: int
    """How many of them are not on the device at any time: 0 to `max_swappable(len(blocks))`."""
    name: str = "the model"
    """For messages."""


# ---- what travels ------------------------------------------------------------------------------------------------------


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def travelling_tensors(model: nn.Module, blocks: Sequence[nn.Module], learning: bool) -> list[list[Tensor]]:
    """Of each block, the tensors that travel with it.

    What shares memory with another block or with the rest of the model stays on the device. So does what learns inside the
    blocks of a frozen model (adapters that were put there), as nothing comes back from the device.
    """
    owned = [(tensor, owner) for owner, block in enumerate(blocks) for tensor in tensors_of(block)]
    outside = [(tensor, -1) for tensor in _tensors_outside(model, {id(block) for block in blocks})]
    everything = [(tensor, owner) for tensor, owner in owned + outside if not is_traceable_wrapper_subclass(tensor)]
    if any(tensor.is_meta for tensor, _ in everything):
        raise ValueError("load the weights before swapping blocks: some are on the meta device")
    shared: set[int] = set()
    for piece in overlapping([tensor for tensor, _ in everything]):
        if len({everything[index][1] for index in piece}) > 1:
            shared.update(id(everything[index][0]) for index in piece)
    found: list[list[Tensor]] = [[] for _ in blocks]
    for tensor, owner in owned:
        if is_traceable_wrapper_subclass(tensor):
            raise UserError(
                f"--blocks_to_swap: a weight is a {type(tensor).__name__}, which is made of several tensors and cannot be "
                "swapped. Use another quantisation, or leave --blocks_to_swap out."
            )
        learns_apart = tensor.requires_grad and not learning
        if id(tensor) not in shared and tensor.numel() and not learns_apart:
            found[owner].append(tensor)
    return found


def _tensors_outside(module: nn.Module, blocks: set[int]) -> Iterator[Tensor]:
    """Of every module that can be reached without passing through a block."""
    if id(module) not in blocks:
        yield from (*module.parameters(recurse=False), *module.buffers(recurse=False))
        for child in module.children():
            yield from _tensors_outside(child, blocks)


def place(module: nn.Module, device: torch.device, stay: frozenset[int] | set[int]) -> None:
    """`module.to(device)` for everything but the tensors with an `id` in `stay`."""
    if not any(id(tensor) in stay for tensor in tensors_of(module)):
        module.to(device)
        return
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    for tensor in own:
        if id(tensor) not in stay:
            grad = tensor.grad
            tensor.data = tensor.data.to(device)
            tensor.grad = None if grad is None else grad.to(device)
    for child in module.children():
        place(child, device, stay)


class SwappedBlock:
    """The travelling tensors of one block. Their `.data` is its slot while it is there, and a stand-in that cannot be used
    (NaN) while it is not."""

    def __init__(self, tensors: Sequence[Tensor], transport: Transport) -> None:
        self.tensors = tensors
        self.transport = transport
        self.layout = FlatLayout.of(tensors)
        self.host = transport.host_buffer(self.layout.num_bytes)
        self.layout.fill(self.host.flat, tensors)
        self.host_views = self.layout.views(self.host.flat, tensors)
        self.absent = [absent(tensor, transport.device) for tensor in tensors]
        self.slot_views: list[Tensor] = []
        self.gradients: list[Tensor | None] = [None] * len(tensors)
        """In main memory, while the block is not on the device."""
        self.bound = False
        self.dirty = False
        """The device has newer weights than main memory."""
        self._versions = 0
        self.point_to(self.absent)

    def point_to(self, views: Sequence[Tensor]) -> None:
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def bind(self) -> None:
        """The block is on the device: use it there."""
        self.point_to(self.slot_views)
        self.bound = True
        self._versions = self._count_changes()

    def unbind(self, learning: bool) -> None:
        """It is about to leave."""
        if not self.bound:
            return
        for index, tensor in enumerate(self.tensors):
            if tensor.grad is not None:
                if not learning:
                    raise RuntimeError("a swapped weight has a gradient, but the blocks are swapped as frozen (learning=False)")
                self.gradients[index] = self.transport.to_host(tensor.grad)
                tensor.grad = None
        self.dirty |= self._versions != self._count_changes()  # a buffer that forward changed, for example
        self.point_to(self.absent)
        self.bound = False

    def restore_gradients(self) -> None:
        """To the device, where this backward pass adds to them."""
        for index, gradient in enumerate(self.gradients):
            if gradient is not None:
                self.tensors[index].grad = self.transport.to_device(gradient).get()
                self.gradients[index] = None

    def _count_changes(self) -> int:
        return sum(tensor._version for tensor in self.tensors)


# ---- one ring ----------------------------------------------------------------------------------------------------------


class Ring:
    """The slots of one group of blocks, and who is in them."""

    def __init__(self, plan: RingPlan, travelling: Sequence[Sequence[Tensor]], transport: Transport, learning: bool) -> None:
        self.plan = plan
        self.transport = transport
        self.learning = learning
        self.misses = 0
        """Blocks that were not under way when they were needed, so that computing had to wait for the whole transfer."""
        self.backward_at: int | None = None
        self.blocks: dict[int, SwappedBlock] = {}
        for index, tensors in enumerate(travelling):
            if plan.streams(index) and tensors:
                self.blocks[index] = SwappedBlock(tensors, transport)
        self.slots: dict[int, Slot] = {}
        for index in self.blocks:
            slot = plan.slot_of(index)
            sizes = [self.blocks[b].layout.num_bytes for b in self.blocks if plan.slot_of(b) == slot]
            if slot not in self.slots:
                self.slots[slot] = transport.slot(max(sizes))
        for index, block in self.blocks.items():
            block.slot_views = block.layout.views(self.slots[plan.slot_of(index)].flat, block.host_views)
        self.occupants: dict[int, int] = {}
        """Slot → the block that is in it or on its way."""

    def load(self, index: int) -> None:
        """Begin to bring a block, unless it is there; who is in its slot leaves."""
        slot = self.plan.slot_of(index)
        if index not in self.blocks or self.occupants.get(slot) == index:
            return
        self.evict(slot)
        self.transport.load(self.blocks[index].host, self.slots[slot])
        self.occupants[slot] = index

    def evict(self, slot: int) -> None:
        if slot not in self.occupants:
            return
        block = self.blocks[self.occupants.pop(slot)]
        block.unbind(self.learning)
        if block.dirty:
            self.transport.store(self.slots[slot], block.host)
            block.dirty = False

    def enter(self, index: int, running: Pass) -> None:
        """From here on the block is used."""
        if index not in self.blocks:
            return
        slot = self.plan.slot_of(index)
        if self.occupants.get(slot) != index:
            self.misses += 1
            self.load(index)
            for coming in self.plan.ahead(index, running):
                self.load(coming)
        block = self.blocks[index]
        if not block.bound:
            self.transport.wait(self.slots[slot])
            block.bind()

    def leave(self, index: int, running: Pass) -> None:
        """It is not used any more in this pass: the next block takes its slot."""
        coming = self.plan.successor(index, running)
        if coming is not None and self.occupants.get(self.plan.slot_of(index), index) == index:
            self.load(coming)

    def enter_backward(self, index: int) -> None:
        before = self.backward_at
        self.backward_at = index
        if before is not None and before > index:
            self.leave(before, Pass.BACKWARD)
        self.enter(index, Pass.BACKWARD)
        if self.learning and index in self.blocks:
            self.blocks[index].dirty = True  # an optimizer may step any time now
            self.blocks[index].restore_gradients()

    def settle(self) -> None:
        """What a training step begins with. Already so after a whole backward pass."""
        self.backward_at = None
        for index in self.plan.start(Pass.FORWARD):
            self.load(index)

    def away(self) -> list[SwappedBlock]:
        return [block for block in self.blocks.values() if not block.bound]


# ---- the swapper -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _SavedWeight:
    """A tensor that backward wants and that lies in a slot: good while its block is there."""

    ring: Ring
    index: int
    tensor: Tensor


def _unchanged(value: Any) -> Any:
    return value


class BlockSwap:
    """Swaps groups of blocks of one model, each with its own slots. Several processes have one each and share nothing.

    pinned_limit: bytes of main memory this process may pin; None for its share of half the physical memory.
    Raises `UserError` when more blocks are to be swapped than can be, and for devices without main memory of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Iterable[BlockGroup],
        device: torch.device,
        *,
        learning: bool = False,
        pinned_limit: int | None = None,
        transport: Transport | None = None,
    ) -> None:
        groups = list(groups)
        plans = [RingPlan(len(group.blocks), group.num_swapped, group.name) for group in groups]
        blocks = [block for group in groups for block in group.blocks]
        _refuse_compiled(blocks)
        self.model = model
        self.device = device
        self.learning = learning
        self.transport = transport or make_transport(device, pinned_limit)
        travelling = iter(travelling_tensors(model, blocks, learning))
        self.rings = [Ring(plan, list(islice(travelling, plan.num_blocks)), self.transport, learning) for plan in plans]
        self._by_address = {slot.flat.data_ptr(): (ring, i) for ring in self.rings for i, slot in ring.slots.items()}
        self._readable = False
        self._backward_runs = False
        self._backward_follows: bool | None = None
        """Whether the running call of the model records a graph; None outside of it."""
        self._guards: list[tuple[Ring, int, saved_tensors_hooks | None]] = []
        """Of the blocks that are running, the innermost last."""
        self._handles: list[Any] = []
        self.place(device)
        for ring in self.rings:
            ring.settle()
        self._attach(groups)
        self.transport.budget.warn("the swapped weights")

    @property
    def misses(self) -> int:
        """Loads that could not hide behind computing; 0 in a run of training steps and nothing else."""
        return sum(ring.misses for ring in self.rings)

    def place(self, device: torch.device) -> None:
        """`model.to(device)` for everything that does not travel. The slots stay where they are."""
        place(self.model, device, {id(t) for ring in self.rings for block in ring.blocks.values() for t in block.tensors})

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Where the optimizer steps, when it steps after backward: weights and gradients of a block are both where the block
        is, the same place every time. Gradients are to be clipped and cleared in here too. Does nothing for a frozen model."""
        if not self.learning:
            yield
            return
        for ring in self.rings:
            ring.settle()
            for index in ring.occupants.values():
                ring.enter(index, Pass.FORWARD)
                ring.blocks[index].restore_gradients()
                ring.blocks[index].dirty = True
        away = [block for ring in self.rings for block in ring.away()]
        self.transport.finish()
        for block in away:
            block.point_to(block.host_views)
            for tensor, gradient in zip(block.tensors, block.gradients, strict=True):
                tensor.grad = gradient
        try:
            yield
        finally:
            for block in away:
                block.gradients = [tensor.grad for tensor in block.tensors]
                for tensor in block.tensors:
                    tensor.grad = None
                block.point_to(block.absent)

    def drop_gradients(self) -> None:
        """Forget all gradients of swapped blocks: for a step that is given up. `updating()` does not need it."""
        for ring in self.rings:
            for block in ring.blocks.values():
                block.gradients = [None] * len(block.tensors)
                for tensor in block.tensors:
                    tensor.grad = None

    @contextmanager
    def host_weights(self) -> Iterator[None]:
        """All swapped weights in main memory, up to date, to be read (`state_dict()`, saving) or changed in place."""
        self._bring_home()
        self._readable = True
        try:
            yield
        finally:
            self._readable = False
            for ring in self.rings:
                for block in ring.blocks.values():
                    block.point_to(block.absent)
                ring.settle()

    def close(self) -> None:
        """The model is an ordinary one again, with the weights that were swapped in main memory."""
        for handle in self._handles:
            handle.remove()
        self._bring_home()
        for ring in self.rings:
            for block in ring.blocks.values():
                block.point_to([view.clone(memory_format=torch.preserve_format) for view in block.host_views])
                for tensor, gradient in zip(block.tensors, block.gradients, strict=True):
                    tensor.grad = gradient
            ring.blocks, ring.slots = {}, {}
        self._by_address = {}

    def _bring_home(self) -> None:
        for ring in self.rings:
            for slot in list(ring.occupants):
                ring.evict(slot)
        self.transport.finish()
        for ring in self.rings:
            for block in ring.blocks.values():
                block.point_to(block.host_views)

    # ---- hooks -----------------------------------------------------------------------------------------------------------

    def _attach(self, groups: Sequence[BlockGroup]) -> None:
        def model_starts(module: nn.Module, args: object) -> None:
            self._backward_follows = torch.is_grad_enabled()

        def model_ends(module: nn.Module, args: object, output: object) -> None:
            self._backward_follows = None

        handles = [self.model.register_forward_pre_hook(model_starts)]
        handles.append(self.model.register_forward_hook(model_ends, always_call=True))
        for ring, group in zip(self.rings, groups, strict=True):
            for index, block in enumerate(group.blocks):
                handles += self._attach_block(ring, index, block)
        self._handles = handles

    def _attach_block(self, ring: Ring, index: int, block: nn.Module) -> list[Any]:
        def before(module: nn.Module, args: object) -> None:
            self._before(ring, index)

        def after(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            self._after(ring, index, (args, kwargs), output)

        def refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
            if index in ring.blocks and not self._readable:
                raise RuntimeError("swapped weights are not on the device: call state_dict() inside BlockSwap.host_weights()")

        return [
            block.register_forward_pre_hook(before),
            block.register_forward_hook(after, with_kwargs=True, always_call=True),
            block.register_state_dict_pre_hook(refuse_state_dict),
        ]

    def _before(self, ring: Ring, index: int) -> None:
        if in_backward():
            self._enter_backward(ring, index)
        else:
            self._backward_runs = False  # still true only if an error ended the last one
            ring.backward_at = None
            ring.enter(index, self._forward_pass())
        guard = self._guard() if torch.is_grad_enabled() else None
        if guard is not None:
            guard.__enter__()
        self._guards.append((ring, index, guard))

    def _after(self, ring: Ring, index: int, inputs: object, output: object) -> None:
        """`output` is None when the block raised an error, or when recomputation stopped early."""
        if self._guards and self._guards[-1][:2] == (ring, index):  # not so if `_before` failed
            guard = self._guards.pop()[2]
            if guard is not None:
                guard.__exit__(None, None, None)
        if output is None:
            return
        entered = {tensor.grad_fn for tensor in tensors_in(inputs)}
        for node in {tensor.grad_fn for tensor in tensors_in(output)} - entered - {None}:
            assert node is not None
            node.register_prehook(lambda gradients: self._enter_backward(ring, index))
        if not in_backward():
            ring.leave(index, self._forward_pass())

    def _forward_pass(self) -> Pass:
        """Reentrant checkpointing runs blocks without a graph in a pass that has one: how the model was called decides."""
        follows = torch.is_grad_enabled() if self._backward_follows is None else self._backward_follows
        return Pass.FORWARD if follows else Pass.FORWARD_ONLY

    def _enter_backward(self, ring: Ring, index: int) -> None:
        if not self._backward_runs:
            self._backward_runs = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._backward_ends)
        ring.enter_backward(index)

    def _backward_ends(self) -> None:
        self._backward_runs = False
        for ring in self.rings:
            ring.settle()

    def _guard(self) -> saved_tensors_hooks:
        """Has autograd ask for weights it saved, so that they are there even for a gradient that does not come through the
        block's outputs. All other tensors go to the hooks that are active now (checkpointing, activation offload)."""
        outer_pack, outer_unpack = torch._C._autograd._top_saved_tensors_default_hooks(True) or (_unchanged, _unchanged)

        def pack(tensor: Tensor) -> Any:
            found = self._owner(tensor)
            return outer_pack(tensor) if found is None else _SavedWeight(*found, tensor)

        def unpack(packed: Any) -> Tensor:
            if not isinstance(packed, _SavedWeight):
                unpacked: Tensor = outer_unpack(packed)
                return unpacked
            if in_backward():
                self._enter_backward(packed.ring, packed.index)
            else:
                packed.ring.enter(packed.index, Pass.BACKWARD)
            return packed.tensor

        return saved_tensors_hooks(pack, unpack)

    def _owner(self, tensor: Tensor) -> tuple[Ring, int] | None:
        """The ring and the block whose memory `tensor` is in."""
        if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
            return None
        ring, slot = self._by_address.get(tensor.untyped_storage().data_ptr(), (None, -1))
        return (ring, ring.occupants[slot]) if ring is not None and slot in ring.occupants else None


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists, dicts and dataclasses: what a block takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def _refuse_compiled(blocks: Sequence[nn.Module]) -> None:
    for block in blocks:
        if getattr(block, "_compiled_call_impl", None) is not None or hasattr(block, "_torchdynamo_orig_callable"):
            raise ValueError("the call of a block is compiled, which hooks do not survive: compile its `forward` instead")
