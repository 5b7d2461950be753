"""The plan: what is requested, what is decided for any problem on any GPU, and that it is legal, pure and right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import layers
from resnet_fused.commands.tune_trial import Candidate, rehearse
from resnet_fused.engine import forward, reference
from resnet_fused.kernels import conv_box, conv_dgrad, conv_forward, conv_wgrad
from resnet_fused.kernels.gpus import ARCHITECTURES, gpu_of
from resnet_fused.kernels.launch import FLOATS, TileConfig, interpreting, target_arch
from resnet_fused.plan import decide, roofline
from resnet_fused.plan.constants import ASSUMED
from resnet_fused.plan.problem import REQUESTS, Problem, Tiles
from resnet_fused.plan.roofline import PREDICTED
from tests import plans
from tests.kernels.test_conv_forward import random
from tests.rule import assert_within_rule


@pytest.fixture
def cudnn():
    yield torch.backends.cudnn
    torch.backends.cudnn.allow_tf32 = not torch.cuda.is_available()  # as in tests/conftest.py, or PyTorch's default


def test_tf32_follows_both_of_torchs_settings(cudnn):
    for allowed in (False, True):
        cudnn.allow_tf32 = allowed
        assert decide.tf32(torch.float32) is allowed
    cudnn.conv.fp32_precision = "ieee"
    assert not decide.tf32(torch.float32)
    cudnn.conv.fp32_precision = "tf32"
    assert decide.tf32(torch.float32)
    assert not decide.tf32(torch.bfloat16)


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [("eager", 0, "eager"), ("", 0, "auto"), ("cuda", 1, "RESNET_FUSED must be one of 'auto', 'triton'")],
)
def test_environment_variable(value, code, text):
    command = [sys.executable, "-c", "from resnet_fused.engine.request import requested; print(requested())"]
    environment = {**os.environ, "RESNET_FUSED": value}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == code
    assert text in run.stdout + run.stderr


@st.composite
def problems(draw: st.DrawFn, largest: int = 64, widest: int = 512) -> Problem:
    groups = draw(st.sampled_from([1, 1, 1, 2, 4, 32]))
    ci, co = (groups * draw(st.integers(1, max(widest // groups, 1))) for _ in range(2))
    n, h, w = (draw(st.integers(1, largest)) for _ in range(3))
    r, s = (draw(st.sampled_from([1, 1, 3, 5, 7])) for _ in range(2))
    stride, dilation = ((draw(st.integers(1, 3)), draw(st.integers(1, 2))) for _ in range(2))
    padding = draw(st.integers(0, r)), draw(st.integers(0, s))
    dtype = draw(st.sampled_from(FLOATS))
    direction = draw(st.sampled_from(["inference", "training"]))
    found = Problem(
        *(n, h, w, ci, co, r, s, stride, padding, dilation, groups, dtype),
        tf32=dtype == torch.float32 and draw(st.booleans()),
        direction=direction,
        prologue=direction == "training" and draw(st.booleans()),
        residual=direction == "inference" and draw(st.booleans()),
        arch=draw(st.sampled_from(ARCHITECTURES)),
    )
    assume(found.p > 0 and found.q > 0)
    return found


class _NoTensors(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(problems())
def test_every_plan_is_pure_and_legal(problem):
    decide.decide.cache_clear()
    with _NoTensors():
        first = decide.decide(problem)
        decide.decide.cache_clear()
        assert decide.decide(problem) == first
    assert first.source == "model"
    predicted = dict(first.alternatives)
    assert first.seconds == predicted[first.implementation]
    assert list(predicted.values()) == sorted(predicted.values())
    assert min(predicted.values()) > 0
    waits = {way: decide.waited(problem, way, seconds, first.tiles) for way, seconds in predicted.items()}
    assert waits[first.implementation] == min(waits.values())
    assert first.implementation == first.alternatives[0][0] or "keep the host longer" in first.reason
    assert {way for way, _ in first.alternatives} == {"fused", "mixed", "eager"}  # no unit here is frozen
    for tile, depth in planned_tiles(problem):
        assert legal(tile, problem), tile
        assert problem.groups == 1 or tile.block_k >= depth, "merged groups share a chunk of K"


def planned_tiles(problem: Problem) -> Iterator[tuple[TileConfig, int]]:
    """The tiles of the unit's kernels, and how many channels of merged groups a chunk of K must hold."""
    yield conv_forward.default_config(problem), problem.tile_channels[0] if problem.merged > 1 else 0
    if problem.direction == "training":
        for prologue in (False, True):
            for epilogue in (False, True):
                conv = replace(problem, prologue=prologue)
                transposed = replace(conv, ci=problem.co, co=problem.ci).merged > 1
                yield (
                    conv_dgrad.default_config(conv, epilogue=epilogue),
                    problem.co // problem.groups if transposed else 0,
                )
            yield conv_wgrad.default_config(replace(problem, prologue=prologue)), 0


