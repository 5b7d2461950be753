"""Stages that call their blocks themselves: these share launches as in a sequence, and nothing else changes."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from resnet_fused import PreActBottleneck, explain, fuse, implementation, modules, trace, unfuse
from resnet_fused.convert import Converted, ConvertedBlocks, ConvertedStage
from resnet_fused.modules import runs_fused
from tests.plans import IN_CHAINS
from tests.rule import assert_within_rule
from tests.test_chains import BOTTLENECK, check
from tests.test_inference import _randomised
from tests.test_live_chains import REGISTER, chains, launched
from tests.zoo import Gated

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="launches on CPU tensors, which takes Triton's interpreter"
)


class Stage(nn.Module):
    """Calls the blocks that it holds as Hugging Face's stages do."""

    def __init__(self, kind: type[nn.Module] = nn.ModuleList) -> None:
        super().__init__()
        blocks = [BOTTLENECK(16, 4), BOTTLENECK(16, 4)]
        self.layers = kind(blocks) if kind is nn.ModuleList else kind(*blocks)

    def forward(self, hidden_state: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_state = layer(hidden_state)
        return hidden_state


class OneByOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = BOTTLENECK(16, 4), BOTTLENECK(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Nested(Stage):
    """Called by number, in containers of containers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"of": nn.ModuleList(self.layers)})])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0]["of"][1](self.layers[0]["of"][0](x))


class OwnForward(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class Checkpoints(Stage):
    """As timm's stages do."""

    grad_checkpointing: bool

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.grad_checkpointing else layer(x)
        return x


STAGES = {
    "a list": Stage,
    "a sequence": lambda: Stage(nn.Sequential),
    "one by one": OneByOne,
    "nested": Nested,
    "a sequence's own forward": lambda: OwnForward(BOTTLENECK(16, 4), BOTTLENECK(16, 4)),
    "a flag": Checkpoints,
}


def make(build=Stage) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return _randomised(build()).eval(), torch.randn(2, 16, 6, 5)


def fused_pair(build=Stage) -> tuple[nn.Module, nn.Module, Tensor]:
    """A stage, a fused copy, and an input."""
    model, x = make(build)
    return model, fuse(copy.deepcopy(model)), x


SHARED = ["conv_forward", *["batch_norm_stats"] * 3, "chain_forward", *["batch_norm_stats"] * 2, "chain_forward"]
"""What two blocks launch together."""


@pytest.mark.parametrize("name", STAGES)
def test_blocks_share_launches(name):
    model, fused, x = fused_pair(STAGES[name])
    assert isinstance(fused, ConvertedStage)
    for _ in range(2):
        assert check(fused, model, x) == SHARED


def test_one_block_and_what_is_no_block():
    class Mixed(Stage):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([BOTTLENECK(16, 4), Gated(16, 16), BOTTLENECK(16, 4)])

    model, fused, x = fused_pair(Mixed)
    assert isinstance(fused, ConvertedStage) and not runs_fused(fused.layers[1])
    assert chains(check(fused, model, x)) == 2


class Doubling(Stage):
    def forward(self, x):
        for layer in self.layers:
            x = 2 * layer(x)
        return x


class Adding(Stage):
    def forward(self, x):
        return self.layers[0](x) + x


class Between(Stage):
    def forward(self, x):
        y = self.layers[0](x)
        return self.layers[1](y) + y


class Listing(Stage):
    def forward(self, x):
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found


class Writing(Stage):
    def forward(self, x):
        self.seen = x
        return super().forward(x)


class Sized(Stage):
    def forward(self, x):
        for layer in self.layers[: x.shape[0]]:
            x = layer(x)
        return x


class Trained(Stage):
    def forward(self, x):
        for layer in self.layers[: 1 if self.training else 2]:
            x = layer(x)
        return x


class Two(Stage):
    def forward(self, x, scale=1):
        return super().forward(x) * scale


class Tupled(Stage):
    def forward(self, x):
        return (super().forward(x),)


class Ticking(Stage):
    """Calls something on nothing."""

    class Clock(nn.Module):
        def __init__(self):
            super().__init__()
            self.hand = nn.Identity()

        def forward(self):
            self.hand.ticks = 1

    def __init__(self):
        super().__init__()
        self.clock = self.Clock()

    def forward(self, x):
        self.clock()
        return super().forward(x)


class Passing(Stage):
    def forward(self, x):
        return x


class Elsewhere(Stage):
    """Its blocks are called, and a layer of its own is there."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1)


@pytest.mark.parametrize(
    "kind", [Doubling, Adding, Between, Listing, Writing, Sized, Trained, Two, Tupled, Ticking, Passing, Elsewhere]
)
def test_others_are_left_alone(kind):
    model, fused, x = fused_pair(kind)
    assert type(fused) is kind
    with torch.no_grad(), implementation("triton"):
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


class Skipping(Stage):
    def forward(self, x):
        for layer in self.layers:
            x = x if getattr(layer, "skip", False) else layer(x)
        return x


class ByKind(Stage):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if isinstance(layer, BOTTLENECK) else layer(x) + x
        return x


class ByClass(Stage):
    """Reads what its class has, until the instance has it."""

    doubled = False

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return 2 * x if self.doubled else x


class Later(Stage):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return 2 * x if hasattr(self, "doubled") else x


class Scaled(Stage):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", None)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x if self.scale is None else x * self.scale


class Ordered(Stage):
    def __init__(self):
        super().__init__()
        self.order = [*self.layers]

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x


class Tied(Stage):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([self.layers[0]] * 2)


class OfParameters(Stage):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return 2 * x if isinstance(x, nn.Parameter) else x


class Switching(Stage):
    mode: Any

    def forward(self, x):
        for layer in self.layers:
            with Switching.mode():
                x = layer(x)
        return x


MODES = [
    torch.no_grad,
    lambda: implementation("eager"),
    lambda: torch.backends.cudnn.flags(enabled=True, allow_tf32=not torch.backends.cudnn.allow_tf32),
]


class ByType(Stage):
    def forward(self, x):
        for layer in self.layers:
            x = layer(layer(x)) if (lambda v: type(v) is nn.Parameter)(x) else layer(x)
        return x


class Catching(Stage):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        try:
            twice = self.layers[0].stride == 1
        except Exception:
            twice = False
        return self.layers[0](x) if twice else x


class InInference(Stage):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.layers[0](x) if torch.is_inference_mode_enabled() else x


class Apart(Stage):
    def forward(self, x):
        self.layers[0](x)
        return self.layers[1](x)


def _skipped(stage):
    stage.layers[1].skip = True


def _exchanged(stage):
    torch.manual_seed(1)
    stage.layers[1] = _randomised(nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))).eval()


def _doubled(stage):
    stage.doubled = True


def _scaled(stage):
    stage.scale = torch.full((1,), 3.0)


def _reversed(stage):
    stage.order.reverse()


def _untied(stage):
    torch.manual_seed(1)
    stage.layers[1] = _randomised(BOTTLENECK(16, 4)).eval()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *[(Skipping, _skipped), (ByKind, _exchanged), (ByClass, _doubled), (Later, _doubled), (Scaled, _scaled)],
        *[(Ordered, _reversed), (Tied, _untied), (OfParameters, None), (ByType, None), (Catching, None)],
        *[(InInference, None), (Apart, None)],
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_stage_that_looks_at_more_than_what_it_calls_is_none(kind, change):
    model, fused, x = fused_pair(kind)
    assert type(fused) is kind
    if change is not None:
        change(model)
        change(fused)
    with torch.no_grad(), implementation("triton"):
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_stage_that_switches_modes_is_none(mode, monkeypatch):
    monkeypatch.setattr(Switching, "mode", staticmethod(mode), raising=False)
    assert type(fuse(Switching().eval())) is Switching


class Calling(BOTTLENECK):
    scale = 1

    def __call__(self, x):
        return super().__call__(x) * self.scale


@pytest.mark.parametrize("kind", [Stage, nn.Sequential])
def test_a_block_with_a_call_of_its_own_is_called(kind):
    def build():
        stage = Stage()
        stage.layers = nn.ModuleList([Calling(16, 4), Calling(16, 4)])
        return stage if kind is Stage else nn.Sequential(*stage.layers)

    model, fused, x = fused_pair(build)
    Calling.scale = 3
    try:
        with torch.no_grad(), implementation("triton"):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
    finally:
        Calling.scale = 1


def test_an_input_may_have_a_default():
    class Default(Stage):
        def forward(self, x=None):
            for layer in self.layers:
                x = layer(x)
            return x

    model, fused, x = fused_pair(Default)
    assert isinstance(fused, ConvertedStage)
    with pytest.raises(TypeError, match="NoneType"):
        fused()
    assert chains(check(fused, model, x)) > 0


def test_a_forward_set_on_the_instance_is_called():
    model, x = make()
    model.forward = lambda x: x + 1
    assert type(fuse(model)) is Stage
    model, fused, x = fused_pair()
    fused.forward = lambda x: x + 1
    with torch.no_grad(), implementation("triton"):
        assert torch.equal(fused(x), x + 1)


def test_basic_blocks_stay_as_they_are():
    basic = Stage()
    basic.layers = nn.ModuleList(modules.BasicBlock(16, 16) for _ in range(2))
    assert type(fuse(basic)) is Stage


def test_attributes_of_our_names_are_left_alone():
    stage = Stage()
    stage._called = 1
    assert type(fuse(stage)) is Stage and stage._called == 1


@pytest.mark.parametrize("name", STAGES)
def test_unfuse_is_exact(name):
    model, x = make(STAGES[name])
    before = [(part, type(part), dict(vars(part))) for part in model.modules()]
    keys = list(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == keys
    with torch.no_grad(), implementation("triton"):
        model(x)
    unfuse(model)
    assert [(part, type(part), dict(vars(part))) for part in model.modules()] == before
    assert not any(isinstance(part, Converted) for part in model.modules())


def test_the_parameter_keeps_its_name():
    model, fused, x = fused_pair()
    assert list(inspect.signature(fused.forward).parameters) == ["hidden_state"]
    with torch.no_grad(), implementation("triton"), trace() as log:
        torch.testing.assert_close(fused(hidden_state=x), model(hidden_state=x), rtol=1e-4, atol=1e-4)
    assert chains([launch.name for launch in log.launches]) == 2


def test_fusing_twice_and_what_a_filter_leaves_out():
    model, fused, x = fused_pair()
    assert check(fuse(fused), model, x) == SHARED
    partly = fuse(copy.deepcopy(model), filter_fn=lambda name, module: name != "layers.1")
    assert type(partly.layers[1]) is BOTTLENECK
    assert chains(check(partly, model, x)) == 1


@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("where", ["", "layers", "layers.0", "layers.1", "layers.1.conv1", "layers.0.bn2"])
def test_hooks_see_and_do_what_they_do_in_eager(where, kind):
    model, fused, x = fused_pair(lambda: Stage(nn.Sequential))
    with torch.no_grad(), implementation("triton"):
        fused(x)
        seen: dict[str, list[Tensor]] = {"ours": [], "eager": []}
        results = {}
        for name, net in (("ours", fused), ("eager", model)):
            handle = REGISTER[kind](net.get_submodule(where), seen[name])
            try:
                results[name] = net(x)
            finally:
                handle.remove()
        torch.testing.assert_close(results["ours"], results["eager"], rtol=1e-4, atol=1e-4)
        assert len(seen["ours"]) == len(seen["eager"])
        assert seen["ours"] or (where == "layers" and kind != "all"), "who iterates over a sequence does not call it"
        for ours, eager in zip(seen["ours"], seen["eager"], strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert check(fused, model, x) == SHARED, "once the hook is gone"


def _append(stage: nn.Module) -> None:
    torch.manual_seed(1)
    stage.layers.append(_randomised(BOTTLENECK(16, 4)).eval())


def _replace(stage: nn.Module) -> None:
    torch.manual_seed(1)
    stage.layers[1] = _randomised(modules.BasicBlock(16, 16)).eval()


def _empty(stage: nn.Module) -> None:
    del stage.layers
    stage.layers = []


CHANGES = {
    "a block more": (_append, 3),
    "a block less": (lambda stage: stage.layers.__delitem__(1), 1),
    "another block": (_replace, 1),
    "the order": (lambda stage: setattr(stage, "layers", nn.ModuleList(reversed(stage.layers))), 2),
    "another container": (lambda stage: setattr(stage, "layers", nn.Sequential(*reversed(stage.layers))), 2),
    "a container that is gone": (_empty, 0),
    "a flag": (lambda stage: setattr(stage, "grad_checkpointing", True), 0),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:nothing was fused")
def test_changes_are_followed(name):
    """At once; and what shares launches is found again."""
    change, found = CHANGES[name]
    model, fused, x = fused_pair(Checkpoints)
    check(fused, model, x)
    for net in (model, fused):
        change(net)
    check(fused, model, x)
    assert chains(check(fuse(fused), model, x)) == found


def test_copies_and_pickles():
    model, fused, x = fused_pair()
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(twin, ConvertedStage)
        assert check(twin, model, x) == SHARED
        assert type(unfuse(twin)) is Stage


def test_gradients_and_training_take_it_apart():
    _, fused, x = fused_pair()
    with implementation("triton"), trace() as log:
        fused(x.requires_grad_()).sum().backward()
        fused.train()
        with torch.no_grad():
            fused(x)
    assert x.grad is not None
    assert not chains([launch.name for launch in log.launches])


def test_one_that_was_never_recognised_calls_its_blocks():
    _, fused, x = fused_pair()
    model = type(fused)()
    with torch.no_grad(), implementation("triton"), trace() as log:
        model.eval()(x)
    assert not chains([launch.name for launch in log.launches])


def test_pre_activation_blocks_hand_on_their_moments():
    class Row(Stage):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(PreActBottleneck(16, 16) for _ in range(3))

    torch.manual_seed(0)
    model, x = Row().train(), torch.randn(2, 16, 4, 5)
    fused, sequence = fuse(copy.deepcopy(model)), fuse(nn.Sequential(*copy.deepcopy(model).layers))
    assert isinstance(fused, ConvertedStage) and isinstance(sequence, ConvertedBlocks)
    seen = []
    for net in (fused, sequence):
        with implementation("triton"), trace() as log:
            z = net(x)
            z.sum().backward()
        seen.append(([launch.name for launch in log.launches], z))
    (ours, z), (expected, wanted) = seen
    assert ours == expected and ours.count("channel_moments") == 1
    assert torch.equal(z, wanted)


def test_tracers_and_compilers_see_the_blocks():
    torch._dynamo.reset()
    counters.clear()
    model, fused, x = fused_pair()
    with torch.no_grad(), implementation("triton"):
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        for got in (compiled(x), torch.jit.trace(fused, x)(x), fx.symbolic_trace(fused)(x)):
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_wrapped_for_data_parallel_training(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, fused, x = fused_pair()
        wrapped = nn.parallel.DistributedDataParallel(fused.train())
        with implementation("triton"):
            wrapped(x).square().sum().backward()
        model.train()(x).square().sum().backward()
        scale = max(p.grad.abs().max().item() for p in model.parameters())
        for ours, eager in zip(wrapped.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, eager.grad, rtol=1e-3, atol=1e-3 * scale)
        assert check(wrapped.eval(), model.eval(), x) == SHARED
        outside = fuse(nn.parallel.DistributedDataParallel(make()[0].train())).eval()
        assert isinstance(outside.module, ConvertedStage)
    finally:
        torch.distributed.destroy_process_group()


def hugging_face(kind: str = "ResNetModel", **options) -> nn.Module:
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 1], "layer_type": "bottleneck"}
    torch.manual_seed(0)
    return _randomised(getattr(transformers, kind)(transformers.ResNetConfig(**sizes, **options))).eval()


def test_hidden_states_of_hugging_faces_are_those_of_eager():
    model, x = hugging_face(), torch.randn(1, 3, 35, 32)
    fused = fuse(copy.deepcopy(model))
    assert all(isinstance(stage, ConvertedStage) for stage in fused.encoder.stages)
    with torch.no_grad(), implementation("triton"), trace() as log:
        got, expected = (m(x, output_hidden_states=True).hidden_states for m in (fused, model))
    exact = copy.deepcopy(model).double()(x.double(), output_hidden_states=True).hidden_states
    for ours, eager, z in zip(got, expected, exact, strict=True):
        assert_within_rule(ours, eager, z)
    assert chains([launch.name for launch in log.launches]) == 3


def test_backbones_of_hugging_faces_return_the_features_of_eager():
    model, x = hugging_face("ResNetBackbone", out_features=["stage1", "stage2"]), torch.randn(1, 3, 35, 32)
    fused = fuse(copy.deepcopy(model))
    with torch.no_grad(), implementation("triton"), trace() as log:
        got = fused(x).feature_maps
    for ours, eager in zip(got, model(x).feature_maps, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert chains([launch.name for launch in log.launches]) == 3


def test_stages_of_timms_regnet():
    with torch.device("meta"):
        model = timm.create_model("regnetx_002")
    fuse(model)
    assert all(isinstance(getattr(model, f"s{i}"), ConvertedStage) for i in range(1, 5))
    model.set_grad_checkpointing()
    assert all(getattr(model, f"s{i}").is_stale() for i in range(1, 5))


def test_the_plan_has_them_where_they_are_predicted_to_be_faster():
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig())
    names = launched(copy.deepcopy(model), 256)
    assert chains(names) == IN_CHAINS
    assert chains(launched(model, 1)) == 0


def test_explain_shows_the_chains():
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig()).bfloat16().eval()
    x = torch.empty(256, 3, 224, 224, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    rows = explain(fuse(model), x, arch=90).rows
    shared = [row.name for row in rows if row.chains]
    stages = ((0, 3), (1, 4), (2, 6))
    layers = [f"resnet.encoder.stages.{stage}.layers.{i}" for stage, blocks in stages for i in range(blocks)]
    assert shared == layers[:IN_CHAINS]
