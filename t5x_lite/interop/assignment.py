"""Decides which tensor of a checkpoint becomes which tensor of a model.

Equal names by default; regular expressions map others, as T5X's assignment_map does, or leave them
out. Strict by default: nothing is missing, nothing is left over, unless a rule says so. Source:
t5x/state_utils.py apply_assignment_map.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from t5x_lite.errors import UsageError, refusing
from t5x_lite.interop import tensor_names
from t5x_lite.interop.checkpoint_source import Source
from t5x_lite.interop.tensors import Index, Tensor, of_leaf
from t5x_lite.models import t5, transfer
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import pytrees

AssignmentMap = Sequence[tuple[str, str | None]]  # (pattern, replacement); see `assign`


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of every tensor."""

  loaded: Sequence[tuple[str, str]]  # the model's name, and where it is from
  skipped: Sequence[str]  # tensors of the checkpoint that the model does not take
  initialised: Sequence[str]  # the model's tensors that are drawn anew

  def summary(self) -> str:
    """Returns one line."""
    kinds = {'skipped': self.skipped, 'newly initialised': self.initialised}
    rest = [f', {len(names)} {kind} ({_some(names)})' for kind, names in kinds.items() if names]
    return ''.join([f'{len(self.loaded)} tensors loaded', *rest])


def assign(
  source: Source,
  cfg: T5Config,
  *,
  assignment_map: AssignmentMap = (),
  strict: bool = True,
  seed: int = 0,
) -> tuple[dict[str, Tensor], Report]:
  r"""Returns the model's tensors by canonical name, and what became of each.

  UsageError if a tensor is missing, left over or of another shape, or a pattern matches nothing.

  Args:
    source: an open checkpoint.
    cfg: the model that is wanted.
    assignment_map: (pattern, replacement) pairs, the first that matches counts. A pattern that
      matches one of the model's canonical names in full gives the checkpoint's name for it, \1 and
      the like filled in; a replacement of None draws the tensor anew, or drops a tensor of the
      checkpoint whose name the pattern matches in full.
    strict: refuse missing and left-over tensors that no rule speaks of; otherwise draw the former
      anew and skip the latter. What a transfer method adds is always drawn anew where it is
      missing; a prompt from the embedding's rows.
    seed: of the tensors that are drawn anew.
  """
  rules = [(_compile(pattern), repl) for pattern, repl in assignment_map]
  unused = dict(enumerate(pattern.pattern for pattern, _ in rules))

  def rule(name: str) -> tuple[re.Match, str | None] | None:
    for i, (pattern, replacement) in enumerate(rules):
      if match := pattern.fullmatch(name):
        unused.pop(i, None)
        return match, replacement
    return None

  fresh = _drawn_anew(cfg, seed)
  result: dict[str, Tensor] = {}
  loaded, initialised, taken = [], [], set()
  for name, shape in tensor_names.shapes(cfg).items():
    found, old = rule(name), name
    if found is not None:
      match, replacement = found
      old = '' if replacement is None else match.expand(replacement)
      if old and old not in source.tensors:
        taken_from = f'{name} from {old}, which {source.path} does not have'
        there = _some(list(source.tensors))
        raise UsageError(f'the assignment map takes {taken_from}; it has {there}')
    tensor = source.tensors.get(old)
    if tensor is None:
      if found is None and strict and not transfer.is_added(name):
        raise UsageError(
          f'{source.path} has no tensor for {name} of shape {shape}; map it from another in '
          f'assignment_map, or draw it anew with ({re.escape(name)!r}, None) or strict=False'
        )
      result[name] = fresh(name)
      initialised.append(name)
      continue
    if tensor.shape != shape:
      has = f'{tensor.origin} gives {name} the shape {tensor.shape}'
      raise UsageError(f'{source.path}: {has}, the model needs {shape}')
    result[name] = tensor
    taken.add(old)
    loaded.append((name, tensor.origin))
  if transfer.PROMPT in initialised:
    result[transfer.PROMPT] = _prompt(result['token_embedder/embedding'], cfg, seed)
  skipped = [name for name in (*source.tensors, *source.unknown) if name not in taken]
  for name in skipped:
    found = rule(name)
    dropped = found is not None and found[1] is None
    if strict and not dropped and not _without_stack(name, source, cfg):
      raise UsageError(
        f'{source.path} has {name}, which the model has no place for; drop it with '
        f'({re.escape(name)!r}, None) in assignment_map, or all such with strict=False'
      )
  for pattern in unused.values():
    nothing = f'the pattern {pattern!r} of assignment_map matches nothing'
    raise UsageError(f'{nothing}; there are {_some(list(result))}')
  return result, Report(loaded, skipped, initialised)


