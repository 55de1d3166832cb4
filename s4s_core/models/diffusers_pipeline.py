"""Turn a diffusers pipeline into a `Setup`: denoiser, schedule, shape and settings.

The network, its conditions and the noise levels are taken from the pipeline; the solver, the times
and the clipping of its own sampling loop are not.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
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
    of_model,
)
from ..errors import UsageError, choose, optional_import, shown
from ..objective import SMALLEST_SIDE
from ..params import OF_THE_MODEL, Params
from ..schedule import NAMED_SCHEDULES, NoiseSchedule, RectifiedFlow, VPDiscrete, VPTable
from ..setup import Setup
from .check import check_denoiser
from .networks.latent import read_captions

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
    prompt: str | Sequence[str] | Path | None = None,
    class_label: int | Sequence[int] | None = None,
    guidance: float = 1.0,
    shape: Sequence[int] | None = None,
    check: bool = True,
    **settings: Any,
) -> Setup:
    """Return the setup of a diffusers pipeline or of a pair (network, scheduler), on its device.

    prompt       the text for a text-to-image pipeline; None is the empty prompt
                 A Path is a file with a prompt in each line, or a .csv with a column `text`
    class_label  the class for a class-conditional network; None is its label for no class
                 A list of either gives seed n its entry n mod length, so that a solver is learned
                 for all of them at once; `condition` of the setup says so
    guidance     scale of classifier-free guidance against the empty prompt or that label; or, where
                 it was distilled into the network (guidance_embeds, as in FLUX.1-dev), the number
                 that the network is told
    shape        of one sample (channels, height, width), in latents if there are, or of a video
                 (channels, frames, height, width); None is the size the network was trained at
    check        run `check_denoiser` on the network without guidance, about 34 calls
    settings     entries of `Params` that replace the defaults chosen here, except those that
                 describe the model

    The network may be a UNet2DModel, a UNet2DConditionModel with text (Stable Diffusion, SDXL), a
    DiTTransformer2DModel, an SD3Transformer2DModel, a FluxTransformer2DModel or a
    WanTransformer3DModel. The scheduler may be any that has alphas_cumprod, one of flow matching,
    or the one that `install` puts in their place. The network is put into eval mode and frozen. It
    runs in its own dtype and gets its time, a fractional number, in float32; the solver's state
    stays float64. A network that looks its time up in a table (time_embedding_type "learned") gets
    the nearest level. Levels that hold no signal (zero terminal SNR) are left out. SDXL is told the
    size of the image, uncropped, as its pipeline does by default; latents of FLUX are not packed.
    `decode` of the setup turns latents into images, or videos (B, C, frames, height, width).
    Raises UsageError for a pipeline of another kind, for a network with inputs that are not
    supplied here, which it names, and if the self-test fails.
    """
    if isinstance(prompt, str) and os.path.isfile(prompt):
        raise UsageError(f"prompt {shown(prompt)} is a file: give Path({shown(prompt)})")
    if isinstance(prompt, Path):
        prompt = read_captions(prompt)
    called, scheduler, vae = _parts(pipeline, _diffusers())
    network = _compiled(called)
    shape = _shape(pipeline, network, shape)
    schedule, to_model_time, wrap = _schedule(scheduler)
    called.eval().requires_grad_(False)
    conditional, unconditional = _conditions(pipeline, network, prompt, class_label, shape)
    if guidance != 1 and (unconditional is None or (prompt, class_label) == (None, None)):
        raise UsageError(
            f"guidance {guidance} needs a prompt or a class_label to guide towards, and a network "
            "that also knows none: give one, or guidance 1"
        )
    condition = None
    if isinstance(given := class_label if prompt is None else prompt, (list, tuple)):
        count = len(given)

        def condition(seeds: Sequence[int]) -> Tensor:
            return torch.tensor([seed % count for seed in seeds], device=network.device)

    _, ask = _NETWORKS[_kind(network)]
    distilled = network.config.get("guidance_embeds")
    by_table = network.config.get("time_embedding_type") == "learned"

    def predict(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        time = to_model_time(t).float()
        time = time.round().long() if by_table else time
        answer = ask(called, x.to(network.dtype), time, **condition)
        return answer[:, : shape[0]].to(x.dtype)  # the rest is a learned variance

    def denoiser(scale: float) -> Callable[..., Tensor]:
        told_it = {"guidance": torch.tensor([scale], device=network.device)} if distilled else {}

        def predict_guided(x: Tensor, t: Tensor, *index: Tensor) -> Tensor:
            if len(index) != (condition is not None):
                raise UsageError(
                    "this model draws what a condition names: sample with "
                    "setup.denoiser_for(seeds), and not where there is none"
                )
            told = {k: v[index[0]] if index else v for k, v in conditional.items()}
            factor = 1.0 if distilled else scale
            return guided(predict, told | told_it, unconditional or {}, factor)(x, t)

        return wrap(predict_guided, schedule)

    def at_its_own(x: Tensor, t: Tensor) -> Tensor:
        """D without guidance, each sample at a condition of its own."""
        told = () if condition is None else (condition(range(len(x))),)
        return denoiser(1.0)(x, t, *told)

    decode = (lambda x: x) if vae is None else _decoder(vae)
    device = str(network.device)
    if check:
        try:
            check_denoiser(at_its_own, schedule, shape, device=device)
        except UsageError as error:
            raise UsageError(
                f"{error}; check=False (--no-check of s4s learn) leaves this test out"
            ) from None
    params = _params(schedule, shape, vae, bool(prompt))
    setup = Setup(
        type(pipeline).__name__ if hasattr(pipeline, "components") else type(network).__name__,
        denoiser(guidance),
        schedule,
        shape,
        params.override_for("from_diffusers", OWN, settings).override(guidance=float(guidance)),
        weights={type(network).__name__: _fingerprint(network)},
        device=device,
        condition=condition,
        decode=decode,
    )
    return setup.variant(denoiser=of_model(setup.denoiser, setup.model))


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
    if not _kind(_compiled(network)):
        raise UsageError(
            f"a network of class {type(network).__name__} is not known, only "
            f"{', '.join(_NETWORKS)}: write it as a function of (x, t) and use "
            "from_noise_prediction or one of its kin"
        )
    if unknown := _unsupplied(_compiled(network), pipeline):
        raise UsageError(
            f"{type(_compiled(network)).__name__} takes more than x, t and a prompt or class "
            f"({unknown}), which from_diffusers does not supply: write it as a function of (x, t) "
            "and use from_noise_prediction or one of its kin"
        )
    return network, scheduler, vae


def _compiled(network: Any) -> Any:
    """The module behind torch.compile's, which has its config; any other is itself."""
    return getattr(network, "_orig_mod", network)


