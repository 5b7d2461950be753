"""The ledger of compiled kernels, on a kernel written for the purpose: what it notices, and what is compiled for it."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
import triton

from resnet_fused.commands.cost_machine_code import parse
from resnet_fused.kernels.launch import Call, Cost, TileConfig
from tests.kernels import ledger as module
from tests.kernels.ledger import Figures, Ledger, digest, faults, main, settle, slow_loads, waits
from tests.kernels.model_kernels import Kernel
from tests.kernels.test_compiled_code import assert_good, warn_of

TEXT = """
import triton.language as tl
from triton.runtime.jit import JITFunction

FACTOR = tl.constexpr(3)

@JITFunction
def scaled(x):
    return x * FACTOR

@JITFunction
def scale_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, scaled(tl.load(x_ptr + offs, mask=offs < n)), mask=offs < n)

def launcher():
    return 1
"""
numbers = count()
ROOT = Path(__file__).parents[2]


def kernel_of(folder: Path, text: str = TEXT):
    """The kernel in a file of its own."""
    path = folder / f"kernel_{next(numbers)}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.scale_kernel


def calls_of(kernel, blocks=(32, 64), arch: int = 80) -> dict[str, Kernel]:
    x = torch.empty(64, device="meta")
    made = [
        Kernel(
            arch,
            "float32",
            Call(
                kernel,
                (1,),
                {"x_ptr": x, "y_ptr": x, "n": 64, "BLOCK": block},
                TileConfig(block, 1, 1),
                lambda: Cost(0, 0, 0),
            ),
        )
        for block in blocks
    ]
    return {kernel.key: kernel for kernel in made}


class Compiler:
    """In the place of Triton's: says the same of every kernel, and notes which it was asked for."""

    figures = Figures(16, 0, 128, 0, [], None, {}, {})

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, kernels) -> dict[str, Figures]:
        self.asked += kernels
        return dict.fromkeys(kernels, self.figures)


def held(kernels: dict[str, Kernel]) -> Ledger:
    return Ledger(module.sources(kernels), dict.fromkeys(kernels, Compiler.figures))


