"""From a pipeline to a folder of the Hub and back: `s4s learn`, the model card, push and load.

The pipelines are tiny and random, so that they fail the self-test, which is left out here.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from test_pipelines import dit, stable_diffusion
from test_pipelines import text as text  # a fixture

import s4s_core as s4s
from s4s_core import CallCounter, CompiledSolver, SolverFamily
from s4s_core.__main__ import main
from s4s_core.deploy import learn_pipeline
from s4s_core.deploy.hub import model_card
from s4s_core.deploy.learn_pipeline import prepare
from s4s_core.experiments.cost import evaluations_a_pass

SMALL = {"n_train_alt": 8, "n_valid_alt": 4, "teacher_nfe": 3, "fid_samples": 10, "epochs": 1}
PROMPTS = ["a digit", "a cat", "a dog"]
GUIDANCE = 7.5


@pytest.fixture(scope="module")
def saved(text, tmp_path_factory):
    """A Stable Diffusion pipeline in a folder, beside it prompts in a file."""
    folder = tmp_path_factory.mktemp("saved")
    stable_diffusion(text).to(dtype=torch.float32).save_pretrained(folder / "tiny-sd")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return folder


def command(saved, out, *more, pipeline="tiny-sd"):
    """Arguments of `s4s learn` that take a second for each number of calls."""
    small = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    return [
        "learn", "--no-check", "--pipeline", str(saved / pipeline), "--out", str(out),
        "--prompts", str(saved / "prompts.txt"), "--guidance", str(GUIDANCE), *small, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def learned(saved, tmp_path_factory):
    """The folder that the command writes, for 2 and 3 calls."""
    out = tmp_path_factory.mktemp("learned") / "my-solver"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S4S_RESULTS", str(out.parent / "results"))
        main(command(saved, out, "--nfe", "2", "3"))
    return out


@pytest.fixture
def setup(saved):
    pipe = diffusers.DiffusionPipeline.from_pretrained(saved / "tiny-sd")
    return s4s.from_diffusers(pipe, prompt="a cat", guidance=GUIDANCE, check=False)


@pytest.mark.slow
def test_the_folder_works_where_this_package_is_not(learned, saved, setup, tmp_path):
    noise = torch.randn(1, *setup.shape, generator=torch.Generator().manual_seed(0))
    torch.save(noise, tmp_path / "noise.pt")
    (code,) = re.findall(r"```py\n(import sys.*?)```", (learned / "README.md").read_text(), re.S)
    code = code.replace('snapshot_download("user/my-solver")', repr(str(learned)))
    code = code.replace(
        'from_pretrained("tiny-sd")', f"from_pretrained({str(saved / 'tiny-sd')!r})"
    )
    latents = "latents=torch.load('noise.pt'), output_type='latent', num_inference_steps"
    code = "import torch\n" + code.replace("num_inference_steps", latents)
    code += "torch.save(image, 'x.pt')\nassert 's4s_core' not in sys.modules\n"
    code += "assert pipe.scheduler.config.beta_schedule == 'scaled_linear'\n"  # to go back from
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    family = SolverFamily.from_pretrained(learned)
    sigma = setup.schedule.sigma(setup.schedule.T)
    expected = family[3].sample(setup.denoiser, sigma * noise.double())[0]
    torch.testing.assert_close(torch.load(tmp_path / "x.pt").double(), expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_folder_says_what_the_solvers_are(learned):
    assert {path.name for path in learned.iterdir()} == {
        "solver_2.json", "solver_3.json", "compiled_2.json", "compiled_3.json",
        "scheduler_config.json", "s4s_scheduler.py", "README.md",
    }  # fmt: skip
    card = huggingface_hub.ModelCard.load(learned / "README.md")
    assert card.data.license == "mit" and card.data.base_model is None  # a folder is no address
    family = SolverFamily.load(learned)
    for solver in family.solvers:
        held_out = solver.provenance["held_out"]
        low, high = held_out["interval"]
        row = (
            f"| {solver.nfe} | {held_out['distance']:.4f} | {held_out['published']:.4f} | {low:.4f}"
        )
        assert row in card.text and low <= high
        assert solver.provenance["cost"]["backward"] == 0
    digest = family[2].provenance["learned"]["prompts"]["sha256"]
    for fact in ("tiny-sd", "guidance: 7.5", "count 3", digest, "teacher_nfe 3", "10 noises"):
        assert fact in card.text
    assert "/" not in family[2].provenance["learned"]["pipeline"]  # no place on this machine


def test_the_card_names_a_base_model_of_the_hub(learned):
    (solver, *_) = SolverFamily.load(learned).solvers
    record = solver.provenance["learned"] | {"pipeline": "someone/some-model"}
    named = s4s.Solver(solver.coefficients, solver.grid, solver.provenance | {"learned": record})
    card = huggingface_hub.ModelCard(model_card(SolverFamily([named]), "mine"))
    assert card.data.base_model == "someone/some-model"


def test_the_loop_of_the_card_is_the_solver(learned, monkeypatch, noise):
    (loop,) = re.findall(r"```py\n(c = .*?)```", (learned / "README.md").read_text("utf-8"), re.S)
    monkeypatch.chdir(learned)
    names = {"json": json, "noise": noise(0, 4, 3).numpy()}
    names["network"] = lambda x, t: np.tanh(x + t / 1000)
    exec(loop, names)
    compiled = CompiledSolver.load("compiled_3.json")
    x = compiled.sample(names["network"], compiled.init_noise_sigma * names["noise"])
    np.testing.assert_allclose(names["x"], x, rtol=1e-14)


def test_held_out_distances_are_those_to_the_teacher(learned, saved):
    """By hand, from noises that no teacher set has: seeds below a million."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(saved / "tiny-sd")
    setup = s4s.from_diffusers(
        pipe, saved / "prompts.txt", guidance=GUIDANCE, check=False, teacher_nfe=3
    )
    seeds, solver = range(SMALL["fid_samples"]), SolverFamily.load(learned)[2]
    x_T, denoiser = s4s.initial_noise(setup, seeds), setup.denoiser_for(seeds)
    away = solver.sample(denoiser, x_T) - setup.teacher.sample(denoiser, x_T)
    expected = away.square().mean().sqrt().item()
    assert solver.provenance["held_out"]["distance"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_an_interrupted_command_goes_on_where_it_was(learned, saved, tmp_path, monkeypatch, capsys):
    out, real, calls = tmp_path / "out", learn_pipeline.learn_gauss_newton, []

    def once(*arguments, **options):
        calls.append(arguments[0].nfe)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(learn_pipeline, "learn_gauss_newton", once)
    with pytest.raises(SystemExit) as info:
        main(command(saved, out, "--nfe", "2", "3"))
    assert info.value.code.startswith("interrupted") and "\n" not in info.value.code
    first = (out / "solver_2.json").read_bytes()
    assert SolverFamily.load(out).nfes == [2]
    main(command(saved, out, "--nfe", "2", "3"))
    assert calls == [2, 3, 3] and (out / "solver_2.json").read_bytes() == first
    assert SolverFamily.load(out) == SolverFamily.load(learned)  # as without an interruption
    printed = capsys.readouterr().out
    main(command(saved, out, "--nfe", "2", "3"))
    assert calls == [2, 3, 3] and capsys.readouterr().out == f"solvers  {out}\n"
    assert printed.index("teacher, 12 pairs") < printed.index("2 calls: distance")


def test_solvers_of_something_else_are_not_mixed_in(learned, saved, capsys):
    before = (learned / "README.md").read_bytes()
    for change in (["--guidance", "2"], ["--set", "epochs=2"], ["--dtype", "bfloat16"]):
        with pytest.raises(SystemExit) as info:
            main(command(saved, learned, "--nfe", "4", *change))
        assert "choose another folder" in info.value.code and "\n" not in info.value.code
    assert (learned / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nfe", "0"], ["nfe", "from 1 to"]),
        (["--dtype", "half"], ["dtype", "float16"]),
        (["--guidance", "nan"], ["guidance", "finite"]),
        (["--prompts", "{folder}/none.txt"], ["none.txt"]),
        (["--prompts", "{folder}/empty.txt"], ["empty.txt", "captions"]),
        (["--class-labels", "1"], ["class_label"]),
        (["--pipeline", "{folder}/none"], ["cannot load", "none"]),
        (["--pipeline", "{folder}/pickled"], ["cannot load", "pickled", "safetensors"]),
        (["--out", "{folder}/empty.txt"], ["empty.txt is a file"]),
        (["--out", "{folder}/full"], ["full holds no solvers"]),
        (["--out", "/proc/none/none"], ["cannot write /proc/none/none"]),
        (["--set", "lr_phi=0.1"], ["s4s learn does not read lr_phi", "epochs"]),
        (["--set", "guidance=2.0"], ["does not read guidance"]),
        (["--set", "distance=psnr"], ["psnr", "l2"]),
        (["--set", "fid_samples=9"], ["fid_samples", "from 10 to"]),
        (["--set", "teacher_solver=dpm_solver", "--set", "teacher_nfe=4", "--nfe", "3"],
         ["multiple of 2", "3"]),
    ],
)  # fmt: skip
def test_slips_are_told_in_one_line_before_anything_is_learned(
    saved, tmp_path, arguments, words, monkeypatch
):
    monkeypatch.setattr(learn_pipeline, "learn_gauss_newton", None)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    if "pickled" in arguments[-1]:
        shutil.copytree(saved / "tiny-sd", tmp_path / "pickled")
        weights = tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save({}, weights.with_suffix(".bin"))
        weights.unlink()
    given = [a.format(folder=tmp_path) for a in arguments]
    with pytest.raises(SystemExit) as info:
        main(command(saved, tmp_path / "out", *given))
    message = info.value.code
    assert message.startswith("error: ") and "\n" not in message
    for word in words:
        assert word in message


