"""The self-test: exact and trained denoisers pass, and every slip is caught and named."""

from itertools import product

import pytest
import torch

import s4s_core as s4s
from s4s_core import (
    EDM,
    RectifiedFlow,
    VPDiscrete,
    VPLinear,
    check_denoiser,
    from_denoiser,
    from_flow,
    from_noise_prediction,
    from_velocity,
)

MAKE = {
    "eps": from_noise_prediction,
    "x_0": from_denoiser,
    "v": from_velocity,
    "eps - x_0": from_flow,
}
SCHEDULES = {"EDM": EDM(), "VP": VPLinear(), "SD": VPDiscrete(), "RF": RectifiedFlow()}
# Time as a network is told it: from t on a schedule, and back.
TIMES = {
    "0 to 1": (lambda t, _: t, lambda m, _: m),
    "0 to 999": (lambda t, _: 1000 * t - 1, lambda m, _: (m + 1) / 1000),
    "sigma": (lambda t, S: S.s(t), lambda m, S: S.t_of_s(m.clamp(min=1e-9))),
    "ln sigma": (lambda t, S: S.s(t).log(), lambda m, S: S.t_of_s(m.clamp(-20, 20).exp())),
    "ln sigma / 4": (
        lambda t, S: S.s(t).log() / 4,
        lambda m, S: S.t_of_s((4 * m).clamp(-20, 20).exp()),
    ),
    "1 - t": (lambda t, _: 1 - t, lambda m, _: 1 - m),
    "2 t": (lambda t, _: 2 * t, lambda m, _: m / 2),
}


def network(setup, schedule, prediction: str, time: str = "0 to 999", sign: int = 1):
    """The setup's denoiser as a network that predicts something else and counts time otherwise."""

    def answer(x, times):
        t = TIMES[time][1](times[0].double(), schedule).clamp(schedule.t_min, schedule.T)
        alpha, sigma, s = schedule.alpha(t), schedule.sigma(t), schedule.s(t)
        x_0 = setup.denoiser(x / alpha, s)  # of EDM, where t is s
        eps = (x - alpha * x_0) / sigma
        predictions = {"eps": eps, "x_0": x_0, "v": alpha * eps - sigma * x_0}
        return sign * (predictions | {"eps - x_0": eps - x_0})[prediction]

    return answer


def wrapped(net, schedule, prediction: str, time: str = "0 to 999"):
    """What a user makes of such a network, rightly or wrongly."""
    return MAKE[prediction](lambda x, t: net(x, TIMES[time][0](t, schedule)), schedule)


@pytest.fixture(scope="module")
def digits():
    return s4s.load("digits", "cpu")


@pytest.fixture(scope="module")
def clean(digits):
    return digits.data()[:128]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prediction"), list(zip(SCHEDULES, MAKE, strict=True)))
@pytest.mark.parametrize("given", [True, False])
def test_the_trained_digits_pass(digits, clean, name, prediction, given):
    schedule = SCHEDULES[name]
    denoiser = wrapped(network(digits, schedule, prediction), schedule, prediction)
    check_denoiser(denoiser, schedule, digits.shape, clean if given else None)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exact_mixture_passes(mixture, name):
    setup, schedule = mixture(), SCHEDULES[name]
    denoiser = wrapped(network(setup, schedule, "v"), schedule, "v")
    check_denoiser(denoiser, schedule, setup.shape)
    check_denoiser(denoiser, schedule, setup.shape, setup.data()[:4096], seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SD", "RF"])
@pytest.mark.parametrize("true", MAKE)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_wrong_prediction_type_is_named(digits, clean, one_sentence, name, true, sign):
    schedule = SCHEDULES[name]
    net = network(digits, schedule, true, sign=sign)
    for taken_for in MAKE:
        if (taken_for, 1) != (true, sign):
            denoiser = wrapped(net, schedule, taken_for)
            predicted = f"predicted {'-' if sign < 0 else ''}{true}: make"
            with one_sentence(predicted, MAKE[true].__name__):
                check_denoiser(denoiser, schedule, digits.shape, clean)


@pytest.mark.slow
@pytest.mark.parametrize("true", ["eps", "v"])
def test_a_wrong_prediction_type_is_caught_without_data(digits, one_sentence, true):
    schedule = SCHEDULES["SD"]
    for taken_for, sign in [*product(MAKE, [1]), (true, -1)]:
        if (taken_for, 1) != (true, sign):
            denoiser = wrapped(network(digits, schedule, true, sign=sign), schedule, taken_for)
            with one_sentence("what it predicts", "clean samples"):
                check_denoiser(denoiser, schedule, digits.shape)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prediction"), [("SD", "eps"), ("RF", "x_0")])
@pytest.mark.parametrize("true", TIMES)
def test_every_wrong_time_is_caught(digits, clean, one_sentence, name, prediction, true):
    schedule = SCHEDULES[name]
    net = network(digits, schedule, prediction, true)
    for told in TIMES:
        if told != true:
            with one_sentence("denoise"):
                denoiser = wrapped(net, schedule, prediction, told)
                check_denoiser(denoiser, schedule, digits.shape, clean)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(
    ("true", "told"),
    [("0 to 999", "0 to 1"), ("0 to 999", "sigma"), ("sigma", "ln sigma"), ("0 to 1", "1 - t")],
)
def test_the_usual_wrong_times_are_caught_without_data(
    digits, one_sentence, prediction, true, told
):
    schedule = SCHEDULES["SD"]
    denoiser = wrapped(network(digits, schedule, prediction, true), schedule, prediction, told)
    with one_sentence("the time that its network is told"):
        check_denoiser(denoiser, schedule, digits.shape)


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_wrong_schedule_is_caught(digits, clean, one_sentence, prediction, given):
    for true, other in [(VPDiscrete(), VPDiscrete.ldm()), (VPLinear(), RectifiedFlow())]:
        denoiser = wrapped(network(digits, true, prediction), other, prediction)
        with one_sentence("does not denoise"):
            check_denoiser(denoiser, other, digits.shape, clean if given else None)


def spoilt(how):
    """A correct denoiser of N(0, 1) data with one fault."""
    return lambda x, t: how(x, x / (1 + t**2))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda x, D: D[:, :1], ["shape (4096, 1)", "(4096, 2)"]),
        (lambda x, D: D * torch.nan, ["NaN"]),
        (lambda x, D: D.clone() + 0 * x.zero_(), ["writes into its input"]),
        (lambda x, D: D + torch.rand_like(D), ["eval()"]),
        (lambda x, D: 0 * D, ["root mean square"]),
        (lambda x, D: 0 * D + 1, ["all alike"]),
    ],
)
def test_a_broken_contract_is_told_in_one_sentence(one_sentence, how, words):
    check_denoiser(spoilt(lambda x, D: D), EDM(), (2,))
    with one_sentence("denoise", *words):
        check_denoiser(spoilt(how), EDM(), (2,))


