"""First contact with a GPU: each way of running that differs there, once. The interpreter does what it can of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import Bottleneck, fuse, implementation, optimize_for_inference
from resnet_fused.commands.tune_worker import Clock
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.conv_forward import conv_forward
from resnet_fused.kernels.launch import Call, TileConfig, observe
from tests.rule import assert_within_rule
from tests.training import DEVICE, check, draw, step
from tests.zoo import randomise_norms

pytestmark = pytest.mark.usefixtures("on_device")

gpu = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu)]
ROADS = ["triton", "mixed", pytest.param("auto", marks=gpu)]
IMAGES, CHANNELS, SIZE = (4, 64, 28) if DEVICE == "cuda" else (2, 16, 5)
"""On a GPU more than one tile in each direction."""


def block() -> nn.Module:
    """With a projection: every kind of launch occurs."""
    shortcut = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1, 2, bias=False), nn.BatchNorm2d(CHANNELS))
    return Bottleneck(CHANNELS, CHANNELS // 4, 2, shortcut)


def sample(
    build: Callable[[], nn.Module] = block, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Tensor, Tensor]:
    return draw(build, (IMAGES, CHANNELS, SIZE, SIZE), dtype)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def assert_predicts(ours: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    """``ours`` computes what ``model`` does in evaluation."""
    with torch.no_grad():
        found = ours(x)
        with implementation("eager"):
            assert_within_rule(found, model(x), copy.deepcopy(model).double()(x.double()), sums=48)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("road", ROADS)
def test_a_training_step_is_right_and_the_next_is_equal_to_the_bit(road, dtype):
    model, x, dz = sample(dtype=dtype)
    check(model, x, dz, road)
    first, second = (step(model, x, dz, road) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("road", ROADS)
def test_inference_is_right_and_the_next_is_equal_to_the_bit(road, dtype):
    model, x, _ = sample(dtype=dtype)
    model.eval()
    with implementation(road):
        assert_predicts(model, model, x)
        with torch.no_grad():
            assert torch.equal(model(x), model(x))


@pytest.fixture
def slice_and_filter() -> tuple[Tensor, Tensor]:
    """Channels 1 to 64 of 80: no pixel begins where 16 bytes could be read at once."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    x = channels_last(torch.randn(2, 80, 9, 9).to(dtype))[:, 1:65]
    return x, torch.randn(64, 64, 1, 1).to(dtype)


def test_unaligned_slices(slice_and_filter):
    x, w = slice_and_filter
    assert_within_rule(conv_forward(x, w), F.conv2d(x, w), F.conv2d(x.double(), w.double()))
    again = channels_last(x.clone())  # the same kernel, specialised for aligned tensors
    assert_within_rule(conv_forward(again, w), F.conv2d(x, w), F.conv2d(x.double(), w.double()))
    assert torch.equal(conv_forward(x, w), conv_forward(x, w))


def test_a_split_sum():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    x, w = channels_last(torch.randn(1, 64, 7, 7).to(dtype)), channels_last(torch.randn(64, 64, 3, 3).to(dtype))
    split = partial(conv_forward, x, w, geometry=Geometry(padding=(1, 1)), config=TileConfig(64, 64, 64, splits=4))
    eager, exact = F.conv2d(x, w, padding=1), F.conv2d(x.double(), w.double(), padding=1)
    expected = split()
    assert_within_rule(expected, eager, exact)
    assert torch.equal(split(), expected)
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = split()
        for _ in range(2):
            found.fill_(float("nan"))
            graph.replay()
            assert torch.equal(found, expected)


@gpu
def test_the_tuners_clock():
    """Its graphs share memory, in which cuBLAS keeps a workspace, also when all that were captured before are gone."""
    clock, a = Clock(torch.device("cuda")), torch.ones(256, 256, device="cuda")
    for _ in range(2):
        prepared = [clock.prepare(lambda: a @ a) for _ in range(2)]
        assert all(clock.seconds(work) > 0 for work in prepared)
        del prepared
    clock.release()
    assert clock.seconds(clock.prepare(lambda: a @ a)) > 0
    assert clock.usable()


@gpu
def test_another_stream(slice_and_filter):
    x, w = slice_and_filter
    x = torch.cat([x] * 64)  # enough to be still under way when the host is done
    expected = conv_forward(x, w)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = conv_forward(x, w)
    stream.synchronize()
    assert torch.equal(found, expected)


