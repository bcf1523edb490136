"""The axes of a tensor in words, as einops writes them: ``"J I D_in D_out"``, ``"I D_in (J D_out)"``."""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ONE = "1"  # a dimension of size 1


@dataclass(frozen=True)
class Axes:
    """Which axes a tensor has, and in which order; parsed once, so that a traced ``forward`` meets no string.

    Attributes:
        text: as it was written.
        order: the axes in canonical order.
        groups: the axes of each dimension; ``"1"`` for a dimension of size 1.
    """

    text: str
    order: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: Any, order: tuple[str, ...], required: tuple[str, ...]) -> "Axes":
        """Read axes.

        Args:
            text: the axes.
            order: all axes that it may name, in canonical order.
            required: those that it must name.

        Raises:
            TypeError: ``text`` is no string.
            ValueError: it is malformed, or names too few axes or one of them twice.

        Example:
            >>> Axes.parse("I D_in (J D_out)", ("I", "J", "D_out", "D_in"), ("D_out", "D_in")).groups
            (('I',), ('D_in',), ('J', 'D_out'))
        """
        if not isinstance(text, str):
            raise TypeError(f"axes must be a string, got {text!r}")
        return _parsed(text, order, required)

    @property
    def names(self) -> list[str]:
        """The axes in the order in which they stand, without those of size 1."""
        return [axis for group in self.groups for axis in group if axis != ONE]

    def sizes(self, tensor: Tensor, known: Mapping[str, int], name: str = "weight") -> dict[str, int]:
        """The known sizes of axes, and those that a tensor with these axes tells.

        Args:
            tensor: the tensor.
            known: the sizes that are known; of the axes that share a dimension, all but one must be.
            name: what an error calls the tensor.

        Raises:
            ValueError: the tensor does not fit, or a size is missing.
        """
        if len(self.groups) != tensor.dim():
            raise ValueError(
                f"{self.text!r} has {len(self.groups)} axes, the {name} {tensor.dim()}: {tuple(tensor.shape)}"
            )
        sizes = {**known, ONE: 1}
        for group, total in zip(self.groups, tensor.shape, strict=True):
            unknown = [axis for axis in group if axis not in sizes]
            if len(unknown) > 1:
                raise ValueError(f"axes {self.text!r}: the size of {' or '.join(unknown)} must be given")
            if unknown:
                sizes[unknown[0]] = total // max(math.prod([sizes[axis] for axis in group if axis in sizes]), 1)
            wanted = [sizes[axis] for axis in group]
            if math.prod(wanted) != total:
                raise ValueError(f"axes {self.text!r}: axis ({' '.join(group)}) of size {total} is not {wanted}")
        del sizes[ONE]
        return sizes

    def canonical(self, tensor: Tensor, known: Mapping[str, int], name: str = "weight") -> Tensor:
        """A tensor with these axes in canonical order: a view where that can be; an axis not named has size 1.

        The arguments and errors are those of :meth:`sizes`.
        """
        sizes, names = self.sizes(tensor, known, name), self.names
        tensor = tensor.reshape([sizes[axis] for axis in names])
        tensor = tensor.permute([names.index(axis) for axis in self.order if axis in names])
        for position, axis in enumerate(self.order):
            if axis not in names:
                tensor = tensor.unsqueeze(position)
        return tensor

    def arranged(self, tensor: Tensor) -> Tensor:
        """A tensor in canonical order, brought to these axes, contiguous; they name all of them."""
        sizes = {**dict(zip(self.order, tensor.shape, strict=True)), ONE: 1}
        tensor = tensor.permute([self.order.index(axis) for axis in self.names])
        shape = [math.prod([sizes[axis] for axis in group]) for group in self.groups]
        return tensor.reshape(shape).contiguous()


@functools.cache
def _parsed(text: str, order: tuple[str, ...], required: tuple[str, ...]) -> Axes:
    """What :meth:`Axes.parse` returns; a diagnosis reads the same few texts thousands of times."""
    words = re.findall(r"[^\s()]+", text)
    rest = re.sub(r"\([^()]*\)", "", text)
    if "(" in rest or ")" in rest or not set(words) <= {*order, ONE}:
        raise ValueError(f"axes must be made of {', '.join(order)}, 1 and pairs of parentheses, got {text!r}")
    names = [word for word in words if word != ONE]
    if len(set(names)) != len(names) or not set(required) <= set(names):
        optional = [axis for axis in order if axis not in required]
        may = f", and may name {' and '.join(optional)}" if optional else ""
        raise ValueError(f"axes must name {' and '.join(required)}{may}, each once; got {text!r}")
    groups = tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^()]*\)|[^\s()]+", text))
    return Axes(text, order, groups)


Layout = Axes  # its name in 0.1, for code and pickles that import fastcaps.layouts
