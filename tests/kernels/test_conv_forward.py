"""conv_forward against the fp64 reference: geometry, epilogues, prologue, hostile numbers, memory it may touch."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.engine import reference
from resnet_fused.kernels import conv_forward as module
from resnet_fused.kernels.activation import IDENTITY, RELU
from resnet_fused.kernels.conv import ConvProblem, Geometry
from resnet_fused.kernels.conv_forward import (
    conv_forward,
    conv_forward_moments,
    default_config,
    split_tiles,
    steps,
    wide_tiles,
)
from resnet_fused.kernels.epilogue import Norm, Prologue, Residual
from resnet_fused.kernels.launch import INTERPRETER, Cost, TileConfig, dry_run, observe
from resnet_fused.kernels.memory import layout, pixel_stride
from tests.rule import assert_within_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cannot do arithmetic in bfloat16; there fp16 stands for the 16-bit formats.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TILES = [None, TileConfig(16, 16, 16), TileConfig(32, 128, 32)]
SAME = Geometry(padding=(1, 1))
"""That of a 3x3 convolution whose output has the size of its input."""


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    t = torch.randn(shape, device=DEVICE).to(dtype)
    return channels_last(t) if len(shape) == 4 else t


def random_norm(channels: int) -> Norm:
    return Norm(random(channels), torch.rand(channels, device=DEVICE) + 0.5, random(channels), random(channels), 1e-5)


def specification(
    x, w, *, geometry=Geometry(), prologue=None, bias=None, norm=None, residual=None, activation=IDENTITY, dtype
):
    """What a launch must compute, in ``dtype`` throughout."""
    cast = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    x = cast(x)
    if prologue is not None:
        x = reference.scale_shift_act(x, cast(prologue.scale), cast(prologue.shift), prologue.activation)
    z = F.conv2d(x, cast(w), cast(bias), *geometry)
    if norm is not None:
        z = F.batch_norm(z, cast(norm.mean), cast(norm.var), cast(norm.gamma), cast(norm.beta), False, 0.0, norm.eps)
    if residual is not None:
        shortcut = reference.PaddedIdentity(cast(residual.tensor), residual.step, residual.before)
        z = z + shortcut.materialize(z.shape[1])
    return reference.activate(z, activation)


def check(x, w, *, config=None, **arguments):
    ours = conv_forward(x, w, config=config, **arguments)
    eager = specification(x, w, dtype=x.dtype, **arguments)
    assert_within_rule(ours, eager, specification(x, w, dtype=torch.float64, **arguments))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    return ours


def layer(ci: int, co: int, size: tuple[int, int], filter: tuple[int, int], **geometry) -> tuple:
    """Channels of input and output, the sizes of input and filter, and the geometry."""
    return ci, co, size, filter, Geometry(**geometry)


GEOMETRIES = {
    "3x3": layer(ci=16, co=24, size=(9, 7), filter=(3, 3), padding=(1, 1)),
    "3x3 stride 2, odd size": layer(ci=20, co=24, size=(9, 7), filter=(3, 3), stride=(2, 2), padding=(1, 1)),
    "every parameter differs by axis": layer(
        ci=18, co=20, size=(11, 8), filter=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)
    ),
    "dilated along rows": layer(ci=20, co=16, size=(9, 6), filter=(3, 2), dilation=(2, 1)),
    "no padding": layer(ci=16, co=16, size=(6, 9), filter=(2, 3)),
    "padding wider than the filter": layer(ci=16, co=16, size=(3, 4), filter=(2, 2), padding=(3, 3)),
    "5x5": layer(ci=16, co=16, size=(7, 6), filter=(5, 5), padding=(2, 2)),
    "7x7 with 16 channels": layer(ci=16, co=16, size=(7, 6), filter=(7, 7), stride=(2, 2), padding=(3, 3)),
    "stem": layer(ci=3, co=20, size=(9, 8), filter=(7, 7), stride=(2, 2), padding=(3, 3)),
    "three channels, no padding": layer(ci=3, co=16, size=(8, 7), filter=(3, 2)),
    "one channel": layer(ci=1, co=16, size=(8, 7), filter=(3, 3), padding=(1, 1)),
    "1x1": layer(ci=40, co=150, size=(5, 7), filter=(1, 1)),
    "1x1 with three channels": layer(ci=3, co=5, size=(5, 7), filter=(1, 1)),
    "1x1 stride 2": layer(ci=20, co=24, size=(9, 7), filter=(1, 1), stride=(2, 2)),
    "1x1 strided along rows": layer(ci=20, co=24, size=(5, 7), filter=(1, 1), stride=(1, 2)),
    "1x1 strided along columns": layer(ci=20, co=24, size=(5, 7), filter=(1, 1), stride=(2, 1)),
    "1x1 padded": layer(ci=16, co=16, size=(4, 4), filter=(1, 1), padding=(1, 1)),
    "two groups": layer(ci=80, co=48, size=(5, 6), filter=(3, 3), padding=(1, 1), groups=2),
    "narrow groups": layer(ci=32, co=32, size=(5, 6), filter=(3, 3), padding=(1, 1), groups=8),
    "groups that do not merge evenly": layer(ci=28, co=42, size=(5, 6), filter=(3, 3), padding=(1, 1), groups=7),
    "depthwise": layer(ci=12, co=24, size=(9, 7), filter=(3, 3), stride=(2, 2), padding=(1, 1), groups=12),
    "filter as large as the image": layer(ci=16, co=16, size=(4, 5), filter=(4, 5)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry(name, dtype):
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x = random(2, ci, *size, dtype=dtype)
    w = random(co, ci // geometry.groups, *taps, dtype=dtype)
    for config in TILES:
        if config is not None and geometry.groups > 1:
            config = TileConfig(config.block_m, config.block_n, 32 if geometry.groups > 2 else 16)
        check(x, w, norm=random_norm(co), activation=RELU, config=config, geometry=geometry)


@pytest.mark.parametrize("filter_size", range(1, 8))
def test_square_filters_of_every_size(filter_size):
    x, w = random(1, 16, 9, 8), random(16, 16, filter_size, filter_size)
    check(x, w, geometry=Geometry(padding=(filter_size // 2, filter_size // 2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "norm", "residual", "relu"), list(product((False, True), repeat=4)))
def test_every_epilogue(bias, norm, residual, relu, dtype):
    x, w = random(2, 16, 5, 6, dtype=dtype), random(20, 16, 3, 3, dtype=dtype)
    check(
        x,
        w,
        geometry=SAME,
        bias=random(20, dtype=dtype) if bias else None,
        norm=random_norm(20) if norm else None,
        residual=Residual(random(2, 20, 5, 6, dtype=dtype)) if residual else None,
        activation=RELU if relu else IDENTITY,
    )


@pytest.mark.parametrize("config", TILES)
def test_wide_tiles_are_finished_in_halves(config):
    x, w = random(1, 16, 5, 6), random(136, 16, 1, 1)
    check(x, w, norm=random_norm(136), residual=Residual(random(1, 136, 5, 6)), activation=RELU, config=config)


@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)])
def test_norm_without_gamma_or_beta(affine):
    x, w, norm = random(2, 16, 5, 6), random(20, 16, 1, 1), random_norm(20)
    norm = norm._replace(gamma=norm.gamma if affine[0] else None, beta=norm.beta if affine[1] else None)
    ours = conv_forward(x, w, norm=norm)
    gamma = norm.gamma if affine[0] else torch.ones_like(norm.mean)
    beta = norm.beta if affine[1] else torch.zeros_like(norm.mean)
    whole = norm._replace(gamma=gamma, beta=beta)
    assert_within_rule(
        ours, specification(x, w, norm=whole, dtype=x.dtype), specification(x, w, norm=whole, dtype=torch.float64)
    )


def test_norm_parameters_may_be_16_bit():
    x, w, norm = random(2, 16, 5, 6, dtype=torch.float16), random(20, 16, 1, 1, dtype=torch.float16), random_norm(20)
    half = Norm(*(v.half() for v in norm[:4]), norm.eps)
    wide = Norm(*(v.float() for v in half[:4]), norm.eps)
    assert torch.equal(conv_forward(x, w, norm=half), conv_forward(x, w, norm=wide))


@pytest.mark.parametrize(("step", "before", "size"), [(2, 4, (9, 7)), (2, 0, (8, 6)), (1, 6, (5, 4)), (3, 10, (10, 7))])
@pytest.mark.parametrize("config", TILES)
def test_padded_identity_is_read_in_place(step, before, size, config):
    residual = random(2, 10, *size)
    p, q = (-(-s // step) for s in size)
    check(
        random(2, 16, p, q), random(20, 16, 3, 3), geometry=SAME, norm=random_norm(20), activation=RELU,
        residual=Residual(residual, step, before), config=config,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["3x3", "every parameter differs by axis", "stem", "1x1", "1x1 stride 2", "narrow groups"]
)
def test_padding_is_zero_after_the_prologue(name, dtype):
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w = random(2, ci, *size, dtype=dtype), random(co, ci // geometry.groups, *taps, dtype=dtype)
    prologue = Prologue(random(ci), random(ci) + 100)
    ours = conv_forward(x, w, prologue=prologue, geometry=geometry)
    a = reference.scale_shift_act(x.double(), *(v.double() for v in prologue[:2]))
    rounded = F.conv2d(a.to(dtype), w, None, *geometry)
    assert_within_rule(ours, rounded, F.conv2d(a, w.double(), None, *geometry))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_zero_and_large_statistics(dtype):
    x, w = random(2, 16, 5, 6, dtype=dtype), random(24, 16, 3, 3, dtype=dtype)
    y = F.conv2d(x.double(), w.double(), padding=1)
    mean, var = y.mean((0, 2, 3)).float(), y.var((0, 2, 3)).float()
    gamma = torch.linspace(-2, 2, 24, device=DEVICE)
    gamma[5] = 0
    for shift, scale in ((0.0, 1.0), (1000.0, 1.0), (0.0, 1e-4)):
        bias = torch.full((24,), shift, device=DEVICE, dtype=dtype)
        norm = Norm(mean + shift, var * scale, gamma, random(24), 1e-5)
        check(x, w, geometry=SAME, bias=bias, norm=norm, activation=RELU)


def test_tiny_variance_leaves_eps():
    x, w = random(1, 16, 4, 4), random(16, 16, 1, 1)
    check(x, w, norm=Norm(random(16), torch.zeros(16, device=DEVICE), random(16), random(16), 1e-3), activation=RELU)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_go_through_as_in_eager(value):
    x, w, norm = random(2, 16, 6, 5), random(20, 16, 3, 3), random_norm(20)
    x[0, 3, 2, 2] = value
    ours = conv_forward(x, w, geometry=SAME, norm=norm, activation=RELU)
    eager = specification(x, w, geometry=SAME, norm=norm, activation=RELU, dtype=x.dtype)
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours.isinf(), eager.isinf())
    assert ours.isnan().any() or ours.isinf().any()


MERGED = ["narrow groups", "groups that do not merge evenly", "depthwise"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", MERGED)
def test_what_is_not_finite_stays_in_its_group(name, value, prologue, dtype):
    """Groups that share a tile share a block-diagonal filter: its zeros must not meet it."""
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w = random(2, ci, *size, dtype=dtype), random(co, ci // geometry.groups, *taps, dtype=dtype)
    x[0, 5, 2, 2] = value
    w[-1, 0, 0, 0] = 0
    vectors = Prologue(torch.rand(ci, device=DEVICE) + 0.5, random(ci)) if prologue else None
    ours = conv_forward(x, w, prologue=vectors, geometry=geometry)
    # Each group apart: what a library's own grouped convolution does to NaN is its own business.
    eager, exact = (
        torch.cat([
            specification(*parts, dtype=t, geometry=geometry._replace(groups=1))
            for parts in zip(activated(x, vectors, t).chunk(geometry.groups, 1), w.chunk(geometry.groups), strict=True)
        ], 1)
        for t in (dtype, torch.float64)
    )  # fmt: skip
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours.isinf(), eager.isinf())
    assert eager.isfinite().all() == (prologue and value < 0)
    touched = ~eager.isfinite()
    assert_within_rule(*(t.masked_fill(touched, 0.0) for t in (ours, eager, exact)))


def activated(x: Tensor, vectors: Prologue | None, dtype: torch.dtype) -> Tensor:
    if vectors is None:
        return x.to(dtype)
    return reference.scale_shift_act(x.double(), *(v.double() for v in vectors[:2])).to(dtype)


def test_relu_keeps_nan_of_the_residual():
    residual = random(1, 16, 3, 3)
    residual[0, 1, 1, 1] = float("nan")
    ours = conv_forward(random(1, 16, 3, 3), random(16, 16, 1, 1), residual=Residual(residual), activation=RELU)
    assert ours.isnan().nonzero().tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_reads_only_the_input_and_writes_only_the_output(name, monkeypatch):
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w, norm = random(2, ci, *size), random(co, ci // geometry.groups, *taps), random_norm(co)
    want = conv_forward(x, w, norm=norm, activation=RELU, geometry=geometry)
    residual = torch.zeros_like(want)
    guarded = [embed(t, float("nan")) for t in (x, residual)]
    w_guarded = embed_flat(w, float("nan"))
    out = embed(torch.full_like(want, float("nan")), 7.0)
    got = conv_forward(
        guarded[0], w_guarded, norm=norm, activation=RELU, residual=Residual(guarded[1]), out=out, geometry=geometry
    )
    assert got is out
    assert torch.equal(got, want)
    storage = torch.as_strided(out, (out.untyped_storage().nbytes() // 4,), (1,), 0)
    assert (storage == 7.0).sum() == storage.numel() - got.numel()


def embed(t: Tensor, guard: float) -> Tensor:
    """``t`` as a slice of channels and images of a larger tensor whose other elements are ``guard``."""
    n, c, h, w = t.shape
    whole = channels_last(torch.full((n + 2, c + 16, h, w), guard, dtype=t.dtype, device=t.device))
    view = whole[1:-1, 8:-8]
    view.copy_(t)
    return view


def embed_flat(t: Tensor, guard: float) -> Tensor:
    """``t`` in the middle of a buffer of ``guard``."""
    buffer = torch.full((t.numel() + 1024,), guard, dtype=t.dtype, device=t.device)
    view = torch.as_strided(buffer, t.shape, t.stride(), 512)
    view.copy_(t)
    return view


def test_every_output_element_is_written(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(module.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    for ci, co, size, taps, geometry in GEOMETRIES.values():
        y = conv_forward(
            random(2, ci, *size), random(co, ci // geometry.groups, *taps), activation=RELU, geometry=geometry
        )
        assert not y.isnan().any()


@pytest.mark.usefixtures("checked_for_overflow")
def test_offsets_beyond_32_bits():
    """Pixels a gigabyte apart: only the pages that hold them exist."""
    step = 2**30 + 16
    buffer = torch.empty(2 * step + 64, dtype=torch.float16, device=DEVICE)
    x = torch.as_strided(buffer, (1, 16, 1, 3), (3 * step, 1, 3 * step, step))
    out = torch.as_strided(buffer, (1, 16, 1, 3), (3 * step, 1, 3 * step, step), 32)
    residual = torch.as_strided(buffer, (1, 16, 1, 3), (3 * step, 1, 3 * step, step), 48)
    x.copy_(random(1, 16, 1, 3))
    residual.copy_(random(1, 16, 1, 3))
    for taps, config in ((1, None), (3, None), (3, TileConfig(16, 16, 16, splits=4))):
        w = random(16, 16, taps, taps, dtype=torch.float16)
        geometry = Geometry(padding=(taps // 2, taps // 2))
        seen = []
        with observe(seen.append):
            conv_forward(x, w, geometry=geometry, residual=Residual(residual), out=out, activation=RELU, config=config)
        assert seen[0].arguments["form"].INT64
        assert seen[-1] is seen[0] or seen[1].arguments["INT64"]
        near = Residual(channels_last(residual))
        small = conv_forward(channels_last(x), w, geometry=geometry, residual=near, activation=RELU, config=config)
        assert torch.equal(out, small)


def test_int64_is_chosen_by_extent():
    def chosen(n: int) -> bool:
        seen = []
        with dry_run(90), observe(seen.append):
            x = torch.empty(n, 64, 64, 64, device="meta", memory_format=torch.channels_last)
            conv_forward(x, torch.empty(64, 64, 1, 1, device="meta"))
        return seen[0].arguments["form"].INT64

    assert not chosen(2**31 // 64**3 - 1)
    assert chosen(2**31 // 64**3)


def test_no_images():
    y = conv_forward(random(0, 16, 5, 5), random(20, 16, 3, 3), geometry=SAME)
    assert y.shape == (0, 20, 5, 5)


def test_output_dtype():
    x, w = random(1, 16, 4, 4, dtype=torch.float16), random(16, 16, 1, 1, dtype=torch.float16)
    y = conv_forward(x, w, residual=Residual(random(1, 16, 4, 4)), out_dtype=torch.float32)
    assert y.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(1, 16, 4, 4)), r"x must be pixel-linear .* got shape \(1, 16, 4, 4\)"),
        (dict(w=torch.zeros(8, 16, 3, 3)), r"w must be channels_last"),
        (
            dict(w=channels_last(torch.zeros(8, 12, 3, 3))),
            r"w of shape \(8, 12, 3, 3\) does not fit 16 channels in 1 groups",
        ),
        (dict(out=channels_last(torch.zeros(1, 8, 4, 5))), r"out must have shape \(1, 8, 4, 4\); got \(1, 8, 4, 5\)"),
        (
            dict(residual=Residual(channels_last(torch.zeros(1, 8, 3, 4)))),
            r"residual must have shape \(1, 8, 4, 4\).*got \(1, 8, 3, 4\)",
        ),
        (dict(residual=Residual(channels_last(torch.zeros(1, 9, 4, 4)))), r"residual must have shape \(1, 8, 4, 4\)"),
        (
            dict(residual=Residual(channels_last(torch.zeros(1, 8, 4, 4)), step=0)),
            "residual.step must be an integer of at least 1",
        ),
        (dict(x=channels_last(torch.zeros(1, 16, 4, 4)).double()), r"x must be \[N, C, H, W\], .* got torch.float64"),
        (dict(x=torch.zeros(16, 4, 4)), r"x must be \[N, C, H, W\], .* got torch.float32 \(16, 4, 4\)"),
        (dict(w=torch.zeros(8, 16, 3)), r"w must be \[CO, CI/groups, R, S\].* got torch.float32 \(8, 16, 3\)"),
        (dict(w=channels_last(torch.zeros(8, 16, 3, 3)).half()), "w must have the dtype of x, torch.float32; got .*16"),
        (
            dict(w=channels_last(torch.zeros(8, 16, 9, 9)), geometry=Geometry(padding=(4, 4))),
            "w may have at most 64 taps",
        ),
        (dict(out_dtype=torch.int32), r"out must be \[N, C, H, W\], .* got torch.int32"),
        (dict(out=torch.zeros(1, 8, 1, 1).expand(1, 8, 4, 4)), "out must be pixel-linear"),
        (dict(out=torch.zeros(999).as_strided((1, 8, 4, 4), (64, 1, 16, 4))), "out must be pixel-linear"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "x": channels_last(torch.zeros(1, 16, 4, 4)),
        "w": channels_last(torch.zeros(8, 16, 3, 3)),
        "geometry": SAME,
    }
    with pytest.raises(ValueError, match=message):
        conv_forward(**{**arguments, **change})


BAD_GEOMETRIES = [
    (Geometry(stride=(0, 1)), r"geometry.stride must be two integers of at least 1; got \(0, 1\)"),
    (Geometry(stride=(1, -2)), r"geometry.stride must be two integers of at least 1; got \(1, -2\)"),
    (Geometry(stride=2), r"geometry.stride must be two integers of at least 1; got 2"),
    (Geometry(padding=(0, -1)), r"geometry.padding must be two integers of at least 0; got \(0, -1\)"),
    (Geometry(padding=(1,)), r"geometry.padding must be two integers of at least 0; got \(1,\)"),
    (Geometry(dilation=(1, 0)), r"geometry.dilation must be two integers of at least 1; got \(1, 0\)"),
    (Geometry(stride=(2.0, 2.0)), r"geometry.stride must be two integers of at least 1; got \(2\.0, 2\.0\)"),
    (Geometry(groups=2.0), r"geometry.groups must be an integer of at least 1; got 2\.0"),
    (Geometry(groups=0), r"geometry.groups must be an integer of at least 1; got 0"),
    (Geometry(groups=-1), r"geometry.groups must be an integer of at least 1; got -1"),
    (
        Geometry(dilation=(1, 2)),
        r"a filter of 3x3 with dilation \(1, 2\) does not fit into an image of 3x4 with padding",
    ),
    (Geometry(dilation=(2, 1)), "a filter of 3x3 .* does not fit into an image of 3x4"),
]


@pytest.mark.parametrize("launcher", [conv_forward, conv_forward_moments])
@pytest.mark.parametrize(("geometry", "message"), BAD_GEOMETRIES)
def test_a_convolution_without_meaning_is_refused(geometry, message, launcher):
    with pytest.raises(ValueError, match=message):
        launcher(random(1, 16, 3, 4), random(8, 16, 3, 3), geometry=geometry)


def test_merged_groups_need_a_chunk_that_holds_them():
    with pytest.raises(ValueError, match=r"config.block_k must hold the 32 input channels"):
        conv_forward(
            random(1, 32, 4, 4), random(32, 4, 1, 1), geometry=Geometry(groups=8), config=TileConfig(16, 16, 16)
        )


def problem(**change) -> ConvProblem:
    base = dict(
        n=8, h=14, w=14, ci=256, co=256, r=3, s=3, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1,
        dtype=torch.bfloat16, tf32=False, prologue=False, arch=90,
    )  # fmt: skip
    return ConvProblem(**{**base, **change})


def test_default_config_widens_with_the_work():
    assert default_config(problem(n=256)) == TileConfig(128, 128, 64, num_stages=3)
    small = default_config(problem(n=1))
    assert small.block_m * small.block_n == 64 * 64
    assert default_config(problem(arch=INTERPRETER, n=1)).block_m == 256


def test_pixel_stride():
    assert pixel_stride(layout(channels_last(torch.zeros(2, 16, 4, 5)))) == 16
    assert pixel_stride(layout(channels_last(torch.zeros(2, 16, 4, 5))[:, 4:9])) == 16
    assert pixel_stride(layout(channels_last(torch.zeros(2, 16, 4, 5))[:, :, 1:])) is None
    assert pixel_stride(layout(channels_last(torch.zeros(1, 16, 4, 5))[:, :, 1:])) == 16
    assert pixel_stride(layout(torch.zeros(2, 16, 4, 5))) is None
    assert pixel_stride(layout(torch.zeros(2, 16, 1, 1))) == 16
    assert pixel_stride(layout(torch.zeros(1, 16, 4, 5).expand(2, 16, 4, 5))) is None
    assert pixel_stride(layout(channels_last(torch.zeros(1, 16, 4, 5)).expand(2, 16, 4, 5))) is None
    assert pixel_stride(layout(torch.zeros(1, 1, 1, 1).expand(2, 1, 4, 5))) is None, "all pixels in one place"
    for step in (15, 16, 20):
        rows = torch.zeros(200).as_strided((2, 16, 1, 3), (3 * step, 1, 3 * step, step))
        assert pixel_stride(layout(rows)) == (step if step >= 16 else None), "pixels that overlap are not linear"


def test_cost_counts_each_byte_once():
    def cost(**change):
        seen = []
        with dry_run(90), observe(seen.append):
            x = torch.empty(2, 64, 9, 9, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
            size = change.pop("size")
            w = channels_last(torch.empty(32, 64, size, size, dtype=torch.float16, device="meta"))
            conv_forward(x, w, **change)
        return seen[0].cost()

    plain = cost(size=3, geometry=SAME)
    assert plain.flops == 2 * 2 * 81 * 32 * 64 * 9
    assert plain.bytes_read == 2 * (2 * 64 * 81 + 32 * 64 * 9)
    assert plain.bytes_written == 2 * 2 * 32 * 81
    strided = cost(size=1, geometry=Geometry(stride=(2, 2)))
    assert strided.bytes_read == 2 * (2 * 64 * 25 + 32 * 64), (
        "a 1x1 convolution of stride 2 reads a quarter of the pixels"
    )


def moments_of(y: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Per tile of ``rows`` pixels, the mean and the sum of squared deviations of each channel, [2, T, C]."""
    tiles = y.to(dtype).permute(0, 2, 3, 1).flatten(0, 2).split(rows)
    means = [tile.mean(0) for tile in tiles]
    spreads = [(tile - mean).square().sum(0) for tile, mean in zip(tiles, means, strict=True)]
    return torch.stack([torch.stack(means), torch.stack(spreads)])


