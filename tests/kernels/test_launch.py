"""Calls as values: observed, planned without running; and where nothing can run them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resnet_fused.kernels.activation import RELU
from resnet_fused.kernels.batch_norm import batch_norm_apply, batch_norm_stats, merge_moments
from resnet_fused.kernels.conv_dgrad import conv_dgrad
from resnet_fused.kernels.conv_forward import conv_forward, conv_forward_moments
from resnet_fused.kernels.conv_wgrad import conv_wgrad
from resnet_fused.kernels.epilogue import Moments, Norm, Prologue, Residual
from resnet_fused.kernels.launch import INTERPRETER, dry_run, dry_target, interpreting, observe, target_arch
from resnet_fused.kernels.norm_backward import (
    batch_norm_backward,
    batch_norm_coefs,
    batch_norm_reduce,
    batch_norm_sums,
    merge_sums,
)
from resnet_fused.kernels.norm_pool import batch_norm_pool, batch_norm_pool_backward
from tests.kernels.test_conv_forward import DEVICE, channels_last, random

ROOT = Path(__file__).parents[2]


def planned(n: int = 8, ci: int = 64, arch: int = 90):
    calls = []
    with dry_run(arch), observe(calls.append):
        x = torch.empty(n, ci, 14, 14, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
        y = conv_forward(x, torch.empty(128, ci, 1, 1, dtype=torch.float16, device="meta"))
    assert y.shape == (n, 128, 14, 14)
    return calls[0]


def test_dry_run_launches_nothing_and_ends():
    call = planned()
    assert call.arguments["M"] == 8 * 14 * 14
    assert dry_target() is None


@pytest.mark.skipif(not interpreting(), reason="a GPU runs the compiled kernels, the interpreter is off")
def test_target_of_the_interpreter():
    assert target_arch() == INTERPRETER


def test_specialisation_follows_divisibility_and_not_the_batch():
    code = """
from tests.kernels.test_launch import planned
assert planned(n=64).specialization() == planned(n=65).specialization()
assert planned(ci=64).specialization() != planned(ci=60).specialization()
"""
    compiler_on(code, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that the JIT would compile for is a fake one here")
def test_what_is_compiled_ahead_the_jit_finds_in_the_cache():
    code = """
from resnet_fused.plan.problem import Problem
from resnet_fused.commands.tune_trial import Candidate, rehearse
sizes = 3, 7, 5, 64, 60, 3, 3, (1, 1), (1, 1), (1, 1), 1
calls, _ = rehearse(Problem(*sizes, torch.bfloat16, False, True, 90, "training", False), Candidate("fused"))
for call in calls:
    jitted = call.kernel.warmup(grid=call.grid, **call.arguments, **call.config.options)
    print(call.kernel.__name__, call.compile(90).hash == jitted.hash)
"""
    lines = compiler_on(STAND_IN + code, check=True).stdout.splitlines()
    assert len(lines) >= 5
    assert all(line.endswith("True") for line in lines), lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is launched on is a fake one here")
def test_a_launch_without_the_jit_is_what_the_jit_would_launch():
    """Whatever changes: sizes, which tensors there are, their dtypes, and how their addresses are aligned."""
    code = """
from resnet_fused.kernels.batch_norm import batch_norm_stats
from resnet_fused.kernels.conv_forward import conv_forward
from resnet_fused.kernels.launch import observe
from resnet_fused.kernels.epilogue import Norm
from triton.runtime.jit import JITFunction

