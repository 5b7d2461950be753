"""conv_wgrad against the fp64 reference: geometry, splits, prologues, hostile numbers, memory it may touch, cost."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.engine import reference
from resnet_fused.kernels import conv_wgrad as module
from resnet_fused.kernels.conv import ConvProblem, Geometry, output_size
from resnet_fused.kernels.conv_wgrad import conv_wgrad, default_config
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import INTERPRETER, TileConfig, dry_run, observe
from tests.kernels.test_conv_dgrad import ALL, _poisoned, random_coefs, random_stats  # noqa: F401
from tests.kernels.test_conv_forward import BAD_GEOMETRIES, DEVICE, DTYPES, SAME, channels_last, embed, random
from tests.rule import assert_within_rule

SPLIT = TileConfig(32, 64, 32, splits=3)
CONFIGS = [None, SPLIT, TileConfig(16, 16, 16)]


def drawn(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, ...], Geometry]:
    """dy, x, the shape of the filter, and the geometry."""
    ci, co, size, taps, geometry = ALL[name]
    x, shape = random(2, ci, *size, dtype=dtype), (co, ci // geometry.groups, *taps)
    y = F.conv2d(x, torch.zeros(shape, dtype=dtype, device=x.device), None, *geometry)
    return random(*y.shape, dtype=dtype), x, shape, geometry


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_geometry(name, dtype):
    dy, x, shape, geometry = drawn(name, dtype)
    exact = reference.conv_wgrad(dy.double(), x.double(), shape, geometry)
    eager = reference.conv_wgrad(dy, x, shape, geometry)
    for config in CONFIGS:
        dw = conv_wgrad(dy, x, shape[2:], geometry=geometry, config=config)
        assert dw.permute(0, 2, 3, 1).is_contiguous()
        assert_within_rule(dw, eager, exact, sums=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "name", ["3x3", "every parameter differs by axis", "stem", "1x1", "1x1 stride 2", "narrow groups", "two groups"]
)
def test_prologues(name, config, dtype):
    g, x, shape, geometry = drawn(name, dtype)
    y, coefs, stats = random(*g.shape, dtype=dtype), random_coefs(g.shape[1]), random_stats(x.shape[1])
    stats[3] += 50  # padding is zero behind the ReLU
    dy = reference.batch_norm_gradient(g.double(), y.double(), coefs.double())
    a = reference.scale_shift_act(x.double(), stats[2].double(), stats[3].double())
    exact = reference.conv_wgrad(dy, a, shape, geometry)
    eager = reference.conv_wgrad(dy.to(dtype), a.to(dtype), shape, geometry)
    kept = torch.full_like(g, float("nan"))
    dw = conv_wgrad(
        g, x, shape[2:], geometry=geometry, y=y, coefs=coefs, x_stats=stats, dy_out=kept, config=config,
        out_dtype=torch.float32,
    )  # fmt: skip
    assert_within_rule(dw.to(dtype), eager, exact, sums=8)
    assert_within_rule(kept, dy.to(dtype), dy)
    wide = conv_wgrad(g.float(), x, shape[2:], geometry=geometry, coefs=coefs, x_stats=stats, config=config)
    only_g = reference.conv_wgrad((g * coefs[0][:, None, None]).double().to(dtype).double(), a, shape, geometry)
    assert_within_rule(wide, only_g.to(dtype), only_g, sums=8 if dtype == torch.float32 else 2**13)


def specification(dy, x, filter_size, *, geometry=Geometry(), y=None, coefs=None, x_stats=None, dtype):
    """What a launch must compute, in ``dtype`` throughout."""
    dy, x = dy.to(dtype), x.to(dtype)
    if coefs is not None:
        coefs = coefs.to(dtype)
        if y is None:
            dy = dy * coefs[0, :, None, None]
        else:
            dy = reference.batch_norm_gradient(dy, y.to(dtype), coefs)
    if x_stats is not None:
        x = reference.scale_shift_act(x, *x_stats[2:4].to(dtype))
    shape = (dy.shape[1], x.shape[1] // geometry.groups, *filter_size)
    return reference.conv_wgrad(dy, x, shape, geometry)


def check(dy, x, filter_size, *, config=None, **arguments):
    ours = conv_wgrad(dy, x, filter_size, config=config, **arguments)
    eager = specification(dy, x, filter_size, dtype=x.dtype, **arguments)
    exact = specification(dy, x, filter_size, dtype=torch.float64, **arguments)
    assert_within_rule(ours, eager, exact, sums=1)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    return ours


@pytest.mark.parametrize("block_k", [16, 64])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (2, 3), (3, 17), (16, 2), (40, 1)])
def test_pixels_are_carried_across_rows_and_images(size, block_k):
    """Steps longer and shorter than a row, and than an image."""
    x, dy = random(5, 16, *size), random(5, 16, *size)
    check(dy, x, (3, 3), geometry=SAME, config=TileConfig(16, 16, block_k, splits=2))


@pytest.mark.parametrize("name", ["3x3", "1x1", "stem", "narrow groups"])
def test_constants_of_dy_add_nothing_beyond_the_last_pixel(name):
    """Where there is no pixel, ``A*0 + B*0 + C`` is not zero."""
    dy, x, shape, geometry = drawn(name, torch.float32)
    coefs = torch.full((3, dy.shape[1]), 100.0, device=DEVICE)
    check(
        dy, x, shape[2:], geometry=geometry, y=torch.zeros_like(dy), coefs=coefs,
        x_stats=random(5, x.shape[1]) + 10, config=TileConfig(16, 16, 64, splits=2),
    )  # fmt: skip


def test_rounds_dy_to_the_type_of_x():
    dy, x, shape, geometry = drawn("1x1", torch.float16)
    g32, y, coefs = random(*dy.shape), random(*dy.shape, dtype=torch.float16), random(3, dy.shape[1])
    eager = reference.batch_norm_gradient(g32, y.float(), coefs).half()
    ours = conv_wgrad(g32, x, shape[2:], geometry=geometry, y=y, coefs=coefs, config=SPLIT)
    half, exact = (
        specification(eager, x, shape[2:], geometry=geometry, dtype=t) for t in (torch.float16, torch.float64)
    )
    assert_within_rule(ours, half, exact, sums=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["dy", "x", "y"])
@pytest.mark.parametrize("at", [(0, 3, 0, 0), (1, 3, 2, 2), (1, 3, -1, -1)], ids=["first", "inner", "last"])
def test_nan_and_inf_arrive(at, where, value):
    tensors = {"dy": random(2, 20, 4, 5), "x": random(2, 16, 6, 7), "y": random(2, 20, 4, 5)}
    tensors[where][at] = value
    arguments = dict(coefs=random(3, 20), x_stats=random(5, 16).abs() + 0.1, **tensors)
    eager = specification(filter_size=(3, 3), dtype=torch.float32, **arguments)
    for config in CONFIGS[:2]:
        ours = conv_wgrad(filter_size=(3, 3), config=config, **arguments)
        assert torch.equal(ours.isnan(), eager.isnan())
        assert torch.equal(ours.isinf(), eager.isinf())
        if value > 0 or where != "x":
            assert not ours.isfinite().all()


@pytest.mark.parametrize("name", ["two groups", "narrow groups", "depthwise"])
def test_nan_stays_in_its_group(name):
    dy, x, shape, geometry = drawn(name, torch.float32)
    x[:, 1] = float("nan")
    nan = conv_wgrad(dy, x, shape[2:], geometry=geometry).isnan().flatten(1).any(1)
    group = torch.arange(dy.shape[1], device=DEVICE) // (dy.shape[1] // geometry.groups)
    assert torch.equal(nan, group == 1 // (x.shape[1] // geometry.groups))


@pytest.mark.parametrize("config", [None, SPLIT])
@pytest.mark.parametrize("name", ALL)
def test_reads_only_its_inputs(name, config):
    dy, x, shape, geometry = drawn(name, torch.float32)
    y, vectors = (
        channels_last(torch.randn_like(dy)),
        {"coefs": random(3, dy.shape[1]), "x_stats": random(5, x.shape[1])},
    )
    plain = conv_wgrad(dy, x, shape[2:], geometry=geometry, config=config)
    full = conv_wgrad(dy, x, shape[2:], geometry=geometry, y=y, config=config, **vectors)
    dy, x, y = (embed(t, float("nan")) for t in (dy, x, y))
    # Without a prologue nothing but the loads' masks keeps the guards out.
    assert torch.equal(conv_wgrad(dy, x, shape[2:], geometry=geometry, config=config), plain)
    assert torch.equal(conv_wgrad(dy, x, shape[2:], geometry=geometry, y=y, config=config, **vectors), full)


@pytest.mark.parametrize("config", [None, SPLIT])
@pytest.mark.parametrize("name", ALL)
def test_writes_every_element_and_nothing_else(name, config, monkeypatch):
    dy, x, shape, geometry = drawn(name, torch.float32)
    want = conv_wgrad(dy, x, shape[2:], geometry=geometry, config=config)
    empty, buffers = torch.empty, []

    def guarded(*shape, **options):
        like = empty(*shape, **options)
        buffer = torch.full((like.numel() + 512,), float("nan"), dtype=like.dtype, device=like.device)
        buffers.append(buffer)
        return buffer.as_strided(like.shape, like.stride(), 256)

    monkeypatch.setattr(module.torch, "empty", guarded)
    got = conv_wgrad(dy, x, shape[2:], geometry=geometry, config=config)
    assert torch.equal(got, want)
    assert buffers
    for buffer in buffers:
        assert buffer[:256].isnan().all() and buffer[-256:].isnan().all() and not buffer[256:-256].isnan().any()


@pytest.mark.parametrize("splits", [1, 2, 100])
def test_splits_are_added_in_order(splits):
    dy, x, shape, geometry = drawn("3x3", torch.float32)
    config, calls = TileConfig(16, 16, 16, splits=splits), []
    with observe(calls.append):
        first = check(dy, x, shape[2:], geometry=geometry, config=config)
    assert [call.kernel.__name__ for call in calls] == ["conv_wgrad_kernel", "sum_splits_kernel"][: min(splits, 2)]
    assert (calls[0].grid[2] - 1) * calls[0].arguments["steps"] * 16 < 2 * 9 * 7, "no program is without pixels"
    assert torch.equal(conv_wgrad(dy, x, shape[2:], geometry=geometry, config=config), first)


def test_filter_of_one_element():
    check(random(1, 1, 9, 9).abs(), random(1, 1, 9, 9).abs(), (1, 1), config=SPLIT)


@pytest.mark.parametrize("config", CONFIGS)
def test_output_dtype(config):
    dy, x, shape, geometry = drawn("3x3", torch.float16)
    wide = conv_wgrad(dy, x, shape[2:], geometry=geometry, out_dtype=torch.float32, config=config)
    assert wide.dtype == torch.float32
    assert torch.equal(conv_wgrad(dy, x, shape[2:], geometry=geometry, config=config), wide.half())


@pytest.mark.usefixtures("checked_for_overflow")
@pytest.mark.parametrize("taps", [1, 3])
def test_offsets_beyond_32_bits(taps):
    """Pixels a gigabyte apart: only the pages that hold them exist."""
    step = 2**30 + 16
    buffer = torch.empty_strided((2 * step + 64,), (1,), dtype=torch.float16, device=DEVICE)
    x, dy, y = (
        torch.as_strided(buffer, (1, 16, 1, 3), (3 * step, 1, 3 * step, step), 16 * i).copy_(random(1, 16, 1, 3))
        for i in range(3)
    )
    shared = dict(geometry=Geometry(padding=(taps // 2, taps // 2)), coefs=random(3, 16), x_stats=random(5, 16))
    calls = []
    with observe(calls.append):
        far = conv_wgrad(dy, x, (taps, taps), y=y, **shared)
    assert calls[0].arguments["form"].INT64
    near = (channels_last(t.contiguous()) for t in (dy, x, y))
    assert torch.equal(far, conv_wgrad(next(near), next(near), (taps, taps), y=next(near), **shared))


def planned(
    n: int, ci: int, co: int, size: int, taps: int = 1, dtype=torch.bfloat16, arch: int = 90, y=False, **change
):
    """The calls that a layer's gradient makes, without running them."""
    calls, pad = [], taps // 2
    stride, groups = change.get("stride", 1), change.get("groups", 1)
    out = output_size(size, taps, stride, pad, 1)
    tensor = lambda c, s: channels_last(torch.empty(n, c, s, s, dtype=dtype, device="meta"))  # noqa: E731
    vectors = {"coefs": (3, co), "x_stats": (5, ci)}
    vectors = {name: torch.empty(shape, device="meta") for name, shape in vectors.items() if name in change}
    with dry_run(arch), observe(calls.append):
        conv_wgrad(
            tensor(co, out), tensor(ci, size), (taps, taps),
            geometry=Geometry((stride, stride), (pad, pad), groups=groups), y=tensor(co, out) if y else None, **vectors,
        )  # fmt: skip
    return calls


