"""What people write by hand: the constructions that structured pruning usually breaks on, each as a small network."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.network import Builder, Network, Table


def _conv(a: int, b: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(a, b, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU(inplace=True))


class Pictures(nn.Module):
    """A stem, a body, and a head over the mean of the pixels."""

    def __init__(self, body: nn.Module, width: int = 16, out: int | None = None) -> None:
        super().__init__()
        self.stem, self.body, self.head = _conv(3, width), body, nn.Linear(out or width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class ShuffleUnit(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self, width: int = 24, groups: int = 3) -> None:
        super().__init__()
        self.groups = groups
        self.first, self.deep = _conv(width, width, 1, groups=groups), _conv(width, width, groups=width)
        self.last = _conv(width, width, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        n, c, h, w = y.size()
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return x + self.last(self.deep(y))


class CBAM(nn.Module):
    """Channel gate (mean and max through one MLP) and spatial gate."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mlp(F.avg_pool2d(x, (x.size(2), x.size(3)))) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * gate.sigmoid().unsqueeze(2).unsqueeze(3).expand_as(x)
        pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * self.spatial(pooled).sigmoid()


class SqueezeExcite(nn.Module):
    """The usual gate, inside a residual bottleneck."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.wide, self.deep = _conv(width, 4 * width, 1), _conv(4 * width, 4 * width, groups=4 * width)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 8, 1), nn.SiLU(), nn.Conv2d(8, 64, 1), nn.Hardsigmoid()
        )
        self.narrow = nn.Sequential(nn.Conv2d(4 * width, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(self.wide(x))
        return x + self.narrow(y * self.gate(y))


class ECA(nn.Module):
    """Efficient channel attention: a convolution *along* the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv1d(1, 1, 3, padding=1, bias=False), _conv(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid().transpose(1, 2).unsqueeze(-1)
        return self.after(x * gate)


class NonLocal(nn.Module):
    """Non-local block with subsampled keys, as in video networks."""

    def __init__(self) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(16, 8, 1) for _ in range(3))
        self.out, self.pool = nn.Conv2d(8, 16, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        theta = self.theta(x).flatten(2).transpose(1, 2)
        phi, g = self.pool(self.phi(x)).flatten(2), self.pool(self.g(x)).flatten(2).transpose(1, 2)
        y = torch.matmul(torch.matmul(theta, phi).softmax(-1), g).transpose(1, 2).reshape(n, -1, *x.shape[2:])
        return x + self.out(y)


class PixelShuffle(nn.Module):
    """Super-resolution: several residual blocks, then sub-pixel convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.ModuleList(nn.Sequential(_conv(16, 24), nn.Conv2d(24, 16, 3, padding=1)) for _ in range(2))
        self.up = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(16))
        self.tail = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = skip = self.head(x)
        for block in self.body:
            x = x + 0.1 * block(x)
        return self.tail(self.up(x + skip))


class SpaceToDepth(nn.Module):
    """Pixels are moved into channels by hand (YOLOv5's focus) and by the op."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = _conv(12, 16), _conv(64, 32), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1)
        return self.head(self.second(F.pixel_unshuffle(self.first(x), 2)))


class UNet(nn.Module):
    """Encoder, decoder, skips by concatenation, transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_conv(3, 8), _conv(8, 16), _conv(16, 32)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)])
        self.merge = nn.ModuleList([_conv(32, 16), _conv(16, 8)])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for k, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if k else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


class FPN(nn.Module):
    """A pyramid: lateral convolutions, upsampling by addition, one head for all levels, outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_conv(3, 8, stride=2), _conv(8, 16, stride=2), _conv(16, 32, stride=2)])
        self.lateral = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in (8, 16, 32))
        self.head = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
        self.boxes, self.classes = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        levels = []
        for block, lateral in zip(self.blocks, self.lateral, strict=True):
            x = block(x)
            levels.append(lateral(x))
        for k in (1, 0):
            levels[k] = levels[k] + F.interpolate(levels[k + 1], scale_factor=2.0, mode="nearest")
        heads = [self.head(level) for level in levels]
        return {"boxes": [self.boxes(h).flatten(2) for h in heads], "classes": [self.classes(h) for h in heads]}


class DenseBlock(nn.Module):
    """Every layer reads all before it, cut again by a transition."""

    def __init__(self, width: int = 16, growth: int = 8, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width + k * growth), nn.ReLU(), nn.Conv2d(width + k * growth, growth, 3, 1, 1))
            for k in range(count)
        )
        self.transition = _conv(width + count * growth, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.transition(x)


class Cell(nn.Module):
    """A cell as architecture search finds them: mixed ops, sums of two inputs, concatenation of the nodes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.left, self.right = _conv(width, 8, 1), _conv(width, 8, 1)
        self.separable = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.alpha = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        weights = self.alpha.softmax(0)
        mixed = weights[0] * self.separable(a) + weights[1] * self.pool(a) + weights[2] * a
        first = mixed + b
        second = self.dilated(first) + F.max_pool2d(b, 3, 1, 1)
        return torch.cat([first, second], dim=1)


class Ghost(nn.Module):
    """Ghost module: cheap depthwise channels next to real ones, then a slice of them."""

    def __init__(self, width: int = 16, out: int = 24) -> None:
        super().__init__()
        self.out = out
        self.primary, self.cheap = _conv(width, 12, 1), _conv(12, 12, groups=12)

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)[:, : self.out]


class Multiplied(nn.Module):
    """Depthwise with a multiplier of three, and a grouped convolution that widens."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.wide = nn.Conv2d(16, 48, 3, padding=1, groups=16), nn.Conv2d(48, 96, 3, padding=1, groups=4)
        self.norm, self.out = nn.GroupNorm(8, 96), nn.Conv2d(96, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.norm(self.wide(F.silu(self.deep(x))))))


