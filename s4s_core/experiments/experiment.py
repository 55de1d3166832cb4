"""What is run: an `Experiment` names one run, `sweep` lists many."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

from ..baselines.grid_search import dmn, gits_over
from ..baselines.learned import learn_bns, learn_generalised
from ..errors import UsageError, choose, require_whole, shown
from ..gauss_newton import learn_gauss_newton
from ..grid import GRIDS, TimeGrid
from ..learn import Epoch, learn_alternating, learn_coefficients, learn_jointly, learn_times
from ..models.zoo import params_for, reference, weights
from ..params import Params, check_names, datasets
from ..published import SOLVERS, count_steps
from ..schedule import NAMED_SCHEDULES, VPDiscrete
from ..setup import Setup
from ..teacher import SEED_LIMIT, SEEDS_PER_SET, initial_noise
from .cache import cache_path, method

LEARN: dict[str, Callable[..., Iterator[Epoch]] | None] = {
    "none": None,
    "coefficients": learn_coefficients,
    "times": learn_times,
    "alternating": learn_alternating,
    "jointly": learn_jointly,
    "bns": learn_bns,
    "generalised": learn_generalised,
}
# What Gauss-Newton learns where params name it as the learner; the others are first order always.
SECOND_ORDER: dict[str, tuple[str, ...]] = {
    "coefficients": ("phi",),
    "times": ("xi",),
    "jointly": ("phi", "xi"),
}
DPM_SOLVER_V3 = "dpm_solver_v3"  # no entry of SOLVERS: its table needs statistics of the model


def _dmn(setup: Setup, nfe: int) -> TimeGrid:
    weighting = "latent" if isinstance(setup.schedule, VPDiscrete) else "pixel"
    return dmn(setup.schedule, nfe, weighting)


def _gits(setup: Setup, nfe: int) -> TimeGrid:
    first = SEEDS_PER_SET * (SEED_LIMIT + 1)  # noise above every teacher set's and evaluation's
    seeds = range(first, first + 256)  # as many as Chen et al. (2024) use
    size = setup.params.sample_batch_size
    parts = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    batches = [(setup.denoiser_for(part), initial_noise(setup, part)) for part in parts]
    coefficient = setup.params.gits_coefficient
    return gits_over(batches, setup.schedule, nfe, coefficient=coefficient)


# Searched once for a model: they depend on neither solver nor seed. "ld3" depends on both.
SEARCHED = {"dmn": _dmn, "gits": _gits}
GRID_NAMES = [*GRIDS, *SEARCHED, "ld3"]


@dataclass(frozen=True)
class Experiment:
    """What to learn, from where, and how many network calls; see params/ for everything else.

    dataset  a file in params/            grid   a name in GRID_NAMES; "ld3" is learned
    solver   a name in SOLVERS, or DPM_SOLVER_V3
    order    evaluations a step may use, at most nfe
    learn    a name in LEARN              seed   of teacher set, batches and "gaussian"
    settings replaces entries of params/<dataset>.yaml by name; None leaves one as it is

    The settings are read once, when the experiment is made: what a file or a dictionary says later
    does not change it. Raises UsageError for a name, type or combination that cannot be run.
    """

    dataset: str = "digits"
    grid: str = "logsnr"
    solver: str = "ipndm"
    order: int = 3
    nfe: int = 5
    learn: str = "none"
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        choose("dataset", self.dataset, datasets())
        choose("grid", self.grid, GRID_NAMES)
        choose("solver", self.solver, [*SOLVERS, DPM_SOLVER_V3])
        choose("value of learn", self.learn, LEARN)
        for name in ("order", "nfe"):
            require_whole(name, getattr(self, name), 1)
        require_whole("seed", self.seed, 0, SEED_LIMIT - 1)
        if not isinstance(self.settings, dict):
            raise UsageError(f"settings must be a mapping, not {shown(self.settings)}")
        check_names(self.settings)
        object.__setattr__(self, "settings", dict(self.settings))
        if self.order > self.nfe:
            raise UsageError(
                f"order {self.order} needs at least {self.order} network calls, not nfe = "
                f"{self.nfe}: lower the order or raise nfe"
            )
        steps = count_steps(self.solver, self.order, self.nfe)
        if self.solver == DPM_SOLVER_V3 and (self.learn != "none" or self.grid == "ld3"):
            raise UsageError(
                f"{DPM_SOLVER_V3} brings statistics of its own and is not learned: choose learn "
                f"none, not {self.learn}, and a grid other than ld3, not {self.grid}"
            )
        if self.solver in SOLVERS:
            self._check_order()
        schedule = NAMED_SCHEDULES[self.params.schedule]  # checks the settings, too
        if self.grid in GRIDS:  # now rather than after an hour: not each has every schedule
            GRIDS[self.grid](schedule, steps)

    def _check_order(self) -> None:
        published = SOLVERS[self.solver]
        if published.single_step and self.learn in ("bns", "generalised"):
            raise UsageError(
                f"learn = {self.learn} starts at a multistep solver, not at {self.solver}: "
                f"choose {', '.join(name for name, s in SOLVERS.items() if not s.single_step)}"
            )
        highest = published.highest(self.order)
        if self.learn in ("none", "times") and self.order > highest:
            raise UsageError(
                f"{self.solver} is published up to order {highest}: order {self.order} needs "
                "learned coefficients (learn = coefficients, alternating or jointly)"
            )

    @property
    def newton_blocks(self) -> tuple[str, ...]:
        """What Gauss-Newton learns; nothing where first order learns, or none."""
        if self.params.learner == "first_order":
            return ()
        blocks = SECOND_ORDER.get(self.learn, ())
        return (*blocks, "first") if self.params.free_first_call and "xi" in blocks else blocks

    @property
    def learner(self) -> Callable[..., Iterator[Epoch]] | None:
        """The function that learns, or None: one of LEARN, or learn_gauss_newton."""
        if blocks := self.newton_blocks:
            return partial(learn_gauss_newton, blocks=blocks)
        return LEARN[self.learn]

    @cached_property
    def params(self) -> Params:
        """The effective settings."""
        return params_for(self.dataset, self.settings)

    def config(self) -> dict[str, Any]:
        """Return everything that the result depends on, as plain values; loads no network."""
        what = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        params = {k: list(v) if type(v) is tuple else v for k, v in asdict(self.params).items()}
        return {
            **what,
            "params": params,
            "weights": weights(self.dataset, self.params),
            "reference": reference(self.dataset, self.params),
            "method": method(),
        }

    def path(self) -> Path:
        """Return the file of its result, there or not."""
        return cache_path(self.dataset, "result", self.config(), "json")

    def variant(self, **changes: Any) -> "Experiment":
        """Return a copy with some fields replaced and the settings as this one read them."""
        other = replace(self, **changes)
        vars(other)["params"] = self.params
        return other

    @property
    def seeded(self) -> bool:
        """Whether the seed has a part in the result."""
        return (
            self.learn != "none" or self.grid == "ld3" or self.solver in (DPM_SOLVER_V3, "gaussian")
        )


def require_lists(**lists: Any) -> None:
    """Raise UsageError unless every argument is a list, of numbers or of names."""
    for name, values in lists.items():
        kinds = {type(v) for v in values} if isinstance(values, list) else set()
        if not kinds or not (kinds <= {int, float} or kinds == {str}):
            raise UsageError(
                f"{name} must be a list of whole numbers, of decimal numbers or of names, not "
                f"{shown(values)}; with papermill write -y '{name}: [...]', since -p passes a list "
                "as text"
            )


def sweep(settings: dict[str, Any] | None = None, **choices: Any) -> list[Experiment]:
    """Return the experiments of every combination of choices, the last of which varies fastest.

    A choice is a field's value or a list of values. Runs that do not depend on the seed (a
    published solver on a grid that is not learned) appear once, with the first seed. Raises
    UsageError as Experiment does, and for a value that is listed twice.
    """
    for name in choices:
        choose("choice", name, {f.name for f in fields(Experiment)} - {"settings"})
    lists = {k: v if isinstance(v, list) else [v] for k, v in choices.items()}
    for name, listed in lists.items():
        if twice := [v for i, v in enumerate(listed) if v in listed[:i]]:
            raise UsageError(f"{name} must list each value once, not {shown(twice[0])} twice")
    found = []
    for values in product(*lists.values()):
        experiment = Experiment(**dict(zip(lists, values, strict=True)), settings=settings or {})
        if experiment.seeded or experiment.seed == lists.get("seed", [0])[0]:
            found.append(experiment)
    return found
