"""Layers of public repositories, small, and what tests of their conversion do with them."""

import warnings

import torch
from peers import (
    adambielski,
    cedrickchee,
    danielhavir,
    gram_ai,
    higgsfield,
    readable_capsnet,
    sabour_tensorflow,
    seed,
    xifengguo,
)

from fastcaps.convert import RECIPES, replace_capsules

I, D_IN, J, D_OUT = 11, 4, 5, 6
BY_NAME = {recipe.name: recipe for recipe in RECIPES}
WRONG = {"gram-ai": "input capsules", "higgsfield": "averaged over the batch", "cedrickchee": "averaged over the batch"}


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
}


def poses_for(name, B=7, dtype=torch.float32):
    x = torch.randn(B, I, D_IN, dtype=dtype)
    return x.mT.contiguous() if name == "cedrickchee" else x


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
