"""A self-test: does D(x, t) estimate the x_0 behind x_t = alpha x_0 + sigma eps on its schedule?

A slip between a network and its denoiser (another prediction type, time 0 to 1 for 0 to 999,
sigma for ln sigma, another schedule) raises no error: samples are merely bad, the teacher's first.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..denoiser import Denoiser, check_contract
from ..errors import UsageError, progress
from ..grid import time_edm
from ..published import dpm_solver_pp
from ..schedule import NoiseSchedule, check_begins_in_noise
from ..solver import trajectory

Records: TypeAlias = list[tuple[float, float]]  # of each noise level: mean square error and slope

# What a network may predict -> how to make its denoiser, and the function (alpha, sigma) -> a, b of
# x_0 = a x + b F, where F is the network's answer.
_PREDICTIONS: dict[str, tuple[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = {
    "eps": ("from_noise_prediction", lambda a, s: (1 / a, -s / a)),
    "x_0": ("from_denoiser", lambda a, s: (0 * a, 1 + 0 * a)),
    "v": ("from_velocity", lambda a, s: (a / (a**2 + s**2), -s / (a**2 + s**2))),
    "eps - x_0": ("from_flow", lambda a, s: (1 / (a + s), -s / (a + s))),
}
# Noise levels of the test in units of the data, on clean samples and on the denoiser's own, whose
# small details come from the sampler of 20 steps.
LEVELS = {True: (1 / 8, 1 / 4, 1 / 2, 1, 2, 4), False: (1 / 2, 1, 2, 4)}
# What may be wrong on average: the logarithm of the noise level that the network takes to be there,
# the scale of its answers, their offset in units of the data; how far a slope may be from 1; and
# how much smaller another error must be to count. Trained digits and the exact mixture stay within
# two thirds of these limits; those of slips do not.
LIMITS = {
    True: {"level": 0.045, "scale": 0.015, "offset": 0.02, "slope": 0.03},
    False: {"level": 0.075, "scale": 0.04, "offset": 0.03, "slope": 0.08},
}
BETTER = 0.96


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

    `x_0` (n, *shape) are clean samples, such as a few hundred images of the training data. With
    them the error names a wrong prediction type, and the test itself takes about 20 calls. Without
    them the denoiser draws its own samples (20 calls more, and 6 fewer afterwards). Only a trained
    or exact denoiser passes, and only without guidance: the answer of a guided one is not the mean
    of x_0.

    The test rests on the fact that D(x, t) is the mean of x_0 given x. At each of several noise
    levels x_0 - D must therefore be uncorrelated with whatever depends on x alone: with D itself
    (or its scale is wrong), with 1 (its offset), with what D becomes when it is told another noise
    level (that level). The regression of eps on its estimate (x - alpha D) / sigma has slope 1, and
    the error does not become smaller when the network's answer is read as another prediction type.

    On the trained digits it finds with 128 clean samples: noise levels 10 % too large or 5 % too
    small, times off by 10/1000, beta_0 of 0.2 for 0.1 or beta_1 of 15 for 20, answers 2 % too large
    or too small or off by 0.02, samples of a batch mixed. Without clean samples: noise levels 30 %
    too large or too small, answers 5 % too large or too small or off by 0.03. It does not see
    beta_1 of 18 for 20, a time rounded to 1/1000, answers clipped to the range of the data, what is
    wrong below an eighth of the data's size only, or a good network of other data.
    """
    n = max(4, min(4096, 8192 // math.prod(shape)))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2 * n, *shape, generator=generator, dtype=torch.float64).to(device)
    t = schedule.t_of_s(1.0).clamp(schedule.t_min, schedule.T)
    check_contract(denoiser, schedule.alpha(t) * 1.4 * noise[:n], t)
    given = x_0 is not None
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
    levels = [rms * f for f in LEVELS[given] if bottom < rms * f < top]
    if not levels:
        raise UsageError(
            f"data of root mean square {rms:.2g} do not fit {schedule}, whose sigma / alpha runs "
            f"from {bottom:.2g} to {top:.2g}: scale the data to about 1 or choose another schedule"
        )
    eps = noise[n : n + len(x_0)]
    now: Records = []
    by_type: dict[tuple[str, str, str], Records] = {}
    shares: dict[str, list[tuple[float, float]]] = {"level": [], "scale": [], "offset": []}
    for s in progress(levels, desc="self-test"):
        y, t = x_0 + s * eps, schedule.t_of_s(s)
        passed = [schedule.t_of_s(s * f).clamp(schedule.t_min, schedule.T) for f in (1, 0.5, 2)]
        D, less, more = (denoiser(schedule.alpha(t) * y, t) for t in passed)
        now.append(_error_and_slope(D, x_0, y, eps, s))
        for key, other in _other_types(D, y, schedule.alpha(t), schedule.sigma(t)):
            by_type.setdefault(key, []).append(_error_and_slope(other, x_0, y, eps, s))
        turns = {"level": (more - less) / math.log(4), "scale": D, "offset": rms + 0 * D}
        for name, turn in turns.items():
            shares[name].append(_share(x_0 - D, turn))
    key = min(by_type, key=lambda key: _ratio(by_type[key], now))
    if _ratio(by_type[key], now) < BETTER:
        taken_for, sign, true = key
        if given and _off(by_type[key], levels)[0] < LIMITS[False]["slope"]:
            raise UsageError(
                "the denoiser does not denoise, but would if its network, taken to predict "
                f"{taken_for}, predicted {sign}{true}: make it with {_PREDICTIONS[true][0]}"
                + (", with the sign of the network's answer turned" if sign else "")
            )
        doubt = f"read as {sign}{true} for {taken_for}, its network's answer would be nearer x_0"
        raise _failed(doubt, given)
    off, level, slope = _off(now, levels)
    found = {name: _pooled(share, len(x_0)) for name, share in shares.items()}
    sizes = {name: size for name, (size, _) in found.items()} | {"slope": off}
    doubts = {
        "level": f"it denoises better when told {math.exp(sizes['level']):.2g} times the noise",
        "scale": f"its answers times {1 + sizes['scale']:.2f} would be nearer x_0",
        "offset": f"its answers are off by {-sizes['offset'] * rms:.2g} on average",
        "slope": f"at sigma / alpha = {level:.2g} the noise it finds must be multiplied by "
        f"{slope:.2f} to be nearest to the noise put in",
    }
    chance = {name: error for name, (_, error) in found.items()} | {"slope": 0.0}
    excess = {n: abs(sizes[n]) / max(limit, chance[n]) for n, limit in LIMITS[given].items()}
    worst = max(excess, key=lambda name: excess[name])
    if not excess[worst] <= 1:
        raise _failed(doubts[worst], given)


def _failed(doubt: str, given: bool) -> UsageError:
    return UsageError(
        f"the denoiser does not denoise as its schedule says ({doubt}): check the time that its "
        "network is told (0 to 1 or 0 to 999, sigma or ln sigma), that the schedule is the one it "
        "was trained with, and what it predicts (eps, x_0, v or eps - x_0)"
        + ("" if given else "; with clean samples as x_0 the test can tell more")
    )


def _samples(denoiser: Denoiser, schedule: NoiseSchedule, noise: Tensor) -> Tensor:
    """Samples from 20 steps of DPM-Solver++(2M), with NaN and infinities replaced by numbers.

    They run over levels from 80 to 0.01 at most, where 20 steps are accurate.
    """
    check_begins_in_noise(schedule)
    first, last = schedule.t_of_s(80.0).item(), schedule.t_of_s(0.01).item()
    part = replace(schedule, T=min(schedule.T, first), t_min=max(schedule.t_min, last))
    grid = time_edm(part, 20)
    x_T = part.sigma(part.T).item() * noise
    points = trajectory(denoiser, x_T, dpm_solver_pp(grid, 2), grid)
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


def _share(residual: Tensor, turn: Tensor) -> tuple[float, float]:
    """The multiple of `turn` that is in the residual, and its standard error, over samples."""
    parts, size = (residual * turn).flatten(1).sum(1), turn.flatten(1).square().sum(1).mean()
    spread = parts.std() / math.sqrt(len(parts))
    return (parts.mean() / size).item(), (spread / size).item()


def _pooled(shares: list[tuple[float, float]], n: int) -> tuple[float, float]:
    """The mean of the levels' shares by their precision, and how far chance may take it from 0."""
    precise = [(share, 1 / error**2) for share, error in shares if 0 < error < math.inf]
    if not (total := sum(weight for _, weight in precise)):
        return 0.0, math.inf
    size = sum(share * weight for share, weight in precise) / total
    return size, 4 * (1 + 10 / n) * total**-0.5  # four standard errors; few samples know them ill


def _off(records: Records, levels: Sequence[float]) -> tuple[float, float, float]:
    """(|slope - 1|, level, slope) at the level where the slope is farthest from 1."""
    return max((abs(slope - 1), s, slope) for s, (_, slope) in zip(levels, records, strict=True))
