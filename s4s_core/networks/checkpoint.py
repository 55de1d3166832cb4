"""Checkpoints of latent diffusion (Rombach et al. 2022), read without running anything in them."""

import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base import UsageError, progress


class _Ignored:
    """Stands in for what a checkpoint keeps beside its weights: takes anything and does nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


# What the published checkpoints' pickles name that torch does not know; none of it is imported.
_BESIDE_WEIGHTS = [
    (_Ignored, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy.dtype"),
]


@contextmanager
def open_checkpoint(path) -> Iterator[dict[str, Tensor]]:
    """The weights by name of a checkpoint, or of the one .ckpt in a zip archive.

    They are mapped from the file, so that only what is used is read; copy it before leaving.
    Raises UsageError for a file that is missing, damaged, no checkpoint, or more than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}; check the path, or fetch it")
    with _unpacked(path) as file:
        try:
            with torch.serialization.safe_globals(_BESIDE_WEIGHTS):
                content = torch.load(
                    file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
                )
        except Exception as error:  # whatever torch makes of a foreign file
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if refused:
                raise UsageError(
                    f"{path} holds {refused[1]}, which is no weight: nothing in it was run and it "
                    "was not loaded; take the file that the model's authors published"
                ) from None
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"{path} is no whole checkpoint ({reason}); fetch it again") from None
        if isinstance(content, dict):
            content = content.get("state_dict", content)
        found = content.items() if isinstance(content, dict) else ()
        weights = {k: v for k, v in found if isinstance(k, str) and isinstance(v, Tensor)}
        if not weights:
            raise UsageError(f"{path} holds no weights; take the file that the authors published")
        yield weights


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """`path`, or if it is an archive with a .ckpt inside, that one, for the while beside it."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [i for i in archive.infolist() if i.filename.endswith(".ckpt")]
    except zipfile.BadZipFile:  # checkpoints were no archives before torch 1.6
        inside = []
    if not inside:
        yield path
        return
    if len(inside) > 1:
        names = ", ".join(i.filename for i in inside)
        raise UsageError(f"{path} holds more than one checkpoint ({names}): unpack the right one")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder, "model.ckpt")
        try:
            _unpack(path, inside[0], file)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UsageError(f"{path} is no whole archive ({error}); fetch it again") from None
        yield file


def _unpack(path: Path, member: zipfile.ZipInfo, to: Path) -> None:
    shown = {"total": member.file_size, "unit": "B", "unit_scale": True}
    with (
        zipfile.ZipFile(path) as archive,
        archive.open(member) as source,
        open(to, "wb") as out,
        progress(desc=f"unpacking {path.name}", **shown) as bar,
    ):
        while chunk := source.read(1 << 24):
            out.write(chunk)
            bar.update(len(chunk))


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose name begins with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def averaged(weights: dict[str, Tensor], path, required: bool) -> dict[str, Tensor]:
    """The U-Net's weights, as their running average (EMA) over training if the file has that too.

    A file with one set of weights may hold the average alone, under the weights' own names;
    `required` says that this one does not. Raises UsageError unless every weight has its average.
    """
    raw, ema = under("model.diffusion_model.", weights), under("model_ema.diffusion_model", weights)
    if not raw or not (ema or required):
        return raw
    names = {name: name.replace(".", "") for name in raw}
    missing = [name for name, key in names.items() if key not in ema]
    if missing:
        raise UsageError(
            f"{path} lacks the average (EMA) of {len(missing)} of the {len(raw)} weights of its "
            "U-Net; take the file that the model's authors published"
        )
    return {name: ema[key] for name, key in names.items()}


# --- Translation: diffusers' names on the left, the authors' on the right ----------------------


_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
_DECODER = {
    "decoder.mid_block.resnets.0": "decoder.mid.block_1",
    "decoder.mid_block.attentions.0": "decoder.mid.attn_1",
    "decoder.mid_block.resnets.1": "decoder.mid.block_2",
    "decoder.conv_norm_out": "decoder.norm_out",
}
_DECODER_LAYERS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def fill_unet(unet: nn.Module, weights: dict[str, Tensor], path) -> nn.Module:
    """Give diffusers' U-Net the weights of the authors' U-Net; see fill."""
    blocks, n = dict(_UNET), 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{n}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
            n += 1
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
        n += 1
    n = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{n}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
            n += 1
        last = 2 if hasattr(block, "attentions") else 1
        blocks[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{n - 1}.{last}"
    return fill(unet, weights, _renamer(blocks, _UNET_LAYERS), path)


def fill_decoder(vae: nn.Module, weights: dict[str, Tensor], path) -> nn.Module:
    """Give diffusers' autoencoder the weights of the authors' decoder, and drop its encoder."""
    vae.encoder = vae.quant_conv = None
    used = ("decoder.", "post_quant_conv.", "quantize.")
    weights = {k: v for k, v in weights.items() if k.startswith(used)}
    blocks, ups = dict(_DECODER), vae.decoder.up_blocks
    for i, block in enumerate(ups):
        there = f"decoder.up.{len(ups) - 1 - i}"  # counted from the finest
        blocks[f"decoder.up_blocks.{i}.upsamplers.0"] = f"{there}.upsample"
        for j in range(len(block.resnets)):
            blocks[f"decoder.up_blocks.{i}.resnets.{j}"] = f"{there}.block.{j}"
    return fill(vae, weights, _renamer(blocks, _DECODER_LAYERS), path)


def _renamer(blocks: dict[str, str], layers: dict[str, str]) -> Callable[[str], str]:
    """Translate the block that a name begins with, then the layer inside that block."""

    def swap(name: str, names: dict[str, str]) -> tuple[str, str]:
        for here, there in names.items():
            if name.startswith(f"{here}."):
                return f"{there}.", name.removeprefix(f"{here}.")
        return "", name

    def rename(name: str) -> str:
        block, rest = swap(name, blocks)
        layer, rest = swap(rest, layers)
        return block + layer + rest

    return rename


def fill(net: nn.Module, weights: dict[str, Tensor], original: Callable[[str], str], path):
    """Give each weight of `net` the one that original(its name) names; the same net, frozen.

    Raises UsageError unless both sides have the same weights, in the same shapes, all finite.
    """
    left, wrong = set(weights), []
    with torch.no_grad():
        for name, target in net.state_dict().items():
            source = original(name)
            left.discard(source)
            value = weights.get(source, torch.empty(0))
            if ".qkv." in source and value.shape[:1] == (3 * len(target),):
                # One layer for q, k and v, in which each head has its three in a row.
                split = value.unflatten(0, (-1, 3, net.config.attention_head_dim))
                value = split[:, "qkv".index(name.rsplit(".to_")[1][0])].flatten(0, 1)
            # What is a linear layer here may be a convolution of 1 x 1 pixels there.
            if value.shape[: target.ndim] == target.shape and value.numel() == target.numel():
                target.copy_(value.view_as(target))
            else:
                wrong.append(name)
    if wrong or left:
        raise UsageError(
            f"{path} is another model's: {len(wrong)} weights of {type(net).__name__} are missing "
            f"there or of another shape, and it has {len(left)} others (such as "
            f"{min(wrong or left)}); take the file that the model's authors published"
        )
    if not all(p.isfinite().all() for p in net.parameters()):
        raise UsageError(f"{path} has weights that are NaN or infinite; fetch it again")
    return net.eval().requires_grad_(False)
