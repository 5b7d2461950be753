"""How long a unit should take on a GPU: a model of every launch, from counts and published peaks. Not a measurement.

A launch takes as long as its scarcest resource: tensor cores, instruction slots, shared memory, L2 or device memory
(the roofline of Williams, Waterman and Patterson 2009). Tiles and waves that are not full lower the roof. Of our
convolutions the product, what memory carries and the start and end of each program do not hide each other wholly: how
much of each counts was fitted to measured times (:data:`PACES`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from resnet_fused.kernels import (
    conv_box,
    conv_dgrad,
    conv_forward,
    conv_pool,
    conv_wgrad,
    dgrad_box,
)
from resnet_fused.kernels.chain import Chain, accumulators, products, shared, tail_stages
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import TileConfig
from resnet_fused.plan.constants import ASSUMED, Constants
from resnet_fused.plan.problem import Problem, Tiles, Way

SHARED_BYTES_PER_CLOCK = 128
"""Of a multiprocessor's shared memory (CUDA C++ Programming Guide: 32 banks of 4 bytes)."""
PART_BYTES = 4
"""Of an element of a split sum's parts."""
MOMENTS_BYTES = 8
"""Of a channel's mean and sum of squared deviations."""
MOST_REGISTERS = 255
SPARE_REGISTERS = 64
"""Of a thread, beside those that hold its share of the tile; an estimate."""
SPARE_OF_CHAINS = 80
"""The same of a chain, whose loop has more beside it."""
REGISTERS = 65536
"""Of a multiprocessor."""
CUDNN_TILE = (128, 64)
CUDNN_FULL_COLUMNS = 256
"""Of the wide instructions of sm_90 and sm_100, which read both factors from shared memory: a narrower tile multiplies
less per factor that it reads, and is taken to be slower by as much, cuDNN's and Triton's alike. Assumed: behind it is
one time, of a 3x3 64->64 of 32x56x56 in bf16 on an H100, 31.2 us or 24 % of its peak."""
CUDNN_GROUP_WIDTH = 32
"""Narrower groups cost cuDNN as much as groups of so many channels."""

# Issue slots of the main loop per cycle of its tensor work, by architecture, for 1x1 and for wider filters: counted in
# the machine code of the default tiles (of boxes: 128x128) for 256 channels and many pixels in bf16 (Triton 3.8.0; the
# tests' ledger holds them, python -m tests.kernels.ledger counts anew). At 1, issuing alone takes as long as the
# product. The filter's gradient has both prologues; the input's has one where the filter is 1x1. Flat: of a network's
# first layer, 7x7/2 3->64, whose channels are so few that a chunk of K runs across taps; one figure. With a pool behind
# it, the gradient of its output is stored, and the filter's has no prologue.
ISSUE_SLOTS: dict[str, dict[int, tuple[float, ...]]] = {
    "conv_forward": {
        **{80: (0.253, 0.326), 86: (0.161, 0.195), 89: (0.081, 0.098)},
        **{90: (0.223, 0.271), 100: (0.867, 0.969), 120: (0.06, 0.076)},
    },
    "conv_box": {90: (0.186, 0.121), 100: (0.316, 0.219), 120: (0.052, 0.054)},
    "conv_forward, prologue": {
        **{80: (1.135, 1.191), 86: (0.567, 0.601), 89: (0.284, 0.3)},
        **{90: (1.355, 2.34), 100: (3.391, 4.781), 120: (0.271, 0.299)},
    },
    "conv_wgrad": {
        **{80: (1.414, 1.727), 86: (1.307, 1.553), 89: (0.653, 0.776)},
        **{90: (2.648, 2.711), 100: (5.047, 5.656), 120: (0.623, 0.773)},
    },
    "conv_dgrad": {
        **{80: (1.812, 0.391), 86: (1.02, 0.25), 89: (0.51, 0.125)},
        **{90: (1.312, 0.445), 100: (2.445, 1.047), 120: (0.493, 0.105)},
    },
    "dgrad_box": {90: (0.11,), 100: (0.227,), 120: (0.054,)},
    "conv_forward, flat": {80: (2.203,), 86: (1.102,), 89: (0.551,), 90: (4.188,), 100: (7.594,), 120: (0.543,)},
    "conv_wgrad, flat": {80: (3.609,), 86: (2.105,), 89: (1.053,), 90: (8.234,), 100: (17.531,), 120: (1.02,)},
    "conv_wgrad, flat, no prologue": {
        **{80: (2.531,), 86: (1.641,), 89: (0.82,), 90: (6.156,), 100: (15.75,), 120: (0.777,)},
    },
}

# The same of the whole of conv_pool, whose loop is short and unrolled, for 64 channels: all its instructions over the
# cycles of its product.
POOL_SLOTS = {80: 0.969, 86: 0.484, 89: 0.242, 90: 1.496, 100: 7.411, 120: 0.24}