def legal(tile: TileConfig, problem: Problem) -> bool:
    sizes = tile.block_m, tile.block_n, tile.block_k
    powers = all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    buffers = tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * problem.dtype.itemsize
    return powers and tile.num_warps in (4, 8) and buffers <= gpu_of(problem.arch).shared


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems(largest=6, widest=40))
def test_planned_tiles_are_right(problem):
    """Those of any GPU in the interpreter, on a GPU its own: another's need not fit into its shared memory."""
    if not interpreting():
        problem = replace(problem, arch=target_arch())
    dtype = torch.float16 if problem.dtype == torch.bfloat16 else problem.dtype
    x = random(problem.n, problem.ci, problem.h, problem.w, dtype=dtype)
    w = random(problem.co, problem.ci // problem.groups, problem.r, problem.s, dtype=dtype)
    geometry, wanted = problem.geometry, replace(problem, prologue=False)
    eager, exact = F.conv2d(x, w, None, *geometry), F.conv2d(x.double(), w.double(), None, *geometry)
    y = conv_forward.conv_forward(x, w, geometry=geometry, config=conv_forward.default_config(wanted))
    assert_within_rule(y, eager, exact, sums=2)
    if problem.direction == "inference":
        return
    dy, size = random(*y.shape, dtype=dtype), (problem.h, problem.w)
    tile = conv_dgrad.default_config(wanted, epilogue=False)
    dx, _ = conv_dgrad.conv_dgrad(dy, w, size, geometry=geometry, config=tile)
    assert_within_rule(
        dx,
        reference.conv_dgrad(dy, w, size, geometry),
        reference.conv_dgrad(dy.double(), w.double(), size, geometry),
        sums=2,
    )
    split = conv_wgrad.default_config(wanted)
    dw = conv_wgrad.conv_wgrad(dy, x, (problem.r, problem.s), geometry=geometry, config=split)
    shape = tuple(w.shape)
    exact = reference.conv_wgrad(dy.double(), x.double(), shape, geometry)
    assert_within_rule(dw, reference.conv_wgrad(dy, x, shape, geometry), exact, sums=4)


LAYER = Problem(
    *(32, 28, 28, 128, 128, 3, 3, (1, 1), (1, 1), (1, 1), 1, torch.bfloat16, False, True, 90, "training", False)
)


@dataclass(frozen=True)
class Measured:
    """A table with one entry for everything."""

    implementation: str
    tiles: Tiles
    seconds: float = 1e-3
    reason: str = "measured so"
    constants: None = None

    def lookup(self, problem: Problem) -> Measured:
        return self


def test_force_comes_before_measurement_before_model():
    tiles = Tiles(forward=TileConfig(32, 32, 32))
    assert decide.decide(LAYER).source == "model"
    measured = decide.decide(LAYER, table=Measured("fused", tiles))
    assert (measured.implementation, measured.tiles, measured.source) == ("fused", tiles, "tuned")
    assert (measured.seconds, measured.reason) == (1e-3, "measured so")
    assert decide.decide(LAYER, table=Measured("eager", tiles)).tiles == decide.best_tiles(LAYER)
    for request, way in (("triton", "fused"), ("mixed", "mixed"), ("eager", "eager")):
        forced = decide.decide(LAYER, request, Measured("fused", tiles))
        assert (forced.implementation, forced.source, forced.seconds) == (way, "forced", None)
        assert repr(request) in forced.reason


def test_where_the_host_takes_longer_than_the_gpu_what_it_launches_sooner_wins():
    small, large = (replace(LAYER, n=n, h=7, w=7, ci=512, co=512, prologue=False) for n in (1, 2048))
    for problem, direction, expected in (
        (small, "frozen", "cudnn"),
        (small, "inference", "fused"),
        (small, "training", "fused"),
        (large, "frozen", "cudnn"),
        (large, "inference", "mixed"),
        (large, "training", "mixed"),
    ):
        assert decide.decide(replace(problem, direction=direction)).implementation == expected, (problem.n, direction)


@pytest.mark.parametrize("road", REQUESTS)
@pytest.mark.parametrize("direction", ["training", "inference"])
def test_what_a_compiler_leaves_undecided_of_a_stem_is_decided_as_without_one(direction, road):
    geometry = (2, 2), (1, 1), (1, 1), 1
    x, w = random(2, 3, 8, 8), random(16, 3, 3, 3)
    with decide.record() as problems:
        _, code = forward.choose(x.shape, w.shape, geometry, x.dtype, direction, x.device, road, pooled=True)
        found = forward.decided(forward.undecided(geometry, road, pooled=True), x, w, direction)
    assert found == forward.Convolution.decode(code)
    assert problems[0] == problems[1] and problems[0].pooled


@pytest.mark.parametrize("road", REQUESTS)
@pytest.mark.parametrize("direction", ["training", "inference"])
def test_what_a_compiler_leaves_undecided_is_decided_as_without_one(direction, road):
    geometry = (2, 1), (1, 1), (1, 1), 1
    x, w = random(2, 12, 5, 4, dtype=torch.float16), random(16, 12, 3, 3, dtype=torch.float16)
    options = {"prologue": True} if direction == "training" else {"residual": True}
    with decide.record() as problems:
        _, code = forward.choose(x.shape, w.shape, geometry, x.dtype, direction, x.device, road, **options)
        assert forward.decided(code, x, w, direction, **options) == forward.Convolution.decode(code)
        found = forward.decided(forward.undecided(geometry, road), x, w, direction, **options)
    assert found == forward.Convolution.decode(code)
    assert problems[0] == problems[1]


def test_a_recorder_that_ends_first_leaves_the_other_one():
    """Though both lists are equal."""
    outer, inner = decide.record(), decide.record()
    first, second = outer.__enter__(), inner.__enter__()
    inner.__exit__(None, None, None)
    decide.note("a problem")
    outer.__exit__(None, None, None)
    decide.note("another")
    assert (first, second) == (["a problem"], [])


def test_problems_are_recorded_as_they_are_planned():
    with decide.record() as outer, decide.record() as inner:
        decide.note(LAYER)
        decide.note(LAYER)
    decide.note(LAYER)
    assert outer == inner == [LAYER, LAYER]


def test_tiles_survive_the_operators_schema():
    wgrad = TileConfig(64, 32, 32, num_stages=2, splits=7)
    for tiles in (
        Tiles(),
        Tiles(dgrad=TileConfig(16, 32, 64, 4, 3, 255)),
        Tiles(TileConfig(16, 16, 16, splits=5), None, wgrad),
    ):
        assert Tiles.decode(tuple(tiles.encode())) == tiles


def test_more_bandwidth_and_less_work_take_less_time():
    h100, h200 = (replace(LAYER, gpu=f"NVIDIA {name}") for name in ("H100 80GB HBM3", "H200"))
    wide = replace(LAYER, r=1, s=1, padding=(0, 0), ci=64, co=256)
    for way in PREDICTED:
        assert seconds(replace(wide, gpu=h200.gpu), way) < seconds(replace(wide, gpu=h100.gpu), way)
        assert seconds(replace(LAYER, n=16), way) < seconds(LAYER, way)
    inference = replace(wide, direction="inference", prologue=False)
    assert seconds(inference, "fused") < seconds(inference, "mixed") < seconds(inference, "eager")


def test_a_narrow_convolution_takes_as_long_in_cudnn_as_published():
    """3x3 64->64 of 32x56x56 in bf16 on an H100: 31.2 us published, 24 % of the peak. Within 1.5 times of it."""
    narrow = Problem(
        *(32, 56, 56, 64, 64, 3, 3, (1, 1), (1, 1), (1, 1), 1, torch.bfloat16),
        *(False, False, 90, "inference", False),
    )
    launch = roofline.predict(narrow, "mixed", Tiles())[0]
    assert launch.kernel == "aten.convolution"
    assert 31.2e-6 / 1.5 < launch.seconds < 31.2e-6 * 1.5, launch


@pytest.mark.parametrize("direction", ["inference", "training"])
def test_the_first_layer_is_predicted_with_its_own_issue_slots(direction):
    """Where a chunk of K runs across taps, a cycle of the tensor cores takes several slots."""
    first = Problem(
        *(256, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3), (1, 1), 1, torch.bfloat16),
        *(False, False, 90, direction, False),
    )
    for arch, slots, bound in ((80, 2.203, "issue"), (90, 4.188, "l2"), (100, 7.594, "issue")):
        problem = replace(first, arch=arch)
        forward = roofline.predict(problem, "fused", Tiles())[0]
        assert (forward.kernel, forward.bound) == ("conv_forward", bound)
        assert forward.seconds > slots * forward.flops / (gpu_of(arch).tensor["bfloat16"] * 1e12)
        if direction == "training":
            (wgrad,) = (x for x in roofline.predict(problem, "fused", Tiles()) if x.kernel == "conv_wgrad")
            assert wgrad.seconds > forward.seconds