@gpu
def test_threads_launch_at_once(slice_and_filter):
    x, w = slice_and_filter
    expected = [conv_forward(x + i, w) for i in range(4)]

    def launch(i: int) -> bool:
        return all(torch.equal(conv_forward(x + i, w), expected[i]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(launch, range(4)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    built = resnet_fused.resnet20().to(DEVICE)
    randomise_norms(built)
    return built.eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(4, 3, 32, 32)


def test_a_frozen_model_takes_other_values_and_shapes(model, image):
    frozen = optimize_for_inference(model, image)
    for x in (image, torch.randn_like(image), image[:3], torch.randn(4, 3, 24, 40), image):
        assert_predicts(frozen, model, x)


@gpu
def test_a_frozen_model_replays_a_graph_on_any_stream(model, image):
    frozen, calls = optimize_for_inference(model, image), list[Call]()
    with observe(calls.append):
        assert_predicts(frozen, model, image + 1)
        assert calls == [], "the launches are those of the graph"
        assert_predicts(frozen, model, image[:3])
        assert calls, "another shape is launched for"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_predicts(frozen, model, image - 1)
    stream.synchronize()


def test_a_frozen_model_serves_threads_at_once(model, image):
    frozen = optimize_for_inference(model, image)
    with torch.inference_mode():
        expected = [frozen(image + i).clone() for i in range(4)]

    def serve(i: int) -> bool:
        return all(torch.equal(frozen(image + i), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(serve, range(4)))


def test_a_frozen_model_is_copied_and_loaded_into(model, image):
    frozen = optimize_for_inference(model, image)
    twin = copy.deepcopy(frozen)
    other = copy.deepcopy(model)
    randomise_norms(other)
    frozen.load_state_dict(optimize_for_inference(other).state_dict())
    assert_predicts(frozen, other, image)
    assert_predicts(twin, model, image)
    twin.prepare(image)
    assert_predicts(twin, model, image + 1)


MODES = ["default", pytest.param("reduce-overhead", marks=gpu)]
WHOLE = [True, pytest.param(False, marks=gpu)]


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("whole", WHOLE, ids=["fullgraph", "in parts"])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_inference(mode, whole):
    model, x, _ = sample()
    compiled = torch.compile(model.eval(), mode=mode, fullgraph=whole)
    with implementation("triton"):
        for _ in range(3):  # a mode with CUDA graphs warms up, records, replays
            torch.compiler.cudagraph_mark_step_begin()
            assert_predicts(compiled, model, x)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("whole", WHOLE, ids=["fullgraph", "in parts"])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_training(mode, whole):
    def three_steps(model: nn.Module, x: Tensor, dz: Tensor, road: str, through: Callable = lambda model: model):
        model, x = copy.deepcopy(model), x.clone().requires_grad_()
        run = through(model)
        with implementation(road):
            for _ in range(3):
                x.grad = None
                model.zero_grad()
                torch.compiler.cudagraph_mark_step_begin()
                z = run(x)
                z.backward(dz)
        return (
            {"z": z.detach(), "x": x.grad}
            | {n: p.grad for n, p in model.named_parameters()}
            | dict(model.named_buffers())
        )

    sampled = sample()
    exact = three_steps(*(t.double() for t in copy.deepcopy(sampled)), "eager")
    eager = three_steps(*sampled, "eager")
    ours = three_steps(*sampled, "triton", partial(torch.compile, mode=mode, fullgraph=whole))
    for name, value in exact.items():
        if value.is_floating_point():
            assert_within_rule(ours[name], eager[name], value, sums=16)
        else:
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("road", ROADS)
def test_checkpointing(road, reentrant):
    check(*sample(), road, through=lambda block: partial(checkpoint, block, use_reentrant=reentrant))


@gpu
@pytest.mark.parametrize("road", ROADS)
def test_a_training_step_in_a_graph_of_the_users(road):
    model, x, dz = sample()
    # Gradients of ReLUs agree at the sample alone: it is what the graph replays, after it was recorded on other values.
    expected = step(model, x, dz, road)
    with implementation(road):
        replay = torch.cuda.make_graphed_callables(copy.deepcopy(model), (torch.randn_like(x).requires_grad_(),))
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        replay.zero_grad()
        z = replay(leaf)
        z.backward(dz)
        found = {"z": z.detach(), "x.grad": leaf.grad} | {f"{n}.grad": p.grad for n, p in replay.named_parameters()}
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def unit(ci: int, co: int) -> nn.Module:
    return fuse(nn.Sequential(nn.Conv2d(ci, co, 3, padding=1, bias=False), nn.BatchNorm2d(co), nn.ReLU()), strict=True)


@pytest.mark.parametrize(("ci", "co"), [(1, 8), (8, 1), (3, 20)])
@pytest.mark.parametrize("road", ROADS)
def test_odd_numbers_of_channels_and_empty_batches(road, ci, co):
    model, x, dz = draw(lambda: unit(ci, co), (2, ci, 7, 5), torch.float32)
    check(model, x, dz, road)
    model.eval()
    with implementation(road):
        assert_predicts(model, model, x)
        with torch.no_grad():
            assert model(x[:0]).shape == (0, co, 7, 5)


@pytest.mark.parametrize("road", ROADS)
def test_frozen_batch_norm(road):
    check(*sample(lambda: block().eval()), road)
