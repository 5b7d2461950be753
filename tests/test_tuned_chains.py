"""Chains among what is tuned: verified, timed, kept in the table, and followed by the plan."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
import torchvision

from resnet_fused.commands import tune_trial
from resnet_fused.commands.tune import Failure, find_problems, tune_chain, tune_problems
from resnet_fused.commands.tune_trial import Candidate, ChainCandidate, ChainTrial, chain_candidates, decoded, rehearse
from resnet_fused.commands.tune_worker import serve
from resnet_fused.engine import chains
from resnet_fused.engine.tolerance import products
from resnet_fused.kernels import chain_box, chain_forward, conv_box, dgrad_box
from resnet_fused.kernels.chain import Chain
from resnet_fused.plan import decide, roofline, tuned
from resnet_fused.plan.problem import Problem, apart, changed, shown
from resnet_fused.plan.tuned import ChainEntry, Entry, Table
from tests.test_tune import DEVICE, FakeRunner, nothing
from tests.test_tuned import put

pytestmark = pytest.mark.usefixtures("on_device", "own_cache")

GPU = "NVIDIA H100 80GB HBM3"


def unit(n: int, side: int, ci: int, co: int, taps: int, dtype: torch.dtype, direction: str, **options) -> Problem:
    sizes = n, side, side, ci, co, taps, taps, (1, 1), (taps // 2,) * 2, (1, 1), 1
    return Problem(*sizes, dtype, False, False, options.get("arch", 90), direction, co == 4 * ci, GPU)


def links(n=32, side=56, width=64, dtype=torch.bfloat16, direction="inference", **options) -> Chain:
    each = [(width, width, 3), (width, 4 * width, 1), (4 * width, width, 1)]
    return Chain(*(unit(n, side, ci, co, taps, dtype, direction, **options) for ci, co, taps in each))


WHOLE = ((3, next(chain_forward.tiles(links()))),)
CUT = ((2, next(chain_forward.tiles(Chain(*links()[:2], None)))), (1, None))
ENTRY = ChainEntry(links(), WHOLE, 1e-4, 1e-6, "measured 100.0 us", (("3", "the process died of signal 11"),))
OF_A_UNIT = Entry(links().expand, "mixed", tuned.Tiles(), 1e-4, 1e-6, "measured")


def test_what_is_saved_is_loaded():
    tuned.save(Table(GPU, (OF_A_UNIT,), None, (ENTRY,)))
    table = tuned.load(GPU)
    assert (table.entries, table.chains) == ((OF_A_UNIT,), (ENTRY,))
    other = replace(ENTRY, links=Chain(None, *links()[1:]), parts=((1, None), (1, None)))
    assert tuned.add(GPU, other).chains == (ENTRY, other)
    assert tuned.add(GPU, replace(other, seconds=1.0)).chains == (ENTRY, replace(other, seconds=1.0))
    assert tuned.load(GPU).exact(other.links) == replace(other, seconds=1.0)


def test_a_table_without_chains_is_read():
    content = json.loads(tuned.render(Table(GPU, (OF_A_UNIT,))))
    del content["chains"]
    assert tuned.parse(json.dumps(content), GPU).entries == (OF_A_UNIT,)


def test_the_nearest_number_of_images_answers():
    found = tuple(replace(ENTRY, links=links(n=n), reason=str(n)) for n in (1, 8, 64))
    table = Table(GPU, chains=found)
    for n, nearest in ((1, 1), (3, 8), (32, 64), (1000, 64)):
        assert table.lookup_chain(links(n=n)).reason == str(nearest)
    for other in (links(side=28), links(width=128), links(direction="frozen"), Chain(*links()[:2], None)):
        assert table.lookup_chain(other) is None
    assert table.exact(links(n=2)) is None


def test_boxes_cover_the_images_that_are_asked_for():
    boxed = next(tile for tile in chain_forward.tiles(links(side=14)) if tile.box is not None)
    entry = replace(ENTRY, links=links(side=14), parts=((3, boxed),))
    pair = Chain(*links(side=14)[:2], None)
    cut_in_two = replace(ENTRY, links=links(n=1, side=14), parts=((2, next(chain_box.tiles(pair))), (1, None)))
    table = Table(GPU, chains=(entry, cut_in_two))
    assert table.lookup_chain(links(side=14)) is entry
    ((_, tile),) = table.lookup_chain(links(n=64, side=14)).parts
    assert tile == replace(boxed, box=conv_box.least_waste(links(n=64, side=14).spatial, boxed.block_m))
    (_, tile), (_, alone) = table.lookup_chain(links(n=2, side=14)).parts
    assert alone is None and tile.box == conv_box.least_waste(links(n=2, side=14).spatial, tile.block_m)
    unit_ = replace(links(side=14, direction="training").spatial, n=32)
    forward = next(conv_box.tiles(unit_))
    dgrad = next(dgrad_box.tiles(unit_.gradient))
    table = Table(GPU, (Entry(unit_, "fused", tuned.Tiles(forward, dgrad), 1e-4, 1e-6, "measured"),))
    few = replace(unit_, n=1)
    found = table.lookup(few).tiles
    assert found.forward.box == conv_box.least_waste(few, forward.block_m) != forward.box
    assert found.dgrad.box == dgrad_box.least_waste(few.gradient, dgrad.block_m) != dgrad.box


CODE = tuned.parts_out(WHOLE)
BAD = {
    "no list": (lambda content: content.update(chains={}), "entries are no list"),
    "no chain": (put("chains", 0, "links", 1, None), "is no chain"),
    "one convolution": (put("chains", 0, "links", [None, tuned.problem_out(links().expand), None]), "is no chain"),
    "links that do not fit": (put("chains", 0, "links", 2, "ci", 128), "does not read what"),
    "links of other images": (put("chains", 0, "links", 2, "n", 8), "does not read what"),
    "another GPU": (put("chains", 0, "links", 0, "gpu", "A100"), "of another GPU"),
    "too many parts": (put("chains", 0, "parts", [*CODE, [1, CODE[0][1]]]), r"is cut in \(3, 1\)"),
    "no tile": (put("chains", 0, "parts", 0, 1, [0] * 30), "the tile None is not legal"),
    "a tile that nobody tries": (put("chains", 0, "parts", 0, 1, 0, 32), "is not legal"),
    "a tile of a unit": (put("chains", 0, "parts", [[1, CODE[0][1]]] * 3), "is not legal"),
    "no time": (put("chains", 0, "seconds", 0), "took 0.0"),
    "a time in words": (put("chains", 0, "seconds", "1e-4"), "should be a number"),
    "a reason that is none": (put("chains", 0, "reason", None), "None should be text"),
    "no problem": (put("chains", 0, "links", 0, "ci", 0), "is no problem"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_entry_is_refused(name):
    change, message = BAD[name]
    content = json.loads(tuned.render(Table(GPU, chains=(ENTRY,))))
    change(content)
    with pytest.raises(ValueError, match=message):
        tuned.parse(json.dumps(content), GPU)


def test_the_plan_follows_what_was_measured():
    assert not decide.decide_chain(links(n=1)).together
    table = Table(GPU, chains=(ENTRY,))
    plan = decide.decide_chain(links(n=1), table=table)
    assert (plan.parts, plan.seconds, plan.source, plan.reason) == (WHOLE, 1e-4, "tuned", ENTRY.reason)
    assert plan.alternatives, "predicted all the same"
    large = links(n=256)
    assert decide.decide_chain(large).together
    slow = Table(GPU, chains=(replace(ENTRY, links=large, parts=apart(large)),))
    assert not decide.decide_chain(large, table=slow).together
    assert decide.decide_chain(large, "triton", slow).source == "model", "for what is forced, all is predicted"
    assert decide.decide_chain(large, "mixed", table).parts == apart(large)


def test_candidates_survive_the_protocol():
    found = chain_candidates(links())
    assert found[0].parts == apart(links())
    assert {tuple(length for length, _ in way.parts) for way in found} == {(1, 1, 1), (3,), (1, 2), (2, 1)}
    assert len(set(found)) == len(found) == len(set(map(str, found)))
    for way in found:
        assert decoded(json.loads(json.dumps(way.encode()))) == way
    assert decoded(Candidate("mixed").encode()) == Candidate("mixed")


def test_the_fastest_wins_if_it_wins_by_more_than_the_spread():
    large = links(n=256)
    default = ChainCandidate(decide.decide_chain(large).parts)
    other = next(way for way in chain_candidates(large) if len(way.parts) == 2)
    for spread, winner in ((1e-5, other), (2e-4, default)):
        entry = tune_chain(large, FakeRunner({str(other): 0.9e-3}, spread=spread), nothing)
        assert entry.parts == winner.parts
        assert (entry.links, entry.seconds) == (large, 0.9e-3 if winner == other else 1e-3)
    assert "best others: " in entry.reason


def test_a_live_chain_that_keeps_the_host_longer_does_not_win():
    whole = next(way for way in chain_candidates(links()) if len(way.parts) == 1)
    for direction, together in (("inference", False), ("frozen", True)):
        chain = links(n=1, direction=direction)
        times = {str(way): 30e-6 for way in chain_candidates(chain)} | {str(whole): 10e-6}
        entry = tune_chain(chain, FakeRunner(times), nothing)
        assert any(length > 1 for length, _ in entry.parts) == together


def test_where_the_host_takes_longer_what_the_gpu_has_done_first_wins():
    """Of roads that keep the host as long, and of tiles."""
    small, larger = links(n=1, side=28, width=128), links(n=14)
    for chain in (small, larger):
        times = dict(decide.decide_chain(chain).alternatives)
        assert times[3,] == times[1, 1, 1], "the host's"
    assert not decide.decide_chain(small).together
    seconds = {tile: sum(x.seconds for x in roofline.chain(larger, tile)) for tile in chain_forward.tiles(larger)}
    fastest = min(seconds, key=seconds.__getitem__)
    assert decide.decide_chain(larger).parts == ((3, fastest),) != ((3, next(iter(seconds))),)


def test_a_wrong_chain_is_quarantined_and_all_wrong_ones_leave_nothing():
    ways = chain_candidates(links())
    whole = next(way for way in ways if len(way.parts) == 1)
    entry = tune_chain(links(), FakeRunner({str(whole): 1e-6}, ratios={str(whole): 3.0}), nothing)
    assert entry.parts != whole.parts
    assert entry.quarantined == ((str(whole), "wrong: its error is 3 times the allowed one"),)
    with pytest.raises(Failure, match="no candidate came through"):
        tune_chain(links(), FakeRunner(ratios={str(way): 3.0 for way in ways}), nothing)


def test_units_and_chains_of_a_model_are_tuned_and_known():
    with torch.device("meta"):
        model = torchvision.models.resnet50().bfloat16()
    for direction in ("inference", "frozen"):
        found = find_problems(model, [(2, 3, 64, 64)], torch.bfloat16, direction, 90)
        of_chains = [p for p in found if isinstance(p, Chain)]
        assert found == [*(p for p in found if isinstance(p, Problem)), *of_chains], "the units before their chains"
        assert len(found) == len(set(found))
        assert all(link in found for chain in of_chains for link in chain.links)
        assert {link.direction for chain in of_chains for link in chain.links} == {direction}
        assert len(of_chains) >= 7
    few = [changed(of_chains[0], gpu="NVIDIA Test 1000"), replace(found[0], gpu="NVIDIA Test 1000")]
    report = tune_problems(few, "NVIDIA Test 1000", FakeRunner(), compiled=nothing)
    assert [type(entry) for entry in report.tuned] == [ChainEntry, Entry] and not report.failed
    again = tune_problems(few, "NVIDIA Test 1000", FakeRunner(), compiled=nothing)
    assert len(again.known) == 2 and not again.tuned
    assert shown(few[0]).endswith("frozen") and few[0].first.layer in shown(few[0])


SMALL = [
    ("whole", lambda chain: chain),
    ("without the next", lambda chain: Chain(*chain[:2], None)),
    ("without 3x3", lambda chain: Chain(None, *chain[1:])),
]


@pytest.mark.parametrize("direction", ["inference", "frozen"])
@pytest.mark.parametrize(("name", "kept"), SMALL)
def test_verification_passes_what_is_right(name, kept, direction):
    chain = kept(links(n=2, side=5, width=16, dtype=torch.float32, direction=direction, arch=80))
    trial = ChainTrial(chain, DEVICE)
    lengths = [len(chain.links)]
    for parts in (apart(chain), tuple((length, None) for length in lengths)):
        assert 0 <= trial.ratio(ChainCandidate(parts)) <= 1
    results = trial.work(ChainCandidate(((len(chain.links), None),)))()
    assert set(results) == {"z"} | ({"y"} if chain.reduce else set())


@pytest.mark.parametrize("output", [0, 1])
def test_verification_finds_a_wrong_chain(output, monkeypatch):
    chain = links(n=2, side=5, width=16, dtype=torch.float32, arch=80)
    whole = chains.launch

    def wrong(*arguments):
        outputs = whole(*arguments)
        outputs[output][0, 0, 0, 0] += 1
        return outputs

    monkeypatch.setattr(tune_trial.chains, "launch", wrong)
    assert ChainTrial(chain, DEVICE).ratio(ChainCandidate(((3, None),))) > 1


def test_a_live_chain_is_timed_with_what_reads_its_batch_norms():
    for direction, before in (("inference", ["batch_norm_stats"] * 3), ("frozen", [])):
        _, launches = rehearse(links(direction=direction), ChainCandidate(WHOLE))
        assert [launch.name for launch in launches] == [*before, "chain_forward"]
    calls, _ = rehearse(links(direction="frozen"), ChainCandidate(WHOLE))
    assert [call.config for call in calls] == [WHOLE[0][1]]


class Clock:
    def prepare(self, work):
        return work

    def seconds(self, work) -> float:
        work()
        return 1e-3

    def release(self) -> None:
        pass

    def usable(self) -> bool:
        return True


def test_the_worker_answers_about_chains():
    chain = links(n=1, side=4, width=16, dtype=torch.float32, arch=80)
    ways = [ChainCandidate(apart(chain)).encode(), ChainCandidate(((3, None),)).encode()]
    requests = [{"problem": tuned.asked_out(chain)}, {"verify": ways[1]}, {"time": ways}]
    out = io.StringIO()
    with torch.no_grad(), products(tf32=False):  # which the worker sets for good
        serve(map(json.dumps, requests), out, lambda asked: tune_trial.trial_of(asked, DEVICE), Clock())
    made, verified, *timed = [json.loads(line) for line in out.getvalue().splitlines()]
    assert made == {}
    assert verified["ratio"] <= 1
    assert set(map(len, timed[-1]["samples"])) == {25} and len(timed[-1]["samples"]) == 2
