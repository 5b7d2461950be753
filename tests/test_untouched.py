"""What fusing must not change: storages, optimizers, whoever watches, recomputation, a model that fails half-way."""

from __future__ import annotations

import copy
import io
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.autograd.forward_ad as forward_ad
import torchvision
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fused
from resnet_fused import functional, fuse, implementation, unfuse
from resnet_fused.convert import Converted
from resnet_fused.engine import eligible, request
from resnet_fused.engine.trace import trace
from tests.training import randomise

pytestmark = pytest.mark.usefixtures("on_device")


def small() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    randomise(model)
    return model


def block() -> nn.Module:
    torch.manual_seed(0)
    module = Bottleneck(16, 4)
    randomise(module)
    return fuse(module)


def launched(work: Callable[[], Any]) -> list[str]:
    with trace() as t:
        work()
    return [launch.name for launch in t.launches]


def layout(model: nn.Module) -> list[tuple[int, tuple[int, ...]]]:
    return [(t.data_ptr(), t.stride()) for t in model.state_dict().values()]


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_storages_strides_and_aliases_stay(form):
    model = small().to(memory_format=form)
    state, before = model.state_dict(), layout(model)
    fuse(model)
    with implementation("triton"):
        model.layer2(torch.randn(2, 64, 4, 4)).sum().backward()
    assert layout(model) == before
    with torch.no_grad():
        state["layer1.0.conv1.weight"].zero_()
    assert not model.layer1[0].conv1.weight.any()
    assert layout(unfuse(model)) == before


def test_shared_memory_stays_shared():
    model = small().cpu().share_memory()
    fuse(model)
    assert all(p.is_shared() for p in model.parameters())


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, fused=True),
}


