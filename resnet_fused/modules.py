"""Residual blocks: modules that run their units (convolution, batch norm, ReLU) fused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import profiler

from resnet_fused import functional
from resnet_fused.engine import eligible
from resnet_fused.engine.forward import Taken, settings
from resnet_fused.engine.ops import channels_last
from resnet_fused.engine.reference import PaddedIdentity
from resnet_fused.engine.replay import Repetition, can_repeat, is_refused
from resnet_fused.engine.request import requested
from resnet_fused.kernels.activation import IDENTITY, RELU, Activation
from resnet_fused.plan.problem import Request

T = TypeVar("T")


class UnitNames(NamedTuple):
    """A convolution and its batch norm, by the dotted names of the submodules, and the activation that follows.

    In a pre-activation block, batch norm and activation stand in front of the convolution.
    """

    conv: str
    norm: str
    activation: Activation = RELU


class BlockLayout(NamedTuple):
    """What a block computes: ``act(units(x) + shortcut(x))``, or ``units(x)`` alone if it is not ``residual``.

    The activation of the last unit stands behind the addition. ``shortcut``: a projection; the name of a
    :class:`PaddedShortcut`; or None for the identity. ``pool``: the name of a module in front of the projection.
    ``in_place``: the addition writes to the branch, and so keeps its dtype where autocast gives the shortcut another.
    ``norm_first``: it is a pre-activation block, behind whose addition nothing stands. Its projection is a convolution,
    of what its first unit's batch norm and activation make of x.
    """

    units: tuple[UnitNames, ...]
    shortcut: UnitNames | str | None = None
    pool: str | None = None
    residual: bool = True
    in_place: bool = False
    norm_first: bool = False

    def all_units(self) -> tuple[UnitNames, ...]:
        """The units of the branch, and the projection if there is one."""
        return (*self.units, self.shortcut) if isinstance(self.shortcut, UnitNames) else self.units


class StemLayout(NamedTuple):
    """How a network begins: ``pool(act(bn(conv(x))))``, by the dotted names of ``conv``, ``norm`` and ``pool``.

    ``pool``: None for one that kernels do not do, or not behind this ``activation``. ``parts``: the children that are
    called for it, one on the result of the other, the first on the network's input; where that is a sequence, ``conv``
    is the last in it.
    """

    conv: str
    norm: str
    pool: str | None
    parts: tuple[str, ...]
    activation: Activation = RELU

    @property
    def is_deep(self) -> bool:
        """Whether something stands in front of the convolution."""
        return self.conv != self.parts[0] and self.norm in self.parts

    @property
    def end(self) -> str:
        """What the last part is."""
        return "activation" if self.pool is None else "pool"


class PaddedShortcut(nn.Module):
    """The shortcut without parameters: every ``stride``-th pixel, zero channels split evenly on both sides.

    Option A of He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385, section 3.3).
    Takes [N, in_channels, H, W], returns [N, out_channels, ceil(H/stride), ceil(W/stride)].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"out_channels must be at least in_channels={in_channels}; got {out_channels}")
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride

    def view(self, x: Tensor) -> PaddedIdentity:
        """The shortcut of ``x`` for a kernel that reads it in place."""
        return PaddedIdentity(x, self.stride, (self.out_channels - self.in_channels) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.view(x).materialize(self.out_channels)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class FusedBlock(nn.Module):
    """A block that runs its :class:`BlockLayout` fused where it can, else ``eager_forward``.

    ``memory``: what training keeps for the backward. ``"default"``: the raw output of every convolution.
    ``"recompute"``: the backward computes the last one, and the projection, again; a pre-activation block keeps neither
    anyway.
    """

    layout: BlockLayout
    memory: str = "default"

    def eager_forward(self, x: Tensor) -> Tensor:
        """The same function through the block's own submodules."""
        raise NotImplementedError

    def described(self) -> tuple[BlockLayout, str]:
        """Its layout, and what training keeps."""
        return self.layout, self.memory

    def title(self) -> str:
        """What a profiler shows it as."""
        return type(self).__name__

    def why_eager(self, x: Tensor) -> str | None:
        """Why the block would run eager on ``x`` as things stand, or None if it is fused."""
        found = self._resolve(x)
        return found if isinstance(found, str) else None

    def why_unfusable(self) -> str | None:
        """Why the block, as its submodules are now, is not the one that its layout describes, or None."""
        return "hooks are registered on a submodule" if eligible.hooked(*descendants(self)) else None

    def forward(self, x: Tensor) -> Tensor:
        repetition = self._repetition(x)
        if repetition is not None and repetition.is_known:
            return in_range(self, repetition.play)
        found = self._resolve(x)
        if isinstance(found, str):
            eligible.report_once(found)
            return self.eager_forward(x)
        if repetition is None or torch.is_grad_enabled():
            return in_range(self, self._launched, found, repetition)
        return in_range(self, repetition.run, partial(self._infer, self.described()[0], x, x))

    def _launched(self, found: functional.Chain | functional.PreAct, repetition: Repetition | None = None) -> Tensor:
        """``repetition``: see :func:`functional.run`."""
        if isinstance(found, functional.PreAct):
            if repetition is not None:
                repetition.keep(None)
            return found.run()
        return functional.run(found, recompute=self.described()[1] == "recompute", repetition=repetition)

    def _infer(self, layout: BlockLayout, x: Tensor, source: Tensor) -> Tensor:
        """``layout`` on ``x``, and its shortcut on ``source``, without gradients, where they are not to run eager."""
        found = self._chain(layout, x, source, requested(self))
        return self._launched(cast(functional.Chain | functional.PreAct, found))

    def _repetition(self, x: Tensor) -> Repetition | None:
        """The call on ``x``, if it may be one that was seen before: without onlookers, evaluated or with gradients."""
        if not isinstance(x, Tensor) or not can_repeat(x):
            return None
        request = requested(self)
        if eligible.why_not_here(x, request) is not None or self.why_unfusable() is not None:
            return None
        return self._repeated(self, self.described()[0], request, x)

    def _repeated(self, owner: nn.Module, layout: BlockLayout, request: Request, *inputs: Tensor) -> Repetition | None:
        """The call of ``layout`` on ``inputs`` that can be repeated, kept with ``owner``; None if it is no such one."""
        if any(x.layout is not torch.strided for x in inputs):
            return None
        tensors: list[Tensor | None] = [*inputs]
        training, situation = torch.is_grad_enabled(), None
        if training:
            situation = functional.situation(inputs[0]), inputs[0].stride(), inputs[0].requires_grad, self.training
            if is_refused(owner, situation):
                return None
        read = self.read_by(layout, tensors)
        if read is None:
            return None
        kept = (self.described()[1], *[t is not None and t.requires_grad for t in tensors]) if training else ()
        return Repetition(owner, (request, settings(inputs[0].device), *read, kept), tensors, situation)

    def read_by(self, layout: BlockLayout, tensors: list[Tensor | None]) -> tuple[Any, ...] | None:
        """``layout``, and all that it reads of submodules but tensors, which are added to ``tensors``.

        None where that is more than :func:`eligible.constants` knows.
        """
        training = torch.is_grad_enabled()
        try:
            constants = [eligible.constants(self._layer(unit), tensors, training) for unit in layout.units]
            if isinstance(layout.shortcut, UnitNames):
                found: list[Tensor | None] = []
                constants.append(eligible.constants(self._layer(layout.shortcut), found, training))
                # Filter and bias: the norm of a pre-activation block's projection is that of its first unit.
                tensors += found[:2] if layout.norm_first else found
            others = [_attributes(self.get_submodule(name)) for name in _others(layout)]
        except (AttributeError, KeyError, TypeError):  # of submodules that are gone, or sizes that are no pairs
            return None
        return None if None in constants else (layout, *constants, *others)

    def forward_ahead(self, x: Tensor, ahead: Tensor | Taken | None, following: FusedBlock | None) -> functional.Ran:
        """What ``forward`` returns, and what the first unit of ``following`` makes of it, or its moments, or None.

        ``ahead``: such of ``x``, if that came along with it. ``following``: another block that :func:`runs_fused`. With
        gradients, pre-activation blocks alone.
        """
        found = self._resolve(x)
        if isinstance(found, str):
            eligible.report_once(found)
            return functional.Ran(self.eager_forward(x))
        if isinstance(found, functional.PreAct):
            taken = ahead if isinstance(ahead, Taken) else None
            return in_range(self, found.run_ahead, taken, following is not None and _takes_moments(following))
        unit = ahead if isinstance(ahead, Tensor) else None
        return in_range(
            self, functional.run_ahead, found, unit, None if following is None else _first_layer(x, following)
        )

    def _resolve(self, x: Tensor) -> functional.Chain | functional.PreAct | str:
        """The block on ``x`` with all that it reads, or why it runs eager."""
        request = requested(self)
        if (reason := eligible.why_not_here(x, request) or self.why_unfusable()) is not None:
            return reason
        return self._chain(self.described()[0], x, x, request)

    def _chain(
        self, layout: BlockLayout, x: Tensor, source: Tensor, request: Request
    ) -> functional.Chain | functional.PreAct | str:
        """``layout`` on ``x``, and its shortcut on ``source``, with all that they read, or why they run eager."""
        try:
            layers = [self._layer(unit) for unit in layout.all_units()]
        except KeyError as name:
            return f"it has no submodule {name} any more"
        if (reason := eligible.why_unsupported(x, layers)) is not None:
            return reason
        if layout.norm_first:
            branch, projection = layers[: len(layout.units)], None if layout.shortcut is None else layers[-1]
            return functional.resolve_preact(x, branch, projection, request=request)
        if source is x:
            source = x = channels_last(x)  # once, for the branch and the shortcut
        shortcut = self._shortcut(layout, source, layers[-1])
        return functional.resolve(x, layers[: len(layout.units)], shortcut, in_place=layout.in_place, request=request)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"{type(self).__qualname__} cannot be scripted: script the model as it was, resnet_fused.unfuse(model)"
        )

    def _layer(self, unit: UnitNames) -> eligible.Layer:
        return eligible.Layer(descendant(self, unit.conv), descendant(self, unit.norm), unit.activation)

    def _shortcut(self, layout: BlockLayout, x: Tensor, projection: eligible.Layer) -> functional.Shortcut | None:
        """That of ``x``; ``projection``: the layer that it is, if it is one."""
        if not layout.residual:
            return None
        if isinstance(layout.shortcut, str):
            return cast(PaddedShortcut, self.get_submodule(layout.shortcut)).view(x)
        if layout.pool is not None:
            x = self.get_submodule(layout.pool)(x)
        return x if layout.shortcut is None else functional.Projection(x, *projection[:2])


