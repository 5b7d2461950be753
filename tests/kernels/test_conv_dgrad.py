"""conv_dgrad against the fp64 reference: geometry, parities, prologue, epilogues, memory it may touch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.engine import reference
from resnet_fused.kernels import conv_dgrad as module
from resnet_fused.kernels.conv import ConvProblem, Geometry
from resnet_fused.kernels.conv_dgrad import conv_dgrad, default_config
from resnet_fused.kernels.epilogue import Residual
from resnet_fused.kernels.launch import Cost, TileConfig, dry_run, observe
from tests.kernels.test_conv_forward import (
    BAD_GEOMETRIES,
    DEVICE,
    DTYPES,
    GEOMETRIES,
    SAME,
    channels_last,
    embed,
    embed_flat,
    layer,
    random,
)
from tests.rule import assert_within_rule

MORE = {
    "stride 3, dilation 2": layer(ci=16, co=20, size=(10, 8), filter=(3, 3), stride=(3, 2), dilation=(2, 2)),
    "stride and dilation with a common factor": layer(
        ci=16, co=16, size=(11, 9), filter=(3, 3), stride=(2, 2), padding=(2, 2), dilation=(2, 2)
    ),
    "narrow, strided": layer(ci=32, co=16, size=(9, 7), filter=(3, 2), stride=(2, 3), padding=(1, 1), groups=8),
    "pixels past the last output": layer(ci=16, co=16, size=(8, 8), filter=(2, 2), stride=(3, 3)),
    "an image smaller than the stride": layer(ci=16, co=16, size=(1, 2), filter=(1, 1), stride=(3, 3)),
}
ALL = GEOMETRIES | MORE
TILES = [None, TileConfig(16, 16, 16), TileConfig(32, 128, 32)]


def drawn(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, int], Geometry]:
    """dy, w, the size of the input, and the geometry."""
    ci, co, size, taps, geometry = ALL[name]
    w = random(co, ci // geometry.groups, *taps, dtype=dtype)
    shape = F.conv2d(torch.zeros(2, ci, *size, dtype=dtype, device=w.device), w, None, *geometry).shape
    return random(*shape, dtype=dtype), w, size, geometry


def random_coefs(channels: int) -> Tensor:
    return torch.randn(3, channels, device=random(1).device)


def random_stats(channels: int) -> Tensor:
    stats = torch.randn(5, channels, device=random(1).device)
    stats[2].clamp_(min=0.3)
    return stats


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Everything that a launcher allocates starts as NaN, or as a number that is no place."""
    empty = torch.empty

    def poisoned(*sizes, **options):
        t = empty(*sizes, **options)
        return t.fill_(float("nan") if t.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_geometry(name, dtype):
    dy, w, size, geometry = drawn(name, dtype)
    exact = reference.conv_dgrad(dy.double(), w.double(), size, geometry)
    eager = reference.conv_dgrad(dy, w, size, geometry)
    for config in TILES if dtype == torch.float32 else TILES[::2]:
        dx, sums = conv_dgrad(dy, w, size, geometry=geometry, config=config)
        assert sums is None
        assert dx.is_contiguous(memory_format=torch.channels_last)
        assert_within_rule(dx, eager, exact, sums=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["3x3", "every parameter differs by axis", "1x1", "1x1 stride 2", "narrow groups"])
@pytest.mark.parametrize("with_y", [True, False])
def test_prologue(name, dtype, with_y):
    g, w, size, geometry = drawn(name, dtype)
    y, coefs = random(*g.shape, dtype=dtype), random_coefs(g.shape[1])
    coefs[2] += 50  # what a padded pixel must not see
    if not with_y:
        coefs[1:] = 0
    dy = reference.batch_norm_gradient(g.double(), y.double(), coefs.double())
    exact = reference.conv_dgrad(dy, w.double(), size, geometry)
    eager = reference.conv_dgrad(dy.to(dtype), w, size, geometry)
    for gradient in (g, g.float()):  # under autocast it may be wider than the filter
        dx, _ = conv_dgrad(gradient, w, size, geometry=geometry, y=y if with_y else None, coefs=coefs)
        assert_within_rule(dx, eager, exact, sums=4)


@pytest.mark.parametrize("config", TILES)
@pytest.mark.parametrize(
    ("shape", "step", "before"),
    [((2, 16, 9, 7), 1, 0), ((2, 16, 5, 4), 2, 0), ((2, 24, 5, 4), 2, 4), ((2, 24, 9, 7), 1, 8), ((2, 16, 3, 3), 3, 0)],
)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_shortcut(shape, step, before, stride, config):
    geometry = Geometry(stride, (1, 1))
    w = random(20, 16, 3, 3)
    dy = random(*F.conv2d(random(2, 16, 9, 7), w, None, *geometry).shape)
    shortcut = random(*shape)
    dx, _ = conv_dgrad(dy, w, (9, 7), geometry=geometry, shortcut=Residual(shortcut, step, before), config=config)
    eager, exact = (
        reference.conv_dgrad(dy.to(t), w.to(t), (9, 7), geometry, Residual(shortcut.to(t), step, before))
        for t in (torch.float32, torch.float64)
    )
    assert_within_rule(dx, eager, exact, sums=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", TILES[::2])
@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2, odd size", "1x1", "depthwise", "pixels past the last output"])
def test_mask_and_sums(name, config, dtype):
    dy, w, size, geometry = drawn(name, dtype)
    channels = w.shape[1] * geometry.groups
    y, stats = random(2, channels, *size, dtype=dtype), random_stats(channels)
    v = y.double() * stats[2].double()[:, None, None] + stats[3].double()[:, None, None]
    g, sums = conv_dgrad(dy, w, size, mask=(y, stats), geometry=geometry, config=config)
    plain, _ = conv_dgrad(dy, w, size, geometry=geometry, config=config)
    decided = v.abs() > 1e-5
    assert torch.equal(g[decided], torch.where(v > 0, plain, 0.0)[decided])
    assert_sums(sums, g, y, stats)


def assert_sums(sums: Tensor, g: Tensor, y: Tensor, stats: Tensor) -> None:
    """``sums`` are those of the gradient as it was stored."""
    eager = reference.batch_norm_sums(g.float(), y.float(), stats)
    exact = reference.batch_norm_sums(g.double(), y.double(), stats.double())
    for ours_row, eager_row, exact_row in zip(sums.sum(1), eager, exact, strict=True):
        assert_within_rule(ours_row, eager_row, exact_row, sums=2)


WHOLE = ["3x3 stride 2, odd size", "every parameter differs by axis", "1x1", "1x1 stride 2", "narrow groups"]


def drawn_whole(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, int], dict]:
    """``drawn``, and among the arguments everything optional: prologue, shortcut, mask."""
    g, w, size, geometry = drawn(name, dtype)
    channels = w.shape[1] * geometry.groups
    stats = random_stats(channels)
    stats[2, ::2] *= -1
    more = dict(
        geometry=geometry,
        y=random(*g.shape, dtype=dtype),
        coefs=random_coefs(g.shape[1]),
        shortcut=Residual(random(2, channels + 8, *(-(-s // 2) for s in size), dtype=dtype), 2, 3),
        mask=(random(2, channels, *size, dtype=dtype), stats),
    )
    return g, w, size, more


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [None, TileConfig(32, 128, 32)])
@pytest.mark.parametrize("name", WHOLE)
def test_everything_at_once(name, config, dtype):
    g, w, size, arguments = drawn_whole(name, dtype)
    ours, sums = conv_dgrad(g, w, size, config=config, **arguments)
    geometry, y, coefs, shortcut, (y_in, stats) = arguments.values()
    v = y_in.double() * stats[2].double()[:, None, None] + stats[3].double()[:, None, None]

    def specification(t: torch.dtype) -> Tensor:
        dy = reference.batch_norm_gradient(g.double(), y.double(), coefs.double()).to(t)
        dx = reference.conv_dgrad(dy, w.to(t), size, geometry, shortcut._replace(tensor=shortcut.tensor.to(t)))
        return torch.where(v > 0, dx, 0.0)

    undecided = v.abs() <= 1e-5
    exact, eager = (specification(t).masked_fill(undecided, 0.0) for t in (torch.float64, dtype))
    assert_within_rule(ours.masked_fill(undecided, 0.0), eager, exact, sums=4)
    assert_sums(sums, ours, y_in, stats)


def test_pixels_that_no_tap_reaches_get_the_shortcut_alone():
    dy, w, size, geometry = drawn("1x1 stride 2", torch.float32)
    shortcut = random(2, 20, *size)
    dx, _ = conv_dgrad(dy, w, size, geometry=geometry, shortcut=Residual(shortcut))
    reached = torch.zeros(size, dtype=torch.bool, device=DEVICE)
    reached[::2, ::2] = True
    assert torch.equal(dx[..., ~reached], shortcut[..., ~reached])
    assert not (dx[..., reached] == shortcut[..., reached]).any()


@pytest.mark.parametrize("name", ALL)
def test_reads_only_its_inputs_and_writes_only_its_outputs(name, monkeypatch):
    g, w, size, arguments = drawn_whole(name, torch.float32)
    want = conv_dgrad(g, w, size, **arguments)
    nan = float("nan")
    shortcut, (y_in, stats) = arguments["shortcut"], arguments["mask"]
    guarded = arguments | {
        "y": embed(arguments["y"], nan),
        "coefs": embed_flat(arguments["coefs"], nan),
        "shortcut": shortcut._replace(tensor=embed(shortcut.tensor, nan)),
        "mask": (embed(y_in, nan), embed_flat(stats, nan)),
    }
    buffers = []

    def guarded_empty(*shape, memory_format=torch.contiguous_format, **options):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        like = torch.zeros(shape, **options).contiguous(memory_format=memory_format)
        view = embed_flat(torch.full_like(like, nan), 7.0)
        buffers.append(view)
        return view

    monkeypatch.setattr(module.torch, "empty", guarded_empty)
    got = conv_dgrad(embed(g, nan), embed_flat(w, nan), size, **guarded)
    assert len(buffers) == 2
    for ours, wanted, view in zip(got, want, buffers, strict=True):
        assert torch.equal(ours, wanted)
        storage = torch.as_strided(view, (view.untyped_storage().nbytes() // 4,), (1,), 0)
        assert (storage[:512] == 7.0).all()
        assert (storage[512 + view.numel() :] == 7.0).all()


def test_nan_passes_the_mask_and_the_product():
    dy, w, size, geometry = drawn("3x3", torch.float32)
    y, stats = random(2, 16, *size), random_stats(16)
    y[0, 3, 4, 4] = float("nan")
    g, _ = conv_dgrad(dy, w, size, geometry=geometry, mask=(y, stats))
    assert g[0, 3, 4, 4] != 0
    dy[1, 0, 2, 2] = float("inf")
    g, _ = conv_dgrad(dy, w, size, geometry=geometry)
    assert not torch.isfinite(g[1, :, 2, 2]).any()
    assert torch.isfinite(g[0]).all()


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["narrow groups", "groups that do not merge evenly", "depthwise", "narrow, strided"])
def test_what_is_not_finite_stays_in_its_group(name, value, prologue):
    dy, w, size, geometry = drawn(name, torch.float32)
    dy[0, 5, 2, 2] = value
    groups = geometry.groups
    y, coefs = random(*dy.shape), random_coefs(dy.shape[1])
    more = dict(y=y, coefs=coefs) if prologue else {}
    ours, _ = conv_dgrad(dy, w, size, geometry=geometry, **more)
    # Each group apart: what a library's own grouped convolution does to NaN is its own business.
    eager, exact = (
        torch.cat([
            reference.conv_dgrad(*parts, size, geometry._replace(groups=1))
            for parts in zip(incoming(dy, more, t).chunk(groups, 1), w.to(t).chunk(groups), strict=True)
        ], 1)
        for t in (torch.float32, torch.float64)
    )  # fmt: skip
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours.isinf(), eager.isinf())
    touched = ~eager.isfinite()
    assert touched.any()
    assert_within_rule(*(t.masked_fill(touched, 0.0) for t in (ours, eager, exact)), sums=4)


def incoming(g: Tensor, vectors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    if not vectors:
        return g.to(dtype)
    return reference.batch_norm_gradient(g.double(), vectors["y"].double(), vectors["coefs"].double()).to(dtype)


@pytest.mark.parametrize("name", WHOLE)
def test_two_runs_are_equal_to_the_bit(name):
    g, w, size, arguments = drawn_whole(name, torch.float32)
    first, second = (conv_dgrad(g, w, size, **arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_images():
    w, dy = random(20, 16, 3, 3), channels_last(torch.zeros(0, 20, 3, 3, device=DEVICE))
    assert conv_dgrad(dy, w, (5, 5))[0].shape == (0, 16, 5, 5)
    y_in = channels_last(torch.zeros(0, 16, 5, 5, device=DEVICE))
    dx, sums = conv_dgrad(dy, w, (5, 5), mask=(y_in, random_stats(16)))
    assert (dx.shape, sums.shape) == ((0, 16, 5, 5), (2, 0, 16))


def test_output_dtype():
    dy, w, size, geometry = drawn("3x3", torch.float16)
    wide, _ = conv_dgrad(dy, w, size, geometry=geometry, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.half(), conv_dgrad(dy, w, size, geometry=geometry)[0])


# The first passes 2^31 inside the image; of the second only the pixel at which the walk over the taps starts does.
@pytest.mark.parametrize("step", [2**30 + 16, 700_000_000])
def test_offsets_beyond_32_bits(step, request):
    """Pixels a gigabyte apart: only the pages that hold them exist."""
    if step > 2**30:  # of the other, masked rows behind the last pixel overflow
        request.getfixturevalue("checked_for_overflow")
    buffer = torch.empty_strided((2 * step + 64,), (1,), dtype=torch.float16, device=DEVICE)
    dy, shortcut, y_in = (
        torch.as_strided(buffer, (1, 16, 1, 3), (3 * step, 1, 3 * step, step), 16 * i) for i in range(3)
    )
    for t in (dy, shortcut, y_in):
        t.copy_(random(1, 16, 1, 3))
    stats = random_stats(16)
    for taps in (1, 3):
        w = random(16, 16, taps, taps, dtype=torch.float16)
        geometry = Geometry(padding=(taps // 2, taps // 2))
        seen = []
        with observe(seen.append):
            far = conv_dgrad(dy, w, (1, 3), geometry=geometry, shortcut=Residual(shortcut), mask=(y_in, stats))
        assert seen[0].arguments["form"].INT64 or (taps, step) == (1, 700_000_000)
        near = [channels_last(t.contiguous()) for t in (dy, shortcut, y_in)]
        cut, masked = Residual(near[1]), (near[2], stats)
        want = conv_dgrad(near[0], w, (1, 3), geometry=geometry, shortcut=cut, mask=masked)
        assert all(torch.equal(a, b) for a, b in zip(far, want, strict=True))


@pytest.mark.parametrize("axis", [0, 1])
def test_int64_is_chosen_by_where_the_walk_over_the_taps_starts(axis):
    """With padding, two rows or columns past the image: 2^21 pixels of 1024 channels are 2^31 elements."""

    def chosen(pixels: int, padding: int) -> bool:
        calls = []
        size, taps, pads = [1, 1], [1, 1], [0, 0]
        size[axis], taps[axis], pads[axis] = pixels, 1 + 2 * padding, padding
        shapes = (1, 1024, *size), (1024, 1024, *taps)
        dy, w = (torch.empty(s, device="meta", memory_format=torch.channels_last) for s in shapes)
        with dry_run(90), observe(calls.append):
            conv_dgrad(dy, w, tuple(size), geometry=Geometry(padding=tuple(pads)))
        return calls[0].arguments["form"].INT64

    assert not chosen(2**21 - 2, padding=0)
    assert chosen(2**21 - 2, padding=1)
    assert chosen(2**21, padding=0)


def planned(dy: Tensor, w: Tensor, size: tuple[int, int], **arguments) -> Cost:
    seen = []
    with dry_run(90), observe(seen.append):
        conv_dgrad(dy, w, size, **arguments)
    return seen[0].cost()


def test_cost_counts_each_byte_once():
    def half(*shape: int) -> Tensor:
        return channels_last(torch.empty(shape, dtype=torch.float16, device="meta"))

    dy, w, coefs = half(2, 32, 9, 9), half(32, 64, 3, 3), torch.empty(3, 32, device="meta")
    plain = planned(dy, w, (9, 9), geometry=SAME)
    assert plain.flops == 2 * 2 * 81 * 32 * 64 * 9
    assert plain.bytes_read == 2 * (2 * 81 * 32 + 32 * 64 * 9)
    assert plain.bytes_written == 2 * 2 * 81 * 64
    scaled = planned(dy, w, (9, 9), geometry=SAME, coefs=coefs)
    assert scaled.bytes_read - plain.bytes_read == 4 * 32, "without y, neither of its coefficients counts"
    prologue = planned(dy, w, (9, 9), geometry=SAME, coefs=coefs, y=half(2, 32, 9, 9))
    assert prologue.bytes_read - plain.bytes_read == 2 * 2 * 81 * 32 + 4 * 3 * 32
    shortcut = planned(dy, w, (9, 9), geometry=SAME, shortcut=Residual(half(2, 96, 5, 5), 2, 16))
    assert shortcut.bytes_read - plain.bytes_read == 2 * 2 * 25 * 64, "of the shortcut's channels, those of the result"
    mask = planned(dy, w, (9, 9), geometry=SAME, mask=(half(2, 64, 9, 9), torch.empty(5, 64, device="meta")))
    assert mask.bytes_read - plain.bytes_read == 2 * 2 * 81 * 64 + 4 * 3 * 64, "mean, scale and shift"
    tiles = (mask.bytes_written - plain.bytes_written) / (4 * 2 * 64)
    assert tiles == int(tiles) >= 2
    strided = planned(half(2, 32, 5, 5), half(32, 64, 1, 1), (9, 9), geometry=Geometry(stride=(2, 2)))
    assert strided.bytes_read == 2 * (2 * 25 * 32 + 32 * 64)
    assert strided.bytes_written == plain.bytes_written, "pixels that no tap reaches are written too"
    padded = planned(half(2, 32, 11, 11), half(32, 64, 1, 1), (9, 9), geometry=SAME)
    assert padded.bytes_read == 2 * (2 * 81 * 32 + 32 * 64), "what went into the padding counts for nothing"


def test_errors_name_the_argument():
    w, dy = random(20, 16, 3, 3), random(2, 20, 3, 3)
    with pytest.raises(ValueError, match=r"dy must have shape \[N, CO, 4, 4\]; got"):
        conv_dgrad(dy, w, (6, 6))
    with pytest.raises(ValueError, match="w must be channels_last"):
        conv_dgrad(dy, w.contiguous(), (5, 5))
    with pytest.raises(ValueError, match=r"w of shape .* does not fit 20 channels in 3 groups"):
        conv_dgrad(dy, w, (5, 5), geometry=Geometry(groups=3))
    with pytest.raises(ValueError, match="w may have at most 64 taps"):
        conv_dgrad(random(1, 16, 9, 9), random(16, 16, 9, 9), (9, 9), geometry=Geometry(padding=(4, 4)))
    with pytest.raises(ValueError, match="y must lie in memory as dy does"):
        conv_dgrad(dy, w, (5, 5), y=random(2, 24, 3, 3)[:, :20], coefs=random_coefs(20))
    with pytest.raises(ValueError, match=r"mask\[0\] must have the shape of the result"):
        conv_dgrad(dy, w, (5, 5), mask=(random(2, 16, 5, 6), random_stats(16)))
    with pytest.raises(ValueError, match=r"mask\[1\] must be contiguous float32 \[5, 16\]; got .* \(5, 20\)"):
        conv_dgrad(dy, w, (5, 5), mask=(random(2, 16, 5, 5), random_stats(20)))
    with pytest.raises(ValueError, match=r"coefs must be contiguous float32 \[3, 20\]; got .* \(3, 16\)"):
        conv_dgrad(dy, w, (5, 5), coefs=random_coefs(16))
    for change in (dict(y=random(2, 20, 3, 3)), dict(dy=dy.half())):
        with pytest.raises(ValueError, match="without coefs, dy must have the dtype of w"):
            conv_dgrad(**{"dy": dy, "w": w, "size": (5, 5), **change})


@pytest.mark.parametrize(("geometry", "message"), BAD_GEOMETRIES)
def test_a_convolution_without_meaning_is_refused(geometry, message):
    with pytest.raises(ValueError, match=message):
        conv_dgrad(random(1, 8, 1, 2), random(8, 16, 3, 3), (3, 4), geometry=geometry)


@pytest.mark.parametrize(
    ("shape", "step", "before"),
    [((2, 12, 5, 5), 1, 0), ((2, 16, 4, 5), 1, 0), ((1, 16, 5, 5), 1, 0), ((2, 16, 5, 5), 2, 0), ((2, 20, 5, 5), 1, 8)],
)
def test_a_shortcut_that_does_not_fit(shape, step, before):
    with pytest.raises(ValueError, match=r"shortcut must have shape \[2, C, .* channels from channel"):
        conv_dgrad(
            random(2, 20, 3, 3), random(20, 16, 3, 3), (5, 5),
            shortcut=Residual(random(*shape), step, before),
        )  # fmt: skip


def test_a_shortcut_without_a_step():
    with pytest.raises(ValueError, match=r"shortcut\.step must be an integer of at least 1; got 0"):
        conv_dgrad(
            random(2, 20, 3, 3), random(20, 16, 3, 3), (5, 5), shortcut=Residual(random(2, 16, 5, 5), step=0)
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "tile"),
    [
        ({}, (128, 128, 64, 8)),
        ({"co": 96}, (128, 128, 32, 8)),
        ({"arch": 80}, (128, 128, 64, 8)),
        ({"n": 32}, (64, 128, 64, 4)),
        ({"ci": 192}, (64, 128, 64, 4)),
        ({"co": 200}, (64, 128, 64, 4)),
        ({"arch": 89}, (64, 128, 32, 4)),
        ({"dtype": torch.float32, "tf32": True}, (64, 64, 32, 4)),
    ],
    ids=str,
)
def test_tiles_in_front_of_an_epilogue_are_wide_where_they_fill_the_gpu(change, tile):
    sizes = {"n": 256, "h": 14, "w": 14, "ci": 256, "co": 256, "r": 3, "s": 3, "arch": 90}
    plain = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "dtype": torch.bfloat16}
    problem = ConvProblem(**sizes | plain | {"tf32": False, "prologue": False} | change)
    config = default_config(problem, epilogue=True)
    assert (config.block_m, config.block_n, config.block_k, config.num_warps) == tile
    assert default_config(problem, epilogue=False).num_warps == 4
