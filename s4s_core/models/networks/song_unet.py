"""The U-Nets of EDM's checkpoints, DDPM++ and NCSN++, under the checkpoints' own parameter names.

Both come from Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential
Equations", and are used as in Karras et al. 2022 (EDM), App. F. The package has two DDPM++ U-Nets:
this one has NVIDIA's exact blocks and resampling filters, which NVIDIA's weights need, whereas the
one in unet.py is small and laid out for a CPU. A layer computes in the dtype of its input, so
activations may be float16 while the weights stay float32 in memory.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError, choose
from .unet import precondition


def _weights(
    layer: nn.Linear | nn.Conv2d | nn.GroupNorm, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer, in the dtype of x."""
    bias = layer.bias
    return layer.weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b, (..., out_features)."""
        return F.linear(x, *_weights(self, x))


class GroupNorm(nn.GroupNorm):
    """A group normalisation of at most 32 groups, each of at least 4 channels."""

    def __init__(self, channels: int):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, channels, ...) normalised."""
        return F.group_norm(x, self.num_groups, *_weights(self, x), self.eps)


def low_pass(taps: Sequence[float]) -> Tensor:
    """Return the separable filter (1, 1, k, k) with these k taps, such as 1 3 3 1; its sum is 1."""
    row = torch.tensor(taps, dtype=torch.float32, device="cpu")  # see NoiseEmbedding
    return torch.outer(row, row)[None, None] / row.sum() ** 2


def resample(x: Tensor, kernel: Tensor, direction: str, padding: int) -> Tensor:
    """Return x (B, C, H, W), filtered by `kernel`, with H and W halved ("down") or doubled ("up").

    The kernel is (1, 1, k, k), and the low-pass filter of the resampling.
    """
    channels = x.shape[1]
    kernel = kernel.to(x.dtype).expand(channels, -1, -1, -1)
    if direction == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)


class Resample(nn.Module):
    """A layer that halves or doubles the resolution; see `resample` and `low_pass`."""

    resample_filter: Tensor

    def __init__(self, direction: str, taps: Sequence[float]):
        super().__init__()
        self.direction, self.padding = direction, (len(taps) - 1) // 2
        self.register_buffer("resample_filter", low_pass(taps))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, C, H, W) at half or twice its resolution."""
        return resample(x, self.resample_filter, self.direction, self.padding)


class Conv2d(nn.Conv2d):
    """A convolution of the resampled image; with `late` its answer is resampled instead.

    `direction` is "", "down" or "up". `late` pads for both filters at once, as the residual encoder
    of NCSN++ does.
    """

    resample_filter: Tensor  # None without a direction, and then not used

    def __init__(self, c_in: int, c_out: int, kernel: int, direction: str = "",
                 taps: Sequence[float] = (1,), late: bool = False):  # fmt: skip
        margin = (len(taps) - 1) // 2
        super().__init__(c_in, c_out, kernel, padding=kernel // 2 + late * margin)
        self.direction, self.late, self.margin = direction, late, margin
        self.register_buffer("resample_filter", low_pass(taps) if direction else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer, (B, c_out, H', W'), for x (B, c_in, H, W)."""
        if self.direction and not self.late:
            x = resample(x, self.resample_filter, self.direction, self.margin)
        weight, bias = _weights(self, x)
        x = F.conv2d(x, weight, bias, padding=self.padding)
        return resample(x, self.resample_filter, self.direction, 0) if self.late else x


class Block(nn.Module):
    """One residual block: x (B, C_in, H, W), emb (B or 1, E) -> (B, C_out, H', W').

    `direction` is "", "down" or "up" and acts before the first convolution; self-attention over
    the pixels, with one head, may follow. Sums of two branches are scaled by sqrt(1/2).
    """

    def __init__(self, c_in: int, c_out: int, c_emb: int, direction: str = "",
                 taps: Sequence[float] = (1, 1), attention: bool = False,
                 dropout: float = 0.0):  # fmt: skip
        super().__init__()
        self.dropout = dropout
        self.norm0, self.conv0 = GroupNorm(c_in), Conv2d(c_in, c_out, 3, direction, taps)
        self.affine = Linear(c_emb, c_out)
        self.norm1, self.conv1 = GroupNorm(c_out), Conv2d(c_out, c_out, 3)
        projects = direction or c_in != c_out
        self.skip = Conv2d(c_in, c_out, 1, direction, taps) if projects else nn.Identity()
        if attention:
            self.norm2, self.qkv = GroupNorm(c_out), Conv2d(c_out, 3 * c_out, 1)
            self.proj = Conv2d(c_out, c_out, 1)
        self.attention = attention

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return the block's answer, (B, C_out, H', W')."""
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(emb)[:, :, None, None].to(x.dtype)
        h = F.dropout(F.silu(self.norm1(h)), self.dropout, self.training)
        x = (self.skip(x) + self.conv1(h)) * math.sqrt(0.5)
        if not self.attention:
            return x
        # Channel 3 c + i of qkv is channel c of q, k or v.
        qkv = self.qkv(self.norm2(x)).unflatten(1, (-1, 3)).flatten(3).permute(2, 0, 3, 1)
        a = F.scaled_dot_product_attention(*qkv.contiguous())  # (B, HW, C)
        return (x + self.proj(a.transpose(1, 2).reshape(x.shape))) * math.sqrt(0.5)


