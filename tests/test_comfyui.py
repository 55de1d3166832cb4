"""The ComfyUI node, against a stand-in for the part of ComfyUI that it meets.

The stand-in states the contract anew: how KSAMPLER starts, calls a sampler and ends, how the two
kinds of models see x, and what the third version of the node schema asks for.
"""

import asyncio
import importlib.util
import inspect
import json
import math
import os
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import s4s_core as s4s

FOLDER = Path(__file__).parents[1] / "integrations" / "comfyui"
SD = s4s.VPDiscrete()
WHOLE = torch.arange(1, 1001, dtype=torch.float64) / 1000


def net(x, t):
    return torch.tanh(x * (1 + t.to(x).view(-1, 1, 1, 1)) + 0.3)


class EPS:
    """Sees x / alpha at s; its network's time is rounded to a whole level."""

    def __init__(self, schedule=SD, times=WHOLE):
        self.times, self.sigmas = times, schedule.s(times)
        self.sigma_max = self.sigmas[-1]

    def noise_scaling(self, sigma, noise, latent, max_denoise):
        return noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma) + latent

    def inverse_noise_scaling(self, sigma, samples):
        return samples

    def timestep(self, sigma):
        return (self.sigmas.log()[:, None] - sigma.log()).abs().argmin(0)

    def sigma(self, timestep):
        return self.sigmas[timestep]

    def denoise(self, x, sigma):
        s = sigma.view(-1, 1, 1, 1)
        return x - s * net(x / (s**2 + 1).sqrt(), self.times[self.timestep(sigma)])


class CONST:
    """Sees x itself at sigma, which is its network's time."""

    sigma_max = torch.tensor(1.0)

    def noise_scaling(self, sigma, noise, latent, max_denoise):
        return sigma * noise + (1 - sigma) * latent

    def inverse_noise_scaling(self, sigma, samples):
        return samples / (1 - sigma)

    def denoise(self, x, sigma):
        return x - sigma.view(-1, 1, 1, 1) * net(x, sigma)


class KSAMPLER:
    def __init__(self, sampler_function, extra_options={}, inpaint_options={}):  # noqa: B006
        self.sampler_function, self.extra_options = sampler_function, extra_options

    def max_denoise(self, model_wrap, sigmas):
        sigma_max = model_wrap.inner_model.model_sampling.sigma_max
        return math.isclose(sigma_max, sigmas[0], rel_tol=1e-5)

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image):
        sampling = model_wrap.inner_model.model_sampling
        x = sampling.noise_scaling(
            sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas)
        )
        samples = self.sampler_function(
            lambda x, sigma, seed: sampling.denoise(x, sigma),
            x,
            sigmas,
            extra_args=extra_args,
            callback=lambda d: callback(d["i"], d["denoised"], d["x"], len(sigmas) - 1),
            disable=True,
            **self.extra_options,
        )
        return sampling.inverse_noise_scaling(sigmas[-1], samples)


