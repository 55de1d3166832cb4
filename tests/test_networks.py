"""The networks, their files and their training: limits, gradients, round trips, claims."""

import json
import math
import os
import time

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from s4s_core import UsageError
from s4s_core.models.networks import (
    Classifier,
    EDMPrecond,
    SmallDenoiser,
    UNet,
    digits_data,
    held_out_split,
    load_network,
    read_metadata,
    save_network,
    train_classifier,
    train_denoiser,
    training,
)
from s4s_core.models.zoo import WEIGHTS

SMALL = dict(widths=(8, 16), embedding=16)


def randomized(net, seed=0):
    """Weights of moderate size, also where training starts from zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net.eval().requires_grad_(False)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def shipped():
    return load_network(WEIGHTS / "digits_denoiser.safetensors")


@pytest.fixture(scope="module")
def classifier():
    return load_network(WEIGHTS / "digits_classifier.safetensors")


@pytest.fixture(scope="module")
def digits():
    return digits_data()


# ---- preconditioning


def test_without_noise_the_denoiser_is_the_identity():
    net, x = randomized(SmallDenoiser(0.75, **SMALL)).double(), normal(4, 1, 8, 8)
    error = [(net(x, sigma) - x).abs().max() for sigma in (1e-3, 1e-5)]
    assert error[0] < 0.1 and error[1] < error[0] / 50


def test_an_untrained_network_is_the_best_linear_denoiser():
    """F is 0 at the start, so D = c_skip x: exact for data N(0, sigma_data^2)."""
    net, x = SmallDenoiser(0.75, **SMALL).double(), normal(4, 1, 8, 8)
    for sigma in (0.002, 0.5, 80.0):
        assert torch.allclose(net(x, sigma), x * 0.75**2 / (0.75**2 + sigma**2), rtol=1e-14)


def test_scalings_are_those_of_the_paper():
    """D = c_skip x + c_out F(c_in x, ln(sigma) / 4), each factor written out once more."""
    net, x, s, d = randomized(SmallDenoiser(0.75, **SMALL)).double(), normal(3, 1, 8, 8), 1.7, 0.75
    root = math.sqrt(s**2 + d**2)
    c_noise = torch.tensor([math.log(s) / 4], dtype=torch.float64)
    expected = d**2 / root**2 * x + s * d / root * net.unet(x / root, c_noise)
    assert torch.allclose(net(x, s), expected, rtol=1e-12)


def test_every_way_to_give_one_sigma_agrees(shipped):
    x = normal(5, 1, 8, 8)
    sigma = torch.tensor(1.3, dtype=torch.float64)
    expected = shipped(x, 1.3)
    assert torch.equal(shipped(x, sigma), expected)
    assert torch.equal(shipped(x, sigma.expand(5)), expected)
    assert torch.allclose(shipped(x, sigma.repeat(5)), expected, atol=1e-5)


def test_sigmas_belong_to_their_images(shipped):
    x, sigma = normal(3, 1, 8, 8), torch.tensor([0.01, 1.0, 30.0])
    together = shipped(x, sigma)
    for i in range(3):
        assert torch.allclose(together[i], shipped(x[i : i + 1], sigma[i].item())[0], atol=1e-4)


def test_the_answer_has_the_dtype_of_the_question(shipped):
    x = normal(4, 1, 8, 8)
    assert shipped(x, 1.0).dtype == torch.float64
    assert shipped(x.float(), 1.0).dtype == torch.float32
    # The skip connection is not rounded to float32: tiny noise comes back to float64 precision.
    assert (shipped(x, 1e-9) - x).abs().max() < 1e-7


def test_float64_weights_agree_with_float32(shipped):
    double = load_network(WEIGHTS / "digits_denoiser.safetensors").double()
    x = normal(8, 1, 8, 8)
    for sigma in (0.002, 0.5, 80.0):
        assert torch.allclose(double(sigma * x, sigma), shipped(sigma * x, sigma), atol=1e-4)


@pytest.mark.parametrize("attention", [(), (1,)])
def test_gradients_reach_image_and_sigma(attention):
    net = randomized(SmallDenoiser(0.75, attention=attention, **SMALL)).double()
    x = normal(2, 1, 4, 4).requires_grad_()
    sigma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, (x, sigma), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, s: net(x, s.expand(2)), (x, sigma), fast_mode=True)


@pytest.mark.parametrize("batch", [1, 2, 20, 128])
def test_an_image_does_not_depend_on_its_neighbours(shipped, batch):
    x = normal(256, 1, 8, 8)
    parts = torch.cat([shipped(part, 1.0) for part in x.split(batch)])
    assert torch.equal(parts, shipped(x, 1.0))


def test_patches_are_channels_of_a_smaller_image():
    patched = randomized(UNet(in_channels=3, patch=2, **SMALL)).double()
    plain = UNet(in_channels=12, **SMALL).double()
    plain.load_state_dict(patched.state_dict())
    x, c_noise = normal(2, 3, 8, 8), normal(2)
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), c_noise), 2)
    assert torch.equal(patched(x, c_noise), expected)


# ---- architecture


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(widths=(8, 16, 24), blocks=2, attention=(1, 2), embedding=32, dropout=0.1),
        dict(in_channels=3, widths=(8,), embedding=16),
    ],
)
def test_a_network_is_rebuilt_from_its_config(config):
    net = UNet(**config)
    twin = UNet(**json.loads(json.dumps(net.config)))
    twin.load_state_dict(net.state_dict())
    x = normal(2, net.config["in_channels"], 8, 8, dtype=torch.float32)
    randomized(net), randomized(twin)
    assert net(x, torch.zeros(2)).shape == x.shape
    assert torch.equal(net(x, torch.zeros(2)), twin(x, torch.zeros(2)))


def test_every_weight_matters():
    """Each parameter has a gradient: no layer is built and then forgotten."""
    net = randomized(UNet(attention=(1,), **SMALL)).requires_grad_()
    net(
        normal(2, 1, 8, 8, dtype=torch.float32), torch.tensor([0.3, -0.5])
    ).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_classifier_features_are_what_its_head_reads(classifier, digits):
    x = digits[0][:16]
    assert classifier.features(x).shape == (16, 64)
    assert torch.equal(classifier.head(classifier.features(x)), classifier(x))


# ---- files


@pytest.mark.parametrize("net", [SmallDenoiser(0.75, attention=(1,), **SMALL), Classifier(width=8)])
def test_a_saved_network_comes_back_rounded_to_half_precision(tmp_path, net):
    net = randomized(net)
    save_network(tmp_path / "net.safetensors", net, note="why not", steps=3)
    loaded = load_network(tmp_path / "net.safetensors")
    assert type(loaded) is type(net) and not loaded.training
    assert read_metadata(tmp_path / "net.safetensors")["note"] == "why not"
    for (name, a), b in zip(net.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a.half().float(), b) and not b.requires_grad, name
    save_network(tmp_path / "again.safetensors", loaded)
    again = load_network(tmp_path / "again.safetensors")
    for a, b in zip(again.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    save_network(path, Classifier(width=8))
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_network(path, Classifier(width=16))
    assert path.read_bytes() == before


def test_only_known_networks_are_saved(tmp_path):
    with pytest.raises(UsageError, match="cannot save a Linear; save one of: SmallDenoiser"):
        save_network(tmp_path / "net.safetensors", torch.nn.Linear(2, 2))


def damage(path, how):
    data = path.read_bytes()
    tensors, config = safetensors.torch.load(data), read_metadata(path)["config"]
    text = {"class": "Classifier", "config": config}
    if how == "cut":
        return data[: len(data) // 2]
    if how == "empty":
        return b""
    if how == "pickle":
        return b"\x80\x04cos\nsystem\n"
    if how == "no metadata":
        return safetensors.torch.save(tensors)
    if how == "other class":
        return safetensors.torch.save(tensors, text | {"class": "os.system"})
    if how == "other argument":
        return safetensors.torch.save(tensors, text | {"config": '{"width": 8, "code": "1"}'})
    if how == "bad config":
        return safetensors.torch.save(tensors, text | {"config": "[__import__('os')]"})
    if how == "other shape":
        return safetensors.torch.save(tensors, text | {"config": '{"width": 16}'})
    if how == "nan":
        tensors["head.bias"][0] = math.nan
        return safetensors.torch.save(tensors, text)
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how, sentence",
    [
        ("cut", "is not a complete safetensors file"),
        ("empty", "is not a complete safetensors file"),
        ("pickle", "is not a complete safetensors file"),
        ("no metadata", "class none, not one of: SmallDenoiser, Classifier"),
        ("other class", "class os.system, not one of: SmallDenoiser, Classifier"),
        ("other argument", "does not describe a Classifier .*code"),
        ("bad config", "does not describe a Classifier"),
        ("other shape", "does not describe a Classifier"),
        ("nan", "NaN or infinite"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(tmp_path, how, sentence):
    path = tmp_path / "net.safetensors"
    save_network(path, Classifier(width=8))
    path.write_bytes(damage(path, how))
    with pytest.raises(UsageError, match=sentence) as error:
        load_network(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def claimed(name, config, **tensors):
    """A network file that says this of itself, whatever its tensors."""
    tensors = tensors or {"w": torch.zeros(2)}
    return safetensors.torch.save(tensors, {"class": name, "config": json.dumps(config)})


def of_dtype(name):
    header = json.dumps({"class": "Classifier", "config": "{}"})
    tensor = f'"w":{{"dtype":"{name}","shape":[4],"data_offsets":[0,2]}}'
    text = f'{{"__metadata__":{header},{tensor}}}'.encode()
    return len(text).to_bytes(8, "little") + text + b"\0\0"


CLAIMS = {
    "a billion blocks": (claimed("SmallDenoiser", {"sigma_data": 1, "blocks": 10**9}), "fewer"),
    "a wide embedding": (
        claimed("SmallDenoiser", {"sigma_data": 1, "embedding": 10**10}),
        "10000000000",
    ),
    "a deep classifier": (claimed("Classifier", {"deeper": [1] * 3_000_000}), "fewer"),
    "many blocks": (claimed("EDMPrecond", {"num_blocks": 10**9}), "EDMPrecond"),
    "a long argument": (claimed("Classifier", {"x" * 10**6: 1}), "xxx"),
    "a long name": (claimed("x" * 10**6, {}), "xxx"),
    "four bits": (of_dtype("F4"), "does not describe"),
    "complex weights": (claimed("Classifier", {}, w=torch.ones(2) * 1j), "complex"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 4\n", "Git LFS pointer"),
    "a page": (b"<html>Sign in</html>", "web page"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_file_claims_keeps_no_computer_busy(tmp_path, one_sentence, name):
    content, word = CLAIMS[name]
    path = tmp_path / "net.safetensors"
    path.write_bytes(content)
    start = time.process_time()
    with one_sentence(str(path), word) as told:
        load_network(path)
    assert time.process_time() - start < 2 and len(str(told.value)) < 600


def test_pipes_and_devices_are_no_networks(tmp_path, one_sentence):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", "/dev/zero", tmp_path):
        with one_sentence("no file"):
            load_network(path)


def test_a_missing_file_is_told_in_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="there is no file .*nothing"):
        load_network(tmp_path / "nothing.safetensors")


# ---- training


def test_digits_are_what_they_should_be(digits):
    images, labels = digits
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert torch.equal((images + 1) * 8, ((images + 1) * 8).round())
    assert sorted(set(labels.tolist())) == list(range(10))


def test_a_split_is_a_partition():
    train, held_out = held_out_split(1797)
    assert len(held_out) == 359
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(1797))


def test_thirty_steps_lower_the_loss(digits):
    run = train_denoiser(digits[0], steps=30, batch=64, warmup=5, every=10, **SMALL)
    records = list(run)
    assert [r.step for r in records] == [10, 20, 30]
    assert 0.8 < records[0].loss < 1.6 and records[-1].loss < records[0].loss - 0.05


def test_training_is_reproducible_and_leaves_the_random_state_alone(digits):
    state = torch.get_rng_state()
    runs = [list(train_denoiser(digits[0], 4, batch=8, every=2, **SMALL)) for _ in range(2)]
    assert runs[0][-1].loss == runs[1][-1].loss
    assert torch.equal(torch.get_rng_state(), state)
    other = list(train_denoiser(digits[0], 4, batch=8, every=2, seed=1, **SMALL))
    assert other[-1].loss != runs[0][-1].loss


def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path, digits):
    settings = dict(steps=6, batch=8, every=2, warmup=2, dropout=0.1, **SMALL)
    *_, whole = train_denoiser(digits[0], **settings)
    checkpoint = tmp_path / "run.safetensors"
    run = train_denoiser(digits[0], checkpoint=checkpoint, **settings)
    assert next(run).step == 2 and next(run).step == 4
    run.close()
    first, resumed = train_denoiser(digits[0], checkpoint=checkpoint, **settings)
    assert first.step == 4 and resumed.step == 6 and resumed.loss == whole.loss
    for a, b in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)
    (done,) = train_denoiser(digits[0], checkpoint=checkpoint, **settings)
    assert done[:2] == whole[:2]


def test_a_training_may_be_lengthened_until_its_rate_falls(tmp_path, digits):
    settings = dict(batch=8, every=2, warmup=2, flip=True, **SMALL)
    *_, whole = train_denoiser(digits[0], 6, cooldown=2, **settings)
    checkpoint = tmp_path / "run.safetensors"
    run = train_denoiser(digits[0], 100, cooldown=50, checkpoint=checkpoint, **settings)
    assert next(run).step == 2 and next(run).step == 4
    run.close()
    *_, cooled = train_denoiser(digits[0], 6, cooldown=2, checkpoint=checkpoint, **settings)
    for a, b in zip(cooled.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UsageError, match="belongs to another run"):
        list(train_denoiser(digits[0], 100, cooldown=50, checkpoint=checkpoint, **settings))


def test_the_rate_rises_stays_and_falls(digits, monkeypatch):
    rates = []
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"])
    )
    list(train_denoiser(digits[0], 8, batch=1, lr=1.0, warmup=2, cooldown=4, **SMALL))
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.5 + 8**-0.5, 0.5, 0.5 - 8**-0.5])


@pytest.mark.parametrize(("given", "share"), [({}, 0.1), ({"unlabelled": 0.25}, 0.25)])
def test_a_share_is_shown_without_its_class(given, share, monkeypatch):
    """Every pixel of image i is i / 9, so an image tells its class, and 10 stands for none."""
    images, seen = (torch.arange(10) / 9).view(10, 1, 1, 1).expand(-1, -1, 4, 4), []
    monkeypatch.setattr(
        training,
        "_denoising_loss",
        lambda net, x, label, _: seen.append((x, label)) or net(x, 1.0, label).sum(),
    )
    list(train_denoiser(images, 1, batch=2000, labels=torch.arange(10), **given, **SMALL))
    ((x, label),) = seen
    hidden = label == 10
    assert hidden.double().mean() == pytest.approx(share, abs=0.05)
    assert torch.equal(label[~hidden], (9 * x[~hidden, 0, 0, 0]).round().long())


@pytest.mark.slow
def test_a_network_that_is_told_classes_learns_them():
    """Black images and white ones: noise hides which it was, so the class alone tells, or none."""
    images = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(-1, -1, 4, 4)
    settings = dict(lr=5e-3, warmup=5, ema_images=1000, labels=torch.arange(2), unlabelled=0.3)
    *_, last = train_denoiser(images, 150, **settings, **SMALL)
    assert last.network.config["classes"] == 2
    x = 5 * normal(40, 1, 4, 4)
    black, white, neither = (last.network(x, 5.0, torch.tensor([c])).mean() for c in range(3))
    assert black < neither < white and white - black > 0.6


@pytest.mark.parametrize("labels", [torch.zeros(1796).long(), torch.zeros(1797, 1).long()])
def test_every_image_needs_a_label(digits, labels, one_sentence):
    with one_sentence("training by class needs one label for each of the 1797 images"):
        next(train_denoiser(digits[0], 2, labels=labels, **SMALL))


def test_each_average_is_the_formula_of_edm(digits):
    """A half-life of one image among 64 leaves the newest weights, which the other averages."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = SmallDenoiser(digits[0].std().item(), in_channels=1, **SMALL)
    expected = torch.cat([w.detach().double().flatten() for w in start.parameters()])
    settings = dict(batch=64, warmup=1, cooldown=1, every=1, ema_images=(1, 20), **SMALL)
    for record in train_denoiser(digits[0], 8, **settings):
        newest, average = (
            torch.cat([w.double().flatten() for w in net.parameters()]) for net in record.averages
        )
        decay = 0.5 ** (64 / min(20, 0.05 * 64 * record.step))  # EDM, Table 7
        expected = decay * expected + (1 - decay) * newest
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
        assert record.network is record.averages[0]
        assert record.step < 6 or (average - newest).abs().max() > 1e-4


