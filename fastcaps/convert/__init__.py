"""Replacing the capsule layers of a model in place, each replacement verified."""

from fastcaps.convert.recipes import RECIPES, Recipe
from fastcaps.convert.replace import ConversionReport, ConvertedCapsules, LayerReport, replace_capsules

__all__ = ["RECIPES", "ConversionReport", "ConvertedCapsules", "LayerReport", "Recipe", "replace_capsules"]
