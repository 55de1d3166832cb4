"""The networks behind the embedded models: the only place that knows an architecture."""

from .classifier import Classifier
from .io import load_network, read_metadata, save_network
from .latent import LatentModel, load_imagenet, load_lsun, load_stable_diffusion
from .training import (
    Record,
    digits_data,
    held_out_split,
    train_classifier,
    train_denoiser,
)
from .unet import EDMPrecond, UNet

__all__ = [
    "Classifier", "EDMPrecond", "LatentModel", "Record", "UNet", "digits_data", "held_out_split",
    "load_imagenet", "load_lsun", "load_network", "load_stable_diffusion", "read_metadata",
    "save_network", "train_classifier", "train_denoiser",
]  # fmt: skip
