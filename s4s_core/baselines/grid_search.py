"""Searched time grids: found once for a model or its noise schedule, before any solver is."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import UsageError, choose, progress
from ..grid import TimeGrid, grid_at, time_edm, time_uniform
from ..published import exponential_adams, ipndm
from ..schedule import NoiseSchedule, VPDiscrete
from ..solver import trajectory

# --- DMN: a bound on the error that knows the noise schedule alone ---------------------------


def dmn_bound(
    lam: Tensor, weighting: str = "pixel", alone: int = 3, smoothing: float = 0.0
) -> Tensor:
    """Return the bound on the error of a sample that Xue et al. (2024) minimise over lam, (N+1,).

    Step i of the data-form solver of order 3 multiplies what the network errs at point n by some
    J_in; the error there is taken to be sigma / alpha ("pixel") or sigma^2 / alpha ("latent"), of
    a variance preserving model whatever the schedule. The last step and the first `alone` count by
    their Euclidean norms; of the others each point's J are summed with their signs, then
    absolutely, the kink there rounded off over `smoothing`.
    """
    N, scale = len(lam) - 1, lam.exp()
    alpha, sigma = torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
    error = sigma**2 / alpha if weighting == "latent" else sigma / alpha
    # exponential_adams asks a grid for lam only, and these belong to no schedule.
    grid: Any = SimpleNamespace(lam=lam, nfe=N)
    b = exponential_adams(grid, min(3, N)).b
    point = (torch.arange(N)[:, None] - torch.arange(b.shape[1])).clamp(min=0)
    J = scale.diff()[:, None] * b * error[point]
    norms = torch.ones(N, dtype=torch.bool)
    norms[max(alone, 1) : -1] = False
    signed = J.new_zeros(N).index_add(0, point[~norms].flatten(), J[~norms].flatten())
    return J[norms].norm(dim=1).sum() + (signed.square() + smoothing**2).sqrt().sum()


def dmn(schedule: NoiseSchedule, nfe: int, weighting: str = "pixel") -> TimeGrid:
    """Search the grid of Xue et al. (2024): the smallest `dmn_bound`, "pixel" or "latent".

    The bound has kinks, so it is minimised with ever less smoothing, and over the logarithms of
    the gaps, which keeps lam rising. The first three steps count alone at every nfe: with none,
    as the authors have it above 6 steps, errors of opposite signs cancel, the minimum has almost
    all its times at the two ends, and their grid is where their optimiser happened to stop.
    Seconds at nfe = 10.
    """
    from scipy.optimize import minimize

    choose("DMN weighting", weighting, ("pixel", "latent"))
    first, last = time_uniform(schedule, nfe).lam[[0, -1]]

    def lam(gaps: Tensor) -> Tensor:
        u = torch.cat([gaps.new_zeros(1), gaps.softmax(0).cumsum(0)])
        return first + u * (last - first)

    def value_and_slope(gaps, smoothing: float):
        gaps = torch.tensor(gaps, requires_grad=True)
        value = dmn_bound(lam(gaps), weighting, smoothing=smoothing)
        return value.item(), torch.autograd.grad(value, gaps)[0].numpy()

    gaps = torch.zeros(nfe, dtype=torch.float64).numpy()
    for smoothing in progress((1.0, 0.1, 0.01, 0.001), desc="dmn"):
        gaps = minimize(value_and_slope, gaps, (smoothing,), "BFGS", jac=True).x
    return grid_at(schedule, nfe, lambda _: schedule.t_of_lam(lam(torch.tensor(gaps))))


# --- GITS: the path of least cost along the teacher's trajectory -----------------------------


def cheapest_path(cost: Tensor, steps: int, coefficient: float = 1.0) -> list[int]:
    """Return the indices 0 = i_0 < .. < i_steps = M-1 of the least total cost.

    That is the sum over k of coefficient^k cost[i_k, i_(k+1)].
    cost (M, M), read above its diagonal; coefficient > 0. Dynamic programming from the end.
    Raises UsageError for more steps than M - 1, or none.
    """
    last = len(cost) - 1
    if not 1 <= steps <= last:
        raise UsageError(f"a path through {last + 1} points has 1 to {last} steps, not {steps}")
    never = torch.ones_like(cost, dtype=torch.bool).tril()
    cost = cost.masked_fill(never, torch.inf)
    rest, choices = cost[:, -1], []
    for _ in range(steps - 1):
        rest, choice = (cost + coefficient * rest).min(1)
        choices.append(choice)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, last]


def jump_costs(denoiser: Denoiser, x_T: Tensor, grid: TimeGrid) -> Tensor:
    """Return what an Euler step from point i to point j > i adds to the deviation, (M, M).

    The deviation of the teacher's trajectory is its distance from the chord between its ends, in
    y = x / alpha; averaged over x_T (B, ...).
    """
    denoised = []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        denoised.append(denoiser(x, t))
        return denoised[-1]

    alpha, s = (v.to(x_T.device) for v in (grid.schedule.alpha(grid.t), grid.s))
    x = torch.stack(list(trajectory(recorded, x_T, ipndm(grid, 4), grid))).flatten(2).double()
    y = x / alpha[:, None, None]
    eps = (y[:-1] - torch.stack(denoised).flatten(2)) / s[:-1, None, None]
    chord = torch.nn.functional.normalize(y[-1] - y[0], dim=1)

    def across(v: Tensor) -> Tensor:
        return v - (v * chord).sum(2, keepdim=True) * chord

    # |y + h eps|^2 for every h at once: three inner products a point and sample do for all j.
    y, eps = across(y - y[0]), across(eps)
    yy, ye, ee = ((a * b).sum(2)[:, None] for a, b in ((y[:-1], y[:-1]), (y[:-1], eps), (eps, eps)))
    h = (s - s[:-1, None])[..., None]
    jump = (yy + 2 * h * ye + h**2 * ee).clamp(min=0).sqrt()
    deviation = y.norm(dim=2)
    deviation[-1] = 0
    cost = (jump - deviation).mean(2)
    return torch.cat([cost, torch.zeros_like(cost[:1])]).cpu()


def gits(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    nfe: int,
    points: int = 60,
    coefficient: float = 1.15,
    batch_size: int = 64,
) -> TimeGrid:
    """Search the grid of Chen et al. (2024): the cheapest Euler steps between a teacher's times.

    The teacher is iPNDM of order 4 over `points` steps from x_T (B, *shape), uniform in t for
    latent models and EDM's otherwise: `points` calls of denoiser(x, t) a batch. The authors use
    256 samples and a coefficient of 1.15 (1.20 for Stable Diffusion); above 1 it favours small
    costs late. Raises UsageError if nfe is larger than `points`.
    """
    batches = [(denoiser, batch) for batch in x_T.split(batch_size)]
    return gits_over(batches, schedule, nfe, points, coefficient)


@torch.no_grad()
def gits_over(
    batches: Sequence[tuple[Denoiser, Tensor]],
    schedule: NoiseSchedule,
    nfe: int,
    points: int = 60,
    coefficient: float = 1.15,
) -> TimeGrid:
    """Search as `gits` does, over (denoiser, x_T) for batches with denoisers of their own."""
    if nfe > points:
        raise UsageError(f"GITS chooses among {points} steps, so nfe cannot be {nfe}: lower it")
    grid = (time_uniform if isinstance(schedule, VPDiscrete) else time_edm)(schedule, points)
    cost = torch.zeros(points + 1, points + 1, dtype=torch.float64)
    for denoiser, x_T in progress(batches, desc="gits"):
        cost += jump_costs(denoiser, x_T, grid) * len(x_T)
    cost /= sum(len(x_T) for _, x_T in batches)
    return TimeGrid(schedule, grid.t[cheapest_path(cost, nfe, coefficient)])
