"""The shipped network of CIFAR-10: what it claims, what it draws, and that solvers learn on it."""

import os

import numpy as np
import pytest
import torch
from running import run_notebook
from test_notebooks import LEAST, LONG

import s4s_core as s4s
from s4s_core.models.networks import cifar10_data, held_out_split, load_network, read_metadata
from s4s_core.models.networks.data import RECORD
from s4s_core.models.zoo import WEIGHTS

CIFAR10 = os.environ.get("CIFAR10")
needs_cifar10 = pytest.mark.skipif(
    not CIFAR10, reason="$CIFAR10 does not name the archive or folder of CIFAR-10 (binary version)"
)
LIMITS = {"denoiser": 16e6, "classifier": 2e6, "perceptual": 2e6, "reference": 1e6}


@pytest.fixture(scope="module")
def setup():
    return s4s.load("cifar10_tiny")


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_files_are_small_and_say_how_they_were_made(name, limit):
    path = WEIGHTS / f"cifar10_tiny_{name}.safetensors"
    assert path.stat().st_size <= limit
    expected = {"dataset", "trained_on"} if name != "reference" else {"of", "features"}
    assert expected <= set(read_metadata(path))


def test_denoiser_finds_the_noise_on_its_own_pictures(setup, noise):
    """(x - D) / sigma correlates with the noise that was added; hardest where there is little."""
    x_0 = setup.teacher.sample(setup.denoiser, s4s.initial_noise(setup, range(20_000, 20_016)))
    z = noise(1, *x_0.shape).to(x_0)
    for sigma, least in ((0.05, 0.3), (0.2, 0.6), (1.0, 0.9), (20.0, 0.99)):
        x = x_0 + sigma * z
        found = (x - setup.denoiser(x, torch.tensor(sigma))) / sigma
        assert torch.corrcoef(torch.stack([found.flatten(), z.flatten()]))[0, 1] > least


@pytest.mark.slow
def test_pictures_are_nearer_to_the_real_ones_than_noise_of_their_moments(setup):
    """Of seeds that nothing was chosen by; the other side has each pixel's mean and spread."""
    x_T = s4s.initial_noise(setup, range(30_000, 30_400))
    solver = s4s.Solver(s4s.unipc(grid := s4s.time_edm(setup.schedule, 10), 3), grid)
    drawn = torch.cat([solver.sample(setup.denoiser, x) for x in x_T.split(100)])
    assert drawn.min() > -2 and drawn.max() < 2
    draw = torch.Generator().manual_seed(0)
    blur = drawn.mean(0) + drawn.std(0) * torch.randn(drawn.shape, generator=draw).to(drawn)
    ours, noise = (
        s4s.frechet_distance(s4s.feature_sums(setup.features, [x]), setup.reference)
        for x in (drawn, blur)
    )
    assert 0 < 4 * ours < noise


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::torchvision")
@pytest.mark.parametrize("distance", ["features", "l2", "lpips"])
def test_learning_lowers_the_loss_of_unseen_noises(distance, request):
    if distance == "lpips":
        request.getfixturevalue("squeeze")  # or a reason why not
    small = s4s.load("cifar10_tiny", batch_size=8, epochs=2, lr_phi=1e-3, distance=distance)
    teacher = s4s.make_teacher_set(small, n_train=24, n_valid=12, seed=0)
    grid = s4s.time_logsnr(small.schedule, nfe=3)
    solver = s4s.Solver(s4s.ipndm(grid, order=3), grid)
    first, *later = (epoch.valid_loss for epoch in s4s.learn_coefficients(solver, small, teacher))
    assert min(later) < first


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")


@pytest.mark.slow
def test_the_order_ablation_runs_on_it_from_another_folder(here):
    given = {"dataset": "cifar10_tiny", "settings": {"cifar10_tiny": LEAST}}
    text = run_notebook("ablation_order", **LONG["ablation_order"] | given).text
    assert "cifar10_tiny classifier, 128 features" in text and "seeds 0 to 99" in text


@pytest.mark.slow
def test_the_appendix_trains_its_networks_from_a_folder(here, tmp_path):
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = np.random.default_rng(0).integers(256, size=(60, RECORD), dtype=np.uint8)
        records[:, 0] = np.arange(60) % 10
        (tmp_path / name).write_bytes(records.tobytes())
    parameters = dict(dataset="cifar10_tiny", data=str(tmp_path), steps=2, judge_steps=2)
    parameters |= dict(samples=150, save_as="mine", unet={"widths": [8, 16, 24]})
    run_notebook("appendix_train_denoiser", **parameters)
    names = ("denoiser", "classifier", "perceptual")
    config = [load_network(tmp_path / f"mine_{name}.safetensors").config for name in names]
    shipped = [load_network(WEIGHTS / f"cifar10_tiny_{name}.safetensors").config for name in names]
    differs = {"sigma_data", "widths"}
    assert {k for k in config[0] if config[0][k] != shipped[0][k]} == differs
    assert config[1:] == shipped[1:]
    saved = s4s.read_reference(tmp_path / "mine_reference.safetensors")
    judge = load_network(tmp_path / "mine_classifier.safetensors")
    again = s4s.feature_sums(judge.features, [cifar10_data(tmp_path, test=True)[0]])
    torch.testing.assert_close(saved.mean, again.mean, rtol=1e-6, atol=1e-7)
    assert saved.mean.shape == (128,)


@needs_cifar10
@pytest.mark.parametrize(("name", "seed"), [("classifier", 0), ("perceptual", 1)])
def test_classifiers_are_as_accurate_as_claimed(name, seed):
    images, labels = cifar10_data(CIFAR10)
    path = WEIGHTS / f"cifar10_tiny_{name}.safetensors"
    _, held_out = held_out_split(len(images), seed=seed)
    net = load_network(path)
    answers = torch.cat([net(x).argmax(1) for x in images[held_out].split(500)])
    right = (answers == labels[held_out]).sum().item()
    assert read_metadata(path)["held_out_accuracy"] == f"{right} of {len(held_out)}"


@needs_cifar10
def test_reference_is_that_of_the_test_set(setup):
    images, _ = cifar10_data(CIFAR10, test=True)
    again = s4s.feature_sums(setup.features, images.split(500))
    assert s4s.frechet_distance(again, setup.reference) == pytest.approx(0, abs=1e-4)


@needs_cifar10
def test_sigma_data_is_that_of_the_data():
    images, _ = cifar10_data(CIFAR10)
    net = load_network(WEIGHTS / "cifar10_tiny_denoiser.safetensors")
    assert net.sigma_data == pytest.approx(images.std().item(), rel=1e-6)
