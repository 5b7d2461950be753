"""How long a unit should take on a GPU: a model of every launch, from counts and published peaks. Not a measurement.

A launch takes as long as its scarcest resource: tensor cores, instruction slots, shared memory, L2 or device memory
(the roofline of Williams, Waterman and Patterson 2009). Tiles and waves that are not full lower the roof.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from resnet_fused.kernels import conv_box, conv_dgrad, conv_forward, conv_wgrad
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import TileConfig
from resnet_fused.plan.problem import Problem, Tiles, Way

CUDNN_OF_PEAK = 0.70
"""Of the tensor cores' dense peak, what cuDNN's convolutions reach where arithmetic bounds a wide tile."""
TRITON_OF_CUDNN = 0.80
"""Of cuDNN's speed, what convolutions in Triton reach (PyTorch forum, thread 201550: "always ~20% slower")."""
MEMORY_OF_PEAK = 0.90
"""Of the nominal bandwidth, what a kernel that streams reaches."""
LAUNCH_SECONDS = 2e-6
"""From the end of a kernel to the start of the next, with its ramp up and down."""
SHARED_BYTES_PER_CLOCK = 128
"""Of a multiprocessor's shared memory (CUDA C++ Programming Guide: 32 banks of 4 bytes)."""
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
# product. The filter's gradient has both prologues; the input's has one where the filter is 1x1.
ISSUE_SLOTS = {
    "conv_forward": {
        **{80: (0.342, 0.293), 86: (0.171, 0.147), 89: (0.085, 0.074)},
        **{90: (0.23, 0.295), 100: (0.898, 1.039), 120: (0.067, 0.07)},
    },
    "conv_box": {90: (0.108, 0.117), 100: (0.201, 0.217), 120: (0.052, 0.054)},
    "conv_forward, prologue": {
        **{80: (1.143, 1.357), 86: (0.562, 0.68), 89: (0.281, 0.34)},
        **{90: (1.371, 2.738), 100: (3.453, 5.953), 120: (0.28, 0.334)},
    },
    "conv_wgrad": {
        **{80: (1.383, 1.727), 86: (1.307, 1.553), 89: (0.653, 0.776)},
        **{90: (1.379, 2.711), 100: (2.531, 5.656), 120: (0.623, 0.773)},
    },
    "conv_dgrad": {
        **{80: (1.812, 0.322), 86: (1.049, 0.213), 89: (0.524, 0.106)},
        **{90: (1.312, 0.457), 100: (2.445, 0.945), 120: (0.493, 0.105)},
    },
}

PREDICTED: tuple[Way, ...] = ("fused", "mixed", "eager")


@dataclass(frozen=True)
class PredictedLaunch:
    """One launch as the model sees it. ``bound``: tensor, issue, shared, l2 or memory; launch if all are shorter."""

    kernel: str
    flops: int
    bytes: int
    seconds: float
    bound: str


@dataclass(frozen=True)
class _Work:
    """A tiled product: how many programs, and what each executes and asks of L2 and of shared memory, padding included.

    ``shared_bytes``: what its loads write there, and what its products read.
    """

    programs: int
    macs: int
    l2_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a unit's tensors: the input, as far as the filter meets it, and whole; the output; the filter."""

    met: int
    x: int
    y: int
    w: int


def predict(problem: Problem, implementation: Way, tiles: Tiles) -> tuple[PredictedLaunch, ...]:
    """Every launch of the unit, in order: of its forward, and in training of its backward too."""
    model = _Model(problem, tiles)
    if implementation == "fused":
        return tuple(model.fused())
    return tuple(model.mixed() if implementation == "mixed" else model.eager())


def best_tiles(problem: Problem) -> Tiles:
    """Those with which a fused unit's forward is predicted to be fastest: the kernel's own, or one of boxes.

    Where neither issuing bounds, the one that issues less.
    """
    candidates = [Tiles(), *(Tiles(forward=tile) for tile in conv_box.tiles(problem))]
    models = [_Model(problem, tiles) for tiles in candidates]
    return min(models, key=lambda model: (model.forward().seconds, model.slots(model.forward_kernel))).tiles


def compare(problem: Problem, tiles: Tiles) -> tuple[tuple[Way, float], ...]:
    """Every implementation with its predicted seconds, fastest first; ``tiles`` are those of the fused one."""
    seconds = {way: sum(launch.seconds for launch in predict(problem, way, tiles)) for way in PREDICTED}
    return tuple(sorted(seconds.items(), key=lambda item: item[1]))


def template(problem: Problem, tile: TileConfig, slots: float) -> PredictedLaunch:
    """The convolution alone of a fused unit's forward, as any kernel in Triton with ``tile`` would run it.

    ``slots``: issue slots per tensor cycle of its main loop.
    """
    model = _Model(problem, Tiles(forward=tile))
    size = model.sizes.met + model.sizes.w + model.sizes.y
    return model.product("template", model.forward_work(), size, slots)


