"""The settings of a model and of all that learns for it: one line says all about each.

params/<dataset>.yaml holds them for a data set, with the source of every value beside it.
"""

import math
import re
import textwrap
from collections.abc import Collection
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError, choose, read_file, shown
from .grid import GRIDS, VARIABLES
from .objective import SMALLEST_SIDE
from .published import SOLVERS
from .schedule import NAMED_SCHEDULES

PACKAGE = Path(__file__).parent
# Beside the package in a checkout, inside it once installed from a wheel.
PARAMS = next(p for p in (PACKAGE.parent / "params", PACKAGE / "params") if p.is_dir())
FULL = "full"  # the preset of all files: their settings as they stand


def setting(
    default: Any,  # MISSING: must be given
    about: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: Collection[str] = (),
    of_the_model: bool = False,
) -> Any:
    """Return the dataclass field of a setting.

    about         what it is, and its unit
    above, at_least, at_most  the bounds of a number, or of every number of a list
    choices       the names that a text may be
    of_the_model  the model is built with it; other settings can change afterwards
    """
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    metadata = {"about": about, "choices": choices, "of_the_model": of_the_model, **bounds}
    return field(default=default, metadata=metadata)


PRECISIONS = ("float32", "bfloat16", "float16")
LEARNERS = ("first_order", "gauss_newton")
JACOBIANS = ("differences", "jvp", "auto")
DISTANCES = ("l2", "psnr", "lpips", "features")
COUNTED = ("coefficients", "learned")


@dataclass(frozen=True)
class Params:
    """All settings; hashable, and checked when made.

    Raises UsageError, naming the setting, for a value of another type or out of bounds.
    """

    # fmt: off
    # The model
    schedule: str = setting(MISSING, "noise schedule", choices=NAMED_SCHEDULES, of_the_model=True)
    shape: tuple[int, ...] = setting(MISSING, "of one sample", above=0, of_the_model=True)
    checkpoint: str = setting("", "file of a bundled network", of_the_model=True)
    url: str = setting("", "address of the checkpoint", of_the_model=True)
    sha256: str = setting("", "of the checkpoint; empty where none is published", of_the_model=True)
    files: tuple[str, ...] = setting((), "addresses or paths of further files", of_the_model=True)
    averaged_weights: bool = setting(True, "those averaged over training (EMA)", of_the_model=True)
    guidance: float = setting(1.0, "scale of classifier-free guidance", above=0, of_the_model=True)
    precision: str = setting("float32", "of the network", choices=PRECISIONS, of_the_model=True)
    # The teacher
    teacher_solver: str = setting("unipc", "published solver of the teacher", choices=SOLVERS)
    teacher_order: int = setting(3, "evaluations that a step of the teacher uses", above=0)
    teacher_grid: str = setting("logsnr", "time grid of the teacher", choices=GRIDS)
    teacher_nfe: int = setting(20, "network calls of the teacher", above=0)
    unipc_variant: str = setting("bh1", "B(h) of UniPC", choices=("bh1", "bh2"))
    # Pairs of noise and teacher sample
    n_train: int = setting(700, "pairs that teach", above=0)
    n_valid: int = setting(200, "pairs that choose the best solver", above=0)
    n_train_alt: int = setting(1400, "pairs that teach where times are learned", above=0)
    n_valid_alt: int = setting(400, "pairs that choose where times are learned", above=0)
    batch_size: int = setting(20, "pairs a step", above=0)
    batch_size_alt: int = setting(40, "pairs a step where times are learned", above=0)
    # Length
    epochs: int = setting(10, "passes over the pairs; of gauss_newton at most", above=0)
    rounds: int = setting(8, "K of Alg. 2", above=0)
    phase_epochs: int = setting(2, "passes over the pairs in a phase of Alg. 2", above=0)
    first_phase: str = setting("phi", "block that Alg. 2 begins with", choices=("phi", "xi"))
    patience: int = setting(0, "steps without a gain until LD3 slows down; 0: cosine", at_least=0)
    # Objective
    distance: str = setting("lpips", "d of Eq. 6", choices=DISTANCES)
    lpips_net: str = setting("vgg", "trunk of LPIPS", choices=SMALLEST_SIDE)
    lpips_resize: int = setting(0, "pixels a side to enlarge to for LPIPS; 0: none", at_least=0)
    gamma: float = setting(0.0242, "r = gamma d m^(-5/2), in units of sigma_T", at_least=0)
    m_counts: str = setting("coefficients", "what m is the number of", choices=COUNTED)
    accept_if_better: bool = setting(True, "keep a new x'_T only if its loss fell")
    # The learner of experiments, and Gauss-Newton
    learner: str = setting("first_order", "by what experiments learn", choices=LEARNERS)
    free_first_call: bool = setting(False, "gauss_newton moves the level of the first call, too")
    newton_batch_size: int = setting(32, "pairs a step", above=0)
    newton_damping: float = setting(1e-2, "first damping of a step, of the diagonal", above=0)
    jacobian: str = setting("auto", "of the network, for gauss_newton", choices=JACOBIANS)
    # Optimisers
    lr_phi: float = setting(1e-2, "rate of the coefficients, a step of Adam", above=0)
    lr_xi: float = setting(5e-3, "rate of the times, a step of RMSprop", above=0)
    lr_xi_c: float = setting(0.1, "rate of the network's times, SGD, divided by N", at_least=0)
    lr_x: float = setting(6.0, "rate of x'_T in unit noise, SGD, divided by N", at_least=0)
    grad_clip: float = setting(1.0, "largest norm of a block's gradient", above=0)
    peak_decay: float = setting(0.8, "of the rates, from a round of Alg. 2 to the next", above=0)
    # Parametrisation
    time_dependent: bool = setting(True, "one row of coefficients a step, not one for all")
    consistent: bool = setting(False, "rows of b sum to 1")
    states: int = setting(0, "earlier states that a step may weigh; 0 is Eq. 5", at_least=0)
    grid_variable: str = setting("lam", "what App. E rescales", choices=VARIABLES)
    offset_fraction: float = setting(0.5, "alpha of E.2, a share of the gap", at_least=0, at_most=1)
    gits_coefficient: float = setting(1.15, "above 1 GITS wants small costs late", above=0)
    statistics_points: int = setting(60, "values of lam that dpm_solver_v3 measures", at_least=4)
    statistics_samples: int = setting(0, "for these; 0 takes the n_train pairs", at_least=0)
    ld3_order: int = setting(3, "order of the solver that an ld3 grid is learned for", above=0)
    ld3_start: str = setting("logsnr", "grid that an ld3 grid starts from", choices=GRIDS)
    rematerialize: bool = setting(False, "compute activations again in the backward pass")
    # Evaluation
    fid_samples: int = setting(50_000, "samples, of seeds from 0", above=0)
    fid_blocks: int = setting(1, "sets of fid_samples samples, for an interval", above=0)
    fid_reference: str = setting("", "statistics of the real data", of_the_model=True)
    fid_offset: float = setting(128.0, "pixels are 127.5 x + this", above=0, of_the_model=True)
    sample_batch_size: int = setting(100, "samples a network call without gradients", above=0)
    nfes: tuple[int, ...] = setting((), "network calls a sample, of whole tables", above=0)
    # fmt: on

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))

    def override(self, **settings: Any) -> "Params":
        """Return a copy with some settings replaced; None leaves one as it is."""
        check_names(settings)
        return replace(self, **{k: v for k, v in settings.items() if v is not None})

    def override_for(self, function: str, reads: Collection[str], settings: dict) -> "Params":
        """Return `override(**settings)`, after refusing what `function` does not read."""
        check_names(settings)
        for name in settings:
            if name not in reads:
                raise UsageError(
                    f"{function} does not read {name} ({_about(name)}): leave it out; it reads "
                    f"{', '.join(sorted(reads))}"
                )
        return self.override(**settings)

    def of_the_model(self) -> "Params":
        """Return what the model is built with, all other settings at their defaults."""
        return Params(**{name: getattr(self, name) for name in OF_THE_MODEL})


