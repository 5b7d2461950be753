"""The benchmark: what is counted and how it is timed, the files of the command, and the page that it writes."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import family, host, measure, run
from benchmarks.compare import compare
from benchmarks.count import KINDS, count, kind, least_work, roof
from benchmarks.measure import BACKWARD, FORWARD, STEP, Setting, Stopwatch, Timing, interleave
from benchmarks.peers import BASELINE, OURS, PEERS, Peer
from benchmarks.shapes import BlockCase, LayerCase, NetworkCase, PreActCase
from resnet_fused import __version__, implementation, trace
from resnet_fused.commands import check
from resnet_fused.commands.shared import Parser, UserError
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import dry_run
from resnet_fused.plan import checked
from tests.kernels.test_launch import compiler_on

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
LAYER = LayerCase(16, 24, 8, 8, kernel=3, stride=1, padding=1, groups=1)
BLOCK = BlockCase("bottleneck", 64, 16, 8, 8, 1, 1, 64, "identity")
PREACT = PreActCase("preact_bottleneck", 64, 128, 8, 8, 2)
SKIPPED = [peer.name for peer in PEERS.values() if peer.name.startswith(("torch.compile", "OpenVINO", "ONNX"))]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def setting(case=LAYER, phase=FORWARD, batch=2, dtype=torch.float32) -> Setting:
    return Setting(case, batch, dtype, phase, CPU)


class TestCount:
    @pytest.mark.parametrize("peer", [BASELINE, OURS[0]], ids=lambda peer: peer.name)
    @pytest.mark.parametrize("case", [LAYER, BLOCK, PREACT], ids=lambda case: case.name)
    def test_is_what_a_trace_of_real_tensors_sees(self, peer, case):
        work = count(peer, setting(case, BACKWARD))
        model = case.build().train()
        x = torch.randn(2, *case.image).contiguous(memory_format=torch.channels_last).requires_grad_()
        with implementation(peer.implementation), dry_run(90):
            z = (function := peer.prepare(model, x))()
            dz = torch.randn_like(z)
            with trace() as seen:
                function().backward(dz)
        assert work.launches == len(seen.launches)
        assert work.flops == sum(launch.flops for launch in seen.launches)
        assert work.moved == sum(launch.bytes_read + launch.bytes_written for launch in seen.launches)

    def test_saved_by_an_eager_layer(self):
        """The output of the convolution, that of the batch norm (in the ReLU's place), mean and rstd."""
        assert count(BASELINE, setting(phase=BACKWARD)).saved == 4 * (2 * 2 * 64 * 24 + 2 * 24)

    def test_fusing_moves_less_and_keeps_less(self):
        """Of a batch for which the GPU takes longer than the host."""
        for phase in (FORWARD, BACKWARD):
            eager, ours = (count(peer, setting(BLOCK, phase, batch=32768)) for peer in (BASELINE, OURS[0]))
            assert ours.moved < eager.moved
            assert set(ours.bytes) == set(KINDS)
        recompute = count(OURS[1], setting(BLOCK, BACKWARD, batch=32768))
        assert recompute.saved < ours.saved < eager.saved

    @pytest.mark.parametrize(
        ("peer", "model", "phase", "batch", "launches", "megabytes"),
        [
            (BASELINE, "resnet50", FORWARD, 32, 174, 165.0),
            (OURS[0], "resnet50", FORWARD, 32, 62, 44.7),
            (BASELINE, "resnet50", BACKWARD, 256, 405, 392.1),
            (OURS[0], "resnet50", BACKWARD, 256, 448, 339.0),
            (OURS[1], "resnet50", BACKWARD, 256, 477, 360.6),
            (BASELINE, "resnet18", FORWARD, 32, 68, 37.4),
            (OURS[0], "resnet18", FORWARD, 32, 23, 10.7),
            (BASELINE, "resnet50_v2", FORWARD, 32, 170, 154.1),
            (OURS[0], "resnet50_v2", FORWARD, 32, 74, 58.7),
            (BASELINE, "resnet50_v2", BACKWARD, 256, 391, 365.0),
            (OURS[0], "resnet50_v2", BACKWARD, 256, 441, 293.3),
        ],
    )
    def test_whole_models_are_those_of_the_results(self, peer, model, phase, batch, launches, megabytes):
        """docs/results.md and README.md."""
        work = count(peer, setting(NetworkCase(model), phase, batch=batch, dtype=torch.bfloat16))
        assert (work.launches, round(work.moved / batch / 1e6, 1)) == (launches, megabytes)

    def test_kinds(self):
        names = ("conv_wgrad", "aten.convolution_backward", "batch_norm_stats", "aten.relu_", "aten.addmm")
        assert [kind(name) for name in names] == [KINDS[0], KINDS[0], KINDS[1], KINDS[2], KINDS[3]]

    def test_whole_steps_and_unseen_launches_are_not_counted(self):
        assert count(BASELINE, setting(phase=STEP)) is None
        assert count(PEERS["torch.compile"], setting()) is None

    def test_roof_is_the_scarcer_of_arithmetic_and_memory(self):
        gpu = gpu_of(90)
        wide, narrow = LayerCase(512, 512, 14, 14, 3, 1, 1, 1), LayerCase(64, 256, 56, 56, 1, 1, 0, 1)
        for layer, bound in ((wide, "flops"), (narrow, "bytes")):
            at = setting(layer, batch=256, dtype=torch.bfloat16)
            work = least_work(at)
            times = {"flops": work.flops / (gpu.tensor["bfloat16"] * 1e12), "bytes": work.moved / (gpu.memory * 1e9)}
            assert max(times, key=times.get) == bound
            assert roof(work, at) == times[bound]


class TestTiming:
    def test_rounds_are_interleaved_in_shifting_order(self):
        order = []

        class Runner:
            def __init__(self, name):
                self.name = name

            def conditions(self):
                return torch.no_grad()

            def __call__(self):
                order.append(self.name)

        timings = interleave({name: Runner(name) for name in "abc"}, range(4), CPU)
        assert "".join(order) == "abc" + "bca" + "cab" + "abc"
        assert {name: len(timing.samples) for name, timing in timings.items()} == {"a": 4, "b": 4, "c": 4}

    def test_median_and_quartiles(self):
        timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
        assert (timing.median, timing.quartiles) == (3, (2, 4))
        assert Timing((7.0,)).quartiles == (7, 7)

    def test_a_stopwatch_tells_long_from_short(self):
        stopwatch = Stopwatch(CPU)
        assert stopwatch(lambda: torch.randn(400, 400).matrix_exp()) > stopwatch(lambda: None) >= 0

    def test_a_capture_that_fails_leaves_the_current_stream(self, monkeypatch):
        """PyTorch's capture stays on its stream where it cannot be ended."""
        streams = ["the caller's"]

        @contextmanager
        def on(stream):
            streams.append(stream)
            yield
            streams.remove(stream)

        @contextmanager
        def restored(stream):
            before = list(streams)
            try:
                yield
            finally:
                streams[:] = before

        for name, fake in {"device": nullcontext, "stream": restored, "synchronize": id}.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: "another")
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: on(stream))
        assert measure._graph(lambda: list(streams), CPU) is not None
        assert streams == ["the caller's"]
        with pytest.raises(ZeroDivisionError):
            measure._graph(lambda: 1 / 0, CPU)
        assert streams == ["the caller's"]


