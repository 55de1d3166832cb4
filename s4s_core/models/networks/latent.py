"""Latent diffusion: the U-Nets, decoders and conditions of three published models.

The checkpoints are the authors' own; the networks are those of diffusers and transformers, with
the authors' names translated. Architectures: Rombach et al. 2022, Tables 12 to 15, and the
configurations published beside each checkpoint.
"""

import csv
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UsageError, optional_import, reason, require_file
from ...teacher import SEEDS_PER_SET
from .checkpoint import averaged, fill, fill_decoder, fill_unet, open_checkpoint, under

TRAINING = "annotations/captions_train2014.json"  # in annotations_trainval2014.zip, of 66 MB
LARGEST_TEXT = 2**28  # bytes


@dataclass(frozen=True)
class LatentModel:
    """The functions that a Setup needs of a latent diffusion model; its latents are x (B, C, H, W).

    network    (x, t (B,) in (0, 1], condition if there is one) -> eps, like x
    decode     x -> images (B, 3, H', W') in about [-1, 1], in the dtype of x; differentiable
    condition  seeds -> (B, length, width), the embeddings of the samples' classes or captions;
               None if the model is unconditional
    null       (1, length, width), the embedding of no class or of the empty caption, which
               guidance needs; None if the model is unconditional
    """

    network: Callable[..., Tensor]
    decode: Callable[[Tensor], Tensor]
    condition: Callable[[Sequence[int]], Tensor] | None = None
    null: Tensor | None = None


EXTRA = ("diffusers transformers", "latent diffusion")

LSUN: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
    "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    "attention_head_dim": 32,
}
IMAGENET: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (192, 384, 576, 960),
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    "attention_head_dim": 1,  # UNet2DConditionModel calls the number of heads so
    "cross_attention_dim": 512,
}
STABLE_DIFFUSION: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "attention_head_dim": 8,  # heads, as above
    "cross_attention_dim": 768,
}
VQ_F4: dict[str, Any] = {
    "block_out_channels": (128, 256, 512),
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
}
KL_F8: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4}
CLIP: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
IMAGENET_CLASSES = 1000  # the embedding that follows these is that of no class
KL_SCALE = 0.18215  # the latents' standard deviation is 1 / KL_SCALE (Rombach et al. 2022, App. G)


def load_lsun(
    path: str | Path,
    first_stage: str | Path,
    device: torch.device | str = "cpu",
    raw: bool = False,
) -> LatentModel:
    """Load the model of LSUN-Bedroom at 256x256, x (B, 3, 64, 64), schedule VPDiscrete.ldm().

    `path` is lsun_bedrooms.zip and `first_stage` is vq-f4.zip, or the model.ckpt in either. The
    U-Net has the averages of its weights over training, or with `raw` the weights themselves.
    Raises UsageError for any other file, and if averages are missing.
    """
    with optional_import(*EXTRA):
        from diffusers import UNet2DModel
    with open_checkpoint(path) as weights:
        last = under("model.diffusion_model.", weights)
        chosen = last if raw else averaged(weights, path, required=True)
        unet = fill_unet(UNet2DModel(**LSUN), chosen, path)
    with open_checkpoint(first_stage) as weights:
        decoder = _decoder("VQModel", VQ_F4, weights, first_stage)
    return LatentModel(_network(unet.to(device)), _decode(decoder.to(device)))


