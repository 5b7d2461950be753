"""Operators that are repeated from a tape: to the bit what they do when they are run."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_launch import compiler_on

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is launched on is a fake one here")

EMULATOR = """
import ctypes
import hashlib

import torch
from torch import nn
from resnet_fused import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck, implementation
from resnet_fused.benchmarks import stand_in
from resnet_fused.engine import ops, replay
from resnet_fused.kernels.launch import observe

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # memory is filled where it is allocated
sizes, launched = {}, []


def launch(*arguments):
    '''A kernel that writes to all its tensors what depends on every byte of each, and on all numbers.'''
    launched.append(arguments)
    spans = sizes.get(name(arguments))
    if spans is None:
        return
    given = [address(a) for a in arguments[9:]]
    memory = [(given[i], size) for i, size in spans]
    seen = hashlib.blake2b(repr(name(arguments)).encode())
    for start, size in memory:
        seen.update(ctypes.string_at(start, size))
    for i, (start, size) in enumerate(memory):
        drawn = hashlib.shake_256(seen.digest() + bytes([i])).digest(size)
        ctypes.memmove(start, bytes(b & 0x3F for b in drawn), size)  # a finite number in every dtype


def name(arguments):
    '''Of the kernel, with its grid and all numbers, but for the addresses.'''
    numbers = [None if isinstance(a, int) and a >= 2**32 else a for a in map(address, arguments[9:])]
    return arguments[4], *arguments[:3], *numbers


def address(a):
    tensor = getattr(a, "base", a)
    return tensor.data_ptr() if isinstance(tensor, torch.Tensor) else a


stand_in.install(90, launch)


def learn(work):
    '''Lets work run without effect, and notes how large the tensors of its kernels are.'''
    sizes.clear()
    launched.clear()
    calls, spans = [], {}
    with observe(calls.append):
        work()
    for call, arguments in zip(calls, launched, strict=True):
        given = [call.arguments[n] for n in call.kernel.arg_names]
        tensors = [(i, getattr(t, "base", t)) for i, t in enumerate(given)]
        spans[name(arguments)] = [(i, t.nbytes) for i, t in tensors if isinstance(t, torch.Tensor)]
    sizes.update(spans)
"""


def lines(code: str) -> list[str]:
    return compiler_on(EMULATOR + code, check=True).stdout.splitlines()


def test_a_step_is_repeated_to_the_bit():
    """Of every kind of block, with both libraries, and with what is computed again in the backward."""
    code = """
import copy

def projected(ci, co, stride):
    return nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))

def step(block, x):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    z = block(x)
    z.sum().backward() if frozen else z.backward(torch.ones_like(z))
    tensors = [z.detach(), x.grad, *[p.grad for p in block.parameters()], *block.buffers()]
    return [t.clone() for t in tensors], [(t.stride(), t.storage_offset(), t._is_view()) for t in tensors]

def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

blocks = [
    (BasicBlock(16, 32, 2, projected(16, 32, 2)), 16),
    (BasicBlock(16, 16), 16),
    (Bottleneck(64, 16), 64),
    (Bottleneck(16, 16, 2, projected(16, 64, 2)), 16),
    (PreActBottleneck(64, 64), 64),
    (PreActBlock(16, 32, 2), 16),
]
for block, ci in blocks:
    for road in ("triton", "mixed"):
        for memory in ("default", "recompute"):
            for frozen in (False, True):
                block = block.train().to(memory_format=torch.channels_last)
                block.memory = memory
                if frozen:
                    (block.norm1 if hasattr(block, "norm1") else block.bn1).eval()
                x = torch.randn(2, ci, 8, 8).to(memory_format=torch.channels_last)
                results = []
                with implementation(road):
                    learn(lambda: step(copy.deepcopy(block), x))
                    replay._tapes.clear()
                    launched.clear()
                    for _ in range(3):
                        results.append(step(copy.deepcopy(block), x))
                tapes = [tape is not None for tape in replay._tapes.values()]
                names = list(map(name, launched))
                once = len(names) // 3
                print(
                    same(results[0][0], results[1][0]) and same(results[1][0], results[2][0]),
                    results[0][1] == results[1][1] == results[2][1],
                    names == names[:once] * 3 and set(names) <= set(sizes),
                    all(tapes) and len(tapes) > 1,
                )
"""
    found = lines(code)
    assert found == ["True True True True"] * 48


UNIT = """
from torch.overrides import TorchFunctionMode
from resnet_fused import trace
from resnet_fused.engine import forward
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.launch import dry_run
from resnet_fused.plan.problem import Tiles

ran, run = [], forward.unit_forward
forward.unit_forward = lambda *arguments: ran.append(arguments) or run(*arguments)

