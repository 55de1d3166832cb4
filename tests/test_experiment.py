"""One run is one record: settings, the cache, interruptions, and the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import s4s_core as s4s
from s4s_core import (
    Experiment,
    LearningDivergedError,
    Solver,
    UsageError,
    datasets,
    gaussian,
    initial_solver,
    ipndm,
    load_params,
    read_params,
    run,
)
from s4s_core import params as params_module
from s4s_core import schedule as schedule_module
from s4s_core.__main__ import main
from s4s_core.experiments import cache as cache_module
from s4s_core.experiments import experiment, tables
from s4s_core.experiments import run as run_module
from s4s_core.models import zoo
from s4s_core.params import Params

TINY = {
    "learner": "first_order",
    "teacher_nfe": 10,
    "n_train": 8,
    "n_valid": 4,
    "n_train_alt": 8,
    "n_valid_alt": 4,
    "batch_size": 4,
    "batch_size_alt": 4,
    "epochs": 2,
    "rounds": 1,
    "phase_epochs": 1,
    "fid_samples": 50,
}


def tiny(learn: str = "coefficients", settings: dict | None = None, **changed) -> Experiment:
    values = {"dataset": "mixture", "nfe": 4, "order": 2, "learn": learn, **changed}
    return Experiment(**values, settings={**TINY, **(settings or {})})


def files(folder, pattern: str = "*") -> list[str]:
    """Names of the whole files under a folder; temporary ones begin with a dot."""
    return sorted(p.name for p in folder.rglob(pattern) if p.is_file() and p.name[0] != ".")


# --- Settings ----------------------------------------------------------------------------------


def test_settings_come_before_the_file_and_the_file_before_the_defaults():
    defaults = {f.name: f.default for f in fields(Params)}
    in_file = load_params("mixture")
    assert defaults["phase_epochs"] == 2 and in_file.phase_epochs == 1
    assert defaults["epochs"] == 10 == in_file.epochs  # the file does not speak of it
    params = Experiment(dataset="mixture", settings={"phase_epochs": 4, "epochs": 3}).params
    assert (params.phase_epochs, params.epochs) == (4, 3)
    assert params.override(phase_epochs=1, epochs=10) == in_file


def test_a_setting_of_none_leaves_the_one_in_the_file():
    given = Experiment(dataset="mixture", settings={"epochs": None, "gamma": None})
    assert given.params == load_params("mixture")
    assert given.path() == Experiment(dataset="mixture").path()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dataset": "ffhqq"}, ["dataset", "'ffhqq'", "digits", "mixture"]),
        ({"dataset": None}, ["dataset", "None", "digits"]),
        ({"grid": "cosine"}, ["grid", "'cosine'", "logsnr", "ld3", "gits"]),
        ({"grid": "ays_sd15"}, ["AYS", "EDM", "Stable Diffusion", "another grid"]),
        ({"solver": "heun"}, ["solver", "'heun'", "ipndm", "unipc"]),
        ({"learn": "phi"}, ["learn", "'phi'", "coefficients", "alternating"]),
        ({"learn": True}, ["learn", "True", "coefficients"]),
        ({"order": 0}, ["order", "from 1 to 1000000"]),
        ({"order": 5}, ["order 5", "nfe = 4"]),
        ({"order": 2.0}, ["order", "whole number", "2.0"]),
        ({"nfe": 0}, ["nfe", "from 1 to 1000000"]),
        ({"nfe": "4"}, ["nfe", "whole number", "'4'"]),
        ({"nfe": True}, ["nfe", "whole number", "True"]),
        ({"seed": -1}, ["seed", "from 0 to 999"]),
        ({"seed": 1000}, ["seed", "1000"]),
        ({"solver": "ddim", "learn": "none"}, ["ddim", "order 1", "order 2", "learn"]),
        ({"solver": "dpm_solver_pp", "order": 4, "learn": "times"}, ["order 3", "learn"]),
        ({"settings": {"lr": 0.1}}, ["setting", "'lr'", "lr_phi"]),
        ({"settings": {"epochs": "many"}}, ["epochs", "int", "'many'"]),
        ({"settings": {"lr_phi": "1e-4"}}, ["lr_phi", "'1e-4'", "decimal point", "1.0e-04"]),
        ({"settings": {"epochs": 0}}, ["epochs", "above 0"]),
        ({"settings": {"gamma": -1.0}}, ["gamma"]),
        ({"settings": {"lr_xi": float("nan")}}, ["lr_xi", "finite"]),
        ({"settings": {"distance": "ssim"}}, ["distance", "'ssim'", "l2", "lpips"]),
        ({"settings": {"rematerialize": 1}}, ["rematerialize", "bool"]),
        ({"settings": {"patience": -1}}, ["patience", "at least 0", "-1"]),
        ({"settings": {"m_counts": "times"}}, ["m_counts", "'times'", "coefficients, learned"]),
        ({"settings": {"statistics_points": 3}}, ["statistics_points", "at least 4", "3"]),
        ({"settings": {"gits_coefficient": 0.0}}, ["gits_coefficient", "above 0"]),
        ({"settings": {"averaged_weights": False}}, ["mixture", "averaged", "lsun_bedroom"]),
        ({"settings": {"epochs": 10**30}}, ["epochs", "2^63"]),
        ({"settings": {"epochs": 10**5000}}, ["epochs", "2^63"]),
        ({"settings": {"lr_phi": 10**400}}, ["lr_phi", "finite"]),
        ({"settings": [("epochs", 3)]}, ["settings"]),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(one_sentence, changed, words):
    values = {"dataset": "mixture", "nfe": 4, "order": 2, "learn": "coefficients", **changed}
    with one_sentence(*words):
        Experiment(**values)


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [
        ("digits", {"schedule": "VPLinear"}),
        ("digits", {"shape": [1, 16, 16]}),
        ("digits", {"checkpoint": "cifar10_tiny_denoiser.safetensors"}),
        ("cifar10_flow", {"schedule": "EDM"}),
        ("cifar10", {"url": "https://nowhere.invalid/a.pkl"}),
        ("mixture", {"shape": [3]}),
    ],
)
def test_what_a_network_is_cannot_be_set(one_sentence, dataset, settings):
    (name,) = settings
    for make in (
        lambda: Experiment(dataset, settings=settings),
        lambda: s4s.load(dataset, **settings),
    ):
        with one_sentence(f"the {name} of {dataset} is", f"params/{dataset}.yaml"):
            make()
    own = load_params(dataset)
    assert Experiment(dataset, settings={name: getattr(own, name)}).params == own


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:99", "cpu:x", 0.5])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(one_sentence, device):
    with one_sentence("unknown device", "cpu"):
        s4s.load("digits", device)


@pytest.mark.parametrize(
    "wrong", [{"seed": None}, {"seed": -1}, {"seed": 1000}, {"n_train": "20"}, {"n_valid": 0}]
)
def test_a_teacher_set_of_other_numbers_is_refused_in_one_sentence(one_sentence, mixture, wrong):
    with one_sentence(*wrong):
        s4s.make_teacher_set(mixture(), **wrong)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/s4s", "~nobody_at_all/results"])
def test_results_that_cannot_be_kept_are_refused_before_the_work(
    one_sentence, monkeypatch, tmp_path, place
):
    (tmp_path / "file").touch()
    place = place if place[0] in "/~" else str(tmp_path / place)
    monkeypatch.setenv("S4S_RESULTS", place)
    monkeypatch.setattr(run_module, "_setup", None)
    with one_sentence(place, "S4S_RESULTS"):
        run(tiny())


def test_results_know_home_and_lose_what_killed_writers_left(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("S4S_RESULTS", "~/kept")
    folder = tiny().path().parent
    assert folder == tmp_path / "kept" / "mixture"
    for name in (".old.tmp", ".new.tmp"):
        (folder / name).touch()
    os.utime(folder / ".old.tmp", (0, 0))
    tiny().path()
    assert [p.name for p in folder.iterdir()] == [".new.tmp"]


def test_lessons_refuse_a_model_that_is_not_of_the_plane_before_it_is_loaded(one_sentence):
    assert s4s.load_2d("mixture").shape == (2,)
    for dataset in ("digits", "ffhq"):  # the latter's checkpoint is not here
        with one_sentence(dataset, "take dataset mixture"):
            s4s.load_2d(dataset)


def test_an_unknown_dataset_is_refused_by_load_in_one_sentence(one_sentence):
    assert datasets() == sorted(datasets()) and {"digits", "mixture"} <= set(datasets())
    with one_sentence("dataset", "'ffhqq'", *datasets()):
        s4s.load("ffhqq")


PLAIN = "schedule: EDM\nshape: [2]\n"
LAUGHS = PLAIN + "a0: &a0 [1]\n"
LAUGHS += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schedule: EDM\nshape: [2]\nepoch: 3\n", ["setting", "'epoch'", "epochs"]),
        ("schedule: EDM\nshape: [2]\nlr_phi: 1e-4\n", ["lr_phi", "'1e-4'", "1.0e-04"]),
        ("schedule: EDM\nshape: [2]\nepochs: three\n", ["epochs", "int", "'three'"]),
        ("schedule: EDM\nshape: [2]\nepochs: 2.5\n", ["epochs", "int", "2.5"]),
        ("schedule: EDM\nshape: [2]\nepochs: yes\n", ["epochs", "int", "True"]),
        ("schedule: EDM\nshape: [2]\nepochs:\n", ["epochs", "int", "None"]),
        ("schedule: EDM\nshape: 2\n", ["shape", "list", "2"]),
        ("schedule: EDM\nshape: [0]\n", ["shape"]),
        ("schedule: Cosine\nshape: [2]\n", ["schedule", "'Cosine'", "EDM"]),
        ("shape: [2]\n", ["schedule"]),
        ("schedule: EDM\n", ["shape"]),
        ("", ["mapping"]),
        ("- EDM\n- [2]\n", ["mapping"]),
        ("schedule: [EDM\nshape: {2", ["YAML"]),
        ("schedule:\tEDM\n\tshape: [2]\n", ["YAML"]),
        ("schedule: EDM\nshape: [2]\n3: 4\n", ["setting", "3"]),
        ("schedule: EDM\nshape: []\n", ["shape"]),
        (PLAIN + "epochs: 010\n", ["epochs", "int", "'010'", "10"]),
        (PLAIN + "epochs: 0x1F\n", ["epochs", "int", "'0x1F'"]),
        (PLAIN + "epochs: 1_000\n", ["epochs", "int", "'1_000'", "1000"]),
        (PLAIN + "epochs: 1:30\n", ["epochs", "int", "'1:30'"]),
        (PLAIN + "lr_phi: 1:30.5\n", ["lr_phi", "float", "'1:30.5'"]),
        (PLAIN + "epochs: 2020-13-45\n", ["epochs", "int", "'2020-13-45'"]),
        (PLAIN + "epochs: 2020-12-24\n", ["epochs", "int", "'2020-12-24'"]),
        (PLAIN + "epochs: 1" + 30 * "0", ["epochs", "2^63"]),
        (PLAIN + "epochs: " + 5000 * "1", ["epochs", "int", "'111"]),
        (PLAIN + "lr_phi: " + 5000 * "1" + ".0", ["lr_phi", "finite"]),
        (PLAIN + "lr_phi: " + 90 * "1", ["lr_phi", "finite"]),
        (PLAIN + "lr_phi: .nan\n", ["lr_phi", "finite"]),
        (PLAIN + "offset_fraction: 1.5\n", ["offset_fraction", "at most 1"]),
        (PLAIN + "epochs: !!bool x\n", ["YAML", "tags", "line 3"]),
        (PLAIN + "epochs: !!int x\n", ["YAML", "tags"]),
        (PLAIN + "epochs: !!timestamp abc\n", ["YAML", "tags"]),
        (PLAIN + "epochs: !!binary aGk=\n", ["YAML", "tags"]),
        (PLAIN + "epochs: !!python/object/apply:os.getcwd []\n", ["YAML", "tags"]),
        (PLAIN + "nfes: !!set {3, 4}\n", ["YAML", "tags"]),
        (PLAIN + "epochs: 3\nepochs: 4\n", ["YAML", "'epochs'", "twice"]),
        (PLAIN + "presets: {quick: {epochs: 3, epochs: 4}}\n", ["YAML", "'epochs'", "twice"]),
        (PLAIN + "a: &a [1]\nnfes: *a\n", ["YAML", "aliases"]),
        (LAUGHS, ["YAML", "aliases"]),
        (PLAIN + "nfes: " + 10_000 * "[" + "\n", ["YAML"]),
        (PLAIN + "nfes: " + 10_000 * "[" + 10_000 * "]", ["YAML"]),
        (PLAIN + "nfes: " + 10_000 * "{a: " + "\n", ["YAML"]),
        (PLAIN + r'distance: "\U7fffffff"', ["YAML", "character"]),
        (PLAIN + r'distance: "\Uffffffff"', ["YAML", "character"]),
        (PLAIN + "? [a]\n: 3\n", ["YAML"]),
        (PLAIN + "x" * 900 + ": 3\n", ["setting", "'xxx"]),
        (PLAIN + "nfes: [" + "3.5, " * 5000 + "]\n", ["nfes", "(3.5, 3.5"]),
        (PLAIN + "distance: " + "x" * 5000, ["distance", "'xxx"]),
        (PLAIN + "# " + "x" * 10**5, ["mine.yaml", "100,000 bytes"]),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_a_wrong_params_file_is_refused_in_one_sentence(one_sentence, tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with one_sentence("mine.yaml", *words) as info:
        read_params(path)
    assert len(str(info.value)) < 1000


def test_what_is_no_params_file_is_refused_in_one_sentence(one_sentence, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")  # nobody writes to it: reading would wait for ever
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("pipe.yaml", "zero.yaml", "."):
        with one_sentence(str(tmp_path / name), "no file"):
            read_params(tmp_path / name)


def test_a_missing_or_binary_params_file_is_refused_in_one_sentence(one_sentence, tmp_path):
    with one_sentence("nowhere.yaml"):
        read_params(tmp_path / "nowhere.yaml")
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with one_sentence("mine.yaml"):
        read_params(tmp_path / "mine.yaml")


def test_a_params_file_may_write_a_float_as_a_whole_number(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("schedule: EDM\nshape: [2]\nlr_x: 6\n")
    assert read_params(path).lr_x == 6.0 and type(read_params(path).lr_x) is float


# --- What a run gives --------------------------------------------------------------------------


def test_result_is_measured_as_it_says():
    given = tiny("none")
    result = run(given)
    setup = s4s.load("mixture")
    x_0 = result.solver.sample(setup.denoiser, s4s.initial_noise(setup, range(50)))
    sums = s4s.feature_sums(lambda x: x, [x_0])
    assert result.frechet == pytest.approx(s4s.frechet_distance(sums, setup.reference), rel=1e-9)
    assert result.n_samples == 50 and result.history == []
    assert (result.seconds, result.evaluations, result.backward) == (0, 0, 0)
    teacher = s4s.load("mixture", **TINY).teacher
    others = teacher.sample(setup.denoiser, s4s.initial_noise(setup, range(50, 100)))
    apart = s4s.frechet_distance(sums, s4s.feature_sums(lambda x: x, [others]))
    assert result.frechet_to_teacher == pytest.approx(apart, rel=1e-9)
    assert result.thumbnails_to_teacher == pytest.approx(apart, rel=1e-9)  # points are so small
    metrics = ["frechet", "frechet_to_teacher", "thumbnails_to_teacher", "distance_to_teacher"]
    assert result.row() == {
        "features": "the plane itself",
        "dataset": "mixture",
        "grid": "logsnr",
        "solver": "ipndm",
        "order": 2,
        "nfe": 4,
        "learn": "none",
        "seed": 0,
        **{name: getattr(result, name) for name in metrics},
        **{f"{name}_blocks": result.blocks[name] for name in metrics},
        "seconds": 0.0,
        "evaluations": 0,
        "backward": 0,
        "n_samples": 50,
    }


def test_the_blocks_of_a_result_are_disjoint_parts_of_its_samples():
    result, setup = run(tiny("none")), s4s.load("mixture", **TINY)
    for i, seeds in enumerate(torch.arange(50).tensor_split(5)):
        x_T = s4s.initial_noise(setup, seeds.tolist())
        x, exact = (psi.sample(setup.denoiser, x_T) for psi in (result.solver, setup.teacher))
        sums = s4s.feature_sums(lambda x: x, [x])
        assert result.blocks["frechet"][i] == pytest.approx(
            s4s.frechet_distance(sums, setup.reference), rel=1e-9
        )
        assert result.blocks["distance_to_teacher"][i] == pytest.approx(
            (x - exact).square().mean().sqrt().item(),
            rel=1e-6,  # of samples kept as float32
        )
    squares = torch.tensor(result.blocks["distance_to_teacher"]).square()
    assert squares.mean().sqrt().item() == pytest.approx(result.distance_to_teacher, rel=1e-6)
    assert [len(b) for b in run(tiny("none", {"fid_samples": 7})).blocks.values()] == [3] * 4


@pytest.mark.parametrize("workers", [None, 1])
def test_each_set_of_samples_has_a_distance_of_its_own(workers, monkeypatch):
    monkeypatch.setattr(run_module, "SHARD", 7)  # divides no set
    several = tiny("none", {"fid_blocks": 3})
    rows = s4s.run_all([several], workers=1) if workers else tables._frame([run(several).row()])
    result, setup = run(several), s4s.load("mixture", **TINY)
    others = setup.teacher.sample(setup.denoiser, s4s.initial_noise(setup, range(150, 200)))
    for i, frechet in enumerate(result.blocks["frechet"]):
        x_T = s4s.initial_noise(setup, range(50 * i, 50 * (i + 1)))
        x, exact = (psi.sample(setup.denoiser, x_T) for psi in (result.solver, setup.teacher))
        sums, apart = (s4s.feature_sums(lambda x: x, [x]) for x in (x, others))
        assert frechet == pytest.approx(s4s.frechet_distance(sums, setup.reference), rel=1e-9)
        assert result.blocks["frechet_to_teacher"][i] == pytest.approx(
            s4s.frechet_distance(sums, apart), rel=1e-9
        )
        assert result.blocks["distance_to_teacher"][i] == pytest.approx(
            (x - exact).square().mean().sqrt().item(), rel=1e-6
        )
    assert result.frechet == pytest.approx(sum(result.blocks["frechet"]) / 3)
    assert result.blocks["frechet"][0] == pytest.approx(run(tiny("none")).frechet, rel=1e-9)
    assert (result.n_samples, rows["n_sets"].item()) == (50, 3)
    assert tables.describe(rows).endswith("seeds 0 to 149, in 3 sets of 50")


def test_the_command_says_how_sure_a_distance_of_several_sets_is(capsys):
    settings = [f"--set={name}={value}" for name, value in (TINY | {"fid_blocks": 2}).items()]
    main(["run", "--dataset", "mixture", "--order=2", "--nfe=4", *settings])
    assert re.search(
        r"2 sets of 50 samples, seeds 0-99\)  [\d.]+ \(95 % interval -?[\d.]+ to [\d.]+\)",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize("start", [run, lambda e: s4s.run_all([e], workers=1)])
def test_sets_that_reach_the_seeds_of_learning_are_refused_before_it(start, one_sentence):
    with one_sentence("below 1000000", "20 + 1 sets of 50000", "fid_blocks"):
        start(tiny("coefficients", {"fid_samples": 50_000, "fid_blocks": 20}))
    assert not list(cache_module.results_folder().rglob("*learned*"))


@pytest.mark.parametrize("learner", ["first_order", "gauss_newton"])
def test_what_learning_cost_the_network_is_counted(learner, monkeypatch):
    seen = []
    learned = run_module._learned

    def counting(experiment, setup, path):
        run_module.cached_teacher_set(setup, experiment.seed, alt=True)  # made before, and kept

        def denoiser(x, t):
            seen.append(len(x))
            return setup.denoiser(x, t)

        return learned(experiment, setup.variant(denoiser=denoiser), path)

    monkeypatch.setattr(run_module, "_learned", counting)
    result = run(tiny("jointly", {"learner": learner}))
    assert result.evaluations == sum(seen) > 0
    assert (result.backward > 0) == (learner == "first_order")
    assert result.backward < result.evaluations


def test_the_ld3_grid_is_that_of_ld3_whatever_learns_on_it():
    first, second = (
        initial_solver(tiny("jointly", {"learner": learner}, grid="ld3")).grid.t
        for learner in ("first_order", "gauss_newton")
    )
    assert torch.equal(first, second)


def test_the_teacher_itself_has_no_distance_to_the_teacher():
    result = run(tiny("none", solver="unipc", order=3, nfe=10))
    assert result.distance_to_teacher == pytest.approx(0, abs=1e-12)
    assert run(tiny("none", solver="ddim", order=1)).distance_to_teacher > 1e-3


@pytest.mark.parametrize("learn", ["coefficients", "times", "alternating", "jointly"])
def test_learning_keeps_its_history_and_its_best_solver(learn):
    result = run(tiny(learn))
    losses = [record["valid_loss"] for record in result.history]
    best = result.history[losses.index(min(losses))]
    assert [record["index"] for record in result.history] == [0, 1, 2]
    assert result.solver.to_dict()["b"] == best["b"] and result.solver.to_dict()["t"] == best["t"]
    assert result.seconds > 0


NEWTON = {"learner": "gauss_newton", "newton_batch_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["coefficients", "times", "jointly"])
def test_the_learner_is_a_setting_and_moves_the_same_blocks(learn):
    given = tiny(learn, NEWTON | {"n_train": 32, "n_train_alt": 32})
    start, result = initial_solver(given), run(given)
    assert {record["phase"] for record in result.history[1:]} == {"newton"}
    assert result.history[-1]["valid_loss"] < result.history[0]["valid_loss"]
    moved = not torch.equal(result.solver.grid.t, start.grid.t)
    assert moved == (learn != "coefficients") and result.solver.grid.scale[0] == 1
    published = ipndm(result.solver.grid, 2)
    assert torch.equal(result.solver.coefficients.b, published.b) == (learn == "times")


def test_the_first_call_is_free_where_the_settings_say_so():
    settings = NEWTON | {"free_first_call": True, "n_train_alt": 32}
    given = tiny("jointly", settings, solver="dpm_solver_pp")
    assert run(given).solver.grid.scale[0] < 1
    same = [tiny("coefficients", s) for s in ({}, {"free_first_call": True})]
    assert torch.equal(*(run(e).solver.coefficients.b for e in same))


@pytest.mark.parametrize("learn", ["alternating", "bns", "generalised"])
def test_what_gauss_newton_does_not_learn_stays_first_order(learn):
    assert tiny(learn, NEWTON).learner is tiny(learn).learner


def test_the_errors_of_samples_are_those_of_the_result():
    given = tiny("none")
    result, setup = run(given), s4s.load("mixture", **TINY)
    errors = s4s.sample_errors(result.solver, setup)
    assert errors.shape == (TINY["fid_samples"],)
    assert errors.mean().sqrt().item() == pytest.approx(result.distance_to_teacher, rel=1e-12)


@pytest.mark.parametrize("learner", ["first_order", "gauss_newton"])
def test_a_solver_learned_on_another_setup_is_that_of_the_setup_and_is_kept(learner, monkeypatch):
    given = tiny("jointly", {"learner": learner})
    setup = s4s.load("mixture", **given.settings)
    assert s4s.learn_on(setup, given) == run(given).solver  # the same model, another place
    sharper = setup.variant(name="sharper", denoiser=lambda x, t: setup.denoiser(0.9 * x, t))
    learned = s4s.learn_on(sharper, given)
    assert not torch.equal(learned.coefficients.b, run(given).solver.coefficients.b)
    monkeypatch.setattr(run_module, "_learned", None)
    assert s4s.learn_on(sharper, given) == learned


def test_solver_file_tells_how_it_was_made():
    result = run(tiny())
    provenance = result.solver.provenance
    assert provenance["experiment"] == result.config
    assert provenance["frechet"] == result.frechet
    params = result.config["params"]
    assert Params(**params) == tiny().params and params == json.loads(json.dumps(params))
    assert {"s4s_core", "torch", "python"} <= set(provenance["versions"])


def test_learning_starts_at_the_published_solver():
    given = tiny(order=4, nfe=6, solver="ipndm")
    assert torch.equal(initial_solver(given).coefficients.b, ipndm(initial_solver(given).grid, 4).b)
    wide = initial_solver(tiny(order=6, nfe=6, solver="ipndm"))
    assert wide.coefficients.order == 6
    assert torch.equal(wide.coefficients.b[:, :4], ipndm(wide.grid, 4).b)
    assert not wide.coefficients.b[:, 4:].any()


def test_each_seed_draws_gaussian_weights_of_its_own():
    grid = initial_solver(tiny()).grid
    for seed in (0, 1):
        drawn = initial_solver(tiny(solver="gaussian", seed=seed)).coefficients.b
        assert torch.equal(drawn, gaussian(grid, 2, seed).b)
    assert torch.equal(
        initial_solver(tiny(seed=0)).coefficients.b, initial_solver(tiny(seed=1)).coefficients.b
    )


def test_the_ld3_grid_is_learned_once_for_all_orders(results):
    one, two = (initial_solver(tiny(grid="ld3", order=order)) for order in (1, 2))
    assert torch.equal(one.grid.t, two.grid.t)
    assert not torch.equal(one.grid.t, initial_solver(tiny(grid="logsnr")).grid.t)
    assert len(files(results, "learned_*.json")) == 1 and not files(results, "result_*.json")


def test_the_costs_of_learning_count_those_of_the_ld3_grid():
    alone, started = tiny("jointly"), tiny("coefficients", grid="ld3")
    names = ("seconds", "evaluations", "backward")
    assert s4s.learning_costs(alone) == {n: getattr(run(alone), n) for n in names}
    own, grid = run(started), s4s.learning_costs(replace(started, learn="none"))
    both = s4s.learning_costs(started)
    assert both == {n: getattr(own, n) + grid[n] for n in names} and min(grid.values()) > 0
    assert all(getattr(own, n) > 0 for n in names)


@pytest.mark.parametrize("name", experiment.SEARCHED)
def test_a_searched_grid_is_found_once_for_all_that_share_it(name, results, monkeypatch):
    first = initial_solver(tiny(grid=name, solver="unipc"))
    assert len(files(results, f"{name}_*.safetensors")) == 1

    def no(*_):
        raise AssertionError("searched again")

    with monkeypatch.context() as patch:
        patch.setitem(experiment.SEARCHED, name, no)
        others = {"order": 1, "solver": "ddim", "learn": "times", "seed": 3}
        again = initial_solver(tiny(grid=name, **others))
        assert torch.equal(again.grid.t, first.grid.t)
        with pytest.raises(AssertionError, match="searched again"):
            initial_solver(tiny(grid=name, nfe=5))


def test_searched_grids_are_those_of_the_model():
    setup = s4s.load("mixture")
    assert torch.equal(initial_solver(tiny(grid="dmn")).grid.t, s4s.dmn(setup.schedule, 4).t)
    # above the noise of evaluation, from 0, and of the teacher set of the highest seed
    seeds = range(1_001_000_000, 1_001_000_256)
    x_T = s4s.initial_noise(setup, seeds)
    expected = s4s.gits(setup.denoiser, x_T, setup.schedule, 4)
    assert torch.equal(initial_solver(tiny(grid="gits")).grid.t, expected.t)
    other = s4s.gits(setup.denoiser, x_T, setup.schedule, 4, coefficient=3.0)
    found = initial_solver(tiny(grid="gits", settings={"gits_coefficient": 3.0})).grid.t
    assert torch.equal(found, other.t) and not torch.equal(found, expected.t)


def test_the_statistics_of_dpm_solver_v3_have_the_sizes_that_are_set():
    few = {"n_train": 5, "n_valid": 1, "teacher_nfe": 6}
    setups = [s4s.load("mixture", **few, statistics_points=n) for n in (4, 6)]
    assert [len(run_module._statistics(setup, 0)[0].lam) for setup in setups] == [4, 6]
    assert s4s.load_params("mixture").statistics_points == 60
    few |= {"statistics_points": 4}
    of_pairs, same, of_more = (
        run_module._statistics(s4s.load("mixture", **few, statistics_samples=n), 0)[0]
        for n in (0, 5, 40)
    )
    teacher = s4s.make_teacher_set(setup := s4s.load("mixture", **few), 40, 1, 0)
    expected = s4s.model_statistics(setup, teacher.train[1], 4, seeds=teacher.seeds[:40])
    assert torch.equal(of_pairs.l, same.l) and torch.equal(of_more.l, expected.l)
    assert not torch.equal(of_pairs.l, of_more.l)


@pytest.mark.parametrize(("name", "weighting"), [("LDM", "latent"), ("VPLinear", "pixel")])
def test_dmn_weighs_errors_as_the_model_needs(name, weighting):
    schedule = schedule_module.NAMED_SCHEDULES[name]
    setup = replace(s4s.load("mixture"), schedule=schedule)
    assert torch.equal(experiment.SEARCHED["dmn"](setup, 3).t, s4s.dmn(schedule, 3, weighting).t)


def test_more_gits_steps_than_the_teacher_has_are_refused_in_one_sentence(one_sentence):
    with one_sentence("GITS", "60 steps", "61"):
        run(tiny("none", grid="gits", nfe=61))


def test_a_run_gives_the_same_numbers_in_another_folder(monkeypatch, tmp_path):
    first = run(tiny())
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path / "elsewhere"))
    again = run(tiny())
    assert again.solver == first.solver
    assert (again.frechet, again.history) == (first.frechet, first.history)


# --- The cache ---------------------------------------------------------------------------------


def test_a_cached_result_is_equal_and_computes_nothing(monkeypatch):
    first = run(tiny())

    def no(*_, **__):
        raise AssertionError("computed again")

    for name in ("sample_batches", "frechet_distance", "make_teacher_set", "model_statistics"):
        monkeypatch.setattr(run_module, name, no)
    monkeypatch.setitem(experiment.LEARN, "coefficients", no)
    again = run(tiny())
    assert again == first
    assert again.solver.provenance == first.solver.provenance
    setup = s4s.load("mixture")
    x_T = s4s.initial_noise(setup, range(5))
    assert torch.equal(
        again.solver.sample(setup.denoiser, x_T), first.solver.sample(setup.denoiser, x_T)
    )


def test_whatever_changes_the_result_changes_its_file(monkeypatch):
    experiments = [
        tiny(),
        tiny("none"),
        tiny("times"),
        tiny(nfe=5),
        tiny(order=3),
        tiny(grid="edm"),
        tiny(solver="unipc"),
        tiny(seed=1),
        *[tiny(settings={key: value}) for key, value in CHANGED.items()],
    ]
    paths = {e.path() for e in experiments}
    assert len(paths) == len(experiments)
    for name in ("method", "reference"):  # the code that computes, and the real data
        monkeypatch.setattr(experiment, name, lambda *_: "another")
        assert tiny().path() not in paths
        paths.add(tiny().path())


def test_the_method_is_its_code_and_not_its_comments(tmp_path, monkeypatch):
    def hashed(text: str) -> str:
        (tmp_path / "solver.py").write_text(text)
        cache_module.method.cache_clear()
        return cache_module.method()

    monkeypatch.setattr(cache_module, "PACKAGE", tmp_path)
    plain = hashed('def step(h):\n    """Return it."""\n    return 2 * h\n')
    assert plain == hashed('def step(h):\n    """Return twice h."""\n    return 2 * h  # twice\n')
    assert plain != hashed('def step(h):\n    """Return it."""\n    return 3 * h\n')
    cache_module.method.cache_clear()


def test_the_statistics_of_the_data_are_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    params, hashes = load_params("ecg"), set()
    for content in (b"some", b"other"):
        (tmp_path / "ecg_reference.safetensors").write_bytes(content)
        hashes.add(zoo.reference("ecg", params))
    assert len(hashes) == 2 and zoo.reference("digits", load_params("digits")) == ""


CHANGED = {
    "epochs": 3,
    "lr_phi": 0.02,
    "gamma": 0.0,
    "batch_size": 8,
    "teacher_nfe": 11,
    "fid_samples": 51,
    "accept_if_better": True,
    "grid_variable": "t",
}


def test_settings_of_the_model_make_another_model_and_others_share_one():
    def setup(**settings):
        return run_module._setup(Experiment("digits", settings=settings))

    plain, half = setup(epochs=3), setup(precision="bfloat16", epochs=3)
    assert plain.denoiser is setup(epochs=4).denoiser and plain.params.epochs == 3
    assert half.params.precision == "bfloat16" and half.params.epochs == 3
    x, t = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        difference = (half.denoiser(x, t) - plain.denoiser(x, t)).abs().max()
    assert 0 < difference < 0.1


def test_a_changed_setting_is_a_new_result(results):
    first, second = run(tiny()), run(tiny(settings={"lr_phi": 0.1}))
    assert first.solver != second.solver
    assert len(files(results, "result_*.json")) == 2
    # The pairs do not depend on the rate: they are made once. They do on the teacher.
    assert len(files(results, "teacher_set_*")) == 1
    third = run(tiny(settings={"teacher_nfe": 11}))
    assert len(files(results, "teacher_set_*")) == len(files(results, "teacher_samples_*")) == 2
    assert third.history[0]["valid_loss"] != first.history[0]["valid_loss"]
    assert third.distance_to_teacher != first.distance_to_teacher


def edited(**changes):
    """What makes of a result's bytes the same with some entries changed."""
    return lambda content: json.dumps(json.loads(content) | changes).encode()


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"{}",
        lambda content: b"[]",
        lambda content: b"\xff\x00\xfe",
        lambda content: b"[" * 100_000,
        edited(frechet=0.001),
        edited(frechet="abc"),
        edited(frechet=None),
        edited(history=5),
        edited(sha256="0" * 64),
        lambda content: run(tiny(nfe=5)) and tiny(nfe=5).path().read_bytes(),
    ],
)
def test_a_result_that_is_not_what_was_written_is_computed_again(damage, capsys):
    first, path = run(tiny()), tiny().path()
    path.write_bytes(damage(path.read_bytes()))
    again = run(tiny())
    assert again.solver == first.solver and again.frechet == first.frechet
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert str(path) in line and "computing it again" in line
    assert run(tiny()) == again  # what was written now is believed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher_set", "teacher_samples", "teacher_sums"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: {name: tensor * 0 for name, tensor in tensors.items()},
        lambda tensors: {name: tensor[:1] for name, tensor in tensors.items() if tensor.ndim},
        lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
        lambda tensors: {f"{name}_": tensor for name, tensor in tensors.items()},
        None,
    ],
)
def test_teacher_data_that_are_not_what_was_written_are_computed_again(
    results, kind, damage, capsys
):
    first = run(tiny())
    (path,) = results.rglob(f"{kind}_*")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    if damage is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        wrong = damage(safetensors.torch.load(path.read_bytes()))
        path.write_bytes(safetensors.torch.save(wrong, metadata))
    tiny().path().unlink()
    again = run(tiny())
    assert (again.solver, again.blocks) == (first.solver, first.blocks)
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda p: p.symlink_to("/dev/zero")])
def test_what_is_no_file_in_the_place_of_a_result_is_told_in_one_sentence(one_sentence, make):
    make(tiny().path())
    with one_sentence(str(tiny().path()), "remove it"):
        run(tiny())