def test_boxes_are_chosen_and_the_reason_says_so():
    """Or why pixels are gathered, where the GPU could load boxes; of others there is nothing to say."""
    layer = Problem(
        *(256, 56, 56, 64, 64, 3, 3, (1, 1), (1, 1), (1, 1), 1, torch.bfloat16),
        *(False, False, 90, "inference", False),
    )
    boxed = decide.decide(layer)
    assert boxed.tiles.forward.box == (2, 8, 8)
    assert "pixels by boxes of 2x8x8" in boxed.reason
    odd = decide.decide(replace(layer, h=57, w=57, stride=(2, 2)))
    assert odd.tiles == Tiles()
    raw = decide.decide(replace(layer, r=1, s=1, padding=(0, 0), prologue=True, direction="training"), "auto")
    assert raw.tiles == Tiles()
    assert "pixels gathered, since its input is normalised" in raw.reason
    assert "gradients gathered, since dy is computed" in raw.reason
    assert "pixels" not in decide.decide(replace(layer, arch=80)).reason


def test_the_gradient_is_by_boxes_where_dy_was_kept_and_they_are_faster():
    layer = Problem(
        *(256, 56, 56, 64, 64, 3, 3, (1, 1), (1, 1), (1, 1), 1, torch.bfloat16),
        *(False, True, 90, "training", False),
    )
    boxed = decide.decide(layer, "triton")
    assert boxed.tiles.forward is None, "its input is normalised on the way"
    assert boxed.tiles.dgrad.box == (2, 8, 8)
    assert decide.decide(replace(layer, direction="inference", prologue=False), "triton").tiles.dgrad is None
    assert decide.decide(replace(layer, dtype=torch.float32, tf32=True), "triton").tiles.dgrad is None
    assert decide.decide(replace(layer, arch=80), "triton").tiles == Tiles()

    def predicted(tiles: Tiles) -> roofline.PredictedLaunch:
        return roofline.predict(layer, "fused", tiles)[-1]

    gathered = predicted(Tiles())
    assert (gathered.kernel, predicted(boxed.tiles).kernel) == ("conv_dgrad", "dgrad_box")
    assert predicted(boxed.tiles).seconds < gathered.seconds
    assert predicted(boxed.tiles).bytes == gathered.bytes
    assert predicted(Tiles(dgrad=replace(boxed.tiles.dgrad, box=(128, 1, 1)))).seconds == predicted(boxed.tiles).seconds
    few = replace(layer, n=8)
    whole, partial = (
        roofline.predict(few, "fused", Tiles(dgrad=replace(boxed.tiles.dgrad, box=box)))[-1].seconds
        for box in ((2, 8, 8), (128, 1, 1))
    )
    assert whole < partial, "boxes of images that there are not"


