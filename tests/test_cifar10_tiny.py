"""The shipped network of CIFAR-10: what it claims, what it draws, and that solvers learn on it."""

import os

import numpy as np
import pytest
import torch
from running import run_notebook
from test_notebooks import LONG

import s4s_core as s4s
from s4s_core.models.networks import cifar10_data, held_out_split, load_network, read_metadata
from s4s_core.models.networks.data import RECORD
from s4s_core.models.zoo import WEIGHTS

CIFAR10 = os.environ.get("CIFAR10")
needs_cifar10 = pytest.mark.skipif(
    not CIFAR10, reason="$CIFAR10 does not name the archive or folder of CIFAR-10 (binary version)"
)
LIMITS = {"denoiser": 16e6, "classifier": 2e6, "perceptual": 2e6, "reference": 1e6}


SEEDS = range(40_000, 40_020)  # two of each class


@pytest.fixture(scope="module")
def setup():
    return s4s.load("cifar10_tiny", guidance=1.0)


def draw(setup, seeds, nfe=8):
    """Samples of these seeds by UniPC on the EDM grid."""
    grid = s4s.time_edm(setup.schedule, nfe)
    x_T = s4s.initial_noise(setup, seeds)
    return s4s.Solver(s4s.unipc(grid, 3), grid).sample(setup.denoiser_for(seeds), x_T)


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_files_are_small_and_say_how_they_were_made(name, limit):
    path = WEIGHTS / f"cifar10_tiny_{name}.safetensors"
    assert path.stat().st_size <= limit
    expected = {"dataset", "trained_on"} if name != "reference" else {"of", "features"}
    assert expected <= set(read_metadata(path))


@pytest.mark.slow
def test_denoiser_finds_the_noise_on_its_own_pictures(setup, noise):
    """(x - D) / sigma correlates with the noise that was added; hardest where there is little."""
    seeds = range(20_000, 20_010)
    denoiser = setup.denoiser_for(seeds)
    x_0 = setup.teacher.sample(denoiser, s4s.initial_noise(setup, seeds))
    z = noise(1, *x_0.shape).to(x_0)
    for sigma, least in ((0.05, 0.3), (0.2, 0.6), (1.0, 0.9), (20.0, 0.99)):
        x = x_0 + sigma * z
        found = (x - denoiser(x, torch.tensor(sigma))) / sigma
        assert torch.corrcoef(torch.stack([found.flatten(), z.flatten()]))[0, 1] > least


@pytest.mark.slow
def test_pictures_are_nearer_to_the_real_ones_than_noise_of_their_moments(setup):
    """Of seeds that nothing was chosen by; the other side has each pixel's mean and spread."""
    solver = s4s.Solver(s4s.unipc(grid := s4s.time_edm(setup.schedule, 10), 3), grid)
    drawn = torch.cat(list(s4s.sample_batches(solver, setup, range(30_000, 30_300))))
    assert drawn.min() > -2 and drawn.max() < 2
    draw = torch.Generator().manual_seed(0)
    blur = drawn.mean(0) + drawn.std(0) * torch.randn(drawn.shape, generator=draw).to(drawn)
    ours, noise = (
        s4s.frechet_distance(s4s.feature_sums(setup.features, [x]), setup.reference)
        for x in (drawn, blur)
    )
    assert 0 < 4 * ours < noise


@pytest.mark.slow
def test_it_draws_the_class_that_it_is_told():
    """By the judge, which is right about 81 % of real pictures; chance is 10 %."""
    guided = s4s.load("cifar10_tiny")
    judge = load_network(WEIGHTS / "cifar10_tiny_classifier.safetensors")
    seeds = range(50_000, 50_060)
    answers = judge(draw(guided, seeds)).argmax(1)
    assert (answers == torch.tensor(seeds) % 10).double().mean() > 0.75


@pytest.mark.slow
def test_guidance_is_linear_in_its_scale_and_one_is_none(setup, noise):
    seeds, t = range(4), torch.tensor(2.0, dtype=torch.float64)
    x = 2 * noise(0, 4, 3, 32, 32).double()
    one, two, four = (
        s4s.load("cifar10_tiny", guidance=w).denoiser_for(seeds)(x, t) for w in (1.0, 2.0, 4.0)
    )
    net = load_network(WEIGHTS / "cifar10_tiny_denoiser.safetensors")
    assert torch.equal(one, net(x, t, torch.tensor(seeds)))
    torch.testing.assert_close(four - one, 3 * (two - one), rtol=0, atol=2e-5)
    assert (two - one).abs().max() > 0.01


def test_seeds_may_have_guidances_of_their_own(noise, one_sentence):
    """Ten seeds, one of each class, share a scale; the next ten have the next one."""
    scales, seeds = [1.0, 4.0], range(8, 14)
    mixed = s4s.load_guidances("cifar10_tiny", scales)
    x, t = 2 * noise(0, 6, 3, 32, 32).double(), torch.tensor(2.0, dtype=torch.float64)
    one, four = (s4s.load("cifar10_tiny", guidance=w).denoiser_for(seeds)(x, t) for w in scales)
    expected = torch.cat([one[:2], four[2:]])
    torch.testing.assert_close(mixed.denoiser_for(seeds)(x, t), expected, rtol=0, atol=2e-5)
    with one_sentence("digits has no guidance"):
        s4s.load_guidances("digits", scales)


