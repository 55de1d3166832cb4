"""Read NVIDIA's pickled EDM checkpoints as data: nothing in the file is ever executed.

Such a file holds objects with a copy of their own source, which Python would import and run. Here
they become dicts, and the source is left out; see pickles.py. Weights lie in the pickle as streams
that `torch.save` wrote in its older format.
"""

import inspect
import io
import itertools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import UsageError
from .io import build, load_network, save_network
from .pickles import STORAGES, TENSORS, interpret, new_dict, of_type, read_older, shown, told_of
from .song_unet import EDMPrecond

MAX_DEPTH = 100  # levels of containers, of which a checkpoint has 25


def load_edm(path: str | Path, device: torch.device | str = "cpu") -> EDMPrecond:
    """Load the network of an EDM checkpoint (its "ema", the weights averaged over training).

    `path` is NVIDIA's .pkl, or a .safetensors that `convert_edm` made of it. The network is in
    float32 and in eval mode, and its weights require no gradient. Raises UsageError for a file that
    is missing or damaged, that is of another architecture, or that holds anything but data.
    """
    if Path(path).suffix == ".safetensors":
        net = load_network(path)
        if not isinstance(net, EDMPrecond):
            raise UsageError(
                f"{path} holds a {type(net).__name__}, no EDMPrecond; use what convert_edm made"
            )
        return net.to(device)
    ema: Any = read_persistent(path).get("ema")
    name = ema.get("class_name") if isinstance(ema, dict) else None
    if name != "EDMPrecond":
        raise UsageError(
            f"{path} has a network of class {shown(name)} as its ema, not EDMPrecond; "
            "use a checkpoint edm-*.pkl"
        )
    try:
        config, tensors = _arguments(ema), dict(_tensors(ema, "", set()))
    except UsageError as error:
        raise UsageError(f"{path} is no EDM checkpoint: {error}; fetch it again") from None
    if sum(tensor.nbytes for tensor in tensors.values()) > Path(path).stat().st_size:
        raise UsageError(f"{path} describes more weights than it holds; fetch it again")
    return cast(EDMPrecond, build(path, "EDMPrecond", config, tensors)).to(device)