class Broken(Peer):
    name = "broken"

    def prepare(self, model, x):
        raise RuntimeError("out of order\nsecond line")


class TestCompare:
    def test_a_peer_that_fails_is_reported_and_ours_raises(self, monkeypatch):
        row, other = compare(setting(), [Broken(), BASELINE], range(2))
        assert row.reason == "failed: RuntimeError: out of order"
        assert row.median_ms is None
        assert other.reason is None
        assert other.rounds == 2
        broken = Broken()
        monkeypatch.setattr("benchmarks.compare.OURS", (broken,))
        with pytest.raises(RuntimeError, match="out of order"):
            compare(setting(), [broken], range(2))

    def test_ratios_are_those_of_the_rounds(self):
        rows = {row.peer: row for row in compare(setting(), [BASELINE, OURS[2]], range(9))}
        eager, ours = rows[BASELINE.name], rows[OURS[2].name]
        assert (ours.over_ours_q1, ours.over_ours, ours.over_ours_q3) == (1, 1, 1)
        assert eager.min_ms / ours.max_ms <= eager.over_ours_q1 <= eager.over_ours <= eager.over_ours_q3
        assert eager.min_ms <= eager.q1_ms <= eager.median_ms <= eager.q3_ms <= eager.max_ms
        assert eager.tflops == pytest.approx(2 * LAYER.flops / eager.median_ms / 1e9)

    def test_no_roof_of_a_cpu(self):
        (row,) = compare(setting(), [BASELINE], range(1))
        assert row.gbs is row.percent_of_roof is row.peak_memory_mb is None
        assert (row.planned_for, row.counted_launches) == ("H100", 3)


