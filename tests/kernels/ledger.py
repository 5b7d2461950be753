"""What Triton's compiler makes of every kernel that the models can launch: a file per Triton in ``ledger/``.

``python -m tests.kernels.ledger`` compiles what the installed Triton's ledger lacks, and drops what nothing launches;
``--all`` compiles everything anew. ``--check SEED`` writes nothing: it compiles a tenth anew, which SEED chooses, and
fails where the ledger is not what the compiler says, or lacks a kernel. ``--report`` is for the tests: all as JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from resnet_fused.commands.cost_machine_code import TENSOR_OPCODES, Program, issue_slots, program, resources
from resnet_fused.kernels.gpus import ARCHITECTURES
from tests.kernels.model_kernels import DTYPES, Kernel, launched

FOLDER = Path(__file__).with_name("ledger")
SAMPLE = 100
"""Kernels that are compiled where there is no ledger of the installed Triton."""
INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma")


class Figures(NamedTuple):
    """Per thread registers and spilled bytes, per program bytes of shared memory; what its PTX holds: multiply-adds
    whose addend came from another lane, and names of tensor-core instructions; and of its machine code's main loop the
    issue slots per tensor cycle, :func:`slow_loads` and :func:`waits`."""

    registers: int
    spilled: int
    shared: int
    contracted_sums: int
    instructions: list[str]
    issue_slots: float | None
    slow_loads: dict[str, int]
    waits: dict[str, int]


Kernels = Mapping[str, Kernel]
Compile = Callable[[Kernels], dict[str, Figures]]


class Ledger(NamedTuple):
    """``sources``: by name, the digest of a kernel's source; ``figures``: by key, what the compiler made of it."""

    sources: dict[str, str]
    figures: dict[str, Figures]

    def known(self, kernels: Kernels) -> dict[str, Figures]:
        """Of those of the ``kernels`` that were compiled from the source that they have now."""
        now = sources(kernels)
        return {
            key: self.figures[key]
            for key, kernel in kernels.items()
            if key in self.figures and self.sources.get(kernel.name) == now[kernel.name]
        }


def read(path: Path) -> Ledger | None:
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    rows = content["figures"].items()
    # A kernel with fewer figures than there are now is one that the ledger lacks.
    return Ledger(content["sources"], {k: Figures(*row) for k, row in rows if len(row) == len(Figures._fields)})


def write(path: Path, ledger: Ledger) -> None:
    """A line for each kernel, so that a difference can be read."""
    path.parent.mkdir(exist_ok=True)
    tables = []
    for name, table in ledger._asdict().items():
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(table[key])}" for key in sorted(table))
        tables.append(f'"{name}": {{\n{rows}\n}}')
    path.write_text("{\n" + ",\n".join(tables) + "\n}\n")


def sources(kernels: Kernels) -> dict[str, str]:
    """By name, the digest of each kernel's source."""
    return {name: digest(kernel) for name, kernel in {k.name: k.call.kernel for k in kernels.values()}.items()}


def digest(kernel: JITFunction) -> str:
    """Of the text of a kernel, and of the functions, constants and named tuples of this project that they refer to.

    The same on every line, in every folder and under every Python, as the JIT's own is not.
    """
    found: dict[str, str] = {}

    def visit(function: JITFunction) -> None:
        found[function.fn.__qualname__] = function.src
        for name in function.fn.__code__.co_names:
            value = function.fn.__globals__.get(name)
            if isinstance(value, JITFunction):
                if value.fn.__qualname__ not in found:
                    visit(value)
            elif isinstance(value, tl.constexpr):
                found[name] = repr(value.value)
            elif hasattr(value, "_fields"):
                found[name] = repr(value._fields)

    visit(kernel)
    return sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]


