"""adambielski/CapsNet-pytorch: the routing is a module of its own, with a learned prior and one more coupling."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def squash(s):
    squared = torch.sum(s.square(), dim=-1, keepdim=True)
    return (squared / (1 + squared)) * (s / torch.sqrt(squared))


class AgreementRouting(nn.Module):
    """Votes [B, I, J, D_out] -> [B, J, D_out] by n_iterations + 1 couplings."""

    def __init__(self, input_caps, output_caps, n_iterations):
        super().__init__()
        self.n_iterations = n_iterations
        self.b = nn.Parameter(torch.zeros(input_caps, output_caps))

    def couple(self, logits, votes):
        c = F.softmax(logits, dim=-1)
        s = torch.matmul(c.transpose(1, 2).unsqueeze(2), votes.transpose(1, 2))  # [B, J, 1, I] @ [B, J, I, D_out]
        return squash(s.squeeze(2))

    def forward(self, votes):
        logits = self.b.expand(votes.shape[0], -1, -1)
        v = self.couple(logits, votes)
        for _ in range(self.n_iterations):
            agreement = torch.matmul(votes.transpose(1, 2), v.unsqueeze(-1)).squeeze(-1)  # [B, J, I]
            logits = logits + agreement.transpose(1, 2)
            v = self.couple(logits, votes)
        return v


class CapsLayer(nn.Module):
    """[B, I, D_in] -> what the routing module makes of the votes."""

    def __init__(self, input_caps, input_dim, output_caps, output_dim, routing_module):
        super().__init__()
        self.input_caps, self.input_dim = input_caps, input_dim
        self.output_caps, self.output_dim = output_caps, output_dim
        self.routing_module = routing_module
        bound = 1 / math.sqrt(input_caps)
        self.weights = nn.Parameter(torch.empty(input_caps, input_dim, output_caps * output_dim))
        nn.init.uniform_(self.weights, -bound, bound)

    def forward(self, x):
        votes = torch.matmul(x.unsqueeze(2), self.weights)  # [B, I, 1, J * D_out]
        return self.routing_module(votes.view(-1, self.input_caps, self.output_caps, self.output_dim))


class PrimaryCapsLayer(nn.Module):
    def __init__(self, in_channels, types, dim, kernel, stride):
        super().__init__()
        self.types, self.dim = types, dim
        self.conv = nn.Conv2d(in_channels, types * dim, kernel, stride)

    def forward(self, x):
        maps = self.conv(x)
        blocks = maps.view(maps.size(0), self.types, self.dim, -1)  # channel type*dim + k is entry k of the pose
        return squash(blocks.transpose(2, 3).reshape(maps.size(0), -1, self.dim))


class CapsNet(nn.Module):
    def __init__(self, channels, size, kernel, stem, types, dim, classes, out_dim, stride):
        super().__init__()
        side = math.floor((size - kernel + 1 - kernel) / stride) + 1
        n = types * side * side
        self.conv1 = nn.Conv2d(channels, stem, kernel)
        self.primaryCaps = PrimaryCapsLayer(stem, types, dim, kernel, stride)
        self.digitCaps = CapsLayer(n, dim, classes, out_dim, AgreementRouting(n, classes, 3))

    def forward(self, images):
        return self.digitCaps(self.primaryCaps(F.relu(self.conv1(images))))


class ReconstructionNet(nn.Module):
    def __init__(self, n_in, hidden, n_out):
        super().__init__()
        self.fc1 = nn.Linear(n_in, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], n_out)

    def forward(self, v, chosen):
        masked = torch.zeros_like(v)
        rows = torch.arange(len(v), device=v.device)
        masked[rows, chosen] = v[rows, chosen]
        x = F.relu(self.fc1(masked.flatten(1)))
        return torch.sigmoid(self.fc3(F.relu(self.fc2(x))))


class Network(nn.Module):
    """The two networks, which stand side by side there, in one."""

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
        self.capsnet = CapsNet(channels, size, kernel, stem, types, dim, classes, out_dim, stride)
        self.reconstruction_net = ReconstructionNet(classes * out_dim, hidden, channels * size * size)

    def forward(self, images):
        v = self.capsnet(images)
        return v, self.reconstruction_net(v, torch.argmax(v.norm(dim=-1), dim=-1))
