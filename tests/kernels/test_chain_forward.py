"""chain_forward against the fp64 reference: both roads' geometry, residuals, masked tails, values not finite, cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton

from resnet_fused.engine.reference import PaddedIdentity, conv_affine_act
from resnet_fused.kernels.chain import Link
from resnet_fused.kernels.chain_forward import chain_forward
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.epilogue import Residual
from resnet_fused.kernels.launch import TileConfig, observe
from resnet_fused.plan import roofline
from tests.compiler import answer
from tests.kernels.test_conv_forward import DTYPES, random, random_norm
from tests.rule import assert_within_rule

PADDED = Geometry((1, 1), (1, 1))
SHAPES = {
    "even": (16, 16, 64, 16),
    "one block and a tail": (20, 24, 72, 17),
    "wide": (32, 64, 160, 32),
    "narrow": (3, 5, 7, 9),
}
"""Channels of the input, of the 3x3, of z, of y."""


def link(co, ci, taps=1, dtype=torch.float32):
    return Link(random(co, ci, taps, taps, dtype=dtype), torch.stack([random_norm(co).gamma, random(co)]))


def apply(link, x, geometry, residual=None):
    """In the dtype of ``x``."""
    return x if link is None else conv_affine_act(x, *link, geometry, residual)


def specification(x, links, geometry, residual, rounded):
    """z and y; ``rounded``: the dtype of what is between the convolutions, here as in the kernel."""
    spatial, expand, reduce = links
    inner = apply(spatial, x, geometry).to(rounded).to(x.dtype)
    z = apply(expand, inner, Geometry(), None if residual is None else residual.to(x.dtype))
    return z, None if reduce is None else apply(reduce, z.to(rounded).to(x.dtype), Geometry())


def check(x, links, geometry=PADDED, residual=None, **arguments):
    ours = chain_forward(
        x, *links, geometry=geometry, residual=None if residual is None else Residual(residual), **arguments
    )
    eager = specification(x, links, geometry, residual, x.dtype)
    exact = specification(x.double(), links, geometry, residual, x.dtype)
    for got, expected, reference in zip(ours, eager, exact, strict=True):
        if expected is None:
            assert got is None
            continue
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_within_rule(got, expected, reference)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["triple", "3x3 and 1x1", "1x1 and 1x1"])
def test_shapes(kind, name, dtype):
    ci, middle, wide, following = SHAPES[name]
    spatial = None if kind == "1x1 and 1x1" else link(middle, ci, 3, dtype)
    reduce = None if kind == "3x3 and 1x1" else link(following, wide, 1, dtype)
    x = random(2, ci if spatial else middle, 5, 6, dtype=dtype)
    geometry = PADDED if spatial else Geometry()
    check(x, (spatial, link(wide, middle, 1, dtype), reduce), geometry, random(2, wide, 5, 6, dtype=dtype))


@pytest.mark.parametrize(
    ("geometry", "taps"),
    [
        (Geometry((2, 2), (1, 1)), (3, 3)),
        (Geometry((2, 1), (0, 2), (2, 1)), (2, 5)),
        (Geometry((1, 1), (2, 2), (2, 2)), (3, 3)),
        (Geometry((3, 2)), (1, 1)),
    ],
)
def test_geometry(geometry, taps):
    x = random(2, 20, 9, 8)
    spatial = Link(random(16, 20, *taps), link(16, 1).affine)
    p, q = F.conv2d(x, spatial.w, None, *geometry).shape[2:]
    tile = TileConfig(16, 32, 16)
    links = spatial, link(64, 16), link(16, 64)
    check(x, links, geometry, random(2, 64, p, q), config=tile)


@pytest.mark.parametrize("residual", [None, Residual(random(2, 20, 9, 11), 2, 8), Residual(random(2, 40, 5, 6))])
def test_residuals(residual):
    x, links = random(2, 12, 5, 6), (link(16, 12, 3), link(40, 16), None)
    z, _ = chain_forward(x, *links, geometry=PADDED, residual=residual)
    added = None if residual is None else PaddedIdentity(*residual).materialize(40)
    inner = apply(links[0], x.double(), PADDED).float()
    assert_within_rule(z, apply(links[1], inner, Geometry(), added), apply(links[1], inner.double(), Geometry(), added))


def test_a_padded_residual_of_even_widths():
    x, residual = random(2, 16, 5, 6), Residual(random(2, 32, 10, 11), 2, 16)
    z, _ = chain_forward(x, link(16, 16, 3), expand := link(64, 16), None, geometry=PADDED, residual=residual)
    bare, _ = chain_forward(
        x, None, Link(torch.zeros_like(expand.w), torch.zeros(2, 64)), link(16, 64), residual=residual
    )
    torch.testing.assert_close(bare, torch.relu(PaddedIdentity(*residual).materialize(64)))
    assert z.shape == bare.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_pixel(value):
    """Channels that fill no block are no neighbours of a zero."""
    x = random(1, 12, 7, 7)
    x[0, 3, 2, 2] = value
    links = link(20, 12, 3), link(24, 20), link(17, 24)
    for link_ in links:
        link_.affine[0] = link_.affine[0].abs()
        link_.w.abs_()
    z, y = chain_forward(x, *links, geometry=PADDED, config=TileConfig(16, 16, 16))
    for got, expected in zip((z, y), specification(x, links, PADDED, None, x.dtype), strict=True):
        assert not expected.isfinite().all()
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_a_slice_of_images_and_channels():
    x, residual = random(4, 24, 6, 6)[1:3, 4:20], random(2, 80, 6, 6)[:, 8:72]
    check(x, (link(16, 16, 3), link(64, 16), link(16, 64)), residual=residual)


def test_no_image():
    z, y = chain_forward(random(0, 16, 6, 6), link(16, 16, 3), link(64, 16), link(8, 64), geometry=PADDED)
    assert z.shape == (0, 64, 6, 6) and y.shape == (0, 8, 6, 6)


def test_cost():
    calls = []
    x, links = (
        random(2, 16, 8, 8, dtype=torch.float16),
        [link(*s, torch.float16) for s in ((8, 16, 3), (32, 8, 1), (4, 32, 1))],
    )
    with observe(calls.append):
        chain_forward(
            x, *links, geometry=Geometry((2, 2), (1, 1)), residual=Residual(random(2, 32, 4, 4, dtype=torch.float16))
        )
    (call,) = calls
    cost, pixels = call.cost(), 2 * 4 * 4
    assert cost.flops == 2 * pixels * (9 * 16 * 8 + 8 * 32 + 32 * 4)
    weights = 2 * (9 * 16 * 8 + 8 * 32 + 32 * 4) + 4 * 2 * (8 + 32 + 4)
    assert cost.bytes_read == 2 * x.numel() + weights + 2 * pixels * 32
    assert cost.bytes_written == 2 * pixels * (32 + 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": random(2, 15, 5, 6)}, r"spatial.w must be torch.float32 \[CO, 15, R, S\]"),
        ({"x": random(2, 16, 5, 6).contiguous()}, "x must be pixel-linear"),
        ({"expand": link(64, 16, 3)}, r"expand.w must be torch.float32 \[CO, 16, 1, 1\]"),
        ({"expand": link(64, 16, 1, torch.float16)}, "expand.w must be torch.float32 .* got torch.float16"),
        ({"reduce": link(16, 60)}, r"reduce.w must be torch.float32 \[CO, 64, 1, 1\]"),
        ({"reduce": Link(random(16, 64, 1, 1), random(16))}, r"reduce.affine must be contiguous float32 \[2, 16\]"),
        ({"residual": Residual(random(2, 64, 5, 5))}, "residual must have shape"),
        ({"spatial": None, "reduce": None}, "spatial or reduce"),
        ({"geometry": Geometry((1, 1), (-1, 0))}, "geometry.padding must be two integers"),
        ({"geometry": Geometry((1, 1), (1, 1), (1, 1), 2)}, "geometry.groups must be 1 in a chain; got 2"),
    ],
)
def test_errors_name_the_argument(change, message):
    links = {"spatial": link(16, 16, 3), "expand": link(64, 16), "reduce": link(16, 64)}
    arguments = {"x": random(2, 16, 5, 6), **links, "geometry": PADDED, **change}
    with pytest.raises(ValueError, match=message):
        chain_forward(**arguments)


COUNT = """
import json
from resnet_fused.commands.cost_machine_code import TENSOR_OPCODES, issue_slots, program
from resnet_fused.kernels import chain_forward
from resnet_fused.plan.roofline import CHAIN_SLOTS
from tests.kernels.model_kernels import chain_call, chain_of

slots = {}
for kernel, archs in CHAIN_SLOTS.items():
    for arch in archs:
        chain = chain_of(arch, "bfloat16", (128, 128, 512, 128))
        tiles = (tile for tile in chain_forward.tiles(chain) if (tile.box is None) == (kernel == "chain_forward"))
        call = chain_call(chain, next(tiles))
        code = program(call.compile(arch))
        loops = [code.code[first : last + 1] for first, last in code.loops]
        multiply = [loop for loop in loops if any(ins.opcode in TENSOR_OPCODES for ins in loop)]
        walk, tail = multiply[0], max(multiply[1:], key=len)
        found = [round(issue_slots(loop, call.config.num_warps, arch)[0], 3) for loop in (walk, tail)]
        slots.setdefault(kernel, []).append([arch, found])
print(json.dumps(slots))
"""


@pytest.mark.skipif(triton.__version__ != "3.8.0", reason="the plan's figures are counted with Triton 3.8.0")
def test_the_plans_issue_slots_are_those_of_the_compiled_kernel():
    counted = {kernel: {arch: tuple(slots) for arch, slots in rows} for kernel, rows in answer("-c", COUNT).items()}
    assert counted == roofline.CHAIN_SLOTS
