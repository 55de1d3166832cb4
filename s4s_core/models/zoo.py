"""Models by name: `load("digits")` returns a denoiser, its schedule and its settings."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..denoiser import (
    Denoiser,
    conditioned,
    from_denoiser,
    from_noise_prediction,
    guided,
    in_precision,
    of_model,
    rescheduled,
)
from ..errors import UsageError, choose, shown
from ..evaluate import FeatureStatistics, FeatureSums
from ..objective import lpips_trunk
from ..params import PACKAGE, Params, load_params
from ..schedule import EDM, NAMED_SCHEDULES
from ..setup import Setup
from .download import fetch, file_sha256, home
from .inception import (
    INCEPTION_SHA256,
    INCEPTION_URL,
    RESIZED,
    image_files,
    inception_features,
    inception_weights,
    read_reference,
    resized_sums,
)
from .mixture import GaussianMixture
from .networks import (
    Classifier,
    LatentModel,
    SmallDenoiser,
    digits_data,
    load_edm,
    load_imagenet,
    load_lsun,
    load_network,
    load_stable_diffusion,
)
from .networks.latent import read_image_numbers

WEIGHTS = PACKAGE / "weights"


def load(dataset: str = "digits", device: str | None = None, **settings: Any) -> Setup:
    """Return the setup of a dataset in params/, on `device` (the GPU if there is one).

    `settings` replace entries of params/ by name. Raises UsageError, which lists the choices, for
    an unknown dataset or setting.
    """
    return build(dataset, params_for(dataset, settings), device)


def params_for(dataset: str, settings: dict[str, Any]) -> Params:
    """Return the settings of a dataset in params/, those given replaced.

    Raises UsageError for a setting that says what the network is, such as its noise schedule: with
    another one its samples would be wrong. Latents may have any size, and the mixture, which is
    exact, any schedule.
    """
    own = load_params(dataset)
    params = own.override(**settings)
    fixed = {"schedule", "shape", "checkpoint", "url"}
    fixed -= {"shape"} if dataset in _LATENT_MODELS else set()
    fixed -= {"schedule"} if not (own.checkpoint or own.url) else set()
    for name in sorted(fixed):
        if (given := getattr(params, name)) != getattr(own, name):
            raise UsageError(
                f"the {name} of {dataset} is {shown(getattr(own, name))}, as its network knows it, "
                f"not {shown(given)}: leave {name} out, or change params/{dataset}.yaml if its "
                "network is another"
            )
    if not params.averaged_weights and dataset != "lsun_bedroom":
        raise UsageError(
            f"{dataset} has one set of weights: leave averaged_weights at true; only the file of "
            "lsun_bedroom has them both before and after they are averaged"
        )
    return params


def build(dataset: str, params: Params, device: str | None = None) -> Setup:
    """Return the setup of a dataset with these settings, on `device` (the GPU if there is one).

    Raises UsageError for a device that is not there.
    """
    model = choose("dataset", dataset, _MODELS)
    # Not mps: it has no float64.
    gpus = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    there = ["cpu", *(gpus if torch.cuda.is_available() else [])]
    device = choose("device", device or default_device(), there)
    paths = model.files(dataset, params)
    setup = model.build(dataset, paths, params, device)
    raw = {} if params.averaged_weights else {"averaged": "no"}
    setup = replace(setup, weights=_weights(model, paths) | raw)
    if params.guidance != 1 and setup.condition is None:
        raise UsageError(
            f"{dataset} has no guidance, for its model knows no classes and no captions: leave "
            f"guidance at 1, not {params.guidance:g}"
        )
    denoiser = of_model(setup.denoiser, setup.model) if paths else setup.denoiser
    if params.precision != "float32":
        denoiser = in_precision(denoiser, getattr(torch, params.precision))
    return replace(setup, denoiser=denoiser)


def load_guidances(dataset: str, scales: Sequence[float], **settings: Any) -> Setup:
    """Return the setup of a dataset in which ten seeds in a row share one guidance scale.

    The scales come in turn, so that a solver can be learned for all of them at once. Guidance is
    linear: D_w = D_1 + (w - 1) (D_2 - D_1), of setups at the scales 1 and 2, and the condition of a
    seed is the seed itself. Raises UsageError for a dataset whose model has no conditions.
    """
    if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise UsageError(f"scales must list at least one number above 0, not {list(scales)}")
    one, two = (load(dataset, **{**settings, "guidance": scale}) for scale in (1.0, 2.0))
    condition = cast(Callable[[Sequence[int]], Tensor], one.condition)  # or load had refused

    def denoise(x: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
        numbers = seeds.tolist()
        w = torch.tensor([scales[seed // 10 % len(scales)] for seed in numbers]).to(x)
        told = condition(numbers)
        weak, strong = (conditioned(setup.denoiser, told)(x, t) for setup in (one, two))
        return weak + (w.view(-1, *[1] * (x.ndim - 1)) - 1) * (strong - weak)

    name = f"{dataset}_guidance_{'_'.join(f'{scale:g}' for scale in scales)}"
    setup = one.variant(name=name, condition=torch.tensor)
    return setup.variant(denoiser=of_model(cast(Denoiser, denoise), setup.model))


def default_device() -> str:
    """Return "cuda" if there is a GPU, or else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_2d(dataset: str = "mixture") -> Setup:
    """Return `load(dataset)` for lessons that draw trajectories in the plane.

    Raises UsageError unless the samples have shape (2,).
    """
    shape = load_params(dataset).shape
    if shape != (2,):
        raise UsageError(
            f"this draws samples on their way through the plane, and those of {dataset} have "
            f"shape {tuple(shape)}: take dataset mixture"
        )
    return load(dataset)