def test_a_solver_learned_elsewhere_is_believed_as_it_was_written_only(results, capsys):
    setup = replace(s4s.load("mixture", **tiny().settings), name="mine")
    learned = s4s.learn_on(setup, tiny())
    (path,) = (results / "mine").glob("solver_*")
    assert s4s.learn_on(setup, tiny()) == learned and not capsys.readouterr().err
    entries = json.loads(path.read_text())
    entries["solver"]["b"][1][0] += 0.1
    path.write_text(json.dumps(entries))
    assert s4s.learn_on(setup, tiny()) == learned
    assert str(path) in capsys.readouterr().err


def script(results, code: str, *arguments: str, **options) -> subprocess.Popen:
    """Another Python that works in the same results folder."""
    environment = {**os.environ, "S4S_RESULTS": str(results), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *(["-c", code] if code else []), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["teacher_set", "result"])
def test_killing_a_run_while_it_writes_leaves_no_half_written_file(results, victim):
    code = f"""
import os, pathlib, signal
from s4s_core import Experiment, errors, run

class Dying:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

def opening(path, *mode):
    file = open(path, *mode)
    return Dying(file) if {victim!r} in pathlib.Path(path).name else file

errors.open = opening
run(Experiment(dataset="mixture", nfe=4, order=2, learn="coefficients", settings={TINY!r}))
"""
    process = script(results, code)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert files(results, f"{victim}_*") == []
    assert bool(files(results, "teacher_set_*")) == (victim == "result")
    result = run(tiny())
    assert result == run(tiny())
    assert files(results, f"{victim}_*") != []


