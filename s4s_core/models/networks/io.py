"""Networks on disk: safetensors files with the class name and its arguments as plain text.

A file holds numbers and strings only; loading one never executes anything from it.
"""

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...errors import UsageError, reason, require_file, write_atomically
from .classifier import Classifier
from .song_unet import EDMPrecond
from .unet import SmallDenoiser

CLASSES: dict[str, type[nn.Module]] = {
    "SmallDenoiser": SmallDenoiser,
    "Classifier": Classifier,
    "EDMPrecond": EDMPrecond,
}


def _class_name(name: str | None, config: str) -> str | None:
    """The present name of the class `name` of a file whose arguments are `config` (JSON).

    Older files call SmallDenoiser EDMPrecond, and EDMPrecond (NVIDIA's own name) EDMDenoiser. Only
    a SmallDenoiser has the argument `widths`, so a new file that holds an EDMPrecond, such as one
    of `convert_edm`, is not mistaken for an old one.
    """
    if name == "EDMPrecond" and '"widths"' in config:
        return "SmallDenoiser"
    return "EDMPrecond" if name == "EDMDenoiser" else name


def save_network(
    path: str | Path, net: nn.Module, dtype: torch.dtype = torch.float16, **metadata: Any
) -> None:
    """Save `net`, an instance of one of CLASSES, with its weights as `dtype`.

    `metadata` is kept in the file as text. An interrupted write leaves an old file as it was.
    Raises UsageError for any other class.
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


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the text in a network file: "class", "config" and the metadata of `save_network`.

    Raises UsageError if the file is missing or is not a complete safetensors file.
    """
    with _opened(path) as file:
        return file.metadata() or {}


def load_network(path: str | Path) -> nn.Module:
    """Load the network saved at `path`, and return it in float32, on the CPU and in eval mode.

    Its weights require no gradient. Raises UsageError for a missing, damaged or foreign file.
    """
    metadata = read_metadata(path)
    name = _class_name(metadata.get("class"), metadata.get("config", ""))
    if name is None or name not in CLASSES:
        raise UsageError(
            f"{path} holds a network of class {(name or 'none')[:80]}, not one of: "
            f"{', '.join(CLASSES)}; use a file that save_network wrote"
        )
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    return build(path, name, metadata.get("config", ""), tensors)


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """The safetensors file; UsageError for whatever keeps it from being read."""
    require_file(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except Exception as error:  # of safetensors, and of torch for a dtype that it does not have
        raise UsageError(
            f"{path} is not a complete safetensors file ({reason(path, error)}); fetch or train it "
            "again"
        ) from None


def build(path: str | Path, name: str, config: str, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Return the network of class `name`, arguments `config` (JSON) and weights `tensors`.

    It is as `load_network` returns it. Raises UsageError, which names the file `path` that they
    come from, if they do not fit together or a weight is not finite.
    """
    if any(value.is_complex() for value in tensors.values()):
        raise UsageError(f"{path} has complex weights, and a {name} has none; use another file")
    made, thread = itertools.count(1), threading.get_ident()

    def count(*_: object) -> None:
        if threading.get_ident() == thread and next(made) > len(tensors):
            raise ValueError("it has fewer weights")

    try:
        arguments = json.loads(config)
        # What the tensors do not have must cost no memory, and a billion layers no time.
        with torch.device("meta"), register_module_parameter_registration_hook(count):
            net = CLASSES[name](**arguments)
        for key, weight in net.state_dict().items():
            if key in tensors and tensors[key].is_floating_point() != weight.is_floating_point():
                raise ValueError(f"{key} is of {tensors[key].dtype}")
        tensors = {key: value.float() for key, value in tensors.items()}
        net.load_state_dict(tensors, assign=True)
        net = CLASSES[name](**arguments)
        net.load_state_dict(tensors)
    except Exception as error:  # whatever a constructor makes of wrong arguments
        raise UsageError(
            f"{path} does not describe a {name} ({reason(path, error)}); fetch or train it again"
        ) from None
    if not all(value.isfinite().all() for value in tensors.values()):
        raise UsageError(f"{path} has weights that are NaN or infinite; fetch or train it again")
    return net.eval().requires_grad_(False)