DEEP = Problem(
    *(1, 7, 7, 512, 512, 3, 3, (1, 1), (1, 1), (1, 1), 1, torch.bfloat16, False, False, 90, "frozen", True),
)
"""On an H100 a launch of 8 programs, each of which walks through 72 steps."""


def test_sums_are_split_where_a_second_launch_pays():
    assert decide.best_tiles(DEEP).splits > 1
    for direction in ("inference", "training"):
        assert decide.best_tiles(replace(DEEP, direction=direction)).splits == 1, direction
    # Of a slow GPU the host does not wait for the second launch.
    wide = replace(DEEP, ci=1024, co=1024, arch=89, direction="inference")
    assert decide.best_tiles(wide).splits > 1
    assert decide.best_tiles(replace(DEEP, n=256)).splits == 1
    assert decide.best_tiles(replace(DEEP, r=1, s=1, padding=(0, 0), ci=64)).splits == 1


def test_the_host_waits_for_every_launch_of_a_unit():
    split = Tiles(forward=TileConfig(64, 64, 64, splits=2))
    inference, training = (replace(DEEP, direction=direction) for direction in ("inference", "training"))
    host = ASSUMED.host_seconds
    waits = [decide.waited(inference, "fused", 1e-6, tiles) for tiles in (Tiles(), split)]
    assert waits == [host["fused inference"], host["fused inference"] + decide.HOST_SPLIT_SECONDS]
    assert decide.waited(inference, "eager", 1e-6, split) == host["eager inference"]
    assert decide.waited(training, "mixed", 1e-6, Tiles()) == host["mixed training"]
    assert decide.waited(training, "mixed", 1e-2, Tiles()) == 1e-2
    assert decide.waited(DEEP, "fused", 1e-6, split) == 1e-6, "a CUDA graph is replayed"


