"""fuse, unfuse and explain: what is recognised, what is refused and why, and what stays as it was."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from functools import wraps
from itertools import islice

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models.resnet import BasicBlock

import resnet_fused
from resnet_fused import explain, functional, fuse, implementation, recognise, unfuse
from resnet_fused.convert import Converted, ConvertedBlock, ConvertedSequential, ConvertedStem, ConvertedUnits
from tests import zoo

pytestmark = pytest.mark.usefixtures("on_device")

COUNTS = {
    "resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "resnet152": 50,
    "resnext50_32x4d": 16, "resnext101_32x8d": 33, "wide_resnet50_2": 16, "wide_resnet101_2": 33,
}  # fmt: skip


def small() -> nn.Module:
    model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    zoo.randomise_norms(model)
    return model.eval()


def converted(model: nn.Module) -> int:
    return sum(isinstance(m, ConvertedBlock) for m in model.modules())


@pytest.mark.parametrize("name", COUNTS)
def test_every_block_of_torchvisions_networks(name):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    assert converted(fuse(model, strict=True)) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "blocks", "runs"),
    [
        ("resnet18", 8, 0), ("resnet50", 16, 0), ("resnet18d", 8, 1), ("resnet50d", 16, 1),
        ("resnext50_32x4d", 16, 0), ("wide_resnet50_2", 16, 0),
    ],
)  # fmt: skip
def test_timm(name, blocks, runs):
    with torch.device("meta"):
        model = fuse(timm.create_model(name, pretrained=False), strict=True)
    assert converted(model) == blocks
    assert sum(isinstance(m, ConvertedSequential) for m in model.modules()) == runs


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_hugging_face(layer_type):
    model = fuse(zoo.hugging_face(layer_type), strict=True)
    assert converted(model) == 6, "five blocks and the unit of the stem"


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: timm.create_model("resnet50_gn"), "conv1: the normalisation is timm.layers.norm.GroupNorm"),
        (lambda: timm.create_model("resnetv2_50d_gn"), "the normalisation is timm.layers.norm_act.GroupNormAct"),
        (lambda: timm.create_model("resnetv2_50d_evos"), "the normalisation is timm.layers.evo_norm.EvoNorm2dS0"),
        (lambda: timm.create_model("resnetv2_50d_frn"), "FilterResponseNormTlu2d"),
        (lambda: timm.create_model("resnetv2_50x1_bit"), "the convolution is timm.layers.std_conv.StdConv2d"),
        (torchvision.models.video.r3d_18, "the convolution is torchvision.models.video.resnet.Conv3DSimple"),
        (lambda: torch.fx.symbolic_trace(torchvision.models.resnet18()), "it is a torch.fx.GraphModule"),
        (lambda: torch.jit.script(torchvision.models.resnet18()), "it is a torch.jit.ScriptModule"),
    ],
)
def test_what_is_not_fused_says_why(build, reason):
    model = build()
    refused = [row for row in explain(model).to_dict() if reason in row["reason"]]
    assert refused
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="cannot be fused"):
        fuse(model, strict=True)
    assert [type(m) for m in model.modules()] == before


def test_warns_if_nothing_was_fused():
    with pytest.warns(UserWarning, match="nothing was fused: no residual block was recognised"):
        fuse(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
        fuse("resnet50")


class Doubled(BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


class Tired(BasicBlock):
    def forward(self, x):
        raise RuntimeError("not today")


class Choosy(BasicBlock):
    def forward(self, x):
        return super().forward(x) if x.shape[2] > 4 else x


class Counting(BasicBlock):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class CountingOnItself(BasicBlock):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Weighted(BasicBlock):
    def forward(self, x):
        return self.relu(torch.add(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))), x, alpha=2))


class AddedToItself(BasicBlock):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return self.relu(out + out)


class ActivatedShortcut(BasicBlock):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.relu(self.bn3(self.conv3(x))))


class Broadcast(BasicBlock):
    def __init__(self, channels, _):
        super().__init__(1, channels)


class Leaking(BasicBlock):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu(out), out


class InPlace(BasicBlock):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity = x if self.downsample is None else self.downsample(x)
        identity += out
        return self.relu(identity)


class TwoReLUs(BasicBlock):
    def forward(self, x):
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Tired, "cannot be traced: not today"),
        (Choosy, "cannot be traced"),
        (Counting, "writes to the module"),
        (CountingOnItself, "writes to the module"),
    ],
)
def test_a_block_with_another_forward_is_left_alone(block, reason):
    module = block(16, 16)
    before = dict(vars(module))
    with pytest.warns(UserWarning, match=reason):
        fuse(module)
    assert type(module) is block
    assert vars(module) == before


@pytest.mark.parametrize(
    "block", [Doubled, Weighted, AddedToItself, ActivatedShortcut, Broadcast, Leaking, InPlace, TwoReLUs]
)
def test_a_block_with_another_forward_keeps_it_between_its_units(block):
    module = block(16, 16).eval()
    zoo.randomise_norms(module)
    x = torch.randn(2, module.conv1.in_channels, 5, 5)
    with torch.inference_mode():
        want = module(x.clone())
        assert isinstance(fuse(module, strict=True), ConvertedUnits)
        with implementation("triton"), resnet_fused.trace() as trace:
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    assert "conv_forward" in [launch.name for launch in trace.launches]
    assert type(unfuse(module)) is block


class OwnNames(nn.Module):
    """The same function as torchvision's block, by other means."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.second = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)])
        self.shortcut = nn.Sequential()

    def branch(self, x):
        for module in (self.first, *self.second):
            x = module(x)
        return x

    def forward(self, x):
        return nn.functional.relu(self.shortcut(x) + self.branch(x))


