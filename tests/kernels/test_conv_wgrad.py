"""conv_wgrad against the fp64 reference: geometry, splits, prologues, dy kept in passing, memory it may touch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import reference
from resnet_fused.kernels.conv_wgrad import WgradConfig, conv_wgrad
from resnet_fused.kernels.launch import TileConfig, observe
from tests.kernels.test_conv_dgrad import ALL, _poisoned, random_coefs, random_stats  # noqa: F401
from tests.kernels.test_conv_forward import DTYPES, channels_last, random
from tests.rule import assert_within_rule

CONFIGS = [None, WgradConfig(TileConfig(16, 16, 16), 3), WgradConfig(TileConfig(32, 64, 32), 1)]


def drawn(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, ...], dict]:
    """dy, x, the shape of the filter, and the convolution's arguments."""
    g = dict(ALL[name])
    ci, co, size, taps = (g.pop(key) for key in ("ci", "co", "size", "filter"))
    x, shape = random(2, ci, *size, dtype=dtype), (co, ci // g.get("groups", 1), *taps)
    return random(*F.conv2d(x, torch.zeros(shape, dtype=dtype, device=x.device), **g).shape, dtype=dtype), x, shape, g


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_geometry(name, dtype):
    dy, x, shape, conv = drawn(name, dtype)
    exact = reference.conv_wgrad(dy.double(), x.double(), shape, **conv)
    eager = reference.conv_wgrad(dy, x, shape, **conv)
    for config in CONFIGS:
        dw = conv_wgrad(dy, x, shape[2:], config=config, **conv)
        assert dw.permute(0, 2, 3, 1).is_contiguous()
        assert_within_rule(dw, eager, exact, sums=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "name", ["3x3", "every parameter differs by axis", "stem", "1x1", "1x1 stride 2", "narrow groups", "two groups"]
)
def test_prologues(name, config, dtype):
    g, x, shape, conv = drawn(name, dtype)
    y, coefs, stats = random(*g.shape, dtype=dtype), random_coefs(g.shape[1]), random_stats(x.shape[1])
    stats[3] += 50  # padding is zero behind the ReLU
    dy = reference.batch_norm_gradient(g.double(), y.double(), coefs.double())
    a = reference.scale_shift_relu(x.double(), stats[2].double(), stats[3].double())
    exact = reference.conv_wgrad(dy, a, shape, **conv)
    eager = reference.conv_wgrad(dy.to(dtype), a.to(dtype), shape, **conv)
    kept = torch.full_like(g, float("nan"))
    dw = conv_wgrad(
        g, x, shape[2:], y=y, coefs=coefs, x_stats=stats, dy_out=kept, config=config, out_dtype=torch.float32, **conv
    )
    assert_within_rule(dw.to(dtype), eager, exact, sums=8)
    assert_within_rule(kept, dy.to(dtype), dy)
    wide = conv_wgrad(g.float(), x, shape[2:], coefs=coefs, x_stats=stats, config=config, **conv)
    only_g = reference.conv_wgrad((g * coefs[0][:, None, None]).double().to(dtype).double(), a, shape, **conv)
    assert_within_rule(wide, only_g.to(dtype), only_g, sums=8 if dtype == torch.float32 else 2**13)


def test_splits_are_added_in_order():
    dy, x, shape, conv = drawn("3x3", torch.float32)
    names = []
    with observe(lambda call: names.append(call.kernel.__name__)):
        first, second = (conv_wgrad(dy, x, shape[2:], config=CONFIGS[1], **conv) for _ in range(2))
    assert names == ["conv_wgrad_kernel", "sum_splits_kernel"] * 2
    assert torch.equal(first, second)


def test_infinity_reaches_its_filters_alone():
    dy, x, shape, conv = drawn("1x1", torch.float32)
    dy[0, 3, 2, 2] = float("inf")
    dw = conv_wgrad(dy, x, shape[2:], **conv)
    finite = torch.isfinite(dw).flatten(1)
    assert not finite[3].any()
    assert finite[:3].all()
    assert finite[4:].all()


def test_no_images_give_zero():
    dw = conv_wgrad(channels_last(torch.zeros(0, 20, 3, 3)), channels_last(torch.zeros(0, 16, 5, 5)), (3, 3))
    assert dw.shape == (20, 16, 3, 3)
    assert (dw == 0).all()


def test_errors_name_the_argument():
    x, dy = random(2, 16, 5, 5), random(2, 20, 3, 3)
    with pytest.raises(ValueError, match=r"dy must have shape \[2, CO, 4, 4\]; got"):
        conv_wgrad(dy, x, (2, 2))
    with pytest.raises(ValueError, match="groups must divide 16 and 20 channels; got 3"):
        conv_wgrad(dy, x, (3, 3), groups=3)
    with pytest.raises(ValueError, match="x must be pixel-linear"):
        conv_wgrad(dy, x.contiguous(), (3, 3))
    with pytest.raises(ValueError, match="y must lie in memory as dy"):
        conv_wgrad(dy, x, (3, 3), y=random(2, 24, 3, 3)[:, :20], coefs=random_coefs(20))
