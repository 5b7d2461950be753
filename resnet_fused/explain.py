"""What each block of a model runs, and why."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from resnet_fused.convert import ConvertedStem, Found, find
from resnet_fused.engine.eligible import Onlooker, reasons
from resnet_fused.engine.request import implementation, requested
from resnet_fused.engine.trace import Launch, trace
from resnet_fused.inference import Called, FoldedConv, FrozenModel, TritonChain, TritonConv, called
from resnet_fused.kernels.chain import Chain
from resnet_fused.kernels.launch import TileConfig, dry_run, interpreting
from resnet_fused.modules import FusedBlock, StemLayout
from resnet_fused.pieces import UnitsLayout
from resnet_fused.plan import roofline, tuned
from resnet_fused.plan.constants import ASSUMED, Constants
from resnet_fused.plan.decide import (
    ROADS,
    ChainPlan,
    Plan,
    arch_of,
    decide,
    decide_chain,
    parts_waited,
    present_gpu,
    record,
    waited,
)
from resnet_fused.plan.problem import PARTS, Problem, Tiles, Way, cut, units_of
from resnet_fused.table import render


@dataclass
class BlockRow:
    """One block of :func:`explain`. ``leaf``: in training, nobody wants the gradient of its input.

    ``chains``: units, some of the next block's perhaps, of which some share a launch; those are among the ``problems``.
    """

    name: str
    block: str
    implementation: Way
    reason: str = ""
    launches: list[Launch] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    leaf: bool = False
    chains: list[Chain] = field(default_factory=list)

    def add(self, planned: Iterable[Problem | Chain]) -> None:
        """Units that it planned, and chains of them; what of these is launched by itself was planned as a unit."""
        for found in planned:
            if not isinstance(found, Chain):
                self.problems.append(found)
            elif shared := [unit for part, _ in _shared(found) for unit in units_of(part)]:
                self.chains.append(found)
                self.problems += shared

    def is_leaf(self, problem: Problem) -> bool:
        """Whether nobody wants the gradient of a unit's input: in a leaf, of those that read the block's own."""
        return self.leaf and not problem.prologue

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values; bytes and floating-point operations are those of the launches that were seen."""
        kernels = [x for x in self.launches if x.config is not None]
        tiles = sorted({f"{c.block_m}x{c.block_n}x{c.block_k}" for c in (x.config for x in kernels) if c is not None})
        return {
            "name": self.name,
            "block": self.block,
            "implementation": self.implementation,
            "tiles": tiles,
            "launches": len(self.launches),
            "bytes": _bytes(self.launches),
            "flops": _flops(self.launches),
            "share": fused_share(self.launches),
            "reason": self.reason,
            "units": [_unit(problem) for problem in self.problems],
            "chains": [_chain(links) for links in self.chains],
        }


def _unit(problem: Problem) -> dict[str, Any]:
    plan = _plan(problem)
    return {
        "unit": str(problem),
        "implementation": plan.implementation,
        "source": plan.source,
        "reason": plan.reason,
        "predicted_seconds": dict(plan.alternatives),
    }


def _plan(problem: Problem) -> Plan:
    return decide(problem, requested(), tuned.load(problem.gpu))


def _chain(links: Chain) -> dict[str, Any]:
    plan = _chain_plan(links)
    return {
        "units": [str(unit) for unit in units_of(links)],
        "launches": _lengths(length for length, _ in plan.parts),
        "source": plan.source,
        "reason": plan.reason,
        "predicted_seconds": {_lengths(lengths): seconds for lengths, seconds in plan.alternatives},
    }


def _shared(links: Chain) -> list[tuple[Chain, TileConfig | None]]:
    """The parts of a chain that are launched as one, with their tiles."""
    parts = _chain_plan(links).parts
    found = zip(cut(links, (length for length, _ in parts)), parts, strict=True)
    return [(part, tile) for part, (_, tile) in found if isinstance(part, Chain)]


def _lengths(lengths: Iterable[int]) -> str:
    return "+".join(map(str, lengths))


def _chain_plan(links: Chain) -> ChainPlan:
    return decide_chain(links, requested(), tuned.load(units_of(links)[0].gpu))