def check_moments(x, w, **arguments):
    y, (values, rows, pixels, counts, _) = conv_forward_moments(x, w, **arguments)
    assert torch.equal(y, conv_forward(x, w, **arguments))
    assert pixels == y.numel() // y.shape[1]
    assert counts is None
    eager, exact = moments_of(y, rows, torch.float32), moments_of(y, rows, torch.float64)
    for ours, plain, want in zip(values, eager, exact, strict=True):
        # The interpreter adds row after row, a GPU and PyTorch in a tree.
        assert_within_rule(ours, plain, want, sums=16)
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["3x3 stride 2, odd size", "stem", "1x1", "two groups", "groups that do not merge evenly", "depthwise"]
)
def test_moments_are_those_of_the_rounded_output(name, dtype):
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w = random(2, ci, *size, dtype=dtype), random(co, ci // geometry.groups, *taps, dtype=dtype)
    check_moments(x, w, config=TileConfig(16, 16, 32), geometry=geometry)


@pytest.mark.parametrize("config", [*TILES, TileConfig(16, 256, 16)])
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_moments_with_prologue_and_bias(bias, prologue, config):
    """The last tile is ragged in its pixels (47 of them) and in its channels, in both halves of a wide one."""
    x, w = random(1, 16, 47, 1, dtype=torch.float16), random(200, 16, 1, 1, dtype=torch.float16)
    check_moments(
        x, w, config=config, prologue=Prologue(random(16), random(16)) if prologue else None,
        bias=random(200, dtype=torch.float16) if bias else None,
    )  # fmt: skip


@pytest.mark.parametrize("config", [*TILES, TileConfig(16, 256, 16)])
@pytest.mark.parametrize("placed", [(1, 0), (2, 24)], ids=["whole", "strided and padded"])
def test_moments_of_what_a_residual_was_added_to(placed, config):
    step, before = placed
    x, w = random(2, 16, 7, 5, dtype=torch.float16), random(200, 16, 1, 1, dtype=torch.float16)
    residual = Residual(random(2, 200 - 2 * before, 7 * step, 5 * step, dtype=torch.float16), step, before)
    check_moments(x, w, config=config, prologue=Prologue(random(16), random(16)), residual=residual)


def test_moments_far_from_zero():
    x, w = random(2, 16, 9, 7), random(20, 16, 3, 3) * 0.01
    check_moments(x, w, bias=torch.full((20,), 100.0, device=DEVICE), config=TILES[1])


@pytest.mark.parametrize("name", ["3x3", "stem", "1x1", "narrow groups"])
def test_moments_are_written_where_they_belong(name, monkeypatch):
    """In a buffer of NaN between guards, every element is written and none beside it."""
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w = random(2, ci, *size), random(co, ci // geometry.groups, *taps)
    empty, buffers = torch.empty, []

    def guarded(*shape, **options):
        if len(shape) != 3:
            return empty(*shape, **options)
        buffers.append(torch.full((shape[0] * shape[1] * shape[2] + 64,), 7.0, device=DEVICE))
        return buffers[-1][32:-32].view(shape).fill_(float("nan"))

    monkeypatch.setattr(module.torch, "empty", guarded)
    _, moments = conv_forward_moments(x, w, config=TileConfig(16, 16, 32), geometry=geometry)
    assert len(buffers) == 1
    assert not moments.values.isnan().any()
    assert (buffers[0] == 7.0).sum() == 64


def test_moments_keep_nan_in_its_tile():
    x, w = random(1, 16, 8, 8), random(20, 16, 1, 1)
    x[0, 3, 2, 5] = float("nan")
    values = conv_forward_moments(x, w, config=TileConfig(16, 16, 16))[1].values
    assert values.isnan().any(0).any(1).nonzero().flatten().tolist() == [(2 * 8 + 5) // 16]


def test_moments_repeat_to_the_bit_and_cost_what_is_written():
    x, w = random(2, 16, 9, 7), random(40, 16, 3, 3)
    seen = []
    with observe(seen.append):
        results = [conv_forward_moments(x, w, config=TILES[1]) for _ in range(2)]
    (y, first), (again, second) = results
    assert torch.equal(y, again)
    assert torch.equal(first.values, second.values)
    assert seen[0].cost().bytes_written == y.nbytes + first.values.nbytes
    with observe(seen.append):
        conv_forward(x, w, config=TILES[1])
    assert seen[-1].cost().bytes_written == y.nbytes
    assert seen[-1].cost().bytes_read == seen[0].cost().bytes_read


SPLIT = TileConfig(16, 16, 16, splits=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(set(GEOMETRIES) - {"1x1 with three channels", "1x1 padded", "one channel"}))
def test_a_sum_is_split_wherever_its_steps_fall(name, dtype):
    """Shares of different length, which begin and end within a tap, and of one step each."""
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w = random(2, ci, *size, dtype=dtype), random(co, ci // geometry.groups, *taps, dtype=dtype)
    tile = TileConfig(16, 32, 32 if geometry.groups > 2 else 16)
    most = steps(problem_of(x, w, geometry), tile)
    for splits in sorted({2, min(3, most), min(7, most), most}):
        check(x, w, norm=random_norm(co), activation=RELU, config=replace(tile, splits=splits), geometry=geometry)


def problem_of(x: Tensor, w: Tensor, geometry: Geometry) -> ConvProblem:
    (n, ci, h, width), (co, _, r, s) = x.shape, w.shape
    return ConvProblem(n, h, width, ci, co, r, s, *geometry, x.dtype, False, False, INTERPRETER)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "norm", "residual", "relu"), list(product((False, True), repeat=4)))
def test_every_epilogue_follows_the_sum_of_all_parts(bias, norm, residual, relu, dtype):
    x, w = random(2, 16, 5, 6, dtype=dtype), random(72, 16, 3, 3, dtype=dtype)
    check(
        x,
        w,
        geometry=SAME,
        bias=random(72, dtype=dtype) if bias else None,
        norm=random_norm(72) if norm else None,
        residual=Residual(random(2, 72, 5, 6, dtype=dtype)) if residual else None,
        activation=RELU if relu else IDENTITY,
        config=SPLIT,
    )


@pytest.mark.parametrize(("step", "before", "size"), [(2, 4, (9, 7)), (1, 6, (5, 4))])
def test_a_padded_identity_is_added_to_a_split_sum(step, before, size):
    p, q = (-(-s // step) for s in size)
    check(
        random(2, 16, p, q), random(20, 16, 3, 3), geometry=SAME, norm=random_norm(20), activation=RELU,
        residual=Residual(random(2, 10, *size), step, before), config=SPLIT,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["3x3", "stem", "narrow groups"])
def test_a_split_sum_of_normalised_inputs(name):
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w = random(2, ci, *size), random(co, ci // geometry.groups, *taps)
    config = TileConfig(16, 16, 32, splits=2)
    check(x, w, prologue=Prologue(random(ci), random(ci) + 100), geometry=geometry, config=config)


@pytest.mark.parametrize("name", MERGED)
def test_what_is_not_finite_stays_in_its_group_when_split(name):
    """A group apart from its tile, and only the taps of the split: the others are added by the others."""
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w = random(2, ci, *size), random(co, ci // geometry.groups, *taps)
    x[0, 5, 2, 2] = float("inf")
    ours = conv_forward(x, w, geometry=geometry, config=TileConfig(16, 16, 32, splits=4))
    eager = specification(x, w, geometry=geometry, dtype=x.dtype)
    touched = ~eager.isfinite()
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours.isinf(), eager.isinf())
    assert touched.any()
    exact = specification(x, w, geometry=geometry, dtype=torch.float64)
    assert_within_rule(*(t.masked_fill(touched, 0.0) for t in (ours, eager, exact)))


@pytest.mark.parametrize("name", ["3x3 stride 2, odd size", "stem", "two groups", "depthwise"])
def test_a_split_sum_touches_its_own_memory_alone(name, monkeypatch):
    """Between guards, in buffers of NaN, of which every element is written; and twice to the same bits."""
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w = random(2, ci, *size), random(co, ci // geometry.groups, *taps)
    empty, buffers, config = torch.empty, [], TileConfig(16, 16, 32, splits=2)
    want = conv_forward(x, w, geometry=geometry, config=config)

    def guarded(*shape, **options):
        buffers.append(torch.full((prod(shape) + 64,), 7.0, device=DEVICE))
        return buffers[-1][32:-32].view(shape).fill_(float("nan"))

    out = embed(torch.full_like(want, float("nan")), 7.0)
    monkeypatch.setattr(module.torch, "empty", guarded)
    got = conv_forward(embed(x, float("nan")), embed_flat(w, float("nan")), geometry=geometry, out=out, config=config)
    monkeypatch.setattr(module.torch, "empty", empty)
    assert got is out
    assert torch.equal(got, want)
    (parts,) = buffers
    assert not parts.isnan().any()
    assert (parts == 7.0).sum() == 64
    storage = torch.as_strided(out, (out.untyped_storage().nbytes() // 4,), (1,), 0)
    assert (storage == 7.0).sum() == storage.numel() - got.numel()


def test_a_split_sum_takes_two_launches_and_counts_their_bytes():
    x, w, seen = random(2, 16, 5, 6, dtype=torch.float16), random(72, 16, 3, 3, dtype=torch.float16), []
    residual, norm = Residual(random(2, 72, 5, 6, dtype=torch.float16)), random_norm(72)
    with observe(seen.append):
        y = conv_forward(x, w, geometry=SAME, norm=norm, residual=residual, config=SPLIT)
    parts = 3 * y.numel() * 4
    product, total = (call.cost() for call in seen)
    assert [call.kernel.__name__ for call in seen] == ["conv_forward_kernel", "conv_forward_sum_kernel"]
    assert seen[0].grid == (4 * 5, 1, 3)
    assert product == Cost(2 * y.numel() * 16 * 9, x.nbytes + w.nbytes, parts)
    assert total == Cost(0, parts + 4 * 72 * 4 + residual.tensor.nbytes, y.nbytes)


def test_no_images_are_not_split():
    assert conv_forward(random(0, 16, 5, 5), random(20, 16, 3, 3), geometry=SAME, config=SPLIT).shape == (0, 20, 5, 5)


@pytest.mark.parametrize("splits", [0, -1, 10])
def test_splits_are_no_more_than_there_are_steps(splits):
    with pytest.raises(ValueError, match=rf"config.splits must be at least 1 and at most .* are 9; got {splits}"):
        conv_forward(random(1, 16, 4, 4), random(8, 16, 3, 3), geometry=SAME, config=replace(SPLIT, splits=splits))


def test_only_gathered_sums_without_moments_are_split():
    x, w = random(1, 16, 4, 4), random(16, 16, 3, 3)
    with pytest.raises(ValueError, match=r"config.splits must be 1 for a tile of boxes; got 3"):
        conv_forward(x, w, geometry=SAME, config=replace(SPLIT, box=(1, 4, 4)))
    with pytest.raises(ValueError, match=r"config.splits must be 1 where moments are taken; got 3"):
        conv_forward_moments(x, w, geometry=SAME, config=SPLIT)


def test_a_split_sum_is_not_begun_for_vectors_that_its_end_would_refuse():
    x, w, seen = random(1, 16, 4, 4), random(16, 16, 3, 3), []
    with observe(seen.append), pytest.raises(ValueError, match="bias must be contiguous"):
        conv_forward(x, w, geometry=SAME, bias=random(15), config=SPLIT)
    assert not seen


def test_a_wide_tile_is_the_widest_default_with_twice_the_pixels_and_warps():
    widest = default_config(problem(arch=80, n=256))
    assert list(wide_tiles(problem(arch=80, n=256))) == [replace(widest, block_m=256, num_warps=8)]
    others = {"arch": 90}, {"arch": 100}, {"n": 1}, {"co": 64}, {"prologue": True}, {"dtype": torch.float32}
    for change in others:
        assert not list(wide_tiles(problem(**{"arch": 80, "n": 256, **change}))), change


def test_splits_to_choose_from_fill_a_gpu():
    deep = problem(n=1, h=7, w=7, ci=512, co=512)
    assert [tile.splits for tile in split_tiles(deep)] == [2, 4, 8, 16, 32]
    assert {replace(tile, splits=1) for tile in split_tiles(deep)} == {default_config(deep)}
    assert [tile.splits for tile in split_tiles(problem(n=1, h=7, w=7, r=1, s=1, padding=(0, 0)))] == [2, 4]
    assert not list(split_tiles(problem(n=256)))
