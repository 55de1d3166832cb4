"""From a diffusers pipeline to a folder for the Hub: what `s4s learn` does."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..denoiser import CallCounter
from ..errors import UsageError, choose, first_line, optional_import, require_whole, writing
from ..evaluate import interval
from ..experiments.cache import try_folder
from ..experiments.cost import evaluations_a_pass, seconds_a_call
from ..experiments.experiment import SEARCHED
from ..experiments.run import BLOCKS, cached_teacher_set, sample_errors
from ..gauss_newton import learn_gauss_newton
from ..models.diffusers_pipeline import from_diffusers
from ..models.networks.latent import read_captions
from ..models.zoo import default_device
from ..params import PRECISIONS
from ..published import Scheme, dpm_solver_pp
from ..setup import Setup
from ..solver import Solver
from .family import SolverFamily
from .hub import save_pretrained
from .install import install

# The settings that are read here; the pipeline decides the others, or nothing does.
TEACHER = {"teacher_solver", "teacher_order", "teacher_grid", "teacher_nfe", "unipc_variant"}
READS = TEACHER | {"n_train_alt", "n_valid_alt", "epochs", "newton_batch_size"}
READS |= {"newton_damping", "jacobian"}
READS |= {"distance", "lpips_net", "lpips_resize", "grid_variable", "offset_fraction"}
READS |= {"sample_batch_size", "fid_samples"}
# Differences need no memory beyond a call's. Decoders and LPIPS are differentiated for each number
# that is learned, which few cards can hold at full size.
DEFAULTS = {"distance": "l2", "jacobian": "differences", "fid_samples": 200}
SEED = 0  # of the pairs and of their order


@dataclass(frozen=True)
class PipelineJob:
    """Solvers that are to be learned for a pipeline, and those that are already there.

    setup    the model, whose name tells it and its conditions from others in the cache
    model    what the solvers say of their model
    record   what they were learned from
    starts   number of network calls -> where learning begins, of those that are missing
    """

    pipeline: Any
    setup: Setup
    model: dict[str, Any]
    record: dict[str, Any]
    starts: dict[int, Solver]
    folder: Path


def prepare(
    pipeline: str | Path,
    folder: str | Path,
    nfes: Sequence[int],
    prompts: str | Path | None = None,
    class_labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    dtype: str = "float32",
    settings: dict[str, Any] | None = None,
    check: bool = True,
) -> PipelineJob:
    """Load a pipeline, and check all that can be checked before hours of learning.

    pipeline      a folder that diffusers wrote, or a repository of the Hub. Weights are read as
                  safetensors alone, and no code of the pipeline's own is run
    folder        where solvers go; those that are there already, of the same model, prompts and
                  settings, are kept
    prompts       a file with a prompt in each line
    class_labels  or the classes of a class-conditional network
    dtype         "float32", "bfloat16" or "float16": that of the network
    settings      entries of `Params` named in READS
    check         run the self-test of `from_diffusers`

    Raises UsageError for what cannot be loaded or learned.
    """
    for nfe in nfes:
        require_whole("nfe", nfe, 1)
    choose("dtype", dtype, PRECISIONS)
    lines = None if prompts is None else read_captions(prompts)
    folder = Path(folder)
    found = _found(folder)
    loaded = _load(pipeline, dtype)
    setup = from_diffusers(loaded, lines, class_labels, guidance, check=check)
    params = setup.params.override_for("s4s learn", READS, DEFAULTS | (settings or {}))
    require_whole("fid_samples", params.fid_samples, 2 * BLOCKS)
    choose("distance", params.distance, ("l2", "lpips"))
    setup = setup.variant(params=params.override(precision=dtype))
    read = {name: value for name, value in asdict(params).items() if name in READS}
    record = {
        "pipeline": Path(pipeline).resolve().name if Path(pipeline).is_dir() else str(pipeline),
        "shape": list(setup.shape),
        "dtype": dtype,
        "seed": SEED,
        "teacher": {name: value for name, value in read.items() if name in TEACHER},
        "settings": {name: value for name, value in read.items() if name not in TEACHER},
    }
    if lines is not None:
        text = "\n".join(lines).encode()
        record["prompts"] = {"count": len(lines), "sha256": hashlib.sha256(text).hexdigest()}
    if class_labels is not None:
        record["class_labels"] = list(class_labels)
    model = setup.model
    for solver in found:
        if [solver.provenance.get(name) for name in ("model", "learned")] != [model, record]:
            raise UsageError(
                f"{folder} holds a solver with {solver.nfe} network calls for another model, or "
                "learned with other prompts or settings: choose another folder, or give what it "
                "was learned with"
            )
    starts = {n: _start(setup, n) for n in sorted({*nfes} - {s.nfe for s in found})}
    if starts:
        _scheduler(loaded, SolverFamily(starts.values()), guidance)
    for nfe in starts:
        _rival(setup, nfe)
    with writing(folder, "choose another folder"):
        try_folder(folder)
    if params.distance == "l2":  # of the latents themselves, if there are any
        setup = setup.variant(decode=lambda x: x)
    digest = hashlib.sha256(repr((model, record)).encode()).hexdigest()[:16]
    setup = setup.variant(name=f"{setup.name}_{digest}")
    return PipelineJob(loaded, setup, model, record, starts, folder)


def _found(folder: Path) -> tuple[Solver, ...]:
    """The solvers that a folder holds; UsageError for a file, and where there are other things."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another folder for the solvers")
    empty = not folder.exists() or not any(folder.iterdir())
    return () if empty else SolverFamily.load(folder).solvers


