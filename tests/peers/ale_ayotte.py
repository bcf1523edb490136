"""AleAyotte/FastCapsNet: gram-ai's layer with the votes transposed; softmax over the input capsules, the last axis."""

import torch
from torch import nn


class CapsuleLayer(nn.Module):
    """[B, I, D_in] -> [J, B, D_out, 1, 1]."""

    def __init__(self, num_capsules, num_route_nodes, in_channels, out_channels, num_iterations=3):
        super().__init__()
        self.num_capsules, self.num_route_nodes, self.num_iterations = num_capsules, num_route_nodes, num_iterations
        self.route_weights = nn.Parameter(torch.randn(num_capsules, num_route_nodes, in_channels, out_channels))

    def squash(self, s):
        n2 = s.pow(2).sum(dim=2, keepdim=True)
        return n2.sqrt() / (1 + n2) * s

    def forward(self, x):
        votes = torch.einsum("jikd,bik->jbdi", self.route_weights, x).unsqueeze(3)  # [J, B, D_out, 1, I]
        logits = torch.zeros(votes.shape)
        for t in range(self.num_iterations):
            v = self.squash((logits.softmax(dim=-1) * votes).sum(dim=-1, keepdim=True))
            if t + 1 < self.num_iterations:
                logits = logits + (votes * v).sum(dim=2, keepdim=True)
        return v
