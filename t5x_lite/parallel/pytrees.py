"""Leaves of pytrees by name, and any pytree as nested dicts, and back.

What lies on disk then does not depend on the classes (optax's named tuples, our dataclasses) that
hold it in memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax


def names_of(path: Sequence[Any]) -> tuple[str, ...]:
  """Returns the names along a pytree path: ('encoder', 'layers', '0', ...)."""
  return tuple(jax.tree_util.keystr((key,), simple=True, separator='/') for key in path)


def path_name(path: Sequence[Any]) -> str:
  """Returns a pytree path as 'encoder/layers/0/kernel'."""
  return '/'.join(names_of(path))


def flatten_names(tree: Any) -> dict[str, Any]:
  """Returns the leaves by their path, 'params/encoder/...', in tree order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): leaf for path, leaf in leaves}


def to_plain(tree: Any) -> dict[str, Any]:
  """Returns any pytree as nested dicts with string keys."""
  plain: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    *parents, last = names_of(path)
    node = plain
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = leaf
  return plain


def from_plain(plain: Mapping[str, Any], like: Any) -> Any:
  """Inverts `to_plain` for a tree of the same structure as `like`."""

  def leaf(path: Sequence[Any], _: Any) -> Any:
    node: Any = plain
    for name in names_of(path):
      node = node[name]
    return node

  return jax.tree_util.tree_map_with_path(leaf, like)
