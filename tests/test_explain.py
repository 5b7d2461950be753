"""explain with a plan: for any GPU, without one, and without touching the model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from resnet_fused import PreActBottleneck, explain, fuse, implementation, optimize_for_inference
from resnet_fused.__main__ import main
from resnet_fused.engine.trace import trace
from resnet_fused.explain import Total
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import dry_run
from resnet_fused.plan import roofline, tuned
from resnet_fused.plan.constants import ASSUMED
from resnet_fused.plan.decide import Plan, best_tiles, decide
from resnet_fused.plan.problem import Problem, Tiles
from tests.plans import IN_CHAINS


def model() -> torch.nn.Module:
    return fuse(torchvision.models.resnet18().bfloat16())


def x() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, dtype=torch.bfloat16)


def test_a_plan_for_another_gpu_runs_nothing_and_leaves_the_model_alone():
    network = model().train()
    network.layer1.eval()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    with trace() as t:
        explanation = explain(network, x(), arch=90)
    assert all(launch.bytes_read + launch.bytes_written > 0 for launch in t.launches)
    assert not network.layer1.training
    assert network.layer2.training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())
    rows = explanation.to_dict()
    assert [len(row["units"]) for row in rows] == [1, 2, 2, 3, 2, 3, 2, 3, 2]
    assert (rows[0]["name"], rows[0]["block"]) == ("conv1", "ResNet, up to its pool")
    for row in rows:
        assert row["launches"] > 0
        for unit in row["units"]:
            predicted = unit["predicted_seconds"]
            assert set(predicted) == {"fused", "mixed", "eager"}
            waits = {way: (max(seconds, ASSUMED.host(way, "inference")), seconds) for way, seconds in predicted.items()}
            assert unit["implementation"] == min(waits, key=waits.get)
            assert unit["source"] == "model"
            assert "inference" in unit["unit"]
    text = str(explanation)
    assert all(f"{way}, predicted us" in text for way in ("fused", "mixed", "eager"))
    assert "predicted fastest" in text


def test_totals_are_those_of_all_units_and_of_what_is_around_them():
    network, images = (t.to(memory_format=torch.channels_last) for t in (model(), x()))
    explanation = explain(network, images, arch=90)
    planned, fused, mixed, eager, roof = explanation.totals()
    units, rest = explanation.problems, explanation.steps["as planned"].outside
    assert len(units) == 20
    assert {"aten.mean", "aten.addmm"} <= {launch.name for launch in rest}
    assert [t.images for t in (planned, fused, mixed, eager, roof)] == [4] * 5
    assert fused.launches == len(rest) + len(units) + 1, "the stem packs its image first"
    assert fused.bytes < mixed.bytes < eager.bytes
    # The host waits for a unit, with or without its ReLU; what a block saves by leaving one out is the GPU's.
    assert planned.seconds <= min(fused.seconds, mixed.seconds, 1.01 * eager.seconds)
    assert roof.seconds < planned.seconds
    assert roof.bytes <= fused.bytes
    waits = sum(
        min(max(s, ASSUMED.host(way, "inference")) for way, s in decide(problem).alternatives) for problem in units
    )
    assert planned.seconds - waits == pytest.approx(fused.seconds - len(units) * ASSUMED.host("fused", "inference"))


BESIDE = {
    (False, "fused"): {},
    (False, "mixed"): {},
    (False, "eager"): {"aten.relu_": -4},
    (True, "fused"): {"batch_norm_apply": 16, "batch_norm_reduce": 16},
    (True, "mixed"): {"batch_norm_apply": 16, "batch_norm_reduce": 16, "aten.add_": 16, "batch_norm_backward": -4},
    (True, "eager"): {"aten.add_": 16 + 53, "aten.add": 16, "aten.relu_": -4, "aten.threshold_backward": -4},
}
"""What ResNet-50's stem and 16 blocks launch more, or less, than their 53 units by themselves: additions and their
gradients, counters of batches, no ReLU behind the 4 projections, whose gradients by batch norm come with the branch's.
"""

BESIDE_A_LEAF = {
    "fused": {"batch_norm_apply": 1, "batch_norm_reduce": 1},
    "mixed": {"batch_norm_apply": 1, "batch_norm_reduce": 1},
    "eager": {"aten.add_": 1},
}
"""The same of a single unit that reads the image."""


@pytest.mark.parametrize(("training", "road"), BESIDE)
def test_units_are_predicted_as_they_are_launched(training, road):
    """To the launch, and to a few per cent of the bytes."""
    with torch.device("meta"):
        network = fuse(torchvision.models.resnet50()).to(torch.bfloat16, memory_format=torch.channels_last)
        # So many that the plan has no eager unit for the host's sake.
        images = torch.empty(512, 3, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    explanation = explain(network, images, arch=90, training=training)
    launched, predicted = Counter(), Counter()
    sizes, expected = Counter(), Counter()
    for launch in explanation.steps[road].inside:
        launched[launch.name] += 1
        sizes[launch.name] += launch.bytes_read + launch.bytes_written
    for problem in explanation.problems:
        # Where all are eager, no chain is cut in front of a unit.
        unit = replace(problem, prologue=problem.prologue and road != "eager")
        for launch in roofline.predict(unit, road, best_tiles(unit) if road == "fused" else Tiles()):
            predicted[launch.kernel] += 1
            expected[launch.kernel] += launch.bytes
    launched.subtract(predicted)
    assert {name: count for name, count in launched.items() if count} == BESIDE[training, road]
    for row in [row for row in explanation.rows if row.problems] if (training, road) == (True, "fused") else ():
        # The first unit's gradient of the input reads the shortcut's: of x, or every second pixel of it alone, which
        # is then all that the projection's writes.
        first, step = row.problems[0], max(problem.stride[0] for problem in row.problems)
        share = 1.0 if len(row.problems) == 3 else 2 / step**2 - 1
        tile = best_tiles(first).dgrad
        kernel = "conv_dgrad" if tile is None or tile.box is None else "dgrad_box"
        expected[kernel] += int(share * first.n * first.h * first.w * first.ci * 2)
    own = [name for name in expected if expected[name] > 0.01 * expected.total() and name not in BESIDE[training, road]]
    assert len(own) >= (1 if road == "fused" and not training else 2)
    for name in own:
        assert sizes[name] == pytest.approx(expected[name], rel=0.06), name


@pytest.mark.parametrize("arch", [80, 90])
def test_a_training_step_has_totals(arch):
    with torch.device("meta"):
        network = fuse(torchvision.models.resnet50()).to(torch.bfloat16, memory_format=torch.channels_last)
        images = torch.empty(128, 3, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    explanation = explain(network, images, arch=arch, training=True)
    planned, fused, mixed, eager, roof = explanation.totals()
    forward = explain(network, images, arch=arch).totals()
    for step, once in zip((planned, fused, mixed, eager, roof), forward, strict=True):
        assert 2 * once.seconds < step.seconds < 8 * once.seconds, step.road
        assert step.bytes > 2 * once.bytes, step.road
    assert roof.seconds < planned.seconds <= min(fused.seconds, mixed.seconds, eager.seconds)
    assert fused.bytes < planned.bytes <= mixed.bytes
    outside = Counter(launch.name for launch in explanation.steps["as planned"].outside)
    assert outside == Counter(launch.name for launch in explanation.steps["eager"].outside)
    assert not {"aten.convolution", "aten.max_pool2d_with_indices_backward"} & set(outside), "the stem's are inside"
    assert planned.launches == outside.total() + sum(len(row.launches) for row in explanation.rows if row.problems)


@pytest.mark.parametrize("road", ["fused", "mixed", "eager"])
def test_nobody_wants_the_gradient_of_the_image(road):
    """Of a first layer, what is predicted is what is launched; and so the totals of all."""
    network = fuse(nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(True))).bfloat16()
    images = torch.empty(64, 3, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    explanation = explain(network.to(memory_format=torch.channels_last), images, arch=90, training=True)
    (unit,), launched = explanation.problems, explanation.steps[road].inside
    launches = roofline.predict(unit, road, best_tiles(unit) if road == "fused" else Tiles(), leaf=True)
    beside = Counter(x.name for x in launched)
    beside.subtract(x.kernel for x in launches)
    assert {name: count for name, count in beside.items() if count} == BESIDE_A_LEAF[road]
    assert sum(x.flops for x in launches) == sum(x.flops for x in launched)
    assert roofline.compulsory(unit, leaf=True) < roofline.compulsory(unit)


@pytest.mark.parametrize("training", [False, True])
def test_units_of_a_pre_activation_block_count_once(training):
    """Whether it runs is asked beforehand, which plans them too."""
    network = nn.Sequential(PreActBottleneck(64, 128, 2), PreActBottleneck(128, 128)).bfloat16()
    images = torch.randn(4, 64, 14, 14, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    rows = explain(fuse(network), images, arch=90, training=training).to_dict()
    assert [len(row["units"]) for row in rows] == [4, 3]


def test_what_is_computed_again_takes_longer():
    """By its arithmetic at the least."""

    def step(memory: str) -> tuple[Total, int]:
        with torch.device("meta"):
            network = fuse(torchvision.models.resnet50(), memory=memory).bfloat16()
            found = explain(network, torch.empty(64, 3, 224, 224).bfloat16(), arch=90, training=True)
        return found.totals()[1], sum(launch.flops for launch in found.steps["fused"].inside)

    (kept, flops), (again, more) = step("default"), step("recompute")
    assert again.launches > kept.launches
    assert more > 1.05 * flops
    streamed = (again.bytes - kept.bytes) / (gpu_of(90).memory * 1e9 * ASSUMED.memory_of_peak)
    computed = (more - flops) / (gpu_of(90).tensor["bfloat16"] * 1e12 * ASSUMED.cudnn_of_peak)
    gaps = (again.launches - kept.launches) * ASSUMED.launch_seconds
    assert again.seconds - kept.seconds == pytest.approx(streamed + computed + gaps)


def test_a_block_that_runs_eager_counts_as_it_runs():
    network = model()
    whole = explain(network, x(), arch=90).totals()
    network.layer1[0].conv1.register_forward_hook(lambda *_: None)
    explanation = explain(network, x(), arch=90)
    assert explanation.rows[1].implementation == "eager"
    for before, after in zip(whole[:4], explanation.totals()[:4], strict=True):
        assert after.bytes >= before.bytes, after.road


@pytest.mark.parametrize("training", [False, True])
def test_without_images_there_are_no_totals(training):
    images = torch.empty(0, 3, 64, 64, dtype=torch.bfloat16)
    explanation = explain(model(), images, arch=90, training=training)
    assert explanation.totals() == []
    assert "images per second" not in str(explanation)


def test_the_interpreter_has_no_totals():
    if torch.cuda.is_available():
        pytest.skip("on a GPU there is something to predict")
    with implementation("triton"):
        assert explain(model().float(), x().float()).totals() == []


def test_a_training_step_is_planned_with_its_prologues():
    rows = explain(model(), x(), arch=80, training=True).to_dict()
    assert all("training" in unit["unit"] for row in rows for unit in row["units"])
    with pytest.raises(ValueError, match="training=True needs an arch"):
        explain(model(), x(), training=True)


def test_a_forced_road_is_the_reason():
    with implementation("mixed"):
        rows = explain(model(), x(), arch=90).to_dict()
    assert {unit["reason"] for row in rows for unit in row["units"]} == {"implementation('mixed') is in force"}


def test_a_measurement_is_the_reason(monkeypatch):
    class Table:
        constants = None

        def lookup(self, problem: Problem) -> Plan:
            return Plan("mixed", Tiles(), 12e-6, "tuned", "measured: 12 us", ())

    table = Table()
    monkeypatch.setattr(tuned, "load", lambda gpu: table)
    rows = explain(model(), x(), arch=90).to_dict()
    assert {(unit["source"], unit["reason"]) for row in rows for unit in row["units"]} == {("tuned", "measured: 12 us")}
    assert decide.cache_info().maxsize is not None


def test_the_gpu_here_is_planned_by_its_measurements(monkeypatch):
    asked = []
    monkeypatch.setattr(tuned, "load", asked.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("resnet_fused.plan.decide._gpu", lambda device: (90, "NVIDIA H200"))
    for arch, gpu in ((90, "NVIDIA H200"), (80, "")):
        asked.clear()
        explain(model(), x(), arch=arch)
        assert set(asked) == {gpu}


def test_command(capsys):
    arguments = ["explain", "--model", "resnet18", "--arch", "sm_120", "--batch", "2", "--size", "64"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "each once: bfloat16 inference" in printed
    assert "3x3 64->64 of 2x16x16" in printed
    assert main([*arguments, "--train", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["blocks"]) == 8
    assert found["blocks"][0]["units"]
    assert len(found["totals"]) == 5
    step = found["totals"][0]["bytes"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"][0]["bytes"] < step / 2
    assert [total["road"] for total in found["totals"]] == ["as planned", "fused", "mixed", "eager", "roof"]
    planned = found["totals"][0]
    assert planned["images_per_second"] == 2 / planned["seconds"]
    assert planned["bytes_per_image"] == planned["bytes"] / 2
    assert "images per second, predicted" in printed


@pytest.mark.parametrize(
    ("arch", "text"), [([], "name an architecture"), (["--arch", "sm_75"], "must be one of sm_80, sm_86")]
)
def test_a_mistake_is_one_line_and_exit_code_2(arch, text, capsys):
    if not arch and torch.cuda.is_available():
        pytest.skip("there is a GPU, and its architecture is the default")
    assert main(["explain", *arch]) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.count("\n") == 1


def resnet50(batch: int) -> tuple[nn.Module, torch.Tensor]:
    with torch.device("meta"):
        network = torchvision.models.resnet50().to(torch.bfloat16, memory_format=torch.channels_last).eval()
        images = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return network, images


def test_live_chains_are_shown_with_the_block_that_launches_them():
    network, images = resnet50(256)
    explanation = explain(fuse(network), images, arch=90)
    blocks = explanation.rows[1:]
    assert [len(row.chains) for row in blocks] == [1] * IN_CHAINS + [0] * (16 - IN_CHAINS)
    names = [[launch.name for launch in row.launches] for row in blocks]
    assert names[1] == ["batch_norm_stats"] * 3 + ["chain_box"], "its first convolution is in the one before"
    assert [row.count("chain_box") for row in names] == [1] * IN_CHAINS + [0] * (16 - IN_CHAINS)
    second = blocks[1]
    assert sum(len(row.problems) for row in explanation.rows) == 53
    (chain,) = second.to_dict()["chains"]
    assert (chain["launches"], chain["source"], len(chain["units"])) == ("3", "model", 3)
    assert chain["predicted_seconds"]["3"] == min(chain["predicted_seconds"].values())
    assert "Chains, each once" in str(explanation)
    planned, fused, *_, roof = explanation.totals()
    assert roof.bytes < planned.bytes < fused.bytes
    assert roof.seconds < planned.seconds < fused.seconds
    assert fused.launches == 53 + 1 + 2


def test_chains_that_are_predicted_slower_are_not_shown():
    network, images = resnet50(1)
    explanation = explain(fuse(network), images, arch=90)
    assert not any(row.chains for row in explanation.rows)
    assert "Chains" not in str(explanation)


def test_a_frozen_model_shows_its_units_and_chains():
    network, images = resnet50(256)
    with torch.device("meta"), dry_run(90):
        frozen = optimize_for_inference(network)
    explanation = explain(frozen, images, arch=90)
    rows = explanation.to_dict()
    assert Counter(row["block"] for row in rows) == {"TritonConv": 6, "TritonChain": 16}
    assert sum(len(row["units"]) for row in rows) == 53
    assert {row["implementation"] for row in rows} == {"fused", "cudnn"}
    together = [row for row in rows if row["chains"]]
    assert [row["chains"][0]["launches"] for row in together] == ["3", "3", "3", "1+2", "3", "3", "2+1"]
    assert [row["launches"] for row in together] == [1, 1, 1, 2, 1, 1, 2]
    planned, fused, *_ = explanation.totals()
    assert (planned.launches, fused.launches) == (44, 56)
    assert planned.seconds < fused.seconds


def test_a_frozen_pre_activation_network_shows_its_units_in_order():
    blocks = PreActBottleneck(64, 64), PreActBottleneck(64, 64, 2)
    with implementation("triton"):
        frozen = optimize_for_inference(nn.Sequential(nn.Conv2d(16, 64, 1), *blocks).eval(), dtype=torch.bfloat16)
    explanation = explain(frozen, torch.empty(2, 16, 14, 14, dtype=torch.bfloat16), arch=90)
    convolutions = [f"1_conv{i}" for i in (1, 2, 3)], ["2_downsample_conv", *(f"2_conv{i}" for i in (1, 2, 3))]
    names = [f"network._{name}_unit" for names in convolutions for name in names]
    assert [row.name for row in explanation.rows] == names
    assert [len(row.launches) for row in explanation.rows] == [1] * 7
    _, fused, *_ = explanation.totals()
    assert fused.launches == 7 + 2 + 1, "the units, the vectors of two norms and the first convolution"


def test_looking_takes_no_chain_apart_and_changes_no_value():
    torch.manual_seed(0)
    blocks = [torchvision.models.resnet.Bottleneck(16, 4) for _ in range(2)]
    network, images = fuse(nn.Sequential(*blocks)).eval(), torch.randn(2, 16, 6, 5)
    with implementation("triton"):
        rows = explain(network, images).rows
    names = [[launch.name for launch in row.launches] for row in rows]
    assert [row.count("chain_forward") for row in names] == [1, 1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


class Small(torch.nn.Module):
    """A bottleneck and a convolution without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torchvision.models.resnet.Bottleneck(16, 4)
        self.last = torch.nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(x))


