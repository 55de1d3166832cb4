"""S4S: learn the coefficients and time steps of a diffusion solver (Frankel et al., ICML 2025).

The method is in the files of this folder. Read them in this order: schedule, grid, denoiser,
solver, published, objective, evaluate, params, setup, teacher, learn, gauss_newton. The folders
hold the rest: models, baselines, experiments, lessons, deploy.
"""

__version__ = "0.2.0"

from .baselines.dpm_solver_v3 import ModelStatistics, dpm_solver_v3, model_statistics
from .baselines.grid_search import cheapest_path, dmn, dmn_bound, gits
from .baselines.learned import learn_bns, learn_generalised
from .denoiser import (
    CallCounter,
    Denoiser,
    conditioned,
    from_denoiser,
    from_flow,
    from_noise_prediction,
    from_velocity,
    guided,
    in_precision,
    rematerialized,
    rescheduled,
)
from .deploy.compiled import CompiledSolver, compile_solver
from .deploy.family import SolverFamily
from .deploy.hub import push_to_hub, save_pretrained
from .deploy.install import install, make_scheduler, save_pipeline
from .deploy.k_diffusion import sample_s4s, sigmas_of, snap_to_levels
from .deploy.learn_family import FamilyEpoch, learn_family, stretch
from .errors import UsageError, choose, progress
from .evaluate import (
    FeatureStatistics,
    FeatureSums,
    feature_sums,
    frechet_distance,
    interval,
    merge,
    thumbnails,
)
from .experiments.cache import results_folder
from .experiments.experiment import Experiment, require_lists, sweep
from .experiments.run import (
    Result,
    RunsFailedError,
    initial_solver,
    learn_on,
    learning_costs,
    run,
    run_all,
    sample_errors,
)
from .gauss_newton import learn_gauss_newton
from .grid import (
    GRIDS,
    LearnedGrid,
    TimeGrid,
    ays,
    time_edm,
    time_edm_t,
    time_logsnr,
    time_quadratic,
    time_uniform,
)
from .learn import (
    Epoch,
    LearningDivergedError,
    collect,
    learn_alternating,
    learn_coefficients,
    learn_jointly,
    learn_times,
)
from .lessons.density import Divergence, compare_densities, invert, jacobian, log_abs_det
from .lessons.exact import exact_path, global_error, local_errors, locally_optimal, sample_path
from .models import networks
from .models.check import check_denoiser
from .models.diffusers_pipeline import from_diffusers
from .models.download import fetch, file_sha256
from .models.inception import (
    inception_features,
    inception_weights,
    read_reference,
    save_statistics,
    to_uint8,
)
from .models.mixture import GaussianMixture
from .models.zoo import load, load_2d, load_guidances
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
from .params import Params, datasets, load_params, read_params, settings_for
from .published import (
    SOLVERS,
    PublishedSolver,
    Scheme,
    ddim,
    deis,
    dpm_solver,
    dpm_solver_pp,
    exponential_adams,
    gaussian,
    ipndm,
    unipc,
)
from .schedule import EDM, NoiseSchedule, RectifiedFlow, VPDiscrete, VPLinear, VPTable
from .setup import Setup
from .solver import (
    Coefficients,
    LoopTable,
    SingleStepCoefficients,
    Solver,
    consistent,
    count_parameters,
    loop_table,
    run_loop,
    trajectory,
)
from .teacher import TeacherSet, initial_noise, make_teacher_set, sample_batches
