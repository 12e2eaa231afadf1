"""Original archives of public image data sets, read as their publishers wrote them, one file a family."""

from experiments._harness.archives import cifar, idx, imagenet, stl10, svhn
from experiments._harness.archives.recipe import Recipe

RECIPES: dict[str, Recipe] = {
  recipe.name: recipe for recipe in (*cifar.RECIPES, *idx.RECIPES, svhn.RECIPE, stl10.RECIPE, imagenet.RECIPE)
}
"""By the name tensorflow-datasets gives the set."""

__all__ = ["RECIPES", "Recipe"]