def weights(dataset: str, params: Params) -> dict[str, str]:
    """Return file name -> sha256 of the networks behind a setup, without loading any of them."""
    model = choose("dataset", dataset, _MODELS)
    return _weights(model, model.files(dataset, params))


def reference(dataset: str, params: Params) -> str:
    """Return a hash of the real data's statistics, or of the names and sizes of its images.

    Empty where the data come with the package or one of its libraries.
    """
    if not choose("dataset", dataset, _MODELS).judged_by_inception:
        bundled = _reference_of(params.checkpoint.partition("_denoiser")[0])
        return _sha256(bundled, bundled.stat().st_mtime_ns) if bundled.is_file() else ""
    path = _reference(params)
    if path.is_file():
        return file_sha256(path)
    images = sorted(f"{p.relative_to(path)} {p.stat().st_size}" for p in path.rglob("*"))
    return hashlib.sha256("\n".join(images).encode()).hexdigest()


def fetch_files(dataset: str) -> list[Path]:
    """Download all files that a model, its evaluation and its distance need; return their paths.

    Raises UsageError for one that cannot be had.
    """
    params, model = load_params(dataset), choose("dataset", dataset, _MODELS)
    paths = model.files(dataset, params)
    if model.judged_by_inception:
        paths += [inception_weights() or fetch(INCEPTION_URL, INCEPTION_SHA256), _reference(params)]
    if params.distance == "lpips":
        paths.append(lpips_trunk(params.lpips_net))
    return paths


def make_reference(dataset: str, folder: str | Path) -> tuple[FeatureSums, dict[str, str]]:
    """Return the sums of Inception's features over a folder of real images, and how they were made.

    The images are brought to the size of the dataset's pictures (`resized_sums`). For ms_coco they
    are those of val2014 that its captions describe, where the file of the captions has a column
    image_id; for others all that are there. Raises UsageError for a dataset that is not judged by
    Inception's features, and for an image that is missing or cannot be read.
    """
    model, params = choose("dataset", dataset, _MODELS), load_params(dataset)
    if not model.judged_by_inception:
        names = ", ".join(name for name, other in _MODELS.items() if other.judged_by_inception)
        raise UsageError(
            f"{dataset} is not judged by Inception's features, and brings what it is compared "
            f"with: choose one of {names}"
        )
    paths = _described(Path(folder), params) if dataset == "ms_coco" else image_files(folder)
    if len(paths) < 2:
        raise UsageError(f"{folder} holds one image alone: statistics need at least 2")
    side = params.shape[-1] * _PIXELS.get(dataset, 1)
    judge = _judged_by_inception(params, default_device())
    told = {"dataset": dataset, "images": str(len(paths)), "pixels": str(side), "resizing": RESIZED}
    sums = resized_sums(paths, side, judge["features"])
    return sums, told | {"features": judge["features_name"]}


