"""Tensors of other people's layers in canonical order, and back: by axes in words, where ``I`` may be several."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastcaps._axes import Axes


def input_axes(*texts: object) -> tuple[str, ...]:
    """The axes of the input capsules in these texts: ``("I",)``, or several: ``("I1", "I2")``."""
    found = {word for text in texts if isinstance(text, str) for word in re.findall(r"\bI\d+\b", text)}
    return tuple(sorted(found, key=lambda word: int(word[1:]))) or ("I",)


@dataclass(frozen=True)
class Arrangement:
    """The axes of a tensor, parsed once; the axes ``inputs`` together are ``I``.

    Attributes:
        axes: the axes, with each of ``inputs`` on its own.
        inputs: the axes of the input capsules.
    """

    axes: Axes
    inputs: tuple[str, ...]

    @classmethod
    def parse(
        cls, text: object, order: tuple[str, ...], required: tuple[str, ...], inputs: tuple[str, ...]
    ) -> "Arrangement":
        """As :meth:`Axes.parse`, with ``I`` in ``order`` and ``required`` standing for all of ``inputs``.

        Example:
            >>> votes = Arrangement.parse("B I1 I2 D_in", ("B", "I", "D_in"), ("B", "I", "D_in"), ("I1", "I2"))
            >>> votes.axes.order
            ('B', 'I1', 'I2', 'D_in')
        """
        return cls(Axes.parse(text, _expanded(order, inputs), _expanded(required, inputs)), inputs)

    @property
    def names(self) -> list[str]:
        """The axes in the order in which they stand."""
        return self.axes.names

    def sizes(self, tensor: Tensor, known: Mapping[str, int], name: str = "weight") -> dict[str, int]:
        """As :meth:`Axes.sizes`; ``I`` too, where all of its axes are known."""
        sizes = self.axes.sizes(tensor, known, name)
        if len(self.inputs) > 1 and all(axis in sizes for axis in self.inputs):
            sizes["I"] = math.prod([sizes[axis] for axis in self.inputs])  # a list, which torch.compile can trace
        return sizes

    def canonical(self, tensor: Tensor, known: Mapping[str, int], name: str = "weight") -> Tensor:
        """As :meth:`Axes.canonical`, with one axis ``I``; of size 1 where none of its axes is named."""
        tensor = self.axes.canonical(tensor, known, name)
        count = len(self.inputs)
        if count == 1 or self.inputs[0] not in self.axes.order:
            return tensor
        first = self.axes.order.index(self.inputs[0])
        if any(axis in self.names for axis in self.inputs):  # shared over some of them: the others are repeated
            shape = list(tensor.shape)
            shape[first : first + count] = [known[axis] for axis in self.inputs]
            tensor = tensor.expand(shape)
        return tensor.flatten(first, first + count - 1)

    def arranged(self, tensor: Tensor, known: Mapping[str, int]) -> Tensor:
        """As :meth:`Axes.arranged`; ``known`` has the sizes of ``inputs`` where these are several."""
        if len(self.inputs) > 1 and self.inputs[0] in self.axes.order:
            first = self.axes.order.index(self.inputs[0])
            tensor = tensor.unflatten(first, [known[axis] for axis in self.inputs])
        return self.axes.arranged(tensor)


def _expanded(names: tuple[str, ...], inputs: tuple[str, ...]) -> tuple[str, ...]:
    """The names, with those of ``inputs`` in place of ``I``."""
    return tuple(axis for name in names for axis in (inputs if name == "I" else (name,)))
