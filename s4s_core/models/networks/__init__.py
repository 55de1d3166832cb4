"""The networks behind the embedded models: the only place that knows an architecture."""

from .classifier import Classifier
from .data import cifar10_data, digits_data, ecg_data, held_out_split, training_data, turned
from .edm import convert_edm, load_edm, read_persistent
from .io import load_network, read_metadata, save_network
from .latent import LatentModel, load_imagenet, load_lsun, load_stable_diffusion
from .song_unet import EDMPrecond, SongUNet
from .training import RECIPES, Record, train_classifier, train_denoiser
from .unet import SmallDenoiser, UNet

__all__ = [
    "Classifier", "EDMPrecond", "SmallDenoiser", "LatentModel", "RECIPES", "Record", "SongUNet",
    "UNet", "cifar10_data", "convert_edm", "digits_data", "ecg_data", "held_out_split", "load_edm",
    "load_imagenet", "load_lsun", "load_network", "load_stable_diffusion", "read_metadata",
    "read_persistent", "save_network", "train_classifier", "train_denoiser", "training_data",
    "turned",
]  # fmt: skip
