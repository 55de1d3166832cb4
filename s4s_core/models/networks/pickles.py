"""Read pickles, and the files of `torch.save`, as data: nothing in them is ever executed.

Such a file asks to import modules, to call functions and to set states. Here a short interpreter of
pickle's instructions builds numbers, strings, containers and tensors instead. It knows the few
functions that a file of weights must name, and calls in place of each a function of this package
that only makes data of its arguments. It refuses all other names.

`pickle.Unpickler` with a list of allowed names would be shorter. But it fills 4 GB for a file of
eight bytes (LONG_BINPUT), it lets the file set the attributes of the functions that it may name
(BUILD), and it counts nothing. `torch.load(weights_only=True)` maps weights beyond their record.
"""

import builtins
import io
import itertools
import math
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import UsageError, reason, require_file

Kind = TypeVar("Kind")
Stream = io.BufferedReader | io.BytesIO
Find = Callable[[tuple[str, str]], Any]  # (module, name) -> what stands for it, None if nothing may
Storage = Callable[[str, torch.dtype, int], Tensor]  # key, dtype, n -> numbers (n,)

# A checkpoint has about 1e5 instructions; one of a single byte can cost 250 bytes of memory.
MAX_INSTRUCTIONS = 1_000_000
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save's older format

IGNORED = object()  # stands for what is no weight, and for all that is made of it