class SplitAttention(nn.Module):
    """Selective kernels: two branches weighted by a softmax over the branches."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.small, self.large = _conv(width, width), _conv(width, width, 5)
        self.squeeze, self.excite = nn.Linear(width, 8), nn.Linear(8, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.small(x), self.large(x)], dim=1)
        pooled = branches.sum(1).mean((2, 3))
        weights = self.excite(self.squeeze(pooled).relu()).view(-1, 2, self.width).softmax(1)
        return (branches * weights[..., None, None]).sum(1)


class Reparametrised(nn.Module):
    """RepVGG: three branches that are added, each with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.one = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.identity, self.next = nn.BatchNorm2d(16), _conv(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(F.relu(self.big(x) + self.one(x) + self.identity(x)))


class Gated(nn.Module):
    """GLU, maxout by reshape, and a gate by chunk, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.glu, self.gate, self.maxout = nn.Conv2d(16, 32, 1), nn.Conv2d(16, 48, 1), nn.Conv2d(24, 40, 1)
        self.out = nn.Conv2d(20, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.glu(x), dim=1)
        value, gate = self.gate(x).chunk(2, dim=1)
        x = self.maxout(value * gate.tanh())
        x = x.reshape(x.shape[0], -1, 2, *x.shape[2:]).amax(2)
        return self.out(x)


class CoordConv(nn.Module):
    """Coordinates as extra channels, made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(18, 24, 3, padding=1), nn.Conv2d(26, 16, 1)

    @staticmethod
    def coordinates(x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        ys = torch.linspace(-1, 1, h, dtype=x.dtype).view(1, 1, h, 1).expand(n, 1, h, w)
        xs = torch.linspace(-1, 1, w, dtype=x.dtype).view(1, 1, 1, w).expand(n, 1, h, w)
        return torch.cat([x, ys, xs], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.coordinates(self.first(self.coordinates(x)).relu()))


class Dynamic(nn.Module):
    """Control flow that depends on the data and on the depth, with layers that are used a number of times."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other = _conv(16, 16), _conv(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.shared(x)
            if x.mean() > -1e6:
                x = self.other(x) + x
        return x


class FrozenNorm(nn.Module):
    """Batch norm whose four vectors are buffers, as detection backbones have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + 1e-5).rsqrt()
        return x * scale + (b - rm * scale)


class LayerScaled(nn.Module):
    """ConvNeXt block: depthwise, channels last, norm over the last dim, MLP, learned scale, channels first."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.deep, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(0.1 * torch.ones(width))
        self.grn = nn.Parameter(torch.ones(1, 1, 1, 4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.wide(self.norm(self.deep(x).permute(0, 2, 3, 1))))
        energy = y.norm(p=2, dim=(1, 2), keepdim=True)
        y = y + self.grn * y * (energy / (energy.mean(-1, keepdim=True) + 1e-6))
        return x + (self.gamma * self.narrow(y)).permute(0, 3, 1, 2)


class LayerNorm2d(nn.Module):
    """Norm over the channels of pictures, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(var + 1e-6)) + self.bias[:, None, None]


class Adaptive(nn.Module):
    """AdaIN: a style vector gives scale and shift of an instance norm; two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.style = _conv(3, 16), nn.InstanceNorm2d(16), nn.Linear(6, 32)
        self.head = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.style(style)[..., None, None].chunk(2, 1)
        return self.head((1 + scale) * self.norm(self.first(x)) + shift)


class Siamese(nn.Module):
    """One tower called on two inputs, whose outputs are compared in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(_conv(3, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 24))
        self.head = nn.Linear(48, 2)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.tower(a), self.tower(b)
        return self.head(torch.cat([(a - b).abs(), a * b], dim=-1)), F.cosine_similarity(a, b)


class FlattenHead(nn.Module):
    """Channels times pixels into a linear layer, as in LeNet and VGG."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_conv(3, 8), nn.MaxPool2d(4), _conv(8, 16), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class FixedView(FlattenHead):
    """The same with the number of features in a view, from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.features_out = 16 * 4 * 4
        self.head = nn.Sequential(nn.Linear(self.features_out, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).view(-1, self.features_out))


class Bilinear(nn.Module):
    """Two features of two inputs, multiplied by a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 16), nn.Linear(7, 24)
        self.both, self.head = nn.Bilinear(16, 24, 20), nn.Linear(20, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.both(self.left(a).relu(), self.right(b).relu()).relu())


class FactorisedBilinear(nn.Module):
    """MFB pooling: multiply, reshape to (k, o), sum over k, signed root, normalise."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 48), nn.Linear(7, 48), nn.Linear(16, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = (self.left(a) * self.right(b)).view(a.shape[0], -1, 3).sum(2)
        return self.head(F.normalize(x.abs().sqrt() * x.sign(), dim=-1))


