"""Checkpoints of latent diffusion (Rombach et al. 2022), read without running anything in them."""

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import UsageError, progress
from .pickles import read_torch, shown, told_of

Net = TypeVar("Net", bound=nn.Module)


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[dict[str, Tensor]]:
    """Yield the weights, by name, of a checkpoint or of the one .ckpt in a zip archive.

    The tensors are mapped from the file, so only those that are used take memory. Copy them before
    the `with` block ends. Raises UsageError for a file that is missing, damaged or no checkpoint,
    and for one that names anything but weights.
    """
    path = Path(path)
    with ExitStack() as stack:
        with told_of(path):
            content = stack.enter_context(_content(path))
        if isinstance(content, dict):
            content = content.get("state_dict", content)
        found = content.items() if isinstance(content, dict) else ()
        weights = {k: v for k, v in found if isinstance(k, str) and isinstance(v, Tensor)}
        if not weights:
            raise UsageError(f"{path} holds no weights; take the file that the authors published")
        yield weights


@contextmanager
def _content(path: Path) -> Iterator[Any]:
    """What torch.save wrote to `path`, or to the .ckpt in an archive, which is unpacked beside it.

    Processes that load an archive at the same time share one copy, which the first that is done
    removes. A process that was killed leaves it, and the next one uses or replaces it.
    """
    from filelock import FileLock

    member = _inside(path)
    if member is None:
        yield read_torch(path)
        return
    copy, lock = (path.with_name(f".{path.name}.{kind}") for kind in ("unpacked", "lock"))
    try:
        with FileLock(lock):
            _unpack(path, member, copy)
            content = read_torch(copy)
        yield content
    finally:
        with FileLock(lock), suppress(PermissionError):  # Windows keeps what is still mapped
            copy.unlink(missing_ok=True)


def _inside(path: Path) -> zipfile.ZipInfo | None:
    """The .ckpt in an archive, or None for a file that is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [i for i in archive.infolist() if i.filename.endswith(".ckpt")]
    except zipfile.BadZipFile:  # checkpoints were no archives before torch 1.6
        return None
    if len(inside) > 1:
        names = ", ".join(i.filename for i in inside)
        raise UsageError(
            f"it holds {len(inside)} checkpoints, {shown(names)}: unpack the right one"
        )
    return inside[0] if inside else None


def _unpack(path: Path, member: zipfile.ZipInfo, copy: Path) -> None:
    """Write a member of the archive `path` to the file `copy`, unless it is there already."""
    archived = path.stat()
    whole = (member.file_size, archived.st_mtime_ns)
    if copy.exists() and (copy.stat().st_size, copy.stat().st_mtime_ns) == whole:
        return
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UsageError(f"its checkpoint is compressed by method {member.compress_type}")
    if member.file_size > 10 * archived.st_size:  # weights hardly shrink
        raise UsageError("its checkpoint would be more than ten times as large as the archive")
    copy.unlink(missing_ok=True)
    shown_as: dict[str, Any] = {"total": member.file_size, "unit": "B", "unit_scale": True}
    with (
        zipfile.ZipFile(path) as archive,
        archive.open(member) as source,
        open(copy, "xb") as out,
        progress(desc=f"unpacking {path.name}", **shown_as) as bar,
    ):
        while chunk := source.read(1 << 24):
            out.write(chunk)
            bar.update(len(chunk))
    os.utime(copy, ns=(archived.st_mtime_ns,) * 2)  # what tells a whole copy from a part of one


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights whose names begin with `prefix`, under the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def averaged(weights: dict[str, Tensor], path: str | Path, required: bool) -> dict[str, Tensor]:
    """Return the U-Net's weights, averaged over training (EMA) if the file has the average.

    A file with only one set of weights may hold the average under the weights' own names;
    `required` says that this file does not, and must have both sets. Raises UsageError if the
    average of a weight is missing.
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


def fill_unet(unet: Any, weights: dict[str, Tensor], path: str | Path) -> Any:
    """Copy the weights of the authors' U-Net into diffusers' U-Net, and return that; see `fill`."""
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


def fill_decoder(vae: Any, weights: dict[str, Tensor], path: str | Path) -> Any:
    """Copy the weights of the authors' decoder into diffusers' autoencoder, and return that.

    Its encoder is removed. See `fill` for the errors.
    """
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
    """The function that translates a weight's name: first its block, then the layer in the block.

    `blocks` and `layers` map diffusers' names to the authors' names.
    """

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


def fill(
    net: Net, weights: dict[str, Tensor], original: Callable[[str], str], path: str | Path
) -> Net:
    """Copy weights[original(name)] into each weight `name` of `net`, and return `net`, frozen.

    Raises UsageError, which names the file `path`, unless both sides have the same weights in the
    same shapes, all finite.
    """
    left: set[str] = set(weights)
    wrong: list[str] = []
    with torch.no_grad():
        for name, target in net.state_dict().items():
            source = original(name)
            left.discard(source)
            value = weights.get(source, torch.empty(0))
            if ".qkv." in source and value.shape[:1] == (3 * len(target),):
                # One layer for q, k and v, in which each head has its three in a row.
                config: Any = net.config
                split = value.unflatten(0, (-1, 3, config.attention_head_dim))
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
