"""Tasks from files of the user's own, in a couple of lines."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence

import seqio

from t5x_lite.data import metrics as metrics_lib
from t5x_lite.data import records, text_files
from t5x_lite.data.objectives import preprocessors
from t5x_lite.data.objectives.named import OBJECTIVES, UL2, find_objective
from t5x_lite.data.tasks import catalog, sources, text_preprocessors
from t5x_lite.data.vocabularies import VocabularyConfig
from t5x_lite.errors import UsageError, check_positive

# Text files up to this size together are read into memory; larger ones are streamed.
MAX_IN_MEMORY_BYTES = 1 << 30

# Rows of a text-to-text task that are tokenized together.
_ROWS_AT_ONCE = 128


def register_file_task(
  name: str,
  *,
  train_file: str = '',
  validation_file: str = '',
  test_file: str = '',
  file_format: str = '',
  input_field: str | int = 'input',
  target_field: str | int = 'target',
  prefix: str = '',
  metrics: Sequence[str] = ('accuracy',),
  reference_separator: str = '',
  vocabulary: VocabularyConfig | None = None,
) -> None:
  """Makes a text-to-text task of TSV, CSV, JSONL, JSON or Parquet files, plain or gzip.

  For instance `register_file_task('mine', train_file='mine.jsonl', prefix='mine: ')`. UsageError if
  the name is taken, a file is missing or a metric unknown. Rows are read, and checked, when used.

  Args:
    name: of the task.
    train_file: path or glob pattern; likewise the other two. At least one.
    validation_file: see train_file.
    test_file: see train_file.
    file_format: 'tsv', 'csv', 'jsonl', 'json' or 'parquet'; empty to tell from the name.
    input_field: column, key (translation.en of an object) or, without a header, number from 0.
    target_field: likewise.
    prefix: put in front of every input, with its space: 'summarize: '.
    metrics: names from `data.metrics.METRICS`.
    reference_separator: if given, a target may hold several right answers between separators;
      training takes the first, metrics the best.
    vocabulary: if given, registers `name` with it; else `name` joins the catalog, for any.
  """
  splits, files = _split_files(name, train=train_file, validation=validation_file, test=test_file)
  for path in files:
    if records.format_of(path, file_format) == 'text':
      raise UsageError(
        f'{path!r} of task {name!r} has no ending that says its format; set file_format to tsv, '
        'csv, jsonl, json or parquet, or use register_text_task for text without targets'
      )
  fields = (input_field, target_field)
  read = functools.partial(sources.read_pairs, fields=fields, file_format=file_format)
  recipe = supervised(
    {split: functools.partial(read, pattern) for split, pattern in splits.items()},
    prefix=prefix,
    metric_fns=metrics_lib.get_metrics(metrics),
    separator=reference_separator,
  )
  catalog.add(name, recipe, vocabulary)


def register_text_task(
  name: str,
  *,
  train_file: str = '',
  validation_file: str = '',
  test_file: str = '',
  file_format: str = '',
  text_field: str | int = 'text',
  lines_per_document: int = 1,
  objective: str | catalog.Preprocessor = 'span_corruption',
  vocabulary: VocabularyConfig | None = None,
) -> None:
  """Makes a pre-training task of text files, plain or gzip.

  For instance `register_text_task('books', train_file='books/*.txt.gz')`. With `objective='all'`
  there are `books_span_corruption`, `books_iid_denoising_rate0.25` and so on, and the mixture
  `books_ul2`; `books_first100_span_corruption` trains on the first 100 rows of each file alone.
  UsageError if the name is taken, a file is missing or the objective unknown.

  Args:
    name: of the task.
    train_file: path or glob pattern; likewise the other two. At least one. Files of text above
      1 GiB together are streamed; TSV and JSONL are held in memory.
    validation_file: see train_file.
    test_file: see train_file.
    file_format: 'text', 'tsv' or 'jsonl'; empty to tell from the name.
    text_field: where TSV or JSONL hold the text.
    lines_per_document: neighbouring lines that belong together.
    objective: name from OBJECTIVES, one with settings such as 'span_corruption_rate0.25_span5', a
      SeqIO preprocessor of tokens, or 'all' for a task NAME_OBJECTIVE of each.
    vocabulary: as in `register_file_task`; not with 'all'.
  """
  splits, files = _split_files(name, train=train_file, validation=validation_file, test=test_file)
  check_positive('lines_per_document', lines_per_document)
  is_text = all(records.format_of(f, file_format) == 'text' for f in files)
  if is_text and text_files.total_bytes(files) > MAX_IN_MEMORY_BYTES:
    if lines_per_document != 1:
      raise UsageError(
        f'The files of task {name!r} are too large for lines_per_document={lines_per_document}; '
        'write one document a line'
      )
    make_source = functools.partial(sources.stream_text, splits)
  else:
    read = functools.partial(
      sources.read_documents,
      field=text_field,
      file_format=file_format,
      lines_per_document=lines_per_document,
    )

    def make_source(first: int | None = None) -> seqio.DataSource:
      first_of = {'train': first}
      return sources.RowsDataSource(
        {k: functools.partial(read, v, first=first_of.get(k)) for k, v in splits.items()}
      )

  if objective != 'all':
    catalog.add(name, unsupervised(make_source, objective), vocabulary)
    return
  if name in _TEXTS or vocabulary is not None:
    problem = 'there is a text of this name' if name in _TEXTS else 'it is for any vocabulary'
    raise UsageError(f"The text {name!r} cannot have objective='all': {problem}")
  _TEXTS[name] = functools.cache(make_source)


def _split_files(name: str, **split_to_file: str) -> tuple[dict[str, str], list[str]]:
  """Returns the pattern of each split that has one, and the files of all."""
  found = {split: file for split, file in split_to_file.items() if file}
  if not found:
    raise UsageError(f'The task {name!r} has no files; give train_, validation_ or test_file')
  return found, [path for pattern in found.values() for path in text_files.expand(pattern)]


def supervised(
  split_to_rows: Mapping[str, Callable[[], sources.Columns]],
  *,
  prefix: str,
  metric_fns: Sequence[metrics_lib.MetricFn],
  separator: str = '',
) -> catalog.TaskRecipe:
  """Returns the recipe of a task of the columns `inputs` and `targets` that each split reads.

  A separator stands between the references of a target; '' means there is one.
  """
  steps = [text_preprocessors.tokenize_rows]
  postprocess_fn = None
  if prefix:
    steps.insert(0, functools.partial(text_preprocessors.prefix_inputs, prefix=prefix))
  if separator:
    first = functools.partial(text_preprocessors.first_reference, separator=separator)
    steps = [first, *steps, text_preprocessors.restore_references]
    postprocess_fn = functools.partial(metrics_lib.split_references, separator=separator)
  make_source = functools.partial(
    sources.RowsDataSource, split_to_rows, rows_per_element=_ROWS_AT_ONCE
  )
  return catalog.TaskRecipe(
    make_source=functools.cache(make_source),
    preprocessors=(*steps, text_preprocessors.split_rows),
    metric_fns=tuple(metric_fns),
    postprocess_fn=postprocess_fn,
  )


def unsupervised(
  make_source: Callable[[], seqio.DataSource],
  objective: str | catalog.Preprocessor,
  *,
  steps: Sequence[catalog.Preprocessor] = (),
  is_t5s: bool = False,
) -> catalog.TaskRecipe:
  """Returns the recipe of a pre-training task.

  Its rows hold documents under `targets`, or `steps`, before the tokenization, put them there. The
  objective is a name that `find_objective` knows, or a preprocessor of tokens.
  """
  if isinstance(objective, str):
    found = find_objective(objective)
    if found is None:
      known = f'{", ".join(OBJECTIVES)}, and others such as span_corruption_rate0.25_span5'
      raise UsageError(f'There is no objective {objective!r}; there are {known}')
    objective = found
  is_lm = objective is preprocessors.full_lm
  end = () if is_lm else (seqio.preprocessors.append_eos_after_trim,)
  tokenize = (text_preprocessors.tokenize_documents, seqio.CacheDatasetPlaceholder())
  return catalog.TaskRecipe(
    make_source=functools.cache(make_source),
    preprocessors=(*steps, *tokenize, objective, *end),
    features=('targets',) if is_lm else ('inputs', 'targets'),
    # The examples of one joined text follow each other, so they are shuffled once more.
    shuffle_buffer_size=1000,
    is_t5s=is_t5s,
  )


def ul2(text: str) -> catalog.MixtureRecipe:
  """Returns UL2's mixture over a text: its denoisers, equally often (Tay et al. 2022, 3.1.2)."""
  return catalog.MixtureRecipe(rates={f'{text}_{denoiser}': 1.0 for denoiser in UL2})


# Sources of texts whose every objective is a task, TEXT_OBJECTIVE or TEXT_first100_OBJECTIVE.
_TEXTS: dict[str, Callable[..., seqio.DataSource]] = {}


def _find_text(name: str) -> catalog.Recipe | None:
  for text in sorted(_TEXTS, key=len, reverse=True):
    match = re.fullmatch(rf'{re.escape(text)}(_first(?P<first>\d+))?_(?P<objective>.+)', name)
    if match is None:
      continue
    if match['objective'] == 'ul2':
      return ul2(name.removesuffix('_ul2'))
    if find_objective(match['objective']) is not None:
      first = match['first'] and int(match['first'])
      return unsupervised(functools.partial(_TEXTS[text], first), match['objective'])
  return None


catalog.add_finder(
  _find_text,
  lambda: tuple(f'{text}_{objective}' for text in _TEXTS for objective in (*OBJECTIVES, 'ul2')),
)