def _kind(network: Any) -> str:
    """The class of _NETWORKS that a network belongs to; empty if to none."""
    return next((c.__name__ for c in type(network).__mro__ if c.__name__ in _NETWORKS), "")


# Entries of a network's config that ask for an input of their own, as LCM, IP-Adapter, networks of
# images to video and some upscalers have it.
_MORE_INPUTS = (
    "addition_embed_type",
    "class_embed_type",
    "time_cond_proj_dim",
    "encoder_hid_dim_type",
    "image_dim",
)
# Parts of a pipeline that feed the network something beside its text, or take over from it.
_MORE_PARTS = ("controlnet", "adapter", "transformer_2", "image_encoder")
# Entries of a pipeline's config: a time for each token, and the refiner's input.
_MORE_SETTINGS = ("expand_timesteps", "requires_aesthetics_score")


def _unsupplied(network: Any, pipeline: Any) -> str:
    """What the network takes that is not supplied here, in a few words; empty if nothing."""
    config, parts = network.config, getattr(pipeline, "components", {})
    found = [
        f"{name} = {config[name]}"
        for name in _MORE_INPUTS
        if config.get(name) and config[name] != "text_time"  # SDXL's
    ]
    found += [f"the pipeline's {name}" for name in _MORE_PARTS if parts.get(name) is not None]
    own = getattr(pipeline, "config", {})
    found += [f"the pipeline's {name}" for name in _MORE_SETTINGS if own.get(name)]
    channels, answers = config.in_channels, config.get("out_channels") or config.in_channels
    if answers not in (channels, 2 * channels):  # twice: with a learned variance
        found.append(f"{channels} channels, of which it answers {answers}")
    return ", ".join(found)


