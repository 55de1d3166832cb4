"""One run is one record: an `Experiment` says what, `run` returns its `Result`, cached on disk.

    python -m s4s_core.experiment --dataset digits --nfe 5 --learn coefficients

Results live under `results/` by the hash of the complete effective configuration: a changed
setting is a new result, never a stale hit. This module is the only writer there.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor

from . import __version__, zoo
from .base import UsageError, one_of, progress, write_atomically
from .dpm_solver_v3 import ModelStatistics, dpm_solver_v3, model_statistics
from .evaluate import feature_sums, frechet_distance
from .grid import TimeGrid
from .grid_search import PUBLISHED, dmn, gits_over
from .learn import (
    LearningDiverged,
    learn_alternating,
    learn_bns,
    learn_coefficients,
    learn_generalised,
    learn_jointly,
    learn_times,
)
from .schedule import VPDiscrete
from .solver import (
    HIGHEST_ORDER,
    SINGLE_STEP,
    SOLVERS,
    Coefficients,
    SingleStepCoefficients,
    Solver,
    count_steps,
)
from .teacher import (
    SEED_LIMIT,
    SEEDS_PER_SET,
    TeacherSet,
    generate,
    initial_noise,
    make_teacher_set,
)

LEARN = {
    "none": None,
    "coefficients": learn_coefficients,
    "times": learn_times,
    "alternating": learn_alternating,
    "jointly": learn_jointly,
    "bns": learn_bns,
    "generalised": learn_generalised,
}
V3 = "dpm_solver_v3"  # no entry of SOLVERS: its table needs statistics of the model


def _dmn(setup: zoo.Setup, nfe: int) -> TimeGrid:
    weighting = "latent" if isinstance(setup.schedule, VPDiscrete) else "pixel"
    return dmn(setup.schedule, nfe, weighting)


def _gits(setup: zoo.Setup, nfe: int) -> TimeGrid:
    first = SEEDS_PER_SET * (SEED_LIMIT + 1)  # noise above every teacher set's and evaluation's
    seeds = range(first, first + 256)  # as many as Chen et al. (2024) use
    size = setup.params.sample_batch_size
    parts = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    batches = [(setup.denoiser_for(part), initial_noise(setup, part)) for part in parts]
    return gits_over(batches, setup.schedule, nfe)


# Searched once for a model: they depend on neither solver nor seed. "ld3" depends on both.
SEARCHED = {"dmn": _dmn, "gits": _gits}
GRID_NAMES = [*PUBLISHED, *SEARCHED, "ld3"]


def results_folder() -> Path:
    """Where results are kept: $S4S_RESULTS, or `results/` in the checkout or the working folder."""
    root = zoo.PACKAGE.parent
    default = root if (root / "params").is_dir() else Path.cwd()
    return Path(os.environ.get("S4S_RESULTS") or default / "results")


@dataclass(frozen=True)
class Experiment:
    """What to learn, from where, and how many network calls; see params/ for everything else.

    dataset  a file in params/            grid   a name in GRID_NAMES; "ld3" is learned
    solver   a name in SOLVERS, or V3     order  evaluations a step may use, at most nfe
    learn    a name in LEARN              seed   of teacher set, batches and "gaussian"
    settings replaces entries of params/<dataset>.yaml by name; None leaves one as it is

    Raises UsageError for a name, type or combination that cannot be run.
    """

    dataset: str = "digits"
    grid: str = "logsnr"
    solver: str = "ipndm"
    order: int = 3
    nfe: int = 5
    learn: str = "none"
    seed: int = 0
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        one_of("dataset", self.dataset, zoo.datasets())
        one_of("grid", self.grid, GRID_NAMES)
        one_of("solver", self.solver, [*SOLVERS, V3])
        one_of("value of learn", self.learn, LEARN)
        for name, lowest in (("order", 1), ("nfe", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise UsageError(
                    f"{name} must be a whole number of at least {lowest}, not {value!r}"
                )
        if self.seed >= SEED_LIMIT:
            raise UsageError(f"seed must be below {SEED_LIMIT}, not {self.seed}")
        if not isinstance(self.settings, dict):
            raise UsageError(f"settings must be a mapping, not {self.settings!r}")
        if self.order > self.nfe:
            raise UsageError(
                f"order {self.order} needs at least {self.order} network calls, not nfe = "
                f"{self.nfe}: lower the order or raise nfe"
            )
        steps = count_steps(self.solver, self.order, self.nfe)
        if self.solver in SINGLE_STEP and self.learn in ("bns", "generalised"):
            raise UsageError(
                f"learn = {self.learn} starts at a multistep solver, not at {self.solver}: "
                f"choose {', '.join(s for s in SOLVERS if s not in SINGLE_STEP)}"
            )
        if self.solver == V3 and (self.learn != "none" or self.grid == "ld3"):
            raise UsageError(
                f"{V3} brings statistics of its own and is not learned: choose learn none, not "
                f"{self.learn}, and a grid other than ld3, not {self.grid}"
            )
        highest = HIGHEST_ORDER.get(self.solver, self.order)
        if self.learn in ("none", "times") and self.order > highest:
            raise UsageError(
                f"{self.solver} is published up to order {highest}: order {self.order} needs "
                "learned coefficients (learn = coefficients, alternating or jointly)"
            )
        schedule = zoo.NAMED_SCHEDULES[self.params.schedule]  # checks the settings, too
        if self.grid in PUBLISHED:  # now rather than after an hour: not each has every schedule
            PUBLISHED[self.grid](schedule, steps)

    @cached_property
    def params(self) -> zoo.Params:
        """The effective settings."""
        return zoo.load_params(self.dataset).override(**self.settings)

    def config(self) -> dict:
        """Everything the result depends on, as plain values."""
        what = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        return {
            **what,
            "params": asdict(self.params),
            "weights": _setup(self).weights,
            "version": __version__,
        }

    def path(self) -> Path:
        """The file of its result."""
        return _cache_path(self.dataset, "result", self.config(), "json")


def check_lists(**lists) -> None:
    """UsageError unless every argument is a list, of numbers or of names."""
    for name, values in lists.items():
        kinds = {type(v) for v in values} if isinstance(values, list) else set()
        if not kinds or not (kinds <= {int, float} or kinds == {str}):
            raise UsageError(
                f"{name} must be a list of whole numbers, of decimal numbers or of names, not "
                f"{values!r}; with papermill write -y '{name}: [...]', since -p passes a list as "
                "text"
            )


def settings_of(dataset: str, settings: dict) -> dict:
    """The dataset's part of settings by dataset, {} without one; UsageError where they are not."""
    for name, chosen in settings.items() if isinstance(settings, dict) else [(None, settings)]:
        if name not in zoo.datasets() or not isinstance(chosen, dict):
            raise UsageError(
                f"settings must map datasets to settings, as in {{{dataset}: {{epochs: 3}}}}, not "
                f"{settings!r}; datasets are {', '.join(zoo.datasets())}"
            )
    return settings.get(dataset, {})


