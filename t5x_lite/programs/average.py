"""The average program: the mean of checkpoints, as a run of its own."""

import logging
from collections.abc import Sequence

from t5x_lite.errors import check_positive
from t5x_lite.interop import export, trained_model

log = logging.getLogger(__name__)


def average(*, sources: Sequence[str], destination: str, last: int = 5) -> str:
  """Averages parameters and writes a run that `infer`, `eval` and `convert` take.

  Optimizer states are not carried over. Memory holds one tensor at a time. UsageError if there are
  fewer checkpoints, or they are not of one architecture.

  Args:
    sources: run directories, whose last checkpoints count, or STEP directories, which count alone.
    destination: the run to write; it must not exist yet.
    last: how many checkpoints of each run.
  """
  check_positive('average.last', last)
  target = export.check_destination(destination)
  mean = trained_model.open_mean(sources, last)
  origin = f'the mean of the last {last} of {", ".join(sources)}'
  export.write(target, mean, to='t5x_lite', origin=origin)
  log.info('%s: %s', destination, next(iter(mean.tensors.values())).origin)
  return destination
