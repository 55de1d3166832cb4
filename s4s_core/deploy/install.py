"""Put a solver into a diffusers pipeline, and the pipeline into a folder that can be shared."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, choose, optional_import, write_atomically
from ..models.diffusers_pipeline import PREDICTION_TYPES, alphas_cumprod, own_settings
from ..schedule import NoiseSchedule, RectifiedFlow, VPDiscrete, VPTable
from ..solver import Solver
from .compiled import answering, check_linear
from .family import SolverFamily
from .part import part_of

AnySolver = Solver | SolverFamily | str | Path


def make_scheduler(solver: AnySolver, prediction: str = "epsilon") -> Any:
    """Return an `S4SScheduler` of diffusers that samples as the solver, or the family, does.

    solver      a solver, a family, or a file of either
    prediction  "epsilon", "v_prediction", "sample" or "flow_prediction", as the network has it

    Raises UsageError for a solver with a number for each pixel, for a solver of a flow that scales
    the input of its calls, and for a noise schedule that no network of diffusers has.
    """
    with optional_import("diffusers", "S4SScheduler"):
        from .s4s_scheduler import S4SScheduler
    family = _family(solver)
    choose("prediction", prediction, PREDICTION_TYPES)
    schedule = family.schedule
    if not isinstance(schedule, (VPDiscrete, VPTable, RectifiedFlow)):
        raise UsageError(
            f"a network of diffusers has discrete noise levels or is a flow, not {schedule}: learn "
            "a solver on the setup that from_diffusers gives"
        )
    if isinstance(schedule, RectifiedFlow) != (prediction == "flow_prediction"):
        raise UsageError(
            f"a network of prediction type {prediction} does not go with a solver for {schedule}: "
            "flow_prediction goes with RectifiedFlow, and no other does"
        )
    levels = round(schedule.network_time(1.0).item())
    return S4SScheduler(
        [_numbers(one, prediction) for one in family.solvers],
        prediction,
        levels if isinstance(schedule, RectifiedFlow) else levels + 1,
    )


def _family(solver: AnySolver) -> SolverFamily:
    if isinstance(solver, Solver):
        return SolverFamily([solver])
    return solver if isinstance(solver, SolverFamily) else SolverFamily.load(solver)


@torch.no_grad()
def _numbers(solver: Solver, prediction: str) -> dict[str, Any]:
    """What the scheduler reads of one solver, as its docstring says."""
    check_linear(solver)
    _, grid = solver.coefficients.as_multistep(solver.grid)
    scale = grid.scale.where((grid.scale - 1).abs() > 1e-9, 1.0)  # a learned one may be rounded
    if prediction == "flow_prediction" and (scale != 1).any():
        raise UsageError(
            "this solver scales the input of its first call, which pipelines of flows hand to the "
            "network as it is: learn one without a free first call"
        )
    schedule, N = grid.schedule, grid.nfe
    rows = []
    for first in range(N):
        part, n = part_of(solver, first, N), N - first
        start, answers, changes = torch.eye(2 * n, dtype=torch.float64).split([1, n, n - 1])
        denoiser = answering(answers, prediction, part.grid.schedule)
        points = part.trajectory(denoiser, start[0])
        x, ends = next(points), []
        for change in [torch.zeros_like(x), *changes]:
            x = points.send(x + change)
            ends.append(_without_rounding(x).tolist())
        rows.append([x[: i + 2] + x[n + 1 : n + 1 + i] for i, x in enumerate(ends)])
    return {
        "timesteps": schedule.network_time(grid.t_model[:-1]).tolist(),
        "scale": scale.tolist(),
        "levels": torch.stack([schedule.alpha(grid.t), schedule.sigma(grid.t)], 1).tolist(),
        "rows": rows,
    }


def _without_rounding(weights: Tensor) -> Tensor:
    """The weights, with zero for what cancels: a term that need not be added."""
    return weights.where(weights.abs() > 1e-12 * weights.abs().max(), 0.0)


def install(pipeline: Any, solver: AnySolver, guidance: float | None = None) -> None:
    """Replace the scheduler of a diffusers pipeline by a solver, or by a family of them.

    solver    a solver, a family, or a file of either
    guidance  the guidance_scale that the pipeline will be called with, to be compared with that
              which the solver was learned for: a scheduler cannot see the scale of a call

    Then pipeline(..., num_inference_steps=N) makes N network calls. Samples are equal to those of
    `Solver.sample` on the setup that `from_diffusers` gives. img2img and inpainting begin in the
    middle: steps that lack earlier evaluations are those of `part_of`. Raises UsageError, and
    leaves the pipeline as it is, if the solver was made for other noise levels, another kind of
    prediction or another guidance.
    """
    with optional_import("diffusers", "S4SScheduler"):
        import diffusers
    if not isinstance(pipeline, diffusers.DiffusionPipeline) or not hasattr(pipeline, "scheduler"):
        raise UsageError(
            f"install takes a DiffusionPipeline with a scheduler, not {type(pipeline).__name__}: "
            "load one with DiffusionPipeline.from_pretrained"
        )
    family, old = _family(solver), pipeline.scheduler
    config = own_settings(old)
    prediction = config.get("prediction_type", "epsilon")
    if type(old).__name__.startswith("FlowMatch"):
        prediction = "flow_prediction"
    if prediction != "flow_prediction":
        _check_levels(family.schedule, alphas_cumprod(old))
    for one in family.solvers:
        _check_guidance(one, guidance)
    network = getattr(pipeline, "unet", None)
    if network is not None and network.config.get("time_embedding_type") == "learned":
        raise UsageError(
            f"{type(network).__name__} looks its time up in a table (time_embedding_type learned), "
            "and learned times lie between its entries: sample with Solver.sample"
        )
    new = make_scheduler(family, prediction)
    if (steps := config.get("num_train_timesteps", 1000)) != new.config.num_train_timesteps:
        raise UsageError(
            f"the solver is for a network told times up to {new.config.num_train_timesteps}, but "
            f"the pipeline has num_train_timesteps {steps}: learn a solver for this pipeline"
        )
    new.register_to_config(**config | dict(new.config))
    pipeline.scheduler = new


def _check_levels(schedule: NoiseSchedule, levels: Tensor) -> None:
    """Raise UsageError unless the schedule has these alphas_cumprod, (levels,)."""
    fault = ""
    if not isinstance(schedule, (VPDiscrete, VPTable)):
        fault = f"has {len(levels)} discrete noise levels"
    elif round(schedule.network_time(1.0).item()) + 1 != len(levels):
        fault = f"has {len(levels)} noise levels"
    else:
        t = torch.arange(1, len(levels) + 1, dtype=torch.float64) / len(levels)
        own = schedule.alpha(t) ** 2
        # diffusers multiplies them in float32, or writes 2^-24 for zero.
        differ = (own - levels).abs() > 1e-3 * levels + 1e-7
        if differ.any():
            n = int((own - levels).abs().argmax())
            fault = f"has alphas_cumprod {levels[n]:.4g} at level {n}, where that has {own[n]:.4g}"
            if levels[-1] < 1e-6:
                fault += ", and no signal at its last level (zero terminal SNR)"
    if fault:
        raise UsageError(
            f"the solver was made for {schedule}, but the pipeline {fault}: learn a solver for "
            "this pipeline"
        )


def learned_guidance(solver: Solver) -> float | None:
    """Return the guidance that the solver was learned for; None if it does not say."""
    model = solver.provenance.get("model")
    return model.get("guidance") if isinstance(model, dict) else None


def _check_guidance(solver: Solver, guidance: float | None) -> None:
    """Raise UsageError if the solver says that it was learned for another guidance."""
    learned = learned_guidance(solver)
    if None not in (guidance, learned) and guidance != learned:
        raise UsageError(
            f"the solver with {solver.nfe} network calls was learned for guidance {learned}, not "
            f"{guidance}: sample with {learned}, or learn one for {guidance}"
        )


def save_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Save a pipeline into which a solver is installed, so that it loads without this package.

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True) takes the scheduler's code
    from the folder. What pipeline.save_pretrained writes wants s4s_core.deploy.s4s_scheduler
    imported instead. Raises UsageError if no solver is installed.
    """
    name = "s4s_scheduler"
    if type(getattr(pipeline, "scheduler", None)).__name__ != "S4SScheduler":
        raise UsageError(f"there is no solver in this {type(pipeline).__name__}: install one first")
    if Path(folder).is_file():
        raise UsageError(f"{folder} is a file: name a folder for the pipeline")
    pipeline.save_pretrained(folder)
    shutil.copy(Path(__file__).with_name(f"{name}.py"), Path(folder) / "scheduler")
    index = Path(folder) / "model_index.json"
    entries = json.loads(index.read_text("utf-8"))
    entries["scheduler"][0] = name  # the file beside the scheduler's config
    write_atomically(index, (json.dumps(entries, indent=2) + "\n").encode())
