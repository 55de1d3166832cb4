"""Solving for the solver: Algorithms 1-3 and LD3 are one loop over blocks of parameters.

    learn_coefficients  S4S, Alg. 1          step phi
    learn_times         LD3 (Tong et al.)    step Xi
    learn_alternating   S4S-Alt, Alg. 2      a phase of phi, a phase of Xi, K times
    learn_jointly       Alg. 3               step both at once
    learn_bns           BNS (Shaul et al.)   both at once, full memory, Eq. 6, PSNR
    learn_generalised   GS (Oganov et al.)   both at once, full memory, corrections to a theory

Each is a generator that yields one `Epoch` after each pass over the training pairs. Settings are
the setup's (params/<dataset>.yaml) unless given by name.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import UsageError, halved, progress
from .grid import LearnedGrid, TimeGrid
from .model import rematerialized
from .objective import (
    decoded_distance,
    feature_distance,
    l2,
    lpips_distance,
    negative_psnr,
    project_to_ball,
    radius,
    relaxed_loss,
)
from .solver import Coefficients, SingleStepCoefficients, Solver, consistent, count_parameters
from .teacher import TeacherSet

# A solver's coefficients on any grid, such as `ipndm`: what the learned corrections are added to.
Theory = Callable[[TimeGrid], Coefficients | SingleStepCoefficients]


@dataclass(frozen=True)
class Epoch:
    """The state after one pass; epoch 0 is the state before the first.

    train_loss  mean distance at x'_T over the pass; valid_loss  mean distance at x'_T = x_T, which
    is what sampling will use; accepted  fraction of the x'_T that moved
    solver      as it stands; best  the one of the smallest valid_loss so far
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


class LearningDiverged(ArithmeticError):
    """A loss or gradient was not finite; `.best` is the best solver until then."""

    def __init__(self, message: str, best: Solver | None = None):  # None while it is unpickled
        super().__init__(message)
        self.best = best


def learn_coefficients(solver: Solver, setup, teacher: TeacherSet, seed: int = 0, **settings):
    """S4S (Alg. 1): learn the coefficients of `solver` on its own grid.

    Yields `Epoch`s. `seed` orders the batches; `settings` replace fields of setup.params by name
    (epochs, batch_size, lr_phi, gamma, distance, ...). Raises UsageError for a setting or a
    solver that does not fit the setup, LearningDiverged where a loss is not finite.
    """
    params = setup.params.override(**settings)
    yield from _learn(solver, setup, teacher, params, [("phi", params.epochs)], seed)


def learn_times(
    solver: Solver,
    setup,
    teacher: TeacherSet,
    seed: int = 0,
    theory: Theory | None = None,
    **settings,
):
    """LD3 (Tong et al. 2024): learn the time steps Xi alone; see learn_coefficients.

    The coefficients are those of `theory` on the grid as it moves, by default the solver's own
    numbers, which stay.
    """
    params = _as_alt(setup.params.override(**settings))
    yield from _learn(solver, setup, teacher, params, [("xi", params.epochs)], seed, theory)


def learn_alternating(solver: Solver, setup, teacher: TeacherSet, seed: int = 0, **settings):
    """S4S-Alt (Alg. 2): `rounds` times a phase for the coefficients and one for the time steps.

    Start it at an LD3 grid (`learn_times`), as Sec. 4 does; see learn_coefficients.
    """
    params = _as_alt(setup.params.override(**settings))
    blocks = ("phi", "xi") if params.first_phase == "phi" else ("xi", "phi")
    phases = [(block, params.phase_epochs) for _ in range(params.rounds) for block in blocks]
    yield from _learn(solver, setup, teacher, params, phases, seed)


def learn_jointly(
    solver: Solver,
    setup,
    teacher: TeacherSet,
    seed: int = 0,
    theory: Theory | None = None,
    **settings,
):
    """Alg. 3: both blocks at once, for as many passes as learn_alternating makes.

    What is learned of the coefficients is added to `theory` as in learn_times.
    """
    params = _as_alt(setup.params.override(**settings))
    epochs = 2 * params.rounds * params.phase_epochs
    yield from _learn(solver, setup, teacher, params, [("phi+xi", epochs)], seed, theory)


def learn_bns(solver: Solver, setup, teacher: TeacherSet, seed: int = 0, **settings):
    """Bespoke non-stationary solvers (Shaul et al. 2024b), in our loop and with our optimisers.

    Full memory of the evaluations and a coefficient of x in each step, learned jointly with the
    times for the best PSNR at x_T itself (r = 0). Starts at a multistep `solver`.
    """
    wide = Solver(solver.coefficients.widen(solver.nfe, states=1), solver.grid)
    settings = {"distance": "psnr", "gamma": 0.0, **settings}
    yield from learn_jointly(wide, setup, teacher, seed, **settings)


