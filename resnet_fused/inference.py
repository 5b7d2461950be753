"""Serving: a frozen copy of a model in which every convolution, with all that follows it, is one call."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partialmethod
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import register_flop_formula

from resnet_fused import functional, pieces
from resnet_fused.convert import unfuse
from resnet_fused.engine import chains, eligible, forward, ops, reference
from resnet_fused.engine.ops import channels_last
from resnet_fused.engine.request import requested
from resnet_fused.engine.trace import is_watched
from resnet_fused.functional import conv_bn_act, conv_bn_act_pool
from resnet_fused.kernels.activation import IDENTITY, RELU, Activation
from resnet_fused.kernels.chain import Link
from resnet_fused.kernels.conv import Geometry, output_size
from resnet_fused.kernels.conv_pool import POOL
from resnet_fused.kernels.epilogue import Norm
from resnet_fused.kernels.launch import FLOATS, TileConfig
from resnet_fused.modules import traced_forward
from resnet_fused.plan.problem import Parts
from resnet_fused.traced import same_random_numbers

PACKED_SHAPES = 4
"""Input shapes for which a convolution keeps its weights packed."""


def optimize_for_inference(
    model: nn.Module, example: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> FrozenModel:
    """A frozen copy of ``model`` for serving; ``model`` itself is left as it is.

    Freeze it on the device where it will run. The copy is in eval mode and takes what ``model`` takes. Convolution,
    batch norm, residual addition and activation run as one call: on a CPU as a oneDNN convolution with folded batch
    norm, in channels_last, its weights packed for the input shape that comes (PyTorch's own operators where oneDNN is
    missing; another activation than a ReLU behind an addition runs behind the call); on a GPU as a Triton launch, or as
    ``resnet_fused.tune`` measured. Parts that are not recognised run as they are.

    ``example``: an input [N, C, H, W] of the shape to expect. It is run once, so that the first request finds
    everything packed; on a GPU, inputs of its shape and dtype then replay one CUDA graph. Other shapes work too, and
    are packed when they first come.

    ``dtype``: float32, float16 or bfloat16, of all weights. Default: the model's own. Batch norm is folded in fp64,
    before the cast. A convolution that reads an input casts it to the dtype of its weights; with ``dtype``, every layer
    with weights does so with whatever it reads. Nothing else is cast: masks and second inputs reach the model as they
    came. Convolutions keep their dtype under autocast.

    oneDNN's ReLU and Hardtanh turn NaN into their least value, as ``torch.compile`` with freezing does. oneDNN keeps
    what it made for the last 1024 convolutions and layouts that it saw, here as in eager PyTorch: some 100 MB where
    hundreds of input shapes come. The environment variables ``ONEDNN_PRIMITIVE_CACHE_CAPACITY`` and
    ``LRU_CACHE_CAPACITY``, set to 16 say, bound it.

    Raises TypeError if ``model`` is not a module (or is TorchScript) or ``example`` not a tensor, ValueError for
    another ``dtype``.

    The operators are those to which Inductor's freezing lowers a convolution.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__qualname__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be a module that runs in Python; got TorchScript: freeze it before it is traced")
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(f"example must be a Tensor; got {type(example).__qualname__}")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS))}; got {dtype}")
    with torch.inference_mode(False), torch.no_grad():  # what is made here can be loaded into later
        frozen = _showing(inspect.signature(model.forward))(unfuse(_copy(model)).eval().requires_grad_(False), dtype)
    if example is not None:
        frozen.prepare(example)
    return frozen


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of weights that are computed from others and kept as plain attributes."""
    attributes = [t for part in model.modules() for t in tree_leaves([vars(part), part._buffers])]
    computed = {id(t): t.detach().clone() for t in attributes if isinstance(t, Tensor) and not t.is_leaf}
    return copy.deepcopy(model, computed)


class FrozenModel(nn.Module):
    """What :func:`optimize_for_inference` returns. Can be called, copied, pickled and moved, not trained.

    Runs under ``torch.inference_mode()``. New weights come by ``load_state_dict``. A CUDA graph is neither copied nor
    saved, and runs no hooks that come after it: call :meth:`prepare` again. It has the signature and the attributes of
    the model, and a ``device``. Compilers, exporters and tracers see PyTorch's own operators.
    """

    first_input: str | None
    """The name of the first parameter of ``forward``, if it has any."""

    _graph: _CudaGraph | None = None

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.network = _freeze(network, dtype)
        if not any(isinstance(module, _UNITS) for module in self.network.modules()):
            eligible.logger.warning("optimize_for_inference found no convolution that it can fuse")
        inner = set() if dtype is not None else set(_fed_from_inside(self.network))
        for module in self.network.modules():
            if isinstance(module, _UNITS):
                module.training, module.casts = False, module not in inner
            else:
                _settle(module, dtype, casts=module not in inner)
        self.eval()
        own = {*dir(type(self)), *vars(self), *self._modules, *vars(self.network)}
        vars(self).update({name: value for name, value in _data(network).items() if name not in own})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "network" or hasattr(fx.GraphModule, name):
                raise
            if name == "device" and not hasattr(self.network, name):
                return next((t.device for t in self._weights()), torch.get_default_device())
            return getattr(self.network, name)

    def __setattr__(self, name: str, value: Any) -> None:
        network = vars(self).get("_modules", {}).get("network")
        lent = network is not None and name in vars(network) and name not in {*vars(self), *dir(type(self))}
        if lent:
            setattr(network, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights of its first convolution; without one, of its first floating-point weight."""
        return next((t.dtype for t in self._weights()), torch.get_default_dtype())

    def _weights(self) -> Iterator[Tensor]:
        yield from (m.weight for m in self.network.modules() if isinstance(m, (*_UNITS, _ConvNd)))
        yield from (t for t in self.network.parameters() if t.is_floating_point())

    def train(self, mode: bool = True) -> FrozenModel:
        """Raises RuntimeError unless ``mode`` is False: there is no batch norm left to train."""
        if mode:
            raise RuntimeError("a model frozen for inference cannot be trained: train the original and freeze it again")
        self.training = False  # what is inside keeps the mode in which the model's own ``eval`` left it
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(args, fx.Proxy):
            raise TypeError("a frozen model cannot be traced symbolically: trace its network, FrozenModel.network")
        if torch.compiler.is_compiling():
            if torch.compiler._is_exporting_flag:  # a graph of one piece: that of another mode would be a part in it
                return self.network(*args, **kwargs)
            with torch.no_grad():  # the compilers of torch 2.11 fail in inference mode
                return self.network(*args, **kwargs)
        with torch.inference_mode():
            if self._graph is not None and kwargs.keys() <= {self.first_input}:
                if self._graph.takes(inputs := (*args, *kwargs.values())):
                    return self._graph(inputs[0])
            return self.network(*args, **kwargs)

    @torch.inference_mode()
    def prepare(self, example: Tensor) -> None:
        """Pack the weights for the shape of ``example``; on a GPU, capture a CUDA graph for it, if that is possible."""
        leaves = tree_leaves(self.network(example))
        self._graph = None
        if not example.is_cuda:
            return
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            eligible.logger.warning("no CUDA graph: the model returns more than tensors")
        elif any(_runs_hooks(module) for module in self.network.modules()):
            eligible.logger.warning("no CUDA graph: it would run no hooks")
        else:
            try:
                self._graph = _CudaGraph(self.network, example)
            except Exception as error:  # whatever a stranger's forward does that cannot be captured
                eligible.logger.warning("no CUDA graph: the capture failed: %s", error)

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenModel:
        self._graph = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("assign_to_params_buffers"):
            self._graph = None  # it reads the tensors that were there
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_graph": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))[2:]
        return _blank, (inspect.signature(self.forward),), *rest

    def __prepare_scriptable__(self) -> FrozenModel:
        raise TypeError("a frozen model cannot be scripted: use torch.jit.trace, torch.export or torch.compile")


