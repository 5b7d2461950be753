"""optimize_for_inference on a CPU: right in every dtype and model family, and safe to copy, save and share."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import resnet_fused
from resnet_fused import chain, functional, implementation, inference, optimize_for_inference
from resnet_fused.inference import FoldedConv, TritonConv
from tests.rule import assert_within_rule
from tests.test_tune import conv_relu


def _randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -0.3, 1)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def _hugging_face(layer_type: str) -> nn.Module:
    config = transformers.ResNetConfig(
        depths=[1, 2], hidden_sizes=[32, 64], embedding_size=16, layer_type=layer_type, num_labels=7
    )
    return transformers.ResNetForImageClassification(config)


MODELS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(),
    "torchvision resnet50": lambda: torchvision.models.resnet50(),
    "torchvision resnext50": lambda: torchvision.models.resnext50_32x4d(),
    "timm resnet18": lambda: timm.create_model("resnet18"),
    "timm resnet26d": lambda: timm.create_model("resnet26d"),
    "timm seresnet18": lambda: timm.create_model("legacy_seresnet18"),
    "Hugging Face basic": lambda: _hugging_face("basic"),
    "Hugging Face bottleneck": lambda: _hugging_face("bottleneck"),
    "our resnet18": resnet_fused.resnet18,
    "our resnet20": resnet_fused.resnet20,
    "fused torchvision resnet18": lambda: resnet_fused.fuse(torchvision.models.resnet18().eval()),
}


def _logits(output) -> Tensor:
    return getattr(output, "logits", output)


@torch.no_grad()
def _check(frozen: nn.Module, model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> None:
    exact = _logits(copy.deepcopy(model).double()(x.double()))
    eager = _logits(copy.deepcopy(model).to(dtype)(x.to(dtype)))
    assert_within_rule(_logits(frozen(x)), eager, exact)


def _units(model: nn.Module) -> list[FoldedConv]:
    return [m for m in model.modules() if isinstance(m, FoldedConv)]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return _randomised(resnet_fused.resnet20())


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_right_and_fully_fused(name, dtype):
    torch.manual_seed(0)
    model = _randomised(MODELS[name]())
    frozen = optimize_for_inference(model, dtype=dtype)
    _check(frozen, model, torch.randn(2, 3, 64, 64), dtype)
    assert not [m for m in frozen.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert len(_units(frozen)) == sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_hugging_face_keeps_its_output_type_keywords_and_hidden_states():
    model = _randomised(_hugging_face("bottleneck"))
    x = torch.randn(2, 3, 32, 32)
    got = optimize_for_inference(model)(pixel_values=x, output_hidden_states=True)
    want = model(pixel_values=x, output_hidden_states=True)
    assert type(got) is type(want)
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_original_is_untouched(model, x):
    model.train()
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    optimize_for_inference(model, x, dtype=torch.bfloat16)
    assert model.training
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_input_is_untouched_and_the_output_stays(model, x):
    frozen = optimize_for_inference(nn.Sequential(*model.layer1)).eval()
    x = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    first = frozen(x)
    value = first.clone()
    frozen(torch.randn_like(x))
    assert torch.equal(x, kept)
    assert torch.equal(first, value)


def test_batch_and_image_sizes_may_change(model, x):
    frozen = optimize_for_inference(model, x)
    for shape in [(5, 3, 32, 32), (1, 3, 24, 40), (0, 3, 32, 32), (2, 3, 32, 32), (3, 3, 17, 19), (4, 3, 32, 32)]:
        if shape[0]:
            _check(frozen, model, torch.randn(shape))
        else:
            assert frozen(torch.randn(shape)).shape == (0, 10)
    assert all(len(unit._packed) <= inference.PACKED_SHAPES for unit in _units(frozen))


def test_copies_and_files_give_the_same_result(model, x):
    frozen = optimize_for_inference(model, x)
    want = frozen(x)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    others = [copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), torch.load(file, weights_only=False)]
    for other in others:
        assert torch.equal(other(x), want)


def test_loading_a_state_dict_replaces_the_packed_weights(model, x):
    frozen = optimize_for_inference(model, x)
    other = _randomised(resnet_fused.resnet20())
    frozen.load_state_dict(optimize_for_inference(other).state_dict())
    _check(frozen, other, x)


def test_it_cannot_be_trained(model, x):
    frozen = optimize_for_inference(model)
    with pytest.raises(RuntimeError, match="frozen for inference cannot be trained"):
        frozen.train()
    assert frozen.eval() is frozen
    assert not frozen(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_onednn_it_runs_on_aten(model, x, dtype, monkeypatch):
    monkeypatch.setattr(inference, "_onednn_takes", lambda dtype: False)
    _check(optimize_for_inference(model, dtype=dtype), model, x, dtype)


def test_float64_models_run_on_aten(model, x):
    model.double()
    torch.testing.assert_close(optimize_for_inference(model)(x), model(x.double()))


class _Unusual(nn.Module):
    """Convolutions whose surroundings forbid one fusion or another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.batch_statistics = nn.BatchNorm2d(8, track_running_stats=False)
        self.same = nn.Conv2d(8, 8, 2, padding="same")
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = self.bn1(y) + y
        x = x + self.b(x)
        shared = self.bn2(self.a(x))
        x = self.relu(shared) + shared
        x = self.batch_statistics(self.c(x))
        x = self.relu(self.same(x)) + x.mean((2, 3), keepdim=True)
        x = self.circular(x) + x[:1, :, :1, :1]
        y = self.b(x)
        x.mul_(2)
        y = y + x
        y = self.c(y) + torch.ones(1, 8, 1, 1)
        z = self.c(y)
        return torch.relu(z + y), y


