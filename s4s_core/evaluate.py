"""How good the samples are: the Frechet distance of features, and the distance to the teacher.

"FID" means Inception features and nothing else; with any other network the number is a "Frechet
distance (<network>)".
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from .base import UsageError, needing, progress, write_atomically
from .download import fetch, home

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
# Of torch-fidelity's file; the eight digits in its name are the first of these.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
IMAGES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class FeatureSums:
    """Sums over n samples of features f (F,) and of f f^T (F, F), float64 on the CPU.

    Sums of disjoint samples add up exactly as the samples do, so they can be made in shards.
    """

    n: int
    first: Tensor
    second: Tensor

    @property
    def mean(self) -> Tensor:
        """(F,)"""
        return self.first / self.n

    @property
    def covariance(self) -> Tensor:
        """(F, F), with denominator n - 1 as the FID has it (Heusel et al. 2017).

        Raises UsageError for fewer than 2 samples.
        """
        if self.n < 2:
            raise UsageError(f"a Frechet distance needs at least 2 samples a side, not {self.n}")
        return (self.second - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (F,) and covariance (F, F) float64 where the sums behind them are not known."""

    mean: Tensor
    covariance: Tensor


@torch.no_grad()
def feature_sums(features, batches: Iterable[Tensor]) -> FeatureSums:
    """Run features(x) -> (B, F) over batches of samples (B, ...)."""
    total = ()  # one running sum: 500 batches of 2048 x 2048 would fill 17 GB
    for x in batches:
        f = features(x).double()
        total = (merge(*total, FeatureSums(len(f), f.sum(0).cpu(), (f.T @ f).cpu())),)
    return merge(*total)


def merge(*parts: FeatureSums) -> FeatureSums:
    """The sums over all the parts' samples together."""
    if not parts:
        raise UsageError("there are no samples to take features of")
    return FeatureSums(
        sum(p.n for p in parts), sum(p.first for p in parts), sum(p.second for p in parts)
    )


