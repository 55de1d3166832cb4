"""What the FID adds to a Fréchet distance: Inception features, and reference statistics on disk.

"FID" means Inception features and nothing else; with any other network the number is a "Fréchet
distance (<network>)".
"""

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from ..errors import (
    UsageError,
    optional_import,
    progress,
    reason,
    require_file,
    write_atomically,
)
from ..evaluate import FeatureStatistics, FeatureSums, feature_sums
from .download import fetch, home
from .networks.data import read_arrays
from .networks.pickles import read_torch

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)

# The hash of torch-fidelity's file, whose name contains the first eight of these digits.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

LARGEST_IMAGE = 2**22  # pixels
IMAGES = {".png", ".jpg", ".jpeg", ".webp"}
RESIZED = "the largest square in the middle, resized by Lanczos's filter of Pillow"
FORMATS = ["PNG", "JPEG", "WEBP"]  # as Pillow calls them, which for others starts programs


def to_uint8(x: Tensor, offset: float = 128.0) -> Tensor:
    """Return images in [-1, 1] as uint8: 127.5 x + offset, clipped to 0 ... 255 and truncated.

    `offset` 128 gives the nearest level (Karras et al. 2022), 127.5 the level below (Rombach et
    al. 2022). The two differ by half a level on average, so a published FID depends on the choice.
    Raises UsageError for values that are not finite, because the pixels would hide them.
    """
    if not x.isfinite().all():
        raise UsageError("samples must be finite: check the solver and the network")
    return (127.5 * x + offset).clamp(0, 255).to(torch.uint8)


def inception_weights() -> Path | None:
    """Return the path of Inception's weights in home() or in torch's cache; None if in neither.

    The content of the file is not checked here. The distance that it measures is an FID only if
    its sha256 is INCEPTION_SHA256.
    """
    name = INCEPTION_URL.rpartition("/")[2]
    copies = home() / name, Path(torch.hub.get_dir(), "checkpoints", name)
    return next((copy for copy in copies if os.path.isfile(copy)), None)