def learn_generalised(
    solver: Solver,
    setup,
    teacher: TeacherSet,
    seed: int = 0,
    theory: Theory | None = None,
    **settings,
):
    """The generalised solver of Oganov et al. 2025 (GAS without its discriminator), in our loop.

    Corrections to the `theory` of the current times, with full memory of evaluations and states,
    learned jointly with the times, at x_T itself (r = 0). Starts at a multistep `solver`.
    """

    def widened(grid: TimeGrid) -> Coefficients:
        published = solver.coefficients if theory is None else theory(grid)
        return published.widen(grid.nfe, states=grid.nfe)

    wide = Solver(widened(solver.grid), solver.grid)
    settings = {"gamma": 0.0, **settings}
    yield from learn_jointly(wide, setup, teacher, seed, widened, **settings)


def _as_alt(params):
    """Learning times goes with the larger batch (App. G.2)."""
    return params.override(batch_size=params.batch_size_alt)


_PIXEL_DISTANCES = {"l2": l2, "psnr": negative_psnr}


def _distance(setup, params):
    """The distance d of Eq. 6 that `params` name, between decoded samples."""
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
    """The learnable numbers: corrections to a published solver's tables, and Xi."""

    def __init__(self, solver: Solver, params, learns_phi: bool, theory: Theory | None):
        self.start, self.consistent = solver, params.consistent
        self.theory = theory or (lambda grid: solver.coefficients)
        table = self.theory(solver.grid)
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

    def coefficients(self) -> Coefficients | SingleStepCoefficients:
        base = self.theory(self.times())
        multistep, first = isinstance(base, Coefficients), self.shared

        def learned(name: str) -> Tensor:
            table = getattr(base, name)
            # The corrector's last row is never used.
            used = len(table) - 1 if multistep and name == "c" else len(table)
            mean = table[first : max(used, first + 1)].mean(0, keepdim=True)
            table = (torch.cat([table[:first], mean]) + self.delta[name])[self.rows]
            return table if multistep or name != "c" else _in_order(table)

        learned_tables = replace(base, **{name: learned(name) for name in self.names})
        return consistent(learned_tables) if self.consistent else learned_tables

    def times(self):
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


def _in_order(c: Tensor, gap: float = 0.01) -> Tensor:
    """Stages of a single-step solver, kept apart by at least `gap` of the step."""
    columns = [c[:, 0]]
    for j in range(1, c.shape[1]):
        lowest = columns[-1].detach() + gap
        columns.append(c[:, j].clamp_max(1 - gap * (c.shape[1] - j)).maximum(lowest))
    return torch.stack(columns, 1)