def options(*arguments: str) -> argparse.Namespace:
    parser = Parser()
    run.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def _on_a_cpu(monkeypatch):
    """Whether there is a GPU or not."""
    monkeypatch.setattr(run, "pick_device", lambda name: CPU)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Where the command has written, on a CPU, with the self-test taken for passed."""
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the page, is not installed")
    folder = tmp_path_factory.mktemp("bench")
    small = ["--models", "resnet20", "--batch", "1", "--rounds", "2", "--train", "--skip", *SKIPPED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checked, "verified", lambda device: True)
        patch.setattr(run, "pick_device", lambda name: CPU)
        assert run.main(options(*small, "--out", str(folder))) == 0
    return folder


@pytest.mark.usefixtures("_on_a_cpu")
class TestCommand:
    def test_rows_are_complete(self, out):
        rows = json.loads((out / "results.json").read_text())["rows"]
        assert {row["level"] for row in rows} == {"network", "layer"}
        models = [row for row in rows if row["level"] == "network"]
        assert {row["phase"] for row in models} == {FORWARD, BACKWARD, STEP}
        assert {row["peer"] for row in models} == PEERS.keys() - set(SKIPPED)
        for row in rows:
            assert (row["median_ms"] is None) == (row["reason"] is not None)
            assert row["median_ms"] is None or row["rounds"] == 2
        ours = [row for row in rows if row["peer"] == OURS[0].name]
        assert all("interpreter" in row["reason"] for row in ours), "no time of the interpreter is written down"
        assert all(row["counted_mb"] is not None for row in ours if row["phase"] != STEP)

    def test_csv_agrees_with_json(self, out):
        rows = json.loads((out / "results.json").read_text())["rows"]
        with (out / "results.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert lines == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]

    def test_says_where_and_how(self, out):
        results = json.loads((out / "results.json").read_text())
        assert results["machine"]["torch"] == torch.__version__
        assert results["machine"]["resnet_fused"] == __version__
        assert results["machine"]["GPU"] == "none"
        assert "--models resnet20 --batch 1 --dtype float32 --train --rounds 2" in results["method"]["command"]
        assert results["planned_for"] == {"name": "H100", "arch": 90}

    def test_refuses_while_the_check_fails(self, monkeypatch, tmp_path):
        failed = check.CheckRow("conv_forward", "3x3", "float32", 7.0, "failed", "")
        report = check.CheckReport(CPU, checked.stack(CPU), (failed,))
        monkeypatch.setattr(checked, "verified", lambda device: False)
        monkeypatch.setattr(check, "run", lambda device: report)
        with pytest.raises(UserError, match=r"self-test fails \(1 of 1 cases\): python -m resnet_fused check"):
            run.main(options("--out", str(tmp_path / "bench")))
        assert not (tmp_path / "bench").exists()

    def test_runs_once_the_check_passes(self, monkeypatch):
        report = check.CheckReport(CPU, checked.stack(CPU), ())
        monkeypatch.setattr(checked, "verified", lambda device: False)
        monkeypatch.setattr(check, "run", lambda device: report)
        run.require_check(CPU)

    def test_a_folder_that_cannot_be_made(self, monkeypatch):
        monkeypatch.setattr(run, "require_check", lambda device: None)
        with pytest.raises(UserError, match=r"--out .*test_benchmarks.py/bench: Not a directory"):
            run.main(options("--out", f"{__file__}/bench"))

    def test_a_folder_in_the_way_of_a_file(self, monkeypatch, tmp_path):
        """Found before the self-test, which takes long."""
        monkeypatch.setattr(run, "require_check", lambda device: pytest.fail("too late"))
        (tmp_path / "results.csv").mkdir()
        with pytest.raises(UserError, match=r"--out .*: results\.csv is a directory there"):
            run.main(options("--out", str(tmp_path)))

    def test_a_size_of_ones_own(self):
        chosen = options("--models", "resnet20", "--size", "64", "--batch", "1", "--dtype", "float32")
        chosen.rounds = 3
        network, first, *_ = run.settings(chosen, CPU)
        assert network.case.image == (3, 64, 64)
        assert network.case.name == "resnet20 at 64x64"
        assert first.case.image == (3, 64, 64)
        assert "--size 64" in run.method(chosen, CPU)["command"]
        assert type(network.case.build()) is type(NetworkCase("resnet20").build())

    def test_results_are_written_as_they_come_and_failures_are_rows(self, monkeypatch, tmp_path):
        """Of three settings the second fails, and while the third is measured the process is stopped."""
        pytest.importorskip("matplotlib", reason="matplotlib, which draws the page, is not installed")
        monkeypatch.setattr(checked, "verified", lambda device: True)
        todo = [setting(batch=batch) for batch in (1, 2, 3)]
        monkeypatch.setattr(run, "settings", lambda options, device: todo)

        def stopped(at, *arguments):
            if at.batch == 2:
                raise RuntimeError("out of order\nsecond line")
            if at.batch == 3:
                raise KeyboardInterrupt
            return compare(at, [BASELINE], range(1))

        monkeypatch.setattr(run, "compare", stopped)
        with pytest.raises(KeyboardInterrupt):
            run.main(options("--out", str(tmp_path / "deep" / "bench")))
        rows = json.loads((tmp_path / "deep" / "bench" / "results.json").read_text())["rows"]
        assert (rows[0]["batch"], rows[0]["reason"]) == (1, None)
        failed = [row for row in rows if row["batch"] == 2]
        assert {row["peer"] for row in failed} == {peer.name for peer in run.peers(todo[1], [])}
        assert {row["reason"] for row in failed} == {"failed: RuntimeError: out of order"}
        assert len(rows) == 1 + len(failed)
        with (tmp_path / "deep" / "bench" / "results.csv").open(newline="") as file:
            assert len(list(csv.DictReader(file))) == len(rows)
        todo.pop()
        assert run.main(options("--out", str(tmp_path))) == 0
        assert "out of order" in (tmp_path / "report.html").read_text()

    def test_what_may_take_minutes_is_said_before(self, monkeypatch, capsys):
        """Of a network, where compilers are at work, each peer that runs here; of a layer itself alone."""
        network, said = setting(NetworkCase("resnet20")), []
        chosen = [Broken(), BASELINE, PEERS["TensorRT"]]
        monkeypatch.setattr(run, "settings", lambda options, device: [setting(), network])
        monkeypatch.setattr(run, "peers", lambda setting, skip: chosen)
        monkeypatch.setattr(Broken, "prepare", lambda *_: said.append(capsys.readouterr().err) or (lambda: None))
        list(run.measure(options("--rounds", "1"), CPU))
        assert said == [f"1 of 2: {setting()}\n", f"2 of 2: {network}\n    preparing broken\n"]
        assert capsys.readouterr().err == f"    preparing {BASELINE.name}\n"

    def test_a_page_of_nothing_but_failures(self, monkeypatch, tmp_path, capsys):
        pytest.importorskip("matplotlib", reason="matplotlib, which draws the page, is not installed")
        monkeypatch.setattr(checked, "verified", lambda device: True)

        def fails(*arguments):
            raise RuntimeError("no kernel image")

        monkeypatch.setattr(run, "compare", fails)
        assert run.main(options("--models", "resnet20", "--train", "--batch", "1", "--out", str(tmp_path))) == 0
        assert "no kernel image" in (tmp_path / "report.html").read_text()
        assert "not measured" in capsys.readouterr().out

    def test_a_disk_that_fills_up_is_one_line(self, monkeypatch, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib, which draws the page, is not installed")
        monkeypatch.setattr(checked, "verified", lambda device: True)
        monkeypatch.setattr(run, "settings", lambda options, device: [setting()])
        monkeypatch.setattr(run, "compare", lambda *arguments: compare(arguments[0], [BASELINE], range(1)))

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"--out .*: No space left on device"):
            run.main(options("--out", str(tmp_path)))

    def test_names_the_extra_without_matplotlib(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "benchmarks.report", raising=False)
        monkeypatch.delattr("benchmarks.report", raising=False)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(UserError, match=r"pip install 'resnet-fused\[bench\]'"):
            run.main(options())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here to time the kernels on")
def test_times_the_kernels_on_a_gpu(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the page, is not installed")
    monkeypatch.setattr(checked, "verified", lambda device: True)
    small = ["--models", "resnet20", "--batch", "2", "--rounds", "2", "--train", "--skip", *SKIPPED]
    assert run.main(options(*small, "--out", str(tmp_path))) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["GPU"] == torch.cuda.get_device_name()
    for row in results["rows"]:
        if row["peer"] in (OURS[0].name, BASELINE.name):
            assert row["median_ms"] > 0
            assert row["peak_memory_mb"] > 0
            assert row["phase"] == STEP or 0 < row["percent_of_roof"] < 100
    assert "resnet_fused, measured" in (tmp_path / "report.html").read_text()


class Page(HTMLParser):
    """What the page loads, runs, and says."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


