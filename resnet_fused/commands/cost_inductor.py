"""Inductor's own convolution in Triton, the template of the installed torch, as source text for one layer.

``torch.compile(mode="max-autotune")`` fills the same template in. Here its hooks are filled in without a GPU: sizes and
strides as numbers, as for static shapes, and a plain store, to which Inductor would add what follows the convolution.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resnet_fused.plan.problem import Problem, dtype_name

CONFIGURATIONS = 3
"""So many of Inductor's are looked at: those with tiles nearest in size to a given one."""

_KERNEL = "inductor_convolution2d"
_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Unavailable(Exception):
    """The installed torch's template can not be filled in for a layer; the message says why."""


@dataclass(frozen=True)
class Template:
    """The template filled in: source text, the number format of its tensors, and the tile and options."""

    source: str
    dtype: str
    tile: tuple[int, int, int]
    num_warps: int
    num_stages: int

    def compile(self, arch: int) -> Any:
        """The compiled kernel for ``arch``; needs no GPU. Raises Unavailable where this Triton cannot compile it."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{_KERNEL}.py"
            file.write_text(self.source)
            spec = importlib.util.spec_from_file_location(_KERNEL, file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            source = ASTSource(
                getattr(module, _KERNEL),
                dict.fromkeys(("arg_X", "arg_W", "out_ptr0"), f"*{self.dtype}"),
                attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
            )
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            try:
                return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            except Exception as error:  # the template is not ours, and neither is the compiler
                raise Unavailable(f"Inductor's template does not compile: {type(error).__name__}: {error}") from error


def fill_in(problem: Problem, block_m: int, block_n: int) -> list[Template]:
    """The template for a layer, with the configurations of Inductor's whose tiles are nearest to ``block_m x block_n``.

    Raises Unavailable, with the reason, where this torch offers no such template.
    """
    if problem.dilation != (1, 1):
        raise Unavailable("Inductor's template takes no dilation")
    try:
        from torch._inductor.choices import InductorChoices
        from torch._inductor.kernel.conv import conv2d_template

        tiles = [_fit(c, problem) for c in InductorChoices().get_config_heuristics("cuda").conv_configs]
        tiles.sort(key=lambda t: (abs(log2(t[0] * t[1] / (block_m * block_n))), -t[2]))
        return [_render(conv2d_template.template, problem, *t) for t in list(dict.fromkeys(tiles))[:CONFIGURATIONS]]
    except Exception as error:  # Inductor's insides may differ from version to version in any way
        raise Unavailable(f"Inductor's template can not be filled in: {type(error).__name__}: {error}") from error


def _fit(config: Any, problem: Problem) -> tuple[int, int, int, int, int]:
    """Tile, warps and stages as Inductor's lowering adapts them: no wider than the layer, 4 warps for wide filters."""
    sizes = (problem.n * problem.h * problem.w, problem.co, problem.ci // problem.groups)
    blocks = (config.block_m, config.block_n, config.block_k)
    m, n, k = (max(16, min(b, triton.next_power_of_2(size))) for b, size in zip(blocks, sizes, strict=True))
    pointwise = problem.r * problem.s == 1
    return m, n, k, config.num_warps if pointwise else min(config.num_warps, 4), config.num_stages


def _render(template: Any, problem: Problem, m: int, n: int, k: int, warps: int, stages: int) -> Template:
    p = problem
    ci = p.ci // p.groups
    sizes = {"X": (p.n, p.ci, p.h, p.w), "W": (p.co, ci, p.r, p.s), None: (p.n, p.co, p.p, p.q)}
    strides = {name: _channels_last(size) for name, size in sizes.items()}
    constants = {
        **{"KERNEL_H": p.r, "KERNEL_W": p.s, "STRIDE_H": p.stride[0], "STRIDE_W": p.stride[1]},
        **{"PADDING_H": p.padding[0], "PADDING_W": p.padding[1], "GROUPS": p.groups, "UNROLL": p.r * p.s == 1},
        **{"ALLOW_TF32": p.tf32, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k},
    }
    long = max(size[0] * stride[0] for size, stride in zip(sizes.values(), strides.values(), strict=True)) >= 2**31
    lines = [f"    {name}: tl.constexpr = {value}" for name, value in constants.items()]
    lines.append(f"    INDEX_DTYPE: tl.constexpr = tl.int{64 if long else 32}")

    def def_kernel(*names: str) -> str:
        heading = (
            f"import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef {_KERNEL}(arg_X, arg_W, out_ptr0):"
        )
        return "\n".join([heading, *lines, *(f"    {name} = arg_{name}" for name in names)])

    def store_output(indices: tuple[str, ...], value: str, mask: str, **_: Any) -> str:
        offset = " + ".join(f"{index} * {step}" for index, step in zip(indices, strides[None], strict=True))
        return f"tl.store(out_ptr0 + tl.broadcast_to({offset}, [BLOCK_M, BLOCK_N]), {value}, {mask})"

    source = template.render(
        **constants,
        def_kernel=def_kernel,
        store_output=store_output,
        size=lambda name, i: sizes[name][i],
        stride=lambda name, i: strides[name][i],
    )
    return Template(source, _TYPES[dtype_name(p.dtype)], (m, n, k), warps, stages)


def _channels_last(size: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    _, c, h, w = size
    return h * w * c, 1, w * c, c
