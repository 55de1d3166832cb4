"""Denoisers: the exact one against quadrature and its own score; the wrappers change nothing."""

import types

import pytest
import torch

from s4s_core import (
    EDM,
    CallCounter,
    GaussianMixture,
    RectifiedFlow,
    VPDiscrete,
    VPLinear,
    from_denoiser,
    from_flow,
    from_noise_prediction,
    from_velocity,
    guided,
    in_precision,
    rematerialized,
    rescheduled,
)
from s4s_core.denoiser import check_contract, of_model

SCHEDULES = [EDM(), VPLinear(), VPDiscrete(), RectifiedFlow()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
TIMES = [0.01, 0.1, 0.4, 0.9]


def line(schedule):
    """Three Gaussians on a line."""
    return GaussianMixture([1.0, 2.0, 3.0], [[-1.0], [0.2], [1.5]], [0.3, 0.1, 0.5], schedule)


def plane(schedule):
    means = [[-1.0, 0.5], [0.2, -0.7], [1.5, 0.1]]
    return GaussianMixture([0.2, 0.5, 0.3], means, [0.3, 0.1, 0.5], schedule)


def scalar(t):
    return torch.tensor(t, dtype=torch.float64)


@every_schedule
@pytest.mark.parametrize("t", TIMES)
def test_mixture_denoiser_is_the_posterior_mean(schedule, t):
    mixture, t = line(schedule), scalar(t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_0 = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    prior = mixture.log_prob(x_0[:, None]).exp()
    x = alpha * torch.tensor([-2.0, -0.5, 0.1, 0.3, 1.0, 2.5], dtype=torch.float64)
    likelihood = (-((x[:, None] - alpha * x_0) ** 2) / (2 * sigma**2)).exp()
    posterior = prior * likelihood
    mean = torch.trapezoid(posterior * x_0, x_0) / torch.trapezoid(posterior, x_0)
    torch.testing.assert_close(mixture(x[:, None], t)[:, 0], mean, rtol=0, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("t", TIMES)
def test_mixture_denoiser_obeys_tweedie(noise, schedule, t):
    mixture, t = plane(schedule), scalar(t)
    x = (2 * noise(0, 20, 2)).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_prob(x, t).sum(), x)
    expected = (x + schedule.sigma(t) ** 2 * score) / schedule.alpha(t)
    torch.testing.assert_close(mixture(x, t), expected.detach(), rtol=1e-9, atol=1e-9)


@every_schedule
def test_mixture_density_integrates_to_one(schedule):
    grid = torch.linspace(-7, 7, 801, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    cell = (grid[1] - grid[0]) ** 2
    for t in (None, scalar(0.3)):
        total = plane(schedule).log_prob(points, t).exp().sum() * cell
        assert total.item() == pytest.approx(1, abs=1e-6)


@every_schedule
def test_noised_samples_have_the_density_at_t(noise, schedule):
    mixture, t = plane(schedule), scalar(0.3)
    x_0 = mixture.sample(20000, seed=1)
    x_t = schedule.alpha(t) * x_0 + schedule.sigma(t) * noise(2, 20000, 2)
    mean = mixture.weights @ mixture.means
    spread = (mixture.weights * (mixture.stds**2 + mixture.means.square().sum(1) / 2)).sum()
    spread = spread - mean.square().sum() / 2
    variance = schedule.alpha(t) ** 2 * spread + schedule.sigma(t) ** 2
    assert x_t.mean(0).tolist() == pytest.approx((schedule.alpha(t) * mean).tolist(), abs=0.03)
    assert x_t.var(0).mean().item() == pytest.approx(variance.item(), rel=0.03)
    # The mean log density of samples is minus the entropy: any other density would give less.
    shifted = mixture.log_prob(x_t + 0.1, t).mean()
    assert mixture.log_prob(x_t, t).mean() > shifted


def test_mixture_weights_are_normalised_and_samples_repeat():
    mixture = line(EDM())
    assert mixture.weights.sum().item() == pytest.approx(1)
    assert torch.equal(mixture.sample(5, seed=3), mixture.sample(5, seed=3))
    assert not torch.equal(mixture.sample(5, seed=3), mixture.sample(5, seed=4))


@every_schedule
@pytest.mark.parametrize("t", TIMES)
def test_noise_prediction_of_a_denoiser_gives_the_denoiser_back(noise, schedule, t):
    mixture, t = plane(schedule), scalar(t)

    def predict_noise(x, times):
        assert times.shape == (len(x),)
        return (x - schedule.alpha(t) * mixture(x, t)) / schedule.sigma(t)

    x = noise(0, 7, 2)
    denoiser = from_noise_prediction(predict_noise, schedule)
    torch.testing.assert_close(denoiser(x, t), mixture(x, t), rtol=1e-10, atol=1e-10)
    assert denoiser.schedule == schedule


@every_schedule
@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("make", [from_velocity, from_flow])
def test_other_predictions_of_a_denoiser_give_the_denoiser_back(noise, schedule, t, make):
    mixture, t = plane(schedule), scalar(t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)

    def predict(x, times):
        assert times.shape == (len(x),)
        x_0 = mixture(x, t)
        eps = (x - alpha * x_0) / sigma
        return alpha * eps - sigma * x_0 if make is from_velocity else eps - x_0

    x = noise(0, 7, 2)
    denoiser = make(predict, schedule)
    torch.testing.assert_close(denoiser(x, t), mixture(x, t), rtol=1e-10, atol=1e-10)
    assert denoiser.schedule == schedule


@pytest.mark.parametrize("schedule", [RectifiedFlow(), RectifiedFlow(shift=3.0)])
def test_the_flow_is_the_derivative_of_the_path_in_sigma(noise, schedule):
    x_0, eps, sigma = noise(0, 4, 2), noise(1, 4, 2), schedule.sigma(0.3)

    def path(sigma):
        return (1 - sigma) * x_0 + sigma * eps

    _, flow = torch.autograd.functional.jvp(path, sigma, torch.ones_like(sigma))
    denoiser = from_flow(lambda x, times: flow, schedule)
    torch.testing.assert_close(denoiser(path(sigma), scalar(0.3)), x_0)


def test_guidance_is_one_call_of_both_conditions(noise):
    seen = []

    def network(x, t, shift, factor):
        seen.append((x.shape, t.shape, shift.shape))
        return factor * x + shift + t[:, None]

    x, t = noise(0, 5, 3), torch.full((5,), 0.3, dtype=torch.float64)
    one, none = ({"shift": noise(seed, 1, 3), "factor": noise(seed + 1, 1, 1)} for seed in (1, 3))
    c, u = network(x, t, **one), network(x, t, **none)
    for scale in (0.0, 1.0, 2.5):
        seen.clear()
        answer = guided(network, one, none, scale)(x, t)
        torch.testing.assert_close(answer, u + scale * (c - u), rtol=1e-13, atol=1e-13)
        rows = 5 if scale == 1 else 10
        assert seen == [((rows, 3), (rows,), (rows, 3))]


def test_guidance_of_the_prediction_is_guidance_of_the_denoiser_and_counts_once(noise):
    schedule, x, t = VPDiscrete(), noise(0, 4, 2), scalar(0.4)

    def network(x, times, mean):
        return x - mean

    one, none = ({"mean": noise(seed, 1, 2)} for seed in (1, 2))
    for make in (from_noise_prediction, from_velocity, from_flow, from_denoiser):
        c, u = (
            make(lambda x, t, condition=condition: network(x, t, **condition), schedule)(x, t)
            for condition in (one, none)
        )
        counted = CallCounter(make(guided(network, one, none, 3.0), schedule))
        torch.testing.assert_close(counted(x, t), u + 3 * (c - u), rtol=1e-12, atol=1e-12)
        assert counted.calls == 1


def test_guidance_takes_one_condition_a_sample(noise):
    x, t, rows = noise(0, 3, 2), torch.zeros(3), noise(1, 3, 2)
    predict = guided(lambda x, t, c: x * c, {"c": rows}, {"c": torch.zeros(1, 2)}, 2.0)
    torch.testing.assert_close(predict(x, t), 2 * x * rows)


@every_schedule
@pytest.mark.parametrize("own", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_rescheduled_mixture_is_the_mixture_of_that_schedule(noise, own, schedule):
    denoiser, expected = rescheduled(plane(own), schedule), plane(schedule)
    assert denoiser.schedule == schedule
    for t in map(scalar, TIMES):
        x = schedule.sigma(t) * noise(3, 7, 2)
        torch.testing.assert_close(denoiser(x, t), expected(x, t), rtol=1e-9, atol=1e-9)


def test_what_has_no_schedule_cannot_be_rescheduled(one_sentence):
    with one_sentence("noise schedule", "from_denoiser"):
        rescheduled(lambda x, t: x, EDM())


def test_from_denoiser_passes_one_time_a_sample(noise):
    seen = []

    def network(x, times):
        seen.append(times)
        return x / 2

    denoiser, x = from_denoiser(network, EDM()), noise(0, 5, 3, 4, 4)
    assert torch.equal(denoiser(x, scalar(0.7)), x / 2)
    assert denoiser.schedule == EDM()
    assert torch.equal(seen[0], torch.full((5,), 0.7, dtype=torch.float64))


def gradients(denoiser, network, x, t):
    network.zero_grad()
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    y = denoiser(x, t)
    y.square().sum().backward()
    return [y.detach(), x.grad, t.grad, *(p.grad.clone() for p in network.parameters())]


def test_rematerialization_changes_no_output_and_no_gradient(noise):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
    ).double()

    def forward(x, times):
        return network(torch.cat([x, times[:, None].log()], 1))

    plain = from_denoiser(forward, EDM())
    again = rematerialized(plain)
    assert again.schedule == EDM()
    x, t = noise(0, 4, 2), scalar(0.5)
    for a, b in zip(gradients(plain, network, x, t), gradients(again, network, x, t), strict=True):
        assert torch.equal(a, b)


def test_rematerialization_keeps_no_activations(noise):
    """Bytes saved for the backward pass: inputs only, however wide the network is."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 512), torch.nn.Tanh(), torch.nn.Linear(512, 2))
    network.double().requires_grad_(False)
    plain = from_denoiser(lambda x, times: network(x), EDM())
    x = noise(0, 8, 2).requires_grad_()

    def saved(denoiser) -> int:
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            denoiser(x, scalar(0.5))
        return sum(sizes)

    assert saved(plain) >= 8 * 512
    assert saved(rematerialized(plain)) <= 2 * x.numel()


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_rounds_the_network_and_nothing_else(noise, dtype, rounding):
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 2).requires_grad_(False)
    plain = from_denoiser(lambda x, times: x + network(x.float()), EDM())
    half = in_precision(plain, dtype)
    x, t = noise(0, 64, 2), scalar(0.5)
    error = (half(x, t) - plain(x, t)).abs().max() / plain(x, t).abs().max()
    assert half.schedule == EDM() and half(x, t).dtype == torch.float64
    assert 0 < error < 4 * rounding
    # Rematerialised, the second pass is rounded as the first was.
    for wrapped in (half, rematerialized(half)):
        start = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(wrapped(start, t).square().sum(), start)
        exact = 2 * plain(x, t) @ (torch.eye(2) + network.weight).double()
        assert (gradient - exact).norm() < 8 * rounding * exact.norm()


def test_count_calls_counts_and_changes_nothing(noise):
    mixture = plane(EDM())
    counted, x = CallCounter(mixture), noise(0, 3, 2)
    assert counted.calls == 0 and counted.schedule == EDM()
    for n in range(1, 4):
        assert torch.equal(counted(x, scalar(0.3)), mixture(x, scalar(0.3)))
        assert counted.calls == n


def test_a_function_without_a_schedule_stays_without_one():
    for wrap in (CallCounter, rematerialized):
        assert not hasattr(wrap(lambda x, t: x), "schedule")


class Convolution(torch.nn.Module):
    """An ordinary network in a dtype of its own, which casts nothing itself."""

    def __init__(self, answer=lambda x: x):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer, self.time = torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.Linear(1, 2)
        self.answer, self.seen = answer, []

    def forward(self, x, t, shift=0.0):
        self.seen.append((x.dtype, t.dtype))
        time = self.time(t[:, None].to(self.time.weight.dtype))
        return self.answer(self.layer(x) + time[..., None, None] + shift)


@pytest.mark.parametrize("make", [from_denoiser, from_noise_prediction, from_velocity, from_flow])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_module_is_asked_in_its_own_dtype_and_answers_in_that_of_x(noise, make, dtype):
    x, t, network = noise(0, 3, 2, 4, 4), scalar(0.4), Convolution()
    exact = make(Convolution().double(), VPLinear())(x, t)
    D = make(network.to(dtype), VPLinear())(x, t)
    assert D.dtype == torch.float64
    assert network.seen == [(dtype, torch.promote_types(dtype, torch.float32))]
    tolerance = {torch.float32: 1e-6, torch.float64: 0, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(D, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "wrap",
    [lambda x: (x, None), lambda x: types.SimpleNamespace(sample=x)],
    ids=["tuple", "sample"],
)
def test_answers_inside_a_tuple_or_an_object_are_unwrapped(noise, wrap):
    x, t = noise(0, 3, 2, 4, 4), scalar(0.4)
    plain, wrapped = (from_velocity(Convolution(a), VPLinear()) for a in (lambda x: x, wrap))
    assert torch.equal(plain(x, t), wrapped(x, t))
    both = [
        guided(Convolution(a), {"shift": 1.0}, {"shift": 1.0}, 2.0) for a in (lambda x: x, wrap)
    ]
    assert torch.equal(*(from_flow(network, VPLinear())(x, t) for network in both))


@pytest.mark.parametrize(
    ("conditional", "unconditional", "words"),
    [
        ({"c": torch.ones(1), "mask": None}, {"c": torch.ones(1)}, ["mask"]),
        ({"c": torch.ones(1)}, {"c": torch.ones(1), "mask": None}, ["mask"]),
        ({"c": torch.ones(1)}, {"c": None}, ["c differ"]),
        ({"c": torch.ones(1), "scale": 1.0}, {"c": torch.ones(1), "scale": 2.0}, ["scale"]),
        ({"c": torch.ones(2)}, {"c": torch.ones(2)}, ["(2,)", "3 samples"]),
    ],
)
def test_conditions_that_do_not_fit_are_named(
    noise, one_sentence, conditional, unconditional, words
):
    with one_sentence(*words):
        denoiser = from_denoiser(
            guided(lambda x, t, **c: x, conditional, unconditional, 2.0), EDM()
        )
        denoiser(noise(0, 3, 2), scalar(1.0))


def test_what_is_no_tensor_is_the_same_in_both_conditions(noise):
    def network(x, t, c, scale, mask):
        assert mask is None
        return x * scale + c[:, None]

    told = [{"c": torch.tensor([c]), "scale": 3.0, "mask": None} for c in (2.0, 1.0)]
    x = noise(0, 3, 2)
    answer = guided(network, *told, 4.0)(x, torch.ones(1).expand(3))
    torch.testing.assert_close(answer, 3 * x + 1 + 4 * (2 - 1))


@pytest.mark.parametrize(
    "wrap", [rematerialized, CallCounter, lambda D: in_precision(D, torch.float32)]
)
def test_wrappers_keep_schedule_and_model(wrap):
    denoiser = of_model(from_denoiser(lambda x, t: x, EDM()), {"name": "mine"})
    assert (wrap(denoiser).schedule, wrap(denoiser).model) == (EDM(), {"name": "mine"})
    moved = rescheduled(denoiser, VPLinear())
    assert (moved.schedule, moved.model) == (VPLinear(), {"name": "mine"})


@pytest.mark.parametrize(
    ("fault", "gradient", "words"),
    [
        (lambda x, t: x.detach() / 2, True, ["gradient", "learn_gauss_newton"]),
        (lambda x, t: torch.nn.Linear(3, 3)(x), False, ["float64", "from_denoiser"]),
        (lambda x, t: (x, x), False, ["returns tuple"]),
        (lambda x, t: x + torch.rand(()), True, ["eval()"]),
        (lambda x, t: x / 2 + 0 * x.mul_(2), True, ["copy"]),
    ],
)
def test_the_contract_of_a_denoiser(noise, one_sentence, fault, gradient, words):
    check_contract(lambda x, t: x / 2, noise(0, 2, 3), scalar(1.0), gradient=True)
    with one_sentence(*words):
        check_contract(fault, noise(0, 2, 3), scalar(1.0), gradient)
