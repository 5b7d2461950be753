"""Every kernel that the models can launch, and those of odd units; found without a GPU and without compiling it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from hashlib import sha256
from itertools import islice, product
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

import resnet_fused
from benchmarks import shapes
from resnet_fused import functional
from resnet_fused.commands.tune_trial import Candidate, rehearse
from resnet_fused.kernels import chain_forward, conv_box, dgrad_box
from resnet_fused.kernels.activation import RELU
from resnet_fused.kernels.chain import Chain, Link
from resnet_fused.kernels.chain_forward import default_config
from resnet_fused.kernels.conv import ConvProblem, Geometry
from resnet_fused.kernels.conv_forward import conv_forward, conv_forward_moments, split_tiles, wide_tiles
from resnet_fused.kernels.conv_forward import default_config as conv_tile
from resnet_fused.kernels.epilogue import Norm, Prologue, Residual
from resnet_fused.kernels.launch import Call, TileConfig, dry_run, observe
from resnet_fused.plan.problem import Problem, Tiles
from tests import zoo

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
MODELS = ["resnet20", "resnet18", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2"]
BATCHES = (1, 8, 32, 256)
"""From one image to as many as leave no multiprocessor idle: tiles follow the number of pixels."""
TRAINED = ["resnet20", "resnet18", "resnet50", "resnext50_32x4d"]
ACTIVATIONS = [nn.SiLU(), nn.Hardtanh(-2.0, 3.0)]
"""In place of ReLU: one whose derivative takes the value in front of it, and one whose output decides it."""
DRAWN = 4
"""Units of odd sizes for each architecture."""
CHAINS = ("chain_forward_kernel", "chain_box_kernel")


def merges(form: Any) -> bool:
    """Whether groups share a tile of a kernel of this ``form``, which says so or how many."""
    merged = getattr(form, "MERGED", False)
    return merged if isinstance(merged, bool) else merged > 1


class Kernel(NamedTuple):
    """One that Triton compiles apart from all others: for an architecture, and as a call specialises it.

    ``odd``: only a unit of odd sizes launches it. ``modelled``: what of :data:`roofline.ISSUE_SLOTS` is counted in it.
    """

    arch: int
    number_format: str
    call: Call
    odd: bool = False
    modelled: tuple[str, int] | None = None

    @property
    def name(self) -> str:
        return self.call.kernel.__name__

    @property
    def narrow(self) -> str:
        """Why its main loop may load less than 16 bytes at a time from global memory; "" where it must not."""
        if self.name == "conv_pool_kernel":
            return "the last pixel of a run is masked, and vectors are loaded among the products of its unrolled loop"
        form, widths = self.call.arguments.get("form"), self.call.arguments.get("widths")
        if form is None:
            return ""
        if self.name in CHAINS:
            if self.arch == 100:
                return "a product leaves whole rows to a thread, which then reads whole vectors of batch norm"
            if triton.__version__.startswith("3.6"):
                return "Triton 3.6 does not see how far a chunk of channels is contiguous"
            return "" if form.EVEN else "masked channels"
        if getattr(form, "FLAT", False):
            return "few input channels: a chunk of K runs across taps"
        if self.call.config.box is not None:
            single = form.ONE_CHUNK and form.R * form.S == 1
            return "vectors are loaded among the products, which are in no loop" if single else ""
        if merges(form):
            return "merged groups: narrower than a load"
        if form.VECTOR > 1 and triton.__version__.startswith("3.6"):
            return "Triton 3.6 does not see how far a mask of channels is constant"
        elements = 16 // DTYPES[self.number_format].itemsize
        return "" if gcd(elements, *widths) == elements else "channels that 16 bytes do not divide"

    @property
    def serial(self) -> str:
        """Why each of its products may wait on sm_90 for the one before; "" where none must."""
        eight = triton.__version__.startswith("3.6.") and self.call.config.num_warps == 8
        if self.name in CHAINS:
            masked = self.name == "chain_box_kernel" and not self.call.arguments["form"].EVEN
            return "Triton 3.6 writes accumulators that are masked while products run" if masked and eight else ""
        if self.prologue:
            return "a factor that is transformed stands in registers, which are written while products run"
        if merges(self.call.arguments.get("form")):
            return "merged groups: a filter that is masked by the element comes through registers"
        if self.name == "conv_box_kernel" and eight:
            return "Triton 3.6 writes accumulators of eight warps while products run"
        return ""

    @property
    def prologue(self) -> bool:
        """Whether it transforms a factor on the way into its product."""
        vectors = ("scale", "coefs", "stats", "expand_affine")
        return any(self.call.arguments.get(f"{name}_ptr") is not None for name in vectors)

    @property
    def key(self) -> str:
        """The same in every process: architecture, name, and a digest of what the call specialises."""
        special = self.call.specialization(), [fields(value) for value in self.call.arguments.values()]
        return f"sm_{self.arch} {self.name} {sha256(repr(special).encode()).hexdigest()[:16]}"


def fields(value: Any) -> Any:
    """The names by which a kernel reads a named tuple, which Triton's specialisation leaves out; None for others."""
    return (getattr(value, "_fields", None), [fields(v) for v in value]) if isinstance(value, tuple) else None


