"""Reads what a compiled program does out of its HLO text.

XLA's own cost analysis counts the body of a loop once, and a scan over layers is a loop. Here a
loop counts as often as it runs: collectives with their bytes and device groups, and traffic to
device memory. The text is read by hand: jaxlib's parser is private.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_COMPUTATION = re.compile(r'^(ENTRY )?%([\w.\-]+) .*\{$')
_OP = re.compile(r'^  (ROOT )?%([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](\{[^}]*\})?')
_CALLS = re.compile(
  r'(?:calls|called_computations|branch_computations|body|true_computation|false_computation)='
  r'(?:\{([^}]*)\}|(%[\w.\-]+))'
)

_DTYPES = 's4 u4 s8 u8 s16 u16 bf16 f16 s32 u32 f32 s64 u64 f64'.split()
_ITEM_BITS = {'pred': 8, **{dtype: int(dtype.lstrip('bfsu')) for dtype in _DTYPES}}
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'send')
# These move no data of their own.
_FREE = 'after-all bitcast call conditional constant get-tuple-element iota opt-barrier'.split()
_FREE += ['parameter', 'partition-id', 'tuple', 'while']
# What is cut out after these is all that was needed before them.
_PASSED_ON = {'bitcast', 'convert', 'copy', 'pad', 'reshape', 'transpose'}
# What a fusion may do with the buffers of a collective that is under way.
_CARRIERS = {*KINDS, 'custom-call', 'tuple'}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of the program."""

  kind: str  # one of KINDS
  bytes: float  # that a device receives each time, in the ring algorithm
  group: tuple[int, ...]  # indices of the devices of the first group
  count: int  # how often it runs in one call of the program


@dataclasses.dataclass(frozen=True)
class _Op:
  name: str
  type: str
  opcode: str
  rest: str
  root: bool

  @property
  def operands(self) -> list[str]:
    end = self.rest.find('), ')
    return re.findall(r'%([\w.\-]+)', self.rest[: end if end >= 0 else None])

  @property
  def calls(self) -> list[str]:
    found = [a or b for a, b in _CALLS.findall(self.rest)]
    if self.opcode == 'call':
      found += re.findall(r'to_apply=(%[\w.\-]+)', self.rest)
    return [name for part in found for name in re.findall(r'%([\w.\-]+)', part)]


def _parse_op(match: re.Match[str]) -> _Op | None:
  text = match[3]
  end = _closing(text) if text.startswith('(') else text.find(' ')
  opcode, found, rest = text[end + 1 :].partition('(')
  return _Op(match[2], text[:end], opcode, rest, bool(match[1])) if found and end > 0 else None


def _closing(text: str) -> int:
  """Returns where the parenthesis that the text begins with ends."""
  depth = 0
  for i, char in enumerate(text, 1):
    depth += (char == '(') - (char == ')')
    if not depth:
      return i
  return len(text)


def _hbm_bytes(kind: str) -> float:
  return sum(_array_bytes(kind, in_hbm=True))


def _array_bytes(kind: str, *, in_hbm: bool = False) -> list[float]:
  """Returns the bytes of each array of a type; of those in HBM only, if asked."""
  sizes = []
  for dtype, dims, layout in _ARRAY.findall(kind):
    # On TPU the layout's S(1) is on-chip memory; S(5) is the host's.
    if dtype in _ITEM_BITS and not (in_hbm and re.search(r'S\([1-9]', layout)):
      sizes.append(math.prod(_numbers(dims)) * _ITEM_BITS[dtype] / 8)
  return sizes


def first_group(text: str, num_devices: int) -> tuple[int, ...]:
  """Returns the devices of the first replica group of a collective.

  The text has replica groups as a list {{0,1},{2,3}}, as iota [2,2]<=[4], or as axes of a mesh; or
  source_target_pairs. An empty list of groups means all devices of the program.
  """
  if match := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', text):
    return int(match[1]), int(match[2])
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
    return tuple(_numbers(match[1]))
  if match := re.search(r'replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', text):
    shape = _numbers(match[1])
    return tuple(_iota(match[2], math.prod(shape)).reshape(shape[0], -1)[0].tolist())
  mesh = r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}'
  if match := re.search(mesh, text):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    ids = _iota(match[2] or '', math.prod(sizes.values())).reshape(list(sizes.values()))
    grouped = re.findall(r"'(\w+)'", match[3])
    index = tuple(slice(None) if name in grouped else 0 for name in sizes)
    return tuple(ids[index].flatten().tolist())
  return tuple(range(num_devices))


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r'\d+', text)]