CLI = ["-m", "s4s_core", "run", "--dataset", "mixture", "--nfe", "4", "--order", "2"]
CLI += [text for key, value in TINY.items() for text in ("--set", f"{key}={value}")]


@pytest.mark.slow
def test_two_processes_may_write_the_same_result(results):
    processes = [script(results, "", *CLI, "--learn", "coefficients") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    metrics = [[line for line in out.splitlines() if "istance" in line] for out, _ in outputs]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 2
    assert len(files(results, "result_*.json")) == 2  # the result and its solver file
    assert f"{run(tiny()).frechet:.4f}" in metrics[0][0]


# --- Interruption ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, "diverged"])
def test_an_interrupted_run_keeps_the_best_solver_so_far_and_no_result(monkeypatch, results, error):
    learn, seen = s4s.learn_coefficients, []

    def interrupted(*arguments, **options):
        for epoch in learn(*arguments, **options):
            if epoch.index == 2:
                raise (
                    LearningDivergedError("not finite", seen[-1]) if error == "diverged" else error
                )
            seen.append(epoch.best)
            yield epoch

    with monkeypatch.context() as patch:
        patch.setitem(experiment.LEARN, "coefficients", interrupted)
        with pytest.raises(LearningDivergedError if error == "diverged" else error):
            run(tiny(settings={"epochs": 3}))
    (name,) = files(results, "*best_so_far.json")
    (path,) = results.rglob(name)
    assert Solver.load(path) == seen[-1]
    given = tiny(settings={"epochs": 3})
    assert not given.path().exists()
    assert len(run(given).history) == 4
    assert not files(results, "*best_so_far.json")


@pytest.mark.slow
def test_a_run_that_is_killed_has_kept_the_best_solver_of_a_minute_ago(results):
    code = f"""
import os, signal
import s4s_core as s4s
from s4s_core.experiments import experiment, run

def killed(*arguments, **options):
    for epoch in s4s.learn_coefficients(*arguments, **options):
        yield epoch
        if epoch.index == 2:
            os.kill(os.getpid(), signal.SIGKILL)

run.SAVE_EVERY = 0
experiment.LEARN["coefficients"] = killed
settings = { ({**TINY, "epochs": 3})!r}
s4s.run(s4s.Experiment("mixture", nfe=4, learn="coefficients", settings=settings))
"""
    process = script(results, code)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    (name,) = files(results, "*best_so_far.json")
    (path,) = results.rglob(name)
    assert Solver.load(path).coefficients.b.isfinite().all()


# --- The command line --------------------------------------------------------------------------


@pytest.mark.slow
def test_command_line_prints_metrics_and_writes_a_solver(results, tmp_path):
    out = tmp_path / "mine" / "solver.json"
    process = script(results, "", *CLI, "--learn", "coefficients", "--out", str(out))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    result = run(tiny())
    assert f"{result.frechet:.4f}" in output and f"{result.distance_to_teacher:.4f}" in output
    assert "the plane itself; 50 samples, seeds 0-49" in output and str(out) in output
    setup = s4s.load("mixture")
    solver = Solver.load(out)
    assert solver == result.solver
    assert solver.sample(setup.denoiser, s4s.initial_noise(setup, range(3))).isfinite().all()


def test_command_line_keeps_the_solver_in_the_results_by_default(results, capsys):
    main(["run", *CLI[3:], "--learn", "none"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("solver")]
    path = line.split("  ")[1]
    assert Solver.load(path) == run(tiny("none")).solver
    assert path.startswith(str(results))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "ffhqq"], ["dataset", "digits", "mixture"]),
        (["--grid", "cosine"], ["grid", "logsnr"]),
        (["--grid", "ays_sdxl"], ["AYS", "Stable Diffusion"]),
        (["--solver", "heun"], ["solver", "unipc"]),
        (["--learn", "phi"], ["learn", "coefficients"]),
        (["--order", "5"], ["order 5", "nfe"]),
        (["--nfe", "0"], ["nfe", "from 1 to"]),
        (["--set", "lr=1"], ["setting", "lr_phi"]),
        (["--set", "lr_phi=1e-4"], ["lr_phi", "1.0e-04"]),
        (["--set", "epochs"], ["KEY=VALUE", "epochs"]),
        (["--set", "epochs=[1"], ["epochs", "YAML"]),
        (["--set", "epochs=010"], ["epochs", "'010'"]),
        (["--set", "epochs=!!int x"], ["'epochs'", "tags"]),
        (["--set", "nfes=" + "[" * 9999], ["'nfes'", "YAML"]),
        (["--out", "{folder}"], ["{folder}"]),
        (["--out", "{file}/solver.json"], ["{file}"]),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, capsys, arguments, words):
    (tmp_path / "a_file").touch()
    places = {"folder": str(tmp_path), "file": str(tmp_path / "a_file")}
    arguments = [a.format(**places) for a in arguments]
    with pytest.raises(SystemExit) as info:
        main(["run", *CLI[3:], "--learn", "none", *arguments])
    message = info.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word.format(**places) in message