def load_imagenet(path: str | Path, device: torch.device | str = "cpu") -> LatentModel:
    """Load the class-conditional model of ImageNet at 256x256, x (B, 3, 64, 64).

    Its schedule is VPDiscrete.ldm(). `path` is the model.ckpt of cin256-v2. The seeds 1000 k to
    1000 k + 999 hold every class once. Raises UsageError for any other file.
    """
    with optional_import(*EXTRA):
        from diffusers import UNet2DConditionModel
    with open_checkpoint(path) as weights:
        unet: Any = UNet2DConditionModel(**IMAGENET)
        unet = fill_unet(unet, averaged(weights, path, required=False), path).to(device)
        decoder = _decoder("VQModel", VQ_F4, under("first_stage_model.", weights), path)
        embedding = nn.Embedding(IMAGENET_CLASSES + 1, IMAGENET["cross_attention_dim"])
        table = under("cond_stage_model.embedding.", weights)
        embedding = fill(embedding, table, lambda name: name, path).to(device)

    def condition(seeds: Sequence[int]) -> Tensor:
        # 617 shares no factor with 1000, and spreads a few seeds over all classes.
        labels = torch.tensor([617 * seed % IMAGENET_CLASSES for seed in seeds], device=device)
        return embedding(labels)[:, None]

    null = embedding.weight[None, -1:]
    return LatentModel(_network(unet), _decode(decoder.to(device)), condition, null)