def compulsory(problem: Problem) -> int:
    """Bytes of device memory that no implementation of the unit avoids.

    Forward, what is read and the output, once each; in training then the output and its gradient, input and filter,
    and the gradients of these two.
    """
    model = _Model(problem, Tiles())
    b = model.sizes
    forward = b.met + b.w + b.y + model.residual
    return forward if problem.direction != "training" else forward + 2 * b.y + b.met + b.x + 2 * b.w


def roof(flops: int, size: int, beside: Problem) -> float:
    """Seconds for so much arithmetic or so many bytes, whichever takes longer, at the nominal peaks of the GPU.

    Of the GPU, and in the number format, of the problem ``beside``.
    """
    model = _Model(beside, Tiles())
    return max(flops / model.peak, size / (model.gpu.memory * 1e9))


def library(kernel: str, flops: int, size: int, beside: Problem) -> PredictedLaunch:
    """A call of PyTorch's outside of all units; ``beside``: see :func:`roof`."""
    model = _Model(beside, Tiles())
    return model.longest(kernel, flops, size, tensor=flops / (model.peak * CUDNN_OF_PEAK))


class _Model:
    def __init__(self, problem: Problem, tiles: Tiles) -> None:
        self.problem, self.tiles = problem, tiles
        self.gpu = gpu_of(problem.arch, problem.gpu)
        e = problem.dtype.itemsize
        depth = problem.r * problem.s * problem.ci // problem.groups
        self.flops = 2 * problem.m * problem.co * depth
        self.sizes = _Sizes(
            met=problem.pixels_read * problem.ci * e,
            x=problem.n * problem.h * problem.w * problem.ci * e,
            y=problem.m * problem.co * e,
            w=problem.co * depth * e,
        )
        self.residual = self.sizes.y if problem.residual else 0

    def fused(self) -> list[PredictedLaunch]:
        p, b = self.problem, self.sizes
        forward = self.forward()
        if p.direction != "training":
            return [forward]
        wide = p.r * p.s > 1  # then the filter's gradient keeps dy for the input's
        wgrad = 2 * b.y + b.met + b.w + (b.y if wide else 0)
        dgrad = (b.y if wide else 2 * b.y) + b.w + b.x + (b.x if p.prologue else 0)
        return [
            forward,
            self.vectors("batch_norm_stats"),
            self.vectors("batch_norm_coefs"),
            self.triton("conv_wgrad", self.wgrad_work(), wgrad),
            self.triton("conv_dgrad", self.dgrad_work(not wide), dgrad),
        ]

    @property
    def forward_kernel(self) -> str:
        """Which of :data:`ISSUE_SLOTS`."""
        if self.tiles.forward is not None and self.tiles.forward.box is not None:
            return "conv_box"
        return "conv_forward, prologue" if self.problem.prologue else "conv_forward"

    def forward(self) -> PredictedLaunch:
        b = self.sizes
        return self.triton(self.forward_kernel, self.forward_work(), b.met + b.w + b.y + self.residual)

    def slots(self, kernel: str) -> float:
        return ISSUE_SLOTS[kernel][self.gpu.arch][self.problem.r * self.problem.s > 1]

    def mixed(self) -> list[PredictedLaunch]:
        p, b = self.problem, self.sizes
        conv = self.cudnn("aten.convolution", b.met + b.w + b.y)
        if p.direction != "training":
            return [conv, self.stream("batch_norm_apply", 2 * b.y + self.residual)]
        apply = [self.stream("batch_norm_apply", 2 * b.x)] if p.prologue else []
        return [
            *apply,
            conv,
            self.stream("channel_moments", b.y),
            self.vectors("batch_norm_stats"),
            self.vectors("batch_norm_coefs"),
            self.stream("batch_norm_backward", 3 * b.y),
            *apply,
            self.cudnn("aten.convolution_backward (filter)", b.y + b.met + b.w),
            self.cudnn("aten.convolution_backward (input)", b.y + b.w + b.x),
            *([self.stream("batch_norm_reduce", 3 * b.x)] if p.prologue else []),
        ]

    def eager(self) -> list[PredictedLaunch]:
        """Between units that are not eager, the chain must be cut in front of this one: its input is materialised."""
        p, b = self.problem, self.sizes
        conv = self.cudnn("aten.convolution", b.met + b.w + b.y)
        add = [self.stream("aten.add_", 2 * b.y + self.residual)] if p.residual else []
        if p.direction != "training":
            return [conv, self.stream("aten.batch_norm", 2 * b.y), *add, self.stream("aten.relu_", 2 * b.y)]
        return [
            *([self.stream("batch_norm_apply", 2 * b.x)] if p.prologue else []),
            conv,
            self.stream("aten.batch_norm (statistics)", b.y),
            self.stream("aten.batch_norm", 2 * b.y),
            self.stream("aten.relu_", 2 * b.y),
            self.stream("aten.threshold_backward", 3 * b.y),
            self.stream("aten.batch_norm_backward (sums)", 2 * b.y),
            self.stream("aten.batch_norm_backward", 3 * b.y),
            self.cudnn("aten.convolution_backward (filter)", b.y + b.met + b.w),
            self.cudnn("aten.convolution_backward (input)", b.y + b.w + b.x),
            *([self.stream("batch_norm_reduce", 3 * b.x)] if p.prologue else []),
        ]

    def forward_work(self) -> _Work:
        p = self.problem
        tile = self.tiles.forward or conv_forward.default_config(p)
        ci, co = p.tile_channels
        taps = p.r * p.s
        depth = _up(taps * ci, tile.block_k) if p.flat else taps * _up(ci, tile.block_k)
        pixels = _tiles(p.m, tile.block_m) if tile.box is None else conv_box.count(p, tile.box)
        programs = pixels * _tiles(co, tile.block_n) * (p.groups // p.merged)
        return self.work(programs, tile, depth)

    def dgrad_work(self, prologue: bool) -> _Work:
        p = self.problem
        tile = self.tiles.dgrad or conv_dgrad.default_config(replace(p, prologue=prologue), epilogue=p.prologue)
        ci, co = p.tile_channels
        parities = p.stride[0] * p.stride[1]
        rows = p.n * _tiles(p.h, p.stride[0]) * _tiles(p.w, p.stride[1])
        depth = _tiles(p.r * p.s * _up(co, tile.block_k), parities)
        programs = parities * _tiles(rows, tile.block_m) * _tiles(ci, tile.block_n) * (p.groups // p.merged)
        return self.work(programs, tile, depth, tensors=2 if prologue else 1)

    def wgrad_work(self) -> _Work:
        p = self.problem
        chosen = self.tiles.wgrad or conv_wgrad.default_config(replace(p, prologue=True))
        tile = chosen.tile
        depth = _up(_tiles(p.m, chosen.splits), tile.block_k)
        programs = conv_wgrad.filter_tiles(p, tile) * chosen.splits
        return self.work(programs, tile, depth, tensors=2)

    def work(self, programs: int, tile: TileConfig, depth: int, tensors: int = 1) -> _Work:
        """``tensors``: how many are loaded for the rows of the product (two behind a prologue of batch norm's)."""
        e, (rows, columns) = self.problem.dtype.itemsize, (tile.block_m, tile.block_n)
        loaded = (tensors * rows + columns) * depth * e
        read = _operand_rows(self.gpu.arch, tile) * depth * e
        return _Work(programs, rows * columns * depth, loaded, loaded + read)

    def triton(self, kernel: str, work: _Work, size: int) -> PredictedLaunch:
        """``kernel``: which of :data:`ISSUE_SLOTS`."""
        return self.product(kernel.removesuffix(", prologue"), work, size, self.slots(kernel))

    def product(self, kernel: str, work: _Work, size: int, slots: float) -> PredictedLaunch:
        waves = _tiles(work.programs, self.gpu.multiprocessors)
        at_peak = waves * 2 * work.macs / (self.peak / self.gpu.multiprocessors)
        return self.longest(
            kernel,
            self.flops,
            size,
            tensor=at_peak / (self.efficiency * TRITON_OF_CUDNN),
            issue=at_peak * slots,
            shared=waves * work.shared_bytes / (SHARED_BYTES_PER_CLOCK * self.gpu.clock * 1e9),
            l2=work.programs * work.l2_bytes / (self.gpu.l2 * 1e9),
        )

    def cudnn(self, kernel: str, size: int) -> PredictedLaunch:
        p, (rows, columns) = self.problem, CUDNN_TILE
        if p.groups == 1:
            macs = _up(p.m, rows) * _up(p.co, columns) * p.r * p.s * _up(p.ci, 8)
        else:
            ci, co = (max(width // p.groups, CUDNN_GROUP_WIDTH) for width in (p.ci, p.co))
            macs = _up(p.m, rows) * p.groups * co * p.r * p.s * ci
        return self.longest(kernel, self.flops, size, tensor=2 * macs / (self.peak * self.efficiency))

    def stream(self, kernel: str, size: int) -> PredictedLaunch:
        return self.longest(kernel, 0, size)

    def vectors(self, kernel: str) -> PredictedLaunch:
        return self.longest(kernel, 0, 0)

    def longest(self, kernel: str, flops: int, size: int, **resources: float) -> PredictedLaunch:
        resources["memory"] = size / (self.gpu.memory * 1e9 * MEMORY_OF_PEAK)
        bound, seconds = max(resources.items(), key=lambda item: item[1])
        return PredictedLaunch(
            kernel, flops, size, seconds + LAUNCH_SECONDS, bound if seconds > LAUNCH_SECONDS else "launch"
        )

    @property
    def efficiency(self) -> float:
        """Of the peak, what cuDNN reaches at the unit's width."""
        p, (rows, columns) = self.problem, CUDNN_TILE
        if p.groups > 1 or self.gpu.arch not in (90, 100) or p.number_format == "float32":
            return CUDNN_OF_PEAK
        filled = min(_up(p.co, columns), CUDNN_FULL_COLUMNS)
        reuse = filled / (rows + filled)
        return CUDNN_OF_PEAK * reuse * (rows + CUDNN_FULL_COLUMNS) / CUDNN_FULL_COLUMNS

    @property
    def peak(self) -> float:
        """FLOP/s of the tensor cores in the unit's number format."""
        return self.gpu.tensor[self.problem.number_format] * 1e12


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