class DeepFM(nn.Module):
    """Recommendation: embeddings of fields, their pairwise products, and a tower over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fields = nn.ModuleList(nn.Embedding(n, 8) for n in (10, 20, 30))
        self.linear = nn.ModuleList(nn.Embedding(n, 1) for n in (10, 20, 30))
        self.tower = nn.Sequential(nn.Linear(24 + 4, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 1)

    def forward(self, fields: Tensor, dense: Tensor) -> Tensor:
        columns = fields.unbind(1)
        vectors = torch.stack([f(c) for f, c in zip(self.fields, columns, strict=True)], dim=1)
        pairs = 0.5 * (vectors.sum(1) ** 2 - (vectors**2).sum(1)).sum(1, keepdim=True)
        first = sum(f(c) for f, c in zip(self.linear, columns, strict=True))
        return self.head(self.tower(torch.cat([vectors.flatten(1), dense], dim=1))) + pairs + first


class DLRM(nn.Module):
    """Recommendation: bag embeddings and a dense tower interact by dot products of which the triangle is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, 16, mode="sum") for n in (10, 20))
        self.top = nn.Sequential(nn.Linear(16 + 3, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        all_of_them = torch.stack([x, *(bag(s) for bag, s in zip(self.bags, sparse, strict=True))], dim=1)
        products = torch.bmm(all_of_them, all_of_them.transpose(1, 2))
        i, j = torch.tril_indices(3, 3, offset=-1)
        return self.top(torch.cat([x, products[:, i, j]], dim=1))


class PointNet(nn.Module):
    """Points: shared MLP by 1-d convolutions, a learned transform, maximum over points, local next to global."""

    def __init__(self) -> None:
        super().__init__()
        self.align = nn.Sequential(nn.Conv1d(3, 16, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten())
        self.matrix = nn.Linear(16, 9)
        self.local, self.wide = nn.Conv1d(3, 16, 1), nn.Sequential(nn.Conv1d(16, 64, 1), nn.BatchNorm1d(64))
        self.head = nn.Sequential(nn.Conv1d(80, 32, 1), nn.ReLU(), nn.Conv1d(32, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix(self.align(x)).view(-1, 3, 3)
        x = self.local(torch.bmm(x.transpose(2, 1), matrix).transpose(2, 1)).relu()
        glob = torch.max(self.wide(x), 2, keepdim=True)[0]
        return self.head(torch.cat([x, glob.repeat(1, 1, x.shape[2])], dim=1))


class EdgeConv(nn.Module):
    """Points: differences to gathered neighbours (DGCNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(3, 16)
        self.edge = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 24))
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        near = torch.cdist(x, x).topk(3, largest=False).indices
        h = self.lift(x).relu()
        batch = torch.arange(x.shape[0])[:, None, None]
        neighbours = h[batch, near]
        here = h.unsqueeze(2).expand(-1, -1, 3, -1)
        return self.head(self.edge(torch.cat([here, neighbours - here], dim=-1)).amax(2))


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residuals and a sum of skips."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 16, 1)
        self.filters = nn.ModuleList(nn.Conv1d(16, 24, 2, dilation=2**k) for k in range(3))
        self.gates = nn.ModuleList(nn.Conv1d(16, 24, 2, dilation=2**k) for k in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(24, 20, 1) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Conv1d(24, 16, 1) for _ in range(3))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(20, 20, 1), nn.ReLU(), nn.Conv1d(20, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), None
        for k, (f, g, s, m) in enumerate(zip(self.filters, self.gates, self.skips, self.mixes, strict=True)):
            padded = F.pad(x, (2**k, 0))
            y = f(padded).tanh() * g(padded).sigmoid()
            total = s(y) if total is None else total + s(y)
            x = x + m(y)
        return self.head(total)


class WeightNormed(nn.Module):
    """Old-style weight norm (two parameters and a hook) on convolutions."""

    def __init__(self) -> None:
        super().__init__()
        with_norm = nn.utils.weight_norm
        self.first, self.second = with_norm(nn.Conv1d(4, 32, 3, padding=1)), with_norm(nn.Conv1d(32, 24, 3, padding=1))
        self.head = nn.Conv1d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


class Parametrised(nn.Module):
    """Weight norm and spectral norm as parametrisations next to ordinary layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(8, 32))
        self.second, self.third = nn.Linear(32, 48), nn.utils.parametrizations.spectral_norm(nn.Linear(48, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x).relu()).relu()).relu())


class VAE(nn.Module):
    """A variational autoencoder, which adds noise in training only, or (`sampled`) always."""

    def __init__(self, sampled: bool = False) -> None:
        super().__init__()
        self.sampled = sampled
        self.encoder = nn.Sequential(nn.Linear(32, 48), nn.ReLU())
        self.mean, self.spread = nn.Linear(48, 12), nn.Linear(48, 12)
        self.decoder = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 32))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        mean, spread = self.mean(h), self.spread(h)
        noise = torch.randn_like(spread) if self.training or self.sampled else 0.0
        return self.decoder(mean + torch.exp(0.5 * spread) * noise)