def unit(n=2, dtype=torch.float32, x=None, eps=1e-5, momentum=0.1, running=True, stride=1, fused=True, twice=False):
    if x is None:
        x = torch.zeros(n, 16, 6, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = torch.zeros(16, 16, 1, 1, dtype=dtype)
    vectors = [torch.zeros(16) for _ in range(4)]
    if not running:
        vectors[2:] = None, None
    if twice:
        vectors[0] = vectors[1]
    code = forward.Convolution(Geometry(stride=(stride, stride)), fused, Tiles()).encode()
    ran.clear()
    y, stats = ops.unit_forward(x, None, w, "identity", None, *vectors, None, momentum, eps, True, code, "")
    assert y.dtype == dtype
    return len(ran)
"""


def test_what_is_repeated_is_only_what_was_the_same():
    code = """
aligned = torch.zeros(2 * 36 * 32 + 16)
def part(offset):
    return aligned[offset : offset + 2 * 36 * 32].view(2, 6, 6, 32).permute(0, 3, 1, 2)[:, :16]

class Autocast:
    def __enter__(self):
        self.inner = torch.autocast("cpu", torch.bfloat16)
        self.inner.__enter__()
    def __exit__(self, *error):
        self.inner.__exit__(*error)

changes = [
    {}, {"n": 3}, {"dtype": torch.bfloat16}, {"x": part(0)}, {"x": part(1)}, {"eps": 1e-3}, {"momentum": None},
    {"running": False}, {"stride": 2}, {"fused": False},
]
print(*[(unit(**change), unit(**change)) for change in changes])
print(*[unit(**change) for change in changes])
torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
print(unit(), unit())
torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
print(unit(), unit())
with torch.autocast("cpu", torch.bfloat16):
    print(unit(), unit())
print(unit(), unit(twice=True), unit(twice=True))
"""
    assert lines(UNIT + code) == [
        " ".join(["(1, 0)"] * 10), " ".join(["0"] * 10), "1 0", "0 0", "1 0", "0 1 1",
    ]  # fmt: skip


def test_whoever_watches_sees_every_launch():
    code = """
class Seeing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))

unit()
calls = []
with observe(calls.append):
    print(unit(), len(calls))
with trace() as traced:
    print(unit(), sum(not launch.name.startswith('aten.') for launch in traced.launches))
with dry_run(90):
    print(unit())
with Seeing():
    print(unit())
print(unit())
"""
    assert lines(UNIT + code) == ["1 2", "1 2", "1", "1", "0"]


STEPS = """
from torch.profiler import ProfilerActivity, profile

block = Bottleneck(64, 16).train().to(memory_format=torch.channels_last)
x = torch.randn(2, 64, 16, 16).to(memory_format=torch.channels_last)

def step():
    z = block(x)
    z.backward(z.detach())
    for parameter in block.parameters():
        parameter.grad = None
"""


@pytest.mark.parametrize("road", ["triton", "mixed"])
def test_the_peak_of_memory_is_no_higher(road):
    """While it is written down, and when it is repeated."""
    code = f"""
def peak():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        step()
    total, most = 0, 0
    for event in measured.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most

with implementation({road!r}):
    step()
    recorded, repeated = None, peak()
    replay._tapes.clear()
    recorded = peak()
    replay.only_launches = lambda: False
    print(peak() >= repeated > x.nbytes, peak() >= recorded > x.nbytes)
"""
    assert lines(STEPS + code) == ["True True"]


def test_a_block_has_one_tape_in_each_direction():
    code = """
from resnet_fused import fuse

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.squeeze = nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 1)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return torch.relu(y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True))) + x)

for make in (lambda: block, lambda: PreActBottleneck(64, 64), lambda: fuse(nn.Sequential(Scaled()))):
    replay._tapes.clear()
    block = make().train().to(memory_format=torch.channels_last)
    with implementation("triton"):
        for _ in range(3):
            step()
    print(*sorted(implementation.__name__ for implementation, *_ in replay._tapes), None in replay._tapes.values())
"""
    assert lines(STEPS + code) == [
        "_residual _residual_backward False",
        "_preact _preact_backward False",
        "_squeezed _squeezed_backward False",
    ]


def test_a_mode_sees_the_operators_of_a_block():
    code = """
from torch.utils._python_dispatch import TorchDispatchMode

class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        seen.append(function._schema.name)
        return function(*args, **(kwargs or {}))

seen = []
with implementation("triton"):
    for _ in range(2):
        step()
    with Seeing():
        step()
print(*[name for name in seen if name.startswith("resnet_fused")])
"""
    operators = ["unit_forward"] * 3 + ["join_forward", "residual_backward"]
    assert lines(STEPS + code) == [" ".join(f"resnet_fused::{name}" for name in operators)]


def test_threads_repeat_at_once():
    code = """
