"""Every kernel that the models can launch, as compiled for every supported GPU: tensor cores used, nothing spilled.

Compilation needs no GPU, but it needs Triton's compiler in place of its interpreter, so it runs in a process of its
own. What the ledger knows is not compiled (tests/kernels/ledger.py).
"""

from __future__ import annotations

import warnings

from resnet_fused.kernels import chain_box, conv_box, dgrad_box
from resnet_fused.kernels.gpus import ARCHITECTURES, gpu_of
from resnet_fused.plan import roofline
from tests.compiler import answer
from tests.kernels.model_kernels import CHAINS

TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}

TENSOR_CORE_KERNELS = (
    *("conv_forward_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel", "conv_pool_kernel"),
    *("conv_box_kernel", "dgrad_box_kernel"),
    *CHAINS,
)
BY_TMA = {
    **{"conv_box_kernel": conv_box.TILES, "dgrad_box_kernel": dgrad_box.TILES},
    "chain_box_kernel": chain_box.TILES,
}


def test_no_spills_and_tensor_cores():
    """Of all GPUs in one test, since finding what the models launch takes longer than looking it up."""
    report = answer("-m", "tests.kernels.ledger", "--report")
    for arch in ARCHITECTURES:
        kernels = [kernel for kernel in report["kernels"] if kernel["arch"] == arch]
        assert len(kernels) >= 80, arch
        found = {kernel["kernel"] for kernel in kernels}
        assert set(TENSOR_CORE_KERNELS) - found == {name for name, tiles in BY_TMA.items() if arch not in tiles}, arch
    tried = [kernel for kernel in report["kernels"] if kernel["figures"] is not None]
    assert len(tried) == (len(report["kernels"]) if report["has_ledger"] else report["compiled"])
    for kernel in tried:
        assert_good(kernel)
    if report["triton"] == "3.8.0":
        assert_counted(report["kernels"])
    warn_of(report)


def assert_counted(kernels: list[dict]) -> None:
    """The plan's issue slots are those of the compiled kernels."""
    counted: dict[str, dict[int, dict[int, float]]] = {}
    for kernel in kernels:
        if kernel["modelled"] is not None:
            name, taps = kernel["modelled"]
            counted.setdefault(name, {}).setdefault(kernel["arch"], {})[taps] = kernel["figures"]["issue_slots"]
    slots = {
        name: {arch: tuple(by[taps] for taps in sorted(by)) for arch, by in archs.items()}
        for name, archs in counted.items()
    }
    assert slots == roofline.ISSUE_SLOTS


def assert_good(kernel: dict) -> None:
    arch, figures = kernel["arch"], kernel["figures"]
    # Units of odd channels and large filters must compile and fit; some of theirs spill.
    assert figures["spilled"] == 0 or kernel["odd"], kernel
    assert figures["registers"] <= 255, kernel
    assert figures["contracted_sums"] == 0, kernel
    for load, count in figures["slow_loads"].items():
        assert kernel["narrow"] or may_be_slow(kernel, load, count), kernel
    assert "loads" not in figures["waits"], kernel
    # A chain's step waits once, so that the products of the next one need not each.
    settled = int(kernel["kernel"] in CHAINS)
    assert figures["waits"].get("products", 0) <= settled or kernel["serial"] or kernel["odd"], kernel
    assert figures["shared"] <= gpu_of(arch).shared, kernel
    if kernel["number_format"] != "float32" and kernel["kernel"] in TENSOR_CORE_KERNELS:
        # The wide instructions of sm_90 and sm_100 take 64 rows at the least.
        wide = kernel["block_m"] >= 64
        assert (TENSOR_CORE[arch] if wide else "mma.sync") in figures["instructions"], kernel


def may_be_slow(kernel: dict, load: str, count: int) -> bool:
    """Whether nothing is to be saved by a load of 16 bytes in place of ``load``, which stands ``count`` times."""
    if load == "LDGSTS 32" and kernel["prologue"] and count <= 3:
        return True  # of its vectors, which have fewer elements than the program threads
    if load in ("LDGSTS 32", "LDGSTS 64") and count == 1 and kernel["filter_tile"] < 16 * kernel["threads"]:
        return True
    # Products in TF32 take both factors with K contiguous: what lies otherwise is turned on the way, by the element.
    return load == "LDGSTS 32" and kernel["number_format"] == "tf32"


def warn_of(report: dict) -> None:
    """What the ledger does not know, and what was done about it."""
    if not report["has_ledger"]:
        not_tried = len(report["kernels"]) - report["compiled"]
        told = f"there is no ledger of Triton {report['triton']}: "
        told += f"{report['compiled']} kernels were compiled, {not_tried} not tried"
    elif report["compiled"]:
        told = f"{report['compiled']} kernels that the ledger lacks were compiled"
    else:
        return
    warnings.warn(f"{told} (python -m tests.kernels.ledger writes them down)", stacklevel=2)
