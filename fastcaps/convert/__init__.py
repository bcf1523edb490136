"""Replacement of the capsule layers of a model in place, each replacement verified."""

from fastcaps.convert.converted import ConvertedCapsules, _unpickled  # noqa: F401 - pickles of 0.1 look for it here
from fastcaps.convert.recipes import RECIPES, Recipe
from fastcaps.convert.replace import replace_capsules
from fastcaps.convert.report import ConversionReport, LayerReport

__all__ = ["RECIPES", "ConversionReport", "ConvertedCapsules", "LayerReport", "Recipe", "replace_capsules"]
