"""One run is one record: `run` returns the `Result` of an `Experiment`, cached on disk.

Results live under `results/` by the hash of the complete effective configuration: a changed
setting is a new result, never a stale hit. Nothing else writes there.
"""

import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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
from ..errors import UsageError, progress, require_whole, shown
from ..evaluate import FeatureSums, feature_sums, frechet_distance, merge, thumbnails
from ..grid import GRIDS, TimeGrid
from ..learn import Epoch, LearningDivergedError
from ..models import zoo
from ..params import Params
from ..published import SOLVERS, Table, count_steps, table_by_name
from ..setup import Setup
from ..solver import Coefficients, Solver
from ..teacher import TeacherSet, make_teacher_set, sample_batches
from .cache import cache_path, cached_tensors, read_sealed, write_sealed
from .experiment import DPM_SOLVER_V3, SEARCHED, Experiment

if TYPE_CHECKING:
    from pandas import DataFrame  # imported where used: it takes longer than all of this package


BLOCKS = 5  # of the evaluation noises, for intervals


@dataclass(frozen=True)
class Result:
    """What a run gave.

    frechet   Fréchet distance of `n_samples` samples, seeds 0 to n_samples - 1, to the real data,
              with the features that `features` names
    frechet_to_teacher  the same to as many samples of the teacher from other noises; the teacher
              itself has the floor of this number
    thumbnails_to_teacher  that again in small means of pixels, which are no network's features
    distance_to_teacher  root mean square difference per entry between those samples and the
              teacher's from the same noise
    blocks    each of these numbers, by its name, on disjoint blocks of the samples
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
        return record | {f"{n}_blocks": values for n, values in self.blocks.items()}


def run(experiment: Experiment) -> Result:
    """Return the experiment's result, from the cache or computed and cached.

    Interrupting leaves the best solver so far beside where the result would be, and no result.
    """
    _check(experiment)
    path, config = experiment.path(), experiment.config()
    if (result := Result.read(path, config)) is not None:
        return result
    setup = _setup(experiment)
    solver, costs, history = _learned(experiment, setup, path)
    metrics, blocks = _measured(solver, setup)
    metrics |= {"n_samples": setup.params.fid_samples, "features": setup.features_name}
    versions = {"s4s_core": __version__, "torch": torch.__version__, "numpy": np.__version__}
    versions |= {"python": platform.python_version(), "machine": platform.machine()}
    provenance = {"experiment": config, "model": setup.model, **metrics, "versions": versions}
    solver = Solver(solver.coefficients, solver.grid, provenance)
    result = Result(config, solver, blocks=blocks, history=history, **metrics, **costs)
    entries = {f.name: getattr(result, f.name) for f in fields(Result)}
    entries["solver"] = solver.to_dict()
    write_sealed(path, entries)
    return result


def _check(experiment: Experiment) -> None:
    """Raise UsageError for what is no experiment."""
    if not isinstance(experiment, Experiment):
        raise UsageError(f"an Experiment is run, not {shown(experiment)}")


def _measured(solver: Solver, setup: Setup) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The numbers of Result by name, of all samples and of each block."""
    n, size = setup.params.fid_samples, setup.params.sample_batch_size
    x_0 = torch.cat([x.cpu() for x in sample_batches(solver, setup, range(n))])
    error = x_0 - _teacher_samples(setup)
    others = _teacher_sums(setup)
    # A block has as many samples as features, at least: their covariance is singular otherwise.
    n_blocks = min(BLOCKS, max(1, n // len(others["features"].mean)))
    parts = torch.arange(n).tensor_split(n_blocks)
    sums = [_sums(setup, x_0[part].split(size)) for part in parts]

    def numbers(sums: dict[str, FeatureSums], error: Tensor) -> dict[str, float]:
        return {
            "frechet": frechet_distance(sums["features"], setup.reference),
            "frechet_to_teacher": frechet_distance(sums["features"], others["features"]),
            "thumbnails_to_teacher": frechet_distance(sums["thumbnails"], others["thumbnails"]),
            "distance_to_teacher": error.square().mean().sqrt().item(),
        }

    total = numbers({name: merge(*(s[name] for s in sums)) for name in others}, error)
    found = [total]
    if n_blocks > 1:
        found = [numbers(s, error[part]) for s, part in zip(sums, parts, strict=True)]
    return total, {name: [block[name] for block in found] for name in total}


@torch.no_grad()
def _sums(setup: Setup, samples: Sequence[Tensor]) -> dict[str, FeatureSums]:
    """The sums of the features of the model and of thumbnails, each batch decoded once."""
    decoded = setup.variant(decode=lambda x: x)
    total: dict[str, FeatureSums] = {}
    for x in samples:
        images = [setup.decode(x.to(setup.device))]
        sums = {"features": decoded.feature_sums(images)}
        sums["thumbnails"] = feature_sums(thumbnails, images)
        # One running sum, as in feature_sums: all batches' would fill the memory.
        total = {name: merge(total[name], sums[name]) for name in sums} if total else sums
    return total


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
        x_0 = torch.cat([x.cpu() for x in sample_batches(anonymous, setup, seeds)])
        return {"error": (x_0 - _teacher_samples(setup)).square().flatten(1).mean(1)}

    numbers = {k: v for k, v in solver.to_dict().items() if k != "provenance"}
    return cached_tensors(setup, "errors", {"solver": numbers, "seeds": len(seeds)}, make)["error"]


def learning_costs(experiment: Experiment) -> dict[str, float]:
    """Return what all that was learned for it cost, with the LD3 grid that it starts from.

    seconds; evaluations and backward as Result has them.
    """
    learned = [experiment, _ld3(experiment)] if experiment.grid == "ld3" else [experiment]
    results = [run(e) for e in learned]
    return {n: sum(getattr(r, n) for r in results) for n in ("seconds", "evaluations", "backward")}


def run_all(
    experiments: Sequence[Experiment] | Mapping[str, Sequence[Experiment]],
    workers: int | None = None,
) -> "DataFrame":
    """Return one row for each experiment, in order, as a pandas frame; with a progress bar.

    experiments  a list, or name -> list: the rows then carry the name in the column "method"
    workers      processes of one thread each for what is not cached: by default one a core that
                 this process may use, since small batches keep no more than one thread busy, or
                 this process alone where there is a GPU

    `run` gives the solver and the history behind a row.
    """
    from pandas import DataFrame

    named = experiments.items() if isinstance(experiments, Mapping) else [("", experiments)]
    for name, group in named:
        if not isinstance(group, Sequence):
            raise UsageError(f"run_all takes lists of experiments, not {name} {shown(group)}")
    todo = [(name, experiment) for name, group in named for experiment in group]
    for _, experiment in todo:
        _check(experiment)
    if workers is not None:
        require_whole("workers", workers, 1)
    workers = workers or (1 if torch.cuda.is_available() else usable_cores())
    missing = [e for _, e in todo if not e.path().exists()]
    if workers > 1 and len(missing) > 1:
        shared = {_representative_for_grid(e).path(): e for e in missing if e.grid not in GRIDS}
        v3 = [e for e in missing if e.solver == DPM_SOLVER_V3]  # share their model's statistics
        once = {(e.dataset, e.seed, e.params.n_train): e for e in v3}
        first = [*shared.values(), *once.values()]
        _run_in_processes([(initial_solver, first), (run, missing)], workers)
    rows = []
    for name, experiment in progress(todo, desc="results"):
        row = run(experiment).row()
        rows.append(row | {"method": name} if name else row)
    return DataFrame(rows)


def usable_cores() -> int:
    """Return how many cores this process may use, whatever the machine has."""
    from joblib import cpu_count  # affinity, containers, and LOKY_MAX_CPU_COUNT

    return min(cpu_count(), int(os.environ.get("SLURM_CPUS_PER_TASK") or 10**6))


def _run_in_processes(
    rounds: list[tuple[Callable[[Experiment], Any], list[Experiment]]], workers: int
) -> None:
    """Run the rounds in order: shared grids and statistics first, then all that uses them."""
    context = multiprocessing.get_context("spawn")  # forked children inherit torch's locks
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _begin_worker) as pool:
        try:
            with progress(total=sum(len(e) for _, e in rounds), desc="runs") as bar:
                for job, experiments in rounds:
                    for done in as_completed([pool.submit(job, e) for e in experiments]):
                        done.result()
                        bar.update()
        except KeyboardInterrupt:  # must not wait for the runs that are under way
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        finally:  # after an error those under way are finished, and kept
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Use one thread, and exit when the parent dies: a killed kernel would leave workers."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None  # only workers come here

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


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
        return run(_ld3(experiment)).solver.grid
    if name in GRIDS:
        return GRIDS[name](setup.schedule, nfe)
    make = lambda: {"t": SEARCHED[name](setup, nfe).t}  # noqa: E731
    return TimeGrid(setup.schedule, cached_tensors(setup, name, {"nfe": nfe}, make)["t"])


def _ld3(experiment: Experiment) -> Experiment:
    """The run whose grid "ld3" is: the same solver at one order, so that orders compare.

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
        return _ld3(experiment)
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
    teacher = _teacher_set(setup, experiment.seed, alt=experiment.learn != "coefficients")
    # The rivals whose coefficients follow the current times do so in the authors' own code.
    follows = experiment.newton_blocks or experiment.learn in ("times", "generalised")
    scheme = {"scheme": partial(_table, experiment)} if follows else {}
    history, best, began = [], solver, time.perf_counter()
    try:
        counted = setup.variant(denoiser=counter)
        for epoch in learn(solver, counted, teacher, seed=experiment.seed, **scheme):
            best = epoch.best
            history.append(_record(epoch))
    except (KeyboardInterrupt, LearningDivergedError):
        best.save(path.with_name(f"{path.stem}_best_so_far.json"))
        raise
    costs = {"seconds": time.perf_counter() - began}
    return best, costs | {n: getattr(counter, n) for n in ("evaluations", "backward")}, history


def _record(epoch: Epoch) -> dict[str, Any]:
    names = ("index", "phase", "train_loss", "valid_loss", "accepted")
    table = epoch.solver.to_dict()
    tables = {n: table[n] for n in ("b", "a", "c", "t", "t_model") if n in table}
    return {n: getattr(epoch, n) for n in names} | tables


def _teacher_set(setup: Setup, seed: int, alt: bool) -> TeacherSet:
    """The pairs to learn from, cached."""
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
        teacher = _teacher_set(setup, seed, alt=False)
        assert teacher.seeds is not None
        seeds, began = teacher.seeds[: teacher.n_train], time.perf_counter()
        tables = vars(model_statistics(setup, teacher.train[1], seeds=seeds))
        return {**tables, "seconds": torch.tensor(time.perf_counter() - began)}

    config = {"n_train": setup.params.n_train, "seed": seed}
    tables = cached_tensors(setup, "model_statistics", config, make)
    seconds = tables.pop("seconds").item()
    return ModelStatistics(**tables), seconds


def _teacher_samples(setup: Setup) -> Tensor:
    """The teacher's samples from the evaluation seeds, cached."""

    def make() -> dict[str, Tensor]:
        batches = sample_batches(setup.teacher, setup, range(setup.params.fid_samples), "teacher")
        return {"x_0": torch.cat([x.cpu() for x in batches])}

    config = {"seeds": setup.params.fid_samples}
    return cached_tensors(setup, "teacher_samples", config, make)["x_0"]


def _teacher_sums(setup: Setup) -> dict[str, FeatureSums]:
    """Sums of the teacher's samples from as many seeds above those of the evaluation, cached."""
    n, size = setup.params.fid_samples, setup.params.sample_batch_size

    def make() -> dict[str, Tensor]:
        batches = sample_batches(setup.teacher, setup, range(n, 2 * n), "teacher, other noises")
        parts = [_sums(setup, x.split(size)) for x in batches]
        merged = {name: merge(*(part[name] for part in parts)) for name in parts[0]}
        return {
            f"{name}_{key}": torch.as_tensor(value)
            for name, sums in merged.items()
            for key, value in vars(sums).items()
        }

    config = {"seeds": [n, 2 * n], "features": setup.features_name}
    found = cached_tensors(setup, "teacher_sums", config, make)
    return {
        name: FeatureSums(int(found[f"{name}_n"]), found[f"{name}_mean"], found[f"{name}_scatter"])
        for name in ("features", "thumbnails")
    }