@dataclass(frozen=True)
class Step:
    """What one input launches: ``inside`` blocks that plan units, and ``outside`` of them."""

    inside: tuple[Launch, ...]
    outside: tuple[Launch, ...]

    @classmethod
    def of(cls, rows: Sequence[BlockRow], rest: Sequence[Launch], planning: Container[str]) -> Step:
        """That of all ``rows`` and of the ``rest``; ``planning``: the names of the blocks that plan units."""
        inside = [x for row in rows if row.name in planning for x in row.launches]
        return cls(tuple(inside), (*rest, *(x for row in rows if row.name not in planning for x in row.launches)))


@dataclass(frozen=True)
class Total:
    """What one input of ``images`` takes on one ``road``: launches, bytes of device memory, and predicted seconds.

    Launches and bytes, every operand once, are counted. ``road``: "as planned", an implementation for all units, or
    "roof": every byte of :func:`roofline.compulsory` once and all arithmetic, at the GPU's nominal peaks.
    """

    road: str
    images: int
    launches: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        images_per_second = self.images / self.seconds
        return asdict(self) | {"bytes_per_image": self.bytes / self.images, "images_per_second": images_per_second}


PLANNED = "as planned"
"""The road of each unit's own plan."""


def fused_share(launches: Iterable[Launch]) -> float | None:
    """Which share of the convolutions' arithmetic is in kernels of ours; None without a convolution."""
    launches = list(launches)
    ours = _flops(x for x in launches if x.config is not None)
    theirs = _flops(x for x in launches if x.name.startswith("aten.convolution"))
    return ours / (ours + theirs) if ours + theirs else None


def _flops(launches: Iterable[Launch]) -> int:
    return sum(launch.flops for launch in launches)


def _bytes(launches: Iterable[Launch]) -> int:
    return sum(launch.bytes_read + launch.bytes_written for launch in launches)


@dataclass
class Explanation:
    """What :func:`explain` found; ``str()`` of it is a table of blocks, one of their units, and one of the totals.

    ``ran``: whether there was an input; ``steps``: by road, what it launches on the planned GPU; empty without one.
    """

    rows: list[BlockRow]
    ran: bool
    steps: dict[str, Step] = field(default_factory=dict)

    @property
    def problems(self) -> list[Problem]:
        """The units of all blocks, each as often as it comes up."""
        return [problem for row in self.rows for problem in row.problems]

    @property
    def constants(self) -> Constants | None:
        """Those measured of the planned GPU; None where the model's own are assumed."""
        table = tuned.load(self.problems[0].gpu) if self.problems else None
        return None if table is None else table.constants

    def totals(self) -> list[Total]:
        """What the model takes by its plan, by one implementation for all units, and at the least.

        Launches and bytes are those of a dry run on each road; in training, of the forward and the backward. Units
        take the time that is predicted for them; outside of a CUDA graph, what their launches or the host take, as for
        the plan. What blocks launch beside their units, and the rest of the model, takes that of its bytes and
        arithmetic. Empty where nothing can be predicted: without units, images or a GPU.
        """
        plans = [(problem, _plan(problem), row.is_leaf(problem)) for row in self.rows for problem in row.problems]
        if not self.steps or not plans or not all(p.m and plan.alternatives for p, plan, _ in plans):
            return []
        beside, constants = plans[0][0], self.constants or ASSUMED
        shared = [part for row in self.rows for links in row.chains for part in _shared(links)]
        alone = plans.copy()
        for link in (link for part, _ in shared for link in units_of(part)):
            alone.remove((link, _plan(link), False))

        def total(road: str, way: Way | None) -> Total:
            step, seconds = self.steps[road], 0.0
            units: list[roofline.PredictedLaunch] = []
            for part, tile in shared if way is None else ():
                chain = roofline.chain(part, cast(TileConfig, tile), constants)
                whole = ((len(part.links), tile),)
                seconds += parts_waited(part, whole, sum(x.seconds for x in chain), constants)
                units += chain
            for problem, plan, leaf in alone if way is None else plans:
                chosen = way or plan.implementation
                tiles = plan.tiles if chosen == "fused" else Tiles()
                unit = roofline.predict(problem, chosen, tiles, constants, leaf=leaf)
                seconds += waited(problem, chosen, sum(x.seconds for x in unit), tiles, constants)
                units += unit
            more = len(step.inside) - len(units), _flops(step.inside) - sum(x.flops for x in units)
            seconds += roofline.correction(*more, _bytes(step.inside) - sum(x.bytes for x in units), beside, constants)
            rest = (roofline.library(x.name, x.flops, _bytes([x]), beside, constants) for x in step.outside)
            seconds += sum(x.seconds for x in rest)
            both = (*step.inside, *step.outside)
            return Total(road, beside.n, len(both), _bytes(both), seconds)

        outside = self.steps[PLANNED].outside
        products = (x.flops for p, _, leaf in plans for x in roofline.predict(p, "fused", Tiles(), leaf=leaf))
        flops = _flops(outside) + sum(products)
        least = _bytes(outside) + sum(roofline.compulsory(p, leaf=leaf) for p, _, leaf in alone)
        least += sum(roofline.compulsory_of_chain(part) for part, _ in shared)
        roof = Total("roof", beside.n, 0, least, roofline.roof(flops, least, beside))
        return [total(PLANNED, None), *(total(way, way) for way in roofline.PREDICTED), roof]

    def to_dict(self) -> list[dict[str, Any]]:
        """One dictionary per block."""
        return [row.to_dict() for row in self.rows]

    def __str__(self) -> str:
        columns = ["name", "block", "implementation", "units", "share", "tiles", "launches", "MB", "reason"]
        rows = []
        for row in self.to_dict():
            share = "" if row["share"] is None else f"{row['share']:.0%}"
            seen = (
                (len(row["units"]), share, ", ".join(row["tiles"]), row["launches"], round(row["bytes"] / 1e6, 3))
                if self.ran
                else (None, "", "", None, None)
            )
            rows.append((row["name"], row["block"], row["implementation"], *seen, row["reason"]))
        fused = sum(row.implementation != "eager" for row in self.rows)
        blocks = render(f"{fused} of {len(rows)} blocks fused", columns, rows)
        tables = [blocks]
        if problems := list(dict.fromkeys(self.problems)):
            tables.append(units_table(problems))
        if chains := list(dict.fromkeys(links for row in self.rows for links in row.chains)):
            tables.append(chains_table(chains))
        if totals := self.totals():
            tables += [totals_table(totals), _source(self.constants)]
        return "\n".join(tables)