def convert_edm(pkl: str | Path, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the network of NVIDIA's `pkl` to the safetensors file `path`, its weights as `dtype`.

    float16 halves the file and rounds the weights. Raises UsageError like `load_edm`.
    """
    save_network(path, load_edm(pkl), dtype, source=Path(pkl).name)


def _arguments(network: dict[str, Any]) -> str:
    """The arguments of `network`, as JSON; its state overrides those that it was made with."""
    values, state = of_type(tuple, network.get("init_args")), of_type(dict, network.get("state"))
    named = dict(zip(inspect.signature(EDMPrecond).parameters, values, strict=False))
    named |= of_type(dict, network.get("init_kwargs"))
    attributes = ("use_fp16", "sigma_min", "sigma_max", "sigma_data")
    named |= {key: state[key] for key in attributes if key in state}
    for key, value in named.items():
        # Shared containers and strings are short in a pickle and could be endless in JSON.
        numbers = value if type(value) in (list, tuple) else [value]
        short = len(numbers) <= 100 and len(named) <= 100 and len(str(key)) <= 100
        if (type(value) is str and len(value) > 100) or not short:
            raise UsageError(f"its argument {shown(key)} is too long")
        if any(type(n) not in (int, float, bool) for n in numbers) and type(value) is not str:
            raise UsageError(f"its argument {shown(key)} is neither a number, a list nor a word")
    return json.dumps(named)


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Pairs (name in the state dict, tensor) of all parameters and buffers of a module.

    `seen` are the ids of the modules that came before; UsageError for one that comes twice.
    """
    if id(module) in seen:
        raise UsageError(f"it has the module {shown(prefix)} twice")
    seen.add(id(module))
    state = of_type(dict, of_type(dict, module).get("state"))
    not_saved = of_type(set, state.get("_non_persistent_buffers_set", set()))
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, item in of_type(dict, state.get(kind)).items():
            if len(prefix + of_type(str, name)) > 150:
                raise UsageError(f"it has the name {shown(prefix + name)}, which is too long")
            if item is not None and kind == "_modules":
                yield from _tensors(item, f"{prefix}{name}.", seen)
            elif item is not None and name not in not_saved:
                yield prefix + name, of_type(Tensor, item)


def read_persistent(path: str | Path) -> dict[Any, Any]:
    """Return the content of a .pkl by NVIDIA's `torch_utils.persistence`.

    It consists of plain dicts, lists, tuples and CPU tensors. An object becomes {"class_name": str,
    "init_args": tuple, "init_kwargs": dict, "state": dict}, and the state of a module has the keys
    "_parameters", "_buffers" and "_modules". The source code in the file is left out. Reading
    takes at most 3 bytes of memory for each byte of weights in the file, and 250 for each other
    byte. Raises UsageError, with the reason, for any other file.
    """
    path = Path(path)
    with told_of(path):
        data, steps = path.read_bytes(), itertools.count(1)
        left = len(data)

        def storage(content: Any) -> Tensor:
            nonlocal left
            left -= len(of_type(bytes, content))
            if left < 0:  # a pickle can name one string of bytes a million times
                raise UsageError("its storages are larger than the file")
            stream = io.BytesIO(content)
            return of_type(Tensor, read_older(stream, len(content), STORAGES.get, steps))

        names = NAMES | {("torch.storage", "_load_from_bytes"): storage}
        content = interpret(io.BytesIO(data), names.get, steps)
        _check_depth(content, {})
        return of_type(dict, content)


def _check_depth(item: Any, heights: dict[int, int], depth: int = 0) -> int:
    """The height of a nested container; UsageError for one that holds itself or is too deep.

    `heights` are the heights of the containers that are already measured, by their ids.
    """
    if type(item) not in (dict, list, tuple):
        return 0
    if depth <= MAX_DEPTH and id(item) not in heights:
        children = item.values() if type(item) is dict else item
        below = (_check_depth(child, heights, depth + 1) for child in children)
        heights[id(item)] = 1 + max(below, default=0)
    if depth + heights.get(id(item), MAX_DEPTH) > MAX_DEPTH:
        raise UsageError(f"it nests containers deeper than {MAX_DEPTH} levels")
    return heights[id(item)]


# ---- what stands for the functions that a checkpoint names


def _object(meta: Any) -> dict[str, Any]:
    """An object of torch_utils.persistence; its source, meta["module_src"], is never looked at."""
    state = of_type(dict, of_type(dict, meta)["state"])
    arguments, keywords = state.pop("_init_args", None), state.pop("_init_kwargs", None)
    return {
        "class_name": of_type(str, meta["class_name"]),
        "init_args": arguments or (),
        "init_kwargs": keywords or {},
        "state": state,
    }


def _module_dict() -> dict[str, Any]:
    return {"class_name": "ModuleDict", "init_args": (), "init_kwargs": {}, "state": {}}


NUMPY = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}


def _numpy_dtype(name: Any, *_: Any) -> str:
    """The `struct` code of a numpy dtype."""
    if of_type(str, name) not in NUMPY:
        raise UsageError(f"it has a numpy scalar of type {shown(name)}")
    return NUMPY[name]


def _numpy_scalar(code: Any, data: Any) -> float | int | bool:
    """The number in `data`, whose `struct` code is `code`."""
    if code not in NUMPY.values():
        raise UsageError(f"it has a numpy scalar of type {shown(code)}")
    return struct.unpack(f"<{code}", data)[0]


NAMES = TENSORS | {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _object,
    ("torch.nn.modules.container", "ModuleDict"): _module_dict,
    ("dnnlib.util", "EasyDict"): new_dict,
    ("numpy", "dtype"): _numpy_dtype,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
}
