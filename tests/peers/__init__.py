"""Capsule layers and networks found in public repositories, written again in plain PyTorch from their description.

They are the evidence against which the drop-in conversion is tested. Each file stands alone and keeps its original's
class, attribute and parameter names, recipe and mistakes; none of them imports fastcaps or contains the original code.

Letters: B batch, I input capsules, J output capsules, D_in and D_out the sizes of their poses.
"""
