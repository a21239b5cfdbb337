"""Any pytree as nested dicts with string keys, and back.

What lies on disk then does not depend on the classes (optax's named tuples,
our dataclasses) that hold it in memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax


def _names(path: Sequence[Any]) -> tuple[str, ...]:
  """The names along a pytree key path, whatever kind of node they index."""
  names = []
  for key in path:
    for attribute in ('key', 'name', 'idx'):
      if hasattr(key, attribute):
        names.append(str(getattr(key, attribute)))
        break
  return tuple(names)


def flatten_names(tree: Any) -> dict[str, Any]:
  """Returns the leaves by their path, 'params/encoder/...', in tree order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {'/'.join(_names(path)): leaf for path, leaf in leaves}


def to_plain(tree: Any) -> dict[str, Any]:
  """Returns any pytree as nested dicts with string keys.

  What a checkpoint holds then does not depend on the classes (optax's
  NamedTuples, our dataclasses) that hold it in memory.
  """
  plain: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *parents, last = _names(path)
    node = plain
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = leaf
  return plain


def from_plain(plain: Mapping[str, Any], like: Any) -> Any:
  """Inverts `to_plain` for a tree of the same structure as `like`."""

  def leaf(path: Sequence[Any], _: Any) -> Any:
    node: Any = plain
    for name in _names(path):
      node = node[name]
    return node

  return jax.tree_util.tree_map_with_path(leaf, like)
