"""From logical axes to shardings: rules, partition specs, constraints.

Parameters and activations name their dims logically ('embed', 'mlp', 'batch', ...); rules map those
names to mesh axes. Words: an `axis` belongs to the mesh or is a logical name, a `dim` to an array.
"""

import contextlib
import contextvars
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_lite.errors import UsageError, suggest
from t5x_lite.parallel import pytrees

Rule = tuple[str, str | tuple[str, ...] | None]


@dataclasses.dataclass(frozen=True)
class LogicalAxisRules:
  """Which mesh axes each logical axis is cut over."""

  # (logical name, mesh axis or axes or None) pairs; the first that can be kept counts
  rules: tuple[Rule, ...]
  # (regular expression, rules) pairs: those come first for arrays in whose path it is found
  by_parameter: tuple[tuple[str, tuple[Rule, ...]], ...] = ()
  strict: int = 0  # how many of the first `rules` are the user's own, which may not give way

  def of(self, path: str) -> tuple[Rule, ...]:
    """Returns all rules for the array at a path, in order of precedence."""
    return (*self.own(path), *self.rules)

  def own(self, path: str) -> tuple[Rule, ...]:
    """Returns the rules that are only for the array at a path."""
    found = [rules for pattern, rules in self.by_parameter if path and re.search(pattern, path)]
    return tuple(itertools.chain.from_iterable(found))


