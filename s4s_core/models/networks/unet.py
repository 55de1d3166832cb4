"""The small pixel U-Net (DDPM++) of the bundled models, and EDM's preconditioning.

It is written from the description in Karras et al. 2022, "Elucidating the Design Space of
Diffusion-Based Generative Models" (EDM), Table 1, Table 7 and Appendix F.1. The package has two
DDPM++ U-Nets: this one is small and laid out for a CPU, whereas the one in song_unet.py has
NVIDIA's exact blocks and resampling filters, which NVIDIA's weights need.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group normalisation of at most 8 groups, each of at least 8 channels.

    Smaller groups cost far more time on a CPU.
    """
    groups = max(1, min(8, channels // 8))
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=1e-6)


CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
POOL: dict[int, Callable[[Tensor, int], Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d}


def zero_init(layer: nn.Conv1d | nn.Conv2d) -> nn.Conv1d | nn.Conv2d:
    """Set a layer's weight and bias to zero, and return the layer.

    A residual branch that ends in this layer adds nothing before training.
    """
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class NoiseEmbedding(nn.Module):
    """The embedding of the noise level and, with `classes`, of the class: (B, width).

    Sines and cosines of c_noise (B,) pass through an MLP of two layers with SiLU; a row for each
    class, and a last one for no class, is added between the two.
    """

    frequencies: Tensor

    def __init__(self, width: int, classes: int = 0):
        super().__init__()
        if not 8 <= width <= 2**16:  # what a file claims must not keep a computer busy
            raise UsageError(f"the noise embedding has 8 to 65536 numbers, not {width}")
        # On the CPU even if the default is "meta", where the first arithmetic imports for seconds.
        frequencies = 1e4 ** -torch.linspace(0, 1, width // 8, device="cpu")
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layer_1, self.layer_2 = nn.Linear(width // 8 * 2, width), nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.3)

    def forward(self, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the embeddings (B, width) of c_noise (B,) or (1,) and label (B,), if there are."""
        angle = c_noise[:, None] * self.frequencies
        waves = torch.cat([angle.sin(), angle.cos()], dim=1)
        hidden = F.silu(self.layer_1(waves))
        if self.label is not None:
            hidden = hidden + self.label(label)
        return F.silu(self.layer_2(hidden))


class Attention(nn.Module):
    """Single-head self-attention over the pixels, (B, C, H, W) -> the same shape.

    With `dimensions` 1 it is over the places of signals, (B, C, length).
    """

    def __init__(self, channels: int, dimensions: int = 2):
        super().__init__()
        conv = CONV[dimensions]
        self.norm = group_norm(channels)
        self.qkv = conv(channels, 3 * channels, 1)
        self.out = zero_init(conv(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer of the attention, (B, C, H, W), which the caller adds to x."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # (B, HW, C)
        a = F.scaled_dot_product_attention(q, k, v)
        return self.out(a.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """One residual block: x (B, C_in, H, W), emb (B or 1, E) -> (B, C_out, H', W').

    With `row` (B,) the embedding of a sample is that row of emb (R, E). `resample` is "", "down" or
    "up" and acts before the first convolution. Every sum of two branches is scaled by sqrt(1/2),
    which keeps the variance of the activations (EDM, App. F.1).
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        c_emb: int,
        resample: str = "",
        attention: bool = False,
        dropout: float = 0.0,
        dimensions: int = 2,
    ):
        super().__init__()
        conv, self.pool, self.resample = CONV[dimensions], POOL[dimensions], resample
        self.norm_1, self.conv_1 = group_norm(c_in), conv(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(c_emb, 2 * c_out)
        self.norm_2, self.dropout = group_norm(c_out), nn.Dropout(dropout)
        self.conv_2 = zero_init(conv(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1)
        self.attention = Attention(c_out, dimensions) if attention else None

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return self.pool(x, 2)
        return F.interpolate(x, scale_factor=2.0) if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor, row: Tensor | None = None) -> Tensor:
        """Return the block's answer, (B, C_out, H', W')."""
        h = self.conv_1(self._resample(F.silu(self.norm_1(x))))
        modulation = self.scale_shift(emb)
        if row is not None:
            modulation = modulation[row]
        modulation = modulation.view(*modulation.shape, *[1] * (x.ndim - 2))
        scale, shift = modulation.chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm_2(h), scale + 1))
        x = (self._resample(self.skip(x)) + self.conv_2(self.dropout(h))) * math.sqrt(0.5)
        return x if self.attention is None else (x + self.attention(x)) * math.sqrt(0.5)


class UNet(nn.Module):
    """The network F(x, c_noise): x (B, in_channels, H, W), c_noise (B,) or (1,) -> like x.

    `widths` are the channels at the resolutions H, H/2, H/4, ... `blocks` is the number of residual
    blocks at each resolution, on the way down and again on the way up. `attention` lists the levels
    (0 is the finest) that get self-attention, and `embedding` is the width of the noise embedding.
    With `patch` = p the network sees p x p pixels as one with p^2 times the channels, which is
    faster by about p^2; the resolutions are then H/p, H/(2p), ... With `classes` the network is
    told the class of each image, and was taught images of no class too, whose label is `classes`.
    With `dimensions` 1 it is a network of signals, x (B, in_channels, length).
    `UNet(**net.config)` rebuilds the network, without its weights.
    """

    def __init__(
        self,
        in_channels: int = 1,
        widths: Sequence[int] = (16, 64),
        blocks: int = 1,
        attention: Sequence[int] = (),
        embedding: int = 128,
        dropout: float = 0.0,
        patch: int = 1,
        classes: int = 0,
        dimensions: int = 2,
    ):
        super().__init__()
        self.config: dict[str, Any] = dict(
            in_channels=in_channels,
            widths=list(widths),
            blocks=blocks,
            attention=list(attention),
            embedding=embedding,
            dropout=dropout,
            patch=patch,
            classes=classes,
            dimensions=dimensions,
        )

        def block(c_in: int, c_out: int, level: int, resample: str = "") -> Block:
            return Block(c_in, c_out, embedding, resample, level in attention, dropout, dimensions)

        self.embedding = NoiseEmbedding(embedding, classes)
        if dimensions not in CONV:
            raise UsageError(f"a U-Net has 1 or 2 dimensions, not {dimensions}")
        channels, conv = in_channels * patch**dimensions, CONV[dimensions]
        self.conv_in = conv(channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c = widths[0]
        for level, width in enumerate(widths):
            for i in range(blocks):
                self.down.append(block(c, width, level, "down" if level > 0 and i == 0 else ""))
                c = width
        self.middle = block(c, c, len(widths) - 1)
        for level, width in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                self.up.append(block(c, width, level, "up"))
            self.up.extend(block(2 * width, width, level) for _ in range(blocks))
            c = width
        self.norm_out = group_norm(c)
        self.conv_out = zero_init(conv(c, channels, 3, padding=1))
        if dimensions == 2:  # on a CPU this layout makes the convolutions 1.5 to 4 times as fast
            self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Return F(x, c_noise, label), (B, in_channels, H, W); label (B,), 0 to `classes`.

        Raises UsageError for labels that the network does not know, and if it needs some.
        """
        row = None
        if (classes := self.config["classes"]) == 0:
            if label is not None:
                raise UsageError("this network knows no classes: call it without a label")
        elif label is None:
            raise UsageError(
                f"this network draws images of a class: give each a label, 0 to {classes - 1}, or "
                f"{classes} for no class"
            )
        elif len(c_noise) == 1:  # all classes' embeddings, so that a sample's depends on no batch
            row, label = label, torch.arange(classes + 1, device=x.device)
        emb = self.embedding(c_noise, label)
        x, skips = self.conv_in(self._patches(x)), []
        for block in self.down:
            skips.append(x := block(x, emb, row))
        x = self.middle(x, emb, row)
        for block in self.up:
            x = block(x if block.resample else torch.cat([x, skips.pop()], dim=1), emb, row)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return self._pixels(x)

    def _patches(self, x: Tensor) -> Tensor:
        p = self.config["patch"]
        if x.ndim == 4:
            return F.pixel_unshuffle(x, p)
        return x.unflatten(2, (-1, p)).transpose(2, 3).flatten(1, 2)

    def _pixels(self, x: Tensor) -> Tensor:
        p = self.config["patch"]
        if x.ndim == 4:
            return F.pixel_shuffle(x, p)
        return x.unflatten(1, (-1, p)).transpose(2, 3).flatten(2, 3)


def precondition(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigma: Tensor | float,
    sigma_data: float,
) -> Tensor:
    """Return D = c_skip x + c_out F(c_in x, c_noise) with F = `network`, like x.

    This is EDM's preconditioning (Karras et al. 2022, Table 1, column "Ours"). x (B, ...) is
    image + sigma * noise, and sigma is a number, a 0-d tensor or (B,), in the units of x. The
    network gets c_noise (B,), or (1,) if the batch has one sigma, and may compute in any dtype.
    """
    if isinstance(sigma, torch.Tensor) and sigma.ndim == 1 and sigma.stride(0) == 0:
        sigma = sigma[0]  # a scalar that was expanded to the batch
    shape = (-1, *[1] * (x.ndim - 1))
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(shape)
    total = (sigma**2 + sigma_data**2).sqrt()
    c_skip, c_out = sigma_data**2 / total**2, sigma * sigma_data / total
    c_in, c_noise = 1 / total, sigma.flatten().log() / 4
    answer = network(c_in * x, c_noise)
    return c_skip * x + c_out * answer.to(x.dtype)


class SmallDenoiser(nn.Module):
    """The denoiser D(x, sigma) of the bundled models: a `UNet` inside EDM's `precondition`.

    x and sigma are those of `precondition`, `sigma_data` is the standard deviation of the data, and
    `unet` are the arguments of `UNet`. The U-Net runs in its own dtype, and the scalings and the
    skip connection in the dtype of x. One sigma for the whole batch is embedded once, which is
    faster and makes an image independent of its neighbours in the batch. With `classes` in `unet`,
    `label` (B,) are the images' classes.
    """

    config: dict[str, Any]

    def __init__(self, sigma_data: float, **unet: Any):
        super().__init__()
        self.sigma_data = float(sigma_data)
        self.unet = UNet(**unet)
        self.config = dict(sigma_data=self.sigma_data, **self.unet.config)

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        """Return the denoised images in the shape and dtype of x."""
        dtype = self.unet.conv_in.weight.dtype

        def network(x: Tensor, c_noise: Tensor) -> Tensor:
            scaled = x.to(dtype)
            if len(x) == 1:  # a CPU convolves a single image in another order, and rounds otherwise
                scaled = scaled.expand(2, *x.shape[1:])
            labels = None if label is None else label.expand(len(scaled))
            return self.unet(scaled, c_noise.to(dtype), labels)[: len(x)]

        return precondition(network, x, sigma, self.sigma_data)
