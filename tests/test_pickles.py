"""NVIDIA's pickles read as data: round trips, and files that try to be more than data."""

import collections
import contextlib
import io
import math
import os
import pickle
import random
import struct
import sys
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from s4s_core import UsageError
from s4s_core.models.networks import (
    EDMPrecond,
    convert_edm,
    load_edm,
    read_persistent,
    save_network,
)
from s4s_core.models.networks.song_unet import Block, Conv2d

CONFIG = dict(
    img_resolution=4, img_channels=1, use_fp16=True, sigma_max=80, model_type="SongUNet",
    model_channels=4, channel_mult=[1, 1], channel_mult_emb=1, num_blocks=1, attn_resolutions=[2],
    augment_dim=9, dropout=0.13, embedding_type="fourier", encoder_type="residual",
    channel_mult_noise=2, resample_filter=[1, 3, 3, 1],
)  # fmt: skip


# ---- files as torch_utils.persistence writes them


class Persistent:
    """An object of a class that `torch_utils.persistence` decorated, made of what it would pickle.

    pickle meets the same functions with the same arguments; only the classes are not the original.
    """

    def __init__(self, class_name, state, *init_args, **init_kwargs):
        self.class_name = class_name
        self.state = dict(state, _init_args=init_args, _init_kwargs=init_kwargs)

    def __reduce__(self):
        meta = dict(type="class", version=6, module_src=Persistent.source,
                    class_name=self.class_name, state=self.state)  # fmt: skip
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


@pytest.fixture(autouse=True)
def upstream(monkeypatch, tmp_path):
    """Modules with the names in NVIDIA's pickles; whatever runs one of them, or the source, fails.

    Returns the path of a file that exists once anything in a pickle was executed.
    """
    marker = tmp_path / "executed"

    def _reconstruct_persistent_obj(meta):
        marker.touch()

    persistence = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = persistence.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    util = types.ModuleType("dnnlib.util")
    util.EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    for module in (persistence, util):
        package = module.__name__.partition(".")[0]
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Persistent, "source", f"open({str(marker)!r}, 'w')", raising=False)
    yield marker
    assert not marker.exists()


def persistent(module: nn.Module, **init_kwargs) -> Persistent:
    """`module` as one of NVIDIA's classes; a ModuleDict is pickled as such."""
    state = dict(module.__dict__)
    state.pop("config", None)
    state["_modules"] = collections.OrderedDict(
        (name, child if child is None or type(child) is nn.Identity else persistent(child))
        for name, child in module._modules.items()
        if type(child) is not nn.Identity
    )
    if type(module) is nn.ModuleDict:
        twin = nn.ModuleDict()
        twin.__dict__.update(state)
        return twin
    names = {EDMPrecond: "EDMPrecond", Block: "UNetBlock"}
    if type(module) is Block:
        state["skip_scale"] = np.sqrt(0.5)
        init_kwargs |= dict(eps=1e-6, init_attn=dict(init_weight=np.sqrt(0.2)))
    if type(module) is Conv2d:
        state.pop("bias", None)
    return Persistent(names.get(type(module), type(module).__name__), state, **init_kwargs)


def network(seed=0, **config) -> EDMPrecond:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EDMPrecond(**CONFIG | config).eval().requires_grad_(False)


def checkpoint(net: EDMPrecond, **changes) -> dict:
    easy = sys.modules["dnnlib.util"].EasyDict
    return {
        "ema": persistent(net, **net.config),
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5}),
        "augment_pipe": Persistent("AugmentPipe", {"p": 0.12}, p=0.12, xflip=1e8),
        "dataset_kwargs": easy(class_name="training.dataset.ImageFolderDataset", xflip=False),
    } | changes


@pytest.fixture
def written(tmp_path):
    """`written(object or bytes)`: the path of a .pkl that holds it."""

    def write(content, protocol=4):
        path = tmp_path / "net.pkl"
        is_bytes = isinstance(content, bytes)
        path.write_bytes(content if is_bytes else pickle.dumps(content, protocol=protocol))
        return path

    return write


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


