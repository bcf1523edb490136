"""The doctor and a model's outputs: which of them are class capsules, and which are not."""

import warnings

import pytest
import torch
from support.networks_to_examine import (
    BATCH,
    DISTINCT,
    ITERATIONS,
    SCORES,
    SOFTMAX,
    TRAINS,
    Routes,
    examined,
)
from torch import nn
from torch.nn import functional as F

import fastcaps
from fastcaps.doctor import FINE, SUSPICIOUS, UNKNOWN, WRONG, iter_findings


class Outputs(nn.Module):
    """A capsule layer in a model; subclasses return what they like of it."""

    def __init__(self, J=4):
        super().__init__()
        self.capsules = Routes(J=J)
        self.decoder = nn.Sequential(nn.Linear(6 * J, J * J), nn.Sigmoid())

    def forward(self, poses):
        v = self.capsules(poses)
        lengths = v.norm(dim=2)
        mask = F.one_hot(lengths.argmax(1), v.shape[1]).to(v.dtype)
        images = self.decoder((v * mask[..., None]).flatten(1)).unflatten(1, (1, v.shape[1], v.shape[1]))
        return self.returned(v, lengths, mask, images)

    def returned(self, v, lengths, mask, images):
        raise NotImplementedError


RETURNED = {
    "lengths, reconstruction": lambda v, n, mask, images: (n, images),
    "reconstruction, lengths": lambda v, n, mask, images: (images, n),
    "reconstruction, mask, poses": lambda v, n, mask, images: {"a": images, "b": mask, "c": v},
    "mask, poses the other way": lambda v, n, mask, images: (mask, v.mT),
    "mask, column vectors": lambda v, n, mask, images: (mask, images, v[..., None]),
}


@pytest.mark.train
@pytest.mark.parametrize("name", RETURNED)
def test_reconstructions_and_masks_are_no_capsules(name):
    """J = 4: the reconstruction is ``[B, 1, J, J]``."""

    class Network(Outputs):
        def returned(self, *values):
            return RETURNED[name](*values)

    model = Network()
    finding = examined(TRAINS, model)
    torch.manual_seed(0)
    with torch.no_grad():
        lengths = model.capsules(torch.randn(7, 12, 3)).norm(dim=2)
    assert f"lengths {lengths.min():.2g} to {lengths.max():.2g}" in finding.evidence, str(finding)


def test_masks_are_no_softmaxed_scores():
    class Masked(Outputs):
        def returned(self, v, lengths, mask, images):
            return mask, lengths

    class Softmaxed(Outputs):
        def returned(self, v, lengths, mask, images):
            return mask, lengths.softmax(1)

    assert examined(SCORES, Masked()).verdict == FINE
    assert examined(SCORES, Softmaxed()).verdict == SUSPICIOUS


def test_random_logits_make_no_class():
    """As in a network of interests for recommendation: the capsules are sound, but none is that of a class."""

    class Interests(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(8, 8) / 3)

        def forward(self, x):
            votes = x @ self.matrix
            logits = torch.randn(*x.shape[:2], 4)
            for _ in range(3):
                v = fastcaps.squash(torch.einsum("bij,bio->bjo", logits.softmax(2), votes))
                logits = logits + torch.einsum("bio,bjo->bij", votes, v)
            return v

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        findings = list(iter_findings(Interests(), torch.randn(7, 20, 8)))
    assert not [str(f) for f in findings if f.verdict in (WRONG, SUSPICIOUS)]
    assert {f.verdict for f in findings if f.check in (BATCH, DISTINCT, SOFTMAX)} == {FINE}
    assert next(f for f in findings if f.check == TRAINS).verdict == UNKNOWN


def test_saturated_votes():
    """A layer that takes votes has no matrices that could be made smaller: many votes saturate its squash."""

    class Agreement(nn.Module):
        n_iterations = 3

        def forward(self, votes):
            logits = votes.new_zeros(votes.shape[1:3])
            v = fastcaps.squash((logits.softmax(-1)[..., None] * votes).sum(1))
            for _ in range(self.n_iterations):
                logits = logits + (votes * v[:, None]).sum(-1)
                v = fastcaps.squash((logits.softmax(-1)[..., None] * votes).sum(1))
            return v

    finding = examined(ITERATIONS, Agreement(), 600, 10, 16)
    assert (finding.verdict, "n_iterations is 3, but" in finding.evidence) == (WRONG, True), str(finding)
