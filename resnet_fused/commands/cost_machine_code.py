"""What a compiled kernel costs, read from its machine code (SASS); needs no GPU.

Registers and stack are what the assembler noted. The *issue slots per tensor cycle* of the main loop are the cycles
that a multiprocessor takes to issue its instructions, over the cycles that its tensor cores take for its products at
peak: near or above 1 they wait for instructions. A static bound, not a timing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import triton

from resnet_fused.kernels.gpus import gpu_of

SCHEDULERS = 4
"""Of a multiprocessor; each issues one instruction of a warp per cycle (every architecture since sm_70)."""

# Multiply-accumulates of 16-bit factors with fp32 sums, per multiprocessor and cycle, of the GPU that stands for its
# architecture: its peak over multiprocessors and boost clock (kernels/gpus.py; 1.41, 1.74, 2.52, 1.83, 1.85, 2.41 GHz).
MACS_PER_CYCLE = {80: 1024, 86: 512, 89: 256, 90: 2048, 100: 4096, 120: 256}

TENSOR_OPCODES = ("HMMA", "HGMMA", "UTCHMMA")


@dataclass(frozen=True)
class Instruction:
    """``name`` with its modifiers, as HMMA.16816.F32.BF16, and the text of its operands."""

    name: str
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]


@dataclass(frozen=True)
class Program:
    """A kernel's instructions, and its loops as positions (first, last) of their bodies."""

    code: tuple[Instruction, ...]
    loops: tuple[tuple[int, int], ...]

    @property
    def main_loop(self) -> tuple[Instruction, ...]:
        """The innermost loop with the most tensor-core work; where the compiler unrolled it, the stretch that is left.

        Empty without tensor-core instructions.
        """
        tensor = self._tensor()
        outside = [i for i in tensor if not any(a <= i <= b for a, b in self.loops)]
        if len(outside) > len(tensor) // 2:
            return self.code[outside[0] : outside[-1] + 1]
        return max(self.product_loops, key=_products, default=())

    @property
    def product_loops(self) -> tuple[tuple[Instruction, ...], ...]:
        """The innermost loops with tensor-core work, in order."""
        tensor = self._tensor()
        held = [(a, b) for a, b in self.loops if any(a <= i <= b for i in tensor)]
        innermost = [o for o in held if not any(o != i and o[0] <= i[0] and i[1] <= o[1] for i in held)]
        return tuple(self.code[first : last + 1] for first, last in sorted(innermost))

    def _tensor(self) -> list[int]:
        return [i for i, ins in enumerate(self.code) if ins.opcode in TENSOR_OPCODES]


def _products(loop: Sequence[Instruction]) -> int:
    return sum(ins.opcode in TENSOR_OPCODES for ins in loop)


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel asks of a multiprocessor.

    ``registers`` per thread; ``spilled``: bytes of stack per thread; ``shared``: bytes per program. ``issue_slots`` per
    tensor cycle of the main loop, or None with the ``reason``; ``loop_slots``: of each loop with products, in order.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    tensor_memory: int
    instructions: int
    issue_slots: float | None
    reason: str
    loop_slots: tuple[float | None, ...] = ()


def read(compiled: Any, arch: int) -> MachineCode:
    """Read Triton's compiled kernel (``Call.compile``)."""
    registers, spilled = resources(compiled)
    code, metadata = program(compiled), compiled.metadata
    slots, reason = issue_slots(code.main_loop, metadata.num_warps, arch)
    return MachineCode(
        registers=registers,
        spilled=spilled,
        shared=metadata.shared,
        warps=metadata.num_warps,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        instructions=len(code.code),
        issue_slots=slots,
        reason=reason,
        loop_slots=tuple(issue_slots(loop, metadata.num_warps, arch)[0] for loop in code.product_loops),
    )


def program(compiled: Any) -> Program:
    """The machine code of Triton's compiled kernel."""
    return parse(_tool("nvdisasm", "-c", compiled))