def unit(n=2, offset=0, norm=True, dtype=torch.bfloat16, vectors=torch.float32):
    x = torch.zeros(n, 64, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    vector = torch.zeros(65, dtype=vectors)[offset : offset + 64]
    normalise = Norm(vector, vector, None, None, 1e-5) if norm else None
    conv_forward(x, torch.zeros(64, 64, 1, 1, dtype=dtype), bias=vector, norm=normalise)
    batch_norm_stats(None, vector, None, 1e-5, running_mean=vector, running_var=vector)

def address(value):
    return value.data_ptr() if isinstance(value, torch.Tensor) else value

changes = [{}, {"n": 1}, {"offset": 1}, {"norm": False}, {"dtype": torch.float16}, {"vectors": torch.float16}]
run = JITFunction.run
for round in range(2):
    for change in changes:
        launched.clear()
        calls = []
        JITFunction.run = None if round else run
        with observe(calls.append):
            unit(**change)
        JITFunction.run = run
        for call, launch in zip(calls, launched[:], strict=True):
            jitted = call.kernel.warmup(grid=call.grid, **call.arguments, **call.config.options)
            expected = [address(call.arguments[name]) for name in call.kernel.arg_names]
            right = launch[:3] == (*call.grid, 1, 1)[:3] and launch[4] == jitted.function
            print(round, right and list(map(address, launch[9:])) == expected)
"""
    lines = compiler_on(STAND_IN + code, check=True).stdout.splitlines()
    assert lines == ["0 True"] * 12 + ["1 True"] * 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is launched on is a fake one here")
def test_a_launch_of_boxes_describes_the_tensors_that_it_is_given():
    """Each time, also without the JIT; and Triton's launcher makes TMA's descriptors of them."""
    code = """
from resnet_fused.kernels.conv_forward import conv_forward
from resnet_fused.kernels.launch import TileConfig, observe
from triton.backends.nvidia import driver
from triton.runtime.jit import JITFunction

tile = TileConfig(64, 64, 64, box=(1, 8, 8))
run = JITFunction.run
for round in range(3):
    x = torch.zeros(2, 64, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    w = torch.zeros(64, 64, 1, 1, dtype=torch.bfloat16)
    launched.clear()
    calls = []
    JITFunction.run = None if round else run
    with observe(calls.append):
        y = conv_forward(x[1:], w, config=tile)
    JITFunction.run = run
    (call,), (launch,) = calls, launched
    jitted = call.kernel.warmup(grid=call.grid, **call.arguments, **call.config.options)
    print(call.compile(90).hash == jitted.hash, launch[4] == jitted.function)
    addresses = []
    utils = type("Utils", (), {"__getattr__": lambda *_: lambda address, *rest: addresses.append(address)})()
    driver.triton.runtime.driver.active.utils = utils
    given = [argument for argument in launch[9:] if hasattr(argument, "block_shape")]
    boxes = zip(given, jitted.metadata.tensordesc_meta, strict=True)
    sizes = [driver.make_tensordesc_arg(*box, *[None] * (triton.__version__ >= "3.7"))[1:] for box in boxes]
    print(addresses == [x[1:].data_ptr(), w.data_ptr(), y.data_ptr()], sizes)
    driver.triton.runtime.driver.active.utils = stand_in._Utils
"""
    lines = compiler_on("import triton\n" + STAND_IN + code, check=True).stdout.splitlines()
    pixels = [1, 1, 64, 64, 64 * 64, 64 * 64, 64, 1]
    sizes = [pixels, [64, 64, 64, 1], pixels]
    assert lines == ["True True", f"True {sizes}"] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is launched on is a fake one here")
def test_hooks_of_triton_see_every_launch_whenever_they_are_set():
    """As Triton's profiler sets them, and as a function in the place of all others."""
    code = """
import triton
from resnet_fused.kernels.conv_forward import conv_forward

x, w = (torch.zeros(*size).to(memory_format=torch.channels_last) for size in ((2, 64, 5, 5), (64, 64, 1, 1)))
knobs, seen = triton.knobs.runtime, []
enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
hook = lambda metadata: seen.append(metadata.get()["name"])

def hooks():
    launched.clear()
    conv_forward(x, w)
    (launch,) = launched
    for called in launch[7:9]:
        if called is not None:
            called(launch[6])
    found = seen[:]
    seen.clear()
    return found

print(hooks(), hooks())
for chain in (enter, leave):
    chain.add(hook)
    print(hooks())
    chain.remove(hook)
for name in ("launch_enter_hook", "launch_exit_hook"):
    with triton.knobs.runtime.scope():
        setattr(knobs, name, hook)
        print(hooks())
        setattr(knobs, name, None)
        print(hooks())
print(hooks(), launched[0][6:9])
"""
    lines = compiler_on(STAND_IN + code, check=True).stdout.splitlines()
    one = "['conv_forward_kernel']"
    assert lines == ["[] []", one, one, one, "[]", one, "[]", "[] (None, None, None)"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is launched on is a fake one here")
def test_a_tensor_on_another_device_is_left_to_the_jit():
    """Which asks the driver for its address there; of one that the driver cannot reach, it says so."""
    code = """
from resnet_fused.kernels.conv_forward import conv_forward
from triton.runtime.jit import JITFunction

x, w = (torch.zeros(*size).to(memory_format=torch.channels_last) for size in ((2, 64, 5, 5), (64, 64, 1, 1)))

def refuse(*arguments, **others):
    raise ValueError("cannot be accessed")

class Elsewhere(torch.Tensor):
    get_device = lambda self: 1

for _ in range(2):
    conv_forward(x, w, bias=torch.zeros(64))
    JITFunction.run = refuse
try:
    conv_forward(x, w, bias=torch.zeros(64).as_subclass(Elsewhere))
except ValueError as error:
    print(error, len(launched))
"""
    lines = compiler_on(STAND_IN + code, check=True).stdout.splitlines()
    assert lines == ["cannot be accessed 2"]


STAND_IN = """
import torch
from resnet_fused.benchmarks import stand_in

launched = []
stand_in.install(90, lambda *arguments: launched.append(arguments))
"""


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_the_loops_of_kernels_end_at_a_bound(path):
    """In the interpreter of Triton 3.6 with NumPy 2.4 nothing else will do: no other environment would show it."""
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    loops = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.For)]
    ends = [ast.unparse(loop.iter) for loop in loops if not ast.unparse(loop.iter).startswith("tl.static_range(")]
    start, step = r"(0, |bound\(.*\), )?", r"(, BLOCK_T|, loop_unroll_factor=\d|, num_stages=[\w.]+)?"
    assert all(re.fullmatch(rf"(tl\.)?range\({start}bound\(.*\){step}\)", end) for end in ends), ends


def test_a_dry_run_is_that_of_its_thread():
    with dry_run(90, "NVIDIA H200"), ThreadPoolExecutor() as pool:
        assert dry_target() == (90, "NVIDIA H200")
        assert pool.submit(dry_target).result() is None


def test_observers_are_forgotten():
    calls = []
    with observe(calls.append):
        pass
    planned()
    assert calls == []


def test_an_observer_is_forgotten_and_not_its_equal():
    class Observer(list):
        """Equal to every list that holds the same."""

        __call__ = list.append

    first, second = Observer(), Observer()
    with observe(first):
        with observe(second):
            assert first == second
        planned()
        with observe(first):
            planned()
    assert (len(first), len(second)) == (3, 0)


def launches() -> dict[str, tuple[Callable, dict[str, Tensor]]]:
    """Per launcher: a call of it, and its vectors by name."""
    c = 24
    x, w = (random(*shape) for shape in ((2, c, 3, 3), (c, c, 1, 1)))
    pooled, place = random(2, c, 2, 2), channels_last(torch.zeros(2, c, 2, 2, dtype=torch.int8, device=DEVICE))
    vectors = {name: torch.rand(c, device=DEVICE) for name in ("mean", "var", "gamma", "beta")}
    stats = {name: torch.rand(5, c, device=DEVICE) for name in ("stats", "stats2")}
    coefs = {name: torch.rand(3, c, device=DEVICE) for name in ("coefs", "coefs2")}
    moments = {"values": torch.rand(2, 4, c, device=DEVICE), "counts": torch.full((4,), 3.0, device=DEVICE)}
    running = {name: torch.rand(c, device=DEVICE) for name in ("gamma", "beta", "running_mean", "running_var")}
    sums = {name: torch.rand(4, c, device=DEVICE) for name in ("sum_g", "sum_gy")}
    fixed = {f"stats.{name}": vector for name, vector in vectors.items()}
    normalised = {f"norm.{name}": vector for name, vector in vectors.items()}
    prologue = {f"prologue[{i}]": torch.rand(c, device=DEVICE) for i in (0, 1)}
    batches = {"batches": torch.tensor(1, device=DEVICE)}
    tile_values = lambda v: Moments(v["moments.values"], 0, 0, v["moments.counts"])  # noqa: E731
    moments = {f"moments.{name}": vector for name, vector in moments.items()}

    def updated(v: dict[str, Tensor], **more) -> Tensor:
        names = ("running_mean", "running_var", "batches")
        state = {name: v[name] for name in names}
        return batch_norm_stats(tile_values(v), v["gamma"], v["beta"], 1e-5, **state, **more)

    return {
        "conv_forward": (
            lambda v: conv_forward(
                x, w, bias=v["bias"], prologue=Prologue(v["prologue[0]"], v["prologue[1]"]),
                norm=Norm(*(v[name] for name in normalised), 1e-5),
            ),
            {"bias": torch.rand(c, device=DEVICE), **prologue, **normalised},
        ),
        "conv_forward_moments": (
            lambda v: conv_forward_moments(x, w, bias=v["bias"], prologue=Prologue(v["prologue[0]"], v["prologue[1]"])),
            {"bias": torch.rand(c, device=DEVICE), **prologue},
        ),
        "conv_dgrad": (
            lambda v: conv_dgrad(x, w, (3, 3), y=x, coefs=v["coefs"], mask=(x, v["mask[1]"])),
            {"coefs": coefs["coefs"], "mask[1]": stats["stats"]},
        ),
        "conv_wgrad": (
            lambda v: conv_wgrad(x, x, (1, 1), y=x, coefs=v["coefs"], x_stats=v["x_stats"]),
            {"coefs": coefs["coefs"], "x_stats": stats["stats"]},
        ),
        "merge_moments": (lambda v: merge_moments(tile_values(v)), moments),
        "batch_norm_stats": (updated, moments | running | batches),
        "batch_norm_stats, cumulative": (lambda v: updated(v, momentum=None), moments | running | batches),
        "batch_norm_stats of fixed ones": (
            lambda v: batch_norm_stats(
                None, v["gamma"], v["beta"], 1e-5, running_mean=v["running_mean"], running_var=v["running_var"]
            ),
            running,
        ),
        "batch_norm_apply": (
            lambda v: batch_norm_apply(x, v["stats"], residual=Residual(x), residual_stats=v["residual_stats"]),
            {"stats": stats["stats"], "residual_stats": stats["stats2"]},
        ),
        "batch_norm_apply of fixed ones": (
            lambda v: batch_norm_apply(x, Norm(*(v[name] for name in fixed), 1e-5)), fixed
        ),
        "batch_norm_reduce": (
            lambda v: batch_norm_reduce(x, x, v["stats"], activation=RELU, z=x, second=(x, v["second[1]"])),
            {"stats": stats["stats"], "second[1]": stats["stats2"]},
        ),
        "batch_norm_sums": (lambda v: batch_norm_sums(x, x, v["stats"]), {"stats": stats["stats"]}),
        "batch_norm_pool": (lambda v: batch_norm_pool(x, v["stats"]), {"stats": stats["stats"]}),
        "batch_norm_pool_backward": (
            lambda v: batch_norm_pool_backward(pooled, place, x, v["stats"], v["coefs"]),
            {"stats": stats["stats"], "coefs": coefs["coefs"]},
        ),
        "merge_sums": (lambda v: merge_sums(v["sums"]), {"sums": torch.rand(3, 4, c, device=DEVICE)}),
        "batch_norm_coefs": (
            lambda v: batch_norm_coefs(v["sum_g"], v["sum_gy"], v["stats"]), sums | {"stats": stats["stats"]}
        ),
        "batch_norm_backward": (
            lambda v: batch_norm_backward(x, x, v["coefs"], second=(x, v["second[1]"])),
            {"coefs": coefs["coefs"], "second[1]": coefs["coefs2"]},
        ),
    }  # fmt: skip


# The number of channels is taken from these: if it is another, any vector may be the first at odds with it.
MEASURES = {"moments.values", "sums", "sum_g", "running_mean of fixed ones"}
LAUNCHES = {
    "conv_forward": 7, "conv_forward_moments": 3, "conv_dgrad": 2, "conv_wgrad": 2, "merge_moments": 2,
    "batch_norm_stats": 7, "batch_norm_stats, cumulative": 7, "batch_norm_stats of fixed ones": 4,
    "batch_norm_apply": 2, "batch_norm_apply of fixed ones": 4, "batch_norm_reduce": 2, "merge_sums": 1,
    "batch_norm_sums": 1, "batch_norm_pool": 1, "batch_norm_pool_backward": 2,
    "batch_norm_coefs": 3, "batch_norm_backward": 2,
}  # fmt: skip
CHANGES = {
    "cut": lambda t: t[..., :-1].contiguous(),
    "longer": lambda t: torch.cat([t, t[..., :1]], -1),
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "a column": lambda t: torch.stack([t, t], -1)[..., 0],
    "fp64": lambda t: t.double(),
    "integers": lambda t: t.int(),
}


@pytest.mark.parametrize("launcher", LAUNCHES)
def test_what_a_kernel_takes_for_granted_of_its_vectors_is_checked(launcher):
    """Kernels read and write vectors element after element, whatever their length and strides: past them, once."""
    launch, vectors = launches()[launcher]
    assert len(vectors) == LAUNCHES[launcher]
    launch(vectors)
    before = {name: vector.clone() for name, vector in vectors.items()}
    for name, vector in vectors.items():
        for change, changed in CHANGES.items():
            bad = vector.expand(2) if vector.dim() == 0 and change != "fp64" else changed(vector)
            suffix = " of fixed ones" if launcher == "batch_norm_stats of fixed ones" else ""
            at_odds = change in ("cut", "longer") and f"{name}{suffix}" in MEASURES
            if at_odds and launcher in ("merge_moments", "merge_sums"):
                continue  # alone, it may have any number of them
            calls = []
            expected = "must be contiguous" if at_odds else re.escape(f"{name} must be contiguous")
            with observe(calls.append), pytest.raises(ValueError, match=expected):
                launch(vectors | {name: bad})
            assert calls == []
            assert all(torch.equal(vector, before[key]) for key, vector in vectors.items()), "nothing was updated"


def test_vectors_are_checked_in_a_dry_run():
    x = torch.empty(2, 24, 3, 3, device="meta", memory_format=torch.channels_last)
    with dry_run(90), pytest.raises(ValueError, match="bias must be contiguous"):
        conv_forward(x, torch.empty(24, 24, 1, 1, device="meta"), bias=torch.empty(23, device="meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is launched on is a fake one here")
def test_vectors_are_checked_again_where_the_code_is_compiled_already():
    code = """
from resnet_fused.kernels.conv_forward import conv_forward

x = torch.zeros(2, 64, 5, 5).to(memory_format=torch.channels_last)
good = torch.zeros(64)
bad = [torch.zeros(63), torch.zeros(65), torch.zeros(1).expand(64), torch.zeros(64, 2)[:, 0], good.double()]
for bias in (bad[0], good, *bad, good):
    launched.clear()
    try:
        conv_forward(x, torch.zeros(64, 64, 1, 1), bias=bias)
    except ValueError as error:
        print(len(launched), str(error).startswith("bias must be contiguous"))
    else:
        print(len(launched), "launched")
"""
    lines = compiler_on(STAND_IN + code, check=True).stdout.splitlines()
    assert lines == ["0 True", "1 launched", *["0 True"] * 5, "1 launched"]


PARAMETERS = re.compile(r"(norm\.|stats\.)?(mean|var|gamma|beta)|bias|running_(mean|var)")


@pytest.mark.parametrize("launcher", LAUNCHES)
def test_vectors_of_parameters_may_be_of_any_float_and_all_others_of_one_type(launcher):
    launch, vectors = launches()[launcher]
    for name, vector in vectors.items():
        half = vectors | {name: vector.half()}
        if PARAMETERS.fullmatch(name):
            launch(half)
            continue
        one = "int64" if name == "batches" else "float32"
        with pytest.raises(ValueError, match=re.escape(f"{name} must be contiguous {one} [")):
            launch(half)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels can be executed")
def test_without_gpu_and_interpreter_the_error_says_so():
    code = (
        "import torch; from resnet_fused.kernels.conv_forward import conv_forward;"
        "conv_forward(torch.zeros(1, 16, 1, 1), torch.zeros(16, 16, 1, 1))"
    )
    run = compiler_on(code, check=False)
    assert run.returncode == 1
    assert "RuntimeError: nothing here can execute a Triton kernel" in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr


def compiler_on(code: str, check: bool) -> subprocess.CompletedProcess:
    """Run ``code`` in a process where Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=check)
