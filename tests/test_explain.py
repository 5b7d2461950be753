"""explain with a plan: for any GPU, without one, and without touching the model."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision

from resnet_fused import explain, fuse, implementation
from resnet_fused.__main__ import main
from resnet_fused.engine.trace import trace
from resnet_fused.plan import tuned
from resnet_fused.plan.decide import HOST_SECONDS, Plan, decide
from resnet_fused.plan.problem import Problem, Tiles


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
            waits = {way: (max(seconds, HOST_SECONDS[way]), seconds) for way, seconds in predicted.items()}
            assert unit["implementation"] == min(waits, key=waits.get)
            assert unit["source"] == "model"
            assert "inference" in unit["unit"]
    text = str(explanation)
    assert all(f"{way}, predicted us" in text for way in ("fused", "mixed", "eager"))
    assert "predicted fastest" in text


def test_totals_are_those_of_all_units_and_of_what_is_around_them():
    network = model()
    explanation = explain(network, x(), arch=90)
    planned, fused, mixed, eager, roof = explanation.totals()
    units, rest = explanation.problems, len(explanation.rest)
    assert len(units) == 20
    assert {"aten.mean", "aten.addmm"} <= {x.name for x in explanation.rest}
    assert [t.images for t in (planned, fused, mixed, eager, roof)] == [4] * 5
    assert fused.launches == rest + len(units) + 1, "the stem packs its image first"
    assert fused.bytes < mixed.bytes < eager.bytes
    assert planned.seconds <= min(fused.seconds, mixed.seconds, eager.seconds)
    assert roof.seconds < planned.seconds
    assert roof.bytes <= fused.bytes
    waits = sum(min(max(s, HOST_SECONDS[way]) for way, s in decide(problem).alternatives) for problem in units)
    assert planned.seconds - waits == pytest.approx(fused.seconds - len(units) * HOST_SECONDS["fused"])


def test_totals_are_what_is_launched():
    network, images = (t.to(memory_format=torch.channels_last) for t in (model(), x()))
    with implementation("triton"):
        explanation = explain(network, images, arch=90)
        planned = explanation.totals()[0]
    seen = [launch for row in explanation.rows for launch in row.launches] + explanation.rest
    assert planned.launches == len(seen)
    assert planned.bytes == pytest.approx(sum(x.bytes_read + x.bytes_written for x in seen), rel=2e-3)


def test_a_block_that_runs_eager_counts_as_it_runs():
    network = model()
    whole = explain(network, x(), arch=90).totals()
    network.layer1[0].conv1.register_forward_hook(lambda *_: None)
    explanation = explain(network, x(), arch=90)
    assert explanation.rows[1].implementation == "eager"
    for before, after in zip(whole[:4], explanation.totals()[:4], strict=True):
        assert after.bytes >= before.bytes, after.road


@pytest.mark.parametrize(
    ("images", "training"),
    [(torch.empty(0, 3, 64, 64, dtype=torch.bfloat16), False), (x(), True)],
    ids=["none", "step"],
)
def test_what_has_no_totals_is_explained_without(images, training):
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
    assert found["totals"] == []
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
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
