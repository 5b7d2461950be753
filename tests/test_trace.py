"""trace: what is recorded, and that its counts are exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision

from resnet_fused import implementation, optimize_for_inference, table
from resnet_fused.engine.trace import trace
from resnet_fused.functional import conv_bn_act

pytestmark = pytest.mark.usefixtures("on_device")


def test_library_calls_with_flops_and_bytes():
    x, w = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 3, 3)
    with torch.no_grad(), trace() as t:
        F.relu_(F.conv2d(x, w, padding=1)).view(-1)
        torch.empty(5)
    assert [launch.name for launch in t.launches] == ["aten.convolution", "aten.relu_"], "no views, no allocations"
    conv, relu = t.launches
    assert conv.flops == 2 * 2 * 36 * 4 * 8 * 9
    assert (conv.bytes_read, conv.bytes_written) == (4 * (x.numel() + w.numel()), 4 * 2 * 4 * 36)
    assert (relu.bytes_read, relu.bytes_written) == (4 * 2 * 4 * 36, 4 * 2 * 4 * 36)
    assert conv.grid is None
    assert conv.config is None


def test_kernel_launches_with_grid_and_tile():
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    conv, bn = torch.nn.Conv2d(16, 20, 1, bias=False), torch.nn.BatchNorm2d(20).eval()
    with torch.no_grad(), implementation("triton"), trace() as t:
        conv_bn_act(x, conv, bn)
    (launch,) = t.launches
    assert launch.name == "conv_forward"
    assert launch.flops == 2 * 2 * 36 * 20 * 16
    assert (launch.bytes_read, launch.bytes_written) == (4 * (x.numel() + 20 * 16 + 4 * 20), 4 * 2 * 20 * 36)
    assert launch.grid == (-(-2 * 36 // launch.config.block_m) * -(-20 // launch.config.block_n), 1)
    assert "conv_forward" in t.table()
    assert f"{launch.config.block_m}x{launch.config.block_n}x{launch.config.block_k}" in t.table()


def test_decomposes_as_under_no_grad():
    x, bn = torch.randn(2, 4, 3, 3), torch.nn.BatchNorm2d(4).eval()
    names = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), trace() as t:
            bn(x)
        names.append([launch.name for launch in t.launches])
    assert names[0] == names[1]
    assert len(names[0]) == 1


def test_nothing_is_recorded_outside():
    with trace() as t:
        pass
    torch.relu(torch.zeros(1))
    assert t.launches == []


def test_tables_without_rich(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    text = table.render("title", ["name", "count"], [("a", 1), ("bb", 20)])
    assert text.splitlines() == ["title", "name  count", "----  -----", "a         1", "bb       20"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU serves by oneDNN")
def test_calls_of_onednn_are_those_that_a_frozen_model_makes():
    block = torchvision.models.resnet.BasicBlock(8, 8).eval()
    frozen, x = optimize_for_inference(block), torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    frozen(x)
    with trace() as t:
        seen = frozen(x)
    assert [launch.name for launch in t.launches] == ["mkldnn._convolution_pointwise"] * 2
    size, filters = 4 * x.numel(), 4 * (8 * 8 * 9 + 8)
    assert [launch.flops for launch in t.launches] == [2 * 2 * 36 * 8 * 8 * 9] * 2
    assert [launch.bytes_read for launch in t.launches] == [size + filters, 2 * size + filters]
    assert [launch.bytes_written for launch in t.launches] == [size] * 2
    assert torch.equal(seen, frozen(x))
