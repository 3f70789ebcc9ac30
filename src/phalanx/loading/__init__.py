"""Read recipes: YAML validated into frozen dataclasses, every mistake reported at once with file and line.

loaded = load_recipe(Recipe, Path("recipe.yaml"), ["training.epochs=3"])
loaded.value, loaded.resolved, loaded.sources["training.epochs"]
"""

from __future__ import annotations

from phalanx.loading.layers import to_plain
from phalanx.loading.placing import placed
from phalanx.loading.problems import Place, Problem, RecipeErrors
from phalanx.loading.recipes import Extends, Loaded, load_recipe
from phalanx.loading.strict_yaml import read_text
from phalanx.loading.validation import schema

__all__ = [
    "Extends",
    "Loaded",
    "Place",
    "Problem",
    "RecipeErrors",
    "load_recipe",
    "placed",
    "read_text",
    "schema",
    "to_plain",
]