def units_table(problems: list[Problem]) -> str:
    """How each unit runs, with what the model predicts for every way, as text."""
    columns = ["unit", "runs", *(f"{way}, predicted us" for way in roofline.PREDICTED), "because"]
    rows = []
    for problem in problems:
        plan = _plan(problem)
        predicted = dict(plan.alternatives)
        times = [round(predicted[way] * 1e6, 1) if way in predicted else None for way in roofline.PREDICTED]
        rows.append((problem.layer, plan.implementation, *times, plan.reason))
    kinds = dict.fromkeys(f"{problem.number_format} {problem.direction}" for problem in problems)
    return render(f"Units, each once: {', '.join(kinds)}", columns, rows)


def chains_table(chains: list[Chain]) -> str:
    """How many units each launch of a chain computes, with what the model predicts for every way to cut it, as text."""
    roads = list(dict.fromkeys(lengths for links in chains for lengths in PARTS[len(links.links)]))
    columns = ["chain", "launches", *(f"{_lengths(road)}, predicted us" for road in roads), "because"]
    rows = []
    for links in chains:
        plan = _chain_plan(links)
        predicted = dict(plan.alternatives)
        times = [round(predicted[road] * 1e6, 1) if road in predicted else None for road in roads]
        names = " > ".join(unit.layer for unit in units_of(links))
        rows.append((names, _lengths(length for length, _ in plan.parts), *times, plan.reason))
    return render("Chains, each once: units of each launch", columns, rows)


def _source(constants: Constants | None) -> str:
    if constants is None:
        return "Predicted with assumed efficiencies: python -m resnet_fused tune measures those of a GPU."
    shares = (
        f"{constants.memory_of_peak:.0%} of the bandwidth, in cuDNN {constants.cudnn_of_peak:.0%} of a product's speed"
    )
    return f"Predicted with what tune measured of this GPU: {shares}, {constants.launch_seconds * 1e6:.1f} us a launch."