def check_names(settings: dict) -> None:
    """Raise UsageError unless every key is the name of a setting."""
    for name in settings:
        choose("setting", name, {f.name for f in fields(Params)})


OF_THE_MODEL = tuple(f.name for f in fields(Params) if f.metadata["of_the_model"])


def _about(name: str) -> str:
    return next(f.metadata["about"] for f in fields(Params) if f.name == name)


def _checked(f: Field, value: Any) -> Any:
    """Return the value of a setting in its own type; UsageError if it cannot be one."""
    kinds: Any = {tuple[int, ...]: int, tuple[str, ...]: str}
    listed = f.type in kinds
    kind: Any = kinds[f.type] if listed else f.type
    if f.type is float and type(value) is int:
        value = float(value) if abs(value) < 2**63 else math.inf
    if listed and isinstance(value, list):
        value = tuple(value)
    if listed and not (type(value) is tuple and all(type(v) is kind for v in value)):
        names = {int: "whole numbers", str: "addresses or paths"}
        raise UsageError(f"{f.name} must list {names[kind]}, not {shown(value)}")
    if listed and f.default is MISSING and not value:
        raise UsageError(f"{f.name} must list at least one number")
    if not listed and type(value) is not kind:
        raise UsageError(_wrong_type(f.name, kind, value))
    if f.metadata["choices"]:
        choose(f.name, value, f.metadata["choices"])
    above, at_least, at_most = (f.metadata[n] for n in ("above", "at_least", "at_most"))
    for number in value if listed else [value]:
        if kind is int and abs(number) > 2**63:
            raise UsageError(f"{f.name} is far too large: it must be below 2^63")
        if kind is float and not abs(number) < float("inf"):
            raise UsageError(f"{f.name} must be finite, not {number}")
        if above is not None and not number > above:
            raise UsageError(f"{f.name} must be above {above}, not {number}")
        if at_least is not None and not number >= at_least:
            raise UsageError(f"{f.name} must be at least {at_least}, not {number}")
        if at_most is not None and not number <= at_most:
            raise UsageError(f"{f.name} must be at most {at_most}, not {number}")
    return value


