"""The pretrained models by name: small random checkpoints, put where the real ones would be."""

import json
import os
import re
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from running import run_notebook
from test_latent import (
    tiny_configurations,
    write_annotations,
    write_imagenet,
    write_lsun,
    write_stable_diffusion,
)
from test_notebooks import LEAST, LONG, papermill

import s4s_core as s4s
from s4s_core import params as params_module
from s4s_core.__main__ import main
from s4s_core.evaluate import FeatureStatistics
from s4s_core.experiments import run as run_module
from s4s_core.models import zoo
from s4s_core.models.inception import save_statistics
from s4s_core.models.networks import EDMPrecond, latent, save_network

EDM_FILES = {
    "cifar10": (32, "edm-cifar10-32x32-uncond-vp", "cifar10-32x32"),
    "ffhq": (64, "edm-ffhq-64x64-uncond-vp", "ffhq-64x64"),
    "afhqv2": (64, "edm-afhqv2-64x64-uncond-vp", "afhqv2-64x64"),
}


def edm_network(side: int) -> EDMPrecond:
    torch.manual_seed(0)
    return EDMPrecond(
        side, 3, model_type="SongUNet", model_channels=8, channel_mult=[1, 1], num_blocks=1,
        attn_resolutions=[8],
    )  # fmt: skip


LATENT = ["lsun_bedroom", "imagenet", "ms_coco"]


def write_latent_models(home):
    """Small checkpoints in the authors' layout, under the names that the datasets look for."""
    checkpoints = write_lsun(home)[:2]
    for checkpoint, name in zip(checkpoints, ("lsun_bedrooms", "vq-f4"), strict=True):
        with zipfile.ZipFile(home / f"lsun_bedroom_{name}.zip", "w") as archive:
            archive.write(checkpoint, "model.ckpt")
        checkpoint.unlink()
    write_imagenet(home, "imagenet_model.ckpt")
    names = ["sd-v1-4.ckpt", "vocab.json", "merges.txt", "MS-COCO_val2014_30k_captions.csv"]
    table = "image_id,text\n1,a dog\n2,cat\n"
    write_stable_diffusion(home, [f"ms_coco_{name}" for name in names], table)
    write_annotations(home / "ms_coco_annotations_trainval2014.zip", "a dog", "tac", "tac tac")
    for name in ("VIRTUAL_lsun_bedroom256.npz", "VIRTUAL_imagenet256_labeled.npz"):
        np.savez(home / name, mu=np.zeros(2048), sigma=np.eye(2048))
    statistics = FeatureStatistics(torch.zeros(2048), torch.eye(2048))
    save_statistics(home / "ms_coco_val2014_30k.safetensors", statistics)


# Every Python process that papermill starts begins with these lines: the models that fit the
# checkpoints, and the settings of this repository without the one hash that is known.
CUSTOMIZE = """
import pathlib
import s4s_core.params, s4s_core.models.networks.latent
s4s_core.params.PARAMS = pathlib.Path({params!r})
vars(s4s_core.models.networks.latent).update({configurations!r})
"""