def totals_table(totals: list[Total]) -> str:
    """The totals as text."""
    columns = ["road", "launches", "MB per image", "images per second, predicted"]
    rows = [
        (t.road, t.launches or None, round(x["bytes_per_image"] / 1e6, 2), round(x["images_per_second"]))
        for t, x in ((t, t.to_dict()) for t in totals)
    ]
    return render(f"The whole model, {totals[0].images} images at a time", columns, rows)


def explain(
    model: nn.Module, x: Tensor | None = None, *, arch: int | None = None, training: bool = False
) -> Explanation:
    """Which implementation each block of ``model`` runs, and why.

    With an input ``x`` for the model, runs it once in eval mode without gradients and reports what was launched: its
    units, the share of the convolutions' arithmetic that they are, tiles, number of launches, bytes, the reason for
    each block that ran eager, and for each convolution of others that did; and of each unit the plan, with the times
    that the model of :mod:`resnet_fused.plan.roofline` predicts for it and its alternatives; and what the whole model
    comes to on every road, with the images per second that this model of a GPU predicts. With ``arch`` (90 for sm_90
    ...) nothing runs: it is planned for a GPU of that architecture, for the one here if it is of it. ``training``,
    which needs an ``arch``: a training step, from the input to the gradients of all parameters, given the gradient of
    what the model returns: without the loss and the optimizer. Without ``x``, the structure alone is judged.

    Of a model that is frozen for inference, each call of its graphs is a block. It runs without its CUDA graph.

    Raises ValueError for ``training`` without ``arch``, and for an ``arch`` with a model that is frozen for a CPU.
    """
    if arch is not None and any(isinstance(part, FoldedConv) for part in model.modules()):
        raise ValueError(f"arch must be None for a model that is frozen for a CPU; got {arch}")
    if training and arch is None:
        raise ValueError("training=True needs an arch: a training step is planned, not run")
    if x is None:
        return Explanation([_row(found) for found in _blocks(model)], ran=False)
    if arch is not None:
        return _planned(model, x, arch, training)
    with torch.no_grad():
        if isinstance(model, FrozenModel):
            model(x)  # what it packs, it packs once
        rows, _ = _observe(model, x, _blocks(model), training=False)
    on_gpu = x.device.type == "cuda" and not interpreting()
    steps = _planned(model, x, arch_of(x.device), training=False).steps if on_gpu else {}
    return Explanation(rows, ran=True, steps=steps)


def _planned(model: nn.Module, x: Tensor, arch: int, training: bool) -> Explanation:
    """What is launched on every road, on tensors without data."""
    # As of a CPU: on the meta device pooling forgets channels_last.
    model = copy.deepcopy(model).to_empty(device="cpu")
    blocks = _blocks(model)
    seen: dict[str, tuple[list[BlockRow], list[Launch]]] = {}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, dry_run(arch, present_gpu(arch)), torch.set_grad_enabled(training):
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
        for road, request in ((PLANNED, requested()), *((way, request) for request, way in ROADS.items())):
            model.zero_grad()
            with implementation(request):
                if isinstance(model, FrozenModel):
                    model(x)  # folds and packs what stays
                seen[road] = _observe(model, x, blocks, training, together=road == PLANNED)
    rows, _ = seen[PLANNED]
    planning = {row.name for row in rows if row.problems}
    return Explanation(rows, ran=True, steps={road: Step.of(*found, planning) for road, found in seen.items()})


def _blocks(model: nn.Module) -> list[Found]:
    """What is found in ``model``, less blocks that are part of a stem; of a frozen one, what its graphs call."""
    if isinstance(model, FrozenModel):
        return [Found(f"network.{name}", part, True) for name, part in called(model).items()]
    found = list(find(model))
    stems = [f for f in found if isinstance(f.verdict, StemLayout)]
    parts = [f.module.get_submodule(name) for f in stems for name in f.verdict.parts]  # type: ignore[union-attr]
    return [f for f in found if f.module not in parts]


