"""Noise schedules: the two coordinates are inverse to each other and equal the published tables."""

import json
import math

import diffusers
import pytest
import torch

from s4s_core import EDM, RectifiedFlow, VPDiscrete, VPLinear, VPTable
from s4s_core.schedule import SCHEDULES, schedule_from_dict

SD, LDM = VPDiscrete(), VPDiscrete.ldm()
LINEAR = tuple((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).tolist())
TABLE = VPTable(alphas_cumprod=LINEAR)
ALL = [EDM(), VPLinear(), SD, LDM, TABLE, RectifiedFlow(), RectifiedFlow(shift=3.0)]
SEEDS = range(3)


def names(schedule):
    named = {LDM: "LDM", SD: "SD", ALL[-1]: "RectifiedFlow-shift"}
    return named.get(schedule, type(schedule).__name__)


every_schedule = pytest.mark.parametrize("schedule", ALL, ids=names)


def times(schedule, seed, n=200):
    """Random times, dense near t_min too, with both ends."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    span = math.log(schedule.T / schedule.t_min)
    ends = torch.tensor([schedule.T, schedule.t_min], dtype=torch.float64)
    logarithmic = schedule.t_min * (span * u).exp()
    uniform = schedule.t_min + (schedule.T - schedule.t_min) * u
    return torch.cat([ends, logarithmic, uniform]).clamp(schedule.t_min, schedule.T)


@every_schedule
@pytest.mark.parametrize("seed", SEEDS)
def test_time_and_lambda_are_inverse(schedule, seed):
    t = times(schedule, seed)
    torch.testing.assert_close(schedule.t_of_lam(schedule.lam(t)), t, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.t_of_s(schedule.s(t)), t, rtol=1e-10, atol=0)
    lam = schedule.lam(t)
    torch.testing.assert_close(schedule.lam(schedule.t_of_lam(lam)), lam, rtol=0, atol=1e-10)


@every_schedule
def test_lambda_is_log_alpha_over_sigma_and_rises_towards_the_data(schedule):
    t = times(schedule, 0).unique()
    ratio = schedule.sigma(t) / schedule.alpha(t)
    torch.testing.assert_close(schedule.s(t), ratio, rtol=1e-14, atol=0)
    torch.testing.assert_close(schedule.lam(t), -ratio.log(), rtol=0, atol=1e-13)
    # Neighbours may be closer than rounding lets lambda tell apart.
    t = t[torch.cat([torch.tensor([True]), t.diff() > 1e-9 * t[1:]])]
    assert (schedule.lam(t).diff() < 0).all()
    assert (schedule.alpha(t) > 0).all() and (schedule.sigma(t) > 0).all()


@pytest.mark.parametrize("schedule", [VPLinear(), SD, LDM, TABLE], ids=names)
def test_variance_preserving_schedules_preserve_variance(schedule):
    t = times(schedule, 0)
    total = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(t), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("t", "log_alpha", "lam"),
    [
        (0.75, -1.4356656670, -1.4065207623),
        (0.5, -0.6406615898, -0.4780252414),
        (0.25, -0.1962010901, 0.3664296530),
        (0.1, None, 1.0738987038),
        (0.01, None, 2.3690711864),
    ],
)
def test_stable_diffusion_has_its_reference_values(t, log_alpha, lam):
    assert SD.lam(t).item() == pytest.approx(lam, abs=6e-11)
    if log_alpha is not None:
        assert SD.alpha(t).log().item() == pytest.approx(log_alpha, abs=6e-11)


@pytest.mark.parametrize(
    ("schedule", "ends", "s_ends"),
    [
        (EDM(), (-4.382027, 6.214608), (80, 0.002)),
        (SD, (-2.682024, 3.534712), (14.614641, 0.029167)),
        (LDM, (-4.428701, 3.250395), (83.822494, 0.038759)),
    ],
    ids=["EDM", "SD", "LDM"],
)
def test_ends_have_their_reference_values(schedule, ends, s_ends):
    t = torch.tensor([schedule.T, schedule.t_min], dtype=torch.float64)
    assert schedule.lam(t).tolist() == pytest.approx(ends, abs=1e-6)
    assert schedule.s(t).tolist() == pytest.approx(s_ends, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "betas"), [(SD, (0.00085, 0.012)), (LDM, (0.0015, 0.0195))], ids=["SD", "LDM"]
)
def test_discrete_schedules_equal_those_of_diffusers_at_every_noise_level(schedule, betas):
    oracle = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=betas[0],
        beta_end=betas[1],
        beta_schedule="scaled_linear",
    )
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    # diffusers multiplies a thousand factors in float32
    alphas_cumprod = oracle.alphas_cumprod.double()
    torch.testing.assert_close(schedule.alpha(t) ** 2, alphas_cumprod, rtol=3e-5, atol=0)


def test_a_table_has_its_levels_whatever_made_them():
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(
        TABLE.alpha(t) ** 2, torch.tensor(LINEAR).double(), rtol=1e-6, atol=0
    )
    table = VPTable(alphas_cumprod=tuple((SD.alpha(t) ** 2).tolist()))
    between = torch.tensor([1e-3, 0.12345, 0.5, 0.98765], dtype=torch.float64)
    torch.testing.assert_close(table.lam(between), SD.lam(between), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_shift_is_that_of_diffusers(shift):
    oracle = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    t = torch.linspace(0.99, 0.01, 9, dtype=torch.float64)
    oracle.set_timesteps(sigmas=t.tolist())
    sigma = RectifiedFlow(shift=shift).sigma(t)
    torch.testing.assert_close(sigma, oracle.sigmas[:-1].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(1000 * sigma, oracle.timesteps.double(), rtol=1e-6, atol=0)


def test_discrete_schedules_are_linear_in_log_alpha_between_and_beyond_the_levels():
    t = torch.tensor([0.5, 0.5004, 0.501], dtype=torch.float64)
    left, inside, right = SD.alpha(t).log()
    assert inside.item() == pytest.approx((0.6 * left + 0.4 * right).item(), abs=1e-13)
    beyond = SD.alpha(torch.tensor([0.001, 0.0005, 0.002], dtype=torch.float64)).log()
    assert beyond[1].item() == pytest.approx((1.5 * beyond[0] - 0.5 * beyond[2]).item(), abs=1e-13)


def test_vp_linear_integrates_its_beta():
    schedule = VPLinear()
    for t in (1e-3, 0.2, 1.0):
        u = torch.linspace(0, t, 20001, dtype=torch.float64)
        integral = torch.trapezoid(0.1 + u * (20 - 0.1), u).item()
        assert schedule.alpha(t).log().item() == pytest.approx(-integral / 2, rel=1e-12)


def test_flow_and_edm_are_what_they_say():
    t = times(RectifiedFlow(), 0)
    assert torch.equal(RectifiedFlow().alpha(t) + RectifiedFlow().sigma(t), torch.ones_like(t))
    assert torch.equal(RectifiedFlow().sigma(t), t)
    assert torch.equal(EDM().sigma(t), t) and torch.equal(EDM().alpha(t), torch.ones_like(t))


@every_schedule
@pytest.mark.parametrize("method", ["alpha", "sigma", "lam", "s"])
def test_derivatives_equal_finite_differences(schedule, method):
    # Between the levels: at a knot of a discrete schedule there is no derivative.
    t = torch.tensor([0.0105, 0.1234, 0.5678, 0.9012], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(getattr(schedule, method), t, eps=1e-7, atol=1e-5, rtol=1e-5)


@every_schedule
def test_derivatives_of_the_inverse_equal_finite_differences(schedule):
    t = torch.tensor([0.0105, 0.1234, 0.5678, 0.9012], dtype=torch.float64)
    lam = schedule.lam(t).requires_grad_()
    assert torch.autograd.gradcheck(schedule.t_of_lam, lam, eps=1e-6, atol=1e-5, rtol=1e-5)


@every_schedule
def test_methods_keep_shape_and_take_plain_floats(schedule):
    t = times(schedule, 0)[:6].view(2, 3)
    for method in (schedule.alpha, schedule.sigma, schedule.lam, schedule.s):
        assert method(t).shape == t.shape
        assert method(schedule.T).dtype == torch.float64 and method(schedule.T).shape == ()
        assert method(schedule.T) == method(torch.tensor(schedule.T, dtype=torch.float64))


@every_schedule
def test_schedule_comes_back_from_its_dict(schedule):
    assert schedule_from_dict(schedule.to_dict()) == schedule
    assert schedule_from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert schedule.to_dict()["name"] in SCHEDULES


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (None, ["mapping"]),
        ([["name", "EDM"]], ["mapping"]),
        ({}, ["noise schedule", "EDM"]),
        ({"name": "Cosine"}, ["Cosine", "EDM", "VPLinear"]),
        ({"name": ["EDM"]}, ["noise schedule"]),
        ({"name": "EDM", "beta_0": 0.1}, ["beta_0", "T", "t_min"]),
        ({"name": "EDM", "T": "80"}, ["EDM.T", "number", "'80'"]),
        ({"name": "EDM", "T": True}, ["EDM.T", "number"]),
        ({"name": "EDM", "T": 0.001}, ["T > t_min"]),
        ({"name": "EDM", "t_min": 0.0}, ["t_min > 0"]),
        ({"name": "EDM", "T": math.nan}, ["T"]),
        ({"name": "EDM", "T": math.inf}, ["T"]),
        ({"name": "EDM", "T": 10**400}, ["EDM.T", "moderate size"]),
        ({"name": "EDM", "T": 10**5000}, ["EDM.T", "thousands of digits"]),
        ({"name": "VPLinear", "beta_1": -1e200}, ["beta_1", "-1e+200"]),
        ({"name": "VPTable", "alphas_cumprod": [0.9, 10**400]}, ["alphas_cumprod"]),
        ({"name": "VPDiscrete", "levels": 3 * 10**9}, ["levels", "1000000", "3000000000"]),
        ({"name": "RectifiedFlow", "T": 1.0}, ["T"]),
        ({"name": "VPDiscrete", "levels": 2.5}, ["levels"]),
        ({"name": "VPDiscrete", "levels": 1}, ["levels"]),
        ({"name": "VPDiscrete", "beta_start": -0.1}, ["beta_start"]),
        ({"name": "VPDiscrete", "beta_end": 1.5}, ["beta_end"]),
        ({"name": "VPLinear", "beta_1": -20.0}, ["beta_1"]),
        ({"name": "EDM", "T": [80.0]}, ["T > t_min"]),
        ({"name": "RectifiedFlow", "shift": -1.0}, ["shift"]),
        ({"name": "VPTable"}, ["VPTable"]),
        ({"name": "VPTable", "alphas_cumprod": 0.5}, ["VPTable"]),
        ({"name": "VPTable", "alphas_cumprod": [0.9]}, ["VPTable"]),
        ({"name": "VPTable", "alphas_cumprod": [0.9, "0.1"]}, ["alphas_cumprod", "'0.1'"]),
        ({"name": "VPTable", "alphas_cumprod": [0.1, 0.9]}, ["VPTable"]),
        ({"name": "VPTable", "alphas_cumprod": [0.9, 0.0]}, ["VPTable"]),
        ({"name": "VPTable", "alphas_cumprod": [[0.9], [0.1]]}, ["alphas_cumprod", "[0.9]"]),
    ],
)
def test_a_dict_that_is_no_schedule_is_refused_in_one_sentence(one_sentence, entries, words):
    with one_sentence(*words):
        schedule_from_dict(entries)
