"""What the tests share: errors told in one sentence, two small models, an empty results folder."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import s4s_core as s4s


def pytest_ignore_collect(collection_path, config):
    """Timings are run on request, with --benchmark-only: they would only slow the tests down."""
    on_request = config.getoption("benchmark_only", default=False)
    return True if collection_path.name == "benchmarks" and not on_request else None


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Every test has a results folder of its own."""
    monkeypatch.setenv("S4S_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def one_sentence():
    """`with one_sentence("order", "nfe"):` expects a UsageError of one line with those words."""

    @contextmanager
    def expect(*words: str, error: type[Exception] = s4s.UsageError):
        with pytest.raises(error) as info:
            yield info
        text = str(info.value)
        assert text.strip() and "\n" not in text
        for word in words:
            assert word in text, f"{word!r} is not in: {text}"

    return expect


class ToyDenoiser:
    """Smooth, bounded and nonlinear in y = x / alpha and ln s: no solver is exact on it."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x, t):
        y, s = x / self.schedule.alpha(t), self.schedule.s(t)
        return torch.tanh(0.3 + y / (1 + s)) * torch.cos(0.3 * s.log() + 0.2 * y / (1 + s))


@pytest.fixture
def toy():
    return ToyDenoiser


@pytest.fixture
def noise():
    """`noise(seed, *shape)`: standard normal float64."""

    def draw(seed: int, *shape: int):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw


@pytest.fixture
def mixture():
    """`mixture(**settings)`: the setup of the 2-D mixture, small enough to learn in a second."""
    small = {
        "teacher_nfe": 30,
        "n_train": 24,
        "n_valid": 16,
        "n_train_alt": 24,
        "n_valid_alt": 16,
        "batch_size": 8,
        "batch_size_alt": 8,
        "epochs": 2,
        "rounds": 2,
        "phase_epochs": 1,
    }

    def make(**settings):
        setup = s4s.load("mixture")
        return replace(setup, params=setup.params.override(**{**small, **settings}))

    return make


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A file in torch-fidelity's format, with random weights that keep the features apart."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Untrained(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    network = Untrained("untrained", ["2048"], feature_extractor_weights_path=path)
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        if weight.ndim == 4:
            weight.copy_(torch.randn(weight.shape, generator=generator))
            weight.mul_((2 / weight[0].numel()) ** 0.5)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def vgg_home(tmp_path_factory):
    """A TORCH_HOME with VGG-16 as torchvision keeps it, of random weights (classifier: zeros)."""
    from torchvision.models import VGG16_Weights, vgg16

    with torch.device("meta"):
        shapes = vgg16().state_dict()
    generator, state = torch.Generator().manual_seed(0), {}
    for name, tensor in shapes.items():
        if name.startswith("features") and tensor.ndim == 4:
            scale = (2 / tensor[0].numel()) ** 0.5
            state[name] = scale * torch.randn(tensor.shape, generator=generator)
        else:
            state[name] = torch.zeros(1).expand(tensor.shape)  # one number in the file
    home = tmp_path_factory.mktemp("torch_home")
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / VGG16_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    return home


@pytest.fixture
def squeeze():
    """`squeeze(resize)`: LPIPS with the smallest trunk, from torchvision's cache."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(folder.glob("squeezenet1_1-*.pth")):
        pytest.skip("needs torchvision's squeezenet1_1 weights in $TORCH_HOME/hub/checkpoints")
    return lambda resize=None: s4s.lpips_distance("squeeze", resize)