def inception_features(
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    offset: float = 128.0,
) -> Callable[[Tensor], Tensor]:
    """Return the function that computes the FID's features, (B, 2048) on `device`.

    It takes images x (B, 1 or 3, H, W), either in [-1, 1] or already uint8. The network is
    torch-fidelity's port of the one of Heusel et al. (2017). It works on 8-bit images: see
    `to_uint8` for `offset`. `weights` is the path of its weights, by default that of
    `inception_weights`, and if there is none the file is downloaded. It is read without executing
    anything in it. Raises UsageError if the file cannot be downloaded or read, or if the
    torch-fidelity package is missing.
    """
    module = _torch_fidelity()
    weights = Path(weights or inception_weights() or fetch(INCEPTION_URL, INCEPTION_SHA256))
    require_file(weights)
    try:
        # torch-fidelity would unpickle the file: it gets a copy that holds tensors only.
        found, tensors = read_torch(weights), io.BytesIO()
        torch.save({name: found[name] for name in found if type(found[name]) is Tensor}, tensors)
        tensors.seek(0)
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=tensors
        )
    except Exception as error:  # whatever either makes of other content
        raise UsageError(
            f"{weights} does not hold torch-fidelity's Inception weights "
            f"({reason(weights, error)}): give "
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


def _torch_fidelity() -> Any:
    with optional_import("torch-fidelity torchvision", "FID"):
        from torch_fidelity import feature_extractor_inceptionv3
    return feature_extractor_inceptionv3


def save_statistics(
    path: str | Path, side: FeatureSums | FeatureStatistics, **metadata: str
) -> None:
    """Save the mean and covariance of features as a safetensors file, for `read_reference`.

    `metadata` is kept in the file as text.
    """
    tensors = {"mean": side.mean, "covariance": side.covariance}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read_reference(
    path: str | Path, features: Callable[[Tensor], Tensor] | None = None
) -> FeatureSums | FeatureStatistics:
    """Return the statistics of the real images in a Fréchet distance, from a file or a folder.

    An .npz file must hold arrays `mu` (F,) and `sigma` (F, F), as the files of Karras et al. (2022)
    and of Dhariwal & Nichol (2021) do, and a .safetensors file what `save_statistics` writes. The
    images of a folder and its subfolders (PNG, JPEG or WebP, all of one size) are passed to
    `features` (default: `inception_features()`) as uint8 (B, 3, H, W). Hidden files and folders,
    and files of other kinds, are left out, which a line on stderr says. Raises UsageError, which
    names the file at fault.
    """
    path = Path(path)
    return _read_images(path, features) if os.path.isdir(path) else _read_statistics(path)


def _read_statistics(path: Path) -> FeatureStatistics:
    require_file(path)
    try:
        if path.suffix == ".safetensors":
            mean, covariance = itemgetter("mean", "covariance")(safetensors.numpy.load_file(path))
        else:
            mean, covariance = read_arrays(path, "mu", "sigma")
        kinds = {mean.dtype.kind, covariance.dtype.kind}
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise UsageError(
            f"{path} is not an .npz file of reference statistics with arrays mu and sigma, nor a "
            f".safetensors file with mean and covariance ({reason(path, error)})"
        ) from None
    if kinds != {"f"} or mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
        raise UsageError(
            f"{path}: mu must be (F,) and sigma (F, F), of floats, not {mean.dtype} {mean.shape} "
            f"and {covariance.dtype} {covariance.shape}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UsageError(f"{path}: mu and sigma must be finite")
    if not np.allclose(covariance, covariance.T):
        raise UsageError(f"{path}: sigma must be symmetric")
    mean, covariance = (torch.from_numpy(v.astype(np.float64)) for v in (mean, covariance))
    # More than what rounding to single precision takes off a singular covariance.
    margin = 1e-6 * covariance.trace() + 1e-150  # and samples all alike have no spread
    if torch.linalg.cholesky_ex(covariance + margin * torch.eye(len(mean)).to(mean)).info:
        raise UsageError(f"{path}: sigma must be positive semidefinite, as every covariance is")
    return FeatureStatistics(mean, covariance)


def _read_images(folder: Path, features: Callable[[Tensor], Tensor] | None) -> FeatureSums:
    paths = image_files(folder)
    shape = _read_image(paths[0]).shape

    def read(path: Path) -> Tensor:
        image = _read_image(path)
        if image.shape != shape:
            raise UsageError(
                f"images of one size are needed, but {path} is {tuple(image.shape)} and "
                f"{paths[0]} is {tuple(shape)}"
            )
        return image

    return _sums(paths, read, features)


def image_files(folder: str | Path) -> list[Path]:
    """Return the images of a folder and its subfolders, by their names; what is left out is said.

    Raises UsageError where there are none.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if not p.is_dir())
    hidden = {p for p in files if any(n.startswith(".") for n in p.relative_to(folder).parts)}
    paths = [p for p in files if p.suffix.lower() in IMAGES and p not in hidden]
    if not paths:
        raise UsageError(f"{folder} holds no images: {', '.join(sorted(IMAGES))} files are read")
    if others := sorted({*files} - {*paths}):
        print(
            f"{folder}: {len(paths)} images are read, and {len(others)} hidden files or files of "
            f"other kinds are not, such as {others[0].relative_to(folder)}",
            file=sys.stderr,
        )
    return paths


def resized_sums(
    paths: Sequence[Path], side: int, features: Callable[[Tensor], Tensor] | None = None
) -> FeatureSums:
    """Return the sums of the features of image files of any size, as (3, side, side) each.

    The largest square in the middle of an image is taken and resized by Lanczos's filter, which
    averages where it shrinks; grey is RGB. They pass through memory 64 at a time. Raises UsageError
    for a file that is no image.
    """
    return _sums(paths, lambda path: _read_image(path, side), features)


def _sums(
    paths: Sequence[Path],
    read: Callable[[Path], Tensor],
    features: Callable[[Tensor], Tensor] | None,
) -> FeatureSums:
    def batches(size: int = 64) -> Iterator[Tensor]:
        label = f"features of {paths[0].parent.name}"
        for start in progress(range(0, len(paths), size), desc=label):
            yield torch.stack([read(path) for path in paths[start : start + size]])

    return feature_sums(features or inception_features(), batches())


def _read_image(path: Path, side: int = 0) -> Tensor:
    """The pixels of an image file, uint8 (3, H, W); H = W = side unless it is 0."""
    from PIL import Image

    require_file(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > LARGEST_IMAGE:  # 64 of them are read at a time
                raise ValueError(f"it has more than {LARGEST_IMAGE} pixels")
            if image.mode[0] in "IF":  # would be cut, not scaled, to 8 bits
                raise ValueError(f"its pixels have more than 8 bits: mode {image.mode}")
            rgb = image.convert("RGB")
            if side:
                shorter = min(rgb.size)
                left, top = ((length - shorter) // 2 for length in rgb.size)
                rgb = rgb.crop((left, top, left + shorter, top + shorter))
                rgb = rgb.resize((side, side), Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    except Exception as error:  # each of PIL's formats has its own
        raise UsageError(f"{path} is not a readable image ({reason(path, error)})") from None
