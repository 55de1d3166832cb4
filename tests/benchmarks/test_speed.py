"""What the solvers cost beside the network's own calls; run with pytest --benchmark-only.

Nothing here is asserted, since timings depend on the machine: the ratios stand in extra_info, and
--benchmark-json writes them. Compared is CPU time in user mode on one thread, which hardly depends
on what else the machine does or on how its allocator returns memory. Memory is Linux's count.
"""

import json
import os
import resource
import statistics
import subprocess
import sys

import pytest
import torch
from torch import nn

from s4s_core import (
    EDM,
    SOLVERS,
    ModelStatistics,
    Setup,
    Solver,
    TeacherSet,
    VPDiscrete,
    dpm_solver_v3,
    from_denoiser,
    ipndm,
    make_scheduler,
    time_logsnr,
)
from s4s_core.learn import learn_coefficients
from s4s_core.params import Params

BATCH, SHAPE, NFE = 64, (3, 32, 32), 5


class Network(nn.Module):
    """Three million parameters, most of them at an eighth of the resolution, as in a U-Net."""

    def __init__(self):
        super().__init__()
        fine = [self.block(32) for _ in range(8)]
        coarse = [self.block(256) for _ in range(5)]
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            *fine,
            nn.Conv2d(32, 256, 8, stride=8),
            *coarse,
            nn.Conv2d(256, 3 * 64, 1),
            nn.PixelShuffle(8),
        )
        self.requires_grad_(False)

    @staticmethod
    def block(channels: int) -> nn.Module:
        return nn.Sequential(nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x, t):
        return self.layers(x.float() / (1 + t.float().view(-1, 1, 1, 1))).to(x.dtype)


def small_setup(**settings) -> Setup:
    torch.manual_seed(0)
    fixed = {"n_train": BATCH, "n_valid": 1, "batch_size": BATCH, "epochs": 1, "distance": "l2"}
    params = Params("EDM", list(SHAPE), accept_if_better=False, **{**fixed, **settings})
    denoiser = from_denoiser(Network(), EDM())
    return Setup("speed", denoiser, EDM(), SHAPE, params, torch.flatten, "pixels", lambda: None)


