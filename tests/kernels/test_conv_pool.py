"""conv_pool against the fp64 reference: geometry, layouts, NaN and infinity as PyTorch's pool has them, cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton

from resnet_fused.kernels.activation import RELU
from resnet_fused.kernels.conv import ConvProblem, Geometry
from resnet_fused.kernels.conv_forward import conv_forward
from resnet_fused.kernels.conv_pool import conv_pool, why_not
from resnet_fused.kernels.epilogue import Norm
from resnet_fused.kernels.gpus import ARCHITECTURES
from resnet_fused.kernels.launch import dry_run, observe
from resnet_fused.plan import roofline
from resnet_fused.plan.problem import Problem, Tiles
from tests.compiler import answer
from tests.kernels.test_conv_forward import DEVICE, DTYPES, layer, random, random_norm
from tests.rule import assert_within_rule

STEM = Geometry((2, 2), (3, 3))
GEOMETRIES = {
    "7x7": layer(ci=3, co=20, size=(32, 18), filter=(7, 7), stride=(2, 2), padding=(3, 3)),
    "7x7, odd size": layer(ci=3, co=16, size=(35, 17), filter=(7, 7), stride=(2, 2), padding=(3, 3)),
    "a tile's edge": layer(ci=3, co=16, size=(28, 32), filter=(7, 7), stride=(2, 2), padding=(3, 3)),
    "one pixel": layer(ci=3, co=16, size=(1, 2), filter=(7, 7), stride=(2, 2), padding=(3, 3)),
    "several tiles of channels": layer(ci=3, co=70, size=(9, 8), filter=(7, 7), stride=(2, 2), padding=(3, 3)),
    "one channel, 5x3": layer(ci=1, co=8, size=(16, 19), filter=(5, 3), stride=(2, 2), padding=(1, 2)),
    "four channels, 8x8, no padding": layer(ci=4, co=8, size=(15, 12), filter=(8, 8), stride=(2, 2)),
}


def specification(x, w, norm, *, geometry, bias=None, dtype):
    cast = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    z = F.conv2d(cast(x), cast(w), cast(bias), *geometry)
    z = F.batch_norm(z, cast(norm.mean), cast(norm.var), cast(norm.gamma), cast(norm.beta), False, 0.0, norm.eps)
    return F.max_pool2d(torch.relu(z), 3, 2, 1)


def check(x, w, norm, **arguments):
    ours = conv_pool(x, w, norm=norm, **arguments)
    eager = specification(x.to(w.dtype), w, norm, dtype=w.dtype, **arguments)
    assert_within_rule(ours, eager, specification(x, w, norm, dtype=torch.float64, **arguments))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry(name, dtype):
    ci, co, size, taps, geometry = GEOMETRIES[name]
    x, w = random(2, ci, *size, dtype=dtype), random(co, ci, *taps, dtype=dtype)
    check(x, w, random_norm(co), geometry=geometry)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "a slice", "turned"])
def test_any_layout_of_the_input(layout):
    x, w, norm = random(2, 3, 16, 20), random(16, 3, 7, 7), random_norm(16)
    if layout == "contiguous":
        x = x.contiguous()
    if layout == "a slice":
        x = random(4, 5, 18, 40)[1:3, 1:4, 1:17, ::2]
    if layout == "turned":
        x = x.transpose(2, 3)
    check(x, w, norm, geometry=STEM)


def test_the_input_is_rounded_to_the_dtype_of_the_filter():
    x, w, norm = random(2, 3, 16, 20), random(16, 3, 7, 7, dtype=torch.float16), random_norm(16)
    ours = conv_pool(x, w, geometry=STEM, norm=norm)
    assert ours.dtype == torch.float16
    assert torch.equal(ours, conv_pool(x.half(), w, geometry=STEM, norm=norm))


@pytest.mark.parametrize("missing", ["gamma", "beta", "both"])
def test_a_bias_and_norms_without_parameters(missing):
    norm = random_norm(16)
    norm = norm._replace(
        gamma=norm.gamma if missing == "beta" else None, beta=norm.beta if missing == "gamma" else None
    )
    check(random(1, 3, 16, 20), random(16, 3, 7, 7), norm, geometry=STEM, bias=random(16))


def test_gammas_of_either_sign_and_zero():
    norm = random_norm(16)
    norm.gamma[:8] = -norm.gamma[:8].abs()
    norm.gamma[5:11] = 0
    check(random(1, 3, 30, 20), random(16, 3, 7, 7), norm, geometry=STEM)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_as_pytorch_has_it(value):
    x, w = random(1, 3, 40, 40), random(16, 3, 7, 7).abs()
    norm = random_norm(16)
    norm.gamma[:8] = -norm.gamma[:8].abs()
    norm.gamma[3:5] = 0
    x[0, 1, 7, 30] = value
    ours, expected = conv_pool(x, w, geometry=STEM, norm=norm), specification(x, w, norm, geometry=STEM, dtype=x.dtype)
    assert not expected.isfinite().all() or value == -float("inf")
    torch.testing.assert_close(ours, expected, equal_nan=True, atol=1e-4, rtol=1e-4)


def test_norms_that_are_not_finite_come_out_as_without_the_pool():
    x, w, norm = random(1, 3, 20, 20), random(16, 3, 7, 7), random_norm(16)
    x[..., 10:] = 0
    x[0, 0, 3, 3] = float("inf")
    inf = float("inf")
    norm.gamma[0], norm.gamma[1], norm.beta[2], norm.mean[3], norm.var[4], norm.var[5] = inf, -inf, inf, inf, inf, -1e-5
    ours = conv_pool(x, w, geometry=STEM, norm=norm)
    expected = F.max_pool2d(conv_forward(x, w, geometry=STEM, norm=norm, activation=RELU), 3, 2, 1)
    assert expected.isnan().any()
    torch.testing.assert_close(ours, expected, equal_nan=True, atol=1e-4, rtol=1e-4)


def test_strides_beyond_32_bits():
    """Of memory that is far larger than what is touched of it."""
    flat = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    for strides in ((2**31, 2**30, 8, 1), (2**31, 8, 2**28, 1)):
        x = flat.as_strided((1, 3, 8, 8), strides)
        x.copy_(random(1, 3, 8, 8))
        check(x, random(16, 3, 7, 7, dtype=torch.float16), random_norm(16), geometry=STEM)


def test_no_image():
    y = conv_pool(random(0, 3, 16, 16), random(16, 3, 7, 7), geometry=STEM, norm=random_norm(16))
    assert y.shape == (0, 16, 4, 4)


def problem(arch: int = 90, dtype: torch.dtype = torch.bfloat16, **changes) -> ConvProblem:
    sizes = {"n": 32, "h": 224, "w": 224, "ci": 3, "co": 64, "r": 7, "s": 7, "stride": (2, 2), "padding": (3, 3)}
    rest = {"dilation": (1, 1), "groups": 1, "dtype": dtype, "tf32": False, "prologue": False, "arch": arch}
    return ConvProblem(**{**sizes, **rest, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ci": 5}, "at most 4 input channels"),
        ({"ci": 4, "groups": 2}, "in one group"),
        ({"stride": (1, 1)}, "stride 2"),
        ({"dilation": (2, 2)}, "no dilation"),
        ({"r": 9, "padding": (4, 4)}, "at most 8x8"),
        ({"prologue": True}, "normalised on the way"),
        ({"dtype": torch.float32}, "fp32 is not multiplied by tensor cores"),
    ],
)
def test_what_it_does_not_compute(changes, reason):
    assert why_not(problem()) is None
    assert reason in why_not(problem(**changes))


def test_bad_arguments():
    x, w, norm = random(1, 3, 16, 16), random(16, 3, 7, 7), random_norm(16)
    launched = []
    with observe(launched.append):
        with pytest.raises(ValueError, match=r"does not fit 4 channels"):
            conv_pool(random(1, 4, 16, 16), w, geometry=STEM, norm=norm)
        with pytest.raises(ValueError, match=r"it needs stride 2"):
            conv_pool(x, w, geometry=Geometry((1, 1), (3, 3)), norm=norm)
        with pytest.raises(ValueError, match=r"w must be channels_last"):
            conv_pool(x, w.contiguous(), geometry=STEM, norm=norm)
        with pytest.raises(ValueError, match=r"x must be \[N, CI, H, W\]"):
            conv_pool(x.double(), w, geometry=STEM, norm=norm)
        with pytest.raises(ValueError, match=r"norm.mean must be"):
            conv_pool(x, w, geometry=STEM, norm=norm._replace(mean=random(15)))
    assert launched == []


def test_launches_and_bytes():
    calls = []
    x = torch.empty(32, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    w = torch.empty(64, 3, 7, 7, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    norm = Norm(*torch.empty(4, 64, device="meta"), 1e-5)
    with dry_run(90), observe(calls.append):
        conv_pool(x, w, geometry=STEM, norm=norm)
    packed = 32 * 229 * 230 * 4 * 2 + 64 * 7 * 8 * 4 * 2
    assert [call.kernel.__name__ for call in calls] == ["conv_pack_kernel", "conv_pool_kernel"]
    pack, pool = (call.cost() for call in calls)
    assert (pack.bytes_read, pack.bytes_written) == (x.nbytes + w.nbytes, packed)
    unmet = 32 * 229 * 4 * 2  # the last pixel of each packed row, which a filter of 7 columns does not reach
    assert (pool.bytes_read, pool.bytes_written) == (packed - unmet + 4 * 64 * 4, 32 * 56 * 56 * 64 * 2)
    assert pool.flops == 2 * 32 * 112 * 112 * 64 * 147


def test_the_plan_counts_what_is_launched():
    calls = []
    x = torch.empty(32, 3, 224, 224, dtype=torch.bfloat16, device="meta")
    w = torch.empty(64, 3, 7, 7, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    with dry_run(90), observe(calls.append):
        conv_pool(x, w, geometry=STEM, norm=Norm(*torch.empty(4, 64, device="meta"), 1e-5))
    unit = Problem(**vars(problem()), direction="inference", residual=False, pooled=True)
    predicted = roofline.predict(unit, "fused", Tiles())
    assert [f"{launch.kernel}_kernel" for launch in predicted] == [call.kernel.__name__ for call in calls]
    for launch, call in zip(predicted, calls, strict=True):
        counted = call.cost()
        assert launch.bytes == pytest.approx(counted.bytes_read + counted.bytes_written, rel=0.01)
        assert launch.flops == counted.flops
    assert roofline.conv_pool.work(problem()).programs == calls[1].grid[0]


COUNT = """
import json, torch
from resnet_fused.commands.cost_machine_code import MACS_PER_CYCLE, SCHEDULERS, read
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.conv_pool import conv_pool
from resnet_fused.kernels.epilogue import Norm
from resnet_fused.kernels.launch import dry_run, observe

slots = {}
for arch, macs in MACS_PER_CYCLE.items():
    calls = []
    with dry_run(arch), observe(calls.append), torch.device("meta"):
        x, w = (torch.empty(n, 3, size, size, dtype=torch.bfloat16) for n, size in ((32, 224), (64, 7)))
        norm = Norm(*(torch.empty(64, dtype=torch.bfloat16) for _ in range(4)), 1e-5)
        conv_pool(x, w.to(memory_format=torch.channels_last), geometry=Geometry((2, 2), (3, 3)), norm=norm)
    code, blocks = read(calls[1].compile(arch), arch), calls[1].arguments["blocks"]
    cycles = blocks.m * blocks.n * blocks.k * 7 / macs
    slots[arch] = round(code.instructions * code.warps / SCHEDULERS / cycles, 3)
print(json.dumps(slots))
"""


@pytest.mark.skipif(triton.__version__ != "3.8.0", reason="the plan's figures are counted with Triton 3.8.0")
def test_the_plans_issue_slots_are_those_of_the_compiled_kernel():
    assert {int(arch): slots for arch, slots in answer("-c", COUNT).items()} == roofline.POOL_SLOTS
    assert set(roofline.POOL_SLOTS) == set(ARCHITECTURES)
