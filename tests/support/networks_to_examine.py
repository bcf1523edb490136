"""Small public networks, the mistakes that are known of them, and what tests of the doctor do with them."""

from peers import adambielski, cedrickchee, danielhavir, gram_ai, higgsfield, seed, xifengguo

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


def first(check, model, sample):
    """The first finding of a check; what is found later, as by training, is not looked for."""
    return next(finding for finding in iter_findings(model, sample) if finding.check == check)
