"""labml.ai's annotated capsule network: the einsum form with a softmax over the input capsules."""

import torch
from torch import nn


class Squash(nn.Module):
    def __init__(self, epsilon=1e-8):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, s):
        n2 = (s * s).sum(-1, keepdim=True)
        return n2 / (1 + n2) * s / (n2 + self.epsilon).sqrt()


class Router(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; logits per sample, full gradient."""

    def __init__(self, in_caps, out_caps, in_d, out_d, iterations):
        super().__init__()
        self.in_caps, self.out_caps, self.iterations = in_caps, out_caps, iterations
        self.softmax, self.squash = nn.Softmax(dim=1), Squash()
        self.weight = nn.Parameter(torch.randn(in_caps, out_caps, in_d, out_d))

    def forward(self, u):
        votes = torch.einsum("bik,ijkd->bijd", u, self.weight)
        logits = u.new_zeros(votes.shape[:3])
        for _ in range(self.iterations):
            v = self.squash(torch.einsum("bij,bijd->bjd", self.softmax(logits), votes))
            logits = logits + torch.einsum("bijd,bjd->bij", votes, v)
        return v