def test_a_seed_has_its_picture_in_any_batch(setup):
    """Up to the rounding of float32: convolutions of other batches sum in another order."""
    whole = draw(setup, SEEDS, nfe=3)
    for part in (range(40_003, 40_004), range(40_003, 40_010)):
        expected = whole[3 : 3 + len(part)]
        torch.testing.assert_close(draw(setup, part, nfe=3), expected, rtol=0, atol=1e-5)


def test_labels_and_networks_must_fit(setup, noise, one_sentence):
    x, t = noise(0, 2, 3, 32, 32), torch.tensor(1.0)
    net = load_network(WEIGHTS / "cifar10_tiny_denoiser.safetensors")
    with one_sentence("give each a label, 0 to 9, or 10 for no class"):
        net(x, t)
    digits = load_network(WEIGHTS / "digits_denoiser.safetensors")
    with one_sentence("knows no classes", "without a label"):
        digits(x[:, :1, :8, :8], t, torch.tensor([0, 1]))
    with one_sentence("say which seeds"):
        setup.denoiser_for(None)


@pytest.mark.slow
def test_the_flow_draws_the_same_pictures(setup):
    """From the same noise, but for the noise above sigma = 80 that the flow begins with."""
    flow = s4s.load("cifar10_flow", guidance=1.0)
    assert flow.schedule == s4s.RectifiedFlow() and flow.weights == setup.weights
    one, other = (s.teacher.sample(s.denoiser_for(SEEDS), s4s.initial_noise(s, SEEDS))
                  for s in (setup, flow))  # fmt: skip
    assert (one - other).square().mean().sqrt() < 0.05 * one.square().mean().sqrt()


LEAST_HERE = {"epochs": 1, "rounds": 1, "fid_samples": 20, "teacher_nfe": 5, "guidance": 1.0}
LEAST_HERE |= {"n_train": 8, "n_train_alt": 8, "n_valid": 4, "n_valid_alt": 4, "batch_size": 4}


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["coefficients", "jointly"])
def test_an_experiment_runs_on_the_flow(learn):
    settings = LEAST_HERE | {"newton_batch_size": 4}
    given = s4s.Experiment("cifar10_flow", nfe=3, order=2, learn=learn, settings=settings)
    result = s4s.run(given)
    losses = [record["valid_loss"] for record in result.history]
    assert min(losses[1:]) < losses[0]
    assert result.features == "cifar10_tiny classifier, 128 features"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::torchvision")
@pytest.mark.parametrize("distance", ["features", "l2", "lpips"])
def test_learning_lowers_the_loss_of_unseen_noises(distance, request):
    if distance == "lpips":
        request.getfixturevalue("squeeze")  # or a reason why not
    settings = dict(batch_size=8, epochs=2, lr_phi=1e-3, distance=distance, guidance=1.0)
    small = s4s.load("cifar10_tiny", **settings)
    teacher = s4s.make_teacher_set(small, n_train=24, n_valid=12, seed=0)
    grid = s4s.time_logsnr(small.schedule, nfe=3)
    solver = s4s.Solver(s4s.ipndm(grid, order=3), grid)
    first, *later = (epoch.valid_loss for epoch in s4s.learn_coefficients(solver, small, teacher))
    assert min(later) < first


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")


ON_PICTURES = {"dataset": "cifar10_tiny", "settings": {"cifar10_tiny": LEAST_HERE}}
ON_PICTURES |= {"nfes": [3], "seeds": [0]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "given"),
    [("ablation_order", {"orders": [1, 2]}), ("ablation_radius", {"gammas": [0.0, 1.0]})],
)
def test_experiments_run_on_it_from_another_folder(here, name, given):
    text = run_notebook(name, **LONG[name] | ON_PICTURES | given).text
    assert "cifar10_tiny classifier, 128 features" in text and "seeds 0 to 19" in text


@pytest.mark.slow
def test_an_ablation_of_the_papers_learning_learns_its_way(here):
    """Gauss-Newton, by which this network learns elsewhere, reads no radius: all would be alike."""
    few = {"n_train": 20, "n_valid": 8, "epochs": 2, "lr_phi": 1e-3}
    given = {"settings": {"cifar10_tiny": LEAST_HERE | few}, "gammas": [0.0, 1.0]}
    text = run_notebook("ablation_radius", **LONG["ablation_radius"] | ON_PICTURES | given).text
    (row,) = {line for line in text.splitlines() if line.startswith("| relaxed loss | 3 |")}
    fixed, free = (float(cell) for cell in row.split("|")[3:5])
    assert free < fixed - 0.01


@pytest.mark.slow
def test_the_appendix_trains_its_networks_from_a_folder(here, tmp_path):
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = np.random.default_rng(0).integers(256, size=(30, RECORD), dtype=np.uint8)
        records[:, 0] = np.arange(30) % 10
        (tmp_path / name).write_bytes(records.tobytes())
    parameters = dict(dataset="cifar10_tiny", data=str(tmp_path), steps=2, judge_steps=2)
    parameters |= dict(samples=60, save_as="mine", unet={"widths": [8, 16, 24]})
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