@pytest.mark.slow
def test_command_line_errors_exit_non_zero_without_a_traceback(results):
    process = script(results, "", *CLI, "--dataset", "ffhqq")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and output == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ") and "ffhqq" in line
    assert not results.exists()


@pytest.mark.slow
def test_notebooks_show_an_error_as_one_line(results, tmp_path, monkeypatch):
    """IPython prints what `_render_traceback_` gives."""
    error = UsageError("nfe must be at least 1")
    assert error._render_traceback_() == ["UsageError: nfe must be at least 1"]
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    code = "import s4s_core; s4s_core.load('ffhqq')"
    process = script(results, "", "-m", "IPython", "--colors=NoColor", "-c", code)
    output, errors = process.communicate(timeout=120)
    shown = [line for line in (output + errors).splitlines() if line.strip()]
    assert shown == [line for line in shown if line.startswith("UsageError: unknown dataset")]
    assert len(shown) == 1


@pytest.mark.slow
def test_many_experiments_give_in_processes_what_they_give_one_by_one(tmp_path, monkeypatch):
    many = [
        s4s.Experiment("mixture", grid, "ipndm", 2, nfe, learn, 0, TINY)
        for grid, nfe in (("ld3", 3), ("ld3", 2), ("gits", 3))
        for learn in ("coefficients", "none")
    ]
    together = s4s.run_all(many, workers=2)
    assert together["nfe"].tolist() == [3, 3, 2, 2, 3, 3]
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path / "alone"))
    alone = [s4s.run(e) for e in many]
    assert [run(e).solver for e in many] == [r.solver for r in alone]
    assert together["frechet"].tolist() == [r.frechet for r in alone]