def test_classes_and_half_precision(tmp_path):
    dit().save_pretrained(tmp_path / "dit")
    job = prepare(
        tmp_path / "dit", tmp_path / "out", [2], class_labels=[3, 5], guidance=2.0,
        dtype="bfloat16", settings=SMALL, check=False,
    )  # fmt: skip
    assert job.pipeline.transformer.dtype == torch.bfloat16 and job.setup.params.precision
    assert job.setup.condition(range(4)).tolist() == [0, 1, 0, 1]
    assert job.record["class_labels"] == [3, 5] and job.record["dtype"] == "bfloat16"


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_the_estimate_is_what_a_pass_costs(mixture, nfe):
    """Beside the first look at the pairs and at the network, and losses that had to be tried."""
    setup = mixture(n_train_alt=40, n_valid_alt=10, newton_batch_size=32, epochs=1)
    schedule = s4s.VPLinear()
    exact = s4s.GaussianMixture([1.0, 2.0], [[1.0, 0.0], [-0.5, 0.8]], [0.3, 0.5], schedule)
    counter = CallCounter(exact)
    setup = setup.variant(denoiser=exact, schedule=schedule)
    teacher = s4s.make_teacher_set(setup, 40, 10)
    start = learn_pipeline._start(setup, nfe)
    scheme = learn_pipeline._scheme(nfe)
    setup = setup.variant(denoiser=counter)
    (_, *epochs) = s4s.learn_gauss_newton(
        start, setup, teacher, scheme=scheme, jacobian="differences"
    )
    assert len(epochs) == 2  # five steps of eight pairs
    before, tried = 2 * 10 * nfe + 3 * 3 * 8, 3 * 40 * nfe
    expected = evaluations_a_pass(nfe, setup.params)
    assert expected <= counter.evaluations <= expected + before + tried