# Of the two loops of a chain, the walk over the taps and that over the channels of z, with 128 channels between the
# convolutions; counted alike.
CHAIN_SLOTS = {
    "chain_forward": {
        **{80: (0.33, 0.594), 86: (0.229, 0.291), 89: (0.114, 0.146)},
        **{90: (0.309, 0.662), 100: (1.039, 1.535), 120: (0.105, 0.134)},
    },
    "chain_box": {90: (0.193, 0.705), 100: (0.426, 1.551)},
}

_T = TypeVar("_T")


class Pace(NamedTuple):
    """What a kernel's convolution takes: a sum, since its programs load, multiply and store one after the other.

    ``product``: of the time of the tensor cores, of issuing, of shared memory or of L2, whichever is longest.
    ``memory``: of that of device memory. ``program``: seconds of a program for its start and its first loads, and as
    much again for every PACED values of its tile, which it stores; those of the programs that a multiprocessor holds
    pass at the same time. No launch is faster than the tensor cores or device memory alone.
    """

    product: float
    memory: float = 0.0
    program: float = 0.0


PACED = 8192

PACES = {
    "conv_forward": (Pace(0.65, 0.40, 1.4e-6),),
    "conv_box": (Pace(0.45, 0.50, 0.8e-6), Pace(0.60, 0.50, 0.75e-6)),
    "conv_forward, prologue": (Pace(0.85, 0.0, 2.4e-6), Pace(1.55, 0.0, 3.2e-6)),
    "conv_wgrad": (Pace(1.40, 0.30), Pace(2.20)),
    "conv_dgrad": (Pace(0.90, 0.50, 0.7e-6), Pace(0.64, 0.0, 6.4e-6)),
    "dgrad_box": (Pace(0.55, 0.0, 3.5e-6),),
    "conv_forward, flat": (Pace(5.2),),
    "conv_wgrad, flat": (Pace(3.5),),
    "conv_wgrad, flat, no prologue": (Pace(3.5),),
    "conv_pool": (Pace(2.05),),
}
"""By the names of ISSUE_SLOTS, for 1x1 and for wider filters. Fitted, each to within 0.8 and 1.3 of every time, to the
kernels of a ResNet-50 at batch 256 in bf16 on an H100 80GB HBM3 (driver 580.159, torch 2.11.0, CUDA 13.0, Triton
3.6.0); 1x1 boxes to 33 tiles of five layers with two stages, within 0.78 and 1.25. Of "conv_wgrad, flat", and of all on
other architectures and in other number formats they are assumed: causes lie in the kernels."""


class ChainPace(NamedTuple):
    """The same of a chain, whose parts do not hide each other: of issuing, of loads, and of the start of programs.

    ``walk``: of issuing the walk over the taps; ``tail``: of the loop behind it; ``l2``, ``memory``: of L2 and of
    device memory. ``step``: seconds for which a step of the tail waits for its loads, but for those that pass while the
    step before is computed, where they are under way by then (``chain.tail_stages``). ``program``: seconds of a program
    for its start and its last stores. What the programs that a multiprocessor holds wait for passes at the same time.
    """

    walk: float
    tail: float
    l2: float
    memory: float
    step: float
    program: float


CHAIN_PACE = ChainPace(2.23, 3.38, 0.48, 0.18, 0.73e-6, 2.7e-6)
"""Fitted, to within 0.87 and 1.11, to 27 times of chains and of their pairs on the same H100, whose tails were two
stages deep: 64, 128 and 256 channels between the convolutions, batches of 1, 32 and 256 (``tests/measured.py``). They
were taken beside cuDNN's, convolution by convolution, in one run, and are scaled so that those are what they are
predicted to be. Of tails of three stages, and of boxes, which nobody has timed, it is a prediction."""

STREAMS = {
    "channel_moments": (1, 1.45),
    "batch_norm_apply": (1, 1.1),
    "batch_norm_pool": (1, 1.5),
    "batch_norm_pool_backward": (1, 1.27),
    "aten._native_batch_norm_legit": (2, 3.75),
    "aten.native_batch_norm_backward": (2, 2.25),
    "aten._native_batch_norm_legit_no_training": (3, 1.4),
    "aten.max_pool2d_with_indices": (1, 2.8),
    "aten.max_pool2d_with_indices_backward": (2, 4.3),
}
"""Launches that are slower than their bytes: how many kernels a call of PyTorch's has, and the bytes that would take as
long over those of the operands, each once. Measured where :data:`PACES` were."""
VECTORS_SECONDS = 3e-6
"""What a launch of one program for a few channels takes, from reading the first to storing the last; measured there."""
CUDNN_SECONDS = 2.8e-6
"""For the start of cuDNN's convolutions and their last stores: taken to be conv_forward's, of PACED values."""
CUDNN_PADDED = 3.2
"""How many times longer its convolutions take where input channels are padded, in 16 bit to a multiple of 8: measured
of a 7x7/2 3->64, there."""

PREDICTED: tuple[Way, ...] = ("fused", "mixed", "eager")
"""Ways that every unit has."""


