"""conv_dgrad by boxes: the same as gathered, sums of partial boxes, what does not fit, the choice of boxes."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor

from resnet_fused.engine import reference
from resnet_fused.kernels import conv_dgrad as module
from resnet_fused.kernels import dgrad_box
from resnet_fused.kernels.conv import ConvProblem, Geometry
from resnet_fused.kernels.conv_dgrad import conv_dgrad
from resnet_fused.kernels.epilogue import Residual
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import TileConfig, dry_run, observe
from tests.kernels.test_conv_box import kernels_of, problem, tile
from tests.kernels.test_conv_dgrad import _poisoned, assert_sums, random_coefs, random_stats  # noqa: F401
from tests.kernels.test_conv_forward import DEVICE, DTYPES, SAME, channels_last, embed, embed_flat, layer, random
from tests.rule import assert_within_rule

BOXES = [(2, 4, 4), (1, 8, 2), (4, 2, 1)]
GEOMETRIES = {
    "3x3": layer(ci=24, co=32, size=(9, 7), filter=(3, 3), padding=(1, 1)),
    "3x3 stride 2": layer(ci=24, co=32, size=(8, 6), filter=(3, 3), stride=(2, 2), padding=(1, 1)),
    "3x3 stride 2, odd size": layer(ci=16, co=32, size=(9, 7), filter=(3, 3), stride=(2, 2), padding=(1, 1)),
    "stride 2, dilated": layer(
        ci=16, co=16, size=(10, 8), filter=(3, 3), stride=(2, 2), padding=(3, 2), dilation=(3, 2)
    ),
    "every parameter differs by axis": layer(
        ci=24, co=32, size=(11, 8), filter=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)
    ),
    "stride 3, dilation 2": layer(ci=16, co=16, size=(10, 8), filter=(3, 3), stride=(3, 2), dilation=(2, 2)),
    "no padding": layer(ci=16, co=16, size=(6, 9), filter=(2, 3)),
    "padding wider than the filter": layer(ci=16, co=16, size=(3, 4), filter=(2, 2), padding=(3, 3)),
    "pixels past the last output": layer(ci=16, co=16, size=(8, 8), filter=(2, 2), stride=(3, 3)),
    "an image smaller than the stride": layer(ci=16, co=16, size=(1, 2), filter=(1, 1), stride=(3, 3)),
    "1x1": layer(ci=40, co=48, size=(5, 7), filter=(1, 1)),
    "1x1 stride 2": layer(ci=24, co=32, size=(6, 8), filter=(1, 1), stride=(2, 2)),
    "1x1 padded": layer(ci=16, co=16, size=(4, 4), filter=(1, 1), padding=(1, 1)),
    "two groups": layer(ci=80, co=64, size=(5, 6), filter=(3, 3), padding=(1, 1), groups=2),
}


def drawn(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, tuple[int, int], Geometry]:
    """dy, w, the size of the input, and the geometry."""
    ci, co, size, taps, geometry = GEOMETRIES[name]
    sizes = ConvProblem(3, *size, ci, co, *taps, *geometry, dtype, False, False, 0)
    return (
        random(3, co, sizes.p, sizes.q, dtype=dtype),
        random(co, ci // geometry.groups, *taps, dtype=dtype),
        size,
        geometry,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry(name, dtype):
    dy, w, size, geometry = drawn(name, dtype)
    exact = reference.conv_dgrad(dy.double(), w.double(), size, geometry)
    eager = reference.conv_dgrad(dy, w, size, geometry)
    for box in BOXES if dtype == torch.float32 else BOXES[:1]:
        calls = []
        with observe(calls.append):
            dx, sums = conv_dgrad(dy, w, size, geometry=geometry, config=tile(box))
        assert [call.kernel.__name__ for call in calls] == ["dgrad_box_kernel"]
        assert sums is None
        assert dx.is_contiguous(memory_format=torch.channels_last)
        assert_within_rule(dx, eager, exact, sums=2)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_agrees_with_the_gathered_kernel_to_the_bit(name):
    """In fp32: both take K in the same order. A chunk of K sums up without rounding here, of whatever order it is."""
    dy, w, size, geometry = drawn(name)
    dy, w = dy.mul(4).round(), w.mul(4).round()
    exponents = torch.randint(-20, 20, (w.shape[0] // 16, 1, *w.shape[2:])).repeat_interleave(16, 0)
    w = channels_last(torch.ldexp(w, exponents.to(w.device)))
    gathered, _ = conv_dgrad(dy, w, size, geometry=geometry, config=TileConfig(32, 16, 16))
    exact = reference.conv_dgrad(dy.double(), w.double(), size, geometry)
    assert not torch.equal(gathered.double(), exact) or prod(w.shape[2:]) == 1 or geometry.stride[0] == 3
    assert torch.equal(conv_dgrad(dy, w, size, geometry=geometry, config=tile((2, 4, 4)))[0], gathered)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("box", [(2, 4, 4), (4, 8, 4), (4, 8, 8)])
@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2, odd size", "two groups", "pixels past the last output"])
def test_mask_and_sums_count_the_pixels_of_the_image_alone(name, box, dtype):
    dy, w, size, geometry = drawn(name, dtype)
    channels = w.shape[1] * geometry.groups
    y, stats = random(3, channels, *size, dtype=dtype), random_stats(channels)
    v = y.double() * stats[2].double()[:, None, None] + stats[3].double()[:, None, None]
    g, sums = conv_dgrad(dy, w, size, mask=(y, stats), geometry=geometry, config=tile(box))
    plain, _ = conv_dgrad(dy, w, size, geometry=geometry, config=tile(box))
    decided = v.abs() > 1e-5
    assert torch.equal(g[decided], torch.where(v > 0, plain, 0.0)[decided])
    assert_sums(sums, g, y, stats)


@pytest.mark.parametrize(
    ("shape", "step", "before"),
    [((2, 16, 9, 7), 1, 0), ((2, 16, 5, 4), 2, 0), ((2, 24, 5, 4), 2, 4), ((2, 24, 9, 7), 1, 8), ((2, 16, 3, 3), 3, 0)],
)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_shortcut(shape, step, before, stride):
    geometry = Geometry(stride, (1, 1))
    w = random(32, 16, 3, 3)
    dy = random(2, 32, *(-(-s // stride[0]) for s in (9, 7)))
    shortcut = Residual(random(*shape), step, before)
    gathered, _ = conv_dgrad(dy, w, (9, 7), geometry=geometry, shortcut=shortcut, config=TileConfig(32, 16, 32))
    boxed, _ = conv_dgrad(dy, w, (9, 7), geometry=geometry, shortcut=shortcut, config=tile((1, 4, 8), 32))
    torch.testing.assert_close(boxed, gathered)
    plain, _ = conv_dgrad(dy, w, (9, 7), geometry=geometry, config=tile((1, 4, 8), 32))
    assert not torch.equal(boxed, plain)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_reads_only_its_inputs_and_writes_only_its_outputs(name, monkeypatch):
    dy, w, size, geometry = drawn(name)
    channels, nan = w.shape[1] * geometry.groups, float("nan")
    cut, y_in, stats = random(3, channels, *size), random(3, channels, *size), random_stats(channels)
    launch = dict(geometry=geometry, config=tile((2, 4, 4)))
    want = conv_dgrad(dy, w, size, shortcut=Residual(cut), mask=(y_in, stats), **launch)
    buffers = []

    def guarded_empty(*shape, memory_format=torch.contiguous_format, **options):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        like = torch.zeros(shape, **options).contiguous(memory_format=memory_format)
        buffers.append(embed_flat(torch.full_like(like, nan), 7.0))
        return buffers[-1]

    monkeypatch.setattr(module.torch, "empty", guarded_empty)
    shortcut, mask = Residual(embed(cut, nan)), (embed(y_in, nan), embed_flat(stats, nan))
    assert kernels_of(lambda: conv_dgrad(dy, embed_flat(w, nan), size, shortcut=shortcut, mask=mask, **launch)) == [
        "dgrad_box_kernel"
    ]
    for wanted, view in zip(want, buffers, strict=True):
        assert torch.equal(view, wanted)
        storage = torch.as_strided(view, (view.untyped_storage().nbytes() // 4,), (1,), 0)
        assert (storage[:512] == 7.0).all()
        assert (storage[512 + view.numel() :] == 7.0).all()


def test_slices_of_channels_and_images():
    dy, w = random(6, 48, 6, 8), random(16, 24, 3, 3)
    part = dy[1:4, 16:32]
    found = []
    assert kernels_of(lambda: found.append(conv_dgrad(part, w, (6, 8), geometry=SAME, config=tile((2, 2, 4)))[0])) == [
        "dgrad_box_kernel"
    ]
    torch.testing.assert_close(found[0], conv_dgrad(part, w, (6, 8), geometry=SAME)[0])


def test_what_is_not_finite_stays_where_it_belongs():
    """A filter's box reaches into the next tap's channels, where a group has fewer than the tile."""
    dy, w = random(2, 32, 6, 6), random(32, 24, 3, 3)
    w[3, 0, 1, 2] = float("inf")
    dx, _ = conv_dgrad(dy, channels_last(w), (6, 6), geometry=SAME, config=tile((1, 4, 4)))
    assert [c for c in range(24) if not dx[:, c].isfinite().all()] == [0]
    dy[1, 0, 2, 2] = float("nan")
    dx, _ = conv_dgrad(dy, random(32, 24, 3, 3), (6, 6), geometry=SAME, config=tile((1, 4, 4)))
    assert dx[0].isfinite().all()
    assert dx[1, :, 1:4, 1:4].isnan().all()
    assert dx[1, :, 4:].isfinite().all()


def test_no_images():
    w, dy = random(32, 16, 3, 3), channels_last(torch.zeros(0, 32, 3, 3, device=DEVICE))
    y_in = channels_last(torch.zeros(0, 16, 5, 5, device=DEVICE))
    dx, sums = conv_dgrad(dy, w, (5, 5), mask=(y_in, random_stats(16)), config=tile((1, 4, 4)))
    assert (dx.shape, sums.shape[::2]) == ((0, 16, 5, 5), (2, 16))


@pytest.mark.parametrize("step", [2**30 + 16, 700_000_000])
def test_offsets_beyond_32_bits(step):
    """Pixels a gigabyte apart: only the pages that hold them exist."""
    buffer = torch.empty_strided((2 * step + 64,), (1,), dtype=torch.float16, device=DEVICE)
    dy, shortcut, y_in = (
        torch.as_strided(buffer, (1, 16, 1, 3), (3 * step, 1, 3 * step, step), 16 * i) for i in range(3)
    )
    for t in (dy, shortcut, y_in):
        t.copy_(random(1, 16, 1, 3))
    w, stats = random(16, 16, 3, 3, dtype=torch.float16), random_stats(16)
    calls = []
    with observe(calls.append):
        far = conv_dgrad(
            dy, w, (1, 3), geometry=SAME, shortcut=Residual(shortcut), mask=(y_in, stats), config=tile((1, 4, 4))
        )
    assert calls[0].kernel.__name__ == "dgrad_box_kernel"
    far_off = calls[0].arguments["form"].INT64
    assert far_off == (step > 2**30)
    near = [channels_last(t.contiguous()) for t in (dy, shortcut, y_in)]
    cut, mask = Residual(near[1]), (near[2], stats)
    want = conv_dgrad(near[0], w, (1, 3), geometry=SAME, shortcut=cut, mask=mask, config=tile((1, 4, 4)))
    assert all(torch.equal(a, b) for a, b in zip(far, want, strict=True))


UNFIT = {
    "a prologue": (random(1, 16, 4, 4), random(16, 16, 3, 3), {"y": random(1, 16, 4, 4), "coefs": random_coefs(16)}),
    "a chunk across groups": (random(1, 48, 4, 4), random(48, 16, 3, 3), {"geometry": SAME._replace(groups=2)}),
    "merged groups": (random(1, 32, 4, 4), random(32, 8, 3, 3), {"geometry": SAME._replace(groups=4)}),
    "filters 36 bytes apart": (random(1, 16, 4, 4), random(16, 1, 3, 3), {}),
    "a tap at an address that 16 bytes do not divide": (
        random(1, 16, 4, 4),
        random(16, 6, 2, 2),
        {"geometry": Geometry()},
    ),
    "pixels 60 bytes apart": (random(1, 15, 4, 4), random(15, 16, 3, 3), {}),
    "an address that 16 bytes do not divide": (random(1, 32, 4, 4)[:, 2:18], random(16, 16, 3, 3), {}),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_gathered(name):
    dy, w, options = UNFIT[name]
    options = {"geometry": SAME} | options
    grown = 0 if options["geometry"].padding == (1, 1) else 1
    size = 4 + grown, 4 + grown
    found = []
    kernels = kernels_of(lambda: found.append(conv_dgrad(dy, w, size, config=tile((1, 4, 4)), **options)[0]))
    assert kernels == ["conv_dgrad_kernel"]
    torch.testing.assert_close(found[0], conv_dgrad(dy, w, size, **options)[0])


def test_a_box_of_other_pixels_is_an_error():
    with pytest.raises(ValueError, match=r"config.box must have block_m=32 pixels; got \(1, 4, 4\)"):
        conv_dgrad(
            random(1, 16, 4, 4),
            random(16, 16, 3, 3),
            (4, 4),
            geometry=SAME,
            config=replace(tile((1, 4, 8)), box=(1, 4, 4)),
        )


def test_bytes_are_counted_as_for_the_gathered_kernel():
    costs = []
    dy, w = random(2, 32, 3, 3), random(32, 16, 3, 3)
    with observe(lambda call: costs.append(call.cost())):
        for config in (None, tile((1, 4, 4))):
            conv_dgrad(
                dy, w, (6, 6), geometry=Geometry((2, 2), (1, 1)), shortcut=Residual(random(2, 16, 6, 6)), config=config
            )
    assert costs[0] == costs[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"arch": 80}, "boxes are for sm_90, sm_100"),
        ({"prologue": True}, "dy is computed on the way"),
        ({"dtype": torch.float32, "tf32": True}, "no factor of 32 bits"),
        ({"co": 48}, "multiple of 32 output"),
        ({"ci": 32}, "at least 64 input"),
        ({"groups": 32}, "a group"),
    ],
)
def test_why_not(options, reason):
    sizes = {"n": 32, "size": 28, "ci": 64, "co": 64, "taps": 3, "arch": 90}
    assert dgrad_box.why_not(problem(**sizes)) is None
    assert dgrad_box.why_not(problem(**sizes | {"stride": 2, "size": 7})) is None
    unfit = problem(**sizes | options)
    assert reason in dgrad_box.why_not(unfit)
    assert not list(dgrad_box.tiles(unfit))


def test_boxes_cover_the_pixels_of_each_parity():
    strided = problem(32, 32, 128, 128, 3, 90, stride=2)
    for config in dgrad_box.tiles(strided):
        assert dgrad_box.count(strided, config.box) * config.block_m == 32 * 32 * 32
    odd = problem(32, 7, 128, 128, 3, 90, stride=2)
    assert dgrad_box.count(odd, (8, 4, 4)) == 4 * 4


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_tiles_fit_the_gpu_and_load_by_tma(arch):
    found = []
    for ci, co, stride in ((64, 64, 1), (512, 256, 2)):
        p, calls = problem(32, 28, ci, co, 3, arch, stride=stride), []
        dy = torch.empty(32, co, p.p, p.q, dtype=p.dtype, device="meta")
        w = torch.empty(co, ci, 3, 3, dtype=p.dtype, device="meta")
        configs = list(dgrad_box.tiles(p))
        with dry_run(arch), observe(calls.append):
            for config in configs:
                conv_dgrad(channels_last(dy), channels_last(w), (28, 28), geometry=p.geometry, config=config)
        assert [call.kernel.__name__ for call in calls] == ["dgrad_box_kernel"] * len(configs)
        found += configs
    assert bool(found) == (arch in dgrad_box.TILES)
    for t in found:
        assert t.num_stages * (t.block_m + t.block_n) * t.block_k * 2 < gpu_of(arch).shared
        assert prod(t.box) == t.block_m
