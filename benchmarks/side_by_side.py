"""Measures programs in turns, each in a process of its own.

Two frameworks in one process fight over threads and memory, and two runs one
after the other measure two states of the machine. Here every contender is
started once, compiles and warms up, and then waits; rounds go around, a few
steps for each. A contender may fail to start: it is reported and left out.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

# Large arrays come from the kernel page by page, cleared, at every step, unless
# the C library asks for 2 MB pages (glibc 2.35 and newer, on Linux).
HUGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}


@dataclasses.dataclass
class Contender:
  """A process that measures on demand.

  Attributes:
    name: what is printed.
    process: reads numbers of steps, writes one JSON line for each.
    ready: the first line it wrote: facts, or an error.
    wall: seconds of each step.
    cpu: CPU seconds of each step, all threads together.
    last: what the last step returned.
    peak: the most memory it has had, in bytes.
  """

  name: str
  process: subprocess.Popen
  ready: dict
  wall: list[float] = dataclasses.field(default_factory=list)
  cpu: list[float] = dataclasses.field(default_factory=list)
  last: float = 0.0
  peak: int = 0

  def measure(self, num_steps: int) -> None:
    """Runs steps and keeps their times."""
    assert self.process.stdin is not None
    print(num_steps, file=self.process.stdin, flush=True)
    answer = _read(self.process)
    self.wall += answer['wall']
    self.cpu += answer['cpu']
    self.last, self.peak = answer['last'], answer['peak']

  @property
  def seconds(self) -> float:
    """The median step's."""
    return statistics.median(self.wall)

  @property
  def cpu_seconds(self) -> float:
    """The median step's."""
    return statistics.median(self.cpu)


def start(name: str, arguments: Sequence[str], huge_pages: bool) -> Contender:
  """Starts this very script as the worker `name`; waits until it is warm."""
  env = {**os.environ, **(HUGE_PAGES if huge_pages else {})}
  process = subprocess.Popen(
    [sys.executable, sys.argv[0], '--worker', name, *arguments],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=env,
  )
  return Contender(name, process, _read(process))


def _read(process: subprocess.Popen) -> dict:
  """Returns the next JSON line; libraries may print other lines before it."""
  assert process.stdout is not None
  for line in process.stdout:
    if line.startswith('{'):
      return json.loads(line)
  raise SystemExit(f'A worker ended with exit code {process.wait()}.')


def work(step: Callable[[], float], warm_up: int = 2, **facts) -> None:
  """Serves a contender: runs step as often as asked and writes the times.

  Args:
    step: does one step to its end and returns a number to look at.
    warm_up: steps before the first that is measured.
    **facts: what the parent wants to know.
  """
  for _ in range(warm_up):
    step()
  print(json.dumps(facts), flush=True)
  for line in sys.stdin:
    wall, cpu, last = [], [], 0.0
    for _ in range(int(line)):
      wall_start, cpu_start = time.perf_counter(), time.process_time()
      last = step()
      wall.append(time.perf_counter() - wall_start)
      cpu.append(time.process_time() - cpu_start)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    print(json.dumps({'wall': wall, 'cpu': cpu, 'last': last, 'peak': peak}), flush=True)


def rounds(contenders: Sequence[Contender], num: int, num_steps: int) -> None:
  """Lets everyone run in turns, and backwards in every second round."""
  for i in range(num):
    for contender in contenders if i % 2 == 0 else reversed(contenders):
      contender.measure(num_steps)
  for contender in contenders:
    assert contender.process.stdin is not None
    contender.process.stdin.close()
    contender.process.wait()
