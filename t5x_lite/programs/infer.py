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
from t5x_lite.decoding import prediction
from t5x_lite.decoding.config import DecodingConfig
from t5x_lite.decoding.continuous import WINDOW, RowDecoder, in_batches
from t5x_lite.errors import UsageError, check_one_of, check_positive
from t5x_lite.interop import trained_model
from t5x_lite.models import model_sharding
from t5x_lite.parallel import distributed
from t5x_lite.parallel.partitioning import MeshConfig
from t5x_lite.programs.generation import Generation
from t5x_lite.programs.output_file import PARTIAL, OutputFile
from t5x_lite.runs import files, progress, run_directory

log = logging.getLogger(__name__)

FORMATS = ('auto', 'task', *records.FORMATS)
EMBEDDINGS = {'none': None, 'mean': 'mean', 'first': 'first'}  # flags to poolings
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
  module: str = '',
  field: str = '',
  template: str = '',
  prefix: str = '',
  skip_bad_rows: bool = False,
  continuous: bool = False,
  decoder_prefix: str = '',
  log_probs: bool = False,
  embeddings: str = '',
  batch_size: int = 32,
  max_input_length: int = MAX_INPUT_LENGTH,
  decoding: DecodingConfig | None = None,
  mesh: MeshConfig | None = None,
  seed: int = 0,
  resume: bool = False,
  overwrite: bool = False,
) -> int:
  """Predicts for every line of a file and returns how many were written.

  UsageError if the model or a line of the input cannot be read; files are read through first.

  Args:
    model: a run directory or one STEP directory of its checkpoints, a folder of transformers or
      T5X, or NAME@REVISION of the hub; several decode together, by their mean log-probability.
    input: the file to read; '-' is standard input.
    output: the file to write, JSONL, or CSV, Parquet or .npy by its ending: {'input', 'prediction',
      'score'} a line, the score being the prediction's log-probability, or of beams what
      'normalization' says; 'n_best' holds all of num_return_sequences, best first; '-' is standard
      output. A file that is there is refused, unless one of the last two arguments is given.
    adapter: a folder with LoRA (ours or PEFT's), adapters or a prompt to put on the model.
    param_dtype: to keep parameters in: 'bfloat16' takes half of float32's memory, 'int8' a fourth;
      the checkpoint's own by default.
    draft_model: a smaller model of the same vocabulary, whose proposals the model reads several at
      once: the same outputs sooner, see docs/generation.md.
    input_format: 'text' (a line is an input), 'csv', 'tsv', 'jsonl', 'json', 'parquet', 'tfrecord'
      or 'datasets'; 'auto' goes by the file's ending, before .gz or .zst. With 'task', input is
      TASK:SPLIT of SeqIO, such as 'pronounce:test'.
    module: Python module(s), comma-separated, whose import registers tasks.
    field: the input's, or number from 0 without a header; a usual name or the only one by default.
    template: makes the input of several fields, 'summarize: {article}'.
    prefix: put before every input, such as 'pronounce: '.
    skip_bad_rows: leave out rows that cannot be read, and say which, instead of refusing the file.
    continuous: lines whose outputs have ended make room for others at once, instead of waiting for
      the longest of their batch; see docs/generation.md.
    decoder_prefix: what every prediction begins with; it does not count for length and score.
    log_probs: write the log-probability of every token of a prediction too, EOS included.
    embeddings: write what the encoder makes of each input instead, as 'embedding': the 'mean' over
      its tokens, that of the 'first', or 'none' for one of each.
    batch_size: lines decoded at a time.
    max_input_length: tokens; what is longer is truncated and says so.
    decoding: how tokens are chosen; greedy, as long as the training targets, by default.
    mesh: how devices are arranged; decided by their number by default.
    seed: of sampling.
    resume: continue an output that was interrupted.
    overwrite: replace an output that is there.
  """
  # ---- Check everything that can be checked before any work ----
  check_positive('infer.batch_size', batch_size)
  check_positive('infer.max_input_length', max_input_length)
  check_one_of('input_format', input_format, FORMATS)
  check_one_of('embeddings', embeddings or 'none', EMBEDDINGS)
  if input == '-' and input_format not in ('auto', 'text'):
    raise UsageError('standard input is text, an input a line; name a file')
  _check_paths('' if input_format == 'task' else input, output, resume, overwrite)
  columns = Columns(input=field, template=template)
  file_format = '' if input_format == 'auto' else input_format
  read = functools.partial(pairs.read_inputs, input, columns, file_format=file_format)
  tell, known = text_files.refuse, text_files.refuse
  if skip_bad_rows:
    tell, known = functools.partial(log.warning, 'left out: %s'), lambda error: None
  models = trained_model.open_together(model, adapter=adapter, param_dtype=param_dtype)
  run, cfg = models[0], models[0].config
  if input_format == 'task':
    read = functools.partial(_task_inputs, input, module, run.vocabulary)
  num_lines = 0
  if input != '-':
    num_lines = sum(1 for _ in read(bad=tell))
    tell = known  # each is told once
  draft = None
  if draft_model:
    draft = trained_model.open_together(draft_model, param_dtype=param_dtype)[0]
  if draft and not run_directory.same_vocabulary(draft.vocabulary, run.vocabulary):
    raise UsageError(f'{draft_model} has another vocabulary than {run.path}: it cannot draft')
  if continuous and (embeddings or len(models) > 1):
    raise UsageError('continuous batching writes texts of one model')
  texts_only = draft or decoding or log_probs or decoder_prefix or len(models) > 1
  if embeddings and (texts_only or not cfg.has_encoder):
    raise UsageError('embeddings are of one model, which has an encoder, and are not decoded')
  width = cfg.emb_dim if EMBEDDINGS.get(embeddings) else 0
  file = OutputFile(output, key='embedding' if embeddings else 'prediction', width=width)
  if not (resume or overwrite) and file.holds_something():
    fix = 'continue it with --resume, replace it with --overwrite, or name another file'
    raise UsageError(f'{output} holds predictions already: {fix}')

  # ---- Model ----
  vocabulary = vocabularies.make_vocabulary(run.vocabulary)
  placement = model_sharding.place_model(cfg, mesh)
  batch_size = placement.whole_batch(batch_size)
  decode = None
  if not embeddings:
    how = {'max_decode_length': run.lengths.get('targets'), 'prefixed': bool(decoder_prefix)}
    decoding = (decoding or DecodingConfig()).resolved(vocabulary, **how)
    predictor = prediction.Predictor(
      cfg,
      placement=placement,
      decoding=decoding,
      batch_size=batch_size,
      max_input_length=max_input_length,
      seed=seed,
      draft=draft.config if draft else None,
    )
    start = vocabulary.encode(decoder_prefix)
    if start and not cfg.has_encoder:
      raise UsageError('decoder_prefix is of models with an encoder; here inputs are prefixes')
    decode = RowDecoder(predictor, continuous=continuous, prefix=start)
  params = trained_model.load_together(models, model_sharding.inference_params(cfg, placement))
  if draft:
    params = params, draft.load_params(model_sharding.inference_params(draft.config, placement))
  predict: Callable[[list[list[int]], list[int]], Iterator[tuple[int, dict[str, Any]]]]
  if decode is None:
    encoder = Generation(cfg, params, placement)
    predict = functools.partial(_embed, encoder, EMBEDDINGS[embeddings], batch_size)
  else:
    predict = functools.partial(_decode, decode, vocabulary, params, log_probs)
  log.info('predicting with %s', ', '.join(one.checkpoint for one in models))

  # ---- Loop ----
  done, truncated = 0, 0
  end = [vocabulary.eos_id] if cfg.has_encoder or 'inputs' in run.lengths else []
  window = batch_size if input == '-' else WINDOW * batch_size
  with contextlib.ExitStack() as stack:
    write = None
    if resume:
      # Only the first process is sure to see the output; all must skip alike.
      if distributed.from_primary(lambda: int(file.is_whole(read(bad=known)))):
        log.info('%s is whole already', output)
        return num_lines
      done = distributed.from_primary(lambda: file.resume(read(bad=known), window))
      log.info('continues %s after line %d', file.lines, done)
    if primary := distributed.is_primary():
      write = stack.enter_context(file.open(append=bool(done)))
    shown = progress.Progress(first_step=done, total_steps=num_lines, active=primary)
    shown.unit = 'line'
    stack.enter_context(shown)
    first, begin = done, time.monotonic()
    report = begin
    lines = itertools.islice(read(bad=tell), done, None)
    while texts := list(itertools.islice(lines, window)):
      ids = [vocabulary.encode(prefix + text) for text in texts]
      # EOS takes the last place: the model saw no input without one.
      rows = [[*row[: max_input_length - len(end)], *end] for row in ids]
      entries: dict[int, dict[str, Any]] = {}
      for i, entry in predict(rows, [*range(done, done + len(rows))]):
        entries[i] = entry
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
            what = 'tokens and was truncated; such lines have "truncated": true'
            log.warning(f'line {done} is longer than max_input_length={max_input_length} {what}')
          truncated += 1
        if write is not None:
          write(entry)
  if primary:
    file.finish(done)
  cut = f', {truncated} of them cut at max_input_length' if truncated else ''
  seconds = time.monotonic() - begin
  took = f'{progress.format_duration(seconds)}, {(done - first) / max(seconds, 1e-9):.3g} lines/s'
  log.info('%d lines in %s%s', done, took, cut)
  return done