FROZEN = {
    "triton": ["block_conv1_unit TritonConv", "block_conv3_chain TritonChain"],
    "eager": [*(f"block_conv{i}_unit FoldedConv" for i in (1, 2, 3)), "last_unit FoldedConv"],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU serves by oneDNN")
@pytest.mark.parametrize("road", FROZEN)
def test_a_frozen_model_is_what_its_graph_calls(road):
    x = torch.randn(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    with implementation(road):
        frozen = optimize_for_inference(Small().eval())
        rows = explain(frozen, x).rows
        assert sorted(f"{row.name} {row.block}" for row in rows) == [f"network.{name}" for name in FROZEN[road]]
        assert {row.implementation for row in rows} == {"fused"}
        assert [len(row.launches) for row in rows] == [1] * len(rows)
        assert [row.implementation for row in explain(frozen).rows] == ["fused"] * len(rows)
        with trace() as log:
            frozen(x)
        assert {launch for row in rows for launch in row.launches} <= set(log.launches)
        if road == "eager":
            with pytest.raises(ValueError, match="arch must be None for a model that is frozen for a CPU"):
                explain(frozen, x, arch=90)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU serves by oneDNN")
def test_a_frozen_model_that_runs_pytorchs_operators_says_why():
    x = torch.randn(2, 16, 5, 5)
    frozen = optimize_for_inference(Small().eval().double())
    for row in explain(frozen, x.double()).rows:
        assert (row.implementation, row.reason) == ("eager", "oneDNN does not take torch.float64 on cpu")
    with implementation("triton"):
        frozen = optimize_for_inference(Small().eval())
    for row in explain(frozen, x).rows:
        assert (row.implementation, row.reason) == ("eager", "the input is not on a CUDA GPU")
