"""Training for one appendix only, on the bundled networks: no other part of the package needs it.

Two generators train a denoiser or a classifier, and yield one record every few steps.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError, progress, write_atomically
from .classifier import Classifier
from .unet import SmallDenoiser


class Record(NamedTuple):
    """A point of a training run: steps done, mean loss since the last record, and the network.

    `averages` are all running averages that were asked for, the network's own first.
    """

    step: int
    loss: float
    network: nn.Module
    averages: tuple[nn.Module, ...] = ()


# How the bundled networks were trained, where the functions below have other defaults.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {"denoiser": {}, "classifier": {}},
    "ecg": {
        "denoiser": dict(batch=64, lr=2e-3, patch=4, widths=(32, 64, 96), attention=(1, 2)),
        "classifier": dict(width=32, deeper=(64, 64), normalize=True, dropout=0.1),
    },
    "cifar10_tiny": {
        "denoiser": dict(batch=1024, lr=2.5e-3, warmup=500, ema_images=(200_000, 1_000_000),
                         flip=True, bf16=True, patch=2, widths=(64, 128, 256), blocks=1,
                         attention=(1, 2), embedding=256),
        "classifier": dict(flip=True, shift=2, bf16=True, dropout=0.1, width=32,
                           deeper=(128, 128), normalize=True),
    },
}  # fmt: skip


def train_denoiser(
    images: Tensor,
    steps: int,
    batch: int = 128,
    lr: float = 2e-3,
    warmup: int | None = None,
    cooldown: int | None = None,
    ema_images: int | Sequence[int] = 50_000,
    flip: bool = False,
    bf16: bool = False,
    compiled: bool = False,
    labels: Tensor | None = None,
    unlabelled: float = 0.1,
    seed: int = 0,
    every: int = 50,
    checkpoint: str | Path = "",
    **unet: Any,
) -> Iterator[Record]:
    """Train D(x, sigma) on `images` (n, C, H, W) in [-1, 1], and yield `Record`s of its average.

    Signals (n, C, length) are learned in the same way.

    With `labels` (n,) the network is D(x, sigma, label), and a share `unlabelled` of the images is
    shown without its class, for classifier-free guidance (Ho & Salimans 2021).

    The recipe is EDM's (Karras et al. 2022, Table 1): ln sigma ~ N(-1.2, 1.2^2), loss weight
    lambda(sigma) = 1 / c_out(sigma)^2, Adam, and an exponential moving average (EMA) of the
    weights. The half-life of the average is `ema_images` images, and shorter at the start; with
    several of them there are several averages, and the first is the record's network. The learning
    rate rises over `warmup` steps (None: 500, but at most a tenth of all), stays at `lr`, and falls
    to zero along a cosine over the last `cooldown` steps (None: over all steps). With `flip` half
    of the images, chosen at random, are mirrored left to right. With `bf16` the network computes in
    bfloat16 where torch's autocast deems it safe, on a device that has instructions for it, and
    `compiled` by torch.compile, which pays on a GPU. `unet` are further arguments of `UNet`. A
    record comes after `every` steps and after the last; its loss is near 1 before training, and its
    network is the running average itself, not a copy.

    All random numbers of a step follow from (seed, step) alone. The file `checkpoint` is written at
    every record. If it exists, the run continues from it and ends as if it had never stopped; its
    first record is then the last one of the run before. The run may continue with other `steps` and
    another `cooldown` as long as the rate has not begun to fall, so one can train while there is
    time and then cool down. Raises UsageError for data that are no images, for labels that are not
    one an image, and for a checkpoint of another run.
    """
    if images.ndim not in (3, 4) or min(steps, batch) < 1:
        raise UsageError(
            "training needs images (n, C, H, W) or signals (n, C, length) and at least one step "
            f"and one image a step, not {tuple(images.shape)}, {steps} steps and {batch} images"
        )
    if labels is not None and labels.shape != (len(images),):
        raise UsageError(
            f"training by class needs one label for each of the {len(images)} images, not "
            f"{tuple(labels.shape)}"
        )
    half_lives = [ema_images] if isinstance(ema_images, int) else list(ema_images)
    if labels is not None:
        unet = {"classes": int(labels.max()) + 1, **unet}
    unet = {"dimensions": images.ndim - 2, **unet}
    warmup = max(1, min(500, steps // 10) if warmup is None else warmup)
    cooldown = steps if cooldown is None else max(1, min(cooldown, steps))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallDenoiser(images.std().item(), in_channels=images.shape[1], **unet)
    net = net.to(images.device)
    emas = [copy.deepcopy(net).eval().requires_grad_(False) for _ in half_lives]
    forward = torch.compile(net) if compiled else net
    adam = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    run = dict(net.config, n=len(images), batch=batch, lr=lr, warmup=warmup, ema_images=half_lives,
               flip=flip, bf16=bf16, unlabelled=unlabelled, seed=seed)  # fmt: skip

    def history(step: int) -> str:
        """The settings that the first `step` steps depend on, as JSON.

        The length of the run is one of them once the learning rate falls.
        """
        falls = dict(steps=steps, cooldown=cooldown) if step > steps - cooldown else {}
        return json.dumps(run | falls)

    start = 0
    if checkpoint and Path(checkpoint).exists():
        start, loss = _restore(checkpoint, history, net, emas, adam)
        yield Record(start, loss, emas[0], tuple(emas))
    losses: list[Tensor] = []
    for step in progress(range(start, steps), desc="training", initial=start, total=steps):
        rise = min((step + 1) / warmup, 1.0)
        fallen = max(0, step - (steps - cooldown)) / cooldown
        adam.param_groups[0]["lr"] = lr * rise * 0.5 * (1 + math.cos(math.pi * fallen))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1_000_003 + step)
            index = torch.randint(len(images), (batch,), device=images.device)
            x_0, label = _mirrored(images[index], flip), None
            if labels is not None:
                hidden = torch.rand(batch, device=images.device) < unlabelled
                label = labels[index].masked_fill(hidden, net.config["classes"])
            with _bfloat16(images.device, bf16):
                objective = _denoising_loss(forward, x_0, label, net.sigma_data)
        adam.zero_grad()
        objective.backward()
        adam.step()
        # EDM, Table 7: the half-life is at most 5 % of the images seen so far.
        for ema, half_life in zip(emas, half_lives, strict=True):
            decay = 0.5 ** (batch / min(half_life, 0.05 * batch * (step + 1)))
            weights = [weight.detach() for weight in net.parameters()]
            torch._foreach_lerp_(list(ema.parameters()), weights, 1 - decay)
        losses.append(objective.detach())
        if (step + 1) % every == 0 or step + 1 == steps:
            mean = torch.stack(losses).double().mean().item()
            if checkpoint:
                text = {"run": history(step + 1), "step": str(step + 1), "loss": repr(mean)}
                _save_checkpoint(checkpoint, text, net, emas, adam)
            yield Record(step + 1, mean, emas[0], tuple(emas))
            losses = []


def _denoising_loss(
    net: Callable[..., Tensor], x_0: Tensor, label: Tensor | None, sigma_data: float
) -> Tensor:
    """EDM Eq. (2) with the weights lambda(sigma): the mean over images, pixels and noise levels."""
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(len(x_0), *[1] * (x_0.ndim - 1), device=x_0.device))
    noise = torch.randn(x_0.shape, device=x_0.device)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (weight * (net(x_0 + sigma * noise, sigma.flatten(), label) - x_0) ** 2).mean()


def train_classifier(
    images: Tensor,
    labels: Tensor,
    steps: int,
    batch: int = 128,
    lr: float = 3e-3,
    flip: bool = False,
    shift: int = 0,
    bf16: bool = False,
    seed: int = 0,
    every: int = 50,
    dropout: float = 0.3,
    **classifier: Any,
) -> Iterator[Record]:
    """Train a `Classifier` on `images` (n, C, H, W), `labels` (n,), and yield `Record`s of it.

    The loss is the cross-entropy, the optimiser AdamW with weight decay 0.01, and the learning rate
    falls from `lr` to zero along a cosine. `flip`, `bf16`, `every` and the random numbers are as in
    `train_denoiser`. With `shift` each image is moved at random by up to that many pixels.
    `classifier` are further arguments of `Classifier`. The network is in eval mode whenever a
    record is yielded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classes = int(labels.max()) + 1
        classifier = {"dimensions": images.ndim - 2, **classifier}
        net = Classifier(images.shape[1], classes=classes, dropout=dropout, **classifier)
    net = net.to(images.device)
    adam = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01, fused=True)
    losses = []
    for step in progress(range(steps), desc="training"):
        adam.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1_000_003 + step)
            index = torch.randint(len(images), (batch,), device=images.device)
            x = _moved(_mirrored(images[index], flip), shift)
            with _bfloat16(images.device, bf16):
                loss = F.cross_entropy(net.train()(x), labels[index])
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == steps:
            yield Record(step + 1, sum(losses) / len(losses), net.eval())
            losses = []