def _task_inputs(name: str, module: str, vocabulary: Any, **bad: Any) -> Iterator[str]:
  """Yields the inputs of a task's or mixture's examples as text; the name is TASK:SPLIT."""
  from t5x_lite.data.tasks import catalog  # TensorFlow
  from t5x_lite.evaluation import evaluators

  catalog.import_modules(module)
  name, _, split = name.partition(':')
  provider = catalog.find_provider(catalog.resolve(name, vocabulary))
  for task in getattr(provider, 'tasks', None) or [provider]:
    if split not in task.splits:
      raise UsageError(f'{task.name} has no split {split!r}; it has {", ".join(task.splits)}')
    lengths = dict.fromkeys(task.output_features, MAX_INPUT_LENGTH)  # objectives need them
    for example in task.get_dataset(lengths, split, shuffle=False).as_numpy_iterator():
      yield evaluators.text_of(example, 'inputs', vocabularies.make_vocabulary(vocabulary))


def _decode(
  decode: RowDecoder, vocabulary: Any, params: Any, log_probs: bool, rows: Any, numbers: list[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields what is written of each line; its number decides what is drawn for it."""
  decoding = decode.predictor.decoding
  given = vocabulary.decode(decode.prefix)

  def entry_of(one: prediction.Output) -> dict[str, Any]:
    text = vocabulary.decode([*decode.prefix, *one.tokens])
    text = decoding.cut(text, len(given) if text.startswith(given) else 0)
    more = {'log_probs': [round(x, 6) for x in one.log_probs or ()]} if log_probs else {}
    return {'prediction': text, 'score': round(one.score or 0.0, 6), **more}

  for i, outputs in decode(params, rows, seeds=numbers):
    n_best = [entry_of(one) for one in outputs]
    entry = {**n_best[0], **({'n_best': n_best} if len(n_best) > 1 else {})}
    if decoding.num_beams > 1 or decoding.best_of:
      entry['normalization'] = decoding.normalization
    yield i, entry


def _embed(
  model: Generation, pooling: str | None, size: int, rows: Any, _: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields what is written of each line, in the fewest digits that are the same float32."""

  def embed(part: Sequence[int]) -> Any:
    longest = len(rows[part[0]])
    return model.encode([rows[i] for i in part], pooling=pooling, max_input_tokens=longest)

  for i, one in in_batches(embed, rows, size):
    one = one if pooling else one[: len(rows[i])]
    yield i, {'embedding': one.astype(str).astype(float).tolist()}


def _check_paths(path: str, output: str, resume: bool, overwrite: bool) -> None:
  """Refuses paths that would fail, or destroy the input, after minutes."""
  place = epath.Path(output)
  if path != '-' and not epath.Path(path).exists():
    raise UsageError(f'no such input file: {path}')
  if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
    raise UsageError(f'{path} is a pipe, and files are read twice: give it as standard input, -')
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
  if files.same(path, output) or files.same(path, output + PARTIAL):
    raise UsageError(f'input and output are the same file: {path}')
  if resume and overwrite:
    raise UsageError('resume and overwrite contradict each other')