class PositionalEmbedding(nn.Module):
    """The embedding c_noise (B,) -> (B, channels) of DDPM++.

    It holds sines and then cosines, at frequencies from 1 to 1e-4.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, c_noise: Tensor) -> Tensor:
        """Return the embeddings (B, channels) of c_noise (B,)."""
        i = torch.arange(self.channels // 2, dtype=torch.float32, device=c_noise.device)
        return _waves(c_noise, 1e-4 ** (i / (len(i) - 1)))


class FourierEmbedding(nn.Module):
    """The embedding c_noise (B,) -> (B, channels) of NCSN++.

    It holds sines and then cosines, at random frequencies, which are saved with the weights.
    """

    freqs: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2, device="cpu"))

    def forward(self, c_noise: Tensor) -> Tensor:
        """Return the embeddings (B, channels) of c_noise (B,)."""
        return _waves(c_noise, 2 * math.pi * self.freqs)


def _waves(c_noise: Tensor, frequencies: Tensor) -> Tensor:
    angle = c_noise[:, None] * frequencies.to(c_noise.dtype)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


EMBEDDINGS = {"positional": PositionalEmbedding, "fourier": FourierEmbedding}
ENCODERS = ("standard", "skip", "residual")
DECODERS = ("standard", "skip")


class SongUNet(nn.Module):
    """The network F(x, c_noise) of EDM's checkpoints, which is DDPM++ or NCSN++.

    x (B, in_channels, H, W), c_noise (B,) or (1,) -> (B, out_channels, H, W). The arguments are
    those that a checkpoint records. Level i has model_channels * channel_mult[i] channels at
    resolution img_resolution / 2^i. It has num_blocks residual blocks on the way down and one more
    on the way up. Self-attention is at `attn_resolutions` (on the way up in the last block only)
    and in the middle. The embedding of the noise has channel_mult_noise * model_channels numbers:
    DDPM++ has the positional one, and NCSN++ the Fourier one. NCSN++ also has a residual encoder,
    in which the image itself, resampled by `resample_filter`, enters at every level. A skip encoder
    or decoder (Karras et al. 2020, StyleGAN2) does so without further layers. An x of another
    resolution is allowed if every level can halve it.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        super().__init__()
        choose("encoder_type", encoder_type, ENCODERS)
        choose("decoder_type", decoder_type, DECODERS)
        # What a file claims must not keep a computer busy.
        if not 1 <= num_blocks * len(channel_mult) <= 100:
            raise UsageError(
                f"a U-Net has 1 to 100 residual blocks on the way down, not {num_blocks} at each "
                f"of {len(channel_mult)} levels; change num_blocks or channel_mult"
            )
        c_emb, c_noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        if not (1 <= c_emb <= 2**16 and 4 <= c_noise <= 2**16):
            raise UsageError(
                f"the noise embedding has 4 to 65536 numbers, not {c_noise}, and its layers at "
                f"most as many, not {c_emb}; change model_channels or its multipliers"
            )
        if img_resolution >> (len(channel_mult) - 1) < 1:
            raise UsageError(
                f"{len(channel_mult)} levels of channel_mult halve {img_resolution} pixels to "
                "nothing; use fewer"
            )
        if not 1 <= len(resample_filter) <= 16:
            raise UsageError(f"resample_filter has 1 to 16 taps, not {len(resample_filter)}")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, not {dropout}")
        self.label_dim, self.label_dropout = label_dim, label_dropout
        levels = [(img_resolution >> i, model_channels * m) for i, m in enumerate(channel_mult)]

        def block(c_in: int, c_out: int, direction: str = "", attention: bool = False) -> Block:
            return Block(c_in, c_out, c_emb, direction, resample_filter, attention, dropout)

        self.map_noise = choose("embedding_type", embedding_type, EMBEDDINGS)(c_noise)
        self.map_label = Linear(label_dim, c_noise) if label_dim else None
        self.map_augment = Linear(augment_dim, c_noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(c_noise, c_emb), Linear(c_emb, c_emb)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips: list[int] = []
        c, c_image = model_channels, in_channels
        for i, (size, width) in enumerate(levels):
            name = f"{size}x{size}"
            if i == 0:
                self.enc[f"{name}_conv"] = Conv2d(in_channels, c, 3)
            else:
                self.enc[f"{name}_down"] = block(c, c, "down")
            skips.append(c)
            if i > 0 and encoder_type == "skip":
                self.enc[f"{name}_aux_down"] = Resample("down", resample_filter)
                self.enc[f"{name}_aux_skip"] = Conv2d(in_channels, c, 1)
            elif i > 0 and encoder_type == "residual":
                convolution = Conv2d(c_image, c, 3, "down", resample_filter, late=True)
                self.enc[f"{name}_aux_residual"], c_image = convolution, c
            for j in range(num_blocks):
                self.enc[f"{name}_block{j}"] = block(c, width, attention=size in attn_resolutions)
                skips.append(c := width)

        for i, (size, width) in reversed(list(enumerate(levels))):
            name, deepest = f"{size}x{size}", i == len(levels) - 1
            if deepest:
                self.dec[f"{name}_in0"] = block(c, c, attention=True)
                self.dec[f"{name}_in1"] = block(c, c)
            else:
                self.dec[f"{name}_up"] = block(c, c, "up")
            for j in range(num_blocks + 1):
                attention = j == num_blocks and size in attn_resolutions
                self.dec[f"{name}_block{j}"] = block(c + skips.pop(), width, attention=attention)
                c = width
            if decoder_type == "skip" and not deepest:
                self.dec[f"{name}_aux_up"] = Resample("up", resample_filter)
            if decoder_type == "skip" or i == 0:
                self.dec[f"{name}_aux_norm"] = GroupNorm(c)
                self.dec[f"{name}_aux_conv"] = Conv2d(c, out_channels, 3)

    def _embedding(
        self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """The embedding of noise level, class and augmentation that all blocks get, (B or 1, E)."""
        emb = self.map_noise(c_noise)
        if self.map_label is not None:
            labels = cast(Tensor, class_labels)  # a network of classes cannot do without
            if self.training and self.label_dropout:
                keep = torch.rand(len(labels), 1, device=labels.device)
                labels = labels * (keep >= self.label_dropout)
            emb = emb + self.map_label(labels.to(emb.dtype) * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None,
                augment_labels: Tensor | None = None) -> Tensor:  # fmt: skip
        """Return F(x, c_noise), (B, out_channels, H, W).

        class_labels (B or 1, label_dim) and augment_labels (B, augment_dim) are as in the data set.
        """
        emb = self._embedding(c_noise, class_labels, augment_labels)
        image = x
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                image = layer(image)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + layer(image)
            elif name.endswith("aux_residual"):
                x = skips[-1] = image = (x + layer(image)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        answer: Tensor | float = 0.0  # a tensor from the first "aux_conv" on
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                answer = layer(answer)
            elif name.endswith("aux_norm"):
                normed = F.silu(layer(x))
            elif name.endswith("aux_conv"):
                answer = answer + layer(normed)
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return cast(Tensor, answer)


MODELS = {"SongUNet": SongUNet}


class EDMPrecond(nn.Module):
    """The denoiser D(x, sigma) of an EDM checkpoint: a U-Net `model` inside EDM's preconditioning.

    The class has NVIDIA's own name. The arguments are those that a checkpoint records, and `model`
    are those of the U-Net; `EDMPrecond(**net.config)` rebuilds the network, without its weights.
    With `use_fp16` the U-Net computes in float16 on a GPU. sigma_min and sigma_max are the noise
    levels between which the checkpoint is meant to be used; they limit nothing here. Raises
    UsageError for arguments of an unknown kind.
    """

    model: SongUNet

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model: Any,
    ):
        super().__init__()
        self.config: dict[str, Any] = dict(
            img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
            use_fp16=use_fp16, sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data,
            model_type=model_type, **model,
        )  # fmt: skip
        self.label_dim, self.use_fp16 = label_dim, bool(use_fp16)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.sigma_data = float(sigma_data)
        if not 0 < self.sigma_data < float("inf"):
            raise UsageError(f"sigma_data must be positive and finite, not {sigma_data}")
        build = choose("model_type", model_type, MODELS)
        self.model = build(img_resolution, img_channels, img_channels, label_dim, **model)

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None,
                augment_labels: Tensor | None = None) -> Tensor:  # fmt: skip
        """Return the denoised images in the shape and dtype of x.

        x (B, C, H, W) is image + sigma * noise, and sigma is a number, a 0-d tensor or (B,), in the
        units of x. class_labels are (B or 1, label_dim), or None for zeros. augment_labels are
        (B, augment_dim), or None for images that were not augmented.
        """
        if self.label_dim and class_labels is None:
            class_labels = x.new_zeros(1, self.label_dim)
        dtype = self.model.map_layer0.weight.dtype
        half = self.use_fp16 and x.device.type == "cuda"

        def network(x: Tensor, c_noise: Tensor) -> Tensor:
            x, c_noise = x.to(torch.float16 if half else dtype), c_noise.to(dtype)
            return self.model(x, c_noise, class_labels, augment_labels)

        return precondition(network, x, sigma, self.sigma_data)