@pytest.mark.slow
def test_a_run_that_fails_in_a_process_says_what_one_in_this_process_says():
    many = [
        s4s.Experiment(
            "mixture", "edm", "ipndm", 2, nfe, "coefficients", 0, TINY | {"lr_phi": 1e300}
        )
        for nfe in (2, 3)
    ]
    told = "2 of 2 runs failed.*\n- mixture edm .* nfe 2 .*: .* in phase 'phi'.*\n- .* nfe 3 .*"
    with pytest.raises(s4s.RunsFailedError, match=told) as error:
        s4s.run_all(many, workers=2)
    assert [e.best.nfe for e in error.value.__cause__.exceptions] in ([2, 3], [3, 2])
    with pytest.raises(s4s.LearningDivergedError, match="diverged in phase 'phi'"):
        s4s.run_all(many[:1])  # the only one says what it has to say itself


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path):
    (tmp_path / "jobs.py").write_text(
        "import time\n"
        "def beat(path):\n"
        "    while True:\n"
        "        open(path, 'a').write('.')\n"
        "        time.sleep(0.05)\n"
    )
    beats = [tmp_path / name for name in ("first", "second")]
    code = (
        "import jobs\n"
        "from s4s_core.experiments.executors import processes\n"
        "with processes(2) as executor:\n"
        f"    list(executor.map(jobs.beat, {[str(path) for path in beats]}))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        limit = time.monotonic() + 100
        while not all(path.exists() for path in beats):
            assert parent.poll() is None and time.monotonic() < limit
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
    time.sleep(2)
    before = [path.stat().st_size for path in beats]
    time.sleep(1)
    assert [path.stat().st_size for path in beats] == before


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(results, tmp_path, monkeypatch):
    code = f"""
import s4s_core as s4s
if __name__ == "__main__":
    choices = dict(dataset="mixture", order=2, learn="coefficients", nfe=[3, 4], seed=[0, 1, 2])
    s4s.run_all(s4s.sweep({TINY}, **choices), workers=2)
"""
    (tmp_path / "sweep.py").write_text(code)
    process = script(results, "", str(tmp_path / "sweep.py"))
    limit = time.monotonic() + 100
    while not files(results, "result_*.json"):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.kill()
    process.communicate()
    made = {path: path.stat().st_mtime_ns for path in results.rglob("result_*.json")}
    experiments = [tiny(nfe=nfe, seed=seed) for nfe in (3, 4) for seed in range(3)]
    again = s4s.run_all(experiments, workers=1)
    assert (
        made
        and made.items() <= {e.path(): e.path().stat().st_mtime_ns for e in experiments}.items()
    )
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path / "fresh"))
    fresh, numbers = s4s.run_all(experiments, workers=1), ["frechet", "distance_to_teacher"]
    assert again[numbers].equals(fresh[numbers])


