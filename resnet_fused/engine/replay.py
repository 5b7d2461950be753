"""Operators and blocks, on what they ran on before: the same launches again, and nothing else.

What an operator does follows from the layouts of its tensors and from its other arguments. Its allocations, launches
and library calls are written down while it runs, as a :class:`Tape`; from then on, the tape is played.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_fused.kernels.launch import KEPT_LAYOUTS, Recipe, current_stream, only_launches, recording
from resnet_fused.plan.decide import tf32


def tape_of(implementation: Callable[..., Any], arguments: Sequence[Any]) -> Tape | None:
    """That of ``implementation(*arguments)``, if :func:`run` wrote it down."""
    return _tapes.get(_key(implementation, arguments, []))


def _key(implementation: Callable[..., Any], arguments: Sequence[Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    return implementation, _settings(arguments[0]), *_signature(arguments, tensors)


def run(implementation: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """What ``implementation(*arguments)`` does and returns, a tensor or several, which follows from their layouts.

    It is just called where its launches are more than launches, where a mode of PyTorch's functions is to see it, where
    it is part of what is written down, and where two of the tensors are the same.
    """
    if not only_launches() or torch._C._len_torch_function_stack() > 0 or torch._C._len_torch_dispatch_stack() > 0:
        return implementation(*arguments)
    tensors: list[Tensor] = []
    key = _key(implementation, arguments, tensors)
    if len(set(map(id, tensors))) < len(tensors):
        return implementation(*arguments)
    tape = _tapes.get(key)
    if tape is not None:
        return tape.play(tensors)
    if key in _tapes:
        return implementation(*arguments)
    if len(_tapes) >= KEPT_LAYOUTS:
        _tapes.clear()
    result, _tapes[key] = _recorded(tensors, lambda: implementation(*arguments))
    return result


def _recorded(tensors: Sequence[Tensor], function: Callable[[], Any]) -> tuple[Any, Tape | None]:
    """What ``function`` returns, of the ``tensors``, and its tape; None if it can not be repeated."""
    with _Recorder(tensors) as recorder, recording(recorder.launched):
        result = function()
    return result, recorder.tape(result)


class Repetition:
    """A call of ``owner`` that follows from the ``key`` and the layouts of ``tensors``, which are all that it reads.

    The first of its kind is just run, the second written down, which takes several times as long, and all others are
    played: where layouts are ever new, none is written down. Raises TypeError for a ``key`` that has no hash.
    With gradients, what plays it stands in the graph, and is kept at once. ``situation``: what is seen of such a call
    at a glance; see :func:`is_refused`.
    """

    def __init__(self, owner: Any, key: tuple[Any, ...], tensors: Sequence[Any], situation: Any = None) -> None:
        self.situation = situation
        self.inputs: list[Tensor] = []
        self.key = _settings(tensors[0]), key, *_signature(tensors, self.inputs)
        known = _repeated.get(owner)
        self.known = _repeated.setdefault(owner, {}) if known is None else known
        self.tape = self.known.get(self.key, _NEW)

    @property
    def is_known(self) -> bool:
        """Whether it can be played."""
        return not isinstance(self.tape, str | None)

    def play(self) -> Any:
        """What it returns."""
        return self.tape.play(self.inputs)

    def run(self, function: Callable[[], Any]) -> Any:
        """What ``function`` returns, which is the call."""
        if self.tape is _NEW:
            self.keep(_MET)
        elif self.tape is _MET and len(set(map(id, self.inputs))) == len(self.inputs):
            result, self.known[self.key] = _recorded(self.inputs, function)
            return result
        return function()

    def keep(self, tape: Any) -> None:
        """Whatever plays the call on its inputs, or None if nothing can."""
        if len(self.known) >= KEPT_CALLS:
            self.known.clear()
        self.known[self.situation if tape is None else self.key] = tape


def is_refused(owner: Any, situation: Any) -> bool:
    """Whether a call of ``owner`` that looked like this one could not be played: then it is not worth a second look."""
    known = _repeated.get(owner)
    return known is not None and situation in known


KEPT_CALLS = 16
"""Of one owner, for how many kinds of calls it is kept what was done."""

_NEW, _MET = "new", "met once"
_repeated: WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()


def can_repeat(*inputs: Tensor) -> bool:
    """Whether calls on ``inputs`` may be written down and played: no one watches, and launches are no more than that.

    There are three of them at most.
    """
    return not is_watched(inputs) and only_launches() and torch._C._len_torch_function_stack() == 0


PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors that have no operators of their own."""


def is_watched(arguments: tuple[Any, ...]) -> bool:
    """Whether a compiler, a tracer, a mode, the meta device or a subclass of Tensor is to see an operator.

    Input and filter, if it reads one, are among its first three arguments. Not counted is what writes down, alone.
    """
    if (
        torch.compiler.is_compiling()
        or (torch._C._len_torch_dispatch_stack() > 0 and not _only_recorded())
        or torch._C._get_tracing_state() is not None
        or arguments[0].is_meta
    ):
        return True
    for value in arguments[:3]:  # noqa: SIM110 (a generator takes as long as all of this)
        if type(value) not in PLAIN and isinstance(value, Tensor):
            return True
    return False


