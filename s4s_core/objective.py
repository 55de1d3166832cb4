"""What is minimised: the distance to the teacher's end point, with a little freedom in x_T."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import UsageError, choose, optional_import
from .grid import TimeGrid
from .solver import Coefficients, SingleStepCoefficients, solve

Distance = Callable[[Tensor, Tensor], Tensor]


def l2(x: Tensor, target: Tensor) -> Tensor:
    """Return the squared difference, averaged over entries: (B, ...) twice -> (B,)."""
    return (x - target).square().flatten(1).mean(1)


def negative_psnr(x: Tensor, target: Tensor) -> Tensor:
    """Return minus the peak signal-to-noise ratio in dB, for values in [-1, 1].

    As Shaul et al. (2024b) minimise it: (B, ...) twice -> (B,), 10 log10 of the mean square
    difference over 2^2; never below -120.
    """
    return 10 * (l2(x, target) / 4).clamp_min(1e-12).log10()


def feature_distance(activations: Callable[[Tensor], Sequence[Tensor]]) -> Distance:
    """Return LPIPS without its learned heads, on any network (Zhang et al. 2018, Eq. 1 with w = 1).

    activations(x) -> layers (B, C, H, W); each is normalised over channels, and the squared
    differences are summed over channels, averaged over pixels and summed over layers.
    """

    def distance(x: Tensor, target: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for a, b in zip(activations(x), activations(target), strict=True):
            a, b = (layer / layer.norm(dim=1, keepdim=True).clamp_min(1e-5) for layer in (a, b))
            total = total + (a - b).square().sum(1).flatten(1).mean(1)
        return total

    return distance


# A distance that is a sum of squares: |e(x) - e(target)|^2 with x (B, ...) -> e (B, Q).
Embedding = Callable[[Tensor], Tensor]


def pixel_embedding(x: Tensor) -> Tensor:
    """Return e, (B, Q), for which |e(x) - e(target)|^2 is `l2`."""
    return x.flatten(1) / x[0].numel() ** 0.5


def feature_embedding(activations: Callable[[Tensor], Sequence[Tensor]]) -> Embedding:
    """Return e for which |e(x) - e(target)|^2 is `feature_distance` of the same activations."""

    def embed(x: Tensor) -> Tensor:
        layers = (a / a.norm(dim=1, keepdim=True).clamp_min(1e-5) for a in activations(x))
        return torch.cat([a.flatten(1) / a[0, 0].numel() ** 0.5 for a in layers], 1)

    return embed


# The smallest side that each trunk's strides and pools leave something of.
SMALLEST_SIDE = {"vgg": 16, "squeeze": 17, "alex": 31}


def lpips_distance(
    net: str = "vgg", resize: int = 0, device: str | torch.device = "cpu"
) -> Distance:
    """Return LPIPS v0.1 (Zhang et al. 2018) as a distance between (B, C, H, W) images in [-1, 1].

    `resize` (0: none) enlarges both images bilinearly to that side first, for models too small
    for the trunk; one channel is repeated to three. The trunk's ImageNet weights come from
    torchvision's cache ($TORCH_HOME/hub/checkpoints). Raises UsageError if they cannot be had, if
    the `lpips` extra is missing, or for images smaller than the trunk allows.
    """
    metric, prepare = _lpips(net, resize, device)

    def distance(x: Tensor, target: Tensor) -> Tensor:
        return metric(prepare(x), prepare(target)).flatten().to(x.dtype)

    return distance


def _lpips(
    net: str, resize: int, device: str | torch.device
) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The network of LPIPS, and what makes images ready for it."""
    choose("LPIPS network", net, SMALLEST_SIDE)
    with optional_import("lpips torchvision", "the LPIPS distance (l2 does not)"):
        import lpips
    try:
        metric = lpips.LPIPS(net=net, verbose=False).to(device).requires_grad_(False).eval()
    except (OSError, RuntimeError) as error:  # no connection, no such file, a wrong hash
        raise UsageError(
            f"the LPIPS trunk {net!r} could not be loaded ({str(error).splitlines()[0]}): put "
            f"torchvision's file into {torch.hub.get_dir()}/checkpoints by hand, or set distance "
            "to l2"
        ) from None

    def prepare(image: Tensor) -> Tensor:
        side = resize or min(image.shape[-2:])
        if image.ndim != 4 or image.shape[1] not in (1, 3) or side < SMALLEST_SIDE[net]:
            raise UsageError(
                f"LPIPS {net!r} needs images of 1 or 3 channels and at least {SMALLEST_SIDE[net]} "
                f"pixels a side, not {tuple(image.shape[1:])}: give lpips_resize, another "
                "lpips_net, or distance l2"
            )
        image = image.float().expand(-1, 3, -1, -1)
        if not resize:
            return image
        return torch.nn.functional.interpolate(image, size=(resize, resize), mode="bilinear")

    return metric, prepare


