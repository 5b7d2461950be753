"""The constants of the plan's model: measured by a clock that knows them, kept with the table, and used by the plan."""

from __future__ import annotations

import io
import json
import logging
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torchvision

from resnet_fused import explain, fuse
from resnet_fused.commands import tune_constants
from resnet_fused.commands.tune import Failure, Runner, keep_constants
from resnet_fused.commands.tune_worker import serve
from resnet_fused.engine.trace import trace
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import dry_run
from resnet_fused.plan import cache, roofline, tuned
from resnet_fused.plan.constants import ASSUMED, HOSTED, Constants
from resnet_fused.plan.decide import decide, waited
from resnet_fused.plan.problem import Problem, Tiles
from resnet_fused.plan.tuned import Entry, Table

pytestmark = pytest.mark.usefixtures("own_cache")

GPU = "NVIDIA H100 80GB HBM3"
H100 = gpu_of(90, GPU)
UNIT = Problem(
    *(32, 56, 56, 64, 64, 3, 3, (1, 1), (1, 1), (1, 1), 1, torch.bfloat16, False, False, 90, "inference", False, GPU)
)
MEASURED = Constants(
    memory_of_peak=0.8,
    tensor_of_peak={"bfloat16": 0.7, "float16": 0.71, "tf32": 0.65, "float32": 0.95},
    cudnn_of_peak=0.9,
    cudnn_by_width={64: 0.4, 128: 0.6, 256: 0.9},
    launch_seconds=1e-6,
    host_seconds=dict(zip(HOSTED, (30e-6, 50e-6, 60e-6, 100e-6, 200e-6, 150e-6), strict=True)),
)


class SimulatedClock:
    """A GPU whose every launch takes as long as its bytes or its operations, and a gap; nothing is computed.

    Convolutions of fewer output channels are slower: by ``narrow``.
    """

    device = torch.device("meta")
    bandwidth, gap, host = 3e12, 1.5e-6, 7e-6
    rates: ClassVar = {torch.bfloat16: 8e14, torch.float16: 7e14, torch.float32: 6e13}
    narrow: ClassVar = {64: 0.4, 128: 0.5, 256: 0.8}
    tf32 = 4e14

    def __init__(self) -> None:
        self.calls = 0

    def prepare(self, work):
        return work

    def seconds(self, work) -> float:
        self.calls += 1
        with trace() as seen:
            result = work()
        total = 0.0
        for launch in seen.launches:
            rate = self.rates[result.dtype] if launch.flops else 1.0
            if launch.flops and torch.backends.cuda.matmul.fp32_precision == "tf32":
                rate = self.tf32
            if launch.name == "aten.convolution":
                rate *= self.narrow[result.shape[1]]
            total += self.gap
            total += max((launch.bytes_read + launch.bytes_written) / self.bandwidth, launch.flops / rate)
        # One call in three is disturbed: a median is not.
        return 10 * total if self.calls % 3 == 0 else total

    def host_seconds(self, work) -> float:
        with dry_run(90), trace() as seen:
            work()
        return self.host * len(seen.launches)


def test_they_are_measured_whichever_setting_of_tf32_was_used():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            conv.fp32_precision = precision
            assert tune_constants.measure(H100, SimulatedClock()).cudnn_by_width
            assert not torch.backends.cudnn.benchmark
    finally:
        conv.fp32_precision = before


def test_what_a_gpu_is_made_of_is_measured():
    clock = SimulatedClock()
    before = torch.backends.cuda.matmul.fp32_precision
    found = tune_constants.measure(H100, clock)
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert found.memory_of_peak == pytest.approx(3e12 / 3350e9, rel=0.02)
    peaks = {
        "bfloat16": 8e14 / 989.4e12,
        "float16": 7e14 / 989.4e12,
        "tf32": 4e14 / 494.7e12,
        "float32": 6e13 / 66.9e12,
    }
    assert found.tensor_of_peak == pytest.approx(peaks, rel=0.01)
    assert found.cudnn_by_width == pytest.approx({64: 0.4, 128: 0.5, 256: 0.8}, rel=0.02)
    assert found.cudnn_of_peak == found.cudnn_by_width[256]
    assert found.launch_seconds == pytest.approx(1.5e-6, rel=0.02)
    launches = {"fused inference": 1, "mixed inference": 2, "eager inference": 3}
    launches |= {"fused training": 7, "mixed training": 8, "eager training": 7}
    assert found.host_seconds == pytest.approx({way: 7e-6 * n for way, n in launches.items()})
    assert clock.calls < 100, "in under a minute"


