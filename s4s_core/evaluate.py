"""How good samples are: features whose sums merge, the Fréchet distance, and how sure a number is.

"FID" means Inception features and nothing else; with any other network the number is a "Fréchet
distance (<network>)".
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from .errors import UsageError, require


@dataclass(frozen=True)
class FeatureSums:
    """Sums over n samples of features f (F,), float64 on the CPU: their mean and their scatter.

    mean     (F,)
    scatter  (F, F), the sum of (f - mean) (f - mean)^T. Where the mean is far larger than the
             spread, sums of f f^T itself would lose the covariance to rounding

    Sums of disjoint samples merge (Chan et al. 1979), so they can be made in shards.
    """

    n: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """(F, F), with denominator n - 1 as the FID has it (Heusel et al. 2017).

        Raises UsageError for fewer than 2 samples.
        """
        if self.n < 2:
            raise UsageError(f"a Fréchet distance needs at least 2 samples a side, not {self.n}")
        return self.scatter / (self.n - 1)


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (F,) and covariance (F, F) float64 where the sums behind them are not known."""

    mean: Tensor
    covariance: Tensor


@torch.no_grad()
def feature_sums(features: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> FeatureSums:
    """Run features(x) -> (B, F) over batches of samples (B, ...), and sum."""
    total: tuple[
        FeatureSums, ...
    ] = ()  # one running sum: 500 batches of 2048 x 2048 would fill 17 GB
    for x in batches:
        f = features(x).double()
        centred = f - f.mean(0)
        total = (merge(*total, FeatureSums(len(f), f.mean(0).cpu(), (centred.T @ centred).cpu())),)
    return merge(*total)


def merge(*parts: FeatureSums) -> FeatureSums:
    """Return the sums over all the parts' samples together; UsageError where there is no part."""
    if not parts:
        raise UsageError("there are no samples to take features of")
    n, shift = sum(p.n for p in parts), parts[0].mean
    mean = shift + torch.stack([p.n / n * (p.mean - shift) for p in parts]).sum(0)
    scatter = torch.zeros_like(parts[0].scatter)
    for p in parts:
        scatter += p.scatter + p.n * torch.outer(p.mean - mean, p.mean - mean)
    return FeatureSums(n, mean, scatter)


def frechet_distance(
    a: FeatureSums | FeatureStatistics, b: FeatureSums | FeatureStatistics
) -> float:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017).

    Raises UsageError where a side has fewer than 2 samples, or features do not fit or are not
    finite.
    """
    for name, side in (("a", a), ("b", b)):
        require(name, side, FeatureSums, FeatureStatistics)
    (m_a, S_a), (m_b, S_b) = ((side.mean, side.covariance) for side in (a, b))
    if not len(m_a) == len(m_b) > 0:
        raise UsageError(
            f"the two sides have {len(m_a)} and {len(m_b)} features: take both with the same "
            "network"
        )
    # Products of larger numbers would overflow.
    if not all((values.abs() < 1e75).all() for values in (m_a, S_a, m_b, S_b)):
        raise UsageError(
            "features must be finite, and below 1e75: check the samples and the network"
        )
    values, vectors = torch.linalg.eigh(S_a)
    # The square roots of rounding errors would add up: fewer samples than features, lower rank.
    rank = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    root = vectors[:, rank] * values[rank].sqrt()
    # tr (S_a S_b)^(1/2) with S_a = R R^T: R^T S_b R is symmetric, its eigenvalues are real.
    cross = torch.linalg.eigvalsh(root.T @ S_b @ root).clamp_min(0).sqrt().sum()
    return ((m_a - m_b).square().sum() + S_a.trace() + S_b.trace() - 2 * cross).item()


def thumbnails(x: Tensor) -> Tensor:
    """Return the entries of small means of x, (B, C, H, W) -> (B, C * 64): features without a net.

    Images are averaged down to 8x8, signals (B, C, L) to 64 values; smaller samples stay as they
    are. Nothing was trained for these, and no learned distance shares their blind spots.
    """
    if x.ndim == 4 and min(x.shape[2:]) > 8:
        x = adaptive_avg_pool2d(x, 8)
    if x.ndim == 3 and x.shape[2] > 64:
        x = adaptive_avg_pool1d(x, 64)
    return x.flatten(1)


def interval(differences: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of the mean of paired differences (S, B), as low and high.

    S seeds of learning are crossed with B disjoint blocks of evaluation noise, so that each of the
    two adds the variance of its own means: var(seeds) / S + var(blocks) / B, which errs to the
    cautious side, with the degrees of freedom of Satterthwaite (1946). Where there is but one seed
    or one block it has no part in this; with one of each the interval is the whole line.
    """
    from scipy.stats import t  # imported where used: it takes half a second

    means = [differences.double().mean(axis) for axis in (1, 0)]
    parts = [(m.var().item() / len(m), len(m) - 1) for m in means if len(m) > 1]
    center, variance = differences.double().mean().item(), sum(v for v, _ in parts)
    if not parts:
        return -math.inf, math.inf
    if variance == 0:
        return center, center
    freedom = variance**2 / sum(v**2 / n for v, n in parts)
    reach = float(t.ppf((1 + level) / 2, freedom)) * variance**0.5
    return center - reach, center + reach
