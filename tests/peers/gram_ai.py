"""gram-ai/capsule-networks: softmax over the input capsules (a mistake), one class for both kinds of capsules."""

import torch
from torch import nn


class CapsuleLayer(nn.Module):
    """With routing: [B, I, D_in] -> [J, B, 1, 1, D_out]. With num_route_nodes = -1: images -> primary capsules."""

    def __init__(
        self,
        num_capsules,
        num_route_nodes,
        in_channels,
        out_channels,
        kernel_size=None,
        stride=None,
        num_iterations=3,
    ):
        super().__init__()
        self.num_capsules, self.num_route_nodes, self.num_iterations = num_capsules, num_route_nodes, num_iterations
        if num_route_nodes == -1:
            self.capsules = nn.ModuleList()
            for _ in range(num_capsules):
                self.capsules.append(nn.Conv2d(in_channels, out_channels, kernel_size, stride))
        else:
            self.route_weights = nn.Parameter(torch.randn(num_capsules, num_route_nodes, in_channels, out_channels))

    def squash(self, tensor, dim=-1):
        n2 = tensor.pow(2).sum(dim=dim, keepdim=True)
        return n2 / (1 + n2) * tensor / n2.sqrt()

    def forward(self, x):
        if self.num_route_nodes == -1:
            entries = [conv(x).reshape(x.size(0), -1, 1) for conv in self.capsules]
            return self.squash(torch.cat(entries, dim=-1))
        votes = torch.matmul(x[None, :, :, None, :], self.route_weights[:, None])  # [J, B, I, 1, D_out]
        logits = torch.zeros_like(votes)
        for _ in range(self.num_iterations):
            coupling = torch.softmax(logits, dim=2)  # over I, where the paper has J
            out = self.squash(torch.sum(coupling * votes, dim=2, keepdim=True))
            agreement = torch.matmul(votes, out.transpose(-1, -2))  # [J, B, I, 1, 1]
            logits = logits + agreement
        return out


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
        grid = (size - kernel + 1 - kernel) // stride + 1
        self.conv1 = nn.Conv2d(channels, stem, kernel)
        self.primary_capsules = CapsuleLayer(dim, -1, stem, types, kernel_size=kernel, stride=stride)
        self.digit_capsules = CapsuleLayer(classes, types * grid * grid, dim, out_dim)
        self.decoder = nn.Sequential(
            nn.Linear(classes * out_dim, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], channels * size * size),
            nn.Sigmoid(),
        )

    def forward(self, images):
        features = torch.relu(self.conv1(images))
        out = self.digit_capsules(self.primary_capsules(features))
        v = out[:, :, 0, 0, :].transpose(0, 1)
        chosen = v.pow(2).sum(dim=-1).argmax(dim=1)
        mask = torch.eye(v.size(1), dtype=v.dtype, device=v.device)[chosen]
        return v, self.decoder((v * mask.unsqueeze(-1)).reshape(v.size(0), -1))
