"""The self-test: what it covers, what it notices, what it leaves behind, and how `fuse` points to it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import resnet_fused
from resnet_fused import BasicBlock, fuse
from resnet_fused.__main__ import main
from resnet_fused.commands import check, check_cases
from resnet_fused.engine import eligible, tolerance
from resnet_fused.engine.tolerance import error_ratio
from resnet_fused.kernels import (
    batch_norm,
    chain_box,
    chain_forward,
    conv_box,
    conv_dgrad,
    conv_forward,
    conv_pool,
    conv_wgrad,
    dgrad_box,
    norm_backward,
    norm_pool,
    squeeze,
)
from resnet_fused.kernels.launch import Call, dry_run, observe
from resnet_fused.plan import checked
from resnet_fused.plan.cache import digest
from tests.kernels.model_kernels import merges, meta_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
STACK = {
    "gpu": "Fake H100",
    "driver": "999.1",
    "torch": "2.99",
    "triton": "3.99",
    "resnet_fused": "9.9",
    "kernels": "9e",
}
H100 = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Notes go to a directory of the test's own."""
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def few(monkeypatch):
    """Two quick cases of two kernels."""
    wanted = {("conv_dgrad", "mask"), ("batch_norm_apply", "residual")}
    every = check.cases(DEVICE.type)
    quick = {(case.kernel, case.name.partition("; ")[2]): case for case in every if case.number_format == "float32"}
    monkeypatch.setattr(check, "cases", lambda _: [quick[key] for key in sorted(wanted)])


def statuses(report: check.CheckReport) -> dict[str, tuple[str, str]]:
    return {row.kernel: (row.status, row.detail) for row in report.rows if row.status != "skipped"}


def test_everything_passes_and_is_shown(capsys):
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    skipped = set() if ON_GPU else {"tf32", "bfloat16"}
    run = [case for case in check.cases(DEVICE.type) if case.number_format not in skipped]
    shown = {"error / allowed", *(text for case in run for text in (case.kernel, case.name, case.number_format))}
    assert {text for text in shown if text not in out} == set()
    assert f"\n{len(run)} passed, 0 failed, {len(skipped)} skipped on " in out
    if not ON_GPU:
        assert "skipped: the interpreter cannot compute in it" in out
        assert "skipped: the interpreter multiplies in fp32" in out