def _wrong_type(name: str, expected: type, value: Any) -> str:
    sentence = f"{name} must be of type {expected.__name__}, not {shown(value)}"
    if isinstance(value, str) and expected in (int, float):
        try:
            number = float(value)
        except ValueError:
            return sentence
        # YAML 1.1 reads 1e-4, without a point, as text, and 010 as 8, which is text here.
        if expected is float and math.isfinite(number):
            return f"{sentence}: write it as a number with a decimal point, {number:.1e}"
        if expected is int and number.is_integer() and abs(number) < 2**53:
            return f"{sentence}: write it in decimal digits, as in {number:.0f}"
    return sentence


def datasets() -> list[str]:
    """Return the names of the files in params/."""
    return sorted(p.stem for p in PARAMS.glob("*.yaml"))


def load_params(dataset: str, preset: str = FULL) -> Params:
    """Return the settings of params/<dataset>.yaml, those of `preset` replaced.

    Raises UsageError, naming the file and the setting at fault.
    """
    settings, presets, _ = _read(_path(dataset))
    return Params(**settings | _preset(dataset, presets, preset))


def read_params(path: str | Path) -> Params:
    """Return the settings of one YAML file, checked; UsageError names the file and the setting."""
    return Params(**_read(path)[0])


def settings_for(
    dataset: str, settings: dict | None = None, preset: str = "", **single: Any
) -> dict[str, Any]:
    """Return what replaces the settings of a data set: those of a preset, then one's own.

    settings  data set -> its settings, as notebooks have them
    preset    a name in `presets` of params/<dataset>.yaml, or "full" for the settings as they
              stand there; empty takes the one that the file itself names as its `preset`
    single    settings by name; None leaves one as it is

    Raises UsageError for anything else.
    """
    _, presets, usual = _read(_path(dataset))
    chosen = _preset(dataset, presets, preset or usual)
    for name, own in settings.items() if isinstance(settings, dict) else [(settings, None)]:
        if settings is not None and (name not in datasets() or not isinstance(own, dict)):
            raise UsageError(
                f"settings must map datasets to settings, as in {{{dataset}: {{epochs: 3}}}}, not "
                f"{shown(settings)}; datasets are {', '.join(datasets())}"
            )
    own = (settings or {}).get(dataset, {})
    return chosen | own | {k: v for k, v in single.items() if v is not None}


def _path(dataset: str) -> Path:
    choose("dataset", dataset, datasets())
    return PARAMS / f"{dataset}.yaml"


def _preset(dataset: str, presets: dict[str, dict], preset: str) -> dict:
    return choose(f"preset of {dataset}", preset, {FULL: {}, **presets})


LARGEST_FILE = 10**5  # bytes of YAML; params/ has files of 4000


class _PlainLoader(yaml.SafeLoader):
    """YAML's text, numbers, lists and mappings alone, in decimal digits, and each key once.

    Aliases can stand for billions of values, and tags for values that no setting has.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem="aliases and tags are not read here", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a name", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{shown(key.value)} is here twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 also reads 010 as 8, 1:30 as 90 and 2020-01-01 as a date; here these are text.
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] in ("bool", "null")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _form in {
    "int": r"[-+]?(0|[1-9][0-9]{0,99})$",
    "float": r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|\.(inf|nan))$",
}.items():
    _PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(_form), list("-+.0123456789")
    )


def read_yaml(text: str | bytes, source: str | Path) -> Any:
    """Return the value of a YAML text of plain values; UsageError, naming its source, if none."""
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.YAMLError as error:
        reason = textwrap.shorten(str(error), 300)
    except RecursionError:
        reason = "lists in lists without end"
    except (ValueError, OverflowError):
        reason = "it names a character that does not exist"
    raise UsageError(f"{source} is not readable YAML ({reason})")


def _read(path: str | Path) -> tuple[dict, dict[str, dict], str]:
    """Return the settings of a file, its presets, and the preset that notebooks take."""
    return _checked_entries(read_file(path, LARGEST_FILE), path)


@lru_cache  # a table of runs asks for the same file hundreds of times, 10 ms each
def _checked_entries(text: bytes, path: str | Path) -> tuple[dict, dict[str, dict], str]:
    entries = read_yaml(text, path)
    if not isinstance(entries, dict):
        raise UsageError(f"{path} must be a YAML mapping from keys to values")
    presets, usual = entries.pop("presets", {}), entries.pop("preset", FULL)
    try:
        if not isinstance(presets, dict) or not all(type(n) is str and n != FULL for n in presets):
            raise UsageError(f"presets must map names other than {FULL} to settings")
        for name in ("schedule", "shape"):
            if not entries.get(name):
                raise UsageError(f"{name} is missing")
        for own in ({}, *presets.values()):
            if not isinstance(own, dict):
                raise UsageError(f"a preset must map settings to values, not be {shown(own)}")
            check_names(entries | own)
            Params(**entries | own)
        choose("preset", usual, {FULL: {}, **presets})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return entries, presets, usual
