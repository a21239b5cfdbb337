"""A model on a mesh: its placement, its parameters' shardings, its steps.

Nothing is allocated here: whoever trains, decodes or compiles asks where parameters go.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import pytrees
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.parallel.placement import Placement, make_placement, single_device


def count_params(params: Any) -> int:
  """Returns the number of parameters."""
  return sum(int(x.size) for x in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, 'size')))


def place_model(
  model: T5Config,
  mesh: MeshConfig | None = None,
  devices: Sequence[jax.Device] | None = None,
  *,
  batch_size: int | None = None,
) -> Placement:
  """Returns where a model's arrays live: on all devices, arranged by their number by default.

  What 'auto' means for the mesh is decided by the model's size and heads and the global batch.
  """
  _, shapes, _ = t5.abstract_params(model)
  sizes = {'num_params': count_params(shapes), 'num_heads': model.num_heads}
  return make_placement(mesh or MeshConfig(), devices, batch_size=batch_size, **sizes)


def place_here(model: T5Config, mesh: MeshConfig | None) -> Placement:
  """Returns the placement of a mesh, or of one device if there is none."""
  return single_device() if mesh is None else place_model(model, mesh)


def param_specs(model: T5Config, placement: Placement) -> Any:
  """Returns shape, dtype and sharding of every parameter."""
  _, shapes, axes = t5.abstract_params(model)
  return placement.specs(shapes, axes)


def inference_params(model: T5Config, placement: Placement) -> Any:
  """Returns shape, dtype and sharding of every parameter for inference.

  What the model only reads in its compute dtype is loaded in it, with the same outputs bit for bit;
  the head and the position biases are read in float32 and keep their own dtype.
  """
  _, shapes, axes = t5.abstract_params(model)
  compute = jnp.dtype(model.dtype)

  def cast(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    name = pytrees.path_name(path)
    tied = name == 'token_embedder/embedding' and model.logits_via_embedding
    exact = tied or 'logits_dense' in name or name.endswith('/rel_embedding')
    if exact or compute.itemsize >= leaf.dtype.itemsize:
      return leaf
    return jax.ShapeDtypeStruct(leaf.shape, compute)

  shapes = jax.tree_util.tree_map_with_path(cast, shapes)
  return placement.specs(shapes, axes)


@functools.lru_cache(maxsize=64)
def jit_step(
  make_step: Callable[..., Any], model: T5Config, placement: Placement, *arguments: Any
) -> Callable[..., Any]:
  """Returns `make_step(graphdef, *arguments)`, jitted, on a placement.

  One function object for equal arguments, so that whoever asks again finds what is compiled
  already. The placement is part of the key, since tracing writes its constraints into the program.
  """
  graphdef, _, _ = t5.abstract_params(model)
  jitted = jax.jit(make_step(graphdef, *arguments))

  @functools.wraps(jitted)
  def step(*args: Any) -> Any:
    with placement.active():
      return jitted(*args)

  return step
