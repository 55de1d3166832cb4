"""Solving for the solver: Algorithms 1-3 and LD3 are one loop over blocks of parameters.

    learn_coefficients  S4S, Alg. 1          step phi
    learn_times         LD3 (Tong et al.)    step Xi
    learn_alternating   S4S-Alt, Alg. 2      a phase of phi, a phase of Xi, K times
    learn_jointly       Alg. 3               step both at once

Each is a generator that yields one `Epoch` after each pass over the training pairs, and `collect`
makes a list of them, which an interrupt ends early. Settings are the setup's, those of
params/<dataset>.yaml, unless given by name; those that a function does not read are refused.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .denoiser import check_contract, rematerialized
from .errors import UsageError, halve_batch, progress, require, require_whole
from .grid import LearnedGrid, TimeGrid
from .objective import (
    Distance,
    decoded_distance,
    feature_distance,
    l2,
    lpips_distance,
    negative_psnr,
    project_to_ball,
    radius,
    relaxed_loss,
)
from .params import Params
from .published import Scheme, Table
from .setup import Setup
from .solver import Coefficients, Solver, check_noise, consistent, count_parameters
from .teacher import TeacherSet

AnyEpoch = TypeVar("AnyEpoch")  # of a solver, or of a family


@dataclass(frozen=True)
class Epoch:
    """The state after one pass over the training pairs; epoch 0 is the state before the first.

    train_loss   mean distance at x'_T over the pass
    valid_loss   mean distance at x'_T = x_T, which is what sampling will use
    accepted     fraction of the x'_T that moved
    solver       as it stands
    best         the solver of the smallest valid_loss so far
    x_T_relaxed  (n_train, *shape), the x'_T as they stand; the next epoch moves them in place
    """

    index: int
    phase: str
    train_loss: float
    valid_loss: float
    accepted: float
    solver: Solver
    best: Solver
    x_T_relaxed: Tensor


def collect(epochs: Iterable[AnyEpoch]) -> list[AnyEpoch]:
    """Return all epochs of a learner; an interrupt ends it early, and those so far are kept.

    One printed sentence tells so. A second interrupt within a second stops what comes next, too.
    Raises UsageError on that one, and on an interrupt before the first epoch.
    """
    found: list[AnyEpoch] = []
    try:
        for epoch in epochs:
            found.append(epoch)
    except KeyboardInterrupt:
        if not found:
            raise UsageError("interrupted before the first epoch: run this again") from None
        print(
            f"interrupted: what comes next goes on with the {len(found)} epochs so far; run this "
            "again to learn to the end, or interrupt twice to stop everything"
        )
        try:
            time.sleep(1)
        except KeyboardInterrupt:
            raise UsageError("interrupted twice: run this again to learn to the end") from None
    return found


class LearningDivergedError(ArithmeticError):
    """A loss or gradient was not finite; `.best` is the best solver until then."""

    def __init__(self, message: str, best: Solver | None = None):  # None while it is unpickled
        super().__init__(message)
        self.best = best


# The settings that the learners read.
_OBJECTIVE = {"distance", "lpips_net", "lpips_resize", "gamma", "accept_if_better", "lr_x"}
_OBJECTIVE |= {"grad_clip", "time_dependent", "consistent", "rematerialize", "sample_batch_size"}
_TIMES = _OBJECTIVE | {"batch_size_alt", "lr_xi", "lr_xi_c", "grid_variable", "offset_fraction"}
_TIMES |= {"m_counts"}
_BOTH = _TIMES | {"lr_phi", "rounds", "phase_epochs"}


def learn_coefficients(
    solver: Solver, setup: Setup, teacher: TeacherSet, seed: int = 0, **settings: Any
) -> Iterator[Epoch]:
    """Learn the coefficients of `solver` on its own grid: S4S (Alg. 1).

    Yields `Epoch`s. `seed` orders the batches; `settings` replace fields of setup.params by name
    (epochs, batch_size, lr_phi, gamma, distance, ...). Raises UsageError for a setting that is not
    read here and for a solver that does not fit the setup, LearningDivergedError where a loss is
    not finite.
    """
    reads = _OBJECTIVE | {"epochs", "batch_size", "lr_phi"}
    params = setup.params.override_for("learn_coefficients", reads, settings)
    yield from _learn(solver, setup, teacher, params, [("phi", params.epochs)], seed)


def learn_times(
    solver: Solver,
    setup: Setup,
    teacher: TeacherSet,
    seed: int = 0,
    scheme: Scheme | None = None,
    **settings: Any,
) -> Iterator[Epoch]:
    """Learn the time steps Xi alone: LD3 (Tong et al. 2024); see learn_coefficients.

    The coefficients are those of `scheme` on the grid as it moves, by default the solver's own
    numbers, which stay. With `patience` the rates fall by the authors' rule.
    """
    params = setup.params.override_for("learn_times", _TIMES | {"epochs", "patience"}, settings)
    phases, patience = [("xi", params.epochs)], params.patience
    params = _larger_batches(params)
    yield from _learn(solver, setup, teacher, params, phases, seed, scheme, patience)


def learn_alternating(
    solver: Solver, setup: Setup, teacher: TeacherSet, seed: int = 0, **settings: Any
) -> Iterator[Epoch]:
    """Learn coefficients and time steps in `rounds` phases of each: S4S-Alt (Alg. 2).

    Start it at an LD3 grid (`learn_times`), as Sec. 4 does; see learn_coefficients.
    """
    reads = _BOTH | {"first_phase", "peak_decay"}
    params = setup.params.override_for("learn_alternating", reads, settings)
    blocks = ("phi", "xi") if params.first_phase == "phi" else ("xi", "phi")
    phases = [(block, params.phase_epochs) for _ in range(params.rounds) for block in blocks]
    yield from _learn(solver, setup, teacher, _larger_batches(params), phases, seed)


def learn_jointly(
    solver: Solver,
    setup: Setup,
    teacher: TeacherSet,
    seed: int = 0,
    scheme: Scheme | None = None,
    **settings: Any,
) -> Iterator[Epoch]:
    """Learn both blocks at once, for as many passes as learn_alternating makes (Alg. 3).

    What is learned of the coefficients is added to `scheme` as in learn_times.
    """
    params = setup.params.override_for("learn_jointly", _BOTH, settings)
    phases = [("phi+xi", 2 * params.rounds * params.phase_epochs)]
    yield from _learn(solver, setup, teacher, _larger_batches(params), phases, seed, scheme)


def _larger_batches(params: Params) -> Params:
    """Learning times goes with the larger batch (App. G.2)."""
    return params.override(batch_size=params.batch_size_alt)


# --- The loop -------------------------------------------------------------------------------

_BLOCKS = {"phi": ["phi"], "xi": ["xi", "xi_c"], "phi+xi": ["phi", "xi", "xi_c"]}


def _learn(
    solver: Solver,
    setup: Setup,
    teacher: TeacherSet,
    params: Params,
    phases: list[tuple[str, int]],
    seed: int,
    scheme: Scheme | None = None,
    patience: int = 0,
) -> Iterator[Epoch]:
    """The one loop: `phases` lists which blocks step, and for how many passes."""
    check_fit(solver, setup, teacher, seed)
    _check_gradient(solver, setup, teacher)
    solver = solver.learned_for(setup.model)
    learned = {block for phase, _ in phases for block in _BLOCKS[phase]}
    student = _Student(solver, params, "phi" in learned, scheme)
    losses = _Losses(student, setup, teacher, params)
    noise = _RelaxedNoise(student, setup, losses, params, learned)
    optimisers = _optimisers(student, params)
    generator = torch.Generator().manual_seed(seed)
    train, valid = torch.arange(len(teacher.x_T)).tensor_split([teacher.n_train])

    best = _Best(student, losses, valid)
    if not math.isfinite(best.loss):
        raise LearningDivergedError(_diverged("start"), best.solver)
    start = best.solver
    yield Epoch(0, "start", losses.of(train), best.loss, 0.0, start, start, noise.x)

    index, steps = 0, math.ceil(len(train) / params.batch_size)
    with progress(total=steps * sum(epochs for _, epochs in phases), desc="learning") as bar:
        for number, (phase, epochs) in enumerate(phases):
            active = {block: optimisers[block] for block in _BLOCKS[phase]}
            student.begin(list(active), best.state)
            # Later rounds start at a smaller peak; each phase falls to 1 % of its peak.
            peak = params.peak_decay ** (number // 2)
            rule = _Patience(patience, student, best, list(active)) if patience else None
            for epoch in range(epochs):
                index, found = index + 1, []
                order = torch.randperm(len(train), generator=generator).split(params.batch_size)
                try:
                    for i, batch in enumerate(order):
                        done = (epoch + i / steps) / epochs
                        _set_rates(active, peak, rule.rates if rule else _cosine(done))
                        loss = losses.backward(noise.start(batch), batch)
                        if not _step(student, active, params.grad_clip, loss):
                            raise LearningDivergedError(_diverged(phase), best.solver)
                        found.append((loss, noise.move(batch, loss)))
                        bar.update()
                        if rule and rule.ends():
                            break
                    now, valid_loss = student.solver(), best.look()
                except UsageError:  # e.g. two times that met
                    raise LearningDivergedError(_diverged(phase), best.solver) from None
                if not math.isfinite(valid_loss):
                    raise LearningDivergedError(_diverged(phase), best.solver)
                train_loss, moved = (torch.cat(v).mean().item() for v in zip(*found, strict=True))
                bar.set_postfix(valid=f"{valid_loss:.3g}")
                yield Epoch(index, phase, train_loss, valid_loss, moved, now, best.solver, noise.x)
                if rule and rule.ended:
                    return


def check_fit(solver: Solver, setup: Setup, teacher: TeacherSet, seed: int) -> None:
    """Raise UsageError unless solver, model and pairs belong together, and the seed is one."""
    require("solver", solver, Solver)
    require("teacher", teacher, TeacherSet)
    require_whole("seed", seed, 0, 2**63 - 1)
    if solver.grid.schedule != setup.schedule:
        raise UsageError(
            f"the solver is made for {solver.grid.schedule}, the model for {setup.schedule}: build "
            "the solver's grid on setup.schedule"
        )
    if teacher.x_T.shape[1:] != tuple(setup.shape):
        raise UsageError(
            f"the teacher set has samples of shape {tuple(teacher.x_T.shape[1:])}, the model of "
            f"{tuple(setup.shape)}: make it with make_teacher_set(setup)"
        )
    if teacher.n_train == len(teacher.x_T):
        raise UsageError("the teacher set has no pair to validate with: n_train must be smaller")
    check_noise(teacher.x_T, setup.schedule)
    if not teacher.x_0.isfinite().all():
        raise UsageError("the teacher set has samples that are NaN or infinite: make it again")
    if setup.condition and teacher.seeds is None:
        raise UsageError(
            f"{setup.name} needs each sample's condition and the teacher set does not know its "
            "seeds: make it with make_teacher_set(setup)"
        )


def _check_gradient(solver: Solver, setup: Setup, teacher: TeacherSet) -> None:
    """Raise UsageError unless the model answers twice alike, and autograd reaches x through it."""
    if torch.is_inference_mode_enabled() or teacher.x_T.is_inference():
        raise UsageError("learning needs gradients: leave torch.inference_mode, here and for pairs")
    seeds = None if teacher.seeds is None else teacher.seeds[:2].tolist()
    denoiser, t = setup.denoiser_for(seeds), solver.grid.t_model[solver.grid.nfe // 2]
    x = setup.schedule.alpha(t) * teacher.x_0[:2] + setup.schedule.sigma(t) * teacher.x_T[:2] / (
        setup.schedule.sigma(setup.schedule.T)
    )
    check_contract(denoiser, x.to(setup.device), t, gradient=True)


def _diverged(phase: str) -> str:
    return (
        f"learning diverged in phase {phase!r} (a loss that is not finite, or times that met): "
        "lower lr_phi or lr_xi, or start from another solver; this error's .best is the best so far"
    )


def _optimisers(student: "_Student", params: Params) -> dict[str, torch.optim.Optimizer]:
    """Adam for phi; for Xi the optimisers of Tong et al. (2024). Their state outlives a phase."""
    blocks, N = student.blocks(), student.start.nfe
    optimisers: dict[str, torch.optim.Optimizer] = {
        "phi": torch.optim.Adam(blocks["phi"], lr=params.lr_phi),
        "xi": torch.optim.RMSprop(blocks["xi"], lr=params.lr_xi, momentum=0.9),
        "xi_c": torch.optim.SGD(blocks["xi_c"], lr=params.lr_xi_c / N),
    }
    for optimiser in optimisers.values():
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    return optimisers


def _cosine(done: float) -> float:
    """What is left of the rates after this share of a phase: 1 at first, 1 % in the end."""
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def _set_rates(active: dict[str, torch.optim.Optimizer], peak: float, share: float) -> None:
    """Clear the gradients, and put the rates on this share of their peak."""
    for optimiser in active.values():
        optimiser.zero_grad()
        for group in optimiser.param_groups:
            group["lr"] = group["initial_lr"] * peak * share


def _step(
    student: "_Student", active: dict[str, torch.optim.Optimizer], clip: float, loss: Tensor
) -> bool:
    """Step the active blocks along their clipped gradients; False if these are not finite."""
    for block, optimiser in active.items():
        norm = torch.nn.utils.clip_grad_norm_(student.blocks()[block], clip)
        if not (norm.isfinite() and loss.isfinite().all()):
            return False
        optimiser.step()
    return True


# --- What it moves, and what it minimises ---------------------------------------------------


class _RelaxedNoise:
    """The starts x'_T of the training pairs, each in the ball B_r(x_T), kept from phase to phase.

    x  (n_train, *shape); at r = 0 (Eq. 6) it stays x_T
    """

    def __init__(
        self,
        student: "_Student",
        setup: Setup,
        losses: "_Losses",
        params: Params,
        learned: set[str],
    ):
        m = count_parameters(student.start.coefficients, params.time_dependent)
        m -= len(student.delta["b"]) if params.consistent else 0
        if params.m_counts == "learned":  # both ends of either list of times stay
            times = 2 * (student.start.nfe - 1) if "xi" in learned else 0
            m = max(1, times + (m if "phi" in learned else 0))
        sigma_T = setup.schedule.sigma(setup.schedule.T).item()
        self.r = radius(params.gamma, math.prod(setup.shape), m) * sigma_T
        # A rate for x'_T in unit noise is sigma_T^2 times as much in the units of x.
        self.rate = params.lr_x / student.start.nfe * sigma_T**2
        self.losses, self.accept_if_better = losses, params.accept_if_better
        self.x = losses.x_T[: losses.n_train].clone()
        self._start = self.x  # of the batch under way

    def start(self, batch: Tensor) -> Tensor:
        """Return the batch's x'_T, (B, *shape), which collect a gradient unless r = 0."""
        self._start = self.x[batch].requires_grad_(self.r > 0)
        return self._start

    @torch.no_grad()
    def move(self, batch: Tensor, loss: Tensor) -> Tensor:
        """Take the projected gradient step of Eq. 7; return which x'_T moved, (B,) of 0 and 1.

        loss  (B,) the distances whose mean was differentiated. With accept_if_better a step that
        does not lower its own distance is not taken.
        """
        if self.r == 0:
            return torch.zeros(len(batch))
        start = self._start
        assert start.grad is not None
        # The gradient of the batch's sum, so that its size does not change a sample's step.
        moved = start - self.rate * len(batch) * start.grad
        moved = project_to_ball(moved, self.losses.x_T[batch], self.r)
        if self.accept_if_better:
            better = self.losses.at("learning", moved, batch) < loss
            moved = torch.where(better.view(-1, *[1] * (moved.ndim - 1)), moved, start)
        self.x[batch] = moved
        return (moved != start).flatten(1).any(1).double().cpu()


class _Best:
    """The best student so far, by the mean distance of the validation pairs at x'_T = x_T."""

    def __init__(self, student: "_Student", losses: "_Losses", valid: Tensor):
        self.student, self.losses, self.valid = student, losses, valid
        self.loss, self.solver, self.state = losses.of(valid), student.solver(), student.snapshot()

    def look(self) -> float:
        """Return the distance of the student as it stands, and keep it if that is the smallest."""
        loss = self.losses.of(self.valid)
        if loss < self.loss:
            self.loss, self.solver = loss, self.student.solver()
            self.state = self.student.snapshot()
        return loss


