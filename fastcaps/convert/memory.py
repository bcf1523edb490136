"""The memory that the comparison of a layer takes, and the refusal where it is not there."""

import math

import torch
from torch import Tensor, nn

from fastcaps.convert.cases import batches
from fastcaps.convert.converted import Plan
from fastcaps.convert.verdict import refuse
from fastcaps.measure import free_memory


def needed_memory(layer: nn.Module, plan: Plan, poses: Tensor, num_iterations: int) -> int:
    """About the most bytes that a comparison takes beside the layer, in float64.

    First the old layer runs alone, on a copy of it. Many layers repeat the weight for each sample, or multiply it with
    the poses entry by entry: they hold ``[B, I, J, D_out, D_in]`` in the forward, and again in the backward. Later five
    times the layer is held, which is less: the copy, the gradients of two results, and in a third run the weight in
    another order and its gradient. With logits of the batch that run holds ``[I, J, D_out, D_in]`` twice for each
    iteration. Autograd keeps the votes in each iteration; where they are the poses, they are held as a weight is.
    """
    given = batches(layer, plan, poses.detach(), torch.Generator())
    B = max(len(plan.canonical(layer, x)) for x in given.values())
    tensors = plan.tensors(layer, poses)
    x, weight = tensors["poses"], tensors["weight"]
    votes = math.prod(x.shape[1:]) if weight is None else x.shape[1] * math.prod(weight.shape[1:3])  # of a sample
    products = 0 if weight is None else votes * weight.shape[3]
    repeated = max(B, num_iterations + 1) if plan.recipe.logits == "batch" else B
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    return 8 * (3 * parameters + 2 * repeated * products + (2 * num_iterations + 8) * B * votes)


def refuse_without_memory(layer: nn.Module, plan: Plan, poses: Tensor, num_iterations: int) -> None:
    """Refuse to compare a layer where the memory may not be enough.

    Raises:
        Refusal: more is needed than is free.
    """
    needed, free = needed_memory(layer, plan, poses, num_iterations), free_memory(poses.device)
    if free is not None and needed > free:
        text = f"comparing it takes up to {_in_words(needed)} of memory, and {_in_words(free)} are free"
        refuse(f"{text}: free some, or convert it on a machine that has it")


def _in_words(count: int) -> str:
    """Bytes as 12.4 GB or 0.3 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