@dataclass(frozen=True)
class PredictedLaunch:
    """One launch, or call of PyTorch's, as the model sees it; ``bytes``: every operand once.

    ``bound``: tensor, issue, shared, l2, memory, program (starts and stores of programs) or latency (a few channels);
    launch if all are shorter.
    """

    kernel: str
    flops: int
    bytes: int
    seconds: float
    bound: str


@dataclass(frozen=True)
class _Work:
    """A tiled product: how many programs, and what each executes and asks of L2 and of shared memory, padding included.

    ``shared_bytes``: what its loads write there, and what its products read. ``resident``: programs that a
    multiprocessor holds at the same time. ``values``: of its tile.
    """

    programs: int
    macs: int
    l2_bytes: int
    shared_bytes: int
    resident: int
    values: int


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a unit's tensors: the input, as far as the filter meets it, and whole; the output; the filter.

    ``pooled``: the output behind a pool; ``places``: where each of its values came from.
    """

    met: int
    x: int
    y: int
    w: int
    pooled: int
    places: int


def predict(
    problem: Problem, implementation: Way, tiles: Tiles, constants: Constants = ASSUMED, *, leaf: bool = False
) -> tuple[PredictedLaunch, ...]:
    """Every launch of the unit, in order: of its forward, and in training of its backward too.

    ``leaf``: nobody wants the gradient of its input.
    """
    model = _Model(problem, tiles, constants, leaf)
    roads = {"fused": model.fused, "mixed": model.mixed, "eager": model.eager, "cudnn": model.folded}
    return tuple(roads[implementation]())


def ways(problem: Problem) -> tuple[Way, ...]:
    """Those that are predicted: "cudnn" where it is certain that cuDNN takes the unit in one call.

    That is a frozen one in 16 bit with a ReLU, whose channels are multiples of 8, without groups, dilation, or a pool
    behind it, and whose tensors have fewer than 2^31 elements.
    """
    whole = problem.ci % 8 == problem.co % 8 == 0 and problem.groups == 1 and problem.dilation == (1, 1)
    whole = whole and problem.relu
    whole = whole and max(problem.n * problem.h * problem.w * problem.ci, problem.m * problem.co) < 2**31
    if problem.direction == "frozen" and problem.dtype.itemsize == 2 and whole and not problem.pooled:
        return *PREDICTED, "cudnn"
    return PREDICTED


def choices(problem: Problem) -> list[Tiles]:
    """Those that a fused unit's forward has: the kernel's own, boxes, and in inference sums that are split."""
    if _in_one(problem):
        return [Tiles()]
    split = () if problem.direction == "training" else conv_forward.split_tiles(problem)
    return [Tiles(), *(Tiles(forward=tile) for tile in (*conv_box.tiles(problem), *split))]


def forward(problem: Problem, tiles: Tiles, constants: Constants = ASSUMED) -> tuple[float, float]:
    """Predicted seconds of a fused unit's forward, and the issue slots of its main loop per tensor cycle."""
    model = _Model(problem, tiles, constants)
    return sum(launch.seconds for launch in model.forward()), model.slots(model.forward_kernel)


def gradient_choices(problem: Problem) -> list[Tiles]:
    """Those that the gradient of a fused unit's input has: the kernel's own, and boxes."""
    return [Tiles(), *(Tiles(dgrad=tile) for tile in dgrad_box.tiles(problem.gradient))]


def gradient(problem: Problem, tiles: Tiles, constants: Constants = ASSUMED) -> tuple[float, float]:
    """Predicted seconds of the gradient of a fused unit's input, and the issue slots of its main loop."""
    model = _Model(problem, tiles, constants)
    return model.dgrad().seconds, model.slots(model.dgrad_kernel)


def programs(problem: Problem, tiles: Tiles) -> int:
    """How many compute the product of a fused unit's forward."""
    return _Model(problem, tiles, ASSUMED).forward_work().programs


def compare(problem: Problem, tiles: Tiles, constants: Constants = ASSUMED) -> tuple[tuple[Way, float], ...]:
    """Every implementation with its predicted seconds, fastest first; ``tiles`` are those of the fused one."""
    seconds = {way: sum(x.seconds for x in predict(problem, way, tiles, constants)) for way in ways(problem)}
    return tuple(sorted(seconds.items(), key=lambda item: item[1]))


def template(problem: Problem, tile: TileConfig, slots: float, constants: Constants = ASSUMED) -> PredictedLaunch:
    """The convolution alone of a fused unit's forward, as any kernel in Triton with ``tile`` would run it.

    ``slots``: issue slots per tensor cycle of its main loop.
    """
    model = _Model(problem, Tiles(forward=tile), constants)
    size = model.sizes.met + model.sizes.w + model.sizes.y
    return model.product("template", PACES["conv_forward"][0], model.forward_work(), size, slots)