def lpips_trunk(net: str = "vgg") -> Path:
    """Return torchvision's file of the trunk of LPIPS, downloaded if it is not there.

    Raises UsageError as `lpips_distance` does.
    """
    _lpips(net, 0, "cpu")
    from torchvision import models

    trunks = {
        "vgg": models.VGG16_Weights,
        "squeeze": models.SqueezeNet1_1_Weights,
        "alex": models.AlexNet_Weights,
    }
    name = trunks[net].IMAGENET1K_V1.url.rpartition("/")[2]
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def lpips_embedding(
    net: str = "vgg", resize: int = 0, device: str | torch.device = "cpu"
) -> Embedding:
    """Return e for which |e(x) - e(target)|^2 is `lpips_distance`, which has the same errors."""
    metric, prepare = _lpips(net, resize, device)
    # The heads are 1x1 convolutions to one channel, with weights that are not negative.
    heads = [lin.model[-1].weight for lin in metric.lins]

    def embed(x: Tensor) -> Tensor:
        layers = metric.net.forward(metric.scaling_layer(prepare(x)))
        parts = []
        for layer, head in zip(layers, heads, strict=True):
            unit = layer / (layer.square().sum(1, keepdim=True).sqrt() + 1e-10)
            parts.append((unit * head.clamp_min(0).sqrt()).flatten(1) / layer[0, 0].numel() ** 0.5)
        return torch.cat(parts, 1).to(x.dtype)

    return embed


def decoded_distance(distance: Distance, decode: Callable[[Tensor], Tensor]) -> Distance:
    """Return the distance between the images of two latents, the target's without gradient.

    decode  latents (B, c, h, w) -> images (B, C, H, W); the distance is that of the images, (B,)
    """

    def between(x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            target = decode(target)
        return distance(decode(x), target)

    return between


def radius(gamma: float, d: int, m: int) -> float:
    """Return r = gamma d m^(-5/2) in units of sigma_T (App. G.2).

    d is the number of entries of x_T, m that of coefficients (of all that is learned, in G.2's
    words: the setting m_counts). The paper gives the exponent; gamma = 0.0242 makes r equal that
    of Tong et al. (2024) at k = 3, N = 6.
    """
    return gamma * d * m**-2.5


def project_to_ball(x: Tensor, center: Tensor, r: float) -> Tensor:
    """Return the point nearest to x within distance r of `center`, per sample (Eq. 7).

    All in the units of x: for B_r(x_T) give r * sigma_T.
    """
    offset = x - center
    length = offset.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return center + offset * (r / length).clamp_max(1).view(-1, *[1] * (x.ndim - 1))


def relaxed_loss(
    denoiser: Denoiser,
    coefficients: Coefficients | SingleStepCoefficients,
    grid: TimeGrid,
    x_T_relaxed: Tensor,
    x_0: Tensor,
    distance: Distance = l2,
) -> Tensor:
    """Return d(Psi(x'_T), Psi*(x_T)) per sample, (B,) (Eq. 9); Eq. 6 at x'_T = x_T.

    Differentiable in the coefficients, the grid and x'_T.
    """
    return distance(solve(denoiser, x_T_relaxed, coefficients, grid), x_0)
