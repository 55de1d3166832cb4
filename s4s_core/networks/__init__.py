"""The networks behind the embedded models: the only place that knows an architecture."""

from .classifier import Classifier
from .io import load_network, read_metadata, save_network
from .training import (
    Record,
    digits_data,
    held_out_split,
    train_classifier,
    train_denoiser,
)
from .unet import EDMPrecond, UNet

__all__ = [
    "Classifier", "EDMPrecond", "Record", "UNet", "digits_data", "held_out_split", "load_network",
    "read_metadata", "save_network", "train_classifier", "train_denoiser",
]  # fmt: skip