def compulsory(problem: Problem, *, leaf: bool = False) -> int:
    """Bytes of device memory that no implementation of the unit avoids; ``leaf``: see :func:`predict`.

    Forward, what is read and the output, once each; in training then the output and its gradient, the input and the
    filter's gradient, and but for a ``leaf`` or a stem the filter and the input's gradient.
    """
    model = _Model(problem, Tiles(), ASSUMED)
    b = model.sizes
    forward = b.met + b.w + (b.pooled if problem.pooled else b.y) + model.residual
    if problem.direction != "training":
        return forward
    if problem.pooled:
        return forward + 2 * b.pooled + b.met + b.w
    return forward + 2 * b.y + b.met + b.w + (0 if leaf else b.x + b.w)


def compulsory_of_chain(links: Chain) -> int:
    """The same of a chain: what nothing behind the first convolution reads again is stored once."""
    models = [_Model(link, Tiles(), ASSUMED) for link in links.links]  # type: ignore[arg-type]
    outputs = sum(model.sizes.y for model in models if model.problem is not links.spatial)
    return models[0].sizes.met + sum(model.sizes.w + model.residual for model in models) + outputs


def chain(links: Chain, tile: TileConfig, constants: Constants = ASSUMED) -> tuple[PredictedLaunch, ...]:
    """The launch of a chain, whose links are problems, behind those that read a live one's batch norms."""
    launch, live = _chain(links, tile, constants), links.first.direction != "frozen"  # type: ignore[attr-defined]
    vectors = [_Model(link, Tiles(), constants) for link in links.links if live]  # type: ignore[arg-type]
    return *(model.vectors("batch_norm_stats", 36 * model.problem.co) for model in vectors), launch


def _chain(links: Chain, tile: TileConfig, constants: Constants) -> PredictedLaunch:
    """What stays in registers is neither loaded nor stored."""
    kernel = "chain_forward" if tile.box is None else "chain_box"
    models = [_Model(link, Tiles(), constants) for link in links.links]  # type: ignore[arg-type]
    first, last = models[0], models[-1]
    programs = _tiles(last.problem.m, tile.block_m) if tile.box is None else conv_box.count(links.first, tile.box)
    waves = _tiles(programs, first.gpu.multiprocessors)
    tensor = walk = tail = l2 = 0.0
    walk_slots, tail_slots = CHAIN_SLOTS[kernel][first.gpu.arch]
    for model, product in zip(models, products(links, tile), strict=True):
        work = model.work(programs, replace(tile, block_n=product.columns), product.depth)
        held = 0 if model is first else tile.block_m * product.depth * model.problem.dtype.itemsize
        at_peak = waves * 2 * work.macs / (model.peak / model.gpu.multiprocessors)
        tensor += at_peak / (model.efficiency * constants.triton_of_cudnn)
        if model.problem is links.spatial:
            walk += CHAIN_PACE.walk * at_peak * walk_slots
        else:
            tail += CHAIN_PACE.tail * at_peak * tail_slots
        l2 += programs * (work.l2_bytes - held) / (model.gpu.l2 * 1e9)
    registers = tile.block_m * accumulators(links, tile) // (32 * tile.num_warps) + SPARE_OF_CHAINS
    resident = first.resident(shared(links, tile), tile.num_warps, registers)
    generations = _tiles(programs, first.gpu.multiprocessors * resident)
    waited = CHAIN_PACE.step * generations * _tiles(links.expand.co, tile.block_n)
    hidden = tail if tail_stages(links, tile) > 2 else 0.0
    size = compulsory_of_chain(links)
    flops, memory = sum(model.flops for model in models), size / first.bandwidth
    parts = {
        "issue": walk + tail,
        "l2": CHAIN_PACE.l2 * l2,
        "memory": CHAIN_PACE.memory * memory + max(0.0, waited - hidden),
        "program": CHAIN_PACE.program * generations,
    }
    return first.added_up(kernel, flops, size, parts, memory, tensor)


def roof(flops: int, size: int, beside: Problem) -> float:
    """Seconds for so much arithmetic or so many bytes, whichever takes longer, at the nominal peaks of the GPU.

    Of the GPU, and in the number format, of the problem ``beside``.
    """
    model = _Model(beside, Tiles(), ASSUMED)
    return max(flops / model.peak, size / (model.gpu.memory * 1e9))


def library(kernel: str, flops: int, size: int, beside: Problem, constants: Constants = ASSUMED) -> PredictedLaunch:
    """A launch outside of all units; ``beside``: see :func:`roof`."""
    return _Model(beside, Tiles(), constants).call(kernel, flops, size)


def correction(launches: int, flops: int, size: int, beside: Problem, constants: Constants = ASSUMED) -> float:
    """Seconds for so many launches, so much arithmetic and so many bytes more than units are predicted to take.

    Or less, where they are negative. They are what blocks add to their units: the shortcut's addition and its gradient,
    and what is computed again; ``beside``: see :func:`roof`.
    """
    model = _Model(beside, Tiles(), constants)
    return launches * constants.launch_seconds + flops / (model.peak * constants.cudnn_of_peak) + size / model.bandwidth