class ByList(BasicBlock):
    """Walks through a list of its submodules, which PyTorch does not know."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.branch = [self.conv1, self.bn1, self.relu, self.conv2, self.bn2]

    def forward(self, x):
        out = x
        for module in self.branch:
            out = module(out)
        return self.relu(out + x)


class PooledShortcut(nn.Module):
    """A shortcut that is longer than the branch."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return nn.functional.relu(self.bn(self.conv(x)) + self.bn2(self.conv2(self.pool(x))))


class Inherited(BasicBlock):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    "build",
    [lambda: OwnNames(16), lambda: Inherited(16, 16), lambda: ByList(16, 16), lambda: PooledShortcut(16)],
)
def test_a_block_of_ones_own_is_fused_and_stays_what_it_is(build):
    block = build().eval()
    zoo.randomise_norms(block)
    x = torch.randn(2, 16, 5, 5)
    with torch.inference_mode():
        want = block(x)
        fuse(block, strict=True)
        torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-4)
        with implementation("triton"), resnet_fused.trace() as trace:
            torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-4)
    assert [launch.name for launch in trace.launches].count("conv_forward") == 2
    assert isinstance(block, type(unfuse(copy.deepcopy(block))))
    block.train()(torch.randn(2, 16, 5, 5)).sum().backward()


def test_each_block_is_judged_by_itself():
    model = torchvision.models.ResNet(BasicBlock, [1, 3, 1, 1])
    model.layer2[1].forward = lambda x: 2 * x
    model.layer2[2].described = "mine"
    model.layer3[0].conv2.forward = lambda x: x
    fuse(model)
    assert [isinstance(block, ConvertedBlock) for block in (*model.layer2, *model.layer3)] == [
        True,
        False,
        False,
        False,
    ]
    assert [row["reason"] for row in explain(model).to_dict() if row["name"][:6] in ("layer2", "layer3")] == [
        "",
        "its forward is replaced on the instance",
        "it has an attribute 'described' of its own",
        "",
    ]
    assert isinstance(model.layer3[0], ConvertedUnits)


def test_hooks_of_the_block_do_not_run_while_it_is_examined():
    model, seen = small(), []
    model.layer1[0].register_forward_hook(lambda *a: seen.append(a))
    fuse(model)
    assert not seen