class _Patience:
    """The rule by which Tong et al. (2024) slow down and stop, in place of a cosine.

    The validation pairs are looked at after every step. After `limit` looks in a row at nothing
    better the student returns to the best, and the rates fall to 0.8 of themselves, at last to 1 %
    of the first; the fifth time that patience ends there, so does learning. (The authors let the
    rate of the network's times fall to 1e-6 instead, and move the validation pairs' x'_T, too.)
    """

    def __init__(self, limit: int, student: "_Student", best: _Best, active: list[str]):
        self.limit, self.student, self.best, self.active = limit, student, best, active
        self.rates, self.ended = 1.0, False  # what is left of the rates
        self._in_vain = self._at_least = 0

    def ends(self) -> bool:
        """Look at the student after a step; return whether that was the last."""
        before = self.best.loss
        self.best.look()
        self._in_vain = 0 if self.best.loss < before else self._in_vain + 1
        if self._in_vain == self.limit:
            self.student.begin(self.active, self.best.state)
            self._at_least += self.rates == 0.01
            self._in_vain, self.rates = 0, max(0.01, 0.8 * self.rates)
        self.ended = self._at_least == 5
        return self.ended


class _Losses:
    """Distances of the student's samples to their targets, in parts that fit into memory."""

    def __init__(self, student: "_Student", setup: Setup, teacher: TeacherSet, params: Params):
        self.student, self.setup, self.seeds = student, setup, teacher.seeds
        self.distance, self.rematerialize = _distance(setup, params), params.rematerialize
        self.x_T, self.x_0 = teacher.x_T.to(setup.device), teacher.x_0.to(setup.device)
        self.n_train = teacher.n_train
        self.sizes = {"learning": params.batch_size, "validation": params.sample_batch_size}

    def of(self, pairs: Tensor) -> float:
        """Return the mean distance of the pairs of these indices, at x'_T = x_T."""
        return self.at("validation", self.x_T[pairs], pairs).mean().item()

    def backward(self, x: Tensor, pairs: Tensor) -> Tensor:
        """Return the distances (B,) from starts x (B, ...); leave the gradients of their mean."""
        return self.at("learning", x, pairs, learns=True)

    def at(self, what: str, x: Tensor, pairs: Tensor, learns: bool = False) -> Tensor:
        """Return the distances (B,) from starts x (B, ...), in ever smaller parts if they must be.

        what  "learning" or "validation": each remembers the size of parts that fits
        """
        while True:
            size, found = self.sizes[what], []
            try:
                with torch.set_grad_enabled(learns):
                    for start, part in zip(x.split(size), pairs.split(size), strict=True):
                        now = self.student.coefficients(), self.student.times()
                        target = self.x_0[part]
                        loss = relaxed_loss(
                            self._denoiser(part), *now, start, target, self.distance
                        )
                        if learns:
                            (loss.sum() / len(pairs)).backward()
                        found.append(loss.detach())
                return torch.cat(found)
            except torch.OutOfMemoryError:
                self.sizes[what] = halve_batch(min(size, len(pairs)), what)
                for parameter in (x, *sum(self.student.blocks().values(), [])):
                    parameter.grad = None

    def _denoiser(self, pairs: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """D(x, t) for the pairs of these indices in the teacher set."""
        seeds = None if self.seeds is None else self.seeds[pairs].tolist()
        denoiser = self.setup.denoiser_for(seeds)
        return rematerialized(denoiser) if self.rematerialize else denoiser


_PIXEL_DISTANCES: dict[str, Distance] = {"l2": l2, "psnr": negative_psnr}


def _distance(setup: Setup, params: Params) -> Distance:
    """The distance d of Eq. 6 that `params` name, between decoded samples."""
    distance: Distance
    if params.distance in _PIXEL_DISTANCES:
        distance = _PIXEL_DISTANCES[params.distance]
    elif params.distance == "lpips":
        distance = lpips_distance(params.lpips_net, params.lpips_resize, setup.device)
    elif setup.activations is None:
        raise UsageError(f"{setup.name} has no network for distance features: choose l2 or lpips")
    else:
        distance = feature_distance(setup.activations)
    decode = rematerialized(setup.decode) if params.rematerialize else setup.decode
    return decoded_distance(distance, decode)


class _Student:
    """The learnable numbers: corrections to the tables of a published solver, and Xi.

    The tables are scheme(grid) + delta. Corrections, not tables, are learned, so that a scheme that
    depends on the grid goes on following it; with time_dependent=False all rows of full memory
    share one correction, to their mean.
    """

    def __init__(self, solver: Solver, params: Params, learns_phi: bool, scheme: Scheme | None):
        self.start, self.consistent = solver, params.consistent
        self.scheme = scheme or (lambda grid: solver.coefficients)
        table = self.scheme(solver.grid)
        self.names = [n for n in ("b", "a", "c") if getattr(table, n, None) is not None]
        N = len(table.b)
        self.shared = N - 1
        if learns_phi and not params.time_dependent:
            # The rows of full memory share one (Table 9, "Glob.").
            self.shared = table.order - 1 if isinstance(table, Coefficients) else 0
        self.rows = torch.arange(N).clamp_max(self.shared)
        self.delta = {n: torch.zeros_like(getattr(table, n)[: self.shared + 1]) for n in self.names}
        self.grid = LearnedGrid.start_at(solver.grid, params.grid_variable, params.offset_fraction)
        self.times_moved = False

    def blocks(self) -> dict[str, list[Tensor]]:
        phi = list(self.delta.values())
        return {"phi": phi, "xi": [self.grid.xi], "xi_c": [self.grid.xi_c]}

    def coefficients(self) -> Table:
        base = self.scheme(self.times())
        multistep, first = isinstance(base, Coefficients), self.shared

        def learned(name: str) -> Tensor:
            table = getattr(base, name)
            # The corrector's last row is never used.
            used = len(table) - 1 if multistep and name == "c" else len(table)
            mean = table[first : max(used, first + 1)].mean(0, keepdim=True)
            table = (torch.cat([table[:first], mean]) + self.delta[name])[self.rows]
            return table if multistep or name != "c" else _separate_stages(table)

        tables: dict[str, Any] = {name: learned(name) for name in self.names}
        table = replace(base, **tables)
        return consistent(table) if self.consistent else table

    def times(self) -> TimeGrid:
        # Until a time step has moved the grid is the given one, to the last bit.
        return self.grid.grid() if self.times_moved else self.start.grid

    def solver(self) -> Solver:
        with torch.no_grad():
            return Solver(self.coefficients(), self.times(), self.start.provenance)

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for block in self.blocks().values() for p in block]

    def begin(self, active: list[str], state: list[Tensor]) -> None:
        """Return to a snapshot and let only the active blocks be learned."""
        self.times_moved |= "xi" in active
        values = iter(state)
        with torch.no_grad():
            for name, parameters in self.blocks().items():
                for p in parameters:
                    p.copy_(next(values)).requires_grad_(name in active)


def _separate_stages(c: Tensor, gap: float = 0.01) -> Tensor:
    """Stages of a single-step solver, kept apart by at least `gap` of the step."""
    columns = [c[:, 0]]
    for j in range(1, c.shape[1]):
        lowest = columns[-1].detach() + gap
        columns.append(c[:, j].clamp_max(1 - gap * (c.shape[1] - j)).maximum(lowest))
    return torch.stack(columns, 1)
