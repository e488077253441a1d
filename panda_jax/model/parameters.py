"""The model's parameters as a flat dict of arrays, which is how they are sharded, saved, trained and handed around."""

from __future__ import annotations

import jax
from flax import nnx

from panda_jax.config import Model
from panda_jax.model.llama import Llama


class Parameters:
    """The model's parameters as a flat dict, and the way back to a module."""

    def __init__(self, config: Model) -> None:
        self._config = config
        module = nnx.eval_shape(lambda: Llama(config, jax.random.key(0)))
        self._graphdef, state = nnx.split(module)
        self._treedef = jax.tree.structure(state)
        variables = nnx.to_flat_state(state)
        self.names = tuple(".".join(map(str, path)) for path, _ in variables)
        self.axes = {
            name: variable.get_metadata("axes") for name, (_, variable) in zip(self.names, variables, strict=True)
        }
        leaves = jax.tree.leaves(state)
        self.shapes = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in zip(self.names, leaves, strict=True)
        }

    def module(self, values: dict[str, jax.Array]) -> Llama:
        """Return the module that holds the given arrays."""
        return nnx.merge(self._graphdef, self._treedef.unflatten([values[name] for name in self.names]))

    def initial(self, key: jax.Array) -> dict[str, jax.Array]:
        """Return random parameters; traceable, so that no device ever holds more than its shard."""
        _, state = nnx.split(Llama(self._config, key))
        return dict(zip(self.names, jax.tree.leaves(state), strict=True))