def sweep(settings: dict | None = None, **choices) -> list[Experiment]:
    """The experiments of every combination: each choice is a field's value or a list of values.

    The last choice varies fastest. A published solver that no seed has a part in, nor in its grid,
    is listed once, for the first seed. Raises UsageError as Experiment does.
    """
    lists = {k: v if isinstance(v, list) else [v] for k, v in choices.items()}
    found = []
    for values in product(*lists.values()):
        experiment = Experiment(**dict(zip(lists, values, strict=True)), settings=settings or {})
        seeded = experiment.grid == "ld3" or experiment.solver in (V3, "gaussian")
        fixed = experiment.learn == "none" and not seeded
        if not fixed or experiment.seed == lists.get("seed", [0])[0]:
            found.append(experiment)
    return found


@dataclass(frozen=True)
class Result:
    """What a run gave.

    frechet   Frechet distance of `n_samples` samples, seeds 0 to n_samples - 1, to the real data,
              with the features that `features` names
    distance_to_teacher  root mean square difference per entry between those samples and the
              teacher's from the same noise
    seconds   of learning, or of measuring the statistics of V3 (0.0 without either), from the
              pairs on; history  one record an epoch: losses, table and times
    """

    config: dict
    solver: Solver
    frechet: float
    distance_to_teacher: float
    n_samples: int
    features: str
    seconds: float
    history: list

    @classmethod
    def read(cls, path: Path) -> "Result":
        """The inverse of the file that `run` writes; raises where it is not whole."""
        entries = json.loads(path.read_text("utf-8"))
        return cls(**{**entries, "solver": Solver.from_dict(entries["solver"])})

    def row(self) -> dict:
        """One flat record for tables and plots."""
        names = ("dataset", "grid", "solver", "order", "nfe", "learn", "seed")
        metrics = ("frechet", "distance_to_teacher", "seconds", "n_samples")
        return {n: self.config[n] for n in names} | {n: getattr(self, n) for n in metrics}