def test_submodules_replaced_after_fusing_are_honoured():
    block, x = fuse(BasicBlock(16, 16).eval()), torch.randn(1, 16, 5, 5)
    block.relu = nn.SiLU()
    with torch.inference_mode(), implementation("triton"), resnet_fused.trace() as trace:
        assert torch.equal(block(x), BasicBlock.forward(block, x))
    assert "conv_forward" not in [launch.name for launch in trace.launches]


def test_subclasses_of_sequential_are_fused_too():
    stem = torchvision.ops.Conv2dNormActivation(3, 16)
    assert isinstance(fuse(stem, strict=True), ConvertedSequential)
    assert type(unfuse(stem)) is torchvision.ops.Conv2dNormActivation


def test_probing_changes_nothing():
    model, state = small(), torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training is False


def test_keys_parameters_and_optimizer_stay():
    model = small().double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    fuse(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    twin = unfuse(copy.deepcopy(model))
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=1e-4, momentum=0.9)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        for _ in range(2):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def wrapped(function):
    @wraps(function)
    def call(*args):
        return function(*args)

    return call


class Flagged(torchvision.models.resnet.BasicBlock):
    """Looks at what its class has, at a buffer that is none yet, and at what nobody has yet."""

    doubled = False

    def __init__(self, units=False):
        super().__init__(16, 16)
        self.units = units
        self.register_buffer("scale", None)

    @wrapped
    def forward(self, x):
        y = super().forward(x)
        if self.units:
            y = y.sin()
        if self.doubled or getattr(self, "more", False):
            y = y + y
        return y if self.scale is None else y * self.scale


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("name", ["doubled", "more", "scale"])
def test_attributes_that_come_later_and_that_its_forward_asks_for_count(name, units):
    block = fuse(nn.Sequential(Flagged(units)).eval())[0]
    x, value = torch.randn(2, 16, 5, 4), torch.tensor(3.0) if name == "scale" else True
    assert isinstance(block, ConvertedUnits if units else ConvertedBlock)
    for part in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        with torch.no_grad(), implementation("triton"):
            assert part.why_eager(x) is None
            part.unrelated = 1
            assert part.why_eager(x) is None
            setattr(part, name, value)
            torch.testing.assert_close(part(x), Flagged.forward(part, x))
            assert name in part.why_eager(x)


def test_attributes_that_come_later_are_the_users():
    model = fuse(small().eval())
    mine = {"memory": [1], "layout": "NHWC", "kinds": 3, "plain": None, "pooled_stem": True}
    blocks = [module for module in model.modules() if isinstance(module, Converted)]
    for block in blocks:
        vars(block).update(mine)
    assert all(row["implementation"] == "fused" for row in explain(model).to_dict())
    x = torch.randn(2, 3, 40, 24)
    with implementation("triton"), resnet_fused.trace() as trace, torch.no_grad():
        got = model(x)
    assert "conv_forward" in [launch.name for launch in trace.launches]
    unfuse(model)
    assert all(vars(block).items() >= mine.items() for block in blocks)
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


def test_unfuse_is_exact():
    model = small()
    twin = copy.deepcopy(model)
    unfuse(fuse(model))
    for a, b in zip(model.modules(), twin.modules(), strict=True):
        assert type(a) is type(b)
        assert a.__dict__.keys() == b.__dict__.keys()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    stem = fuse(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()))
    assert isinstance(stem, ConvertedSequential)
    assert type(unfuse(stem)) is nn.Sequential