def called(model: FrozenModel) -> dict[str, Called]:
    """All that the graphs of ``model`` call, in order, by the names that it has in the network."""
    found: dict[str, Called] = {}
    for name, graph in model.network.named_modules():
        for node in graph.graph.nodes if isinstance(graph, fx.GraphModule) else ():
            part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(part, Called):
                found[f"{name}.{node.target}".lstrip(".")] = part
    return found


def _data(module: nn.Module) -> dict[str, Any]:
    """Attributes of ``module`` that say something of it: those with names of their own, less tensors and functions."""
    found = ((name, value) for name, value in vars(module).items() if name[0] != "_")
    return {name: value for name, value in found if not callable(value) and not isinstance(value, Tensor)}


def _showing(signature: inspect.Signature) -> type[FrozenModel]:
    """:class:`FrozenModel` with a ``forward`` of this ``signature``, less annotations, for those who ask for it."""
    code = FrozenModel.forward
    forward: Any = FunctionType(code.__code__, code.__globals__, "forward")
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [_shown(parameter) for parameter in signature.parameters.values()]
    forward.__signature__ = inspect.Signature([own, *parameters])
    first = next(iter(signature.parameters), None)
    return type("FrozenModel", (FrozenModel,), {"forward": forward, "first_input": first, "__module__": __name__})


def _shown(parameter: inspect.Parameter) -> inspect.Parameter:
    """``parameter`` without annotation; ``...`` stands for a default that is no plain value, and may not be pickled."""
    plain = parameter.default is parameter.empty or isinstance(parameter.default, bool | int | float | str | None)
    return parameter.replace(annotation=parameter.empty, default=parameter.default if plain else ...)


def _blank(signature: inspect.Signature) -> FrozenModel:
    return object.__new__(_showing(signature))


def _fed_from_inside(network: nn.Module) -> Iterator[nn.Module]:
    """The convolutions that read what another layer returned, and not what came into a graph."""
    for part in network.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if node.op != "call_module" or not node.args:
                continue
            module = part.get_submodule(node.target)
            layers = _links(part, node) if isinstance(module, TritonChain) else [module]
            yield from layers[1 if _is_input(node.args[0]) else 0 :]


def _is_input(node: Any) -> bool:
    """Whether ``node`` is an input of its graph, padded perhaps."""
    while isinstance(node, fx.Node) and node.target is F.pad:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _settle(module: nn.Module, dtype: torch.dtype | None, casts: bool) -> None:
    """Cast what ``module`` itself holds to ``dtype``, and let it cast what it reads; see optimize_for_inference."""
    if dtype is not None:
        module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    layer = (not module._modules or eligible.is_norm(module)) and any(t.is_floating_point() for t in own)
    if casts and (isinstance(module, _ConvNd) or (dtype is not None and layer)):
        module.register_forward_pre_hook(_cast_input, with_kwargs=True)


