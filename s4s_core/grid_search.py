"""Searched time grids: found once for a model or its noise schedule, before any solver is."""

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from .base import UsageError, one_of, progress
from .grid import GRIDS, TimeGrid, _grid, time_edm, time_uniform
from .schedule import NoiseSchedule, VPDiscrete
from .solver import exponential_adams, ipndm, trajectory

# --- DMN: a bound on the error that knows the noise schedule alone ---------------------------


def dmn_bound(
    lam: Tensor, weighting: str = "pixel", alone: int = 3, smoothing: float = 0.0
) -> Tensor:
    """The bound on the error of a sample that Xue et al. (2024) minimise over lam, (N+1,).

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
    b = exponential_adams(SimpleNamespace(lam=lam, nfe=N), min(3, N)).b
    point = (torch.arange(N)[:, None] - torch.arange(b.shape[1])).clamp(min=0)
    J = scale.diff()[:, None] * b * error[point]
    norms = torch.ones(N, dtype=torch.bool)
    norms[max(alone, 1) : -1] = False
    signed = J.new_zeros(N).index_add(0, point[~norms].flatten(), J[~norms].flatten())
    return J[norms].norm(dim=1).sum() + (signed.square() + smoothing**2).sqrt().sum()


def dmn(schedule: NoiseSchedule, nfe: int, weighting: str = "pixel") -> TimeGrid:
    """The grid of Xue et al. (2024): the smallest `dmn_bound`, "pixel" or "latent".

    The bound has kinks, so it is minimised with ever less smoothing, and over the logarithms of
    the gaps, which keeps lam rising. The first three steps count alone at every nfe: with none,
    as the authors have it above 6 steps, errors of opposite signs cancel, the minimum has almost
    all its times at the two ends, and their grid is where their optimiser happened to stop.
    Seconds at nfe = 10.
    """
    from scipy.optimize import minimize

    one_of("DMN weighting", weighting, ("pixel", "latent"))
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
    return _grid(schedule, nfe, lambda _: schedule.t_of_lam(lam(torch.tensor(gaps))))


# --- GITS: the path of least cost along the teacher's trajectory -----------------------------


def cheapest_path(cost: Tensor, steps: int, coefficient: float = 1.0) -> list[int]:
    """The indices 0 = i_0 < .. < i_steps = M-1 of least sum_k coefficient^k cost[i_k, i_(k+1)].

    cost (M, M), read above its diagonal; coefficient > 0. Dynamic programming from the end.
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
        path.append(choice[path[-1]].item())
    return [*path, last]


def jump_costs(denoiser, x_T: Tensor, grid: TimeGrid) -> Tensor:
    """(M, M): what one Euler step from point i to point j > i adds to the teacher's deviation.

    The deviation is the distance from the chord between the ends of the teacher's trajectory, in
    y = x / alpha; its mean over x_T (B, ...).
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
    denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    nfe: int,
    points: int = 60,
    coefficient: float = 1.15,
    batch_size: int = 64,
) -> TimeGrid:
    """The grid of Chen et al. (2024): the cheapest nfe Euler steps between times of a teacher.

    The teacher is iPNDM of order 4 over `points` steps from x_T (B, *shape), uniform in t for
    latent models and EDM's otherwise: `points` calls of denoiser(x, t) a batch. The authors use
    256 samples and a coefficient of 1.15 (1.20 for Stable Diffusion); above 1 it favours small
    costs late. Raises UsageError if nfe is larger than `points`.
    """
    batches = [(denoiser, batch) for batch in x_T.split(batch_size)]
    return gits_over(batches, schedule, nfe, points, coefficient)


@torch.no_grad()
def gits_over(
    batches, schedule: NoiseSchedule, nfe: int, points: int = 60, coefficient: float = 1.15
) -> TimeGrid:
    """`gits` over a list of (denoiser, x_T), where each batch has a denoiser of its own."""
    if nfe > points:
        raise UsageError(f"GITS chooses among {points} steps, so nfe cannot be {nfe}: lower it")
    grid = (time_uniform if isinstance(schedule, VPDiscrete) else time_edm)(schedule, points)
    cost = torch.zeros(points + 1, points + 1, dtype=torch.float64)
    for denoiser, x_T in progress(batches, desc="gits"):
        cost += jump_costs(denoiser, x_T, grid) * len(x_T)
    cost /= sum(len(x_T) for _, x_T in batches)
    return TimeGrid(schedule, grid.t[cheapest_path(cost, nfe, coefficient)])


# --- Published lists ---------------------------------------------------------------------

# Noise levels sigma / alpha between the models' own first and last (Sabour et al. 2024).
_AYS = {
    "sd15": [6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152],
    "sdxl": [6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113],
}


# GITS for Stable Diffusion 1.5 at guidance 7.5, as Tong et al. (2024) list it in their code.
_GITS_SD15 = {
    3: [14.6146, 1.7083, 0.532, 0.0292],
    4: [14.6146, 3.1131, 1.0421, 0.3811, 0.0292],
    5: [14.6146, 4.39, 1.5286, 0.6526, 0.2667, 0.0292],
    6: [14.6146, 4.7242, 1.9132, 0.9324, 0.4557, 0.1801, 0.0292],
    8: [14.6146, 6.4477, 2.7391, 1.4467, 0.8319, 0.4936, 0.2667, 0.1258, 0.0292],
    10: [14.6146, 5.9489, 3.3251, 2.0267, 1.2969, 0.8319, 0.5712, 0.3811, 0.2255, 0.1258, 0.0292],
}


def gits_sd15(schedule: NoiseSchedule, nfe: int) -> TimeGrid:
    """GITS's grid for iPNDM on Stable Diffusion, already found: no search, and no model needed.

    UsageError for another schedule, or a number of calls that has no list.
    """
    if schedule != VPDiscrete() or nfe not in _GITS_SD15:
        raise UsageError(
            f"GITS is listed for {VPDiscrete()} and nfe {', '.join(map(str, _GITS_SD15))}, not for "
            f"{schedule} and nfe {nfe}: search it with gits"
        )
    levels = torch.tensor(_GITS_SD15[nfe], dtype=torch.float64)
    return _grid(schedule, nfe, lambda _: schedule.t_of_s(levels))


def ays(schedule: NoiseSchedule, nfe: int, model: str = "sd15") -> TimeGrid:
    """The grid of Sabour et al. (2024) for Stable Diffusion 1.5 ("sd15") or XL ("sdxl").

    Published for 10 steps; any other number interpolates the logarithms of the noise levels
    linearly, as the authors advise. UsageError for a schedule other than Stable Diffusion's.
    """
    levels = one_of("AYS model", model, _AYS)
    if schedule != VPDiscrete():
        raise UsageError(
            f"there is no AYS grid for {schedule}, only for Stable Diffusion's {VPDiscrete()}: "
            "choose another grid"
        )
    first, last = time_uniform(schedule, 1).lam.split(1)
    knots = torch.cat([first, -torch.tensor(levels, dtype=torch.float64).log(), last])

    def times(u: Tensor) -> Tensor:
        position = u * (len(knots) - 1)
        left = position.long().clamp(max=len(knots) - 2)
        return schedule.t_of_lam(knots[left] + (position - left) * knots.diff()[left])

    return _grid(schedule, nfe, times)


# Grids that need no more than a noise schedule and nfe.
PUBLISHED = {
    **GRIDS,
    "ays_sd15": partial(ays, model="sd15"),
    "ays_sdxl": partial(ays, model="sdxl"),
    "gits_sd15": gits_sd15,
}