def run(experiment: Experiment) -> Result:
    """The experiment's result, from the cache or computed and cached.

    Interrupting leaves the best solver so far beside where the result would be, and no result.
    """
    path = experiment.path()
    try:
        return Result.read(path)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:  # e.g. edited by hand: make it again
        print(f"{path} is not a readable result ({error}); computing it again", file=sys.stderr)
    setup = _setup(experiment)
    solver, seconds, history = _learned(experiment, setup, path)
    n = setup.params.fid_samples
    x_0 = torch.cat([x.cpu() for x in generate(solver, setup, range(n))])
    batches = (x.to(setup.device) for x in x_0.split(setup.params.sample_batch_size))
    sums = feature_sums(lambda x: setup.features(setup.decode(x)), batches)
    metrics = {
        "frechet": frechet_distance(sums, setup.reference),
        "distance_to_teacher": (x_0 - _teacher_samples(setup)).square().mean().sqrt().item(),
        "n_samples": n,
        "features": setup.features_name,
    }
    config = experiment.config()
    versions = {"s4s_core": __version__, "torch": torch.__version__, "python": _python()}
    solver = Solver(
        solver.coefficients, solver.grid, {"experiment": config, **metrics, "versions": versions}
    )
    result = Result(config, solver, seconds=seconds, history=history, **metrics)
    entries = {f.name: getattr(result, f.name) for f in fields(Result)}
    entries["solver"] = solver.to_dict()
    write_atomically(path, (json.dumps(entries, indent=1) + "\n").encode())
    return result


def learning_seconds(experiment: Experiment) -> float:
    """Seconds of all that was learned for it: the LD3 grid that it starts from, too."""
    before = run(_ld3(experiment)).seconds if experiment.grid == "ld3" else 0.0
    return before + run(experiment).seconds


def run_all(experiments: Sequence[Experiment], workers: int | None = None) -> list[Result]:
    """The results of many experiments, in their order, with a progress bar.

    What is not cached runs in `workers` processes of one thread each: by default one a core, since
    small batches keep no more than one thread busy, or this process alone where there is a GPU.
    """
    workers = workers or (1 if torch.cuda.is_available() else os.cpu_count())
    missing = [e for e in experiments if not e.path().exists()]
    if workers > 1 and len(missing) > 1:
        shared = {_with_its_grid(e).path(): e for e in missing if e.grid not in PUBLISHED}
        v3 = [e for e in missing if e.solver == V3]  # these share their model's statistics
        shared |= {(e.dataset, e.seed, e.params.n_train): e for e in v3}
        _run_in_processes([(start, list(shared.values())), (run, missing)], workers)
    return [run(e) for e in progress(experiments, desc="results")]


def _run_in_processes(rounds: list[tuple[Callable, list[Experiment]]], workers: int) -> None:
    """Fill the cache, one round after the other: the second needs what the first shares."""
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
    """One thread, and an end with the parent: workers of a killed kernel would stay for good."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def start(experiment: Experiment) -> Solver:
    """The solver that learning begins with: the published table on the experiment's grid."""
    setup = _setup(experiment)
    grid = _time_grid(experiment, setup)
    return Solver(_table(experiment, grid), grid)


