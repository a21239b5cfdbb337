"""Trains a SentencePiece vocabulary for T5; the same text and settings give equal bytes."""

import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece
from absl import logging
from etils import epath

from t5x_lite.data import records, text_files, vocabularies
from t5x_lite.data.vocabularies import SPECIAL_IDS, UNK_ID, VocabularyConfig
from t5x_lite.errors import UsageError, check_one_of, check_positive
from t5x_lite.runs import files

MODEL_TYPES = ('unigram', 'bpe', 'char')
NORMALIZATIONS = ('nmt_nfkc', 'nfkc', 'nmt_nfkc_cf', 'identity')

# SentencePiece skips longer sentences (its default limit is 4,192 bytes), so longer lines are cut.
_MAX_SENTENCE_BYTES = 4096
# Its sums depend on the threads. All sentences, in this order: the sample was drawn already.
_TRAINER = {'num_threads': 16, 'input_sentence_size': 0, 'shuffle_input_sentence': False}
# What goes to SentencePiece as it is.
_SETTINGS = 'vocab_size model_type character_coverage byte_fallback split_digits'.split()


def train_vocabulary(
  *,
  output: str,
  input: str | Sequence[str] = (),
  task: str = '',
  split: str = 'train',
  vocab_size: int = 32_000,
  model_type: str = 'unigram',
  character_coverage: float = 0.9995,
  byte_fallback: bool = False,
  user_defined_symbols: Sequence[str] = (),
  normalization: str = 'nmt_nfkc',
  split_digits: bool = False,
  file_format: str = '',
  fields: Sequence[str | int] = (),
  max_sentences: int = 5_000_000,
  seed: int = 0,
  overwrite: bool = False,
) -> dict[str, Any]:
  """Trains a vocabulary with pad, eos, unk = 0, 1, 2 and no bos, as T5's.

  Prints and returns its config, with T5's 100 sentinels, its size without them, and of a sample of
  the sentences the characters per token and the unknown tokens. UsageError if a setting cannot
  work, or the text has too few different pieces or too many characters for `vocab_size`: nothing is
  written then.

  Args:
    output: the model file to write.
    input: text, TSV or JSONL, plain or gzip; paths or glob patterns.
    task: a registered task or mixture to take the text from instead.
    split: of the task.
    vocab_size: pieces, with the three special ones, without sentinels, which are added when a
      vocabulary is loaded (`VocabularyConfig.extra_ids`).
    model_type: 'unigram' (T5's), 'bpe' or 'char'.
    character_coverage: share of the text's characters that get a piece; 1.0 suits small alphabets.
    byte_fallback: spell other characters in bytes (256 more pieces) instead of unk.
    user_defined_symbols: pieces that are never cut.
    normalization: 'nmt_nfkc' (T5's), 'nfkc', 'nmt_nfkc_cf' (lower case too) or 'identity'.
    split_digits: whether every digit is a piece of its own.
    file_format: 'text', 'tsv' or 'jsonl'; empty to tell from the names.
    fields: TSV columns or JSONL keys to read; none means all text there is.
    max_sentences: a larger text is sampled down to this many.
    seed: of the sample.
    overwrite: whether to replace an existing file.
  """
  given = dict(locals())
  if not output:
    raise UsageError('output is empty; name the model file to write')
  if bool(input) == bool(task):
    raise UsageError('Give either input or task: the text to learn from')
  if not 4 <= vocab_size <= 10_000_000:  # SentencePiece counts in 32 bits
    raise UsageError(f'vocab_size is {vocab_size}; it must be 4 to 10,000,000, special pieces too')
  check_one_of('model_type', model_type, MODEL_TYPES)
  check_one_of('normalization', normalization, NORMALIZATIONS)
  check_positive('max_sentences', max_sentences)
  if not 0.9 <= character_coverage <= 1.0:
    raise UsageError(f'character_coverage is {character_coverage}; it must lie between 0.9 and 1.0')
  vocabularies.check_pieces('user_defined_symbols', user_defined_symbols)
  path = epath.Path(output)
  if path.is_dir():
    raise UsageError(f'the output {output} is a directory: name a file')
  if path.exists() and not overwrite:
    fix = 'choose another name or set overwrite'
    raise UsageError(f'{output} exists, and models trained with it need it as it is; {fix}')
  if task:
    # Not at the top: TensorFlow takes many seconds, and files do not need it.
    from t5x_lite.data.tasks import catalog

    texts = catalog.texts(task, split)
  else:
    paths = text_files.expand(input)
    if any(files.same(one, output) for one in paths):
      raise UsageError(f'input and output are the same file: {output}')
    texts = (text for one in paths for text in records.texts(one, fields, file_format))
  sentences, total = _sample(_sentences(texts), max_sentences, seed)
  if not sentences:
    raise UsageError(f'There is no text in {task or input!r}')
  if total > len(sentences):
    logging.info('Learning from %d of %d sentences', len(sentences), total)
  settings = {'user_defined_symbols': [*user_defined_symbols], **{x: given[x] for x in _SETTINGS}}
  model = _train(sentences, normalization_rule_name=normalization, **settings)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_text(path, model)
  found = _summary(VocabularyConfig(path=output), sentences)
  text = '{config.path}: {vocab_size} pieces from {num_sentences} sentences, '
  text += '{characters_per_token:.2f} characters per token, {unknown_percent:.3f}% unknown'
  print(text.format(**found))
  return found


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  """Yields lines, at most `_MAX_SENTENCE_BYTES` long, that hold something."""
  for text in texts:
    # A tab is SentencePiece's own mark; it would skip the line.
    for line in text.replace('\t', ' ').split('\n'):
      line = line.strip()
      while len(line.encode()) > _MAX_SENTENCE_BYTES:
        # As many whole characters as fit, then back to a space if there is one.
        head = line.encode()[:_MAX_SENTENCE_BYTES].decode('utf-8', 'ignore')
        head = head[: head.rfind(' ')] if head.rfind(' ') > 0 else head
        yield head
        line = line[len(head) :].strip()
      if line:
        yield line