from concurrent.futures import ThreadPoolExecutor

with implementation("triton"):
    learn(step)
blocks = [Bottleneck(64, 16).train().to(memory_format=torch.channels_last) for _ in range(4)]
for each in blocks:
    each.load_state_dict(block.state_dict())

def work(each):
    found, own = [], x.clone(memory_format=torch.preserve_format)
    with implementation("triton"):
        for _ in range(5):
            z = each(own)
            z.backward(z.detach())
            found.append(z.detach().clone())
    return found + [parameter.grad for parameter in each.parameters()]

alone = work(blocks[0])
replay._tapes.clear()
with ThreadPoolExecutor(3) as pool:
    for found in pool.map(work, blocks[1:]):
        print(all(map(torch.equal, alone, found)))
"""
    assert lines(STEPS + code) == ["True"] * 3


def test_what_is_not_understood_is_never_repeated():
    """A tensor from elsewhere, a number that depends on contents, tensors in a list; views and results in place are."""
    code = """
kept = torch.zeros(16)

def operator(change):
    def implementation(x):
        ran.append(change)
        y = torch.zeros_like(x)
        if change == "elsewhere":
            y += kept
        elif change == "number":
            y += float(x.sum())
        elif change == "several":
            y += torch.stack([x, x])[1]
        elif change == "views":
            y[4:8] += x.view(4, 4).unbind()[1]
            return [y, y.view(torch.int32)]
        elif change == "negated":
            y += torch._neg_view(x)
        elif change == "input":
            return x
        return y
    return implementation

for change in ("", "elsewhere", "number", "several", "views", "negated", "input"):
    ran, run = [], operator(change)
    found = [replay.run(run, [x]) for x in torch.ones(3, 16)]
    count = len(ran)
    again = run(torch.ones(16))
    same = all(torch.equal(a, b) for each in found for a, b in zip(each, again, strict=True))
    print(count, same)
"""
    assert lines(code) == ["1 True", "3 True", "3 True", "3 True", "1 True", "1 True", "1 True"]


def test_tapes_are_forgotten():
    code = """
replay.KEPT_LAYOUTS = 3
for n in range(1, 9):
    unit(n=n)
    print(len(replay._tapes))
"""
    assert lines(UNIT + code) == [str(n % 3 or 3) for n in range(1, 9)]


def test_what_tma_loads_is_described_anew():
    code = """
from resnet_fused.engine import forward
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.launch import TileConfig
from resnet_fused.plan.problem import Tiles

code = forward.Convolution(Geometry(), True, Tiles(TileConfig(64, 64, 64, box=(1, 8, 8)))).encode()
for i in range(3):
    x = torch.zeros(2, 64, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    w = torch.zeros(64, 64, 1, 1, dtype=torch.bfloat16)
    launched.clear()
    y, _ = ops.unit_forward(x, None, w, "identity", None, None, None, None, None, None, 0.1, 1e-5, True, code, "")
    bases = [a.base.data_ptr() for a in launched[0][9:] if hasattr(a, "base")]
    (tape,) = replay._tapes.values()
    print(bases == [x.data_ptr(), w.data_ptr(), y.data_ptr()], len(launched), len(tape.steps))
"""
    assert lines(code) == ["True 2 8"] * 3


def test_a_library_that_lays_its_result_out_otherwise():
    """As PyTorch may where cuDNN is switched off: what follows was recorded for the layout of the first time."""
    code = """
convolution = torch.convolution
torch.convolution = lambda *arguments: convolution(*arguments).contiguous()

def operator(x, w):
    return torch.ops.aten.convolution.default(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)

x = torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last)
w = torch.randn(16, 16, 1, 1)
first, second = (replay.run(operator, [x, w]) for _ in range(2))
(tape,) = replay._tapes.values()
print(torch.equal(first, second), first.stride() == second.stride() != convolution(x.contiguous(), w, None, [1, 1],
    [0, 0], [1, 1], False, [0, 0], 1).stride(), tape is not None)
"""
    assert lines(code) == ["True True True"]


INFERENCE = """
import copy
from functools import partial

import torchvision
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torchvision.ops import FrozenBatchNorm2d
from resnet_fused import fuse, modules, trace

def projected(ci, co, stride, *before, norm=nn.BatchNorm2d):
    return nn.Sequential(*before, nn.Conv2d(ci, co, 1, 1 if before else stride, bias=False), norm(co))

def bottleneck(norm, stride=1):
    return Bottleneck(16, 8, stride, projected(16, 32, stride, norm=norm), norm_layer=norm)

