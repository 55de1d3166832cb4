"""A self-test: does D(x, t) estimate the x_0 behind x_t = alpha x_0 + sigma eps on its schedule?

A slip between a network and its denoiser (another prediction type, time 0 to 1 for 0 to 999,
sigma for ln sigma, another schedule) raises no error: samples are merely bad, the teacher's first.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..denoiser import Denoiser, check_contract
from ..errors import UsageError, progress
from ..grid import time_edm
from ..published import dpm_solver_pp
from ..schedule import NoiseSchedule, check_begins_in_noise
from ..solver import Solver

Records: TypeAlias = list[tuple[float, float]]  # of each noise level: mean square error and slope

# What a network may predict -> how to make its denoiser, and the function (alpha, sigma) -> a, b of
# x_0 = a x + b F, where F is the network's answer.
_PREDICTIONS: dict[str, tuple[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
    "eps": ("from_noise_prediction", lambda a, s: (1 / a, -s / a)),
    "x_0": ("from_denoiser", lambda a, s: (0 * a, 1 + 0 * a)),
    "v": ("from_velocity", lambda a, s: (a / (a**2 + s**2), -s / (a**2 + s**2))),
    "eps - x_0": ("from_flow", lambda a, s: (1 / (a + s), -s / (a + s))),
}
# How far a slope may be from 1, on clean samples and on the denoiser's own; how much smaller
# another error must be to count; and by what factor the noise levels that are passed to the
# denoiser are made wrong. The slopes of the trained digits and of the exact mixture stay within
# half of these limits; those of slips do not.
SLOPE, SLOPE_OWN, BETTER, FACTOR = 0.03, 0.08, 0.96, 2.0


@torch.no_grad()
def check_denoiser(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    shape: Sequence[int],
    x_0: Tensor | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> None:
    """Raise UsageError, naming the likely cause, if D(x, t) does not denoise on `schedule`.

    `x_0` (n, *shape) are clean samples, such as a few images of the training data. With them the
    error names a wrong prediction type. Without them the denoiser draws its own samples (20 calls),
    and the test then misses some slips in the time of networks that predict x_0 or v. The test
    itself takes about 14 calls. Only a trained or exact denoiser passes, and only without
    guidance: the answer of a guided one is not the mean of x_0.

    The test rests on the fact that the posterior mean is the best estimate of x_0. At each of
    several noise levels the regression of eps on its estimate (x - alpha D) / sigma must therefore
    have slope 1, and the error must not become smaller when the network's answer is read as another
    prediction type, or when another noise level is passed to the denoiser.
    """
    n = max(4, min(4096, 8192 // math.prod(shape)))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2 * n, *shape, generator=generator, dtype=torch.float64).to(device)
    t = schedule.t_of_s(1.0).clamp(schedule.t_min, schedule.T)
    check_contract(denoiser, schedule.alpha(t) * 1.4 * noise[:n], t)
    given, doubt = x_0 is not None, ""
    if x_0 is None:
        x_0 = _samples(denoiser, schedule, noise[:n])
    elif x_0.shape[1:] != tuple(shape) or not len(x_0):
        raise UsageError(
            f"x_0 must be samples of shape {tuple(shape)}, at least one, not {tuple(x_0.shape)}"
        )
    x_0 = x_0[:n].to(noise)
    rms = x_0.square().mean().sqrt().item()
    if not given and not 0.02 < rms < 5:
        raise _failed(f"the root mean square of its samples is {rms:.2g}, not about 1", given)
    if not given and x_0.std(0).square().mean().sqrt().item() < 0.1 * rms:
        raise _failed("its samples are all alike", given)
    bottom, top = schedule.s(schedule.t_min).item(), schedule.s(schedule.T).item()
    levels = [rms * f for f in (0.5, 1, 2, 4) if bottom < rms * f < top]
    if not levels:
        raise UsageError(
            f"data of root mean square {rms:.2g} do not fit {schedule}, whose sigma / alpha runs "
            f"from {bottom:.2g} to {top:.2g}: scale the data to about 1 or choose another schedule"
        )
    eps = noise[n : n + len(x_0)]
    by_factor: dict[float, Records] = {}  # the denoiser is passed `factor` times the noise level
    by_type: dict[tuple[str, str, str], Records] = {}
    for s in progress(levels, desc="self-test"):
        y, t = x_0 + s * eps, schedule.t_of_s(s)
        for factor in (1, 1 / FACTOR, FACTOR):
            t_passed = schedule.t_of_s(s * factor).clamp(schedule.t_min, schedule.T)
            D = denoiser(schedule.alpha(t_passed) * y, t_passed)
            by_factor.setdefault(factor, []).append(_error_and_slope(D, x_0, y, eps, s))
            if factor == 1:
                for key, other in _other_types(D, y, schedule.alpha(t), schedule.sigma(t)):
                    by_type.setdefault(key, []).append(_error_and_slope(other, x_0, y, eps, s))
    now = by_factor.pop(1)
    key = min(by_type, key=lambda key: _ratio(by_type[key], now))
    factor = min(by_factor, key=lambda factor: _ratio(by_factor[factor], now))
    off, level, slope = _off(now, levels)
    if _ratio(by_type[key], now) < BETTER:
        taken_for, sign, true = key
        if given and _off(by_type[key], levels)[0] < SLOPE_OWN:
            raise UsageError(
                "the denoiser does not denoise, but would if its network, taken to predict "
                f"{taken_for}, predicted {sign}{true}: make it with {_PREDICTIONS[true][0]}"
                + (", with the sign of the network's answer turned" if sign else "")
            )
        doubt = f"read as {sign}{true} for {taken_for}, its network's answer would be nearer x_0"
    if _ratio(by_factor[factor], now) < BETTER:
        doubt = f"it denoises better when told {factor:.2g} times the noise that there is"
    elif off > (SLOPE if given else SLOPE_OWN):
        doubt = (
            f"at sigma / alpha = {level:.2g} the noise it finds must be multiplied by {slope:.2f} "
            "to be nearest to the noise put in"
        )
    if doubt:
        raise _failed(doubt, given)


def _failed(doubt: str, given: bool) -> UsageError:
    return UsageError(
        f"the denoiser does not denoise as its schedule says ({doubt}): check the time that its "
        "network is told (0 to 1 or 0 to 999, sigma or ln sigma), that the schedule is the one it "
        "was trained with, and what it predicts (eps, x_0, v or eps - x_0)"
        + ("" if given else "; with clean samples as x_0 the test can tell more")
    )


def _samples(denoiser: Denoiser, schedule: NoiseSchedule, noise: Tensor) -> Tensor:
    """Samples from 20 steps of DPM-Solver++(2M), with NaN and infinities replaced by numbers."""
    check_begins_in_noise(schedule)
    grid = time_edm(schedule, 20)
    solver = Solver(dpm_solver_pp(grid, 2), grid)
    points = solver.trajectory(denoiser, schedule.sigma(schedule.T).item() * noise)
    *_, x = progress(points, desc="self-test: samples", total=grid.nfe + 1)
    return x.nan_to_num(1e9).clamp(-1e9, 1e9)


def _error_and_slope(
    D: Tensor, x_0: Tensor, y: Tensor, eps: Tensor, s: float
) -> tuple[float, float]:
    """Mean square error of D, and the slope of the regression of eps on its estimate."""
    found = (y - D) / s
    slope = (eps * found).mean() / found.square().mean()
    return (D - x_0).square().mean().item(), slope.item()


def _other_types(
    D: Tensor, y: Tensor, alpha: Tensor, sigma: Tensor
) -> Iterator[tuple[tuple[str, str, str], Tensor]]:
    """What D would be if the network's answer were read as another prediction.

    Pairs ((type it was taken for, "" or "-", type it is read as), D).
    """
    x = alpha * y
    for taken_for, (_, read) in _PREDICTIONS.items():
        a, b = read(alpha, sigma)
        answer = (D - a * x) / b
        for true, (_, read) in _PREDICTIONS.items():
            a, b = read(alpha, sigma)
            for sign in ("", "-"):
                if (true, sign) != (taken_for, ""):
                    yield (taken_for, sign, true), a * x + (-b if sign else b) * answer


def _ratio(records: Records, reference: Records) -> float:
    """The geometric mean, over the levels, of the errors of `records` / those of `reference`."""
    pairs = zip(records, reference, strict=True)
    logs = [math.log((a + 1e-300) / (b + 1e-300)) for (a, _), (b, _) in pairs]
    return math.exp(sum(logs) / len(logs))


def _off(records: Records, levels: Sequence[float]) -> tuple[float, float, float]:
    """(|slope - 1|, level, slope) at the level where the slope is farthest from 1."""
    return max((abs(slope - 1), s, slope) for s, (_, slope) in zip(levels, records, strict=True))
