"""Predicts memory and time of a train step from shapes alone.

Good enough to throw away what cannot work before the compiler is asked (see plan.py), and to say
what would help when memory runs out. Bytes and seconds are per device and step.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5x_lite.compiler import flops
from t5x_lite.compiler.hlo import Collective
from t5x_lite.models import attention
from t5x_lite.models.config import T5Config
from t5x_lite.parallel.hardware import Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """What a prediction depends on."""

  model: T5Config
  batch: Mapping[str, tuple[tuple[int, ...], Any]]  # shape and dtype of each global array
  sizes: Mapping[str, int]  # of the mesh axes 'data', 'fsdp' and 'model'
  num_microbatches: int
  chunk: int | None  # target positions whose logits are held at a time; None for all
  state_bytes: int  # of parameters and optimizer state on a device
  params_bytes: int  # of parameters on a device
  num_slices: int = 1  # that the data axis spans

  @property
  def itemsize(self) -> int:
    """Bytes of an activation."""
    return 4 if self.model.dtype == 'float32' else 2

  @property
  def rows(self) -> float:
    """Rows of a microbatch on a device."""
    ways = self.sizes['data'] * self.sizes['fsdp'] * self.num_microbatches
    return self.batch['decoder_target_tokens'][0][0] / ways

  @property
  def inputs(self) -> int:
    """Encoder tokens of a row."""
    return self.batch['encoder_input_tokens'][0][1] if self.model.has_encoder else 0

  @property
  def targets(self) -> int:
    """Decoder tokens of a row."""
    return self.batch['decoder_target_tokens'][0][1]

  @property
  def num_layers(self) -> tuple[int, int]:
    """Encoder and decoder layers that there are."""
    encoder = self.model.num_encoder_layers if self.model.has_encoder else 0
    return encoder, self.model.num_decoder_layers if self.model.has_decoder else 0


def _layer_activations(setup: Setup) -> Iterator[tuple[int, dict[str, float]]]:
  """Yields (layers, bytes of one layer's activations by kind) of each stack.

  All kinds but 'gradients' are the residuals of JAX's differentiation, which a test counts.
  """
  model, b, s, tp = setup.model, setup.rows, setup.itemsize, setup.sizes['model']
  D, F, gates = model.emb_dim, model.mlp_dim / tp, len(model.mlp_activations)
  H = model.num_heads / (tp if model.num_heads % tp == 0 else 1)
  J = H * model.head_dim
  M, L = setup.inputs, setup.targets
  for layers, q, cross in zip(setup.num_layers, (M, L), (0, M), strict=True):
    if not layers:
      continue
    lengths, kind = (q, cross) if cross else (q,), model.attention
    attentions = len(lengths)
    platform = attention.PLATFORMS.get(kind, ('tpu',))[0]
    forms = [attention.choose(kind, q, m, platform) for m in lengths]
    dense = [m for m, form in zip(lengths, forms, strict=True) if form in ('dense', 'cudnn')]
    pairs = q * sum(dense)
    sums = 2 * q * (attentions - len(dense))  # softmax's top and total, of the others
    kinds = {
      'input': b * q * D * s,
      # Of attentions; of the last block nothing depends on.
      'outs': b * q * D * s * attentions,
      # Other results of weight matrices: queries (the cross attention's keys and values have the
      # encoder's length), and wi.
      'dots': b * s * (q * ((2 + attentions) * J + gates * F) + 2 * cross * J),
      'attention': b * H * (pairs * s + sums * 4),
      # Normed inputs, twice, and what is read of the values.
      'rest': b * q * s * ((1 + 2 * attentions) * D + attentions * J),
      # The largest there is at a time: of float32 logits, or of wi.
      'gradients': b * max(H * pairs * 4, q * gates * F * s),
    }
    yield layers, kinds


# What each policy keeps of a layer, from the most memory to the least.
_KEPT = {
  'none': ('input', 'outs', 'dots', 'attention', 'rest'),
  'minimal': ('input', 'outs', 'dots'),
  'save_names': ('input', 'outs'),
  'full': ('input',),
}


def memory(setup: Setup) -> dict[str, float]:
  """Predicts the bytes of a train step by kind, their 'peak', and the 'largest' array's."""
  saved = working = largest = 0.0
  for layers, kinds in _layer_activations(setup):
    kept = sum(kinds[kind] for kind in _KEPT[setup.model.remat_policy])
    saved += layers * kept
    # What one layer makes again, and gradients.
    working = max(working, sum(kinds.values()) - kept)
    largest = max(largest, kinds['gradients'])
  model, tp = setup.model, setup.sizes['model']
  positions = min(setup.chunk or setup.targets, setup.targets)
  logits = 3 * 4 * setup.rows * positions * model.vocab_size / tp
  # Accumulators beside the new gradients, and the optimizer's updates, made one by one.
  gradients = setup.params_bytes * (2.25 if setup.num_microbatches > 1 else 1.25)
  layer = setup.params_bytes * setup.sizes['fsdp'] / max(sum(setup.num_layers), 1)
  # One layer at work, one under way.
  weights = 2 * layer * setup.itemsize / 4 if setup.sizes['fsdp'] > 1 else 0.0
  found = {'state': float(setup.state_bytes), 'gradients': gradients, 'saved': saved}
  found |= {'working': working, 'logits': logits, 'weights': weights}
  # Logits and a layer's work are never there together.
  return {**found, 'peak': sum(found.values()) - min(working, logits), 'largest': largest}


def hardware_flops(setup: Setup) -> float:
  """Returns the FLOPs of a train step, recomputation included."""
  (rows, targets), _ = setup.batch['decoder_target_tokens']
  size = {'batch_size': rows, 'inputs': setup.inputs, 'targets': targets}
  total = flops.forward_flops(setup.model, **size)
  head = 2 * setup.model.emb_dim * setup.model.vocab_size
  return 3 * total + (_passes(setup) - 3) * (total - rows * targets * head)


def seconds(setup: Setup, chip: Chip) -> dict[str, float]:
  """Predicts the times that a step takes at least, were each alone."""
  result = {
    'compute': hardware_flops(setup) / math.prod(setup.sizes.values()) / chip.peak_flops,
    'HBM': _hbm_bytes(setup) / chip.hbm_bandwidth,
    'ICI': collective_bytes(setup) / (2 * chip.link_bandwidth),
  }
  if setup.num_slices > 1:
    slices = setup.num_slices
    result['DCN'] = 2 * setup.params_bytes * (slices - 1) / slices / chip.dcn_bandwidth
  return result


def collective_bytes(setup: Setup) -> float:
  """Predicts the bytes that a device receives in a step."""
  data, fsdp, tp = (setup.sizes[name] for name in ('data', 'fsdp', 'model'))
  k, s = setup.num_microbatches, setup.itemsize
  whole = setup.params_bytes * fsdp  # of a model shard
  gathers = _passes(setup) - 1  # the two halves of backward share one
  result = k * (fsdp - 1) / fsdp * whole * (gathers * s / 4 + 1)
  result += 2 * (data - 1) / data * setup.params_bytes * k
  for layers, kinds in _layer_activations(setup):
    # After each block one all-reduce forward, one backward (and again).
    outs = kinds['input'] + kinds['outs']
    result += k * layers * outs * gathers * 2 * (tp - 1) / tp
  return result


def _passes(setup: Setup) -> int:
  """How often a step reads every weight: forward, twice backward, again."""
  return 3 + (setup.model.remat_policy in ('full', 'save_names'))


def _hbm_bytes(setup: Setup) -> float:
  """Predicts traffic to device memory."""
  k = setup.num_microbatches
  weights = setup.params_bytes * setup.sizes['fsdp'] * setup.itemsize / 4
  update = 3 * setup.params_bytes + 2 * setup.state_bytes
  activations = sum(layers * sum(kinds.values()) for layers, kinds in _layer_activations(setup))
  return k * _passes(setup) * weights + update + 2 * k * setup.params_bytes + 4 * k * activations


def network_seconds(
  chip: Chip, devices: Sequence[Any], found: list[Collective]
) -> dict[str, float]:
  """Returns how long a program's collectives take at least, by network.

  A collective over a whole closed torus dim sends both ways at once; one over several dims uses the
  links of all. Those over different dims share no link, so they may run at once: ICI is the busiest
  dim. Devices come in the order of the program's device assignment.
  """
  times, busy = collections.defaultdict(float), collections.defaultdict(float)
  coords = [d.coords for d in devices] if chip.torus_dims else []
  extents = [1 + max(dim) for dim in zip(*coords, strict=True)]
  for one in found:
    group = [devices[i] for i in one.group]
    slices = {getattr(d, 'slice_index', None) or 0 for d in group}
    places = slices if chip.torus_dims else {d.process_index for d in group}
    amount = one.bytes * one.count
    if one.kind == 'send':  # each device sends its own to the other slices
      times['DCN'] += amount / chip.dcn_bandwidth
    elif len(places) > 1:
      times['DCN'] += amount / chip.dcn_bandwidth / (len(group) / len(places))
    else:  # GPUs have no torus: all of NVLink is one link
      spanned = [len({d.coords[dim] for d in group}) for dim in range(len(extents))]
      links = {
        dim: 2 if n == extent and extent >= chip.wrap else 1
        for dim, (n, extent) in enumerate(zip(spanned, extents, strict=True))
        if n > 1
      }
      for dim in links or [0]:
        busy[dim] += amount / chip.link_bandwidth / (sum(links.values()) or 1)
  return {'ICI': max(busy.values(), default=0.0), **times}


def levers(setup: Setup) -> dict[str, float]:
  """Returns changes that would lower the peak, cheapest first, and the predicted peak with each."""
  found = {}

  def consider(text: str, **changes: Any) -> None:
    new = memory(dataclasses.replace(setup, **changes))['peak']
    if new < 0.99 * memory(setup)['peak']:
      found[text] = new

  replace, rows = setup.model.replace, setup.rows
  if setup.chunk is None:
    chunk = max(1, min(64, setup.targets // 4))
    consider(f'losses.LossConfig.chunk = {chunk}', chunk=chunk)
  consider("models.T5Config.attention = 'blocked'", model=replace(attention='blocked'))
  policies = list(_KEPT)
  for policy in policies[policies.index(setup.model.remat_policy) + 1 :]:
    consider(f"models.T5Config.remat_policy = '{policy}'", model=replace(remat_policy=policy))
  for more in (2, 4, 8, 16):
    if rows % more == 0:
      number = more * setup.num_microbatches
      consider(f'train.train.num_microbatches = {number}', num_microbatches=number)
  if rows >= 2:
    number = int(rows) * setup.num_microbatches
    text = f"remat_policy = 'full', chunk = 64 and num_microbatches = {number} together"
    consider(text, model=replace(remat_policy='full'), chunk=64, num_microbatches=number)
  data = setup.sizes['data'] // setup.num_slices
  if data > 1:
    sizes = {**setup.sizes, 'data': setup.num_slices, 'fsdp': setup.sizes['fsdp'] * data}
    text = f'partitioning.MeshConfig.fsdp = {sizes["fsdp"]} (data = {setup.num_slices})'
    state, params = setup.state_bytes // data, setup.params_bytes // data
    consider(text, sizes=sizes, state_bytes=state, params_bytes=params)
  tp = setup.sizes['model']
  if setup.sizes['fsdp'] % 2 == 0 and setup.model.num_heads % (2 * tp) == 0:
    sizes = {**setup.sizes, 'fsdp': setup.sizes['fsdp'] // 2, 'model': 2 * tp}
    consider(f'partitioning.MeshConfig.model = {2 * tp} (fsdp = {sizes["fsdp"]})', sizes=sizes)
  return found
