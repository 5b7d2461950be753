"""Serving: a frozen copy of a model in which every convolution, with all that follows it, is one call."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import threading
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from resnet_fused import chain, functional, ops, plan, reference
from resnet_fused.convert import unfuse
from resnet_fused.functional import conv_bn_act
from resnet_fused.kernels.tile import Norm
from resnet_fused.modules import FusedBlock

PACKED_SHAPES = 4
"""Input shapes for which a convolution keeps its weights packed."""


def optimize_for_inference(
    model: nn.Module, example: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> FrozenModel:
    """A frozen copy of ``model`` for serving; ``model`` itself is left as it is.

    Freeze it on the device where it will run. The copy is in eval mode and takes what ``model`` takes. Convolution,
    batch norm, residual addition and ReLU run as one call: on a CPU as a oneDNN convolution with folded batch norm, in
    channels_last, its weights packed for the input shape that comes (PyTorch's own operators where oneDNN is missing);
    on a GPU as a Triton launch, or as ``resnet_fused.tune`` measured. Parts that are not recognised run as they are.

    ``example``: an input [N, C, H, W] of the shape to expect. It is run once, so that the first request finds
    everything packed; on a GPU, inputs of its shape and dtype then replay one CUDA graph. Other shapes work too, and
    are packed when they first come.

    ``dtype``: float32, float16 or bfloat16, of weights and activations; 4-dimensional floating-point inputs are cast to
    it. Batch norm is folded in fp64, before the cast. Default: the model's own.

    oneDNN's ReLU turns NaN into 0, as ``torch.compile`` with freezing does.

    Raises TypeError if ``model`` is not a module or ``example`` not a tensor, ValueError for another ``dtype``.

    The operators are those to which Inductor's freezing lowers a convolution.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__qualname__}")
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(f"example must be a Tensor; got {type(example).__qualname__}")
    if dtype is not None and dtype not in plan.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, plan.DTYPES))}; got {dtype}")
    frozen = FrozenModel(unfuse(copy.deepcopy(model)).eval().requires_grad_(False), dtype)
    if example is not None:
        frozen.prepare(example)
    return frozen