def _iota(text: str, size: int) -> np.ndarray:
  """Returns the device ids that '[4,2]T(1,0)' stands for."""
  ids = np.arange(size)
  if match := re.search(r'\[([\d,]+)\]', text):
    ids = ids.reshape(_numbers(match[1]))
  if match := re.search(r'T\(([\d,]+)\)', text):
    ids = ids.transpose(_numbers(match[1]))
  return ids.reshape(-1)


class HloModule:
  """A compiled program's HLO: the operations of all `computations`, by name."""

  def __init__(self, text: str, num_devices: int):
    """Parses the text of jax.stages.Compiled.as_text()."""
    self._num_devices = num_devices
    self.computations: dict[str, list[_Op]] = {}
    self._entry = ''
    ops: list[_Op] = []
    for line in text.splitlines():
      if match := _OP.match(line):
        if op := _parse_op(match):
          ops.append(op)
      elif match := _COMPUTATION.match(line):
        ops = self.computations[match[2]] = []
        if match[1]:
          self._entry = match[2]

  def collectives(self) -> list[Collective]:
    """Returns all collectives, those of fused computations included."""
    # One collective may show as several pieces, overlapped with compute: in one computation, or
    # begun before a loop and carried through its iterations.
    channels: dict[str, tuple[Collective, int]] = {}
    for name, times in self._counts().items():
      for i, (computation, op) in enumerate(self._with_fused(name)):
        if one := self._collective(computation, op):
          match = re.search(r'channel_id=(\d+)', op.rest)
          key = match[1] if match else f'{name}#{i}'
          one, before = channels.get(key, (one, times))
          channels[key] = one, min(before, times)
    found: collections.Counter[Collective] = collections.Counter()
    for one, times in channels.values():
      found[one] += times
    return [dataclasses.replace(one, count=count) for one, count in found.items()]

  def hbm_bytes(self) -> float:
    """Returns the bytes read from and written to device memory.

    Every operand and result that is not on-chip counts once per operation, but of arrays that are
    only sliced or updated in place, only the part.
    """
    total = 0.0
    for name, times in self._counts().items():
      ops = self.computations[name]
      types = {op.name: op.type for op in ops}
      total += times * sum(self._traffic(op, types) for op in ops)
    return total

  def _counts(self) -> Mapping[str, int]:
    """Returns how often each computation that is not fused runs."""
    counts: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
      counts[name] += times
      for op in self.computations.get(name, ()):
        if op.opcode in ('while', 'call', 'conditional', 'async-start'):
          trips = self._trips(op) if op.opcode == 'while' else 1
          for called in op.calls:
            visit(called, times * trips)

    visit(self._entry, 1)
    return counts

  def _trips(self, op: _Op) -> int:
    """Returns how often a loop runs: what its condition compares with."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', op.rest):
      return int(match[1])
    match = re.search(r'condition=%([\w.\-]+)', op.rest)
    condition = self.computations.get(match[1] if match else '', [])
    constants = {one.name: one.rest for one in condition if one.opcode == 'constant'}
    # The comparison may lie in a fusion; its constant is an operand then.
    for name in (name for one in condition if one.root for name in one.operands):
      if number := re.match(r'(\d+)\)', constants.get(name, '')):
        return int(number[1])
    return 1  # ends by its data, as decoding does

  def _with_fused(self, name: str) -> Iterator[tuple[str, _Op]]:
    """Yields the operations of a computation and of all fused into it."""
    for op in self.computations.get(name, ()):
      yield name, op
      if op.opcode in ('fusion', 'custom-call'):
        for called in op.calls:
          yield from self._with_fused(called)

  def _collective(self, computation: str, op: _Op) -> Collective | None:
    kind = op.opcode.removesuffix('-start')
    sizes = _array_bytes(op.type)
    if kind not in KINDS or not sizes:
      return None
    group = first_group(op.rest, self._num_devices)
    n = len(group)
    started = op.opcode != kind  # its type lists operands before results
    received = sizes[0]
    if kind in ('all-gather', 'all-to-all'):
      received = (max(sizes) if started else sum(sizes)) * (n - 1) / n
    elif kind == 'all-reduce' and computation.startswith('all-reduce-scatter'):
      kind, received = 'reduce-scatter', sum(sizes) * (n - 1) / n  # TPU fuses the slice
    elif kind == 'all-reduce':
      received = 2 * sum(sizes) * (n - 1) / n
    elif kind == 'reduce-scatter':
      received = (min(sizes) if started else sum(sizes)) * (n - 1)
    return Collective(kind, received, group, 1) if n > 1 and received else None

  def _traffic(self, op: _Op, types: Mapping[str, str]) -> float:
    if op.opcode in _FREE or op.opcode.endswith(('-done', '-update')):
      return 0.0
    operands = [types.get(name, '') for name in op.operands]
    if op.opcode in ('dynamic-slice', 'slice'):
      return 2 * _hbm_bytes(op.type)
    if op.opcode == 'dynamic-update-slice':
      return 2 * _hbm_bytes(operands[1])
    if op.opcode == 'slice-start':  # ((operands), result, context)
      return max(_array_bytes(op.type[_closing(op.type[1:]) + 1 :]), default=0.0)
    if op.opcode.endswith('-start'):  # its type repeats its operands
      return _hbm_bytes(op.type)
    if op.opcode == 'fusion' and op.calls:
      return self._fusion_traffic(op, operands)
    return _hbm_bytes(op.type) + sum(map(_hbm_bytes, operands))

  def _fusion_traffic(self, fusion: _Op, operands: Sequence[str]) -> float:
    """Returns what a fusion reads and writes, given its operands' types."""
    ops = self.computations.get(fusion.calls[0], [])
    types = {op.name: op.type for op in ops}
    users = _users(ops)
    match = re.search(r'output_to_operand_aliasing=\{(.*?\))\}', fusion.rest)
    aliased = re.findall(r'\{\d*\}: \((\d+),', match[1]) if match else []
    carried = collections.Counter(map(int, aliased))  # how many results alias each operand
    total = updated = 0.0  # the latter of results that are updated in place, or not touched
    for op in ops:
      index = int(op.rest.partition(')')[0]) if op.opcode == 'parameter' else len(operands)
      whole = _hbm_bytes(operands[index]) if index < len(operands) else 0.0
      if not whole:
        continue
      own = users[op.name]
      if index in carried and {user.opcode for user in own} <= _CARRIERS:
        # What a collective that is under way reads and writes.
        updated += whole * carried[index]
      elif {(user.opcode, user.operands[0]) for user in own} == {('dynamic-update-slice', op.name)}:
        updated += whole
        total += 2 * sum(_array_bytes(types.get(own[0].operands[1], '')))
      else:
        total += min(whole, self._read(op, users))
    return total + max(0.0, _hbm_bytes(fusion.type) - updated)

  def _read(self, op: _Op, users: Mapping[str, list[_Op]]) -> float:
    """Returns how much of a value its users read, infinite if all of it."""
    total = 0.0
    for user in users[op.name]:
      sliced = user.opcode in ('dynamic-slice', 'slice')
      if sliced and user.operands[0] == op.name:
        total += sum(_array_bytes(user.type))
      elif user.opcode in _PASSED_ON:
        total += self._read(user, users)
      elif user.opcode == 'fusion' and user.calls:
        inner = self.computations.get(user.calls[0], [])
        places = tuple(f'{i})' for i, name in enumerate(user.operands) if name == op.name)
        for one in inner:
          if one.opcode == 'parameter' and one.rest.startswith(places):
            total += self._read(one, _users(inner))
      elif not sliced:  # else it is an index
        return math.inf
    return total


def _users(ops: Sequence[_Op]) -> Mapping[str, list[_Op]]:
  users: dict[str, list[_Op]] = collections.defaultdict(list)
  for op in ops:
    for operand in op.operands:
      users[operand].append(op)
  return users
