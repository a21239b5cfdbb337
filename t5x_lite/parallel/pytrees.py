"""Leaves of pytrees by name, and any pytree as nested dicts, and back.

So what lies on disk does not depend on the classes that hold it in memory.
"""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util


def names_of(path: Sequence[Any]) -> tuple[str, ...]:
  """Returns the names along a pytree path: ('encoder', 'layers', '0', ...)."""
  return tuple(jax.tree_util.keystr((key,), simple=True, separator='/') for key in path)


def leaves(tree: Any, **options: Any) -> list[tuple[tuple[str, ...], Any]]:
  """Returns (names along the path, leaf) of each leaf of a tree."""
  found = jax.tree_util.tree_leaves_with_path(tree, **options)
  return [(names_of(path), leaf) for path, leaf in found]


def path_name(path: Sequence[Any]) -> str:
  """Returns a pytree path as 'encoder/layers/0/kernel'."""
  return '/'.join(names_of(path))


def flatten_names(tree: Any) -> dict[str, Any]:
  """Returns the leaves by their path, 'params/encoder/...', in tree order."""
  return {'/'.join(path): leaf for path, leaf in leaves(tree)}


def to_plain(tree: Any) -> dict[str, Any]:
  """Returns any pytree as nested dicts with string keys."""
  return nested(leaves(tree))


def nested(found: Iterable[tuple[Sequence[str], Any]]) -> dict[str, Any]:
  """Returns (names along the path, leaf) pairs as nested dicts."""
  return traverse_util.unflatten_dict({tuple(path): leaf for path, leaf in found})


def leaves_with_axes(tree: Any, axes: Any) -> list[tuple[tuple[str, ...], Any, Any]]:
  """Returns (names along the path, leaf, its logical axes) of each leaf of a tree."""
  names = jax.tree.structure(tree).flatten_up_to(axes)
  return [(path, leaf, own) for (path, leaf), own in zip(leaves(tree), names, strict=True)]


def from_plain(plain: Mapping[str, Any], like: Any) -> Any:
  """Inverts `to_plain` for a tree of the same structure as `like`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: functools.reduce(operator.getitem, names_of(path), plain), like
  )
