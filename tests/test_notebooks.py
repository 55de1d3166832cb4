"""Every notebook runs from another folder: the lessons as they are, whole tables at a small scale.

Most run in this process (running.py). Those marked `kernel` go through papermill, as a person does.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from running import NOTEBOOKS, run_notebook
from test_lessons import RIGHT, WRONG

import s4s_core as s4s

LEAST = {"epochs": 1, "rounds": 1, "fid_samples": 100, "teacher_nfe": 10}
LEAST |= {"n_train": 40, "n_train_alt": 40, "n_valid": 20, "n_valid_alt": 20}
SMALL = {"seeds": [0], "settings": {"mixture": LEAST, "digits": LEAST}}
# Whole tables, cut down. The plane is a model like any other to them, and costs next to nothing.
PLANE = SMALL | {"dataset": "mixture"}
LONG = {
    "ablation_order": PLANE | {"orders": [1, 2], "nfes": [2, 3]},
    "train_solver": PLANE | {"grids": ["edm", "logsnr"], "nfes": [3]},
    "tables": PLANE | {"grids": ["dmn", "gits", "ld3"], "solvers": ["ipndm", "unipc"], "nfes": [3]},
    "ablation_radius": PLANE | {"gammas": [0.0, 1.0], "nfes": [3]},
    "ablation_init": PLANE | {"nfes": [3]},
    "ablation_design": SMALL | {"nfes": [3]},  # compares LPIPS's form with L2: images
    "ablation_dataset_size": PLANE | {"sizes": [20, 40], "nfe": 3, "fid_samples": 100},
    "ablation_joint": PLANE | {"nfes": [3, 4]},
    "ablation_single_step": PLANE | {"nfes": [3, 4], "fid_samples": 100},
    "compare_learned": PLANE
    | {"grids": ["edm", "ld3"], "solvers": ["ipndm"], "nfes": [3], "rival_nfes": [3], "target": 3},
    "figure_coefficient_pca": PLANE | {"nfe": 3, "epochs": 1},
    "pictures": {"dataset": "digits", "settings": {"digits": LEAST}, "solvers": ["unipc"]}
    | {"nfes": [3], "shown": 3, "distances": ["features", "l2"], "picked": [0, 3], "seeds": [0]}
    | {"flow": "digits"},
    "ablation_guidance": {"guidances": [1.0, 2.0], "solvers": ["unipc"], "nfe": 3, "order": 2}
    | {
        "published_nfes": [3],
        "n": 2,
        "careful_nfe": 6,
        "fid_samples": 20,
        "sizes": {"n_train_alt": 8, "n_valid_alt": 4},
    }
    | {"settings": {"cifar10_tiny": {"teacher_nfe": 4, "newton_batch_size": 8, "epochs": 1}}},
    "beyond_images": {"seeds": [0], "solvers": ["unipc"]}
    | {"grids": ["logsnr"], "nfes": [3], "compared": [3], "order": 2, "shown": 3, "n": 2}
    | {"settings": {"ecg": LEAST, "digits": LEAST}},
    "beyond_teacher": {"seeds": [0, 1], "teacher_nfes": [10, 40], "taught_by": [10], "nfes": [3]}
    | {"judged_nfe": 3, "blocks": 2, "fid_samples": 100, "exact": {"teacher_nfe": 50}}
    | {
        "sizes": {"n_train_alt": 40, "n_valid_alt": 20},
        "settings": {"digits": LEAST, "ecg": LEAST},
        "others": {"LD3, 3 calls": {"grid": "ld3", "nfe": 3}},
        "other": "ecg",
        "other_nfes": [3],
        "other_sizes": {"n_train_alt": 40, "n_valid_alt": 20, "fid_samples": 100},
    },
    "beyond_linear": PLANE
    | {"sizes": [20, 40], "orders": [1, 0], "states": [0, 1], "nfes": [3], "rival_sizes": [20]}
    | {"other": "digits", "other_sizes": [20]}
    | {"rival": {"learner": "first_order", "epochs": 1}, "epochs": 1, "fid_samples": 100},
    "beyond_family": PLANE
    | {"nfes": [3, 4], "seen": [3], "seeds": [0], "fid_samples": 130}  # in 5 blocks, and in 2
    | {"sizes": {"n_train_alt": 24, "n_valid_alt": 8}}
    | {"other": "digits", "other_sizes": {"n_train_alt": 24, "n_valid_alt": 8}, "other_nfes": [3]},
    "figure_samples": {"nfe": 3, "n": 4, "plane_nfe": 3, "settings": SMALL["settings"]},
}
SHORT = {
    **{path.stem: {} for path in NOTEBOOKS.glob("0?_*.ipynb")},
    "00_tour": {"nfe": 4, "samples": 300, "pairs": 100},
    "appendix_departures": {"seeds": [0], "rounds": 1, "pairs": 40, "samples": 20},
    "appendix_theory": {"drawn": 1000, "sizes": [125, 250]},
    "appendix_train_denoiser": {},
    "beyond_black_box": {"models": {"digits": [8, 20]}, "seeds": [0], "nfe": 2, "order": 2},
    "beyond_head": {"datasets": ["digits"], "pairs": {"digits": [24, 20]}, "blocks": 2}
    | {"steps": 1, "epochs": 1, "fid_samples": 20, "settings": {"digits": {"teacher_nfe": 10}}},
    "bring_your_own_model": {"epochs": 2},
    "use_it_anywhere": {"nfes": [3, 4], "pairs": 60},
}


def test_every_notebook_is_run():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {*LONG, *SHORT}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # no processes: they import torch anew


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_a_whole_table_runs_at_a_small_scale(name):
    last = LONG[name].get("fid_samples", 100) - 1
    assert f"seeds 0 to {last}\n" in run_notebook(name, **LONG[name]).text


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_short_notebook_runs_and_prints_what_it_says(name):
    tries = {cell: RIGHT[cell] + [answer for answer, _ in WRONG[cell]] for cell in RIGHT}
    ran = run_notebook(name, tries, **SHORT[name])
    asked = [cell.id for cell, _ in ran.cells if cell.id in RIGHT]
    for cell, printed in ran.cells:
        if "check-output" in cell.metadata.get("tags", []):
            committed = "".join(
                o.get("text", "") for o in cell.outputs if o.get("name") == "stdout"
            )
            assert printed.split() == committed.split(), cell.source
    for cell in asked:
        assert [ran.tried[cell, answer] for answer in RIGHT[cell]] == ["right\n"] * len(RIGHT[cell])
        for answer, said in WRONG[cell]:  # how far off it is, and a hint in brackets
            assert ran.tried[cell, answer].startswith("not yet: "), answer
            assert said in ran.tried[cell, answer] and ran.tried[cell, answer].endswith(")\n")


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["mixture", "ecg"])
def test_the_tour_draws_points_and_signals_too(dataset):
    small = {"nfe": 3, "samples": 40, "pairs": 24, "settings": {dataset: LEAST}}
    assert "joint      3 calls  Fréchet" in run_notebook("00_tour", dataset=dataset, **small).text


def papermill(tmp_path: Path, name: str, folders=(), **parameters):
    """Run a notebook through papermill from tmp_path, with a cache of its own and the `folders`
    that the environment names; return the process and the output's path.
    """
    out = tmp_path / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", NOTEBOOKS / f"{name}.ipynb", out]
    for key, value in parameters.items():
        command += ["-y", f"{key}: {value}"]
    environment = {**os.environ, "S4S_RESULTS": str(tmp_path / "results"), "OMP_NUM_THREADS": "1"}
    environment.update(folders)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    return done, out


@pytest.mark.kernel
def test_papermill_runs_the_order_ablation_from_another_folder(tmp_path):
    small = SMALL | {"dataset": "digits", "orders": [1, 2], "nfes": [2, 3]}
    done, out = papermill(tmp_path, "ablation_order", **small)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = str([cell.get("outputs") for cell in nbformat.read(out, 4).cells])
    assert "image/png" in outputs and "| method | order |" in outputs
    assert "digits classifier, 64 features; seeds 0 to 99" in outputs


@pytest.mark.kernel
def test_a_slip_is_shown_as_one_sentence_without_internals(tmp_path):
    done, _ = papermill(tmp_path, "ablation_order", dataset="ffhqq")
    assert done.returncode != 0
    assert "unknown dataset 'ffhqq'; choose one of: afhqv2" in done.stderr
    assert "s4s_core/" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "sentence"),
    [
        ("ablation_order", {"dataset": "ffhqq"}, "unknown dataset 'ffhqq'; choose one of: afhqv2"),
        ("ablation_order", {"epochs": "1e-4"}, "epochs must be of type int, not '1e-4'"),
        ("ablation_order", {"orders": [0]}, "order must be a whole number from 1"),
        ("ablation_order", {"nfes": "[4, 6]"}, "nfes must be a list of whole numbers"),
        ("ablation_order", {"preset": "quik"}, "unknown preset of digits 'quik'; choose one of"),
        ("ablation_order", {"dataset": "ffhq", "preset": "quick"}, "unknown preset of ffhq"),
        ("train_solver", {"seeds": 0}, "seeds must be a list of whole numbers"),
        ("tables", {"settings": {"gamma": 0.0}}, "settings must map datasets to settings"),
        ("02_time_grids", {"dataset": "digits"}, "take dataset mixture"),
        ("train_solver", {"grids": ["edn"]}, "unknown grid 'edn'; choose one of: ays_sd15"),
        ("train_solver", {"nfes": [2]}, "order 3 needs at least 3 network calls, not nfe = 2"),
        ("compare_learned", {"methods": ["S4S", "S5S"]}, "unknown method 'S5S'; choose one of"),
        ("00_tour", {"dataset": "fhq"}, "unknown dataset 'fhq'"),
        ("00_tour", {"nfe": 0}, "nfe must be a whole number from 1 to 1000000, not 0"),
        ("00_tour", {"order": 9}, "published up to order 4, not 9"),
    ],
)
def test_a_slip_in_a_parameter_is_one_sentence(one_sentence, name, parameters, sentence):
    with one_sentence(sentence):
        run_notebook(name, **parameters)


EXPERIMENTS = sorted({*LONG})
GRAMMAR = ["dataset", "...", "seeds", "preset", "epochs", "fid_samples", "settings", "save_as"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_share_one_grammar_of_parameters(name):
    import papermill as pm

    names = list(pm.inspect_notebook(NOTEBOOKS / f"{name}.ipynb"))
    shared = [n if n != "seed" else "seeds" for n in names]
    positions = [shared.index(n) for n in GRAMMAR if n in shared]
    assert positions == sorted(positions) and positions[0] == 0
    assert set(GRAMMAR) - set(shared) <= {"...", "seeds"}, f"{name} lacks a parameter"
    assert not {"rounds", "n_train", "n_train_alt"} & set(names)


def test_the_papers_settings_are_those_of_its_models():
    """`-p dataset ffhq` means the paper's settings; the digits' usual preset is short."""
    assert s4s.settings_for("ffhq") == {} == s4s.settings_for("cifar10")
    assert s4s.settings_for("digits")["epochs"] < s4s.load_params("digits").epochs
    assert s4s.settings_for("digits", preset="full") == {}