def read_torch(path: Path) -> Any:
    """Return what `torch.save` wrote to `path`: containers, numbers, strings and CPU tensors.

    Bookkeeping beside the weights is IGNORED. Tensors are mapped from the file, so only those that
    are used take memory; those of torch's format before 1.6 are read at once. All else takes at
    most 250 times the pickle's bytes. Raises whatever a damaged file leads to: see `told_of`.
    """
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            return _read_zip(file)
        file.seek(0)
        return read_older(file, path.stat().st_size, _find, itertools.count(1))


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Turn whatever reading the file `path` raises into a UsageError of one sentence."""
    require_file(path)
    try:
        yield
    except UsageError as error:
        raise UsageError(
            f"{path} was refused, and nothing in it was executed: {error}; take the file that its "
            "authors published"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise UsageError(f"cannot read {path} ({error.strerror}); see to that first") from None
        raise UsageError(
            f"{path} is no whole checkpoint, and nothing in it was executed "
            f"({reason(path, error)}); fetch it again"
        ) from None


def shown(name: object) -> str:
    """Return a name from a file, quoted and cut to fit into one line."""
    return repr(name if name is None else str(name)[:80])


# ---- the interpreter

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
FRESH = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip


def interpret(
    stream: Stream,
    find: Find,
    steps: Iterator[int],
    storage: Storage | None = None,
) -> Any:
    """Return the object of the pickle at the position of `stream`, and move that behind the pickle.

    `find` gives the function (which the pickle may call) or the value that stands for a name.
    `steps` counts instructions over all pickles of a file. `storage` gives the numbers that the
    pickle refers to. Raises UsageError for what is not allowed, and other errors for damage.
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
                _filled(list, stack[-1]).append(item)
            case "APPENDS":
                items = since_mark()
                _filled(list, stack[-1]).extend(items)
            case "ADDITEMS":
                items = since_mark()
                _filled(set, stack[-1]).update(map(_key, items))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _filled(dict, stack[-1])[_key(key)] = value
            case "SETITEMS":
                items = since_mark()
                target = _filled(dict, stack[-1])
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[_key(key)] = value
            case "GLOBAL":
                stack.append(_known(find, *argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_known(find, module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                if function is IGNORED:
                    stack.append(IGNORED)
                elif type(function) is FunctionType:
                    stack.append(function(*of_type(tuple, arguments)))
                else:
                    raise UsageError(f"it calls a {type(function).__name__}")
            case "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state)
            case "BINPERSID" if storage:
                stack.append(storage(*_storage_id(stack.pop())))
            case name:
                raise UsageError(f"it uses the pickle instruction {name}")


def _known(find: Find, module: Any, name: Any) -> Any:
    """What stands for module.name; UsageError if nothing does."""
    key = (of_type(str, module), of_type(str, name))
    if (found := find(key)) is None:
        raise UsageError(f"it asks for {shown('.'.join(key))}")
    return found


def of_type(kind: type[Kind], value: Any) -> Kind:
    """Return the value, if its type is exactly `kind`; raises UsageError otherwise."""
    if type(value) is not kind:
        raise UsageError(f"it uses a {type(value).__name__} as a {kind.__name__}")
    return value


def _filled(kind: type[Kind], target: Any) -> Kind:
    """The container that an instruction fills, which is of no use if the target is IGNORED."""
    return kind() if target is IGNORED else of_type(kind, target)


def _key(value: Any) -> Any:
    """The value, if it may be a key; UsageError otherwise."""
    # Hashing a tuple that is nested deeply enough would end the interpreter, and a million
    # multiples of 2^61 - 1, which have one hash, would keep it busy for hours.
    if type(value) is int and value.bit_length() <= 60:
        return value
    if value is not IGNORED and type(value) not in (str, float, bool, type(None)):
        raise UsageError(f"it uses a {type(value).__name__} as a key")
    return value


def _set_state(target: Any, state: Any) -> None:
    """Do what the instruction BUILD may do: fill a ModuleDict, or leave the target as it is.

    The latter is for what is IGNORED, for a numpy dtype, and for a dict that gets nothing or the
    versions of a network's layers. UsageError for any other target.
    """
    if target is IGNORED:
        return
    if type(target) is dict and type(state) is dict:
        if target.get("class_name") == "ModuleDict":
            target["state"] = state
            return
        if state.keys() <= {"_metadata"}:
            return
    if type(target) is str and type(state) is tuple and state[1] in ("<", "|"):
        return
    raise UsageError(f"it sets the state of a {type(target).__name__}")


# ---- the files of torch.save

STORAGES = {
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
}


def new_dict() -> dict[str, Any]:
    """Return an empty dict, which stands for one of another class."""
    return {}


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Any:
    return tensor


def _strided(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, flags: Any = None
) -> Tensor:
    """A tensor that is a view of a storage; UsageError if it reaches beyond the storage."""
    if len(of_type(tuple, size)) != len(of_type(tuple, stride)) or len(size) > 8:
        raise UsageError(f"it makes a tensor of {len(size)} dimensions and {len(stride)} strides")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise UsageError("it makes a tensor with a size, a stride or an offset that is no count")
    if flags:  # conjugated or negated when it is read
        raise UsageError("it makes a tensor whose numbers are not those of its storage")
    n = of_type(Tensor, storage).numel()
    end = offset + 1 + sum((m - 1) * step for m, step in zip(size, stride, strict=True))
    if math.prod(size) > n or (0 not in size and end > n):
        raise UsageError(f"it makes a tensor that reaches beyond its {n} numbers")
    return storage.new_empty(size) if 0 in size else storage.as_strided(size, stride, offset)


TENSORS = {
    ("collections", "OrderedDict"): new_dict,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _strided,
}
# What lies beside the weights in published checkpoints: these packages' objects, and these names.
BOOKKEEPING = {"argparse", "collections", "lightning", "numpy", "omegaconf", "pathlib"}
BOOKKEEPING |= {"pytorch_lightning", "typing"}
PLAIN = {("_codecs", "encode"), ("torch", "device"), ("torch", "Size")}
PLAIN |= {("torch", str(dtype).removeprefix("torch.")) for dtype in STORAGES.values()}
PLAIN |= {
    (module, name)
    for module in ("builtins", "__builtin__")
    for name, value in vars(builtins).items()
    if isinstance(value, type)
}


def _find(key: tuple[str, str]) -> Any:
    """What stands for a name in a checkpoint."""
    if key in PLAIN or (key[0].partition(".")[0] in BOOKKEEPING and key not in TENSORS):
        return IGNORED
    return (TENSORS | STORAGES).get(key)


def _storage_id(item: Any) -> tuple[str, torch.dtype, int]:
    """The key, the dtype and the length of a storage that a pickle refers to."""
    kind, dtype, key, _, n, *view = of_type(tuple, item)
    if kind != "storage" or not isinstance(dtype, torch.dtype) or any(view):
        raise UsageError("it refers to a storage of an unknown format")
    if type(n) is not int or not 0 <= n < 2**60:
        raise UsageError("it refers to a storage whose length is no count")
    return of_type(str, key), dtype, n


def _read_zip(file: Stream) -> Any:
    """The object in a zip archive of torch.save, with the tensors mapped from their records."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        starts = sorted(info.header_offset for info in records.values())
        ends = dict(zip(starts, [*starts[1:], archive.start_dir], strict=True))
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UsageError(f"it is a zip archive of {len(pickles)} pickles, and should have one")
    folder = pickles[0].removesuffix("data.pkl")

    def record(name: str) -> tuple[int, int]:
        """The offset and the number of bytes of a record."""
        if (info := records.get(folder + name)) is None:
            raise UsageError(f"it lacks its record {shown(name)}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UsageError("its records are compressed or encrypted, as torch never writes them")
        lengths = struct.unpack_from("<HH", mapped, info.header_offset + 26)  # of name and extra
        start = info.header_offset + 30 + sum(lengths)
        if start + info.file_size > ends[info.header_offset]:
            raise UsageError(f"its record {shown(name)} runs into the next one")
        view = memoryview(mapped)[start : start + info.file_size]
        if info.CRC not in (zlib.crc32(view), 0):  # torch.save may be told to write 0 instead
            raise UsageError(f"its record {shown(name)} has other numbers than were written")
        return start, info.file_size

    def content(name: str) -> bytes:
        start, n = record(name)
        return mapped[start : start + n]

    @cache
    def storage(key: str, dtype: torch.dtype, n: int) -> Tensor:
        start, size = record(f"data/{key}")
        if n * dtype.itemsize != size:
            raise UsageError(f"it has a storage of {size} bytes that claims {n} numbers")
        if n == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(mapped, dtype=dtype, count=n, offset=start)

    if folder + "byteorder" in records and content("byteorder") != b"little":
        raise UsageError("its numbers are big-endian")
    return interpret(io.BytesIO(content("data.pkl")), _find, itertools.count(1), storage)


def read_older(stream: Stream, size: int, find: Find, steps: Iterator[int]) -> Any:
    """Return what torch.save wrote to the rest of `stream` in its older format.

    That is five small pickles, the fourth of them the object, and then the numbers themselves, at
    most `size` bytes. See `interpret` for the other arguments and the errors.
    """
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, n: int) -> Tensor:
        nonlocal size
        if key not in storages:
            size -= n * dtype.itemsize
            if size < 0:
                raise UsageError(f"it has a storage that claims {n} numbers")
            storages[key] = torch.empty(n, dtype=dtype)
        if storages[key].dtype != dtype or len(storages[key]) != n:
            raise UsageError("it has a storage that is read in two ways")
        return storages[key]

    none: dict[tuple[str, str], Any] = {}
    magic, protocol, system = (interpret(stream, none.get, steps) for _ in range(3))
    if (magic, protocol) != (MAGIC, PROTOCOL) or system.get("little_endian") is not True:
        raise UsageError("it is of an unknown format")
    content = interpret(stream, find, steps, storage)
    keys = interpret(stream, none.get, steps)
    if sorted(of_type(list, keys)) != sorted(storages):
        raise UsageError("it lists other storages than it has")
    for key in keys:
        numbers: Any = storages[key].view(torch.uint8).numpy()
        claimed = int.from_bytes(stream.read(8), "little")
        if claimed != len(storages[key]) or stream.readinto(numbers) != len(numbers):
            raise UsageError(f"it has a storage that claims {claimed} numbers, and others")
    if stream.read(1):
        raise UsageError("it goes on behind its last storage")
    return content