def test_a_list_is_of_numbers_or_of_names(one_sentence):
    s4s.require_lists(nfes=[3, 4], gammas=[0.0, 1, 2.5], grids=["edm"])
    for wrong in ("[3, 4]", 3, [], [3, "edm"], [True], [None]):
        with one_sentence("nfes must be a list of whole numbers, of decimal numbers or of names"):
            s4s.require_lists(nfes=wrong)


def test_a_sweep_is_every_combination_and_lists_what_no_seed_changes_once():
    found = s4s.sweep(
        {"fid_samples": 9}, dataset="mixture", grid=["edm", "ld3"], solver="ipndm", nfe=[3, 4],
        learn=["none", "coefficients"], seed=[5, 6],
    )  # fmt: skip
    assert all(e.params.fid_samples == 9 and e.dataset == "mixture" for e in found)
    combinations = [(e.grid, e.nfe, e.learn, e.seed) for e in found]
    assert len(set(combinations)) == len(combinations) == 2 * (1 + 2 + 2 + 2)
    assert combinations[:3] == [("edm", 3, "none", 5), ("edm", 3, "coefficients", 5),
                                ("edm", 3, "coefficients", 6)]  # fmt: skip
    assert ("ld3", 4, "none", 6) in combinations and ("edm", 4, "none", 6) not in combinations
    assert [e.seed for e in s4s.sweep(dataset="mixture", nfe=3)] == [0]
    assert len(s4s.sweep(dataset="mixture", solver="gaussian", seed=[0, 1])) == 2