# ---- round trips


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_checkpoint_is_read(written, protocol):
    net = network()
    loaded = load_edm(written(checkpoint(net), protocol))
    assert type(loaded) is EDMPrecond and same_weights(loaded, net)
    assert loaded.config == net.config and (loaded.sigma_min, loaded.sigma_max) == (0, 80)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    assert torch.equal(loaded(x, 0.7), net(x, 0.7))


def test_objects_become_dicts(written):
    content = read_persistent(written(checkpoint(network())))
    ema = content["ema"]
    assert (ema["class_name"], ema["init_args"]) == ("EDMPrecond", ())
    assert ema["init_kwargs"]["channel_mult"] == [1, 1]
    model = ema["state"]["_modules"]["model"]
    assert model["class_name"] == "SongUNet"
    block = model["state"]["_modules"]["enc"]["state"]["_modules"]["4x4_block0"]
    assert type(block["state"]["skip_scale"]) is float
    assert block["state"]["skip_scale"] == math.sqrt(0.5)
    assert block["init_kwargs"]["init_attn"] == {"init_weight": math.sqrt(0.2)}
    assert content["loss_fn"] == {
        "class_name": "EDMLoss",
        "init_args": (),
        "init_kwargs": {},
        "state": {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5},
    }
    assert content["augment_pipe"]["init_kwargs"] == {"p": 0.12, "xflip": 1e8}
    assert type(content["dataset_kwargs"]) is dict and content["dataset_kwargs"]["xflip"] is False
    assert "open(" not in str(content)  # the source is left out


def test_what_older_versions_wrote_is_read(written):
    """numpy 1 named its module otherwise; Python up to 3.10 sets an EasyDict's empty state."""
    data = pickle.dumps(checkpoint(network()), protocol=4)
    data = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    assert same_weights(load_edm(written(data)), network())
    easy = raw(b"cdnnlib.util\nEasyDict\n)\x81}b" + short("a") + b"K\x01s")
    assert read_persistent(written(easy)) == {"a": 1}


def test_the_state_overrules_the_arguments(written):
    """Upstream's objects get their state back, whatever their constructor was given."""
    content = checkpoint(network())
    content["ema"].state |= {"sigma_min": 0.002, "sigma_data": 0.7, "use_fp16": False}
    net = load_edm(written(content))
    assert (net.sigma_min, net.sigma_data, net.use_fp16) == (0.002, 0.7, False)


def test_positional_arguments_are_read(written):
    content = checkpoint(network())
    state = content["ema"].state
    state["_init_args"] = (state["_init_kwargs"].pop("img_resolution"), 1)
    state["_init_kwargs"].pop("img_channels")
    assert same_weights(load_edm(written(content)), network())


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32],
)
def test_tensors_come_back(written, dtype):
    x = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4).to(dtype)
    tensors = {"x": x, "t": x.transpose(0, 2), "row": x[1, :, 2], "none": x[:0], "one": x[0, 0, 0]}
    content = read_persistent(written(tensors))
    for name, tensor in tensors.items():
        assert content[name].dtype == dtype and torch.equal(content[name], tensor), name


@pytest.mark.parametrize("dtype, error", [(torch.float32, 0), (torch.float16, 1e-3)])
def test_a_converted_checkpoint_is_the_same_network(tmp_path, written, dtype, error):
    net, path = network(), tmp_path / "net.safetensors"
    convert_edm(written(checkpoint(net)), path, dtype)
    loaded = load_edm(path, device="cpu")
    assert loaded.config == net.config
    x = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    assert torch.allclose(loaded(x, 0.7), net(x, 0.7), rtol=0, atol=error)


def test_memory_stays_near_the_size_of_the_file(written):
    path = written({"x": torch.zeros(1_000_000)})
    assert megabytes(path) < 3e-6 * path.stat().st_size