class Generator(nn.Module):
    """A DCGAN generator that reshapes a linear layer into a picture."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.start = nn.Linear(10, width * 16)
        self.up = nn.Sequential(
            *(nn.ConvTranspose2d(width, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.up(self.start(z).view(-1, self.width, 4, 4))


class Experts(nn.Module):
    """Mixture of experts with dense routing: stacked weights, all experts run, a softmax weighs them."""

    def __init__(self, width: int = 24, hidden: int = 32, count: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(8, width)
        self.router = nn.Linear(width, count)
        self.up = nn.Parameter(torch.randn(count, width, hidden) * 0.2)
        self.down = nn.Parameter(torch.randn(count, hidden, width) * 0.2)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        weights = self.router(x).softmax(-1)
        y = torch.einsum("bsd,edh->bseh", x, self.up).relu()
        y = torch.einsum("bseh,ehd->bsed", y, self.down)
        return self.head(x + torch.einsum("bsed,bse->bsd", y, weights))


class SparseExperts(nn.Module):
    """Mixture of experts as modules, with tokens picked by top-k and added back where they came from."""

    def __init__(self, width: int = 24, count: int = 3) -> None:
        super().__init__()
        self.inner, self.router = nn.Linear(8, width), nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(count)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == k)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return self.head(x + out.view_as(x))


class Attention(nn.Module):
    """Attention by hand, in the ways people write it.

    Args:
        fused: one projection for q, k and v, "last" reshaped to (3, heads, dim), "first" to (heads, 3, dim),
            "chunk" cut in three, "no" three projections.
        kv_heads: fewer heads of keys and values (grouped queries).
        rotary: turns the pairs of q and k by position.
        relative: adds a learned table of relative positions.
    """

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        fused: str = "no",
        kv_heads: int | None = None,
        rotary: bool = False,
        relative: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, width // heads
        self.fused, self.rotary = fused, rotary
        if fused == "no":
            self.q = nn.Linear(width, width)
            self.k, self.v = (nn.Linear(width, self.kv_heads * self.head_dim) for _ in range(2))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(2 * 8 - 1, heads) * 0.1) if relative else None

    def split(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, length, _ = x.shape
        if self.fused == "last":
            q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        elif self.fused == "first":
            q, k, v = self.qkv(x).view(n, length, self.heads, 3 * self.head_dim).transpose(1, 2).chunk(3, dim=-1)
        elif self.fused == "chunk":
            q, k, v = (t.view(n, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        else:
            q = self.q(x).view(n, length, self.heads, self.head_dim).transpose(1, 2)
            k, v = (
                f(memory).view(n, memory.shape[1], self.kv_heads, self.head_dim).transpose(1, 2)
                for f in (self.k, self.v)
            )
        return q, k, v

    @staticmethod
    def turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        position = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
        angle = position * 10000 ** (-torch.arange(half, dtype=x.dtype) / half)
        cos, sin = (torch.cat([t, t], dim=-1) for t in (angle.cos(), angle.sin()))
        a, b = x[..., :half], x[..., half:]
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x, x if memory is None else memory)
        if self.rotary:
            q, k = self.turn(q), self.turn(k)
        if self.kv_heads != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(8)
        if self.table is not None:
            steps = torch.arange(x.shape[1])
            scores = scores + self.table[steps[:, None] - steps[None, :] + 7].permute(2, 0, 1)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        return self.out(y)


class Encoder(nn.Module):
    """Tokens, learned positions, blocks of attention and an MLP, classes."""

    def __init__(self, gated: bool = False, norm: Callable[[int], nn.Module] = nn.LayerNorm, **options: Any) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(30, 32), nn.Parameter(torch.randn(1, 8, 32) * 0.1)
        self.attention = nn.ModuleList(Attention(**options) for _ in range(2))
        self.norms = nn.ModuleList(norm(32) for _ in range(4))
        self.gated = gated
        self.up = nn.ModuleList(nn.Linear(32, 96 if gated else 48) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(48, 32) for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[:, : tokens.shape[1]]
        for k, attention in enumerate(self.attention):
            x = x + attention(self.norms[2 * k](x))
            y = self.up[k](self.norms[2 * k + 1](x))
            if self.gated:
                a, b = y.chunk(2, dim=-1)
                y = F.silu(a) * b
            else:
                y = F.gelu(y)
            x = x + self.down[k](y)
        return self.head(x)


class Tied(nn.Module):
    """A language model whose head is the embedding, scaled by the root of its width."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.norm(self.block(self.embedding(tokens) * 5.0, src_mask=mask, is_causal=True)))


class EncoderDecoder(nn.Module):
    """nn.Transformer with embeddings around it."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, 32), nn.Embedding(20, 32)
        self.net = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(32, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.net(self.source(source), self.target(target)))


class CrossAttention(nn.Module):
    """Text that looks at a picture: nn.MultiheadAttention with keys and values of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.queries = nn.Parameter(torch.randn(1, 5, 32))
        self.attention = nn.MultiheadAttention(32, 4, kdim=24, vdim=24, batch_first=True)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.patches(x).flatten(2).transpose(1, 2)
        y, _ = self.attention(self.queries.expand(x.shape[0], -1, -1), memory, memory)
        return self.head(self.norm(y))


class CrossByHand(nn.Module):
    """A decoder that attends to another sequence, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(6, 32), nn.Linear(7, 32)
        self.self_attention, self.cross = Attention(fused="last"), Attention()
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, x = self.source(source), self.target(target)
        x = x + self.self_attention(x)
        return self.head(self.norm(x + self.cross(x, memory)))


class LinearAttention(nn.Module):
    """Kernel attention by einsum, without a softmax over positions."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.inner, self.qkv, self.out = nn.Linear(8, 32), nn.Linear(32, 96, bias=False), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (t.reshape(n, length, self.heads, -1) for t in self.qkv(self.inner(x)).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        memory = torch.einsum("blhd,blhe->bhde", k, v)
        scale = 1 / (torch.einsum("blhd,bhd->blh", q, k.sum(1)) + 1e-6)
        return self.out(torch.einsum("blhd,bhde,blh->blhe", q, memory, scale).flatten(2))


