"""The command `cost`: compiled facts of planned kernels beside Inductor's, with what is a model named so."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import pytest
import torch

from resnet_fused.__main__ import main
from resnet_fused.commands import cost_inductor
from resnet_fused.commands.cost_inductor import Unavailable, fill_in
from resnet_fused.commands.tune import find_problems
from resnet_fused.commands.tune_trial import Candidate, rehearse
from resnet_fused.kernels.chain import Chain
from resnet_fused.plan import decide, roofline
from resnet_fused.plan.problem import Problem

LAYER = Problem(
    *(8, 28, 28, 64, 128, 3, 3, (1, 1), (1, 1), (1, 1), 1, torch.bfloat16, False, False, 90, "inference", False)
)


def cost(units: slice | Callable[[Any], bool], *arguments: str) -> str:
    """What ``python -m resnet_fused cost`` prints of these units of the network, or of those of which this is true.

    As without a GPU, whose name and measurements would count, and without measurements of the user's.
    """

    def few(*arguments: Any) -> list[Problem]:
        found = find_problems(*arguments)
        return found[units] if isinstance(units, slice) else list(filter(units, found))

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr("resnet_fused.commands.cost.find_problems", few)
        patch.setattr("resnet_fused.commands.cost.interpreting", lambda: False)
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setattr("resnet_fused.plan.decide.present_gpu", lambda arch: "")
        patch.setenv("RESNET_FUSED_CACHE", os.devnull)
        assert main(["cost", "--model", "resnet20", *arguments]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    return json.loads(cost(slice(None, None, 8), "--arch", "sm_90", "--implementation", "triton", "--json"))


def test_units_are_compiled(reports):
    (report,) = reports
    assert (report["arch"], report["gpu"]) == (90, "H100")
    assert len(report["units"]) == 2
    for unit in report["units"]:
        assert (unit["implementation"], unit["launches"]) == ("fused", 1)
        ours, template = unit["kernels"]
        assert ours["name"] == {"3x3 64->64 of 32x8x8": "conv_box"}.get(unit["layer"], "conv_forward")
        assert ours["code"]["spilled"] == 0
        assert 16 < ours["code"]["registers"] <= 255
        assert 0 < ours["occupancy"]["percent"] <= 100
        assert ours["bytes"] == unit["bytes"]
        assert template["name"] == "Inductor's template"
        assert template["code"]["registers"] > 16


def test_bytes_of_a_fused_unit_are_the_compulsory_ones_and_batch_norms_vectors(reports):
    for unit in reports[0]["units"]:
        channels = int(unit["layer"].split("->")[1].split()[0])
        assert unit["bytes"] == unit["compulsory_bytes"] + 4 * 4 * channels


def test_times_are_the_plans(reports):
    unit = next(unit for unit in reports[0]["units"] if unit["layer"] == "3x3 64->64 of 32x8x8")
    problem = replace(LAYER, n=32, h=8, w=8, co=64)
    (launch,) = roofline.predict(problem, "fused", decide.best_tiles(problem))
    assert unit["predicted"] == [vars(launch)]


def test_a_chain_is_compiled_and_those_that_are_apart_are_left_out():
    arguments = "--model", "resnet50", "--batch", "256", "--json"
    (report,) = json.loads(cost(lambda p: isinstance(p, Chain) and p.spatial.h >= 28, *arguments))
    units = {unit["implementation"]: unit for unit in report["units"]}
    assert (units["3"]["launches"], units["2"]["launches"]) == (4, 3)
    assert units.keys() - {"2+1"} == {"3", "2"}
    for unit in (units["3"], units["2"]):
        stats, chain = unit["kernels"]
        assert (stats["name"], chain["name"]) == ("batch_norm_stats", "chain_box")
        assert chain["code"]["spilled"] == 0 and chain["code"]["loop_slots"]
        assert chain["predicted"]["seconds"] == max(launch["seconds"] for launch in unit["predicted"])
        assert unit["bytes"] == pytest.approx(unit["compulsory_bytes"], rel=1e-3)


def test_the_text_names_what_is_a_model():
    text = cost(slice(1), "--arch", "sm_80", "--batch", "2", "--implementation", "mixed")
    for words in (
        "us (MODEL)",
        "bound (MODEL)",
        "registers",
        "spilled",
        "issue slots",
        "batch_norm_apply",
        "for sm_80 (A100)",
    ):
        assert words in " ".join(text.split())
    assert "predicted" not in text


def test_without_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr("resnet_fused.commands.cost.interpreting", lambda: True)
    assert main(["cost"]) == 2
    assert "TRITON_INTERPRET is set: unset it" in capsys.readouterr().err


def test_an_unknown_architecture(monkeypatch, capsys):
    monkeypatch.setattr("resnet_fused.commands.cost.interpreting", lambda: False)
    assert main(["cost", "--arch", "sm_70"]) == 2
    assert "--arch sm_70: must be one of sm_80" in capsys.readouterr().err


def test_compulsory_bytes():
    m, e = 8 * 28 * 28, 2
    x, y, w = m * 64 * e, m * 128 * e, 9 * 64 * 128 * e
    assert roofline.compulsory(LAYER) == x + y + w
    assert roofline.compulsory(replace(LAYER, residual=True)) == x + 2 * y + w
    assert roofline.compulsory(replace(LAYER, direction="training")) == (x + y + w) + 2 * y + x + x + 2 * w


@pytest.mark.parametrize("direction", ["inference", "training"])
@pytest.mark.parametrize("way", ["fused", "mixed", "eager"])
def test_a_rehearsal_runs_nothing_and_moves_at_least_what_it_must(way, direction):
    problem = replace(LAYER, direction=direction)
    calls, launches = rehearse(problem, Candidate(way))
    moved = sum(launch.bytes_read + launch.bytes_written for launch in launches)
    assert moved >= roofline.compulsory(problem)
    assert bool(calls) == (way != "eager")
    assert len(launches) >= len(calls)


class TestTemplate:
    def test_has_inductors_tiles_nearest_to_ours(self):
        templates = fill_in(LAYER, 64, 64)
        assert 1 <= len(templates) <= cost_inductor.CONFIGURATIONS
        assert templates[0].tile[0] * templates[0].tile[1] == 64 * 64
        for template in templates:
            m, _, k = template.tile
            assert k <= 64
            assert f"BLOCK_M: tl.constexpr = {m}" in template.source
            assert "KERNEL_H: tl.constexpr = 3" in template.source

    def test_dilation_is_not_offered(self):
        with pytest.raises(Unavailable, match="takes no dilation"):
            fill_in(replace(LAYER, dilation=(2, 2)), 64, 64)

    def test_a_compiler_that_fails_is_told(self, monkeypatch):
        def fails(*arguments, **options):
            raise RuntimeError("PassManager::run failed")

        monkeypatch.setattr(cost_inductor.triton, "compile", fails)
        with pytest.raises(Unavailable, match=r"does not compile: RuntimeError: PassManager"):
            fill_in(LAYER, 64, 64)[0].compile(90)

    def test_a_torch_without_it_is_told(self, monkeypatch):
        monkeypatch.setattr("torch._inductor.kernel.conv.conv2d_template", None)
        with pytest.raises(Unavailable, match=r"can not be filled in: AttributeError"):
            fill_in(LAYER, 64, 64)