class TestPage:
    @pytest.fixture
    def text(self, out) -> str:
        return (out / "report.html").read_text()

    def test_needs_nothing_beside_it(self, text):
        page = Page(text)
        assert page.open == [], "every element is closed"
        assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
        assert all(link.startswith("#") for link in page.links)
        assert "@import" not in text
        assert "url(http" not in text
        assert page.tags.count("svg") == 4, "speed-up, bytes of two phases, memory"

    def test_ids_of_the_plots_do_not_meet(self, text):
        plots = text.split("<svg")[1:]
        clips = [{part.split('"')[0] for part in plot.split('clipPath id="')[1:]} for plot in plots]
        assert all(not a & b for a, b in pairwise(clips))

    def test_says_where_and_what_is_a_model(self, text):
        said = " ".join(Page(text).words)
        for words in (torch.__version__, __version__, "no CUDA GPU", "as planned for the H100"):
            assert words in said
        for words in ("MODEL", "roof", "GB/s"):
            assert words not in said, "a CPU has no roof of a GPU, and what was not measured has no column"
        assert "not measured: on a CPU its kernels run in Triton's interpreter" in said
        assert "Peak of allocated memory: not measured" in said
        assert "nan" not in said.split()

    def test_a_gpu_is_shown_as_measured(self, out):
        """Rows with times of a GPU, made up, lie where they were measured, and no longer on the roof."""
        from benchmarks import report

        results = json.loads((out / "results.json").read_text())
        results["machine"]["GPU"] = "made up"
        for row in results["rows"]:
            if row["peer"] == OURS[0].name and row["counted_mb"] is not None:
                row |= dict.fromkeys(("median_ms", "q1_ms", "q3_ms", "tflops", "gbs", "percent_of_roof"), 1.5)
                row |= {"reason": None, "peak_memory_mb": 12.25}
        said = " ".join(Page(report.page(results)).words)
        assert "resnet_fused, measured" in said
        assert "ms at the roof (MODEL)" in said
        assert "H100 SXM datasheet" in said
        assert "GB/s" in said
        assert "no CUDA GPU" not in said
        assert "12.2" in said

    def test_our_own_bar_stands_at_one(self, out, monkeypatch):
        from benchmarks import report

        rows = [row for row in json.loads((out / "results.json").read_text())["rows"] if row["level"] == "network"]
        shown = {}
        monkeypatch.setattr(report, "_speedup", lambda ax, title, rows: shown.update({r["peer"]: r for r in rows}))
        list(report.speedups(rows))
        ours = [shown[peer.name]["over_ours"] for peer in OURS if peer.name in shown]
        assert min(ours) == 1
        assert BASELINE.name in shown

    def test_what_the_spread_swallows_is_no_verdict(self, out):
        from benchmarks import report

        results = json.loads((out / "results.json").read_text())
        settled, swallowed = (0.9, 0.917, 0.93), (0.97, 1.013, 1.04)
        rows = [row for row in results["rows"] if row["peer"] == BASELINE.name and row["phase"] == FORWARD]
        for quartiles, times in ((settled, 0), (swallowed, 1)):
            for row in rows:
                row |= dict(zip(("over_ours_q1", "over_ours", "over_ours_q3"), quartiles, strict=True))
            for part in (report.speedups(rows[:1]), [report._times(rows[:1])]):
                drawn = Page("".join(part)).words
                assert sum(word.strip() == report.UNDECIDED for word in drawn) == times
                assert any(word.strip() in ("0.92", "0.917") for word in drawn) == (not times)

    @pytest.mark.skipif(CHROMIUM is None, reason="no headless browser is installed (chromium)")
    def test_opens_in_a_browser(self, out, tmp_path):
        from PIL import Image

        picture = tmp_path / "page.png"
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--window-size=1200,6000", f"--screenshot={picture}", (out / "report.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        image = Image.open(picture).convert("RGB")
        colours = {colour for _, colour in image.getcolors(maxcolors=1 << 24)}
        assert image.size == (1200, 6000)
        for drawn in ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"):
            assert tuple(bytes.fromhex(drawn[1:])) in colours


