"""The relaxed objective: its ball, its radius, its distances."""

import math
import sys
from urllib.error import URLError

import pytest
import torch

from s4s_core import (
    EDM,
    Coefficients,
    decoded_distance,
    feature_distance,
    ipndm,
    l2,
    lpips_distance,
    make_teacher_set,
    project_to_ball,
    radius,
    relaxed_loss,
    time_edm,
)
from s4s_core.solver import solve


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_projection_is_onto_the_ball_of_each_sample(noise, seed, shape):
    center, offset = 80 * noise(seed, 16, *shape), noise(seed + 10, 16, *shape)
    r = offset.flatten(1).norm(dim=1).median().item()
    x = center + offset
    projected = project_to_ball(x, center, r)
    before = offset.flatten(1).norm(dim=1)
    after = (projected - center).flatten(1).norm(dim=1)
    inside = before < r * (1 - 1e-12)
    assert inside.any() and (~inside).any()
    torch.testing.assert_close(projected[inside], x[inside], rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(
        after[~inside], torch.full_like(after[~inside], r), rtol=1e-10, atol=0
    )
    # Nearest: the move is along the radius.
    cosine = torch.cosine_similarity((projected - center).flatten(1), offset.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-9)


def test_projection_is_idempotent_and_alone_for_each_sample(noise):
    center, x = noise(0, 8, 3), 3 * noise(1, 8, 3)
    once = project_to_ball(x, center, 0.7)
    torch.testing.assert_close(project_to_ball(once, center, 0.7), once, rtol=0, atol=1e-14)
    assert torch.equal(project_to_ball(x[2:3], center[2:3], 0.7), once[2:3])


def test_projection_at_the_center_and_onto_radius_zero(noise):
    x, center = noise(0, 4, 3), noise(1, 4, 3)
    assert torch.equal(project_to_ball(center, center, 0.5), center)
    assert torch.equal(project_to_ball(x, center, 0.0), center)


@pytest.mark.parametrize(
    ("nfe", "r"), [(3, 0.843), (4, 0.306), (5, 0.149), (6, 0.085), (8, 0.0368), (10, 0.0196)]
)
def test_radius_of_cifar10_has_its_reference_values(nfe, r):
    assert radius(0.0242, d=3072, m=3 * nfe - 3) == pytest.approx(r, rel=0.01)


def test_radius_falls_as_the_parameters_to_the_five_halves():
    assert radius(0.1, 64, 8) / radius(0.1, 64, 32) == pytest.approx(4**2.5)
    assert radius(0.2, 128, 8) == pytest.approx(4 * radius(0.1, 64, 8))
    assert radius(0.0, 64, 8) == 0


def test_l2_is_the_mean_square_of_each_sample(noise):
    x, y = noise(0, 5, 3, 2, 2), noise(1, 5, 3, 2, 2)
    expected = [((a - b) ** 2).mean().item() for a, b in zip(x, y, strict=True)]
    assert l2(x, y).tolist() == pytest.approx(expected)
    assert l2(x, x).tolist() == [0] * 5


def test_relaxed_loss_at_the_teachers_own_noise_is_the_global_error(mixture):
    """Eq. 7 becomes Eq. 6 where x' = x_T."""
    setup = mixture()
    teacher = make_teacher_set(setup)
    grid = time_edm(EDM(), 4)
    table = ipndm(grid, 3)
    loss = relaxed_loss(setup.denoiser, table, grid, teacher.x_T, teacher.x_0)
    student = solve(setup.denoiser, teacher.x_T, table, grid)
    assert torch.equal(loss, (student - teacher.x_0).square().mean(1))


def test_relaxed_loss_of_the_teacher_is_zero(mixture):
    setup = mixture()
    teacher, solver = make_teacher_set(setup), setup.teacher
    loss = relaxed_loss(setup.denoiser, solver.coefficients, solver.grid, teacher.x_T, teacher.x_0)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-20)