def _table(experiment: Experiment, grid: TimeGrid) -> Coefficients | SingleStepCoefficients:
    """The published coefficients on a grid, with room for what the experiment learns."""
    if experiment.solver == V3:
        statistics, _ = _statistics(_setup(experiment), experiment.seed)
        return dpm_solver_v3(grid, statistics, experiment.order)
    order = min(experiment.order, HIGHEST_ORDER.get(experiment.solver, experiment.order))
    table = zoo.published(experiment.solver, grid, order, experiment.params, experiment.seed)
    if experiment.solver in SINGLE_STEP:
        return table
    return table.widen(experiment.order, min(experiment.params.states, grid.nfe))


def _time_grid(experiment: Experiment, setup: zoo.Setup) -> TimeGrid:
    """The grid by its name, a searched one cached."""
    name = experiment.grid
    nfe = count_steps(experiment.solver, experiment.order, experiment.nfe)
    if name == "ld3":
        return run(_ld3(experiment)).solver.grid
    if name in PUBLISHED:
        return PUBLISHED[name](setup.schedule, nfe)
    make = lambda: {"t": SEARCHED[name](setup, nfe).t}  # noqa: E731
    return TimeGrid(setup.schedule, _cached_tensors(setup, name, {"nfe": nfe}, make)["t"])


def _ld3(experiment: Experiment) -> Experiment:
    """The run whose grid "ld3" is: the same solver at one order, so that orders compare."""
    params = experiment.params
    order = min(params.ld3_order, experiment.nfe, HIGHEST_ORDER.get(experiment.solver, 99))
    return replace(experiment, grid=params.ld3_start, order=order, learn="times")


def _with_its_grid(experiment: Experiment) -> Experiment:
    """The same experiment for all whose grids, learned or searched, are one."""
    if experiment.grid == "ld3":
        return _ld3(experiment)
    return replace(experiment, solver="ddim", order=1, learn="none", seed=0)


def _setup(experiment: Experiment) -> zoo.Setup:
    """The model with the experiment's settings, one object for all experiments that share them."""
    return _setup_with(experiment.dataset, json.dumps(experiment.settings, sort_keys=True))


@cache
def _setup_with(dataset: str, settings: str) -> zoo.Setup:
    given = json.loads(settings)
    of_model = {k: given[k] for k in zoo.OF_THE_MODEL if given.get(k) is not None}
    model = _model(dataset, json.dumps(of_model))
    return replace(model, params=zoo.load_params(dataset).override(**given))


@cache
def _model(dataset: str, settings: str) -> zoo.Setup:
    """One network for all experiments that differ in what it is used for."""
    return zoo.load(dataset, **json.loads(settings))


def _learned(experiment: Experiment, setup, path: Path) -> tuple[Solver, float, list]:
    """The learned solver, the seconds that took and the history."""
    solver, learn = start(experiment), LEARN[experiment.learn]
    if experiment.solver == V3:
        return solver, _statistics(setup, experiment.seed)[1], []
    if learn is None:
        return solver, 0.0, []
    teacher = _teacher_set(setup, experiment.seed, alt=learn is not learn_coefficients)
    # The rivals that follow the theory of the current times do so in the authors' own code.
    follows = experiment.learn in ("times", "generalised")
    theory = {"theory": partial(_table, experiment)} if follows else {}
    history, best, began = [], solver, time.perf_counter()
    try:
        for epoch in learn(solver, setup, teacher, seed=experiment.seed, **theory):
            best = epoch.best
            history.append(_record(epoch))
    except (KeyboardInterrupt, LearningDiverged):
        best.save(path.with_name(f"{path.stem}_best_so_far.json"))
        raise
    return best, time.perf_counter() - began, history


def _record(epoch) -> dict:
    names = ("index", "phase", "train_loss", "valid_loss", "accepted")
    table = epoch.solver.to_dict()
    tables = {n: table[n] for n in ("b", "a", "c", "t", "t_model") if n in table}
    return {n: getattr(epoch, n) for n in names} | tables


def _teacher_set(setup, seed: int, alt: bool) -> TeacherSet:
    """The pairs to learn from, cached."""
    p = setup.params
    n_train, n_valid = (p.n_train_alt, p.n_valid_alt) if alt else (p.n_train, p.n_valid)

    def make() -> dict[str, Tensor]:
        made = make_teacher_set(setup, n_train, n_valid, seed)
        return {"x_T": made.x_T, "x_0": made.x_0, "seeds": made.seeds}

    config = {"n_train": n_train, "n_valid": n_valid, "seed": seed}
    return TeacherSet(**_cached_tensors(setup, "teacher_set", config, make), n_train=n_train)