def _others(layout: BlockLayout) -> Iterator[str]:
    """The submodules that a forward calls beside its units."""
    if layout.pool is not None:
        yield layout.pool
    if isinstance(layout.shortcut, str):
        yield layout.shortcut


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    """What a pool or a shortcut computes with: as text, in which 2 is not 2.0."""
    return type(module), *[(name, repr(value)) for name, value in vars(module).items() if name[0] != "_"]


def is_norm_first(module: nn.Module | None) -> bool:
    """Whether the forward of ``module`` is that of a pre-activation block."""
    if not runs_fused(module):
        return False
    layout: BlockLayout | None = cast(FusedBlock, module).described()[0]
    return layout is not None and layout.norm_first


def _takes_moments(block: FusedBlock) -> bool:
    """Whether ``block`` is to normalise its input by the statistics of the batch."""
    if not is_norm_first(block):
        return False
    try:
        norm = descendant(block, block.described()[0].units[0].norm)
    except KeyError:
        return False
    return isinstance(norm, nn.Module) and norm.training


def _first_layer(x: Tensor, block: FusedBlock) -> eligible.Layer | None:
    """The layer that reads what ``block`` does, which lies as ``x``; None if it is not to be computed by itself."""
    layout: BlockLayout | None = block.described()[0]  # None: it was never recognised
    if layout is None or layout.norm_first:
        return None
    first, *others = layout.units
    try:
        layer = block._layer(first)
    except KeyError:
        return None
    known = others and not eligible.hooked(*layer[:2]) and eligible.why_unsupported(x, [layer]) is None
    return layer if known else None