def test_a_slip_in_a_sweep_is_one_sentence(one_sentence):
    for slip, words in (
        ({"grid": ["edm", "edn"]}, "unknown grid 'edn'"),
        ({"seed": [0, 1, 0]}, "seed must list each value once, not 0 twice"),
        ({"nfe": ["4"]}, "nfe must be a whole number from 1 to 1000000, not '4'"),
        ({"order": [0]}, "order must be a whole number from 1 to 1000000, not 0"),
    ):
        with one_sentence(words):
            s4s.sweep(**{"dataset": "mixture", "nfe": 3, **slip})


@pytest.mark.parametrize("settings", [{"gamma": 0.0}, {"digits": 3}, 7, {"digitz": {}}])
def test_settings_of_a_dataset_are_looked_up_by_its_name(one_sentence, settings):
    own = {"digits": {"epochs": 3}, "mixture": {}}
    assert s4s.settings_for("digits", own, preset="full") == {"epochs": 3}
    assert s4s.settings_for("mixture", {"digits": {"epochs": 3}}) == {}
    with one_sentence("settings must map datasets to settings", repr(settings), "mixture"):
        s4s.settings_for("mixture", settings)


# --- Presets -----------------------------------------------------------------------------------

PRESETS = """
schedule: EDM
shape: [2]
distance: l2
epochs: 7
preset: quick
presets:
  quick: {epochs: 2, rounds: 3}
  careful: {lr_phi: 0.001}
"""