def _only_recorded() -> bool:
    return torch._C._len_torch_dispatch_stack() == 1 and type(torch._C._get_dispatch_stack_at(0)) is _Recorder


def _settings(x: Tensor) -> tuple[Any, ...]:
    """What operators depend on beside their arguments: may they round to TF32, and what autocast does to a library."""
    kind = x.device.type
    return tf32(torch.float32), torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)


def _signature(arguments: Sequence[Any], tensors: list[Tensor]) -> list[Any]:
    """All about ``arguments`` but the contents of tensors, which are added to ``tensors``."""
    found: list[Any] = []
    for value in arguments:  # written out, as this is most of what is left to do
        if isinstance(value, Tensor):
            tensors.append(value)
            layout = value.shape, value.stride(), value.dtype, value.is_neg()
            found.append((layout, value.get_device(), value.data_ptr() % 16))
        elif isinstance(value, _LISTS):
            numbers = value and isinstance(value[0], _NUMBERS)  # then there are no tensors behind it
            found.append(tuple(value if numbers else _signature(value, tensors)))
        else:
            found.append(value)
    return found


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    """How memory is to be read, element by element."""
    return tensor.dtype, tensor.is_neg()


def _is_aligned(tensor: Tensor) -> bool:
    """Whether the address is one that compiled code may count on, as all are that PyTorch allocates."""
    return tensor.data_ptr() % 16 == 0


_LISTS, _NUMBERS = (list, tuple), (int, str)

_NONE = 0
"""The slot of None. On a tape, a tensor is known by the number of its slot."""

Step = Callable[[list[Any], list[Any], int], None]
"""Takes the tensors and the addresses by slot, of which it adds its own, and the stream."""


class _Event(NamedTuple):
    """What an operator did; ``reads``: the slots whose memory that needs, ``holds``: those whose tensors."""

    step: Step
    reads: Sequence[int] = ()
    holds: Sequence[int] = ()


class _View(NamedTuple):
    """That the tensor in ``slot`` begins ``offset`` elements behind that in ``base``, and how it lies in memory."""

    slot: int
    base: int
    offset: int
    like: tuple[tuple[int, ...], tuple[int, ...], int]

    def step(self, held: bool) -> Step:
        """``held``: the tensor itself is needed, not its address alone."""
        slot, base, offset, (shape, strides, itemsize) = self

        def address(tensors: list[Any], addresses: list[Any], stream: int) -> None:
            addresses[slot] = addresses[base] + offset * itemsize

        def view(tensors: list[Any], addresses: list[Any], stream: int) -> None:
            address(tensors, addresses, stream)
            tensors[slot] = torch.as_strided(tensors[base], shape, strides, tensors[base].storage_offset() + offset)

        return view if held else address


def _allocation(slot: int, like: Tensor) -> Step:
    shape, strides, dtype, device = tuple(like.shape), like.stride(), like.dtype, like.device

    def allocate(tensors: list[Any], addresses: list[Any], stream: int) -> None:
        tensors[slot] = new = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        addresses[slot] = new.data_ptr()

    return allocate


def _call(func: Any, arguments: Sequence[Any], kwargs: Any, given: Mapping[int, int], new: Mapping[int, _New]) -> Step:
    """``given``: the slots of those arguments that are tensors, ``new``: what becomes of results; by position."""
    others = [None if i in given else value for i, value in enumerate(arguments)]
    if func is torch.ops.aten.convolution.default:
        func = torch.convolution  # the same, in half the time until it is called

    def call(tensors: list[Any], addresses: list[Any], stream: int) -> None:
        filled = others[:]
        for i, slot in given.items():
            filled[i] = tensors[slot]
        results = _several(func(*filled, **kwargs))
        for i, (slot, strides) in new.items():
            result = results[i]
            if result.stride() != strides:  # the library chose another implementation, as it was told to
                result = torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(
                    result
                )
            tensors[slot] = result
            addresses[slot] = result.data_ptr()

    return call


class _New(NamedTuple):
    """A tensor that a library makes, and the strides that everything behind it takes for granted."""

    slot: int
    strides: tuple[int, ...]


def _release(slots: Sequence[int]) -> Step:
    def release(tensors: list[Any], addresses: list[Any], stream: int) -> None:
        for slot in slots:
            tensors[slot] = None

    return release


def _several(result: Any) -> Any:
    return result if isinstance(result, _LISTS) else (result,)


