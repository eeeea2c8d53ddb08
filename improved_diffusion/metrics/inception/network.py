"""The Inception-v3 network of 2015-12-05, on whose features FID is defined (Heusel et al. 2017, arXiv:1706.08500).

It differs from the Inception-v3 of later libraries in two ways, and FID depends on both: the average pools of the pool
branches do not count their padding, and the pool branch of the last block takes a maximum. Layers bear the names of the
published PyTorch weights. Batch normalization is folded into the convolutions, as the network is only ever evaluated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Feature size -> the layer whose output, averaged over space, is that feature.
POOLED_LAYERS = {64: "MaxPool_1", 192: "MaxPool_2", 768: "Mixed_6e", 2048: "Mixed_7c"}
# Of sFID (Nash et al. 2021, arXiv:2103.03841): the first 7 channels of this layer, that is of its 1x1 branch, at each
# of the 17x17 positions.
SPATIAL, SPATIAL_LAYER, SPATIAL_CHANNELS = 2023, "Mixed_6d", 7
# Of the Inception Score: the logits, without their bias, of the 1008 outputs.
LOGITS, CLASSIFIER = 1008, "classifier"


class Inception(nn.Sequential):
    """The network as far as the deepest of `features`: Inception((64,)) costs a ninth of Inception((2048,)).

    Args:
        features: sizes to return: 64, 192, 768 and 2048 are averages over space of ever deeper layers, 2023 keeps space
            (SPATIAL) and 1008 are the logits (LOGITS).
    """

    def __init__(self, features: Iterable[int]):
        layers = trunk()
        size_at = {name: size for size, name in feature_layers().items() if size in set(features)}
        depth = max(list(layers).index(name) for name in size_at) + 1
        super().__init__(OrderedDict(list(layers.items())[:depth]))
        self.size_at = size_at

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """Images (N, 3, 299, 299), scaled by (x - 128) / 128, to {size: features (N, size)}, in order of depth."""
        features = {}
        for name, layer in self.named_children():
            x = layer(x)
            size = self.size_at.get(name)
            if size == SPATIAL:
                features[size] = x[:, :SPATIAL_CHANNELS].flatten(1)
            elif size == LOGITS:
                features[size] = x
            elif size is not None:
                features[size] = x.mean(dim=(2, 3))
        return features


def feature_layers() -> dict[int, str]:
    """Feature size -> the layer after which it is taken."""
    return POOLED_LAYERS | {SPATIAL: SPATIAL_LAYER, LOGITS: CLASSIFIER}


class Classifier(nn.Linear):
    """From the last feature maps to the logits."""

    def __init__(self) -> None:
        super().__init__(2048, LOGITS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(dim=(2, 3)))


def trunk() -> dict[str, nn.Module]:
    """All the layers by name, in order; the comments give the shape of each stage's output."""
    return {
        "Conv2d_1a_3x3": Conv(3, 32, 3, stride=2, padding="valid"),
        "Conv2d_2a_3x3": Conv(32, 32, 3, padding="valid"),
        "Conv2d_2b_3x3": Conv(32, 64, 3),
        "MaxPool_1": nn.MaxPool2d(3, stride=2),  # (N, 64, 73, 73)
        "Conv2d_3b_1x1": Conv(64, 80, 1),
        "Conv2d_4a_3x3": Conv(80, 192, 3, padding="valid"),
        "MaxPool_2": nn.MaxPool2d(3, stride=2),  # (N, 192, 35, 35)
        "Mixed_5b": BlockA(192, pool_channels=32),
        "Mixed_5c": BlockA(256, pool_channels=64),
        "Mixed_5d": BlockA(288, pool_channels=64),  # (N, 288, 35, 35)
        "Mixed_6a": BlockB(288),
        "Mixed_6b": BlockC(768, channels=128),
        "Mixed_6c": BlockC(768, channels=160),
        "Mixed_6d": BlockC(768, channels=160),
        "Mixed_6e": BlockC(768, channels=192),  # (N, 768, 17, 17)
        "Mixed_7a": BlockD(768),
        "Mixed_7b": BlockE(1280, pool=average_pool),
        "Mixed_7c": BlockE(2048, pool=max_pool),  # (N, 2048, 8, 8)
        CLASSIFIER: Classifier(),
    }


class Conv(nn.Conv2d):
    """Convolution (with batch normalization folded into its weight and bias), then ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: str = "same",
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


def average_pool(x: Tensor) -> Tensor:
    """3x3 mean at stride 1 over the pixels that exist: TensorFlow does not count the padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """3x3 maximum at stride 1."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(nn.Module):
    """35x35: branches of 1x1, 5x5 and two 3x3 convolutions, and a pool."""

    def __init__(self, in_channels: int, pool_channels: int):
        super().__init__()
        self.branch1x1 = Conv(in_channels, 64, 1)
        self.branch5x5_1 = Conv(in_channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(in_channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3dbl, branch_pool], dim=1)


class BlockB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3 = Conv(in_channels, 384, 3, stride=2, padding="valid")
        self.branch3x3dbl_1 = Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), branch3x3dbl, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(nn.Module):
    """17x17: 7x7 convolutions factored into 1x7 and 7x1."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.branch1x1 = Conv(in_channels, 192, 1)
        self.branch7x7_1 = Conv(in_channels, channels, 1)
        self.branch7x7_2 = Conv(channels, channels, (1, 7))
        self.branch7x7_3 = Conv(channels, 192, (7, 1))
        self.branch7x7dbl_1 = Conv(in_channels, channels, 1)
        self.branch7x7dbl_2 = Conv(channels, channels, (7, 1))
        self.branch7x7dbl_3 = Conv(channels, channels, (1, 7))
        self.branch7x7dbl_4 = Conv(channels, channels, (7, 1))
        self.branch7x7dbl_5 = Conv(channels, 192, (1, 7))
        self.branch_pool = Conv(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([self.branch1x1(x), branch7x7, branch7x7dbl, branch_pool], dim=1)


class BlockD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.branch3x3_1 = Conv(in_channels, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, padding="valid")
        self.branch7x7x3_1 = Conv(in_channels, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        return torch.cat([branch3x3, branch7x7x3, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """8x8: 3x3 convolutions split into a 1x3 and a 3x1 side by side."""

    def __init__(self, in_channels: int, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.branch1x1 = Conv(in_channels, 320, 1)
        self.branch3x3_1 = Conv(in_channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(in_channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(in_channels, 192, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_1(x)
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(branch3x3),
                self.branch3x3_2b(branch3x3),
                self.branch3x3dbl_3a(branch3x3dbl),
                self.branch3x3dbl_3b(branch3x3dbl),
                self.branch_pool(self.pool(x)),
            ],
            dim=1,
        )
