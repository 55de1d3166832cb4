"""A small classifier: its features define a Fréchet distance, its layers a perceptual one."""

import torch.nn.functional as F
from torch import nn


class Classifier(nn.Module):
    """x (B, in_channels, 8, 8) or larger, in [-1, 1] -> logits (B, classes).

    `features(x)` is (B, width): the last ReLU activations, averaged over the pixels, which is how
    Inception features are taken for the FID (Heusel et al. 2017).
    """

    def __init__(self, in_channels=1, width=64, classes=10, dropout=0.0):
        super().__init__()
        self.config = dict(in_channels=in_channels, width=width, classes=classes, dropout=dropout)
        self.conv_1 = nn.Conv2d(in_channels, width // 2, 3, padding=1)
        self.conv_2 = nn.Conv2d(width // 2, width, 3, padding=1)
        self.conv_3 = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def activations(self, x):
        """What each ReLU gives: (B, width / 2, H, W), (B, width, H, W), (B, width, H/2, W/2)."""
        first = F.relu(self.conv_1(x.to(self.head.weight.dtype)))
        second = F.relu(self.conv_2(first))
        return first, second, F.relu(self.conv_3(F.max_pool2d(second, 2)))

    def features(self, x):
        return self.activations(x)[-1].mean(dim=(2, 3))

    def forward(self, x):
        return self.head(self.dropout(self.features(x)))