def mesh_axes(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns what a rule, or an entry of a partition spec, names."""
  if target is None:
    return ()
  return (target,) if isinstance(target, str) else tuple(target)


def spec(
  axes: Sequence[str | None],
  shape: Sequence[int],
  mesh_sizes: Mapping[str, int],
  rules: LogicalAxisRules,
  path: str = '',
) -> PartitionSpec:
  """Returns the partition spec of an array with these logical axes (None: a dim that stays whole).

  Rules are tried in order; each mesh axis is used at most once an array (as in flax's
  logical_to_mesh_axes). A rule whose mesh axes do not divide the dim is passed over, so the dim
  stays whole rather than being padded. The path is a parameter's, such as
  'encoder/layers/mlp/wo/kernel'. Raises UsageError if a name has no rule at all.
  """
  assert len(axes) == len(shape), (axes, shape)
  result: list[Any] = [None] * len(axes)
  done = [name is None for name in axes]
  used: set[str] = set()
  applicable = rules.of(path)
  for name, target in applicable:
    for i, axis in enumerate(axes):
      if axis != name or done[i]:
        continue
      names = mesh_axes(target)
      size = math.prod(mesh_sizes[n] for n in names)
      if not names:
        done[i] = True
      elif used.isdisjoint(names) and shape[i] % size == 0:
        result[i], done[i] = target, True
        used.update(names)
        break
  known = {name for name, _ in applicable}
  for axis in axes:
    if axis is not None and axis not in known:
      allowed = ', '.join(sorted(known))
      raise UsageError(f'no rule names the logical axis {axis!r}; rules exist for {allowed}')
  return PartitionSpec(*result)


def check_rules(shapes: Any, axes: Any, mesh: Mesh, rules: LogicalAxisRules) -> None:
  """Raises UsageError if a rule that the user wrote cannot be kept; arguments as of `Placement`.

  The standard rules give way to each other: with parameter and activation dims cut, 'embed' takes
  what is left. A rule of the user's that does nothing would only show in the first run's memory.
  """
  leaves = pytrees.leaves_with_axes(shapes, axes)
  arrays = {'/'.join(path): (leaf.shape, names) for path, leaf, names in leaves}
  strict = rules.rules[: rules.strict]
  known = {name for name, _ in rules.rules[rules.strict :]}
  for rule in itertools.chain(strict, *(own for _, own in rules.by_parameter)):
    if (name := rule[0]) not in known:
      there = ', '.join(sorted(known)) + suggest(name, known)
      raise UsageError(f'the rule {rule} names the logical axis {name!r}; there are {there}')
  for pattern, _ in rules.by_parameter:
    if not any(re.search(pattern, path) for path in arrays):
      hint = suggest(pattern, arrays, cutoff=0.3)
      raise UsageError(f'parameter_rules: no parameter matches {pattern!r}{hint}')
  for path, (shape, names) in arrays.items():
    _check_array(path, shape, names, mesh.shape, rules, (*rules.own(path), *strict))


def check_axis_cuts(shapes: Any, axes: Any, mesh: Mesh, rules: LogicalAxisRules, cut: str) -> None:
  """Raises UsageError if an array that the mesh axis `cut` should cut stays whole.

  For a number of devices that somebody asked for: what they do not divide is replicated otherwise,
  and shows only in the memory of the first run.
  """
  for path, leaf, names in pytrees.leaves_with_axes(shapes, axes):
    name = '/'.join(path)
    targets = {axis for axis, to in rules.of(name) if to == cut}
    dims = [i for i, axis in enumerate(names) if axis in targets]
    result = spec(names, leaf.shape, mesh.shape, rules, name)
    if dims and leaf.ndim > 1 and not any(cut in mesh_axes(one) for one in result):
      raise UsageError(
        f'{mesh.shape[cut]} devices along the mesh axis {cut!r} do not divide {name}, whose dim '
        f'{names[dims[0]]!r} is {leaf.shape[dims[0]]}: choose a MeshConfig.{cut} that does'
      )


def _check_array(
  path: str, shape: Any, axes: Any, sizes: Any, rules: LogicalAxisRules, wanted: Sequence[Rule]
) -> None:
  """Checks that the first rule wanted for each dim of an array is kept."""
  result = spec(axes, shape, sizes, rules, path)
  for i, axis in enumerate(axes):
    rule = next((r for r in wanted if r[0] == axis), None)
    # A rule is for the first dim of that name.
    if rule is None or result[i] == rule[1] or axis in axes[:i]:
      continue
    wanted_axes = mesh_axes(rule[1])
    size = math.prod(sizes[n] for n in wanted_axes)
    if shape[i] % size:
      dim = f'its dim {axis!r} of {shape[i]}'
      raise UsageError(f'the rule {rule} cannot cut {path}: {size} devices do not divide {dim}')
    for j, cut in enumerate(result):
      if j != i and set(mesh_axes(cut)) & set(wanted_axes):
        why = f'its dim {axes[j]!r} is cut over {cut!r} already; add ({axes[j]!r}, None) before it'
        raise UsageError(f'the rule {rule} collides in {path}: {why}')


# Set while a program traces its step; read by the model's constraints. A context, not an argument,
# so that the model's signatures stay about the model.
_ACTIVE = contextvars.ContextVar[Any]('t5x_lite_axis_rules', default=None)


@contextlib.contextmanager
def axis_rules(mesh: Mesh, rules: LogicalAxisRules) -> Iterator[None]:
  """Makes `constrain` effective for what is traced inside."""
  token = _ACTIVE.set((mesh, rules))
  try:
    yield
  finally:
    _ACTIVE.reset(token)


def active_mesh() -> Mesh | None:
  """Returns the mesh of the `axis_rules` that is being traced, if any."""
  active = _ACTIVE.get()
  return None if active is None else active[0]


def _active_rules() -> tuple[Mesh, LogicalAxisRules] | None:
  active = _ACTIVE.get()
  return None if active is None or active[0].size == 1 else active  # one device cuts nothing


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains an activation's sharding by logical names; outside `axis_rules` it returns x."""
  if (active := _active_rules()) is None:
    return x
  mesh, rules = active
  partition = spec(axes, x.shape, mesh.shape, rules)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition))


def per_shard(fn: Callable[..., jax.Array], axes: Sequence[tuple], out_axes: tuple) -> Callable:
  """Returns fn run by each device on its own part, for fn that never look across.

  Outside `axis_rules`, or on one device, it is fn itself. Axes are the logical names of the arrays
  of each of fn's arguments, which may be pytrees; the result has the shape of the first and the
  names out_axes.
  """
  if (active := _active_rules()) is None:
    return fn
  mesh, rules = active

  def run(*args):
    specs = tuple(
      jax.tree.map(lambda x, names=names: spec(names, x.shape, mesh.shape, rules), arg)
      for arg, names in zip(args, axes, strict=True)
    )
    out_specs = spec(out_axes, args[0].shape, mesh.shape, rules)
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(*args)

  return run
