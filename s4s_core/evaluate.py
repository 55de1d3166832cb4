"""How good the samples are: the Frechet distance of features, and the distance to the teacher.

"FID" means Inception features and nothing else; with any other network the number is a "Frechet
distance (<network>)".
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import UsageError


@dataclass(frozen=True)
class FeatureSums:
    """Sums over n samples of features f (F,) and of f f^T (F, F), float64 on the CPU.

    Sums of disjoint samples add up exactly as the samples do, so they can be made in shards.
    """

    n: int
    first: Tensor
    second: Tensor

    @property
    def mean(self) -> Tensor:
        """(F,)"""
        return self.first / self.n

    @property
    def covariance(self) -> Tensor:
        """(F, F), with denominator n - 1 as the FID has it (Heusel et al. 2017)."""
        return (self.second - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)


@torch.no_grad()
def feature_sums(features, batches: Iterable[Tensor]) -> FeatureSums:
    """Run features(x) -> (B, F) over batches of samples (B, ...)."""
    parts = []
    for x in batches:
        f = features(x).double()
        parts.append(FeatureSums(len(f), f.sum(0).cpu(), (f.T @ f).cpu()))
    return merge(*parts)


def merge(*parts: FeatureSums) -> FeatureSums:
    """The sums over all the parts' samples together."""
    if not parts:
        raise UsageError("there are no samples to take features of")
    return FeatureSums(
        sum(p.n for p in parts), sum(p.first for p in parts), sum(p.second for p in parts)
    )


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017).

    Raises UsageError where a side has fewer than 2 samples, or features do not fit or are not
    finite.
    """
    if min(a.n, b.n) < 2:
        raise UsageError(f"a Frechet distance needs at least 2 samples a side, not {a.n} and {b.n}")
    if len(a.first) != len(b.first):
        raise UsageError(
            f"the two sides have {len(a.first)} and {len(b.first)} features: take both with the "
            "same network"
        )
    if not all(sums.second.isfinite().all() for sums in (a, b)):
        raise UsageError("features must be finite: check the samples and the network")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # tr (S_a S_b)^(1/2) through the symmetric S_a^(1/2) S_b S_a^(1/2), whose eigenvalues are real.
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return ((a.mean - b.mean).square().sum() + traces - 2 * cross).item()