def megabytes(path) -> float:
    """The peak of Python's memory while a file is read, or refused."""
    tracemalloc.start()
    try:
        with contextlib.suppress(UsageError):
            read_persistent(path)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "make",
    [
        lambda n: raw(n * b"\x8f"),  # sets
        lambda n: raw(n // 2 * b"}\x94"),  # dicts, each remembered
        lambda n: raw(b"(" + n // 2 * b"N\x94" + b"t"),
        lambda n: raw(n // 6 * b"]r\xff\xff\xff\x7f"),
        lambda n: raw(b"ctorch.nn.modules.container\nModuleDict\n\x94" + n // 4 * b"h\x00)R"),
        lambda n: raw(  # one state of many entries, in many objects
            b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n\x94}\x94"
            + short("class_name") + short("x") + b"s" + short("state") + b"}("
            + b"".join(b"M" + i.to_bytes(2, "little") + b"N" for i in range(n // 8))
            + b"us\x85\x94" + n // 10 * b"h\x00h\x02R"
        ),
    ],
)  # fmt: skip
def test_memory_is_bounded_by_the_size_of_the_file(written, make):
    path = written(make(40_000))
    assert megabytes(path) < 250e-6 * path.stat().st_size + 0.5


def test_one_storage_that_is_loaded_many_times_is_refused(written, one_sentence):
    ((content,),) = storage(5000, 5000, 5000).call[1:]
    numbers = pickle.dumps(content, protocol=3)[2:-1]
    load = b"ctorch.storage\n_load_from_bytes\n"
    path = written(raw(b"](" + numbers[:-2] + b"q\x00" + 500 * (load + b"h\x00\x85R") + b"e"))
    assert megabytes(path) < 5e-6 * path.stat().st_size + 0.5
    with one_sentence("larger than the file"):
        read_persistent(path)


# ---- files that want more than to be read


class Calls:
    """Pickled as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touch(marker) -> str:
    return f"touch '{marker}'"


def storage_with(content: bytes) -> Calls:
    return Calls(torch.storage._load_from_bytes, content)


def storage(claimed=3, numbers=3, numel=3, keys=("0",), little=True, view=None, magic=None):
    """A storage in torch.save's older format, of what the arguments say."""
    stream = io.BytesIO()
    pickle.dump(magic or 0x1950A86A20F9469CFC6C, stream, protocol=2)
    pickle.dump(1001, stream, protocol=2)
    pickle.dump({"protocol_version": 1001, "little_endian": little}, stream, protocol=2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            named = ("storage", torch.FloatStorage, "0", "cpu", numel, view)
            return named if item == "the storage" else None

    Pickler(stream, protocol=2).dump("the storage")
    pickle.dump(list(keys), stream, protocol=2)
    data = struct.pack("<q", claimed) + struct.pack(f"<{numbers}f", *range(numbers))
    return storage_with(stream.getvalue() + data)


def tensor(size, stride, offset=0, of=None):
    of = storage() if of is None else of
    return Calls(torch._utils._rebuild_tensor_v2, of, offset, size, stride, False, {})


def raw(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def zip_bomb() -> Calls:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    return storage_with(stream.getvalue())


def evil_storage(marker) -> Calls:
    stream = io.BytesIO()
    torch.save(Calls(os.system, touch(marker)), stream, _use_new_zipfile_serialization=False)
    return storage_with(stream.getvalue())


def laughs(n=60):
    items = ["ha"]
    for _ in range(n):
        items = [items, items]
    return items


def inside(what):
    """`what` in the state of the innermost object of an otherwise honest checkpoint."""

    def make(marker):
        content = checkpoint(network())
        model = content["ema"].state["_modules"]["model"]
        model.state["_modules"]["map_layer0"].state["extra"] = what(marker)
        return content

    return make


HOSTILE = {
    "system": (lambda m: Calls(os.system, touch(m)), "system"),
    "eval": (lambda m: Calls(eval, f"open({str(m)!r}, 'w')"), "builtins.eval"),
    "exec": (lambda m: Calls(exec, f"open({str(m)!r}, 'w')"), "builtins.exec"),
    "getattr": (lambda m: Calls(getattr, "", "join"), "builtins.getattr"),
    "open": (lambda m: Calls(open, str(m), "w"), "open"),
    "in a state": (inside(lambda m: Calls(os.system, touch(m))), "system"),
    "in a list in a state": (inside(lambda m: [{"a": Calls(exec, "1")}]), "builtins.exec"),
    "in a storage": (evil_storage, "system"),
    "in a storage in a state": (inside(evil_storage), "system"),
    "other function of torch": (lambda m: Calls(torch.load, str(m)), "torch.serialization.load"),
    "other module of torch": (lambda m: {"net": nn.Linear(1, 1)}, "linear.Linear"),
    "a storage's name outside": (lambda m: raw(b"ctorch\nFloatStorage\n"), "torch.FloatStorage"),
    "a dotted name": (
        lambda m: raw(short("collections") + short("OrderedDict.fromkeys") + b"\x93"),
        "OrderedDict.fromkeys",
    ),
    "GLOBAL": (lambda m: raw(b"cos\nsystem\n" + short(touch(m)) + b"\x85R"), "os.system"),
    "INST": (lambda m: raw(b"(" + short(touch(m)) + b"ios\nsystem\n"), "INST"),
    "STRING": (lambda m: raw(b"S'text'\n"), "STRING"),
    "OBJ": (lambda m: raw(b"(cos\nsystem\n" + short(touch(m)) + b"o"), "os.system"),
    "OBJ of a known name": (lambda m: raw(b"(ccollections\nOrderedDict\no"), "OBJ"),
    "NEWOBJ": (lambda m: raw(b"csubprocess\nPopen\n" + short("id") + b"\x85\x81"), "Popen"),
    "NEWOBJ_EX": (lambda m: raw(b"ccollections\nOrderedDict\n)}\x92"), "NEWOBJ_EX"),
    "EXT1": (lambda m: raw(b"\x82\x01"), "EXT1"),
    "EXT4": (lambda m: raw(b"\x84\x01\x00\x00\x00"), "EXT4"),
    "PERSID": (lambda m: raw(b"Pid\n"), "PERSID"),
    "BINPERSID": (lambda m: raw(short("id") + b"Q"), "BINPERSID"),
    "LONG4": (lambda m: raw(b"\x8b\x04\x00\x00\x00abcd"), "LONG4"),
    "buffers": (lambda m: raw(b"\x97"), "NEXT_BUFFER"),
    "call of a string": (lambda m: raw(short("os.system") + short("id") + b"\x85R"), "calls a str"),
    "call of a call": (
        lambda m: raw(b"ccollections\nOrderedDict\n)R" + short("id") + b"\x85R"),
        "calls a dict",
    ),
    "state of a function": (
        lambda m: raw(b"ccollections\nOrderedDict\nN}" + short("x") + b"K\x01s\x86b"),
        "state of a function",
    ),
    "__setstate__": (lambda m: raw(b"}}" + short("__setstate__") + b"K\x01sb"), "state of a dict"),
    "state of a list": (lambda m: raw(b"]}b"), "state of a list"),
    "state of a tensor": (
        lambda m: raw(pickle.dumps(tensor((3,), (1,)), protocol=4)[2:-1] + b"}b"),
        "state of a Tensor",
    ),
    "append to a function": (lambda m: raw(b"ccollections\nOrderedDict\nK\x01a"), "as a list"),
    "items of a tensor": (
        lambda m: raw(pickle.dumps(tensor((3,), (1,)), protocol=4)[2:-1] + b"K\x00K\x01s"),
        "as a dict",
    ),
    "deep key": (lambda m: raw(b"})" + 100_000 * b"\x85" + b"Ns"), "tuple as a key"),
    "deep name": (
        lambda m: raw(b"cnumpy\ndtype\n)" + 100_000 * b"\x85" + b"R"),
        "tuple as a str",
    ),
    "deep module": (lambda m: raw(b")" + 100_000 * b"\x85" + short("x") + b"\x93"), "as a str"),
    "deep nesting": (lambda m: raw(b"}K\x00" + 50_000 * b"]" + 49_999 * b"a" + b"s"), "deeper"),
    "deep sharing": (lambda m: {"a": laughs(200)}, "deeper"),
    "itself": (lambda m: raw(b"}\x94K\x00h\x00s"), "deeper"),
    "many instructions": (lambda m: raw(1_100_000 * b"N"), "1000000 instructions"),
    "numpy object": (lambda m: {"x": np.array([None])}, "numpy"),
    "numpy dtype": (lambda m: raw(b"cnumpy\ndtype\n" + short("O8") + b"\x85R"), "O8"),
    "zip bomb": (lambda m: zip_bomb(), "no whole checkpoint"),
    "storage claims more": (lambda m: storage(claimed=2**40, numel=2**40), "1099511627776 numbers"),
    "storage claims less": (lambda m: storage(claimed=2, numel=2), "goes on behind"),
    "storage disagrees": (lambda m: storage(numel=2), "claims 3 numbers"),
    "storage of other magic": (lambda m: storage(magic=7), "unknown format"),
    "storage of other keys": (lambda m: storage(keys=("1",)), "lists other storages"),
    "storage of other endianness": (lambda m: storage(little=False), "unknown format"),
    "storage with a view": (lambda m: storage(view=("0", 0, 1)), "unknown format"),
    "too large": (lambda m: tensor((4,), (1,)), "beyond its 3 numbers"),
    "huge": (lambda m: tensor((2**62, 2**62), (0, 0)), "beyond its 3 numbers"),
    "expanded": (lambda m: tensor((2**40,), (0,)), "beyond its 3 numbers"),
    "long stride": (lambda m: tensor((2,), (3,)), "beyond its 3 numbers"),
    "far offset": (lambda m: tensor((2,), (1,), 2), "beyond its 3 numbers"),
    "negative offset": (lambda m: tensor((2,), (1,), -1), "no count"),
    "negative stride": (lambda m: tensor((2,), (-1,), 1), "no count"),
    "negative size": (lambda m: tensor((-1,), (1,)), "no count"),
    "fractional size": (lambda m: tensor((1.5,), (1,)), "no count"),
    "size of a list": (lambda m: tensor([3], (1,)), "list as a tuple"),
    "missing stride": (lambda m: tensor((3, 1), (1,)), "2 dimensions and 1 strides"),
    "no storage": (lambda m: tensor((3,), (1,), of=[1, 2, 3]), "list as a Tensor"),
    "no dict": (lambda m: [1, 2], "list as a dict"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(written, one_sentence, upstream, name):
    make, word = HOSTILE[name]
    path = written(make(upstream))
    with one_sentence(str(path), "nothing in it was executed", word):
        load_edm(path)


def test_the_hostile_calls_would_have_worked(written, upstream):
    """The marker of these tests does appear where a pickle is loaded without care."""
    pickle.loads(written(HOSTILE["in a storage"][0](upstream)).read_bytes())
    assert upstream.exists()
    upstream.unlink()
    pickle.loads(pickle.dumps(checkpoint(network())))
    assert upstream.exists()
    upstream.unlink()


def changed(path, value):
    """A checkpoint whose ema has `value` at `path` of its state or of its arguments."""

    def make():
        content = checkpoint(network())
        target = content["ema"].state
        for key in path[:-1]:
            target = target.state if isinstance(target, Persistent) else target
            target = target[key]
        target = target.state if isinstance(target, Persistent) else target
        target[path[-1]] = value
        return content

    return make


def twice():
    content = checkpoint(network())
    modules = content["ema"].state["_modules"]["model"].state["_modules"]
    modules["map_layer1"] = modules["map_layer0"]
    return content


def shared_weights():
    """Many weights in one storage: the network would be far larger than the file."""
    content = checkpoint(network())
    big = torch.zeros(100_000)
    modules = content["ema"].state["_modules"]["model"].state["_modules"]
    modules["map_layer0"].state["_parameters"] = {f"w{i}": big for i in range(100)}
    return content


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: {"net": 1}, ["class None", "EDMPrecond"]),
        (lambda: {"ema": Persistent("VPPrecond", {})}, ["class 'VPPrecond'", "EDMPrecond"]),
        (lambda: {"ema": Persistent("EDMPrecond", {})}, ["NoneType as a dict"]),
        (lambda: {"ema": {"class_name": "EDMPrecond"}}, ["NoneType as a tuple"]),
        (lambda: {"ema": {"class_name": []}}, ["class '[]'"]),
        (changed(["_init_args"], 5), ["int as a tuple"]),
        (changed(["_init_kwargs"], [1]), ["list as a dict"]),
        (changed(["_non_persistent_buffers_set"], 5), ["int as a set"]),
        (changed(["_modules", "model"], "x"), ["str as a dict"]),
        (changed(["_init_kwargs", "model_type"], "DhariwalUNet"), ["DhariwalUNet"]),
        (changed(["_init_kwargs", "model_channels"], 8), ["does not describe"]),
        (changed(["_init_kwargs", "model_channels"], 10**9), ["1000000000"]),
        (changed(["_init_kwargs", "num_blocks"], 10**9), ["1000000000"]),
        (changed(["_init_kwargs", "label_dim"], 10**12), ["does not describe"]),
        (changed(["_init_kwargs", "unheard"], 1), ["unheard"]),
        (changed(["_init_kwargs", "channel_mult"], laughs()), ["channel_mult", "neither"]),
        (changed(["_init_kwargs", "channel_mult"], [1] * 1000), ["channel_mult", "too long"]),
        (changed(["_init_kwargs", "model_type"], "x" * 1000), ["model_type", "too long"]),
        (changed(["sigma_data"], "half"), ["does not describe", "half"]),
        (changed(["sigma_data"], math.nan), ["sigma_data"]),
        (changed(["_modules"], [1]), ["list as a dict"]),
        (changed(["_modules", "x" * 200], None), ["too long"]),
        (changed(["_buffers", "x"], [1.0]), ["list as a Tensor"]),
        (changed(["_parameters", "x"], torch.zeros(2)), ["does not describe"]),
        (
            changed(["_modules", "model", "_modules", "map_layer0", "_parameters", "bias"],
                    torch.full((4,), math.nan)),
            ["NaN"],
        ),
        (twice, ["twice"]),
        (shared_weights, ["more weights than it holds"]),
    ],
)  # fmt: skip
def test_other_checkpoints_are_told_in_one_sentence(written, one_sentence, make, words):
    path = written(make())
    with one_sentence(str(path), *words):
        load_edm(path)


def test_a_missing_file_and_another_network_are_told_in_one_sentence(tmp_path, one_sentence):
    from s4s_core.models.networks import Classifier

    with one_sentence("no file", "nothing.pkl"):
        load_edm(tmp_path / "nothing.pkl")
    with one_sentence("no file"):
        read_persistent(tmp_path)
    with one_sentence("nothing.safetensors"):
        load_edm(tmp_path / "nothing.safetensors")
    save_network(tmp_path / "other.safetensors", Classifier(width=8))
    with one_sentence("Classifier", "EDMPrecond"):
        load_edm(tmp_path / "other.safetensors")


def test_a_failed_conversion_leaves_nothing(tmp_path, written, one_sentence):
    with one_sentence("builtins.exec"):
        convert_edm(written(Calls(exec, "1")), tmp_path / "net.safetensors")
    assert not (tmp_path / "net.safetensors").exists()


# ---- damage


def test_a_truncated_file_is_told_in_one_sentence(written, one_sentence):
    data = pickle.dumps(checkpoint(network()), protocol=4)
    for n in [0, 1, 2, 11, *range(50, len(data), len(data) // 40), len(data) - 1]:
        path = written(data[:n])
        with one_sentence(str(path)):
            load_edm(path)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_megabyte_is_told_in_one_sentence(written, one_sentence, seed):
    data = random.Random(seed).randbytes(1_000_000)
    path = written(data if seed % 2 else raw(data))
    with one_sentence(str(path)):
        load_edm(path)


NO_OPERANDS = [
    b"q\xff", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"\x8e" + 7 * b"\xff" + b"\x7f",
    b"\x8a\xff", b"u", b"s", b"R", b"b", b"t", b"\x87", b"h\x07", b"Q", b"a", b"\x93",
]  # fmt: skip


@pytest.mark.parametrize("body", NO_OPERANDS)
def test_instructions_without_what_they_need_are_told_in_one_sentence(written, one_sentence, body):
    path = written(raw(body))
    with one_sentence(str(path)):
        read_persistent(path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_changed_byte_loads_or_is_told(written, seed):
    """Whatever a damaged byte does, the answer is a working network or one sentence."""
    data, draw, told = pickle.dumps(checkpoint(network()), protocol=4), random.Random(seed), 0
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(draw.choice([1, 1, 4])):
            damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            net = load_edm(written(bytes(damaged)))
        except UsageError as error:
            assert "\n" not in str(error)
            told += 1
        else:
            assert net(torch.zeros(1, 1, 4, 4), 1.0).shape == (1, 1, 4, 4)
    assert told > 5
