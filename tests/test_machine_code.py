"""What is read off machine code: loops, tensor-core work, issue slots, occupancy; on text written for the purpose."""

from __future__ import annotations

import pytest

from resnet_fused.commands.cost_machine_code import (
    Instruction,
    described_macs,
    issue_slots,
    occupancy,
    parse,
    tensor_macs,
)

LISTING = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/                   HMMA.16816.F32.BF16 R12, R4, R7, R12 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   STG.E.128 [R2], R8 ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
"""


def test_the_main_loop_is_the_innermost_with_tensor_work():
    program = parse(LISTING)
    assert [ins.opcode for ins in program.main_loop] == ["HMMA", "HMMA", "BRA"]
    assert (2, 4) in program.loops
    assert (1, 5) in program.loops
    assert len(program.code) == 9


def test_an_unrolled_loop_is_the_stretch_of_its_products():
    program = parse(LISTING.replace("@!P0 BRA `(.L_x_2)", "NOP").replace("@P1 BRA `(.L_x_1)", "NOP"))
    assert [ins.opcode for ins in program.main_loop] == ["HMMA", "HMMA"]


def test_a_wait_behind_the_programs_end_is_no_loop():
    """It branches back to where the program waited, before a product that is in no loop."""
    listing = LISTING.replace("@!P0 BRA `(.L_x_2)", "NOP").replace("@P1 BRA `(.L_x_1)", "NOP")
    program = parse(listing + "        /*0090*/                   BRA `(.L_x_2) ;\n")
    assert program.loops == ()
    assert [ins.opcode for ins in program.main_loop] == ["HMMA", "HMMA"]


def test_without_products_there_is_no_main_loop():
    assert parse("        /*0000*/   EXIT ;\n").main_loop == ()
    assert issue_slots((), 4, 90) == (None, "no tensor-core instructions")


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
        ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 // 4),
        ("FFMA", 0),
    ],
)
def test_products_of_one_warp(name, macs):
    assert tensor_macs(Instruction(name, "")) == macs


def test_a_product_without_a_shape_is_refused():
    with pytest.raises(ValueError, match="must name its shape"):
        tensor_macs(Instruction("HMMA.F32", ""))


def test_slots_are_instructions_over_tensor_cycles():
    """Two products of four warps on sm_80: 16384 multiply-accumulates, 16 cycles; three instructions each, 3 cycles."""
    loop = parse(LISTING).main_loop
    assert issue_slots(loop, 4, 80) == (3 / 16, "")
    assert issue_slots(loop, 8, 80) == (3 / 16, "")
    assert issue_slots(loop, 4, 86) == (3 / 32, "")
    tf32 = tuple(Instruction(ins.name.replace("16816.F32.BF16", "1688.F32.TF32"), ins.operands) for ins in loop)
    assert issue_slots(tf32, 4, 80) == (3 / 16, "")


def test_slots_of_tcgen05_come_from_the_descriptor():
    """M = 128, N = 64, bf16: bits 17 to 22 hold N/8, bits 24 to 28 M/16."""
    descriptor = (128 // 16) << 24 | (64 // 8) << 17 | 1 << 7
    assert described_macs(descriptor) == 128 * 64 * 16
    product = Instruction("UTCHMMA", "gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR9], idesc[UR10]")
    known = (Instruction("UMOV", f"UR10, {descriptor:#x}"), product)
    assert issue_slots(known, 4, 100) == ((4 * 2 / 4) / (128 * 64 * 16 / 4096), "")
    value, reason = issue_slots((product,), 4, 100)
    assert value is None
    assert "does not stand in the main loop" in reason


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "programs", "limit"),
    [
        (32, 0, 4, 90, 16, "warps"),
        (255, 0, 4, 90, 2, "registers"),
        (64, 100_000, 4, 90, 2, "shared memory"),
        (16, 0, 1, 80, 32, "programs"),
        (168, 49_152, 4, 80, 3, "registers"),
        (128, 32_768, 4, 86, 3, "shared memory"),
    ],
)
def test_occupancy(registers, shared, warps, arch, programs, limit):
    found = occupancy(registers, shared, warps, arch)
    assert (found.programs, found.limit) == (programs, limit)


def test_tensor_memory_limits_occupancy():
    found = occupancy(64, 0, 4, 100, tensor_memory=256)
    assert (found.programs, found.limit, found.percent) == (2, "tensor memory", 12.5)
