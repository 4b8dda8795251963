"""From a recipe to its stages. `Graph.leaves` names what each table and figure reads."""

from dvpo.errors import InputError
from reproduce.graphs.atlas import atlas_graph
from reproduce.graphs.common import Graph
from reproduce.graphs.data import data_graph
from reproduce.recipe import AtlasRecipe, DataRecipe

__all__ = ["Graph", "atlas_graph", "build", "data_graph"]


def build(recipe: AtlasRecipe | DataRecipe, data: str | None) -> Graph:
    """The graph of a recipe. Raises InputError where data or a model must be named and is not."""
    if isinstance(recipe, AtlasRecipe):
        if data is not None:
            raise InputError(f"recipe {recipe.name} makes its own data; leave --data out, or choose --recipe small")
        return atlas_graph(recipe)
    return data_graph(recipe, data)