def runs_fused(module: nn.Module | None) -> bool:
    """Whether the forward of ``module`` is that of a fused block."""
    # By the code: the parameter may have another name.
    return isinstance(module, FusedBlock) and type(module).forward.__code__.co_code == _FORWARD


_FORWARD = FusedBlock.forward.__code__.co_code


def in_range(block: FusedBlock, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What ``function`` returns; while a profiler runs, in a range with the title of ``block``."""
    if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
        return function(*arguments, **options)
    with profiler.record_function(block.title()):
        return function(*arguments, **options)


def traced_forward(module: nn.Module, forward: Any) -> Any:
    """What a tracer sees of ``module``, whose ``forward`` this is: a fused block's own function, eager."""
    return cast(FusedBlock, module).eager_forward if runs_fused(module) else forward


def descendant(module: nn.Module, name: str) -> Any:
    """What ``module.get_submodule`` finds, in a fraction of the time: it is asked for at every call of a block."""
    if name in module._modules:
        return module._modules[name]
    found: Any = module
    for part in name.split("."):
        found = found._modules[part]
    return found


def descendants(module: nn.Module) -> list[nn.Module]:
    """What ``module.modules()`` yields behind the module itself, in a fraction of the time; a shared one repeatedly."""
    found = []
    for child in module._modules.values():
        if child is not None:
            found.append(child)
            if child._modules:
                found += descendants(child)
    return found


class _NumberedBlock(FusedBlock):
    """A block with submodules ``conv1, bn1, conv2, bn2 ...``, ``relu`` and ``downsample``."""

    depth: int
    relu: nn.Module
    downsample: nn.Module | None

    @property
    def layout(self) -> BlockLayout:  # type: ignore[override]
        downsample = self._modules.get("downsample")
        made = _numbered.__wrapped__ if torch.compiler.is_compiling() else _numbered
        activation = eligible.activation_of(self.relu) or RELU  # why_unfusable tells of others
        return made(self.depth, activation, downsample is not None, isinstance(downsample, PaddedShortcut))

    def why_unfusable(self) -> str | None:
        downsample = self.downsample
        if downsample is not None and not isinstance(downsample, PaddedShortcut):
            if type(downsample) is not nn.Sequential or len(downsample) != 2:
                return (
                    f"the shortcut is {type(downsample).__qualname__}, not nn.Sequential of a convolution and its norm"
                )
        if eligible.activation_of(self.relu) is None:
            return f"the activation is {type(self.relu).__qualname__}"
        return super().why_unfusable()


@lru_cache(maxsize=64)
def _numbered(depth: int, activation: Activation, downsampled: bool, padded: bool) -> BlockLayout:
    units = tuple([UnitNames(f"conv{i}", f"bn{i}", activation) for i in range(1, depth + 1)])
    if not downsampled:
        return BlockLayout(units)
    return BlockLayout(units, "downsample" if padded else UnitNames("downsample.0", "downsample.1", IDENTITY))


class BasicBlock(_NumberedBlock):
    """Two 3x3 convolutions; torchvision's constructor arguments, attribute names and state-dict keys.

    ``x`` [N, inplanes, H, W] -> [N, planes, ceil(H/stride), ceil(W/stride)].
    He et al. 2015 (arXiv:1512.03385), figure 5.
    """

    expansion = 1
    depth = 2

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock needs groups=1 and base_width=64; got groups={groups}, base_width={base_width}"
            )
        if dilation > 1:
            raise ValueError(f"BasicBlock needs dilation=1; got {dilation}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = norm_layer(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def eager_forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class Bottleneck(_NumberedBlock):
    """1x1, 3x3 and 1x1 convolution, the stride on the 3x3; torchvision's arguments, attribute names and keys.

    ``x`` [N, inplanes, H, W] -> [N, 4*planes, ceil(H/stride), ceil(W/stride)]. He et al. 2015 (arXiv:1512.03385),
    figure 5; the groups of Xie et al. 2016 (arXiv:1611.05431); the width of Zagoruyko 2016 (arXiv:1605.07146).
    """

    expansion = 4
    depth = 3

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def eager_forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class _PreActivation(FusedBlock):
    """A block with submodules ``norm1, conv1, norm2, conv2 ...``, ``act`` and ``downsample``."""

    depth: int
    act: nn.Module
    downsample: nn.Module | None

    @property
    def layout(self) -> BlockLayout:  # type: ignore[override]
        made = _norm_first.__wrapped__ if torch.compiler.is_compiling() else _norm_first
        activation = eligible.activation_of(self.act) or RELU  # why_unfusable tells of others
        return made(self.depth, activation, self._modules.get("downsample") is not None)

    def why_unfusable(self) -> str | None:
        downsample = self.downsample
        if downsample is not None and (type(downsample) is not nn.Sequential or [*downsample._modules] != ["conv"]):
            return f"the shortcut is {type(downsample).__qualname__}, not nn.Sequential of a convolution named conv"
        if eligible.activation_of(self.act) is None:
            return f"the activation is {type(self.act).__qualname__}"
        return super().why_unfusable()

    def eager_forward(self, x: Tensor) -> Tensor:
        out = self.act(self.get_submodule("norm1")(x))
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.get_submodule("conv1")(out)
        for i in range(2, self.depth + 1):
            out = self.get_submodule(f"conv{i}")(self.act(self.get_submodule(f"norm{i}")(out)))
        return cast(Tensor, out + shortcut)


@lru_cache(maxsize=64)
def _norm_first(depth: int, activation: Activation, downsampled: bool) -> BlockLayout:
    units = tuple([UnitNames(f"conv{i}", f"norm{i}", activation) for i in range(1, depth + 1)])
    shortcut = UnitNames("downsample.conv", "norm1", activation) if downsampled else None
    return BlockLayout(units, shortcut, norm_first=True)


def _projection(channels: int, width: int, stride: int) -> nn.Module | None:
    """A convolution where the shape changes, else None."""
    if stride == 1 and channels == width:
        return None
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, width, 1, stride, bias=False)))


