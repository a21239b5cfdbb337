"""The infer program: a prediction, or an embedding, for every line of a file, in their order."""

import contextlib
import functools
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from t5x_lite.data import pairs, records, text_files, vocabularies
from t5x_lite.data.pairs import Columns
from t5x_lite.data.text_files import Bad
from t5x_lite.decoding import prediction, steps
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.errors import UsageError
from t5x_lite.interop import trained_model
from t5x_lite.models import model_sharding
from t5x_lite.models.config import T5Config
from t5x_lite.parallel import distributed
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.parallel.placement import Placement
from t5x_lite.programs.output_file import OutputFile
from t5x_lite.runs import progress

log = logging.getLogger(__name__)

FORMATS = ('auto', *records.FORMATS)
# Relative positions reach as far as one likes, memory does not.
MAX_INPUT_LENGTH = 1024
REPORT_SECONDS = 10.0
REPORTED_BAD_ROWS = 10
OUTPUT_KINDS = ('predictions', 'embeddings')

Rows = Sequence[Sequence[int]]
# Parameters, the token ids of some lines and the lines' numbers; returns what is written of each.
Predict = Callable[[Any, Rows, Sequence[int]], list[dict[str, Any]]]


def infer(
  *,
  model: str | Sequence[str],
  input: str,
  output: str,
  adapter: str = '',
  param_dtype: str = '',
  input_format: str = 'auto',
  field: str = '',
  template: str = '',
  prefix: str = '',
  skip_bad_rows: bool = False,
  output_kind: str = 'predictions',
  pooling: str = 'mean',
  batch_size: int = 32,
  window: int = 8,
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
    output: the file to write, JSONL, or CSV, Parquet or .npy by its ending: {'input', 'prediction',
      'score'} a line, the score being the prediction's log-probability, or of beams what
      'normalization' says; 'n_best' holds all of num_return_sequences, best first; '-' is standard
      output. A file that is there already is refused, unless one of the last two arguments says
      what to do with it.
    adapter: a folder with LoRA (ours or PEFT's), adapters or a prompt to put on the model.
    param_dtype: to keep parameters in: 'bfloat16' takes half of float32's memory, 'int8' a fourth;
      the checkpoint's own by default.
    input_format: 'text' (a line is an input), 'csv', 'tsv', 'jsonl', 'json', 'parquet', 'tfrecord'
      or 'datasets'; 'auto' goes by the file's ending, before .gz or .zst.
    field: the input's, or number from 0 without a header; a usual name or the only one by default.
    template: makes the input of several fields, 'summarize: {article}'.
    prefix: put before every input, such as 'pronounce: '.
    skip_bad_rows: leave out rows that cannot be read, and say which, instead of refusing the file.
    output_kind: 'predictions', or 'embeddings': what the encoder makes of each input.
    pooling: of embeddings: 'mean' over the input's tokens, 'first' token, or 'none' for all.
    batch_size: lines decoded at a time.
    window: batches that are sorted by length together, and written at once.
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
  counts = {'batch_size': batch_size, 'window': window, 'max_input_length': max_input_length}
  for name, value in counts.items():
    if value < 1:
      raise UsageError(f'infer.{name} is {value}; it must be at least 1')
  for name, one, allowed in (
    ('input_format', input_format, FORMATS),
    ('output_kind', output_kind, OUTPUT_KINDS),
    ('pooling', pooling, [one or 'none' for one in steps.POOLINGS]),
  ):
    if one not in allowed:
      raise UsageError(f'{name}={one!r} is not one of {", ".join(allowed)}')
  if input == '-' and input_format not in ('auto', 'text'):
    raise UsageError('standard input is text, an input a line; name a file')
  columns = Columns(input=field, template=template)
  _check_paths(input, output, resume, overwrite)
  skipped = 0

  def bad(error: UsageError) -> None:
    nonlocal skipped
    skipped += 1
    if skipped <= REPORTED_BAD_ROWS:
      log.warning('%s (left out)', error)

  read = functools.partial(read_inputs, input, input_format, columns)
  tell, known = (bad, lambda error: None) if skip_bad_rows else (text_files.refuse,) * 2
  num_lines = None
  if input != '-':
    num_lines = sum(1 for _ in read(tell))
    tell = known
    if skipped:
      log.warning('%d rows of %s cannot be read and are left out', skipped, input)
  embeds = output_kind == 'embeddings'
  models = trained_model.open_together(model, adapter=adapter, param_dtype=param_dtype)
  run = models[0]
  if embeds and (len(models) > 1 or not run.config.has_encoder):
    raise UsageError('output_kind=embeddings takes one model, with an encoder')
  width = run.config.emb_dim if embeds and pooling != 'none' else 0
  file = OutputFile(output, key=output_kind.removesuffix('s'), width=width)
  if not (resume or overwrite) and file.holds_something():
    raise UsageError(
      f'{output} holds {output_kind} already: continue it with --resume, replace it with '
      '--overwrite, or name another file'
    )

  # ---- Model ----
  vocabulary = vocabularies.make_vocabulary(run.vocabulary)
  placement = model_sharding.place_model(run.config, mesh)
  batch_size = placement.whole_batch(batch_size)
  predict: Predict
  if embeds:
    predict = functools.partial(_embed, run.config, placement, pooling)
  else:
    decoding = (decoding or DecodingConfig()).resolved(vocabulary, run.lengths.get('targets'))
    predictor = prediction.Predictor(
      run.config,
      placement=placement,
      decoding=decoding,
      batch_size=batch_size,
      max_input_length=max_input_length,
      seed=seed,
    )
    predict = functools.partial(_decode, predictor, vocabulary)
  specs = model_sharding.inference_params(run.config, placement)
  params = trained_model.load_together(models, specs)
  log.info('predicting with %s', ', '.join(one.checkpoint for one in models))

  # ---- Loop ----
  done, truncated = 0, 0
  end = [vocabulary.eos_id] if run.config.has_encoder or 'inputs' in run.lengths else []
  window *= 1 if input == '-' else batch_size
  with contextlib.ExitStack() as stack:
    write = None
    if resume:
      # Only the first process is sure to see the output; all must skip alike.
      if distributed.from_primary(lambda: int(file.is_whole(read(known)))):
        log.info('%s is whole already', output)
        return num_lines or 0
      done = distributed.from_primary(lambda: file.resume(read(known), window))
      log.info('continues %s after line %d', file.lines, done)
    if primary := distributed.is_primary():
      write = stack.enter_context(file.open(append=bool(done)))
    shown = progress.Progress(first_step=done, total_steps=num_lines, active=primary, unit='line')
    stack.enter_context(shown)
    first, begin = done, time.monotonic()
    report = begin
    lines = itertools.islice(read(tell), done, None)
    while texts := list(itertools.islice(lines, window)):
      ids = [vocabulary.encode(prefix + text) for text in texts]
      # EOS takes the last place: the model saw no input without one.
      rows = [[*row[: max_input_length - len(end)], *end] for row in ids]
      # Among rows of its length, a row is padded little; the longest first, if memory is short.
      order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
      entries: dict[int, dict[str, Any]] = {}
      for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        found = predict(params, [rows[i] for i in part], [done + i for i in part])
        entries.update(zip(part, found, strict=True))
        if (now := time.monotonic()) > report:
          at = done + len(entries)
          shown.update(at, {'lines_per_second': (at - first) / (now - begin)})
          report = now + (0.5 if sys.stderr.isatty() else REPORT_SECONDS)
      for i, text in enumerate(texts):
        done += 1
        entry = {'input': text, **entries[i]}
        if len(ids[i]) + len(end) > max_input_length:
          entry['truncated'] = True
          if not truncated:
            log.warning(
              f'line {done} is longer than max_input_length={max_input_length} tokens and was '
              'truncated; such lines have "truncated": true'
            )
          truncated += 1
        if write is not None:
          write(entry)
  if primary:
    file.finish(done)
  cut = f', {truncated} of them cut at max_input_length' if truncated else ''
  seconds = max(time.monotonic() - begin, 1e-9)
  took = f'{progress.format_duration(seconds)} ({(done - first) / seconds:.3g} lines/s)'
  log.info('%d lines in %s%s', done, took, cut)
  return done


def _decode(
  predictor: prediction.Predictor,
  vocabulary: vocabularies.Vocabulary,
  params: Any,
  rows: Rows,
  numbers: Sequence[int],
) -> list[dict[str, Any]]:
  """Returns the outputs of a batch; a line's number tells what is drawn for it."""
  decoding = predictor.decoding

  def entry_of(outputs: Sequence[prediction.Output]) -> dict[str, Any]:
    texts = [decoding.cut(vocabulary.decode(one.tokens)) for one in outputs]
    scores = [round(one.score or 0.0, 6) for one in outputs]
    n_best = [{'prediction': x, 'score': y} for x, y in zip(texts, scores, strict=True)]
    entry: dict[str, Any] = dict(n_best[0])
    if len(n_best) > 1:
      entry['n_best'] = n_best
    if decoding.num_beams > 1 or decoding.best_of:
      entry['normalization'] = decoding.normalization
    return entry

  return [entry_of(outputs) for outputs in predictor.predict_all(params, rows, seeds=numbers)]


def _embed(
  model: T5Config, placement: Placement, pooling: str, params: Any, rows: Rows, _: Sequence[int]
) -> list[dict[str, Any]]:
  """Returns the embeddings of a batch, in the fewest digits that are the same float32."""
  size = {'batch_size': len(rows), 'length': prediction.padded_length(max(map(len, rows)))}
  batch = {'encoder_input_tokens': prediction.pad_rows(rows, pad_id=model.pad_id, **size)}
  how = None if pooling == 'none' else pooling
  found = prediction.call_step(steps.make_encode_step, model, params, placement, batch, how)
  return [
    {'embedding': (one if how else one[: len(row)]).astype(str).astype(float).tolist()}
    for row, one in zip(rows, found, strict=True)
  ]


def read_inputs(
  path: str, input_format: str, columns: Columns, bad: Bad = text_files.refuse
) -> Iterator[str]:
  """Yields the input of every line or row ('-': of standard input); UsageErrors name theirs."""
  kind = '' if input_format == 'auto' else input_format
  if path != '-':
    yield from pairs.read_inputs(path, columns, file_format=kind, bad=bad)
    return
  for number, line in enumerate(sys.stdin.buffer, start=1):
    try:
      text = line.decode('utf-8')
    except UnicodeDecodeError as error:
      bad(UsageError(f'standard input:{number} is not UTF-8 text ({error.reason})'))
    else:
      yield text.removesuffix('\n').removesuffix('\r')


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
