"""arogozhnikov/readable_capsnet: the einsum form; one variant takes the number of iterations in the call."""

import torch
from torch import einsum, nn


def squash(s):
    n2 = einsum("bje,bje->bj", s, s)
    return einsum("bj,bje->bje", n2 / (1 + n2) / n2.sqrt(), s)


def route(votes, iterations):
    b, i, j, _ = votes.shape
    logits = votes.new_zeros(b, i, j)
    for _ in range(iterations):
        v = squash(einsum("bij,bije->bje", logits.softmax(-1), votes))
        logits = logits + einsum("bje,bije->bij", v, votes)
    return v


class Votes(nn.Module):
    def __init__(self, in_caps, in_hid, out_caps, out_hid):
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(in_caps, in_hid, out_caps, out_hid))

    def forward(self, poses):
        return einsum("bid,idje->bije", poses, self.weight)


class CapsuleLayerWithRouting(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; softmax over the output capsules, logits per sample, full gradient."""

    def __init__(self, in_caps, in_hid, out_caps, out_hid, routing_iterations=3):
        super().__init__()
        self.routing_iterations = routing_iterations
        self.input_caps2U = Votes(in_caps, in_hid, out_caps, out_hid)

    def forward(self, poses):
        return route(self.input_caps2U(poses), self.routing_iterations)


class Capsule2Capsule(CapsuleLayerWithRouting):
    """The same layer under another name."""


class CapsuleLayerCalled(nn.Module):
    """The same layer, told at every call how often to iterate."""

    def __init__(self, in_caps, in_hid, out_caps, out_hid):
        super().__init__()
        self.input_caps2U = Votes(in_caps, in_hid, out_caps, out_hid)

    def forward(self, poses, routing_iterations):
        return route(self.input_caps2U(poses), routing_iterations)