def test_both_launches_of_a_split_sum_are_predicted_and_their_bytes_are_those_that_run():
    tiles = Tiles(forward=TileConfig(64, 64, 64, splits=8))
    product, total = roofline.predict(DEEP, "fused", tiles)
    calls, _ = rehearse(DEEP, Candidate("fused", tiles))
    first, second = (call.cost() for call in calls)
    assert (product.kernel, total.kernel) == ("conv_forward", "conv_forward_sum")
    assert (product.flops, product.bytes) == (first.flops, first.bytes_read + first.bytes_written)
    vectors = 4 * 4 * DEEP.co
    assert (total.flops, total.bytes) == (second.flops, second.bytes_read + second.bytes_written - vectors)
    assert roofline.programs(DEEP, tiles) == prod(calls[0].grid) == 64


def test_what_l2_can_not_keep_of_the_parts_takes_memory_twice():
    tiles = Tiles(forward=TileConfig(64, 64, 64, splits=8))
    for images, bound in ((64, "l2"), (2048, "memory")):
        large = replace(DEEP, n=images)
        _, total = roofline.predict(large, "fused", tiles)
        assert total.bound == bound
    from_memory = (total.bytes - 50e6) / (3350e9 * ASSUMED.memory_of_peak)
    assert total.seconds == pytest.approx(from_memory + ASSUMED.launch_seconds)


def resnet50_at_batch_1(direction: str) -> list[Problem]:
    return [
        Problem(
            *(1, layer.height, layer.width, layer.in_channels, layer.out_channels, layer.kernel, layer.kernel),
            *((layer.stride,) * 2, (layer.padding,) * 2, (1, 1), layer.groups, torch.bfloat16),
            *(False, False, 90, direction, False),
        )
        for layer in dict.fromkeys(layers("resnet50"))
    ]


@pytest.mark.parametrize("direction", ["inference", "frozen"])
def test_at_batch_1_half_of_an_h100_has_a_program_or_the_plan_says_why_not(direction):
    for problem in resnet50_at_batch_1(direction):
        plan = decide.decide(problem)
        (call, *_), _ = rehearse(problem, Candidate("fused", plan.tiles))
        programs = prod(call.grid)
        assert programs == roofline.programs(problem, plan.tiles)
        if plan.implementation == "fused" and programs < 66:
            assert f"{programs} programs on 132 multiprocessors, since" in plan.reason, plan.reason
        else:
            assert "since no split" not in plan.reason


