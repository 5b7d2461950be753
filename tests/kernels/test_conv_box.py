"""conv_forward by boxes: the same as gathered, what does not fit, statistics of partial boxes, the choice of boxes."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fused.engine import forward
from resnet_fused.kernels import conv_box
from resnet_fused.kernels.activation import IDENTITY, RELU
from resnet_fused.kernels.batch_norm import batch_norm_stats, merge_moments
from resnet_fused.kernels.conv import ConvProblem, Geometry
from resnet_fused.kernels.conv_forward import conv_forward, conv_forward_moments
from resnet_fused.kernels.epilogue import Moments, Prologue, Residual
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import TileConfig, dry_run, observe
from tests.kernels.test_conv_forward import DTYPES, SAME, channels_last, check, layer, random, random_norm

BOXES = [(2, 4, 4), (1, 8, 2), (1, 1, 16), (4, 2, 1)]
GEOMETRIES = {
    "3x3": layer(ci=32, co=24, size=(9, 7), filter=(3, 3), padding=(1, 1)),
    "3x3 stride 2": layer(ci=32, co=24, size=(8, 6), filter=(3, 3), stride=(2, 2), padding=(1, 1)),
    "3x3 stride 2, dilated": layer(
        ci=16, co=16, size=(10, 8), filter=(3, 3), stride=(2, 2), padding=(3, 2), dilation=(3, 2)
    ),
    "every parameter differs by axis": layer(
        ci=32, co=20, size=(11, 8), filter=(3, 2), padding=(1, 2), dilation=(1, 2)
    ),
    "no padding": layer(ci=16, co=16, size=(6, 9), filter=(2, 3)),
    "padding wider than the filter": layer(ci=16, co=16, size=(3, 4), filter=(2, 2), padding=(3, 3)),
    "5x5 stride 2": layer(ci=16, co=16, size=(8, 6), filter=(5, 5), stride=(2, 2), padding=(2, 2)),
    "1x1": layer(ci=48, co=40, size=(5, 7), filter=(1, 1)),
    "1x1 stride 2": layer(ci=32, co=24, size=(6, 8), filter=(1, 1), stride=(2, 2)),
    "1x1 padded": layer(ci=16, co=16, size=(4, 4), filter=(1, 1), padding=(1, 1)),
    "two groups": layer(ci=64, co=80, size=(5, 6), filter=(3, 3), padding=(1, 1), groups=2),
}


def tile(box: tuple[int, int, int], block_k: int = 16) -> TileConfig:
    return TileConfig(prod(box), 16, block_k, box=box)


def kernels_of(launch) -> list[str]:
    calls = []
    with observe(calls.append):
        launch()
    return [call.kernel.__name__ for call in calls]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry(name, dtype):
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w = random(3, ci, *size, dtype=dtype), random(co, ci // geometry.groups, *taps, dtype=dtype)
    for box in BOXES:
        launch = lambda: check(x, w, norm=random_norm(co), activation=RELU, config=tile(box), geometry=geometry)  # noqa: B023, E731
        assert kernels_of(launch) == ["conv_box_kernel"]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_agrees_with_the_gathered_kernel_to_the_bit(name):
    """In fp32: both take K in the same order. A chunk of K sums up without rounding here, of whatever order it is."""
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w = random(3, ci, *size).mul(4).round(), random(co, ci // geometry.groups, *taps).mul(4).round()
    exponents = torch.randint(-20, 20, (1, w.shape[1] // 16, *taps)).repeat_interleave(16, 1)
    w = channels_last(torch.ldexp(w, exponents))
    gathered = conv_forward(x, w, geometry=geometry, config=TileConfig(32, 16, 16))
    assert not torch.equal(gathered.double(), F.conv2d(x.double(), w.double(), None, *geometry)) or prod(taps) == 1
    assert torch.equal(conv_forward(x, w, geometry=geometry, config=tile((2, 4, 4))), gathered)


@pytest.mark.parametrize(("bias", "norm", "residual", "relu"), list(product((False, True), repeat=4)))
def test_every_epilogue(bias, norm, residual, relu):
    x, w = random(2, 16, 5, 6), random(20, 16, 3, 3)
    check(
        x,
        w,
        geometry=SAME,
        bias=random(20) if bias else None,
        norm=random_norm(20) if norm else None,
        residual=Residual(random(2, 20, 5, 6)) if residual else None,
        activation=RELU if relu else IDENTITY,
        config=tile((1, 4, 8)),
    )


@pytest.mark.parametrize("taps", [1, 3])
def test_a_strided_residual_of_fewer_channels(taps):
    x, w = random(2, 16, 5, 6), random(24, 16, taps, taps)
    residual = Residual(random(2, 12, 10, 11), 2, 6)
    check(x, w, geometry=Geometry(padding=(taps // 2,) * 2), residual=residual, config=tile((1, 4, 8)))


def test_high_boxes_are_finished_in_halves():
    x, w = random(3, 16, 9, 6), random(20, 16, 3, 3)
    check(x, w, geometry=SAME, norm=random_norm(20), residual=Residual(random(3, 20, 9, 6)), config=tile((2, 8, 8)))


def test_slices_of_channels_and_images():
    x, w = random(6, 48, 6, 8), random(16, 16, 3, 3)
    part = x[1:4, 16:32]
    launch = lambda: check(part, w, geometry=SAME, config=tile((2, 2, 4)))  # noqa: E731
    assert kernels_of(launch) == ["conv_box_kernel"]
    strided = Geometry((2, 2), (1, 1))
    assert kernels_of(lambda: check(part, w, geometry=strided, config=tile((2, 2, 4)))) == ["conv_box_kernel"]


def stored_by_tma(launch) -> bool:
    calls = []
    with observe(calls.append):
        launch()
    assert [call.kernel.__name__ for call in calls] == ["conv_box_kernel"]
    return isinstance(calls[0].arguments["y_ptr"], TensorDescriptor)


@pytest.mark.parametrize("box", [(2, 2, 4), (1, 4, 4), (1, 1, 16), (4, 8, 4), (1, 16, 8), (1, 1, 128)])
@pytest.mark.parametrize("taps", [1, 3])
def test_tma_stores_what_lies_in_the_output_alone(taps, box):
    """Boxes that stick out, whole and in halves; the channels beside a slice keep what they had."""
    x, w = random(3, 16, 9, 7, dtype=torch.float16), random(24, 16, taps, taps, dtype=torch.float16)
    whole = torch.full_like(random(3, 48, 9, 7, dtype=torch.float16), float("nan"))
    geometry = Geometry(padding=(taps // 2,) * 2)
    out = whole[:, 8:32]
    launch = lambda: conv_forward(x, w, geometry=geometry, out=out, config=tile(box))  # noqa: E731
    assert stored_by_tma(launch)
    exact = F.conv2d(x.double(), w.double(), padding=taps // 2)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
    assert whole[:, :8].isnan().all()
    assert whole[:, 32:].isnan().all()


def test_what_tma_does_not_store():
    """Where channels of the next group or rows of an odd number of bytes follow, or the address is odd."""
    x, w = random(2, 64, 5, 6), random(40, 16, 3, 3)
    groups = Geometry(padding=(1, 1), groups=2)
    launch = lambda co: check(x, random(co, 32, 3, 3), geometry=groups, config=tile((1, 4, 4)))  # noqa: E731
    assert not stored_by_tma(lambda: launch(80))
    assert stored_by_tma(lambda: launch(96))
    assert stored_by_tma(lambda: check(x[:, :16], w, geometry=SAME, config=tile((1, 4, 4))))
    assert not stored_by_tma(lambda: check(x[:, :16], w[:38], geometry=SAME, config=tile((1, 4, 4))))
    out = random(2, 48, 5, 6)[:, 2:42]
    arguments = dict(geometry=SAME, out=out, config=tile((1, 4, 4)))
    assert "conv_box_kernel" not in kernels_of(lambda: conv_forward(x[:, :16], w, **arguments))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_moments_count_the_pixels_of_the_image_alone(name):
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w, bias = random(3, ci, *size), random(co, ci // geometry.groups, *taps), random(co) + 50
    for box in [*BOXES, (4, 8, 4)]:
        y, moments = conv_forward_moments(x, w, geometry=geometry, bias=bias, config=tile(box))
        gathered, expected = conv_forward_moments(x, w, geometry=geometry, bias=bias)
        torch.testing.assert_close(y, gathered)
        assert moments.counts.sum() == y.shape[0] * y.shape[2] * y.shape[3]
        exact = y.double().flatten(2).transpose(0, 1).flatten(1)
        mean, m2 = merge_moments(moments)
        torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(
            m2.double(), ((exact - exact.mean(1, keepdim=True)) ** 2).sum(1), rtol=1e-4, atol=1e-3
        )
        assert isinstance(expected, Moments) and expected.counts is None


def test_processes_share_the_moments_of_boxes(monkeypatch):
    """Of partial boxes too: each process tells how many pixels it has."""
    x, w = random(3, 16, 9, 7), random(16, 16, 3, 3)
    y, moments = conv_forward_moments(x, w, geometry=SAME, config=tile((2, 4, 4)))
    monkeypatch.setattr(forward, "process_group", lambda name: None)
    monkeypatch.setattr(forward.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(
        forward.dist, "all_gather_into_tensor", lambda out, message, group: out.copy_(torch.cat([message, message]))
    )
    shared = forward._gather(moments, "two processes")
    assert shared.counts.tolist() == [y.numel() / 16] * 2
    mean, var = batch_norm_stats(shared, None, None, 0.0)[:2]
    torch.testing.assert_close(mean, y.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var**-2, y.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-4)


UNFIT = {
    "a chunk across groups": (
        random(1, 48, 4, 4),
        random(8, 24, 3, 3),
        {"geometry": Geometry((1, 1), (1, 1), groups=2)},
    ),
    "stride 2 over odd rows": (random(1, 16, 5, 4), random(8, 16, 3, 3), {"geometry": Geometry((2, 2), (1, 1))}),
    "stride 3": (random(1, 16, 6, 6), random(8, 16, 3, 3), {"geometry": Geometry((3, 3), (1, 1))}),
    "a prologue": (random(1, 16, 4, 4), random(8, 16, 3, 3), {"prologue": Prologue(random(16), random(16))}),
    "pixels 60 bytes apart": (random(1, 15, 4, 4), random(8, 15, 3, 3), {}),
    "an address that 16 bytes do not divide": (random(1, 32, 4, 4)[:, 2:18], random(8, 16, 3, 3), {}),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_gathered(name):
    x, w, options = UNFIT[name]
    assert kernels_of(lambda: check(x, w, config=tile((1, 4, 4)), **options)) == ["conv_forward_kernel"]


def test_a_box_of_other_pixels_is_an_error():
    with pytest.raises(ValueError, match=r"config.box must have block_m=32 pixels; got \(1, 4, 4\)"):
        conv_forward(random(1, 16, 4, 4), random(16, 16, 3, 3), config=TileConfig(32, 16, 16, box=(1, 4, 4)))


def test_infinity_and_nan_stay_in_their_output_channel():
    x, w = random(2, 16, 6, 6), random(32, 16, 3, 3)
    w[5, 3, 1, 1], w[17, 15, 2, 2] = float("inf"), float("nan")
    y = conv_forward(x, channels_last(w), geometry=SAME, config=tile((1, 4, 4)))
    assert [c for c in range(32) if not y[:, c].isfinite().all()] == [5, 17]


def problem(n: int, size: int, ci: int, co: int, taps: int, arch: int, stride: int = 1, **options) -> ConvProblem:
    geometry = ((stride, stride), (taps // 2, taps // 2), (1, 1), options.pop("groups", 1))
    chosen = {"dtype": torch.bfloat16, "tf32": False, "prologue": False} | options
    return ConvProblem(n, size, size, ci, co, taps, taps, *geometry, **chosen, arch=arch)


@pytest.mark.parametrize(
    ("size", "images", "pixels", "covered"),
    [(56, 32, 256, 1), (28, 32, 128, 1), (14, 32, 128, 1), (7, 128, 128, 1), (7, 32, 128, 8 / 7)],
)
def test_the_least_waste(size, images, pixels, covered):
    p = problem(images, size, 64, 64, 3, 90)
    box = conv_box.least_waste(p, pixels)
    assert prod(box) == pixels
    assert conv_box.count(p, box) * pixels == pytest.approx(covered * p.m)


def test_a_1x1_convolution_wastes_no_pixel_but_in_the_last_box():
    p = problem(3, 7, 64, 256, 1, 90)
    assert conv_box.least_waste(p, 128) == (1, 1, 128)
    assert conv_box.count(p, (1, 1, 128)) == 2


def test_architectures():
    """Triton 3.6 makes code for sm_120 that stores to the stack around every load."""
    assert list(conv_box.TILES) == ([90, 100] if triton.__version__.startswith("3.6.") else [90, 100, 120])


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_tiles_fit_the_gpu(arch):
    found = [t for ci, co in ((64, 64), (256, 512)) for t in conv_box.tiles(problem(32, 28, ci, co, 3, arch))]
    assert bool(found) == (arch in conv_box.TILES)
    for t in found:
        assert t.num_stages * (t.block_m + t.block_n) * t.block_k * 2 < gpu_of(arch).shared
        assert prod(t.box) == t.block_m


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"arch": 80}, "boxes are for sm_90, sm_100"),
        ({"prologue": True}, "normalised on the way"),
        ({"dtype": torch.float32}, "not multiplied by tensor cores"),
        ({"ci": 24}, "multiple of 32 input"),
        ({"co": 32}, "at least 64 output"),
        ({"groups": 32}, "a group"),
        ({"stride": 2, "size": 7}, "step by (2, 2) over 7x7"),
    ],
)
def test_why_not(options, reason):
    sizes = {"n": 32, "size": 28, "ci": 64, "co": 64, "taps": 3, "arch": 90}
    assert conv_box.why_not(problem(**sizes)) is None
    unfit = problem(**sizes | options)
    assert reason in conv_box.why_not(unfit)
    assert not list(conv_box.tiles(unfit))


def test_bytes_are_counted_as_for_the_gathered_kernel():
    costs = []
    x, w = random(2, 16, 6, 6), random(16, 16, 3, 3)
    with observe(lambda call: costs.append(call.cost())):
        conv_forward(x, w, geometry=SAME)
        conv_forward(x, w, geometry=SAME, config=tile((1, 4, 4)))
    assert costs[0] == costs[1]


def test_every_architecture_with_tma_loads_by_it():
    for arch in conv_box.TILES:
        p, calls = problem(32, 28, 128, 256, 3, arch), []
        x, w = (torch.empty(shape, dtype=p.dtype, device="meta") for shape in ((32, 128, 28, 28), (256, 128, 3, 3)))
        with dry_run(arch), observe(calls.append):
            for config in conv_box.tiles(p):
                conv_forward(channels_last(x), channels_last(w), geometry=SAME, config=config)
        assert {call.kernel.__name__ for call in calls} == {"conv_box_kernel"}