@pytest.mark.parametrize("when", ["in between", "before loading the state"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fused_optimizer_with_state_steps_right(name, when):
    """One step apart, the other behind fusing, on the same gradients."""
    model, twin = unfuse(block()), unfuse(block())
    ours, eager = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    step(model, ours, 1)
    step(twin, eager, 1)
    fuse(model)
    if when == "before loading the state":
        state = ours.state_dict()
        ours = OPTIMIZERS[name](model.parameters())
        ours.load_state_dict(state)
    step(model, ours, 2)
    step(twin, eager, 2)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()


def test_what_flattens_parameters_and_gradients_works():
    model, x = block(), torch.randn(2, 16, 3, 3)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with implementation("triton"):
        optimizer.step(closure)
    for p in model.parameters():
        assert p.grad.stride() == p.stride()
        p.view(p.shape[0], -1), p.grad.view(-1)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())


def test_safetensors_saves_it(tmp_path):
    safetensors.torch.save_file(fuse(small()).state_dict(), tmp_path / "model.safetensors")


@pytest.mark.parametrize("road", ["triton", "mixed"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_gradients_come_in_the_parameters_layout(form, road):
    module = block().to(memory_format=form)
    x = torch.randn(2, 16, 4, 4)
    with implementation(road):
        gradients = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    assert [g.stride() for g in gradients] == [p.stride() for p in module.parameters()]
    module.conv2.weight = nn.Parameter(torch.randn(4, 4, 3, 3).permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1))
    with implementation(road):
        (gradient,) = torch.autograd.grad(module(x).sum(), [module.conv2.weight])
    assert gradient.stride() == module.conv2.weight.stride()
    module.conv2.weight = nn.Parameter(torch.randn(4, 4, 3, 6)[..., ::2])
    with implementation(road):
        (gradient,) = torch.autograd.grad(module(x).sum(), [module.conv2.weight])
    assert gradient.is_contiguous(), "without the parameter's gaps"


def test_a_filter_is_laid_out_on_the_way_and_the_remedy_is_named_once(caplog):
    module, x = block().eval(), torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    eligible._reported.clear()
    with torch.no_grad(), implementation("triton"):
        names = launched(lambda: module(x))
        assert (names.count("conv_forward"), len(names)) == (3, 4), "one launch more, for the 3x3 filter"
        launched(lambda: module(x))
        assert [("memory_format=torch.channels_last" in r.getMessage()) for r in caplog.records] == [True]
        with torch.autocast(x.device.type, torch.float16):
            cast = launched(lambda: module(x))
        module.to(memory_format=torch.channels_last)
        assert launched(lambda: module(x)) == ["conv_forward"] * 3
        with torch.autocast(x.device.type, torch.float16):
            assert launched(lambda: module(x)) == cast, "with the cast, for nothing"


def test_a_write_through_data_is_seen():
    module, x = block().eval(), torch.randn(2, 16, 4, 4)
    with torch.no_grad(), implementation("triton"):
        before = module(x)
        module.conv2.weight.data.mul_(2)
        module.conv1.weight.data = module.conv1.weight.data.clone() * 3
        after = module(x)
    with torch.no_grad(), implementation("eager"):
        torch.testing.assert_close(module(x), after, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after)


class Noisy(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.randn_like(x)
        return super().forward(x)


class Deep(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else super().forward(x)


class Swapped(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.bn1, self.bn2) if self.training else (self.bn2, self.bn1)
        return self.relu(second(self.conv2(self.relu(first(self.conv1(x))))) + x)


class Lucky(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x) if self.training and torch.rand(()).item() < 1e-6 else super().forward(x)


class Luckier(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x) if self.training and random.random() < 1e-6 else super().forward(x)


class WithoutGradients(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


class Uncast(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Gradual(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else x


class FrozenToo(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.bn1.training != self.training else super().forward(x)


class Checkpointed(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(checkpoint(self.branch, x, use_reentrant=False) + x)

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Collecting(BasicBlock):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x)


class CountingInABuffer(BasicBlock):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Noisy, "its forward in training is not that"),
        (Deep, "its forward in training is not that"),
        (Swapped, "its forward in training is not that"),
        (Lucky, "computes with tensors of its own, or draws random numbers"),
        (Luckier, "draws random numbers"),
        (WithoutGradients, "switches gradients"),
        (Uncast, "switches gradients, autocast"),
        (Gradual, "its forward in training is not that"),
        (FrozenToo, "with batch norm in evaluation"),
        (Checkpointed, "cannot be traced|switches|computes with tensors of its own"),
        (Collecting, "writes to the module"),
        (CountingInABuffer, "computes with tensors of its own"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_branches_or_writes_is_refused(kind, reason, training):
    module = kind(8, 8).train(training)
    before, states = copy.deepcopy(module.state_dict()), (torch.get_rng_state(), random.getstate())
    with pytest.warns(UserWarning, match=reason):
        fuse(module)
    assert type(module) is kind
    assert module.training is training
    assert getattr(module, "seen", []) == []
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


class Switchable(BasicBlock):
    drop, act = 0.0, None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drop, self.scales = 0.0, [1.0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if not self.drop and self.scales == [1.0] else x


def test_a_plain_attribute_that_changes_after_fusing_is_honoured():
    module, x = fuse(Switchable(8, 8), strict=True), torch.randn(2, 8, 3, 3)
    with implementation("triton"):
        assert "conv_forward" in launched(lambda: module(x))
        module.drop = 0.5
        assert module(x) is x
        module.drop = 0.0
        module.scales.append(2.0)
        assert module(x) is x
        module.scales.pop()
        assert "conv_forward" in launched(lambda: module(x))


def test_a_subclass_of_a_block_of_ours_keeps_its_own_forward():
    class Halved(resnet_fused.BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.5

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Halved(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    torch.manual_seed(0)
    module, x = Wrapped().eval(), torch.randn(2, 8, 3, 3)
    with torch.no_grad():
        with implementation("eager"):
            want = module(x)
        frozen = resnet_fused.optimize_for_inference(module)
        fuse(module)
        with implementation("triton"):
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen(x), want, rtol=1e-4, atol=1e-5)


def test_blocks_behind_the_first_are_fused_under_autocast():
    model, x = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)), torch.randn(2, 8, 3, 3)
    fuse(model)
    for training in (True, False):
        model.train(training)
        for start in (x, x.half()):
            with implementation("triton"), torch.autocast(x.device.type, torch.float16):
                assert launched(lambda start=start: model(start)).count("conv_forward") == 4


def test_modules_that_stand_in_a_sequence_twice_run_twice():
    conv, norm, relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
    for modules in ((conv, norm, relu, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), relu), (conv, norm, relu) * 2):
        plain = nn.Sequential(*modules)
        fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 3, 3)
        want = plain(x)
        for road in ("auto", "triton"):
            twin = copy.deepcopy(fused)
            with implementation(road):
                torch.testing.assert_close(twin(input=x), want, rtol=1e-4, atol=1e-5)
            assert all(map(torch.equal, (b for n, b in twin.named_buffers() if "num" in n), (
                b for n, b in plain.named_buffers() if "num" in n
            )))  # fmt: skip


def test_gradients_and_saved_tensors_with_the_negative_bit():
    module, x = block(), torch.randn(2, 16, 3, 3, requires_grad=True)
    dz = torch.randn(2, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    inputs = [x, *module.parameters()]
    with implementation("triton"):
        want = torch.autograd.grad(module(x), inputs, -dz)
        got = torch.autograd.grad(module(x), inputs, torch._neg_view(dz))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: -t, torch._neg_view):
            z = module(x)
        back = torch.autograd.grad(z, inputs, -dz)
    assert all(map(torch.equal, got, want))
    assert all(map(torch.equal, back, want))


def test_units_of_several_dtypes_keep_their_gradients_dtypes():
    module, x = block(), torch.randn(2, 16, 3, 3)
    module.bn1.half()
    with torch.autocast(x.device.type, torch.float16):
        for road in ("eager", "triton"):
            with implementation(road):
                module(x).sum().backward()
            assert [p.grad.dtype for p in module.parameters()] == [p.dtype for p in module.parameters()]


def test_a_convolution_whose_inner_method_is_replaced_runs_it():
    module, x = block().eval(), torch.randn(2, 16, 3, 3)
    conv = module.conv2
    conv._conv_forward = lambda x, w, b: nn.functional.conv2d(x, w, b, padding=1) * 2
    with torch.no_grad(), implementation("eager"):
        want = module(x)
    with torch.no_grad(), implementation("triton"):
        torch.testing.assert_close(module(x), want)


def test_a_counter_of_floats_is_told_once(caplog):
    module, x = block(), torch.randn(2, 16, 3, 3)
    module.bn1.num_batches_tracked = torch.tensor(0.0)
    eligible._reported.clear()
    with implementation("triton"):
        for _ in range(3):
            module(x)
    assert sum("num_batches_tracked" in record.getMessage() for record in caplog.records) == 1


def test_a_filter_that_is_no_parameter_keeps_its_gradient():
    module = block().eval().requires_grad_(False)
    delta = torch.zeros(4, 4, 3, 3, requires_grad=True)
    weight = module.conv2.weight
    del module.conv2.weight
    module.conv2.weight = weight + delta
    x = torch.randn(2, 16, 4, 4)
    found = []
    for road in ("triton", "mixed", "eager"):
        with implementation(road):
            found.append(torch.autograd.grad(module(x).square().sum(), delta, retain_graph=True)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], found[2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_replicas_of_data_parallel_keep_their_gradients(training):
    module = block().train(training)
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        twin = child._replicate_for_data_parallel()
        for key, p in child._parameters.items():
            setattr(twin, key, None if p is None else p * 1)  # a broadcast copy: no parameter
        replica._modules[name] = twin
    x = torch.randn(2, 16, 4, 4)
    with implementation("triton"):
        assert "conv_forward" in launched(lambda: replica(x).sum().backward())
    assert all(p.grad is not None for p in module.parameters())


def test_tangents_of_forward_mode_stay():
    module, x = block().eval().requires_grad_(False), torch.randn(2, 16, 4, 4)
    found = []
    for road in ("triton", "eager"):
        with implementation(road), forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x)))).tangent)
            weight = module.conv1.weight
            module.conv1._parameters["weight"] = forward_ad.make_dual(weight.detach(), torch.ones_like(weight))
            found.append(forward_ad.unpack_dual(module(x)).tangent)
            module.conv1._parameters["weight"] = weight
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[3])


@pytest.mark.parametrize(
    "register",
    [
        nn_module.register_module_forward_hook,
        nn_module.register_module_forward_pre_hook,
        nn_module.register_module_full_backward_hook,
        nn_module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_on_every_module_run(register):
    module, x, seen = resnet_fused.Bottleneck(16, 4), torch.randn(2, 16, 4, 4), []
    module.relu.inplace = False  # PyTorch's own hooks refuse what is in place
    handle = register(lambda m, *rest: seen.append(type(m)))
    try:
        with implementation("triton"):
            module(x.requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == 3
    with implementation("triton"):
        assert "conv_forward" in launched(lambda: module(x))


def test_torch_fx_traces_the_eager_forward():
    model, x = fuse(small().eval()), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        for road in ("auto", "triton"):
            with implementation(road):
                traced = torch.fx.symbolic_trace(model)
                features = create_feature_extractor(model, ["layer2.0.conv1", "layer3"])
            torch.testing.assert_close(traced(x), want)
            assert features(x)["layer3"].shape == (1, 256, 2, 2)
    stem = fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    assert [n.op for n in torch.fx.symbolic_trace(stem).graph.nodes].count("call_module") == 3


def test_scripting_names_unfuse():
    for model in (fuse(small()), fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))):
        with pytest.raises(RuntimeError, match=r"resnet_fused\.unfuse\(model\)"):
            torch.jit.script(model)
        torch.jit.script(unfuse(model))


@pytest.mark.parametrize("training", [True, False])
def test_several_gradients_at_once(training):
    module = block().train(training)
    x = torch.randn(2, 16, 3, 3, requires_grad=True)
    inputs = [x, *module.parameters()]
    dz = torch.randn(3, 2, 16, 3, 3)
    with implementation("triton"):
        z = module(x)
        one_by_one = [torch.autograd.grad(z, inputs, g, retain_graph=True) for g in dz]
        batched = torch.autograd.grad(z, inputs, dz, is_grads_batched=True, retain_graph=True)
        mapped = torch.func.vmap(lambda g: torch.autograd.grad(z, inputs, g, retain_graph=True))(dz)
    for i, want in enumerate(zip(*one_by_one, strict=True)):
        assert torch.equal(batched[i], torch.stack(want))
        assert torch.equal(mapped[i], torch.stack(want))


def test_a_vectorised_jacobian():
    module, x = block().eval(), torch.randn(1, 16, 2, 2)
    found = []
    for road in ("triton", "eager"):
        with implementation(road):
            found.append(torch.autograd.functional.jacobian(lambda x: module(x).mean((2, 3)), x, vectorize=True))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


ROADS = {"triton": "conv_forward", "mixed": "batch_norm_apply", "eager": "aten.relu"}


def road_of(names: list[str]) -> str:
    return next(road for road, launch in ROADS.items() if launch in names or launch + "_" in names)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("road", ROADS)
def test_recomputation_takes_the_road_of_its_forward(road, reentrant):
    module, x = block(), torch.randn(2, 16, 3, 3, requires_grad=True)
    for outside in ("auto", "eager", "triton"):
        with implementation(road):
            z = checkpoint(module, x, use_reentrant=reentrant)
        with implementation(outside):
            assert road_of(launched(lambda z=z: z.sum().backward())) == road
    with implementation(road):
        z = checkpoint(lambda x: checkpoint(module, module(x), use_reentrant=reentrant), x, use_reentrant=reentrant)
    assert road_of(launched(lambda: z.sum().backward())) == road


def test_forwards_on_several_roads_are_each_recomputed_on_their_own():
    module, x = block(), torch.randn(2, 16, 3, 3, requires_grad=True)
    forwards = {}
    for road in (*ROADS, "auto"):
        with implementation(road):
            forwards[road] = checkpoint(module, x, use_reentrant=False)
    forwards["default"] = checkpoint(module, x, use_reentrant=False)
    wanted = {"auto": "eager", "default": "eager"} if x.device.type == "cpu" else {}
    for road, z in forwards.items():
        assert road_of(launched(lambda z=z: z.sum().backward())) == wanted.get(road, road)


def test_recomputation_in_another_thread_and_a_road_of_its_own():
    module, x = block(), torch.randn(2, 16, 3, 3, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        with implementation("mixed"):
            y = module(x)
        return module(y)

    with implementation("triton"):
        z = checkpoint(forward, x, use_reentrant=False)
    errors, names = [], []

    def work() -> None:
        try:
            names.extend(launched(lambda: z.sum().backward()))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert names.count("conv_forward") == 3
    assert names.count("aten.convolution") == 3


def test_a_forward_in_between_leaves_the_recomputation_its_road():
    module, x = block(), torch.randn(2, 16, 3, 3, requires_grad=True)
    with implementation("triton"):
        z = checkpoint(module, x, use_reentrant=False)
    module(x)
    assert road_of(launched(lambda: z.sum().backward())) == "triton"


def test_what_was_told_is_forgotten_with_the_module():
    module, x = block(), torch.randn(2, 16, 3, 3, requires_grad=True)
    with implementation("triton"):
        module(x)
    assert module in request._forwards
    module(x)
    assert module not in request._forwards, "the default needs no note"


def test_tensors_saved_elsewhere_may_come_back_in_another_layout():
    module, x = block(), torch.randn(2, 16, 3, 4, requires_grad=True)
    x.data = x.data.contiguous(memory_format=torch.channels_last)
    for road in ("triton", "mixed"):
        with implementation(road):
            want = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
                z = module(x)
            assert all(map(torch.equal, torch.autograd.grad(z.square().sum(), [x, *module.parameters()]), want))
            with torch.autograd.graph.save_on_cpu():
                z = module(x)
            assert all(map(torch.equal, torch.autograd.grad(z.square().sum(), [x, *module.parameters()]), want))


@pytest.mark.parametrize("road", ["triton", "mixed"])
def test_what_is_saved_of_a_shortcut_may_come_back_in_another_layout_too(road):
    layer = eligible.Layer(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12))
    shortcut = functional.Projection(torch.randn(2, 6, 4, 3), nn.Conv2d(6, 12, 1), nn.BatchNorm2d(12))
    leaves = [torch.randn(2, 8, 4, 3, requires_grad=True), *layer.conv.parameters(), *shortcut.conv.parameters()]

    def transposed(t: Tensor) -> Tensor:
        """The values of ``t`` with the last dimension the outermost in memory."""
        return t.movedim(-1, 0).contiguous().movedim(0, -1)

    with implementation(road):
        z = functional.residual_block(leaves[0], [layer], shortcut)
        want = torch.autograd.grad(z.square().sum(), leaves)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, transposed):
            z = functional.residual_block(leaves[0], [layer], shortcut)
        assert all(map(torch.equal, torch.autograd.grad(z.square().sum(), leaves), want))


@pytest.mark.parametrize(
    ("name", "training"),
    [
        *[(name, training) for name in ("x", "z", "conv1.weight", "conv2.weight", "bn2.weight") for training in (0, 1)],
        ("bn2.running_mean", False),
        ("bn2.running_var", False),
    ],
)
def test_what_changes_in_place_before_the_backward_raises_as_in_eager(name, training):
    for memory in ("default", "recompute"):
        raised = {}
        for road in ("eager", "triton", "mixed"):
            module = fuse(block().train(bool(training)), memory=memory)
            x = torch.randn(2, 16, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
            with implementation(road):
                z = module(x)
            changed = {"x": x, "z": z} | dict(module.named_parameters()) | dict(module.named_buffers())
            with torch.no_grad():
                changed[name].mul_(2)
            try:
                z.sum().backward()
                raised[road] = None
            except RuntimeError as error:
                raised[road] = "modified by an inplace operation" in str(error)
        assert raised["triton"] == raised["mixed"] == raised["eager"], raised


def test_a_filter_that_is_cast_may_change_before_the_backward_as_in_eager():
    for road in ("eager", "triton", "mixed"):
        module, x = block(), torch.randn(2, 16, 3, 3)
        with implementation(road), torch.autocast(x.device.type, torch.float16):
            z = module(x)
        with torch.no_grad():
            module.conv2.weight.mul_(2)
        z.sum().backward()


def test_an_addition_in_place_keeps_the_branchs_dtype():
    """As torchvision's blocks add; those that make a new tensor get the wider dtype."""

    class Added(BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)

    x = torch.randn(2, 8, 4, 4)
    for module in (fuse(BasicBlock(8, 8)), fuse(Added(8, 8))):
        for training in (True, False):
            module.train(training)
            with torch.autocast(x.device.type, torch.float16):
                with implementation("eager"):
                    want = module(x)
                for road in ("triton", "mixed"):
                    with implementation(road):
                        got = module(x)
                    assert got.dtype == want.dtype
                    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_a_new_block_of_a_converted_class_is_an_ordinary_one():
    module = type(block())(16, 4)
    x = torch.randn(2, 16, 3, 3)
    with implementation("triton"):
        assert "conv_forward" not in launched(lambda: module(x))
    fuse(module)
    with implementation("triton"):
        assert "conv_forward" in launched(lambda: module(x))
    assert type(unfuse(module)) is Bottleneck


class Wrapper(nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 1.5


def _rename(m: nn.Module) -> None:
    m.shortcut = m.downsample
    del m.downsample


SURGERY: dict[str, Callable[[nn.Module], Any]] = {
    "wrapped convolution": lambda m: setattr(m, "conv2", Wrapper(m.conv2)),
    "wrapped norm": lambda m: setattr(m, "bn1", Wrapper(m.bn1)),
    "identity for a norm": lambda m: setattr(m, "bn1", nn.Identity()),
    "identity for the ReLU": lambda m: setattr(m, "relu", nn.Identity()),
    "another convolution": lambda m: setattr(m, "conv2", nn.Conv2d(12, 12, 3, padding=1)),
    "shortcut's convolution replaced": lambda m: m.downsample.__setitem__(0, Wrapper(m.downsample[0])),
    "shortcut extended": lambda m: m.downsample.append(nn.ReLU()),
    "shortcut with something in front": lambda m: m.downsample.insert(0, nn.Identity()),
    "shortcut rebuilt": lambda m: setattr(
        m, "downsample", nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12))
    ),
    "shortcut taken away": lambda m: setattr(m, "downsample", None),
    "shortcut renamed": _rename,
    "a submodule taken away": lambda m: delattr(m, "bn2"),
}


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("name", SURGERY)
@pytest.mark.filterwarnings("ignore:nothing was fused")
def test_surgery_after_fusing(name, again):
    torch.manual_seed(0)
    plain = BasicBlock(8, 12, 2, nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12)))
    module = fuse(copy.deepcopy(plain))
    for m in (plain, module):
        SURGERY[name](m)
    if again:
        fuse(module)
    module.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 5, 5)

    def result(m: nn.Module, road: str) -> Any:
        try:
            with implementation(road):
                return m(x)
        except Exception as error:
            return type(error)

    want = result(plain, "eager")
    for road in ("triton", "mixed", "eager"):
        got = result(copy.deepcopy(module), road)
        assert isinstance(got, Tensor) == isinstance(want, Tensor)
        if isinstance(want, Tensor):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        else:
            assert got == want
    unfuse(module)
    assert not any(isinstance(m, Converted) for m in module.modules())
    assert type(module) is BasicBlock


