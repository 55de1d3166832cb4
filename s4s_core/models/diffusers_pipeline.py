"""Turn a diffusers pipeline into a `Setup`: denoiser, schedule, shape and settings.

The network, its conditions and the noise levels are taken from the pipeline; the solver, the times
and the clipping of its own sampling loop are not.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..denoiser import (
    Denoiser,
    Network,
    from_denoiser,
    from_flow,
    from_noise_prediction,
    from_velocity,
    guided,
)
from ..errors import UsageError, choose, optional_import
from ..objective import SMALLEST_SIDE
from ..params import OF_THE_MODEL, Params
from ..schedule import NAMED_SCHEDULES, NoiseSchedule, RectifiedFlow, VPDiscrete, VPTable
from ..setup import Setup
from .check import check_denoiser

Wrap = Callable[[Network, NoiseSchedule], Denoiser]

# scheduler.config.prediction_type -> how the network's answer becomes a denoiser.
PREDICTION_TYPES: dict[str, Wrap] = {
    "epsilon": from_noise_prediction,
    "v_prediction": from_velocity,
    "sample": from_denoiser,
    "flow_prediction": from_flow,
}
# The settings that the caller may choose: all but those that the pipeline decides.
OWN = {f.name for f in fields(Params)} - set(OF_THE_MODEL)
# The least ln(alpha / sigma) of a schedule; below it alpha is lost in rounding (Lu et al. 2022a).
LOWEST_LAM = -5.1


def from_diffusers(
    pipeline: Any,
    prompt: str | None = None,
    class_label: int | None = None,
    guidance: float = 1.0,
    check: bool = True,
    **settings: Any,
) -> Setup:
    """Return the setup of a diffusers pipeline or of a pair (network, scheduler), on its device.

    prompt       the text for a text-to-image pipeline; None is the empty prompt
    class_label  the class for a class-conditional network; None is its label for no class
    guidance     scale of classifier-free guidance against the empty prompt or that label
    check        run `check_denoiser` on the network without guidance, about 34 calls
    settings     entries of `Params` that replace the defaults chosen here, except those that
                 describe the model

    The network may be a UNet2DModel, a UNet2DConditionModel with text, a DiTTransformer2DModel or
    an SD3Transformer2DModel. The scheduler may be any that has alphas_cumprod, or one of flow
    matching. The network is put into eval mode and frozen. It runs in its own dtype and gets its
    time, a fractional number, in float32; the solver's state stays float64. A network that looks
    its time up in a table (time_embedding_type "learned") gets the nearest level. `decode` of the
    setup turns latents into images. Raises UsageError for a pipeline of another kind, and if the
    self-test fails.
    """
    diffusers = _diffusers()
    network, scheduler, vae = _parts(pipeline, diffusers)
    schedule, to_model_time, wrap = _schedule(scheduler)
    network.eval().requires_grad_(False)
    conditional, unconditional = _conditions(pipeline, network, prompt, class_label, diffusers)
    if guidance != 1 and (unconditional is None or (prompt, class_label) == (None, None)):
        raise UsageError(
            f"guidance {guidance} needs a prompt or a class_label to guide towards, and a network "
            "that also knows none: give one, or guidance 1"
        )
    channels = network.config.in_channels
    by_table = network.config.get("time_embedding_type") == "learned"

    def predict(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        time = to_model_time(t).float()
        time = time.round().long() if by_table else time
        answer = network(x.to(network.dtype), timestep=time, **condition).sample
        return answer[:, :channels].to(x.dtype)  # the rest is a learned variance

    def denoiser(scale: float) -> Denoiser:
        return wrap(guided(predict, conditional, unconditional or {}, scale), schedule)

    size = network.config.sample_size
    shape = (channels, *((size, size) if isinstance(size, int) else size))
    decode = (lambda x: x) if vae is None else _decoder(vae)
    device = str(network.device)
    if check:
        try:
            check_denoiser(denoiser(1.0), schedule, shape, device=device)
        except UsageError as error:
            raise UsageError(f"{error}; check=False leaves this test out") from None
    return Setup(
        type(pipeline).__name__ if hasattr(pipeline, "components") else type(network).__name__,
        denoiser(guidance),
        schedule,
        shape,
        _params(schedule, shape, vae, bool(prompt)).override_for("from_diffusers", OWN, settings),
        device=device,
        decode=decode,
    )


def _diffusers() -> Any:
    with optional_import("diffusers transformers", "a diffusers pipeline"):
        import diffusers
    return diffusers


def _parts(pipeline: Any, diffusers: Any) -> tuple[Any, Any, Any]:
    """Network, scheduler and autoencoder (or None) of a pipeline or a pair.

    Raises UsageError for another object, and for a network of unknown class or conditions.
    """
    if isinstance(pipeline, diffusers.DiffusionPipeline):
        parts = pipeline.components
        network = parts.get("unet") or parts.get("transformer")
        scheduler, vae = parts.get("scheduler"), parts.get("vae") or parts.get("vqvae")
    elif isinstance(pipeline, tuple) and len(pipeline) == 2:
        (network, scheduler), vae = pipeline, None
    else:
        raise UsageError(
            "from_diffusers takes a DiffusionPipeline or a pair (network, scheduler), not "
            f"{type(pipeline).__name__}: load one with DiffusionPipeline.from_pretrained"
        )
    known = ["UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"]
    known.append("SD3Transformer2DModel")
    classes: Any = tuple(getattr(diffusers, name) for name in known)
    if not isinstance(network, classes):
        raise UsageError(
            f"a network of class {type(network).__name__} is not known, only {', '.join(known)}: "
            "write it as a function of (x, t) and use from_noise_prediction or one of its kin"
        )
    if network.config.get("addition_embed_type") or network.config.get("class_embed_type"):
        raise UsageError(
            f"{type(network).__name__} takes conditions beside a prompt or a class (as in SDXL), "
            "which from_diffusers does not know: write it as a function of (x, t) and use "
            "from_noise_prediction or one of its kin"
        )
    return network, scheduler, vae


def _schedule(scheduler: Any) -> tuple[NoiseSchedule, Callable[[Tensor], Tensor], Wrap]:
    """The noise schedule, the function t -> the network's time, and how its answer is read."""
    config = getattr(scheduler, "config", {})
    kind, N = type(scheduler).__name__, config.get("num_train_timesteps", 1000)
    prediction = config.get("prediction_type", "epsilon")
    if kind.startswith("FlowMatch") or prediction == "flow_prediction":
        # Where the shift depends on the size of the image it is left to the learned times.
        fixed = not config.get("use_dynamic_shifting")
        shift = config.get("flow_shift", config.get("shift", 1.0)) if fixed else 1.0
        flow = RectifiedFlow(shift=float(shift))
        return flow, lambda t: N * flow.sigma(t), from_flow
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UsageError(
            f"{kind} has no alphas_cumprod and is no flow-matching scheduler: give the scheduler "
            "that the network was trained with, such as DDPMScheduler"
        )
    wrap = choose("prediction_type of the scheduler", prediction, PREDICTION_TYPES)
    if config.get("rescale_betas_zero_snr") or not (scheduler.alphas_cumprod > 0).all():
        raise UsageError(
            "the scheduler's last noise level holds no signal (rescale_betas_zero_snr), where "
            "x / alpha does not exist: give the pipeline a scheduler without that option"
        )
    schedule = _levels(scheduler, config, N)
    return schedule, lambda t: N * t - 1, wrap


