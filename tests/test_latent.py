"""Latent diffusion: files in the authors' layout, their networks checked against diffusers."""

import collections
import io
import json
import math
import os
import re
import struct
import sys
import types
import zipfile

import numpy
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel

import s4s_core as s4s
from s4s_core.models.networks import (
    LatentModel,
    latent,
    load_imagenet,
    load_lsun,
    load_stable_diffusion,
)
from s4s_core.models.networks.checkpoint import open_checkpoint
from s4s_core.models.zoo import guided_network

WIDTHS = (8, 8, 16, 16)  # channels of a U-Net's levels
TIME = torch.tensor([0.3004, 0.9], dtype=torch.float64)
TOKENS = [*"acdgot", *(f"{c}</w>" for c in "acdgot"), "<|startoftext|>", "<|endoftext|>"]


def tiny_configurations() -> dict[str, dict]:
    """The three models with the same blocks, and far fewer channels in each."""
    unet = {"block_out_channels": WIDTHS, "norm_num_groups": 4}
    vae = {"block_out_channels": (4, 8), "norm_num_groups": 4}
    text = {"vocab_size": len(TOKENS), "max_position_embeddings": 5, "hidden_size": 12}
    text |= {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    smaller = {
        "LSUN": {**unet, "attention_head_dim": 4},
        "IMAGENET": {**unet, "cross_attention_dim": 6},
        "STABLE_DIFFUSION": {**unet, "cross_attention_dim": 12, "attention_head_dim": 2},
        "VQ_F4": {**vae, "num_vq_embeddings": 20},
        "KL_F8": vae,
        "CLIP": {**text, "bos_token_id": len(TOKENS) - 2, "eos_token_id": len(TOKENS) - 1},
    }
    return {name: {**getattr(latent, name), **config} for name, config in smaller.items()}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, config in tiny_configurations().items():
        monkeypatch.setattr(latent, name, config)


# --- The authors' layout, in the order of their constructors -----------------------------------


class Layout(dict):
    """Random weights by name."""

    def layer(self, name: str, *shape: int, bias: bool = True):
        spread = 1 / math.sqrt(math.prod(shape[1:]))
        self[f"{name}.weight"] = spread * torch.randn(shape)
        if bias:
            self[f"{name}.bias"] = 0.1 * torch.randn(shape[0])

    def under(self, prefix: str) -> dict:
        return {f"{prefix}{name}": value for name, value in self.items()}


def unet_layout(channels: int, attends: tuple[bool, ...], context: int | None = None) -> Layout:
    """Rombach et al.'s U-Net of WIDTHS, two blocks a level; `context` is the conditions' width."""
    net, emb = Layout(), 4 * WIDTHS[0]

    def block(name: str, c_in: int, c: int):
        net.layer(f"{name}.in_layers.0", c_in)
        net.layer(f"{name}.in_layers.2", c, c_in, 3, 3)
        net.layer(f"{name}.emb_layers.1", c, emb)
        net.layer(f"{name}.out_layers.0", c)
        net.layer(f"{name}.out_layers.3", c, c, 3, 3)
        if c_in != c:
            net.layer(f"{name}.skip_connection", c, c_in, 1, 1)

    def attention(name: str, c: int):
        net.layer(f"{name}.norm", c)
        if context is None:
            net.layer(f"{name}.qkv", 3 * c, c, 1)
            net.layer(f"{name}.proj_out", c, c, 1)
            return
        net.layer(f"{name}.proj_in", c, c, 1, 1)
        net.layer(f"{name}.proj_out", c, c, 1, 1)
        inner = f"{name}.transformer_blocks.0"
        for i, width in ((1, c), (2, context)):
            net.layer(f"{inner}.attn{i}.to_q", c, c, bias=False)
            net.layer(f"{inner}.attn{i}.to_k", c, width, bias=False)
            net.layer(f"{inner}.attn{i}.to_v", c, width, bias=False)
            net.layer(f"{inner}.attn{i}.to_out.0", c, c)
        net.layer(f"{inner}.ff.net.0.proj", 8 * c, c)
        net.layer(f"{inner}.ff.net.2", c, 4 * c)
        for i in (1, 2, 3):
            net.layer(f"{inner}.norm{i}", c)

    net.layer("time_embed.0", emb, WIDTHS[0])
    net.layer("time_embed.2", emb, emb)
    net.layer("input_blocks.0.0", WIDTHS[0], channels, 3, 3)
    skips, c, n = [WIDTHS[0]], WIDTHS[0], 1
    for level, width in enumerate(WIDTHS):
        for _ in range(2):
            block(f"input_blocks.{n}.0", c, width)
            if attends[level]:
                attention(f"input_blocks.{n}.1", width)
            c, n = width, n + 1
            skips.append(c)
        if level < 3:
            net.layer(f"input_blocks.{n}.0.op", c, c, 3, 3)
            n += 1
            skips.append(c)
    block("middle_block.0", c, c)
    attention("middle_block.1", c)
    block("middle_block.2", c, c)
    n = 0
    for level, width in reversed(list(enumerate(WIDTHS))):
        for i in range(3):
            block(f"output_blocks.{n}.0", c + skips.pop(), width)
            if attends[level]:
                attention(f"output_blocks.{n}.1", width)
            if level > 0 and i == 2:
                net.layer(f"output_blocks.{n}.{1 + attends[level]}.conv", width, width, 3, 3)
            c, n = width, n + 1
    net.layer("out.0", c)
    net.layer("out.2", channels, c, 3, 3)
    return net


def decoder_layout(channels: int, codes: int | None = None) -> Layout:
    """The decoder of widths (4, 8), and beside it what only training needs."""
    net, c = Layout(), 8

    def block(name: str, c_in: int, c: int):
        net.layer(f"{name}.norm1", c_in)
        net.layer(f"{name}.conv1", c, c_in, 3, 3)
        net.layer(f"{name}.norm2", c)
        net.layer(f"{name}.conv2", c, c, 3, 3)
        if c_in != c:
            net.layer(f"{name}.nin_shortcut", c, c_in, 1, 1)

    if codes:
        net.layer("quantize.embedding", codes, channels, bias=False)
    net.layer("post_quant_conv", channels, channels, 1, 1)
    net.layer("decoder.conv_in", c, channels, 3, 3)
    block("decoder.mid.block_1", c, c)
    net.layer("decoder.mid.attn_1.norm", c)
    for name in ("q", "k", "v", "proj_out"):
        net.layer(f"decoder.mid.attn_1.{name}", c, c, 1, 1)
    block("decoder.mid.block_2", c, c)
    for level, width in ((1, 8), (0, 4)):
        for i in range(3):
            block(f"decoder.up.{level}.block.{i}", c, width)
            c = width
        if level:
            net.layer(f"decoder.up.{level}.upsample.conv", c, c, 3, 3)
    net.layer("decoder.norm_out", c)
    net.layer("decoder.conv_out", 3, c, 3, 3)
    net.layer("encoder.conv_in", 4, 3, 3, 3)
    net.layer("quant_conv", channels, channels, 1, 1)
    net.layer("loss.logvar", 1)
    return net


LSUN_UNET = 3, (False, True, True, True)
IMAGENET_UNET = 3, (False, True, True, True), 6
STABLE_DIFFUSION_UNET = 4, (True, True, True, False), 12


def with_average(unet: Layout) -> dict:
    """Raw weights of no use, and the average in the names that training gives it."""
    raw = {f"model.diffusion_model.{name}": 100 * torch.ones_like(w) for name, w in unet.items()}
    ema = {f"model_ema.diffusion_model{n.replace('.', '')}": w for n, w in unet.items()}
    counts = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return {**raw, **ema, **counts, "betas": torch.zeros(1000)}


def save(path, weights: dict, **beside):
    torch.save({"state_dict": dict(weights), "epoch": 3, "optimizer_states": [], **beside}, path)
    return path


def write_lsun(folder, names=("lsun.ckpt", "vq.ckpt")):
    """The two files in `folder`, and the layouts that are in them."""
    torch.manual_seed(0)
    unet, vae = unet_layout(*LSUN_UNET), decoder_layout(3, codes=20)
    save(folder / names[0], with_average(unet))
    save(folder / names[1], vae)
    return folder / names[0], folder / names[1], unet, vae


def write_imagenet(folder, name="cin.ckpt"):
    torch.manual_seed(1)
    unet, vae = unet_layout(*IMAGENET_UNET), decoder_layout(3, codes=20)
    table = {"cond_stage_model.embedding.weight": torch.randn(1001, 6)}
    weights = {**unet.under("model.diffusion_model."), **vae.under("first_stage_model."), **table}
    return save(folder / name, weights), unet, vae, table.popitem()[1]


def write_stable_diffusion(
    folder, names=("sd.ckpt", "vocab.json", "merges.txt", "captions.txt"),
    captions="cat\na dog\n\ntac tac\n",
):  # fmt: skip
    torch.manual_seed(2)
    unet, vae = unet_layout(*STABLE_DIFFUSION_UNET), decoder_layout(4)
    text = CLIPTextModel(CLIPTextConfig(**tiny_configurations()["CLIP"])).eval()
    weights = {**unet.under("model.diffusion_model."), **vae.under("first_stage_model.")}
    before = "cond_stage_model.transformer.text_model."
    for name, value in text.state_dict().items():
        weights[before + name.removeprefix("text_model.")] = value
    weights[before + "embeddings.position_ids"] = torch.arange(5)[None]
    files = [folder / name for name in names]
    save(files[0], weights)
    files[1].write_text(json.dumps({t: i for i, t in enumerate(TOKENS)}))
    files[2].write_text("#version: 0.2\n")
    files[3].write_text(captions)
    return files, unet, vae, text


def write_annotations(path, *captions):
    """MS-COCO's archive of annotations, as far as its captions of training images go."""
    entries = [{"image_id": 3, "id": n, "caption": text} for n, text in enumerate(captions)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("annotations/captions_val2014.json", "[]")
        archive.writestr(latent.TRAINING, json.dumps({"info": {}, "annotations": entries}))
    return path


@pytest.fixture
def lsun(tmp_path):
    return write_lsun(tmp_path)


@pytest.fixture
def imagenet(tmp_path):
    return write_imagenet(tmp_path)


@pytest.fixture
def stable_diffusion(tmp_path):
    return write_stable_diffusion(tmp_path)


def network_of(load, monkeypatch, *arguments):
    """The U-Net and the decoder that a loader made."""
    made = []
    for name in ("fill_unet", "fill_decoder"):
        fill = getattr(latent, name)
        keep = lambda *a, fill=fill: made.append(fill(*a)) or made[-1]  # noqa: E731
        monkeypatch.setattr(latent, name, keep)
    return load(*arguments), *made


# --- The same networks -------------------------------------------------------------------------


def assert_same_values(weights: dict, expected: dict):
    for name, value in weights.items():
        assert torch.equal(value, expected[name].view_as(value)), name


def assert_same(net, expected: dict):
    assert set(net.state_dict()) == set(expected)
    assert_same_values(net.state_dict(), expected)
    assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("model", ["imagenet", "stable_diffusion"])
def test_conditional_unets_get_the_weights_that_diffusers_gives_them(model, request, monkeypatch):
    files, unet, *_ = request.getfixturevalue(model)
    files = files if isinstance(files, list) else [files]
    _, net, _ = network_of(getattr(latent, f"load_{model}"), monkeypatch, *files)
    oracle = convert_ldm_unet_checkpoint(unet.under("model.diffusion_model."), dict(net.config))
    assert_same(net, oracle)


def test_decoders_get_the_weights_that_diffusers_gives_them(
    lsun, imagenet, stable_diffusion, monkeypatch
):
    for load, files, vae in (
        (load_lsun, lsun[:2], lsun[3]),
        (load_imagenet, imagenet[:1], imagenet[2]),
        (load_stable_diffusion, stable_diffusion[0], stable_diffusion[2]),
    ):
        with monkeypatch.context() as patch:
            _, _, net = network_of(load, patch, *files)
        oracle = {**vae, **convert_ldm_vae_checkpoint(vae, dict(net.config))}
        assert_same(net, {name: oracle[name] for name in net.state_dict()})
        assert not [name for name in net.state_dict() if "encoder" in name]


def test_the_unconditional_unet_is_the_average_with_its_heads_apart(lsun, monkeypatch):
    *files, unet, _ = lsun
    _, net, _ = network_of(load_lsun, monkeypatch, *files)
    # diffusers converts all but the attention layers.
    oracle = convert_ldm_unet_checkpoint(with_average(unet), dict(net.config), extract_ema=True)
    weights = net.state_dict()
    apart = {name for name in weights if "attentions" in name}
    assert_same_values({n: v for n, v in weights.items() if n not in apart}, oracle)
    x = torch.randn(2, 16, 2, 2)
    layer = net.mid_block.attentions[0]
    torch.testing.assert_close(layer(x), attention_of(unet, "middle_block.1", x, heads=4))


def attention_of(unet: Layout, name: str, x, heads: int):
    """Self-attention whose layer qkv gives each head its q, k and v in a row."""
    h = torch.nn.functional.group_norm(
        x, 4, unet[f"{name}.norm.weight"], unet[f"{name}.norm.bias"], eps=1e-5
    ).flatten(2)
    qkv = torch.nn.functional.conv1d(h, unet[f"{name}.qkv.weight"], unet[f"{name}.qkv.bias"])
    out = []
    for head in qkv.chunk(heads, dim=1):
        q, k, v = head.chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)
        out.append(v @ weights.transpose(1, 2))
    h = torch.cat(out, 1)
    h = torch.nn.functional.conv1d(
        h, unet[f"{name}.proj_out.weight"], unet[f"{name}.proj_out.bias"]
    )
    return x + h.view_as(x)


def test_classes_and_captions_are_embedded_as_the_file_says(imagenet, stable_diffusion):
    path, *_, table = imagenet
    condition = load_imagenet(path).condition
    labels = [617 * seed % 1000 for seed in range(3, 1003)]
    assert sorted(labels) == list(range(1000))
    assert torch.equal(condition(range(3, 1003))[:, 0], table[labels])
    files, *_, text = stable_diffusion
    condition = load_stable_diffusion(*files).condition
    start, end = len(TOKENS) - 2, len(TOKENS) - 1
    cat = [start, TOKENS.index("c"), TOKENS.index("a"), TOKENS.index("t</w>"), end]
    tac = [start, TOKENS.index("t"), TOKENS.index("a"), TOKENS.index("c</w>"), end]
    with torch.no_grad():
        expected = text(torch.tensor([cat, tac, cat])).last_hidden_state
    torch.testing.assert_close(condition([0, 2, 3]), expected)
    assert torch.equal(condition([1]), condition([1_000_000]))  # three captions


def test_learning_has_captions_that_evaluation_has_not(stable_diffusion, tmp_path, one_sentence):
    """The seeds of every teacher set, and of noises beyond them, from a file that has both."""
    files, *_ = stable_diffusion
    files[3].write_text("cat\nact\ntac\n")
    others = write_annotations(tmp_path / "a.zip", "Cat.", "at", " act \n", "ta", "TAC", "ca")
    assert latent.read_captions(others) == ["Cat.", "at", "act", "ta", "TAC", "ca"]
    learning = [1_000_000, 1_000_001, 1_000_002, 5_000_001, 2_000_000_000]
    condition = load_stable_diffusion(*files, others).condition
    judged, taught = condition([0, 1, 2, 999_999]), condition(learning)
    assert not any(torch.equal(a, b) for a in judged for b in taught)
    alone = load_stable_diffusion(*files).condition  # without that file all are as they were
    torch.testing.assert_close(judged, alone([0, 1, 2, 0]))
    files[3].write_text("at\nta\nca\n")
    torch.testing.assert_close(taught, load_stable_diffusion(*files).condition(learning))
    files[3].write_text("cat\nact\ntac\n")
    write_annotations(others, "Tac", "cat.")
    with one_sentence("a.zip", "captions.txt", "learn from"):
        load_stable_diffusion(*files, others)


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", {"a.json": "[]"}, {latent.TRAINING: "{"}, {latent.TRAINING: "[]"}]
    + [{latent.TRAINING: '{"annotations": [{"text": "cat"}]}'}, {latent.TRAINING: "[" * 9999}]
    + [{latent.TRAINING: '{"annotations": []}'}, {latent.TRAINING: '"' + "a" * 9999 + '"'}],
)
def test_archives_that_hold_no_captions_are_refused(tmp_path, monkeypatch, one_sentence, content):
    monkeypatch.setattr(latent, "LARGEST_TEXT", 9999)
    path = tmp_path / "a.zip"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in content.items():
                archive.writestr(name, text)
    with one_sentence("a.zip", "captions"):
        latent.read_captions(path)


def test_captions_come_from_a_table_too(stable_diffusion, tmp_path, one_sentence):
    files, *_ = stable_diffusion
    (tmp_path / "table.csv").write_text('image_id,text\n7,"a dog, tac"\n8,cat\n')
    assert latent.read_captions(tmp_path / "table.csv") == ["a dog, tac", "cat"]
    (tmp_path / "other.csv").write_text("image_id,words\n7,cat\n")
    with one_sentence("other.csv", "captions"):
        load_stable_diffusion(*files[:3], tmp_path / "other.csv")


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "\ufeffa dog\ncat\r\n\n", ["a dog", "cat"]),
        ("a.txt", "a\u2028dog\x0b\x85cat\ntac\n", ["a dog cat", "tac"]),
        ("a.csv", "\ufefftext,id\na dog,1\ncat,2\n", ["a dog", "cat"]),
        ("a.csv", 'id,text\r\n1,"a\r\ndog"\r\n2,c\u2028at\r\n3\r\n', ["a dog", "c at"]),
    ],
)
def test_captions_are_what_their_lines_say(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert latent.read_captions(tmp_path / name) == expected


@pytest.mark.parametrize(
    "content",
    [
        b'text\n"a dog\ncat\n',
        b"\xff\xfea",
        b"words\ncat\n",
        b"text\n",
        b"",
        b"text\na dog, asleep\n",
        b"text,text\na,b\n",
        b"text\n<!DOCTYPE html>\n",
        b"text\na\0b\n",
    ],
)
def test_captions_that_cannot_be_read_are_refused(tmp_path, one_sentence, content):
    (tmp_path / "a.csv").write_bytes(content)
    with one_sentence("a.csv", "captions"):
        latent.read_captions(tmp_path / "a.csv")


# --- Networks as functions ---------------------------------------------------------------------


def test_guidance_is_one_call_of_both_halves_and_none_at_scale_one():
    sizes = []

    def network(x, t, c):
        sizes.append(len(x))
        return x * t.view(-1, 1) + c[:, 0]

    x, t, c = torch.randn(3, 2), torch.rand(3), torch.randn(3, 1, 2)
    null = torch.randn(1, 1, 2)
    one, half = network(x, t, c), network(x, t, null.expand(3, 1, 2))
    for scale, calls in ((1.0, [3]), (7.5, [6]), (0.0, [6])):
        sizes.clear()
        model = LatentModel(network, decode=None, null=null)
        result = guided_network(model.network, model.null, scale)(x, t, c)
        torch.testing.assert_close(result, half + scale * (one - half))
        assert sizes == calls


def test_guidance_is_that_of_the_model(imagenet):
    path, *_, table = imagenet
    x, c = torch.randn(2, 3, 8, 8), table[[5, 9]][:, None]
    model = load_imagenet(path)
    plain, strong = (guided_network(model.network, model.null, scale) for scale in (1.0, 2.0))
    eps, null = (plain(x, TIME, e) for e in (c, table[[1000, 1000]][:, None]))
    expected = null + 2.0 * (eps - null)
    torch.testing.assert_close(strong(x, TIME, c), expected, rtol=1e-4, atol=1e-5)
    assert (eps - null).abs().max() > 1e-3


def test_times_reach_the_unet_unrounded_and_differentiable(lsun, monkeypatch):
    model, net, _ = network_of(load_lsun, monkeypatch, *lsun[:2])
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    x, t = torch.randn(2, 3, 8, 8).double(), TIME.clone().requires_grad_()
    eps = model.network(x, t)
    assert eps.dtype == torch.float64 and eps.shape == x.shape
    assert torch.equal(seen[0], 1000 * t - 1) and seen[0].dtype == torch.float64
    assert not torch.equal(eps, model.network(x, (1000 * TIME).round() / 1000 + 2e-4))
    eps.square().sum().backward()
    assert t.grad.abs().min() > 0


def test_vq_decoding_quantises_and_passes_the_gradient_straight_through(lsun, monkeypatch):
    model, _, vae = network_of(load_lsun, monkeypatch, *lsun[:2])
    codes = lsun[3]["quantize.embedding.weight"]
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    near = torch.cdist(x.detach().movedim(1, -1).reshape(-1, 3), codes).argmin(1)
    quantised = codes[near].view(2, 4, 4, 3).movedim(-1, 1).clone().requires_grad_()
    image = model.decode(x)
    expected = vae.decode(quantised, force_not_quantize=True).sample
    assert image.shape == (2, 3, 8, 8)
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)
    image.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, quantised.grad, rtol=1e-3, atol=1e-4)
    assert model.decode(x.detach().double()).dtype == torch.float64