def frechet_distance(
    a: FeatureSums | FeatureStatistics, b: FeatureSums | FeatureStatistics
) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017).

    Raises UsageError where a side has fewer than 2 samples, or features do not fit or are not
    finite.
    """
    (m_a, S_a), (m_b, S_b) = ((side.mean, side.covariance) for side in (a, b))
    if len(m_a) != len(m_b):
        raise UsageError(
            f"the two sides have {len(m_a)} and {len(m_b)} features: take both with the same "
            "network"
        )
    if not all(values.isfinite().all() for values in (m_a, S_a, m_b, S_b)):
        raise UsageError("features must be finite: check the samples and the network")
    values, vectors = torch.linalg.eigh(S_a)
    # The square roots of rounding errors would add up: fewer samples than features, lower rank.
    rank = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    root = vectors[:, rank] * values[rank].sqrt()
    # tr (S_a S_b)^(1/2) with S_a = R R^T: R^T S_b R is symmetric, its eigenvalues are real.
    cross = torch.linalg.eigvalsh(root.T @ S_b @ root).clamp_min(0).sqrt().sum()
    return ((m_a - m_b).square().sum() + S_a.trace() + S_b.trace() - 2 * cross).item()


def to_uint8(x: Tensor, offset: float = 128.0) -> Tensor:
    """Pixels 0 to 255 of images in [-1, 1]: 127.5 x + offset, clipped, its fraction dropped.

    `offset` 128 gives the nearest level (Karras et al. 2022), 127.5 the level below (Rombach et
    al. 2022): half a level on average, which a published FID contains. Raises UsageError for
    values that are not finite, which no pixel shows.
    """
    if not x.isfinite().all():
        raise UsageError("samples must be finite: check the solver and the network")
    return (127.5 * x + offset).clamp(0, 255).to(torch.uint8)


def inception_weights() -> Path | None:
    """The file of Inception's weights that is there, in home() or in torch's cache, if one is.

    Whatever lies there is used; only with INCEPTION_SHA256 is what it measures an FID.
    """
    name = INCEPTION_URL.rpartition("/")[2]
    copies = home() / name, Path(torch.hub.get_dir(), "checkpoints", name)
    return next((copy for copy in copies if copy.is_file()), None)


def inception_features(
    weights=None, device="cpu", offset: float = 128.0
) -> Callable[[Tensor], Tensor]:
    """x (B, 1 or 3, H, W) in [-1, 1], or already uint8, -> (B, 2048): the features of the FID.

    They are torch-fidelity's port of the network of Heusel et al. (2017), which works on 8-bit
    images: see `to_uint8` for `offset`. `weights` is a file, by default that of
    `inception_weights` or else fetched, read without executing anything in it. Raises UsageError
    if it cannot be had or read, or if the torch-fidelity package is missing.
    """
    module = _torch_fidelity()
    weights = Path(weights or inception_weights() or fetch(INCEPTION_URL, INCEPTION_SHA256))
    try:
        # torch-fidelity would unpickle the file: it gets a copy that holds tensors only.
        tensors = io.BytesIO()
        torch.save(torch.load(weights, map_location="cpu", weights_only=True), tensors)
        tensors.seek(0)
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=tensors
        )
    except Exception as error:  # torch.load, pickle and load_state_dict each have their own
        raise UsageError(
            f"{weights} does not hold torch-fidelity's Inception weights ({_reason(error)}): give "
            "that file, or none to have it downloaded"
        ) from None
    network.to(device)

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise UsageError(f"FID needs images of 1 or 3 channels, not {tuple(x.shape[1:])}")
        x = x if x.dtype == torch.uint8 else to_uint8(x, offset)
        parts = x.expand(-1, 3, -1, -1).to(device).split(64)  # 0.5 GB of activations
        return torch.cat([network(part)[0] for part in parts])

    return features


def _torch_fidelity():
    with needing("torch-fidelity torchvision", "FID"):
        from torch_fidelity import feature_extractor_inceptionv3
    return feature_extractor_inceptionv3


def save_statistics(path, side: FeatureSums | FeatureStatistics, **metadata: str) -> None:
    """Save what a Frechet distance needs of one side, for `read_reference`, as safetensors."""
    tensors = {"mean": side.mean, "covariance": side.covariance}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read_reference(path, features=None) -> FeatureSums | FeatureStatistics:
    """The other side of a Frechet distance: published statistics, or a folder of images.

    An .npz file holds arrays `mu` (F,) and `sigma` (F, F), as those of Karras et al. (2022) and of
    Dhariwal & Nichol (2021) do; a .safetensors file what `save_statistics` writes. The images of a
    folder and its subfolders (PNG, JPEG, WebP, all of one size) go as uint8 (B, 3, H, W) through
    `features` (default: `inception_features()`). Raises UsageError naming the file at fault.
    """
    path = Path(path)
    return _read_images(path, features) if path.is_dir() else _read_statistics(path)


def _read_statistics(path: Path) -> FeatureStatistics:
    try:
        if path.suffix == ".safetensors":
            mean, covariance = itemgetter("mean", "covariance")(safetensors.numpy.load_file(path))
        else:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = file["mu"], file["sigma"]
        kinds = {mean.dtype.kind, covariance.dtype.kind}
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise UsageError(
            f"{path} is not an .npz file of reference statistics with arrays mu and sigma, nor a "
            f".safetensors file with mean and covariance ({_reason(error)})"
        ) from None
    if kinds != {"f"} or mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise UsageError(
            f"{path}: mu must be (F,) and sigma (F, F), of floats, not {mean.dtype} {mean.shape} "
            f"and {covariance.dtype} {covariance.shape}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UsageError(f"{path}: mu and sigma must be finite")
    if not np.allclose(covariance, covariance.T):
        raise UsageError(f"{path}: sigma must be symmetric")
    return FeatureStatistics(*(torch.from_numpy(v.astype(np.float64)) for v in (mean, covariance)))


def _read_images(folder: Path, features) -> FeatureSums:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
    if not paths:
        raise UsageError(f"{folder} holds no images: {', '.join(sorted(IMAGES))} files are read")
    shape = _read_image(paths[0]).shape

    def batches(size: int = 64):
        for start in progress(range(0, len(paths), size), desc=f"features of {folder.name}"):
            images = []
            for path in paths[start : start + size]:
                images.append(_read_image(path))
                if images[-1].shape != shape:
                    raise UsageError(
                        f"images of one size are needed, but {path} is {tuple(images[-1].shape)} "
                        f"and {paths[0]} is {tuple(shape)}"
                    )
            yield torch.stack(images)

    return feature_sums(features or inception_features(), batches())


def _read_image(path: Path) -> Tensor:
    """uint8 (3, H, W)"""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # would be cut, not scaled, to 8 bits
                raise ValueError(f"its pixels have more than 8 bits: mode {image.mode}")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # each of PIL's formats has its own
        raise UsageError(f"{path} is not a readable image ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """The first sentence: what follows advises to load the file unsafely."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
