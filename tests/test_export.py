"""Exporters and tracers of fused and of frozen models: what they write down runs elsewhere, for every batch size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import SEModule
from timm.models import resnet as timm
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchvision.models import resnet

from resnet_fused import BasicBlock, ResidualBlock, fuse, implementation, optimize_for_inference, unfuse
from resnet_fused.models import CifarResNet, ResNet
from resnet_fused.plan.problem import Request
from tests.training import randomise

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore"),  # of exporters, about themselves
]

Model = Callable[[torch.Tensor], torch.Tensor]


def _small() -> nn.Module:
    """A run in a sequence, a block of torchvision's of either kind, and one of ours."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        resnet.Bottleneck(8, 4, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))),
        resnet.BasicBlock(16, 16),
        ResidualBlock(16, [(24, 3)], "pad", stride=2),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)),
    )


def _gated() -> nn.Module:
    """Units with a squeeze and excitation behind them."""
    gate = partial(SEModule, rd_channels=8)
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        timm.BasicBlock(8, 8, attn_layer=gate),
        timm.BasicBlock(8, 16, 2, timm.downsample_avg(8, 16, 1, 2), attn_layer=gate),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "blocks": _small,
    "gates and units": _gated,
    "torchvision's, with its stem": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4),
    "ours": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4),
    "ours for small images": lambda: CifarResNet(8),
}


FROZEN: dict[str, tuple[str, Request]] = {
    "frozen, as served by PyTorch": ("torchvision's, with its stem", "eager"),
    "frozen, as served by kernels": ("torchvision's, with its stem", "triton"),
    "frozen blocks, as served by kernels": ("blocks", "triton"),
}


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """In eval mode, its blocks fused."""
    return _made(request.param)


@pytest.fixture(params=[*NETWORKS, *FROZEN])
def served(request: pytest.FixtureRequest) -> nn.Module:
    """The same, or frozen."""
    return _made(request.param)


def _made(name: str) -> nn.Module:
    if name in FROZEN:
        network, road = FROZEN[name]
        with implementation(road):
            return optimize_for_inference(_made(network))
    model = NETWORKS[name]()
    randomise(model)
    return fuse(model).eval() if "ours" not in name else model.eval()


def _images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8)


def _assert_same(got: Model, model: nn.Module, *sizes: int) -> None:
    """For batches of ``sizes`` images, with ``got`` run as if there were no kernels."""
    for n in sizes:
        x = _images(n)
        with torch.no_grad(), implementation("eager"):
            torch.testing.assert_close(got(x), model(x), rtol=1e-4, atol=1e-4)


def _operators(graph: torch.fx.Graph) -> set[str]:
    """The namespaces of the operators in ``graph``."""
    return {node.target.namespace for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


BATCHES = {"named": torch.export.Dim("batch", min=2, max=64), "AUTO": torch.export.Dim.AUTO}


def _exported(model: nn.Module, batch: str, strict: bool) -> torch.export.ExportedProgram:
    with implementation("triton"):
        exported = torch.export.export(model, (_images(2),), dynamic_shapes=({0: BATCHES[batch]},), strict=strict)
    assert _operators(exported.graph) == {"aten"}
    (limits,) = exported.range_constraints.values()
    assert limits.lower <= 2 and limits.upper >= 64
    return exported


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("batch", BATCHES)
def test_torch_export_keeps_the_batch_open(served, batch, strict):
    _assert_same(_exported(served, batch, strict).module(), served, 2, 5)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_torch_export_of_training(model, strict):
    model.train()
    exported = _exported(model, "named", strict).module()
    x, twin = _images(5), copy.deepcopy(model)
    with implementation("eager"):
        torch.testing.assert_close(exported(x), twin(x), rtol=1e-4, atol=1e-4)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(exported.get_buffer(name), buffer)


def test_torch_export_of_one_batch_size(served):
    with implementation("triton"):
        exported = torch.export.export(served, (_images(2),))
    _assert_same(exported.module(), served, 2)


@pytest.mark.parametrize("name", FROZEN)
def test_torch_compile_of_a_frozen_model_is_one_graph_for_every_size(name):
    torch._dynamo.reset()
    frozen = _made(name)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager", dynamic=True)
    with implementation("triton"), torch._dynamo.config.patch(error_on_recompile=True):
        for n in (2, 5):
            x = _images(n)
            torch.testing.assert_close(compiled(x), frozen(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["blocks", "frozen blocks, as served by kernels"])
def test_aot_inductor_takes_what_was_exported(name, tmp_path):
    model = _made(name)
    with implementation("triton"), torch.no_grad():
        exported = torch.export.export(model, (_images(2),), dynamic_shapes=({0: BATCHES["named"]},))
        file = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    _assert_same(torch._inductor.aoti_load_package(file), model, 2, 5)


def onnx_of(model: nn.Module, x: torch.Tensor, dynamo: bool, file: Path) -> Model:
    """``model`` exported for batches of any size, as ONNX's own evaluator runs it."""
    onnx = pytest.importorskip("onnx.reference", reason="onnx is not installed")
    options: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    if dynamo:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        options = {"dynamic_shapes": ({0: "batch"},), "verbose": False}
    torch.onnx.export(model, (x,), str(file), dynamo=dynamo, **options)
    session = onnx.ReferenceEvaluator(str(file))
    return lambda x: torch.from_numpy(session.run(None, {session.input_names[0]: x.cpu().numpy()})[0]).to(x.device)


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
def test_onnx(served, dynamo, tmp_path):
    with implementation("triton"):
        exported = onnx_of(served, _images(2), dynamo, tmp_path / "model.onnx")
    _assert_same(exported, served, 2, 5)


def test_torch_jit_trace(served):
    with implementation("triton"), torch.no_grad():
        traced = torch.jit.trace(served, _images(2))
    assert "resnet_fused::" not in str(traced.inlined_graph)
    _assert_same(traced, served, 2, 5)


def test_torch_fx(model):
    with implementation("triton"):
        traced = torch.fx.symbolic_trace(model)
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"], "nothing but calls of the layers"
    _assert_same(traced, model, 2, 5)


def test_torch_jit_script_says_what_to_do(model):
    with pytest.raises(RuntimeError, match=r"cannot be scripted: script the model as it was, resnet_fused\.unfuse"):
        torch.jit.script(model)


@pytest.mark.parametrize("name", [name for name in NETWORKS if "ours" not in name])
def test_fx_quantisation_leaves_no_block_out(name):
    def quantised(model: nn.Module) -> list[str]:
        with implementation("triton"), torch.no_grad():
            prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (_images(2),))
            prepared(_images(2))
        kinds = [type(part).__module__ for part in convert_fx(prepared).modules()]
        return [kind for kind in kinds if "quantized" in kind]

    model = _made(name).cpu()
    with torch.device("cpu"):
        found = quantised(copy.deepcopy(model))
        assert found == quantised(unfuse(model))
    assert len(found) > 5
