"""Small public networks, the mistakes that are known of them, and what tests of the doctor do with them."""

import torch
from peers import adambielski, cedrickchee, danielhavir, gram_ai, higgsfield, seed, xifengguo
from torch import nn

import fastcaps
from fastcaps.doctor import WRONG, examine, iter_findings
from fastcaps.doctor.targets import random_sample

SMALL = {"size": 12, "kernel": 3, "stem": 5, "types": 3, "dim": 4, "classes": 10, "out_dim": 6}
SHAPE = (1, 12, 12)
SCRAMBLED, ZERO, BATCH = "capsules keep their place", "zero capsules", "samples are independent"
SOFTMAX, ITERATIONS, SQUASH = "softmax over the output capsules", "number of iterations", "squash over a pose"
AGREEMENT, DISTINCT, STATE = "one coupling for each pair of capsules", "output capsules differ", "calls are independent"
ROUTING, RUNS, SCORES = "routing", "it runs", "class scores are lengths"
INPUTS, TRAINS, LOSS = "squash of the input poses", "it trains from here", "margin loss"

KNOWN = {
    "capsule": (seed, set()),
    "xifengguo": (xifengguo, {SCRAMBLED}),
    "gram-ai": (gram_ai, {SOFTMAX, ZERO}),
    "adambielski": (adambielski, {ITERATIONS, ZERO}),
    "higgsfield": (higgsfield, {BATCH, SOFTMAX, SQUASH, SCRAMBLED, ZERO}),
    "cedrickchee": (cedrickchee, {BATCH, INPUTS, ZERO}),
    "danielhavir": (danielhavir, {SCRAMBLED, ZERO}),
}


def wrong(findings):
    return {finding.check for finding in findings if finding.verdict == WRONG}


def look(model, shape=SHAPE, **losses):
    return examine(model, random_sample(model, shape), **losses)


def sample():
    """Images of :data:`SHAPE`."""
    return torch.rand(7, *SHAPE)


def up_to(check, model, sample):
    """The first finding of each check up to this one; what is found later, as by training, is not looked for."""
    found = {}
    for finding in iter_findings(model, sample):
        found.setdefault(finding.check, finding)
        if finding.check == check:
            break
    return found


def first(check, model, sample):
    """The first finding of a check."""
    return up_to(check, model, sample)[check]


class Routes(nn.Module):
    """Poses ``[B, I, D_in]`` to ``[B, J, D_out]``; subclasses are wrong in one thing, or write the same otherwise."""

    def __init__(self, I=12, J=4, D_in=3, D_out=6, T=3):
        super().__init__()
        self.weight, self.T = nn.Parameter(0.3 * torch.randn(I, J, D_out, D_in)), T

    def coupling(self, logits, t):
        return logits.softmax(2)

    def squashed(self, s):
        return fastcaps.squash(s)

    def agreement(self, votes, v):
        return (votes * v).sum(-1, keepdim=True)

    def forward(self, poses):
        votes = torch.einsum("ijok,bik->bijo", self.weight, poses)
        logits = poses.new_zeros(*votes.shape[:3], 1)
        for t in range(self.T):
            v = self.squashed((self.coupling(logits, t) * votes).sum(1))
            logits = logits + self.agreement(votes, v[:, None])
        return v


def examined_up_to(check, model, *shape):
    torch.manual_seed(0)
    return up_to(check, model, torch.randn(7, *(shape or (12, 3))))


def examined(check, model, *shape):
    return examined_up_to(check, model, *shape)[check]


class Planted(seed.Capsule):
    """The seed form with one mistake, or none."""

    mistake = "none"

    def forward(self, x):
        u = torch.einsum("ijod,bid->bijo", self.weights[0], x)
        b = u.new_zeros(u.shape[:3])
        for _ in range(self.num_routing - (self.mistake == "iterations")):
            c = b.softmax(1 if self.mistake == "softmax" else 2)
            s = torch.einsum("bij,bijo->bjo", c, u)
            n2 = (s * s).sum(1 if self.mistake == "squash" else -1, keepdim=True)
            v = s * n2 / (1 + n2) / (n2 + (0 if self.mistake == "zero" else 1e-8)).sqrt()
            a = torch.einsum("bijo,bjo->bij", u, v)
            b = b + (a.mean(0, keepdim=True) if self.mistake == "batch" else a)
        return v


def plant(model, mistake):
    """Give a network of :mod:`peers.seed` a mistake."""
    model.digits.__class__ = type("Planted", (Planted,), {"mistake": mistake})