class PreActBlock(_PreActivation):
    """Two 3x3 convolutions, behind batch norm and ReLU each; timm's attribute names and state-dict keys.

    ``x`` [N, in_channels, H, W] -> [N, out_channels, ceil(H/stride), ceil(W/stride)]. The shortcut is x, or a 1x1
    convolution of the first activations where the shape changes. He et al. 2016 (arXiv:1603.05027), figure 4 (e).
    """

    depth = 2

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.downsample = _projection(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.act = nn.ReLU(inplace=True)


class PreActBottleneck(_PreActivation):
    """1x1, 3x3 and 1x1 convolution, behind batch norm and ReLU each, the stride on the 3x3; timm's names and keys.

    ``x`` [N, in_channels, H, W] -> [N, out_channels, ceil(H/stride), ceil(W/stride)], with out_channels/4 in between.
    The shortcut is as in :class:`PreActBlock`.
    """

    depth = 3

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        width = out_channels // 4
        self.downsample = _projection(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.act = nn.ReLU(inplace=True)


class ResidualBlock(_NumberedBlock):
    """``relu(branch(x) + shortcut(x))`` with a branch of one to n units (convolution, batch norm, ReLU).

    ``channels``: channels of the input. ``layers``: per unit either ``(out_channels, kernel_size)``, padded so that the
    size stays, or an ``nn.Conv2d`` of your own. ``shortcut``: ``"identity"``, ``"projection"`` (a 1x1 convolution and
    batch norm) or ``"pad"`` (:class:`PaddedShortcut`). ``stride``: of the first convolution given as a tuple; the
    shortcut follows the product of all strides. ``zero_init``: start the last gamma at zero, so that a fresh block is
    ``relu(shortcut(x))`` (Goyal et al. 2017, arXiv:1706.02677, section 5.1).

    Raises ValueError for layers whose channels do not chain or that the shortcut cannot follow.
    """

    SHORTCUTS = ("identity", "projection", "pad")

    def __init__(
        self,
        channels: int,
        layers: Sequence[tuple[int, int] | nn.Conv2d],
        shortcut: str = "identity",
        *,
        stride: int = 1,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers must hold at least one layer; got none")
        if shortcut not in self.SHORTCUTS:
            raise ValueError(f"shortcut must be one of {', '.join(map(repr, self.SHORTCUTS))}; got {shortcut!r}")
        self.depth = len(layers)
        width, total, pending = channels, (1, 1), stride
        for i, layer in enumerate(layers, 1):
            if not isinstance(layer, nn.Conv2d):
                layer = _same_size(width, *layer, stride=pending)
                pending = 1
            if layer.in_channels != width:
                raise ValueError(f"layers[{i - 1}] must take {width} channels; it takes {layer.in_channels}")
            width = layer.out_channels
            total = (total[0] * layer.stride[0], total[1] * layer.stride[1])
            self.add_module(f"conv{i}", layer)
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
        if pending != 1:
            raise ValueError(f"stride={stride} has no layer to go to: give it to your own convolutions")
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(shortcut, channels, width, total)
        if zero_init:
            nn.init.zeros_(cast(nn.BatchNorm2d, self.get_submodule(f"bn{self.depth}")).weight)

    def eager_forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.depth + 1):
            out = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(out))
            if i < self.depth:
                out = self.relu(out)
        identity = x if self.downsample is None else self.downsample(x)
        return cast(Tensor, self.relu(out + identity))


def _same_size(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def _shortcut(kind: str, channels: int, width: int, stride: tuple[int, int]) -> nn.Module | None:
    if kind == "projection":
        return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    if kind == "pad":
        if stride[0] != stride[1]:
            raise ValueError(f"shortcut='pad' needs the same stride in both directions; got {stride}")
        return PaddedShortcut(channels, width, stride[0])
    if width != channels or stride != (1, 1):
        raise ValueError(
            f"shortcut='identity' needs a branch from {channels} to {channels} channels with stride 1; "
            f"got {width} channels with stride {stride}"
        )
    return None