def pooled():
    block = torchvision.models.resnet.Bottleneck(16, 8, 2, projected(16, 32, 2, nn.AvgPool2d(2, 2)))
    return fuse(nn.Sequential(block))[0]

def input_of(block, n=2):
    return torch.randn(n, block.conv1.in_channels, 8, 8).to(memory_format=torch.channels_last)

def ready(block):
    for norm in block.modules():
        if hasattr(norm, "running_var"):  # such that no vector is that of another norm
            for vector in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(vector, 0.5, 2)
    return block.eval().to(memory_format=torch.channels_last)

@torch.no_grad()
def restored(block, x):
    'What the block returns, whose tensors the kernels write to, which is undone.'
    tensors = [x, *block.parameters(), *block.buffers()]
    kept = [t.clone() for t in tensors]
    z = block(x)
    for t, value in zip(tensors, kept, strict=True):
        t.copy_(value)
    return z

def directly(block, x):
    'The same, without tapes.'
    only_launches, replay.only_launches = replay.only_launches, lambda: False
    try:
        learn(lambda: restored(block, x))
        return restored(block, x)
    finally:
        replay.only_launches = only_launches

def played(block):
    return sum(isinstance(tape, replay.Tape) for tape in replay._repeated.get(block, {}).values())
"""


def test_inference_is_repeated_to_the_bit():
    code = """
blocks = [
    BasicBlock(16, 32, 2, projected(16, 32, 2)), BasicBlock(16, 16), pooled(),
    Bottleneck(16, 8, 2, modules.PaddedShortcut(16, 32, 2)),
    Bottleneck(16, 16, 2, projected(16, 64, 2)),
    bottleneck(FrozenBatchNorm2d, 2), bottleneck(partial(FrozenBatchNormAct2d, apply_act=False)),
    bottleneck(partial(BatchNormAct2d, apply_act=False)), PreActBottleneck(64, 64), PreActBlock(16, 32, 2),
]
for block in map(ready, blocks):
    for road in ("triton", "mixed"):
        for dtype in (None, torch.bfloat16):
            replay._repeated.clear()
            x = input_of(block)
            if hasattr(block, "norm1"):  # a block of pre-activations adds to what the one before returned
                x = x.to(dtype)
            with implementation(road), torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
                want = directly(block, x)
                launched.clear()
                results = [restored(block, x) for _ in range(4)]
            names = list(map(name, launched))
            once = len(names) // 4
            print(
                all(torch.equal(want, z) and z.stride() == want.stride() and z.dtype == want.dtype for z in results),
                len({z.data_ptr() for z in results}) == 4,
                names == names[:once] * 4 and once > 0,
                played(block) == 1,
            )
"""
    assert lines(INFERENCE + code) == ["True True True True"] * 40


def test_frozen_norms_are_repeated_in_training_too():
    """In which they are as ever; a live one in evaluation among them is not."""
    code = """
for norm in (FrozenBatchNorm2d, partial(FrozenBatchNormAct2d, apply_act=False), nn.BatchNorm2d):
    block = ready(bottleneck(norm)).train()
    x = input_of(block)
    with torch.no_grad(), implementation("triton"):
        want = directly(block, x)
        print(all(torch.equal(want, restored(block, x)) for _ in range(4)), played(block))
"""
    assert lines(INFERENCE + code)[:2] == ["True 1"] * 2
    assert lines(INFERENCE + code)[2].endswith(" 0")


TRAINING = (
    INFERENCE
    + """
from resnet_fused.engine.autograd import Step

@torch.enable_grad()
def restored(block, x):
    'The result of the block, all gradients and buffers; what the kernels wrote to is undone.'
    tensors = [*block.parameters(), *block.buffers()]
    kept = [t.detach().clone() for t in tensors]
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    z = block(leaf)
    z.backward(torch.ones_like(z))
    left = [z.detach(), leaf.grad, *[p.grad for p in block.parameters()], *block.buffers()]
    found = [(None, None) if t is None else (t.stride(), t.clone()) for t in left]
    block.zero_grad()
    with torch.no_grad():
        for t, value in zip(tensors, kept, strict=True):
            t.copy_(value)
    return found

def same(ours, theirs):
    return all(
        a == b if a is None or t is None else a == b and t.dtype == u.dtype and torch.equal(t, u)
        for (a, t), (b, u) in zip(ours, theirs, strict=True)
    )

def played(block):
    return sum(isinstance(step, Step) for step in replay._repeated.get(block, {}).values())
"""
)


def test_training_steps_are_repeated_to_the_bit():
    """Where what the graph has of a block is one node, which reads its input and parameters as they lie."""
    code = """
def recomputing(block):
    block.memory = "recompute"
    return block

