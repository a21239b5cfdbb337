"""Finds text files and reads their lines, plain, gzip or zstd, of which records.py makes rows."""

import contextlib
import glob
import gzip
import io
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from t5x_lite.errors import UsageError

# A Hugging Face `datasets` folder of one split, and of several, holds these.
DATASET_FILE = 'state.json'
DATASET_SPLITS_FILE = 'dataset_dict.json'

COMPRESSED = ('.gz', '.zst')
Bad = Callable[[UsageError], None]  # told of each row that cannot be read, which is then left out


def refuse(error: UsageError) -> None:
  """The `Bad` of every reader that is given none: a row that cannot be read is an error."""
  raise error


def is_dataset_folder(path: str | os.PathLike) -> bool:
  """Whether `save_to_disk` of Hugging Face's `datasets` wrote this folder."""
  return any((epath.Path(path) / name).exists() for name in (DATASET_FILE, DATASET_SPLITS_FILE))


def expand(patterns: str | os.PathLike | Sequence[str]) -> list[str]:
  """Returns the files of a path, of a glob pattern or of several, sorted.

  What exists is never a pattern, whatever its name. A folder counts if `datasets` wrote it.
  UsageError if a path or pattern names no file.
  """
  if isinstance(patterns, str | os.PathLike):
    patterns = [os.fspath(patterns)]
  files = []
  for pattern in patterns:
    found = [pattern] if epath.Path(pattern).exists() else []
    if not found and glob.has_magic(pattern):
      if '**' in pattern:
        raise UsageError(f"{pattern!r} has '**'; name each folder with '*'")
      # Folders that are there under this very name are no patterns.
      end = pattern.rfind('/') + 1
      while end and not epath.Path(pattern[:end]).is_dir():
        end = pattern.rfind('/', 0, end - 1) + 1
      matches = epath.Path(glob.escape(pattern[:end])).glob(pattern[end:])
      found = sorted(os.fspath(path) for path in matches)
    found = [file for file in found if is_dataset_folder(file) or not epath.Path(file).is_dir()]
    if not found:
      raise UsageError(f'There is no file {pattern!r}')
    files.extend(found)
  return files


def total_bytes(files: Sequence[str]) -> int:
  """Returns the size of files in memory: compressed, four times that on disk, near enough."""
  return sum(epath.Path(f).stat().length * (4 if f.endswith(COMPRESSED) else 1) for f in files)


_ARCHIVES = {
  b'PK\x03\x04': 'a spreadsheet or a zip archive; save it as CSV',
  b'\x1f\x8b': 'a gzip file; give it a name that ends in .gz',
  b'\x28\xb5\x2f\xfd': 'a zstd file; give it a name that ends in .zst',
}


def lines(path: str, *, keep_ends: bool = False, bad: Bad = refuse) -> Iterator[tuple[int, str]]:
  r"""Yields (line number from 1, line without its end), blank lines too.

  Only `\n` and `\r\n` end a line: str.splitlines would also cut at U+2028 and other characters that
  occur inside text. With `keep_ends` the end is left on, for formats in which it may be text, and
  `bad` hears of no line, since that may be part of a row: bytes that are not UTF-8 become halves of
  surrogate pairs, which records.as_text refuses. The path '-' is standard input. UsageError if the
  file is missing, or not UTF-8, or not whole gzip or zstd.
  """
  number = 0
  if path == '-' and sys.stdin is None:
    raise UsageError('standard input is closed: name a file')
  try:
    stdin = contextlib.nullcontext(sys.stdin.buffer) if path == '-' else None
    with stdin or epath.Path(path).open('rb') as raw:
      # Binary files split at b'\n' alone.
      for number, line in enumerate(_decompressed(raw, path), start=1):
        if number == 1:
          line = line.removeprefix(b'\xef\xbb\xbf')
          for magic, what in _ARCHIVES.items():
            if line.startswith(magic):
              raise UsageError(f'{path} is {what}')
        if not keep_ends:
          line = line.removesuffix(b'\n').removesuffix(b'\r')
        try:
          text = line.decode('utf-8')
        except UnicodeDecodeError as error:
          if not keep_ends or bad is refuse:
            why = f'{error.reason} at byte {error.start}'
            bad(UsageError(f'{path}:{number} is not UTF-8 ({why}); convert the file with iconv'))
            continue
          text = line.decode('utf-8', 'surrogateescape')
        yield number, text
  except (OSError, EOFError, zlib.error) as error:
    if getattr(error, 'errno', None):
      raise UsageError(f'Cannot read {path!r}: {os.strerror(error.errno)}') from error
    kind = 'zstd' if path.endswith('.zst') else 'gzip'
    raise UsageError(f'{path} is not a whole {kind} file after line {number}: {error}') from error


def _decompressed(raw: Any, path: str) -> Any:
  """Returns the binary file that a name's ending says is in another; Arrow brings zstd along."""
  if path.endswith('.zst'):
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(raw, 'zstd')
    return io.BufferedReader(stream)
  return gzip.open(raw) if path.endswith('.gz') else raw