def test_a_digest_is_of_what_is_compiled_and_not_of_where_it_stands(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first = digest(kernel_of(tmp_path))
    same = [TEXT.replace("return 1", "return 2"), "# moved down\n\n" + TEXT]
    assert {digest(kernel_of(tmp_path / "elsewhere", text)) for text in same} == {first}
    changed = [
        TEXT.replace("constexpr(3)", "constexpr(4)"),
        TEXT.replace("x * F", "x + F"),
        TEXT.replace("0, B", "1, B"),
    ]
    assert len({first, *(digest(kernel_of(tmp_path, text)) for text in changed)}) == 4


def test_the_key_tells_apart_what_is_compiled_apart(tmp_path):
    kernel = kernel_of(tmp_path)
    (one,) = calls_of(kernel, (32,)).values()
    special = [
        one,
        one._replace(arch=90),
        one._replace(call=replace(one.call, arguments={**one.call.arguments, "n": 63})),
        one._replace(call=replace(one.call, config=TileConfig(32, 1, 1, num_warps=8))),
        one._replace(call=replace(one.call, arguments={**one.call.arguments, "BLOCK": 64})),
    ]
    assert len({kernel.key for kernel in special}) == len(special)
    assert one._replace(call=replace(one.call, grid=(7,))).key == one.key
    assert one.key == next(iter(calls_of(kernel_of(tmp_path), (32,))))


def test_what_is_known_is_not_compiled_and_what_changed_is(tmp_path):
    kernels = calls_of(kernel_of(tmp_path))
    ledger, compiler = held(kernels), Compiler()
    assert settle(kernels, ledger, compiler) == (ledger.figures, {})
    assert compiler.asked == []
    changed = calls_of(kernel_of(tmp_path, TEXT.replace("x * F", "x + F")))
    assert changed.keys() == kernels.keys()
    assert settle(changed, ledger, compiler)[1] == changed
    assert sorted(compiler.asked) == sorted(kernels)
    another, compiler = calls_of(kernel_of(tmp_path), (32, 64, 128)), Compiler()
    figures, anew = settle(another, ledger, compiler)
    assert figures.keys() == another.keys()
    assert compiler.asked == list(anew) == list(another.keys() - kernels.keys())


def test_without_a_ledger_a_hundred_are_compiled_and_the_rest_is_told(tmp_path, monkeypatch):
    kernel = kernel_of(tmp_path)
    kernels = {key: k for arch in range(250) for key, k in calls_of(kernel, (32,), arch).items()}
    compilers = Compiler(), Compiler()
    assert [len(settle(kernels, None, compiler)[0]) for compiler in compilers] == [100, 100]
    assert compilers[0].asked == compilers[1].asked
    monkeypatch.setattr(module, "compiled", Compiler())
    with pytest.warns(UserWarning, match="no ledger of Triton .*: 100 kernels were compiled, 150 not tried"):
        warn_of(module.report(kernels, None))
    with pytest.warns(UserWarning, match="250 kernels that the ledger lacks were compiled"):
        warn_of(module.report(kernels, Ledger({}, {})))


@pytest.mark.parametrize("figure", Figures._fields)
def test_a_wrong_figure_is_noticed(figure, tmp_path):
    kernels = calls_of(kernel_of(tmp_path), (32,))
    ledger = held(kernels)
    assert faults(kernels, ledger, "seed", Compiler()) == []
    (key,) = kernels
    wrong = ["wgmma"] if figure == "instructions" else 1
    ledger.figures[key] = ledger.figures[key]._replace(**{figure: wrong})
    (fault,) = faults(kernels, ledger, "seed", Compiler())
    assert key in fault
    assert f"{figure}={wrong}" in fault


def test_a_ledger_that_is_not_of_what_is_launched_is_noticed(tmp_path):
    kernels = calls_of(kernel_of(tmp_path))
    first, second = kernels
    assert faults({first: kernels[first]}, held(kernels), "seed", Compiler()) == [f"no longer launched: {second}"]
    assert faults(kernels, held({first: kernels[first]}), "seed", Compiler()) == [f"not in the ledger: {second}"]
    changed = calls_of(kernel_of(tmp_path, TEXT.replace("x * F", "x + F")))
    assert len(faults(changed, held(kernels), "seed", Compiler())) == 2


def test_a_ledger_with_fewer_figures_knows_nothing(tmp_path):
    kernels, path = calls_of(kernel_of(tmp_path)), tmp_path / "ledger.json"
    module.write(path, held(kernels))
    assert module.read(path) == held(kernels)
    path.write_text(path.read_text().replace(", {}]", "]"))
    assert module.read(path).known(kernels) == {}


def test_the_seed_chooses_the_tenth(tmp_path):
    kernel = kernel_of(tmp_path)
    kernels = {key: k for arch in range(95) for key, k in calls_of(kernel, (32,), arch).items()}
    asked = []
    for seed in ("one", "other", "one"):
        compiler = Compiler()
        assert faults(kernels, held(kernels), seed, compiler) == []
        asked.append(compiler.asked)
    assert [len(tried) for tried in asked] == [10, 10, 10]
    assert asked[0] == asked[2] != asked[1]


def test_the_command_writes_checks_and_reports(tmp_path):
    """In a process of its own: where its interpreter ran, Triton's compiler would find the interpreter's functions."""
    code = f"from tests.kernels.test_ledger import use_the_command; use_the_command({str(tmp_path)!r})"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "used\n"


def use_the_command(folder: str) -> None:
    kernels = calls_of(kernel_of(Path(folder)))
    module.FOLDER = Path(folder) / "ledger"
    module.launched = lambda arch: kernels if arch == 80 else {}
    with pytest.raises(SystemExit, match=r"there is no .*json: run python -m"):
        main(["--check", "seed"])
    path = module.FOLDER / f"triton-{triton.__version__}.json"
    assert said() == f"{path.name}: 2 kernels, 2 of them compiled\n"
    text = path.read_text()
    assert len(text.splitlines()) == 2 + 3 + 4, "a line for each kernel"
    assert "2 kernels, 0 of them" in said()
    assert "all as it says" in said("--check", "seed")
    report = json.loads(said("--report"))
    assert [kernel["key"] for kernel in report["kernels"]] == list(kernels)
    for kernel in report["kernels"]:
        assert_good(kernel)
        assert 8 <= kernel["figures"]["registers"] < 64

    tampered = module.read(path)
    for key, figures in tampered.figures.items():
        tampered.figures[key] = figures._replace(registers=figures.registers + 1)
    module.write(path, tampered)
    with pytest.raises(SystemExit, match=r"the ledger has Figures\(registers=.*, the compiler"):
        main(["--check", "seed"])
    said("--all")
    assert path.read_text() == text
    print("used")


def said(*arguments: str) -> str:
    with redirect_stdout(io.StringIO()) as out:
        main(list(arguments))
    return out.getvalue()


LOADS = """
.L_x_1:
        /*0100*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64] ;
        /*0110*/                   LDG.E.U16 R3, desc[UR4][R2.64] ;
        /*0120*/                   LDGSTS.E [R1+0x10], desc[UR4][R2.64] ;
        /*0130*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0140*/                   HMMA.16816.F32 R4, R4, R6, R4 ;
"""


@pytest.mark.parametrize(
    ("end", "slow"),
    [
        ("        /*0150*/              @P0 BRA `(.L_x_1) ;", {"LDG 16": 1, "LDG 128": 1, "LDGSTS 32": 1}),
        ("        /*0150*/                   EXIT ;", {}),
    ],
)
def test_what_a_main_loop_loads_otherwise_than_by_16_bytes(end, slow):
    assert slow_loads(parse(LOADS + end)) == slow


def test_of_an_unrolled_loop_what_is_narrower_than_any_vector_counts():
    products = "        /*0150*/                   HMMA.16816.F32 R4, R4, R6, R4 ;\n"
    assert slow_loads(parse(products + LOADS + products)) == {"LDG 16": 1}


LOAD = ["LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64]", "LDGDEPBAR"]
PRODUCTS = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0"]
READY = ["DEPBAR.LE SB0, 0x0", "WARPGROUP.ARRIVE"]
DONE = ["WARPGROUP.DEPBAR.LE gsb0, 0x0"]


@pytest.mark.parametrize(
    ("loop", "found"),
    [
        ([*READY, *PRODUCTS, *LOAD], {}),
        ([*LOAD, *READY, *PRODUCTS], {"loads": 1}),
        ([*LOAD, "DEPBAR.LE SB0, 0x2", *PRODUCTS, *READY], {}),
        ([*LOAD, *READY, *LOAD, *READY, *PRODUCTS], {"loads": 2}),
        ([PRODUCTS[0], *DONE, PRODUCTS[1], *DONE], {"products": 1}),
        ([*PRODUCTS, "WARPGROUP.DEPBAR.LE gsb0, 0x1", *PRODUCTS, *DONE], {}),
    ],
)
def test_what_a_main_loop_waits_for(loop, found):
    lines = [
        f"        /*{16 * i:04x}*/                   {text} ;" for i, text in enumerate([*loop, "@P0 BRA `(.L_x_1)"])
    ]
    assert waits(parse("\n".join([".L_x_1:", *lines]))) == found


@pytest.mark.parametrize(
    ("figure", "bad"),
    [
        *[("spilled", 8), ("registers", 256), ("contracted_sums", 1), ("shared", 200_000), ("instructions", [])],
        *[("slow_loads", {"LDG 16": 1}), ("slow_loads", {"LDGSTS 32": 4}), ("slow_loads", {"LDG 128": 1})],
        *[("waits", {"loads": 2}), ("waits", {"products": 3})],
    ],
)
def test_a_bad_kernel_of_the_ledger_fails(figure, bad):
    figures = Figures(128, 0, 1000, 0, ["mma.sync"], 0.3, {"LDGSTS 32": 3}, {})
    kernel = {"arch": 80, "kernel": "conv_forward_kernel", "number_format": "bfloat16", "block_m": 64, "odd": False}
    kernel |= {"narrow": "", "serial": "", "prologue": True, "filter_tile": 4096, "threads": 128}
    assert_good(kernel | {"figures": figures._asdict()})
    with pytest.raises(AssertionError):
        assert_good(kernel | {"figures": figures._replace(**{figure: bad})._asdict()})
