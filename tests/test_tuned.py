"""The table of measurements: what it answers, what it writes, and what it refuses to read."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_fused import BasicBlock, fuse, implementation, trace
from resnet_fused.kernels import conv_box, conv_forward, dgrad_box
from resnet_fused.kernels.launch import TileConfig
from resnet_fused.plan import cache, checked, decide, tuned
from resnet_fused.plan.problem import Problem, Tiles
from resnet_fused.plan.tuned import Entry, Table

GPU = "NVIDIA H100 80GB HBM3"
pytestmark = pytest.mark.usefixtures("own_cache")
PROBLEM = Problem(
    *(32, 28, 28, 128, 128, 3, 3, (1, 1), (1, 1), (1, 1), 1, torch.bfloat16, False, True, 90, "training", False, GPU)
)
TILES = Tiles(TileConfig(64, 64, 32), None, TileConfig(64, 32, 64, num_stages=2, splits=5))
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


def test_the_digest_tells_every_change_of_a_kernel(tmp_path):
    def digest():
        return cache.digest.__wrapped__(tmp_path)

    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("y = 1\n")
    seen = [digest()]
    (tmp_path / "notes.txt").write_text("no code")
    assert digest() == seen[0]
    (tmp_path / "b.py").write_text("y = 2\n")
    seen.append(digest())
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    seen.append(digest())
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n")
    (tmp_path / "c.py").write_text("")
    seen.append(digest())
    assert len(set(seen)) == 4
    assert all(re.fullmatch("[0-9a-f]{12}", found) for found in seen)


def test_what_was_found_of_other_kernels_does_not_count(monkeypatch, caplog):
    cpu = torch.device("cpu")
    file = tuned.save(Table(GPU, (ENTRY,)))
    checked.note(cpu)
    assert cache.versions()["kernels"] in file.name
    monkeypatch.setattr(cache, "digest", lambda folder: "0123456789ab")
    tuned.load.cache_clear()
    assert tuned.load(GPU) is None
    assert not checked.verified(cpu)
    assert not caplog.records, "it is not there, as after an update of torch"
    file.rename(tuned.path(GPU))
    tuned.load.cache_clear()
    assert tuned.load(GPU) is None
    assert "is ignored: its versions is" in caplog.text


@pytest.mark.parametrize(("own", "xdg"), [("own", "xdg"), ("", "xdg"), ("", "")])
def test_the_cache_directory(own, xdg, monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FUSED_CACHE", own and str(tmp_path / own))
    monkeypatch.setenv("XDG_CACHE_HOME", xdg and str(tmp_path / xdg))
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = own or (f"{xdg}/resnet_fused" if xdg else ".cache/resnet_fused")
    assert cache.cache_dir() == tmp_path / expected


def document(*changes) -> str:
    content = json.loads(tuned.render(Table(GPU, (ENTRY,))))
    for change in changes:
        change(content)
    return json.dumps(content)


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        for key in path:
            content = content[key]
        content[last] = value

    return change


TILE_OF_HALF_A_GPU = [512, 512, 64, 4, 4, 0, 0, 0, 0, 0]
BAD = {
    "cut off": (lambda: tuned.render(Table(GPU, (ENTRY,)))[:200], "delimiter|Expecting|Unterminated"),
    "no object": (lambda: "[]", "not a table of schema 1"),
    "another schema": (lambda: document(put("schema", 2)), "not a table of schema 1"),
    "another GPU": (lambda: document(put("gpu", "A100")), "its gpu is 'A100'"),
    "another version": (lambda: document(put("versions", "triton", "3.0")), "its versions is"),
    "other kernels": (lambda: document(put("versions", "kernels", "0123456789ab")), "its versions is .*0123456789ab"),
    "an unknown way": (lambda: document(put("entries", 0, "implementation", "magic")), "implementation 'magic'"),
    "cuDNN in training": (lambda: document(put("entries", 0, "implementation", "cudnn")), "implementation 'cudnn'"),
    "cuDNN without a ReLU": (
        lambda: document(
            put("entries", 0, "implementation", "cudnn"),
            put("entries", 0, "problem", "direction", "frozen"),
            put("entries", 0, "problem", "relu", False),
        ),
        "implementation 'cudnn'",
    ),
    "training without a ReLU": (lambda: document(put("entries", 0, "problem", "relu", False)), "is no problem"),
    "a tile too large": (lambda: document(put("entries", 0, "tiles", TILE_OF_HALF_A_GPU * 3)), "is not legal"),
    "a tile of text": (lambda: document(put("entries", 0, "tiles", ["64"] * 30)), "should be integers"),
    "too few numbers": (lambda: document(put("entries", 0, "tiles", [64] * 7)), "has 7 numbers for its tiles, not 30"),
    "no time": (lambda: document(put("entries", 0, "seconds", 0)), r"took 0\.0 \+- 1e-06 seconds"),
    "no number": (lambda: document(put("entries", 0, "seconds", float("nan"))), "took nan"),
    "a problem without channels": (lambda: document(put("entries", 0, "problem", "ci", 0)), "is no problem"),
    "no image left": (lambda: document(put("entries", 0, "problem", "h", 0)), "is no problem"),
    "a dtype of its own": (lambda: document(put("entries", 0, "problem", "dtype", "int8")), "malformed: KeyError"),
    "a field too many": (lambda: document(put("entries", 0, "problem", "colour", 1)), "malformed: TypeError"),
    "nested without end": (lambda: "[" * 100_000, "malformed: RecursionError"),
    "nested inside": (lambda: f'{{"schema": 1, "gpu": {"[" * 5000}{"]" * 5000}}}', "RecursionError"),
    "a number of 401 digits": (lambda: document(put("entries", 0, "problem", "n", 10**400)), "is no problem"),
    "a time of 401 digits": (lambda: document(put("entries", 0, "seconds", 10**400)), "malformed: OverflowError"),
    "a number of 10,000 digits": (lambda: document(put("schema", 1)).replace("1e-06", "1" * 10_000), "limit|Overflow"),
    "a size of 64 bits": (lambda: document(put("entries", 0, "problem", "h", 2**31)), "is no problem"),
    "a time that is true": (lambda: document(put("entries", 0, "seconds", True)), "True should be a number"),
    "a time in words": (lambda: document(put("entries", 0, "seconds", "1e-4")), "'1e-4' should be a number"),
    "a spread without end": (lambda: document(put("entries", 0, "spread", float("inf"))), "inf seconds"),
    "a size that is true": (lambda: document(put("entries", 0, "problem", "n", True)), "should be integers"),
    "a flag that is no flag": (lambda: document(put("entries", 0, "problem", "tf32", 0)), "is no problem"),
    "a pool of a normalised input": (lambda: document(put("entries", 0, "problem", "pooled", True)), "is no problem"),
    "a third direction": (lambda: document(put("entries", 0, "problem", "direction", "sideways")), "is no problem"),
    "a direction of lists": (lambda: document(put("entries", 0, "problem", "direction", [])), "is no problem"),
    "an entry of another GPU": (lambda: document(put("entries", 0, "problem", "gpu", "A100")), "is of the GPU 'A100'"),
    "a negative padding": (lambda: document(put("entries", 0, "problem", "padding", [-1, 1])), "is no problem"),
    "no stride": (lambda: document(put("entries", 0, "problem", "stride", [0, 1])), "is no problem"),
    "a filter larger than the image": (lambda: document(filter_of(99)), "is no problem"),
    "three strides": (lambda: document(put("entries", 0, "problem", "stride", [1, 1, 1])), "is no problem"),
    "entries that are no list": (lambda: document(put("entries", {})), "entries are no list"),
    "a reason that is none": (lambda: document(put("entries", 0, "reason", None)), "None should be text"),
    "a quarantine of numbers": (lambda: document(put("entries", 0, "quarantined", [["mixed", 3]])), "should be text"),
    "a quarantine of one": (lambda: document(put("entries", 0, "quarantined", [["mixed"]])), "not enough values"),
    "no split": (lambda: document(put("entries", 0, "tiles", 29, 0)), "has 0 splits; legal are 1 to 264"),
    "less than no split": (lambda: document(put("entries", 0, "tiles", 29, -5)), "has -5 splits"),
    "splits without end": (lambda: document(put("entries", 0, "tiles", 29, 10**6)), "has 1000000 splits"),
    "splits of a forward with moments": (lambda: document(put("entries", 0, "tiles", 9, 2)), "is not legal"),
    "splits of boxes": (
        lambda: document(of_inference, put("entries", 0, "tiles", slice(6, 10), [1, 8, 8, 2])),
        "not legal",
    ),
    "splits of no step": (
        lambda: document(of_inference, put("entries", 0, "tiles", 9, 37)),
        "config.splits must be .* 36; got",
    ),
    "no split of the forward": (lambda: document(of_inference, put("entries", 0, "tiles", 9, 0)), "has 0 splits"),
    "splits of the input's gradient": (lambda: document(put("entries", 0, "tiles", 19, 2)), "not to be told from"),
    "a tile without rows": (lambda: document(put("entries", 0, "tiles", 0, 0)), "not to be told from"),
    "rows of an odd number": (lambda: document(put("entries", 0, "tiles", 0, 48)), "is not legal"),
    "rows below a tensor core's": (lambda: document(put("entries", 0, "tiles", 0, 8)), "is not legal"),
    "rows without end": (
        lambda: document(put("entries", 0, "tiles", slice(0, 7), [2048, 2048, 16, 4, 1, 0, 0])),
        "legal",
    ),
    "columns too deep": (lambda: document(put("entries", 0, "tiles", slice(0, 5), [16, 256, 256, 4, 4])), "not legal"),
    "sixteen warps": (lambda: document(put("entries", 0, "tiles", 3, 16)), "is not legal"),
    "no stage": (lambda: document(put("entries", 0, "tiles", 4, 0)), "is not legal"),
    "nine stages": (lambda: document(put("entries", 0, "tiles", 4, 9)), "is not legal"),
    "few registers": (lambda: document(put("entries", 0, "tiles", 5, 31)), "is not legal"),
    "many registers": (lambda: document(put("entries", 0, "tiles", 5, 256)), "is not legal"),
    "merged groups in pieces": (lambda: document(merged_groups), "must hold the 32 input channels of merged groups"),
    "no UTF-8": (lambda: b"\xff\xfe{}", "can't decode"),
}


def filter_of(size: int):
    def change(content):
        content["entries"][0]["problem"] |= {"r": size, "s": size}

    return change


def merged_groups(content) -> None:
    """Groups of 16 channels share a tile of 32, which a block_k of 16 does not hold."""
    content["entries"][0]["problem"] |= {"groups": 8}
    content["entries"][0]["tiles"] = [64, 64, 16, 4, 3, 0, 0, 0, 0, 1] + 20 * [0]


def of_inference(content) -> None:
    content["entries"][0]["problem"] |= {"direction": "inference", "prologue": False}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_refused_with_one_message_and_ignored(case, caplog):
    make, message = BAD[case]
    content = make()
    tuned.path(GPU).parent.mkdir(parents=True)
    tuned.path(GPU).write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        assert tuned.load(GPU) is None
        assert tuned.load(GPU) is None
        tuned.load.cache_clear()
        assert tuned.load(GPU) is None
    (record,) = caplog.records
    assert str(tuned.path(GPU)) in record.getMessage()
    with pytest.raises(ValueError, match=message):
        tuned.parse(cache.read(tuned.path(GPU)), GPU)


def test_limits_are_legal():
    """What the tuner may find is read again."""
    for tile in (TileConfig(16, 256, 16, num_stages=1), TileConfig(256, 16, 16, num_stages=8, max_registers=255)):
        entry = replace(ENTRY, tiles=Tiles(tile, tile, replace(tile, splits=264)))
        assert tuned.parse(tuned.render(Table(GPU, (entry,))), GPU).entries == (entry,)
    split = replace(ENTRY, problem=replace(PROBLEM, direction="frozen", prologue=False))
    split = replace(split, tiles=Tiles(TileConfig(64, 64, 32, splits=36)))
    assert tuned.parse(tuned.render(Table(GPU, (split,))), GPU).entries == (split,)
    steady = replace(ENTRY, spread=0.0)
    assert tuned.parse(tuned.render(Table(GPU, (steady,))), GPU).entries == (steady,)
    large = replace(ENTRY, problem=replace(PROBLEM, n=2**31 - 1))
    assert tuned.parse(tuned.render(Table(GPU, (large,))), GPU).lookup(PROBLEM) == large
    assert Table(GPU, (large,)).lookup(replace(PROBLEM, n=0)) == large, "an empty batch has a plan too"


def test_four_and_eight_warps_are_legal():
    a100 = replace(PROBLEM, n=256, gpu="", arch=80, prologue=False, direction="inference")
    (wide,) = conv_forward.wide_tiles(a100)
    assert tuned.legal(wide, a100)
    for other in (replace(wide, num_warps=16), replace(wide, num_warps=2)):
        assert not tuned.legal(other, a100)
    h100 = replace(a100, arch=90)
    assert tuned.legal(next(tile for tile in conv_box.tiles(h100) if tile.num_warps == 8), h100)


def test_boxes_are_legal_where_their_kernel_takes_them():
    """Chunks are of the channels that it sums over, of the input forward and of the output for the gradient."""
    h100 = replace(PROBLEM, n=256, r=3, s=3, padding=(1, 1), ci=64, co=96, gpu="", arch=90, prologue=True)
    (tile, *_) = dgrad_box.tiles(h100.gradient)
    assert tile.block_k == 32
    assert tuned.legal(tile, h100, gradient=True)
    assert not tuned.legal(tile, h100), "its input is normalised on the way"
    assert not tuned.legal(replace(tile, block_k=64), h100, gradient=True)
    assert not tuned.legal(tile, replace(h100, r=1, s=1, padding=(0, 0)), gradient=True), "it would compute dy"


def test_nobody_sees_the_rehearsal():
    text = tuned.render(Table(GPU, (ENTRY,)))
    with trace() as seen, torch.device("meta"):
        tuned.parse(text, GPU)
    assert not seen.launches


def broken(kind: str, file: Path) -> None:
    """Make ``file``, or a folder above it, unusable."""
    if kind == "cache is a file":
        file.parents[1].rmdir()
        file.parents[1].write_text("")
        return
    file.parent.mkdir(parents=True)
    if kind == "directory":
        file.mkdir()
    elif kind == "dangling link":
        file.symlink_to("nowhere")
    elif kind == "link to itself":
        file.symlink_to(file)
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("directory", "Is a directory"),
        ("cache is a file", "Not a directory"),
        ("link to itself", "Too many levels of symbolic links"),
        ("pipe", "it is no regular file"),
        ("device", "it is no regular file"),
        ("dangling link", ""),
    ],
)
def test_a_table_that_cannot_be_read_is_ignored(kind, message, caplog):
    broken(kind, tuned.path(GPU))
    assert tuned.load(GPU) is None
    assert message in caplog.text
    assert len(caplog.records) == bool(message)
    assert not checked.verified(torch.device("cpu"))


@pytest.fixture
def _homeless(own_cache, monkeypatch):
    """A user whom the system does not know, as in many a container."""
    for name in ("RESNET_FUSED_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", home)


@pytest.mark.usefixtures("_homeless")
def test_without_a_home_directory_everything_runs_and_nothing_is_kept(monkeypatch, caplog):
    assert tuned.load(GPU) is None
    assert not checked.verified(torch.device("cpu"))
    block, x = fuse(torch.nn.Sequential(BasicBlock(16, 16))).eval(), torch.randn(1, 16, 4, 4)
    monkeypatch.setattr(decide, "target", lambda device: (0, GPU))
    with implementation("triton"), torch.no_grad(), trace() as seen:
        block(x)
    assert sum(launch.config is not None for launch in seen.launches) == 2
    assert len(caplog.records) <= 1
    for write in (lambda: tuned.add(GPU, ENTRY), lambda: checked.note(torch.device("cpu"))):
        with pytest.raises(FileNotFoundError, match="no home directory: RESNET_FUSED_CACHE must name"):
            write()


@pytest.mark.usefixtures("_homeless")
def test_a_cache_needs_no_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / "resnet_fused"


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_permissions_that_the_umask_leaves(mask):
    before = os.umask(mask)
    try:
        files = tuned.save(Table(GPU, (ENTRY,))), checked.note(torch.device("cpu"))
    finally:
        os.umask(before)
    assert [file.stat().st_mode & 0o777 for file in files] == [0o666 & ~mask] * 2


def crowd(work, count: int = 8) -> None:
    """``work(i)`` for every i at once."""
    with ThreadPoolExecutor(count) as pool:
        start = threading.Barrier(count)
        list(pool.map(lambda i: (start.wait(), work(i)), range(count)))


@pytest.mark.parametrize("locks", [True, False])
def test_tuners_side_by_side_lose_no_entry(locks, monkeypatch):
    if not locks:

        def flock(*_):
            raise OSError("No locks available")

        monkeypatch.setattr(cache.fcntl, "flock", flock)
        tuned.add(GPU, ENTRY)
        assert tuned.load(GPU).entries == (ENTRY,)
        return
    crowd(lambda i: [tuned.add(GPU, replace(ENTRY, problem=replace(PROBLEM, n=10 * i + j + 1))) for j in range(3)])
    assert {entry.problem.n for entry in tuned.load(GPU).entries} == {
        10 * i + j + 1 for i in range(8) for j in range(3)
    }


def test_what_another_process_saved_since_the_table_was_loaded_stays():
    tuned.save(Table(GPU, (ENTRY,)))
    assert tuned.load(GPU).entries == (ENTRY,)
    other, own = (replace(ENTRY, problem=replace(PROBLEM, n=n)) for n in (2, 3))
    cache.write_whole(tuned.path(GPU), tuned.render(Table(GPU, (ENTRY, other))))
    assert tuned.add(GPU, own).entries == (ENTRY, other, own)


def test_notes_side_by_side_are_all_kept(monkeypatch):
    here = threading.local()
    monkeypatch.setattr(checked, "stack", lambda device: {"gpu": here.gpu})

    def note(i):
        here.gpu = str(i)
        checked.note(torch.device("cpu"))

    crowd(note)
    noted = json.loads((cache.cache_dir() / "checked.json").read_text())
    assert sorted(stack["gpu"] for stack in noted) == [str(i) for i in range(8)]


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", "[[1]]", "null", "\0"])
def test_a_note_that_is_none_costs_another_self_test(content):
    cache.write_whole(cache.cache_dir() / "checked.json", content)
    assert not checked.verified(torch.device("cpu"))
    checked.note(torch.device("cpu"))
    assert checked.verified(torch.device("cpu"))
