"""The table of measurements: what it answers, what it writes, and what it refuses to read."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch

from resnet_fused import tuned
from resnet_fused.kernels.conv_wgrad import WgradConfig
from resnet_fused.kernels.launch import TileConfig
from resnet_fused.problem import Problem, Tiles
from resnet_fused.tuned import Entry, Table

GPU = "NVIDIA H100 80GB HBM3"
pytestmark = pytest.mark.usefixtures("own_cache")
PROBLEM = Problem(
    *(32, 28, 28, 128, 128, 3, 3, (1, 1), (1, 1), (1, 1), 1, torch.bfloat16, False, "training", True, False, 90, GPU)
)
TILES = Tiles(TileConfig(64, 64, 32), None, WgradConfig(TileConfig(64, 32, 64, num_stages=2), 5))
ENTRY = Entry(PROBLEM, "fused", TILES, 1e-4, 1e-6, "measured 100.0 us", (("mixed", "the process died of signal 11"),))


def test_what_is_saved_is_loaded():
    file = tuned.save(Table(GPU, (ENTRY,)))
    assert file == tuned.path(GPU)
    table = tuned.load(GPU)
    assert table is not None
    assert (table.gpu, table.entries) == (GPU, (ENTRY,))
    assert tuned.load(GPU) is table, "read once"
    assert tuned.load("another GPU") is None


def test_the_nearest_number_of_images_answers():
    table = Table(GPU, tuple(replace(ENTRY, problem=replace(PROBLEM, n=n), reason=str(n)) for n in (1, 8, 64)))
    for n, nearest in ((1, 1), (2, 1), (3, 8), (32, 64), (1000, 64)):
        assert table.lookup(replace(PROBLEM, n=n)).reason == str(nearest)
    for other in ({"h": 29}, {"co": 256}, {"dtype": torch.float16}, {"prologue": False}, {"arch": 80}):
        assert table.lookup(replace(PROBLEM, **other)) is None
    assert table.exact(replace(PROBLEM, n=2)) is None


def test_inference_answers_for_frozen_models_unless_those_were_measured():
    inference, frozen = (replace(PROBLEM, direction=d, prologue=False) for d in ("inference", "frozen"))
    table = Table(GPU, (replace(ENTRY, problem=inference, reason="inference"),))
    assert table.lookup(frozen).reason == "inference"
    assert table.lookup(PROBLEM) is None
    table = table.with_entry(replace(ENTRY, problem=frozen, implementation="cudnn", reason="frozen"))
    assert table.lookup(frozen).reason == "frozen"
    assert table.lookup(inference).reason == "inference"


def test_an_entry_replaces_that_of_its_problem():
    table = Table(GPU).with_entry(ENTRY).with_entry(replace(ENTRY, seconds=2e-4))
    assert [entry.seconds for entry in table.entries] == [2e-4]


def test_the_package_ships_tables_that_the_users_own_comes_before(tmp_path, monkeypatch):
    shipped = tmp_path / "package" / "tables"
    shipped.mkdir(parents=True)
    monkeypatch.setattr(tuned, "__file__", str(shipped.parent / "tuned.py"))
    (shipped / tuned.path(GPU).name).write_text(tuned.render(Table(GPU, (ENTRY,))))
    assert tuned.load(GPU).entries == (ENTRY,)
    tuned.save(Table(GPU))
    assert tuned.load(GPU).entries == ()


@pytest.mark.parametrize(("own", "xdg"), [("own", "xdg"), ("", "xdg"), ("", "")])
def test_the_cache_directory(own, xdg, monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FUSED_CACHE", own and str(tmp_path / own))
    monkeypatch.setenv("XDG_CACHE_HOME", xdg and str(tmp_path / xdg))
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = own or (f"{xdg}/resnet_fused" if xdg else ".cache/resnet_fused")
    assert tuned.cache_dir() == tmp_path / expected


def document(change) -> str:
    content = json.loads(tuned.render(Table(GPU, (ENTRY,))))
    change(content)
    return json.dumps(content)


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        for key in path:
            content = content[key]
        content[last] = value

    return change


TILE_OF_HALF_A_GPU = [512, 512, 64, 4, 4, 0, 0]
BAD = {
    "cut off": (lambda: tuned.render(Table(GPU, (ENTRY,)))[:200], "delimiter|Expecting|Unterminated"),
    "no object": (lambda: "[]", "not a table of schema 1"),
    "another schema": (lambda: document(put("schema", 2)), "not a table of schema 1"),
    "another GPU": (lambda: document(put("gpu", "A100")), "its gpu is 'A100'"),
    "another version": (lambda: document(put("versions", "triton", "3.0")), "its versions is"),
    "an unknown way": (lambda: document(put("entries", 0, "implementation", "magic")), "implementation 'magic'"),
    "cuDNN in training": (lambda: document(put("entries", 0, "implementation", "cudnn")), "implementation 'cudnn'"),
    "a tile too large": (lambda: document(put("entries", 0, "tiles", TILE_OF_HALF_A_GPU * 3)), "is not legal"),
    "a tile of text": (lambda: document(put("entries", 0, "tiles", ["64"] * 21)), "should be integers"),
    "too few numbers": (lambda: document(put("entries", 0, "tiles", [64] * 7)), "has 7 numbers for its tiles, not 21"),
    "no time": (lambda: document(put("entries", 0, "seconds", 0)), r"took 0\.0 \+- 1e-06 seconds"),
    "no number": (lambda: document(put("entries", 0, "seconds", float("nan"))), "took nan"),
    "a problem without channels": (lambda: document(put("entries", 0, "problem", "ci", 0)), "is no problem"),
    "no image left": (lambda: document(put("entries", 0, "problem", "h", 0)), "is no problem"),
    "a dtype of its own": (lambda: document(put("entries", 0, "problem", "dtype", "int8")), "malformed: KeyError"),
    "a field too many": (lambda: document(put("entries", 0, "problem", "colour", 1)), "malformed: TypeError"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_refused_with_one_message_and_ignored(case, caplog):
    make, message = BAD[case]
    tuned.write_whole(tuned.path(GPU), make())
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        assert tuned.load(GPU) is None
        assert tuned.load(GPU) is None
    (record,) = caplog.records
    assert str(tuned.path(GPU)) in record.getMessage()
    with pytest.raises(ValueError, match=message):
        tuned.parse(make(), GPU)


def test_a_table_that_cannot_be_read_is_ignored(caplog):
    tuned.path(GPU).mkdir(parents=True)
    assert tuned.load(GPU) is None
    assert "Is a directory" in caplog.text
