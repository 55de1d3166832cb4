"""CIFAR-10 in its authors' layout: made-up files of a few images."""

import hashlib
import io
import os
import tarfile

import numpy as np
import pytest
import torch

from s4s_core.models.networks import cifar10_data, data

NAMES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def files():
    """File name -> (labels (2,), pixels (2, 3, 32, 32) uint8), of random values."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randint(10, (2,), generator=generator, dtype=torch.uint8),
            torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8),
        )
        for name in NAMES
    }


def content(labels, pixels) -> bytes:
    """<1 x label><3072 x pixel> for each image: red, green, blue, each row by row."""
    return b"".join(
        bytes([label]) + bytes(image.flatten().tolist())
        for label, image in zip(labels.tolist(), pixels, strict=True)
    )


@pytest.fixture
def folder(tmp_path, files):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, images in files.items():
        (folder / name).write_bytes(content(*images))
    return folder


@pytest.fixture
def archive(tmp_path, folder, monkeypatch):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, folder.name)
    monkeypatch.setattr(data, "CIFAR10_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_the_images_and_labels_are_those_of_the_files(files, request, kind):
    path = request.getfixturevalue(kind)
    for test, names in ((False, NAMES[:5]), (True, NAMES[5:])):
        images, labels = cifar10_data(str(path), test=test)
        assert images.dtype == torch.float32 and images.shape == (2 * len(names), 3, 32, 32)
        pixels = torch.cat([files[name][1] for name in names])
        assert torch.equal(((images + 1) * 127.5).round(), pixels.float())
        assert images.abs().max() <= 1
        assert labels.tolist() == torch.cat([files[name][0] for name in names]).tolist()


def test_another_archive_is_refused_unread(archive, one_sentence, monkeypatch):
    monkeypatch.setattr(tarfile, "open", lambda path: pytest.fail("opened"))
    archive.write_bytes(archive.read_bytes()[:-1])
    with one_sentence(str(archive), "sha256", data.CIFAR10_SHA256, "fetch it again"):
        cifar10_data(archive)


def test_an_archive_without_the_files_is_told(tmp_path, one_sentence, monkeypatch):
    path = tmp_path / "other.tar"
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("readme.html"), io.BytesIO())
    monkeypatch.setattr(data, "CIFAR10_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with one_sentence(str(path), "data_batch_1.bin", data.CIFAR10):
        cifar10_data(path)


@pytest.mark.parametrize("path", ["", "nowhere"])
def test_missing_data_are_told_with_the_place_to_have_them_from(
    tmp_path, monkeypatch, one_sentence, path
):
    monkeypatch.chdir(tmp_path)
    with one_sentence("CIFAR-10 could not be read", data.CIFAR10, "folder"):
        cifar10_data(path)


@pytest.mark.parametrize("damage", [b"", b"x", b"\x0b" + bytes(3072)])
def test_a_damaged_file_is_named(folder, one_sentence, damage):
    (folder / "data_batch_3.bin").write_bytes(damage)
    with one_sentence(str(folder), "data_batch_3.bin", data.CIFAR10):
        cifar10_data(folder)


@pytest.mark.parametrize("link", [os.mkfifo, lambda p: p.symlink_to("/dev/zero")])
def test_pipes_and_devices_are_no_data(folder, tmp_path, one_sentence, link):
    (folder / "data_batch_3.bin").unlink()
    link(folder / "data_batch_3.bin")
    link(tmp_path / "other")
    for path in (folder, tmp_path / "other"):
        with one_sentence(str(path), "no file", data.CIFAR10):
            cifar10_data(path)
    with one_sentence("no file", "ecg.dat"):
        data.ecg_data(tmp_path / "other")


@pytest.mark.parametrize("levels", [np.zeros(0), np.ones((2, 20_000)), np.full(20_000, np.nan)])
def test_another_electrocardiogram_is_refused(tmp_path, one_sentence, levels):
    np.savez(tmp_path / "ecg.npz", ecg=levels)
    with one_sentence("electrocardiogram", "ecg.dat"):
        data.ecg_data(tmp_path / "ecg.npz")


def test_data_of_other_names_are_refused(one_sentence):
    with one_sentence("ffhq", "cifar10_tiny", "digits"):
        data.training_data("ffhq")


def test_data_go_by_their_name(folder):
    assert data.training_data("cifar10_tiny", folder)[0].shape == (10, 3, 32, 32)
    assert data.training_data("cifar10_tiny", folder, test=True)[0].shape == (2, 3, 32, 32)
    assert data.training_data("digits")[0].shape == (1797, 1, 8, 8)
