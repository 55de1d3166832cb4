"""EDM checkpoints as NVIDIA pickles them, read as data: nothing in the file is ever executed.

Such a file asks to import modules, to call functions and to run a copy of the network's source.
Here a short interpreter of pickle's instructions builds numbers, strings, containers and tensors.
It knows the few functions that a checkpoint must name, puts in the place of each one of ours that
makes data of its arguments, and refuses everything else by name. Weights lie in the pickle as
streams that `torch.save` wrote in its older format: five small pickles, read by the same
interpreter with even fewer names, then the numbers themselves.
"""

import inspect
import io
import itertools
import json
import math
import pickletools
import struct
from pathlib import Path
from types import FunctionType

import torch
from torch import Tensor, nn

from ...errors import UsageError
from .io import build, load_network, save_network
from .song_unet import EDMPrecond

# A checkpoint has about 1e5 instructions and 25 levels; an instruction of one byte can cost 200.
MAX_INSTRUCTIONS, MAX_DEPTH = 1_000_000, 100
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save's older format


def load_edm(path, device="cpu") -> nn.Module:
    """The network (weights averaged over training, "ema") of an EDM checkpoint, as `EDMPrecond`.

    `path` is NVIDIA's .pkl or a .safetensors that `convert_edm` made of it. The network is float32,
    in eval mode, its weights without gradient. Raises UsageError for a file that is missing,
    damaged, of another architecture, or that holds anything but data.
    """
    if Path(path).suffix == ".safetensors":
        net = load_network(path)
        if not isinstance(net, EDMPrecond):
            raise UsageError(
                f"{path} holds a {type(net).__name__}, no EDMPrecond; use what convert_edm made"
            )
        return net.to(device)
    ema = read_persistent(path).get("ema")
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
    return build(path, "EDMPrecond", config, tensors).to(device)


def convert_edm(pkl, path, dtype: torch.dtype = torch.float32) -> None:
    """Write the network of NVIDIA's `pkl` to the safetensors file `path`, its weights as `dtype`.

    float16 halves the file and rounds the weights. Raises UsageError like `load_edm`.
    """
    save_network(path, load_edm(pkl), dtype, source=Path(pkl).name)


def _arguments(network: dict) -> str:
    """The arguments that `network` was made with, as JSON; what its state says of them counts."""
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


def _tensors(module, prefix: str, seen: set[int]):
    """(name in the state dict, tensor) of every parameter and buffer of a module."""
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


def read_persistent(path) -> dict:
    """The content of a .pkl by `torch_utils.persistence`, as plain dicts, lists and CPU tensors.

    An object is {"class_name": str, "init_args": tuple, "init_kwargs": dict, "state": dict}, the
    state of a module with its "_parameters", "_buffers" and "_modules". The source that the file
    carries is left out. Raises UsageError, with the reason, for all that is no such file; memory
    stays within a few times the size of the file.
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


def _shown(name) -> str:
    """A name from a file, fit for one line."""
    return repr(name if name is None else str(name)[:80])


# ---- the interpreter

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
FRESH = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip


def _interpret(stream: io.BytesIO, names: dict, steps, persistent_ids: bool = False):
    """The object of the pickle at the position of `stream`, which is left behind its end.

    `names` are the (module, name) pairs that it may mention, with what stands for them: functions
    that it may call, or values. `steps` counts instructions over all pickles of a file.
    """
    stack, marks, memo = [], [], {}

    def since_mark() -> list:
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


def _known(names: dict, module, name):
    name = (_of_type(str, module), _of_type(str, name))
    if name not in names:
        raise UsageError(f"it asks for {_shown('.'.join(name))}")
    return names[name]


def _of_type(kind: type, value):
    if type(value) is not kind:
        raise UsageError(f"it uses a {type(value).__name__} as a {kind.__name__}")
    return value


def _key(value):
    # Hashing a tuple that is nested deeply enough would end the interpreter.
    if type(value) not in (str, int):
        raise UsageError(f"it uses a {type(value).__name__} as a key")
    return value


def _set_state(target, state) -> None:
    """What "BUILD" may do: fill a ModuleDict; confirm an empty dict or a numpy dtype."""
    if type(target) is dict and type(state) is dict:
        if target.get("class_name") == "ModuleDict":
            target["state"] = state
            return
        if not state:
            return
    if type(target) is str and type(state) is tuple and state[1] in ("<", "|"):
        return
    raise UsageError(f"it sets the state of a {type(target).__name__}")


def _check_depth(item, heights: dict[int, int], depth: int = 0) -> int:
    """The height of a nested container; UsageError for one that holds itself or is too deep."""
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


def _object(meta) -> dict:
    """An object of torch_utils.persistence: its source, meta["module_src"], is left alone."""
    state = dict(_of_type(dict, _of_type(dict, meta)["state"]))
    arguments, keywords = state.pop("_init_args", None), state.pop("_init_kwargs", None)
    return {
        "class_name": _of_type(str, meta["class_name"]),
        "init_args": arguments or (),
        "init_kwargs": keywords or {},
        "state": state,
    }


def _module_dict() -> dict:
    return {"class_name": "ModuleDict", "init_args": (), "init_kwargs": {}, "state": {}}


def _empty_dict() -> dict:
    return {}


def _parameter(tensor, requires_grad, hooks) -> Tensor:
    return tensor


def _strided(storage, offset, size, stride, *_) -> Tensor:
    """A tensor in a storage, which must hold at least as many numbers."""
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


def _numpy_dtype(name, *_) -> str:
    """The `struct` code of a numpy dtype."""
    if _of_type(str, name) not in NUMPY:
        raise UsageError(f"it has a numpy scalar of type {_shown(name)}")
    return NUMPY[name]


def _numpy_scalar(code, data):
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


def _storage(data, steps) -> Tensor:
    """The numbers (n,) of a storage in torch.save's older format."""
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