def test_kl_decoding_undoes_the_scale(stable_diffusion, monkeypatch):
    model, _, vae = network_of(load_stable_diffusion, monkeypatch, *stable_diffusion[0])
    x = torch.randn(2, 4, 4, 4)
    assert torch.equal(model.decode(0.18215 * x), vae.decode(0.18215 * x / 0.18215).sample)
    vae.double()
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model.decode(x).mean(), x, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_solver_is_learned_for_a_guided_model_through_its_decoder(stable_diffusion):
    model, schedule = load_stable_diffusion(*stable_diffusion[0]), s4s.VPDiscrete()
    params = s4s.Params(schedule="StableDiffusion", shape=[4, 8, 8], distance="l2", epochs=3)
    params = params.override(teacher_nfe=8, teacher_grid="uniform", n_train=6, n_valid=3)
    params = params.override(batch_size=3, rematerialize=True)
    setup = s4s.Setup(
        "tiny",
        s4s.from_noise_prediction(guided_network(model.network, model.null, 7.5), schedule),
        schedule,
        (4, 8, 8),
        params,
        condition=model.condition,
        decode=model.decode,
    )
    teacher = s4s.make_teacher_set(setup)
    grid = s4s.time_uniform(schedule, 5)
    first, *_, last = s4s.learn_coefficients(s4s.Solver(s4s.ipndm(grid, 3), grid), setup, teacher)
    assert last.best is not first.solver
    x_0 = torch.cat(list(s4s.sample_batches(last.best, setup, teacher.seeds[6:].tolist())))
    images = [setup.decode(x) for x in (x_0, teacher.x_0[6:])]
    loss = (images[0] - images[1]).square().mean().item()
    assert loss == pytest.approx(min(first.valid_loss, last.valid_loss), rel=0.2)
    assert loss < first.valid_loss


