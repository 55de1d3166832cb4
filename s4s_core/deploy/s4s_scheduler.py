"""A learned few-step solver as a diffusers scheduler.

This file needs torch and diffusers alone. A copy of it beside scheduler_config.json, which holds
the numbers, is all that a shared pipeline needs (`trust_remote_code=True`).
"""

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput


class S4SScheduler(SchedulerMixin, ConfigMixin):
    """Takes the steps of a solver, or of one for each of several numbers of network calls.

    solvers  a dict for each number N of calls: `timesteps` and `scale`, N numbers, what the network
             is told and what its input is multiplied by; `levels`, N + 1 pairs alpha, sigma; and
             `rows`. Where sampling begins with step `first`, above 0 in img2img, step first + i
             gives the sum of what rows[first][i] weighs: the first sample, the network's i + 1
             answers, and i changes of the samples between steps, as inpainting makes them
    prediction_type, num_train_timesteps  of the network, for which these rows were made
    """

    order = 1
    # Their settings may stand in our config, so that any of them can take our place again.
    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler"]

    @register_to_config
    def __init__(
        self, solvers: list[dict], prediction_type: str, num_train_timesteps: int = 1000
    ) -> None:
        self._solvers = {len(solver["timesteps"]): solver for solver in solvers}
        self.init_noise_sigma = solvers[0]["levels"][0][1]
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._start: torch.Tensor
        self._given: torch.Tensor
        self._asked: tuple[torch.Tensor, torch.Tensor] | None
        self._answers: list[torch.Tensor]
        self._changes: list[torch.Tensor]
        self.set_timesteps(max(self._solvers))

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    @property
    def step_index(self) -> int | None:
        """The step that comes next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step that sampling begins with; None where the first timestep tells it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin with this step, as img2img does."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the solver for this number of network calls, and begin anew.

        `sigmas` may be the even ones that some pipelines give in place of a number; these and the
        shift `mu` are for schedulers that have no times of their own.
        """
        n = num_inference_steps if sigmas is None else len(sigmas)
        if n not in self._solvers:
            raise ValueError(
                f"this scheduler holds solvers for {', '.join(map(str, self._solvers))} network "
                f"calls, not {n}: pass num_inference_steps={max(self._solvers)}"
            )
        if sigmas is not None and any(abs(s - 1 + i / n) > 1e-5 for i, s in enumerate(sigmas)):
            raise ValueError("this scheduler has learned times of its own: leave sigmas out")
        self.num_inference_steps, self._solver = n, self._solvers[n]
        self.timesteps = torch.tensor(self._solver["timesteps"], dtype=torch.float32, device=device)
        flow = self.config["prediction_type"] == "flow_prediction"
        self.sigmas = torch.tensor([s if flow else s / a for a, s in self._solver["levels"]])
        self._step_index = self._begin_index = self._asked = None
        self._answers, self._changes = [], []

    def index_for_timestep(self, timestep: torch.Tensor | float) -> int:
        """Return the step at this timestep; ValueError if there is none."""
        if isinstance(timestep, torch.Tensor):
            start = self.timesteps.untyped_storage().data_ptr()
            if timestep.untyped_storage().data_ptr() == start:  # a view: no wait for the device
                return int(timestep.storage_offset())
        times, wanted = self._solver["timesteps"], float(timestep)
        i = min(range(len(times)), key=lambda i: abs(times[i] - wanted))
        if abs(times[i] - wanted) > 0.5:
            raise ValueError(f"{wanted:g} is none of this scheduler's timesteps {times}")
        return i

    def _next(self, timestep: torch.Tensor | float) -> int:
        """The step that comes next, which before the first the timestep may have to tell."""
        if self._step_index is None:
            begin = self._begin_index
            return self.index_for_timestep(timestep) if begin is None else begin
        if self._step_index == self.num_inference_steps:
            raise ValueError(
                f"all {self.num_inference_steps} steps are made: call set_timesteps to begin anew"
            )
        return self._step_index

    def scale_model_input(
        self, sample: torch.Tensor, timestep: torch.Tensor | float
    ) -> torch.Tensor:
        """Return what the network is to see of the sample before the next step."""
        scale = self._solver["scale"][self._next(timestep)]
        self._asked = sample, sample if scale == 1 else scale * sample
        return self._asked[1]

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return alpha x_0 + sigma noise at the step that comes next, or else at (B,) timesteps."""
        levels = self._solver["levels"]
        if self._begin_index is None:
            pairs = [levels[self.index_for_timestep(t)] for t in timesteps]
            alpha, sigma = original_samples.new_tensor(pairs).T.reshape(
                2, -1, *[1] * (original_samples.ndim - 1)
            )
        else:
            next_step = self._begin_index if self._step_index is None else self._step_index
            alpha, sigma = levels[next_step]
        return alpha * original_samples + sigma * noise

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Return what `add_noise` does: its name in pipelines of flow matching."""
        return self.add_noise(sample, noise, timestep.reshape(-1))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Return the sample after the next step. Deterministic: `generator` is not read."""
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the network answered {tuple(model_output.shape)} for samples "
                f"{tuple(sample.shape)}: it must answer with their shape (a learned variance split "
                "off)"
            )
        i, asked = self._next(timestep), self._asked
        if asked is None and self._solver["scale"][i] != 1:
            raise ValueError(
                "this solver scales the network's input, and this pipeline hands it on as it is "
                "(it does not call scale_model_input): learn a solver without a free first call"
            )
        if asked is not None and sample is asked[1]:
            sample = asked[0]  # DiTPipeline hands on what the network saw
        wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if self._step_index is None:
            self._first, self._start = i, wide
        else:
            self._changes.append(wide - self._given)
        self._answers.append(model_output.to(wide))
        weights = self._solver["rows"][self._first][i - self._first]
        terms = zip(weights, [self._start, *self._answers, *self._changes], strict=True)
        x = sum(weight * term for weight, term in terms if weight).to(sample.dtype)
        self._given = x.clone()  # the pipeline may write into x
        self._step_index, self._asked = i + 1, None
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
