"""Solving for the solver by second order: the objectives of learn.py as small least squares.

A solver has 10 to 50 numbers theta, and the residual e(Psi(x_T)) - e(x_0) is a whole picture, so a
few dozen Gauss-Newton steps end where thousands of gradient steps only go. The Jacobian is that of
the one loop in forward mode, with the derivative of the network replaced by a difference of two of
its answers: nothing is differentiated through the network and no activation is kept. A compiled,
quantised or remote network will do. (With `jacobian: jvp` it is the network's own derivative.)
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .denoiser import Denoiser, forward_mode
from .errors import UsageError, choose, first_line, halve_batch, progress
from .grid import LearnedGrid, TimeGrid
from .learn import Epoch, LearningDivergedError, check_fit
from .objective import Embedding, feature_embedding, lpips_embedding, pixel_embedding
from .params import Params
from .published import Scheme, Table
from .setup import Setup
from .solver import Coefficients, LoopTable, Solver, check_estimate, loop_table, run_loop
from .teacher import TeacherSet

BLOCKS = ("phi", "xi", "first")
SETTINGS = {"distance", "lpips_net", "lpips_resize", "sample_batch_size", "grid_variable"}
SETTINGS |= {"offset_fraction", "newton_batch_size", "newton_damping", "jacobian", "epochs"}
FIRST = 0.0  # logit of where a free first call begins: at T itself its level changes nothing
STEPS_AN_EPOCH = 4  # between two looks at the validation pairs
SMALL_STEPS = 16  # of a quarter of the pairs, and by which the best of several starts is chosen
ANY_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PATIENCE = 4  # epochs without a validation loss that is 1 % lower


def learn_gauss_newton(
    solver: Solver,
    setup: Setup,
    teacher: TeacherSet,
    seed: int = 0,
    blocks: Sequence[str] = ("phi", "xi"),
    scheme: Scheme | None = None,
    starts: Sequence[Solver] = (),
    **settings: Any,
) -> Iterator[Epoch]:
    """Learn the chosen blocks of `solver` at once, by recursive Gauss-Newton at x'_T = x_T.

    blocks  "phi", the coefficients; "xi", the times of the steps and of the network; "first", the
            noise level of the first call, which suits tables in data form
    scheme  coefficients on the current times, which what is learned is added to, as in learn_times
    starts  further solvers to begin at. All begin on the same pairs, and after 16 steps only the
            one of the smallest validation loss goes on

    A step takes newton_batch_size pairs, each of the first 16 a quarter of it. After every 4 comes
    an `Epoch`: a look at the validation pairs, at the mean of what the second half of the steps
    gave (not of the first 16), since a single step follows the chance of its batch. It ends once 4
    of these, after the first 16 steps, have not lowered the validation loss by 1 %, or when it has
    been through all pairs `epochs` times.

    Raises UsageError for a setting that is not read here, a distance that is no sum of squares, a
    solver that does not fit the setup, and a network whose answers are too noisy to be
    differentiated; LearningDivergedError where its answers are not finite.
    """
    params = setup.params.override_for("learn_gauss_newton", SETTINGS, settings)
    for start in (solver, *starts):
        check_fit(start, setup, teacher, seed)
    solvers = [start.learned_for(setup.model) for start in (solver, *starts)]
    students = [Student(start, params, blocks, scheme) for start in solvers]
    problems = [Problem(student, setup, teacher, params) for student in students]
    runs = [Run(problem, teacher, params, seed) for problem in problems]

    for index, run, best in epochs_of(runs):
        phase, losses = "newton" if index else "start", (run.train_loss, run.valid_loss)
        yield Epoch(index, phase, *losses, 0.0, run.solver, best, teacher.train[0])


def epochs_of(runs: Sequence["Run"]) -> Iterator[tuple[int, "Run", Any]]:
    """Yield 0, 1, .., the run that has taken this epoch, and the best that any has found so far.

    Raises LearningDivergedError, which has the best, where the answers are not finite.
    """
    first = min(runs, key=lambda run: run.valid_loss)
    best, best_loss = first.solver, first.valid_loss
    if not math.isfinite(best_loss):
        raise LearningDivergedError("the loss is not finite at the start", best)
    yield 0, first, best
    with progress(desc="learning", unit="epoch") as bar:
        for index, run in enumerate(_turns(runs), start=1):
            try:
                run.advance()
            except LearningDivergedError as error:
                error.best = best
                raise
            if run.valid_loss < best_loss:
                best_loss, best = run.valid_loss, run.solver
            bar.update()
            bar.set_postfix(valid=f"{best_loss:.3g}")
            yield index, run, best


def _turns(runs: Sequence["Run"]) -> Iterator["Run"]:
    """Which run takes the next epoch: each of several in turn, then the best until it is done."""
    if len(runs) > 1:
        for run in runs:
            yield from itertools.repeat(run, SMALL_STEPS // STEPS_AN_EPOCH)
    run = min(runs, key=lambda run: run.valid_loss)
    while not run.done:
        yield run


class LeastSquares(Protocol):
    """What is learned: numbers theta (size,), zero at the start, and their sum of squares."""

    size: int

    def solver(self, theta: Tensor) -> Any:
        """Return what theta stands for."""

    def loss(self, theta: Tensor, pairs: Tensor) -> float:
        """Return the loss on these pairs."""

    def normal_equations(self, theta: Tensor, pairs: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the loss, J' r and J' J on these pairs."""