# --- Files -------------------------------------------------------------------------------------


def save_as_lightning(path, weights: dict, patch):
    """Save with what Lightning leaves in a checkpoint, under the names of its day."""
    callbacks = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callbacks.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": callbacks.__name__})
    multiarray = types.ModuleType("numpy.core.multiarray")

    def scalar(*_): ...

    scalar.__module__, scalar.__qualname__, multiarray.scalar = (
        multiarray.__name__,
        "scalar",
        scalar,
    )
    reduce = lambda _: (scalar, (numpy.dtype("f8"), b"12345678"))  # noqa: E731
    score = type("number", (), {"__reduce__": reduce})()
    for module in (callbacks, multiarray):
        patch.setitem(sys.modules, module.__name__, module)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        patch.setitem(sys.modules, name, types.ModuleType(name))
    state = {"best_model_score": score, "callback": callbacks.ModelCheckpoint()}
    save(path, weights, callbacks={callbacks.ModelCheckpoint: state})


def test_what_lies_beside_the_weights_is_left_alone(lsun, monkeypatch):
    path, vq, unet, _ = lsun
    with monkeypatch.context() as patch:
        save_as_lightning(path, with_average(unet), patch)
    content = path.read_bytes()
    for name in (b"ModelCheckpoint", b"numpy.core.multiarray", b"numpy\ndtype"):
        assert name in content
    assert load_lsun(path, vq).network(torch.randn(2, 3, 8, 8), TIME).isfinite().all()
    assert "pytorch_lightning" not in sys.modules


