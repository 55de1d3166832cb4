"""Solvers inside diffusers pipelines: the samples are those of our own loop, call for call.

The networks are tiny and random. What is expected comes from `Solver.sample` on `from_diffusers`,
before and after a solver took the scheduler's place.
"""

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import diffusers
import pytest
import torch
from test_pipelines import (
    SD,
    dit,
    flux,
    ldm,
    quiet,
    scheduler,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    unet,
    wan,
)
from test_pipelines import text as text  # a fixture

import s4s_core as s4s
from s4s_core import RectifiedFlow, Solver, SolverFamily, TimeGrid, VPDiscrete, VPTable
from s4s_core.deploy.part import part_of

NFE = 4
PROMPT = {"prompt": "a digit"}


def solver_on(schedule, nfe=NFE, table=s4s.unipc, model=None):
    """A solver with a corrector, decoupled times, and numbers that no published one has."""
    t = s4s.time_logsnr(schedule, nfe).t
    grid = TimeGrid(schedule, t, torch.cat([t[:1], t[1:-1] * 1.01, t[-1:]]))
    table = table(grid)
    if isinstance(table, s4s.Coefficients):
        generator = torch.Generator().manual_seed(nfe)
        b = table.b * (1 + 0.05 * torch.randn(table.b.shape, generator=generator))
        table = replace(table, b=b)
    return Solver(table, grid, {"model": model} if model else {})


def free_first_call(schedule):
    start = s4s.LearnedGrid.start_at(s4s.time_logsnr(schedule, NFE))
    grid = replace(start, first=torch.tensor(0.0, dtype=torch.float64)).grid()
    return Solver(s4s.dpm_solver_pp(grid), grid)


def scaling(schedule):
    """A solver whose calls see other sizes of the sample, as learned ones do on flows alone."""
    solver = solver_on(schedule)
    scale = torch.tensor([1.3, 1.0, 0.8, 1.1], dtype=torch.float64)
    return Solver(solver.coefficients, replace(solver.grid, scale=scale))


def counted(pipeline):
    """The times of the network's calls, as they come."""
    network, calls = getattr(pipeline, "unet", None) or pipeline.transformer, []
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def run(pipeline, latents, nfe=NFE, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipeline(num_inference_steps=nfe, latents=latents, output_type="latent", **options)[
            0
        ]


def same(found, expected, tolerance=1e-5):
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, error
    assert expected.std() > 0.05


def installed(pipeline, solver, guidance=None):
    s4s.install(pipeline, solver, guidance)
    return pipeline


# How a pipeline is made, the guidance, the shape of a sample, and what the call needs beside them.
KNOWN = {
    "epsilon": (stable_diffusion, 7.5, (4, 4, 4), {}),
    "v_prediction": (
        lambda text: stable_diffusion(text, prediction_type="v_prediction"), 7.5, (4, 4, 4), {},
    ),
    "sample": (
        lambda text: stable_diffusion(text, prediction_type="sample"), 1.0, (4, 4, 4), {},
    ),
    "SD3": (lambda text: stable_diffusion_3(text, shift=3.0), 4.0, (4, 4, 4), {}),
    "SDXL": (stable_diffusion_xl, 5.0, (4, 4, 8), {}),
    "FLUX distilled": (flux, 3.5, (4, 4, 8), {}),
    "FLUX": (
        lambda text: flux(text, guidance_embeds=False), 3.5, (4, 4, 8),
        {"negative_prompt": ["", ""], "true_cfg_scale": 3.5},
    ),
    "Wan": (wan, 3.0, (4, 2, 4, 4), {"num_frames": 5}),
}  # fmt: skip
FLOWS = {"SD3", "FLUX distilled", "FLUX", "Wan"}
TABLES = {
    "corrector": lambda schedule: solver_on(schedule),
    "noise form": lambda schedule: solver_on(schedule, NFE, s4s.ipndm),
    "states": lambda schedule: solver_on(
        schedule, NFE, lambda grid: s4s.dpm_solver_pp(grid).pad(NFE, NFE)
    ),
    "2S": lambda schedule: solver_on(schedule, NFE // 2, lambda grid: s4s.dpm_solver(grid, 2)),
    "free first call": lambda schedule: free_first_call(schedule),
    "scales": lambda schedule: scaling(schedule),
}
# Pipelines of flows hand their samples to the network as they are, and nothing can scale them.
SCALED = ("free first call", "scales")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "table"),
    [(name, table) for name in ("epsilon", "v_prediction", "sample") for table in TABLES]
    + [("SD3", table) for table in TABLES if table not in SCALED]
    + [(name, "corrector") for name in ("SDXL", "FLUX distilled", "FLUX", "Wan")]
    + [("SDXL", "scales")],
)
def test_pipelines_draw_what_the_solver_draws(text, noise, name, table):
    make, guidance, shape, options = KNOWN[name]
    pipeline = make(text).to(torch.float32)
    setup = s4s.from_diffusers(pipeline, check=False, guidance=guidance, shape=shape, **PROMPT)
    solver = TABLES[table](setup.schedule)
    installed(pipeline, solver)
    again = s4s.from_diffusers(pipeline, check=False, guidance=guidance, shape=shape, **PROMPT)
    calls, z = counted(pipeline), noise(0, 2, *shape)
    factor = 8 if name == "Wan" else 2
    height, width = (factor * n for n in shape[-2:])
    found = run(
        pipeline, packed(name, z.float()), prompt=["a digit"] * 2, guidance_scale=guidance,
        height=height, width=width, **options,
    )  # fmt: skip
    # True guidance costs FLUX and Wan a call of its own.
    assert len(calls) == NFE * (1 + (name in ("FLUX", "Wan"))) and solver.nfe == NFE
    # Pipelines of flows do not scale their noise.
    sigma = 1.0 if name in FLOWS else setup.schedule.sigma(setup.schedule.T)
    for same_model in (setup, again):
        same(found, packed(name, solver.sample(same_model.denoiser, sigma * z)))


