"""One run is one record: `run` returns the `Result` of an `Experiment`, cached on disk.

Results live under `results/` by the hash of the complete effective configuration: a changed
setting is a new result, never a stale hit. Nothing else writes there. The files are the only state:
what a killed or failed run has learned, and the shards of samples that it has measured, are there
for the next.
"""

import contextlib
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..baselines.dpm_solver_v3 import ModelStatistics, dpm_solver_v3, model_statistics
from ..denoiser import CallCounter
from ..errors import TEMPORARY, UsageError, in_one_line, progress, require, require_whole, shown
from ..evaluate import FeatureSums, feature_sums, frechet_distance, merge, thumbnails
from ..grid import GRIDS, TimeGrid
from ..learn import Epoch, LearningDivergedError
from ..models import zoo
from ..params import Params
from ..published import SOLVERS, Table, count_steps, table_by_name
from ..setup import Setup
from ..solver import Coefficients, Solver
from ..teacher import SEEDS_PER_SET, TeacherSet, make_teacher_set, sample_batches
from .cache import (
    cache_path,
    cached_tensors,
    read_sealed,
    results_folder,
    tensors_path,
    write_sealed,
)
from .executors import Elsewhere, Plan, ThisProcess, carry_out, cluster, processes
from .experiment import DPM_SOLVER_V3, SEARCHED, Experiment

if TYPE_CHECKING:
    from pandas import DataFrame  # imported where used: it takes longer than all of this package


BLOCKS = 5  # of the evaluation noises, for intervals
SAVE_EVERY = 60  # seconds of learning, after which the best solver so far is kept in a file
SHARD = 1000  # samples: what one task draws, holds in memory, and loses with its worker
# Experiments at a time on a cluster: with Inception's features the shards of one take 1.6 GB.
AT_ONCE = 64


@dataclass(frozen=True)
class Result:
    """What a run gave.

    frechet   Fréchet distance of `n_samples` samples, seeds 0 to n_samples - 1, to the real data,
              with the features that `features` names; where params ask for several sets of so many
              samples (fid_blocks), the mean of their distances, as all numbers are then
    frechet_to_teacher  the same to as many samples of the teacher from other noises; the teacher
              itself has the floor of this number
    thumbnails_to_teacher  that again in small means of pixels, which are no network's features
    distance_to_teacher  root mean square difference per entry between those samples and the
              teacher's from the same noise, both rounded to float32: differences below 1e-7 of an
              entry are lost, and a distance of 1e-3 changes by less than 1e-6 of itself
    blocks    each of these numbers, by its name, on disjoint blocks of the samples: on each set, or
              where there is one set, on parts of it, whose distances are of fewer samples
    seconds   of learning, or of measuring the statistics of DPM-Solver-v3 (0.0 without either),
              from the pairs on
    evaluations, backward  samples that the network saw in learning, and was differentiated for
    history   one record an epoch: losses, table and times
    """

    config: dict[str, Any]
    solver: Solver
    frechet: float
    frechet_to_teacher: float
    thumbnails_to_teacher: float
    distance_to_teacher: float
    blocks: dict[str, list[float]]
    n_samples: int
    features: str
    seconds: float
    evaluations: int
    backward: int
    history: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path, config: dict[str, Any]) -> "Result | None":
        """Return what `run` wrote for this configuration, or None if it is not there or unsound."""
        return read_sealed(
            path, config, lambda e: cls(**{**e, "solver": Solver.from_dict(e["solver"])})
        )

    def row(self) -> dict[str, Any]:
        """Return one flat record for tables and plots; the blocks of a number are a column."""
        names = ("dataset", "grid", "solver", "order", "nfe", "learn", "seed")
        costs = ("seconds", "evaluations", "backward", "n_samples", "features")
        record = {n: self.config[n] for n in names}
        record |= {n: getattr(self, n) for n in (*self.blocks, *costs)}
        if (n_sets := self.config["params"]["fid_blocks"]) > 1:
            record["n_sets"] = n_sets
        return record | {f"{n}_blocks": values for n, values in self.blocks.items()}


