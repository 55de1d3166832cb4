"""An S4S solver as a sampler of k-diffusion, whose manner ComfyUI and Forge share.

A model there is model(x, sigma (B,), **extra_args) -> D and sees x_t = alpha x_0 + sigma eps as

    x_t / alpha at the level s = sigma / alpha    models of eps or v
    x_t         at the level sigma                flow models, where alpha = 1 - sigma

so that levels, and not times, are what a sampler and a model agree on.
"""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UsageError, require
from ..grid import TimeGrid
from ..schedule import NoiseSchedule, RectifiedFlow
from ..solver import Solver
from .part import part_of


def _unit(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """What k-diffusion divides x_t and sigma by."""
    return torch.ones_like(t) if isinstance(schedule, RectifiedFlow) else schedule.alpha(t)


def sigmas_of(solver: Solver) -> Tensor:
    """Return the N + 1 levels (float64, falling) on which `sample_s4s` samples in N calls.

    The last is not 0: learned steps end where the grid does. Start at noise of the first level.
    """
    require("solver", solver, Solver)
    _, grid = solver.coefficients.as_multistep(solver.grid)
    return grid.schedule.sigma(grid.t) / _unit(grid.schedule, grid.t)


def sample_s4s(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    solver: Solver,
) -> Tensor:
    """Return a sample, like x (B, ...), by `solver` in k-diffusion's manner.

    model     model(x (B, ...), sigma (B,), **extra_args) -> D (B, ...), called once a step
    x         noise of the level sigmas[0], in the view that the model has of it; so is the answer
    sigmas    sigmas_of(solver), or a part of it without gaps: steps that lack the evaluations
              before the part are those of `part_of`
    callback  called after each call with a dict: x and sigma_hat as the model got them, i, sigma
              and denoised
    disable   whether to show no progress bar; None shows it in a terminal only

    Raises UsageError for other sigmas, and as `Solver.sample` does.
    """
    part = part_of(solver, *_place(sigmas_of(solver), sigmas))
    schedule, steps = part.grid.schedule, cycle(range(part.nfe))
    first, last = _unit(schedule, part.grid.t[[0, -1]])
    with tqdm(total=part.nfe, disable=disable) as bar:

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            unit = _unit(schedule, t)
            seen, level = x_t / unit, schedule.sigma(t) / unit
            D = model(seen, level * x.new_ones(len(x)), **(extra_args or {}))
            if callback is not None:
                i = next(steps)
                found = {"x": seen, "i": i, "sigma": sigmas[i], "sigma_hat": level, "denoised": D}
                callback(found)
            bar.update()
            return D

        return part.sample(denoise, first * x) / last


def _place(own: Tensor, sigmas: Tensor) -> tuple[int, int]:
    """The first and the last index of the part of the levels that sigmas is."""
    given = sigmas.detach().cpu().double()
    if given.ndim == 1 and len(given) > 1:
        begin = int((own - given[0]).abs().argmin())
        end = begin + len(given) - 1
        # Pipelines hand levels on in float32, or in half precision.
        rtol = max(1e-5, torch.finfo(sigmas.dtype).eps) if sigmas.is_floating_point() else 0.0
        if end < len(own) and torch.allclose(given, own[begin : end + 1], rtol=rtol, atol=0):
            return begin, end
    raise UsageError(
        f"this solver samples on its own {len(own)} noise levels ({_shortened(own)}) or a part of "
        f"them without gaps, not on {_shortened(given)}: take them from sigmas_of(solver)"
    )


def _shortened(levels: Tensor) -> str:
    texts = [f"{level:.4g}" for level in levels.flatten()[:10].tolist()]
    return ", ".join(texts + ["..."] * (levels.numel() > 10)) or "none"


def snap_to_levels(solver: Solver) -> Solver:
    """Return the solver whose calls are at whole noise levels of its model, each at its own.

    ComfyUI rounds the time of a model of eps or v to such a level, and a network that looks its
    time up in a table knows no other. The steps stay where they are. The coefficients were made for
    other times of call: learn them again, `learn_coefficients` keeps the times. A single-step
    solver becomes the multistep table of its stages. Raises UsageError for a schedule that has no
    levels, or fewer than there are calls.
    """
    coefficients, grid = solver.coefficients.as_multistep(solver.grid)
    N, schedule = grid.nfe, grid.schedule
    levels = getattr(schedule, "levels", 0) or len(getattr(schedule, "alphas_cumprod", ()))
    if levels < N:
        raise UsageError(
            f"{schedule} has {levels or 'no'} whole levels for {N} calls: snap solvers on "
            "VPDiscrete or VPTable, of no more calls than levels; other models do not round times"
        )
    index = torch.arange(N)
    level = (levels * grid.t_model[:-1] - 1).round().clamp(max=levels - 1)  # n lies at (n + 1) / N
    level = level.maximum(N - 1 - index)
    level = (level + index).cummin(0).values - index  # falls by one at least
    t_model = torch.cat([(level + 1) / levels, grid.t_model[-1:]])
    return Solver(
        coefficients,
        TimeGrid(schedule, grid.t, t_model, grid.scale),
        {**solver.provenance, "snapped_to_levels": levels},
    )
