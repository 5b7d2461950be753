"""Every launcher says what it takes, and no kernel takes more than a reader can hold on a page."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
MOST = {"kernel": 30, "device": 13}
"""Parameters of a kernel, and of a function that kernels call."""


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.stem}.{node.name}", node


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    own = function.args
    rest = [arg for arg in (own.vararg, own.kwarg) if arg is not None]
    return [*own.posonlyargs, *own.args, *own.kwonlyargs, *rest]


def is_device_code(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


HOST = [pytest.param(node, id=name) for name, node in functions() if not is_device_code(node)]
DEVICE = [pytest.param(node, id=name) for name, node in functions() if is_device_code(node)]


@pytest.mark.parametrize("function", HOST)
def test_a_function_of_the_host_has_types(function):
    untyped = [p.arg for p in parameters(function) if p.annotation is None and p.arg not in ("self", "cls")]
    assert not untyped
    assert function.returns is not None


@pytest.mark.parametrize("function", DEVICE)
def test_what_travels_together_is_one_parameter(function):
    kind = "kernel" if function.name.endswith("_kernel") else "device"
    assert len(parameters(function)) <= MOST[kind]