def launched(arch: int) -> dict[str, Kernel]:
    """By key, what the models launch on ``arch`` in inference, in training those of TRAINED, and some odd units.

    fp16 differs from bf16 in the name of an instruction only, so that one GPU of each kind of tensor core will do. So
    it will for fp32 in training, with tiles that are smaller than those of 16 bits everywhere.
    """
    found: dict[str, Kernel] = {}
    for kernel in _launched(arch):
        found.setdefault(kernel.key, kernel)  # one of TF32 and fp32 goes by the former, of which more is asked
    return found


def _launched(arch: int) -> Iterator[Kernel]:
    yield from _modelled(arch)
    each_kind = arch in (80, 90)
    # Of a tile with few columns, a thread holds one row; 8 divides 24 and 40, 16 does not.
    for n, ci, co, taps in ((2, 16, 16, 3), (32, 24, 40, 3), (32, 40, 24, 1)):
        sizes = n, 28, 28, ci, co, taps, taps, (1, 1), (taps // 2, taps // 2), (1, 1), 1
        unit = Problem(*sizes, torch.bfloat16, False, True, arch, "training", residual=False)
        for way in ("fused", "mixed"):
            yield from (Kernel(arch, "bfloat16", call) for call in rehearse(unit, Candidate(way))[0])
    for name in DTYPES:
        if name != "float16" or each_kind:
            yield from _calls(arch, name, MODELS, training=False)
            yield from _tried(arch, name)
        if name != "float16" or each_kind:
            yield from _chained(arch, name)
        if name == "bfloat16":
            yield from _calls(arch, name, TRAINED if each_kind else TRAINED[:3], training=True)
        elif name != "float16" and each_kind:
            yield from _calls(arch, name, TRAINED[2:3], training=True)
    for activation in ACTIVATIONS:
        yield from _activated(arch, activation)
    with torch.device("meta"):
        bottlenecks = resnet_fused.PreActBottleneck(256, 256), resnet_fused.PreActBottleneck(256, 512, 2)
        basic = resnet_fused.PreActBlock(64, 64), resnet_fused.PreActBlock(64, 128, 2)
    for blocks, channels in ((bottlenecks, 256), (basic, 64)):
        yield from _of_blocks(arch, blocks, channels)
        # In a row the first one takes the moments of what it writes.
        yield from _of_blocks(arch, [resnet_fused.fuse(nn.Sequential(*blocks))], channels)
    yield from _gated(arch)
    draw = random.Random(arch)
    for _ in range(DRAWN):
        yield from _drawn(arch, draw)


def _modelled(arch: int) -> Iterator[Kernel]:
    """Of a unit of 256 channels and as many pixels as fill every GPU, with a prologue and without one."""
    for taps, prologue in product((1, 3), (True, False)):
        sizes = 256, 14, 14, 256, 256, taps, taps, (1, 1), (taps // 2, taps // 2), (1, 1), 1
        unit = Problem(*sizes, torch.bfloat16, False, prologue, arch, "training", residual=False)
        for call in rehearse(unit, Candidate("fused"))[0]:
            name = call.kernel.__name__.removesuffix("_kernel")
            if name == "conv_forward":
                yield Kernel(arch, "bfloat16", call, modelled=(name + ", prologue" * prologue, taps))
            elif name in ("conv_dgrad", "conv_wgrad") and prologue:
                yield Kernel(arch, "bfloat16", call, modelled=(name, taps))
        # Every tile that the plan or the tuner may choose.
        for tile in (*conv_box.tiles(unit), *wide_tiles(unit)):
            boxed, *_ = rehearse(unit, Candidate("fused", Tiles(forward=tile)))[0]
            square = (tile.block_m, tile.block_n) == (128, 128)
            yield Kernel(arch, "bfloat16", boxed, modelled=("conv_box", taps) if square else None)
        for tile in dgrad_box.tiles(unit.gradient):
            boxed = rehearse(unit, Candidate("fused", Tiles(dgrad=tile)))[0][-1]
            square = (tile.block_m, tile.block_n) == (128, 128)
            yield Kernel(arch, "bfloat16", boxed, modelled=("dgrad_box", taps) if square and prologue else None)
    yield from _first_layer(arch)


def _first_layer(arch: int) -> Iterator[Kernel]:
    """Of a network: so few channels that a chunk of K runs across taps. Nobody wants the gradient of its input."""
    with torch.device("meta"):
        conv = nn.Conv2d(3, 64, 7, 2, 3, bias=False, dtype=torch.bfloat16)
        x = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16)
    for call in _step(arch, conv, x):
        name = call.kernel.__name__.removesuffix("_kernel")
        if name in ("conv_forward", "conv_wgrad"):
            yield Kernel(arch, "bfloat16", call, modelled=(f"{name}, flat", 7))
    for call in _step(arch, conv, x, nn.MaxPool2d(3, 2, 1)):
        wgrad = call.kernel.__name__ == "conv_wgrad_kernel"
        yield Kernel(arch, "bfloat16", call, modelled=("conv_wgrad, flat, no prologue", 7) if wgrad else None)


def _step(arch: int, conv: nn.Conv2d, x: Tensor, pool: nn.MaxPool2d | None = None) -> list[Call]:
    """What a training step of one unit launches, with the pool behind it if there is one."""
    with torch.device("meta"):
        conv, bn = conv.to(memory_format=torch.channels_last), nn.BatchNorm2d(conv.out_channels)
    calls: list[Call] = []
    with resnet_fused.implementation("triton"), dry_run(arch), observe(calls.append):
        z = functional.conv_bn_act(x, conv, bn) if pool is None else functional.conv_bn_act_pool(x, conv, bn, pool)
        z.sum().backward()
    return calls


def _tried(arch: int, number_format: str) -> Iterator[Kernel]:
    """What the plan or the tuner may take for the default tiles: wide ones, and sums of few images that are split.

    In how many parts, no code depends on.
    """
    torch.backends.cudnn.allow_tf32 = number_format == "tf32"
    layers = dict.fromkeys(layer for name in MODELS for layer in shapes.layers(name))
    for batch, layer, residual in product(BATCHES, layers, (False, True)):
        unit = Problem(
            *(batch, layer.height, layer.width, layer.in_channels, layer.out_channels, layer.kernel, layer.kernel),
            *((layer.stride,) * 2, (layer.padding,) * 2, (1, 1), layer.groups),
            *(DTYPES[number_format], number_format == "tf32", False, arch, "frozen", residual),
        )
        for tile in (*islice(split_tiles(unit), 1), *wide_tiles(unit)):
            calls, _ = rehearse(unit, Candidate("fused", Tiles(forward=tile)))
            yield from (Kernel(arch, number_format, call) for call in calls)


CHAINED = {
    "resnet50": [
        (64, 64, 256, 64),
        (64, 64, 256, 128),
        (128, 128, 512, 128),
        (128, 128, 512, 256),
        (256, 256, 1024, 256),
    ],
    "wide_resnet50_2": [(128, 128, 256, 128), (128, 128, 256, 256), (256, 256, 512, 256)],
    "masked": [(40, 48, 144, 24), (96, 80, 272, 40)],
}
"""Channels of the 3x3's input and output, of z, and of the next block's first output. The models' 1x1 are ResNeXt's."""


def _chained(arch: int, number_format: str) -> Iterator[Kernel]:
    """What the plan may take of convolutions that follow each other in a frozen model: of three, or of two."""
    for units in CHAINED.values():
        for widths in units:
            spatial, expand, reduce = chain = chain_of(arch, number_format, widths)
            for part in (chain, Chain(None, expand, reduce), Chain(spatial, expand, None)):
                # In fp32 none is planned, but the self-test launches some of at most 128 channels.
                own = [default_config(part)] if number_format == "float32" and expand.ci <= 128 else []
                for tile in (*chain_forward.tiles(part), *own):
                    yield Kernel(arch, number_format, chain_call(part, tile))


def chain_of(arch: int, number_format: str, widths: tuple[int, int, int, int]) -> Chain:
    """Three convolutions; ``widths``: as in :data:`CHAINED`."""
    ci, middle, wide, following = widths
    same = {"dilation": (1, 1), "groups": 1, "dtype": DTYPES[number_format], "tf32": number_format == "tf32"}
    unit = partial(ConvProblem, 256, 14, 14, **same, prologue=False, arch=arch)
    spatial = unit(ci, middle, 3, 3, (1, 1), (1, 1))
    return Chain(spatial, *(unit(*of, 1, 1, (1, 1), (0, 0)) for of in ((middle, wide), (wide, following))))


def chain_call(chain: Chain, tile: TileConfig) -> Call:
    """The launch of ``chain`` on tensors without data."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=first.dtype, device="meta").to(memory_format=torch.channels_last)

    def link(p: ConvProblem | None) -> Link | None:
        return p and Link(empty(p.co, p.ci, p.r, p.s), torch.empty(2, p.co, device="meta"))

    first, expand, calls = chain.first, chain.expand, []
    residual = Residual(empty(expand.n, expand.co, expand.p, expand.q))
    with dry_run(first.arch), observe(calls.append):
        chain_forward.chain_forward(
            empty(first.n, first.ci, first.h, first.w),
            *map(link, chain),
            geometry=first.geometry if chain.spatial else Geometry(),
            residual=residual,
            tf32=first.tf32,
            config=tile,
        )
    return calls[0]


def _gated(arch: int) -> Iterator[Kernel]:
    """Of blocks with squeeze and excitation, and of a last convolution of 3x3; of the last stage's images too."""
    with torch.device("meta"):
        blocks = zoo.Gated(256, 256), zoo.Gated(256, 512, 2), zoo.Gated(256, 256, act=nn.SiLU())
        late = (zoo.Gated(2048, 2048),)
    for block in (*blocks, *late):
        resnet_fused.fuse(block)
    yield from _of_blocks(arch, blocks, 256)
    yield from _of_blocks(arch, late, 2048, side=7)
    for name, (ci, taps), prologue in product(DTYPES, ((64, 1), (64, 3), (512, 1), (512, 3)), (False, True)):
        if name == "float16" and arch not in (80, 90):
            continue
        side = 56 if ci == 64 else 7
        sizes = 32, side, side, ci, 4 * ci if taps == 1 else ci, taps, taps, (1, 1), (taps // 2,) * 2, (1, 1), 1
        unit = ConvProblem(*sizes, DTYPES[name], name == "tf32", prologue, arch)
        for tile in (None, *conv_box.tiles(unit)):
            yield from (Kernel(arch, name, call) for call in _of_images(unit, tile))


def _of_images(unit: ConvProblem, tile: TileConfig | None) -> list[Call]:
    """Launches of a convolution whose tiles are of single images: for a squeeze, behind a norm too, and with a gate."""
    calls: list[Call] = []
    with torch.device("meta"):
        x = torch.empty(unit.n, unit.ci, unit.h, unit.w, dtype=unit.dtype).to(memory_format=torch.channels_last)
        w = torch.empty(unit.co, unit.ci, unit.r, unit.s, dtype=unit.dtype).to(memory_format=torch.channels_last)
        prologue = Prologue(torch.empty(unit.ci), torch.empty(unit.ci)) if unit.prologue else None
        options: dict[str, Any] = {"geometry": Geometry(unit.stride, unit.padding), "tf32": unit.tf32}
        norm, gate = Norm(*torch.empty(4, unit.co), 1e-5), torch.empty(unit.n, unit.co, dtype=unit.dtype)
        with dry_run(unit.arch), observe(calls.append):
            conv_forward_moments(x, w, prologue=prologue, by_image=True, config=tile, **options)
            if unit.prologue:
                return calls
            options |= {"norm": norm, "activation": RELU}
            y, _ = conv_forward_moments(x, w, by_image=True, config=tile, **options)
            if unit.r == 1:
                options |= {"gate": gate, "residual": Residual(y)}
                conv_forward(x, w, config=tile, **options)
                if tile is None and unit.ci > 64:
                    conv_forward(x, w, config=replace(conv_tile(unit), splits=2), **options)
    return calls


def _activated(arch: int, activation: nn.Module) -> Iterator[Kernel]:
    """Of two bottlenecks, one with a projection."""
    with torch.device("meta"):
        projection = nn.Sequential(nn.Conv2d(256, 512, 1, 2, bias=False), nn.BatchNorm2d(512))
        blocks = resnet_fused.Bottleneck(256, 64), resnet_fused.Bottleneck(256, 128, 2, projection)
    for block in blocks:
        block.relu = activation
    return _of_blocks(arch, blocks, 256)


def _of_blocks(arch: int, blocks: Iterable[nn.Module], channels: int, side: int = 56) -> Iterator[Kernel]:
    """Of blocks on an input of so many channels, in inference and in a training step, on every road."""
    calls: list[Call] = []
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    for block, road, training in product(blocks, ("triton", "mixed"), (False, True)):
        block.train(training).to(torch.bfloat16, memory_format=torch.channels_last)
        x = torch.empty(32, channels, side, side, **options, requires_grad=training)
        with resnet_fused.implementation(road), dry_run(arch), observe(calls.append), torch.set_grad_enabled(training):
            z = block(x)
            if training:
                z.sum().backward()
    return (Kernel(arch, "bfloat16", call) for call in calls)


def _drawn(arch: int, draw: random.Random) -> Iterator[Kernel]:
    """Of a training step of one unit."""
    number_format = draw.choice(list(DTYPES))
    dtype, groups, size = DTYPES[number_format], draw.choice([1, 1, 2, 32]), draw.choice([1, 3, 5])
    ci, co = (groups * draw.randint(1, 256 // groups) for _ in range(2))
    with torch.device("meta"):
        conv = nn.Conv2d(ci, co, size, draw.randint(1, 2), draw.randint(0, size), groups=groups, dtype=dtype)
        x = torch.empty(draw.randint(1, 64), ci, draw.randint(7, 60), draw.randint(7, 60), dtype=dtype)
    torch.backends.cudnn.allow_tf32 = number_format == "tf32"
    return (Kernel(arch, number_format, call, odd=True) for call in _step(arch, conv, x.requires_grad_()))


def _calls(arch: int, number_format: str, models: Iterable[str], training: bool) -> Iterator[Kernel]:
    """Of the models in inference or in a training step, on every road."""
    torch.backends.cudnn.allow_tf32 = number_format == "tf32"
    calls: list[Call] = []
    # Of the passes over pixels no code depends on how many there are.
    for road, batches in (("triton", BATCHES), ("mixed", BATCHES[:1])):
        with resnet_fused.implementation(road), dry_run(arch), observe(calls.append), torch.set_grad_enabled(training):
            for name, batch in product(models, batches):
                dtype, side = DTYPES[number_format], shapes.NETWORKS[name]
                model = meta_model(name, dtype).train(training)
                logits = model(torch.empty(batch, 3, side, side, dtype=dtype, device="meta"))
                if training:
                    logits.sum().backward()
                    model.zero_grad()
    return (Kernel(arch, number_format, call) for call in calls)


@cache
def meta_model(name: str, dtype: torch.dtype) -> nn.Module:
    """One of the library's, on the meta device and channels_last: to make one takes longer than to run it.

    It keeps its dtype, since recorded calls hold its parameters.
    """
    with torch.device("meta"):
        return getattr(resnet_fused, name)().to(dtype, memory_format=torch.channels_last)