def test_archives_and_files_of_old_versions_are_read_too(lsun, tmp_path):
    path, vq, *_ = lsun
    x = torch.randn(2, 3, 8, 8)
    expected = load_lsun(path, vq)
    archive = tmp_path / "cache" / "lsun.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(path, "../model.ckpt")
        file.writestr("config.yaml", "model: 1")
    old = tmp_path / "old.ckpt"
    weights = torch.load(vq, weights_only=True)
    torch.save(weights, old, _use_new_zipfile_serialization=False)
    model = load_lsun(archive, old)
    assert torch.equal(model.network(x, TIME), expected.network(x, TIME))
    assert torch.equal(model.decode(x), expected.decode(x))
    assert [p for p in archive.parent.iterdir() if p.suffix != ".lock"] == [archive]
    assert not (tmp_path / "model.ckpt").exists()


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, eval], ids=["os.mkdir", "eval"])
def test_a_hostile_file_is_refused_and_not_run(lsun, tmp_path, one_sentence, function):
    path, vq, unet, _ = lsun
    proof = tmp_path / "proof"
    argument = {os.mkdir: str(proof), eval: f"__import__('os').mkdir({str(proof)!r})"}[function]
    for old in (False, True):
        content = {"state_dict": with_average(unet), "epoch": Hostile(function, argument)}
        torch.save(content, path, _use_new_zipfile_serialization=not old)
        with one_sentence(str(path), function.__name__, "nothing in it was executed"):
            load_lsun(path, vq)
    assert not proof.exists()


