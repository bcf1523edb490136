"""gchochla/capsules-utils: as in the paper, with a division by the norm alone."""

import torch
from torch import nn


class SemanticCaps(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; softmax over the output capsules, logits per sample, full gradient."""

    def __init__(self, n_capsules, n_prev_capsules, capsule_dimension, input_size, routing_iterations):
        super().__init__()
        self.Ws = nn.Parameter(1e-3 * torch.randn(n_capsules, n_prev_capsules, capsule_dimension, input_size))
        self.route_iters = routing_iterations

    @staticmethod
    def squash(s):
        n = s.square().sum(-1, keepdim=True) ** 0.5
        return n**2 / (1 + n**2) * (s / n)

    def forward(self, x):
        u = torch.einsum("jidk,bik->bjid", self.Ws, x)
        return self.routing(u, torch.zeros(u.shape[:-1]))

    def routing(self, u, b):
        for t in range(self.route_iters):
            v = self.squash((torch.softmax(b, dim=1).unsqueeze(2) @ u).squeeze(2))
            if t < self.route_iters - 1:
                b = b + (u @ v.unsqueeze(-1)).squeeze(-1)
        return v
