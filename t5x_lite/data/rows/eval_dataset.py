"""A finite pass over a split, in order, with the raw examples of the rows."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from t5x_lite.data.config import DatasetConfig
from t5x_lite.data.rows import packing, row_stream


class EvalDataset:
  """A finite pass over a split for decoding and scoring, unpacked, in order.

  Iterating gives `(batch, examples)`: this host's rows of each global batch, and the raw examples
  of the WHOLE batch in row order (so every host can score gathered predictions; rows after
  len(examples) are padding). An example is what SeqIO passes to postprocess functions: untrimmed
  features, `inputs_pretokenized` and the like, in numpy, text as bytes. Each pass reads anew.
  """

  def __init__(self, cfg: DatasetConfig, *, process_index: int = 0, process_count: int = 1):
    """Takes what to read, but for pack, shuffle, num_epochs; UsageError if it does not fit."""
    cfg.check_processes(process_index, process_count)
    self._cfg = dataclasses.replace(
      cfg, pack=False, shuffle=False, num_epochs=1, per_task_loss=False
    )
    self._index, self._count = process_index, process_count
    provider, self._converter, self._vocab_sizes = row_stream.open_task(self._cfg)
    self._datasets = row_stream.read_examples(self._cfg, provider, seed=cfg.seed, trim=False)

  def __iter__(self) -> Iterator[tuple[packing.Rows, list[dict[str, Any]]]]:
    passes = (dataset.as_numpy_iterator() for dataset in self._datasets)
    # What else an example has is cut by the converter.
    cut = {**self._cfg.lengths, **dict.fromkeys(self._converter.extra_features)}
    all_examples = itertools.chain.from_iterable(passes)
    while examples := list(itertools.islice(all_examples, self._cfg.batch_size)):
      ragged = {
        name: packing.Ragged.from_arrays([example[name][:length] for example in examples])
        for name, length in cut.items()
      }
      row_stream.check_ids(self._cfg, self._vocab_sizes, ragged)
      rows = packing.fill(self._converter.padded(ragged), self._cfg.batch_size)
      yield packing.host_rows(rows, self._index, self._count), examples