def _bfloat16(device: torch.device, wanted: bool) -> torch.autocast:
    """Autocast to bfloat16 if it is `wanted` and the device need not emulate it.

    Emulation made training 14 times slower (on AVX2).
    """
    supported = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and supported)


def _mirrored(x: Tensor, flip: bool) -> Tensor:
    """The images; with `flip` a random half of them is mirrored left to right."""
    if not flip:
        return x
    chosen = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < 0.5
    return torch.where(chosen, x.flip(-1), x)


def _moved(x: Tensor, shift: int) -> Tensor:
    """The images, each moved by up to `shift` pixels either way, with borders by reflection."""
    if not shift:
        return x
    windows = F.pad(x, 4 * [shift], mode="reflect").unfold(2, x.shape[2], 1)
    windows = windows.unfold(3, x.shape[3], 1)  # (B, C, 2 shift + 1, 2 shift + 1, H, W), a view
    down, right = torch.randint(2 * shift + 1, (2, len(x))).to(x.device)
    return windows[torch.arange(len(x), device=x.device), :, down, right]


def _save_checkpoint(
    path: str | Path,
    text: dict[str, str],
    net: nn.Module,
    emas: Sequence[nn.Module],
    adam: torch.optim.Optimizer,
) -> None:
    """Save all that a later run needs, as tensors; `text` says which run and step they are of."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    for i, ema in enumerate(emas):
        tensors |= {f"ema.{i}.{k}": v for k, v in ema.state_dict().items()}
    for i, state in adam.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    write_atomically(path, safetensors.torch.save(tensors, text))


def _restore(
    path: str | Path,
    history: Callable[[int], str],
    net: nn.Module,
    emas: Sequence[nn.Module],
    adam: torch.optim.Optimizer,
) -> tuple[int, float]:
    """Load a checkpoint into `net`, `emas` and `adam`; return its number of steps and its loss."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UsageError(f"{path} is not a complete checkpoint ({error}); delete it") from None
    run, expected = metadata.get("run"), history(int(metadata.get("step", 0)))
    if run != expected:
        raise UsageError(
            f"{path} belongs to another run, {run}, than {expected}; "
            "use its settings, or another file"
        )
    tensors = safetensors.torch.load_file(path)
    for prefix, target in (("net.", net), *((f"ema.{i}.", ema) for i, ema in enumerate(emas))):
        target.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    # Fused Adam reads memory in order, so its averages need the layout of their parameter.
    state = {
        i: {"step": tensors[f"adam.{i}.step"]}
        | {
            k: torch.empty_like(p).copy_(tensors[f"adam.{i}.{k}"])
            for k in ("exp_avg", "exp_avg_sq")
        }
        for i, p in enumerate(net.parameters())
    }
    adam.load_state_dict({"state": state, "param_groups": adam.state_dict()["param_groups"]})
    return int(metadata["step"]), float(metadata["loss"])
