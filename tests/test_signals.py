"""One dimension instead of two: the networks of signals, and the model of heartbeats."""

import numpy as np
import pytest
import torch

import s4s_core as s4s
from s4s_core.experiments import plot
from s4s_core.models import networks
from s4s_core.models.networks import Classifier, SmallDenoiser, UNet
from s4s_core.models.zoo import WEIGHTS

SMALL = dict(in_channels=2, widths=(8, 16), attention=(1,), embedding=16, dimensions=1)


@pytest.fixture(scope="module")
def setup():
    return s4s.load("ecg", teacher_nfe=10)


def randomized(net):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=draw))
    return net.double().eval().requires_grad_(False)


def test_a_network_of_signals_keeps_their_shape_and_each_for_itself(noise):
    net, x = randomized(SmallDenoiser(0.5, **SMALL)), noise(0, 5, 2, 32).double()
    answer = net(x, 0.7)
    assert answer.shape == x.shape and answer.dtype == x.dtype
    torch.testing.assert_close(net(x[2:4], 0.7), answer[2:4])
    torch.testing.assert_close(net(x, torch.full((5,), 0.7)), answer)


def test_convolutions_of_signals_are_those_of_images_of_one_row(noise):
    """Kernels whose upper and lower rows are zero see a signal where there is one row."""
    flat = randomized(UNet(**SMALL | {"widths": (8,), "attention": (0,)}))
    tall = UNet(**flat.config | {"dimensions": 2}).double().eval()
    weights = tall.state_dict()
    for name, value in flat.state_dict().items():
        if value.ndim == 3:  # a convolution along the length: its kernel is the middle row
            row = torch.zeros_like(weights[name])
            row[:, :, row.shape[2] // 2] = value
            value = row
        weights[name] = value
    tall.load_state_dict(weights)
    x, c_noise = noise(0, 3, 2, 16).double(), torch.tensor([0.3]).double()
    torch.testing.assert_close(tall(x[:, :, None], c_noise)[:, :, 0], flat(x, c_noise))


def test_networks_of_signals_are_saved_and_loaded(tmp_path, noise):
    x = noise(0, 3, 2, 32)
    for net in (SmallDenoiser(0.5, **SMALL), Classifier(2, 8, deeper=(8,), dimensions=1)):
        net = randomized(net).float()
        networks.save_network(tmp_path / "net.safetensors", net, dtype=torch.float32)
        again = networks.load_network(tmp_path / "net.safetensors")
        arguments = (x, 0.5) if isinstance(net, SmallDenoiser) else (x,)
        assert torch.equal(again(*arguments), net(*arguments)) and again.config == net.config


def test_patches_of_signals_are_those_of_images_of_one_row(noise):
    """Four points as four channels, and back."""
    net, x = UNet(**SMALL | {"patch": 4}), noise(0, 3, 2, 32)
    patches = net._patches(x)
    assert patches.shape == (3, 8, 8) and torch.equal(net._pixels(patches), x)
    assert torch.equal(patches[:, 0], x[:, 0, ::4]) and torch.equal(patches[:, 5], x[:, 1, 1::4])


def test_other_dimensions_are_refused_in_one_sentence(one_sentence):
    with one_sentence("a U-Net has 1 or 2 dimensions, not 3"):
        UNet(**SMALL | {"dimensions": 3})
    with one_sentence("a classifier has 1 or 2 dimensions, not 3"):
        Classifier(dimensions=3)


@pytest.mark.parametrize("name", ["denoiser", "classifier", "perceptual"])
def test_older_files_hold_networks_of_images(name):
    path = WEIGHTS / f"digits_{name}.safetensors"
    assert "dimensions" not in networks.read_metadata(path)["config"]
    assert networks.load_network(path).config["dimensions"] == 2


def test_signals_are_drawn_side_by_side():
    signals = torch.linspace(-1, 1, 12).view(3, 1, 4)
    lines = plot.plot_signals(signals, rate=2, scale=2.5).get_lines()
    drawn = np.stack([line.get_xydata() for line in lines])
    np.testing.assert_allclose(drawn[..., 1], 2.5 * signals[:, 0], rtol=1e-6)
    np.testing.assert_allclose(np.diff(drawn[..., 0]), 0.5)
    assert (drawn[1:, 0, 0] > drawn[:-1, -1, 0]).all()


def test_training_learns_signals():
    time = torch.arange(32) / 32
    waves = torch.stack([torch.sin(2 * torch.pi * (time + i / 7)) for i in range(7)])[:, None]
    run = networks.train_denoiser(waves, 40, batch=32, warmup=5, every=20, widths=(8, 16))
    first, last = (record.loss for record in run)
    assert last < first
    signals, labels = networks.turned(waves)
    assert torch.equal(signals[labels == 1], waves.flip(-1))
    assert torch.equal(signals[labels == 3], -waves.flip(-1))


def test_the_recording_is_read_as_scipy_has_it(tmp_path, one_sentence):
    beats = np.round(1024 + 200 * np.sin(np.arange(3600) / 360 * 2 * np.pi)).astype(np.uint16)
    np.savez(tmp_path / "ecg.npz", ecg=beats)
    windows, starts = networks.ecg_data(tmp_path / "ecg.npz")
    assert windows.shape == (129, 1, 128) and windows.abs().max() <= 1
    time = starts[10] + torch.arange(128) / 64
    expected = torch.sin(2 * torch.pi * time) / 2.5
    torch.testing.assert_close(windows[10, 0].double(), expected.double(), rtol=0, atol=0.02)
    for path in (tmp_path / "none.dat", tmp_path):
        with one_sentence("give the path of ecg.dat"):
            networks.ecg_data(path)


def test_heartbeats_are_near_the_real_ones_and_noise_is_not(setup):
    drawn = torch.cat(list(s4s.sample_batches(setup.teacher, setup, range(200))))
    assert drawn.shape == (200, 1, 128) and drawn.abs().max() < 1.5
    spread = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    noise = drawn.mean(0) + drawn.std(0) * spread.to(drawn)
    ours, other = (
        s4s.frechet_distance(setup.feature_sums([x]), setup.reference) for x in (drawn, noise)
    )
    assert 0 < 4 * ours < other


def test_a_seed_has_its_signal_in_any_batch(setup):
    seeds = range(60_000, 60_008)
    x_T = s4s.initial_noise(setup, seeds)
    whole = setup.teacher.sample(setup.denoiser, x_T)
    part = setup.teacher.sample(setup.denoiser, x_T[3:5])
    torch.testing.assert_close(part, whole[3:5], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["l2", "features"])
@pytest.mark.parametrize("learner", ["gauss_newton", "first_order"])
def test_learning_lowers_the_loss_of_unseen_signals(distance, learner):
    settings = {"n_train": 48, "n_valid": 20, "epochs": 1, "fid_samples": 20, "lr_phi": 1e-3}
    settings |= {"distance": distance, "learner": learner, "teacher_nfe": 10}
    given = s4s.Experiment("ecg", nfe=3, order=2, learn="coefficients", settings=settings)
    losses = [record["valid_loss"] for record in s4s.run(given).history]
    assert min(losses[1:]) < losses[0]