def test_the_suites_run_as_documented():
    """One process, whatever the tests are configured for, and what was counted beside the times."""
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-p", "no:cacheprovider"]
    chosen = ["-k", "3x3 and 64-64 and 8x8 and eager", "--benchmark-json=/dev/stdout", "--benchmark-quiet"]
    # A worker of xdist would tell the plugin that benchmarks run in parallel.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, *chosen], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"counted_launches": 3' in done.stdout
    assert "4 passed" in done.stdout


def test_the_hosts_time_is_measured_for_every_implementation():
    code = "from resnet_fused.benchmarks import host; host.ROUNDS = host.REPEATS = 1; host.BLOCKS = 2; host.main()"
    out = compiler_on(code, check=True).stdout
    for road in host.ROADS:
        row = next(line for line in out.splitlines() if road in line)
        assert min(float(number) for number in re.findall(r"\d+\.\d+", row)) > 0
    assert "Microseconds" in out
    assert "triton: " in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is interpreted")
def test_the_host_is_not_timed_in_the_interpreter(capsys):
    assert host.main() == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_the_family_is_counted_without_running_it():
    rows = [family.planned(name) for name in ("resnet18", "resnetv2_18d")]
    assert rows[0][1:] == (1.0, 1.0, ())
    assert all(0.6 < share < 0.8 for share in rows[1][1:3])
    assert rows[1].rest[0][0] == "conv2: what follows is add, not a batch norm"
    assert sum(share for _, share in rows[1].rest) == pytest.approx(1 - rows[1].inference)
    text = family.table(rows)
    assert "At least 95%: 1 of 2 in inference, 1 in a training step." in text
    assert "| resnet18 | 100.0% | 100.0% |  |" in text
    assert "resnet50" in family.names()