class FakeHub:
    """Repositories as folders, in the place of those two functions of the Hub that are used."""

    def __init__(self, root: Path):
        self.root = root

    def create_repo(self, repo_id, private, exist_ok):
        if not repo_id.startswith("me/"):
            raise huggingface_hub.errors.HFValidationError("403 Forbidden:\nnot yours")
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"hub/{repo_id}"

    def upload_folder(self, repo_id, folder_path):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo_id, revision, allow_patterns):
        if not (self.root / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such\nrepository")
        copy = self.root / "cache" / (revision or "main")
        for path in (self.root / repo_id).glob(allow_patterns):
            copy.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        return str(copy)


def test_what_is_pushed_is_what_is_loaded(learned, tmp_path, monkeypatch, one_sentence):
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert s4s.push_to_hub(learned, "me/mine") == "hub/me/mine"
    family = SolverFamily.from_pretrained("me/mine", revision="v1")
    assert family == SolverFamily.load(learned)
    assert family[2].provenance == SolverFamily.load(learned)[2].provenance
    assert {p.suffix for p in (tmp_path / "cache" / "v1").iterdir()} == {".json"}  # no code
    with one_sentence("you/yours", "403 Forbidden"):
        s4s.push_to_hub(learned, "you/yours")
    with one_sentence("me/none", "no such"):
        SolverFamily.from_pretrained("me/none")
    with one_sentence("holds no solvers"):
        s4s.push_to_hub(tmp_path, "me/mine")


def test_solvers_made_by_hand_have_a_folder_too(setup, tmp_path, one_sentence, text):
    grid = s4s.time_logsnr(setup.schedule, 4)
    family = SolverFamily([s4s.Solver(s4s.ipndm(grid), grid)])
    scheduler = s4s.make_scheduler(family)
    s4s.save_pretrained(family, scheduler, tmp_path / "mine")
    assert SolverFamily.load(tmp_path / "mine") == family
    other = SolverFamily([s4s.Solver(s4s.ddim(grid), grid, {"held_out": {"distance": "x"}})])
    with one_sentence("held_out"):
        s4s.save_pretrained(other, scheduler, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with one_sentence("must hold these solvers", "DDIMScheduler"):
        s4s.save_pretrained(family, stable_diffusion(text).scheduler, tmp_path / "other")


def test_a_file_of_prompts_is_a_list_of_them(text, saved, one_sentence):
    pipe = stable_diffusion(text)
    setups = [s4s.from_diffusers(pipe, p, check=False) for p in (saved / "prompts.txt", PROMPTS)]
    x_T = s4s.initial_noise(setups[0], range(4))
    t = torch.tensor(0.5, dtype=torch.float64)
    a, b = (setup.denoiser_for(range(4))(x_T, t) for setup in setups)
    assert torch.equal(a, b)
    with one_sentence("none.txt"):
        s4s.from_diffusers(pipe, saved / "none.txt", check=False)