def drop(weights):
    weights.popitem()


def reshape(weights):
    name = next(n for n in weights if n.endswith("conv_in.weight") or n.endswith("0.0.weight"))
    weights[name] = weights[name].transpose(0, 1)


def add(weights):
    weights["out.7.weight" if "out.2.weight" in weights else "decoder.extra"] = torch.zeros(2)


def spoil(weights):
    next(iter(weights.values())).fill_(math.nan)


@pytest.mark.parametrize("change", [drop, reshape, add, spoil])
@pytest.mark.parametrize("which", ["unet", "decoder"])
def test_a_file_that_does_not_fit_is_refused(lsun, one_sentence, change, which):
    path, vq, unet, vae = lsun
    change(unet if which == "unet" else (decoder := used(vae)))
    save(path, with_average(unet)) if which == "unet" else save(vq, decoder)
    with one_sentence(str(path if which == "unet" else vq)):
        load_lsun(path, vq)


def used(vae: Layout) -> dict:
    return {k: v for k, v in vae.items() if not k.startswith(("encoder.", "quant_conv", "loss"))}


def test_raw_weights_are_taken_where_they_are_asked_for(lsun, monkeypatch):
    *files, _, _ = lsun
    _, net, _ = network_of(load_lsun, monkeypatch, *files, "cpu", True)
    assert all((weight == 100).all() for weight in net.parameters())  # as with_average has them