def _load(pipeline: str | Path, dtype: str) -> Any:
    with optional_import("diffusers transformers", "a diffusers pipeline"):
        from diffusers import DiffusionPipeline
    try:
        loaded = DiffusionPipeline.from_pretrained(
            pipeline, dtype=getattr(torch, dtype), use_safetensors=True
        )
    except Exception as error:  # whatever diffusers makes of a missing or foreign folder
        raise UsageError(
            f"cannot load the pipeline {pipeline} ({first_line(error, 300)}): "
            "give a folder that diffusers wrote, or a repository of the Hub, with safetensors"
        ) from None
    if loaded.dtype != getattr(torch, dtype):
        raise UsageError(
            f"this diffusers loads {pipeline} in {loaded.dtype}, not in {dtype}: pip install "
            "--upgrade diffusers"
        )
    return loaded.to(default_device())


def _scheme(nfe: int) -> Scheme:
    """DPM-Solver++ with room for all evaluations and a weight of the state in each step."""
    return lambda grid: dpm_solver_pp(grid, min(3, nfe)).pad(nfe, 1)


def _start(setup: Setup, nfe: int) -> Solver:
    grid = SEARCHED["dmn"](setup, nfe)
    return Solver(_scheme(nfe)(grid), grid)


def _rival(setup: Setup, nfe: int) -> Solver:
    """The teacher's own method with so many calls."""
    params = setup.params.override(
        teacher_nfe=nfe, teacher_order=min(setup.params.teacher_order, nfe)
    )
    return setup.variant(params=params).teacher


def _scheduler(pipeline: Any, family: SolverFamily, guidance: float) -> Any:
    """The scheduler that the family is in this pipeline, which keeps its own."""
    own = pipeline.scheduler
    install(pipeline, family, guidance)
    made, pipeline.scheduler = pipeline.scheduler, own
    return made


# --- What it costs ----------------------------------------------------------------------------


def estimate(job: PipelineJob) -> Iterator[str]:
    """Yield lines that say what the job will cost: network evaluations, and time on this device.

    The time is that of one network call of sample_batch_size samples, which is made for it.
    """
    setup, params = job.setup, job.setup.params
    each = seconds_a_call(setup)

    def line(what: str, evaluations: int) -> str:
        return f"{what:24} {evaluations:10,} forward, 0 backward, about {each * evaluations:,.0f} s"

    pairs, held_out = params.n_train_alt + params.n_valid_alt, params.fid_samples
    told = f"guidance {params.guidance:g}" if params.guidance != 1 else "no guidance"
    yield f"network evaluations, one a sample and call ({told}), on {setup.device}:"
    yield line(f"teacher, {pairs:,} pairs", pairs * params.teacher_nfe)
    yield line(f"teacher, {held_out} held out", held_out * params.teacher_nfe)
    for nfe in job.starts:
        yield line(f"{nfe} calls, a pass", evaluations_a_pass(nfe, params))
    yield f"Learning ends where the loss no longer falls, after at most {params.epochs} passes."


# --- Learning ---------------------------------------------------------------------------------


def learn_missing(job: PipelineJob) -> Iterator[str]:
    """Learn the solvers that are missing, and write the folder after each; yield a line about each.

    Coefficients and times are learned at once by Gauss-Newton, from DMN's times. What was learned
    before an error or an interruption is in the folder.
    """
    for nfe, start in job.starts.items():
        solver = _learned(job, start)
        family = SolverFamily([*_found(job.folder), solver])
        scheduler = _scheduler(job.pipeline, family, job.setup.params.guidance)
        save_pretrained(family, scheduler, job.folder)
        held_out, cost = solver.provenance["held_out"], solver.provenance["cost"]
        low, high = held_out["interval"]
        worse = " (the published solver is nearer)" if low > 0 else ""
        yield (
            f"{nfe} calls: distance to the teacher {held_out['distance']:.4f}, published "
            f"{held_out['published']:.4f}, difference {low:.4f} to {high:.4f}{worse}; "
            f"{cost['evaluations']:,} forward, {cost['backward']} backward, {cost['seconds']:.0f} s"
        )


def _learned(job: PipelineJob, start: Solver) -> Solver:
    """The solver, which says what it was learned from and how good it is."""
    setup = job.setup
    teacher, began = cached_teacher_set(setup, SEED, alt=True), time.perf_counter()
    counter = CallCounter(setup.denoiser)
    for epoch in learn_gauss_newton(
        start, setup.variant(denoiser=counter), teacher, SEED, scheme=_scheme(start.nfe)
    ):
        best = epoch.best
    cost = {"evaluations": counter.evaluations, "backward": counter.backward}
    provenance = {
        "model": job.model,
        "learned": job.record,
        "held_out": _held_out(setup, best),
        "cost": cost | {"seconds": round(time.perf_counter() - began, 1)},
        "versions": {"s4s_core": __version__, "torch": torch.__version__},
    }
    return replace(best, provenance=provenance)


def _held_out(setup: Setup, solver: Solver) -> dict[str, Any]:
    """How near to the teacher the solver comes, beside what the teacher's own method would do."""
    p, rival = setup.params, _rival(setup, solver.nfe)
    errors = torch.stack([sample_errors(s, setup) for s in (solver, rival)])
    parts = [e.mean(1).sqrt() for e in errors.tensor_split(BLOCKS, 1)]
    learned, published = errors.mean(1).sqrt().tolist()
    return {
        "distance": learned,
        "published": published,
        "interval": interval(torch.stack([ours - theirs for ours, theirs in parts])[None]),
        "rival": f"{p.teacher_solver} of order {p.teacher_order} on the grid {p.teacher_grid}",
        "noises": p.fid_samples,
        "blocks": BLOCKS,
    }