# Fields of T5Config that change what the same numbers compute.
_NUMERICS = 'num_heads head_dim mlp_activations scale_logits relpos_max_distance'.split()
_NUMERICS += 'layer_norm_epsilon pad_id eos_id decoder_start_id'.split()


def check_numerics(source: Source, cfg: T5Config) -> None:
  """Raises UsageError if the model would compute something else with these.

  Shapes do not show it: gelu or silu, a scaled head or not. The configuration is believed.
  """
  if source.format == 't5x':
    return
  for field in (*_NUMERICS, *(['lora_alpha'] if source.config.lora_rank else [])):
    theirs, ours = getattr(source.config, field), getattr(cfg, field)
    if theirs != ours:
      fix = f'set T5Config.{field}, or CheckpointConfig.strict=False to change it on purpose'
      raise UsageError(f'{source.path} has {field}={theirs!r}, the configuration {ours!r}: {fix}')


def _compile(pattern: str) -> re.Pattern:
  with refusing(f'{pattern!r} in assignment_map is no regular expression', re.error):
    return re.compile(pattern)


def _some(found: Sequence[str], limit: int = 3) -> str:
  more = f', and {len(found) - limit} more' if len(found) > limit else ''
  return ', '.join(found[:limit]) + more


def _without_stack(name: str, source: Source, cfg: T5Config) -> bool:
  """True for a stack that the wanted architecture leaves out on purpose."""
  of_encoder = r'encoder/.*|.*/encoder_decoder_attention/.*|.*pre_cross_.*'
  return cfg.architecture != source.config.architecture and (
    (not cfg.has_decoder and name.startswith('decoder/'))
    or (not cfg.has_encoder and re.fullmatch(of_encoder, name) is not None)
  )


def _prompt(table: Tensor, cfg: T5Config, seed: int) -> Tensor:
  """Returns rows of the most frequent pieces, which come first (Lester et al. 2021, 3.2)."""
  assert cfg.prompt_length is not None
  count, population = cfg.prompt_length, min(5000, cfg.vocab_size)
  ids = np.random.default_rng(seed).choice(population, count, replace=count > population)

  def fetch(index: Index) -> np.ndarray:
    return table.read((slice(0, population), slice(None)))[ids][index]

  return Tensor((count, cfg.emb_dim), table.dtype, fetch, 'rows of the embedding')


def _drawn_anew(cfg: T5Config, seed: int) -> Callable[[str], Tensor]:
  """Returns what gives a parameter, by canonical name, as a new model has it.

  All that were asked for are drawn in one go when the first is read; the rest never is.
  """
  cfg = cfg.replace(scan_layers=True)
  places = {n: (path, leaf) for path, leaf, names in tensor_names.leaves(cfg) for n in names}
  wanted: set[str] = set()

  def draw(key: jax.Array) -> dict[str, Any]:
    drawn = pytrees.flatten_names(t5.init_params(cfg, key))
    return {path: drawn[path] for path in wanted}

  drawn = functools.cache(lambda: jax.device_get(jax.jit(draw)(jax.random.key(seed))))

  def tensor(name: str) -> Tensor:
    path, leaf = places[name]
    key = '/'.join(path)
    wanted.add(key)
    dtype, origin = np.dtype(np.float32), 'newly initialised'
    whole = Tensor(leaf.shape, dtype, lambda index: drawn()[key][index], origin)
    return of_leaf(whole, cfg, path)[name]

  return tensor