def noise() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 80 * torch.randn(BATCH, *SHAPE, generator=generator, dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


on_cpu_time = pytest.mark.benchmark(timer=user_seconds)


class Timed:
    """A denoiser that adds up the time spent in its calls."""

    def __init__(self, denoiser):
        self.denoiser, self.schedule, self.seconds = denoiser, denoiser.schedule, 0.0

    def __call__(self, x, t):
        began = user_seconds()
        x_0 = self.denoiser(x, t)
        self.seconds += user_seconds() - began
        return x_0


def with_statistics(grid, order):
    """DPM-Solver-v3, whose tables have a number for each pixel."""
    lam = time_logsnr(EDM(), 7).lam
    l, s, b = (0.1 * torch.rand(3, len(lam), *SHAPE, dtype=torch.float64)).unbind()  # noqa: E741
    return dpm_solver_v3(grid, ModelStatistics(lam, l, s, b), order)


FAMILIES = {
    **SOLVERS,
    "generalised": lambda grid, order: ipndm(grid, order).pad(grid.nfe, states=grid.nfe),
    "dpm_solver_v3": with_statistics,
}


@on_cpu_time
@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_against_its_network_calls(benchmark, name):
    """Target: 1.03, and 1.05 for the families beyond Eq. 5."""
    setup, x_T, grid = small_setup(), noise(), time_logsnr(EDM(), NFE)
    solver = Solver(FAMILIES[name](grid, 1 if name == "ddim" else 3), grid)
    ratios = []

    def sample():
        denoiser, began = Timed(setup.denoiser), user_seconds()
        solver.sample(denoiser, x_T)
        ratios.append((user_seconds() - began) / denoiser.seconds)

    benchmark.pedantic(sample, rounds=4, warmup_rounds=1)
    benchmark.extra_info["ratio"] = round(statistics.median(ratios[1:]), 4)


@on_cpu_time
@pytest.mark.parametrize("name", ["unipc", "generalised"])
def test_a_scheduler_step_against_that_of_unipc_in_diffusers(benchmark, name):
    """Target: 1, for latents of 1024 x 1024 pixels without a network."""
    from diffusers import UniPCMultistepScheduler

    grid = time_logsnr(VPDiscrete(), NFE)
    ours = make_scheduler(Solver(FAMILIES[name](grid, 3), grid))
    theirs = UniPCMultistepScheduler(solver_order=3, beta_schedule="scaled_linear")
    x_T, answer = torch.randn(2, 1, 4, 128, 128).unbind()

    def sample(scheduler):
        for _ in range(20):
            scheduler.set_timesteps(NFE)
            x = x_T
            for t in scheduler.timesteps:
                scheduler.scale_model_input(x, t)
                x = scheduler.step(answer, t, x, return_dict=False)[0]

    def seconds(scheduler):
        began = user_seconds()
        sample(scheduler)
        return user_seconds() - began

    ratios = [seconds(ours) / seconds(theirs) for _ in range(5)]
    benchmark.pedantic(sample, (ours,), rounds=3)
    benchmark.extra_info["ratio"] = round(statistics.median(ratios), 4)


def learning(setup: Setup, nfe: int):
    """A generator of epochs of one step each, the epoch before the first behind it."""
    grid, x_T = time_logsnr(EDM(), nfe), noise()
    teacher = TeacherSet(torch.cat([x_T, x_T[:1]]), torch.zeros(BATCH + 1, *SHAPE), BATCH)
    epochs = learn_coefficients(Solver(ipndm(grid, 3), grid), setup, teacher)
    next(epochs)
    return epochs


@on_cpu_time
def test_a_learning_step_against_forward_and_backward_passes(benchmark):
    """Target: 1.10."""
    setup, x_T, grid = small_setup(), noise(), time_logsnr(EDM(), NFE)

    def bare():
        for t in grid.t[:-1]:
            x = x_T.clone().requires_grad_()
            setup.denoiser(x, t).sum().backward()

    seconds = []

    def prepare():
        epochs = learning(setup, NFE)
        began = user_seconds()
        bare()
        seconds.append(user_seconds() - began)
        return (epochs,), {}

    benchmark.pedantic(next, setup=prepare, rounds=8, warmup_rounds=1)
    benchmark.extra_info["ratio"] = round(benchmark.stats.stats.min / min(seconds[1:]), 4)


PEAK = """
import json, pathlib, re, sys
sys.path.insert(0, sys.argv[1])
import test_speed
test_speed.torch.set_num_threads(1)

def peak():  # of this process alone, in MB; getrusage would begin with its parent's
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024

setup = test_speed.small_setup(rematerialize=sys.argv[3] == "rematerialized")
epochs = test_speed.learning(setup, int(sys.argv[2]))
before = peak()
next(epochs)
print(json.dumps([before, peak()]))
"""


def peak_memory(nfe: int, how: str) -> tuple[float, float]:
    """MB of a process that makes one learning step: at its peak, and above what it had before."""
    # Freed memory returns to the system at once, so that the peak is of what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, os.path.dirname(__file__), str(nfe), how]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, peak = json.loads(output.stdout)
    return round(peak), round(peak - before)


def test_peak_memory_of_learning_ten_steps_against_three(benchmark):
    """Target: 1.15."""
    found = {f"{n} {how}": peak_memory(n, how) for n, how in MEMORY_RUNS}
    ten, three = found["10 rematerialized"], found["3 rematerialized"]
    benchmark.extra_info["ratio"] = round(ten[0] / three[0], 4)
    benchmark.extra_info["ratio of the step alone"] = round(ten[1] / three[1], 4)
    benchmark.extra_info["MB (peak, of the step)"] = found
    benchmark.pedantic(lambda: None)  # pytest-benchmark wants something to time


MEMORY_RUNS = [(3, "rematerialized"), (10, "rematerialized"), (3, "plain")]