def partly(block):
    block.bn1.eval()
    block.conv2.weight.requires_grad_(False)
    block.bn2.momentum = None
    return block

def last(block):
    block.relu = nn.SiLU()
    return block

blocks = [
    (BasicBlock(16, 32, 2, projected(16, 32, 2)), 1), (BasicBlock(16, 16), 1),
    (Bottleneck(16, 8, 2, modules.PaddedShortcut(16, 32, 2)), 1),
    (recomputing(Bottleneck(16, 16, 2, projected(16, 64, 2))), 1), (last(Bottleneck(32, 8)), 1),
    (bottleneck(FrozenBatchNorm2d, 2), 1), (bottleneck(partial(BatchNormAct2d, apply_act=False)), 1),
    (partly(ready(Bottleneck(16, 16, 2, projected(16, 64, 2))).train()), 1), (pooled(), 0),
]
for block, kept in blocks:
    evaluated = [m for m in block.modules() if not m.training]
    block = ready(block).train()
    for module in evaluated:
        module.eval()
    for road in ("triton", "mixed"):
        for dtype in (None, torch.bfloat16):
            replay._repeated.clear()
            x = input_of(block).to(dtype)
            with implementation(road), torch.autocast("cpu", dtype, enabled=dtype is not None):
                want = directly(block, x)
                launched.clear()
                results = [restored(block, x) for _ in range(4)]
            names = list(map(name, launched))
            once = len(names) // 4
            print(
                all(same(want, found) for found in results),
                names == names[:once] * 4 and once > 0,
                played(block) == kept,
            )
"""
    assert lines(TRAINING + code) == ["True True True"] * 36


CHANGES = """
def in_place(block):
    block.conv2.weight.data.add_(1)

def swapped(block):
    block.conv2.weight.data = block.conv2.weight.data * 2

def new_parameter(block):
    block.bn1.weight = nn.Parameter(block.bn1.weight.detach() + 1)

def eps(block):
    block.bn2.eps = 0.5

def dilated(block):
    block.conv2.padding = block.conv2.dilation = (2, 2)

def biased(block):
    block.conv1.bias = nn.Parameter(torch.ones(block.conv1.out_channels))

def half(block):
    block.half()

def activated(block):
    block.relu = nn.SiLU()

def gapped(block):
    block.bn1.running_mean = torch.randn(2 * block.bn1.num_features)[::2]

def without(block):
    block.bn1.weight = None

def negative(block):
    block.bn1.bias.data = torch._neg_view(block.bn1.bias.data)
"""
"""What may become of a block between two calls."""


def test_a_training_step_after_a_change_is_that_of_the_changed_block():
    code = """
def misaligned(block):
    w = block.conv2.weight.data
    memory = torch.empty(w.numel() + 1)
    block.conv2.weight.data = torch.as_strided(memory, w.shape, w.stride(), 1).copy_(w * 2)

def momentum(block):
    block.bn2.momentum = 0.5

def averaged(block):
    block.bn2.momentum = None

def untracked(block):
    block.bn2.track_running_stats = False

def evaluated(block):
    block.bn2.eval()

def frozen(block):
    block.conv2.weight.requires_grad_(False)
    block.bn1.bias.requires_grad_(False)

def recomputing(block):
    block.memory = "recompute"

def uncounted(block):
    block.bn1.num_batches_tracked = None

def hooked(block):
    block.bn2.register_forward_hook(lambda module, args, result: result * 2)

changes = [
    in_place, swapped, misaligned, new_parameter, eps, momentum, averaged, untracked, evaluated, frozen, recomputing,
    dilated, biased, half, activated, gapped, without, uncounted, negative, hooked,
]
for change in changes:
    block = ready(Bottleneck(16, 8, 1, projected(16, 32, 1))).train()
    x = input_of(block)
    with implementation("triton"):
        want = directly(block, x)
        assert all(same(restored(block, x), want) for _ in range(3)) and played(block) == 1
        change(block)
        x = x.to(block.conv1.weight.dtype)
        now = directly(block, x)
        alike = len(now) == len(want) and same(now, want)
        print(change.__name__, all(same(restored(block, x), now) for _ in range(4)), alike)
"""
    changed = ["in_place", "swapped", "misaligned", "new_parameter", "eps", "momentum", "averaged", "untracked"]
    changed += ["evaluated", "frozen", "recomputing", "dilated", "biased", "half", "activated", "gapped", "without"]
    changed += ["uncounted", "negative", "hooked"]
    assert lines(TRAINING + CHANGES + code) == [f"{name} True False" for name in changed]


def test_what_is_frozen_in_the_end_is_inference():
    code = """
