"""What a run will need, found by making it on tensors without memory: the very loaders, caches, loss, backward pass and
optimizer that will run, on the largest batch of the data.

Three things are not run but added: block swap moves memory that has addresses, which simulated tensors have not, so that its
slots are taken from the `RingPlan`s it follows; offloaded activations are taken out where autograd saves them; and what the
device's libraries hold for themselves (`own_memory`) is measured or stated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from library.activation_offload import MIN_BYTES, PREFETCH
from library.batch import TrainBatch
from library.cache_io import LatentCache, TextCache
from library.caching import distinct_captions, encode_captions, encoder_autocast, text_batch_size
from library.custom_offloading_utils import tensors_of
from library.dataset import ImageDataset, Paired, Row, TrainData
from library.epoch_plan import Part
from library.errors import UserError
from library.family_base import ModelBundle
from library.image_io import choose_crop
from library.memory_policy import MemoryPolicy
from library.memory_tracker import MemoryTracker, Peak, Work, simulated
from library.offload_plan import RingPlan
from library.offload_transport import ALIGNMENT, round_up
from library.optimizers import group_rates
from library.prior_cache import StoredPrior
from library.records import Record
from library.strategy_base import LATENT_DTYPE, Conditioning

if TYPE_CHECKING:
    from library.train_util import PreparedRun, Trainer
    from networks.network_interface import LayerKind

WEIGHTS, LEARNING, GRADIENTS, OPTIMIZER = "weights", "learning weights", "gradients", "optimizer state"
SLOTS = "swap slots"

FamilyT = TypeVar("FamilyT")

_CANNOT_SIMULATE = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException, UnsupportedOperatorException,
)  # fmt: skip


class Phase(NamedTuple):
    """The most a part of the run has in use at one time."""

    name: str
    device: Peak
    host: Peak
    """Main memory, beside what the process itself takes. On a CPU the same as `device`."""


class Group(NamedTuple):
    """Parameters that learn at one rate."""

    name: str
    num_parameters: int
    rate: float | None


class LargestBatch(NamedTuple):
    width: int
    height: int
    images: int


@dataclass(frozen=True)
class Forecast:
    """What one run will need. Bytes throughout."""

    device: str
    """Kind of device: "cuda", "cpu"."""
    phases: tuple[Phase, ...]
    """In the order of the run; training is the last."""
    groups: tuple[Group, ...]
    batch: LargestBatch
    """The one that was simulated."""
    caches: int
    """Latents and text encoder outputs that are kept in main memory."""
    swapped: int
    """Weights of swapped blocks in main memory, pinned as far as the budget goes."""
    offloaded: int
    """Activations in main memory, likewise."""
    forward_backward: Work
    """Of one micro-batch of that size."""
    step: Work
    """Of the optimizer's step."""
    caption: Conditioning | None = None
    """One caption's outputs, without memory, where they are cached."""
    layers: Sequence[LayerKind] = ()
    """That are adapted."""

    @property
    def training(self) -> Phase:
        return self.phases[-1]

    @property
    def device_peak(self) -> int:
        """The most that tensors take on the device at any time of the run."""
        return max(phase.device.total for phase in self.phases)

    @property
    def host_peak(self) -> int:
        """Main memory that the run needs beside the process itself and, on a CPU, `device_peak`."""
        peaks = [0] if self.device == "cpu" else [phase.host.total for phase in self.phases]
        return max(peaks) + self.caches + self.swapped + self.offloaded


# ---- the data ----------------------------------------------------------------------------------------------------------


def largest_batch(dataset: ImageDataset) -> tuple[Part, LargestBatch]:
    """The batch with the most pixels."""
    batches = [
        (part, LargestBatch(*size, min(part.batch_size, len(items))))
        for part in dataset.parts
        for size, items in part.buckets.items()
    ]
    return max(batches, key=lambda found: found[1].width * found[1].height * found[1].images)


def _records(part: Part, batch: LargestBatch) -> list[Record]:
    """Of the bucket, those with the longest captions."""
    items = part.buckets[batch.width, batch.height]
    found = sorted((part.records[index] for index, _ in items.values.tolist()), key=lambda record: -len(record.caption))
    return found[: batch.images]