def _in_one(problem: Problem) -> bool:
    """Whether one kernel convolves and pools, if the unit is fused."""
    return problem.pooled and problem.direction != "training" and conv_pool.why_not(problem) is None


class _Model:
    def __init__(self, problem: Problem, tiles: Tiles, constants: Constants, leaf: bool = False) -> None:
        self.problem, self.tiles, self.constants, self.leaf = problem, tiles, constants, leaf
        self.gpu = gpu_of(problem.arch, problem.gpu)
        e = problem.dtype.itemsize
        places = problem.n * conv_pool.pooled_size(problem.p) * conv_pool.pooled_size(problem.q) * problem.co
        depth = problem.r * problem.s * problem.ci // problem.groups
        self.flops = 2 * problem.m * problem.co * depth
        self.sizes = _Sizes(
            met=problem.pixels_read * problem.ci * e,
            x=problem.n * problem.h * problem.w * problem.ci * e,
            y=problem.m * problem.co * e,
            w=problem.co * depth * e,
            pooled=places * e,
            places=places,
        )
        self.residual = self.sizes.y if problem.residual else 0

    def fused(self) -> list[PredictedLaunch]:
        p, b = self.problem, self.sizes
        if _in_one(p):
            return self.pooled()
        forward = self.forward()
        if p.direction != "training":
            return [*forward, *self.pool()]
        wide = p.r * p.s > 1  # then the filter's gradient keeps dy for the input's
        splits = self.wgrad_config.splits
        parts = 4 * splits * b.w // p.dtype.itemsize if splits > 1 else 0  # in fp32
        dy = b.y if p.pooled else 3 * b.y if wide and not self.leaf else 2 * b.y
        wgrad = [
            self.triton(self.wgrad_kernel, self.wgrad_work(), dy + b.met + (parts or b.w)),
            *([self.call("sum_splits", 0, parts + b.w)] if parts else []),
        ]
        if p.pooled:
            return [*forward, *self.pooled_training(self.moments), *wgrad]
        vectors = self.vectors("batch_norm_stats", self.moments), self.vectors("batch_norm_coefs")
        return [*forward, *vectors, *wgrad, *([] if self.leaf else [self.dgrad()])]

    def pooled_training(self, moments: int = 0) -> list[PredictedLaunch]:
        """All but the convolution and its gradient; ``moments``: bytes of those that are merged."""
        b = self.sizes
        return [
            self.vectors("batch_norm_stats", moments),
            self.call("batch_norm_pool", 0, b.y + 2 * b.pooled + b.places),
            self.call("batch_norm_reduce", 0, 2 * b.pooled),
            self.vectors("batch_norm_coefs"),
            self.call("batch_norm_pool_backward", 0, 2 * b.y + b.pooled + b.places),
        ]

    @property
    def dgrad_kernel(self) -> str:
        """Which of :data:`ISSUE_SLOTS`."""
        return "conv_dgrad" if self.tiles.dgrad is None or self.tiles.dgrad.box is None else "dgrad_box"

    def dgrad(self) -> PredictedLaunch:
        p, b = self.problem, self.sizes
        read = (2 * b.y if p.gradient.prologue else b.y) + b.w + (b.x if p.prologue else 0)
        return self.triton(self.dgrad_kernel, self.dgrad_work(), read + b.x)

    def pooled(self) -> list[PredictedLaunch]:
        p, b, work = self.problem, self.sizes, conv_pool.work(self.problem)
        packed = work.packed * p.dtype.itemsize
        seconds_per_program = work.macs * 2 / (self.peak / self.gpu.multiprocessors)
        at_peak = _tiles(work.programs, self.gpu.multiprocessors) * seconds_per_program
        return [
            self.call("conv_pack", 0, b.x + b.w + packed),
            self.paced(
                "conv_pool",
                PACES["conv_pool"][0],
                _Work(work.programs, work.macs, 0, 0, 1, 0),
                self.flops,
                packed + b.pooled,
                tensor=at_peak / (self.efficiency * self.constants.triton_of_cudnn),
                issue=at_peak * POOL_SLOTS[self.gpu.arch],
            ),
        ]

    def pool(self) -> list[PredictedLaunch]:
        """PyTorch's, which stores where it found the largest values as integers of 8 bytes."""
        size = self.sizes.pooled + self.sizes.places * 8
        return [self.call("aten.max_pool2d_with_indices", 0, self.sizes.y + size)] if self.problem.pooled else []

    def pool_backward(self) -> list[PredictedLaunch]:
        """Its gradient, for which PyTorch reads all that it has."""
        size = self.sizes.pooled + self.sizes.places * 8 + 2 * self.sizes.y
        return [self.call("aten.max_pool2d_with_indices_backward", 0, size)] if self.problem.pooled else []

    @property
    def forward_kernel(self) -> str:
        """Which of :data:`ISSUE_SLOTS`."""
        if self.tiles.forward is not None and self.tiles.forward.box is not None:
            return "conv_box"
        if self.problem.flat:
            return "conv_forward, flat"
        return "conv_forward, prologue" if self.problem.prologue else "conv_forward"

    @property
    def wgrad_kernel(self) -> str:
        """Which of :data:`ISSUE_SLOTS`."""
        if not self.problem.flat:
            return "conv_wgrad"
        return "conv_wgrad, flat, no prologue" if self.problem.pooled else "conv_wgrad, flat"

    def forward(self) -> list[PredictedLaunch]:
        b, work = self.sizes, self.forward_work()
        behind = b.y + self.residual + self.moments
        if self.tiles.splits == 1:
            return [self.triton(self.forward_kernel, work, b.met + b.w + behind)]
        parts = self.tiles.splits * self.problem.m * self.problem.co * PART_BYTES
        kept = min(parts, int(self.gpu.l2_size * 1e6))
        l2 = (parts + behind) / (self.gpu.l2 * 1e9)
        return [
            self.triton(self.forward_kernel, work, b.met + b.w + parts, kept),
            self.longest("conv_forward_sum", 0, parts + behind, kept, l2=l2),
        ]

    @property
    def moments(self) -> int:
        """Bytes of those that the forward of training takes, of each tile's pixels or of parts of them."""
        if self.problem.direction != "training":
            return 0
        tile = self.tiles.forward or conv_forward.default_config(self.problem)
        pixels = tile.block_m if tile.box is None else tile.block_m // conv_box.parts_of(tile, bare=True)
        return _tiles(self.problem.m, pixels) * self.problem.co * MOMENTS_BYTES

    def slots(self, kernel: str) -> float:
        return self.by_filter(ISSUE_SLOTS[kernel][self.gpu.arch])

    def by_filter(self, each: tuple[_T, ...]) -> _T:
        """Of one value, or one for 1x1 and one for wider filters."""
        return each[-1] if self.problem.r * self.problem.s > 1 else each[0]

    def folded(self) -> list[PredictedLaunch]:
        """Batch norm in the filter, all in one call; it reads a residual when the product is done."""
        b = self.sizes
        name = "aten.cudnn_convolution_add_relu" if self.problem.residual else "aten.cudnn_convolution_relu"
        launch = self.cudnn(name, b.met + b.w + b.y)
        added = launch.seconds + self.residual / self.bandwidth
        return [replace(launch, bytes=launch.bytes + self.residual, seconds=added)]

    def mixed(self) -> list[PredictedLaunch]:
        p, b = self.problem, self.sizes
        if p.direction != "training":
            return [self.convolution(), self.call("batch_norm_apply", 0, 2 * b.y + self.residual), *self.pool()]
        if p.pooled:
            moments = self.call("channel_moments", 0, b.y)
            return [self.convolution(), moments, *self.pooled_training(), self.convolution_backward()]
        apply = [self.call("batch_norm_apply", 0, 2 * b.x)] if p.prologue else []
        return [
            *apply,
            self.convolution(),
            self.call("channel_moments", 0, b.y),
            self.vectors("batch_norm_stats"),
            self.vectors("batch_norm_coefs"),
            self.call("batch_norm_backward", 0, 3 * b.y),
            *apply,
            self.convolution_backward(),
            *([self.call("batch_norm_reduce", 0, 3 * b.x)] if p.prologue else []),
        ]

    def eager(self) -> list[PredictedLaunch]:
        """Between units that are not eager, the chain must be cut in front of this one: its input is materialised."""
        p, b = self.problem, self.sizes
        add = [self.call("aten.add_", 0, 2 * b.y + self.residual)] if p.residual else []
        if p.direction != "training":
            norm = self.call("aten._native_batch_norm_legit_no_training", 0, 2 * b.y)
            relu = [self.call("aten.relu_", 0, 2 * b.y)] if p.relu else []
            return [self.convolution(), norm, *add, *relu, *self.pool()]
        return [
            *([self.call("batch_norm_apply", 0, 2 * b.x)] if p.prologue else []),
            self.convolution(),
            self.call("aten._native_batch_norm_legit", 0, 2 * b.y),
            self.call("aten.relu_", 0, 2 * b.y),
            *self.pool(),
            *self.pool_backward(),
            self.call("aten.threshold_backward", 0, 3 * b.y),
            self.call("aten.native_batch_norm_backward", 0, 3 * b.y),
            self.convolution_backward(),
            *([self.call("batch_norm_reduce", 0, 3 * b.x)] if p.prologue else []),
        ]

    def convolution(self) -> PredictedLaunch:
        b = self.sizes
        return self.cudnn("aten.convolution", b.met + b.w + b.y)

    def convolution_backward(self) -> PredictedLaunch:
        """One call of two kernels, the gradients of the filter and of the input; of a leaf or stem the first alone."""
        b, name = self.sizes, "aten.convolution_backward"
        if self.leaf or self.problem.pooled:
            return self.cudnn(name, b.y + b.met + 2 * b.w)
        parts = [self.cudnn(name, size) for size in (b.y + b.met + b.w, b.y + b.w + b.x)]
        longest = max(parts, key=lambda part: part.seconds)
        size = b.y + b.met + b.x + 2 * b.w
        return PredictedLaunch(name, 2 * self.flops, size, sum(part.seconds for part in parts), longest.bound)

    def forward_work(self) -> _Work:
        p = self.problem
        tile = self.tiles.forward or conv_forward.default_config(p)
        depth = _tiles(conv_forward.steps(p, tile), tile.splits) * tile.block_k
        pixels = _tiles(p.m, tile.block_m) if tile.box is None else conv_box.count(p, tile.box)
        programs = pixels * _tiles(p.tile_channels[1], tile.block_n) * (p.groups // p.merged) * tile.splits
        work = self.work(programs, tile, depth)
        part = tile.block_m * tile.block_n * PART_BYTES if tile.splits > 1 else 0
        stored = tile.block_m * tile.block_n * (3 if p.residual else 2) // 2
        return replace(work, l2_bytes=work.l2_bytes + part, values=stored)

    def dgrad_work(self) -> _Work:
        p = self.problem
        tile = self.tiles.dgrad or conv_dgrad.default_config(p.gradient, epilogue=p.prologue)
        ci, co = p.tile_channels
        parities = p.stride[0] * p.stride[1]
        rows = p.n * _tiles(p.h, p.stride[0]) * _tiles(p.w, p.stride[1])
        pixels = parities * _tiles(rows, tile.block_m) if tile.box is None else dgrad_box.count(p, tile.box)
        depth = _tiles(p.r * p.s * _up(co, tile.block_k), parities)
        programs = pixels * _tiles(ci, tile.block_n) * (p.groups // p.merged)
        return self.work(programs, tile, depth, tensors=2 if p.gradient.prologue else 1)

    @property
    def wgrad_config(self) -> TileConfig:
        return self.tiles.wgrad or conv_wgrad.default_config(replace(self.problem, prologue=not self.problem.pooled))

    def wgrad_work(self) -> _Work:
        p = self.problem
        tile = self.wgrad_config
        depth = _up(_tiles(p.m, tile.splits), tile.block_k)
        programs = conv_wgrad.filter_tiles(p, tile) * tile.splits
        return self.work(programs, tile, depth, tensors=1 if p.pooled else 2)

    def work(self, programs: int, tile: TileConfig, depth: int, tensors: int = 1) -> _Work:
        """``tensors``: how many are loaded for the rows of the product (two behind a prologue of batch norm's)."""
        e, (rows, columns) = self.problem.dtype.itemsize, (tile.block_m, tile.block_n)
        loaded = (tensors * rows + columns) * depth * e
        read = _operand_rows(self.gpu.arch, tile) * depth * e
        pipeline = (tensors * rows + columns) * tile.block_k * tile.num_stages * e
        registers = tile.max_registers or MOST_REGISTERS
        held = min(registers, rows * columns // (32 * tile.num_warps) + SPARE_REGISTERS)
        resident = self.resident(pipeline, tile.num_warps, held)
        return _Work(programs, rows * columns * depth, loaded, loaded + read, resident, rows * columns)

    def resident(self, shared: int, num_warps: int, registers: int) -> int:
        """Programs that a multiprocessor holds, of so many bytes of shared memory, and registers of a thread."""
        return max(1, min(self.gpu.sm_shared // shared, REGISTERS // (32 * num_warps * registers)))

    def triton(self, kernel: str, work: _Work, size: int, kept: int = 0) -> PredictedLaunch:
        """``kernel``: which of :data:`ISSUE_SLOTS`."""
        name, _, _ = kernel.partition(", ")
        return self.product(name, self.by_filter(PACES[kernel]), work, size, self.slots(kernel), kept)

    def product(self, kernel: str, pace: Pace, work: _Work, size: int, slots: float, kept: int = 0) -> PredictedLaunch:
        waves = _tiles(work.programs, self.gpu.multiprocessors)
        at_peak = waves * 2 * work.macs / (self.peak / self.gpu.multiprocessors)
        return self.paced(
            kernel,
            pace,
            work,
            self.flops,
            size,
            kept,
            tensor=at_peak / (self.efficiency * self.constants.triton_of_cudnn),
            issue=at_peak * slots,
            shared=waves * work.shared_bytes / (SHARED_BYTES_PER_CLOCK * self.gpu.clock * 1e9),
            l2=work.programs * work.l2_bytes / (self.gpu.l2 * 1e9),
        )

    def paced(
        self, kernel: str, pace: Pace, work: _Work, flops: int, size: int, kept: int = 0, **resources: float
    ) -> PredictedLaunch:
        """One of our convolutions; ``resources``: what its product takes of each."""
        generations = max(1.0, work.programs / (self.gpu.multiprocessors * work.resident))
        longest, product = max(resources.items(), key=lambda item: item[1])
        memory = (size - kept) / self.bandwidth
        parts = {
            longest: pace.product * product,
            "memory": pace.memory * memory,
            "program": pace.program * generations * (1 + work.values / PACED),
        }
        return self.added_up(kernel, flops, size, parts, memory, resources["tensor"])

    def added_up(
        self, kernel: str, flops: int, size: int, parts: dict[str, float], memory: float, tensor: float
    ) -> PredictedLaunch:
        """A launch whose ``parts`` do not hide each other; none is faster than device memory or the tensor cores."""
        bound = max(parts, key=lambda part: parts[part])
        floors = (memory, "memory"), (tensor, "tensor")
        return self.launch(kernel, flops, size, *max((sum(parts.values()), bound), *floors))

    def cudnn(self, kernel: str, size: int) -> PredictedLaunch:
        p, (rows, columns) = self.problem, CUDNN_TILE
        if p.groups == 1:
            macs = _up(p.m, rows) * _up(p.co, columns) * p.r * p.s * _up(p.ci, 8)
        else:
            ci, co = (max(width // p.groups, CUDNN_GROUP_WIDTH) for width in (p.ci, p.co))
            macs = _up(p.m, rows) * p.groups * co * p.r * p.s * ci
        padded = CUDNN_PADDED if p.groups == 1 and p.dtype.itemsize == 2 and p.ci % 8 else 1.0
        launch = self.longest(kernel, self.flops, size, tensor=padded * 2 * macs / (self.peak * self.efficiency))
        return replace(launch, seconds=launch.seconds + CUDNN_SECONDS)

    def call(self, kernel: str, flops: int, size: int) -> PredictedLaunch:
        """Of a kernel that streams, or of PyTorch's."""
        gap = self.constants.launch_seconds
        kernels, moved = STREAMS.get(kernel, (1, 1.0))
        tensor = flops / (self.peak * self.constants.cudnn_of_peak)
        launch = self.longest(kernel, flops, int(size * moved), tensor=tensor)
        return replace(launch, bytes=size, seconds=launch.seconds + (kernels - 1) * gap)

    def vectors(self, kernel: str, size: int = 0) -> PredictedLaunch:
        return self.longest(kernel, 0, size, latency=VECTORS_SECONDS)

    def longest(self, kernel: str, flops: int, size: int, kept: int = 0, **resources: float) -> PredictedLaunch:
        """``kept``: of the ``size``, what L2 keeps from one launch to the next."""
        resources["memory"] = (size - kept) / self.bandwidth
        bound, seconds = max(resources.items(), key=lambda item: item[1])
        return self.launch(kernel, flops, size, seconds, bound)

    def launch(self, kernel: str, flops: int, size: int, seconds: float, bound: str) -> PredictedLaunch:
        gap = self.constants.launch_seconds
        return PredictedLaunch(kernel, flops, size, seconds + gap, bound if seconds > gap else "launch")

    @property
    def efficiency(self) -> float:
        """Of the peak, what cuDNN reaches at the unit's width."""
        p, (rows, columns), widest = self.problem, CUDNN_TILE, self.constants.cudnn_of_peak
        if p.groups > 1 or p.number_format == "float32":
            return widest
        if (measured := self.constants.cudnn(p.co)) is not None:
            return measured
        if self.gpu.arch not in (90, 100):
            return widest
        filled = min(_up(p.co, columns), CUDNN_FULL_COLUMNS)
        reuse = filled / (rows + filled)
        return widest * reuse * (rows + CUDNN_FULL_COLUMNS) / CUDNN_FULL_COLUMNS

    @property
    def bandwidth(self) -> float:
        """Bytes per second of device memory that a kernel which streams reaches."""
        return self.gpu.memory * 1e9 * self.constants.memory_of_peak

    @property
    def peak(self) -> float:
        """FLOP/s of the tensor cores in the unit's number format."""
        number_format = self.problem.number_format
        return self.gpu.tensor[number_format] * 1e12 * self.constants.tensor_of_peak[number_format]


def _operand_rows(arch: int, tile: TileConfig) -> int:
    """Rows and columns of both factors that the products of a tile read from shared memory, repetitions included.

    wgmma (sm_90) takes 64 rows and all columns at a time, tcgen05 (sm_100) the tile. Else each warp reads what its part
    of the tile needs; the parts lie as Triton lays them (``warpsPerTileV2``): the longer side is halved first.
    """
    rows, columns = (tile.block_m, tile.block_n) if tile.box is None else (tile.block_n, tile.block_m)
    if arch == 100 and rows >= 64:
        return rows + columns
    if arch == 90 and rows >= 64:
        return rows + rows // 64 * columns
    down = across = 1
    while down * across < tile.num_warps:
        if rows // (16 * down) >= columns // (16 * across) and 16 * down < rows:
            down *= 2
        else:
            across *= 2
    return rows * across + columns * down


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _up(size: int, block: int) -> int:
    return _tiles(size, block) * block
