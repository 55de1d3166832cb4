"""What a notebook's runs cost, from nothing: network evaluations, images, disk; none is run."""

import ast
import contextlib
import io
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, choose, in_one_line, read_file
from ..gauss_newton import SMALL_STEPS, STEPS_AN_EPOCH
from ..grid import time_uniform
from ..params import Params
from ..published import ddim
from ..setup import Setup
from ..solver import Solver
from ..teacher import sample_batches
from .experiment import DPM_SOLVER_V3, Experiment
from .run import SHARD, ld3_run, teacher_of

LARGEST = 10**8  # bytes of a notebook
INCEPTION = 2048  # features, whose covariance is most of what a shard stores
FORWARD_MODE = 3  # plain calls that one call with its derivative is worth
BACKWARD = 2  # and what differentiating one adds to it
RUNS = ("run_all", "run")
LOADS = ("load", "initial_solver")  # they need the files of the model, and tell nothing of the runs


def planned(path: str | Path, parameters: Mapping[str, Any]) -> tuple[list[Experiment], int]:
    """Return the experiments of a notebook's first `run_all`, and how many others run something.

    parameters  replace those of the cell tagged "parameters", by name

    Its statements are executed until then, in this process, and what they print is dropped; those
    that call `run` or load a model, and what depends on them, are left out, since nothing is to be
    run and no file is needed. Raises UsageError for what is no such notebook, an unknown parameter
    and statements that fail.
    """
    cells = _cells(path)
    names = {
        node.id
        for tagged, body in cells
        for node in ast.walk(ast.Module(body, []))
        if tagged and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    for name in parameters:
        choose("parameter", name, names)
    found: list[Experiment] | None = None
    others, left_out, space = 0, False, {"__name__": "__main__"}
    for tagged, body in cells:
        for statement in body:
            named = [n for n in ast.walk(statement) if isinstance(n, ast.Call)]
            calls = [call for call in named if _name(call) in RUNS]
            if found is None and calls and _name(calls[0]) == "run_all":
                given = _execute(path, ast.Expression(calls.pop(0).args[0]), "eval", space)
                groups = given.values() if isinstance(given, dict) else [given]
                found = [e for group in groups if isinstance(group, list) for e in group]
            elif found is None and (calls or any(_name(call) in LOADS for call in named)):
                left_out = True
            elif found is None:
                try:
                    _execute(path, ast.Module([statement], []), "exec", space)
                except UsageError as error:
                    if not (left_out and error.__cause__):  # it may need that
                        raise
            others += bool(calls)
        if tagged:
            space |= parameters
    if not found or not all(isinstance(e, Experiment) for e in found):
        raise UsageError(f"{path} has no run_all of experiments: what it costs cannot be told")
    return found, others


def _cells(path: str | Path) -> list[tuple[bool, list[ast.stmt]]]:
    """Whether it holds the parameters, and its statements, of each code cell."""
    try:
        cells = json.loads(read_file(path, LARGEST))["cells"]
        return [
            ("parameters" in c["metadata"].get("tags", []), ast.parse("".join(c["source"])).body)
            for c in cells
            if c["cell_type"] == "code"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError):
        raise UsageError(f"{path} is no notebook of plain Python: give one of notebooks/") from None


def _name(call: ast.Call) -> str:
    """The name of the function that is called, without what it is an attribute of."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _execute(path: str | Path, tree: Any, mode: str, space: dict[str, Any]) -> Any:
    code = compile(ast.fix_missing_locations(tree), str(path), mode)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return eval(code, space)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{path} fails before its first run_all: {in_one_line(error):.300}"
        ) from error


def cost(experiments: Iterable[Experiment]) -> Counter[str]:
    """Return what experiments cost where nothing of them is cached.

    runs               different ones, and "learned": those that learn, LD3's grids among them;
                       "bounded": those of these that Gauss-Newton learns
    forward, backward  samples that the network sees, guidance included in one; and those for which
                       it is differentiated
    images             samples of which features are taken
    bytes              that stay in the results folder; and "passing": of one run under way

    Learning is counted to its last pass. By Gauss-Newton, which ends by itself, it is a bound, that
    of a full table of coefficients and times at once.
    """
    parts: dict[Any, dict[str, int]] = {}
    passing = []
    for e in experiments:
        p, path = e.params, _key(e)
        judged = p.fid_samples * p.fid_blocks
        entries = 8 * (INCEPTION * (INCEPTION + 1)) if p.fid_reference else 0
        parts["run", path] = {
            "runs": 1, "forward": judged * e.nfe, "images": judged,
        }  # fmt: skip
        teacher = teacher_of(e)
        parts["teacher", teacher, p.fid_samples, judged] = {
            "forward": (judged + p.fid_samples) * p.teacher_nfe, "images": p.fid_samples,
            "bytes": 4 * judged * math.prod(p.shape) + entries,
        }  # fmt: skip
        learners = [e, ld3_run(e)] if e.grid == "ld3" else [e]
        learners = [one for one in learners if one.learn != "none"]
        for one in learners:
            bounded = int(bool(one.newton_blocks))
            parts["learn", _key(one)] = {"learned": 1, "bounded": bounded} | _learning(one)
        sets = [_pairs(one) for one in learners]
        if e.grid == "gits":
            parts["gits", e.dataset, p.of_the_model(), e.nfe, p.gits_coefficient] = {
                "forward": 256 * 60
            }
        if e.solver == DPM_SOLVER_V3:
            n = p.statistics_samples or p.n_train
            sets.append((n, p.n_valid if n == p.n_train else 1))
            looks = 2 * p.statistics_points * n * FORWARD_MODE
            model = (teacher, e.seed, n, p.statistics_points)
            parts["statistics", model] = {"forward": looks}
        for pairs in sets:
            parts["pairs", teacher, e.seed, pairs] = {
                "forward": sum(pairs) * p.teacher_nfe,
                "bytes": 16 * sum(pairs) * math.prod(p.shape),
            }
        passing.append(entries * math.ceil(p.fid_samples / SHARD) * p.fid_blocks)
    total: Counter[str] = Counter()
    for part in parts.values():
        total.update(part)
    total["passing"] = max(passing, default=0)
    return total


def _key(e: Experiment) -> tuple:
    return (e.dataset, e.grid, e.solver, e.order, e.nfe, e.learn, e.seed, e.params)


def _pairs(e: Experiment) -> tuple[int, int]:
    """How many pairs a run learns from, and how many choose its best solver."""
    p = e.params
    return (p.n_train, p.n_valid) if e.learn == "coefficients" else (p.n_train_alt, p.n_valid_alt)


def _learning(e: Experiment) -> dict[str, int]:
    """Evaluations of learning alone."""
    p, (n, held_out) = e.params, _pairs(e)
    if e.newton_blocks:
        p = p.override(n_train_alt=n, n_valid_alt=held_out)
        return {"forward": p.epochs * evaluations_a_pass(e.nfe, p), "backward": 0}
    short = e.learn in ("coefficients", "times")
    passes = p.epochs if short else 2 * p.rounds * p.phase_epochs
    relaxed = p.gamma > 0 and e.learn not in ("bns", "generalised")
    # The answer of the first call needs no derivative where neither x_T nor a time moves.
    still = 0 if relaxed or e.learn != "coefficients" else 1
    looks = n * (1 + (relaxed and p.accept_if_better) + p.rematerialize) + held_out
    if e.learn == "times" and p.patience:  # a look at the others after every step, too
        looks += held_out * math.ceil(n / p.batch_size_alt)
    return {
        "forward": e.nfe * (n + held_out + passes * looks),
        "backward": (e.nfe - still) * passes * n,
    }


def evaluations_a_pass(nfe: int, params: Params) -> int:
    """Return how many samples the network sees in one pass of Gauss-Newton over the pairs.

    Where each step finds a lower loss at once; up to three more losses may be tried.
    """
    # A number that is learned costs every later call: before call i there are 3 i - 1 states, times
    # and levels and i (i + 1) / 2 weights, and the call's own time has a slope.
    derivatives = sum(3 * i + i * (i + 1) // 2 for i in range(1, nfe))
    n, size = params.n_train_alt, params.newton_batch_size
    steps = min(SMALL_STEPS, n / max(1, size // 4)) + max(0, n - SMALL_STEPS * (size // 4)) / size
    looks = math.ceil(steps / STEPS_AN_EPOCH)
    return n * (2 * nfe + derivatives) + looks * params.n_valid_alt * nfe


def seconds_a_call(setup: Setup) -> float:
    """Return how long the network takes for one sample, in a call of sample_batch_size of them."""
    grid = time_uniform(setup.schedule, 1)
    solver, seeds = Solver(ddim(grid), grid), range(setup.params.sample_batch_size)
    for _ in range(2):  # the first is slower
        began = time.perf_counter()
        for x in sample_batches(solver, setup, seeds, "measuring"):
            x.cpu()
        each = (time.perf_counter() - began) / len(seeds)
    return each


@torch.no_grad()
def seconds_an_image(setup: Setup) -> float:
    """Return how long decoding a sample and taking its features takes, in such a batch."""
    x = torch.zeros(setup.params.sample_batch_size, *setup.shape)
    for _ in range(2):
        began = time.perf_counter()
        setup.feature_sums([x])
        each = (time.perf_counter() - began) / len(x)
    return each


def told(total: Mapping[str, int]) -> Iterator[str]:
    """Yield lines that say what `cost` returned."""
    yield f"{total['runs']:15,} runs, for which {total['learned']:,} solvers are learned"
    if total["bounded"]:
        yield f"{total['bounded']:15,} of these by Gauss-Newton, whose count is an upper bound"
    yield f"{total['forward']:15,} network evaluations, one a sample and call (guidance included)"
    yield f"{total['backward']:15,} of them differentiated"
    yield f"{total['images']:15,} images of which features are taken"
    disk = [total[n] / 1e9 for n in ("bytes", "passing")]
    yield f"{disk[0]:15.1f} GB of disk, and {disk[1]:.1f} GB while a run is under way"


def hours(total: Mapping[str, int], setup: Setup) -> float:
    """Return about how long that takes on the setup's device, from a short measurement there."""
    calls = total["forward"] + BACKWARD * total["backward"]
    seconds = calls * seconds_a_call(setup) + total["images"] * seconds_an_image(setup)
    return seconds / 3600


def by_dataset(experiments: Sequence[Experiment]) -> dict[str, list[Experiment]]:
    """Return the experiments of each dataset, in order."""
    return {name: [e for e in experiments if e.dataset == name]
            for name in dict.fromkeys(e.dataset for e in experiments)}  # fmt: skip