def _described(folder: Path, params: Params) -> list[Path]:
    """The images of a folder of MS-COCO's val2014 that the captions describe."""
    captions = _further_file("ms_coco", params.files[CAPTIONS])
    paths = [folder / f"COCO_val2014_{n:012d}.jpg" for n in read_image_numbers(captions)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise UsageError(
            f"{folder} lacks {len(missing)} of the {len(paths)} images that {captions} describes, "
            f"such as {missing[0]}: unpack all of val2014.zip there"
        )
    return paths


# --- The models -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """How to find the files of a dataset's model, and how to build a setup from them.

    files                a function (name, params) -> paths; it downloads what is missing
    build                a function (name, paths, params, device) -> setup
    judged_by_inception  whether its features are Inception's
    """

    files: Callable[[str, Params], list[Path]]
    build: Callable[[str, list[Path], Params, str], Setup]
    judged_by_inception: bool = False


def _weights(model: _Model, paths: list[Path]) -> dict[str, str]:
    if not model.judged_by_inception:
        return {path.name: _sha256(path, path.stat().st_mtime_ns) for path in paths}
    there = inception_weights()
    inception = file_sha256(there) if there else INCEPTION_SHA256
    return {path.name: file_sha256(path) for path in paths} | {"inception": inception}


@lru_cache
def _sha256(path: Path, changed: int) -> str:
    """The sha256 of a small file, cached in memory only, because its folder may be read-only.

    `changed` is the file's modification time: a new one is another entry of the cache.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _setup(name: str, params: Params, device: str, **entries: Any) -> Setup:
    schedule = NAMED_SCHEDULES[params.schedule]
    entries = {"schedule": schedule, "shape": params.shape, "params": params, **entries}
    return Setup(name=name, device=device, **entries)


def _mixture(name: str, paths: list[Path], params: Params, device: str) -> Setup:
    """The mixture of the lessons: eight Gaussians on a ring, unevenly weighted, on the CPU."""
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    means = torch.stack([angle.cos(), angle.sin()], 1)
    stds = torch.tensor([0.05, 0.1] * 4)
    mixture = GaussianMixture(torch.arange(1.0, 9.0), means, stds, NAMED_SCHEDULES[params.schedule])
    return _setup(
        name,
        params,
        "cpu",
        denoiser=mixture,
        features=lambda x: x,
        features_name="the plane itself",
        data=lambda: mixture.sample(20_000, seed=0),
    )


def _bundled_model(
    family: str, data: Callable[[], Tensor | FeatureStatistics | FeatureSums] | None = None
) -> _Model:
    """The model whose files in weights/ begin with `family`.

    Without `data` one of them holds the statistics of the real data's features.
    """
    data = data or (lambda: read_reference(_reference_of(family)))
    return _Model(partial(_bundled_files, family), partial(_bundled, family, data))


def _reference_of(family: str) -> Path:
    return WEIGHTS / f"{family}_reference.safetensors"


def _bundled_files(family: str, name: str, params: Params) -> list[Path]:
    """The denoiser, the classifier that measures its samples, and the one that learning uses.

    These are two classifiers because learning must not see the one that measures.
    """
    judges = (f"{family}_{judge}.safetensors" for judge in ("classifier", "perceptual"))
    return [WEIGHTS / file for file in (params.checkpoint, *judges)]


def _bundled(
    family: str,
    data: Callable[[], Tensor | FeatureStatistics | FeatureSums],
    name: str,
    paths: list[Path],
    params: Params,
    device: str,
) -> Setup:
    """A small model that is bundled with the package, as are the two classifiers that judge it.

    It was trained on EDM's schedule, and is read on the one that `params` name. If it knows
    classes, successive seeds take them in turn.
    """
    network, *judges = (load_network(path).to(device) for path in paths)
    classifier, perceptual = (cast(Classifier, judge) for judge in judges)
    classes, condition, null = cast(SmallDenoiser, network).config["classes"], None, None
    if classes:
        null = torch.tensor([classes], device=device)

        def condition(seeds: Sequence[int]) -> Tensor:
            return torch.tensor([seed % classes for seed in seeds], device=device)

    denoiser = from_denoiser(guided_network(network, null, params.guidance), EDM())
    schedule = NAMED_SCHEDULES[params.schedule]
    return _setup(
        name,
        params,
        device,
        denoiser=denoiser if schedule == EDM() else rescheduled(denoiser, schedule),
        condition=condition,
        features=lambda x: classifier.features(x.float()),
        features_name=f"{family} classifier, {classifier.head.in_features} features",
        data=data,
        activations=perceptual.activations,
    )


def _edm_files(name: str, params: Params) -> list[Path]:
    """The model's file: its .safetensors conversion if there is one, or else the published one."""
    published = home() / params.url.rpartition("/")[2]
    converted = published.with_suffix(".safetensors")
    return [converted if os.path.isfile(converted) else fetch(params.url, params.sha256)]


def _edm(name: str, paths: list[Path], params: Params, device: str) -> Setup:
    """A model of Karras et al. 2022, from its checkpoint or the conversion of it.

    If it knows classes, successive seeds take them in turn.
    """
    (path,) = paths
    network = load_edm(path, device)
    network.use_fp16 = False  # params.precision decides, and is recorded with each result
    if params.precision != "float32":
        network.to(memory_format=torch.channels_last)  # pays in half precision only
    channels, side = network.config["img_channels"], network.config["img_resolution"]
    if (classes := network.label_dim) and params.guidance != 1:
        raise UsageError(
            f"{path} knows {classes} classes, but no label for none of them, which guidance "
            f"{params.guidance:g} needs: leave guidance at 1"
        )

    def condition(seeds: Sequence[int]) -> Tensor:
        chosen = torch.tensor([seed % classes for seed in seeds], device=device)
        return torch.nn.functional.one_hot(chosen, classes)

    if (channels, side, side) != params.shape:
        raise UsageError(
            f"{path} is a model of images {(channels, side, side)}, not {params.shape} as "
            f"{name} has them: put the right file in its place, or change shape"
        )
    return _setup(
        name,
        params,
        device,
        denoiser=from_denoiser(
            lambda x, t, *label: network(x, t, *label), NAMED_SCHEDULES[params.schedule]
        ),
        condition=condition if classes else None,
        **_judged_by_inception(params, device),
    )


def _latent_files(name: str, params: Params) -> list[Path]:
    """The checkpoint (params.url) and the further files, in the order of params.files."""
    first = _further_file(name, params.url, params.sha256)
    return [first, *(_further_file(name, place) for place in params.files)]


def _further_file(name: str, place: str, sha256: str = "") -> Path:
    return _file(place, f"{name}_{place.rpartition('/')[2]}", sha256)


def _latent(
    load_model: Callable[..., LatentModel],
    name: str,
    paths: list[Path],
    params: Params,
    device: str,
) -> Setup:
    """A latent diffusion model, which `load_model` builds from its files."""
    raw = {} if params.averaged_weights else {"raw": True}  # of load_lsun alone
    model, schedule = load_model(*paths, device=device, **raw), NAMED_SCHEDULES[params.schedule]
    return _setup(
        name,
        params,
        device,
        denoiser=from_noise_prediction(
            guided_network(model.network, model.null, params.guidance), schedule
        ),
        condition=model.condition,
        decode=model.decode,
        **_judged_by_inception(params, device),
    )


def guided_network(
    network: Callable[..., Tensor], null: Tensor | None, scale: float
) -> Callable[..., Tensor]:
    """Return network(x, t, condition) with classifier-free guidance against the condition `null`.

    `null` has one row. For None, where there are no conditions, it is network(x, t). Either is a
    function, which gets x in float64: these networks round what must be rounded themselves.
    """
    if null is None:
        return lambda x, t: network(x, t)

    def named(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return network(x, t, c)

    def told(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        if c is None:
            raise UsageError(
                "this model draws what a condition names: sample with setup.denoiser_for(seeds), "
                "or give the denoiser a condition after x and t"
            )
        return guided(named, {"c": c}, {"c": null}, scale)(x, t)

    return told


def _file(place: str, name: str, sha256: str = "") -> Path:
    """Return the path of a file given as a URL (downloaded as `name`) or as a path (relative to
    `home()`).
    """
    if "://" in place:
        return fetch(place, sha256, name)
    path = home() / place
    if not path.exists():
        raise UsageError(
            f"{path} is missing, and there is no address to have it from: put it there"
        )
    return path


def _reference(params: Params) -> Path:
    """The path of the real images' statistics, or of the folder of images."""
    path = home() / params.fid_reference
    if "://" not in params.fid_reference and not path.exists():
        raise UsageError(
            f"{path} is missing, and there is no address to have it from: s4s reference makes it "
            "from a folder of the real images"
        )
    return _file(params.fid_reference, params.fid_reference.rpartition("/")[2])


def _judged_by_inception(params: Params, device: str) -> dict[str, Any]:
    """The entries of a Setup that is measured by the FID; files are read at the first use."""

    @cache
    def network() -> Callable[[Tensor], Tensor]:
        return inception_features(device=device, offset=params.fid_offset)

    there = inception_weights()
    official = there is None or file_sha256(there) == INCEPTION_SHA256
    return {
        "features": lambda x: network()(x),
        "features_name": "Inception, FID" if official else "Inception of other weights, not FID",
        "data": lambda: read_reference(_reference(params), network()),
    }


_LATENT_MODELS: dict[str, Callable[..., LatentModel]] = {
    "lsun_bedroom": load_lsun,
    "imagenet": load_imagenet,
    "ms_coco": load_stable_diffusion,
}
_PIXELS = {"lsun_bedroom": 4, "imagenet": 4, "ms_coco": 8}  # a side, of each entry of a latent
CAPTIONS = 2  # the place of the captions that judge among the files of ms_coco
_MODELS: dict[str, _Model] = {
    "mixture": _Model(lambda name, params: [], _mixture),
    "digits": _bundled_model("digits", lambda: digits_data()[0]),
    "ecg": _bundled_model("ecg"),
    "cifar10_tiny": _bundled_model("cifar10_tiny"),
    "cifar10_flow": _bundled_model("cifar10_tiny"),
    **{name: _Model(_edm_files, _edm, True) for name in ("cifar10", "ffhq", "afhqv2")},
    **{
        name: _Model(_latent_files, partial(_latent, load_model), True)
        for name, load_model in _LATENT_MODELS.items()
    },
}