def test_every_kernel_is_checked_in_every_number_format():
    every = check.cases("cuda")
    convolutions = {
        "conv_forward",
        "conv_forward, boxes",
        "conv_forward, gate",
        "conv_forward, split",
        "conv_forward, wide",
        "conv_forward_moments",
        "conv_pool",
        "chain_forward",
        "conv_dgrad",
        "conv_dgrad, boxes",
        "conv_wgrad",
        "squeeze",
        "block (triton)",
        "block (mixed)",
    }
    passes = ("stats", "apply", "pool", "reduce", "coefs", "backward")
    wanted = set(product(convolutions, check_cases.FORMATS))
    passes = *(f"batch_norm_{name}" for name in passes), "gate_gradient"
    wanted |= set(product(passes, {*check_cases.FORMATS} - {"tf32"}))
    assert {(case.kernel, case.number_format) for case in every} == wanted
    keys = [(case.kernel, case.name, case.number_format) for case in every]
    assert len(keys) == len(set(keys))
    kernels = {call.kernel.__name__ for call in launched(90).values()}
    norms = batch_norm, norm_backward, norm_pool, squeeze
    modules = *norms, chain_box, chain_forward, conv_box, conv_forward, conv_pool, conv_dgrad, dgrad_box, conv_wgrad
    assert kernels == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def test_json_is_one_document(few, capsys):
    assert main(["check", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["failed"] is False
    assert document["stack"].keys() == STACK.keys()
    assert document["stack"]["torch"] == torch.__version__
    passed = [row for row in document["rows"] if row["status"] == "passed"]
    assert [row["kernel"] for row in passed] == ["batch_norm_apply", "conv_dgrad"]
    assert all(0 <= row["ratio"] <= 1 and row["dtype"] == "float32" for row in passed)
    assert len(document["rows"]) == (2 if ON_GPU else 4)


def broken(launcher, change):
    """``launcher``, with ``change`` applied to the first of its results."""

    def call(*arguments, **options):
        first, *others = launcher(*arguments, **options)
        change(first)
        return (first, *others)

    return call


def test_a_wrong_number_fails_and_is_named(few, capsys, monkeypatch):
    monkeypatch.setattr(check_cases, "conv_dgrad", broken(check_cases.conv_dgrad, lambda dx: dx[0, 0, 0, 0].add_(1e-2)))
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "1 passed, 1 failed" in out
    (line,) = [line for line in out.splitlines() if "failed: dx" in line]
    assert "conv_dgrad" in line
    assert "dx is wrong" in line


def test_nan_fails_and_leaves_the_json_valid(few, capsys, monkeypatch):
    monkeypatch.setattr(
        check_cases, "conv_dgrad", broken(check_cases.conv_dgrad, lambda dx: dx[0, 0, 0, 0].fill_(float("nan")))
    )
    assert main(["check", "--json"]) == 1
    document = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (row,) = [row for row in document["rows"] if row["status"] == "failed"]
    assert (row["kernel"], row["ratio"], row["detail"]) == ("conv_dgrad", None, "dx is wrong")


def test_a_kernel_that_raises_fails_alone(few, capsys, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(check_cases, "batch_norm_apply", fails)
    assert main(["check"]) == 1
    report = check.run(DEVICE)
    assert statuses(report)["batch_norm_apply"] == ("failed", "RuntimeError: no kernel image is available")
    assert statuses(report)["conv_dgrad"] == ("passed", "")
    assert "1 passed, 1 failed" in capsys.readouterr().out


def test_runs_that_differ_fail(few, monkeypatch):
    """The last bits of one element, well within the tolerance."""
    flips = iter(range(1000))

    def flip(dx: Tensor) -> None:
        dx[0, 0, 0, 0] += next(flips) % 2 * 2**-20

    monkeypatch.setattr(check_cases, "conv_dgrad", broken(check_cases.conv_dgrad, flip))
    report = check.run(DEVICE)
    assert statuses(report) == {
        "conv_dgrad": ("failed", "two runs differ in dx"),
        "batch_norm_apply": ("passed", ""),
    }


def test_a_block_that_runs_eager_proves_nothing(monkeypatch):
    (case,) = [c for c in check.cases(DEVICE.type) if (c.kernel, c.name) == ("block (triton)", "basic; inference")][:1]
    monkeypatch.setattr(check, "cases", lambda _: [case])
    monkeypatch.setattr(eligible, "why_not_here", lambda x, request: "of a mistake")
    (row,) = [row for row in check.run(DEVICE).rows if row.status != "skipped"]
    assert (row.status, row.detail) == ("failed", "no kernel was launched")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--device", "abacus"], "no such device"), (["--device", "meta"], "run on cpu and cuda")],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(["check", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


# The cases for a GPU, as far as they can be judged without one.


def launched(arch: int) -> dict:
    """What the cases for a GPU of this architecture launch, by what is compiled anew for."""
    calls: dict = {}
    with dry_run(arch), observe(lambda call: calls.setdefault(compiled_code(call), call)):
        for case in check.cases("cuda"):
            with tolerance.products(case.number_format == "tf32"):
                case.comparison(torch.device("meta")).ours()
    return calls


def compiled_code(call: Call) -> tuple:
    """Kernel, tile and number format."""
    blocks = tuple(getattr(call.config, f"block_{side}") for side in "mnk")
    tensors = [t for t in (getattr(value, "base", value) for value in call.arguments.values()) if isinstance(t, Tensor)]
    narrowest = min((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize)
    form = call.arguments.get("form")
    flags = tuple(getattr(form, name, None) for name in ("PRECISION", "R", "FLAT"))
    return call.kernel.__name__, blocks, narrowest, (*flags, merges(form))


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_a_gpu_meets_the_tiles_of_real_networks(arch):
    ours, theirs = launched(arch), set()
    for number_format, model in product(("tf32", "bfloat16"), ("resnet18", "resnet50", "resnext50_32x4d")):
        dtype = check_cases.FORMATS[number_format]
        network = meta_model(model, dtype).train()
        x = torch.empty(64, 3, 224, 224, dtype=dtype, device="meta")
        see = observe(lambda call: theirs.add(compiled_code(call)))
        with tolerance.products(number_format == "tf32"), resnet_fused.implementation("triton"), dry_run(arch), see:
            network(x).sum().backward()
            network.zero_grad()
            with torch.no_grad():
                network.eval()(x)
    assert len(theirs) > 20
    assert not theirs - ours.keys()


class Watch(TorchFunctionMode):
    """Notes the smallest magnitude that goes into a ReLU."""

    smallest = float("inf")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.relu:
            self.smallest = min(self.smallest, args[0].abs().min().item())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device_type", "margin"), [("cpu", 0.05), ("cuda", 0.1)])
def test_no_block_has_an_input_of_a_relu_within_rounding_of_zero(device_type, margin):
    """The margin is many roundings of values near one: in fp16 in the interpreter, in bfloat16 on a GPU."""
    every = [case for case in check.cases(device_type) if case.kernel == "block (mixed)" and "training" in case.name]
    blocks = [case for case in every if case.number_format == "float32"]
    assert len(blocks) == len(check_cases.BLOCKS)
    for case in blocks:
        comparison = case.comparison(DEVICE)
        with Watch() as watch:
            comparison.expected(torch.float64, {})
        assert margin < watch.smallest < 1, case.name


def test_eager_in_tf32_is_convolution_of_cut_factors():
    x, w = torch.randn(2, 8, 5, 4), torch.randn(8, 8, 3, 3)
    cut = (torch.tensor([1 + 2**-10, 1 + 2**-11, -1 - 2**-11, 3.0]), torch.tensor([1 + 2**-10, 1.0, -1.0, 3.0]))
    assert torch.equal(tolerance.cut(cut[0]), cut[1])

    def gradients(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = F.conv2d(x, w, padding=1)
        return y.detach(), *torch.autograd.grad(y, (x, w), dy)

    dy = torch.randn(2, 8, 5, 4)
    with tolerance._Tf32Factors():
        ours = gradients(x, w, dy)
    theirs = gradients(tolerance.cut(x), tolerance.cut(w), tolerance.cut(dy))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    plain = gradients(x, w, dy)
    assert all(1e-5 < (a - b).abs().max() / b.abs().max() < 1e-2 for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("tf32", [False, True])
def test_eager_in_tf32_errs_as_pytorch_does_or_as_cut_factors_do(tf32):
    """By the larger error of the two: which of them cuDNN computes is its own choice."""
    x, w = torch.randn(2, 8, 5, 4), torch.randn(8, 8, 3, 3)

    def expected(dtype: torch.dtype) -> dict[str, Tensor]:
        y = F.conv2d(x.to(dtype), w.to(dtype))
        rough = torch.backends.cudnn.conv.fp32_precision == "tf32"
        return {"cut": y, "PyTorch's": y.add(1.0) if rough else y}

    exact, eager = tolerance.references(expected, torch.float32, tf32)
    plain = F.conv2d(x, w)
    torch.testing.assert_close(exact, dict.fromkeys(exact, F.conv2d(x.double(), w.double())))
    wanted = (F.conv2d(tolerance.cut(x), tolerance.cut(w)), plain + 1.0) if tf32 else (plain, plain)
    assert all(torch.equal(got, y) for got, y in zip(eager.values(), wanted, strict=True))


AHEAD = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from resnet_fused.commands import check
from resnet_fused.kernels.launch import dry_run, observe

class H100:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(H100())
cases = [c for c in check.cases("cuda") if c.kernel in ("batch_norm_coefs", "batch_norm_backward")]
compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda **options: compiled.append(options["fn"].name)
labels = []
check._compile(cases, lambda items, label: labels.append((label, len(items))) or items)
ahead = len(compiled)
calls = []
with dry_run(90), observe(calls.append):
    for case in cases:
        case.comparison(torch.device("meta")).ours()
for call in calls:
    call.kernel.warmup(grid=call.grid, **call.arguments, **call.config.options)
print(ahead, len(compiled), len(calls), labels)
"""


def test_what_is_compiled_ahead_is_what_is_launched(tmp_path):
    """Under a driver that only names a GPU: a launch later on finds its kernel compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", AHEAD], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ahead, after, calls, labels = done.stdout.split(maxsplit=3)
    assert 0 < int(ahead) == int(after) < int(calls)
    assert labels.strip() == f"[('compiling', {ahead})]"


# The rule.


def test_error_ratio_is_the_error_over_what_is_allowed():
    exact = torch.tensor([4.0, -1.0, 0.5]).double()
    eager, ours = exact.float() + torch.tensor([0, 0.125, 0]), exact.float() + torch.tensor([0.5, 0, 0])
    eps = torch.finfo(torch.float32).eps
    assert error_ratio(ours, eager, exact) == 0.5 / (2 * 0.125 + 4 * eps)
    assert error_ratio(ours, eager, exact, sums=1000) == 0.5 / (2 * 0.125 + 4 * (eps + 1000 * eps))
    assert error_ratio(ours.half(), exact.half(), exact) == 0.5 / (4 * torch.finfo(torch.float16).eps)
    assert error_ratio(exact.float(), eager, exact) == 0


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("ours", "eager", "exact", "right"),
    [
        ([1, NAN], [1, 2], [1, 2], False),
        ([1, INF], [1, 2], [1, 2], False),
        ([1, NAN], [1, NAN], [1, NAN], True),
        ([1, 2], [1, NAN], [1, NAN], False),
        ([1, 2], [1, NAN], [1, 2], False),
        ([1, 2], [1, INF], [1, 2], False),
        ([1, INF], [1, INF], [1, INF], True),
        ([1, -INF], [1, INF], [1, INF], False),
        ([1, INF], [1, INF], [1, 1e6], True),
        ([1, 60000], [1, INF], [1, 1e6], False),
        ([0, 0], [0, 0], [0, 0], True),
        ([0, 1e-7], [0, 0], [0, 0], False),
    ],
    ids=str,
)
def test_error_ratio_of_what_is_not_finite(ours, eager, exact, right):
    ratio = error_ratio(torch.tensor(ours).half(), torch.tensor(eager).half(), torch.tensor(exact).double())
    assert ratio == (0 if right else INF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ours=torch.zeros(3)), r"one shape; got \(3,\), \(2,\) and \(2,\)"),
        (dict(eager=torch.zeros(2).half()), r"one dtype.*got torch.float32, torch.float16"),
        (dict(exact=torch.zeros(2)), r"exact float64"),
        (dict.fromkeys(("ours", "eager", "exact"), torch.zeros(0)), r"an element at least"),
    ],
)
def test_error_ratio_refuses_what_does_not_compare(change, message):
    tensors = {"ours": torch.zeros(2), "eager": torch.zeros(2), "exact": torch.zeros(2).double()}
    with pytest.raises(ValueError, match=message):
        error_ratio(**{**tensors, **change})


# The note of what was checked.


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU that can be named, and no more."""
    monkeypatch.setattr(checked, "stack", lambda device: {**STACK})
    monkeypatch.setattr(checked, "_reminded", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: STACK["gpu"])


def test_a_stack_is_verified_once_it_was_noted(fake_gpu, cache, monkeypatch):
    assert not checked.verified(H100)
    assert checked.note(H100) == cache / "checked.json"
    assert checked.verified(H100)
    monkeypatch.setattr(checked, "stack", lambda device: {**STACK, "driver": "1000.0"})
    assert not checked.verified(H100), "another driver"
    checked.note(H100)
    checked.note(H100)
    assert len(json.loads((cache / "checked.json").read_text())) == 2
    monkeypatch.setattr(checked, "stack", lambda device: {**STACK})
    assert checked.verified(H100)
    assert {path.name for path in cache.iterdir()} == {"checked.json", ".lock"}


@pytest.mark.parametrize("content", [b"", b"{", b"[1, null]", b"{}", b"7", b"\xff\xfe\x00", b'[{"gpu": "Fake H100"}]'])
def test_a_corrupt_note_counts_as_none_and_is_replaced(fake_gpu, cache, content):
    cache.mkdir()
    (cache / "checked.json").write_bytes(content)
    assert not checked.verified(H100)
    checked.note(H100)
    assert checked.verified(H100)


def test_a_note_that_fails_leaves_the_old_one(fake_gpu, cache, monkeypatch):
    checked.note(H100)
    before = (cache / "checked.json").read_text()

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(checked, "stack", lambda device: {**STACK, "driver": "1000.0"})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        checked.note(H100)
    assert {path.name for path in cache.iterdir()} == {"checked.json", ".lock"}
    assert (cache / "checked.json").read_text() == before


@pytest.mark.skipif(ON_GPU, reason="with a GPU the names are those of that GPU")
def test_the_stack_of_the_cpu_names_no_gpu():
    assert checked.stack(torch.device("cpu")) == {
        "gpu": "",
        "driver": "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "resnet_fused": resnet_fused.__version__,
        "kernels": digest(Path(resnet_fused.kernels.__file__).parent),
    }


class Nvml:
    """NVIDIA's management library, as far as it is asked."""

    def __init__(self, status: int) -> None:
        self.status = status

    def nvmlInit_v2(self) -> int:
        return self.status

    def nvmlSystemGetDriverVersion(self, text, size: int) -> int:
        text.value = b"999.1"
        return 0


@pytest.mark.parametrize(("status", "version"), [(0, "999.1"), (9, "unknown"), (None, "unknown")])
def test_the_driver_is_what_nvml_says(status, version, monkeypatch):
    def load(name: str) -> Nvml:
        if status is None:
            raise OSError(f"{name}: cannot open shared object file")
        return Nvml(status)

    monkeypatch.setattr(checked.ctypes, "CDLL", load)
    assert checked._driver.__wrapped__() == version


def on_a_gpu(monkeypatch, status: str) -> None:
    """Let the command believe that it checked a GPU."""
    row = check.CheckRow("conv_forward", "1x1", "float32", 0.5, status)
    monkeypatch.setattr(check, "pick_device", lambda name: H100)
    monkeypatch.setattr(check, "run", lambda device, progress: check.CheckReport(device, STACK, (row,)))


def test_a_passed_check_of_a_gpu_is_noted(fake_gpu, cache, capsys, monkeypatch):
    on_a_gpu(monkeypatch, "failed")
    assert main(["check"]) == 1
    assert not checked.verified(H100)
    on_a_gpu(monkeypatch, "passed")
    assert main(["check"]) == 0
    assert checked.verified(H100)
    assert "1 passed, 0 failed, 0 skipped on Fake H100" in capsys.readouterr().out


def test_an_unwritable_directory_costs_one_line(fake_gpu, cache, capsys, monkeypatch):
    cache.write_text("a file where the directory should be")
    on_a_gpu(monkeypatch, "passed")
    assert main(["check", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["failed"] is False
    assert len(err.splitlines()) == 1
    assert str(cache) in err


def test_a_gpu_that_the_kernels_do_not_run_on_is_a_mistake(fake_gpu, capsys, monkeypatch):
    on_a_gpu(monkeypatch, "passed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert main(["check"]) == 2
    assert "compute capability 7.5: the kernels need 8.0" in capsys.readouterr().err


# What `fuse` says about it.


def reminders(caplog, device: str = "cuda:0") -> list[str]:
    """What is logged while a model that seems to lie on ``device`` is fused, twice."""
    model = nn.Sequential(BasicBlock(8, 8))
    model.parameters = lambda: iter([SimpleNamespace(device=torch.device(device))])
    caplog.clear()
    with caplog.at_level(logging.INFO, "resnet_fused"):
        fuse(model)
        fuse(model)
    return [record.getMessage() for record in caplog.records if record.name == "resnet_fused"]


def test_fuse_names_the_command_once_per_process(fake_gpu, caplog):
    (line,) = reminders(caplog)
    assert "Fake H100" in line
    assert "`python -m resnet_fused check`" in line
    assert len(line.splitlines()) == 1
    assert reminders(caplog) == []


@pytest.mark.parametrize("case", ["on the CPU", "checked before", "too old a GPU", "no GPU"])
def test_fuse_says_nothing_where_there_is_nothing_to_check(case, fake_gpu, caplog, monkeypatch):
    if case == "checked before":
        checked.note(H100)
    elif case == "too old a GPU":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    elif case == "no GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reminders(caplog, "cpu" if case == "on the CPU" else "cuda:0") == []


def test_the_setting_of_tf32_can_be_read_afterwards():
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    for allowed in (True, False):
        cudnn.allow_tf32 = allowed
        for inside in (True, False):
            with tolerance.products(inside):
                assert (cudnn.conv.fp32_precision == "tf32") is inside
            assert cudnn.allow_tf32 is allowed
    cudnn.allow_tf32 = before == "tf32"