def test_what_cannot_be_fused_stays_right():
    torch.manual_seed(0)
    model = _randomised(_Unusual())
    x = torch.randn(2, 8, 9, 9)
    for ours, theirs in zip(optimize_for_inference(model)(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class _Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = resnet_fused.ResidualBlock(8, [(8, 3)])
        self.rest = nn.Sequential(resnet_fused.ResidualBlock(8, [(16, 3), (8, 1)]), nn.ReLU())

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.stem(x) if scale is None else self.stem(x) * scale
        return self.rest[0](x)


def test_optional_arguments_keep_their_meaning():
    model = _randomised(_Optional())
    frozen = optimize_for_inference(model)
    x = torch.randn(1, 8, 6, 6)
    assert len(_units(frozen)) == 3
    torch.testing.assert_close(frozen(x), model(x))
    torch.testing.assert_close(frozen(x, scale=torch.tensor(3.0)), model(x, torch.tensor(3.0)))


def test_hooks_and_parametrizations_go_on_working(model, x):
    seen = []
    model.layer2[0].conv1.register_forward_hook(lambda module, args, out: seen.append(1))
    model.layer3.register_forward_hook(lambda module, args, out: out * 2)
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    frozen = optimize_for_inference(model)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x))
    assert len(seen) == 2


def test_folding_survives_extreme_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=True), nn.BatchNorm2d(8, eps=1e-2), nn.ReLU()).eval()
    model[1].running_mean.fill_(30.0)
    model[1].running_var.copy_(torch.logspace(-8, 4, 8))
    nn.init.constant_(model[1].weight, -1.0)
    nn.init.zeros_(model[1].weight[:2])
    _check(optimize_for_inference(model), model, torch.randn(2, 4, 8, 8))


def test_nothing_to_fuse_is_said(caplog):
    caplog.set_level("WARNING", logger="resnet_fused")
    optimize_for_inference(nn.Linear(2, 2))
    assert "no convolution that it can fuse" in caplog.text


def test_the_triton_plan_is_the_same_plan():
    torch.manual_seed(0)
    model = _randomised(nn.Sequential(resnet_fused.ResidualBlock(8, [(8, 1), (8, 3)]), nn.AdaptiveAvgPool2d(1)))
    x = torch.randn(1, 8, 5, 5)
    with resnet_fused.implementation("triton"):
        frozen = optimize_for_inference(model)
    assert sum(isinstance(m, TritonConv) for m in frozen.modules()) == 2
    _check(frozen, model, x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("resnet18",), TypeError, "model must be a torch.nn.Module; got str"),
        ((nn.Identity(), (1, 3, 8, 8)), TypeError, "example must be a Tensor; got tuple"),
        ((nn.Identity(), None, torch.int8), ValueError, "dtype must be one of .*; got torch.int8"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    model, example, dtype = (*arguments, None, None)[:3]
    with pytest.raises(error, match=message):
        optimize_for_inference(model, example, dtype=dtype)


@pytest.mark.parametrize("residual", [False, True])
def test_a_unit_that_was_measured_faster_by_cudnn(residual, monkeypatch):
    """With the filter folded once, anew after new weights, and only where a ReLU follows."""
    calls = []

    def cudnn(x, w, *rest):
        calls.append(w)
        return conv_relu(x, w, *rest)

    def choose(*arguments, **options):
        directions.append(arguments[4])
        return "cudnn" if arguments[4] == "frozen" else "eager", ()

    directions: list[str] = []
    monkeypatch.setattr(chain, "cudnn_conv_relu", cudnn)
    monkeypatch.setattr(functional, "choose", choose)
    torch.manual_seed(0)
    layer = _randomised(nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1, groups=2), nn.BatchNorm2d(16)))
    x, other = torch.randn(2, 12, 7, 6), torch.randn(2, 16, 4, 3) if residual else None
    unit = TritonConv(layer[0], layer[1], functional.geometry(layer[0]))
    unit.relu = True

    def expected(dtype):
        y = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        return torch.relu(y if other is None else y + other.to(dtype))

    with torch.inference_mode(), implementation("triton"):
        for _ in range(2):
            assert_within_rule(unit(x, other), expected(torch.float32), expected(torch.float64), sums=2)
        assert calls[0] is calls[1]
        assert pickle.loads(pickle.dumps(unit))._folded is None
        nn.init.normal_(layer[0].weight)
        unit.load_state_dict(TritonConv(layer[0], layer[1], functional.geometry(layer[0])).state_dict())
        assert_within_rule(unit(x, other), expected(torch.float32), expected(torch.float64), sums=2)
        unit.relu = False
        unit(x, other)
    assert directions == ["frozen"] * 3 + ["inference"]