class Windows(nn.Module):
    """Attention in windows of pixels, cut and put back by hand, with a shift."""

    def __init__(self, window: int = 4) -> None:
        super().__init__()
        self.window = window
        self.lift, self.attention, self.norm = nn.Conv2d(3, 32, 1), Attention(fused="last"), nn.LayerNorm(32)
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        s = self.window
        y = torch.roll(self.norm(x), (-s // 2, -s // 2), (1, 2))
        y = y.view(n, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        y = self.attention(y).view(n, h // s, w // s, s, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
        return self.head((x + torch.roll(y, (s // 2, s // 2), (1, 2))).permute(0, 3, 1, 2))


class Mixer(nn.Module):
    """MLP-Mixer: one MLP over tokens, one over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norms = nn.Conv2d(3, 32, 4, 4), nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.channels = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.head(x.mean(1))


class Hyper(nn.Module):
    """The weight of a convolution is made by a small network from a condition; one picture at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.make = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 6 * 8 * 3 * 3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        weight = self.make(condition).view(6, 8, 3, 3)
        return self.head(F.conv2d(self.first(x).relu(), weight, padding=1).mean((2, 3)))


class CondConv(nn.Module):
    """Experts' kernels are mixed for each picture, and applied as one grouped convolution."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.stem, self.route = _conv(3, 8), nn.Linear(8, count)
        self.kernels = nn.Parameter(torch.randn(count, 16, 8, 3, 3) * 0.1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        weights = self.route(x.mean((2, 3))).sigmoid()
        kernels = torch.einsum("nk,koihw->noihw", weights, self.kernels).flatten(0, 1)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n).view(n, -1, h, w)
        return self.head(y.relu())


class FlatKernels(nn.Module):
    """Experts' kernels are kept as vectors, mixed for each picture, and cut out of the mix."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, 16
        self.stem, self.route = _conv(3, 12), nn.Linear(12, 3)
        self.kernels = nn.Parameter(torch.randn(3, 16 * 12 * size**2) * 0.1)
        self.head = nn.Sequential(_conv(16, 24), nn.Conv2d(24, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        mixed = self.route(x.mean((2, 3))).sigmoid() @ self.kernels
        kernels = mixed.view(n * self.made, c, self.size, self.size)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=self.size // 2, groups=n)
        return self.head(y.view(n, self.made, h, w).relu())


class GroupDeviation(nn.Module):
    """EvoNorm: a gate over the deviation of each group, which is repeated by a shape that the code read."""

    def __init__(self, width: int = 16, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias, self.gate = (nn.Parameter(torch.rand(width) + 0.5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        grouped = x.reshape(n, self.groups, c // self.groups, h, w)
        deviation = (grouped.var(dim=(2, 3, 4), unbiased=False, keepdim=True) + 1e-5).sqrt()
        gated = x * (x * self.gate.view(1, -1, 1, 1)).sigmoid() / deviation.expand(grouped.shape).reshape(n, c, h, w)
        return gated * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


@lru_cache(256)
def _heads_last(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    """The shape that attention needs, remembered as einops remembers its recipes."""
    return (*shape[:-1], heads, shape[-1] // heads)


class CachedShapes(nn.Module):
    """Attention whose sizes come from a function that remembers its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.head = nn.Linear(8, 96), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.reshape(_heads_last(tuple(part.shape), self.heads)).transpose(1, 2) for part in parts)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Diffusion(nn.Module):
    """DCRNN: a gated unit over nodes, whose state holds nodes times features in one dim, mixed by a matrix of nodes."""

    def __init__(self, nodes: int = 6, width: int = 12, steps: int = 2) -> None:
        super().__init__()
        self.nodes, self.width, self.steps = nodes, width, steps
        self.register_buffer("mix", torch.rand(nodes, nodes).softmax(1))
        inside = (2 + width) * (steps + 1)
        self.gates, self.candidate = nn.Linear(inside, 2 * width), nn.Linear(inside, width)
        self.head = nn.Linear(width, 1)

    def convolve(self, x: Tensor, state: Tensor, layer: nn.Linear) -> Tensor:
        x = torch.cat([x, state.reshape(len(x), self.nodes, -1)], dim=2)
        wide = x.permute(1, 2, 0).reshape(self.nodes, -1)
        hops = wide.unsqueeze(0)
        for _ in range(self.steps):
            wide = self.mix @ wide
            hops = torch.cat([hops, wide.unsqueeze(0)])
        y = hops.reshape(self.steps + 1, self.nodes, x.size(2), len(x)).permute(3, 1, 2, 0)
        return layer(y.reshape(len(x) * self.nodes, x.size(2) * (self.steps + 1)))

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), self.nodes * self.width, dtype=x.dtype)
        for t in range(x.size(1)):
            gates = self.convolve(x[:, t], state, self.gates).sigmoid().reshape(-1, self.nodes, 2 * self.width)
            reset, keep = (part.reshape(-1, self.nodes * self.width) for part in gates.split(self.width, dim=-1))
            new = self.convolve(x[:, t], reset * state, self.candidate).tanh().reshape(len(x), -1)
            state = keep * state + (1 - keep) * new
        return self.head(state.view(-1, self.width)).view(len(x), self.nodes)


class StateSpace(nn.Module):
    """A selective scan in a Python loop, as mamba's reference code does it."""

    def __init__(self, width: int = 24, state: int = 8) -> None:
        super().__init__()
        self.state = state
        self.inner = nn.Linear(8, 2 * width, bias=False)
        self.conv = nn.Conv1d(width, width, 3, groups=width, padding=2)
        self.select, self.step = nn.Linear(width, 4 + 2 * state, bias=False), nn.Linear(4, width)
        self.log = nn.Parameter(torch.log(torch.arange(1.0, state + 1).repeat(width, 1)))
        self.skip, self.out = nn.Parameter(torch.ones(width)), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.inner(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        delta, b, c = self.select(x).split([4, self.state, self.state], dim=-1)
        delta = F.softplus(self.step(delta))
        decay = torch.exp(delta.unsqueeze(-1) * -self.log.exp())
        push = delta.unsqueeze(-1) * b.unsqueeze(2) * x.unsqueeze(-1)
        h = torch.zeros_like(decay[:, 0])
        found = []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + push[:, t]
            found.append((h * c[:, t].unsqueeze(1)).sum(-1))
        return self.out((torch.stack(found, 1) + x * self.skip) * F.silu(gate))


class Fourier(nn.Module):
    """Token mixing by a Fourier transform over the sequence (FNet keeps the real part)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(8, 32), nn.LayerNorm(32)
        self.mlp, self.head = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        x = self.norm(x + torch.fft.fft(x, dim=1).real)
        return self.head(x + self.mlp(x))


class VectorQuantised(nn.Module):
    """Nearest entries of a code book, with the straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(_conv(3, 16, stride=2), nn.Conv2d(16, 8, 1))
        self.book = nn.Embedding(12, 8)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(8, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x).permute(0, 2, 3, 1).contiguous()
        flat = z.view(-1, z.shape[-1])
        distance = (flat**2).sum(1, keepdim=True) - 2 * flat @ self.book.weight.t() + (self.book.weight**2).sum(1)
        chosen = self.book(distance.argmin(1)).view(z.shape)
        return self.decoder((z + (chosen - z).detach()).permute(0, 3, 1, 2))


class Anchored(nn.Module):
    """A one-stage detection head: reshape to anchors, split into parts, decode with buffers, concatenate levels."""

    def __init__(self, anchors: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.anchors, self.per_anchor = anchors, classes + 5
        self.body = nn.ModuleList([_conv(3, 16, stride=2), _conv(16, 32, stride=2)])
        self.heads = nn.ModuleList(nn.Conv2d(c, anchors * (classes + 5), 1) for c in (16, 32))
        self.register_buffer("sizes", torch.rand(1, anchors, 1, 1, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for block, head in zip(self.body, self.heads, strict=True):
            x = block(x)
            n, _, h, w = (y := head(x)).shape
            y = y.view(n, self.anchors, self.per_anchor, h, w).permute(0, 1, 3, 4, 2).contiguous()
            xy, wh, scores = y.sigmoid().split((2, 2, self.per_anchor - 4), 4)
            found.append(torch.cat((xy * 2 - 0.5, (wh * 2) ** 2 * self.sizes, scores), 4).view(n, -1, self.per_anchor))
        both = torch.cat(found, 1)
        return both[..., :4], both[..., 4:]


class EarlyExits(nn.Module):
    """Heads after each block, outputs in a list of tuples, and a loss-like scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_conv(3, 16), _conv(16, 24), _conv(24, 32)])
        self.heads = nn.ModuleList(nn.Linear(c, 4) for c in (16, 24, 32))

    def forward(self, x: Tensor) -> tuple[list[tuple[Tensor, int]], Tensor]:
        found, penalty = [], x.new_zeros(())
        for k, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            x = block(x)
            penalty = penalty + x.square().mean()
            found.append((head(x.mean((2, 3))), k))
        return found, penalty


class Reversible(nn.Module):
    """A reversible block: two halves of the channels, each changed by a function of the other (RevNet, Glow)."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.out = _conv(8, 8), _conv(8, 8), _conv(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, x.shape[1] // 2, dim=1)
        a = a + self.f(b)
        b = b + self.g(a)
        return self.out(torch.cat([b, a], dim=1))


class CrossStage(nn.Module):
    """CSP and ELAN: parts of a split go through blocks, all of them are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = _conv(16, 32, 1), _conv(16 * 4, 24, 1)
        self.blocks = nn.ModuleList(nn.Sequential(_conv(16, 12), _conv(12, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.last(torch.cat(parts, 1))


class TwoStream(nn.Module):
    """Audio and video with lateral connections and a late fusion by a weighted sum; dict of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.video = nn.ModuleList([nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(16, 16, 3, padding=1)])
        self.audio, self.lateral = nn.Conv1d(4, 12, 3, padding=1), nn.Conv1d(12, 8, 1)
        self.fuse = nn.Linear(12, 16)
        self.weight, self.head = nn.Parameter(torch.tensor(0.3)), nn.Linear(16, 5)

    def forward(self, video: Tensor, audio: Tensor) -> dict[str, Tensor]:
        a, v = self.audio(audio).relu(), self.video[0](video).relu()
        side = F.interpolate(self.lateral(a), size=v.shape[2])[..., None, None].expand_as(v)
        v = self.video[1](torch.cat([v, side], dim=1)).relu().mean((2, 3, 4))
        return {"logits": self.head(torch.lerp(v, self.fuse(a.mean(-1)), self.weight))}


class Highway(nn.Module):
    """Highway layers, a residual MLP with norms, and skips from the first to the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 32)
        self.change, self.carry = (nn.ModuleList(nn.Linear(32, 32) for _ in range(2)) for _ in range(2))
        self.norm, self.head = nn.BatchNorm1d(32), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        for change, carry in zip(self.change, self.carry, strict=True):
            gate = carry(h).sigmoid()
            h = gate * change(h).relu() + (1 - gate) * h
        return self.head(torch.cat([self.norm(h), x], dim=1))


class FactorisedEmbedding(nn.Module):
    """Sums of several embeddings and sinusoidal positions, projected up, with a padding mask (ALBERT style)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.kinds = nn.Embedding(30, 16, padding_idx=0), nn.Embedding(2, 16)
        angle = torch.arange(12)[:, None] * 0.1 ** torch.arange(8)
        self.register_buffer("positions", torch.cat([angle.sin(), angle.cos()], dim=1))
        self.up, self.block = nn.Linear(16, 32), nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.kinds(kinds) + self.positions[: tokens.shape[1]]
        mask = tokens == 0
        x = self.up(x)
        for _ in range(3):
            x = self.block(x, src_key_padding_mask=mask)
        x = x.masked_fill(mask.unsqueeze(-1), 0.0)
        return self.head(x.sum(1) / (~mask).sum(1, keepdim=True))


class TemporalShift(nn.Module):
    """A share of the channels comes from the frame before, one from the frame after (TSM)."""

    def __init__(self) -> None:
        super().__init__()
        self.frames, self.share = 4, 4
        self.first, self.second, self.head = _conv(3, 16), _conv(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        nt, c, h, w = x.size()
        x = x.view(nt // self.frames, self.frames, c, h, w)
        fold = c // self.share
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        x = self.second(out.view(nt, c, h, w)).mean((2, 3))
        return self.head(x.view(nt // self.frames, self.frames, -1).mean(1))


class CachedAttention(nn.Module):
    """Keys and values go through buffers, from which they are read again; one fused matrix, split by the width."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.embedding = heads, nn.Embedding(30, width)
        self.qkv, self.out, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 30)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, 16, heads, width // heads), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        n, t, c = x.shape
        q, k, v = (z.view(n, t, self.heads, c // self.heads) for z in self.qkv(x).split(c, dim=-1))
        self.keys[:n, :t], self.values[:n, :t] = k, v
        q, k, v = (z.transpose(1, 2) for z in (q, self.keys[:n, :t], self.values[:n, :t]))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.out(y.transpose(1, 2).reshape(n, t, c)))


class GroupedOutput(nn.Module):
    """One shared head of keys and values; heads times dims are cut into groups of half a head, each with its matrix."""

    def __init__(self, heads: int = 4, groups: int = 8) -> None:
        super().__init__()
        self.heads, self.groups, self.embedding = heads, groups, nn.Linear(6, 24)
        self.q, self.k, self.v = nn.Linear(24, 8 * heads), nn.Linear(24, 8), nn.Linear(24, 8)
        self.weight = nn.Parameter(torch.randn(groups * 6, 8 * heads // groups))
        self.head = nn.Linear(groups * 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        n, t, _ = x.shape
        q, k, v = self.q(x).view(n, t, self.heads, -1).transpose(1, 2), self.k(x)[:, None], self.v(x)[:, None]
        y = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)
        y = y.reshape(n * t, self.groups, -1).transpose(0, 1)
        weight = self.weight.view(self.groups, -1, y.shape[-1]).transpose(1, 2)
        return self.head(torch.bmm(y, weight).transpose(0, 1).reshape(n, t, -1))


class SetTransformer(nn.Module):
    """Learned points attend to a set, the set to them, and a learned seed pools it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(20, 24), nn.Linear(24, 4)
        self.points, self.seed = nn.Parameter(torch.randn(1, 6, 24)), nn.Parameter(torch.randn(1, 1, 24))
        self.gather, self.spread, self.pool = (nn.MultiheadAttention(24, 3, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        seen, _ = self.gather(self.points.expand(len(x), -1, -1), x, x)
        x = x + self.spread(x, seen, seen)[0]
        pooled, _ = self.pool(self.seed.repeat(len(x), 1, 1), x, x, need_weights=False)
        return self.head(pooled.squeeze(1))


def _pictures(body: Callable[[], nn.Module], width: int = 16, out: int | None = None, size: int = 16) -> Builder:
    return lambda: Network(Pictures(body(), width, out), torch.randn(2, 3, size, size))


def _tokens(**options: Any) -> Builder:
    return lambda: Network(Encoder(**options), torch.randint(0, 30, (2, 8)))


def _on(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Builder:
    def build() -> Network:
        inputs = tuple(torch.randn(*shape) for shape in shapes)
        return Network(make(), inputs if len(inputs) > 1 else inputs[0])

    return build


def _bodies() -> Table:
    return {
        "channel_shuffle": _pictures(lambda: nn.Sequential(ShuffleUnit(), ShuffleUnit()), 24),
        "cbam": _pictures(lambda: nn.Sequential(CBAM(), _conv(16, 32)), out=32),
        "squeeze_excite": _pictures(lambda: nn.Sequential(SqueezeExcite(), SqueezeExcite())),
        "efficient_channel_attention": _pictures(ECA, out=32),
        "non_local": _pictures(NonLocal),
        "dense_block": _pictures(lambda: nn.Sequential(DenseBlock(), DenseBlock())),
        "searched_cell": _pictures(lambda: nn.Sequential(Cell(), Cell())),
        "ghost": _pictures(Ghost, out=24),
        "ghost_sliced": _pictures(lambda: Ghost(out=20), out=20),
        "group_multipliers": _pictures(Multiplied),
        "selective_kernels": _pictures(SplitAttention),
        "reparametrised": _pictures(Reparametrised, out=32),
        "gates": _pictures(Gated),
        "coordinates": _pictures(CoordConv),
        "control_flow": _pictures(Dynamic),
        "frozen_norm": _pictures(lambda: nn.Sequential(nn.Conv2d(16, 32, 1), FrozenNorm(32), nn.ReLU()), out=32),
        "layer_scale": _pictures(lambda: nn.Sequential(LayerScaled(), LayerScaled())),
        "norm_by_hand": _pictures(lambda: nn.Sequential(nn.Conv2d(16, 24, 1), LayerNorm2d(24), nn.GELU()), out=24),
        "group_deviation": _pictures(lambda: nn.Sequential(GroupDeviation(), _conv(16, 16), GroupDeviation())),
        "reversible": _pictures(Reversible, out=24),
        "cross_stage": _pictures(CrossStage, out=24),
        "grouped": _pictures(lambda: nn.Sequential(_conv(16, 32, groups=4), _conv(32, 32, groups=8)), out=32),
        "inverted_residual": _pictures(
            lambda: nn.Sequential(_conv(16, 64, 1), _conv(64, 64, groups=64), nn.Conv2d(64, 24, 1)), out=24
        ),
    }


def _whole() -> Table:
    picture = (2, 3, 16, 16)
    return {
        "mlp": _on(lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), (4, 8)),
        "pixel_shuffle": _on(PixelShuffle, picture),
        "space_to_depth": _on(SpaceToDepth, picture),
        "unet": _on(UNet, picture),
        "fpn": _on(FPN, picture),
        "adaptive_norm": _on(Adaptive, picture, (2, 6)),
        "siamese": _on(Siamese, picture, picture),
        "flatten_head": _on(FlattenHead, (2, 3, 32, 32)),
        "fixed_view": _on(FixedView, (2, 3, 32, 32)),
        "bilinear": _on(Bilinear, (4, 6), (4, 7)),
        "factorised_bilinear": _on(FactorisedBilinear, (4, 6), (4, 7)),
        "point_net": _on(PointNet, (2, 3, 20)),
        "edge_conv": _on(EdgeConv, (2, 10, 3)),
        "wave_net": _on(WaveNet, (2, 1, 20)),
        "weight_norm": _on(WeightNormed, (2, 4, 10)),
        "parametrised": _on(Parametrised, (4, 8)),
        "vae": _on(VAE, (4, 32)),
        "vae_sampled": _on(lambda: VAE(sampled=True), (4, 32)),
        "generator": _on(Generator, (4, 10)),
        "experts": _on(Experts, (2, 6, 8)),
        "sparse_experts": _on(SparseExperts, (2, 6, 8)),
        "cross_attention": _on(CrossAttention, picture),
        "cross_by_hand": _on(CrossByHand, (2, 6, 6), (2, 4, 7)),
        "linear_attention": _on(LinearAttention, (2, 6, 8)),
        "windows": _on(Windows, (2, 3, 8, 8)),
        "mixer": _on(Mixer, picture),
        "hyper": _on(Hyper, picture, (4,)),
        "conditional_kernels": _on(CondConv, picture),
        "flat_kernels": _on(lambda: FlatKernels(3), picture),
        "flat_kernels_pointwise": _on(lambda: FlatKernels(1), picture),
        "cached_shapes": _on(CachedShapes, (2, 6, 8)),
        "diffusion": _on(Diffusion, (2, 4, 6, 2)),
        "state_space": _on(StateSpace, (2, 6, 8)),
        "fourier": _on(Fourier, (2, 6, 8)),
        "vector_quantised": _on(VectorQuantised, picture),
        "anchored": _on(Anchored, picture),
        "early_exits": _on(EarlyExits, picture),
        "highway": _on(Highway, (4, 8)),
        "temporal_shift": _on(TemporalShift, (8, 3, 8, 8)),
        "grouped_output": _on(GroupedOutput, (2, 5, 6)),
        "cached_attention": lambda: Network(CachedAttention(), torch.randint(0, 30, (2, 6))),
        "set_transformer": lambda: Network(SetTransformer(), torch.randn(3, 5, 20)),
        "two_stream": lambda: Network(
            TwoStream(), {"video": torch.randn(2, 3, 4, 6, 6), "audio": torch.randn(2, 4, 8)}
        ),
        "deep_fm": lambda: Network(DeepFM(), (torch.randint(0, 10, (4, 3)), torch.randn(4, 4))),
        "dlrm": lambda: Network(DLRM(), (torch.randn(4, 4), torch.randint(0, 10, (2, 4, 3)))),
        "tied": lambda: Network(Tied(), torch.randint(0, 30, (2, 7))),
        "encoder_decoder": lambda: Network(
            EncoderDecoder(), (torch.randint(0, 20, (2, 6)), torch.randint(0, 20, (2, 5)))
        ),
        "factorised_embedding": lambda: Network(
            FactorisedEmbedding(), (torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0]]), torch.randint(0, 2, (2, 4)))
        ),
    }


def table() -> Table:
    """Every network of the family, by name."""
    attention = {
        "attention": _tokens(),
        "attention_fused_last": _tokens(fused="last"),
        "attention_fused_first": _tokens(fused="first"),
        "attention_chunked": _tokens(fused="chunk"),
        "attention_grouped_queries": _tokens(kv_heads=2),
        "attention_multi_query": _tokens(kv_heads=1),
        "attention_rotary": _tokens(rotary=True),
        "attention_relative": _tokens(relative=True),
        "attention_llama": _tokens(kv_heads=2, rotary=True, gated=True, norm=nn.RMSNorm),
    }
    return {**_bodies(), **_whole(), **attention}