def answers(request: dict, clock) -> dict:
    out = io.StringIO()
    serve([json.dumps(request)], out, lambda problem: pytest.fail("no problem is needed"), clock)
    return json.loads(out.getvalue())


def test_the_worker_measures_them():
    found = answers({"constants": [90, GPU]}, SimulatedClock())["constants"]
    assert Constants.from_dict(found) == tune_constants.measure(H100, SimulatedClock())


def test_without_a_gpu_the_worker_says_so():
    found = answers({"constants": [90, GPU]}, None)
    assert "constants are measured on a CUDA GPU, and there is none here" in found["error"]


def child(answer: object) -> Runner:
    """One whose process answers its first request so."""
    return Runner([sys.executable, "-c", f"input(); print({json.dumps(answer)!r}, flush=True); input()"], timeout=60.0)


def test_they_are_kept_beside_what_was_measured_and_measured_once():
    entry = Entry(UNIT, "mixed", Tiles(), 1e-4, 0.0, "measured")
    tuned.save(Table(GPU, (entry,)))
    runner = child({"constants": MEASURED.to_dict()})
    try:
        assert "were measured." in keep_constants(90, GPU, runner)
    finally:
        runner.close()
    table = tuned.load(GPU)
    assert (table.entries, table.constants) == ((entry,), MEASURED)
    assert "were measured before" in keep_constants(90, GPU, None)
    assert tuned.add(GPU, replace(entry, seconds=2e-4)).constants == MEASURED, "another entry leaves them"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"error": "RuntimeError: CUDA error", "fatal": True}, "CUDA error"),
        ({"constants": MEASURED.to_dict() | {"memory_of_peak": -1.0}}, "memory_of_peak must be a number above 0"),
    ],
)
def test_where_they_cannot_be_measured_they_stay_assumed(answer, reason):
    runner = child(answer)
    try:
        told = keep_constants(90, GPU, runner)
    finally:
        runner.close()
    assert "stay assumed" in told
    assert reason in told
    assert tuned.load(GPU) is None


def put(name: str, value: object):
    return lambda content: content | {name: value}


BAD = {
    "a list": (lambda content: [1.0], "its constants must be"),
    "one too few": (lambda content: {k: v for k, v in content.items() if k != "launch_seconds"}, "must be"),
    "one too many": (put("colour", 1.0), "must be"),
    "none": (put("memory_of_peak", 0.0), "memory_of_peak must be a number above 0"),
    "no number": (put("memory_of_peak", float("nan")), "memory_of_peak"),
    "true": (put("launch_seconds", True), "launch_seconds must be a number"),
    "words": (put("launch_seconds", "2e-6"), "launch_seconds must be a number"),
    "a launch of minutes": (put("launch_seconds", 60.0), "launch_seconds must be .* at most 1"),
    "without end": (put("triton_of_cudnn", float("inf")), "triton_of_cudnn"),
    "another format": (put("tensor_of_peak", {"int8": 0.5}), "tensor_of_peak must have bfloat16"),
    "no formats": (put("tensor_of_peak", []), "tensor_of_peak must have"),
    "no host": (put("host_seconds", {}), "host_seconds must have fused"),
    "a negative host": (put("host_seconds", dict.fromkeys(HOSTED, -1e-6)), "host_seconds must be"),
    "the host of inference alone": (put("host_seconds", dict.fromkeys(HOSTED[:3], 1e-6)), "host_seconds must have"),
    "one width": (put("cudnn_by_width", {"64": 0.5}), "cudnn_by_width must have 64, 128, 256"),
    "401 digits": (put("memory_of_peak", 10**400), "."),
}