def test_cost_counts_each_byte_once():
    (one,) = planned(1, 32, 64, 9, 3)
    cost = one.cost()
    assert cost.flops == 2 * 81 * 64 * 32 * 9
    assert cost.bytes_read == 2 * 81 * (64 + 32)
    assert cost.bytes_written == 2 * 64 * 32 * 9

    (strided,) = planned(1, 32, 64, 9, stride=2)
    assert strided.cost().bytes_read == 2 * 25 * (64 + 32), "every fourth pixel of the input"

    (scaled,) = planned(1, 32, 64, 9, coefs=True)
    assert scaled.cost().bytes_read == 2 * 81 * (64 + 32) + 4 * 64, "without y one vector of coefs matters"
    (full,) = planned(1, 32, 64, 9, coefs=True, x_stats=True, y=True)
    assert full.cost().bytes_read == 2 * 81 * (2 * 64 + 32) + 4 * (3 * 64 + 2 * 32), "scale and shift of five rows"

    first, second = planned(64, 64, 64, 56, 3)
    filters = first.grid[2] * 64 * 64 * 9 * 4
    assert first.cost().bytes_read == 2 * 64 * 56 * 56 * 128
    assert first.cost().bytes_written == second.cost().bytes_read == filters
    assert second.cost().bytes_written == 2 * 64 * 64 * 9


