"""higgsfield and jindongwang: softmax over the input capsules, logits shared by the batch, elementwise squash.

All three are mistakes that many copies inherited; they are kept here.
"""

import torch
from torch import nn


def squash(s):
    n2 = (s**2).sum(dim=-1, keepdim=True)
    return n2 * s / ((1 + n2) * torch.sqrt(n2))


class DigitCaps(nn.Module):
    """[B, I, D_in] -> [B, J, D_out, 1]."""

    def __init__(self, num_capsules=10, num_routes=1152, in_channels=8, out_channels=16):
        super().__init__()
        self.in_channels, self.num_routes, self.num_capsules = in_channels, num_routes, num_capsules
        self.W = nn.Parameter(torch.randn(1, num_routes, num_capsules, out_channels, in_channels))

    def forward(self, x):
        columns = x[:, :, None, :, None]  # [B, I, 1, D_in, 1]
        u = torch.stack([self.W[0] @ column for column in columns])  # [B, I, J, D_out, 1]
        b_ij = torch.zeros(1, self.num_routes, self.num_capsules, 1, device=x.device)  # no dtype, as there
        for _ in range(3):
            c_ij = torch.softmax(b_ij, dim=1).unsqueeze(-1)  # over I, where the paper has J
            s_j = (c_ij * u).sum(dim=1, keepdim=True)  # [B, 1, J, D_out, 1]
            v_j = squash(s_j)  # over the last axis, which has size 1: each element on its own
            agreement = (u * v_j).sum(dim=3)  # [B, I, J, 1]
            b_ij = b_ij + agreement.mean(dim=0, keepdim=True)
        return v_j.squeeze(1)


class ConvLayer(nn.Module):
    def __init__(self, channels, stem, kernel):
        super().__init__()
        self.conv = nn.Conv2d(channels, stem, kernel)

    def forward(self, x):
        return torch.relu(self.conv(x))


class PrimaryCaps(nn.Module):
    def __init__(self, convolutions, in_channels, out_channels, kernel, stride, dim):
        super().__init__()
        self.dim = dim
        self.capsules = nn.ModuleList(nn.Conv2d(in_channels, out_channels, kernel, stride) for _ in range(convolutions))

    def forward(self, x):
        maps = torch.stack([conv(x) for conv in self.capsules], dim=1)
        return squash(maps.view(x.size(0), -1, self.dim))  # flat, whatever the convolutions stand for


def predicted(v):
    """The class of each image: the largest entry of a softmax over the batch, here of its logarithm."""
    lengths = (v**2).sum(dim=(2, 3)).sqrt()
    return (lengths - lengths.logsumexp(dim=0)).argmax(dim=1)


class Decoder(nn.Module):
    def __init__(self, n_in, hidden, n_out):
        super().__init__()
        self.reconstraction_layers = nn.Sequential(
            nn.Linear(n_in, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], n_out),
            nn.Sigmoid(),
        )

    def forward(self, v):
        chosen = predicted(v)
        mask = chosen[:, None] == torch.arange(v.size(1), device=v.device)
        return self.reconstraction_layers((v * mask[:, :, None, None]).view(v.size(0), -1))


class Network(nn.Module):
    """The primary capsules are `types` convolutions of `dim` channels; with jindongwang, `dim` of `types`."""

    def __init__(
        self,
        channels=1,
        size=28,
        kernel=9,
        stem=256,
        types=32,
        dim=8,
        classes=10,
        out_dim=16,
        stride=2,
        hidden=(512, 1024),
        jindongwang=False,
    ):
        super().__init__()
        cells = ((size - kernel + 1 - kernel) // stride + 1) ** 2
        convolutions, width = (dim, types) if jindongwang else (types, dim)
        self.conv_layer = ConvLayer(channels, stem, kernel)
        self.primary_capsules = PrimaryCaps(convolutions, stem, width, kernel, stride, dim)
        self.digit_capsules = DigitCaps(classes, types * cells, dim, out_dim)
        self.decoder = Decoder(classes * out_dim, hidden, channels * size * size)

    def forward(self, images):
        v = self.digit_capsules(self.primary_capsules(self.conv_layer(images)))
        return v.squeeze(-1), self.decoder(v)
