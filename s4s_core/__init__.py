"""S4S: learn the coefficients and time steps of a diffusion solver (Frankel et al., ICML 2025).

Read the modules in this order: schedule, grid, solver, teacher, objective, learn.
"""

__version__ = "0.1.0"

from .base import UsageError, progress
from .check import check_denoiser
from .density import Divergence, compare_densities, invert, jacobian, log_abs_det
from .download import fetch, file_sha256
from .dpm_solver_v3 import ModelStatistics, dpm_solver_v3, model_statistics
from .evaluate import (
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
from .grid import (
    GRIDS,
    LearnedGrid,
    TimeGrid,
    time_edm,
    time_edm_t,
    time_logsnr,
    time_quadratic,
    time_uniform,
)
from .grid_search import ays, cheapest_path, dmn, dmn_bound, gits
from .learn import (
    Epoch,
    LearningDiverged,
    learn_alternating,
    learn_bns,
    learn_coefficients,
    learn_generalised,
    learn_jointly,
    learn_times,
)
from .model import (
    GaussianMixture,
    conditioned,
    count_calls,
    from_denoiser,
    from_flow,
    from_noise_prediction,
    from_velocity,
    guided,
    in_precision,
    rematerialized,
    rescheduled,
)
from .objective import (
    decoded_distance,
    feature_distance,
    l2,
    lpips_distance,
    negative_psnr,
    project_to_ball,
    radius,
    relaxed_loss,
)
from .pipelines import from_diffusers
from .schedule import EDM, NoiseSchedule, RectifiedFlow, VPDiscrete, VPLinear, VPTable
from .solver import (
    SOLVERS,
    Coefficients,
    SingleStepCoefficients,
    Solver,
    consistent,
    count_parameters,
    ddim,
    deis,
    dpm_solver,
    dpm_solver_pp,
    exponential_adams,
    gaussian,
    ipndm,
    local_errors,
    locally_optimal,
    trajectory,
    unipc,
)
from .teacher import (
    TeacherSet,
    exact_path,
    generate,
    global_error,
    initial_noise,
    make_teacher_set,
    sample_path,
)
from .zoo import Params, Setup, datasets, load, load_params, load_planar, read_params

_EXPERIMENT = (
    "Experiment",
    "Result",
    "check_lists",
    "learning_seconds",
    "results_folder",
    "run",
    "run_all",
    "settings_of",
    "start",
    "sweep",
)


def __getattr__(name: str):
    # Loaded when asked for: `python -m s4s_core.experiment` must find it not yet imported.
    if name in _EXPERIMENT:
        from importlib import import_module

        return getattr(import_module(".experiment", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPERIMENT])
