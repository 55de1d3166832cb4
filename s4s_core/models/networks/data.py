"""What the bundled networks learned from: the digits, CIFAR-10 and an electrocardiogram.

Only their training needs it. Of all this the models use `digits_data` alone, as the real images of
the model "digits".
"""

import hashlib
import tarfile
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from ...errors import UsageError, choose, reason, require_file

CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
# TensorFlow Datasets and Red Datasets check this one; CIFAR-10's authors publish an MD5 only.
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
RECORD = 1 + 3 * 32 * 32  # bytes of an image: its class, then red, green and blue, row by row
FILE = 10_000 * RECORD
LARGEST = 1 << 28  # bytes of an array: of the covariance of 5792 features


def training_data(dataset: str, path: str | Path = "", test: bool = False) -> tuple[Tensor, Tensor]:
    """Return the training images (n, C, H, W) in [-1, 1] and labels (n,) of a bundled model.

    With `test` return the images that samples are compared to: CIFAR-10's test set, or again all
    digits, which are too few to divide. `path` is where CIFAR-10 is. Raises UsageError for another
    dataset.
    """
    read = {"digits": lambda path, test: digits_data(), "cifar10_tiny": cifar10_data}
    return choose("dataset to learn from", dataset, read)(path, test)


def digits_data() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits: images (1797, 1, 8, 8) in [-1, 1], labels (1797,).

    Grey values are 0 ... 16 in the source (UCI, "Optical Recognition of Handwritten Digits").
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target)


def cifar10_data(path: str | Path, test: bool = False) -> tuple[Tensor, Tensor]:
    """Return CIFAR-10: images (50000, 3, 32, 32) in [-1, 1] and labels (50000,).

    With `test` these are the 10000 test images and their labels. The source is Krizhevsky 2009,
    "Learning Multiple Layers of Features from Tiny Images". `path` is the archive of the binary
    version, or the folder with its .bin files. Raises UsageError, which gives the archive's URL,
    for anything else.
    """
    path = Path(path)
    names = ["test_batch.bin"] if test else [f"data_batch_{i}.bin" for i in range(1, 6)]
    try:
        if path.is_dir():
            files = [_read(path / name) for name in names]
        else:
            files = _unpack(path, names)
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise UsageError(
            f"CIFAR-10 could not be read from {path} ({reason(path, error)}): fetch {CIFAR10}, "
            "and give the path of the archive, or of the folder with the .bin files in it"
        ) from None
    for name, content in zip(names, files, strict=True):
        if not content or len(content) % RECORD or max(content[::RECORD]) > 9:
            raise UsageError(f"{path}: {name} does not hold images of CIFAR-10; fetch {CIFAR10}")
    records = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8).view(-1, RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32) / 127.5 - 1, records[:, 0].long()


def _read(path: Path) -> bytes:
    """The content of one of the files; OSError for a larger one, and for a pipe or a device."""
    if not path.is_file() or path.stat().st_size > FILE:
        raise OSError(f"{path.name} is no file of at most {FILE} bytes")
    return path.read_bytes()


def _unpack(path: Path, names: list[str]) -> list[bytes]:
    """The content of the archive's members; UsageError unless it is the published archive."""
    if not path.is_file():
        raise OSError("no file")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != CIFAR10_SHA256:
        raise UsageError(
            f"{path} is not the archive {CIFAR10}: its sha256 is {found} instead of "
            f"{CIFAR10_SHA256}; fetch it again"
        )
    with tarfile.open(path) as archive:
        members = (archive.extractfile(f"cifar-10-batches-bin/{name}") for name in names)
        # The archive is the published one, so these members are files and not None.
        return [cast(IO[bytes], member).read() for member in members]


def read_arrays(path: str | Path, *names: str) -> list[Any]:
    """Return arrays, by their names, of an .npz file, without unpickling anything.

    Raises UsageError for what is no file and for an array of more than LARGEST bytes, and whatever
    numpy and zipfile raise for damage.
    """
    import numpy as np

    require_file(path)
    with zipfile.ZipFile(path) as archive:
        for name in names:
            if (size := archive.getinfo(f"{name}.npy").file_size) > LARGEST:
                raise UsageError(f"its array {name} would take {size} bytes, more than {LARGEST}")
    with np.load(path, allow_pickle=False) as file:
        return [file[name] for name in names]


ECG_RATE, ECG_POINTS = 64, 128  # a second, and a window


def ecg_data(path: str | Path = "", every: int = 4) -> tuple[Tensor, Tensor]:
    """Return two-second windows of an electrocardiogram, (n, 1, 128), and their starts (n,) in s.

    It is minutes 19:35 to 24:35 of record 208, lead MLII, of the MIT-BIH Arrhythmia Database (Moody
    & Mark 2001, on PhysioNet under ODC-BY), which SciPy offers as an example: normal beats,
    ventricular ones and artefacts. 360 Hz become 64, and 2.5 mV around the mean become 1; a window
    begins at `every` fourth point. `path` is SciPy's file ecg.dat; without it SciPy downloads it.
    Raises UsageError where that cannot be.
    """
    import numpy as np
    from scipy import datasets, signal

    try:
        if path:
            (levels,) = read_arrays(path, "ecg")
            millivolts = (levels.astype(np.float64) - 1024) / 200
            if levels.ndim != 1 or len(levels) < 1000 or not np.isfinite(millivolts).all():
                raise ValueError("its signal is too short, of several leads or not finite")
        else:
            millivolts = datasets.electrocardiogram()
    except Exception as error:  # numpy, zipfile, zlib and scipy each have their own
        raise UsageError(
            f"the electrocardiogram could not be had ({reason(path, error)}): give the path of "
            "ecg.dat, from https://github.com/scipy/dataset-ecg"
        ) from None
    slow = signal.resample_poly(millivolts - millivolts.mean(), 8, 45) / 2.5
    starts = np.arange(0, len(slow) - ECG_POINTS + 1, every)
    windows = torch.tensor(slow[starts[:, None] + np.arange(ECG_POINTS)], dtype=torch.float32)
    return windows.clamp(-1, 1)[:, None], torch.tensor(starts / ECG_RATE)


def turned(signals: Tensor) -> tuple[Tensor, Tensor]:
    """Return signals (4 n, C, length) as they are, backwards, upside down and both; labels (4 n,).

    To tell which is which needs no teacher's labels, and takes knowing how a heart beats.
    """
    both = [signals, signals.flip(-1), -signals, -signals.flip(-1)]
    return torch.cat(both), torch.arange(4).repeat_interleave(len(signals))


def held_out_split(n: int, fraction: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return two index tensors that divide 0 ... n-1 at random: for training, and held out.

    The second has round(fraction * n) entries.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    n_held_out = round(fraction * n)
    return order[n_held_out:], order[:n_held_out]
