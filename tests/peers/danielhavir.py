"""danielhavir/capsule-network: detached routing, flat primary capsules, NaN gradient at a zero capsule."""

import torch
from torch import nn


def squash(s):
    n2 = torch.sum(s**2, dim=-1, keepdim=True)
    return n2 / (1 + n2) * s / (torch.sqrt(n2) + 1e-8)  # the gradient of this root at zero is what gives the NaN


class RoutingCapsules(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; only the last weighted sum is differentiated."""

    def __init__(self, in_dim, in_caps, num_caps, dim_caps, num_routing):
        super().__init__()
        self.in_dim, self.in_caps = in_dim, in_caps
        self.num_caps, self.dim_caps = num_caps, dim_caps
        self.num_routing = num_routing
        self.W = nn.Parameter(0.01 * torch.randn(1, num_caps, in_caps, dim_caps, in_dim))

    def forward(self, x):
        per_output = [torch.matmul(w, x.unsqueeze(-1)).squeeze(-1) for w in self.W[0]]  # J times [B, I, D_out]
        votes = torch.stack(per_output, dim=1)
        with torch.no_grad():
            logits = votes.new_zeros(x.size(0), self.num_caps, self.in_caps, 1)
            for _ in range(self.num_routing - 1):
                v = squash(torch.sum(logits.softmax(dim=1) * votes, dim=2))
                logits += torch.matmul(votes, v.unsqueeze(-1))
            coupling = logits.softmax(dim=1)
        return squash(torch.sum(coupling * votes, dim=2))


class PrimaryCapsules(nn.Module):
    def __init__(self, in_channels, types, dim, kernel, stride):
        super().__init__()
        self.dim = dim
        self.conv = nn.Conv2d(in_channels, types * dim, kernel, stride)

    def forward(self, x):
        out = self.conv(x)
        capsules = out.numel() // (out.size(0) * self.dim)
        return squash(out.contiguous().view(out.size(0), capsules, self.dim))  # flat view of NCHW


class Network(nn.Module):
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
    ):
        super().__init__()
        rows = 1 + (size - kernel + 1 - kernel) // stride
        self.conv1 = nn.Conv2d(channels, stem, kernel)
        self.primary = PrimaryCapsules(stem, types, dim, kernel, stride)
        self.digits = RoutingCapsules(dim, types * rows * rows, classes, out_dim, 3)
        self.decoder = nn.Sequential(
            nn.Linear(classes * out_dim, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], channels * size * size),
            nn.Sigmoid(),
        )

    def forward(self, images):
        v = self.digits(self.primary(torch.relu(self.conv1(images))))
        best = torch.sum(v**2, dim=-1).argmax(dim=1).tolist()
        rows = []
        for row, j in zip(v, best, strict=True):
            before, chosen, after = torch.split(row, [j, 1, len(row) - j - 1])
            rows.append(torch.cat([before * 0, chosen, after * 0]).flatten())
        return v, self.decoder(torch.stack(rows))
