"""The U-Nets of EDM's checkpoints: the numbers of NVIDIA's code, layers by their definitions."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from s4s_core import UsageError
from s4s_core.models.networks import EDMPrecond, SmallDenoiser, SongUNet, load_network, save_network
from s4s_core.models.networks.song_unet import (
    Block,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
)

SMALL = dict(
    img_resolution=8, img_channels=3, model_type="SongUNet", model_channels=8, channel_mult=[1, 2],
    num_blocks=1, attn_resolutions=[8],
)  # fmt: skip
NCSNPP = dict(embedding_type="fourier", encoder_type="residual", channel_mult_noise=2,
              resample_filter=[1, 3, 3, 1])  # fmt: skip
# Outputs 0, 100, 200, 300 of NVIDIA's training/networks.py (commit 0a2ff34) for `filled` weights.
RECORDED = [
    (dict(), [0.113797, -1.509488, 0.057934, -0.311927]),
    (dict(label_dim=3, augment_dim=9), [0.111602, -1.507018, 0.075253, -0.301044]),
    (NCSNPP, [0.093579, -1.592743, 0.078919, -0.286475]),
    (dict(NCSNPP, label_dim=3, augment_dim=9), [0.090517, -1.594904, 0.084015, -0.280829]),
    (
        dict(encoder_type="skip", decoder_type="skip", resample_filter=[1, 3, 3, 1]),
        [-0.215442, -1.516678, -0.431421, -0.166065],
    ),
    (
        dict(img_resolution=12, channel_mult=[2, 1, 2], num_blocks=2, attn_resolutions=[6, 3],
             channel_mult_emb=2, sigma_data=1.3),
        [-0.311311, -2.179398, -2.68402, -2.577259],
    ),
]  # fmt: skip


def filled(net):
    """Weights and frequencies that need no random numbers; the low-pass filters stay."""
    for i, (name, value) in enumerate(sorted(net.state_dict().items())):
        if not name.endswith("resample_filter"):
            k = torch.arange(value.numel(), dtype=torch.float64)
            uniform = (43758.5453 * torch.sin(12.9898 * k + 78.233 * i)) % 1 - 0.5
            scale = math.sqrt(12 / value[0].numel()) if value.ndim > 1 else 2
            value.copy_((scale * uniform).reshape(value.shape))
    return net.eval().requires_grad_(False)


def question(net):
    """x (2, C, H, W), sigma (2,), class and augment labels, as far as `net` knows them."""
    shape = (2, net.config["img_channels"], *[net.config["img_resolution"]] * 2)
    x = 3 * torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)
    n_labels, n_augment = net.config["label_dim"], net.config.get("augment_dim", 0)
    labels = torch.eye(n_labels)[[1, 0]] if n_labels else None
    augment = torch.linspace(-1, 1, 2 * n_augment).reshape(2, -1) if n_augment else None
    return x.float(), torch.tensor([0.3, 20.0]), labels, augment


@pytest.fixture
def net():
    return filled(EDMPrecond(**SMALL, label_dim=3, augment_dim=9))


# ---- the network of the checkpoints


@pytest.mark.parametrize("config, expected", RECORDED)
def test_answers_are_those_of_the_original(config, expected):
    net = filled(EDMPrecond(**SMALL | config))
    answer = net(*question(net)).flatten()[::100][:4]
    assert torch.allclose(answer, torch.tensor(expected), rtol=0, atol=5e-6)


def test_names_and_shapes_are_those_of_the_checkpoints():
    """The unconditional DDPM++ for CIFAR-10: counted, and a few of its names."""
    with torch.device("meta"):
        net = EDMPrecond(
            32, 3, model_type="SongUNet", model_channels=128, channel_mult=[2, 2, 2], augment_dim=9
        )
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert sum(p.numel() for p in net.parameters()) == 55_733_891
    assert shapes["model.map_augment.weight"] == (128, 9)
    assert shapes["model.map_layer0.weight"] == (512, 128)
    assert shapes["model.enc.32x32_conv.weight"] == (128, 3, 3, 3)
    assert shapes["model.enc.32x32_block0.skip.weight"] == (256, 128, 1, 1)
    assert shapes["model.enc.16x16_down.conv0.resample_filter"] == (1, 1, 2, 2)
    assert shapes["model.enc.16x16_block3.qkv.weight"] == (768, 256, 1, 1)
    assert shapes["model.dec.8x8_in0.proj.bias"] == (256,)
    assert shapes["model.dec.32x32_block4.affine.weight"] == (256, 512)
    assert shapes["model.dec.32x32_aux_conv.weight"] == (3, 256, 3, 3)
    assert "model.map_augment.bias" not in shapes and "model.map_noise.freqs" not in shapes


def test_the_auxiliary_branches_have_the_names_of_the_checkpoints():
    def names(**config):
        return {name.rpartition(".")[0] for name in EDMPrecond(**SMALL | config).state_dict()}

    assert "model.enc.4x4_aux_residual" in names(**NCSNPP) and "model.map_noise" in names(**NCSNPP)
    both = names(encoder_type="skip", decoder_type="skip")
    assert {"model.enc.4x4_aux_down", "model.enc.4x4_aux_skip"} <= both
    assert {"model.dec.8x8_aux_up", "model.dec.4x4_aux_conv", "model.dec.8x8_aux_norm"} <= both


def test_scalings_are_those_of_the_small_network(net):
    """Both networks stand behind one preconditioning: F = 0 leaves D = c_skip x."""
    for name in ("weight", "bias"):
        net.model.dec["8x8_aux_conv"].get_parameter(name).zero_()
    small = SmallDenoiser(0.5, in_channels=3, widths=(8,), embedding=16)
    x = question(net)[0].double()
    for sigma in (0.002, 1.0, 80.0):
        assert torch.equal(net(x, sigma), small(x, sigma))


# ---- what a caller may give


def test_every_way_to_give_one_sigma_agrees(net):
    x, _, labels, augment = question(net)
    sigma = torch.tensor(1.3, dtype=torch.float64)
    expected = net(x, 1.3, labels, augment)
    assert torch.equal(net(x, sigma, labels, augment), expected)
    assert torch.equal(net(x, sigma.expand(2), labels, augment), expected)
    assert torch.allclose(net(x, sigma.repeat(2), labels, augment), expected, atol=1e-5)


def test_labels_left_out_are_zeros(net):
    x, sigma, labels, augment = question(net)
    zeros = net(x, sigma, torch.zeros(2, 3), torch.zeros(2, 9))
    assert torch.equal(net(x, sigma), zeros)
    assert (net(x, sigma, labels) - zeros).abs().max() > 1e-3
    assert (net(x, sigma, None, augment) - zeros).abs().max() > 1e-3


def test_labels_belong_to_their_images(net):
    x, sigma, labels, augment = question(net)
    together = net(x, sigma, labels, augment)
    for i in range(2):
        alone = net(x[i : i + 1], sigma[i], labels[i : i + 1], augment[i : i + 1])
        assert torch.allclose(alone[0], together[i], atol=1e-5)


def test_the_answer_has_the_dtype_of_the_question(net):
    x, *rest = question(net)
    answer = net(x.double(), *rest)
    assert answer.dtype == torch.float64
    assert torch.allclose(answer.float(), net(x, *rest), atol=1e-5)
    assert (net(x.double(), 1e-9) - x).abs().max() < 1e-7  # the skip connection is not rounded


def test_half_precision_needs_a_gpu_and_rounds_only_the_images(net):
    """On a CPU `use_fp16` changes nothing; the U-Net itself takes float16 with float32 weights."""
    x, sigma, labels, augment = question(net)
    half = filled(EDMPrecond(**net.config | {"use_fp16": True}))
    assert torch.equal(half(x, sigma), net(x, sigma))
    c_noise = sigma.log() / 4
    expected = net.model(x / 3, c_noise, labels, augment)
    answer = net.model((x / 3).half(), c_noise, labels, augment)
    assert answer.dtype == torch.float16
    assert (answer - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (6, 2)])
def test_other_resolutions_pass(net, shape):
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    assert net(x, 1.0).shape == x.shape and net(x, 1.0).isfinite().all()


def test_gradients_reach_image_and_sigma():
    net = filled(EDMPrecond(**SMALL | NCSNPP | {"img_resolution": 4})).double()
    x = question(net)[0].double().requires_grad_()
    sigma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, (x, sigma), fast_mode=True)


def test_class_labels_are_dropped_in_training_only():
    config = SMALL | dict(label_dim=3, label_dropout=1.0, dropout=0.0)
    net = filled(EDMPrecond(**config))
    x, sigma, labels, _ = question(net)
    assert not torch.equal(net(x, sigma, labels), net(x, sigma))
    assert torch.equal(net.train()(x, sigma, labels), net.eval()(x, sigma))


# ---- layers


def test_two_equal_taps_average_and_repeat(noise):
    x = noise(0, 2, 3, 8, 6)
    assert torch.allclose(Resample("down", [1, 1])(x), F.avg_pool2d(x, 2))
    assert torch.allclose(Resample("up", [1, 1])(x), F.interpolate(x, scale_factor=2.0))


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
def test_up_is_the_adjoint_of_down(noise, taps):
    x, y = noise(0, 2, 3, 8, 6), noise(1, 2, 3, 4, 3)
    down, up = Resample("down", taps), Resample("up", taps)
    assert torch.allclose((down(x) * y).sum() * 4, (x * up(y)).sum())


def test_attention_is_softmax_attention(noise):
    block = filled(Block(8, 8, 4, attention=True)).double()
    block.attention, x, emb = False, noise(0, 2, 8, 3, 5), noise(1, 2, 4)
    before = block(x, emb)
    block.attention = True
    qkv = block.qkv(block.norm2(before)).reshape(2, 8, 3, 15)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(8), dim=2)
    a = (v @ weights.transpose(1, 2)).reshape(before.shape)
    assert torch.allclose(block(x, emb), (before + block.proj(a)) / math.sqrt(2))


def test_embeddings_are_sines_before_cosines():
    positional = PositionalEmbedding(8)(torch.tensor([0.0, 1.0]))
    assert torch.equal(positional[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    frequencies = 1e-4 ** (torch.arange(4) / 3)
    assert torch.allclose(positional[1, :4], frequencies.sin())
    fourier = FourierEmbedding(8)
    angle = 2 * math.pi * 0.3 * fourier.freqs
    expected = torch.cat([angle.sin(), angle.cos()])[None]
    assert torch.allclose(fourier(torch.tensor([0.3])), expected, atol=1e-4)


# ---- files and slips


def test_a_network_is_rebuilt_from_its_config(net):
    twin = filled(EDMPrecond(**json.loads(json.dumps(net.config))))
    assert torch.equal(twin(*question(net)), net(*question(net)))


@pytest.mark.parametrize("dtype, error", [(torch.float32, 0), (torch.float16, 1e-3)])
def test_a_saved_network_comes_back(tmp_path, dtype, error):
    net = filled(EDMPrecond(**SMALL | NCSNPP, use_fp16=True, sigma_max=80))
    save_network(tmp_path / "net.safetensors", net, dtype)
    loaded = load_network(tmp_path / "net.safetensors")
    assert loaded.config == net.config and not loaded.training
    assert torch.equal(loaded.model.map_noise.freqs, net.model.map_noise.freqs)
    for a, b in zip(loaded.parameters(), net.parameters(), strict=True):
        assert (a - b).abs().max() <= error * b.abs().max()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(model_type="os.system"), ["model_type 'os.system'", "SongUNet"]),
        (dict(encoder_type="x"), ["encoder_type 'x'", "residual, skip, standard"]),
        (dict(decoder_type="residual"), ["decoder_type 'residual'", "skip, standard"]),
        (dict(embedding_type=3), ["embedding_type 3", "fourier, positional"]),
        (dict(num_blocks=10**9), ["1000000000", "num_blocks"]),
        (dict(channel_mult=[]), ["0 levels", "channel_mult"]),
        (dict(channel_mult=[1] * 5), ["5 levels", "8 pixels"]),
        (dict(model_channels=10**9), ["1000000000", "model_channels"]),
        (dict(resample_filter=[1] * 99), ["resample_filter", "99"]),
        (dict(dropout=1.5), ["dropout", "1.5"]),
        (dict(sigma_data=0), ["sigma_data", "0"]),
    ],
)
def test_impossible_networks_are_told_in_one_sentence(one_sentence, change, words):
    with one_sentence(*words):
        EDMPrecond(**SMALL | change)


def test_the_bare_network_is_public():
    net = SongUNet(8, 3, 5, model_channels=8, channel_mult=[1], num_blocks=1)
    assert net(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape == (1, 5, 8, 8)
    with pytest.raises(UsageError):
        SongUNet(8, 3, 5, num_blocks=0)