def _statistics(setup, seed: int) -> tuple[ModelStatistics, float]:
    """The model statistics at the teacher's samples and the seconds they took, cached."""

    def make() -> dict[str, Tensor]:
        teacher = _teacher_set(setup, seed, alt=False)
        seeds, began = teacher.seeds[: teacher.n_train], time.perf_counter()
        tables = vars(model_statistics(setup, teacher.train[1], seeds=seeds))
        return {**tables, "seconds": torch.tensor(time.perf_counter() - began)}

    config = {"n_train": setup.params.n_train, "seed": seed}
    tables = _cached_tensors(setup, "model_statistics", config, make)
    seconds = tables.pop("seconds").item()
    return ModelStatistics(**tables), seconds


def _teacher_samples(setup) -> Tensor:
    """The teacher's samples from the evaluation seeds, cached."""

    def make() -> dict[str, Tensor]:
        batches = generate(setup.teacher, setup, range(setup.params.fid_samples), "teacher")
        return {"x_0": torch.cat([x.cpu() for x in batches])}

    config = {"seeds": setup.params.fid_samples}
    return _cached_tensors(setup, "teacher_samples", config, make)["x_0"]


def _cached_tensors(
    setup, kind: str, config: dict, make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    config = {
        **config,
        "kind": kind,
        "teacher": setup.teacher.to_dict(),
        "guidance": setup.params.guidance,
        "precision": setup.params.precision,
        "weights": setup.weights,
        "version": __version__,
    }
    path = _cache_path(setup.name, kind, config, "safetensors")
    try:
        return safetensors.torch.load(path.read_bytes())
    except (FileNotFoundError, safetensors.SafetensorError):
        tensors = make()
        write_atomically(path, safetensors.torch.save(tensors))
        return tensors


def _cache_path(dataset: str, kind: str, config: dict, suffix: str) -> Path:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    return results_folder() / dataset / f"{kind}_{digest}.{suffix}"


def _python() -> str:
    return f"{platform.python_version()} on {platform.machine()}"


def main(arguments: list[str] | None = None) -> None:
    """Run one experiment, print its metrics, write its solver file."""
    parser = argparse.ArgumentParser(
        prog="python -m s4s_core.experiment",
        description="Learn a solver, measure it, write it to a JSON file.",
    )
    for f in fields(Experiment):
        if f.name != "settings":
            parser.add_argument(f"--{f.name}", type=f.type, default=f.default, help=_HELP[f.name])
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a setting of params/<dataset>.yaml, e.g. --set epochs=3",
    )
    parser.add_argument("--out", metavar="FILE", help="the solver file (default: in results/)")
    given = vars(parser.parse_args(arguments))
    try:
        out, settings = given.pop("out"), dict(_setting(text) for text in given.pop("set"))
        experiment = Experiment(**given, settings=settings)
        path = Path(out) if out else experiment.path().with_suffix(".solver.json")
        if path.is_dir():
            raise UsageError(f"--out takes a file, not the folder {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        result = run(experiment)
        result.solver.save(path)
    except (UsageError, LearningDiverged, OSError) as error:
        sys.exit(f"error: {error}")
    seeds = f"{result.n_samples} samples, seeds 0-{result.n_samples - 1}"
    print(f"Frechet distance ({result.features}; {seeds})  {result.frechet:.4f}")
    print(f"distance to the teacher (root mean square)  {result.distance_to_teacher:.4f}")
    print(f"seconds of learning  {result.seconds:.1f}")
    print(f"solver  {path}")


_HELP = {
    "dataset": "a file in params/",
    "grid": ", ".join(GRID_NAMES),
    "solver": f"{', '.join(SOLVERS)} or {V3}",
    "order": "evaluations a step may use",
    "nfe": "network calls a sample",
    "learn": ", ".join(LEARN),
    "seed": "of the teacher set and of the batches",
}


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    try:
        if equals and value:
            return key, yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise UsageError(f"--set takes KEY=VALUE with a YAML value, not {text!r}")


if __name__ == "__main__":
    main()
