"""Layers of public repositories, small, and what tests of their conversion do with them."""

import warnings
from types import SimpleNamespace

import torch
from peers import (
    abc_capsnet,
    adambielski,
    ale_ayotte,
    alex_capsnet,
    caps_fake,
    cedrickchee,
    cezannec,
    danielhavir,
    gchochla,
    gram_ai,
    higgsfield,
    hula_ai,
    labml,
    laubonghaudoi,
    leftthomas,
    motokimura,
    point_capsules,
    readable_capsnet,
    riroaki,
    sabour_tensorflow,
    seed,
    timomernick,
    xifengguo,
)

from fastcaps.convert import RECIPES, replace_capsules

I, D_IN, J, D_OUT = 11, 4, 5, 6
BY_NAME = {recipe.name: recipe for recipe in RECIPES}
WRONG = {
    "gram-ai": "input capsules",
    "higgsfield": "averaged over the batch",
    "cedrickchee": "averaged over the batch",
    "motokimura": "averaged over the batch",
    "cezannec": "input capsules",
    "aleayotte": "input capsules",
    "labml": "input capsules",
    "timomernick": "norm over the output capsules",
}
COLUMNS = ("cedrickchee", "timomernick")  # their poses come as [B, D_in, I]
CONSTANT_T = ("higgsfield", "cezannec", "3d-point-capsules", "capsfake", "timomernick")  # 3 is written into them


def adam(T):
    return adambielski.CapsLayer(I, D_IN, J, D_OUT, adambielski.AgreementRouting(I, J, T - 1))


LAYERS = {
    "capsule": lambda T=3: seed.Capsule(I, D_IN, J, D_OUT, T),
    "xifengguo": lambda T=3: xifengguo.DenseCapsule(I, D_IN, J, D_OUT, T),
    "gram-ai": lambda T=3: gram_ai.CapsuleLayer(J, I, D_IN, D_OUT, num_iterations=T),
    "adambielski": lambda T=3: adam(T),
    "higgsfield": lambda T=3: higgsfield.DigitCaps(J, I, D_IN, D_OUT),
    "cedrickchee": lambda T=3: cedrickchee.CapsuleLayer(D_IN, I, J, D_OUT, True, T),
    "danielhavir": lambda T=3: danielhavir.RoutingCapsules(D_IN, I, J, D_OUT, T),
    "readable_capsnet": lambda T=3: readable_capsnet.CapsuleLayerWithRouting(I, D_IN, J, D_OUT, T),
    "sabour": lambda T=3: sabour_tensorflow.CapsuleLayer(I, J, D_IN, D_OUT, T),
    "riroaki": lambda T=3: riroaki.DigitCaps(D_IN, I, J, D_OUT, T),
    "motokimura": lambda T=3: motokimura.DigitCaps(I, D_IN, J, D_OUT, T),
    "hula-ai": lambda T=3: hula_ai.DigitCapsLayer(J, I, D_IN, D_OUT, T),
    "gchochla": lambda T=3: gchochla.SemanticCaps(J, I, D_OUT, D_IN, T),
    "cezannec": lambda T=3: cezannec.DigitCaps(J, I, D_IN, D_OUT),
    "aleayotte": lambda T=3: ale_ayotte.CapsuleLayer(J, I, D_IN, D_OUT, T),
    "labml": lambda T=3: labml.Router(I, J, D_IN, D_OUT, T),
    "laubonghaudoi": lambda T=3: laubonghaudoi.DigitCaps(SimpleNamespace(r=T), I, J, D_IN, D_OUT),
    "3d-point-capsules": lambda T=3: point_capsules.LatentCapsLayer(J, I, D_IN, D_OUT),
    "abc-capsnet": lambda T=3: abc_capsnet.DigitCapsuleLayer(J, I, D_IN, D_OUT, T),
    "alexcapsnet": lambda T=3: alex_capsnet.DenseCapsule(I, D_IN, J, D_OUT, "cpu", T),
    "timomernick": lambda T=3: timomernick.CapsuleLayer(D_IN, I, J, D_OUT),
}
CALLED_WITH_MORE = {"capsfake": lambda: caps_fake.DigitCaps(J, I, D_IN, D_OUT)}
RETURN_TWO = {
    "leftthomas": lambda T=3: leftthomas.CapsuleLinear(J, D_IN, D_OUT, I, T),
    "leftthomas-squashed": lambda T=3: leftthomas.CapsuleLinear(J, D_IN, D_OUT, I, T, squash=True),
    "leftthomas-shared": lambda T=3: leftthomas.CapsuleLinear(J, D_IN, D_OUT, None, T),
    "leftthomas-shared-squashed": lambda T=3: leftthomas.CapsuleLinear(J, D_IN, D_OUT, None, T, squash=True),
}


def poses_for(name, B=7, dtype=torch.float32):
    x = torch.randn(B, I, D_IN, dtype=dtype)
    return x.mT.contiguous() if name in COLUMNS else x


def quietly(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return replace_capsules(*args, measure=False, **options)


def gradients(layer, x):
    x = x.clone().requires_grad_()
    out = layer(x)
    torch.manual_seed(5)
    grads = torch.autograd.grad(out, [x, *layer.parameters()], torch.randn(out.shape, dtype=out.dtype))
    return [out.detach(), *grads]


def train_steps(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        v = model(x)
        (v.flatten(1).norm(dim=1) - x.flatten(1).sum(1).sigmoid()).pow(2).mean().backward()
        optimizer.step()