def _levels(scheduler: Any, config: Any, N: int) -> NoiseSchedule:
    """A VPDiscrete if its few constants describe the schedule, or else a table of all levels.

    Constants keep solver files short.
    """
    schedule: VPDiscrete | VPTable
    if config.get("beta_schedule") == "scaled_linear" and config.get("trained_betas") is None:
        schedule = VPDiscrete(1.0, 1 / N, config["beta_start"], config["beta_end"], N)
    else:
        schedule = VPTable(1.0, 1 / N, tuple(scheduler.alphas_cumprod.double().tolist()))
    return replace(schedule, T=min(schedule.T, schedule.t_of_lam(LOWEST_LAM).item()))


@torch.no_grad()
def _conditions(
    pipeline: Any, network: Any, prompt: str | None, class_label: int | None, diffusers: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The network's keyword arguments with the condition and without any.

    The latter are None if the network has no condition at all, or no label for no class.
    """
    config, device, kind = network.config, network.device, type(network).__name__
    takes_text = isinstance(
        network, (diffusers.UNet2DConditionModel, diffusers.SD3Transformer2DModel)
    )
    null = config.get("num_embeds_ada_norm")
    classes = null or config.get("num_class_embeds")
    if prompt is not None and not takes_text:
        raise UsageError(f"{kind} takes no prompt: leave it out")
    if class_label is not None and (takes_text or not classes):
        raise UsageError(f"{kind} takes no class_label: leave it out")
    if takes_text:
        if not hasattr(pipeline, "encode_prompt"):
            raise UsageError(
                f"{kind} needs the text encoder of its pipeline: give the whole pipeline, not a "
                "pair"
            )
        texts = [prompt or ""] * (3 if isinstance(network, diffusers.SD3Transformer2DModel) else 1)
        answers = pipeline.encode_prompt(
            *texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        names = ("encoder_hidden_states", "pooled_projections")
        with_text, without = (dict(zip(names, answers[i::2], strict=False)) for i in (0, 1))
        return with_text, without
    if not classes:
        return {}, None
    label = null if class_label is None else class_label
    if type(label) is not int or not 0 <= label < classes + (null is not None):
        raise UsageError(
            f"class_label must be a whole number from 0 to {classes - 1}, not {class_label!r}"
        )
    rows = [{"class_labels": torch.tensor([n], device=device)} for n in (label, null or 0)]
    return rows[0], rows[1] if null else None


def _decoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """The function that turns latents (B, C, H, W) into images in [-1, 1]; differentiable."""
    vae.eval().requires_grad_(False)
    scale = vae.config.get("scaling_factor") or 1.0
    shift = vae.config.get("shift_factor") or 0.0

    def decode(z: Tensor) -> Tensor:
        return vae.decode((z / scale + shift).to(vae.dtype)).sample.to(z.dtype)

    return decode


def _params(schedule: NoiseSchedule, shape: Sequence[int], vae: Any, text: bool) -> Params:
    """The paper's settings for pixels, latents and text (App. G.2).

    Images that LPIPS cannot take get the distance l2 instead.
    """
    side, channels = min(shape[1:]), shape[0]
    if vae is not None:
        side *= 2 ** (len(vae.config.block_out_channels) - 1)
        channels = vae.config.out_channels
    perceptual = side >= SMALLEST_SIDE["vgg"] and channels in (1, 3)
    flow = isinstance(schedule, RectifiedFlow)
    # The family, where the schedule has no name of its own: setup.schedule is what counts.
    family = "RectifiedFlow" if flow else "StableDiffusion"
    names = [name for name, known in NAMED_SCHEDULES.items() if known == schedule]
    return Params(
        schedule=names[0] if names else family,
        shape=tuple(shape),
        teacher_order=2 if text else 3,
        teacher_grid="logsnr" if vae is None else "uniform",
        unipc_variant="bh1" if vae is None else "bh2",
        distance="lpips" if perceptual else "l2",
        rematerialize=True,
        sample_batch_size=100 if vae is None else 10,
    )