@pytest.fixture(scope="session")
def folders(tmp_path_factory, inception_file, vgg_home):
    """S4S_HOME and TORCH_HOME with everything that the datasets ask for, of random weights."""
    home = tmp_path_factory.mktemp("home")
    (home / "weights-inception-2015-12-05-6726825d.pth").symlink_to(inception_file)
    for side, checkpoint, reference in EDM_FILES.values():
        save_network(home / f"{checkpoint}.safetensors", edm_network(side), torch.float32)
        np.savez(home / f"{reference}.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    write_latent_models(home)
    params = tmp_path_factory.mktemp("params")
    for path in params_module.PARAMS.iterdir():
        (params / path.name).write_text(
            re.sub("sha256: [0-9a-f]{64}", 'sha256: ""', path.read_text())
        )
    start = CUSTOMIZE.format(params=str(params), configurations=tiny_configurations())
    (params / "sitecustomize.py").write_text(start)
    places = {"S4S_HOME": home, "TORCH_HOME": vgg_home, "PYTHONPATH": params}
    return {name: str(folder) for name, folder in places.items()}


@pytest.fixture
def placed(folders, monkeypatch, tmp_path):
    """This process meets those files as papermill's would, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    for name, folder in folders.items():
        monkeypatch.setenv(name, folder)
    monkeypatch.setattr(params_module, "PARAMS", Path(folders["PYTHONPATH"]))
    for name, config in tiny_configurations().items():
        monkeypatch.setattr(latent, name, config)


SMALL = {
    "fid_samples": 4, "epochs": 1, "rounds": 1, "phase_epochs": 1, "teacher_nfe": 3,
    "n_train": 2, "n_valid": 2, "n_train_alt": 2, "n_valid_alt": 2,
    "batch_size": 2, "batch_size_alt": 2,
}  # fmt: skip
ORDER = {"orders": [3], "nfes": [3], "seeds": [0]}


@pytest.mark.slow
def test_fetching_names_all_files_that_a_dataset_reads(placed):
    names = [path.name for path in zoo.fetch_files("cifar10")]
    assert names[-1] == "vgg16-397923af.pth" and "weights-inception" in names[-3]
    assert len(names) == 4 and all(path.exists() for path in zoo.fetch_files("cifar10"))


@pytest.mark.kernel
def test_papermill_runs_the_order_ablation_on_a_pretrained_model(tmp_path, folders):
    settings = json.dumps({"cifar10": SMALL})
    done, out = papermill(
        tmp_path, "ablation_order", folders, dataset="cifar10", settings=settings, **ORDER
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = str([cell.get("outputs") for cell in nbformat.read(out, 4).cells])
    assert "Inception of other weights, not FID; seeds 0 to 3" in outputs
    assert "| S4S | 3 |" in outputs and "nan" not in outputs


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [*EDM_FILES, *LATENT])
def test_a_pretrained_model_runs_through_the_order_ablation(placed, dataset):
    # Decoded pictures of full size take minutes; one model of latents draws and compares them here.
    smaller = {"distance": "l2", "shape": [4 if dataset == "ms_coco" else 3, 16, 16]}
    small = SMALL if dataset in (*EDM_FILES, "lsun_bedroom") else SMALL | smaller
    text = run_notebook("ablation_order", dataset=dataset, settings={dataset: small}, **ORDER).text
    assert "Inception of other weights, not FID; seeds 0 to 3" in text
    assert "| S4S | 3 |" in text and "nan" not in text


# The notebooks that ask more of a model than the others' list of experiments.
OTHERS = {
    ("00_tour", "cifar10"): {"nfe": 3, "samples": 4, "pairs": 4},
    ("compare_learned", "cifar10"): LONG["compare_learned"],
    ("ablation_single_step", "ffhq"): LONG["ablation_single_step"],
    ("tables", "afhqv2"): LONG["tables"] | {"grids": ["edm", "ld3"], "solvers": ["ipndm"]},
    ("figure_samples", "lsun_bedroom"): LONG["figure_samples"],
    ("train_solver", "imagenet"): LONG["train_solver"] | {"grids": ["edm"]},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dataset"), OTHERS)
def test_other_notebooks_take_a_pretrained_model(placed, name, dataset):
    # DPM-Solver-v3's regression for each entry of a sample needs more than two of them.
    small = SMALL | {"distance": "l2", "n_train": 16 if name == "compare_learned" else 2}
    given = {"dataset": dataset, "settings": {dataset: small, "mixture": LEAST}}
    assert (
        "Inception of other weights, not FID"
        in run_notebook(name, **OTHERS[name, dataset] | given).text
    )


@pytest.mark.parametrize("dataset", EDM_FILES)
def test_the_setup_of_an_edm_model_is_its_network(placed, dataset):
    setup = s4s.load(dataset, device="cpu")
    side, checkpoint, _ = EDM_FILES[dataset]
    assert setup.shape == (3, side, side) and setup.schedule == s4s.EDM()
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = edm_network(side).eval()(x, torch.tensor(1.5))
    assert torch.equal(setup.denoiser(x, torch.tensor(1.5, dtype=torch.float64)), expected)
    assert setup.weights[f"{checkpoint}.safetensors"] == s4s.file_sha256(
        os.path.join(os.environ["S4S_HOME"], f"{checkpoint}.safetensors")
    )


def test_a_setting_of_guidance_reaches_the_model(placed):
    t, drawn = torch.tensor(0.5, dtype=torch.float64), {}
    for guidance in (1.0, 2.0, 3.0):
        experiment = s4s.Experiment("imagenet", settings={"guidance": guidance})
        setup = run_module._setup(experiment)
        assert setup.params.guidance == guidance
        with torch.no_grad():
            drawn[guidance] = setup.denoiser_for([0])(s4s.initial_noise(setup, [0]), t)
    # D is linear in the guidance: equal steps of it are equal steps of D.
    first, second = drawn[2.0] - drawn[1.0], drawn[3.0] - drawn[2.0]
    assert first.norm() > 0 and (second - first).norm() < 1e-3 * first.norm()


def test_weights_before_their_average_are_another_model(placed):
    t, both = torch.tensor(0.5, dtype=torch.float64), (True, False)
    setups = [s4s.load("lsun_bedroom", "cpu", averaged_weights=choice) for choice in both]
    averaged, raw = (setup.denoiser(torch.ones(1, 3, 8, 8).double(), t) for setup in setups)
    assert not torch.equal(averaged, raw) and setups[0].model != setups[1].model
    assert "averaged" not in setups[0].weights


def test_a_model_of_another_size_in_its_place_is_refused(tmp_path, monkeypatch, one_sentence):
    monkeypatch.setenv("S4S_HOME", str(tmp_path))
    path = tmp_path / "edm-ffhq-64x64-uncond-vp.safetensors"
    save_network(path, edm_network(32), torch.float32)
    with one_sentence(str(path), "(3, 32, 32)", "(3, 64, 64)", "ffhq"):
        s4s.load("ffhq")


def test_a_file_of_another_hash_is_refused(tmp_path, monkeypatch, one_sentence):
    monkeypatch.setenv("S4S_HOME", str(tmp_path))
    path = tmp_path / "ms_coco_sd-v1-4.ckpt"
    path.write_bytes(b"something else")
    with one_sentence(str(path), s4s.load_params("ms_coco").sha256, s4s.file_sha256(path)):
        s4s.load("ms_coco")


@pytest.mark.parametrize("dataset", [*EDM_FILES, *LATENT])
def test_without_its_file_a_model_says_where_to_put_it(
    tmp_path, monkeypatch, one_sentence, dataset
):
    def offline(*_, **__):
        raise OSError("no connection")

    monkeypatch.setenv("S4S_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("s4s_core.models.download.urlopen", offline)
    url = s4s.load_params(dataset).url
    name = (f"{dataset}_" if dataset in LATENT else "") + url.rpartition("/")[2]
    with one_sentence(url, str(tmp_path / "home" / name), "by hand"):
        s4s.load(dataset)


def test_further_files_are_addresses_or_paths(tmp_path, monkeypatch, one_sentence):
    with one_sentence("files must list addresses or paths", "(3,)"):
        s4s.Params(schedule="EDM", shape=[1], files=[3])
    monkeypatch.setenv("S4S_HOME", str(tmp_path))
    with one_sentence(str(tmp_path / "captions.txt"), "missing", "put it there"):
        zoo._file("captions.txt", "captions.txt")


# --- Statistics of real images -------------------------------------------------------------------


def coco(folder: Path, number: int, *size: int, mode: str = "RGB") -> Image.Image:
    """Write an image of that size under the name of one of MS-COCO's validation images."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(number).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(folder / f"COCO_val2014_{number:012d}.jpg", quality=95)
    return Image.open(folder / f"COCO_val2014_{number:012d}.jpg").convert("RGB")


@pytest.mark.slow
def test_the_statistics_of_captions_are_those_of_their_images(
    placed, tmp_path, capsys, inception_file
):
    """Wide, tall and grey ones, cropped and resized by hand, by numpy; a third has no caption."""
    folder, out = tmp_path / "val2014", tmp_path / "made" / "coco.safetensors"
    wide = coco(folder, 1, 640, 480).crop((80, 0, 560, 480))
    tall = coco(folder, 2, 300, 500, mode="L").crop((0, 100, 300, 400))
    coco(folder, 3, 30, 30)
    main(["reference", str(folder), "--out", str(out)])
    printed = capsys.readouterr()
    assert "2 images, Inception of other weights, not FID\nthe largest square" in printed.out
    assert "to 512 pixels a side" in printed.out and str(out) in printed.out and not printed.err
    squares = [image.resize((512, 512), Image.Resampling.LANCZOS) for image in (wide, tall)]
    pixels = torch.from_numpy(np.stack([np.asarray(s) for s in squares])).permute(0, 3, 1, 2)
    features = s4s.inception_features(inception_file)(pixels).double().numpy()
    found = s4s.read_reference(out)
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.covariance, np.cov(features.T), rtol=1e-4, atol=1e-9)
    with safetensors.safe_open(out, "pt") as file:
        told = file.metadata()
    assert (told["images"], told["pixels"], told["dataset"]) == ("2", "512", "ms_coco")
    assert "Lanczos" in told["resizing"] and "not FID" in told["features"]
    setup = s4s.load("ms_coco", fid_reference=str(out))
    assert torch.equal(setup.reference.mean, found.mean)