def _shape(pipeline: Any, network: Any, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one sample: as asked for, or as the network was trained."""
    kind = _kind(network)
    video, packed = kind == "WanTransformer3DModel", kind == "FluxTransformer2DModel"
    channels = network.config.in_channels // (4 if packed else 1)
    size: Any = network.config.get("sample_size")
    size = size or getattr(pipeline, "default_sample_size", None)
    if shape is None and size is None:
        example = [channels, *([1] if video else []), 32, 32]
        raise UsageError(
            f"{type(network).__name__} does not say at which size it was trained: give shape, as "
            f"in shape={example}"
        )
    if shape is None:
        shape = (channels, *((size, size) if isinstance(size, int) else size))
    whole = all(type(n) is int and n > 0 for n in shape)
    if not (whole and len(shape) == 3 + video and shape[0] == channels):
        raise UsageError(
            f"shape must be {channels} channels,{' frames,' * video} a height and a width, not "
            f"{list(shape)!r}"
        )
    if packed and any(n % 2 for n in shape[1:]):
        raise UsageError(
            f"{kind} sees squares of 2 x 2: give shape an even height and width, not {list(shape)}"
        )
    return tuple(shape)


def _fingerprint(network: Any) -> str:
    """A sha256 of the first numbers of every weight, which tells fine-tuned copies apart."""
    digest = hashlib.sha256()
    for name, weight in network.state_dict().items():
        some = weight.flatten()[:16].double().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {some.tolist()}".encode())
    return digest.hexdigest()


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
    wrap = choose("prediction_type of the scheduler", prediction, PREDICTION_TYPES)
    schedule = _levels(alphas_cumprod(scheduler), config, N)
    return schedule, lambda t: N * t - 1, wrap


def alphas_cumprod(scheduler: Any) -> Tensor:
    """Return alpha^2 of all noise levels (N,), float64, on the CPU.

    An S4SScheduler keeps the settings of the scheduler whose place it took. Raises UsageError for a
    scheduler that has no such levels.
    """
    if type(scheduler).__name__ == "S4SScheduler" and "beta_schedule" in scheduler.config:
        scheduler = _diffusers().DDPMScheduler.from_config(own_settings(scheduler))
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UsageError(
            f"{type(scheduler).__name__} has no alphas_cumprod and is no flow-matching scheduler: "
            "give the scheduler that the network was trained with, such as DDPMScheduler"
        )
    return scheduler.alphas_cumprod.double().cpu()


def own_settings(scheduler: Any) -> dict[str, Any]:
    """Return the settings of a scheduler, or of the one whose place an S4SScheduler has taken."""
    items = scheduler.config.items()
    return {k: v for k, v in items if k != "solvers" and not k.startswith("_")}


def _levels(levels: Tensor, config: Any, N: int) -> NoiseSchedule:
    """A VPDiscrete if its few constants describe the schedule, or else a table of all levels.

    Constants keep solver files short. Levels without signal are left out at the noisy end.
    """
    schedule: VPDiscrete | VPTable
    last = 1.0
    plain = config.get("trained_betas") is None and not config.get("rescale_betas_zero_snr")
    if config.get("beta_schedule") == "scaled_linear" and plain:
        schedule = VPDiscrete(1.0, 1 / N, config["beta_start"], config["beta_end"], N)
    else:
        # Schedulers write zero, or 2^-24 instead of it. Nothing is interpolated towards that.
        last = int((levels > 2e-7).sum()) / N
        schedule = VPTable(1.0, 1 / N, tuple(levels.where(levels > 1e-7, 1e-12).tolist()))
    return replace(schedule, T=min(last, schedule.t_of_lam(LOWEST_LAM).item()))


@torch.no_grad()
def _conditions(
    pipeline: Any, network: Any, prompt: Any, class_label: Any, shape: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The network's keyword arguments, a row for each condition, and those without any.

    The latter are None if the network has no condition at all, or no label for no class.
    """
    config, device, kind = network.config, network.device, type(network).__name__
    encode, _ = _NETWORKS[_kind(network)]
    null = config.get("num_embeds_ada_norm")
    classes = null or config.get("num_class_embeds")
    if prompt is not None and not encode:
        raise UsageError(f"{kind} takes no prompt: leave it out")
    if class_label is not None and (encode or not classes):
        raise UsageError(f"{kind} takes no class_label: leave it out")
    if encode:
        if not hasattr(pipeline, "encode_prompt"):
            raise UsageError(
                f"{kind} needs the text encoder of its pipeline: give the whole pipeline, not a "
                "pair"
            )
        texts = _listed("prompt", str, "a text", "" if prompt is None else prompt)
        parts = (texts[i : i + 32] for i in range(0, len(texts), 32))
        found = [encode(pipeline, part, shape, device) for part in parts]
        told, none = (
            {k: torch.cat([pair[i][k] for pair in found]).to(network.dtype) for k in found[0][i]}
            for i in (0, 1)
        )
        return told, {k: v[:1] for k, v in none.items()}
    if not classes:
        return {}, None
    what = f"a whole number from 0 to {classes - 1}"
    labels = _listed("class_label", int, what, null if class_label is None else class_label)
    for label in labels:
        if not 0 <= label < classes + (null is not None):
            raise UsageError(f"class_label must be {what}, not {label}")
    rows = [{"class_labels": torch.tensor(n, device=device)} for n in (labels, [null or 0])]
    return rows[0], rows[1] if null else None


Rows = dict[str, Tensor]


def _pairs(*answers: Tensor, names: tuple[str, ...] = ("pooled_projections",)) -> list[Rows]:
    """What encode_prompt answers with a text and without, in turn, as keyword arguments."""
    names = ("encoder_hidden_states", *names)
    return [dict(zip(names, answers[i::2], strict=False)) for i in (0, 1)]


def _texts_of_unet(pipeline: Any, texts: list[str], shape: Any, device: Any) -> list[Rows]:
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    answers = pipeline.encode_prompt(texts, device=device, **options)
    pairs, config = _pairs(*answers, names=("text_embeds",)), pipeline.unet.config
    if config.get("addition_embed_type"):  # SDXL: the sizes before and after cropping, and where
        size = [n * pipeline.vae_scale_factor for n in shape[1:]]
        for rows in pairs:
            rows["time_ids"] = torch.tensor([[*size, 0, 0, *size]] * len(texts), device=device)
    return pairs


def _texts_of_sd3(pipeline: Any, texts: list[str], shape: Any, device: Any) -> list[Rows]:
    return _pairs(*pipeline.encode_prompt(texts, None, None, device=device))


def _texts_of_wan(pipeline: Any, texts: list[str], shape: Any, device: Any) -> list[Rows]:
    answers = pipeline.encode_prompt(texts, device=device, max_sequence_length=512)
    return _pairs(*answers)  # as its pipeline does by default: encode_prompt alone cuts at 226


def _texts_of_flux(pipeline: Any, texts: list[str], shape: Any, device: Any) -> list[Rows]:
    (c, c_pooled, _), (u, u_pooled, _) = (
        pipeline.encode_prompt(part, device=device) for part in (texts, [""])
    )
    return _pairs(c, u, c_pooled, u_pooled)


def _ask(network: Any, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
    return network(x, timestep=time, **condition).sample


def _ask_unet(
    network: Any, x: Tensor, time: Tensor, encoder_hidden_states: Tensor, **added: Tensor
) -> Tensor:
    return _ask(
        network, x, time, encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=added
    )


def _ask_flux(network: Any, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
    """FLUX sees a token for each square of 2 x 2, with its place, and times from 0 to 1."""
    squares, text = torch.nn.functional.pixel_unshuffle(x, 2), condition["encoder_hidden_states"]
    size = squares.shape[2:]
    places = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in (1, *size)))
    answer = _ask(
        network, squares.flatten(2).mT, time / 1000, img_ids=places.to(x),
        txt_ids=x.new_zeros(text.shape[1], 3), **condition,
    )  # fmt: skip
    return torch.nn.functional.pixel_shuffle(answer.mT.unflatten(2, size), 2)


# Class of a network -> how its conditions are made of texts (with and without; None: it takes no
# text), and how it is asked.
_NETWORKS: dict[str, tuple[Callable[..., list[Rows]] | None, Callable[..., Tensor]]] = {
    "UNet2DModel": (None, _ask),
    "UNet2DConditionModel": (_texts_of_unet, _ask_unet),
    "DiTTransformer2DModel": (None, _ask),
    "SD3Transformer2DModel": (_texts_of_sd3, _ask),
    "FluxTransformer2DModel": (_texts_of_flux, _ask_flux),
    "WanTransformer3DModel": (_texts_of_wan, _ask),
}


def _listed(name: str, kind: type, what: str, given: Any) -> list:
    """One or several values as a list; UsageError for none, or any of another type."""
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    if not values or not all(type(value) is kind for value in values):
        raise UsageError(f"{name} must be {what}, or a list of such, not {given!r:.80}")
    return values


def _decoder(vae: Any) -> Callable[[Tensor], Tensor]:
    """The function that turns latents into images or videos in [-1, 1]; differentiable."""
    vae.eval().requires_grad_(False)
    config, scale = vae.config, vae.config.get("scaling_factor") or 1.0
    shift = [[config.get("shift_factor") or 0.0], [1.0]]
    if config.get("latents_mean") and config.get("latents_std"):  # numbers for each channel
        shift = [config["latents_mean"], config["latents_std"]]
    mean, std = torch.tensor(shift, dtype=torch.float64)[..., None]

    def decode(z: Tensor) -> Tensor:
        x = z.flatten(2) * std.to(z) / scale + mean.to(z)
        return vae.decode(x.view_as(z).to(vae.dtype)).sample.to(z.dtype)

    return decode


def _params(schedule: NoiseSchedule, shape: Sequence[int], vae: Any, text: bool) -> Params:
    """The paper's settings for pixels, latents and text (App. G.2).

    Images that LPIPS cannot take, and videos, get the distance l2 instead.
    """
    side, channels, video = min(shape[1:]), shape[0], len(shape) == 4
    if vae is not None and not video:
        side *= 2 ** (len(vae.config.block_out_channels) - 1)
        channels = vae.config.out_channels
    perceptual = side >= SMALLEST_SIDE["vgg"] and channels in (1, 3) and not video
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
