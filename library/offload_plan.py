"""Which block is on the device when: the pure half of block swap. Knows numbers of blocks only, so a test can walk all of it.

Of n blocks, s of them swapped, the device holds n - s in as many *slots*. Block b always sits in slot b mod (n - s): when it
comes back, it comes back to the same addresses. A training step goes up the blocks and down again, so

    forward    when block b is done, b + slots takes its slot;   at the end the last blocks are there, where backward begins
    backward   when block b is done, b - slots takes its slot;   at the end the first ones are there, where forward begins

and every load has the computing time of slots - 1 blocks to hide behind. That is 2 s loads per step, the fewest possible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from library.errors import UserError

FLAG = "--blocks_to_swap"


class Pass(Enum):
    """Which way the blocks are used, and what follows."""

    FORWARD = "forward, and backward follows"
    BACKWARD = "backward, and forward follows"
    FORWARD_ONLY = "forward, and another forward follows: previews, validation"


def max_swappable(num_blocks: int) -> int:
    """Two blocks have to stay: one computes while the next one arrives."""
    return max(num_blocks - 2, 0)


@dataclass(frozen=True)
class RingPlan:
    """The plan of one list of blocks. Raises `UserError` when `num_swapped` is not within 0 and `max_swappable(num_blocks)`."""

    num_blocks: int
    num_swapped: int
    name: str = "the model"
    """For messages."""

    def __post_init__(self) -> None:
        most = max_swappable(self.num_blocks)
        if not 0 <= self.num_swapped <= most:
            raise UserError(
                f"cannot swap {self.num_swapped} blocks: {self.name} has {self.num_blocks} blocks, of which 0 to {most} can be "
                f"swapped (one computes while the next one arrives). Set {FLAG} accordingly."
            )

    @property
    def num_slots(self) -> int:
        """Blocks on the device at any time."""
        return self.num_blocks - self.num_swapped

    def slot_of(self, block: int) -> int:
        return block % self.num_slots

    def streams(self, block: int) -> bool:
        """Whether `block` shares its slot with another block. One that does not is loaded once and stays."""
        return block + self.num_slots < self.num_blocks or block >= self.num_slots

    def start(self, coming: Pass) -> list[int]:
        """The blocks that are loaded when a pass begins, in order of use."""
        if coming is Pass.BACKWARD:
            return list(range(self.num_blocks - 1, self.num_swapped - 1, -1))
        return list(range(self.num_slots))

    def successor(self, block: int, running: Pass) -> int | None:
        """The block that takes the slot of `block` as soon as `block` is done; None when it stays where it is."""
        if running is Pass.BACKWARD:
            return block - self.num_slots if block >= self.num_slots else None
        if block + self.num_slots < self.num_blocks:
            return block + self.num_slots
        first = self.slot_of(block)
        return first if running is Pass.FORWARD_ONLY and first != block else None

    def ahead(self, block: int, running: Pass) -> list[int]:
        """What should be loaded beside `block`, next used first: for a pass that did not begin as planned."""
        if running is Pass.BACKWARD:
            return list(range(block - 1, max(block - self.num_slots, -1), -1))
        return list(range(block + 1, min(block + self.num_slots, self.num_blocks)))

    def slot_sizes(self, block_sizes: Sequence[int]) -> list[int]:
        """Bytes of each slot on the device, given those of each block: as large as the largest block that uses it."""
        return [max(block_sizes[slot :: self.num_slots]) for slot in range(self.num_slots)]

    def host_size(self, block_sizes: Sequence[int]) -> int:
        """Bytes in main memory: every block that does not stay on the device."""
        return sum(size for block, size in enumerate(block_sizes) if self.streams(block))


@dataclass(frozen=True)
class SwapDivision:
    """The groups of equal blocks of one network, in order of use, and how `--blocks_to_swap` divides among them."""

    counts: tuple[tuple[str, int], ...]
    """(name in messages, number of blocks) of each group."""
    divide: Callable[[int], tuple[int, ...]] = lambda number: (number,)
    """The user's number -> how many blocks of each group are swapped; none of them falls as the number grows."""

    @property
    def largest(self) -> int:
        """The largest number there can be."""
        number = 0
        while sum(self.divide(number)) < sum(count for _, count in self.counts) and self._fits(number + 1):
            number += 1
        return number

    def _fits(self, number: int) -> bool:
        shares = zip(self.counts, self.divide(number), strict=True)
        return all(share <= max_swappable(count) for (_, count), share in shares)

    def plans(self, number: int) -> tuple[RingPlan, ...]:
        """One for each group. Raises `UserError`, with the largest number there can be, when `number` is above it."""
        shares = self.divide(number)
        if self._fits(number):
            return tuple(RingPlan(count, share, name) for (name, count), share in zip(self.counts, shares, strict=True))
        most = self.largest
        has = " and ".join(f"{count} {name}" for name, count in self.counts)
        raise UserError(
            f"{FLAG} {number} would swap {' and '.join(map(str, shares))} of this model's {has}, and two of each have to stay: "
            f"one computes while the next one arrives. {f'Use {most} at most.' if most else f'Leave {FLAG} out.'}"
        )