def bottlenecks():
    """(ci, co, size, taps, stride) of each convolution of ResNet-50's blocks."""
    ci, size = 64, 56
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(depth):
            stride = 2 if block == 0 and stage else 1
            yield ci, width, size, 1, 1
            yield width, width, size, 3, stride
            if block == 0:
                yield ci, 4 * width, size, 1, stride
            size //= stride
            yield width, 4 * width, size, 1, 1
            ci = 4 * width


def test_partial_filters_are_few_beside_the_activations():
    calls = [
        call
        for ci, co, size, taps, stride in bottlenecks()
        for call in planned(256, ci, co, size, taps, stride=stride)[1:]
    ]
    assert 2 * sum(call.cost().bytes_read for call in calls) < 256 * 1.5e6, "1.5 MB for each of 256 images"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("batch", [32, 256])
def test_programs_fill_the_gpu(batch, arch):
    for ci, co, size, taps, stride in bottlenecks():
        call = planned(batch, ci, co, size, taps, arch=arch, stride=stride)[0]
        longest = -(-call.arguments["M"] // (8 * call.config.block_k))
        wave = gpu_of(arch).multiprocessors
        assert prod(call.grid) >= min(0.4 * wave, longest * prod(call.grid[:2])), (ci, co, size, taps)


def problem(**change) -> ConvProblem:
    base = dict(
        n=8, h=14, w=14, ci=256, co=256, r=3, s=3, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1,
        dtype=torch.bfloat16, tf32=False, prologue=False, arch=90,
    )  # fmt: skip
    return ConvProblem(**{**base, **change})


def test_default_config_is_cached_and_splits_deep_products():
    assert default_config(problem()) is default_config(problem())
    assert default_config(problem(n=256, h=56, w=56, ci=64, co=64)).splits > 1
    assert default_config(problem(n=1, h=7, w=7, ci=512, co=512)).splits == 1
    assert default_config(problem(arch=INTERPRETER, n=1)).splits == 1


CHANGES = [
    (dict(x=torch.zeros(1, 16, 4, 4)), r"x must be pixel-linear .* got shape \(1, 16, 4, 4\)"),
    (dict(dy=torch.zeros(1, 8, 4, 4)), r"dy must be pixel-linear"),
    (dict(dy=channels_last(torch.zeros(1, 8, 4, 5))), r"dy must have shape \[1, CO, 4, 4\]; got \(1, 8, 4, 5\)"),
    (dict(dy=channels_last(torch.zeros(2, 8, 4, 4))), r"dy must have shape \[1, CO, 4, 4\]; got \(2, 8, 4, 4\)"),
    (dict(geometry=SAME._replace(groups=3)), r"geometry.groups must divide 16 and 8 channels; got 3"),
    (dict(dy=channels_last(torch.zeros(1, 8, 4, 4)).half()), r"dy must have the dtype of x, torch.float32"),
    (dict(y=channels_last(torch.zeros(1, 8, 4, 4))), r"y needs coefs"),
    (dict(dy_out=channels_last(torch.zeros(1, 8, 4, 4))), r"dy_out needs coefs"),
    (
        dict(dy_out=torch.zeros(1, 8, 1, 1).expand(1, 8, 4, 4), coefs=torch.zeros(3, 8)),
        r"dy_out must be pixel-linear",
    ),
    (
        dict(y=channels_last(torch.zeros(1, 8, 4, 5)), coefs=torch.zeros(3, 8)),
        r"y must lie in memory as dy, \(1, 8, 4, 4\); got \(1, 8, 4, 5\)",
    ),
    (dict(coefs=torch.zeros(3, 9)), r"coefs must be contiguous float32 \[3, 8\]; got .*\(3, 9\)"),
    (dict(coefs=torch.zeros(3, 8).half()), r"coefs must be contiguous float32 \[3, 8\]; got torch.float16"),
    (dict(x_stats=torch.zeros(2, 16)), r"x_stats must be contiguous float32 \[5, 16\]; got .*\(2, 16\)"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "dy": channels_last(torch.zeros(1, 8, 4, 4)),
        "x": channels_last(torch.zeros(1, 16, 4, 4)),
        "filter_size": (3, 3),
        "geometry": SAME,
    }
    with pytest.raises(ValueError, match=message):
        conv_wgrad(**{**arguments, **change})


@pytest.mark.parametrize(("geometry", "message"), BAD_GEOMETRIES)
def test_a_convolution_without_meaning_is_refused(geometry, message):
    with pytest.raises(ValueError, match=message):
        conv_wgrad(random(1, 8, 1, 2), random(1, 16, 3, 4), (3, 3), geometry=geometry)


def test_int64_is_chosen_by_extent():
    def chosen(n: int) -> bool:
        calls = []
        with dry_run(90), observe(calls.append):
            dy, x = (channels_last(torch.empty(n, 64, 64, 64, device="meta")) for _ in range(2))
            conv_wgrad(dy, x, (1, 1), config=TileConfig(64, 64, 64, splits=10_000))
        return calls[0].arguments["form"].INT64

    assert not chosen(2**31 // 64**3 - 1)
    assert chosen(2**31 // 64**3)


def test_no_images_give_zero():
    dw = conv_wgrad(channels_last(torch.zeros(0, 20, 3, 3)), channels_last(torch.zeros(0, 16, 5, 5)), (3, 3))
    assert dw.shape == (20, 16, 3, 3)
    assert (dw == 0).all()


@pytest.mark.parametrize(
    ("change", "tile"),
    [
        ({}, (128, 128, 8)),
        ({"r": 1, "s": 1}, (64, 128, 4)),
        ({"ci": 512, "co": 512}, (64, 128, 4)),
        ({"ci": 128, "co": 128}, (128, 128, 8)),
        ({"ci": 1024, "co": 64}, (64, 128, 4)),
        ({"co": 260}, (64, 128, 4)),
        ({"groups": 4}, (64, 64, 4)),
        ({"arch": 89}, (64, 64, 4)),
        ({"dtype": torch.float32, "tf32": True}, (64, 64, 4)),
        ({"prologue": False}, (64, 128, 4)),
    ],
    ids=str,
)
def test_tiles_behind_prologues_are_as_wide_as_the_filter_and_the_gpu_allow(change, tile):
    config = default_config(problem(**{"n": 256, "prologue": True} | change))
    assert (config.block_m, config.block_n, config.num_warps) == tile