block = ready(Bottleneck(32, 8))
x = input_of(block)

def launches():
    launched.clear()
    block(x)
    return len(launched)

with implementation("triton"):
    trained = [launches() for _ in range(3)]
    assert played(block) == 1
    block.requires_grad_(False)
    frozen = launches()
    with torch.no_grad():
        print(frozen == launches() < min(trained))
"""
    assert lines(TRAINING + code) == ["True"]


def test_what_is_no_one_node_is_looked_at_once():
    """A block of which PyTorch runs a unit, or without anything to train: its calls are not taken for repetitions."""
    code = """
block = ready(Bottleneck(16, 8, 1, projected(16, 32, 1))).train()
x, asked = input_of(block), []
constants = modules.eligible.constants
modules.eligible.constants = lambda *arguments: asked.append(arguments) or constants(*arguments)
block.relu = nn.Identity()
with implementation("triton"):
    for _ in range(3):
        block(x)
        print(len(asked), played(block))
    block.requires_grad_(False).eval()
    for _ in range(3):
        block(x)
        print(len(asked), played(block))
"""
    assert lines(TRAINING + code) == ["4 0"] * 3 + ["8 0"] * 3


def test_inference_after_a_change_is_that_of_the_changed_block():
    code = """
def loaded(block):
    block.load_state_dict({k: v + 1 for k, v in block.state_dict().items()})

def statistics(block):
    block.bn2.running_var.mul_(4)

def contiguous(block):
    block.to(memory_format=torch.contiguous_format)

def filled(block):
    block.bn1.eps = torch.tensor(0.25)
    for _ in range(3):
        block(torch.zeros(1, 16, 8, 8).to(memory_format=torch.channels_last))
    block.bn1.eps.fill_(0.5)

changes = [
    in_place, swapped, new_parameter, loaded, statistics, eps, dilated, biased, half, activated, gapped, contiguous,
    without, negative, filled,
]
for change in changes:
    block = ready(Bottleneck(16, 8, 1, projected(16, 32, 1)))
    x = input_of(block)
    with torch.no_grad(), implementation("triton"):
        want = directly(block, x)
        assert all(torch.equal(restored(block, x), want) for _ in range(3)) and played(block) == 1
        change(block)
        x = x.to(block.conv1.weight.dtype)
        now = directly(block, x)
        print(change.__name__, all(torch.equal(restored(block, x), now) for _ in range(4)), torch.equal(now, want))
"""
    changed = ["in_place", "swapped", "new_parameter", "loaded", "statistics", "eps", "dilated", "biased", "half"]
    changed += ["activated", "gapped", "contiguous", "without", "negative", "filled"]
    found = lines(INFERENCE + CHANGES + code)
    assert [line.split()[:2] for line in found] == [[name, "True"] for name in changed]
    assert [line.split()[0] for line in found if line.endswith(" True")] == ["contiguous"]


def test_inference_after_a_change_of_a_frozen_norm():
    code = """
def in_place(block):
    block.bn1.weight.add_(1)

def swapped(block):
    block.bn2.bias.data = block.bn2.bias.data * 2

def new_buffer(block):
    block.bn1.running_mean = block.bn1.running_mean + 1

def moved(block):
    for name, buffer in block.bn3._buffers.items():
        block.bn3._buffers[name] = buffer.clone()

def loaded(block):
    block.load_state_dict({k: v + 1 for k, v in block.state_dict().items()})

def statistics(block):
    block.downsample[1].running_var.mul_(4)

def eps(block):
    block.bn2.eps = 0.5

def half(block):
    block.half()

def gapped(block):
    block.bn1.weight = torch.randn(2 * len(block.bn1.weight))[::2]

def trainable(block):
    block.bn1.weight = nn.Parameter(block.bn1.weight + 1)

def exchanged(block):
    block.bn2 = ready(nn.BatchNorm2d(8))

changes = [in_place, swapped, new_buffer, moved, loaded, statistics, eps, half, gapped, trainable, exchanged]
for norm in (FrozenBatchNorm2d, partial(FrozenBatchNormAct2d, apply_act=False)):
    for change in changes:
        block = ready(bottleneck(norm))
        x = input_of(block)
        with torch.no_grad(), implementation("triton"):
            want = directly(block, x)
            assert all(torch.equal(restored(block, x), want) for _ in range(3)) and played(block) == 1
            change(block)
            x = x.to(block.conv1.weight.dtype)
            now = directly(block, x)
            print(change.__name__, all(torch.equal(restored(block, x), now) for _ in range(4)), torch.equal(now, want))