class Run:
    """Learning from one start: theta after each step, and what is judged of it on validation."""

    def __init__(self, problem: LeastSquares, teacher: TeacherSet, params: Params, seed: int):
        self.problem = problem
        self.path = [torch.zeros(problem.size, dtype=torch.float64)]
        self.memory = _Memory(problem.size, params.newton_damping)
        train, self.valid = torch.arange(len(teacher.x_T)).tensor_split([teacher.n_train])
        self.batches = _batches(len(train), params.newton_batch_size, params.epochs, seed)
        self.next = next(self.batches, None)
        self.train_loss = self.problem.loss(self.judged, train[: len(self.valid)])
        self.valid_loss = self.problem.loss(self.judged, self.valid)
        self.level, self.stale = math.inf, 0

    @property
    def judged(self) -> Tensor:
        """The mean of the second half of the steps, or the last one while batches are small.

        A step follows the chance of its batch, and the mean of many does so less (Polyak and
        Juditsky 1992).
        """
        steps = len(self.path) - 1
        first = max(SMALL_STEPS, steps // 2) + 1 if self.settled else steps
        return torch.stack(self.path[first:]).mean(0)

    @property
    def settled(self) -> bool:
        """Whether the small batches are over, whose luck would be a level that none can lower."""
        return len(self.path) - 1 > SMALL_STEPS

    @property
    def solver(self) -> Any:
        return self.problem.solver(self.judged)

    @property
    def done(self) -> bool:
        return self.next is None or self.stale >= PATIENCE

    def advance(self) -> None:
        """Take the steps of one epoch."""
        losses = []
        for _ in range(STEPS_AN_EPOCH):
            if (batch := self.next) is None:
                break
            self.next = next(self.batches, None)
            theta = self.path[-1]
            loss, g, G = self.problem.normal_equations(theta, batch)
            if not (math.isfinite(loss) and G.isfinite().all()):
                message = "the network's answers were not finite; this error's .best is the best"
                raise LearningDivergedError(f"{message} so far")
            self.path.append(theta + self.memory.step(self.problem, theta, batch, loss, g, G))
            losses.append(loss)
        if losses:
            self.train_loss = sum(losses) / len(losses)
        self.valid_loss = self.problem.loss(self.judged, self.valid)
        if self.settled and self.valid_loss < 0.99 * self.level:
            self.level, self.stale = self.valid_loss, 0
        else:
            self.stale += self.settled


def _batches(n: int, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Batches of n pairs, small ones first, while steps are long and models soon forgotten."""
    generator, count = torch.Generator().manual_seed(seed), 0
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        while len(order):
            take = size if count >= SMALL_STEPS else max(1, size // 4)
            take = len(order) if len(order) < 1.5 * take else take  # no batch of a few pairs left
            yield order[:take]
            order, count = order[take:], count + 1


# --- The step -------------------------------------------------------------------------------


class _Memory:
    """The forgetting sum of the quadratic models of the loss, one of each batch, and the damping.

    The model of a batch at theta_0, the mean of |r + J (theta - theta_0)|^2, is kept as
    theta' S theta + 2 c' theta. Models that are far back, or that were made where the loss was not
    quadratic, are forgotten.
    """

    def __init__(self, size: int, damping: float):
        self.S = torch.zeros(size, size, dtype=torch.float64)
        self.c = torch.zeros(size, dtype=torch.float64)
        self.damping, self.trust, self.count = damping, 1.0, 0

    def step(
        self, problem: LeastSquares, theta: Tensor, batch: Tensor, loss: float, g: Tensor, G: Tensor
    ) -> Tensor:
        """Take up the batch's model; return the damped step that its own loss bears out."""
        i = self.count
        self.count += 1
        keep = 0.0 if i == 0 else min(0.95, (i + 1) / (i + 5)) * min(max(self.trust, 0.1), 1.0)
        self.S, self.c = keep * self.S + G, keep * self.c + g - G @ theta
        best, step = loss, torch.zeros_like(theta)
        for _ in range(4):
            diagonal = self.S.diagonal()
            damped = self.S + self.damping * torch.diag(diagonal + 1e-12 * diagonal.max())
            trial = -torch.linalg.lstsq(damped, self.S @ theta + self.c).solution
            new = problem.loss(theta + trial, batch)
            expected = -(2 * g @ trial + trial @ G @ trial).item()
            # 1 where the loss of the batch fell as its model says.
            self.trust = 1 - abs(loss - new - expected) / max(abs(expected), 0.05 * loss, 1e-300)
            if new < best:
                best, step = new, trial
            # Past models may ask for a step that this batch alone would not take.
            if self.trust > 0.1 or new < 0.98 * loss or (new < 1.1 * loss and i > 3):
                step = trial
                break
            self.damping *= 6
        factor = 1 / 4 if self.trust > 0.75 else 1 / 2 if self.trust > 0.4 else 2
        self.damping = min(max(self.damping * factor, 1e-6), 100.0)
        return step


# --- The problem ----------------------------------------------------------------------------


class Student:
    """theta (m,), zero at the start, as a solver: corrections to a scheme's tables, and times."""

    def __init__(
        self, solver: Solver, params: Params, blocks: Sequence[str], scheme: Scheme | None
    ):
        for block in blocks:
            choose("block", block, BLOCKS)
        self.start, self.scheme = solver, scheme or (lambda grid: solver.coefficients)
        table, N = self.scheme(solver.grid), solver.grid.nfe
        self.grid = LearnedGrid.start_at(solver.grid, params.grid_variable, params.offset_fraction)
        if "first" in blocks and self.grid.first is None:
            self.grid = replace(self.grid, first=solver.grid.t.new_tensor(FIRST))
        self.places: dict[str, Tensor] = {}
        if "phi" in blocks:
            tables = {name: getattr(table, name, None) for name in ("b", "a", "c")}
            multistep = isinstance(table, Coefficients)
            self.places = {
                name: _places(name, own, multistep)
                for name, own in tables.items()
                if own is not None
            }
        self.sizes = {name: places.shape[1] for name, places in self.places.items()}
        self.sizes |= {"xi": N, "xi_c": N - 1} if "xi" in blocks else {}
        self.sizes |= {"first": 1} if "first" in blocks else {}
        self.size = sum(self.sizes.values())

    def table_and_grid(self, theta: Tensor) -> tuple[Table, TimeGrid]:
        parts = dict(zip(self.sizes, theta.split(list(self.sizes.values())), strict=True))
        times, zero = self.grid, theta.new_zeros(1)
        if "xi" in parts:
            xi_c = times.xi_c + torch.cat([zero, parts["xi_c"], zero])
            times = replace(times, xi=times.xi + torch.cat([parts["xi"], zero]), xi_c=xi_c)
        if "first" in parts and times.first is not None:
            times = replace(times, first=times.first + parts["first"][0])
        grid = times.grid() if {"xi", "first"} & {*parts} else self.start.grid
        table = self.scheme(grid)
        learned: dict[str, Any] = {
            name: getattr(table, name).index_put(tuple(places), parts[name], accumulate=True)
            for name, places in self.places.items()
        }
        return replace(table, **learned), grid

    def solver(self, theta: Tensor) -> Solver:
        with torch.no_grad():
            return Solver(*self.table_and_grid(theta), self.start.provenance)

    def numbers(self, theta: Tensor) -> LoopTable:
        return loop_table(*self.table_and_grid(theta))


def _places(name: str, table: Tensor, multistep: bool) -> Tensor:
    """Indices (dims, n) of the entries of a table that the solver uses."""
    used = torch.ones(table.shape[:2] if multistep else table.shape, dtype=torch.bool)
    if multistep:
        used = used.tril(1 if name == "c" else 0)
        if name == "c":
            used[-1] = False
    elif name == "a":
        used = used.tril(-1)
    elif name == "c":
        used[:, 0] = False
    return used.expand(table.shape).nonzero().T


class Problem:
    """r(theta) = e(Psi_theta(x_T)) - e(x_0) over pairs of the teacher set."""

    def __init__(self, student: Student, setup: Setup, teacher: TeacherSet, params: Params):
        self.student, self.size, self.solver = student, student.size, student.solver
        self.setup, self.seeds = setup, teacher.seeds
        self.x_T, self.x_0 = teacher.x_T.to(setup.device), teacher.x_0.to(setup.device)
        self.embed, self.rows = _embedding(setup, params), params.sample_batch_size
        self.step = self._difference_step(params)

    def loss(self, theta: Tensor, pairs: Tensor) -> float:
        """Return the mean distance; infinite where theta is no solver, as when times meet."""
        return self._fitting(self._loss, theta, pairs)

    def normal_equations(self, theta: Tensor, pairs: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return |r|^2, J' r and J' J, each its mean over the pairs.

        Network calls are spent on derivatives in the numbers that the loop reads; the chain rule
        from these to theta is a small matrix, so that a step in all times costs no call of its own.
        """
        return self._fitting(self._normal_equations, theta, pairs)

    def _fitting(self, compute: Callable[..., Any], theta: Tensor, pairs: Tensor) -> Any:
        """Compute, in ever smaller parts if memory asks for it."""
        while True:
            try:
                return compute(theta, pairs)
            except torch.OutOfMemoryError:
                self.rows = halve_batch(self.rows, "learning")

    def _loss(self, theta: Tensor, pairs: Tensor) -> float:
        total = 0.0
        try:
            with torch.no_grad():
                table = self.student.numbers(theta)
                for part in pairs.split(self.rows):
                    x = _end(self._network(part), self.x_T[part], table)
                    total += (self.embed(x) - self.embed(self.x_0[part])).square().sum().item()
        except UsageError:
            return math.inf
        return total / len(pairs) if math.isfinite(total) else math.inf

    def _normal_equations(self, theta: Tensor, pairs: Tensor) -> tuple[float, Tensor, Tensor]:
        with torch.no_grad():
            table = self.student.numbers(theta)
        read = [name for name in _READ if getattr(table, name) is not None]
        sizes = [getattr(table, name).numel() for name in read]

        def flat(theta: Tensor) -> Tensor:
            numbers = self.student.numbers(theta)
            return torch.cat([getattr(numbers, name).flatten() for name in read])

        chain = torch.autograd.functional.jacobian(flat, theta)
        chain = chain[active := chain.abs().sum(1) > 0]
        if not len(chain):  # everything that is learned stands at its bound
            return self.loss(theta, pairs), theta * 0, torch.outer(theta, theta) * 0
        columns = torch.eye(len(active), dtype=theta.dtype)[:, active].to(self.x_T.device)
        numbers = {name: getattr(table, name).to(self.x_T.device) for name in read}

        def moved(step: Tensor) -> LoopTable:
            parts = (columns @ step).split(sizes)
            new = zip(numbers.items(), parts, strict=True)
            return table._replace(**{n: v + part.view(v.shape) for (n, v), part in new})

        loss, g, G = 0.0, torch.zeros_like(theta), torch.zeros(2 * theta.shape, dtype=theta.dtype)
        for part in pairs.split(max(1, self.rows // len(chain))):
            network, x_T = self._network(part), self.x_T[part]
            if self.step is not None:
                network = _black_box(network, self.step, self.rows)

            def embedded(step: Tensor, network=network, x_T=x_T) -> tuple[Tensor, Tensor]:
                e = self.embed(_end(network, x_T, moved(step)))
                return e, e

            with forward_mode(), torch.no_grad():
                J, e = torch.func.jacfwd(embedded, has_aux=True)(columns.new_zeros(len(chain)))
                r = (e - self.embed(self.x_0[part])).double().flatten().cpu()
                J = J.double().flatten(0, 1).cpu() @ chain
            loss, g, G = loss + r.square().sum().item(), g + J.T @ r, G + J.T @ J
        return loss / len(pairs), g / len(pairs), G / len(pairs)

    def _difference_step(self, params: Params) -> float | None:
        """The step in x, in units of its size, and in t; None if the network is differentiated.

        It must be above what the network rounds and below what it bends. That is so where one and
        two steps, from noised data half way along the grid, agree on the derivative.
        """
        schedule, half = self.setup.schedule, len(self.student.start.grid.t) // 2
        part, t = torch.arange(min(8, len(self.x_T))), self.student.start.grid.t[half]
        network, sigma = self._network(part), schedule.sigma(t).item()
        noise = self.x_T[part] / schedule.sigma(schedule.T).item()
        x = schedule.alpha(t).item() * self.x_0[part] + sigma * noise
        forward = {"jvp": True, "differences": False, "auto": params.precision != "float32"}
        if forward[params.jacobian]:
            try:
                with forward_mode(), torch.no_grad():
                    torch.func.jvp(lambda x: network(x, t), (x,), (noise,))
                return None
            except (RuntimeError, NotImplementedError) as error:
                if params.jacobian == "jvp":
                    raise UsageError(
                        f"the network of {self.setup.name} has no forward derivative "
                        f"({first_line(error)}): choose jacobian differences"
                    ) from None
        usual = 3e-3 if params.precision == "float32" else 3e-2
        for step in (usual, 4 * usual, 16 * usual):
            h = step * (x.square().mean() / noise.square().mean()).sqrt()
            with torch.no_grad():
                D = network(x, t)
                check_estimate(D, x)
                one, two = ((network(x + k * h * noise, t) - D) / k for k in (1, 2))
            if (one - two).norm() <= 0.2 * two.norm() or not D.isfinite().all():
                if step > usual:
                    said = f"the answers of {self.setup.name}'s network are noisy: its derivatives "
                    said += f"are differences over {step:.1%} of x instead of {usual:.1%}"
                    warnings.warn(said, stacklevel=2)
                return step
        raise UsageError(
            f"the answers of {self.setup.name}'s network are too noisy to be differentiated by "
            f"differences, even over {step:.0%} of x: make it deterministic or more precise, or "
            "choose jacobian jvp"
        )

    def _network(self, pairs: Tensor) -> Denoiser:
        """D(x, t) for x (k B, ...), k copies of these B pairs one after the other."""
        if self.setup.condition is None:
            return self.setup.denoiser
        assert self.seeds is not None  # check_fit
        condition, denoiser = self.setup.condition(self.seeds[pairs].tolist()), self.setup.denoiser

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            copies = len(x) // len(condition)
            rows: Any = condition.repeat(copies, *[1] * (condition.ndim - 1))
            return denoiser(x, t, rows)  # type: ignore[call-arg]

        return denoise


_READ = ("a", "b", "c", "t_model", "scale", "alpha")


def _end(denoiser: Denoiser, x_T: Tensor, table: LoopTable) -> Tensor:
    *_, x_0 = run_loop(denoiser, x_T, table)
    return x_0


def _embedding(setup: Setup, params: Params) -> Embedding:
    """e, with |e(x) - e(x_0)|^2 the distance that `params` name, of decoded samples."""
    if params.distance == "l2":
        embed: Embedding = pixel_embedding
    elif params.distance == "lpips":
        embed = lpips_embedding(params.lpips_net, params.lpips_resize, setup.device)
    elif params.distance == "features" and setup.activations is not None:
        embed = feature_embedding(setup.activations)
    else:
        raise UsageError(
            f"the distance {params.distance} of {setup.name} is no sum of squares, so it cannot "
            "be lowered here: choose l2"
        )
    return lambda x: embed(setup.decode(x))


# --- The derivative of a network that is only called ------------------------------------------


def _black_box(network: Denoiser, step: float, rows: int) -> Denoiser:
    """The same network, with a forward derivative by differences for `torch.func.jacfwd`.

    Inside jacfwd all numbers are where x is; the network gets its time on the CPU, as always, and
    at most so many rows at once, where a single pair has more derivatives than these.
    """

    def call(x: Tensor, t: Tensor) -> Tensor:
        with sdpa_kernel(ANY_ATTENTION):  # the network is not differentiated
            return torch.cat([network(part, t.cpu()) for part in x.split(rows)])

    def differences(x: Tensor, t: Tensor, D: Tensor, dx: Tensor, dt: Tensor) -> Tensor:
        """dx (P, B, ...), dt (P,) -> dD (P, B, ...); a tangent of zero costs no call."""
        dD, sizes = torch.zeros_like(dx), dx.flatten(1).square().mean(1).sqrt()
        if len(live := sizes.nonzero()[:, 0]):
            h = (step * x.square().mean().sqrt() / sizes[live]).view(-1, *[1] * x.ndim)
            moved = call((x + h * dx[live]).flatten(0, 1), t)
            dD[live] = (moved.view(len(live), *x.shape) - D) / h
        if dt.any():
            h = -step * t  # towards the data, so that no time is above T
            dD = dD + dt.view(-1, *[1] * x.ndim).to(x) * ((call(x, t + h) - D) / h)
        return dD

    return lambda x, t: _BlackBox.apply(x, t, call, differences)


class _BlackBox(torch.autograd.Function):
    """D = network(x, t), and what torch needs to know of its derivative."""

    @staticmethod
    def forward(x, t, network, differences):
        return network(x, t)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, t, _, ctx.differences = inputs
        ctx.save_for_forward(x, t, output)

    @staticmethod
    def jvp(ctx, dx, dt, *_):
        x, t, D = ctx.saved_tensors
        dx = torch.zeros_like(x) if dx is None else dx
        dt = torch.zeros_like(t) if dt is None else dt
        return _Differences.apply(x, t, D, dx, dt, ctx.differences)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        raise NotImplementedError("x and t themselves are the same for all tangents")


class _Differences(torch.autograd.Function):
    """dD for one tangent, or under vmap for all of them in one call of the network."""

    @staticmethod
    def forward(x, t, D, dx, dt, differences):
        return differences(x, t, D, dx[None], dt[None])[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x, t, D, dx, dt, differences):
        dx, dt = (
            v.expand(info.batch_size, *v.shape) if dim is None else v.movedim(dim, 0)
            for v, dim in ((dx, in_dims[3]), (dt, in_dims[4]))
        )
        return differences(x, t, D, dx, dt), 0
