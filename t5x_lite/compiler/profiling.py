"""Where the time of a few steps goes: a trace of JAX's profiler, and a table.

The trace opens in xprof and, its json.gz, in Perfetto (ui.perfetto.dev). The table is made of its
events with the program's HLO: events name operations, and the HLO says what an operation is part
of. Tried on CPUs; the names of GPUs' and TPUs' lines are those of the profiler's documentation
(https://docs.jax.dev/en/latest/profiling.html).
"""

import collections
import glob
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from t5x_lite.compiler import hlo

FOLDER, SUMMARY = 'profile', 'summary.txt'
WARMUP = 5  # steps: caches are cold before, threads and allocators not yet settled
_MARK = 't5x_lite: '
_NUM_OPS = 12


def part(name: str) -> Any:
  """Names what the loop does meanwhile, in a trace; nothing without one."""
  return jax.profiler.TraceAnnotation(_MARK + name)


class StepProfiler:
  """Traces some steps of a loop, once."""

  def __init__(self, model_dir: str, *, first_step: int, last_step: int, num_steps: int | None):
    """Decides which of a loop's steps: num_steps or none, traced into MODEL_DIR/profile."""
    self._directory = os.path.join(model_dir, FOLDER)
    self._num_steps = min(num_steps or 0, last_step - first_step)
    self._start = first_step + min(WARMUP, last_step - first_step - self._num_steps)
    self._running = False

  def before(self, step: int, pending: Any) -> None:
    """Begins the trace if this is its first step, when `pending` is done."""
    if self._num_steps and step == self._start:
      jax.block_until_ready(pending)
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # it would slow the loop down
      jax.profiler.start_trace(self._directory, profiler_options=options)
      self._running = True

  def after(self, step: int, pending: Any, program: jax.stages.Compiled) -> str:
    """Ends the trace after its last step and returns the table, else ''."""
    if not self._running or step < self._start + self._num_steps:
      return ''
    with part('wait for the device'):
      jax.block_until_ready(pending)
    self.stop()
    table = summarize(self._directory, program.as_text() or '', num_steps=self._num_steps)
    text = f'steps {self._start + 1} to {step}, traced into {self._directory}\n{table}'
    (epath.Path(self._directory) / SUMMARY).write_text(text + '\n')
    return text

  def stop(self) -> None:
    """Ends the trace if it runs, as when the loop ends early."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()


def summarize(directory: str, hlo_text: str, *, num_steps: int) -> str:
  """Returns where the time of a directory's newest trace of num_steps went, as a table."""
  root = epath.Path(glob.escape(directory))  # its own name is no pattern
  (path,) = sorted(root.glob('plugins/profile/*/*.xplane.pb'))[-1:]
  data = jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes())
  kinds = operation_kinds(hlo_text)
  ops, loop = collections.Counter[str](), collections.Counter[str]()
  for plane in data.planes:
    for line in plane.lines:
      if plane.name.startswith('/device:TPU') and line.name != 'XLA Ops':
        continue  # the same once more, by step or module
      events = []
      for event in line.events:
        if event.name.startswith(_MARK):
          loop[event.name.removeprefix(_MARK)] += int(event.duration_ns)
        elif not event.name.startswith('end: '):
          name = str(dict(event.stats).get('hlo_op') or event.name.split(' ')[0].lstrip('%'))
          if name in kinds:
            events.append((int(event.start_ns), int(event.duration_ns), name))
      for name, nanoseconds in self_times(events):
        ops[name] += nanoseconds
  by_kind, labelled = collections.Counter(), collections.Counter()
  for name, nanoseconds in ops.items():
    by_kind[kinds[name][0]] += nanoseconds
    labelled[f'{name} ({", ".join(filter(None, kinds[name]))})'] = nanoseconds

  def rows(title: str, times: collections.Counter[str], most: int | None = None) -> Iterator[str]:
    yield f'{"ms/step":>9} {"share":>6}  {title}'
    for name, time in times.most_common(most):
      yield f'{time / num_steps / 1e6:9.3f} {time / max(1, times.total()):6.1%}    {name}'

  table = [*rows('the loop', loop), *rows('operations, all devices together', by_kind)]
  table += rows('the longest operations, less what they call', labelled, _NUM_OPS)
  return '\n'.join(table)


def self_times(events: list[tuple[int, int, str]]) -> Iterator[tuple[str, int]]:
  """Yields the time of each nested (start, duration, name) less that of those inside it."""
  stack: list[list[Any]] = []  # end, name, time left
  for start, duration, name in sorted(events, key=lambda one: (one[0], -one[1])):
    while stack and stack[-1][0] <= start:
      _, done, left = stack.pop()
      yield done, left
    if stack:
      stack[-1][2] -= duration
    stack.append([start + duration, name, duration])
  for _, name, left in stack:
    yield name, left


def operation_kinds(hlo_text: str) -> dict[str, tuple[str, str]]:
  """Returns what each operation of a program belongs to, and what it computes.

  'attention' is everything from queries, keys and values to their average, its matmuls included;
  'matmuls' are those of projections, MLPs and logits. 'communication' has the wait for others.
  """
  module = hlo.HloModule(hlo_text, num_devices=1)
  with_dot = {name for name, ops in module.computations.items() if any(map(_is_dot, ops))}
  kinds = {}
  for ops in module.computations.values():
    for op in ops:
      match = re.search(r'op_name="([^"]*)"', op.rest)
      scope = match[1] if match else ''
      if op.opcode.removesuffix('-start').removesuffix('-done') in hlo.KINDS:
        kind = 'communication'
      elif re.search(r'[/(]attention[/)]', scope):
        kind = 'attention'
      elif _is_dot(op) or (op.opcode == 'fusion' and with_dot.intersection(op.calls)):
        kind = 'matmuls'
      elif re.search(r'[/(]optimizer[/)]', scope):
        kind = 'optimizer'
      elif op.opcode in ('while', 'call', 'conditional'):
        kind = 'loops and calls'
      else:
        kind = 'everything else'
      backward = ' backward' if 'transpose(' in scope else ''
      kinds[op.name] = kind, scope.rpartition('/')[2] + backward
  return kinds


def _is_dot(op: Any) -> bool:
  if op.opcode == 'custom-call':
    return re.search(r'custom_call_target="[^"]*(gemm|matmul|dot)', op.rest) is not None
  return op.opcode in ('dot', 'convolution')
