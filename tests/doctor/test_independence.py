"""The doctor's view of state that is kept from call to call, of random numbers, and of the other samples."""

import random

import numpy as np
import pytest
import torch
from support.networks_to_examine import BATCH, STATE, first
from torch import nn

import fastcaps
from fastcaps.convert.modules import seed_generators
from fastcaps.doctor import FINE, SUSPICIOUS, UNKNOWN, WRONG, examine


class Routes(nn.Module):
    """Poses ``[B, I, D_in]`` to ``[B, J, D_out]``, from the routing logits that ``start`` gives."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(12, 4, 6, 3))

    def start(self, votes):
        return votes.new_zeros(votes.shape[:3])

    def end(self, logits):
        """What is kept."""

    def forward(self, poses):
        votes = torch.einsum("ijok,bik->bijo", self.weight, poses)
        logits = self.start(votes)
        for _ in range(3):
            v = fastcaps.squash(torch.einsum("bij,bijo->bjo", logits.softmax(2), votes))
            logits = logits + torch.einsum("bijo,bjo->bij", votes, v)
        self.end(logits)
        return v


class KeepsAnAttribute(Routes):
    logits = None

    def start(self, votes):
        return super().start(votes) if self.logits is None else self.logits

    def end(self, logits):
        self.logits = logits.detach()


class KeepsABuffer(Routes):
    def __init__(self):
        super().__init__()
        self.register_buffer("logits", torch.zeros(12, 4))

    def start(self, votes):
        return self.logits.expand(len(votes), -1, -1)

    def end(self, logits):
        self.logits.copy_(logits.detach()[-1])


class KeepsAParameter(Routes):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(12, 4))

    def start(self, votes):
        return self.logits.expand(len(votes), -1, -1)

    def end(self, logits):
        self.logits.data += logits.detach()[0]


class Counts(Routes):
    """What it keeps changes no output."""

    calls, last = 0, None

    def end(self, logits):
        self.calls, self.last = self.calls + 1, logits.detach()


class BuiltInTheFirstCall(Routes):
    """The first call draws its weight; from then on it is kept."""

    def __init__(self):
        super().__init__()
        self.weight = None

    def forward(self, poses):
        if self.weight is None:
            self.weight = nn.Parameter(0.3 * torch.randn(12, 4, 6, 3))
        return super().forward(poses)


class Random(Routes):
    def start(self, votes):
        return torch.randn(votes.shape[:3])


class RandomByNumpy(Routes):
    def start(self, votes):
        return torch.from_numpy(np.random.randn(*votes.shape[:3])).to(votes)


class RandomByPython(Routes):
    def start(self, votes):
        return torch.tensor([random.gauss(0, 1) for _ in range(48)]).view(12, 4).expand(len(votes), -1, -1)


class RandomBySystem(Routes):
    """No seed holds these numbers."""

    def start(self, votes):
        return torch.from_numpy(np.random.default_rng().standard_normal(votes.shape[:3])).to(votes)


class RandomInput(Routes):
    def forward(self, poses):
        return super().forward(poses + 0.1 * torch.randn_like(poses))


def sample():
    return torch.randn(7, 12, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [KeepsAnAttribute, KeepsABuffer, KeepsAParameter])
def test_kept_state_is_said_and_not_blamed_on_the_batch_mates(kind):
    model = kind()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finding = first(STATE, model, sample())
    assert (finding.verdict, "logits changed" in finding.evidence) == (WRONG, True), str(finding)
    assert first(BATCH, model, sample()).verdict == FINE
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "logits" not in vars(model)


@pytest.mark.parametrize(
    "kind", [Routes, Counts, BuiltInTheFirstCall, Random, RandomByNumpy, RandomByPython, RandomInput]
)
def test_what_is_drawn_or_counted_is_no_kept_state_and_no_leak(kind):
    model = kind()
    seed_generators(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    seed_generators(5)
    for check in (STATE, BATCH):
        finding = first(check, model, sample())
        assert finding.verdict == FINE, str(finding)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected  # the random numbers of others are theirs


@pytest.mark.train
def test_random_numbers_that_no_seed_holds_are_no_mistake():
    findings = examine(RandomBySystem(), sample())
    assert not [str(f) for f in findings if f.verdict in (WRONG, SUSPICIOUS)]
    for check in (STATE, BATCH):
        finding = next(f for f in findings if f.check == check)
        assert (finding.verdict, "draws random numbers" in finding.evidence) == (UNKNOWN, True), str(finding)


def test_random_logits_do_not_hide_a_leak():
    class Leaks(Random):
        def start(self, votes):
            return super().start(votes) + votes.mean((0, 3))

    assert first(BATCH, Leaks(), sample()).verdict == WRONG


def test_state_that_is_not_finite():
    class Grows(Routes):
        scale = 1.0

        def forward(self, poses):
            self.scale *= 1e30
            return super().forward(poses) * self.scale

    assert first(STATE, Grows(), sample()).verdict == UNKNOWN


@pytest.mark.train
def test_a_run_changes_nothing_of_the_model():
    model = KeepsABuffer().train()
    examine(model, sample())
    assert model.training
    assert not model.logits.any()
