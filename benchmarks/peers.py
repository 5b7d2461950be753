"""Every way to run a model that is compared, this library's own and others', all of one form."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import fuse, optimize_for_inference
from resnet_fused.plan.problem import Request

Function = Callable[[], Tensor]


class Peer(ABC):
    """A way to run a model.

    ``packages``: what must be installed, by the names of their imports. ``device``: the type of the only device that it
    is compared on. ``infers``, ``trains``: what it can do. ``implementation``: what blocks of this library do inside.
    ``counted``: whether :func:`resnet_fused.trace` sees what it launches. ``layers``: whether the command compares
    single layers too. ``heavy``: preparing it may take minutes. ``own_graph``: it replays a CUDA graph of its own.
    """

    name: str
    packages: tuple[str, ...] = ()
    device: str | None = None
    infers = trains = True
    implementation: Request = "eager"
    counted = layers = heavy = own_graph = False

    def does(self, training: bool) -> bool:
        """Whether it is made for training, or else for inference."""
        return self.trains if training else self.infers

    def why_not(self, device: torch.device, training: bool) -> str | None:
        """Why it cannot run there, in words, or None if it can."""
        if not self.does(training):
            return f"it is for {'inference' if training else 'training'} alone"
        if self.device not in (None, device.type):
            return f"it is compared on {self.device} alone"
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"the Python package {missing[0]} is not installed" if missing else None

    @abstractmethod
    def prepare(self, model: nn.Module, x: Tensor) -> Function:
        """A function that computes ``model(x)``, with gradients if ``model`` is in training mode.

        ``x`` [N, C, H, W] is channels_last. ``model`` lies on its device, in its dtype (in training: in fp32,
        to run under autocast); it is taken over, and may be changed. Raises whatever it likes if it cannot be done.
        """


class Eager(Peer):
    """PyTorch, one operator after the other; ``torch.backends.cudnn.benchmark`` is the caller's."""

    def __init__(self, name: str, memory_format: torch.memory_format) -> None:
        self.name, self.memory_format = name, memory_format
        self.counted = self.layers = memory_format == torch.channels_last

    def prepare(self, model: nn.Module, x: Tensor) -> Function:
        model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        x = _formatted(x, self.memory_format)
        return lambda: model(x)


class Compile(Peer):
    """``torch.compile``; with ``freezing``, the weights become constants in inference."""

    def __init__(self, name: str, mode: str, freezing: bool) -> None:
        self.name, self.mode, self.freezing = name, mode, freezing
        self.heavy, self.own_graph = mode == "max-autotune", mode != "default"
        self.trains = self.heavy or not freezing
        self.device = "cuda" if mode == "reduce-overhead" else None  # elsewhere the mode changes nothing

    def why_not(self, device: torch.device, training: bool) -> str | None:
        missing = _why_no_compiler() if device.type == "cpu" else None
        return super().why_not(device, training) or missing

    def prepare(self, model: nn.Module, x: Tensor) -> Function:
        from torch._inductor import config, list_mode_options

        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        freezing = self.freezing and not model.training
        # In the options too, or dynamo would serve it with code of the same class that was compiled without freezing.
        options = {**list_mode_options(self.mode), "freezing": freezing}
        compiled = torch.compile(model, options=options, fullgraph=True)
        with config.patch(freezing=freezing):
            compiled(x)
        return lambda: compiled(x)


class FxFuse(Peer):
    """``torch.fx.experimental.optimization.fuse``: batch norm folded into the convolutions, eager otherwise."""

    name = "torch.fx fuse"
    trains = False

    def prepare(self, model: nn.Module, x: Tensor) -> Function:
        from torch.fx.experimental.optimization import fuse as fold

        folded = fold(model).to(memory_format=torch.channels_last)
        return lambda: folded(x)


class JitOptimize(Peer):
    """``torch.jit.optimize_for_inference`` of a traced model, which lays tensors out as it likes."""

    name = "torch.jit.optimize_for_inference"
    trains = False

    def prepare(self, model: nn.Module, x: Tensor) -> Function:
        x = x.contiguous()
        with _quiet_tracer():
            frozen = torch.jit.optimize_for_inference(torch.jit.trace(model, x))
        return lambda: frozen(x)


class OnnxRuntime(Peer):
    """ONNX Runtime on the CPU, in fp32, with as many threads as PyTorch; exported with onnxscript."""

    name = "ONNX Runtime"
    packages = ("onnxruntime", "onnxscript")
    device = "cpu"
    trains = False

    def prepare(self, model: nn.Module, x: Tensor) -> Function:
        import onnxruntime

        if x.dtype != torch.float32:
            raise NotImplementedError(f"its CPU kernels compute in float32; got {x.dtype}")
        x = x.contiguous()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait actively after a run would take the processor from the peer that is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(_onnx(model, x), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x.numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])


class OpenVino(Peer):
    """OpenVINO on the CPU, with as many threads as PyTorch; 16-bit dtypes as its precision hint, inputs in fp32."""

    name = "OpenVINO"
    packages = ("openvino",)
    device = "cpu"
    trains = False

    def prepare(self, model: nn.Module, x: Tensor) -> Function:
        import openvino

        hint = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[x.dtype]
        dtype, x = x.dtype, x.float().contiguous()
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
        }
        with _quiet_tracer():
            converted = openvino.convert_model(model.float(), example_input=x)
        compiled = openvino.compile_model(converted, "CPU", options)
        if (used := compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()) != hint:
            raise NotImplementedError(f"it computes in {used} here, not in {hint}")
        request = compiled.create_infer_request()
        feed = [x.numpy()]
        return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0]).to(dtype)


