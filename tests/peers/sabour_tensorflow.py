"""The authors' TensorFlow layer (Sabour et al. 2017) in PyTorch: a bias in every iteration, optionally leaky."""

import torch
from torch import nn


class CapsuleLayer(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; softmax over the output capsules, logits per sample, full gradient."""

    def __init__(self, input_dim, output_dim, input_atoms, output_atoms, num_routing=3, leaky=False):
        super().__init__()
        self.input_dim, self.output_dim = input_dim, output_dim
        self.input_atoms, self.output_atoms = input_atoms, output_atoms
        self.num_routing, self.leaky = num_routing, leaky
        self.weights = nn.Parameter(torch.empty(input_dim, input_atoms, output_dim * output_atoms).normal_(std=0.1))
        self.biases = nn.Parameter(torch.full((output_dim, output_atoms), 0.1))

    def couple(self, logits):
        if not self.leaky:
            return torch.softmax(logits, dim=-1)
        leak = torch.zeros_like(logits[..., :1])  # takes its share of the vote and is dropped
        return torch.softmax(torch.cat([leak, logits], dim=-1), dim=-1)[..., 1:]

    def forward(self, x):
        wide = torch.sum(x[:, :, :, None] * self.weights[None], dim=2)  # [B, I, J * D_out]
        votes = wide.reshape(-1, self.input_dim, self.output_dim, self.output_atoms)
        logits = torch.zeros_like(votes[..., 0])
        for _ in range(self.num_routing):
            s = torch.sum(self.couple(logits)[..., None] * votes, dim=1) + self.biases
            length = torch.sqrt(torch.sum(s * s, dim=-1, keepdim=True))
            v = (s / length) * (length**2 / (1 + length**2))
            logits = logits + torch.sum(votes * v[:, None], dim=-1)
        return v