def test_raw_weights_are_never_taken_for_the_average(lsun, imagenet, one_sentence, monkeypatch):
    path, vq, unet, _ = lsun
    weights = with_average(unet)
    save(path, {k: v for k, v in weights.items() if not k.startswith("model_ema.")})
    with one_sentence("lsun.ckpt", "EMA", f"{len(unet)} of the {len(unet)}"):
        load_lsun(path, vq)
    del weights["model_ema.diffusion_modelout0weight"]
    save(path, weights)
    with one_sentence("lsun.ckpt", "EMA", f" 1 of the {len(unet)}"):
        load_lsun(path, vq)
    # A file that should have the average alone, and has both.
    path, unet, *_ = imagenet
    weights = {**torch.load(path, weights_only=True)["state_dict"], **with_average(unet)}
    save(path, weights)
    _, net, _ = network_of(load_imagenet, monkeypatch, path)
    assert torch.equal(net.conv_in.weight, unet["input_blocks.0.0.weight"])


def test_other_files_are_refused_in_one_sentence(lsun, tmp_path, one_sentence):
    path, vq, *_ = lsun
    with one_sentence("no file", "absent.ckpt"):
        load_lsun(tmp_path / "absent.ckpt", vq)
    whole = path.read_bytes()
    for content in (b"", b"<html>not found</html>", whole[:-1000], safetensors.torch.save({})):
        path.write_bytes(content)
        with one_sentence(str(path), "fetch it again"):
            load_lsun(path, vq)
    torch.save([1, 2], path)
    with one_sentence(str(path), "no weights"):
        load_lsun(path, vq)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.ckpt", "1")
        file.writestr("b.ckpt", "2")
    with one_sentence("a.ckpt, b.ckpt"):
        load_lsun(path, vq)