@pytest.fixture
def few_features(placed, monkeypatch):
    judge = {"features": lambda x: x.float().mean((2, 3)), "features_name": "means"}
    monkeypatch.setattr(zoo, "_judged_by_inception", lambda *_: judge)


@pytest.mark.usefixtures("few_features")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["val2014"], ["ms_coco_val2014_30k.safetensors is there already", "remove it"]),
        (["val2014", "--out=there.safetensors"], ["there.safetensors is there already"]),
        (["val2014", "--out=a.npz"], ["--out takes a .safetensors file", "a.npz"]),
        (["val2014", "--out=there.safetensors/a.safetensors"], ["cannot write", "make room"]),
        (["nowhere"], ["nowhere lacks 2 of the 2 images", "COCO_val2014_000000000001.jpg"]),
        (["one"], ["one lacks 1 of the 2 images", "unpack all of val2014.zip"]),
        (["broken"], ["COCO_val2014_000000000002.jpg is not a readable image"]),
        (["deep"], ["COCO_val2014_000000000002.jpg is not a readable image", "8 bits"]),
        (["one", "--dataset=cifar10"], ["one holds one image alone"]),
        (["nowhere", "--dataset=cifar10"], ["nowhere holds no images"]),
        (["val2014", "--dataset=digits"], ["digits is not judged by Inception", "ms_coco"]),
        (["val2014", "--dataset=mine"], ["unknown dataset 'mine'"]),
    ],
)
def test_what_gives_no_statistics_is_refused_in_one_sentence(tmp_path, arguments, words):
    for number in (1, 2):
        coco(tmp_path / "val2014", number, 9, 7)
    coco(tmp_path / "one", 1, 9, 7)
    for name, image in {"broken": b"no image", "deep": None}.items():
        coco(tmp_path / name, 1, 9, 7)
        second = tmp_path / name / "COCO_val2014_000000000002.jpg"
        second.write_bytes(image or b"")
        if image is None:
            Image.new("I;16", (9, 9)).save(second, format="PNG")
    (tmp_path / "there.safetensors").touch()
    if len(arguments) == 1 and arguments != ["val2014"] or "--dataset" in arguments[-1]:
        arguments = [*arguments, "--out=new.safetensors"]
    with pytest.raises(SystemExit) as error:
        main(["reference", *arguments])
    text = str(error.value)
    assert text.startswith("error: ") and "\n" not in text and all(word in text for word in words)
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.usefixtures("few_features")
def test_a_full_disk_leaves_no_statistics(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    for number in (1, 2):
        coco(tmp_path / "val2014", number, 9, 7)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit, match="No space left on device"):
            main(["reference", "val2014", "--out=new/a.safetensors"])
    assert not list(tmp_path.glob("new/*"))


def test_captions_without_the_numbers_of_images_are_refused(tmp_path, one_sentence):
    path = tmp_path / "captions.csv"
    for text in ("text\ncat\n", "image_id,text\n", "image_id,text\nx,cat\n", "image_id\n-1\n"):
        path.write_text(text)
        with one_sentence("captions.csv", "image_id"):
            latent.read_image_numbers(path)
    path.write_text("image_id,text\n42,cat\n7,dog\n42,a cat\n")
    assert latent.read_image_numbers(path) == [42, 7]


def test_without_its_statistics_the_command_that_makes_them_is_named(
    tmp_path, monkeypatch, one_sentence
):
    monkeypatch.setenv("S4S_HOME", str(tmp_path))
    with one_sentence("ms_coco_val2014_30k.safetensors is missing", "s4s reference"):
        zoo.reference("ms_coco", s4s.load_params("ms_coco"))
