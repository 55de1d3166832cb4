"""Read NVIDIA's pickled EDM checkpoints as data: nothing in the file is ever executed.

Such a file asks to import modules, to call functions and to run a copy of the network's source.
Here a short interpreter of pickle's instructions builds numbers, strings, containers and tensors
instead. It knows the few functions that a checkpoint must name, and calls in place of each a
function of this file that only makes data of its arguments. It refuses all other names. Weights lie
in the pickle as streams that `torch.save` wrote in its older format: five small pickles, which the
same interpreter reads with even fewer names, and then the numbers themselves.
"""

import inspect
import io
import itertools
import json
import math
import pickletools
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ...errors import UsageError
from .io import build, load_network, save_network
from .song_unet import EDMPrecond

Kind = TypeVar("Kind")
Names = Mapping[tuple[str, str], Any]  # (module, name) in a pickle -> what stands for it here

# A checkpoint has about 1e5 instructions and 25 levels; an instruction of one byte can cost 200.
MAX_INSTRUCTIONS, MAX_DEPTH = 1_000_000, 100
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save's older format


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
            f"{path} has a network of class {_shown(name)} as its ema, not EDMPrecond; "
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
    values, state = _of_type(tuple, network.get("init_args")), _of_type(dict, network.get("state"))
    named = dict(zip(inspect.signature(EDMPrecond).parameters, values, strict=False))
    named |= _of_type(dict, network.get("init_kwargs"))
    attributes = ("use_fp16", "sigma_min", "sigma_max", "sigma_data")
    named |= {key: state[key] for key in attributes if key in state}
    for key, value in named.items():
        # Shared containers and strings are short in a pickle and could be endless in JSON.
        numbers = value if type(value) in (list, tuple) else [value]
        short = len(numbers) <= 100 and len(named) <= 100 and len(str(key)) <= 100
        if (type(value) is str and len(value) > 100) or not short:
            raise UsageError(f"its argument {_shown(key)} is too long")
        if any(type(n) not in (int, float, bool) for n in numbers) and type(value) is not str:
            raise UsageError(f"its argument {_shown(key)} is neither a number, a list nor a word")
    return json.dumps(named)


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Pairs (name in the state dict, tensor) of all parameters and buffers of a module.

    `seen` are the ids of the modules that came before; UsageError for one that comes twice.
    """
    if id(module) in seen:
        raise UsageError(f"it has the module {_shown(prefix)} twice")
    seen.add(id(module))
    state = _of_type(dict, _of_type(dict, module).get("state"))
    not_saved = _of_type(set, state.get("_non_persistent_buffers_set", set()))
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, item in _of_type(dict, state.get(kind)).items():
            if len(_of_type(str, name)) > 100:
                raise UsageError(f"it has the name {_shown(name)}, which is too long")
            if item is not None and kind == "_modules":
                yield from _tensors(item, f"{prefix}{name}.", seen)
            elif item is not None and name not in not_saved:
                yield prefix + name, _of_type(Tensor, item)


def read_persistent(path: str | Path) -> dict[Any, Any]:
    """Return the content of a .pkl by NVIDIA's `torch_utils.persistence`.

    It consists of plain dicts, lists, tuples and CPU tensors. An object becomes {"class_name": str,
    "init_args": tuple, "init_kwargs": dict, "state": dict}, and the state of a module has the keys
    "_parameters", "_buffers" and "_modules". The source code in the file is left out. Reading
    takes at most a few times as much memory as the file has bytes. Raises UsageError, with the
    reason, for any other file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}); check the path") from None
    try:
        steps = itertools.count(1)
        storage = {("torch.storage", "_load_from_bytes"): lambda data: _storage(data, steps)}
        content = _interpret(io.BytesIO(data), NAMES | storage, steps)
        _check_depth(content, {})
        if type(content) is not dict:
            raise UsageError(f"it holds a {type(content).__name__} where a dict should be")
    except UsageError as error:
        raise UsageError(
            f"{path} was refused, and nothing in it was executed: {error}; "
            "fetch the checkpoint again from its publisher"
        ) from None
    except Exception as error:  # whatever damaged bytes lead to
        reason = f"{type(error).__name__}: {_shown(str(error))}"
        raise UsageError(f"{path} is not a complete pickle ({reason}); fetch it again") from None
    return content


def _shown(name: object) -> str:
    """A name from a file, quoted and cut to fit into one line."""
    return repr(name if name is None else str(name)[:80])


# ---- the interpreter

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
FRESH = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip


def _interpret(
    stream: io.BytesIO, names: Names, steps: Iterator[int], persistent_ids: bool = False
) -> Any:
    """The object of the pickle at the position of `stream`, which is then moved behind the pickle.

    `names` are the (module, name) pairs that the pickle may mention, with the functions (which it
    may call) or values that stand for them. `steps` counts instructions over all pickles of a file.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    argument: Any

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for instruction, argument, _ in pickletools.genops(stream):
        if next(steps) > MAX_INSTRUCTIONS:
            raise UsageError(f"it has more than {MAX_INSTRUCTIONS} instructions")
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case name if name in LITERALS:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in FRESH:
                stack.append(FRESH[name]())
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                n = int(name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "APPEND":
                item = stack.pop()
                _of_type(list, stack[-1]).append(item)
            case "APPENDS":
                items = since_mark()
                _of_type(list, stack[-1]).extend(items)
            case "ADDITEMS":
                items = since_mark()
                _of_type(set, stack[-1]).update(map(_key, items))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _of_type(dict, stack[-1])[_key(key)] = value
            case "SETITEMS":
                items = since_mark()
                target = _of_type(dict, stack[-1])
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[_key(key)] = value
            case "GLOBAL":
                stack.append(_known(names, *argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_known(names, module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                if type(function) is not FunctionType:
                    raise UsageError(f"it calls a {type(function).__name__}")
                stack.append(function(*_of_type(tuple, arguments)))
            case "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state)
            case "BINPERSID" if persistent_ids:
                pass
            case name:
                raise UsageError(f"it uses the pickle instruction {name}")


def _known(names: Names, module: Any, name: Any) -> Any:
    """The entry of `names` for module.name; UsageError if there is none."""
    key = (_of_type(str, module), _of_type(str, name))
    if key not in names:
        raise UsageError(f"it asks for {_shown('.'.join(key))}")
    return names[key]


def _of_type(kind: type[Kind], value: Any) -> Kind:
    """The value, if its type is exactly `kind`; UsageError otherwise."""
    if type(value) is not kind:
        raise UsageError(f"it uses a {type(value).__name__} as a {kind.__name__}")
    return value


def _key(value: Any) -> str | int:
    """The value, if it may be a key; UsageError otherwise."""
    # Hashing a tuple that is nested deeply enough would end the interpreter.
    if type(value) not in (str, int):
        raise UsageError(f"it uses a {type(value).__name__} as a key")
    return value


def _set_state(target: Any, state: Any) -> None:
    """Do what the instruction BUILD may do: fill a ModuleDict, or leave the target as it is.

    The latter is for an empty dict and for a numpy dtype. UsageError for any other target.
    """
    if type(target) is dict and type(state) is dict:
        if target.get("class_name") == "ModuleDict":
            target["state"] = state
            return
        if not state:
            return
    if type(target) is str and type(state) is tuple and state[1] in ("<", "|"):
        return
    raise UsageError(f"it sets the state of a {type(target).__name__}")


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
    state = dict(_of_type(dict, _of_type(dict, meta)["state"]))
    arguments, keywords = state.pop("_init_args", None), state.pop("_init_kwargs", None)
    return {
        "class_name": _of_type(str, meta["class_name"]),
        "init_args": arguments or (),
        "init_kwargs": keywords or {},
        "state": state,
    }


def _module_dict() -> dict[str, Any]:
    return {"class_name": "ModuleDict", "init_args": (), "init_kwargs": {}, "state": {}}


def _empty_dict() -> dict[str, Any]:
    return {}


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Any:
    return tensor


def _strided(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor that is a view of a storage; UsageError if it reaches beyond the storage."""
    numbers = [offset, *_of_type(tuple, size), *_of_type(tuple, stride)]
    if len(size) != len(stride) or len(size) > 8:
        raise UsageError(f"it makes a tensor of {len(size)} dimensions and {len(stride)} strides")
    if any(type(n) is not int or n < 0 for n in numbers):
        raise UsageError("it makes a tensor with a size, a stride or an offset that is no count")
    n = _of_type(Tensor, storage).numel()
    end = offset + 1 + sum((m - 1) * step for m, step in zip(size, stride, strict=True))
    if math.prod(size) > n or (0 not in size and end > n):
        raise UsageError(f"it makes a tensor that reaches beyond its {n} numbers")
    return storage.new_empty(size) if 0 in size else storage.as_strided(size, stride, offset)


NUMPY = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}


def _numpy_dtype(name: Any, *_: Any) -> str:
    """The `struct` code of a numpy dtype."""
    if _of_type(str, name) not in NUMPY:
        raise UsageError(f"it has a numpy scalar of type {_shown(name)}")
    return NUMPY[name]


def _numpy_scalar(code: Any, data: Any) -> float | int | bool:
    """The number in `data`, whose `struct` code is `code`."""
    if code not in NUMPY.values():
        raise UsageError(f"it has a numpy scalar of type {_shown(code)}")
    return struct.unpack(f"<{code}", data)[0]


STORAGES = {
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
}


def _storage(data: Any, steps: Iterator[int]) -> Tensor:
    """The numbers (n,) of a storage in the older format of torch.save."""
    if _of_type(bytes, data)[:2] == b"PK":
        raise UsageError("it holds a storage as a zip archive, which torch never writes there")
    stream = io.BytesIO(data)
    magic, protocol, system, storage, keys = (
        _interpret(stream, STORAGES, steps, persistent_ids=True) for _ in range(5)
    )
    if (magic, protocol) != (MAGIC, PROTOCOL) or system.get("little_endian") is not True:
        raise UsageError("it holds a storage of an unknown format")
    _, dtype, key, _, n, view = _of_type(tuple, storage)
    if not isinstance(dtype, torch.dtype) or keys != [key] or view is not None:
        raise UsageError("it holds a storage of an unknown format")
    numbers = bytearray(memoryview(data)[stream.tell() :])
    claimed, size = int.from_bytes(numbers[:8], "little"), len(numbers) - 8
    if claimed != _of_type(int, n) or n * dtype.itemsize != size:
        raise UsageError(f"it holds a storage that claims {claimed} numbers in {size} bytes")
    return torch.frombuffer(numbers, dtype=dtype, offset=8) if n else torch.empty(0, dtype=dtype)


NAMES = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _object,
    ("torch.nn.modules.container", "ModuleDict"): _module_dict,
    ("collections", "OrderedDict"): _empty_dict,
    ("dnnlib.util", "EasyDict"): _empty_dict,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _strided,
    ("numpy", "dtype"): _numpy_dtype,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
}
