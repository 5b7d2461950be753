"""Single wrong lines that the tests must notice, for ``python -m tests.mutate``. To add one, append it."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """In ``file``, ``old``, which stands there exactly once, becomes ``new``, and one of ``tests`` fails.

    ``tests``: arguments of pytest; the fewer tests, the sooner it is known.
    """

    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())} -> {' '.join(self.new.split())}"


AUTOGRAD = "tests/test_autograd.py"

MUTATIONS = [
    Mutation(
        "resnet_fused/chain.py",
        "return not self.frozen or self.needs.gamma",
        "return not self.frozen",
        f"{AUTOGRAD} -k frozen",
    ),
    Mutation(
        "resnet_fused/chain.py",
        "bias = unit.stats[2] * dbeta if unit.frozen else",
        "bias = 0 * dbeta if unit.frozen else",
        f"{AUTOGRAD} -k frozen",
    ),
    Mutation(
        "resnet_fused/chain.py",
        "return g.clone() if g is dz else g.to(shortcut.dtype)",
        "return g.to(shortcut.dtype)",
        f"{AUTOGRAD} -k opcheck",
    ),
    Mutation("resnet_fused/chain.py", "total = own.clone()", "total = own", "tests/test_distributed.py -k one_process"),
    Mutation("resnet_fused/chain.py", "mask=True, out=dx", "mask=False, out=dx", f"{AUTOGRAD} -k fp32"),
    Mutation(
        "resnet_fused/chain.py",
        "overwrite=g is not dz and not keeps_g",
        "overwrite=not keeps_g",
        f"{AUTOGRAD} -k 'fp32 and run'",
    ),
    Mutation(
        "resnet_fused/chain.py",
        "overwrite=g is not dz and not keeps_g",
        "overwrite=g is not dz",
        f"{AUTOGRAD} -k fp32",
    ),
    Mutation(
        "resnet_fused/autograd.py",
        "keep = [True] * (branch - 1) + [spec.keep_last_y, spec.keep_projection_y]",
        "keep = [True] * (branch + 1)",
        "tests/test_training_costs.py -k saved_bytes",
    ),
    Mutation("resnet_fused/autograd.py", "if torch.is_grad_enabled():", "if False:", f"{AUTOGRAD} -k second"),
    Mutation(
        "resnet_fused/functional.py",
        'if conv.padding == "valid":',
        "if False:",
        "tests/test_functional.py -k convolution_arguments",
    ),
    Mutation(
        "resnet_fused/functional.py",
        'return "the batch is empty"',
        "pass",
        "tests/test_functional.py -k empty",
    ),
    Mutation(
        "resnet_fused/modules.py",
        "(self.out_channels - self.in_channels) // 2",
        "0",
        "tests/test_modules.py -k splits",
    ),
    Mutation(
        "resnet_fused/modules.py",
        'recompute=self.memory == "recompute"',
        "recompute=False",
        "tests/test_training_costs.py -k saved_bytes",
    ),
    Mutation(
        "resnet_fused/plan.py",
        'entry.tiles if entry is not None and entry.implementation == "fused" else Tiles()',
        "entry.tiles if entry is not None else Tiles()",
        "tests/test_plan.py -k force",
    ),
    Mutation(
        "resnet_fused/plan.py",
        "key=lambda way: (waited(problem, *way), way[1])",
        "key=lambda way: way[1]",
        "tests/test_plan.py -k host",
    ),
    Mutation("resnet_fused/plan.py", "_requested.reset(token)", "pass", "tests/test_functional.py -k restored"),
]