class FrozenModel(nn.Module):
    """What :func:`optimize_for_inference` returns. Can be called, copied, pickled and moved, not trained.

    Runs under ``torch.inference_mode()``. A CUDA graph is neither copied nor saved: call :meth:`prepare` again.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        floating = [p.dtype for p in network.parameters() if p.is_floating_point()]
        self.dtype = dtype or (floating[0] if floating else torch.get_default_dtype())
        self.network = _freeze(network, dtype)
        units = 0
        for module in self.network.modules():
            if isinstance(module, FoldedConv | TritonConv):
                units += 1
            elif dtype is not None:
                module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
        if not units:
            plan.logger.warning("optimize_for_inference found no convolution that it can fuse")
        self._graph: _CudaGraph | None = None
        self.eval()

    def train(self, mode: bool = True) -> FrozenModel:
        """Raises RuntimeError unless ``mode`` is False: there is no batch norm left to train."""
        if mode:
            raise RuntimeError("a model frozen for inference cannot be trained: train the original and freeze it again")
        super().train(False)
        return self

    @torch.inference_mode()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(self._cast, (args, kwargs))
        if self._graph is not None and not kwargs and self._graph.takes(args):
            return self._graph(args[0])
        return self.network(*args, **kwargs)

    @torch.inference_mode()
    def prepare(self, example: Tensor) -> None:
        """Pack the weights for the shape of ``example``; on a GPU, capture a CUDA graph for it."""
        example = self._cast(example)
        leaves = tree_leaves(self.network(example))
        if not example.is_cuda:
            return
        if all(isinstance(leaf, Tensor) for leaf in leaves):
            self._graph = _CudaGraph(self.network, example)
        else:
            plan.logger.warning("no CUDA graph: the model returns more than tensors")

    def _cast(self, x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()):
            return x
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenModel:
        self._graph = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_graph": None}


class FoldedConv(nn.Module):
    """``relu(conv(x) + residual)``, batch norm folded into the convolution; the residual and the ReLU are optional.

    One oneDNN call where oneDNN takes device and dtype, else PyTorch's convolution with addition and ReLU in place.
    ``x``: [N, CI, H, W]; ``residual``: of the output's shape [N, CO, P, Q], overwritten if ``in_place``.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        weight, bias = _folded(conv, bn)
        dtype = dtype or conv.weight.dtype
        self.register_buffer("weight", weight.to(dtype).contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", None if bias is None else bias.to(dtype))
        self.geometry: Any = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        self.relu = False
        self.in_place = False
        self._packed: dict[torch.Size, tuple[Tensor, tuple[int, ...]]] = {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not (x.is_cpu and x.dtype == self.weight.dtype and _onednn_takes(x.dtype) and x.dim() == 4):
            return self._aten(x, residual)
        packed, shape = self._packed.get(x.shape) or self._pack(x.shape)
        x = x.contiguous(memory_format=torch.channels_last)
        mkldnn = torch.ops.mkldnn
        if residual is None:
            relu = "relu" if self.relu else "none"
            return mkldnn._convolution_pointwise.default(x, packed, self.bias, *self.geometry, relu, [], "")
        if residual.dtype != x.dtype or residual.shape != shape:
            return self._aten(x, residual)
        residual = residual.contiguous(memory_format=torch.channels_last)
        after: tuple[Any, ...] = "add", 1.0, "relu" if self.relu else None, [], ""
        if self.in_place:
            return mkldnn._convolution_pointwise_.binary(residual, x, packed, self.bias, *self.geometry, *after)
        return mkldnn._convolution_pointwise.binary(x, residual, packed, self.bias, *self.geometry, *after)

    def _aten(self, x: Tensor, residual: Tensor | None) -> Tensor:
        padding, stride, dilation, groups = self.geometry
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        if residual is not None:
            y = y.add_(residual) if residual.shape == y.shape and residual.dtype == y.dtype else y + residual
        return y.relu_() if self.relu else y

    def _pack(self, shape: torch.Size) -> tuple[Tensor, tuple[int, ...]]:
        """The weights in the blocked layout that oneDNN prefers for inputs of ``shape``, and the output's shape."""
        padding, stride, dilation, _ = self.geometry
        p, q = (
            ops.output_size(shape[2 + i], self.weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1)
        )
        packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, list(shape))
        entry = packed, (shape[0], self.weight.shape[0], p, q)
        kept = list(self._packed.items())[1 - PACKED_SHAPES :]
        self._packed = dict([*kept, (shape, entry)])
        return entry

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedConv:
        self._packed = {}
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._packed = {}
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": {}}


class TritonConv(nn.Module):
    """``relu(bn(conv(x)) + residual)`` as one Triton launch with every argument at hand; see :class:`FoldedConv`.

    Where that was measured to be faster, cuDNN does all of it instead, with batch norm folded into a second filter.
    """

    weight: Tensor
    conv_bias: Tensor | None
    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype | None) -> None:
        super().__init__()
        weight = conv.weight.detach().to(dtype or conv.weight.dtype)
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        for name, value in [
            ("conv_bias", conv.bias),
            ("mean", bn.running_mean),
            ("var", bn.running_var),
            ("gamma", bn.weight),
            ("beta", bn.bias),
        ]:
            self.register_buffer(name, None if value is None else value.detach())
        self.eps = bn.eps
        self.geometry = functional.geometry(conv)
        self.relu = False
        self.in_place = False
        self._folded: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        if plan.why_eager(x) is not None:
            return self._aten(x, residual)
        target = x.dtype, "frozen" if self.relu else "inference", x.device, plan.requested()
        implementation, code = functional.choose(
            tuple(x.shape), tuple(self.weight.shape), self.geometry, *target, residual=residual is not None
        )
        if implementation == "eager":
            return self._aten(x, residual)
        norm = self.mean, self.var, self.gamma, self.beta, self.eps
        if implementation == "cudnn" and (residual is None or residual.dtype == x.dtype):
            if self._folded is None:
                self._folded = self._fold()
            folded, shift = self._folded
            return chain.cudnn_conv_relu(x, folded, shift, residual, *self.geometry)
        return ops.conv_bn_act(x, self.weight, self.conv_bias, *norm, residual, 1, 0, code, self.relu, x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> TritonConv:
        self._folded = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self._folded is not None:
            for old, new in zip(self._folded, self._fold(), strict=True):
                old.copy_(new)  # in place, where a CUDA graph reads it

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_folded": None}

    def _fold(self) -> tuple[Tensor, Tensor]:
        norm = Norm(self.mean, self.var, self.gamma, self.beta, self.eps)
        return chain.fold(self.weight, self.conv_bias, norm)

    def _aten(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = F.conv2d(x, self.weight, self.conv_bias, *self.geometry)
        y = F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, eps=self.eps)
        y = y if residual is None else y + residual
        return F.relu(y) if self.relu else y


class _CudaGraph:
    """The launches of ``network`` for inputs like ``example``, recorded once; several threads may call it."""

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self.x = example.clone(memory_format=torch.preserve_format)
        self.lock = threading.Lock()
        with torch.cuda.device(example.device):
            self.done = torch.cuda.Event()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    network(self.x)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side):  # the default one belongs to the first device that captured
                self.out = network(self.x)

    def takes(self, args: tuple[Any, ...]) -> bool:
        x = args[0] if len(args) == 1 else None
        return isinstance(x, Tensor) and (x.shape, x.dtype, x.device) == (self.x.shape, self.x.dtype, self.x.device)

    def __call__(self, x: Tensor) -> Any:
        with self.lock, torch.cuda.device(self.x.device):
            torch.cuda.current_stream().wait_event(self.done)
            self.x.copy_(x)
            self.graph.replay()
            out = tree_map(torch.clone, self.out)
            self.done.record()
            return out


@cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    names = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
    mkldnn = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and all(hasattr(mkldnn, name) for name in names)):
        return False
    if dtype == torch.bfloat16:
        return mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def _folded(conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in fp64 of the convolution that equals ``bn(conv(x))``."""
    weight, bias = (None if t is None else t.detach() for t in (conv.weight, conv.bias))
    assert weight is not None
    if bn is None:
        return weight.double(), None if bias is None else bias.double()
    assert bn.running_mean is not None and bn.running_var is not None
    gamma, beta = (None if t is None else t.detach() for t in (bn.weight, bn.bias))
    return reference.fold(weight, bias, bn.running_mean, bn.running_var, gamma, beta, bn.eps)


_ADD = (operator.add, operator.iadd, torch.add)
_RELU = (F.relu, F.relu_, torch.relu, torch.relu_)
_READERS = (FoldedConv, TritonConv, nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)
"""Modules that neither write to their input nor return an alias of it."""
_PURE = (operator.getitem, operator.sub, operator.floordiv, getattr, F.pad)
"""Functions of which the same holds, or that only move views about."""


def _freeze(module: nn.Module, dtype: torch.dtype | None, called: bool = True) -> nn.Module:
    """Replace the largest parts of ``module`` that can be traced by graphs of fused convolutions.

    ``called``: nothing but a call is ever done with ``module`` (its owner might index a container, say).
    """
    if not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return module
    if called and (graph := _traced(module)) is not None:
        return _fused(graph, dtype)
    for name, child in module.named_children():
        library = type(child).__module__.startswith("torch.nn")
        setattr(module, name, _freeze(child, dtype, called=not library))
    return module


def _traced(module: nn.Module) -> fx.GraphModule | None:
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    if functional.hooked(module):
        return None
    tracer = _Tracer()
    tracer.traced_func_name = "eager_forward" if isinstance(module, FusedBlock) else "forward"
    try:
        graph = tracer.trace(module)
    except Exception as error:
        plan.logger.info("%s is not frozen as a whole: %s", type(module).__qualname__, error)
        return None
    for node in graph.nodes:
        node.meta.pop("is_wrapped", None)  # what stands for conv_bn_act here is not a wrapped function
    return fx.GraphModule(module, graph)


class _Tracer(fx.Tracer):
    """Traces the modules of this package through their eager roads."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, functional))  # type: ignore[arg-type]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if target is conv_bn_act:
            return reference.conv_bn_act(*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or functional.hooked(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_module(m, m.eager_forward if isinstance(m, FusedBlock) else forward, args, kwargs)


def _fused(graph: fx.GraphModule, dtype: torch.dtype | None) -> fx.GraphModule:
    """Fold, in place, what follows each convolution of ``graph`` into one module."""
    for node in list(graph.graph.nodes):
        if _calls(graph, node, nn.Identity, nn.Dropout):
            _absorb(node, node.args[0])
    for node in list(graph.graph.nodes):
        if _calls(graph, node, nn.Conv2d) and _foldable(graph.get_submodule(node.target)):
            _fuse_unit(graph, node, dtype)
    for node in graph.graph.nodes:
        if _calls(graph, node, FoldedConv):
            unit: Any = graph.get_submodule(node.target)
            unit.in_place = _owns_residual(graph, node)
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()
    return graph


def _fuse_unit(graph: fx.GraphModule, node: fx.Node, dtype: torch.dtype | None) -> None:
    conv: Any = graph.get_submodule(str(node.target))
    norm = _only_user(node)
    bn: Any = None
    if norm is not None and _calls(graph, norm, nn.BatchNorm2d):
        bn = graph.get_submodule(str(norm.target))
        if functional.why_unfusable(conv, bn) is not None or bn.running_mean is None:
            bn = None
    unit: FoldedConv | TritonConv
    if plan.why_eager(conv.weight) is not None:
        unit = FoldedConv(conv, bn, dtype)
    elif bn is not None:
        unit = TritonConv(conv, bn, dtype)
    else:
        return
    node.target = f"{node.name}_unit"
    graph.add_submodule(node.target, unit)
    if bn is not None:
        _absorb(norm, node)
    _fuse_residual(graph, node)
    after = _only_user(node)
    if after is not None and _is_relu(graph, after):
        unit.relu = True
        _absorb(after, node)


def _fuse_residual(graph: fx.GraphModule, node: fx.Node) -> None:
    add = _only_user(node)
    if add is None or add.op != "call_function" or add.target not in _ADD or add.kwargs or len(add.args) != 2:
        return
    others = [arg for arg in add.args if arg is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return
    between = node.next
    while between is not add:
        if not (_calls(graph, between, *_READERS) or between.op == "get_attr" or between.target in _PURE):
            return
        between = between.next
    add.prepend(node)
    node.args = (node.args[0], others[0])
    _absorb(add, node)


def _owns_residual(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the residual of ``node`` is a tensor that the graph made itself and that nothing reads afterwards."""
    if len(node.args) < 2:
        return False
    x, residual = node.args
    if residual is x or not isinstance(residual, fx.Node) or not _calls(graph, residual, *_READERS):
        return False
    return all(user <= node and _calls(graph, user, *_READERS) for user in residual.users)


def _absorb(node: Any, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _calls(graph: fx.GraphModule, node: fx.Node, *kinds: type[nn.Module]) -> bool:
    """Whether ``node`` calls a module of exactly one of ``kinds``, without hooks, on positional arguments alone."""
    if node.op != "call_module" or node.kwargs:
        return False
    module = graph.get_submodule(str(node.target))
    return type(module) in kinds and not functional.hooked(module)


def _is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _RELU
    return node.target in ("relu", "relu_") if node.op == "call_method" else _calls(graph, node, nn.ReLU)


def _foldable(conv: Any) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and conv.weight.is_floating_point()