def test_captions_and_tokens_are_checked(stable_diffusion, one_sentence):
    path, vocabulary, merges, captions = stable_diffusion[0]
    captions.write_text("\n \n")
    with one_sentence("captions.txt", "no captions"):
        load_stable_diffusion(path, vocabulary, merges, captions)
    captions.unlink()
    with one_sentence("captions.txt", "no file"):
        load_stable_diffusion(path, vocabulary, merges, captions)
    captions.write_text("cat")
    for content in ('{"a": 0}', "{", json.dumps({t: i for i, t in enumerate(TOKENS[1:])})):
        vocabulary.write_text(content)
        with one_sentence("vocab.json", "CLIP"):
            load_stable_diffusion(path, vocabulary, merges, captions)


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_a_missing_package_is_named_with_what_to_do(
    stable_diffusion, monkeypatch, one_sentence, package
):
    monkeypatch.setitem(sys.modules, package, None)
    with one_sentence("pip install diffusers transformers"):
        load_stable_diffusion(*stable_diffusion[0])


# ---- files that are not what they should be


def zipped(method=zipfile.ZIP_STORED, change=lambda data: data):
    """An archive with a checkpoint in it, whose bytes `change` may damage."""

    def make(path):
        stream = io.BytesIO()
        save(stream, {"w": torch.arange(3000.0)})
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("model.ckpt", stream.getvalue())
        path.write_bytes(change(path.read_bytes()))

    return make


def saved(content, change=lambda data: data, **options):
    """What torch.save writes, whose bytes `change` may damage, without checksums to tell it."""

    def make(path):
        torch.serialization.set_crc32_options(False)
        torch.save(content() if callable(content) else content, path, **options)
        torch.serialization.set_crc32_options(True)
        path.write_bytes(change(path.read_bytes()))

    return make


def claims(data: bytes) -> bytes:
    """Four numbers that claim to be twelve."""
    (number,) = re.findall(rb"K\x04(?=N?tq)", data)
    return data.replace(number + b"tq", b"K\x0ctq").replace(number + b"Ntq", b"K\x0cNtq")


def lies(data: bytes) -> bytes:
    """As before, and the archive's directory says so too."""
    data = bytearray(claims(data))
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))
    data[entry + 20 : entry + 28] = struct.pack("<II", 48, 48)
    return bytes(data)


def flagged(data: bytes, flags=0, method=0) -> bytes:
    """The archive with other flags or another method in both headers of each member."""
    data = bytearray(data)
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := data.find(signature, start + 1)) >= 0:
            data[start + at] |= flags
            data[start + at + 2] |= method
    return bytes(data)


def broken(data: bytes) -> bytes:
    middle = len(data) // 3
    return data[:middle] + bytes(100) + data[middle + 100 :]


def flipped(path):
    """A checkpoint with other weights than its checksums say."""
    torch.save(FOUR, path)
    data = path.read_bytes()
    path.write_bytes(
        data.replace(torch.arange(4.0).numpy().tobytes(), torch.ones(4).numpy().tobytes())
    )


def zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.ckpt", bytes(10_000_000))