class TensorRT(Peer):
    """TensorRT, through Torch-TensorRT."""

    name = "TensorRT"
    packages = ("torch_tensorrt",)
    heavy = True
    device = "cuda"
    trains = False

    def prepare(self, model: nn.Module, x: Tensor) -> Function:
        import torch_tensorrt

        engine = torch_tensorrt.compile(model, ir="dynamo", inputs=[x], use_explicit_typing=True)
        return lambda: engine(x)


class CudnnFrontend(Peer):
    """cuDNN's graph API: convolution, batch norm as scale and shift, and ReLU in one graph; for a single unit."""

    name = "cudnn-frontend"
    packages = ("cudnn",)
    device = "cuda"
    trains = False
    layers = True

    def prepare(self, model: nn.Module, x: Tensor) -> Function:
        if [type(part) for part in model.children()] != [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
            raise NotImplementedError("it takes one convolution with batch norm and ReLU, not a block or a network")
        import cudnn

        conv: Any
        bn: Any
        conv, bn, _ = model.children()
        kinds = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}
        kind = getattr(cudnn.data_type, kinds[x.dtype])
        wide = cudnn.data_type.FLOAT
        handle = cudnn.create_handle()
        graph = cudnn.pygraph(io_data_type=kind, intermediate_data_type=wide, compute_data_type=wide, handle=handle)
        scale = bn.weight.float() * (bn.running_var.float() + bn.eps).rsqrt()
        shift = bn.bias.float() - bn.running_mean.float() * scale
        w = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        operands = [x, w, scale.detach().view(1, -1, 1, 1), shift.detach().view(1, -1, 1, 1)]
        image, weight, factor, term = map(graph.tensor_like, operands)
        geometry = {"padding": [*conv.padding], "stride": [*conv.stride], "dilation": [*conv.dilation]}
        y = graph.conv_fprop(image=image, weight=weight, **geometry)
        y = graph.relu(input=graph.add(a=graph.mul(a=y, b=factor), b=term))
        y.set_output(True).set_data_type(kind)
        graph.build([cudnn.heur_mode.A])
        with torch.no_grad():
            out = torch.empty_like(conv(x), memory_format=torch.channels_last)
        tensors = dict(zip((image, weight, factor, term, y), (*operands, out), strict=True))
        workspace = torch.empty(graph.get_workspace_size(), device=x.device, dtype=torch.uint8)

        def run() -> Tensor:
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(x.device).cuda_stream)
            graph.execute(tensors, workspace, handle=handle)
            return out

        return run


class Fuse(Peer):
    """This library: ``fuse(model, memory=memory)``, the implementation of each unit chosen by its plan."""

    implementation: Request = "auto"
    counted = True

    def __init__(self, name: str, memory: str) -> None:
        self.name, self.memory = name, memory
        self.infers = self.layers = memory == "default"

    def why_not(self, device: torch.device, training: bool) -> str | None:
        reason = "on a CPU its kernels run in Triton's interpreter, which says nothing of their speed"
        return super().why_not(device, training) or (reason if device.type != "cuda" else None)

    def prepare(self, model: nn.Module, x: Tensor) -> Function:
        fused = fuse(model.to(memory_format=torch.channels_last), memory=self.memory)  # type: ignore[call-overload]
        return lambda: fused(x)


class Frozen(Peer):
    """This library's copy for serving: ``optimize_for_inference(model, x)``."""

    name = "resnet_fused.optimize_for_inference"
    implementation: Request = "auto"
    own_graph = True
    trains = False
    layers = True

    def prepare(self, model: nn.Module, x: Tensor) -> Function:
        frozen = optimize_for_inference(model, x)
        return lambda: frozen(x)


BASELINE = Eager("eager channels_last", torch.channels_last)
OURS: tuple[Peer, ...] = (
    Fuse("resnet_fused", "default"),
    Fuse("resnet_fused recompute", "recompute"),
    Frozen(),
)
OTHERS: tuple[Peer, ...] = (
    Eager("eager", torch.contiguous_format),
    BASELINE,
    FxFuse(),
    JitOptimize(),
    Compile("torch.compile", "default", freezing=False),
    Compile("torch.compile freezing", "default", freezing=True),
    Compile("torch.compile reduce-overhead", "reduce-overhead", freezing=True),
    Compile("torch.compile max-autotune", "max-autotune", freezing=True),
    OnnxRuntime(),
    OpenVino(),
    TensorRT(),
    CudnnFrontend(),
)
PEERS = {peer.name: peer for peer in (*OTHERS, *OURS)}
"""All of them by name."""


def _formatted(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``x`` in ``memory_format``; a leaf of the graph, so that the conversion is no part of what is timed."""
    return x.detach().contiguous(memory_format=memory_format).requires_grad_(x.requires_grad)


@contextlib.contextmanager
def _quiet_tracer() -> Iterator[None]:
    """TorchScript is deprecated, and warns of every size that it takes for a constant."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", category)
        yield


def _why_no_compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler is installed"
    return None


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    program: Any = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    data: bytes = program.model_proto.SerializeToString()
    return data
