"""cezannec/capsule_net_pytorch: softmax over the input capsules, as gram-ai's layer, with names of its own."""

import torch
from torch import nn


class DigitCaps(nn.Module):
    """[B, I, D_in] -> [J, B, 1, 1, D_out]; three iterations, always."""

    def __init__(self, num_capsules, previous_layer_nodes, in_channels, out_channels):
        super().__init__()
        self.W = nn.Parameter(torch.randn(num_capsules, previous_layer_nodes, in_channels, out_channels))

    def squash(self, s):
        n2 = (s * s).sum(dim=-1, keepdim=True)
        return n2 / (1 + n2) * s / torch.sqrt(n2)

    def forward(self, u):
        votes = u[None, :, :, None, :] @ self.W[:, None]  # [J, B, I, 1, D_out]
        b_ij = torch.zeros(votes.shape)  # a logit for each entry; those of a pose stay equal
        for t in range(3):
            v = self.squash((b_ij.softmax(dim=2) * votes).sum(dim=2, keepdim=True))
            if t < 2:
                b_ij = b_ij + (votes * v).sum(dim=-1, keepdim=True)
        return v
