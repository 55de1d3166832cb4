"""Networks on disk: safetensors with the class name and its arguments as plain text.

A file holds numbers and strings only; loading one never executes anything from it.
"""

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from ..base import UsageError, write_atomically
from .classifier import Classifier
from .song_unet import EDMDenoiser
from .unet import EDMPrecond

CLASSES = {"EDMPrecond": EDMPrecond, "Classifier": Classifier, "EDMDenoiser": EDMDenoiser}


def save_network(path, net: nn.Module, dtype: torch.dtype = torch.float16, **metadata) -> None:
    """Save `net` (one of CLASSES), its weights as `dtype`; `metadata` is kept beside it, as text.

    Raises UsageError for any other class. An interrupted write leaves the old file as it was.
    """
    name = type(net).__name__
    if CLASSES.get(name) is not type(net):
        raise UsageError(f"cannot save a {name}; save one of: {', '.join(CLASSES)}")
    text = {"class": name, "config": json.dumps(net.config)}
    text |= {key: str(value) for key, value in metadata.items()}
    # Buffers are frequencies and filters: half precision would turn the phase of a Fourier feature.
    weights = {key for key, _ in net.named_parameters()}
    tensors = {
        k: v.detach().cpu().to(dtype if k in weights else v.dtype).contiguous()
        for k, v in net.state_dict().items()
    }
    write_atomically(path, safetensors.torch.save(tensors, text))


def read_metadata(path) -> dict[str, str]:
    """The text beside the weights: "class", "config" and whatever was given to save_network.

    Raises UsageError if the file is missing or no complete safetensors file.
    """
    if not Path(path).is_file():
        raise UsageError(f"there is no network file {path}; check the path, or train a network")
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UsageError(
            f"{path} is not a complete safetensors file ({error}); fetch or train it again"
        ) from None


def load_network(path) -> nn.Module:
    """The network saved at `path`: float32, on the CPU, in eval mode, its weights without gradient.

    Raises UsageError for a missing, damaged or foreign file.
    """
    metadata = read_metadata(path)
    name = metadata.get("class")
    if name not in CLASSES:
        raise UsageError(
            f"{path} holds a network of class {name!r}, not one of: {', '.join(CLASSES)}; "
            "use a file that save_network wrote"
        )
    return build(path, name, metadata.get("config", ""), safetensors.torch.load_file(path))


def build(path, name: str, config: str, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """`load_network` for what a file at `path` was found to hold; `config` is JSON."""
    tensors = {key: value.float() for key, value in tensors.items()}
    try:
        arguments = json.loads(config)
        with torch.device("meta"):  # sizes that the tensors do not have must cost no memory
            CLASSES[name](**arguments).load_state_dict(tensors, assign=True)
        net = CLASSES[name](**arguments)
        net.load_state_dict(tensors)
    except Exception as error:  # whatever a constructor makes of wrong arguments
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{path} does not describe a {name} ({reason}); fetch or train it again"
        ) from None
    if not all(value.isfinite().all() for value in tensors.values()):
        raise UsageError(f"{path} has weights that are NaN or infinite; fetch or train it again")
    return net.eval().requires_grad_(False)