def test_an_interrupted_training_keeps_all_its_averages(tmp_path, digits):
    images, labels = digits
    settings = dict(steps=6, batch=8, every=2, warmup=2, labels=labels, ema_images=(4, 1), **SMALL)
    *_, whole = train_denoiser(images, **settings)
    settings["checkpoint"] = tmp_path / "run.safetensors"
    run = train_denoiser(images, **settings)
    assert next(run).step == 2 and next(run).step == 4
    run.close()
    first, resumed = train_denoiser(images, **settings)
    assert first.step == 4 and resumed.loss == whole.loss and len(resumed.averages) == 2
    for mine, other in zip(resumed.averages, whole.averages, strict=True):
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(UsageError, match="belongs to another run"):
        next(train_denoiser(images, **settings | {"ema_images": 4}))


def test_a_compiled_network_takes_every_step_and_is_not_what_is_kept(digits, monkeypatch):
    """A spy stands for torch.compile, which takes most of a minute on a processor."""
    given, calls = [], []

    def spy(net):
        given.append(net)
        return lambda *inputs: calls.append(len(inputs[0])) or net(*inputs)

    monkeypatch.setattr(torch, "compile", spy)
    settings = dict(steps=3, batch=8, **SMALL)
    (plain,) = train_denoiser(digits[0], **settings)
    assert not given
    (compiled,) = train_denoiser(digits[0], compiled=True, **settings)
    assert len(given) == 1 and calls == [8, 8, 8] and compiled.loss == plain.loss
    assert type(compiled.network) is SmallDenoiser
    for a, b in zip(compiled.network.parameters(), plain.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_flipping_shows_an_image_and_its_mirror_image_alike(digits, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training, "_denoising_loss", lambda net, x, *_: seen.append(x) or net(x, x.mean()).sum()
    )
    list(train_denoiser(digits[0][:1], 1, batch=400, flip=True, **SMALL))
    mirrored = (seen[0] == digits[0][0].flip(-1)).flatten(1).all(1)
    assert mirrored.sum() == pytest.approx(200, abs=60)
    assert torch.equal(seen[0][~mirrored], digits[0][:1].expand(400, -1, -1, -1)[~mirrored])


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_trains_almost_the_same_and_is_not_emulated(digits, supported, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    settings = dict(steps=4, batch=64, warmup=1, **SMALL)
    (exact,), (rounded,) = (
        list(train_denoiser(digits[0], bf16=b, **settings)) for b in (False, True)
    )
    assert (exact.loss != rounded.loss) == supported
    assert exact.loss == pytest.approx(rounded.loss, abs=0.02)
    assert all(p.dtype == torch.float32 for p in rounded.network.parameters())


def test_moved_images_are_windows_of_the_reflected_image():
    x = normal(50, 3, 8, 8)
    moved, padded = training._moved(x, 2), F.pad(x, 4 * [2], mode="reflect")
    places = [
        [(i, j) for i in range(5) for j in range(5) if torch.equal(m, p[:, i : i + 8, j : j + 8])]
        for m, p in zip(moved, padded, strict=True)
    ]
    assert all(len(found) == 1 for found in places)
    assert {i for ((i, _),) in places} == {j for ((_, j),) in places} == set(range(5))


def test_a_deeper_classifier_learns_from_moved_images_and_is_saved(tmp_path, digits):
    settings = dict(width=8, deeper=(12,), normalize=True, flip=True, shift=1, bf16=True)
    *_, last = train_classifier(*digits, 40, batch=64, every=20, **settings)
    layers = last.network.activations(digits[0][:5])
    shapes = [(5, 4, 8, 8), (5, 8, 8, 8), (5, 8, 4, 4), (5, 12, 2, 2)]
    assert [tuple(layer.shape) for layer in layers] == shapes
    assert last.network.features(digits[0][:5]).shape == (5, 12) and last.loss < 2.2
    save_network(tmp_path / "net.safetensors", last.network, torch.float32)
    same = load_network(tmp_path / "net.safetensors")
    assert torch.equal(same(digits[0]), last.network(digits[0]))


def test_a_checkpoint_of_another_run_is_refused(tmp_path, digits):
    checkpoint = tmp_path / "run.safetensors"
    list(train_denoiser(digits[0], 2, batch=4, checkpoint=checkpoint, **SMALL))
    with pytest.raises(UsageError, match="belongs to another run"):
        list(train_denoiser(digits[0], 3, batch=4, checkpoint=checkpoint, **SMALL))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UsageError, match="not a complete checkpoint"):
        list(train_denoiser(digits[0], 2, batch=4, checkpoint=checkpoint, **SMALL))


@pytest.mark.parametrize("change", [dict(steps=0), dict(batch=0), dict(images=torch.zeros(9, 2))])
def test_impossible_training_is_told_in_one_sentence(digits, change):
    settings = dict(images=digits[0], steps=2) | change
    with pytest.raises(UsageError, match=r"training needs images \(n, C, H, W\) or signals"):
        next(train_denoiser(**settings))


def test_the_average_of_constant_weights_is_those_weights(digits):
    (record,) = train_denoiser(digits[0], 3, batch=4, lr=0.0, **SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = SmallDenoiser(digits[0].std().item(), in_channels=1, **SMALL)
    for a, b in zip(record.network.parameters(), start.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_a_classifier_learns(digits):
    images, labels = digits
    *_, last = train_classifier(images[:500], labels[:500], steps=60, batch=64, every=20)
    assert (last.network(images[:500]).argmax(1) == labels[:500]).float().mean() > 0.6


# ---- what is shipped


def test_shipped_files_are_small_and_say_how_they_were_made():
    names = ("denoiser", "classifier", "perceptual")
    files = [WEIGHTS / f"digits_{name}.safetensors" for name in names]
    assert sum(file.stat().st_size for file in files) < 3_000_000
    for file in files:
        assert {"class", "config", "dataset", "steps", "seed"} <= set(read_metadata(file))


def test_shipped_sigma_data_is_that_of_the_data(shipped, digits):
    assert shipped.sigma_data == pytest.approx(digits[0].std().item(), rel=1e-6)


@pytest.mark.parametrize("sigma, least", [(0.05, 0.55), (0.2, 0.8), (1.0, 0.9), (20.0, 0.99)])
def test_shipped_denoiser_finds_the_noise(shipped, digits, sigma, least):
    """(x - D) / sigma correlates with the noise that was added; hardest where there is little."""
    noise = normal(256, 1, 8, 8)
    x = digits[0][:256].double() + sigma * noise
    found = (x - shipped(x, sigma)) / sigma
    assert torch.corrcoef(torch.stack([found.flatten(), noise.flatten()]))[0, 1] > least


def test_shipped_denoiser_sees_the_mean_in_pure_noise(shipped, digits):
    """At sigma = 80 nothing but the prior is left."""
    answer = shipped(80 * normal(256, 1, 8, 8), 80.0)
    assert (answer - digits[0].mean(0)).square().mean().sqrt() < 0.2


@pytest.mark.parametrize(("name", "seed"), [("classifier", 0), ("perceptual", 1)])
def test_shipped_classifiers_are_as_accurate_as_claimed(name, seed, digits):
    images, labels = digits
    path = WEIGHTS / f"digits_{name}.safetensors"
    _, held_out = held_out_split(len(images), seed=seed)
    right = (load_network(path)(images[held_out]).argmax(1) == labels[held_out]).sum().item()
    claim = read_metadata(path)["held_out_accuracy"]
    assert claim == f"{right} of {len(held_out)}" and right / len(held_out) > 0.98


def test_files_that_use_a_former_name_of_a_class_still_load(tmp_path):
    """EDMPrecond once was the small network here, and NVIDIA's of that name was EDMDenoiser."""
    small = randomized(SmallDenoiser(0.75, **SMALL))
    edm = randomized(
        EDMPrecond(8, 1, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1)
    )
    for net, former in ((small, "EDMPrecond"), (edm, "EDMDenoiser")):
        path = tmp_path / f"{former}.safetensors"
        save_network(path, net, torch.float32)
        metadata = read_metadata(path) | {"class": former}
        safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)
        again = load_network(path)
        assert type(again) is type(net)
        for key, value in net.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key
    assert type(load_network(WEIGHTS / "digits_denoiser.safetensors")) is SmallDenoiser