def training_batch(data: TrainData) -> TrainBatch:
    """The largest batch as the data loader would give it, without the pictures."""
    dataset = data.train
    part, size = largest_batch(dataset)
    stride, channels = data.latent.stride, data.latent.channels
    cached = dataset.latent_cache is not None
    shape = (channels, size.height // stride, size.width // stride) if cached else (3, size.height, size.width)
    records = _records(part, size)
    stored = StoredPrior(0, torch.empty(channels, size.height // stride, size.width // stride, dtype=LATENT_DTYPE))
    rows = [
        Row(
            torch.empty(shape),
            0,
            choose_crop(record.placement),
            dataset.readings(record)[0],
            _paired(record, size, dataset.mask_stride),
            prior=stored if dataset.priors is not None and record.subset.preserves else None,
        )
        for record in records
    ]
    return dataset.collate(records, rows, part.multiplier)


def _has_mask(record: Record) -> bool:
    return record.subset.alpha_mask or (record.paired is not None and not record.subset.conditioned)


def _paired(record: Record, size: LargestBatch, mask_stride: int) -> Paired:
    """What belongs to a picture of a batch of `size`."""
    mask = torch.empty(size.height // mask_stride, size.width // mask_stride) if _has_mask(record) else None
    conditioned = record.paired is not None and record.subset.conditioned
    return Paired(mask, torch.empty(3, size.height, size.width) if conditioned else None)


def _mask_cache_bytes(dataset: ImageDataset) -> int:
    """Of masks, which are kept in memory where the latents of their pictures are."""
    sizes = [record.placement.bucket for record in dataset.records if _has_mask(record)]
    return sum(
        torch.float32.itemsize * (width // dataset.mask_stride) * (height // dataset.mask_stride) for width, height in sizes
    )


def _latent_cache_bytes(data: TrainData) -> int:
    """In memory, with the mirror image where it is asked for."""
    spec, found = data.latent, {}
    for record in (record for dataset in data.image_datasets for record in dataset.records):
        width, height = record.placement.bucket
        copies = 2 if record.subset.flip_aug else 1
        values = spec.channels * (height // spec.stride) * (width // spec.stride)
        found[record.path, record.recipe] = copies * LATENT_DTYPE.itemsize * values
    return sum(found.values())


# ---- offloading --------------------------------------------------------------------------------------------------------


class _Shape(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class SimulatedOffload:
    """What `ActivationOffload` does to the memory of the device: what autograd saves is gone until backward asks for it."""

    def __init__(self, model: nn.Module, min_bytes: int = MIN_BYTES) -> None:
        self.min_bytes = min_bytes
        self.host_bytes = 0
        self.largest = 0
        self._weights = {t.untyped_storage()._cdata for t in tensors_of(model)}
        self._hooks: saved_tensors_hooks | None = None
        self._known: dict[tuple[Any, ...], weakref.ref[Any]] = {}
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._end, always_call=True)

    @property
    def arriving(self) -> int:
        """Bytes on the device that are on their way back before they are needed."""
        return PREFETCH * self.largest

    def _start(self, module: nn.Module, args: object) -> None:
        if torch.is_grad_enabled():
            self.host_bytes, self._known = 0, {}
            self._hooks = saved_tensors_hooks(self._pack, self._unpack)
            self._hooks.__enter__()

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks = None

    def _pack(self, tensor: Tensor) -> Tensor | _Shape:
        storage = tensor.untyped_storage()
        if tensor.nbytes < self.min_bytes or storage._cdata in self._weights or tensor.device.type == "meta":
            return tensor
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        before = self._known.get(key)
        if before is None or before() is None:  # every block takes the same rotation and text mask
            self._known[key] = weakref.ref(storage)
            self.largest = max(self.largest, tensor.nbytes)
            self.host_bytes += tensor.nbytes
        return _Shape(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def _unpack(self, packed: Tensor | _Shape) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return torch.empty_strided(packed.size, packed.stride, dtype=packed.dtype, device=packed.device)


class SwapFootprint(NamedTuple):
    """Bytes of a denoiser's blocks when some of them are swapped."""

    slots: int
    """On the device."""
    away: int
    """Of the weights that are in slots now and then, and have no other place on the device."""
    away_learning: int
    """Of weights that learn, those that are away at any one time: so are their gradients and optimizer state."""
    host: int


def swap_footprint(rings: Sequence[RingPlan], groups: Sequence[Sequence[nn.Module]]) -> SwapFootprint:
    """What `BlockSwap` takes, by the plans it follows. groups: the blocks of each ring."""
    slots = away = learning = host = 0
    for ring, blocks in zip(rings, groups, strict=True):
        if not ring.num_swapped:
            continue
        learns = any(parameter.requires_grad for block in blocks for parameter in block.parameters())
        sizes = [sum(round_up(tensor.nbytes, ALIGNMENT) for tensor in tensors_of(block)) for block in blocks]
        slots += sum(ring.slot_sizes(sizes))
        away += sum(sizes)
        learning += sum(sizes) - sum(ring.slot_sizes(sizes)) if learns else 0
        host += ring.host_size(sizes)
    return SwapFootprint(slots, away, learning, host)


@dataclass(frozen=True)
class _SimulatedPolicy(MemoryPolicy):
    """Autocast as it is with a swap, without one; and a call at the end of an update's passes, before its step."""

    swaps: bool = False
    passes_end: Callable[[], None] = lambda: None

    @property
    def autocast(self) -> AutocastKwargs:
        return AutocastKwargs(cache_enabled=not self.swaps)

    def updating(self) -> AbstractContextManager[None]:
        self.passes_end()
        return nullcontext()


# ---- the run -----------------------------------------------------------------------------------------------------------


def forecast(prepared: PreparedRun) -> Forecast:
    """What `prepared` will need. Its data and its accelerator are left as they were."""
    return forecasts(prepared, [prepared.memory.rings])[0]


def forecasts(prepared: PreparedRun, choices: Sequence[tuple[RingPlan, ...]]) -> list[Forecast]:
    """The same for several ways to swap blocks, instead of its own; all of them or none swap. Simulates once."""
    try:
        with simulated(), _borrowed(prepared):
            simulation = _Simulation(_without_transport(prepared), offloads=prepared.memory.offloads, swaps=bool(choices[0]))
            simulation.run()
            return [simulation.forecast(rings) for rings in choices]
    except (*_CANNOT_SIMULATE, RuntimeError) as error:
        # a foreign kernel that asks for the memory of a tensor gets a plain RuntimeError
        if not isinstance(error, _CANNOT_SIMULATE) and "data pointer" not in str(error):
            raise
        raise UserError(
            f"this run cannot be simulated, so nothing can be said of its memory: {type(error).__name__}: {error} "
            f"Leave --plan and --auto_fit out, or use an optimizer (here {prepared.options.optimizer.name}) and a network "
            "module that are made of torch's own operators."
        ) from error


def _without_transport(prepared: PreparedRun) -> PreparedRun:
    """The same run with everything on the device, whole, and nothing compiled."""
    options = prepared.options
    family, memory = _without(options.family, "blocks_to_swap", "split_mode"), _without(options.memory, "shard_weights")
    options = replace(options, family=family, memory=memory)
    plan = replace(prepared.memory, rings=(), offloads=False, shards=False)
    return replace(prepared, options=options, memory=plan, compute=replace(prepared.compute, compiler=None))


def _without(group: FamilyT, *names: str) -> FamilyT:
    """An option group with the fields called `names`, where it has them, at their defaults."""
    own: Any = group
    changed: FamilyT = replace(own, **{field.name: field.default for field in fields(own) if field.name in names})
    return changed


@contextmanager
def _borrowed(prepared: PreparedRun) -> Iterator[None]:
    """Caches that are simulated are taken away again, and what the accelerator was given. fp16's scaling of the loss takes no
    memory, and steps or not by values that are not there."""
    accelerator = prepared.accelerator
    scaler, accelerator.scaler = accelerator.scaler, None
    try:
        yield
    finally:
        for dataset in prepared.data.image_datasets:
            dataset.latent_cache = dataset.text_cache = None
        accelerator.free_memory()
        accelerator.scaler = scaler


class _Simulation:
    """One pass through a run, phase by phase."""

    trainer: Trainer
    passes: Work
    """Forward and backward, of one micro-batch."""
    step: Work
    offload: SimulatedOffload | None = None

    def __init__(self, prepared: PreparedRun, *, offloads: bool, swaps: bool) -> None:
        self.prepared, self.offloads, self.swaps = prepared, offloads, swaps
        self.device = prepared.accelerator.device
        self.tracker = MemoryTracker()
        self.phases: list[Phase] = []
        self.caches = 0
        self.caption: Conditioning | None = None

    def run(self) -> None:
        prepared = self.prepared
        with self.tracker:
            bundle = prepared.load()
            if prepared.options.cache.latents:
                self._cache_latents(bundle)
            if prepared.options.cache.text_outputs:
                self._cache_text(bundle)
            self._train(bundle)

    def _end_phase(self, name: str) -> None:
        self.phases.append(Phase(name, self.tracker.peak(self.device.type), self.tracker.peak("cpu")))
        self.tracker.reset_peaks()

    def _weights(self, bundle: ModelBundle, names: Iterable[str]) -> None:
        """The named parts are read, if they are not there yet."""
        for name in names:
            self.tracker.mark(WEIGHTS, tensors_of(bundle.part(name)))

    # ---- caches --------------------------------------------------------------------------------------------------------

    def _cache_latents(self, bundle: ModelBundle) -> None:
        prepared, options = self.prepared, self.prepared.options
        self._weights(bundle, ["vae"])
        _, size = largest_batch(prepared.data.train)
        images = torch.empty(options.memory.vae_batch_size, 3, size.height, size.width).to(self.device)
        with torch.no_grad():
            prepared.strategies.latents_caching.stored(bundle.vae, images, [0] * len(images)).cpu()
        self._end_phase("caching latents")
        for dataset in prepared.data.image_datasets:
            dataset.latent_cache = LatentCache()
        if not options.cache.cache_latents_to_disk:
            self.caches += _latent_cache_bytes(prepared.data) + sum(map(_mask_cache_bytes, prepared.data.image_datasets))

    def _cache_text(self, bundle: ModelBundle) -> None:
        prepared, options = self.prepared, self.prepared.options
        conditioning = prepared.strategies.text_caching.conditioning
        sources = conditioning.sources() - prepared.learning
        self._weights(bundle, sorted(sources))
        captions = list(distinct_captions(prepared.data))
        longest = sorted(captions, key=len, reverse=True)[: text_batch_size(options)]
        with torch.no_grad(), encoder_autocast(options, self.device):
            entry = encode_captions(longest, prepared.strategies, sources, bundle, self.device).rows(0)
        self._end_phase("caching text encoder outputs")
        self.caption = entry
        complete = sources == conditioning.sources()
        for dataset in prepared.data.image_datasets:
            dataset.text_cache = TextCache(conditioning, complete, memory=dict.fromkeys(captions, entry))
        if not options.cache.cache_text_encoder_outputs_to_disk:
            self.caches += len(captions) * sum(tensor.nbytes for tensor in entry.tensors().values())

    # ---- training ------------------------------------------------------------------------------------------------------

    def _train(self, bundle: ModelBundle) -> None:
        tracker, prepared = self.tracker, self.prepared
        trainer = self.trainer = prepared.assemble(bundle, prepared.previews())
        if self.offloads:
            self.offload = SimulatedOffload(bundle.denoiser)
        cached = {"vae"} if prepared.options.cache.latents else set()
        if prepared.options.cache.text_outputs:
            cached |= set(bundle.text_encoder_names) - prepared.learning
        self._weights(bundle, sorted(set(bundle.loaders) - cached))
        tracker.mark(LEARNING, trainer.parameters)
        reached: set[int] = set()

        def note_gradient(parameter: Tensor) -> None:
            tracker.mark(GRADIENTS, [parameter.grad])
            reached.add(id(parameter))

        for parameter in trainer.parameters:
            parameter.register_post_accumulate_grad_hook(note_gradient)
        trainer.trainable.train()
        trainer.trainable.before_step(0)
        trainer.image_losses = None  # there are no numbers to keep
        self._give_state(trainer)
        self._update(trainer)
        if unreached := [parameter for parameter in trainer.parameters if id(parameter) not in reached]:
            for parameter in unreached:
                _optimizer(trainer).state.pop(parameter, None)
            self._update(trainer)
        self._end_phase("training")

    def _give_state(self, trainer: Trainer) -> None:
        """The optimizer's state, which a first update leaves: a step with gradients that no pass has made."""
        trainer.update_rule.before_last_batch(0, 1)
        for parameter in trainer.parameters:
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        trainer.update_rule.after_backward(trainer.parameters)
        trainer.update_rule.step(trainer.parameters, torch.zeros((), device=self.device))
        self.tracker.mark(OPTIMIZER, _state(trainer))

    def _update(self, trainer: Trainer) -> None:
        """An update of the kind that the run makes; of more micro-batches than two, two show all that there is."""
        tracker, count = self.tracker, min(self.prepared.length.accumulation, 2)
        batch, before = training_batch(self.prepared.data), replace(tracker.work)
        passes = Work()

        def passes_end() -> None:
            nonlocal passes
            passes = tracker.work.since(before)

        trainer.memory = trainer.trainable.memory = _SimulatedPolicy(swaps=self.swaps, passes_end=passes_end)
        tracker.reset_peaks()
        trainer.update([batch] * count)
        self.step = tracker.work.since(before).since(passes)
        self.passes = Work(passes.flops // count, passes.moved_bytes // count)

    # ---- what it comes to ----------------------------------------------------------------------------------------------

    def forecast(self, rings: tuple[RingPlan, ...]) -> Forecast:
        """With the denoiser's blocks swapped as `rings` say."""
        training, swap = self.phases[-1], None
        if rings:
            model: Any = self.trainer.bundle.denoiser
            swap = swap_footprint(rings, model.block_groups())
            training = training._replace(device=_swapped(training.device, swap))
        if self.offload is not None:
            training = training._replace(device=_with(training.device, "arriving activations", self.offload.arriving))
        return Forecast(
            device=self.device.type,
            phases=(*self.phases[:-1], training),
            groups=_groups(self.trainer),
            batch=largest_batch(self.prepared.data.train)[1],
            caches=self.caches,
            swapped=self._host_bytes(swap) if swap is not None else 0,
            offloaded=self.offload.host_bytes if self.offload is not None else 0,
            forward_backward=self.passes,
            step=self.step,
            caption=self.caption,
            layers=self.trainer.trainable.layer_kinds(),
        )

    def _host_bytes(self, swap: SwapFootprint) -> int:
        """Of weights that learn, gradients and optimizer state are where their blocks are."""
        learning = sum(parameter.nbytes for parameter in self.trainer.parameters)
        state = sum(tensor.nbytes for tensor in _state(self.trainer))
        return swap.host + swap.away_learning * (learning + state) // max(learning, 1)


def _with(peak: Peak, kind: str, num_bytes: int) -> Peak:
    kinds = {**peak.kinds, kind: peak.kinds.get(kind, 0) + num_bytes}
    return Peak(sum(kinds.values()), kinds)


def _swapped(peak: Peak, swap: SwapFootprint) -> Peak:
    """`peak` of a run without swap, with one. Where the blocks learn, what is not on the device takes its share of the
    gradients and of the optimizer's state with it."""
    kinds = dict(peak.kinds)
    share = swap.away_learning / max(kinds.get(LEARNING, 0), 1)
    for kind in (GRADIENTS, OPTIMIZER):
        kinds[kind] = round(kinds.get(kind, 0) * (1 - share))
    owner = LEARNING if swap.away_learning else WEIGHTS
    kinds[owner] = kinds.get(owner, 0) - swap.away
    return _with(Peak(0, kinds), SLOTS, swap.slots)


def _optimizer(trainer: Trainer) -> Any:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def _state(trainer: Trainer) -> list[Tensor]:
    return [value for value in tree_leaves(dict(_optimizer(trainer).state)) if isinstance(value, Tensor)]


def _groups(trainer: Trainer) -> tuple[Group, ...]:
    optimizer = _optimizer(trainer)
    rates = group_rates(optimizer)
    found: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        name = group.get("name", f"group{index}")
        found[name] = found.get(name, 0) + sum(parameter.numel() for parameter in group["params"])
    return tuple(Group(name, count, rates.get(f"lr/{name}")) for name, count in found.items())