def test_idempotent_and_after_loading():
    model = fuse(small())
    kinds = [type(m) for m in model.modules()]
    layouts = [m.described() for m in model.modules() if isinstance(m, ConvertedBlock)]
    fuse(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [m.described() for m in model.modules() if isinstance(m, ConvertedBlock)] == layouts
    model.load_state_dict(small().state_dict(), strict=True)


def test_in_inference_mode_the_parameters_stay_trainable():
    model = small()
    with torch.inference_mode():
        fuse(model)
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()


def test_a_block_takes_its_input_by_the_name_that_it_has():
    layer, x = zoo.hugging_face().resnet.encoder.stages[0].layers[0].eval(), torch.randn(1, 16, 4, 4)
    want = layer(hidden_state=x)
    fuse(layer, strict=True)
    for road in ("auto", "triton"):
        with implementation(road):
            torch.testing.assert_close(layer(hidden_state=x), want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(copy.deepcopy(layer)(hidden_state=x), want, rtol=1e-4, atol=1e-4)
    assert next(n.name for n in torch.fx.symbolic_trace(layer).graph.nodes) == "hidden_state"
    with pytest.raises(TypeError, match="unexpected keyword"):
        layer(x=x)
    block = fuse(BasicBlock(8, 8))
    assert torch.equal(block(x=torch.ones(2, 8, 3, 3)), block(torch.ones(2, 8, 3, 3)))


def test_a_model_of_inference_tensors_is_fused():
    with torch.inference_mode():
        assert converted(fuse(copy.deepcopy(small()), strict=True)) == 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_distributed_data_parallel(when, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small().train()
        wrapped = torch.nn.parallel.DistributedDataParallel(fuse(model) if when == "before" else model)
        fuse(wrapped, strict=True)
        assert converted(wrapped) == 4
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        before = model.layer1[0].conv1.weight.detach().clone()
        wrapped(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        assert not torch.equal(model.layer1[0].conv1.weight, before)
    finally:
        torch.distributed.destroy_process_group()


def test_a_sequence_that_was_fused_alone_is_part_of_a_block_that_is_fused_later():
    shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, 2), nn.BatchNorm2d(12))
    model = nn.Sequential(BasicBlock(8, 12, 2, shortcut))
    assert isinstance(fuse(shortcut), ConvertedSequential)
    fuse(model)
    assert isinstance(model[0], ConvertedBlock)
    assert type(shortcut) is nn.Sequential


def test_synchronised_norms_are_those_of_the_block_that_was_recognised():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(BasicBlock(8, 8)))
    assert isinstance(block.bn1, nn.SyncBatchNorm)
    assert block.why_unfusable() is None


def test_filter():
    model = fuse(small(), filter_fn=lambda name, module: name.startswith("layer2"))
    assert [n for n, m in model.named_modules() if isinstance(m, ConvertedBlock)] == ["layer2.0"]


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "save"])
def test_copies_compute_the_same(kind):
    model, x = fuse(small()), torch.randn(1, 3, 32, 32)
    if kind == "deepcopy":
        twin = copy.deepcopy(model)
    elif kind == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert converted(twin) == 4
    with torch.inference_mode(), implementation("triton"):
        assert torch.equal(model(x), twin(x))


def hook(block):
    block.relu.register_forward_hook(lambda m, i, o: o * 2)


def parametrise(block):
    parametrizations.weight_norm(block.conv2)


def pruned(block):
    prune.custom_from_mask(block.conv1, "weight", torch.rand_like(block.conv1.weight) < 0.5)


def test_a_hook_on_the_relu_of_a_sequence_runs():
    model, seen = fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())), []
    model[2].register_forward_hook(lambda *a: seen.append(a))
    with implementation("triton"), resnet_fused.trace() as trace:
        model(torch.randn(2, 3, 5, 5))
    assert len(seen) == 1
    assert "conv_forward" in [launch.name for launch in trace.launches]


@pytest.mark.parametrize("change", [hook, parametrise, pruned])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_and_parametrizations_are_honoured(change, when):
    model, x = small(), torch.randn(1, 3, 32, 32)
    if when == "after":
        fuse(model)
    change(model.layer2[0])
    if when == "before":
        fuse(model)
        assert not isinstance(model.layer2[0], ConvertedBlock)
    with torch.inference_mode():
        want = model(x)
        with implementation("triton"), resnet_fused.trace() as trace:
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
            rows = {row["name"]: row for row in explain(model, x).to_dict()}
    # A block as a whole, or those of its units that are as they were.
    assert rows["layer2.0"]["implementation"] == ("eager" if when == "after" else "fused")
    assert rows["layer1.0"]["implementation"] == "fused"
    assert "conv_forward" in [launch.name for launch in trace.launches]