def test_the_self_test_repeats_and_costs_few_calls(digits, clean):
    counted = s4s.CallCounter(digits.denoiser)
    check_denoiser(counted, digits.schedule, digits.shape)
    assert counted.calls == 34
    check_denoiser(counted, digits.schedule, digits.shape, clean)
    assert counted.calls == 34 + 20


def test_data_that_do_not_fit_are_told_in_one_sentence(digits, clean, one_sentence):
    with one_sentence("x_0", "(1, 8, 8)", "(128, 8, 8)"):
        check_denoiser(digits.denoiser, EDM(), digits.shape, clean[:, 0])
    with one_sentence("scale the data"):
        check_denoiser(digits.denoiser, EDM(), digits.shape, 1e6 * clean)


def test_a_schedule_that_ends_in_signal_has_no_noise_to_begin_with(digits, clean, one_sentence):
    short = EDM(T=1.0)
    part = digits.variant(schedule=short, denoiser=s4s.rescheduled(digits.denoiser, short))
    check_denoiser(part.denoiser, short, digits.shape, clean)
    for ask in (
        lambda: check_denoiser(part.denoiser, short, digits.shape),
        lambda: s4s.make_teacher_set(part, 2, 2),
    ):
        with one_sentence("signal left", "sigma / alpha = 1", "raise T"):
            ask()


def told(factor):
    return lambda D: lambda x, t: D(x, factor * t), EDM()


def answered(how):
    return lambda D: lambda x, t: how(D(x, t)), EDM()


def read_on(schedule, shift=0.0):
    """The network of VPLinear on another schedule, or told a time off by `shift`."""
    own = VPLinear()

    def denoiser(D):
        def denoise(x, t):
            t = (t + shift).clamp(own.t_min, own.T)
            return D(x / own.alpha(t), own.s(t))

        return denoise

    return denoiser, schedule


# What is told with 128 clean samples, and what also without any.
SLIPS = [
    (told(1.1), False),
    (told(0.9), False),
    (told(1.3), True),
    (told(0.7), True),
    (answered(lambda D: 0.95 * D), True),
    (answered(lambda D: 1.05 * D), True),
    (answered(lambda D: 0.98 * D), False),
    (answered(lambda D: D + 0.05), True),
    (answered(lambda D: D - 0.03), True),
    (answered(lambda D: 0.9 * D + 0.1 * D.mean(0, keepdim=True)), True),
    (read_on(VPLinear(), shift=0.02), False),
    (read_on(VPLinear(), shift=-0.01), False),
    (read_on(VPLinear(beta_1=15.0)), False),
    (read_on(VPLinear(beta_0=0.2)), False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("slip", "without_data"), SLIPS)
def test_small_slips_are_told(digits, clean, one_sentence, slip, without_data):
    spoil, schedule = slip
    denoiser = spoil(digits.denoiser)
    with one_sentence("does not denoise"):
        check_denoiser(denoiser, schedule, digits.shape, clean)
    if without_data:
        with one_sentence("does not denoise", "can tell more"):
            check_denoiser(denoiser, schedule, digits.shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "ecg"])
@pytest.mark.parametrize("seed", [1, 2])
def test_trained_networks_pass_on_other_noises(name, seed):
    setup = s4s.load(name, "cpu")
    check_denoiser(setup.denoiser, setup.schedule, setup.shape, seed=seed)
