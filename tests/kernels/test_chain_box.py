"""chain_forward by boxes: the same as gathered, masked tails, residuals, what does not fit, which tiles there are."""

from __future__ import annotations

from math import prod

import pytest
import torch

from resnet_fused.kernels import chain_box
from resnet_fused.kernels.chain import Chain, Link, shared, tail_stages
from resnet_fused.kernels.chain_forward import chain_forward, default_config, tiles
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.epilogue import Residual
from resnet_fused.kernels.gpus import ARCHITECTURES, gpu_of
from resnet_fused.kernels.launch import TileConfig, dry_run, observe
from tests.kernels.model_kernels import chain_of
from tests.kernels.test_chain_forward import PADDED, check, link
from tests.kernels.test_conv_forward import DTYPES, random

BOXES = [(2, 4, 4), (1, 8, 2), (1, 1, 16), (4, 2, 1)]
PLAIN = Geometry()


def tile(box: tuple[int, int, int], block_n: int = 16, block_k: int = 16) -> TileConfig:
    return TileConfig(prod(box), block_n, block_k, box=box)


def kernels_of(launch) -> list[str]:
    calls = []
    with observe(calls.append):
        launch()
    return [call.kernel.__name__ for call in calls]


def assert_boxed(x, links, geometry=PADDED, residual=None, **arguments):
    assert kernels_of(lambda: check(x, links, geometry, residual, **arguments)) == ["chain_box_kernel"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("box", BOXES, ids=str)
@pytest.mark.parametrize("kind", ["triple", "3x3 and 1x1", "1x1 and 1x1"])
def test_kinds(kind, box, dtype):
    """Boxes that reach out of the image, and channels that fill no block."""
    spatial = None if kind == "1x1 and 1x1" else link(24, 16, 3, dtype)
    reduce = None if kind == "3x3 and 1x1" else link(17, 40, 1, dtype)
    x = random(3, 16 if spatial else 24, 5, 6, dtype=dtype)
    links = spatial, link(40, 24, 1, dtype), reduce
    residual = random(3, 40, 5, 6, dtype=dtype)
    assert_boxed(x, links, PADDED if spatial else PLAIN, residual, config=tile(box))


@pytest.mark.parametrize(
    ("geometry", "taps", "size"),
    [
        (Geometry((2, 2), (1, 1)), (3, 3), (8, 6)),
        (Geometry((2, 2), (3, 2), (3, 2)), (3, 3), (10, 8)),
        (Geometry((1, 1), (1, 2), (1, 2)), (3, 2), (11, 8)),
        (Geometry((2, 2)), (1, 1), (6, 8)),
        (PLAIN, (1, 1), (5, 7)),
        (PLAIN, (2, 3), (6, 9)),
    ],
)
def test_geometry(geometry, taps, size):
    x = random(2, 32, *size)
    links = Link(random(16, 32, *taps), link(16, 1).affine), link(48, 16), link(16, 48)
    for box in BOXES:
        for block_k in (16, 32):
            assert_boxed(x, links, geometry, config=tile(box, 32, block_k))


def test_agrees_with_the_gathered_kernel_to_the_bit():
    """In fp32, which is exact for whole numbers so small."""
    x, links = random(2, 16, 5, 6).sign(), [link(16, 16, 3), link(64, 16), link(16, 64)]
    for of in links:
        of.w.sign_()
        of.affine.sign_()
    residual = Residual(random(2, 64, 5, 6).sign())
    arguments = {"geometry": PADDED, "residual": residual}
    gathered = chain_forward(x, *links, **arguments, config=TileConfig(16, 16, 16))
    boxed = chain_forward(x, *links, **arguments, config=tile((2, 4, 4)))
    assert all(torch.equal(*pair) for pair in zip(gathered, boxed, strict=True))


@pytest.mark.parametrize("residual", [Residual(random(2, 20, 9, 11), 2, 8), Residual(random(2, 32, 10, 12), 2, 16)])
def test_a_padded_residual(residual):
    x, links = random(2, 16, 5, 6), (link(16, 16, 3), link(64, 16), link(16, 64))
    arguments = {"geometry": PADDED, "residual": residual}
    gathered = chain_forward(x, *links, **arguments)
    boxed = chain_forward(x, *links, **arguments, config=tile((1, 4, 4)))
    for ours, theirs in zip(boxed, gathered, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_pixel(value):
    x, links = random(1, 16, 7, 7), [link(24, 16, 3), link(40, 24), link(17, 40)]
    x[0, 3, 2, 2] = value
    for of in links:
        of.affine[0] = of.affine[0].abs()
        of.w.abs_()
    boxed = chain_forward(x, *links, geometry=PADDED, config=tile((1, 4, 4)))
    for ours, theirs in zip(boxed, chain_forward(x, *links, geometry=PADDED), strict=True):
        assert not theirs.isfinite().all() and theirs.isfinite().any()
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_slices_of_images_and_channels():
    x, residual = random(4, 24, 6, 6)[1:3, 4:20], random(2, 80, 6, 6)[:, 8:72]
    links = link(16, 16, 3), link(64, 16), link(16, 64)
    assert_boxed(x, links, residual=residual, config=tile((1, 4, 4)))
    assert_boxed(x, (None, *links[1:]), PLAIN, residual, config=tile((1, 4, 4)))
    assert_boxed(x, links, Geometry((2, 2), (1, 1)), random(2, 80, 3, 3)[:, 8:72], config=tile((1, 4, 4)))


@pytest.mark.parametrize(
    ("x", "links", "config"),
    {
        "an address that 16 bytes do not divide": (random(2, 24, 5, 6)[:, 1:17], (16, 64, 16), tile((1, 4, 4))),
        "pixels that 16 bytes do not divide": (random(2, 18, 5, 6)[:, :16], (16, 64, 16), tile((1, 4, 4))),
        "a filter's rows that 16 bytes do not divide": (random(2, 16, 5, 6), (16, 62, 16), tile((1, 4, 4))),
        "chunks that do not divide the channels": (random(2, 24, 5, 6), (16, 64, 16), tile((1, 4, 4))),
    }.values(),
)
def test_what_tma_does_not_take_is_gathered(x, links, config):
    middle, wide, following = links
    chain = link(middle, x.shape[1], 3), link(wide, middle), link(following, wide)
    assert kernels_of(lambda: check(x, chain, config=config)) == ["chain_forward_kernel"]


def test_a_step_that_tma_does_not_make_is_gathered():
    chain = link(16, 16, 3), link(64, 16), None
    launch = lambda: check(random(2, 16, 9, 8), chain, Geometry((2, 2), (1, 1)), config=tile((1, 4, 4)))  # noqa: E731
    assert kernels_of(launch) == ["chain_forward_kernel"]


def test_a_box_of_other_pixels_is_an_error():
    config = TileConfig(16, 16, 16, box=(1, 4, 2))
    with pytest.raises(ValueError, match=r"config.box must have block_m=16 pixels; got \(1, 4, 2\)"):
        chain_forward(random(2, 16, 5, 6), link(16, 16, 3), link(64, 16), None, geometry=PADDED, config=config)


def boxed(arch: int, widths: tuple[int, int, int, int], number_format: str = "bfloat16") -> list[TileConfig]:
    return [*chain_box.tiles(chain_of(arch, number_format, widths))]


@pytest.mark.parametrize("arch", [90, 100])
def test_tiles(arch):
    for middle in (64, 128):
        found = boxed(arch, (middle, middle, 4 * middle, middle))
        assert {config.block_m for config in found} == {128, 64}
        assert all(prod(config.box) == config.block_m for config in found)


@pytest.mark.parametrize("large", ["x", "residual", "z", "y"])
@pytest.mark.parametrize("box", [None, (1, 8, 16)])
def test_offsets_are_of_64_bits_where_any_tensor_is_large(large, box):
    """Of 2^31 elements, or so many that rows past the end are; the others have less."""
    widths = {"x": 64, "residual": 80, "z": 80, "y": 64} | {large: 128}
    forms = []
    for n in (128, 1024):

        def images(channels: int, n: int = n) -> torch.Tensor:
            empty = torch.empty(n, channels, 128, 128, dtype=torch.bfloat16, device="meta")
            return empty.to(memory_format=torch.channels_last)

        wide = widths["z"]
        residual = images(widths["residual"])[:, :wide] if large == "residual" else images(wide)
        with torch.device("meta"), dry_run(90), observe(lambda call: forms.append(call.arguments["form"])):
            links = [
                Link(torch.empty(co, ci, 1, 1, dtype=torch.bfloat16), torch.empty(2, co))
                for ci, co in ((widths["x"], wide), (wide, widths["y"]))
            ]
            config = TileConfig(128, 64, 64, 4, box=box)
            chain_forward(images(widths["x"]), None, *links, residual=Residual(residual), config=config)
    assert [form.INT64 for form in forms] == [False, True]
    assert all(isinstance(form, chain_box.Form) == (box is not None) for form in forms)


@pytest.mark.parametrize("arch", [90, 100])
def test_no_step_of_a_box_waits_for_its_own_loads(arch):
    for widths in ((64, 64, 256, 128), (128, 128, 512, 256), (256, 256, 1024, 256)):
        spatial, expand, reduce = chain = chain_of(arch, "bfloat16", widths)
        for part in (chain, Chain(None, expand, reduce), Chain(spatial, expand, None)):
            assert all(tail_stages(part, config) == 3 for config in chain_box.tiles(part))


def test_tiles_of_many_channels_come_fewer_at_a_time():
    assert {config.block_n for config in boxed(90, (256, 256, 1024, 256))} == {32}
    assert not boxed(100, (256, 256, 1024, 256)), "they would spill"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_channels_that_do_not_fill_their_blocks_have_lower_tiles(arch):
    """Or other programs, so that nothing spills; and none where loads and stores would be by the element."""
    for widths in ((64, 80, 320, 80), (32, 48, 192, 24)):
        chain = chain_of(arch, "bfloat16", widths)
        found = [*tiles(chain)]
        assert found and all(config.max_registers == 255 for config in found if config.box is None)
        assert arch in (90, 100) or all(config.block_m == 64 for config in found)
    assert not [*tiles(chain_of(arch, "bfloat16", (64, 80, 328, 80)))]
    assert default_config(chain_of(arch, "bfloat16", (64, 80, 272, 80))).box is None, "whatever tiles there are"


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (chain_of(80, "bfloat16", (64, 64, 256, 64)), "boxes of chains are for sm_90, sm_100"),
        (chain_of(90, "tf32", (64, 64, 256, 64)), "its factors do not have 16 bits"),
        (chain_of(90, "bfloat16", (48, 64, 256, 64)), "multiple of 32 input"),
        (chain_of(90, "bfloat16", (64, 32, 128, 32)), "at least 64 output channels"),
    ],
)
def test_why_not(chain, reason):
    assert reason in chain_box.why_not(chain)
    assert not [*chain_box.tiles(chain)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_loop_over_z_is_as_deep_as_shared_memory_allows(arch):
    """Of what may be chosen; the ledger holds the compiled kernels to what is counted here."""
    room, stages = gpu_of(arch).shared, set()
    for widths in ((64, 64, 256, 64), (128, 128, 512, 128), (256, 256, 1024, 256)):
        spatial, expand, reduce = chain = chain_of(arch, "bfloat16", widths)
        for part in (chain, Chain(None, expand, reduce), Chain(spatial, expand, None)):
            for config in tiles(part):
                assert shared(part, config) <= room
                stages.add((widths[1], tail_stages(part, config)))
    assert (64, 3) in stages and (128, 3) in stages
    assert ((64, 2) in stages) == (room < 2**17)