def test_the_blocks_own_hooks_still_run():
    model, seen = fuse(small()), []
    model.layer1[0].register_forward_hook(lambda *a: seen.append(a))
    with torch.inference_mode(), implementation("triton"):
        model(torch.randn(1, 3, 32, 32))
    assert len(seen) == 1


def test_train_mode_is_exactly_the_original():
    model = small().double().train()
    twin = fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(twin(x), model(x))
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_sequential_runs():
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.Tanh()),
    ).eval()
    zoo.randomise_norms(model)
    x = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        want = model(x)
        fuse(model)
        with implementation("triton"), resnet_fused.trace() as trace:
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert [launch.name for launch in trace.launches].count("conv_forward") == 2
    assert isinstance(model[:2], ConvertedSequential)


def test_explain_with_an_input():
    model = fuse(small())
    model.layer3.train()
    x = torch.randn(1, 3, 32, 32)
    with implementation("triton"):
        assert explain(model, x).to_dict()[2]["launches"] == 5, "two filters are laid out on the way"
        explanation = explain(model.to(memory_format=torch.channels_last), x)
    rows = explanation.to_dict()
    assert [row["implementation"] for row in rows] == ["fused"] * 5
    assert rows[2]["launches"] == 3
    assert rows[2]["bytes"] > 0
    assert rows[2]["tiles"]
    assert model.layer3.training, "training flags are restored"
    assert not model.layer1.training
    assert not any(m._forward_hooks for m in model.modules())
    assert "5 of 5 blocks fused" in str(explanation)
    assert "not converted" in str(explain(small()))


def test_compiles_in_one_graph():
    model, x = fuse(small()), torch.randn(1, 3, 32, 32)
    with torch.inference_mode(), implementation("triton"):
        want = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want)


def deep() -> nn.Module:
    """A stem of three convolutions."""
    model = timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), stem_type="deep", stem_width=8)
    zoo.randomise_norms(model)
    return model.eval()


STEMS = {
    "torchvision": small,
    "timm": lambda: timm.create_model("resnet18", pretrained=False).eval(),
    "Hugging Face": lambda: zoo.build("Hugging Face"),
}


def stems(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, ConvertedStem)]


