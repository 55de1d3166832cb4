"""A self-test: does D(x, t) estimate the x_0 behind x_t = alpha x_0 + sigma eps on its schedule?

A slip between a network and its denoiser (another prediction type, time 0 to 1 for 0 to 999,
sigma for ln sigma, another schedule) raises no error: samples are merely bad, the teacher's first.
"""

import math

import torch
from torch import Tensor

from .base import UsageError, progress
from .grid import time_edm
from .schedule import NoiseSchedule
from .solver import Solver, dpm_solver_pp

# x_0 in units of what a network may predict: a x + b F, with F its answer.
_PREDICTIONS = {
    "eps": ("from_noise_prediction", lambda a, s: (1 / a, -s / a)),
    "x_0": ("from_denoiser", lambda a, s: (0 * a, 1 + 0 * a)),
    "v": ("from_velocity", lambda a, s: (a / (a**2 + s**2), -s / (a**2 + s**2))),
    "eps - x_0": ("from_flow", lambda a, s: (1 / (a + s), -s / (a + s))),
}
# How far a slope may be from 1, on clean samples and on the denoiser's own; how much smaller
# another error must be to count; and the other noise levels told. Of the trained digits and the
# exact mixture the slopes stay within half of this, those of slips do not.
SLOPE, SLOPE_OWN, BETTER, FACTOR = 0.03, 0.08, 0.96, 2.0


@torch.no_grad()
def check_denoiser(
    denoiser, schedule: NoiseSchedule, shape, x_0: Tensor | None = None, seed: int = 0, device="cpu"
) -> None:
    """Raise UsageError, naming the likely cause, if D(x, t) does not denoise on `schedule`.

    x_0 (n, *shape) are clean samples, such as a few images of the training data. With them a wrong
    prediction type is told by name; without, the denoiser draws its own (20 calls), which leaves
    some slips in the time of x_0- and v-predicting networks unseen. Some 14 calls more. Only a
    trained or exact denoiser passes, and one without guidance: a guided one estimates no mean.

    The test: the posterior mean is the best estimate of x_0, so at each of several noise levels
    the regression of eps on its estimate (x - alpha D) / sigma must have slope 1, and neither
    another prediction type nor another noise level told may give a smaller error.
    """
    n = max(4, min(4096, 8192 // math.prod(shape)))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2 * n, *shape, generator=generator, dtype=torch.float64).to(device)
    _check_contract(denoiser, schedule, noise[:n])
    given, doubt = x_0 is not None, ""
    if not given:
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
    told, types = {}, {}  # errors and slopes, level by level
    for s in progress(levels, desc="self-test"):
        y, t = x_0 + s * eps, schedule.t_of_s(s)
        for factor in (1, 1 / FACTOR, FACTOR):
            t_told = schedule.t_of_s(s * factor).clamp(schedule.t_min, schedule.T)
            D = denoiser(schedule.alpha(t_told) * y, t_told)
            told.setdefault(factor, []).append(_error_and_slope(D, x_0, y, eps, s))
            if factor == 1:
                for key, other in _other_types(D, y, schedule.alpha(t), schedule.sigma(t)):
                    types.setdefault(key, []).append(_error_and_slope(other, x_0, y, eps, s))
    now = told.pop(1)
    key = min(types, key=lambda key: _ratio(types[key], now))
    factor = min(told, key=lambda factor: _ratio(told[factor], now))
    off, level, slope = _off(now, levels)
    if _ratio(types[key], now) < BETTER:
        taken_for, sign, true = key
        if given and _off(types[key])[0] < SLOPE_OWN:
            raise UsageError(
                "the denoiser does not denoise, but would if its network, taken to predict "
                f"{taken_for}, predicted {sign}{true}: make it with {_PREDICTIONS[true][0]}"
                + (", with the sign of the network's answer turned" if sign else "")
            )
        doubt = f"read as {sign}{true} for {taken_for}, its network's answer would be nearer x_0"
    if _ratio(told[factor], now) < BETTER:
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


def _check_contract(denoiser, schedule: NoiseSchedule, noise: Tensor) -> None:
    """Shape, finite numbers, an input left alone, and the same answer twice."""
    t = schedule.t_of_s(1.0).clamp(schedule.t_min, schedule.T)
    x = schedule.alpha(t) * 1.4 * noise
    before = x.clone()
    first, second = denoiser(x, t), denoiser(x, t)
    if first.shape != x.shape:
        fault = f"returns shape {tuple(first.shape)} for x of shape {tuple(x.shape)}"
    elif not first.isfinite().all():
        fault = f"returns NaN or infinity at t = {t:.3g}"
    elif not torch.equal(x, before):
        fault = "writes into its input: let it work on a copy"
    elif (first - second).abs().max() > 1e-3 * first.abs().max():
        fault = "answers the same question in two ways: call eval() on its network (dropout?)"
    else:
        return
    raise UsageError(f"the denoiser {fault}; D(x, t) must be an estimate of x_0 like x")


def _samples(denoiser, schedule: NoiseSchedule, noise: Tensor) -> Tensor:
    """x_0 from 20 steps of DPM-Solver++(2M), whatever comes out."""
    grid = time_edm(schedule, 20)
    solver = Solver(dpm_solver_pp(grid, 2), grid)
    points = solver.trajectory(denoiser, schedule.sigma(schedule.T).item() * noise)
    *_, x = progress(points, desc="self-test: samples", total=grid.nfe + 1)
    return x.nan_to_num(1e9).clamp(-1e9, 1e9)


def _error_and_slope(D: Tensor, x_0: Tensor, y: Tensor, eps: Tensor, s: float):
    """Mean square error of D, and the slope of the regression of eps on its estimate."""
    found = (y - D) / s
    slope = (eps * found).mean() / found.square().mean()
    return (D - x_0).square().mean().item(), slope.item()


def _other_types(D: Tensor, y: Tensor, alpha: Tensor, sigma: Tensor):
    """What D would be if the network's answer had been read as another prediction."""
    x = alpha * y
    for taken_for, (_, read) in _PREDICTIONS.items():
        a, b = read(alpha, sigma)
        answer = (D - a * x) / b
        for true, (_, read) in _PREDICTIONS.items():
            a, b = read(alpha, sigma)
            for sign in ("", "-"):
                if (true, sign) != (taken_for, ""):
                    yield (taken_for, sign, true), a * x + (-b if sign else b) * answer


def _ratio(records, reference) -> float:
    """The geometric mean, over the levels, of one error by another."""
    pairs = zip(records, reference, strict=True)
    logs = [math.log((a + 1e-300) / (b + 1e-300)) for (a, _), (b, _) in pairs]
    return math.exp(sum(logs) / len(logs))


def _off(records, levels=None):
    """The largest distance of a slope from 1, where it is, and that slope."""
    levels = levels or [None] * len(records)
    return max((abs(slope - 1), s, slope) for s, (_, slope) in zip(levels, records, strict=True))
