"""A ComfyUI node: a solver, or one of a family, as a SAMPLER and the SIGMAS that go with it."""

import math
import warnings
from pathlib import Path
from typing import Any

import comfy.model_sampling
import comfy.samplers
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

from s4s_core import RectifiedFlow, Solver, SolverFamily, UsageError, sample_s4s, sigmas_of
from s4s_core.deploy.install import learned_guidance
from s4s_core.models.diffusers_pipeline import LOWEST_LAM

FOLDER = "s4s"  # solver files lie in ComfyUI/models/s4s
folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


class S4SKSampler(comfy.samplers.KSAMPLER):
    """A sampler that starts at pure noise of standard deviation s, which solvers are learned for.

    At a model's highest level ComfyUI would take sqrt(1 + s^2). It hands over its guider as
    `model_wrap`, of which a solver of another guidance warns.
    """

    def max_denoise(self, model_wrap: Any, sigmas: Any) -> bool:
        return False

    def sample(self, model_wrap: Any, *args: Any, **kwargs: Any) -> Any:
        learned = learned_guidance(self.extra_options["solver"])
        cfg = getattr(model_wrap, "cfg", None)  # guiders of other kinds have none
        config = getattr(model_wrap.inner_model, "model_config", None)
        # Such a network, as FLUX.1-dev, is told the guidance by its prompt.
        distilled = getattr(config, "unet_config", {}).get("guidance_embed")
        if None not in (learned, cfg) and learned != cfg and not distilled:
            warnings.warn(
                f"the solver was learned for guidance {learned:g}, not for cfg {cfg:g}: sample "
                f"with {learned:g}, or learn one for {cfg:g}",
                stacklevel=2,
            )
        return super().sample(model_wrap, *args, **kwargs)


def check_model(solver: Solver, model_sampling: Any) -> None:
    """Raise UsageError unless the solver is for a model of this kind and highest noise level.

    Warns where the model rounds the times of the solver's calls.
    """
    flow = isinstance(solver.grid.schedule, RectifiedFlow)
    kinds = {True: "a flow model", False: "a model of eps or v"}
    if flow != isinstance(model_sampling, comfy.model_sampling.CONST):
        raise UsageError(
            f"the solver was made for {kinds[flow]}, but this is {kinds[not flow]}: choose a "
            "solver file that was learned for this model"
        )
    if flow:
        return
    first = sigmas_of(solver)[0].item()
    # What lies above is left out of a solver's schedule (from_diffusers).
    highest = min(float(model_sampling.sigma_max), math.exp(-LOWEST_LAM))
    if not math.isclose(first, highest, rel_tol=0.01):
        raise UsageError(
            f"the solver starts at noise level {first:.4g}, but this model at {highest:.4g}: "
            "choose a solver file that was learned for this model"
        )
    _, grid = solver.coefficients.as_multistep(solver.grid)
    levels = grid.schedule.s(grid.t_model[:-1]).float()
    rounded = model_sampling.sigma(model_sampling.timestep(levels))
    if not torch.allclose(rounded.to(levels), levels, rtol=1e-4):
        warnings.warn(
            "this model rounds its times to whole levels, where the solver does not call it: use "
            "s4s_core.snap_to_levels, and learn the coefficients again",
            stacklevel=2,
        )


class S4SSampler(io.ComfyNode):
    """Reads a solver file and checks that it fits the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="S4SSampler",
            display_name="S4S sampler",
            category="sampling/samplers",
            description="A learned few-step solver; wire both outputs into SamplerCustom.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("solver", options=folder_paths.get_filename_list(FOLDER)),
                io.Int.Input("steps", default=5, min=1, tooltip="network calls of a picture"),
            ],
            outputs=[io.Sampler.Output(), io.Sigmas.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, solver: str, **others: Any) -> int:
        """A file that was learned again is read again."""
        return Path(folder_paths.get_full_path_or_raise(FOLDER, solver)).stat().st_mtime_ns

    @classmethod
    def execute(cls, model: Any, solver: str, steps: int) -> io.NodeOutput:
        loaded = SolverFamily.load(folder_paths.get_full_path_or_raise(FOLDER, solver))[steps]
        check_model(loaded, model.get_model_object("model_sampling"))
        sampler = S4SKSampler(sample_s4s, {"solver": loaded})
        return io.NodeOutput(sampler, sigmas_of(loaded).float())


class S4SExtension(ComfyExtension):
    """What ComfyUI finds in this folder."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [S4SSampler]


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension; ComfyUI calls it."""
    return S4SExtension()