def sockets(kind):
    """io.Model and its like: Input has an id, Output has none."""

    def put(name, **options):
        return SimpleNamespace(id=name, type=kind, **options)

    return SimpleNamespace(Input=put, Output=lambda: SimpleNamespace(type=kind))


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    """The node's module, imported as ComfyUI does, with an empty folder models/s4s."""

    def module(name, **contents):
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    places = {}
    module("comfy", samplers=module("comfy.samplers", KSAMPLER=KSAMPLER))
    sys.modules["comfy"].model_sampling = module("comfy.model_sampling", CONST=CONST)
    module(
        "folder_paths",
        models_dir=str(tmp_path),
        add_model_folder_path=lambda name, path: places.update({name: Path(path)}),
        get_filename_list=lambda name: sorted(p.name for p in places[name].glob("*")),
        get_full_path_or_raise=lambda name, file: str(places[name] / file),
    )
    io = SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}),
        Schema=SimpleNamespace,
        NodeOutput=lambda *values: values,
        **{n: sockets(n.upper()) for n in ("Model", "Combo", "Int", "Sampler", "Sigmas")},
    )
    extension = type("ComfyExtension", (), {})
    module("comfy_api", latest=module("comfy_api.latest", io=io, ComfyExtension=extension))
    spec = importlib.util.spec_from_file_location("s4s_nodes", FOLDER / "__init__.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    (tmp_path / "s4s").mkdir()
    loaded.models = tmp_path / "s4s"
    return loaded


@pytest.fixture
def node(comfy):
    (found,) = asyncio.run(asyncio.run(comfy.comfy_entrypoint()).get_node_list())
    return found


def solver_on(schedule, nfe=4, snap=True):
    grid = s4s.time_logsnr(schedule, nfe)
    moved = schedule.t_of_lam(schedule.lam(grid.t) + 0.05)
    grid = s4s.TimeGrid(schedule, grid.t, torch.cat([grid.t[:1], moved[1:-1], grid.t[-1:]]))
    solver = s4s.Solver(s4s.unipc(grid, 3), grid)
    return s4s.snap_to_levels(solver) if schedule == SD and snap else solver


def guider(model_sampling, **options):
    """What a sampler is handed as model_wrap: the guider, with the model inside."""
    config = SimpleNamespace(unet_config=options.pop("unet_config", {}))
    inner = SimpleNamespace(model_sampling=model_sampling, model_config=config)
    return SimpleNamespace(inner_model=inner, **options)


def model_of(model_sampling):
    return SimpleNamespace(get_model_object=lambda name: {"model_sampling": model_sampling}[name])


@pytest.mark.parametrize(
    ("model_sampling", "denoiser"),
    [
        (EPS(), s4s.from_noise_prediction(net, SD)),
        (CONST(), s4s.from_flow(net, s4s.RectifiedFlow())),
    ],
    ids=["eps", "flow"],
)
def test_a_picture_is_the_solvers_own(comfy, node, model_sampling, denoiser, noise):
    schedule, z, seen = denoiser.schedule, noise(0, 2, 4, 3, 3), []
    solver = solver_on(schedule)
    solver.save(comfy.models / "mine.json")
    sampler, sigmas = node.execute(model_of(model_sampling), "mine.json", 4)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (solver.nfe + 1,)
    samples = sampler.sample(
        guider(model_sampling),
        sigmas.double(),  # their rounding is all that differs
        {"seed": 0},
        lambda *found: seen.append(found),
        z,
        torch.zeros_like(z),
    )
    alpha = schedule.alpha(solver.grid.t[-1])
    expected = solver.sample(denoiser, schedule.sigma(schedule.T) * z) / alpha
    torch.testing.assert_close(samples, expected, rtol=1e-6, atol=1e-6)
    assert [(i, total) for i, _, _, total in seen] == [(i, solver.nfe) for i in range(solver.nfe)]


@pytest.mark.parametrize(
    ("schedule", "model_sampling", "words"),
    [
        (SD, CONST(), ["a model of eps or v, but this is a flow model"]),
        (s4s.RectifiedFlow(), EPS(), ["a flow model, but this is a model of eps or v"]),
        (SD, EPS(s4s.VPDiscrete.ldm()), ["14.61", "model at 83.8"]),
        (SD, EPS(s4s.EDM(), 4518 * WHOLE), ["14.61", "model at 164"]),  # zero terminal SNR
        (SD, EPS(s4s.EDM(), 80 * WHOLE), ["14.61", "model at 80"]),
    ],
)
def test_a_file_for_another_model_is_refused(
    comfy, node, schedule, model_sampling, words, one_sentence
):
    solver_on(schedule).save(comfy.models / "mine.json")
    with one_sentence(*words, "choose a solver file"):
        node.execute(model_of(model_sampling), "mine.json", 4)


def test_calls_that_the_model_would_round_are_warned_of(comfy, node):
    solver_on(SD, snap=False).save(comfy.models / "mine.json")
    with pytest.warns(UserWarning, match="snap_to_levels"):
        node.execute(model_of(EPS()), "mine.json", 4)


def test_levels_of_another_node_are_refused(comfy, node, noise, one_sentence):
    solver_on(SD).save(comfy.models / "mine.json")
    sampler, sigmas = node.execute(model_of(EPS()), "mine.json", 4)
    wrap, z = guider(EPS()), noise(0, 1, 4, 3, 3)
    with one_sentence("own 5 noise levels"):
        sampler.sample(wrap, sigmas * 0.9, {"seed": 0}, print, z, torch.zeros_like(z))


def test_steps_choose_a_solver_of_a_family(comfy, node, one_sentence):
    family = s4s.SolverFamily([solver_on(SD, 4), solver_on(SD, 6)])
    family.save(comfy.models / "family.json")
    for steps in (4, 6):
        sampler, sigmas = node.execute(model_of(EPS()), "family.json", steps)
        assert sampler.extra_options["solver"] == family[steps] and len(sigmas) == steps + 1
    with one_sentence("5 network calls", "4, 6"):
        node.execute(model_of(EPS()), "family.json", 5)


@pytest.mark.parametrize(
    ("learned", "options", "warned"),
    [
        (7.5, {"cfg": 7.5}, False),
        (7.5, {"cfg": 1.0}, True),
        (None, {"cfg": 1.0}, False),
        (7.5, {}, False),
        (3.5, {"cfg": 1.0, "unet_config": {"guidance_embed": True}}, False),
        (3.5, {"cfg": 1.0, "unet_config": {"guidance_embed": False}}, True),
    ],
)
def test_another_guidance_is_warned_of(comfy, node, noise, recwarn, learned, options, warned):
    solver = solver_on(SD)
    if learned is not None:
        solver = solver.learned_for({"name": "a", "guidance": learned, "weights": {}})
    solver.save(comfy.models / "mine.json")
    sampler, sigmas = node.execute(model_of(EPS()), "mine.json", 4)
    z = noise(0, 1, 4, 3, 3)
    sampler.sample(guider(EPS(), **options), sigmas, {"seed": 0}, print, z, 0 * z)
    found = [str(w.message) for w in recwarn]
    assert found == [w for w in found if f"guidance {learned:g}" in w and "cfg 1" in w]
    assert len(found) == warned


def test_a_broken_file_is_told_by_name(comfy, node, one_sentence):
    (comfy.models / "broken.json").write_text("{")
    with one_sentence("broken.json"):
        node.execute(model_of(EPS()), "broken.json", 4)


def test_a_file_that_was_learned_again_is_read_again(comfy, node):
    solver_on(SD).save(comfy.models / "mine.json")
    before = node.fingerprint_inputs(model=None, solver="mine.json")
    assert before == node.fingerprint_inputs(model=None, solver="mine.json")
    os.utime(comfy.models / "mine.json", ns=(1, 1))
    assert before != node.fingerprint_inputs(model=None, solver="mine.json")


def test_the_schema_names_what_execute_takes(comfy, node):
    solver_on(SD).save(comfy.models / "mine.json")
    schema = node.define_schema()
    inputs = [socket.id for socket in schema.inputs]
    assert inputs == list(inspect.signature(node.execute).parameters)
    assert [socket.type for socket in schema.outputs] == ["SAMPLER", "SIGMAS"]
    assert schema.inputs[1].options == ["mine.json"]


def test_the_example_workflow_is_wired(node, comfy):
    schema = node.define_schema()
    (path,) = (FOLDER / "example_workflows").glob("*.json")
    flow = json.loads(path.read_text("utf-8"))
    nodes = {node["id"]: node for node in flow["nodes"]}
    for link, begin, out, end, into, kind in flow["links"]:
        source, target = nodes[begin]["outputs"][out], nodes[end]["inputs"][into]
        assert source["type"] == target["type"] == kind
        assert link in source["links"] and link == target["link"]
    assert all(i["link"] for node in nodes.values() for i in node["inputs"])
    (ours,) = (node for node in nodes.values() if node["type"] == schema.node_id)
    assert [s["type"] for s in ours["outputs"]] == [s.type for s in schema.outputs]
    assert [s["name"] for s in ours["inputs"]] == [schema.inputs[0].id]
    assert len(ours["widgets_values"]) == len(schema.inputs) - 1


def test_the_registry_finds_what_it_asks_for():
    own, root = (
        tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
        for folder in (FOLDER, FOLDER.parents[1])
    )
    assert {"PublisherId", "DisplayName"} <= set(own["tool"]["comfy"])
    assert own["project"]["version"] == root["project"]["version"]
    assert own["project"]["requires-python"] == root["project"]["requires-python"]
    assert own["project"]["dependencies"] == [root["project"]["name"]]
