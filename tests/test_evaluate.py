"""The Frechet distance and the FID, against torch-fidelity, scipy and a closed form."""

import os
import pickle
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import s4s_core as s4s
from s4s_core import (
    FeatureStatistics,
    FeatureSums,
    feature_sums,
    frechet_distance,
    inception_features,
    inception_weights,
    merge,
    read_reference,
    save_statistics,
    to_uint8,
)
from s4s_core.models.inception import INCEPTION_SHA256, INCEPTION_URL, image_files, resized_sums


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
    return FeatureSums(n, mean, (n - 1) * covariance)


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
        torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts.scatter, whole.scatter, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [7, 150, 43]])
def test_a_mean_far_above_the_spread_costs_no_digit(noise, sizes):
    far = 1e7 + noise(0, 200, 12)
    parts = [sums(part) for part in far.split(sizes)]
    expected = np.cov((far - 1e7).numpy(), rowvar=False)
    for found in (merge(*parts), merge(merge(*parts[:1]), *parts[1:])):
        np.testing.assert_allclose(found.covariance, expected, rtol=0, atol=1e-9)


def test_single_precision_features_are_summed_in_double(noise):
    x = (1e4 + noise(0, 3000, 4)).float()
    expected = np.cov(x.double().numpy(), rowvar=False)
    found = feature_sums(lambda batch: batch, x.split(100))
    assert found.mean.dtype == torch.float64
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-4, atol=1e-5)


def test_features_are_taken_without_gradients():
    weight = torch.ones(2, 3, requires_grad=True)
    found = feature_sums(lambda batch: batch @ weight, [torch.ones(4, 2)])
    assert not found.mean.requires_grad


def test_no_samples_are_refused_in_one_sentence(one_sentence):
    with one_sentence("no samples"):
        merge()
    with one_sentence("no samples"):
        feature_sums(lambda batch: batch, [])


def test_one_sample_has_no_covariance(noise, one_sentence):
    with one_sentence("at least 2 samples", "not 1"):
        frechet_distance(sums(noise(0, 1, 12)), sums(features(noise, 0)))