FOUR = {"state_dict": {"w": torch.arange(4.0)}}
OLD = {"_use_new_zipfile_serialization": False}
NO_CHECKPOINTS = {
    "storage that claims more": (saved(FOUR, claims), "claims 12 numbers"),
    "storage that claims more, as its record does": (saved(FOUR, lies), "runs into the next"),
    "old storage that claims more": (saved(FOUR, claims, **OLD), "numbers"),
    "other weights": (flipped, "other numbers than were written"),
    "complex": (saved({"w": torch.ones(2) * 1j}), "torch.ComplexFloatStorage"),
    "conjugate": (saved({"w": (torch.ones(2) * 1j).conj()}), "torch.ComplexFloatStorage"),
    "negated": (saved({"w": torch._neg_view(torch.ones(2))}), "not those of its storage"),
    "sparse": (saved({"w": torch.eye(3).to_sparse()}), "sparse"),
    "quantised": (
        saved(lambda: {"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}),
        "torch.",
    ),
    "meta": (saved({"w": torch.ones(3, device="meta")}), "meta"),
    "module": (saved({"w": torch.nn.Linear(2, 2)}), "Linear"),
    "compressed records": (saved(FOUR, lambda d: flagged(d, method=8)), "compressed"),
    "encrypted records": (saved(FOUR, lambda d: flagged(d, flags=1)), "encrypted"),
    "encrypted archive": (zipped(change=lambda d: flagged(d, flags=1)), "encrypted"),
    "archive of method 99": (zipped(change=lambda d: flagged(d, method=99)), "method 99"),
    "damaged deflate": (zipped(zipfile.ZIP_DEFLATED, broken), "no whole checkpoint"),
    "damaged LZMA": (zipped(zipfile.ZIP_LZMA, broken), "method 14"),
    "damaged bzip2": (zipped(zipfile.ZIP_BZIP2, broken), "method 12"),
    "damaged member": (zipped(change=broken), "no whole checkpoint"),
    "archive that is a bomb": (zip_bomb, "ten times"),
    "pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\nsize 4\n"),
        "Git LFS pointer",
    ),
    "page": (lambda p: p.write_text("\n<!DOCTYPE html><html>Sign in</html>"), "web page"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "text": (lambda p: p.write_text("hello"), "no whole checkpoint"),
    "pipe": (os.mkfifo, "no file"),
    "device": (lambda p: p.symlink_to("/dev/zero"), "no file"),
    "folder": (lambda p: p.mkdir(), "no file"),
}


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_told_in_one_sentence(tmp_path, one_sentence, name):
    make, word = NO_CHECKPOINTS[name]
    path = tmp_path / "model.ckpt"
    make(path)
    with one_sentence(str(path), word) as told, open_checkpoint(path):
        pass
    assert "weights_only" not in str(told.value) and len(str(told.value)) < 600
    assert {p.name for p in tmp_path.iterdir()} <= {"model.ckpt", ".model.ckpt.lock"}


def made(patch, place: str, value=None):
    """An object, or with `value` a class as a key, of a package that is not installed."""
    module, _, name = place.rpartition(".")
    kind = type(name, (), {"__module__": module})
    for i in range(module.count(".") + 1):
        part = ".".join(module.split(".")[: i + 1])
        patch.setitem(sys.modules, part, types.ModuleType(part))
    setattr(sys.modules[module], name, kind)
    thing = kind()
    thing.content = {"a": [1]}
    return {kind: value} if value else thing


BESIDE = {
    "numpy 2's number": lambda patch: numpy.float64(2.0),
    "numpy 2's array": lambda patch: numpy.arange(3),
    "defaultdict": lambda patch: collections.defaultdict(dict, a={1: 2}),
    "set": lambda patch: {1, 2},
    "sizes and dtypes": lambda patch: [torch.Size([1]), torch.float16, torch.device("cpu"), b"ab"],
    "callback": lambda patch: made(
        patch, "lightning.pytorch.callbacks.early_stopping.EarlyStopping", 1
    ),
    "settings": lambda patch: made(patch, "omegaconf.dictconfig.DictConfig"),
    "keys": lambda patch: {None: 1, 0.5: 2, True: 3},
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_bookkeeping_beside_the_weights_is_ignored(tmp_path, monkeypatch, name, old):
    path, w = tmp_path / "model.ckpt", torch.randn(3, 4).T
    options = OLD if old else {}
    with monkeypatch.context() as patch:
        torch.save({"beside": BESIDE[name](patch), "state_dict": {"w": w}}, path, **options)
    with open_checkpoint(path) as weights:
        assert list(weights) == ["w"] and torch.equal(weights["w"], w)


@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_is_what_torch_reads(tmp_path, old):
    """Shared storages, empty tensors, parameters and networks' own dicts, of every dtype."""
    path, options = tmp_path / "model.ckpt", OLD if old else {}
    x = torch.arange(-12, 12.0).reshape(2, 3, 4)
    state = {str(d): x.to(d) for d in (torch.float16, torch.bfloat16, torch.int8, torch.bool)}
    state |= {"x": x, "view": x[1, :, 2], "none": x[:0], "one": x[0, 0, 0]}
    state |= {"parameter": torch.nn.Parameter(x), **torch.nn.Linear(2, 3).state_dict()}
    torch.save(state, path, **options)
    expected = torch.load(path, weights_only=True)
    with open_checkpoint(path) as weights:
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            assert weights[name].dtype == value.dtype and torch.equal(weights[name], value)


def test_processes_share_one_unpacked_copy_and_leave_none(tmp_path, monkeypatch):
    path, copy = tmp_path / "lsun.zip", tmp_path / ".lsun.zip.unpacked"
    zipped()(path)
    with open_checkpoint(path) as first:
        whole = copy.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("unpacked twice"))
            with open_checkpoint(path) as second:
                assert torch.equal(first["w"], second["w"])
        assert not copy.exists() and torch.equal(first["w"], torch.arange(3000.0))
    copy.write_bytes(whole[:-100])  # a process was killed while it unpacked
    with open_checkpoint(path) as weights:
        assert torch.equal(weights["w"], torch.arange(3000.0))
    assert not copy.exists()
