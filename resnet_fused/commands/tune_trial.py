"""A problem made concrete: random tensors, each candidate's run of them, and how far its result is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.engine import backward, chains, forward, ops, reference
from resnet_fused.engine.backward import Needs, UnitBackward, Wanted
from resnet_fused.engine.forward import Before, Convolution, Running
from resnet_fused.engine.tolerance import deterministic, error_ratio, products, references
from resnet_fused.engine.trace import Launch, trace
from resnet_fused.kernels import chain_forward, conv_dgrad, conv_forward, conv_wgrad
from resnet_fused.kernels.activation import IDENTITY, RELU
from resnet_fused.kernels.batch_norm import batch_norm_apply
from resnet_fused.kernels.chain import Chain, Link
from resnet_fused.kernels.conv_pool import POOL, pooled_size
from resnet_fused.kernels.epilogue import Norm, Residual
from resnet_fused.kernels.launch import Call, TileConfig, dry_run, observe
from resnet_fused.kernels.norm_backward import batch_norm_reduce
from resnet_fused.kernels.norm_pool import Peaks, batch_norm_pool
from resnet_fused.plan import decide, roofline, tuned
from resnet_fused.plan.problem import PARTS, Parts, Problem, Tiles, Way, apart, cut
from resnet_fused.plan.tuned import legal, parts_in, parts_out

EPS = 1e-5
SUMS = 8
"""Sums in a row behind the results; see :func:`resnet_fused.engine.tolerance.error_ratio`."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a problem."""

    implementation: Way
    tiles: Tiles = field(default_factory=Tiles)

    def encode(self) -> dict[str, Any]:
        """As plain values."""
        return {"implementation": self.implementation, "tiles": self.tiles.encode()}

    @classmethod
    def decode(cls, fields: dict[str, Any]) -> Candidate:
        """The inverse of :meth:`encode`."""
        return cls(fields["implementation"], Tiles.decode(tuple(fields["tiles"])))

    def __str__(self) -> str:
        own = [f"{kernel} {_short(tile)}" for kernel, tile in vars(self.tiles).items() if tile is not None]
        return " ".join([self.implementation, *own])


@dataclass(frozen=True)
class ChainCandidate:
    """One way to cut a chain into launches; a part of one link runs as its unit is planned."""

    parts: Parts

    @property
    def implementation(self) -> Way:
        """Of what is to be compiled and verified: a chain is ours."""
        return "fused"

    def encode(self) -> dict[str, Any]:
        """As plain values."""
        return {"parts": parts_out(self.parts)}

    def __str__(self) -> str:
        return " + ".join(str(length) + (f" in {_short(tile)}" if tile else "") for length, tile in self.parts)


def decoded(fields: dict[str, Any]) -> Candidate | ChainCandidate:
    """The candidate that was encoded so."""
    return ChainCandidate(parts_in(fields["parts"])) if "parts" in fields else Candidate.decode(fields)


def _short(t: TileConfig) -> str:
    text = f"{t.block_m}x{t.block_n}x{t.block_k} in {t.num_stages} stages"
    text += f", {t.num_warps} warps" if t.num_warps != 4 else ""
    text += f", {t.max_registers} registers" if t.max_registers else ""
    text += ", boxes of " + "x".join(map(str, t.box)) if t.box else ""
    return text if t.splits == 1 else f"{text}, {t.splits} splits"