def test_gradients_of_the_relaxed_loss_equal_finite_differences(mixture):
    setup = mixture()
    x_T, x_0 = (x[:3] for x in make_teacher_set(setup).train)
    grid = time_edm(EDM(), 4)
    b = ipndm(grid, 3).b.requires_grad_()
    mask = torch.ones_like(b).tril()

    def loss(b, x):
        return relaxed_loss(setup.denoiser, Coefficients(mask * b), grid, x, x_0)

    inputs = (b, x_T.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


# --- Latents -----------------------------------------------------------------------------------


def decoder():
    """A small decoder of the plane's points."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    return net.double().requires_grad_(False)


def test_distance_of_latents_is_that_of_their_images(noise):
    x, target, decode = noise(0, 4, 2), noise(1, 4, 2), decoder()
    distance = decoded_distance(l2, decode)
    assert torch.equal(distance(x, target), l2(decode(x), decode(target)))
    assert distance(x, x).tolist() == [0] * 4


def test_gradients_reach_the_table_through_the_decoder(mixture):
    setup = mixture()
    x_T, x_0 = (x[:3] for x in make_teacher_set(setup).train)
    grid, distance = time_edm(EDM(), 4), decoded_distance(l2, decoder())
    b = ipndm(grid, 3).b.requires_grad_()
    mask = torch.ones_like(b).tril()

    def loss(b, x):
        return relaxed_loss(setup.denoiser, Coefficients(mask * b), grid, x, x_0, distance)

    inputs = (b, x_T.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


def test_the_target_gets_no_gradient(noise):
    x, target = (noise(seed, 4, 2).requires_grad_() for seed in (0, 1))
    decoded_distance(l2, decoder())(x, target).sum().backward()
    assert x.grad.abs().min() > 0 and target.grad is None


# --- Perceptual distances ----------------------------------------------------------------------


def images(noise, seed: int, channels: int = 3, side: int = 32):
    return noise(seed, 4, channels, side, side).mul(0.4).clamp(-1, 1)


@pytest.mark.filterwarnings("ignore:::torchvision")
@pytest.mark.parametrize(("channels", "resize"), [(3, None), (1, None), (3, 64), (1, 64)])
def test_lpips_is_a_differentiable_distance(squeeze, noise, channels, resize):
    distance = squeeze(resize)
    x = images(noise, 0, channels).requires_grad_()
    y = images(noise, 1, channels)
    d = distance(x, y)
    assert d.shape == (4,) and d.dtype == torch.float64 and (d > 0.01).all()
    assert distance(y, y).tolist() == [0] * 4
    torch.testing.assert_close(distance(y, x.detach()), d.detach(), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(d.sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    nearer = distance(0.02 * x.detach() + 0.98 * y, y)
    assert (nearer < d.detach()).all()


@pytest.mark.filterwarnings("ignore:::torchvision")
def test_lpips_of_grey_images_is_that_of_their_three_equal_channels(squeeze, noise):
    distance = squeeze()
    x, y = images(noise, 0, 1), images(noise, 1, 1)
    three = [image.repeat(1, 3, 1, 1) for image in (x, y)]
    assert torch.equal(distance(x, y), distance(*three))


@pytest.mark.filterwarnings("ignore:::torchvision")
def test_lpips_resizes_images_too_small_for_the_trunk(squeeze, noise, one_sentence):
    x, y = images(noise, 0, side=8), images(noise, 1, side=8)
    assert (squeeze(32)(x, y) > 0).all()
    with one_sentence("squeeze", "17 pixels", "(3, 8, 8)", "lpips_resize"):
        squeeze()(x, y)


def trunk_without_weights(monkeypatch):
    """torchvision's trunks without their download."""
    import torchvision.models

    for name in ("vgg16", "squeezenet1_1", "alexnet"):
        build = getattr(torchvision.models, name)
        monkeypatch.setattr(torchvision.models, name, lambda build=build, **_: build(weights=None))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::torchvision")
@pytest.mark.parametrize(("net", "side"), [("vgg", 16), ("squeeze", 17), ("alex", 31)])
def test_every_trunk_takes_its_smallest_image_and_none_smaller(
    monkeypatch, noise, one_sentence, net, side
):
    trunk_without_weights(monkeypatch)
    distance = lpips_distance(net)
    x, y = noise(0, 1, 3, side, side), noise(1, 1, 3, side, side)
    assert distance(x, y).isfinite().all()
    with one_sentence(net, f"{side} pixels", str(side - 1)):
        distance(x[..., 1:], y[..., 1:])


@pytest.mark.filterwarnings("ignore:::torchvision")
@pytest.mark.parametrize("shape", [(4, 2), (4, 4, 32, 32), (4, 2, 32, 32)])
def test_lpips_of_what_is_no_image_is_refused_in_one_sentence(
    monkeypatch, noise, one_sentence, shape
):
    trunk_without_weights(monkeypatch)
    with one_sentence("LPIPS", str(shape[1:])):
        lpips_distance("squeeze")(noise(0, *shape), noise(1, *shape))


@pytest.mark.filterwarnings("ignore:::torchvision")
def test_feature_distance_is_lpips_without_its_heads(noise):
    import lpips

    torch.manual_seed(0)
    oracle = lpips.LPIPS(net="squeeze", lpips=False, pnet_rand=True, verbose=False).double()
    x, y = images(noise, 0), images(noise, 1)
    distance = feature_distance(lambda image: oracle.net(oracle.scaling_layer(image)))
    torch.testing.assert_close(distance(x, y), oracle(x, y).flatten(), rtol=1e-6, atol=1e-9)


def test_feature_distance_is_a_distance_whose_gradient_is_finite(noise):
    """At pixels where a ReLU is zero in every channel too."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 8, 3).double()
    distance = feature_distance(lambda image: [layer(image).relu(), image.relu()])
    x, y = images(noise, 0).requires_grad_(), images(noise, 1)
    d = distance(x, y)
    assert d.shape == (4,) and (d > 0).all() and distance(y, y).tolist() == [0] * 4
    torch.testing.assert_close(distance(y, x), d)
    (gradient,) = torch.autograd.grad(d.sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    (gradient,) = torch.autograd.grad(distance(x * 0, y).sum(), x)
    assert gradient.isfinite().all()


def test_lpips_without_its_package_says_how_to_install_it(monkeypatch, one_sentence):
    monkeypatch.setitem(sys.modules, "lpips", None)  # what import then raises ImportError for
    with one_sentence("pip install lpips", "l2"):
        lpips_distance("squeeze")


@pytest.mark.filterwarnings("ignore:::torchvision")
@pytest.mark.parametrize(
    "failure",
    [
        URLError("no route to host"),
        ConnectionResetError("connection reset by peer"),
        TimeoutError("timed out"),
        PermissionError("permission denied"),
        RuntimeError('invalid hash value (expected "b8a52dc0", got "00000000")'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_lpips_without_its_weights_says_where_to_put_them(
    monkeypatch, tmp_path, one_sentence, failure
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise failure

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with one_sentence("squeeze", str(tmp_path / "hub"), "checkpoints", "l2"):
        lpips_distance("squeeze")


def test_lpips_knows_its_trunks(one_sentence):
    with one_sentence("LPIPS network", "'inception'", "alex", "squeeze", "vgg"):
        lpips_distance("inception")


def test_projection_and_radius_keep_x_within_r_of_its_noise(noise):
    r = radius(0.0242, 64, 12) * 80
    x_T = 80 * noise(0, 5, 1, 8, 8)
    moved = project_to_ball(x_T + 100 * noise(1, 5, 1, 8, 8), x_T, r)
    length = (moved - x_T).flatten(1).norm(dim=1)
    assert length.tolist() == pytest.approx([r] * 5) and math.isfinite(r)
