"""motokimura/capsnet_pytorch: logits shared by the batch, detached; all else as in the paper."""

import torch
from torch import nn


def squash(s):
    n2 = s.square().sum(-1, keepdim=True)
    return n2 / (1 + n2) * (s / n2.sqrt())


class DigitCaps(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; there the sizes are constants."""

    def __init__(self, in_capsules, in_capsule_size, out_capsules, out_capsule_size, routing_iters):
        super().__init__()
        self.routing_iters = routing_iters
        self.W = nn.Parameter(torch.empty(in_capsules, out_capsules, out_capsule_size, in_capsule_size))
        nn.init.uniform_(self.W, -(in_capsules**-0.5), in_capsules**-0.5)

    def forward(self, x):
        u = torch.einsum("ijdk,bik->bijd", self.W, x)
        logits = torch.zeros(self.W.shape[:2])
        for t in range(self.routing_iters):
            last = t == self.routing_iters - 1
            votes = u if last else u.detach()
            v = squash((logits.softmax(1)[..., None] * votes).sum(1))
            if not last:
                logits = logits + torch.einsum("bijd,bjd->bij", votes, v).mean(0)
        return v