"""
    changed = ["in_place", "swapped", "new_buffer", "moved", "loaded", "statistics", "eps", "half", "gapped"]
    changed += ["trainable", "exchanged"]
    assert lines(INFERENCE + code) == [f"{name} True {name == 'moved'}" for name in changed] * 2


STAGE = """
class Stage(nn.Module):
    'Calls its blocks itself.'

    def __init__(self, blocks):
        super().__init__()
        self.layers = blocks

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x

def stage(kind):
    blocks = [Bottleneck(32, 16, 2, projected(32, 64, 2)), *(Bottleneck(64, 16) for _ in range(3))]
    made = nn.Sequential(*blocks) if kind == "sequence" else Stage(nn.ModuleList(blocks))
    return fuse(nn.Sequential(ready(made).bfloat16()))[0], blocks

def repeated(block):
    x = torch.randn(2, 32, 8, 8).to(torch.bfloat16, memory_format=torch.channels_last)
    want = directly(block, x)
    launched.clear()
    results = [restored(block, x) for _ in range(4)]
    names = list(map(name, launched))
    once = len(names) // 4
    return all(torch.equal(want, z) for z in results) and names == names[:once] * 4, once
"""


@pytest.mark.parametrize("kind", ["sequence", "stage"])
def test_blocks_that_share_launches_are_repeated_at_once(kind):
    code = f"""
def changed(block):
    block.conv2.weight.data = block.conv2.weight.data * 2

def hooked(block):
    block.register_forward_hook(lambda module, args, z: None)

def training(block):
    block.bn1.train()

for change in (None, changed, hooked, training):
    block, blocks = stage({kind!r})
    with torch.no_grad(), implementation("triton"):
        if change is not None:
            repeated(block)
            change(blocks[1])
        before = played(block)
        print(*repeated(block), played(block) - before)
"""
    # With onlookers, or statistics of a batch, blocks are apart.
    assert lines(INFERENCE + STAGE + code) == ["True 17 1", "True 17 0", "True 16 0", "True 20 0"]


def test_inference_that_is_not_to_be_repeated():
    code = """
block = ready(Bottleneck(16, 8, 1, projected(16, 32, 1)))
x = input_of(block)
seen = []
with torch.no_grad(), implementation("triton"):
    for _ in range(3):
        block(x)
    assert played(block) == 1
    calls = []
    with observe(calls.append):
        block(x)
    with trace() as traced:
        block(x)
    print(len(calls), sum(not launch.name.startswith("aten.") for launch in traced.launches))
    hook = block.bn2.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        block(x)
    hook.remove()
    print(len(seen))
    block.bn2.train()
    launched.clear()
    for _ in range(3):
        block(x)
    print(len(launched) > 3 * 4, played(block))
    block.eval()
    with torch.enable_grad():
        print(block(x).requires_grad)
    print(played(block), [played(copy.deepcopy(block))])
    with implementation("eager"):
        block(x)
        launched.clear()
        block(x)
    print(len(launched))
    block.conv1.stride = (1.0, 1.0)  # equal to what it was, and nothing that PyTorch takes
    try:
        block(x)
    except TypeError as error:
        print(type(error).__name__)
    block.conv1.stride = (1, 1)
    for n in range(3, 3 + 2 * replay.KEPT_CALLS):
        block(input_of(block, n))
    print(played(block), len(replay._repeated[block]) <= replay.KEPT_CALLS)
    owner = block
    del block, owner
print(len(replay._repeated))
"""
    assert lines(INFERENCE + code) == ["4 4", "3", "True 1", "True", "1 [0]", "0", "TypeError", "0 True", "0"]


DOUBLED = """
from resnet_fused import convert

class Doubled(torchvision.models.resnet.Bottleneck):
    'More than a block: the units of its branch, and its last one with the projection.'

    def forward(self, x):
        out = 2 * self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))