@pytest.fixture
def params_folder(tmp_path, monkeypatch):
    """A params folder of its own, with the file mixture.yaml above and a plain one."""
    folder = tmp_path / "params"
    folder.mkdir()
    (folder / "mixture.yaml").write_text(PRESETS)
    (folder / "plain.yaml").write_text("schedule: EDM\nshape: [2]\n")
    monkeypatch.setattr(params_module, "PARAMS", folder)
    return folder


def test_a_preset_replaces_settings_and_the_usual_one_is_the_files_own(params_folder):
    assert s4s.settings_for("mixture") == {"epochs": 2, "rounds": 3}
    assert s4s.settings_for("mixture", preset="full") == {} == s4s.settings_for("plain")
    own = {"mixture": {"rounds": 1}, "plain": {"rounds": 9}}
    found = s4s.settings_for("mixture", own, "quick", epochs=None, fid_samples=5)
    assert found == {"epochs": 2, "rounds": 1, "fid_samples": 5}
    assert load_params("mixture").epochs == 7 and load_params("mixture", "quick").epochs == 2
    assert load_params("mixture", "careful").lr_phi == 0.001


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("preset: quik", ["unknown preset 'quik'", "careful", "full", "quick"]),
        ("presets: 3", ["presets must map names"]),
        ("presets: {full: {}}", ["presets must map names"]),
        ("presets: {quick: 3}", ["a preset must map settings"]),
        ("presets: {quick: {epoch: 3}}", ["unknown setting 'epoch'"]),
        ("presets: {quick: {epochs: 0}}", ["epochs must be above 0"]),
        ("preset: [quick]", ["unknown preset ['quick']"]),
    ],
)
def test_a_slip_in_presets_is_one_sentence(params_folder, one_sentence, text, words):
    kept = PRESETS if text.startswith("preset:") else PRESETS.partition("preset:")[0]
    kept = kept.replace("preset: quick\n", "")
    (params_folder / "mixture.yaml").write_text(f"{kept}{text}\n")
    with one_sentence("mixture.yaml", *words):
        s4s.settings_for("mixture")


def test_an_unknown_preset_is_refused_in_one_sentence(params_folder, one_sentence):
    with one_sentence("unknown preset of plain 'quick'; choose one of: full"):
        s4s.settings_for("plain", preset="quick")


# --- A live kernel -----------------------------------------------------------------------------


def test_what_a_file_or_a_dictionary_says_later_does_not_change_an_experiment(params_folder):
    settings = {"fid_samples": 20, "teacher_nfe": 5, "n_train": 4, "n_valid": 2, "epochs": 1}
    given = s4s.Experiment("mixture", "ld3", nfe=3, settings=settings | {"ld3_order": 2})
    path = given.path()
    given.settings["fid_samples"] = settings["fid_samples"] = 30
    (params_folder / "mixture.yaml").write_text(
        "schedule: EDM\nshape: [2]\nlr_xi: 0.5\ndistance: l2\n"
    )
    result = run(given)
    assert given.path() == path and path.exists()
    assert result.n_samples == result.config["params"]["fid_samples"] == 20
    before = run_module.ld3_run(given)
    assert before.params == given.params and run(before).config["params"]["lr_xi"] == 5e-3


def test_the_key_of_a_result_needs_no_network(monkeypatch):
    def no(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("s4s_core.models.zoo.load_network", no)
    given = s4s.Experiment("digits", settings={"n_train": 3})
    weights = given.config()["weights"]
    monkeypatch.undo()
    assert weights == s4s.load("digits").weights and len(weights) == 3
    assert given.path().name.startswith("result_")


def test_settings_make_one_setup_and_one_network():
    one, other = (run_module._setup(tiny(**{"nfe": nfe})) for nfe in (3, 4))
    assert one is other
    changed = run_module._setup(s4s.Experiment("mixture", settings={"epochs": 3}))
    assert changed is not one and changed.denoiser is one.denoiser
    assert {one.params: 1}[s4s.load_params("mixture").override(**TINY)] == 1


def test_no_more_cores_are_used_than_this_process_may(monkeypatch):
    assert 1 <= run_module.usable_cores() <= os.cpu_count()
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert run_module.usable_cores() == 1
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert run_module.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_named_lists_of_experiments_are_told_apart_in_the_frame():
    rows = s4s.run_all({"iPNDM": [tiny("none")], "S4S": [tiny(), tiny(seed=1)]}, workers=1)
    assert rows["method"].tolist() == ["iPNDM", "S4S", "S4S"]
    assert rows["seed"].tolist() == [0, 0, 1]
    assert tables.describe(rows) == "3 runs; features: the plane itself; seeds 0 to 49"
    rows.loc[0, "n_samples"] = 20
    assert tables.describe(rows).endswith("; seeds 0 to 19 or 49")
    assert "method" not in s4s.run_all([tiny("none")])


@pytest.mark.slow
def test_the_former_command_still_runs(results):
    arguments = ["--dataset", "mixture", "--nfe", "2", "--order", "1", "--set", "fid_samples=5"]
    settings = ["--set", "teacher_nfe=3"]
    process = script(results, "", "-m", "s4s_core.experiment", *arguments, *settings)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Fréchet distance (the plane itself; 5 samples, seeds 0-4)" in output


def test_lists_name_what_the_command_takes(capsys):
    for what, words in {
        "datasets": ["mixture", "ffhq"],
        "solvers": ["ipndm", "dpm_solver_v3"],
        "grids": ["logsnr", "ld3"],
        "learners": ["alternating"],
        "settings": ["lr_phi", "0.01", "rate of the coefficients"],
    }.items():
        main(["list", what])
        shown = capsys.readouterr().out
        assert all(word in shown for word in words), what