def _row(found: Found) -> BlockRow:
    if isinstance(found.module, FusedBlock | Called):
        rest = found.verdict.rest if isinstance(found.verdict, UnitsLayout) else ()
        return BlockRow(*_named(found), "fused", "; ".join(f"{name}: {reason}" for name, reason in rest))
    reason = found.verdict if isinstance(found.verdict, str) else "not converted: call fuse(model)"
    return BlockRow(*_named(found), "eager", reason)


def _frozen_way(row: BlockRow) -> Way:
    """Who computes a unit or a chain of a frozen model: of a chain in several launches, the last."""
    if row.chains:
        return "fused"
    return _plan(row.problems[-1]).implementation if row.problems else "eager"


def _named(found: Found) -> tuple[str, str]:
    """The name of a block and that of its class; of a stem, which is a part of its network, its first part's."""
    kind = getattr(found.module, "original", type(found.module)).__qualname__
    if not isinstance(found.verdict, StemLayout):
        return found.name, kind
    return f"{found.name}.{found.verdict.parts[0]}".lstrip("."), f"{kind}, up to its {found.verdict.end}"


def _observe(
    model: nn.Module, x: Tensor, blocks: Sequence[Found], training: bool, together: bool = True
) -> tuple[list[BlockRow], list[Launch]]:
    """Run ``model`` once, in training backward too: what each block planned and launched, or why it ran eager.

    And what was launched outside of them. A block's backward is what runs between the gradients of its output and its
    input. A stem lasts until the first block begins, and its backward from the gradient of what that reads to the end.
    ``together``: units of several blocks may share a launch, which is the first block's.
    """
    rows = {found.module: _row(found) for found in blocks}
    spans: dict[tuple[nn.Module, str], list[int]] = {}
    problems: dict[nn.Module, tuple[int, int]] = {}
    modes = [(module, module.training) for module in model.modules()]

    def start(module: nn.Module, way: str) -> None:
        spans[module, way] = [len(seen.launches)]

    def stop(module: nn.Module, way: str) -> None:
        spans[module, way].append(len(seen.launches))

    def close(module: nn.Module) -> None:
        stop(module, "forward")
        row = rows[module]
        row.add(planned[problems[module][0] :])
        if isinstance(module, TritonConv | TritonChain):
            row.implementation = _frozen_way(row)
        if row.implementation == "fused":
            known = [row.reason] if row.reason else []
            row.reason = "; ".join(dict.fromkeys([*known, *refused[problems[module][1] :]]))

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        for stem in [m for (m, _), span in spans.items() if isinstance(m, ConvertedStem) and len(span) == 1]:
            close(stem)
            if training and args[0].requires_grad:
                args[0].register_hook(lambda _, stem=stem: start(stem, "backward"))
        start(module, "forward")
        if isinstance(module, FusedBlock | Called) and (reason := module.why_eager(*args)) is not None:
            rows[module].implementation, rows[module].reason = "eager", reason
        problems[module] = len(planned), len(refused)  # behind the question, which may plan units itself

    def leave(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if isinstance(module, ConvertedStem) and len(spans[module, "forward"]) == 2:
            return
        close(module)
        if training and result.requires_grad:
            result.register_hook(lambda _: start(module, "backward"))
            rows[module].leaf = not args[0].requires_grad
            if args[0].requires_grad:
                args[0].register_hook(lambda _: stop(module, "backward"))

    looks = (Onlooker(enter), Onlooker(leave)) if together else (enter, leave)
    handles = [h for b in rows for h in (b.register_forward_pre_hook(looks[0]), b.register_forward_hook(looks[1]))]
    if not together:
        chained = [part for part in model.modules() if isinstance(part, TritonConv) and part not in rows]
        handles += [unit.register_forward_hook(lambda *_: None) for unit in chained]
    try:
        model.train(training)
        with trace() as seen, record() as planned, reasons() as refused:
            result = model(x)
            if training:
                ends = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
                torch.autograd.backward(ends, [torch.empty_like(t) for t in ends])
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    inside: set[int] = set()
    for (module, _), (first, *last) in spans.items():
        span = range(first, last[0] if last else len(seen.launches))
        rows[module].launches += [seen.launches[i] for i in span]
        inside.update(span)
    return list(rows.values()), [launch for i, launch in enumerate(seen.launches) if i not in inside]