def resources(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of stack per thread of Triton's compiled kernel, as the assembler noted them."""
    usage = _tool("cuobjdump", "-res-usage", compiled)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage names no registers: {usage[:500]!r}")
    return int(found[1]), int(found[2])


def _tool(name: str, option: str, compiled: Any) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


_LABEL = re.compile(r"^\s*(\.L_[\w.]+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*\}?\s*$")
_TARGET = re.compile(r"\.L_[\w.]+")


def parse(sass: str) -> Program:
    """The instructions and loops in what ``nvdisasm -c`` prints.

    A loop ends with a branch back to its label, unless the program ends in between: behind its end stand the loops in
    which it waits, and branch back to where it did.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(Instruction(found[1], found[2]))
    loops = []
    for i, ins in enumerate(code):
        target = _TARGET.search(ins.operands) if ins.opcode == "BRA" else None
        first = labels.get(target[0], i + 1) if target else i + 1
        if first < i and all(other.opcode != "EXIT" for other in code[first:i]):
            loops.append((first, i))
    return Program(tuple(code), tuple(loops))


def issue_slots(loop: Sequence[Instruction], warps: int, arch: int) -> tuple[float | None, str]:
    """Issue slots per tensor cycle of a loop body that ``warps`` execute; or None and why it can not be told.

    The products of sm_100 (UTCHMMA) are issued once for the whole program, those of the others by each warp. What one
    warp alone executes around them counts as if all did.
    """
    if not loop:
        return None, "no tensor-core instructions"
    values: dict[str, int] = {}
    macs, rate = 0, MACS_PER_CYCLE[gpu_of(arch).arch]
    for ins in loop:
        if constant := _CONSTANT.match(ins.operands) if ins.opcode == "UMOV" else None:
            values[constant[1]] = int(constant[2], 16)
        elif ins.opcode == "UTCHMMA":
            register = _DESCRIPTOR.search(ins.operands)
            if register is None or register[1] not in values:
                return None, "the size of a tcgen05 product does not stand in the main loop"
            macs += described_macs(values[register[1]])
        else:
            macs += warps * tensor_macs(ins)
    if any("TF32" in ins.name for ins in loop):
        rate //= 2
    return (warps * len(loop) / SCHEDULERS) / (macs / rate), ""


_CONSTANT = re.compile(r"(UR\d+), 0x([0-9a-f]+)$")
_DESCRIPTOR = re.compile(r"idesc\[(UR\d+)\]")


def described_macs(descriptor: int) -> int:
    """Multiply-accumulates of a tcgen05 product of 16-bit factors or, at half the depth, TF32.

    Of the instruction descriptor (PTX ISA, tcgen05.mma) bits 17 to 22 are N/8, bits 24 to 28 M/16, and bits 7 to 9 the
    factors' format: 0 fp16, 1 bf16, 2 TF32. A product is 32 bytes deep. For TF32 it counts twice, since it takes as
    long as one of 16 bits.
    """
    n, m = (descriptor >> 17 & 63) * 8, (descriptor >> 24 & 31) * 16
    return m * n * 16


_SHAPES = {"HMMA": (re.compile(r"\.(16)(8)(4|8|16)(?=\.|$)"), 1), "HGMMA": (re.compile(r"\.(\d+)x(\d+)x(\d+)\b"), 4)}


def tensor_macs(ins: Instruction) -> int:
    """Multiply-accumulates of one warp: of its HMMA, or of its quarter of a warpgroup's HGMMA; 0 for all others."""
    if ins.opcode not in _SHAPES:
        return 0
    pattern, warps = _SHAPES[ins.opcode]
    shape = pattern.search(ins.name)
    if shape is None:
        raise ValueError(f"a tensor-core instruction must name its shape, as HMMA.16816; got {ins.name}")
    return prod(map(int, shape.groups())) // warps


# Per compute capability (CUDA C++ Programming Guide, technical specifications): warps and programs that a
# multiprocessor holds at most. A100, GA10x, AD10x, H100, B200, GB20x.
_MAX_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
_MAX_PROGRAMS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
_REGISTERS_PER_SCHEDULER = 16384
_REGISTER_UNIT = 256
_SHARED_UNIT = 128
_SHARED_RESERVED = 1024
_TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Occupancy:
    """Programs that a multiprocessor holds at a time, what limits them, and the warps in percent of the most."""

    programs: int
    limit: str
    percent: float


@cache
def occupancy(registers: int, shared: int, warps: int, arch: int, tensor_memory: int = 0) -> Occupancy:
    """Of programs with so many ``registers`` per thread, bytes of ``shared`` memory and ``warps``.

    Registers are given to a warp in units of 256 and belong to one of four schedulers; shared memory is given in units
    of 128 bytes, 1024 of which the system keeps per program. ``tensor_memory``: columns, of the 512 of sm_100.
    """
    gpu = gpu_of(arch)
    warp_registers = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    whole_warps = -(-warps // SCHEDULERS) * SCHEDULERS
    limits = {
        "programs": _MAX_PROGRAMS[gpu.arch],
        "warps": _MAX_WARPS[gpu.arch] // warps,
        "registers": _REGISTERS_PER_SCHEDULER // max(warp_registers, 1) * SCHEDULERS // whole_warps,
        "shared memory": gpu.sm_shared // (-(-shared // _SHARED_UNIT) * _SHARED_UNIT + _SHARED_RESERVED),
    }
    if tensor_memory:
        limits["tensor memory"] = _TENSOR_MEMORY_COLUMNS // tensor_memory
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limit, 100 * limits[limit] * warps / _MAX_WARPS[gpu.arch])
