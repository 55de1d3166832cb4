"""A small classifier, trained in one appendix only, on training the bundled networks.

In the models of that appendix its features define a Fréchet distance, and its layers a perceptual
distance.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError


class Classifier(nn.Module):
    """A small classifier: x (B, in_channels, 8, 8) or larger, in [-1, 1] -> logits (B, classes).

    It has three convolutions, the third at half the resolution, and then one for each number of
    channels in `deeper`, each at half the resolution of the one before. With `normalize` the
    answers of each convolution are normalised over the batch. With `dimensions` 1 x is a signal
    (B, in_channels, length) instead of an image.
    """

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 64,
        classes: int = 10,
        dropout: float = 0.0,
        deeper: Sequence[int] = (),
        normalize: bool = False,
        dimensions: int = 2,
    ):
        super().__init__()
        self.config: dict[str, Any] = dict(
            in_channels=in_channels, width=width, classes=classes, dropout=dropout
        )
        self.config |= dict(deeper=list(deeper), normalize=normalize, dimensions=dimensions)
        layers = {
            1: (nn.Conv1d, nn.BatchNorm1d, F.max_pool1d),
            2: (nn.Conv2d, nn.BatchNorm2d, F.max_pool2d),
        }
        if dimensions not in layers:
            raise UsageError(f"a classifier has 1 or 2 dimensions, not {dimensions}")
        conv, norm, self.pool = layers[dimensions]
        c, self.depth = in_channels, 3 + len(deeper)
        for i, c_out in enumerate((width // 2, width, width, *deeper), start=1):
            setattr(self, f"conv_{i}", conv(c, c_out, 3, padding=1))
            setattr(self, f"norm_{i}", norm(c_out) if normalize else nn.Identity())
            c = c_out
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(c, classes)

    def activations(self, x: Tensor) -> list[Tensor]:
        """Return the answers of all ReLUs.

        Of images their shapes are (B, width / 2, H, W), (B, width, H, W), (B, width, H/2, W/2) and
        so on.
        """
        x, layers = x.to(self.head.weight.dtype), []
        for i in range(1, self.depth + 1):
            x = getattr(self, f"conv_{i}")(self.pool(x, 2) if i > 2 else x)
            layers.append(x := F.relu(getattr(self, f"norm_{i}")(x)))
        return layers

    def features(self, x: Tensor) -> Tensor:
        """Return the last ReLU's answers averaged over the pixels, (B, channels).

        Inception features are taken for the FID in the same way (Heusel et al. 2017).
        """
        return self.activations(x)[-1].flatten(2).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes)."""
        return self.head(self.dropout(self.features(x)))