def _sample(sentences: Iterable[str], maximum: int, seed: int) -> tuple[list[str], int]:
  """Returns at most `maximum` sentences, each as likely (Vitter 1985, R), and how many came."""
  generator = random.Random(seed)
  kept: list[str] = []
  total = 0
  for total, sentence in enumerate(sentences, 1):
    if len(kept) < maximum:
      kept.append(sentence)
    elif (place := generator.randrange(total)) < maximum:
      kept[place] = sentence
  return kept, total


def _train(sentences: Sequence[str], **settings) -> bytes:
  writer = io.BytesIO()
  try:
    settings |= {'sentence_iterator': iter(sentences), 'model_writer': writer}
    sentencepiece.SentencePieceTrainer.train(minloglevel=2, **SPECIAL_IDS, **_TRAINER, **settings)
  except RuntimeError as error:
    raise UsageError(_explain(str(error), settings['vocab_size'])) from error
  return writer.getvalue()


def _explain(message: str, vocab_size: int) -> str:
  """Returns what to do about an error of SentencePiece's trainer."""
  size = f'vocab_size is {vocab_size}'
  if found := re.search(r'too high.*<= (\d+)', message):
    most = f'{size}, but this text gives no more than {found[1]} pieces'
    return f'{most}; set it to {found[1]} or less, or give more text'
  if found := re.search(r'required_chars\. \d+ vs (\d+)', message):
    need = f'{size}, but the characters of this text alone need {found[1]}'
    return f'{need}; set it higher, or lower character_coverage'
  return f'SentencePiece cannot train on this text: {message.strip()}'


def _summary(config: VocabularyConfig, sentences: Sequence[str]) -> dict[str, Any]:
  # A later call may have written the same path: read what is there now.
  vocabularies.make_vocabulary.cache_clear()
  vocabularies.fingerprint.cache_clear()
  vocabulary = vocabularies.make_vocabulary(config)
  sample = sentences[:: max(1, len(sentences) // 10_000)]
  tokens = [token for text in sample for token in vocabulary.encode(text)]
  return {
    'config': config,
    'vocab_size': vocabulary.vocab_size - config.extra_ids,
    'num_sentences': len(sentences),
    'characters_per_token': sum(map(len, sample)) / max(1, len(tokens)),
    'unknown_percent': 100.0 * tokens.count(UNK_ID) / max(1, len(tokens)),
  }
