"""A small classifier: its features define a Fréchet distance, its layers a perceptual one."""

import torch.nn.functional as F
from torch import nn


class Classifier(nn.Module):
    """x (B, in_channels, 8, 8) or larger, in [-1, 1] -> logits (B, classes).

    Three convolutions, the third at half the resolution; then one for each number of channels in
    `deeper`, each at half the resolution of the one before. `normalize` normalises each of them
    over the batch. `features(x)` is (B, channels of the last): the last ReLU activations, averaged
    over the pixels, which is how Inception features are taken for the FID (Heusel et al. 2017).
    """

    def __init__(self, in_channels=1, width=64, classes=10, dropout=0.0, deeper=(),
                 normalize=False):  # fmt: skip
        super().__init__()
        self.config = dict(in_channels=in_channels, width=width, classes=classes, dropout=dropout)
        self.config |= dict(deeper=list(deeper), normalize=normalize)
        c, self.depth = in_channels, 3 + len(deeper)
        for i, c_out in enumerate((width // 2, width, width, *deeper), start=1):
            setattr(self, f"conv_{i}", nn.Conv2d(c, c_out, 3, padding=1))
            setattr(self, f"norm_{i}", nn.BatchNorm2d(c_out) if normalize else nn.Identity())
            c = c_out
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(c, classes)

    def activations(self, x):
        """What each ReLU gives: (B, width / 2, H, W), (B, width, H, W), (B, width, H/2, W/2) ..."""
        x, layers = x.to(self.head.weight.dtype), []
        for i in range(1, self.depth + 1):
            x = getattr(self, f"conv_{i}")(F.max_pool2d(x, 2) if i > 2 else x)
            layers.append(x := F.relu(getattr(self, f"norm_{i}")(x)))
        return layers

    def features(self, x):
        return self.activations(x)[-1].mean(dim=(2, 3))

    def forward(self, x):
        return self.head(self.dropout(self.features(x)))