def test_sides_of_different_features_are_refused_in_one_sentence(noise, one_sentence):
    with one_sentence("features", "12", "3"):
        frechet_distance(sums(features(noise, 0)), sums(features(noise, 1, size=3)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
def test_features_that_are_not_finite_are_refused_in_one_sentence(noise, one_sentence, value):
    x = features(noise, 0)
    x[3, 4] = value
    with one_sentence("finite"):
        frechet_distance(sums(x), sums(features(noise, 1)))


@pytest.mark.parametrize("seed", range(5))
def test_any_shards_of_the_seeds_give_the_distance_of_the_whole(mixture, noise, seed):
    """Shards of any number, size and order: one number, whoever computed which part of it."""
    setup = mixture(sample_batch_size=16)
    grid = s4s.time_logsnr(setup.schedule, 4)
    solver = s4s.Solver(s4s.ipndm(grid, 2), grid)

    def of(seeds) -> FeatureSums:
        return feature_sums(setup.features, s4s.sample_batches(solver, setup, seeds))

    whole, other = of(range(60)), sums(noise(1, 50, 2))
    generator = np.random.default_rng(seed)
    cuts = np.sort(generator.choice(np.arange(1, 60), size=4, replace=False))
    shards = np.split(generator.permutation(60), cuts)
    parts = merge(*[of(shard.tolist()) for shard in shards])
    assert parts.n == whole.n == 60
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.scatter, whole.scatter, rtol=1e-12, atol=1e-12)
    assert frechet_distance(parts, other) == pytest.approx(
        frechet_distance(whole, other), rel=1e-11
    )


@pytest.mark.parametrize("n", [5, 40])
def test_singular_covariances_have_the_distance_of_their_low_rank_form(noise, n):
    """tr (S_a S_b)^(1/2) is the nuclear norm of A B^T / (n - 1), exact for n of 300 features."""
    x, y = features(noise, 0, n, 300), features(noise, 10, n, 300)
    a, b = ((f - f.mean(0)) / (n - 1) ** 0.5 for f in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    expected = means + a.square().sum() + b.square().sum() - 2 * cross
    assert frechet_distance(sums(x), sums(y)) == pytest.approx(expected.item(), rel=1e-7)


def test_samples_all_alike_have_no_spread(noise):
    a, b = (sums(torch.full((4, 12), value, dtype=torch.float64)) for value in (1.0, 3.0))
    spread = sums(features(noise, 0))
    assert frechet_distance(a, b) == pytest.approx(12 * 4)
    expected = (spread.mean - 1).square().sum() + spread.covariance.trace()
    assert frechet_distance(a, spread) == pytest.approx(expected.item())


def test_statistics_stand_for_their_sums(noise):
    a, b = sums(features(noise, 0)), sums(features(noise, 10))
    published = FeatureStatistics(b.mean, b.covariance)
    assert frechet_distance(a, published) == frechet_distance(a, b)
    assert frechet_distance(published, published) == pytest.approx(0, abs=1e-5)


def test_pixels_are_those_of_either_rule():
    levels = torch.arange(256, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        x = (levels / 127.5 - 1).to(dtype)
        assert torch.equal(to_uint8(x), levels.to(torch.uint8))
        assert torch.equal(to_uint8(x + 0.49 / 127.5), levels.to(torch.uint8))
        assert torch.equal(to_uint8(x + 0.49 / 127.5, 127.5), levels.to(torch.uint8))
        assert torch.equal(to_uint8(x[1:] - 0.01 / 127.5, 127.5), levels[:-1].to(torch.uint8))
    assert to_uint8(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_no_pixels(value, one_sentence):
    with one_sentence("finite"):
        to_uint8(torch.tensor([0.0, value]))


@pytest.fixture(scope="module")
def inception(inception_file):
    return inception_features(inception_file)


def pixels(seed: int, n: int, side: int = 16):
    """Smooth random images (n, 3, side, side) uint8, brighter and bluer with the seed."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator) * 160 + 20 * seed
    coarse[:, 2] += 20 * seed
    return torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 255).byte()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::torch_fidelity")
def test_fid_equals_torch_fidelitys(inception_file, inception):
    """From pictures to the number, with fewer images than features.

    torch-fidelity adds up the square roots of rounding errors there: some 1e-6 of the number.
    """
    import torch_fidelity

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

    x, y = pixels(0, 8), pixels(1, 7)
    expected = torch_fidelity.calculate_metrics(
        input1=Pictures(x),
        input2=Pictures(y),
        fid=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        cuda=False,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )["frechet_inception_distance"]
    as_samples = [images.double() / 127.5 - 1 for images in (x, y)]
    a, b = (feature_sums(inception, images.split(5)) for images in as_samples)
    assert a.mean.shape == (2048,) and a.n == 8
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_folder_of_images_is_its_pixels(inception, tmp_path):
    """Lossless formats in subfolders; uint8 and [-1, 1] give the same features, grey is RGB."""
    images = pixels(2, 3)
    grey = images[2:, :1].expand(-1, 3, -1, -1)
    for k, name in enumerate(["00/a.png", "01/b.webp"]):
        path = tmp_path / name
        path.parent.mkdir()
        Image.fromarray(images[k].permute(1, 2, 0).numpy()).save(path, lossless=True)
    Image.fromarray(grey[0, 0].numpy()).save(tmp_path / "c.PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    found = read_reference(tmp_path, inception)
    rgb = torch.cat([images[:2], grey])
    expected = feature_sums(inception, [rgb[:2] / 127.5 - 1, rgb[2:, :1] / 127.5 - 1])
    assert found.n == 3
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.scatter, expected.scatter, rtol=1e-5, atol=1e-6)


def test_images_of_two_sizes_are_refused_in_one_sentence(tmp_path, one_sentence):
    for name, side in (("a.png", 8), ("b.png", 9)):
        Image.new("RGB", (side, 8)).save(tmp_path / name)
    with one_sentence("a.png", "b.png", "(3, 8, 8)", "(3, 8, 9)"):
        read_reference(tmp_path, lambda x: x.flatten(1))


def test_images_of_any_size_are_resized_a_few_at_a_time(tmp_path):
    for k in range(130):
        Image.new("RGB", (9 + k % 5, 7), (k, 0, 0)).save(tmp_path / f"{k}.png")
    seen = []
    found = resized_sums(image_files(tmp_path), 4, lambda x: seen.append(x) or x.float()[:, 0, 0])
    assert [len(x) for x in seen] == [64, 64, 2] and {x.shape[1:] for x in seen} == {(3, 4, 4)}
    torch.testing.assert_close(found.mean, torch.full((4,), 64.5).double())


def test_images_that_cannot_be_read_are_named_in_one_sentence(tmp_path, one_sentence):
    path = tmp_path / "a.png"
    for content in (b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(30)):
        path.write_bytes(content)
        with one_sentence(str(path), "not a readable image"):
            read_reference(tmp_path, lambda x: x)
    for mode, size, words in (("I;16", 8, "8 bits"), ("1", 2049, "more than 4194304 pixels")):
        Image.new(mode, (size, size)).save(path)
        with one_sentence(str(path), words):
            read_reference(tmp_path, lambda x: x)


def test_a_folder_without_images_is_refused_in_one_sentence(tmp_path, one_sentence):
    with one_sentence(str(tmp_path), "no images", ".webp"):
        read_reference(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "float32", ">f8"])
def test_published_statistics_are_read(noise, tmp_path, dtype):
    """Arrays beside mu and sigma are let be, even those that would have to be unpickled."""
    a = sums(features(noise, 0))
    arrays = {"mu": a.mean.numpy().astype(dtype), "sigma": a.covariance.numpy().astype(dtype)}
    path = tmp_path / "reference.npz"
    np.savez(path, **arrays, arr_0=np.zeros((2, 4, 4, 3), np.uint8), labels=np.array([{}]))
    found = read_reference(path)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    torch.testing.assert_close(found.mean, a.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.covariance, a.covariance, rtol=1e-6, atol=1e-5)
    assert frechet_distance(a, found) == pytest.approx(0, abs=1e-4)


def test_saved_statistics_are_those_that_are_read(noise, tmp_path, one_sentence):
    a, path = sums(features(noise, 0)), tmp_path / "reference.safetensors"
    save_statistics(path, a, features="made up")
    found = read_reference(path)
    assert torch.equal(found.mean, a.mean) and torch.equal(found.covariance, a.covariance)
    path.write_bytes(path.read_bytes()[:-1])
    with one_sentence(str(path), "mean and covariance"):
        read_reference(path)


class Executed:
    def __reduce__(self):
        return pytest.fail, ("a file was executed",)


EYE, ZERO = np.eye(3), np.zeros(3)


@pytest.mark.parametrize(
    "arrays, word",
    [
        ({"mu": ZERO}, "sigma"),
        ({"sigma": EYE}, "mu"),
        ({}, "mu"),
        ({"mu": ZERO, "sigma": np.eye(4)}, "(4, 4)"),
        ({"mu": ZERO[:, None], "sigma": EYE}, "(3, 1)"),
        ({"mu": np.zeros(()), "sigma": np.zeros(())}, "()"),
        ({"mu": ZERO, "sigma": EYE.astype(int)}, "int64"),
        ({"mu": ZERO, "sigma": EYE + 0j}, "complex128"),
        ({"mu": ZERO, "sigma": np.array([["a"] * 3] * 3)}, "<U1"),
        ({"mu": ZERO + np.nan, "sigma": EYE}, "finite"),
        ({"mu": ZERO, "sigma": EYE + np.inf}, "finite"),
        ({"mu": ZERO, "sigma": np.tri(3)}, "symmetric"),
        ({"mu": ZERO, "sigma": np.diag([1.0, 1.0, -1e-3])}, "positive semidefinite"),
        ({"mu": ZERO, "sigma": -EYE}, "positive semidefinite"),
        ({"mu": ZERO[:0], "sigma": EYE[:0, :0]}, "(0,)"),
        ({"mu": np.array([Executed()] * 3), "sigma": EYE}, "Object arrays"),
    ],
)
def test_statistics_of_another_make_are_refused_in_one_sentence(
    arrays, word, tmp_path, one_sentence
):
    path = tmp_path / "reference.npz"
    np.savez(path, **arrays)
    with one_sentence(str(path), word):
        read_reference(path)


def test_singular_statistics_are_read(noise, tmp_path):
    """Fewer samples than features, rounded to single precision, and samples all alike."""
    singular = sums(noise(0, 5, 12)).covariance.numpy()
    for sigma in (singular, singular.astype(np.float32), np.zeros((12, 12))):
        np.savez(tmp_path / "reference.npz", mu=np.zeros(12), sigma=sigma)
        assert read_reference(tmp_path / "reference.npz").covariance.shape == (12, 12)


def test_arrays_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch, one_sentence):
    monkeypatch.setattr("s4s_core.models.networks.data.LARGEST", 1_000_000)
    path = tmp_path / "reference.npz"
    np.savez_compressed(path, mu=np.zeros(400), sigma=np.zeros((400, 400)))
    assert path.stat().st_size < 10_000
    with one_sentence(str(path), "more than 1000000"):
        read_reference(path)


@pytest.mark.parametrize("name", ["reference.npz", "reference.safetensors", "folder/a.png"])
def test_pipes_are_no_statistics_and_no_images(tmp_path, one_sentence, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / name)
    with one_sentence("no file", name):
        read_reference(tmp_path / name.split("/")[0], lambda x: x.flatten(1))


def test_what_is_left_out_of_a_folder_is_said_in_one_line(tmp_path, capsys):
    """A notebook's copies are no second images."""
    (tmp_path / ".ipynb_checkpoints").mkdir()
    image = Image.new("RGB", (4, 4))
    for name in ("a.png", "b.png", "x.bmp", ".ipynb_checkpoints/a-checkpoint.png"):
        image.save(tmp_path / name)
    assert read_reference(tmp_path, lambda x: x.float().flatten(1)).n == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 images" in line and "2 hidden" in line and str(tmp_path) in line


@pytest.mark.parametrize("format", ["EPS", "BMP", "TIFF", "GIF"])
def test_other_formats_under_an_images_name_are_refused(
    tmp_path, monkeypatch, one_sentence, format
):
    """Pillow would start Ghostscript for the first."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, format=format)
    with one_sentence(str(path), "not a readable image"):
        read_reference(tmp_path, lambda x: x.float().flatten(1))


def test_files_that_are_no_statistics_are_refused_in_one_sentence(tmp_path, one_sentence):
    path = tmp_path / "reference.npz"
    with one_sentence(str(path), "no file"):
        read_reference(path)
    np.savez_compressed(path, mu=ZERO, sigma=EYE)
    whole = path.read_bytes()
    broken = whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]
    for content in (b"", b"text", whole[:100], broken, pickle.dumps(Executed())):
        path.write_bytes(content)
        with one_sentence(str(path), "mu and sigma"):
            read_reference(path)
    with open(path, "wb") as file:
        np.save(file, EYE)
    with one_sentence(str(path), "mu and sigma"):
        read_reference(path)


def test_fid_takes_images_only(inception, one_sentence):
    for shape in ((2, 4, 16, 16), (2, 16), (3, 16, 16)):
        with one_sentence("1 or 3 channels"):
            inception(torch.zeros(shape))


@pytest.mark.parametrize("content", [b"", b"text", {"weight": torch.zeros(3)}, Executed()])
def test_weights_of_another_make_are_refused_and_not_executed(content, tmp_path, one_sentence):
    path = tmp_path / "inception.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with one_sentence(str(path), "torch-fidelity's Inception weights"):
        inception_features(path)


def test_weights_that_cannot_be_fetched_are_asked_for_in_one_sentence(
    tmp_path, monkeypatch, one_sentence
):
    monkeypatch.setenv("S4S_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("s4s_core.models.download.urlopen", offline)
    name = "weights-inception-2015-12-05-6726825d.pth"
    with one_sentence("github.com", INCEPTION_SHA256, str(tmp_path / "home" / name)):
        inception_features()


def offline(*_, **__):
    raise OSError("no connection")


@pytest.mark.parametrize("folder", ["home", "torch/hub/checkpoints"])
def test_weights_put_there_by_hand_are_found(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("S4S_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("s4s_core.models.download.urlopen", offline)
    path = tmp_path / folder / "weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"the official file")
    assert inception_weights() == path  # of whatever weights: the zoo looks at their hash


def test_the_address_is_torch_fidelitys():
    from torch_fidelity import feature_extractor_inceptionv3 as module

    assert INCEPTION_URL == module.URL_INCEPTION_V3


def test_without_torch_fidelity_its_name_is_told(monkeypatch, one_sentence):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with one_sentence("pip install torch-fidelity"):
        inception_features()
