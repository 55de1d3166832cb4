"""DPM-Solver-v3 (Zheng et al. 2023): three statistics of the model choose what is held constant.

In y = x / alpha and lam = ln(alpha / sigma) the probability-flow ODE is

    dy/dlam = -l y - f,      f = e^-lam eps - l y,      df/dlam ~ s f + b along its solutions

for any l, s and b that depend on lam alone: where the last is exact, so is one step. Constant
data predictions are (l, s, b) = (1, 0, 0), constant noise predictions (0, -1, 0). The empirical
model statistics are, for every entry of a sample, the l that removes what f depends on y linearly
and the s and b that predict df/dlam best. (This s is theirs; the noise level is e^-lam here.)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..denoiser import forward_mode
from ..errors import UsageError, choose, progress
from ..grid import TimeGrid, time_logsnr
from ..published import step_orders
from ..setup import Setup
from ..solver import Coefficients

# --- The statistics ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """lam (M,), rising; l, s and b (M, *shape), shape of one sample or () for scalars; float64.

    Linear in lam between the points. `vars` gives its tensors by name, as files keep them.
    Raises UsageError for other shapes or numbers not finite.
    """

    lam: Tensor
    l: Tensor  # noqa: E741  the paper's letter
    s: Tensor
    b: Tensor

    def __post_init__(self):
        if self.lam.ndim != 1 or len(self.lam) < 2 or not (self.lam.diff() > 0).all():
            raise UsageError(f"lam must rise over at least 2 points, not be {self.lam.tolist()}")
        shapes = {name: tuple(getattr(self, name).shape) for name in ("l", "s", "b")}
        if len(set(shapes.values())) > 1 or self.l.shape[:1] != self.lam.shape:
            raise UsageError(f"l, s and b need one shape, ({len(self.lam)}, ...), not {shapes}")
        if not all(table.isfinite().all() for table in (self.lam, self.l, self.s, self.b)):
            raise UsageError("the statistics must be finite: check the denoiser from T to t_min")

    def at(self, lam: Tensor) -> Tensor:
        """Return l, s and b at lam (n,), (3, n, *shape); the end segments go on beyond the ends."""
        right = torch.searchsorted(self.lam, lam).clamp(1, len(self.lam) - 1)
        u = (lam - self.lam[right - 1]) / (self.lam[right] - self.lam[right - 1])
        tables = torch.stack([self.l, self.s, self.b])
        return tables[:, right - 1].lerp(tables[:, right], u.view(-1, *[1] * (self.l.ndim - 1)))


def model_statistics(
    setup: Setup, x_0: Tensor, points: int = 60, seed: int = 0, seeds: Tensor | None = None
) -> ModelStatistics:
    """Measure the statistics of setup.denoiser at `points` values of lam, evenly from T to t_min.

    x_0 (n, *setup.shape): clean samples, the teacher's or data; `seeds` (n,) are those of their
    conditions, if the model has any. Every point takes x_t from the
    same noise and traces the Jacobian with the same signs, so that l is smooth in lam. Costs
    2 points * n calls in forward mode, each some 3 plain ones. Zheng et al. (App. C) take 1200
    points and 4096 samples on CIFAR-10, 250 and 1024 for Stable Diffusion. Raises UsageError for
    other shapes, less than 2 samples or 4 points, and a denoiser without a derivative.
    """
    from scipy.interpolate import CubicSpline

    if x_0.shape[1:] != tuple(setup.shape) or len(x_0) < 2 or points < 4:
        raise UsageError(
            f"the statistics need at least 4 points and 2 samples of shape {tuple(setup.shape)}, "
            f"not {points} points and x_0 of shape {tuple(x_0.shape)}"
        )
    if setup.condition is not None and seeds is None:
        raise UsageError(f"{setup.name} needs each sample's condition: give the seeds of x_0")
    lam = time_logsnr(setup.schedule, points - 1).lam
    generator, x_0 = torch.Generator().manual_seed(seed), x_0.double().cpu()
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    signs = 2 * torch.randint(2, x_0.shape, generator=generator).double() - 1
    seeds = torch.zeros(len(x_0)) if seeds is None else seeds
    batches = [x.split(setup.params.sample_batch_size) for x in (seeds, x_0, noise, signs)]
    slopes: list[Tensor] = []
    means: list[Tensor] = []
    covariances: list[Tensor] = []
    for point in progress(lam, desc="model statistics"):
        found = [
            _predictions(setup, point, batch.tolist(), *(x.to(setup.device) for x in pairs))
            for batch, *pairs in zip(*batches, strict=True)
        ]
        *three, trace = (torch.cat(values).cpu() for values in zip(*found, strict=True))
        predictions = torch.stack(three)
        slopes.append(trace.mean(0))
        means.append(predictions.mean(1))
        centered = predictions - means[-1][:, None]
        covariances.append(torch.einsum("in...,jn...->ij...", centered, centered) / len(x_0))
    m, mean, covariance = torch.stack(slopes), torch.stack(means), torch.stack(covariances)
    if not m.any():
        raise UsageError(
            "the denoiser hides its derivative: take torch.no_grad and detach out of it"
        )
    m_dot = torch.from_numpy(CubicSpline(lam, m)(lam, 1))
    # With m = 1 - l and dy/dlam = D - y, both f and its derivative are sums over y, D, dD/dlam.
    one, zero = torch.ones_like(m), torch.zeros_like(m)
    f, f_dot = torch.stack([m, -one, zero], 1), torch.stack([m_dot - m, m, -one], 1)

    def covary(u: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("pi...,pij...,pj...->p...", u, covariance, v)

    # Where f does not vary there is nothing to regress on: b alone predicts df/dlam.
    varies = covary(f, f) > 1e-12 * (f**2 * covariance.diagonal(0, 1, 2).movedim(-1, 1)).sum(1)
    s = torch.where(varies, covary(f, f_dot) / covary(f, f).where(varies, one), zero)
    return ModelStatistics(lam, 1 - m, s, ((f_dot - s[:, None] * f) * mean).sum(1))


@torch.no_grad()
def _predictions(setup: Setup, lam: Tensor, seeds: list, x_0: Tensor, noise: Tensor, signs: Tensor):
    """y, D, dD/dlam along the ODE, and one estimate of the diagonal of dD/dy, each like x_0."""
    denoiser = setup.denoiser_for(seeds)

    def D(y: Tensor, lam: Tensor) -> Tensor:
        t = setup.schedule.t_of_lam(lam)
        return denoiser(setup.schedule.alpha(t).to(y.device) * y, t)

    jvp: Any = torch.func.jvp
    y = x_0 + (-lam).exp().item() * noise
    with forward_mode():
        prediction, slope = jvp(D, (y, lam), (signs, torch.zeros_like(lam)))
        _, rate = jvp(D, (y, lam), (prediction - y, torch.ones_like(lam)))
    return y, prediction, rate, signs * slope


# --- The table --------------------------------------------------------------------------------


def dpm_solver_v3(
    grid: TimeGrid,
    statistics: ModelStatistics,
    order: int = 3,
    predictor: str = "full",
    corrector: str = "pseudo",
) -> Coefficients:
    """Return DPM-Solver-v3 of any order up to nfe, which falls to 1 towards the last step.

    "full" takes the polynomial through the kept values, "pseudo" their divided differences as if
    all stood for derivatives at the newest point: of lower order, but calmer. The corrector takes
    as many values as the predictor, a pseudo one an older one too; "none" leaves it out. Zheng et
    al. pair full with pseudo for latent models; on CIFAR-10 full with full up to 8 steps, pseudo
    with full at 5. Raises UsageError for statistics of another range of lam.
    """
    choose("predictor", predictor, ("full", "pseudo"))
    choose("corrector", corrector, ("full", "pseudo", "none"))
    orders, pseudo = step_orders(grid, order, None, True), corrector == "pseudo"
    # The loop's evaluations are f / s, with the s of the times passed to the network.
    integrals, s = _Integrals(statistics, grid.lam), grid.schedule.s(grid.t_model)
    shape = statistics.l.shape[1:]
    tables = torch.zeros(2, grid.nfe, order + 1, *shape, dtype=torch.float64)
    d = torch.zeros(grid.nfe, 2, *shape, dtype=torch.float64)
    for i, p in enumerate(orders):
        newest_first = [i - j for j in range(p)]
        from_i = [i, i + 1, *newest_first[1:]][: p + pseudo]
        for role, points, kind in ((0, newest_first, predictor), (1, from_i, corrector)):
            weights, d[i, role] = integrals.step(i, points, kind == "pseudo")
            columns = [i + role - point for point in points]
            tables[role, i, columns] = weights * _over(s[points] / grid.s.diff()[i], weights)
    tables[1, -1] = 0  # the end point is never evaluated
    if not (tables.isfinite().all() and d.isfinite().all()):
        raise UsageError(
            "the statistics are so large that the table overflows: compute them from more samples "
            "(n_train)"
        )
    return Coefficients(
        tables[0, :, :order],
        None if corrector == "none" else tables[1],
        a=integrals.decay[:, None],
        l=statistics.at(grid.lam[:-1])[0],
        d=d,
    )


class _Integrals:
    """The integrals L, S of l, s and B of e^-S b over lam, which make steps from point to point.

    l, s and b are linear between their points: Gauss's rule on each piece that the points of the
    statistics and of the grid cut out is exact for L and S, and of order 6 for what follows.
    """

    def __init__(self, statistics: ModelStatistics, lam: Tensor):
        first, last = statistics.lam[[0, -1]].tolist()
        if lam[0] < first - 1e-6 or lam[-1] > last + 1e-6:
            raise UsageError(
                f"the statistics cover lam from {first:.6g} to {last:.6g}, the grid runs from "
                f"{lam[0]:.6g} to {lam[-1]:.6g}: compute them for its schedule"
            )
        inside = statistics.lam[(statistics.lam > lam[0]) & (statistics.lam < lam[-1])]
        knots, place = torch.cat([lam, inside]).unique(return_inverse=True)
        self.lam, self.place, width = lam, place[: len(lam)], knots.diff()[:, None]
        self.nodes, self.weights = knots[:-1, None] + width * _NODES, width * _WEIGHTS

        def integral(values: Tensor) -> tuple[Tensor, Tensor]:
            """Of values (P, Q, *shape) at the nodes: up to the nodes, and up to lam."""
            pieces = torch.einsum("pq,pq...->p...", self.weights, values)
            total = torch.cat([torch.zeros_like(pieces[:1]), pieces.cumsum(0)])
            within = torch.einsum("p,rq,pq...->pr...", width[:, 0], _PARTIAL, values)
            return total[:-1, None] + within, total[self.place]

        l, s, b = statistics.at(self.nodes.flatten()).unflatten(1, self.nodes.shape)  # noqa: E741
        (L, self.L), (S, self.S) = integral(l), integral(s)
        self.B_nodes, self.B = integral((-S).exp() * b)
        self.exponent, self.decay = L + S, (-self.L.diff(dim=0)).exp()

    def step(self, i: int, points: list[int], pseudo: bool) -> tuple[Tensor, Tensor]:
        """The weights of f at `points`, i first, and the constant of the step from i to i + 1.

        With L, S, B from point i: y_{i+1} = e^-L (y_i - integral e^(L + S) (g + B) dlam), where
        g = e^-S f - B is constant where s and b predict f, and a polynomial here.
        """
        piece = slice(self.place[i], self.place[i + 1])
        kernel = (self.exponent[piece] - self.L[i] - self.S[i]).exp()
        kernel = kernel * _over(self.weights[piece], kernel)
        powers = [(self.nodes[piece] - self.lam[i]) ** n for n in range(len(points))]
        moments = torch.einsum("npq,pq...->n...", torch.stack(powers), kernel)
        matrix = _polynomial(self.lam[points] - self.lam[i], pseudo)
        shares = torch.einsum("nj,n...->j...", matrix, moments)
        to_g, B = (self.S[i] - self.S[points]).exp(), self.S[i].exp() * (self.B[points] - self.B[i])
        B_nodes = self.S[i].exp() * (self.B_nodes[piece] - self.B[i])
        constant = (shares * B).sum(0) - (kernel * B_nodes).sum((0, 1))
        return -self.decay[i] * shares * to_g, self.decay[i] * constant


def _polynomial(x: Tensor, pseudo: bool) -> Tensor:
    """(p, p): row n gives the coefficient of x^n from the values at x, of which x_0 = 0.

    Pseudo: the n-th divided difference, with which Newton's polynomial would go on from x_0.
    """
    p = len(x)
    if not pseudo:
        return torch.linalg.inv(x[:, None] ** torch.arange(p))
    gaps = x[:, None] - x + torch.eye(p, dtype=x.dtype)
    matrix = torch.zeros_like(gaps)
    for n in range(p):
        matrix[n, : n + 1] = 1 / gaps[: n + 1, : n + 1].prod(1)
    return matrix


def _over(values: Tensor, table: Tensor) -> Tensor:
    """`values`, shaped to multiply a table of their shape and one sample's."""
    return values.view(*values.shape, *[1] * (table.ndim - values.ndim))


# Gauss-Legendre on [0, 1]: nodes, weights, and the weights of the integrals from 0 to each node.
_Q = torch.arange(3)
_NODES, _WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(len(_Q)))
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2
_POWERS = _NODES[:, None] ** _Q
_PARTIAL = (_NODES[:, None] ** (_Q + 1) / (_Q + 1)) @ torch.linalg.inv(_POWERS)