def launched(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """The logits, and what was launched for them."""
    with torch.no_grad(), implementation("triton"), resnet_fused.trace() as trace:
        return zoo.logits(model, x), [launch.name for launch in trace.launches if launch.grid]


@pytest.mark.parametrize("name", STEMS)
def test_a_stem_is_fused_up_to_its_pool_and_nothing_else_changes(name):
    model = STEMS[name]()
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    x = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        want = zoo.logits(model, x)
    (stem,) = stems(fuse(model))
    got, names = launched(model, x)
    assert names[:2] == ["conv_pack", "conv_pool"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    twin = pickle.loads(pickle.dumps(model))
    assert len(stems(twin)) == 1
    assert launched(twin, x)[1] == names
    assert list(model.state_dict()) == keys
    assert "_conversion" in vars(stem)
    assert [type(m) for m in unfuse(model).modules()] == kinds
    assert "_conversion" not in vars(stem)


@pytest.mark.parametrize("part", ["conv1", "bn1", "relu", "maxpool"])
def test_a_hook_on_a_part_of_a_stem_sees_what_it_saw(part):
    model, x = small(), torch.randn(1, 3, 32, 32)
    seen: list[torch.Tensor] = []
    model.get_submodule(part).register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    launched(model, x)
    _, names = launched(fuse(model), x)
    assert "conv_pool" not in names
    torch.testing.assert_close(*seen)


def _other_pool(model: nn.Module) -> None:
    model.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)


def _between(model: nn.Module) -> None:
    def forward(self, x):
        return self.maxpool(self.relu(self.bn1(self.conv1(x)) + 1))

    model.__class__ = type("Between", (type(model),), {"forward": forward})


def _twice_read(model: nn.Module) -> None:
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.maxpool(y).sum() + y.sum()

    model.__class__ = type("TwiceRead", (type(model),), {"forward": forward})


def known(model: nn.Module, monkeypatch) -> None:
    """Let the forward of its class count among those that are known."""
    kind = type(model)
    monkeypatch.setattr(recognise, "NETWORKS", (*recognise.NETWORKS, (kind.__module__, kind.__qualname__)))


@pytest.mark.parametrize(("change", "count"), [(_other_pool, 1), (_between, 0), (_twice_read, 1)])
def test_a_stem_ends_where_something_else_begins(change, count, monkeypatch):
    model, x = small(), torch.randn(1, 3, 32, 32)
    change(model)
    known(model, monkeypatch)
    with torch.no_grad():
        want = model(x)
    assert len(stems(fuse(model))) == count
    got, names = launched(model, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert "conv_pool" not in names
    assert names.count("conv_forward") >= count


@pytest.mark.parametrize("training", [True, False])
def test_a_deep_stem_is_fused_to_its_end(training):
    model, x = deep().train(training), torch.randn(2, 3, 40, 24)
    twin = copy.deepcopy(model)
    assert len(stems(fuse(model, strict=True))) == 1
    with implementation("triton"), resnet_fused.trace() as trace:
        got = model(x)
    torch.testing.assert_close(got, twin(x), rtol=1e-4, atol=1e-4)
    names = [launch.name for launch in trace.launches]
    assert "aten.convolution" not in names
    assert names.count("batch_norm_pool") == 1
    model.conv1.append(nn.Identity())
    twin.conv1.append(nn.Identity())
    with implementation("triton"):
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)


def _replaced_norm(model: nn.Module) -> None:
    model.bn1 = nn.InstanceNorm2d(64)


def _replaced_activation(model: nn.Module) -> None:
    model.relu = nn.SiLU()


def _replaced_pool(model: nn.Module) -> None:
    model.maxpool = nn.AvgPool2d(3, 2, 1)


def _wider_stride(model: nn.Module) -> None:
    model.maxpool.stride = 3


def _own_forward(model: nn.Module) -> None:
    model.relu.forward = lambda x: x + 1


@pytest.mark.parametrize(
    "surgery",
    [_replaced_norm, _replaced_activation, _replaced_pool, _wider_stride, _own_forward],
    ids=lambda f: f.__name__,
)
def test_a_stem_that_was_operated_on_does_what_it_is_now(surgery):
    model, x = fuse(small()), torch.randn(1, 3, 32, 32)
    surgery(model)
    got, names = launched(model, x)
    assert "conv_pool" not in names
    with torch.no_grad():
        torch.testing.assert_close(got, unfuse(model)(x), rtol=1e-4, atol=1e-4)


def test_methods_beside_the_forward_see_every_value():
    model, x = timm.create_model("resnet18", pretrained=False).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = model.forward_intermediates(x, intermediates_only=True)
        fuse(model)
        with implementation("triton"):
            got = model.forward_intermediates(x, intermediates_only=True)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STEMS)
def test_a_stem_is_trained_up_to_its_pool_in_fewer_passes(name):
    model, x = STEMS[name]().train(), torch.randn(2, 3, 40, 24)
    twin = copy.deepcopy(model)
    fuse(model)
    with implementation("triton"), resnet_fused.trace() as trace:
        loss = zoo.logits(model, x).square().mean()
        loss.backward()
    names = [launch.name for launch in trace.launches if launch.grid]
    assert names[:3] == ["conv_forward", "batch_norm_stats", "batch_norm_pool"]
    assert names.count("batch_norm_pool_backward") == 1
    assert not [launch for launch in trace.launches if "max_pool" in launch.name]
    expected = zoo.logits(twin, x).square().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (key, ours), (_, theirs) in islice(zip(model.named_parameters(), twin.named_parameters(), strict=True), 3):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-2, atol=1e-2 * theirs.grad.abs().max().item(), msg=key
        )
    for (key, ours), (_, theirs) in islice(zip(model.named_buffers(), twin.named_buffers(), strict=True), 3):
        torch.testing.assert_close(ours, theirs, msg=key)