def packed(name, z):
    if not name.startswith("FLUX"):
        return z
    return diffusers.FluxPipeline._pack_latents(z, *z.shape)


@pytest.mark.parametrize("table", ["corrector", "scales"])
@pytest.mark.parametrize("make", [dit, ldm])
def test_pipelines_of_classes_and_of_none_draw_what_the_solver_draws(make, table):
    pipeline = make().to(torch.float32)
    labels, condition = ([[207, 207], 4.0], {"class_label": 207, "guidance": 4.0})
    if make is ldm:
        labels, condition = [2], {}
    setup = s4s.from_diffusers(pipeline, check=False, **condition)
    solver = TABLES[table](setup.schedule)
    installed(pipeline, solver)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, *setup.shape, generator=generator)
    generator.manual_seed(3)
    found = pipeline(*labels, generator, num_inference_steps=NFE, output_type="np").images
    x_T = setup.schedule.sigma(setup.schedule.T) * z.double()
    expected = setup.decode(solver.sample(setup.denoiser, x_T))
    same(torch.tensor(found), (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", ["epsilon", "SD3"])
def test_half_precision_stays_near(text, noise, name, dtype, tolerance):
    make, *_ = KNOWN[name]
    z, found = noise(0, 2, 4, 4, 4), {}
    for precision in (torch.float64, dtype):
        pipeline = make(text).to(precision)
        schedule = VPDiscrete() if name == "epsilon" else RectifiedFlow(shift=3.0)
        installed(pipeline, TABLES["2S"](schedule))
        options = {"prompt": ["a digit"] * 2, "guidance_scale": 1.5}
        found[precision] = run(pipeline, z.to(precision), **options)
        assert found[precision].dtype == precision
    same(found[dtype], found[torch.float64], tolerance)


def test_runs_do_not_remember_each_other(text, noise):
    pipeline = stable_diffusion(text)
    installed(pipeline, SolverFamily(solver_on(VPDiscrete(), nfe) for nfe in (4, 5)))
    z = noise(0, 3, 4, 4, 4)
    first = run(pipeline, z[:1], **PROMPT)
    run(pipeline, z, 5, prompt=["a digit"] * 3)
    assert torch.equal(run(pipeline, z[:1], **PROMPT), first)
    same(run(pipeline, z, prompt=["a digit"] * 3)[:1], first, 1e-12)


def test_a_sample_that_is_changed_between_steps_goes_on_from_there(text, noise):
    """As `trajectory` does from a point that it is sent; also if it is written into."""
    pipeline = stable_diffusion(text)
    setup = s4s.from_diffusers(pipeline, check=False, **PROMPT)
    solver, z, change = solver_on(setup.schedule), noise(0, 1, 4, 4, 4), noise(1, 1, 4, 4, 4)
    installed(pipeline, solver)
    points = solver.trajectory(setup.denoiser, z * setup.schedule.sigma(setup.schedule.T))
    x = points.send(next(points))
    for _ in range(NFE - 1):
        x = points.send(x + change)

    def anew(pipe, i, t, names):
        return {"latents": names["latents"] + change} if i < NFE - 1 else {}

    def in_place(pipe, i, t, names):
        if i < NFE - 1:
            names["latents"] += change
        return {}

    for callback in (anew, in_place):
        found = run(pipeline, z, guidance_scale=1.0, callback_on_step_end=callback, **PROMPT)
        same(found, x, 1e-6)


def as_kind(pipeline, kind):
    return quiet(kind(**pipeline.components, requires_safety_checker=False))


@pytest.mark.parametrize("strength", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("table", ["corrector", "states", "2S", "scales"])
def test_img2img_begins_with_published_steps(text, noise, strength, table):
    pipeline = stable_diffusion(text)
    setup = s4s.from_diffusers(pipeline, check=False, **PROMPT)
    solver = TABLES[table](setup.schedule)
    pipeline = as_kind(installed(pipeline, solver), diffusers.StableDiffusionImg2ImgPipeline)
    z = noise(0, 1, 4, 4, 4)
    seen, calls = [], counted(pipeline)
    add_noise = pipeline.scheduler.add_noise
    pipeline.scheduler.add_noise = lambda *args: seen.append(args[:2]) or add_noise(*args)
    found = pipeline(
        image=z, strength=strength, num_inference_steps=NFE, guidance_scale=1.0,
        output_type="latent", generator=torch.Generator().manual_seed(0), **PROMPT,
    ).images  # fmt: skip
    ((image, eps),) = seen
    assert len(calls) == NFE * strength
    part = part_of(solver, NFE - len(calls), NFE)
    schedule = part.grid.schedule
    x = schedule.alpha(schedule.T) * image + schedule.sigma(schedule.T) * eps
    *_, expected = part.trajectory(from_other_T(setup.denoiser), x)
    same(found, expected, 1e-6)


def from_other_T(denoiser):
    """The same denoiser, which does not say at which time it was meant to begin."""
    return lambda x, t: denoiser(x, t)


@pytest.mark.parametrize("table", ["corrector", "scales"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_keeps_what_is_not_masked(text, noise, strength, table):
    pipeline = stable_diffusion(text)
    installed(pipeline, TABLES[table](VPDiscrete()))
    z = noise(0, 1, 4, 4, 4)
    everything = run(pipeline, z, **PROMPT)
    pipeline = as_kind(pipeline, diffusers.StableDiffusionInpaintPipeline)
    image, mask = torch.rand(1, 3, 8, 8, dtype=torch.float64), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1

    def inpaint(mask):
        generator = torch.Generator().manual_seed(0)
        options = {"image": image, "mask_image": mask, "strength": strength, "generator": generator}
        return run(pipeline, z, height=8, width=8, **options, **PROMPT)

    found, kept = inpaint(mask), inpaint(0 * mask)
    assert torch.equal(found[..., 2:], kept[..., 2:])
    assert not torch.allclose(found[..., :2], kept[..., :2], rtol=0.1)
    if strength == 1:
        same(inpaint(0 * mask + 1), everything, 1e-6)


def test_a_pipeline_is_saved_and_loaded(text, noise, tmp_path):
    pipeline, z = stable_diffusion(text), noise(0, 1, 4, 4, 4)
    installed(pipeline, SolverFamily(solver_on(VPDiscrete(), nfe) for nfe in (4, 5)))
    expected = run(pipeline, z, 5, **PROMPT)
    pipeline.save_pretrained(tmp_path)
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64))
    same(run(again, z, 5, **PROMPT), expected, 1e-9)
    alone = type(pipeline.scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    assert alone.config == again.scheduler.config
    other = stable_diffusion(text)
    other.scheduler = alone
    same(run(other, z, 5, **PROMPT), expected, 1e-9)


SCRIPT = """
import sys, torch, diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained(
    "pipeline", trust_remote_code=True, torch_dtype=torch.float64
)
options = {"latents": torch.load("z.pt"), "num_inference_steps": 4, "output_type": "latent"}
torch.save(pipe("a digit", **options).images, "x.pt")
assert not any(name.startswith("s4s_core") for name in sys.modules)
"""


@pytest.mark.slow
def test_a_shared_folder_samples_in_a_fresh_process_without_the_package(
    text, noise, tmp_path, monkeypatch
):
    pipeline, z = stable_diffusion(text), noise(0, 1, 4, 4, 4)
    installed(pipeline, solver_on(VPDiscrete()))
    expected = run(pipeline, z, **PROMPT)
    s4s.save_pipeline(pipeline, tmp_path / "pipeline")
    torch.save(z, tmp_path / "z.pt")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    command = [sys.executable, "-I", "-c", SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(torch.load(tmp_path / "x.pt"), expected, 1e-9)  # another process may sum in another order


def test_any_scheduler_can_take_its_place_again(text, noise):
    plain, pipeline = stable_diffusion(text), stable_diffusion(text)
    for _ in range(2):
        installed(pipeline, solver_on(VPDiscrete()))  # also over itself
    for kind in (diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler):
        one, other = (kind.from_config(p.scheduler.config) for p in (plain, pipeline))
        torch.testing.assert_close(one.alphas_cumprod, other.alphas_cumprod)
        assert one.config.prediction_type == other.config.prediction_type


def test_a_pipeline_that_scales_no_input_is_refused_where_it_matters(one_sentence):
    network = unet(sample_size=4, in_channels=3, out_channels=3).float()
    pipeline = quiet(diffusers.DDPMPipeline(network, scheduler(**SD)))
    installed(pipeline, solver_on(VPDiscrete()))
    assert pipeline(num_inference_steps=NFE, output_type="np").images.shape == (1, 4, 4, 3)
    installed(pipeline, scaling(VPDiscrete()))
    with one_sentence("does not call scale_model_input", "free first call", error=ValueError):
        pipeline(num_inference_steps=NFE)


@pytest.mark.parametrize("table", ["corrector", "scales"])
def test_no_step_waits_for_the_device(noise, monkeypatch, table):
    scheduler = s4s.make_scheduler(TABLES[table](VPDiscrete()))
    x = noise(0, 1, 4, 4, 4)
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, None)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(seen.tanh(), t, x, return_dict=False)[0]


def noise_of(scheduler, timesteps, begin=None):
    scheduler.set_timesteps(NFE)
    if begin is not None:
        scheduler.set_begin_index(begin)
    ones = torch.ones(len(timesteps), 1, dtype=torch.float64)
    return scheduler.add_noise(ones, 0 * ones, timesteps), scheduler.add_noise(
        0 * ones, ones, timesteps
    )


def test_noise_is_added_at_the_levels_of_the_steps_not_of_the_calls():
    solver = solver_on(VPDiscrete())
    scheduler, grid = s4s.make_scheduler(solver), solver.grid
    alpha, sigma = (f(grid.t)[1:3, None] for f in (VPDiscrete().alpha, VPDiscrete().sigma))
    found = noise_of(scheduler, scheduler.timesteps[1:3])
    torch.testing.assert_close(found, (alpha, sigma))
    torch.testing.assert_close(
        noise_of(scheduler, scheduler.timesteps[:1], 2), (alpha[1:], sigma[1:])
    )
    torch.testing.assert_close(scheduler.sigmas.double(), grid.s, rtol=1e-6, atol=1e-6)


def provenance(guidance):
    return {"name": "StableDiffusionPipeline", "guidance": guidance, "weights": {}}


def looking_up(text):
    pipeline = stable_diffusion(text)
    pipeline.unet.register_to_config(time_embedding_type="learned")
    return pipeline


def with_scheduler(text, scheduler):
    pipeline = stable_diffusion(text)
    pipeline.scheduler = scheduler
    return pipeline


LEVELS = tuple(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64).tolist())
MISFITS = {
    "schedule": (stable_diffusion, VPDiscrete.ldm(), {}, ["VPDiscrete", "alphas_cumprod"]),
    "table": (stable_diffusion, VPTable(alphas_cumprod=LEVELS), {}, ["VPTable", "alphas_cumprod"]),
    "levels": (stable_diffusion, VPDiscrete(levels=500), {}, ["1000 noise levels"]),
    "continuous": (stable_diffusion, s4s.EDM(), {}, ["EDM", "1000 discrete"]),
    "flow": (stable_diffusion, RectifiedFlow(), {}, ["RectifiedFlow", "1000 discrete"]),
    "no flow": (stable_diffusion_3, VPDiscrete(), {}, ["flow_prediction", "VPDiscrete"]),
    "zero SNR": (
        lambda text: stable_diffusion(text, rescale_betas_zero_snr=True),
        VPDiscrete(), {}, ["zero terminal SNR"],
    ),
    "prediction": (
        lambda text: stable_diffusion(text, prediction_type="score"),
        VPDiscrete(), {}, ["'score'", "v_prediction"],
    ),
    "guidance": (
        stable_diffusion, VPDiscrete(), {"guidance": 2.0}, ["guidance 7.5, not 2.0"],
    ),
    "learned times": (looking_up, VPDiscrete(), {}, ["UNet2DConditionModel", "table"]),
    "no levels": (
        lambda text: with_scheduler(text, diffusers.EDMEulerScheduler()),
        VPDiscrete(), {}, ["EDMEulerScheduler", "alphas_cumprod"],
    ),
    "no levels left": (
        lambda text: with_scheduler(text, s4s.make_scheduler(solver_on(VPDiscrete()))),
        VPDiscrete(), {}, ["S4SScheduler", "trained with"],
    ),
    "steps": (
        lambda text: stable_diffusion_3(text, num_train_timesteps=100),
        RectifiedFlow(), {}, ["num_train_timesteps 100", "1000"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_told_before_anything_is_replaced(text, one_sentence, name):
    make, schedule, options, words = MISFITS[name]
    pipeline = make(text)
    old = pipeline.scheduler
    with one_sentence(*words):
        installed(pipeline, solver_on(schedule, model=provenance(7.5)), **options)
    assert pipeline.scheduler is old


def test_a_solver_for_levels_without_signal_fits_the_pipeline_it_was_made_for(text, noise):
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    pipeline = stable_diffusion(text, **options)
    setup = s4s.from_diffusers(pipeline, check=False, **PROMPT)
    solver, z = solver_on(setup.schedule), noise(0, 1, 4, 4, 4)
    installed(pipeline, solver)
    x_T = setup.schedule.sigma(setup.schedule.T) * z
    same(run(pipeline, z, guidance_scale=1.0, **PROMPT), solver.sample(setup.denoiser, x_T))


def per_pixel():
    grid = s4s.time_logsnr(VPDiscrete(), NFE)
    return Solver(replace(s4s.ddim(grid), d=torch.zeros(NFE, 2, 4, 4, 4)), grid)


SCHEDULER_FAULTS = {
    "number of calls": (lambda s, x: s.set_timesteps(28), ["for 4 network calls, not 28", "=4"]),
    "no number": (lambda s, x: s.set_timesteps(), ["for 4", "not None"]),
    "sigmas": (lambda s, x: s.set_timesteps(sigmas=[1.0, 0.9, 0.1, 0.0]), ["leave sigmas out"]),
    "timestep": (lambda s, x: s.step(x, 500, x), ["500", "none of this"]),
    "shape": (lambda s, x: s.step(torch.cat([x, x], 1), 999, x), ["(1, 8, 4, 4)", "(1, 4, 4, 4)"]),
    "too many": (lambda s, x: [s.step(x, s.timesteps[0], x) for _ in range(5)], ["all 4 steps"]),
}


@pytest.mark.parametrize("fault", SCHEDULER_FAULTS)
def test_a_wrong_call_is_told_in_one_sentence(noise, one_sentence, fault):
    call, words = SCHEDULER_FAULTS[fault]
    with one_sentence(*words, error=ValueError):
        call(s4s.make_scheduler(solver_on(VPDiscrete())), noise(0, 1, 4, 4, 4))


def test_what_is_no_scheduler_or_pipeline_is_told_in_one_sentence(text, one_sentence, tmp_path):
    for make, words in [
        (lambda: s4s.make_scheduler(per_pixel()), ["(d", "each pixel"]),
        (
            lambda: s4s.make_scheduler(free_first_call(RectifiedFlow()), "flow_prediction"),
            ["free first call"],
        ),
        (lambda: s4s.make_scheduler(solver_on(s4s.EDM())), ["EDM", "from_diffusers"]),
        (lambda: s4s.make_scheduler(solver_on(VPDiscrete()), "eps"), ["'eps'", "epsilon"]),
        (lambda: s4s.make_scheduler(solver_on(VPDiscrete()), "flow_prediction"), ["go with"]),
        (lambda: s4s.make_scheduler(tmp_path / "none.json"), ["none.json", "no file"]),
        (lambda: s4s.install("a/model", solver_on(VPDiscrete())), ["DiffusionPipeline", "str"]),
        (lambda: s4s.save_pipeline(stable_diffusion(text), tmp_path), ["install one first"]),
    ]:
        with one_sentence(*words):
            make()


def test_files_will_do(text, tmp_path):
    solver = solver_on(VPDiscrete())
    solver.save(tmp_path / "solver.json")
    SolverFamily([solver]).save(tmp_path / "family.json")
    pipeline = stable_diffusion(text)
    configs = []
    for source in (solver, tmp_path / "solver.json", str(tmp_path / "family.json")):
        installed(pipeline, source)
        configs.append(json.loads(pipeline.scheduler.to_json_string()))
    assert configs[0] == configs[1] == configs[2]


def test_a_missing_extra_is_told_in_one_sentence(monkeypatch, one_sentence):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with one_sentence("pip install diffusers"):
        s4s.install(None, solver_on(VPDiscrete()))