def load_stable_diffusion(
    path: str | Path,
    vocabulary: str | Path,
    merges: str | Path,
    captions: str | Path,
    others: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> LatentModel:
    """Load Stable Diffusion v1 at 512x512, x (B, 4, 64, 64), schedule VPDiscrete().

    `path` is sd-v1-4.ckpt, `vocabulary` and `merges` are the tokenizer's files (vocab.json and
    merges.txt of CLIP ViT-L/14), and `captions` and `others` are files for `read_captions`.
    Seed n has the caption in line n; after the last caption the first one follows again. Where
    there are `others`, the seeds of learning, from SEEDS_PER_SET on, have those in place of them
    that are not among `captions`. Raises UsageError for any other file.
    """
    with optional_import(*EXTRA):
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel
    judged, tokenize = read_captions(captions), _tokenizer(vocabulary, merges)
    taught = _apart(others, judged, captions) if others else judged
    with open_checkpoint(path) as weights:
        unet: Any = UNet2DConditionModel(**STABLE_DIFFUSION)
        unet = fill_unet(unet, averaged(weights, path, required=False), path).to(device)
        decoder = _decoder("AutoencoderKL", KL_F8, under("first_stage_model.", weights), path)
        table = under("cond_stage_model.transformer.text_model.", weights)
        table.pop("embeddings.position_ids", None)  # 0, 1, .., 76
        text: Any = CLIPTextModel(CLIPTextConfig(**CLIP))
        text = fill(text, table, lambda name: name.removeprefix("text_model."), path).to(device)

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        return text(tokenize(texts).to(device)).last_hidden_state

    def condition(seeds: Sequence[int]) -> Tensor:
        files = [taught if seed >= SEEDS_PER_SET else judged for seed in seeds]
        return encode([lines[seed % len(lines)] for lines, seed in zip(files, seeds, strict=True)])

    decode = _decode(decoder.to(device), KL_SCALE)
    return LatentModel(_network(unet), decode, condition, encode([""]))


def _network(unet: Any) -> Callable[..., Tensor]:
    """The function eps(x, t[, condition]); the U-Net gets the time 1000 t - 1, not rounded."""

    def predict(x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        return unet(x.to(unet.dtype), 1000 * t - 1, *condition).sample.to(x.dtype)

    return predict


def _decode(vae: Any, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    """The function that turns latents, `scale` times those of the autoencoder, into images."""
    # A VQ model quantises first, and passes the gradient on as if it did not.
    return lambda x: vae.decode(x.to(vae.dtype) / scale).sample.to(x.dtype)


def read_captions(path: str | Path) -> list[str]:
    """Return the lines of a text file, or the column `text` of a .csv, without empty ones.

    Of a .zip, which must be the archive of MS-COCO's annotations, return those of its training
    images. Raises UsageError for a file that has none or cannot be read.
    """
    require_file(path)
    try:
        if Path(path).suffix == ".zip":
            lines = _annotated(path)
        elif Path(path).suffix == ".csv":
            # A caption that is missing is left out, as an empty line is.
            lines = _column(path, "text")
        else:
            lines = _lines(path)
        if "\0" in "".join(lines) or "".join(lines[:1]).lstrip().startswith(("<", "{")):
            raise ValueError("it is no text, a web page or JSON")
    except Exception as error:  # csv, json, zipfile and zlib each have their own
        raise UsageError(
            f"{path} is no readable file of captions ({reason(path, error)})"
        ) from None
    lines = [s for line in lines if (s := " ".join(line.split()))]
    if not lines:
        raise UsageError(f"{path} has no captions: give a text file with one in each line")
    return lines


def read_image_numbers(path: str | Path) -> list[int]:
    """Return the column `image_id` of a .csv of captions: the images that they describe, each once.

    Raises UsageError for a file that has none or cannot be read.
    """
    require_file(path)
    try:
        numbers = [int(text) for text in _column(path, "image_id") if text]
        if not numbers or min(numbers) < 0:
            raise ValueError("there are none, or some are below zero")
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(
            f"{path} does not say in a column image_id which images its captions describe "
            f"({reason(path, error)})"
        ) from None
    return list(dict.fromkeys(numbers))


def _lines(path: str | Path) -> list[str]:
    """The lines of a text, cut not at the separators of Unicode, as splitlines does."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [*file]


def _column(path: str | Path, name: str) -> list[str]:
    """One column of a .csv, empty where a row ends before it."""
    names, *rows = csv.reader(_lines(path), strict=True)
    if names.count(name) != 1 or any(len(row) > len(names) for row in rows):
        raise ValueError(f"one column is called {name}, and what has commas is in quotes")
    return [dict(zip(names, row, strict=False)).get(name, "") for row in rows]


def _annotated(path: str | Path) -> list[str]:
    """The captions of MS-COCO's training images, from the archive of its annotations."""
    with zipfile.ZipFile(path) as archive:
        if (size := archive.getinfo(TRAINING).file_size) > LARGEST_TEXT:
            raise ValueError(f"{TRAINING} would take {size} bytes, more than {LARGEST_TEXT}")
        found = json.loads(archive.read(TRAINING))
    return [str(entry["caption"]) for entry in found["annotations"]]


def _apart(others: str | Path, judged: list[str], captions: str | Path) -> list[str]:
    """Those of `others` that are not `judged`, whatever their case and end: to learn from."""
    said = {_said(line) for line in judged}
    if not (found := [line for line in read_captions(others) if _said(line) not in said]):
        raise UsageError(
            f"every caption of {others} stands in {captions}, too: give others to learn from"
        )
    return found


def _said(caption: str) -> str:
    return caption.casefold().rstrip(" .")


def _tokenizer(vocabulary: str | Path, merges: str | Path) -> Callable[[list[str]], Tensor]:
    """The function texts -> tokens (B, length), cut or padded to the text encoder's length."""
    with optional_import(*EXTRA):
        from transformers import CLIPTokenizer
    for path in (vocabulary, merges):
        require_file(path)
    try:
        tokenizer = CLIPTokenizer(str(vocabulary), str(merges))
        valid = len(tokenizer) == CLIP["vocab_size"]
    except Exception:  # whatever it makes of a missing or foreign file
        valid = False
    if not valid:
        raise UsageError(
            f"{vocabulary} and {merges} are not the {CLIP['vocab_size']} tokens of CLIP ViT-L/14: "
            "take its vocab.json and merges.txt"
        )
    length = CLIP["max_position_embeddings"]
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
    return lambda texts: tokenizer(texts, return_tensors="pt", **options).input_ids


def _decoder(
    name: str, config: dict[str, Any], weights: dict[str, Tensor], path: str | Path
) -> Any:
    """The autoencoder of diffusers' class `name`, for decoding only."""
    with optional_import(*EXTRA):
        import diffusers
    levels = len(config["block_out_channels"])
    vae = getattr(diffusers, name)(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=2,
        **config,
    )
    return fill_decoder(vae, weights, path)
