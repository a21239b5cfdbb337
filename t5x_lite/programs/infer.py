"""The infer program: a prediction for every line of a file, one JSON object each, as it goes."""

import contextlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from t5x_lite.data import pairs, records, vocabularies
from t5x_lite.data.pairs import Columns
from t5x_lite.decoding import prediction
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.interop import trained_model
from t5x_lite.models import model_sharding
from t5x_lite.parallel import distributed
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.runs import files, progress, run_directory

log = logging.getLogger(__name__)

FORMATS = ('auto', *records.FORMATS)
# Relative positions reach as far as one likes, memory does not.
MAX_INPUT_LENGTH = 1024
REPORT_SECONDS = 10.0


def infer(
  *,
  model: str | Sequence[str],
  input: str,
  output: str,
  adapter: str = '',
  param_dtype: str = '',
  draft_model: str = '',
  input_format: str = 'auto',
  field: str = '',
  template: str = '',
  prefix: str = '',
  batch_size: int = 32,
  max_input_length: int = MAX_INPUT_LENGTH,
  decoding: DecodingConfig | None = None,
  mesh: MeshConfig | None = None,
  seed: int = 0,
  resume: bool = False,
  overwrite: bool = False,
) -> int:
  """Predicts for every line of a file and returns how many were written.

  Args:
    model: a run directory or one STEP directory of its checkpoints, a folder of transformers or
      T5X, or NAME@REVISION of the hub; several decode together, by their mean log-probability.
    input: the file to read; '-' is standard input.
    output: the JSONL file to write, {'input', 'prediction', 'score'} a line, the score being the
      prediction's log-probability, or of beams what 'normalization' says; 'n_best' holds all of
      num_return_sequences, best first; '-' is standard output. A file that is there already is
      refused, unless one of the last two arguments says what to do with it.
    adapter: a folder with LoRA (ours or PEFT's), adapters or a prompt to put on the model.
    param_dtype: to keep parameters in: 'bfloat16' takes half of float32's memory, 'int8' a fourth;
      the checkpoint's own by default.
    draft_model: a smaller model of the same vocabulary, whose proposals the model reads several at
      once: the same outputs sooner, see docs/generation.md.
    input_format: 'text' (a line is an input), 'csv', 'tsv', 'jsonl', 'json', 'parquet' or
      'datasets'; 'auto' goes by the file's ending.
    field: the input's, or number from 0 without a header; a usual name or the only one by default.
    template: makes the input of several fields, 'summarize: {article}'.
    prefix: put before every input, such as 'pronounce: '.
    batch_size: lines decoded at a time.
    max_input_length: tokens; what is longer is truncated and says so.
    decoding: how tokens are chosen; greedy, as long as the training targets, by default.
    mesh: how devices are arranged; decided by their number by default.
    seed: of sampling.
    resume: continue an output that was interrupted.
    overwrite: replace an output that is there.

  Raises:
    UsageError: if the model or a line of the input cannot be read; files are read through first.
  """
  # ---- Check everything that can be checked before any work ----
  for name, value in (('batch_size', batch_size), ('max_input_length', max_input_length)):
    if value < 1:
      raise UsageError(f'infer.{name} is {value}; it must be at least 1')
  if input_format not in FORMATS:
    raise UsageError(f'input_format={input_format!r} is not one of {", ".join(FORMATS)}')
  if input == '-' and input_format not in ('auto', 'text'):
    raise UsageError('standard input is text, an input a line; name a file')
  columns = Columns(input=field, template=template)
  _check_paths(input, output, resume, overwrite)
  num_lines = None
  if input != '-':
    num_lines = sum(1 for _ in read_inputs(input, input_format, columns))
  models = trained_model.open_together(model, adapter=adapter, param_dtype=param_dtype)
  run = models[0]
  draft = trained_model.open_model(draft_model, param_dtype=param_dtype) if draft_model else None
  if draft and not run_directory.same_vocabulary(draft.vocabulary, run.vocabulary):
    raise UsageError(f'{draft_model} has another vocabulary than {run.path}: it cannot draft')

  # ---- Model ----
  vocabulary = vocabularies.make_vocabulary(run.vocabulary)
  decoding = (decoding or DecodingConfig()).resolved(vocabulary, run.lengths.get('targets'))
  predictor = prediction.Predictor(
    run.config,
    placement=model_sharding.place_model(run.config, mesh),
    decoding=decoding,
    batch_size=batch_size,
    max_input_length=max_input_length,
    seed=seed,
    draft=draft.config if draft else None,
  )
  params = trained_model.load_together(models, predictor.abstract_params)
  if draft:
    specs = model_sharding.inference_params(draft.config, predictor.placement)
    params = params, draft.load_params(specs)
  log.info('predicting with %s', ', '.join(one.checkpoint for one in models))

  # ---- Loop ----
  done, truncated = 0, 0
  end = [vocabulary.eos_id] if run.config.has_encoder or 'inputs' in run.lengths else []
  start = report = time.monotonic()
  of = '' if num_lines is None else f' of {num_lines}'

  def entry_of(text: str, found: Sequence[prediction.Output]) -> dict[str, Any]:
    texts = [decoding.cut(vocabulary.decode(one.tokens)) for one in found]
    scores = [round(one.score or 0.0, 6) for one in found]
    n_best = [{'prediction': x, 'score': y} for x, y in zip(texts, scores, strict=True)]
    entry: dict[str, Any] = {'input': text, **n_best[0]}
    if len(n_best) > 1:
      entry['n_best'] = n_best
    if decoding.num_beams > 1 or decoding.best_of:
      entry['normalization'] = decoding.normalization
    return entry

  with contextlib.ExitStack() as stack:
    write = None
    if resume:
      # Only the first process is sure to see the output; all must skip alike.
      done = distributed.from_primary(
        lambda: _resume(output, read_inputs(input, input_format, columns), predictor.batch_size)
      )
      log.info('continues %s after line %d', output, done)
    if distributed.is_primary():
      write = stack.enter_context(_open_output(output, append=bool(done)))
    lines = itertools.islice(read_inputs(input, input_format, columns), done, None)
    while batch := list(itertools.islice(lines, predictor.batch_size)):
      ids = [vocabulary.encode(prefix + text) for text in batch]
      # EOS takes the last place: the model saw no input without one.
      rows = [[*row[: max_input_length - len(end)], *end] for row in ids]
      outputs = predictor.predict_all(params, rows, index=done // predictor.batch_size)
      for text, row, found in zip(batch, ids, outputs, strict=True):
        done += 1
        entry = entry_of(text, found)
        if len(row) + len(end) > max_input_length:
          entry['truncated'] = True
          if not truncated:
            log.warning(
              f'line {done} is longer than max_input_length={max_input_length} tokens and was '
              'truncated; such lines have "truncated": true'
            )
          truncated += 1
        if write is not None:
          write(entry)
      if time.monotonic() > report:
        log.info('line %d%s', done, of)
        report = time.monotonic() + REPORT_SECONDS
  cut = f', {truncated} of them cut at max_input_length' if truncated else ''
  log.info('%d lines in %s%s', done, progress.format_duration(time.monotonic() - start), cut)
  return done


def read_inputs(path: str, input_format: str, columns: Columns) -> Iterator[str]:
  """Yields the input of every line or row ('-': of standard input); UsageErrors name theirs."""
  kind = '' if input_format == 'auto' else input_format
  if path != '-':
    yield from pairs.read_inputs(path, columns, file_format=kind)
    return
  for number, line in enumerate(sys.stdin.buffer, start=1):
    try:
      yield line.decode('utf-8').removesuffix('\n').removesuffix('\r')
    except UnicodeDecodeError as error:
      raise UsageError(f'standard input:{number} is not UTF-8 text ({error.reason})') from error


def _check_paths(path: str, output: str, resume: bool, overwrite: bool) -> None:
  """Refuses paths that would fail, or destroy the input, after minutes."""
  place = epath.Path(output)
  if path != '-' and not epath.Path(path).exists():
    raise UsageError(f'no such input file: {path}')
  if path == '-' and jax.process_count() > 1:
    raise UsageError('with several processes the input must be a file')
  if output == '-':
    if resume:
      raise UsageError('standard output cannot be resumed: name a file')
    return
  if resume and path == '-':
    raise UsageError('standard input cannot be resumed: name a file')
  # An object store has no directories.
  if '://' not in output and not place.parent.is_dir():
    raise UsageError(f'no such directory for the output: {place.parent}')
  if place.is_dir():
    raise UsageError(f'the output {output} is a directory: name a file')
  there = os.path.exists(output) and os.path.exists(path)
  if path == output or (there and os.path.samefile(path, output)):
    raise UsageError(f'input and output are the same file: {path}')
  if resume and overwrite:
    raise UsageError('resume and overwrite contradict each other')
  if not (resume or overwrite) and place.exists() and place.stat().length:
    raise UsageError(
      f'{output} holds predictions already: continue it with --resume, replace it with '
      '--overwrite, or name another file'
    )


@contextlib.contextmanager
def _open_output(path: str, *, append: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Yields a function that writes one object, at once."""
  opened: Any = contextlib.nullcontext(sys.stdout)
  if path != '-':
    try:
      opened = files.retried(path, lambda: epath.Path(path).open('a' if append else 'w'))
    except OSError as error:
      raise UsageError(f'cannot write {path}: {error.strerror}') from error
  with opened as file:

    def write(entry: dict[str, Any]) -> None:
      try:
        file.write(json.dumps(entry, ensure_ascii=False) + '\n')
        files.retried(path, file.flush)
      except OSError as error:
        why = f'{error.strerror}; make room, and continue with --resume'
        raise UsageError(f'cannot write {path}: {why}') from error

    yield write


def _resume(path: str, inputs: Iterator[str], batch_size: int) -> int:
  """Cuts an output to whole batches, so that the rest is decoded as ever; returns its lines."""
  if not epath.Path(path).exists():
    return 0
  ends = [0]  # byte offset after each good line
  with epath.Path(path).open('rb') as file:
    for line, text in zip(file, inputs, strict=False):
      try:
        written = json.loads(line)['input'] if line.endswith(b'\n') else None
      except (ValueError, KeyError, TypeError):  # no JSON, no UTF-8
        written = None
      if written is None:
        break
      if written != text:
        where = f'{path}:{len(ends)} is not the prediction of line {len(ends)} of this input'
        raise UsageError(f'{where}: give --overwrite instead of --resume to start over')
      ends.append(ends[-1] + len(line))
  kept = (len(ends) - 1) // batch_size * batch_size
  if '://' in path:
    epath.Path(path).write_bytes(epath.Path(path).read_bytes()[: ends[kept]])
  else:
    os.truncate(path, ends[kept])
  return kept