@pytest.mark.parametrize("case", BAD)
def test_a_table_with_bad_constants_is_refused(case, caplog):
    change, message = BAD[case]
    content = json.loads(tuned.render(Table(GPU, constants=MEASURED)))
    text = json.dumps(content | {"constants": change(content["constants"])})
    with pytest.raises(ValueError, match=message):
        tuned.parse(text, GPU)
    cache.write_whole(tuned.path(GPU), text)
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        assert tuned.load(GPU) is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("constants", [MEASURED, ASSUMED, None])
def test_what_is_written_is_read(constants):
    assert tuned.parse(tuned.render(Table(GPU, constants=constants)), GPU).constants == constants


def test_units_that_were_not_tuned_are_predicted_with_them():
    table = Table(GPU, constants=MEASURED)
    assumed, measured = decide(UNIT), decide(UNIT, table=table)
    assert measured.source == "model"
    assert measured.alternatives == roofline.compare(UNIT, measured.tiles, MEASURED)
    assert measured.alternatives != assumed.alternatives
    narrow = roofline.predict(UNIT, "mixed", Tiles(), MEASURED)[0]
    at_peak = 2 * UNIT.m * 64 * 9 * 64 / (989.4e12 * 0.7 * 0.4)
    assert narrow.seconds == pytest.approx(at_peak + roofline.CUDNN_SECONDS + 1e-6, rel=0.01)
    stream = roofline.predict(UNIT, "mixed", Tiles(), MEASURED)[1]
    slower = roofline.STREAMS["batch_norm_apply"][1]
    assert stream.seconds == pytest.approx(slower * 2 * UNIT.m * 64 * 2 / (3350e9 * 0.8) + 1e-6)
    small = replace(UNIT, n=1)
    assert waited(small, "eager", 1e-6, Tiles(), MEASURED) == 60e-6
    slow = replace(MEASURED, host_seconds=MEASURED.host_seconds | {"fused inference": 90e-6, "mixed inference": 20e-6})
    assert decide(small, table=Table(GPU, constants=slow)).implementation == "mixed"
    assert decide(small).implementation != "mixed"


@pytest.mark.parametrize(("width", "share"), [(16, 0.4), (64, 0.4), (65, 0.6), (256, 0.9), (2048, 0.9)])
def test_a_width_counts_for_those_up_to_it(width, share):
    assert MEASURED.cudnn(width) == share
    assert ASSUMED.cudnn(width) is None


def test_explain_says_by_what_it_predicts(monkeypatch):
    model = fuse(torchvision.models.resnet18().bfloat16().to(memory_format=torch.channels_last))
    x = torch.zeros(512, 3, 64, 64).bfloat16().to(memory_format=torch.channels_last)
    monkeypatch.setattr(sys.modules["resnet_fused.explain"], "present_gpu", lambda arch: GPU)
    before = explain(model, x, arch=90, training=False)
    assert before.constants is None
    assert "Predicted with assumed efficiencies" in str(before)
    assumed = before.totals()
    tuned.save(Table(GPU, constants=replace(MEASURED, memory_of_peak=0.2, host_seconds=ASSUMED.host_seconds)))
    after = explain(model, x, arch=90, training=False)
    assert after.constants.memory_of_peak == 0.2
    assert "Predicted with what tune measured of this GPU: 20% of the bandwidth" in str(after)
    measured = after.totals()
    for slow, fast in zip(measured[:4], assumed[:4], strict=True):
        assert slow.seconds > fast.seconds
    assert measured[4] == assumed[4], "the roof is of nominal peaks"


def test_a_runner_that_answers_something_else_fails():
    runner = child({"constants": [1, 2]})
    try:
        with pytest.raises(Failure, match="its constants must be"):
            runner.constants(90, GPU)
    finally:
        runner.close()