def compiled(kernels: Kernels) -> dict[str, Figures]:
    """By key, of each of the ``kernels``, which the processors share."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _share, [kernels]) as pool:
        return dict(pool.imap_unordered(_compile, kernels))


_shared: Kernels = {}


def _share(kernels: Kernels) -> None:
    """In a process of the pool: it inherits what can not be sent to it."""
    global _shared
    _shared = kernels


def _compile(key: str) -> tuple[str, Figures]:
    kernel = _shared[key]
    code = kernel.call.compile(kernel.arch)
    ptx = code.asm["ptx"]
    instructions = [name for name in INSTRUCTIONS if name in ptx]
    machine = program(code)
    slots, _ = issue_slots(machine.main_loop, code.metadata.num_warps, kernel.arch)
    return key, Figures(
        *resources(code),
        code.metadata.shared,
        contracted_sums(ptx),
        instructions,
        slots if slots is None else round(slots, 3),
        slow_loads(machine),
        waits(machine),
    )


def slow_loads(machine: Program) -> dict[str, int]:
    """Loads from global memory in the main loop, by opcode and bits, but for 16 bytes straight to shared memory.

    Where the compiler has unrolled the loop, only those of less than 4 bytes: the epilogue's loads of vectors stand
    among its products.
    """
    loop = machine.main_loop
    unrolled = loop not in [machine.code[first : last + 1] for first, last in machine.loops]
    loads = Counter((i.opcode, _bits(i.name)) for i in loop if i.opcode in ("LDG", "LDGSTS"))
    slow = {x: n for x, n in loads.items() if x != ("LDGSTS", 128) and (x[1] < 32 or not unrolled)}
    return {f"{opcode} {bits}": count for (opcode, bits), count in sorted(slow.items())}


def waits(machine: Program) -> dict[str, int]:
    """What the main loop waits for where it need not; without what does not occur.

    loads: all that are under way, behind which no product stands that they could be under way with. products: those
    that begin when the one before is done, in place of following it through the tensor cores (sm_90). Where the
    compiler has unrolled the loop, its last loads have no product left to be under way with.
    """
    unrolled = machine.main_loop not in [machine.code[first : last + 1] for first, last in machine.loops]
    found: Counter[str] = Counter()
    loading = serial = False
    for instruction in machine.main_loop:
        if instruction.opcode == "LDGDEPBAR":
            loading = True
        elif instruction.name.startswith("DEPBAR.LE") and instruction.operands == "SB0, 0x0":
            found["loads"] += loading and not unrolled
        elif instruction.name == "WARPGROUP.DEPBAR.LE" and instruction.operands == "gsb0, 0x0":
            serial = True
        elif instruction.opcode in TENSOR_OPCODES:
            found["products"] += serial
            loading = serial = False
    return {what: count for what, count in sorted(found.items()) if count}


def _bits(name: str) -> int:
    """How wide a load is: LDG.E.U16 takes 16 bits, LDG.E.128 128, LDG.E 32."""
    return next((int(part.lstrip("US")) for part in name.split(".") if part.lstrip("US").isdigit()), 32)


def contracted_sums(ptx: str) -> int:
    """Multiply-adds whose addend came from another lane: each lane of a sum would round a product of its own."""
    exchanged: set[str] = set()
    found = 0
    for line in ptx.splitlines():
        name, _, operands = line.strip().rstrip(";").partition(" ")
        registers = re.findall(r"%\w+", operands)
        if name.startswith("shfl.") or (name.startswith("mov.b") and exchanged & set(registers[1:])):
            exchanged |= set(registers[:2] if operands.strip().startswith("{") else registers[:1])
        elif registers:
            found += name.startswith("fma.") and operands.rpartition(",")[2].strip() in exchanged
            exchanged -= set(registers[:1])
    return found


def settle(kernels: Kernels, ledger: Ledger | None, compiled: Compile) -> tuple[dict[str, Figures], Kernels]:
    """The figures of all ``kernels``, and those that were compiled for it, since the ledger does not know them.

    Without a ledger those of a sample only.
    """
    if ledger is None:
        drawn = random.Random(0).sample(sorted(kernels), min(SAMPLE, len(kernels)))
        missing, known = {key: kernels[key] for key in drawn}, {}
    else:
        known = ledger.known(kernels)
        missing = {key: kernel for key, kernel in kernels.items() if key not in known}
    return {**known, **(compiled(missing) if missing else {})}, missing


def faults(kernels: Kernels, ledger: Ledger, seed: str, compiled: Compile) -> list[str]:
    """Kernels that the ledger lacks or holds in vain, and of a tenth, which ``seed`` chooses, wrong figures."""
    known = ledger.known(kernels)
    found = [f"not in the ledger: {key}" for key in kernels if key not in known]
    found += [f"no longer launched: {key}" for key in ledger.figures if key not in kernels]
    tried = random.Random(seed).sample(sorted(known), -(-len(known) // 10))
    for key, figures in sorted(compiled({key: kernels[key] for key in tried}).items()):
        if figures != known[key]:
            found.append(f"{key}: the ledger has {known[key]}, the compiler {figures}")
    return found


def report(kernels: Kernels, ledger: Ledger | None) -> dict[str, Any]:
    """``figures`` is None for a kernel that was not tried."""
    figures, anew = settle(kernels, ledger, compiled)
    rows = [
        {
            "key": key,
            "arch": kernel.arch,
            "kernel": kernel.name,
            "number_format": kernel.number_format,
            "tile": str(tile),
            "block_m": tile.block_m,
            "odd": kernel.odd,
            "narrow": kernel.narrow,
            "prologue": kernel.prologue,
            "serial": kernel.serial,
            "filter_tile": kernel.call.config.block_n
            * kernel.call.config.block_k
            * DTYPES[kernel.number_format].itemsize,
            "threads": 32 * kernel.call.config.num_warps,
            "modelled": kernel.modelled,
            "figures": figures[key]._asdict() if key in figures else None,
        }
        for key, kernel in kernels.items()
        for tile in [kernel.call.config]
    ]
    return {"triton": triton.__version__, "has_ledger": ledger is not None, "compiled": len(anew), "kernels": rows}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.ledger", description=__doc__)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--all", action="store_true", help="compile everything anew")
    way.add_argument("--check", metavar="SEED", help="compile a tenth anew and compare")
    way.add_argument("--report", action="store_true", help="print all kernels as JSON")
    options = parser.parse_args(arguments)
    path = FOLDER / f"triton-{triton.__version__}.json"
    ledger = None if options.all else read(path)
    kernels = {key: kernel for arch in ARCHITECTURES for key, kernel in launched(arch).items()}
    if options.report:
        json.dump(report(kernels, ledger), sys.stdout)
        return
    if options.check is not None:
        if ledger is None:
            raise SystemExit(f"there is no {path}: run python -m tests.kernels.ledger")
        triton.knobs.compilation.always_compile = True
        if found := faults(kernels, ledger, options.check, compiled):
            raise SystemExit("\n".join([*found, f"{path.name} is not what this Triton makes of the kernels"]))
        print(f"{path.name}: a tenth of {len(kernels)} kernels compiled anew, seed {options.check}: all as it says")
        return
    triton.knobs.compilation.always_compile = options.all
    figures, anew = settle(kernels, ledger or Ledger({}, {}), compiled)
    write(path, Ledger(sources(kernels), figures))
    print(f"{path.name}: {len(figures)} kernels, {len(anew)} of them compiled")


if __name__ == "__main__":
    main(sys.argv[1:])
