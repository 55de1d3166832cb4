"""Models by name: `load("digits")` gives a denoiser, its schedule and its settings."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path

import torch
import yaml
from torch import Tensor

from .base import UsageError, one_of
from .download import fetch, file_sha256, home
from .evaluate import (
    INCEPTION_SHA256,
    FeatureStatistics,
    FeatureSums,
    feature_sums,
    inception_features,
    inception_weights,
    read_reference,
)
from .grid import VARIABLES
from .grid_search import PUBLISHED
from .model import (
    Denoiser,
    GaussianMixture,
    conditioned,
    from_denoiser,
    from_noise_prediction,
    guided,
    in_precision,
)
from .networks import (
    LatentModel,
    digits_data,
    load_edm,
    load_imagenet,
    load_lsun,
    load_network,
    load_stable_diffusion,
)
from .objective import SMALLEST_SIDE
from .schedule import EDM, NoiseSchedule, RectifiedFlow, VPDiscrete, VPLinear
from .solver import SOLVERS, Solver, count_steps

PACKAGE = Path(__file__).parent
WEIGHTS = PACKAGE / "weights"
# Beside the package in a checkout, inside it once installed from a wheel.
PARAMS = next(p for p in (PACKAGE.parent / "params", PACKAGE / "params") if p.is_dir())

NAMED_SCHEDULES = {
    "EDM": EDM(),
    "VPLinear": VPLinear(),
    "LDM": VPDiscrete.ldm(),
    "StableDiffusion": VPDiscrete(),
    "RectifiedFlow": RectifiedFlow(),
}


@dataclass(frozen=True)
class Params:
    """The settings of params/<dataset>.yaml; units and sources stand there, beside each value.

    Raises UsageError, naming the key, for a value of another type or out of range.
    """

    schedule: str
    shape: list
    checkpoint: str = ""
    url: str = ""
    sha256: str = ""
    files: list = ()
    guidance: float = 1.0
    precision: str = "float32"
    teacher_solver: str = "unipc"
    teacher_order: int = 3
    teacher_grid: str = "logsnr"
    teacher_nfe: int = 20
    unipc_variant: str = "bh1"
    n_train: int = 700
    n_valid: int = 200
    n_train_alt: int = 1400
    n_valid_alt: int = 400
    batch_size: int = 20
    batch_size_alt: int = 40
    epochs: int = 10
    rounds: int = 8
    phase_epochs: int = 2
    first_phase: str = "phi"
    distance: str = "lpips"
    lpips_net: str = "vgg"
    lpips_resize: int = 0
    gamma: float = 0.0242
    accept_if_better: bool = True
    lr_phi: float = 1e-2
    lr_xi: float = 5e-3
    lr_xi_c: float = 0.1
    lr_x: float = 6.0
    grad_clip: float = 1.0
    peak_decay: float = 0.8
    time_dependent: bool = True
    consistent: bool = False
    states: int = 0
    grid_variable: str = "lam"
    offset_fraction: float = 0.5
    ld3_order: int = 3
    ld3_start: str = "logsnr"
    rematerialize: bool = False
    fid_samples: int = 50000
    fid_reference: str = ""
    fid_offset: float = 128.0
    sample_batch_size: int = 100
    nfes: list = ()

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))
            elif f.type is list and type(value) is tuple:
                object.__setattr__(self, f.name, list(value))
            elif type(value) is not f.type:
                raise UsageError(_wrong_type(f.name, f.type, value))
        for key, allowed in _CHOICES.items():
            one_of(key, getattr(self, key), allowed)
        if not all(type(place) is str for place in self.files):
            raise UsageError(f"files must list addresses or paths, not {self.files}")
        for key in ("shape", "nfes"):
            if not all(type(n) is int and n > 0 for n in getattr(self, key)):
                raise UsageError(f"{key} must list whole numbers above 0, not {getattr(self, key)}")
        for f in fields(self):
            value, lowest = getattr(self, f.name), 0 if f.name in _MAY_BE_ZERO else 1e-300
            if f.type in (int, float) and not lowest <= value < float("inf"):
                raise UsageError(f"{f.name} must be positive and finite, not {value}")

    def override(self, **settings) -> "Params":
        """A copy with some settings replaced; None leaves one as it is."""
        for key in settings:
            one_of("setting", key, {f.name for f in fields(self)})
        return replace(self, **{k: v for k, v in settings.items() if v is not None})


_CHOICES = {
    "schedule": NAMED_SCHEDULES,
    "precision": ("float32", "bfloat16", "float16"),
    "teacher_solver": SOLVERS,
    "teacher_grid": PUBLISHED,
    "unipc_variant": ("bh1", "bh2"),
    "first_phase": ("phi", "xi"),
    "distance": ("l2", "psnr", "lpips", "features"),
    "lpips_net": SMALLEST_SIDE,
    "grid_variable": VARIABLES,
    "ld3_start": PUBLISHED,
}
# A model is built with these; the others can change afterwards.
OF_THE_MODEL = ("schedule", "shape", "checkpoint", "url", "sha256", "files", "guidance")
OF_THE_MODEL += ("precision", "fid_reference", "fid_offset")
_MAY_BE_ZERO = {"states", "gamma", "lr_x", "lr_xi_c", "lpips_resize", "offset_fraction"}


def _wrong_type(key: str, expected: type, value) -> str:
    sentence = f"{key} must be of type {expected.__name__}, not {value!r}"
    if isinstance(value, str) and expected in (int, float):
        try:
            number = float(value)
        except ValueError:
            return sentence
        # YAML 1.1 reads 1e-4, without a point, as text.
        return f"{sentence}: write it as a number with a decimal point, {number:.1e}"
    return sentence


def datasets() -> list[str]:
    """The names that `load` takes."""
    return sorted(p.stem for p in PARAMS.glob("*.yaml"))


def load_params(dataset: str) -> Params:
    """Read and check params/<dataset>.yaml; UsageError names the file and the key at fault."""
    one_of("dataset", dataset, datasets())
    return read_params(PARAMS / f"{dataset}.yaml")


def read_params(path) -> Params:
    """Read and check one YAML file of settings."""
    try:
        settings = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is not readable YAML ({reason})") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path} must be a YAML mapping from keys to values")
    try:
        for key in settings:
            one_of("key", key, {f.name for f in fields(Params)})
        return Params(**settings)
    except TypeError:
        raise UsageError(f"{path} lacks schedule or shape") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Setup:
    """A model and all that learning a solver for it needs; a model of your own is one of these.

    denoiser   D(x, t) -> x_0 estimate; schedule, shape (of one sample), params  as they say
    condition  seeds -> (B, ...), the classes or captions that go with the noises of these seeds;
               the denoiser is then D(x, t, condition). None: there are no conditions
    decode     x -> images (B, C, H, W) in [-1, 1], differentiable, where samples are latents
    features   decode(x) -> (B, F) for the Frechet distance, and its name; only to measure it
    data       () -> real images, (n, ...) as decode gives them, or statistics of their features:
               the other side of that distance
    activations  decode(x) -> layers (B, C, H, W) of a network for the distance "features"
    weights    file name -> sha256, for each network behind these; none for closed forms
    """

    name: str
    denoiser: Denoiser
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    params: Params
    features: Callable[[Tensor], Tensor] | None = None
    features_name: str = ""
    data: Callable[[], Tensor | FeatureSums | FeatureStatistics] | None = None
    activations: Callable[[Tensor], Sequence[Tensor]] | None = None
    weights: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    condition: Callable[[Sequence[int]], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] = lambda x: x

    def denoiser_for(self, seeds: Sequence[int]) -> Denoiser:
        """D(x, t) for the samples of these seeds, each with the condition that is its own."""
        if self.condition is None:
            return self.denoiser
        return conditioned(self.denoiser, self.condition(seeds))

    @cached_property
    def teacher(self) -> Solver:
        """The accurate solver that `params` name (Psi* of Alg. 1)."""
        p = self.params
        steps = count_steps(p.teacher_solver, p.teacher_order, p.teacher_nfe)
        grid = PUBLISHED[p.teacher_grid](self.schedule, steps)
        return Solver(published(p.teacher_solver, grid, p.teacher_order, p), grid)

    @cached_property
    def reference(self) -> FeatureSums | FeatureStatistics:
        """Of the real data; UsageError if the setup has no features or no data."""
        if self.features is None or self.data is None:
            raise UsageError(f"{self.name} has no features or no data: give its Setup both")
        data = self.data()
        if not isinstance(data, Tensor):
            return data
        return feature_sums(self.features, data.to(self.device).split(1000))


def published(name: str, grid, order: int, params: Params, seed: int = 0):
    """The table of a published solver, in the variant that `params` name.

    `seed` draws the weights of "gaussian"; the others have nothing random.
    """
    options = {"unipc": {"variant": params.unipc_variant}, "gaussian": {"seed": seed}}
    return one_of("solver", name, SOLVERS)(grid, order, **options.get(name, {}))


def load(dataset: str = "digits", device: str | None = None, **settings) -> Setup:
    """The setup of a dataset in params/, on `device` (the GPU if there is one).

    `settings` replace entries of params/ by name. Raises UsageError for an unknown dataset or
    setting, listing those there are.
    """
    params = load_params(dataset).override(**settings)
    build = one_of("dataset", dataset, _BUILDERS)
    setup = build(params, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if params.precision == "float32":
        return setup
    return replace(setup, denoiser=in_precision(setup.denoiser, getattr(torch, params.precision)))


def load_planar(dataset: str = "mixture") -> Setup:
    """`load` for lessons that draw trajectories: UsageError unless samples lie in the plane."""
    shape = load_params(dataset).shape
    if shape != [2]:
        raise UsageError(
            f"this draws samples on their way through the plane, and those of {dataset} have "
            f"shape {tuple(shape)}: take dataset mixture"
        )
    return load(dataset)


def _mixture(params: Params, device: str) -> Setup:
    """Eight Gaussians on a ring, unevenly weighted, for the lessons; exact, and on the CPU."""
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    means = torch.stack([angle.cos(), angle.sin()], 1)
    stds = torch.tensor([0.05, 0.1] * 4)
    mixture = GaussianMixture(torch.arange(1.0, 9.0), means, stds, NAMED_SCHEDULES[params.schedule])
    return Setup(
        "mixture",
        mixture,
        mixture.schedule,
        tuple(params.shape),
        params,
        features=lambda x: x,
        features_name="the plane itself",
        data=lambda: mixture.sample(params.fid_samples, seed=0),
    )


def _shipped(name: str, data: Callable, params: Params, device: str) -> Setup:
    """A small model of our own, in the package with the two networks that judge it."""
    # Learning must not see the network that judges it, so the last two are trained apart.
    files = (params.checkpoint, f"{name}_classifier.safetensors", f"{name}_perceptual.safetensors")
    network, classifier, perceptual = (load_network(WEIGHTS / f).to(device) for f in files)
    schedule = NAMED_SCHEDULES[params.schedule]
    return Setup(
        name,
        from_denoiser(network, schedule),
        schedule,
        tuple(params.shape),
        params,
        features=lambda x: classifier.features(x.float()),
        features_name=f"{name} classifier, {classifier.head.in_features} features",
        data=data,
        activations=perceptual.activations,
        weights={f: hashlib.sha256((WEIGHTS / f).read_bytes()).hexdigest() for f in files},
        device=device,
    )


def _edm(name: str, params: Params, device: str) -> Setup:
    """A checkpoint of Karras et al. 2022."""
    path = _checkpoint(params)
    network = load_edm(path, device)
    network.use_fp16 = False  # params.precision decides, and is recorded with each result
    if params.precision != "float32":
        network.to(memory_format=torch.channels_last)  # pays in half precision only
    channels, side = network.config["img_channels"], network.config["img_resolution"]
    if [channels, side, side] != params.shape:
        raise UsageError(
            f"{path} is a model of images {(channels, side, side)}, not {tuple(params.shape)} as "
            f"{name} has them: put the right file in its place, or change shape"
        )
    schedule = NAMED_SCHEDULES[params.schedule]
    return Setup(
        name,
        from_denoiser(network, schedule),
        schedule,
        tuple(params.shape),
        params,
        device=device,
        **_judged_by_inception(params, device, {path.name: file_sha256(path)}),
    )


def _checkpoint(params: Params) -> Path:
    """The model's file: its .safetensors conversion if there is one, or as published."""
    published = home() / params.url.rpartition("/")[2]
    converted = published.with_suffix(".safetensors")
    return converted if converted.is_file() else fetch(params.url, params.sha256)


