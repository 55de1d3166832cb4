"""The long notebooks through papermill, at the smallest scale and from another folder.

nbval runs the short ones at their defaults; those of the long ones are full tables.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SMALL = {"seeds": [0], "fid_samples": 100, "epochs": 1, "n_train": 40}
LEAST = {"epochs": 1, "rounds": 1, "fid_samples": 100}
LEAST |= {"n_train": 40, "n_train_alt": 40, "n_valid": 20, "n_valid_alt": 20}
QUICK = {"seeds": [0], "settings": {"digits": LEAST}}
LONG = {
    "ablation_order": SMALL | {"orders": [1, 2], "nfes": [2, 3], "rounds": 1, "n_train_alt": 40},
    "train_solver": SMALL | {"grids": ["edm", "logsnr"], "nfes": [3]},
    "tables": QUICK | {"grids": ["dmn", "gits", "ld3"], "solvers": ["ipndm", "unipc"], "nfes": [3]},
    "ablation_radius": QUICK | {"gammas": [0.0, 1.0], "nfes": [3]},
    "ablation_init": QUICK | {"nfes": [3], "patient": {}},
    "ablation_design": QUICK | {"nfes": [3]},
    "ablation_dataset_size": QUICK | {"sizes": [20, 40], "nfe": 3},
    "ablation_joint": QUICK | {"nfes": [3, 4]},
    "ablation_single_step": QUICK | {"nfes": [3, 4]},
    "compare_learned": QUICK
    | {"grids": ["edm", "ld3"], "solvers": ["ipndm"], "nfes": [3], "rival_nfes": [3], "target": 3},
    "figure_coefficient_pca": QUICK | {"nfe": 3},
    "pictures": {"dataset": "digits", "settings": {"digits": LEAST}, "solvers": ["unipc"]}
    | {"nfes": [3], "shown": 3, "distances": ["features", "l2"], "n": 4},
    "figure_samples": {"nfe": 3, "n": 4, "plane_nfe": 3}
    | {"settings": {"digits": LEAST, "mixture": LEAST}},
}


def test_every_notebook_runs_here_or_under_nbval():
    command = (NOTEBOOKS.parent / "do").read_text("utf-8")
    globs = ("0*", "appendix_*", "bring_*")
    under_nbval = {p.stem for glob in globs for p in NOTEBOOKS.glob(f"{glob}.ipynb")}
    assert all(f"notebooks/{glob}.ipynb" in command for glob in globs)
    assert {p.stem for p in NOTEBOOKS.glob("*.ipynb")} == under_nbval | set(LONG)


def papermill(
    tmp_path, name: str, folders=(), **parameters
) -> tuple[subprocess.CompletedProcess, Path]:
    """Run a notebook from tmp_path with a cache of its own, and the `folders` that the environment
    names; the process and the output's path.
    """
    out = tmp_path / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", NOTEBOOKS / f"{name}.ipynb", out]
    for key, value in parameters.items():
        command += ["-y", f"{key}: {value}"]
    environment = {**os.environ, "S4S_RESULTS": str(tmp_path / "results"), "OMP_NUM_THREADS": "1"}
    environment.update(folders)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    return done, out


@pytest.mark.parametrize("name", LONG)
def test_the_long_notebooks_run_from_another_folder(tmp_path, name):
    done, out = papermill(tmp_path, name, **LONG[name])
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = str([cell.get("outputs") for cell in nbformat.read(out, 4).cells])
    assert "image/png" in outputs and "| method | order |" in outputs or name != "ablation_order"
    assert "seeds 0 to 99" in outputs


SHORT = sorted({path.stem for path in NOTEBOOKS.glob("*.ipynb")} - set(LONG))
SMALLER = {"00_tour": {"nfe": 4, "samples": 300, "epochs": 1, "rounds": 1}}


@pytest.mark.parametrize("name", SHORT)
def test_the_short_notebooks_run_from_another_folder(tmp_path, name):
    done, out = papermill(tmp_path, name, **SMALLER.get(name, {}))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "image/png" in out.read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "parameters", "sentence"),
    [
        ("ablation_order", {"dataset": "ffhqq"}, "unknown dataset 'ffhqq'; choose one of: afhqv2"),
        ("ablation_order", {"epochs": "'1e-4'"}, "epochs must be of type int, not '1e-4'"),
        ("ablation_order", {"orders": "[0]"}, "order must be a whole number of at least 1"),
        ("ablation_order", {"nfes": "'[4, 6]'"}, "nfes must be a list of whole numbers"),
        ("train_solver", {"seeds": "0"}, "seeds must be a list of whole numbers"),
        ("tables", {"settings": "{gamma: 0.0}"}, "settings must map datasets to settings"),
        ("02_time_grids", {"dataset": "digits"}, "take dataset mixture"),
        ("train_solver", {"grids": "[edn]"}, "unknown grid 'edn'; choose one of: ays_sd15"),
        ("train_solver", {"nfes": "[2]"}, "order 3 needs at least 3 network calls, not nfe = 2"),
        ("00_tour", {"dataset": "fhq"}, "unknown dataset 'fhq'"),
        ("00_tour", {"nfe": 0}, "nfe must be a whole number of at least 1, not 0"),
        ("00_tour", {"order": 9}, "published up to order 4, not 9"),
    ],
)
def test_a_slip_in_a_parameter_is_one_sentence_without_internals(
    tmp_path, name, parameters, sentence
):
    done, _ = papermill(tmp_path, name, **parameters)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "s4s_core/" not in done.stderr