def candidates(problem: Problem) -> list[Candidate]:
    """Every way to try: fused with the default tiles first, then with one kernel's tile varied, then the others."""
    default, *others = roofline.choices(problem)
    found = [Candidate("fused", default)]
    if problem.pooled:
        return [*found, Candidate("mixed"), Candidate("eager")]
    found += [Candidate("fused", Tiles(forward=t)) for t in _variants(conv_forward.default_config(problem), problem)]
    found += [Candidate("fused", Tiles(forward=t)) for t in conv_forward.wide_tiles(problem)]
    found += [Candidate("fused", tiles) for tiles in others]
    if problem.direction == "training":
        dgrad = conv_dgrad.default_config(problem.gradient, epilogue=problem.prologue)
        found += [Candidate("fused", Tiles(dgrad=t)) for t in _variants(dgrad, problem)]
        found += [Candidate("fused", tiles) for tiles in roofline.gradient_choices(problem)[1:]]
        wgrad = conv_wgrad.default_config(replace(problem, prologue=True))
        whole = replace(wgrad, splits=1)
        found += [
            Candidate("fused", Tiles(wgrad=tile))
            for t in (whole, *_variants(whole, problem))
            for splits in sorted({max(wgrad.splits // 2, 1), wgrad.splits, 2 * wgrad.splits})
            if (tile := replace(t, splits=splits)) != wgrad
        ]
    if problem.direction == "frozen" and problem.relu:
        found.append(Candidate("cudnn"))
    return [*found, Candidate("mixed"), Candidate("eager")]


def chain_candidates(links: Chain) -> list[ChainCandidate]:
    """Each link by itself first, then every launch of several, with every tile."""
    found = [ChainCandidate(apart(links))]
    for lengths in PARTS[len(links.links)]:
        parts = list(cut(links, lengths))
        for tile in [tile for part in parts if isinstance(part, Chain) for tile in chain_forward.tiles(part)]:
            found.append(ChainCandidate(tuple((length, tile if length > 1 else None) for length in lengths)))
    return found


def _variants(tile: TileConfig, problem: Problem) -> Iterator[TileConfig]:
    """Neighbours of a tile: one of its numbers halved or doubled, two of them exchanged, all registers allowed."""
    changes: list[dict[str, Any]] = [
        {"block_m": tile.block_m * 2},
        {"block_m": tile.block_m // 2},
        {"block_n": tile.block_n * 2},
        {"block_n": tile.block_n // 2},
        {"block_m": tile.block_m // 2, "block_n": tile.block_n * 2},
        {"block_m": tile.block_m * 2, "block_n": tile.block_n // 2},
        {"num_stages": tile.num_stages - 1},
        {"num_stages": tile.num_stages + 1},
        {"max_registers": None if tile.max_registers else 255},
    ]
    if problem.groups == 1:
        changes += [{"block_k": tile.block_k * 2}, {"block_k": tile.block_k // 2}]
    for change in changes:
        other = replace(tile, **change)
        if legal(other, problem) and other.block_m <= 256 and other.block_n <= 256 and other.num_stages >= 2:
            yield other


def rehearse(problem: Problem | Chain, candidate: Candidate | ChainCandidate) -> tuple[list[Call], list[Launch]]:
    """What the candidate would launch: our calls, and all launches, libraries' too, with their cost. Nothing runs."""
    calls: list[Call] = []
    # Where our operators run, below autograd, a convolution on the meta device keeps channels_last.
    eager = candidate.implementation == "eager"
    first: Any = problem.first if isinstance(problem, Chain) else problem
    with dry_run(first.arch, first.gpu), torch.no_grad():
        work = trial_of(problem, torch.device("meta")).work(candidate)
        with nullcontext() if eager else torch._C._AutoDispatchBelowAutograd(), trace() as seen, observe(calls.append):
            work()
    return calls, seen.launches


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


class _Verified:
    """What candidates are compared with: right results in the number format of ``unit``, behind so many sums."""

    unit: Problem
    sums_in_a_row = SUMS

    def work(self, candidate: Any) -> Callable[[], dict[str, Tensor]]:
        """What the candidate runs, to be called as often as wanted; returns its results by name."""
        raise NotImplementedError

    def _expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The formulas in ``dtype``: in fp64 the exact results, else what eager PyTorch makes of them."""
        raise NotImplementedError

    def ratio(self, candidate: Any) -> float:
        """The largest error of the candidate's results over the allowed one: right is what is at most 1."""
        with products(self.unit.tf32):
            ours = self.work(candidate)()
        exact, eager = self._references
        return max(
            error_ratio(got.to(eager[name].dtype), eager[name], exact[name], self.sums_in_a_row)
            for name, got in ours.items()
        )

    @cached_property
    def _references(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return references(self._expected, self.unit.dtype, self.unit.tf32)


class Trial(_Verified):
    """Random tensors for ``problem`` on ``device``, which may be meta. No input of a ReLU among them lies near zero."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = self.unit = p = problem
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        def activation(*shape: int) -> Tensor:
            return _channels_last(normal(*shape).to(p.dtype))

        x = normal(p.n, p.ci, p.h, p.w)
        self.x = _channels_last((x + 0.1 * x.sign()).to(p.dtype))
        self.w = activation(p.co, p.ci // p.groups, p.r, p.s) * (p.ci // p.groups * p.r * p.s) ** -0.5
        self.gamma, self.beta = normal(p.co).abs() + 0.5, normal(p.co)
        self.mean, self.var = normal(p.co), normal(p.co).abs() + 0.5
        self.residual = activation(p.n, p.co, p.p, p.q) if p.residual else None
        self.x_stats: Tensor | None = None
        if p.prologue:
            scale = normal(p.ci).abs() + 0.5
            zero, one = torch.zeros_like(scale), torch.ones_like(scale)
            self.x_stats = torch.stack([zero, one, scale, zero, one / p.m])
        if p.direction == "training":
            self.g = activation(p.n, p.co, *((pooled_size(p.p), pooled_size(p.q)) if p.pooled else (p.p, p.q)))
            with deterministic():
                self.y = _channels_last(F.conv2d(self.input(p.dtype), self.w, None, *p.geometry))
            self.stats = self.statistics(self.y.double()).float()
            if p.pooled:
                _, peak, place = map(_channels_last, reference.batch_norm_pool(self.y.double(), self.stats.double()))
                self.peaks = Peaks(peak.to(p.dtype), place)
            self.sums = reference.batch_norm_sums(self.passed(), self.y.double(), self.stats.double()).float()

    @property
    def before(self) -> Before | None:
        """What stands in front of the convolution."""
        return None if self.x_stats is None else Before(self.x_stats, RELU)

    def input(self, dtype: torch.dtype) -> Tensor:
        """What is convolved."""
        if self.x_stats is None:
            return self.x.to(dtype)
        work = torch.promote_types(dtype, torch.float32)
        a = reference.scale_shift_act(self.x.to(work), self.x_stats[2].to(work), self.x_stats[3].to(work))
        return _channels_last(a.to(dtype))

    def passed(self) -> Tensor:
        """The gradient of batch norm's output, in fp64: ``g`` itself, or what a pool and a ReLU make of it."""
        if not self.problem.pooled:
            return self.g.double()
        g = reference.max_pool_gradient(self.g.double(), self.peaks.place, (self.problem.p, self.problem.q))
        z = reference.batch_norm_apply(self.y.double(), self.stats.double())
        return torch.where(z > 0, g, 0.0)

    def statistics(self, y: Tensor) -> Tensor:
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        return reference.batch_norm_stats(mean, var, self.gamma.to(y), self.beta.to(y), EPS, 1 / self.problem.m)

    def work(self, candidate: Candidate) -> Callable[[], dict[str, Tensor]]:
        p = self.problem
        if p.direction == "training":
            conv = Convolution(p.geometry, candidate.implementation == "fused", candidate.tiles)
            return self._eager_training if candidate.implementation == "eager" else lambda: self._training(conv)
        infer = self.inference(candidate)
        return lambda: {"z": infer(self.x, self.residual)}

    @property
    def norm(self) -> Norm:
        """Batch norm with constants."""
        return Norm(self.mean, self.var, self.gamma, self.beta, EPS)

    def inference(self, candidate: Candidate) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The unit as the candidate runs it, of an input and what is added."""
        p, norm = self.problem, self.norm
        if candidate.implementation == "eager":
            return self._eager
        conv = Convolution(p.geometry, candidate.implementation == "fused", candidate.tiles)
        if candidate.implementation == "cudnn":
            w, bias = forward.fold(self.w, None, norm)
            return lambda x, residual: forward.cudnn_conv_relu(x, w, bias, residual, p.geometry)
        if p.pooled:
            return lambda x, _: forward.inference_pooled(x, self.w, None, norm, conv)
        activation = RELU if p.relu else IDENTITY
        return lambda x, residual: forward.inference(
            x, self.w, None, norm, None, None if residual is None else Residual(residual), conv, activation, p.dtype
        )

    def _training(self, conv: Convolution) -> dict[str, Tensor]:
        running = Running(None, None, None, 0.1)
        y, stats = forward.unit_forward(
            self.x, self.before, self.w, None, self.gamma, self.beta, running, EPS, True, conv, ""
        )
        needs = Needs(w=True, bias=False, gamma=True, beta=True)
        unit = UnitBackward(
            conv,
            self.w,
            self.w.stride(),
            None,
            self.y,
            self.stats,
            frozen=False,
            group="",
            needs=needs,
            activation=RELU,
        )
        wanted = Wanted(x=not self.problem.pooled, shortcut=False, weight_dtype=self.w.dtype, norm_dtype=torch.float32)
        if self.problem.pooled:
            z, _ = batch_norm_pool(y, stats)
            backward.pooled_unit_backward(unit, self.g, self.peaks, self.x, wanted)
            assert unit.gradients.w is not None
            return {"y": y, "scale": stats[2], "shift": stats[3], "z": z, "dw": unit.gradients.w}
        dx, _ = backward.unit_backward(unit, self.g, self.sums[:, None], self.x, self.before, wanted)
        assert dx is not None and unit.gradients.w is not None
        return {"y": y, "scale": stats[2], "shift": stats[3], "dx": dx, "dw": unit.gradients.w}

    def _eager(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = F.conv2d(x, self.w, None, *self.problem.geometry)
        z = F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, eps=EPS)
        z = z if residual is None else z.add_(residual)
        z = F.relu_(z) if self.problem.relu else z
        return F.max_pool2d(z, *POOL) if self.problem.pooled else z

    def _eager_training(self) -> dict[str, Tensor]:
        """With the passes that cutting a fused chain in front of the unit takes."""
        x = self.x if self.x_stats is None else batch_norm_apply(self.x, self.x_stats)
        x, w, gamma, beta = (t.detach().requires_grad_() for t in (x, self.w, self.gamma, self.beta))
        if self.problem.pooled:
            x = x.detach()
        with torch.enable_grad():
            y = F.conv2d(x, w, None, *self.problem.geometry)
            z = F.relu(F.batch_norm(y, None, None, gamma, beta, training=True, eps=EPS))
            (F.max_pool2d(z, *POOL) if self.problem.pooled else z).backward(self.g)
        if self.problem.pooled:
            assert w.grad is not None
            return {"dw": w.grad}
        dx = x.grad
        assert dx is not None
        if self.x_stats is not None:
            dx = _channels_last(dx)
            dx, _ = batch_norm_reduce(dx, self.x, self.x_stats, activation=RELU, out=dx)
        return {"dx": dx}

    def formula(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The unit of inference in the dtype of ``x``."""
        y = F.conv2d(x, self.w.to(x.dtype), None, *self.problem.geometry)
        work = torch.promote_types(x.dtype, torch.float32)
        mean, var, gamma, beta = (v.to(work)[:, None, None] for v in (self.mean, self.var, self.gamma, self.beta))
        z = (y.to(work) - mean) * torch.rsqrt(var + EPS) * gamma + beta
        z = z if residual is None else z + residual.to(work)
        z = F.relu(z) if self.problem.relu else z
        return (F.max_pool2d(z, *POOL) if self.problem.pooled else z).to(x.dtype)

    def _expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        p, a = self.problem, self.input(dtype)
        if p.direction != "training":
            return {"z": self.formula(a, self.residual)}
        y = F.conv2d(a, self.w.to(dtype), None, *p.geometry)
        work = torch.promote_types(dtype, torch.float32)
        stats, coefs = self.statistics(y.to(work)), reference.batch_norm_coefs(self.sums.to(work), self.stats.to(work))
        dy = reference.batch_norm_gradient(self.passed().to(work), self.y.to(work), coefs).to(dtype)
        dw = reference.conv_wgrad(dy, a, (p.co, p.ci // p.groups, p.r, p.s), p.geometry)
        if p.pooled:
            z, _, _ = reference.batch_norm_pool(y.to(work), stats)
            return {"y": y, "scale": stats[2], "shift": stats[3], "z": z.to(dtype), "dw": dw}
        dx = reference.conv_dgrad(dy, self.w.to(dtype), (p.h, p.w), p.geometry)
        if self.x_stats is not None:
            dx = torch.where(a > 0, dx, 0.0)
        return {"y": y, "scale": stats[2], "shift": stats[3], "dx": dx, "dw": dw}


class ChainTrial(_Verified):
    """The same of a chain: a :class:`Trial` for each of its links, of which each reads what the one before returns."""

    def __init__(self, links: Chain, device: torch.device) -> None:
        self.problem = links
        self.members = [None if link is None else Trial(cast(Problem, link), device) for link in links]
        self.first = next(member for member in self.members if member is not None)
        self.unit, self.sums_in_a_row = self.first.problem, SUMS * len(links.links)
        self.live = self.unit.direction != "frozen"

    def work(self, candidate: ChainCandidate) -> Callable[[], dict[str, Tensor]]:
        """What a frozen model works out once is worked out before."""
        expand = self.members[chains.EXPAND]
        assert expand is not None and expand.residual is not None
        alone = {member: member.inference(_planned(member.problem)) for member in self.members if member is not None}
        links = {member: _link(member) for member in alone}
        residual = expand.residual

        def together(members: Sequence[Trial | None], x: Tensor, residual: Tensor, tile: TileConfig | None) -> Any:
            first = next(member for member in members if member is not None)
            read = [None if m is None else _link(m) if self.live else links[m] for m in members]
            return chains.launch(read, first.problem.geometry, x, residual, tile)

        def run() -> dict[str, Tensor]:
            members: Any = self.members
            z, y = chains.run(
                members, candidate.parts, self.first.x, residual, lambda m, x, r: alone[m](x, r), together
            )
            return {"z": z} if y is None else {"z": z, "y": y}

        return run

    def _expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        x, results = self.first.x.to(dtype), {}
        for name, member in zip(("x", "z", "y"), self.members, strict=True):
            if member is not None:
                results[name] = x = member.formula(x, member.residual)
        results.pop("x", None)
        return results


def _planned(problem: Problem) -> Candidate:
    """As a unit of its own is planned."""
    plan = decide.decide(problem, "auto", tuned.load(problem.gpu))
    return Candidate(plan.implementation, plan.tiles if plan.implementation == "fused" else Tiles())


def _link(trial: Trial) -> Link:
    return Link(trial.w, ops.affine(trial.mean, trial.var, trial.gamma, trial.beta, None, EPS))


def trial_of(problem: Problem | Chain, device: torch.device) -> Any:
    """The trial of a problem, or of a chain of them."""
    return ChainTrial(problem, device) if isinstance(problem, Chain) else Trial(problem, device)