def run(experiment: Experiment) -> Result:
    """Return the experiment's result, from the cache or computed and cached.

    Interrupting leaves the best solver so far beside where the result would be, and no result.
    """
    require("experiment", experiment, Experiment)
    path, config = experiment.path(), experiment.config()
    if (result := Result.read(path, config)) is not None:
        return result
    _sets(experiment.params)  # refused now rather than after learning
    setup, (solver, costs, history) = _setup(experiment), _learned_once(experiment)
    metrics, blocks = _measured(experiment, solver)
    metrics |= {"n_samples": setup.params.fid_samples, "features": setup.features_name}
    versions = {"s4s_core": __version__, "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"python": platform.python_version(), "machine": platform.machine()}
    provenance = {"experiment": config, "model": setup.model, **metrics, "versions": versions}
    solver = Solver(solver.coefficients, solver.grid, provenance)
    result = Result(config, solver, blocks=blocks, history=history, **metrics, **costs)
    entries = {f.name: getattr(result, f.name) for f in fields(Result)}
    write_sealed(path, entries | {"solver": solver.to_dict()})
    for shard in (shard for block in _blocks(setup) for shard in block):
        tensors_path(setup, "shard", _shard_config(experiment, shard)).unlink(missing_ok=True)
    _learned_path(experiment).unlink(missing_ok=True)
    return result


Learned = tuple[Solver, dict[str, Any], list[dict[str, Any]]]  # what it cost, and the history


def _learned_once(experiment: Experiment) -> Learned:
    """What the experiment learns: from its own file, from that of its result, or learned now."""
    path, config = _learned_path(experiment), experiment.config()

    def learned(entries: dict[str, Any]) -> Learned:
        return Solver.from_dict(entries["solver"]), entries["costs"], entries["history"]

    if (found := read_sealed(path, config, learned)) is not None:
        return found
    if (result := Result.read(experiment.path(), config)) is not None:
        names = ("seconds", "evaluations", "backward")
        return result.solver, {n: getattr(result, n) for n in names}, result.history
    solver, costs, history = _learned(experiment, _setup(experiment), experiment.path())
    entries = {"config": config, "solver": solver.to_dict(), "costs": costs, "history": history}
    write_sealed(path, entries)
    return solver, costs, history


def _learned_path(experiment: Experiment) -> Path:
    return cache_path(experiment.dataset, "learned", experiment.config(), "json")


def _chunks(seeds: range) -> list[range]:
    """The seeds in pieces of at most SHARD."""
    return [seeds[i : i + SHARD] for i in range(0, len(seeds), SHARD)]


def _sets(params: Params) -> list[range]:
    """The seeds of each set of samples that is judged, as many as fid_samples says."""
    n, n_sets = params.fid_samples, params.fid_blocks
    if (n_sets + 1) * n > SEEDS_PER_SET:  # with the teacher's from other noises
        raise UsageError(
            f"evaluation has the seeds below {SEEDS_PER_SET}, too few for {n_sets} + 1 sets of {n} "
            "samples: lower fid_samples or fid_blocks"
        )
    return [range(i * n, (i + 1) * n) for i in range(n_sets)]


def _judging(params: Params) -> list[range]:
    """All of these seeds in chunks, which divide each set alike."""
    return [chunk for seeds in _sets(params) for chunk in _chunks(seeds)]


def _blocks(setup: Setup) -> list[list[range]]:
    """The shards of each block of evaluation noise: they depend on nothing but the setup."""
    if setup.params.fid_blocks > 1:
        return [_chunks(seeds) for seeds in _sets(setup.params)]
    n, n_features = setup.params.fid_samples, len(setup.reference.mean)
    # A block has as many samples as features, at least: their covariance is singular otherwise.
    n_blocks = min(BLOCKS, max(1, n // n_features))
    blocks = torch.arange(n).tensor_split(n_blocks)
    return [_chunks(range(int(block[0]), int(block[-1]) + 1)) for block in blocks]


def _measured(
    experiment: Experiment, solver: Solver
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The numbers of Result by name, of all samples and of each block."""
    setup = _setup(experiment)
    others = _teacher_sums(setup)

    def numbers(sums: dict[str, FeatureSums], square: float) -> dict[str, float]:
        return {
            "frechet": frechet_distance(sums["features"], setup.reference),
            "frechet_to_teacher": frechet_distance(sums["features"], others["features"]),
            "thumbnails_to_teacher": frechet_distance(sums["thumbnails"], others["thumbnails"]),
            "distance_to_teacher": square**0.5,
        }

    total: dict[str, FeatureSums] = {}
    found, total_square = [], 0.0
    for block in _blocks(setup):
        sums: dict[str, FeatureSums] = {}
        square = 0.0
        for seeds in block:
            shard = _shard(experiment, solver, seeds)
            square += shard["square"].item()
            sums = _merged(sums, _unpacked(shard))
        total, total_square = _merged(total, sums), total_square + square
        entries = sum(map(len, block)) * math.prod(setup.shape)
        found.append(numbers(sums, square / entries))
    by_name = {name: [block[name] for block in found] for name in found[0]}
    if setup.params.fid_blocks > 1:
        return {name: sum(values) / len(values) for name, values in by_name.items()}, by_name
    entries = setup.params.fid_samples * math.prod(setup.shape)
    return numbers(total, total_square / entries), by_name


def _shard(experiment: Experiment, solver: Solver, seeds: range) -> dict[str, Tensor]:
    """Sums of the features of a shard of samples, and its squared distance from the teacher.

    Cached until the result is there.
    """
    setup = _setup(experiment)

    def make() -> dict[str, Tensor]:
        sums: dict[str, FeatureSums] = {}
        square = torch.zeros((), dtype=torch.float64)
        for x, error in _with_errors(solver, setup, seeds):
            sums, square = _merged(sums, _sums(setup, x)), square + error.sum()
        return {**_packed(sums), "square": square}

    return cached_tensors(setup, "shard", _shard_config(experiment, seeds), make)


def _shard_config(experiment: Experiment, seeds: range) -> dict[str, Any]:
    return experiment.config() | {"seeds": [seeds.start, seeds.stop]}


def _with_errors(solver: Solver, setup: Setup, seeds: range) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of samples, and their squared differences from the teacher's, on the CPU."""
    exact = _teacher_samples(setup, seeds)
    for x in sample_batches(solver, setup, seeds):
        yield x, (x.cpu().float() - exact[: len(x)]).double().square()
        exact = exact[len(x) :]


@torch.no_grad()
def _sums(setup: Setup, x: Tensor) -> dict[str, FeatureSums]:
    """The sums of the features of the model and of thumbnails, of samples decoded once."""
    decoded = setup.variant(decode=lambda x: x)
    images = [setup.decode(x.to(setup.device))]
    return {
        "features": decoded.feature_sums(images),
        "thumbnails": feature_sums(thumbnails, images),
    }


def _merged(a: dict[str, FeatureSums], b: dict[str, FeatureSums]) -> dict[str, FeatureSums]:
    return {name: merge(a[name], b[name]) for name in b} if a else b


def _packed(sums: dict[str, FeatureSums]) -> dict[str, Tensor]:
    """The sums as the tensors of a file."""
    return {
        f"{name}_{key}": torch.as_tensor(value)
        for name, part in sums.items()
        for key, value in vars(part).items()
    }


def _unpacked(tensors: dict[str, Tensor]) -> dict[str, FeatureSums]:
    names = [f.name for f in fields(FeatureSums)]
    found: dict[str, Any] = {k: v if v.ndim else v.item() for k, v in tensors.items()}
    return {
        name: FeatureSums(**{key: found[f"{name}_{key}"] for key in names})
        for name in ("features", "thumbnails")
    }


def learn_on(setup: Setup, experiment: Experiment) -> Solver:
    """Return the solver that the experiment learns on this setup in place of its dataset's; cached.

    The name of the setup must tell it from others, since a file is found by it.
    """
    config = experiment.config() | {"model": setup.model}
    path = cache_path(setup.name, "solver", config, "json")
    solver = read_sealed(path, config, lambda entries: Solver.from_dict(entries["solver"]))
    if solver is None:
        solver, _, _ = _learned(experiment, setup, path)
        solver = replace(solver, provenance=solver.provenance | {"experiment": config})
        write_sealed(path, {"config": config, "solver": solver.to_dict()})
    return solver


def sample_errors(solver: Solver, setup: Setup) -> Tensor:
    """Return the mean squared difference per entry from the teacher's sample, (fid_samples,).

    The noises are those of the seeds from 0 up, the same for every solver, so that two solvers can
    be compared noise by noise; cached.
    """
    seeds = range(setup.params.fid_samples)

    def make() -> dict[str, Tensor]:
        anonymous = replace(solver, provenance={})  # another model's is asked for on purpose here
        batches = (b for chunk in _chunks(seeds) for b in _with_errors(anonymous, setup, chunk))
        return {"error": torch.cat([error.flatten(1).mean(1) for _, error in batches])}

    numbers = {k: v for k, v in solver.to_dict().items() if k != "provenance"}
    return cached_tensors(setup, "errors", {"solver": numbers, "seeds": len(seeds)}, make)["error"]


def learning_costs(experiment: Experiment) -> dict[str, float]:
    """Return what all that was learned for it cost, with the LD3 grid that it starts from.

    seconds; evaluations and backward as Result has them.
    """
    learned = [experiment, ld3_run(experiment)] if experiment.grid == "ld3" else [experiment]
    costs = [_learned_once(e)[1] for e in learned]
    return {n: sum(c[n] for c in costs) for n in ("seconds", "evaluations", "backward")}


class RunsFailedError(UsageError):
    """Some runs failed; the others are kept. Its cause is an ExceptionGroup of their errors."""

    def __str__(self) -> str:
        """Return a line for each run that failed, below the first."""
        return ValueError.__str__(self)


def run_all(
    experiments: Sequence[Experiment] | Mapping[str, Sequence[Experiment]],
    workers: int | None = None,
    executor: Executor | None = None,
) -> "DataFrame":
    """Return one row for each experiment, in order, as a pandas frame; with a progress bar.

    experiments  a list, or name -> list: the rows then carry the name in the column "method"
    workers      processes of one thread each for what is not cached: by default one a core that
                 this process may use, since small batches keep no more than one thread busy, or
                 this process alone where there is a GPU
    executor     what carries it out in place of those processes, such as a cluster; by default what
                 the Python file $S4S_EXECUTOR configures, if that is set

    A run that fails takes no other with it, and what it has learned and measured is kept. Where its
    worker was lost it is tried again once. When all others are done, RunsFailedError says in a line
    each which runs failed and why; the only run that there is raises its own error. An interrupt
    keeps the runs that have ended, and raises UsageError.

    `run` gives the solver and the history behind a row.
    """
    from pandas import DataFrame

    if workers is not None:
        require_whole("workers", workers, 1)
    if executor is not None:
        require("executor", executor, Executor)
    if workers and executor:
        raise UsageError("workers are processes of this machine: give run_all an executor or these")
    named = experiments.items() if isinstance(experiments, Mapping) else [("", experiments)]
    for name, group in named:
        if not isinstance(group, Sequence):
            raise UsageError(f"run_all takes lists of experiments, not {name} {shown(group)}")
    todo = [(name, experiment) for name, group in named for experiment in group]
    for _, experiment in todo:
        require("experiment", experiment, Experiment)
    missing = {path: e for _, e in todo if not (path := e.path()).exists()}
    results: dict[Path, Result] = {}
    if missing:
        try:
            with (
                _executor(workers, executor, next(iter(missing)).parent) as (chosen, at_once),
                progress(total=len(missing), desc="runs") as bar,
            ):
                plans = {path: _plan(e) for path, e in missing.items()}
                results, errors = carry_out(plans, chosen, at_once, bar.update)
        except KeyboardInterrupt:
            kept = sum(path.exists() for path in missing)
            raise UsageError(
                f"interrupted: {kept} of {len(missing)} runs have ended and are kept; run this "
                "again for the others"
            ) from None
        if errors and len(missing) == 1:
            raise errors.popitem()[1]
        if errors:
            raise RunsFailedError(
                f"{len(errors)} of {len(missing)} runs failed, and the others are kept; "
                f"s4s_core.run of one shows where:{_told(missing, errors)}"
            ) from ExceptionGroup("failed runs", list(errors.values()))
    rows = []
    for name, experiment in progress(todo, desc="results"):
        row = (results.get(experiment.path()) or run(experiment)).row()
        rows.append(row | {"method": name} if name else row)
    return DataFrame(rows)


def _told(experiments: Mapping[Path, Experiment], errors: Mapping[Path, Exception]) -> str:
    """A line for each run that failed, and why; a reason that was just given is not repeated."""
    lines, last = "", ""
    for path, error in errors.items():
        known = isinstance(error, UsageError | LearningDivergedError)
        reason = " ".join(str(error).split()) if known else in_one_line(error)
        e = experiments[path]
        lines += f"\n- {e.dataset} {e.grid} {e.solver} order {e.order} nfe {e.nfe} {e.learn} "
        lines += f"seed {e.seed}: {'the same' if reason == last else f'{reason:.400}'}"
        last = reason
    return lines


def teacher_of(experiment: Experiment) -> tuple[Hashable, ...]:
    """Return what tells the experiment's model and teacher from others; loads no network."""
    p = experiment.params
    taught = (p.teacher_solver, p.teacher_order, p.teacher_grid, p.teacher_nfe, p.unipc_variant)
    return (experiment.dataset, p.of_the_model(), *taught)


def _plan(experiment: Experiment) -> Plan:
    """The tasks of a run. What several runs share is one task, made before those that read it."""
    shared: dict[Any, Any] = {}
    if experiment.grid not in GRIDS:
        shared["grid", _representative_for_grid(experiment).path()] = (initial_solver, experiment)
    if experiment.solver == DPM_SOLVER_V3:
        p = experiment.params
        n = p.statistics_samples or p.n_train
        model = (experiment.dataset, experiment.seed, n, p.statistics_points)
        shared["statistics", model] = (initial_solver, experiment)
    if shared:
        yield shared
    path, chunks = experiment.path(), _judging(experiment.params)
    teacher = (teacher_of(experiment), tuple(_sets(experiment.params)))
    draw: dict[Any, Any] = {
        ("teacher", teacher, chunk): (_draw_teacher, experiment, chunk) for chunk in chunks
    }
    (solver, blocks), *_ = yield {("learn", path): (_prepared, experiment), **draw}
    shards = [shard for block in blocks for shard in block]
    draw = {("shard", path, shard): (_draw, experiment, solver, shard) for shard in shards}
    yield {**draw, ("teacher", teacher): (_merge_teacher, experiment)}
    (result,) = yield {("run", path): (run, experiment)}
    return result


def _prepared(experiment: Experiment) -> tuple[Solver, list[list[range]]]:
    return _learned_once(experiment)[0], _blocks(_setup(experiment))


def _draw(experiment: Experiment, solver: Solver, seeds: range) -> None:
    _shard(experiment, solver, seeds)


def _draw_teacher(experiment: Experiment, seeds: range) -> None:
    setup = _setup(experiment)
    _teacher_samples(setup, seeds)
    first = _sets(setup.params)[0]
    whole = tensors_path(setup, "teacher_sums", _part_config(setup, first))
    if seeds.start in first and not whole.exists():
        _teacher_part(setup, seeds)


def _merge_teacher(experiment: Experiment) -> None:
    _teacher_sums(_setup(experiment))


@contextlib.contextmanager
def _executor(
    workers: int | None, given: Executor | None, folder: Path
) -> Iterator[tuple[Executor, int]]:
    """What carries tasks out, and how many experiments it has under way at a time."""
    file = os.environ.get("S4S_EXECUTOR")
    with contextlib.ExitStack() as stack:
        if given or (file and not workers):
            stack.enter_context(_alone_with_a_cluster())
            sign = tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=TEMPORARY)
            name = Path(stack.enter_context(sign).name).absolute()
            given = given or stack.enter_context(cluster(Path(str(file)).expanduser()))
            yield Elsewhere(given, results_folder().absolute(), name), AT_ONCE
            return
        workers = workers or (1 if torch.cuda.is_available() else usable_cores())
        if workers == 1:
            yield ThisProcess(), 1
        else:
            yield stack.enter_context(processes(workers)), 2 * workers


@contextlib.contextmanager
def _alone_with_a_cluster() -> Iterator[None]:
    """Say so where another notebook works with a cluster on the same results."""
    from filelock import FileLock, Timeout

    lock = FileLock(results_folder() / ".cluster.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(
            f"another notebook has a cluster at work on {results_folder()}: what both need is "
            "computed twice, and nothing is lost",
            file=sys.stderr,
        )
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    try:
        yield
    finally:
        lock.release()


def usable_cores() -> int:
    """Return how many cores this process may use, whatever the machine has."""
    from joblib import cpu_count  # affinity, containers, and LOKY_MAX_CPU_COUNT

    return min(cpu_count(), int(os.environ.get("SLURM_CPUS_PER_TASK") or 10**6))


def initial_solver(experiment: Experiment) -> Solver:
    """Return the solver that learning begins with: the published table on the experiment's grid."""
    grid = _time_grid(experiment, _setup(experiment))
    return Solver(_table(experiment, grid), grid)


def _table(experiment: Experiment, grid: TimeGrid) -> Table:
    """The published coefficients on a grid, with room for what the experiment learns."""
    if experiment.solver == DPM_SOLVER_V3:
        statistics, _ = _statistics(_setup(experiment), experiment.seed)
        return dpm_solver_v3(grid, statistics, experiment.order)
    params, order = experiment.params, SOLVERS[experiment.solver].highest(experiment.order)
    table = table_by_name(experiment.solver, grid, order, params.unipc_variant, experiment.seed)
    if not isinstance(table, Coefficients):
        return table
    return table.pad(experiment.order, min(params.states, grid.nfe))


def _time_grid(experiment: Experiment, setup: Setup) -> TimeGrid:
    """The grid by its name, a searched one cached."""
    name = experiment.grid
    nfe = count_steps(experiment.solver, experiment.order, experiment.nfe)
    if name == "ld3":
        return _learned_once(ld3_run(experiment))[0].grid
    if name in GRIDS:
        return GRIDS[name](setup.schedule, nfe)
    make = lambda: {"t": SEARCHED[name](setup, nfe).t}  # noqa: E731
    config: dict[str, Any] = {"nfe": nfe}
    config |= {"coefficient": setup.params.gits_coefficient} if name == "gits" else {}
    return TimeGrid(setup.schedule, cached_tensors(setup, name, config, make)["t"])


def ld3_run(experiment: Experiment) -> Experiment:
    """Return the run whose grid "ld3" is: the same solver at one order, so that orders compare.

    LD3 is a method with an optimiser of its own, whatever else the experiment learns with.
    """
    params = experiment.params
    order = SOLVERS[experiment.solver].highest(min(params.ld3_order, experiment.nfe))
    first_order = experiment.variant(grid=params.ld3_start, order=order, learn="times")
    vars(first_order)["params"] = params.override(learner="first_order")
    return first_order


def _representative_for_grid(experiment: Experiment) -> Experiment:
    """A stand-in with the same grid, so that a grid shared by many runs is made once."""
    if experiment.grid == "ld3":
        return ld3_run(experiment)
    return experiment.variant(solver="ddim", order=1, learn="none", seed=0)


def _setup(experiment: Experiment) -> Setup:
    """The model with the experiment's settings, one object for all experiments that share them."""
    return _setup_with(experiment.dataset, experiment.params)


@cache
def _setup_with(dataset: str, params: Params) -> Setup:
    return replace(_model(dataset, params.of_the_model()), params=params)


@cache
def _model(dataset: str, of_the_model: Params) -> Setup:
    """Load a network once for all experiments that differ in what it is used for."""
    return zoo.build(dataset, of_the_model)


def _learned(
    experiment: Experiment, setup: Setup, path: Path
) -> tuple[Solver, dict[str, Any], list[dict[str, Any]]]:
    """The learned solver, what that cost and the history."""
    solver, learn = initial_solver(experiment), experiment.learner
    counter = CallCounter(setup.denoiser)
    costs: dict[str, Any] = {"seconds": 0.0, "evaluations": 0, "backward": 0}
    if experiment.solver == DPM_SOLVER_V3:
        return solver, costs | {"seconds": _statistics(setup, experiment.seed)[1]}, []
    if learn is None:
        return solver, costs, []
    teacher = cached_teacher_set(setup, experiment.seed, alt=experiment.learn != "coefficients")
    # The rivals whose coefficients follow the current times do so in the authors' own code.
    follows = experiment.newton_blocks or experiment.learn in ("times", "generalised")
    scheme = {"scheme": partial(_table, experiment)} if follows else {}
    history, best, so_far = [], solver, path.with_name(f"{path.stem}_best_so_far.json")
    began = saved = time.perf_counter()
    try:
        counted = setup.variant(denoiser=counter)
        for epoch in learn(solver, counted, teacher, seed=experiment.seed, **scheme):
            best = epoch.best
            history.append(_record(epoch))
            if time.perf_counter() - saved > SAVE_EVERY:  # who is killed cannot save
                best.save(so_far)
                saved = time.perf_counter()
    except (KeyboardInterrupt, LearningDivergedError):
        best.save(so_far)
        raise
    so_far.unlink(missing_ok=True)
    costs = {"seconds": time.perf_counter() - began}
    return best, costs | {n: getattr(counter, n) for n in ("evaluations", "backward")}, history


def _record(epoch: Epoch) -> dict[str, Any]:
    names = ("index", "phase", "train_loss", "valid_loss", "accepted")
    table = epoch.solver.to_dict()
    tables = {n: table[n] for n in ("b", "a", "c", "t", "t_model") if n in table}
    return {n: getattr(epoch, n) for n in names} | tables


def cached_teacher_set(setup: Setup, seed: int, alt: bool) -> TeacherSet:
    """Return the pairs to learn from, cached; alt: those where times are learned too."""
    p = setup.params
    n_train, n_valid = (p.n_train_alt, p.n_valid_alt) if alt else (p.n_train, p.n_valid)

    def make() -> dict[str, Tensor]:
        made = make_teacher_set(setup, n_train, n_valid, seed)
        assert made.seeds is not None
        return {"x_T": made.x_T, "x_0": made.x_0, "seeds": made.seeds}

    config = {"n_train": n_train, "n_valid": n_valid, "seed": seed}
    return TeacherSet(**cached_tensors(setup, "teacher_set", config, make), n_train=n_train)


def _statistics(setup: Setup, seed: int) -> tuple[ModelStatistics, float]:
    """The model statistics at the teacher's samples and the seconds they took, cached."""

    def make() -> dict[str, Tensor]:
        if n == p.n_train:
            teacher = cached_teacher_set(setup, seed, alt=False)
        else:
            teacher = make_teacher_set(setup, n, 1, seed)
        assert teacher.seeds is not None
        seeds, began = teacher.seeds[: teacher.n_train], time.perf_counter()
        tables = vars(model_statistics(setup, teacher.train[1], points, seeds=seeds))
        return {**tables, "seconds": torch.tensor(time.perf_counter() - began)}

    p = setup.params
    n, points = p.statistics_samples or p.n_train, p.statistics_points
    config = {"n_train": n, "points": points, "seed": seed}
    tables = cached_tensors(setup, "model_statistics", config, make)
    seconds = tables.pop("seconds").item()
    return ModelStatistics(**tables), seconds


def _teacher_samples(setup: Setup, seeds: range) -> Tensor:
    """The teacher's samples of some evaluation seeds, float32 on the CPU, cached in chunks."""

    def make(chunk: range) -> dict[str, Tensor]:
        batches = sample_batches(setup.teacher, setup, chunk, "teacher")
        return {"x_0": torch.cat([x.float().cpu() for x in batches])}

    found = []
    for chunk in _judging(setup.params):
        if overlap := range(max(chunk.start, seeds.start), min(chunk.stop, seeds.stop)):
            config = {"seeds": [chunk.start, chunk.stop]}
            x_0 = cached_tensors(setup, "teacher_samples", config, partial(make, chunk))["x_0"]
            found.append(x_0[overlap.start - chunk.start : overlap.stop - chunk.start])
    return torch.cat(found)


def _teacher_part(setup: Setup, seeds: range) -> dict[str, FeatureSums]:
    """Sums of the teacher's samples from the seeds as far above those of the evaluation, cached."""

    def make() -> dict[str, Tensor]:
        sums: dict[str, FeatureSums] = {}
        others = range(*_part_config(setup, seeds)["seeds"])
        for x in sample_batches(setup.teacher, setup, others, "teacher, other noises"):
            sums = _merged(sums, _sums(setup, x))
        return _packed(sums)

    return _unpacked(cached_tensors(setup, "teacher_part", _part_config(setup, seeds), make))


def _part_config(setup: Setup, seeds: range) -> dict[str, Any]:
    end = _sets(setup.params)[-1].stop
    return {"seeds": [end + seeds.start, end + seeds.stop], "features": setup.features_name}


def _teacher_sums(setup: Setup) -> dict[str, FeatureSums]:
    """Sums of the teacher's samples, a set of them from seeds above the evaluation's, cached."""
    seeds = _sets(setup.params)[0]
    read: list[range] = []

    def make() -> dict[str, Tensor]:
        sums: dict[str, FeatureSums] = {}
        for chunk in _chunks(seeds):
            sums = _merged(sums, _teacher_part(setup, chunk))
            read.append(chunk)
        return _packed(sums)

    found = cached_tensors(setup, "teacher_sums", _part_config(setup, seeds), make)
    for chunk in read:  # what they made is kept now
        tensors_path(setup, "teacher_part", _part_config(setup, chunk)).unlink(missing_ok=True)
    return _unpacked(found)