def _runs_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs hooks, but for our own."""
    before = [hook for hook in module._forward_pre_hooks.values() if hook is not _cast_input]
    return bool(before or module._forward_hooks or eligible.hooked())


def _cast_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A pre-hook: ``module`` reads floating-point tensors in the dtype of its weights."""
    weights = (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    like = next(weights, None)
    return (args, kwargs) if like is None else tree_map(lambda x: _cast(x, like), (args, kwargs))


def _cast(x: Any, like: Tensor) -> Any:
    return x.to(like.dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != like.dtype else x


def _conv2d(x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
    """``F.conv2d`` of a frozen model, which casts what it reads."""
    return F.conv2d(_cast(x, weight), weight, *rest, **named)


class FoldedConv(nn.Module):
    """``act(conv(x) + residual)``, batch norm folded into the convolution; the residual is optional.

    One oneDNN call where oneDNN takes the tensors and nothing traces them, else PyTorch's operators. Behind a residual
    oneDNN has a ReLU alone: another activation is a second call.
    ``x``: [N, CI, H, W]; ``residual``: of the output's shape [N, CO, P, Q], overwritten if ``in_place``. What has
    another shape or dtype is added as PyTorch does: by ``+=``, which keeps those of the branch, if it ``accumulates``.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, bn: Any, geometry: Geometry, dtype: torch.dtype | None) -> None:
        super().__init__()
        weight, bias = _folded(conv, bn)
        dtype = dtype or conv.weight.dtype
        self.register_buffer("weight", _laid_out(weight.to(dtype)))
        self.register_buffer("bias", None if bias is None else _laid_out(bias.to(dtype)))
        self.geometry = geometry
        self.norm = None if bn is None else type(bn).__name__
        self.casts = True
        self.accumulates = False
        self.activation = IDENTITY
        self.in_place = False
        self._packed: dict[torch.Size, tuple[Tensor, tuple[int, ...]]] = {}

    def forward(self, x: Tensor, residual: Any = None) -> Tensor:
        if _is_traced(x):
            return self._aten(x, residual)
        x = _cast(x, self.weight) if self.casts else x
        found = self._packing(x)
        if found is None:
            return self._aten(x, residual)
        packed, shape = found
        x = channels_last(x)
        mkldnn, geometry = torch.ops.mkldnn, _for_onednn(self.geometry)
        if residual is None:
            name, algorithm = _POINTWISE[self.activation.name]
            after: tuple[Any, ...] = name, [*self.activation.numbers], algorithm
            return mkldnn._convolution_pointwise.default(x, packed, self.bias, *geometry, *after)
        if not _is_like(residual, x) or residual.shape != shape:
            return self._aten(x, residual)
        residual = channels_last(residual)
        relu = self.activation == RELU
        after = "add", 1.0, "relu" if relu else None, [], ""
        if self.in_place:
            y = mkldnn._convolution_pointwise_.binary(residual, x, packed, self.bias, *geometry, *after)
        else:
            y = mkldnn._convolution_pointwise.binary(x, residual, packed, self.bias, *geometry, *after)
        return y if relu else reference.activate(y, self.activation, inplace=True)

    def why_eager(self, x: Tensor, *_: Any) -> str | None:
        """Why PyTorch's operators run on ``x`` as things stand, or None."""
        taken = self._packing(_cast(x, self.weight) if self.casts else x) is not None
        return None if taken else f"oneDNN does not take {x.dtype} on {x.device}"

    def _aten(self, x: Tensor, residual: Any) -> Tensor:
        x = _cast(x, self.weight) if self.casts else x
        _check_input(x, self.weight, self.geometry)
        y = F.conv2d(x, self.weight, self.bias, *self.geometry)
        if self.norm is not None:
            y = _normalisable(y, x, self.weight, self.geometry, self.norm)
        return _finish(y, residual, self.accumulates, self.activation)

    def _packing(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]] | None:
        """The weights as oneDNN wants them for ``x``, and the output's shape; None where PyTorch is to judge ``x``."""
        weight = self.weight
        if not (_is_like(x, weight) and x.is_cpu and _onednn_takes(x.dtype)):
            return None
        return self._packed.get(x.shape) or self._pack(x.shape)

    def _pack(self, shape: torch.Size) -> tuple[Tensor, tuple[int, ...]] | None:
        output = _output_shape(shape, self.weight, self.geometry)
        if output is None:
            return None
        geometry = _for_onednn(self.geometry)
        packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, list(shape))
        kept = list(self._packed.items())[1 - PACKED_SHAPES :]
        self._packed = dict([*kept, (shape, (packed, output))])
        return packed, output

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedConv:
        self._packed = {}
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._packed = {}
        super()._load_from_state_dict(*args)
        _lay_out_buffers(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": {}}


_POINTWISE = {
    "identity": ("none", ""),
    "relu": ("relu", ""),
    "leaky_relu": ("leaky_relu", ""),
    "hardtanh": ("hardtanh", ""),
    "hardswish": ("hardswish", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
"""By an activation's name, what oneDNN's operators call it, and its algorithm."""


def _for_onednn(geometry: Geometry) -> tuple[Any, ...]:
    """``geometry`` in the order in which oneDNN's operators take it."""
    stride, padding, dilation, groups = geometry
    return padding, stride, dilation, groups


class TritonConv(nn.Module):
    """``act(bn(conv(x)) + residual)`` as one Triton launch with every argument at hand; see :class:`FoldedConv`.

    ``pooled``: ``max_pool(relu(bn(conv(x))), 3, stride=2, padding=1)`` as two; see :func:`functional.conv_bn_act_pool`.

    Where that was measured or is predicted to be faster, cuDNN does all of it instead, with batch norm folded into a
    second filter, if the activation is a ReLU.

    ``squeezes``: returns what :class:`TritonGate` reads, and the mean of each image of ``bn(conv(x))``, [N, CO, 1, 1].

    ``averages``: returns the mean of each image of the result too. ``gate``: [N, CO, 1, 1], multiplies with
    ``bn(conv(x))``. ``alone``: it is ``bn(conv(x))`` that is wanted, of such means, to make a gate of.

    ``bn`` None: ``conv(x) + residual``, without a bias. ``stats``: ``x`` is what a :class:`TritonFront` stands in front
    of, whose activation is ``before``.
    """

    weight: Tensor
    affine: Tensor | None
    conv_bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None

    def __init__(self, conv: nn.Conv2d, bn: Any, geometry: Geometry, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        vectors = (None,) * 4 if bn is None else (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        held = conv.weight.to(dtype or conv.weight.dtype), conv.bias, *vectors
        for name, value in zip(("weight", "conv_bias", "mean", "var", "gamma", "beta"), held, strict=True):
            self.register_buffer(name, None if value is None else _laid_out(value))
        self.eps = 0.0 if bn is None else bn.eps
        self.geometry = geometry
        self.norm = None if bn is None else type(bn).__name__
        self.before = IDENTITY
        self.casts = True
        self.accumulates = False
        self.activation = IDENTITY
        self.pooled = self.squeezes = self.averages = False
        self._folded: tuple[Tensor, Tensor] | None = None
        self.register_buffer("affine", None, persistent=False)
        self._made_of: tuple[Any, ...] = ()

    def forward(
        self, x: Tensor, residual: Any = None, stats: Tensor | None = None, gate: Any = None, alone: bool = False
    ) -> Any:
        if self.squeezes:
            return self._squeeze(_cast(x, self.weight) if self.casts else x)
        if self.pooled:
            launches = self._launches(x, residual)
            return self._pool(x) if launches else self._aten(_cast(x, self.weight), residual, None, self.activation)
        activation = IDENTITY if alone else self.activation
        x = _cast(x, self.weight) if self.casts else x
        if not self._launches(x, residual, gate):
            if stats is not None:
                x = ops.join_forward(x, stats, None, None, None, 1, 0, self.before.code, x.dtype)
            return self._aten(x, residual, gate, activation)
        residual = None if residual is None else channels_last(residual.resolve_neg())
        return self._launched(channels_last(x.resolve_neg()), residual, stats, gate, activation)

    def _launched(
        self, x: Tensor, residual: Tensor | None, stats: Tensor | None, gate: Tensor | None, activation: Activation
    ) -> Any:
        """By whom the plan chooses, of what :meth:`_launches` takes; both are channels_last."""
        relu = activation == RELU and stats is None and gate is None
        implementation, code = self._planned(x, residual=residual is not None, relu=relu)
        if implementation == "eager" and stats is None:
            return self._aten(x, residual, gate, activation)
        norm = self.mean, self.var, self.gamma, self.beta, self.eps
        if stats is not None or self.norm is None:
            return ops.preact_conv(x, stats, self.weight, self.before.code, *norm, activation.code, residual, code)
        if implementation == "cudnn" and (residual is None or residual.dtype == x.dtype):
            if self._folded is None or self._folded[0].device != x.device:  # a replica's is that of the original
                self._folded = self._fold()
            folded, shift = self._folded
            return self._averaged(forward.cudnn_conv_relu(x, folded, shift, residual, self.geometry))
        if self.averages:
            return ops.conv_bn_act_means(x, self.weight, self.conv_bias, *norm, code, activation.code)
        out_dtype = x.dtype
        if gate is not None:
            out_dtype = torch.promote_types(out_dtype, gate.dtype)
            gate = gate.resolve_neg().view(gate.shape[:2]).contiguous()
        if residual is not None and not self.accumulates:
            out_dtype = torch.promote_types(out_dtype, residual.dtype)
        after = gate, residual, 1, 0, code, activation.code, out_dtype
        return ops.conv_bn_act(x, self.weight, self.conv_bias, *norm, *after)

    def why_eager(self, x: Tensor, residual: Any = None, *_: Any) -> str | None:
        """Why PyTorch's operators run on ``x`` as things stand, or None."""
        if (reason := eligible.why_not_here(x)) is not None:
            return reason
        fits = self._launches(_cast(x, self.weight) if self.casts else x, residual)
        return None if fits else f"no launch takes {tuple(x.shape)}, {x.dtype}, with what is added"

    def _pool(self, x: Tensor) -> Tensor:
        target = self.weight.dtype, "frozen", x.device, requested()
        implementation, code = functional.choose(
            tuple(x.shape), tuple(self.weight.shape), self.geometry, *target, pooled=True
        )
        if implementation == "eager":
            return self._aten(_cast(x, self.weight), None, None, self.activation)
        return ops.conv_bn_act_pool(x.resolve_neg(), self.weight, self.conv_bias, *self._norm(), code)

    def _planned(self, x: Tensor, relu: bool, residual: bool = False) -> functional.Choice:
        """Who convolves ``x``, and how."""
        target = x.dtype, "frozen", x.device, requested()
        return functional.choose(
            tuple(x.shape), tuple(self.weight.shape), self.geometry, *target, residual=residual, relu=relu
        )

    def _squeeze(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The raw output and stats, or batch norm's output and None; and the means."""
        if self._launches(x, None):
            read = channels_last(x.resolve_neg())
            implementation, code = self._planned(read, relu=False)
            if implementation != "eager":
                norm = self.conv_bias, self.gamma, self.beta, self.mean, self.var, None, None, self.eps, False
                return ops.squeezed_forward(read, None, self.weight, IDENTITY.code, *norm, code, "")[:3]
        v = self._aten(x, None, None, IDENTITY)
        return v, None, v.mean((2, 3), keepdim=True)

    def _averaged(self, z: Tensor) -> Any:
        return (z, z.mean((2, 3), keepdim=True)) if self.averages else z

    def _launches(self, x: Tensor, residual: Any, gate: Any = None) -> bool:
        """Whether a launch takes these; what it does not take, PyTorch is to judge."""
        if isinstance(x, fx.Proxy) or torch.compiler.is_compiling():
            return False
        casts = FLOATS if self.pooled and self.casts else ()
        if not _is_like(x, self.weight, casts) or x.dtype not in FLOATS or eligible.why_not_here(x) is not None:
            return False
        shape = _output_shape(x.shape, self.weight, self.geometry)
        if shape is None or x.shape[0] == 0 or not (gate is None or _is_gate(gate, x, shape)):
            return False
        if residual is None:
            return True
        return _is_like(residual, x, () if self.norm is None else FLOATS) and tuple(residual.shape) == shape

    def link(self) -> Link:
        """What a chain is told of it: its constants anew, where batch norm's are not those that they were made of."""
        vectors = self.conv_bias, self.mean, self.var, self.gamma, self.beta
        if not all(t is None or type(t) in eligible.PLAIN for t in vectors):
            return Link(self.weight, self._constants())
        seen = [t if t is None else (id(t), 0 if t.is_inference() else t._version, t.data_ptr()) for t in vectors]
        if self.affine is None or self._made_of[:2] != (self.eps, seen):
            constants = self._constants()
            if type(constants) is not Tensor:
                return Link(self.weight, constants)
            self.affine, self._made_of = constants, (self.eps, seen, vectors)
        return Link(self.weight, self.affine)

    def _apply(self, fn: Any, recurse: bool = True) -> TritonConv:
        self._folded, self._made_of = None, ()
        super()._apply(fn, recurse)
        if self.affine is not None:
            self.link()
        return self

    @torch.inference_mode()  # where what it overwrites was made
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        _lay_out_buffers(self)
        if self._folded is not None:
            for old, new in zip(self._folded, self._fold(), strict=True):
                old.copy_(new)  # in place, where a CUDA graph reads it
        if self.affine is not None:
            old, self._made_of = self.affine, ()
            new = self.link().affine
            if old.device == new.device:
                self.affine = old.copy_(new)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_folded": None, "_made_of": ()}

    def _constants(self) -> Tensor:
        return torch.stack(reference.affine(self.conv_bias, *self._norm())).float()

    def _norm(self) -> Norm:
        assert self.mean is not None and self.var is not None
        return Norm(self.mean, self.var, self.gamma, self.beta, self.eps)

    def _fold(self) -> tuple[Tensor, Tensor]:
        norm = self._norm()
        return forward.fold(self.weight, self.conv_bias, norm)

    def _aten(self, x: Tensor, residual: Any, gate: Any, activation: Activation) -> Any:
        _check_input(x, self.weight, self.geometry)
        bias = None if self.conv_bias is None else self.conv_bias.to(self.weight.dtype)
        y = F.conv2d(x, self.weight, bias, *self.geometry)
        if self.norm is not None:
            y = _normalisable(y, x, self.weight, self.geometry, self.norm)
            y = F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, eps=self.eps)
        y = _finish(y if gate is None else y * gate, residual, self.accumulates, activation)
        return F.max_pool2d(y, *POOL) if self.pooled else self._averaged(y)


class TritonGate(nn.Module):
    """``act(bn(y) * gate + residual)`` in one pass; the residual is optional.

    ``y`` and ``stats`` are what a :class:`TritonConv` that squeezes returns, whose batch norm they stand for; ``gate``,
    [N, CO, 1, 1], is made of its means.
    """

    def __init__(self) -> None:
        super().__init__()
        self.training = self.accumulates = False
        self.activation = IDENTITY

    def forward(self, y: Tensor, stats: Tensor | None, gate: Any, residual: Any = None) -> Tensor:
        if stats is None or not self._fits(y, gate, residual):
            v = y if stats is None else ops.join_forward(y, stats, None, None, None, 1, 0, IDENTITY.code, y.dtype)
            return _finish(v * gate, residual, self.accumulates, self.activation)
        dtype = torch.promote_types(y.dtype, gate.dtype)
        if residual is not None:
            dtype = dtype if self.accumulates else torch.promote_types(dtype, residual.dtype)
            residual = channels_last(residual.resolve_neg())
        times = gate.resolve_neg().view(y.shape[:2]).contiguous()
        return ops.join_forward(y, stats, times, residual, None, 1, 0, self.activation.code, dtype)

    def _fits(self, y: Tensor, gate: Any, residual: Any) -> bool:
        """Whether the pass takes these."""
        if not _is_gate(gate, y, y.shape):
            return False
        return residual is None or (_is_like(residual, y, FLOATS) and residual.shape == y.shape)


class TritonFront(nn.Module):
    """Batch norm, with an activation in it or behind it, of which 1x1 convolutions alone read the result.

    Returns what they are to read, and the stats [5, C] by which they compute it on the way in: ``x`` itself; or, where
    no launch takes it, what the modules make of it, and None. The norm is a child of the graph that calls this with it,
    under the name that it has without it. ``activation``: the one behind it.
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.training = False
        self.activation = activation

    def forward(self, x: Tensor, norm: Any) -> tuple[Tensor, Tensor | None]:
        if not self._launches(x, norm):
            return reference.activate(norm(x), self.activation, inplace=True), None
        held = norm.weight, norm.bias, norm.running_mean, norm.running_var
        vectors = (None if t is None else t.resolve_neg().contiguous() for t in held)
        read = channels_last(x.resolve_neg())
        return read, ops.norm_forward(read, [], 0, *vectors, None, None, norm.eps, False, "")

    def _launches(self, x: Any, norm: Any) -> bool:
        """Whether the kernels take ``x`` and, behind it, what the ``norm`` holds."""
        if (
            torch.compiler.is_compiling()
            or eligible.why_not_here(x) is not None
            or any(map(_runs_hooks, norm.modules()))
        ):
            return False
        mean = norm.running_mean
        if not _is_like(x, mean, FLOATS if mean.dtype == torch.float32 else ()) or x.dtype not in FLOATS:
            return False
        return x.dim() == 4 and x.shape[1] == mean.shape[0] and x.numel() > 0


class TritonChain(nn.Module):
    """``z = expand(spatial(x), residual)`` and ``y = reduce(z)``, in as few launches as are predicted to be fastest.

    Returns both. ``places``: of the three, those that there are among the ``units``. Without ``spatial`` the input
    takes its place, without ``reduce`` there is no ``y``. The units are children of the graph that calls this with
    them, under the names that they have without it.
    """

    def __init__(self, places: tuple[int, ...]) -> None:
        super().__init__()
        self.training = False
        self.places = places

    def forward(self, x: Tensor, residual: Any, *units: TritonConv) -> tuple[Any, Any]:
        given = dict(zip(self.places, units, strict=True))
        members = given.get(0), given[chains.EXPAND], given.get(2)
        return chains.run(members, _parts(members, units, x, residual), x, residual, _alone, _together)

    def why_eager(self, x: Tensor, residual: Any, first: TritonConv, *_: Any) -> str | None:
        """Why PyTorch's operators run on ``x`` as things stand, or None."""
        return first.why_eager(x)


Members = tuple[TritonConv | None, TritonConv, TritonConv | None]
"""Spatial, expand and reduce of a chain, those that there are."""


def _parts(members: Members, units: Sequence[TritonConv], x: Any, residual: Any) -> Parts:
    """How many of the ``units``, which the ``members`` are, each launch computes, with its tile."""
    first = units[0]
    x = _cast(x, first.weight) if first.casts else x
    if eligible.hooked(*units) or not first._launches(x, None) or not _fits(members, x, residual):
        return ((1, None),) * len(units)
    filters = tuple(None if unit is None else (tuple(unit.weight.shape), unit.geometry) for unit in members)
    return forward.choose_chain(tuple(x.shape), filters, x.dtype, "frozen", x.device, requested()).parts


def _fits(members: Members, x: Tensor, residual: Any) -> bool:
    """Whether all is of one dtype and each unit reads what the one before returns."""
    shape = tuple(x.shape)
    for place, unit in enumerate(members):
        if unit is None:
            continue
        found = _output_shape(torch.Size(shape), unit.weight, unit.geometry)
        if found is None or not _is_like(unit.weight, x):
            return False
        shape = found
        if place == chains.EXPAND and not (_is_like(residual, x) and tuple(residual.shape) == shape):
            return False
    return True


def _alone(unit: TritonConv, x: Tensor, residual: Tensor | None) -> Tensor:
    result: Tensor = unit(x) if residual is None else unit(x, residual)
    return result


def _together(units: Sequence[TritonConv | None], x: Tensor, residual: Tensor, tile: TileConfig | None) -> list[Tensor]:
    first = next(unit for unit in units if unit is not None)
    links = [None if unit is None else unit.link() for unit in units]
    return chains.launch(links, first.geometry, _cast(x, first.weight), residual, tile)


def _check_input(x: Any, weight: Tensor, geometry: Geometry) -> None:
    """Refuse an input that PyTorch would refuse, by an error of the same type that says what is needed."""
    if isinstance(x, fx.Proxy) or torch._C._get_tracing_state() is not None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"the input must be a torch.Tensor; got {type(x).__qualname__}")
    channels = weight.shape[1] * geometry.groups
    if x.dim() not in (3, 4) or x.shape[-3] != channels or not x.is_floating_point():
        raise RuntimeError(_unfit(x, weight, geometry))


def _normalisable(y: Any, x: Any, weight: Tensor, geometry: Geometry, norm: str) -> Any:
    """The output ``y`` of a convolution as the norm of that name takes it, or its refusal."""
    if not isinstance(y, Tensor):
        return y
    if y.dim() != 4 and norm in _REFUSALS:
        raise _REFUSALS[norm](_unfit(x, weight, geometry))
    if y.device != weight.device:
        raise RuntimeError(_unfit(x, weight, geometry))
    return y if y.dim() == 4 else y[None]


_REFUSALS: dict[str, type[Exception]] = {
    "BatchNorm2d": ValueError,
    "SyncBatchNorm": ValueError,
    "SyncBatchNormAct": ValueError,
    "BatchNormAct2d": AssertionError,
}
"""What norms raise for an image without a batch; the others take it for a batch of one."""


def _unfit(x: Tensor, weight: Tensor, geometry: Geometry) -> str:
    return (
        f"the input of a convolution must be [N, {weight.shape[1] * geometry.groups}, H, W], in floating point, on "
        f"{weight.device}; got {tuple(x.shape)}, {x.dtype}, on {x.device}"
    )


def _finish(y: Tensor, residual: Any, accumulates: bool, activation: Activation) -> Tensor:
    if residual is not None:
        y = y.add_(residual) if accumulates else y + residual
    return reference.activate(y, activation, inplace=True)


_UNITS = (FoldedConv, TritonConv)
Called = FoldedConv | TritonConv | TritonChain
"""What the graph of a frozen model calls in place of convolutions and what follows them."""


def _is_traced(x: Any) -> bool:
    """Whether a compiler, a tracer, a transform, a mode or a subclass of Tensor is to see PyTorch's own operators."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in eligible.PLAIN
        or torch._C._get_tracing_state() is not None
        or is_watched()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _is_like(x: Any, other: Tensor, dtypes: tuple[torch.dtype, ...] = ()) -> bool:
    """Whether ``x`` is a dense tensor that lies where ``other`` does, in its dtype or one of ``dtypes``."""
    return (
        isinstance(x, Tensor)
        and x.layout == torch.strided
        and x.device == other.device
        and (x.dtype == other.dtype or x.dtype in dtypes)
    )


def _is_gate(gate: Any, y: Tensor, shape: Sequence[int]) -> bool:
    """Whether it has a number for each image and channel of a result of ``shape``, and lies where ``y`` does."""
    return _is_like(gate, y, FLOATS) and gate.shape == (*shape[:2], 1, 1)


def _output_shape(shape: torch.Size, weight: Tensor, geometry: Geometry) -> tuple[int, int, int, int] | None:
    """Shape [N, CO, P, Q] of the convolution of an input of ``shape``; None if the filter does not fit it."""
    stride, padding, dilation, groups = geometry
    if len(shape) != 4 or shape[1] != weight.shape[1] * groups:
        return None
    p, q = (output_size(shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return (shape[0], weight.shape[0], p, q) if p > 0 and q > 0 else None


def _laid_out(t: Tensor) -> Tensor:
    """``t`` as kernels read it: dense, a filter channels_last."""
    dense = torch.channels_last if t.dim() == 4 else torch.contiguous_format
    return t.detach().resolve_neg().contiguous(memory_format=dense)


def _lay_out_buffers(module: nn.Module) -> None:
    """What was put in place of a buffer may lie otherwise, or be a parameter."""
    for name, value in module._buffers.items():
        if value is not None and (value.requires_grad or value.is_neg() or value.stride() != _laid_out(value).stride()):
            module._buffers[name] = _laid_out(value)


class _CudaGraph:
    """The launches of ``network`` for inputs like ``example``, recorded once; several threads may call it.

    While they are recorded, other threads may use the GPU. What was recorded reads ``weights`` where they lie.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self.x = example.clone(memory_format=torch.preserve_format)
        self.weights = [*network.parameters(), *network.buffers()]
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
            # the default stream of a capture belongs to the first device that captured; one that fails stays on its own
            capture = torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local")
            with torch.cuda.stream(side), capture:
                self.out = network(self.x)

    def takes(self, args: tuple[Any, ...]) -> bool:
        if len(args) != 1 or _is_traced(x := args[0]) or not _is_like(x, self.x) or x.shape != self.x.shape:
            return False
        watched = torch._C._len_torch_dispatch_stack() > 0 or eligible.hooked()
        return not (watched or torch.cuda.is_current_stream_capturing())

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


def _onednn_flops(x: Tensor, *rest: Any, out_val: Tensor) -> int:
    """Floating-point operations of a convolution by oneDNN, whose filter comes first or behind what is added."""
    packed = next(t for t in reversed(rest[:2]) if isinstance(t, Tensor) and t.dim() == 4)
    return 2 * out_val.numel() * math.prod(packed.shape[1:])


if _onednn_takes(torch.float32):
    _onednn = torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_
    register_flop_formula(_onednn, get_raw=True)(_onednn_flops)


def _folded(conv: nn.Conv2d, bn: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in fp64 of the convolution that equals ``bn(conv(x))``."""
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    if bn is None:
        return weight.double(), None if bias is None else bias.double()
    gamma, beta = (None if t is None else t.detach() for t in (bn.weight, bn.bias))
    return reference.fold(weight, bias, bn.running_mean, bn.running_var, gamma, beta, bn.eps)


def _augmented(name: str, a: Any, b: Any) -> Any:
    """``a += b`` and its kind: what else names ``a`` sees it, which a graph of ``a + b`` would hide."""
    return getattr(operator, name)(a, b)


_ADD = (operator.add, torch.add, "add")
_READERS = (*_UNITS, TritonChain, TritonGate, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
"""Modules that, like norms, neither write to their input nor return an alias of it."""
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
    if eligible.hooked(module):
        return None
    tracer = _FreezingTracer()
    own = traced_forward(module, None) is None
    tracer.traced_func_name = "forward" if own else "eager_forward"
    try:
        with _without_effects(module):
            graph = tracer.trace(module)
    except Exception as error:
        eligible.logger.info("%s is not frozen as a whole: %s", type(module).__qualname__, error)
        return None
    for node in graph.nodes:
        node.meta.pop("is_wrapped", None)  # what stands for conv_bn_act here is not a wrapped function
        node.type = None  # an annotation that is a string cannot be pickled in torch 2.11
    return fx.GraphModule(module, graph)


@contextmanager
def _without_effects(module: nn.Module) -> Iterator[None]:
    """Raises RuntimeError if the block draws random numbers or writes to ``module``: a graph would not do so again."""
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    attributes = [(part, dict(vars(part))) for part in parts]
    buffers = [(buffer, buffer.clone(), buffer._version) for buffer in module.buffers()]
    try:
        with same_random_numbers(RuntimeError):
            yield
        if any(_written(part, was) for part, was in attributes):
            raise RuntimeError("its forward writes to the module")
        if any(buffer._version != version for buffer, _, version in buffers):
            raise RuntimeError("its forward writes to a buffer")
    finally:
        for part, was in attributes:
            vars(part).update(was)
            for name in _written(part, was):
                del vars(part)[name]
        for buffer, value, version in buffers:
            if buffer._version != version:
                buffer.copy_(value)


def _written(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Attributes of ``module`` that are not as they were ``before``, but for the constants that a tracer puts there."""
    now = {name: value for name, value in vars(module).items() if not name.startswith("_tensor_constant")}
    new = [name for name, value in now.items() if name not in before or value is not before[name]]
    return [*new, *before.keys() - vars(module).keys()]


class _FreezingProxy(fx.Proxy):
    """A proxy that tells ``a += b`` from ``a = a + b``."""

    def augment(self, name: str, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _augmented, (name, self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    setattr(_FreezingProxy, f"__{_name}__", partialmethod(_FreezingProxy.augment, _name))


class _FreezingTracer(fx.Tracer):
    """Traces the modules of this package through their eager roads."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(conv_bn_act, conv_bn_act_pool, functional.residual_block))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _FreezingProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        if target is conv_bn_act:
            return reference.conv_bn_act(*args, **kwargs)
        if target is conv_bn_act_pool:
            x, conv, bn, pool = args
            return pool(reference.conv_bn_act(x, conv, bn))
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, _UNITS) or eligible.is_norm(m) or eligible.hooked(m)
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_module(m, traced_forward(m, forward), args, kwargs)


def _fused(graph: fx.GraphModule, dtype: torch.dtype | None) -> fx.GraphModule:
    """Fold, in place, what follows each convolution of ``graph`` into one module."""
    for node in list(graph.graph.nodes):
        if _calls(graph, node, nn.Identity, nn.Dropout) and not graph.get_submodule(node.target).training:
            _absorb(node, node.args[0])
        elif node.target is F.conv2d and (dtype is not None or _is_input(node.args[0])):
            node.target = _conv2d
        elif node.op == "call_method" and node.target == "view":
            with graph.graph.inserting_before(node):  # a convolution's output is channels_last, of which views are few
                node.update_arg(0, graph.graph.call_method("contiguous", node.args[:1]))
    convolutions = [node for node in graph.graph.nodes if _calls(graph, node, nn.Conv2d)]
    units = [(node, _fuse_unit(graph, node, dtype)) for node in convolutions]
    left = [node for node, unit in reversed(units) if unit is None]  # of a sum of two, the last one adds
    units += [(node, _fuse_sum(graph, node, dtype)) for node in left]
    for node, unit in units:
        if isinstance(unit, FoldedConv):
            unit.in_place = _owns_residual(graph, node)
    inside: dict[str, nn.Module] = {}
    for node, unit in units:
        if isinstance(unit, TritonConv):
            _fuse_gate(graph, node, unit)
    for node, unit in units:
        if isinstance(unit, TritonConv):
            _fuse_chain(graph, node, unit)
    for node in list(graph.graph.nodes):
        norm = _norm(graph, node)
        if norm is not None and _fuse_front(graph, node, norm, dtype):
            inside |= {f"{node.target}.{name}": part for name, part in norm.named_children()}
    graph.delete_all_unused_submodules()
    for name, part in inside.items():  # of a norm that nothing calls, they count as unused
        graph.add_submodule(name, part)
    graph.graph.lint()
    graph.recompile()
    return graph


def _fuse_unit(graph: fx.GraphModule, node: fx.Node, dtype: torch.dtype | None) -> FoldedConv | TritonConv | None:
    conv: Any = graph.get_submodule(str(node.target))
    geometry = _geometry(conv)
    if geometry is None:
        return None
    norm = _only_user(node)
    bn: Any = None if norm is None else _norm(graph, norm)
    if bn is not None and not _folds(bn, conv.weight):
        bn = None
    unit: FoldedConv | TritonConv
    if eligible.why_not_here(conv.weight) is not None:
        unit = FoldedConv(conv, bn, geometry, dtype)
    elif bn is not None and max(conv.weight.shape[2:]) <= eligible.MAX_FILTER:
        unit = TritonConv(conv, bn, geometry, dtype)
    else:
        return None
    if bn is not None:
        _absorb(norm, node)
        unit.activation = cast(Activation, eligible.activation_in(bn))
    if unit.activation == IDENTITY:
        _fuse_residual(graph, node, unit)
        _fuse_activation(graph, node, unit)
    if isinstance(unit, TritonConv):
        _fuse_pool(graph, node, unit)
    _call(graph, node, unit)
    return unit


def _call(graph: fx.GraphModule, node: fx.Node, unit: FoldedConv | TritonConv) -> None:
    node.target = f"{node.name}_unit"
    graph.add_submodule(node.target, unit)


def _fuse_sum(graph: fx.GraphModule, node: fx.Node, dtype: torch.dtype | None) -> TritonConv | None:
    """Make a unit of a convolution that an addition alone follows, on a GPU."""
    conv = _called(graph, node)
    geometry = _geometry_alone(conv)
    if geometry is None:
        return None
    unit = TritonConv(cast(nn.Conv2d, conv), None, geometry, dtype)
    _fuse_residual(graph, node, unit)
    if len(node.args) == 1:
        return None
    _call(graph, node, unit)
    return unit


def _geometry_alone(conv: Any) -> Geometry | None:
    """That of a convolution without bias, which kernels compute by itself; None if they do not."""
    if type(conv) is not nn.Conv2d or conv.bias is not None or (geometry := _geometry(conv)) is None:
        return None
    taken = max(conv.weight.shape[2:]) <= eligible.MAX_FILTER and eligible.why_not_here(conv.weight) is None
    return geometry if taken else None


def _fuse_gate(graph: fx.GraphModule, node: fx.Node, unit: TritonConv) -> None:
    """Where the output of ``unit`` is multiplied with what the means of its images make, have launches do so.

    Its own, if it :func:`takes_means` and may run behind the gate; else another, see :class:`TritonGate`.
    """
    if unit.norm is None or unit.activation != IDENTITY or len(node.args) != 1:
        return
    seen = pieces.Graph(graph, graph.graph)
    gate = seen.gate(node)
    if gate is None or not pieces.gives_gates(seen, gate, _means_like(seen, gate, unit.weight)):
        return
    movable = _pure_between(graph, node, gate.product, gate.all_nodes())
    late = movable and functional.takes_means(unit.weight, unit.geometry) and not _is_input(node.args[0])
    if late:
        x, means = _with_means(graph, node)
        with graph.graph.inserting_before(node):
            squeeze = graph.graph.call_module(str(node.target), (means,), {"alone": True})
    else:
        unit.squeezes = True
        y, stats, squeeze = _outputs(graph, node, 3)
    result = gate.result
    for reader in [reader for reader in gate.nodes if node in reader.all_input_nodes]:
        reader.replace_input_with(node, squeeze)
        if seen.is_squeeze(reader):
            read = squeeze
            if not pieces.keeps_dimensions(reader):
                with graph.graph.inserting_before(reader):
                    read = graph.graph.call_method("flatten", (squeeze, 1))
            result = read if reader is result else result
            _absorb(reader, read)
    part = unit if late else TritonGate()
    name = str(node.target) if late else f"{node.name}_gate"
    if not late:
        graph.add_submodule(name, part)
    with graph.graph.inserting_before(gate.product):
        joined = graph.graph.call_module(name, (x,) if late else (y, stats, result))
    _absorb(gate.product, joined)
    if gate.expansion is not None:
        graph.graph.erase_node(gate.expansion)
    _fuse_residual(graph, joined, part)
    _fuse_activation(graph, joined, part)
    if late:
        joined.args = (x, *(joined.args[1:] or (None,)), None, result)
        graph.graph.erase_node(node)


def _outputs(graph: fx.GraphModule, node: fx.Node, count: int) -> list[fx.Node]:
    """So many values that ``node`` returns, each a node behind it."""
    found: list[fx.Node] = []
    for i in range(count):
        with graph.graph.inserting_after(found[-1] if found else node):
            found.append(graph.graph.call_function(operator.getitem, (node, i)))
    return found


def _with_means(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What ``node`` reads, and the mean of each image of it, which come along with it where a launch makes it."""
    read = cast(fx.Node, node.args[0])
    unit: Any = graph.get_submodule(str(read.target)) if _calls(graph, read, TritonConv) else None
    alone = unit is not None and unit.norm is not None and not unit.pooled and not unit.squeezes
    if not (alone and len(read.args) == 1 and _pure_between(graph, read, node)):
        with graph.graph.inserting_before(node):
            return read, graph.graph.call_function(_means, (read,))
    unit.averages, readers = True, list(read.users)
    x, means = _outputs(graph, read, 2)
    for reader in readers:
        reader.replace_input_with(read, x)
    return x, means


def _means(x: Tensor) -> Tensor:
    """The mean of each image; what has none is the convolution's to refuse."""
    return x.mean((2, 3), keepdim=True) if x.dim() == 4 else x


def _means_like(seen: pieces.Graph, gate: pieces.Gate, weight: Tensor) -> Tensor:
    """As many channels as ``weight`` has filters, in the dtype that the layers of the ``gate`` still have."""
    parts = [seen.part(node) for node in gate.nodes if node.op == "call_module"]
    held = [t for part in parts for t in part.parameters() if t.is_floating_point()]
    return weight.to(held[0].dtype) if held else weight


def _fuse_activation(graph: fx.GraphModule, node: fx.Node, unit: FoldedConv | TritonConv | TritonGate) -> None:
    after = _only_user(node)
    found = None if after is None else _activation(graph, after)
    if found is not None:
        unit.activation = found
        _absorb(after, node)


def _fuse_pool(graph: fx.GraphModule, node: fx.Node, unit: TritonConv) -> None:
    pool = _only_user(node)
    if pool is None or unit.activation != RELU or len(node.args) != 1 or not _calls(graph, pool, nn.MaxPool2d):
        return
    if eligible.why_not_pooled(graph.get_submodule(str(pool.target))) is None:
        unit.pooled = True
        _absorb(pool, node)


def _fuse_residual(graph: fx.GraphModule, node: fx.Node, unit: FoldedConv | TritonConv | TritonGate) -> None:
    add = _only_user(node)
    if add is None or add.kwargs:
        return
    augmented = add.target is _augmented and add.args[0] == "iadd"
    args = add.args[1:] if augmented else add.args
    in_place = bool(augmented or (add.op == "call_method" and add.target == "add_"))
    others = [arg for arg in args if arg is not node]
    known = in_place or (add.op != "call_module" and add.target in _ADD)
    if not known or len(args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return
    if in_place and args[0] is not node:
        return  # it writes to a tensor that may have other names
    if not _pure_between(graph, node, add):
        return
    add.prepend(node)
    node.args = (*node.args, others[0])
    unit.accumulates = in_place
    _absorb(add, node)


def _fuse_chain(graph: fx.GraphModule, node: fx.Node, expand: TritonConv) -> None:
    """Make one module of the 1x1 convolution ``node`` and those next to it, as :class:`TritonChain` has them."""
    if len(node.args) < 2 or not (expand.activation == RELU and _is_pointwise(expand) and expand.geometry.groups == 1):
        return
    before: Any = node.args[0]
    after = _following(graph, node)
    spatial = _unit(graph, before)
    alone = spatial is not None and _only_user(before) is node and node.args[1] is not before
    if not (alone and _pure_between(graph, before, node)):
        spatial = None
    if spatial is None and after is None:
        return
    three = (None if spatial is None else before, node, after)
    members: dict[int, fx.Node] = {place: member for place, member in enumerate(three) if member is not None}
    name = f"{node.name}_chain"
    graph.add_submodule(name, TritonChain(tuple(members)))
    with graph.graph.inserting_before(node):
        units = [graph.graph.get_attr(str(member.target)) for member in members.values()]
        both = graph.graph.call_module(name, (before if spatial is None else before.args[0], node.args[1], *units))
        for i, old in enumerate((node, after)):
            if old is not None:
                old.replace_all_uses_with(graph.graph.call_function(operator.getitem, (both, i)))
    for unit in _links(graph, both):
        unit.link()
    for old in reversed(members.values()):
        graph.graph.erase_node(old)


def _links(graph: nn.Module, chain: fx.Node) -> list[TritonConv]:
    """The units that the ``graph`` calls a :class:`TritonChain` with."""
    return [cast(TritonConv, graph.get_submodule(str(cast(fx.Node, unit).target))) for unit in chain.args[2:]]


def _following(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The unit that is to be the last of a chain, if one reads ``node``."""
    for user in node.users:
        unit = _unit(graph, user)
        if unit is not None and _is_pointwise(unit) and _pure_between(graph, node, user):
            return user
    return None


def _unit(graph: fx.GraphModule, node: Any) -> TritonConv | None:
    """What ``node`` calls, if that may be a chain's first or last: a convolution in one group, and a ReLU alone."""
    if not (isinstance(node, fx.Node) and _calls(graph, node, TritonConv)) or len(node.args) != 1:
        return None
    unit: Any = graph.get_submodule(str(node.target))
    plain = not (unit.pooled or unit.averages) and unit.geometry.groups == 1
    return unit if unit.activation == RELU and plain else None


def _fuse_front(graph: fx.GraphModule, node: fx.Node, norm: nn.Module, dtype: torch.dtype | None) -> bool:
    """Have 1x1 convolutions compute what the ``norm`` at ``node``, and an activation behind it, make of their input.

    Where nothing else reads that, see :class:`TritonFront`; returns whether it is so.
    """
    inside, following, last = cast(Activation, eligible.activation_in(norm)), IDENTITY, node
    after = _only_user(node)
    if inside == IDENTITY and after is not None and (found := _activation(graph, after)) is not None:
        following, last = found, after
    readers = list(last.users)
    if not readers or not all(_reads_behind(graph, reader, last, norm) for reader in readers):
        return False
    spans = [(last, reader) for reader in readers] + ([] if last is node else [(node, last)])
    if not all(_pure_between(graph, *span) for span in spans):
        return False
    name = f"{node.name}_front"
    graph.add_submodule(name, TritonFront(following))
    with graph.graph.inserting_before(node):
        both = graph.graph.call_module(name, (*node.args, graph.graph.get_attr(str(node.target))))
        x, stats = (graph.graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
    for reader in readers:
        unit: Any = graph.get_submodule(str(reader.target))
        if not isinstance(unit, TritonConv):
            unit = TritonConv(unit, None, cast(Geometry, _geometry_alone(unit)), dtype)
            _call(graph, reader, unit)
        unit.before = following if inside == IDENTITY else inside
        reader.args = (x, *(reader.args[1:] or (None,)), stats)
    for old in dict.fromkeys((last, node)):
        graph.graph.erase_node(old)
    return True


def _reads_behind(graph: fx.GraphModule, reader: fx.Node, read: fx.Node, norm: nn.Module) -> bool:
    """Whether ``reader`` is a 1x1 convolution of ``read`` alone that can compute the ``norm`` of its input."""
    if not _calls(graph, reader, nn.Conv2d, TritonConv) or reader.args[0] is not read or read in reader.args[1:]:
        return False
    part: Any = graph.get_submodule(str(reader.target))
    geometry = _geometry_alone(part)
    if isinstance(part, TritonConv) and part.conv_bias is None and (part.norm is None or len(reader.args) == 1):
        geometry = None if part.squeezes or part.averages or part.pooled else part.geometry
    if geometry is None or part.weight.shape[2:] != (1, 1) or eligible.is_frozen(norm):
        return False
    return _folds(norm, part.weight[0, :, 0, 0])  # of a filter in groups, these are not all channels


def _is_pointwise(unit: TritonConv) -> bool:
    return unit.weight.shape[2:] == (1, 1) and unit.geometry == Geometry()


def _pure_between(graph: fx.GraphModule, first: fx.Node, last: fx.Node, but: Sequence[fx.Node] = ()) -> bool:
    """Whether no node between the two writes to a tensor, so that either may run where the other does.

    ``but``: these do not count.
    """
    node = first.next
    while node is not last:
        if not (node in but or _reads(graph, node) or node.op == "get_attr" or node.target in _PURE):
            return False
        node = node.next
    return True


def _owns_residual(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the residual of ``node`` is a tensor that the graph made itself and that nothing reads afterwards."""
    if len(node.args) < 2:
        return False
    x, residual = node.args
    if residual is x or not isinstance(residual, fx.Node) or not _reads(graph, residual):
        return False
    return all(user <= node and _reads(graph, user) for user in residual.users)


def _absorb(node: Any, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _called(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, as its class has it, on positional arguments; None if it does something else."""
    if node.op != "call_module" or node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    module = graph.get_submodule(str(node.target))
    replaced = any(callable(getattr(type(module), name, None)) for name in vars(module))
    return None if replaced or eligible.hooked(module) else module


def _calls(graph: fx.GraphModule, node: fx.Node, *kinds: type[nn.Module]) -> bool:
    """Whether ``node`` calls a module of exactly one of ``kinds``; see :func:`_called`."""
    return type(_called(graph, node)) in kinds


def _norm(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The batch norm that ``node`` calls, which has an activation of its own at the most, or None."""
    module = _called(graph, node)
    if module is None or not eligible.is_norm(module) or eligible.why_inside(module) is not None:
        return None
    return module


def _reads(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` calls a module that neither writes to its input nor returns an alias of it."""
    return _calls(graph, node, *_READERS) or _norm(graph, node) is not None


def _activation(graph: fx.GraphModule, node: fx.Node) -> Activation | None:
    """That which ``node`` is of the only value that it reads, or None."""
    if node.op == "call_module":
        module = _called(graph, node)
        return None if module is None else eligible.activation_of(module)
    if node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        return eligible.activation_of_call(node.target, node.args, node.kwargs)
    return None


def _geometry(conv: Any) -> Geometry | None:
    """Stride, padding, dilation and groups of ``conv`` as numbers, by the filter that it has.

    None unless this is a plain convolution whose filter, bias and numbers fit: what they do is PyTorch's to say.
    """
    weight, bias, groups = (getattr(conv, name, _MISSING) for name in ("weight", "bias", "groups"))
    if not _is_dense(weight) or weight.dim() != 4 or weight.numel() == 0 or type(groups) is not int or groups < 1:
        return None
    if weight.shape[0] % groups or conv.padding_mode != "zeros":
        return None
    if bias is not None and not (_is_vector(bias, weight) and bias.dtype == weight.dtype):
        return None
    stride, dilation, padding = _pair(conv.stride, 1), _pair(conv.dilation, 1), _pair(conv.padding, 0)
    if conv.padding == "valid":
        padding = 0, 0
    elif conv.padding == "same" and dilation is not None and stride == (1, 1):
        both = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
        padding = None if any(total % 2 for total in both) else (both[0] // 2, both[1] // 2)
    return Geometry(stride, padding, dilation, groups) if stride and padding and dilation else None


def _pair(sizes: Any, least: int) -> tuple[int, int] | None:
    """One or two integers of at least ``least`` as two; None if it is anything else."""
    sizes = sizes if isinstance(sizes, tuple | list) else (sizes,)
    if len(sizes) not in (1, 2) or any(type(size) is not int or size < least for size in sizes):
        return None
    return sizes[0], sizes[-1]


def _folds(bn: Any, weight: Tensor) -> bool:
    """Whether ``bn`` normalises each channel of ``weight``'s output by constants, in dtypes that PyTorch takes."""
    frozen = eligible.is_frozen(bn)
    constants = [getattr(bn, name, _MISSING) for name in ("running_mean", "running_var")]
    affine = [getattr(bn, name, _MISSING) for name in ("weight", "bias")]
    vectors = constants + [t for t in affine if t is not None or frozen]
    if (
        bn.training
        or type(bn.eps) not in (int, float)
        or not bn.eps > 0
        or not all(_is_vector(t, weight) for t in vectors)
    ):
        return False
    mixed = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) and not frozen else weight.dtype
    return len({t.dtype for t in vectors}) == 1 and vectors[0].dtype in (weight.dtype, mixed)


_MISSING: Any = object()
_FLOATS = (*FLOATS, torch.float64)


def _is_dense(t: Any) -> bool:
    return type(t) in eligible.PLAIN and t.layout == torch.strided and t.dtype in _FLOATS


def _is_vector(t: Any, weight: Tensor) -> bool:
    """Whether ``t`` has one number for each channel that ``weight`` returns."""
    return _is_dense(t) and t.shape == weight.shape[:1] and t.device == weight.device