def units(stride=1, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    made = Doubled(16, 8, stride, projected(16, 32, stride, norm=norm), norm_layer=norm)
    for added in (made.bn3, made.downsample[1]):
        added.act = nn.Identity()  # where it has one
    block = fuse(nn.Sequential(ready(made)))[0]
    assert isinstance(block, convert.ConvertedUnits)
    return block

def played(block):
    kept = [tape for conv in block.modules() for tape in replay._repeated.get(conv, {}).values()]
    return sum(hasattr(tape, "play") for tape in kept)
"""
UNITS = INFERENCE + DOUBLED


def test_units_are_repeated_to_the_bit():
    code = """
norms = nn.BatchNorm2d, FrozenBatchNorm2d, FrozenBatchNormAct2d, BatchNormAct2d
for stride, norm in ((1, norms[0]), *((2, norm) for norm in norms)):
    for road in ("triton", "mixed"):
        for dtype in (None, torch.bfloat16):
            block = units(stride, norm)
            x = input_of(block)
            with implementation(road), torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
                want = directly(block, x)
                launched.clear()
                results = [restored(block, x) for _ in range(4)]
            names = list(map(name, launched))
            once = len(names) // 4
            print(
                all(torch.equal(want, z) and z.stride() == want.stride() and z.dtype == want.dtype for z in results),
                names == names[:once] * 4 and once > 0,
                played(block),
            )
"""
    # A ReLU behind one in the norm ends a piece.
    assert lines(UNITS + code) == ["True True 2"] * 12 + ["True True 3"] * 8


def test_training_steps_of_units_are_repeated_to_the_bit():
    code = """
for stride in (1, 2):
    for road in ("triton", "mixed"):
        for dtype in (None, torch.bfloat16):
            block = units(stride).train()
            x = input_of(block).to(dtype)
            with implementation(road), torch.autocast("cpu", dtype, enabled=dtype is not None):
                want = directly(block, x)
                results = [restored(block, x) for _ in range(4)]
            print(all(same(want, found) for found in results), played(block))
"""
    assert lines(TRAINING + DOUBLED + code) == ["True 2"] * 8


def test_units_after_a_change_are_those_of_the_changed_module():
    code = """
def in_place(block):
    block.conv2.weight.add_(1)

def swapped(block):
    block.conv3.weight.data = block.conv3.weight.data * 2

def statistics(block):
    block.bn2.running_var.mul_(4)

def eps(block):
    block.downsample[1].eps = 0.5

def dilated(block):
    block.conv2.padding = block.conv2.dilation = (2, 2)

def biased(block):
    block.conv1.bias = nn.Parameter(torch.ones(block.conv1.out_channels))

def half(block):
    block.half()

def exchanged(block):
    block.bn3 = ready(nn.BatchNorm2d(32, eps=0.5))

def hooked(block):
    block.bn2.register_forward_hook(lambda module, inputs, z: 2 * z)

def activated(block):
    block.relu = nn.SiLU()

def training(block):
    block.bn2.train()

changes = [
    in_place, swapped, statistics, eps, dilated, biased, half, exchanged, hooked, activated, training,
]
for change in changes:
    block = units()
    x = input_of(block)
    with torch.no_grad(), implementation("triton"):
        want = directly(block, x)
        assert all(torch.equal(restored(block, x), want) for _ in range(3)) and played(block) == 2
        change(block)
        x = x.to(block.conv1.weight.dtype)
        now = directly(block, x)
        print(change.__name__, all(torch.equal(restored(block, x), now) for _ in range(4)), torch.equal(now, want))
"""
    changed = ["in_place", "swapped", "statistics", "eps", "dilated", "biased", "half", "exchanged", "hooked"]
    changed += ["activated", "training"]
    assert lines(UNITS + code) == [f"{name} True False" for name in changed]


def test_units_after_a_change_of_the_activation_in_a_norm():
    code = """
def activated(block):
    block.bn2.act = nn.SiLU()

def hooked(block):
    block.bn2.act.register_forward_hook(lambda module, inputs, z: 2 * z)

def dropped(block):
    block.bn2.drop = nn.Threshold(0.5, 0.25)

def doubled(block):
    block.bn2.forward = lambda x: 2 * type(block.bn2).forward(block.bn2, x)

for norm in (FrozenBatchNormAct2d, BatchNormAct2d):
    for change in (activated, hooked, dropped, doubled):
        block = units(norm=norm)
        x = input_of(block)
        with torch.no_grad(), implementation("triton"):
            want = directly(block, x)
            assert all(torch.equal(restored(block, x), want) for _ in range(3)) and played(block) == 3
            change(block)
            now = directly(block, x)
            print(change.__name__, all(torch.equal(restored(block, x), now) for _ in range(4)), torch.equal(now, want))
"""
    changed = ["activated", "hooked", "dropped", "doubled"]
    assert lines(UNITS + code) == [f"{name} True False" for name in changed] * 2


def test_units_that_are_not_to_be_repeated():
    code = """
block = units()
x = input_of(block)
with torch.no_grad(), implementation("triton"):
    for _ in range(3):
        block(x)
    assert played(block) == 2
    with torch.enable_grad():
        print(block(x).requires_grad)
    with implementation("eager"):
        block(x)
        launched.clear()
        block(x)
    print(len(launched))
    calls = []
    with observe(calls.append):
        block(x)
    with trace() as traced:
        block(x)
    print(len(calls), sum(not launch.name.startswith("aten.") for launch in traced.launches))
    print(played(block), played(copy.deepcopy(block)))
del block
print(len(replay._repeated))
"""
    assert lines(UNITS + code) == ["True", "0", "4 4", "4 0", "0"]