def test_every_layer_of_more_than_a_step_can_be_split_over_an_h100():
    single = 0
    for problem in resnet50_at_batch_1("frozen"):
        counts = [roofline.programs(problem, tiles) for tiles in roofline.choices(problem)]
        single += max(counts) < 66
        assert max(counts) >= 66 or conv_forward.steps(problem, conv_forward.default_config(problem)) == 1
    assert single == 1, "1x1 64->64 of 56x56 pixels"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "sums split in 8, for 64 programs on 132 multiprocessors, since more are not predicted to be faster"),
        ({"direction": "inference"}, "8 programs on 132 multiprocessors, since a second launch would keep the host"),
        ({"direction": "training"}, "programs on 132 multiprocessors, since sums are split in inference alone"),
        ({"ci": 128, "r": 1, "s": 1, "padding": (0, 0)}, "since no split sum is predicted to be faster"),
        ({"ci": 64, "r": 1, "s": 1, "padding": (0, 0)}, "since each sum is a single step, which leaves nothing to"),
        ({"n": 256}, ""),
    ],
)
def test_the_reason_tells_how_a_few_programs_fill_a_gpu(change, told):
    problem = replace(DEEP, **change)
    reason = decide._spread(problem, decide.best_tiles(problem))
    assert told in reason
    assert told or not reason


def seconds(problem: Problem, way: str) -> float:
    return sum(launch.seconds for launch in roofline.predict(problem, way, Tiles()))


@pytest.mark.parametrize(
    ("arch", "block_m", "block_n", "num_warps", "cycles"),
    [
        (90, 128, 64, 4, 1.75),
        (90, 128, 128, 4, 1.25),
        (90, 128, 256, 8, 1.0),
        (80, 128, 64, 4, 1.125),
        (80, 128, 128, 4, 0.75),
        (80, 256, 128, 8, 0.6875),
    ],
)
def test_shared_memory_is_busy_as_long_as_counted_by_hand(arch, block_m, block_n, num_warps, cycles):
    """Cycles of shared memory for each cycle of the tensor cores at peak."""
    unit = replace(LAYER, arch=arch, direction="inference", prologue=False)
    tile = TileConfig(block_m, block_n, 64, num_warps)
    work = roofline._Model(unit, Tiles(forward=tile), ASSUMED).forward_work()
    per_cycle = {80: 1024, 90: 2048}[arch]
    assert (work.shared_bytes / 128) / (work.macs / per_cycle) == cycles


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_plans_are_those_of_the_snapshot(arch):
    """``python -m tests.plans`` writes them anew: look at the difference."""
    if arch == 120 and arch not in conv_box.TILES:
        pytest.skip("this Triton has no boxes for sm_120, which the snapshot's plans choose")
    found, kept = plans.text(arch), plans.path(arch).read_text()
    if arch == 90 and triton.__version__.startswith("3.6."):  # whose tiles of chains hold fewer channels
        found, kept = (text.partition("chains of")[0] for text in (found, kept))
    assert found == kept


@pytest.mark.parametrize(
    "change",
    [
        {"direction": "inference"},
        {"dtype": torch.float32},
        {"ci": 60},
        {"co": 60},
        {"groups": 2},
        {"dilation": (2, 2)},
        {"relu": False},
        {"pooled": True, "residual": False, "ci": 3, "r": 7, "s": 7},
    ],
    ids=str,
)
def test_cudnns_one_call_is_predicted_where_it_is_certain_to_be_possible(change):
    assert dict(decide.decide(DEEP).alternatives).keys() == {"fused", "mixed", "eager", "cudnn"}
    assert dict(decide.decide(replace(DEEP, **change)).alternatives).keys() == {"fused", "mixed", "eager"}


@pytest.mark.parametrize("residual", [False, True])
def test_cudnns_one_call_is_one_launch_of_the_predicted_work(residual):
    unit = replace(DEEP, residual=residual)
    (predicted,) = roofline.predict(unit, "cudnn", Tiles())
    _, (launched,) = rehearse(unit, Candidate("cudnn"))
    bias = unit.co * unit.dtype.itemsize
    assert predicted.kernel == launched.name
    assert predicted.flops == launched.flops
    assert predicted.bytes == launched.bytes_read + launched.bytes_written - bias