def test_the_forward_of_another_network_is_not_touched():
    model = small()
    model.__class__ = type("Own", (type(model),), {})
    assert stems(fuse(model)) == []
    assert converted(model) == 4


def test_parts_that_are_called_again_are_themselves(monkeypatch):
    model, x = small(), torch.randn(1, 3, 32, 32)
    model.bn1.weight.data.neg_()
    model.register_buffer("more", torch.randn(1, 64, 2, 2))

    def forward(self, x):
        before = self.bn1(self.more)
        y = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        again = self.maxpool(self.maxpool(self.relu(self.bn1(y - 1))))
        return (
            before.std()
            + y.mean()
            + again.mean()
            + self.bn1(y).mean()
            + self.maxpool(y).mean()
            + self.conv1(again[:, :3]).mean()
        )

    model.__class__ = type("Again", (type(model),), {"forward": forward})
    known(model, monkeypatch)
    with torch.no_grad():
        want = model(x)
    got, names = launched(fuse(model), x)
    assert names[:2] == ["conv_pack", "conv_pool"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_a_stem_returned_is_not_kept():
    model, kept = fuse(small()), []
    model.layer2[0].register_forward_pre_hook(lambda m, args: kept.append(pooled()))
    run = functional.run_pooled
    pooled = lambda: None  # noqa: E731

    def run_pooled(x, found):
        nonlocal pooled
        y = run(x, found)
        pooled = weakref.ref(y)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "run_pooled", run_pooled)
        launched(model, torch.randn(1, 3, 32, 32))
    assert kept == [None]


def test_explain_shows_a_stem_that_is_a_block_of_its_own():
    """Hugging Face's first convolution is a block, which fuses in training, inside of its stem."""
    model, x = fuse(zoo.build("Hugging Face")), torch.randn(1, 3, 32, 32)
    with implementation("triton"):
        rows = explain(model, x).rows
    assert [row.name for row in rows].count("resnet.embedder.embedder") == 1
    assert [launch.name for launch in rows[0].launches][-2:] == ["conv_pack", "conv_pool"]


def test_an_attribute_that_became_a_tensor_is_another():
    model, x = small(), torch.randn(1, 3, 32, 32)
    model.scale = 1.0
    fuse(model).scale = torch.ones(3)
    assert "conv_pool" not in launched(model, x)[1]


def _ranges(module: nn.Module, x: torch.Tensor, road: str) -> list[str]:
    """What a profiler shows of a call beside the operators."""
    with implementation(road), torch.profiler.profile(acc_events=True) as profile:
        module(x)
    return [event.name for event in profile.events() if event.is_user_annotation]


def test_a_profiler_shows_what_is_fused_by_its_name():
    run = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(BasicBlock(8, 8)))
    names = ["ResNet, up to its pool", *(f"layer{i}.0 (BasicBlock)" for i in range(1, 5))]
    cases = [
        (fuse(run), torch.randn(2, 8, 6, 6), ["Sequential", "3.0 (BasicBlock)"]),
        (fuse(small()), torch.randn(2, 3, 33, 33), names),
        (resnet_fused.BasicBlock(8, 8), torch.randn(2, 8, 6, 6), ["BasicBlock"]),
    ]
    for module, x, expected in cases:
        assert _ranges(module, x, "triton") == expected
        assert _ranges(module, x, "eager") == []


def test_without_a_profiler_there_are_no_ranges(monkeypatch):
    monkeypatch.setattr(torch.autograd.profiler, "record_function", None)
    with implementation("triton"):
        fuse(small())(torch.randn(1, 3, 33, 33))