_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class _Recorder(TorchDispatchMode):
    """Writes down what an operator does inside, of which ``tensors`` are the inputs, as long as it is ``clear``."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.clear = True
        self.events: list[_Event | _View] = []
        self.slots = WeakTensorKeyDictionary()
        self.count = _NONE + 1
        self.inputs = [self._new(tensor) for tensor in tensors]

    def _new(self, tensor: Tensor) -> int:
        self.slots[tensor] = slot = self.count
        self.count += 1
        return slot

    def _slot(self, tensor: Tensor | None) -> int:
        return _NONE if tensor is None else int(self.slots[tensor])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.clear:
            try:
                self._note(func, args, kwargs or {}, result)
            except KeyError:  # a tensor from elsewhere
                self.clear = False
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = {i: self._slot(value) for i, value in enumerate(args) if isinstance(value, Tensor)}
        nested = [item for value in args if isinstance(value, list | tuple) for item in value]
        results = _several(result)
        hidden = any(isinstance(value, Tensor) for value in (*nested, *kwargs.values()))
        if func is torch.ops.aten.promote_types.default:
            return
        if func.namespace != "aten" or hidden or not all(isinstance(t, Tensor | None) for t in results):
            self.clear = False
        elif func._schema.name.removeprefix("aten::") in _ALLOCATIONS:
            if result.is_meta:
                return  # what TMA's descriptors are made of, once
            self.clear = _is_aligned(result)
            self.events.append(_Event(_allocation(slot := self._new(result), result), [slot]))
        elif func.is_view and isinstance(result, Tensor) and _bits(result) == _bits(args[0]):
            offset = result.storage_offset() - args[0].storage_offset()
            like = tuple(result.shape), result.stride(), result.element_size()
            self.events.append(_View(self._new(result), given[0], offset, like))
        else:
            made = {i: t for i, t in enumerate(results) if t is not None and t not in self.slots}
            self.clear = all(map(_is_aligned, made.values()))
            new = {i: _New(self._new(t), t.stride()) for i, t in made.items()}
            step = _call(func, args, kwargs, given, new)
            self.events.append(_Event(step, [slot for slot, _ in new.values()], [*given.values()]))

    def launched(self, recipe: Recipe, compiled: Any, tensors: Mapping[str, Tensor | None]) -> None:
        """That ``recipe`` was launched; ``compiled``: what repeats it, or None."""
        try:
            slots = {name: self._slot(tensor) for name, tensor in tensors.items()}
        except KeyError:
            compiled = None
        if compiled is None:
            self.clear = False
            return
        step = recipe.repeated(compiled, slots)
        self.events.append(_Event(step, [*slots.values()], [slots[name] for name in recipe.boxes]))

    def tape(self, result: Any) -> Tape | None:
        """Of an operator that returned ``result``; None if it can not be repeated."""
        if not self.clear or any(t is not None and t not in self.slots for t in _several(result)):
            return None
        outputs = [self._slot(tensor) for tensor in _several(result)]
        kind = type(result) if isinstance(result, list | tuple) else None
        return Tape(self._steps(outputs), self.count, outputs, kind)

    def _steps(self, outputs: Sequence[int]) -> list[Step]:
        """All that happened, and where memory is used for the last time, its release."""
        held = {*outputs, *(slot for event in self.events if isinstance(event, _Event) for slot in event.holds)}
        for event in reversed(self.events):
            if isinstance(event, _View) and event.slot in held:
                held.add(event.base)
        owner = list(range(self.count))  # of the memory of each slot
        last: dict[int, int] = {}
        steps: list[Step] = []
        for i, event in enumerate(self.events):
            if isinstance(event, _View):
                owner[event.slot] = owner[event.base]
                steps.append(event.step(event.slot in held))
            else:
                last.update((owner[slot], i) for slot in (*event.reads, *event.holds))
                steps.append(event.step)
        kept = {_NONE, *self.inputs, *(owner[slot] for slot in outputs)}
        for i, slot in sorted(((i, slot) for slot, i in last.items() if slot not in kept), reverse=True):
            steps.insert(i + 1, _release([other for other in range(self.count) if owner[other] == slot]))
        return steps


class Tape(NamedTuple):
    """``slots``: how many there are, ``outputs``: those that are returned, in a ``kind`` of list or alone."""

    steps: Sequence[Step]
    slots: int
    outputs: Sequence[int]
    kind: Callable[[Any], Any] | None

    def play(self, inputs: Sequence[Tensor]) -> Any:
        """What the operator does and returns for ``inputs``, laid out as those that it was recorded with."""
        rest = [None] * (self.slots - len(inputs) - 1)
        tensors = [None, *inputs, *rest]
        addresses = [None, *[tensor.data_ptr() for tensor in inputs], *rest]
        with torch.cuda.device_of(inputs[0]):
            stream = current_stream()
            for step in self.steps:
                step(tensors, addresses, stream)
        results = [tensors[slot] for slot in self.outputs]
        return results[0] if self.kind is None else self.kind(results)


_tapes: dict[tuple[Any, ...], Tape | None] = {}
"""By what an operator is given; None: it does what can not be repeated."""
