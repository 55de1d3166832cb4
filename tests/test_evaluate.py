"""The Frechet distance, against torch-fidelity, scipy and a closed form."""

import numpy as np
import pytest
import scipy.linalg
import torch

from s4s_core import FeatureSums, feature_sums, frechet_distance, merge


def sums(x) -> FeatureSums:
    return feature_sums(lambda batch: batch, [x])


def features(noise, seed: int, n: int = 200, size: int = 12):
    """Correlated, shifted features."""
    return noise(seed, n, size) @ noise(seed + 50, size, size) + noise(seed + 90, size)


@pytest.mark.parametrize("seed", range(4))
def test_sums_give_the_mean_and_covariance_of_numpy(noise, seed):
    x = features(noise, seed)
    found = sums(x)
    assert found.n == 200
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:::torch_fidelity")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [200, 8])
def test_frechet_distance_equals_torch_fidelitys(noise, seed, n):
    """With fewer samples than features (8 of 12) too, where the covariances are singular."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = features(noise, seed, n), features(noise, seed + 10, n + 50)
    statistics = [fid_features_to_statistics(f) for f in (x, y)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)
    found = frechet_distance(sums(x), sums(y))
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_frechet_distance_equals_the_matrix_square_root(noise, seed):
    x, y = features(noise, seed).numpy(), features(noise, seed + 10).numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    found = frechet_distance(sums(torch.from_numpy(x)), sums(torch.from_numpy(y)))
    assert found == pytest.approx(expected, rel=1e-9)


def with_statistics(mean, covariance, n: int = 1000) -> FeatureSums:
    """Sums of n samples with exactly this mean and covariance."""
    mean = torch.tensor(mean, dtype=torch.float64)
    covariance = torch.tensor(covariance, dtype=torch.float64)
    return FeatureSums(n, n * mean, (n - 1) * covariance + n * torch.outer(mean, mean))


def test_frechet_distance_of_gaussians_has_its_closed_form():
    """|m_a - m_b|^2 + sum (s_a - s_b)^2 where the covariances share their axes."""
    a = with_statistics([1.0, -2.0], [[4.0, 0.0], [0.0, 9.0]])
    b = with_statistics([0.0, 1.0], [[1.0, 0.0], [0.0, 25.0]])
    assert frechet_distance(a, b) == pytest.approx(1 + 9 + 1 + 4, rel=1e-9)
    rotated = with_statistics([1.0, -2.0], [[6.5, 2.5], [2.5, 6.5]])
    isotropic = with_statistics([1.0, -2.0], [[4.0, 0.0], [0.0, 4.0]])
    assert frechet_distance(rotated, isotropic) == pytest.approx((3 - 2) ** 2 + 0, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_is_symmetric_positive_and_zero_on_itself(noise, seed):
    a, b = sums(features(noise, seed)), sums(features(noise, seed + 10))
    distance = frechet_distance(a, b)
    assert distance > 0 and frechet_distance(b, a) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * a.covariance.trace().item())


def test_frechet_distance_of_one_feature_is_that_of_two_normals(noise):
    x, y = noise(0, 500, 1), 3 * noise(1, 400, 1) + 2
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert frechet_distance(sums(x), sums(y)) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [7, 150, 43], [100, 100]])
def test_shards_add_up_to_the_whole(noise, sizes):
    x = features(noise, 0)
    whole = sums(x)
    for parts in (
        merge(*[sums(part) for part in x.split(sizes)]),
        feature_sums(lambda batch: batch, x.split(sizes)),
    ):
        assert parts.n == whole.n
        torch.testing.assert_close(parts.first, whole.first, rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(parts.second, whole.second, rtol=1e-12, atol=1e-10)


def test_shards_of_whole_numbers_add_up_exactly():
    x = torch.randint(-100, 100, (60, 5), generator=torch.Generator().manual_seed(0)).double()
    parts, whole = merge(*[sums(part) for part in x.split(7)]), sums(x)
    assert torch.equal(parts.first, whole.first) and torch.equal(parts.second, whole.second)


def test_single_precision_features_are_summed_in_double(noise):
    x = (1e4 + noise(0, 3000, 4)).float()
    expected = np.cov(x.double().numpy(), rowvar=False)
    found = feature_sums(lambda batch: batch, x.split(100))
    assert found.first.dtype == torch.float64
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-4, atol=1e-5)


def test_features_are_taken_without_gradients():
    weight = torch.ones(2, 3, requires_grad=True)
    found = feature_sums(lambda batch: batch @ weight, [torch.ones(4, 2)])
    assert not found.first.requires_grad


def test_no_samples_are_refused_in_one_sentence(one_sentence):
    with one_sentence("no samples"):
        merge()
    with one_sentence("no samples"):
        feature_sums(lambda batch: batch, [])


def test_one_sample_has_no_covariance(noise, one_sentence):
    with one_sentence("at least 2 samples", "1 and 200"):
        frechet_distance(sums(noise(0, 1, 12)), sums(features(noise, 0)))


def test_sides_of_different_features_are_refused_in_one_sentence(noise, one_sentence):
    with one_sentence("features", "12", "3"):
        frechet_distance(sums(features(noise, 0)), sums(features(noise, 1, size=3)))


def test_features_that_are_not_finite_are_refused_in_one_sentence(noise, one_sentence):
    x = features(noise, 0)
    x[3, 4] = float("nan")
    with one_sentence("finite"):
        frechet_distance(sums(x), sums(features(noise, 1)))
