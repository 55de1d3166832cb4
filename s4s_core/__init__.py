"""S4S: learn the coefficients and time steps of a diffusion solver (Frankel et al., ICML 2025).

Read the modules in this order: schedule, grid, solver, teacher, objective, learn.
"""

__version__ = "0.1.0"

from .base import UsageError, progress
from .evaluate import FeatureSums, feature_sums, frechet_distance, merge
from .grid import (
    GRIDS,
    LearnedGrid,
    TimeGrid,
    time_edm,
    time_logsnr,
    time_quadratic,
    time_uniform,
)
from .learn import (
    Epoch,
    LearningDiverged,
    learn_alternating,
    learn_coefficients,
    learn_jointly,
    learn_times,
)
from .model import (
    GaussianMixture,
    conditioned,
    count_calls,
    from_denoiser,
    from_noise_prediction,
    rematerialized,
)
from .objective import (
    decoded_distance,
    feature_distance,
    l2,
    lpips_distance,
    project_to_ball,
    radius,
    relaxed_loss,
)
from .schedule import EDM, NoiseSchedule, RectifiedFlow, VPDiscrete, VPLinear
from .solver import (
    SOLVERS,
    Coefficients,
    Solver,
    count_parameters,
    ddim,
    deis,
    dpm_solver_pp,
    exponential_adams,
    gaussian,
    ipndm,
    trajectory,
    unipc,
)
from .teacher import TeacherSet, generate, initial_noise, make_teacher_set
from .zoo import Params, Setup, datasets, load, load_params, read_params

_EXPERIMENT = ("Experiment", "Result", "check_lists", "results_folder", "run", "run_all", "start")


def __getattr__(name: str):
    # Loaded when asked for: `python -m s4s_core.experiment` must find it not yet imported.
    if name in _EXPERIMENT:
        from importlib import import_module

        return getattr(import_module(".experiment", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPERIMENT])