def _latent(name: str, load_model: Callable, params: Params, device: str) -> Setup:
    """A model of latents; `load_model` makes a LatentModel of the files, in the order of params."""
    places = [(params.url, params.sha256), *((place, "") for place in params.files)]
    files = [_file(place, f"{name}_{place.rpartition('/')[2]}", sha) for place, sha in places]
    model, schedule = load_model(*files, device), NAMED_SCHEDULES[params.schedule]
    return Setup(
        name,
        from_noise_prediction(guided_network(model, params.guidance), schedule),
        schedule,
        tuple(params.shape),
        params,
        device=device,
        condition=model.condition,
        decode=model.decode,
        **_judged_by_inception(params, device, {path.name: file_sha256(path) for path in files}),
    )


def guided_network(model: LatentModel, scale: float) -> Callable[..., Tensor]:
    """eps(x, t, condition) with guidance against model.null; of a model without, its network."""
    if model.null is None:
        return model.network

    def network(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return model.network(x, t, c)

    return lambda x, t, c: guided(network, {"c": c}, {"c": model.null}, scale)(x, t)


def _file(place: str, name: str, sha256: str = "") -> Path:
    """The file of an address, kept as `name`, or of a path, which may begin in home()."""
    if "://" in place:
        return fetch(place, sha256, name)
    path = home() / place
    if not path.exists():
        raise UsageError(
            f"{path} is missing, and there is no address to have it from: put it there"
        )
    return path


def _judged_by_inception(params: Params, device: str, weights: dict[str, str]) -> dict:
    """The entries of a Setup whose distance is the FID; files are read when it is measured."""

    @cache
    def network():
        return inception_features(device=device, offset=params.fid_offset)

    def reference() -> FeatureSums | FeatureStatistics:
        place = params.fid_reference
        return read_reference(_file(place, place.rpartition("/")[2]), network())

    there = inception_weights()
    sha256 = file_sha256(there) if there else INCEPTION_SHA256
    official = sha256 == INCEPTION_SHA256
    return {
        "features": lambda x: network()(x),
        "features_name": "Inception, FID" if official else "Inception of other weights, not FID",
        "data": reference,
        "weights": {**weights, "inception": sha256},
    }


_LATENT_MODELS = {
    "lsun_bedroom": load_lsun,
    "imagenet": load_imagenet,
    "ms_coco": load_stable_diffusion,
}
_BUILDERS = {
    "mixture": _mixture,
    "digits": partial(_shipped, "digits", lambda: digits_data()[0]),
    "cifar10_tiny": partial(
        _shipped,
        "cifar10_tiny",
        lambda: read_reference(WEIGHTS / "cifar10_tiny_reference.safetensors"),
    ),
    **{name: partial(_edm, name) for name in ("cifar10", "ffhq", "afhqv2")},
    **{name: partial(_latent, name, load_model) for name, load_model in _LATENT_MODELS.items()},
}