@pytest.mark.parametrize("name", ["conv1", "bn2"])
def test_a_block_of_ours_without_one_of_its_parts_raises_as_its_modules_do(name):
    module = resnet_fused.BasicBlock(8, 8)
    delattr(module, name)
    for road in ("eager", "triton"):
        with implementation(road), pytest.raises(AttributeError, match=name):
            module(torch.randn(1, 8, 3, 3))


def test_surgery_on_a_sequence():
    stem = fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    stem[0] = Wrapper(stem[0])
    stem.insert(1, nn.Identity())
    stem.append(nn.ReLU())
    x = torch.randn(2, 3, 5, 5)
    with implementation("eager"):
        want = copy.deepcopy(stem)(x)
    with implementation("triton"):
        torch.testing.assert_close(stem(x), want, rtol=1e-4, atol=1e-4)
        assert launched(lambda: stem(x)).count("conv_forward") == 1
    del stem[0]
    assert type(unfuse(stem)) is nn.Sequential


def _state(model: nn.Module) -> list[Any]:
    return [(type(m), dict(vars(m)), dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in model.modules()]


def _same(a: list[Any], b: list[Any]) -> bool:
    def equal(x: dict, y: dict) -> bool:
        return x.keys() == y.keys() and all(x[k] is y[k] or x[k] == y[k] for k in x if k[:1] != "_")

    return all(p[0] is q[0] and all(map(equal, p[1:], q[1:])) for p, q in zip(a, b, strict=True))


class Interrupt(BaseException):
    pass


def _lines(work: Callable[[], Any], at: int | None = None) -> list[tuple[str, int]]:
    """Run ``work``; the lines of the conversion that it executes, of which number ``at`` raises Interrupt."""
    seen: list[tuple[str, int]] = []

    def tracer(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_globals.get("__name__") not in ("resnet_fused.convert", "contextlib"):
            return None
        if event == "line":
            seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) - 1 == at:
                raise Interrupt
        return tracer

    sys.settrace(tracer)
    try:
        work()
    except Interrupt:
        pass
    finally:
        sys.settrace(None)
    return seen


@pytest.mark.parametrize("change", ["fuse", "fuse again", "unfuse"])
def test_an_interrupt_anywhere_leaves_the_model_as_before_or_converted(change):
    """At every line, the first, the second and the last time that it is executed."""

    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Bottleneck(8, 2), BasicBlock(8, 8))
        return model if change == "fuse" else fuse(model)

    work = {"fuse": fuse, "fuse again": lambda m: fuse(m, memory="recompute"), "unfuse": unfuse}[change]
    work(build())  # what is done but once in a process
    reference = build()
    before = _state(reference)
    passages: dict[tuple[str, int], list[int]] = {}
    for at, line in enumerate(_lines(lambda: work(reference))):
        passages.setdefault(line, []).append(at)
    after = _state(reference)
    kinds = [[entry[0] for entry in state] for state in (before, after)]
    points = sorted({at for passed in passages.values() for at in (*passed[:2], passed[-1])})
    assert len(points) > 20
    for at in points:
        model = build()
        start = _state(model)
        assert len(_lines(lambda m=model: work(m), at)) == at + 1
        now = _state(model)
        assert _same(now, start) or [entry[0] for entry in now] == kinds[1], f"half-way at line {at}"
        assert not any(p is None for m in model.modules() for p in (getattr(m, "training", None),))
        unfuse(model)
        assert not any(isinstance(m, Converted) for m in model.modules())
        assert not any(name in vars(m) for m in model.modules() for name in ("_conversion", "memory"))


def test_an_error_half_way_leaves_the_model_as_before(monkeypatch):
    from resnet_fused import convert

    model, made = small(), convert._converted

    def full(kind: Any, original: Any) -> Any:
        if len([m for m in model.modules() if isinstance(m, Converted)]) == 2:
            raise MemoryError
        return made(kind, original)

    monkeypatch.setattr(convert, "_converted", full)
    start = _state(model)
    with pytest.raises(MemoryError):
        fuse(model)
    assert _same(_state(model), start)


def test_copies_of_a_fused_model_are_fused():
    model = fuse(small())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert sum(isinstance(m, Converted) for m in twin.modules()) == 5
        assert type(unfuse(twin).layer1[0]) is BasicBlock