def _learn(
    solver: Solver,
    setup,
    teacher: TeacherSet,
    params,
    phases: list[tuple[str, int]],
    seed: int,
    theory: Theory | None = None,
) -> Iterator[Epoch]:
    """The one loop: `phases` lists which blocks step, and for how many passes."""
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
    if setup.condition and teacher.seeds is None:
        raise UsageError(
            f"{setup.name} needs each sample's condition and the teacher set does not know its "
            "seeds: make it with make_teacher_set(setup)"
        )
    device, distance = setup.device, _distance(setup, params)
    student = _Student(solver, params, any("phi" in phase for phase, _ in phases), theory)
    optimisers = _optimisers(student, params)
    m = count_parameters(solver.coefficients, params.time_dependent)
    m -= len(student.delta["b"]) if params.consistent else 0
    sigma_T = setup.schedule.sigma(setup.schedule.T).item()
    r = radius(params.gamma, math.prod(setup.shape), m) * sigma_T
    # A rate for x'_T in unit noise is sigma_T^2 times as much in the units of x.
    lr_x = params.lr_x / solver.nfe * sigma_T**2
    x_T, x_0 = teacher.x_T.to(device), teacher.x_0.to(device)
    x_relaxed = x_T[: teacher.n_train].clone()  # x'_T, kept from phase to phase (Alg. 2)
    generator = torch.Generator().manual_seed(seed)
    sizes = {"learning": params.batch_size, "validation": params.sample_batch_size}

    def denoiser_of(pairs: Tensor):
        """D(x, t) for the pairs of these indices in the teacher set."""
        seeds = None if teacher.seeds is None else teacher.seeds[pairs].tolist()
        denoiser = setup.denoiser_for(seeds)
        return rematerialized(denoiser) if params.rematerialize else denoiser

    def distances(what: str, x: Tensor, pairs: Tensor, learns: bool = False) -> Tensor:
        """Distances of the student's samples from x (B, ...) to the targets of these pairs.

        Where it learns, the gradients of their mean are left behind. In parts, ever smaller where
        memory does not suffice.
        """
        while True:
            parts, found = zip(x.split(sizes[what]), pairs.split(sizes[what]), strict=True), []
            try:
                for start, part in parts:
                    with torch.set_grad_enabled(learns):
                        now = student.coefficients(), student.times()
                        loss = relaxed_loss(denoiser_of(part), *now, start, x_0[part], distance)
                    if learns:
                        (loss.sum() / len(pairs)).backward()
                    found.append(loss.detach())
                return torch.cat(found)
            except torch.OutOfMemoryError:
                sizes[what] = halved(min(sizes[what], len(pairs)), what)
                for parameter in (x, *sum(student.blocks().values(), [])):
                    parameter.grad = None

    def mean_loss(pairs: Tensor) -> float:
        return distances("validation", x_T[pairs], pairs).mean().item()

    def step(batch: Tensor, active: list[str]) -> tuple[Tensor, Tensor]:
        """One gradient step of the active blocks and of the batch's x'_T; losses, and who moved."""
        start = x_relaxed[batch].requires_grad_(r > 0)
        loss = distances("learning", start, batch, learns=True)
        for block in active:
            norm = torch.nn.utils.clip_grad_norm_(student.blocks()[block], params.grad_clip)
            if not (norm.isfinite() and loss.isfinite().all()):
                raise LearningDiverged(_diverged(phase), best)
            optimisers[block].step()
        if r == 0:
            return loss, torch.zeros(len(batch))
        with torch.no_grad():
            # The gradient of the batch's sum, so that its size does not change a sample's step.
            moved = start - lr_x * len(batch) * start.grad
            moved = project_to_ball(moved, x_T[batch], r)
            if params.accept_if_better:
                better = distances("learning", moved, batch) < loss
                moved = torch.where(better.view(-1, *[1] * (moved.ndim - 1)), moved, start)
            x_relaxed[batch] = moved
            return loss, (moved != start).flatten(1).any(1).double().cpu()

    train, valid = torch.arange(len(teacher.x_T)).tensor_split([teacher.n_train])
    best_loss = mean_loss(valid)
    best, best_state = student.solver(), student.snapshot()
    if not math.isfinite(best_loss):
        raise LearningDiverged(_diverged("start"), best)
    yield Epoch(0, "start", mean_loss(train), best_loss, 0.0, best, best, x_relaxed)

    index, steps = 0, math.ceil(len(train) / params.batch_size)
    with progress(total=steps * sum(epochs for _, epochs in phases), desc="learning") as bar:
        for number, (phase, epochs) in enumerate(phases):
            active = _BLOCKS[phase]
            student.begin(active, best_state)
            # Later rounds start at a smaller peak; each phase falls to 1 % of its peak.
            peak = params.peak_decay ** (number // 2)
            for epoch in range(epochs):
                index, losses, moves = index + 1, [], []
                order = torch.randperm(len(train), generator=generator).split(params.batch_size)
                try:
                    for i, batch in enumerate(order):
                        done = (epoch + i / steps) / epochs
                        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
                        for block in active:
                            optimisers[block].zero_grad()
                            for group in optimisers[block].param_groups:
                                group["lr"] = group["initial_lr"] * peak * cosine
                        loss, moved = step(batch, active)
                        losses.append(loss)
                        moves.append(moved)
                        bar.update()
                    now, valid_loss = student.solver(), mean_loss(valid)
                except UsageError:  # e.g. two times that met
                    raise LearningDiverged(_diverged(phase), best) from None
                if not math.isfinite(valid_loss):
                    raise LearningDiverged(_diverged(phase), best)
                if valid_loss < best_loss:
                    best_loss, best, best_state = valid_loss, now, student.snapshot()
                train_loss, accepted = (torch.cat(v).mean().item() for v in (losses, moves))
                bar.set_postfix(valid=f"{valid_loss:.3g}")
                yield Epoch(index, phase, train_loss, valid_loss, accepted, now, best, x_relaxed)


_BLOCKS = {"phi": ["phi"], "xi": ["xi", "xi_c"], "phi+xi": ["phi", "xi", "xi_c"]}


def _diverged(phase: str) -> str:
    return (
        f"learning diverged in phase {phase!r} (a loss that is not finite, or times that met): "
        "lower lr_phi or lr_xi, or start from another solver; this error's .best is the best so far"
    )


def _optimisers(student: _Student, params) -> dict[str, torch.optim.Optimizer]:
    """Adam for phi; for Xi the optimisers of Tong et al. (2024)."""
    blocks, N = student.blocks(), student.start.nfe
    optimisers = {
        "phi": torch.optim.Adam(blocks["phi"], lr=params.lr_phi),
        "xi": torch.optim.RMSprop(blocks["xi"], lr=params.lr_xi, momentum=0.9),
        "xi_c": torch.optim.SGD(blocks["xi_c"], lr=params.lr_xi_c / N),
    }
    for optimiser in optimisers.values():
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    return optimisers
