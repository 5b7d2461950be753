"""Every peer runs and computes what eager PyTorch computes, or says why it does not run here."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks.measure import BACKWARD, FORWARD, STEP, PeerRunner, Setting
from benchmarks.peers import BASELINE, OURS, PEERS, CudnnFrontend, Peer
from benchmarks.shapes import BlockCase, LayerCase
from resnet_fused import implementation
from resnet_fused.engine.tolerance import error_ratio
from tests.zoo import randomise_norms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SUMS = 16
LAYER = LayerCase(8, 16, 8, 8, kernel=3, stride=1, padding=1, groups=1)
BLOCK = BlockCase("basic", 16, 32, 8, 8, 2, 1, 64, "projection")


class Tiny(nn.Module):
    """A stem, a block and a classifier, which every exporter can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = LAYER.build()
        self.block = BLOCK.build()
        self.fc = nn.Linear(BLOCK.planes, 10)

    def forward(self, x):
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def build(training: bool) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = Tiny().train(training)
    randomise_norms(model)
    x = torch.randn(2, *LAYER.image).contiguous(memory_format=torch.channels_last)  # the same on every device
    return model.to(DEVICE), x.to(DEVICE)


def skip_unless_able(peer: Peer, training: bool) -> None:
    """Skip with the peer's reason, which must be one: of a peer that could run, this would be a silent gap."""
    reason = peer.why_not(DEVICE, training)
    if reason is None:
        return
    if peer.device in (None, DEVICE.type) and peer not in OURS and "compiler" not in reason:
        assert any(importlib.util.find_spec(package) is None for package in peer.packages), reason
    pytest.skip(reason)


@pytest.mark.parametrize("peer", [peer for peer in PEERS.values() if peer.infers], ids=lambda peer: peer.name)
def test_inference_agrees_with_eager(peer):
    skip_unless_able(peer, training=False)
    model, x = build(training=False)
    with implementation(peer.implementation), torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        eager = copy.deepcopy(model)(x)
        try:
            run = peer.prepare(copy.deepcopy(model), x)
        except NotImplementedError as error:
            pytest.skip(str(error))
        for _ in range(2):
            assert error_ratio(run(), eager, exact, SUMS) <= 1


@pytest.mark.parametrize("peer", [peer for peer in PEERS.values() if peer.trains], ids=lambda peer: peer.name)
def test_training_agrees_with_eager(peer):
    skip_unless_able(peer, training=True)
    model, x = build(training=True)
    results = []
    for kind in ("exact", "eager", "peer"):
        trained, images = copy.deepcopy(model), x
        if kind == "exact":
            trained, images = trained.double(), x.double()
        with implementation(peer.implementation if kind == "peer" else "eager"):
            y = peer.prepare(trained, images)() if kind == "peer" else trained(images)
            trained.zero_grad(set_to_none=True)  # a compiler has run it
            y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in trained.parameters())])
    for exact, eager, ours in zip(*results, strict=True):
        assert error_ratio(ours, eager, exact, SUMS) <= 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU they run in the tests above")
@pytest.mark.parametrize("peer", OURS[:2], ids=lambda peer: peer.name)
def test_ours_run_the_kernels(peer):
    """Not timed on a CPU, but right there too: in the interpreter."""
    model = build(training=True)[0].block
    x = torch.randn(2, *BLOCK.image).contiguous(memory_format=torch.channels_last)
    exact, eager = copy.deepcopy(model).double()(x.double()), copy.deepcopy(model)(x)
    with implementation("triton"):
        ours = peer.prepare(model, x)()
    assert "ResidualFunction" in type(ours.grad_fn).__name__
    assert error_ratio(ours.detach(), eager.detach(), exact.detach(), SUMS) <= 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["freezing last", "freezing first"])
def test_two_ways_to_compile_share_no_code(order):
    """Dynamo keeps compiled code by class: one model must not be served with what was compiled for the other."""
    compilers = [PEERS["torch.compile"], PEERS["torch.compile freezing"]]
    skip_unless_able(compilers[0], training=False)
    x = torch.randn(2, *LAYER.image, device=DEVICE).contiguous(memory_format=torch.channels_last)
    models = [LAYER.build().eval().requires_grad_(False).to(DEVICE) for _ in compilers]
    counters.clear()
    with torch.no_grad():
        functions = {i: compilers[i].prepare(copy.deepcopy(models[i]), x) for i in order}
        for i, model in enumerate(models):
            torch.testing.assert_close(functions[i](), model(x))
    assert counters["stats"]["unique_graphs"] == 2


def test_a_compiler_replays_a_graph_as_our_frozen_copy_does(monkeypatch):
    """Quick to prepare: what takes minutes may be left out of a comparison."""
    peer, seen = PEERS["torch.compile reduce-overhead"], []
    assert peer.own_graph and not peer.heavy and peer.does(training=False)
    assert "on cuda alone" in peer.why_not(torch.device("cpu"), training=False), "there it is freezing once more"
    monkeypatch.setattr(torch, "compile", lambda model, options, fullgraph: seen.append(options) or model)
    peer.prepare(*build(training=False))
    assert [(options["triton.cudagraphs"], options["freezing"]) for options in seen] == [(True, True)]


def test_reasons_are_words():
    for peer in PEERS.values():
        for device in ("cpu", "cuda"):
            for training in (False, True):
                reason = peer.why_not(torch.device(device), training)
                assert reason is None or len(reason.split()) > 3
    assert BASELINE.why_not(DEVICE, training=True) is None


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "onnxruntime is not installed" in PEERS["ONNX Runtime"].why_not(torch.device("cpu"), False)
    assert "torch_tensorrt is not installed" in PEERS["TensorRT"].why_not(torch.device("cuda"), False)
    assert "cudnn is not installed" in PEERS["cudnn-frontend"].why_not(torch.device("cuda"), False)


def test_cudnn_graphs_are_for_single_units():
    model, x = build(training=False)
    with pytest.raises(NotImplementedError, match="not a block or a network"):
        CudnnFrontend().prepare(model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_training_trains(dtype):
    runner = PeerRunner(BASELINE, Setting(NETWORK, 2, dtype, STEP, DEVICE))
    assert {p.dtype for p in runner.model.parameters()} == {torch.float32}, "mixed precision keeps them"
    before = [p.detach().clone() for p in runner.model.parameters()]
    with runner.conditions():
        runner()
    assert all(not torch.equal(p, old) for p, old in zip(runner.model.parameters(), before, strict=True))


def test_mixed_precision_is_compiled():
    peer = PEERS["torch.compile"]
    skip_unless_able(peer, training=True)
    runner = PeerRunner(peer, Setting(LAYER, 2, torch.bfloat16, BACKWARD, DEVICE))
    with runner.conditions():
        runner()
    assert (runner.x.dtype, runner.x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {p.grad.dtype for p in runner.model.parameters()} == {torch.float32}


def test_inference_has_no_gradients():
    runner = PeerRunner(BASELINE, Setting(LAYER, 2, torch.bfloat16, FORWARD, DEVICE))
    with runner.conditions():
        y = runner()
    assert (y.dtype, y.requires_grad) == (torch.bfloat16, False)


class _Network:
    name = "a tiny network"
    image = LAYER.image

    def build(self) -> nn.Module:
        return Tiny()


NETWORK = _Network()
