"""Loads instruction data and prompt sets from local files.

JSON lists, JSON lines, CSV (each also gzipped), parquet, and directories
written by `datasets.Dataset.save_to_disk` are read; the schema of each file
is recognized from its first row. Nothing is downloaded and nothing is cached.
"""

import dataclasses
import datetime
import itertools
import logging
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedjax_safety import _validate
from fedjax_safety.data import _files, _readers, _schemas, errors

Scalar = str | int | float | bool

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Example:
  """One request and its answer.

  Attributes:
    prompt: the request, with any input or context appended.
    response: the answer; `''` in sets that hold prompts only.
    metadata: every other scalar column of the row, for example a category or
      a user id to partition by. Columns of CSV files are text. Chats with
      `openai_moderation` (LMSYS-Chat-1M, WildChat) get `response_flagged`.
  """

  prompt: str
  response: str
  metadata: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)


def load_examples(
  path: _files.PathLike,
  *,
  fields: Mapping[str, str] | None = None,
  need_response: bool = True,
  skip_empty: bool = False,
  limit: int | None = None,
) -> list[Example]:
  """Loads the examples of a file, a glob or a directory, in file order.

  Text is kept exactly as written. A chat becomes its first user turn and the
  first assistant turn after that. A JSON file of `client_id -> rows` becomes
  one list with the id in `metadata['client_id']`.

  Args:
    path: a file, a glob, or a directory (searched recursively; one that holds
      several splits is refused).
    fields: {'prompt' | 'response' | 'context': column}, for columns whose
      names are not recognized.
    need_response: whether every example must have a response.
    skip_empty: drop rows without a prompt or a needed response, with a
      warning, instead of raising.
    limit: read at most this many examples.

  Returns:
    The examples, at least one.

  Raises:
    errors.DataError: a `ValueError`; nothing is found, a file is damaged or
      empty, its schema is unknown, or rows lack text.
  """
  if limit is not None:
    _validate.positive(limit=limit)
  examples: list[Example] = []
  for file in _files.find(path):
    left = None if limit is None else limit - len(examples)
    if left == 0:
      break
    examples += _examples(
      _readers.read_rows(file),
      str(file),
      fields=fields,
      need_response=need_response,
      skip_empty=skip_empty,
      limit=left,
    )
  return examples


def load_clients(
  path: _files.PathLike,
  *,
  fields: Mapping[str, str] | None = None,
  need_response: bool = True,
  skip_empty: bool = False,
) -> dict[str, list[Example]]:
  """Loads data that is already divided over clients.

  Args:
    path: a JSON file `{client_id: [row, ...]}`, or a directory with one file
      or one subdirectory per client, whose name is the client id.
    fields: as in `load_examples`.
    need_response: as in `load_examples`.
    skip_empty: as in `load_examples`.

  Returns:
    Examples by client id, in the order of the file or of the sorted names;
    every client has at least one.

  Raises:
    errors.DataError: as in `load_examples`, or a client has no examples.
  """
  options = dict(
    fields=fields, need_response=need_response, skip_empty=skip_empty
  )
  root = pathlib.Path(path).expanduser()
  if root.is_dir():
    return {
      name: load_examples(entry, **options)
      for name, entry in _client_entries(root).items()
    }
  (file,) = _one_file(root)
  return {
    str(name): _examples(rows, f'client {name!r} of {file}', **options)
    for name, rows in _readers.read_clients(file).items()
  }


def select(
  examples: Sequence[Example], where: Mapping[str, Scalar]
) -> list[Example]:
  """Keeps the examples whose metadata equal every value of `where`.

  Args:
    examples: any examples.
    where: metadata key -> wanted value, for example `{'is_safe': False}`;
      numbers and truth values also match their text, as in CSV files.

  Returns:
    The matching examples in order, at least one.

  Raises:
    ValueError: no example matches; the message lists keys or values found.
  """
  for key, wanted in where.items():
    found = {ex.metadata[key] for ex in examples if key in ex.metadata}
    if not found:
      known = sorted({name for ex in examples for name in ex.metadata})
      raise ValueError(
        f'where={dict(where)!r} names {key!r}, which no example has'
        f'{_validate.did_you_mean(key, known)}; known: {", ".join(known)}'
      )
    examples = [ex for ex in examples if _same(ex.metadata.get(key), wanted)]
    if not examples:
      shown = ', '.join(sorted(map(repr, found))[:10])
      raise ValueError(
        f'where={dict(where)!r} matches no example; {key!r} is one of {shown}'
      )
  return list(examples)


def _examples(
  rows: Iterable[tuple[str, Any]],
  source: str,
  *,
  fields: Mapping[str, str] | None,
  need_response: bool,
  skip_empty: bool,
  limit: int | None = None,
) -> list[Example]:
  """Reads the rows of one source, all of one schema."""
  examples: list[Example] = []
  empty: list[tuple[str, str]] = []
  schema: _schemas.Schema | None = None
  for place, row in rows:
    try:
      if schema is None:
        schema = _schemas.detect(row, fields)
        _check_response(schema, row, need_response)
      example = _example(schema, row)
    except errors.SchemaError as error:
      raise errors.SchemaError(f'{source}, {place}: {error}') from error
    lacking = _lacking(example, need_response)
    if lacking:
      empty.append((place, lacking))
    else:
      examples.append(example)
    if len(examples) == limit:
      break
  _report_empty(empty, len(empty) + len(examples), source, skip_empty)
  if not examples:
    raise errors.EmptyDataError(
      f'{source} holds no examples; check that it is the right file'
    )
  return examples


def _check_response(
  schema: _schemas.Schema, row: Any, need_response: bool
) -> None:
  """Raises if responses are needed and the schema has none."""
  if need_response and not schema.has_response:
    found = ', '.join(map(str, row)) if isinstance(row, Mapping) else 'text'
    raise errors.SchemaError(
      f'prompts without a response field; fields found: {found}; known '
      f'response fields: {", ".join(_schemas.RESPONSE_FIELDS)}; name the '
      "field with fields={'response': ...}, or use the file where prompts "
      'alone suffice (need_response=False)'
    )


def _example(schema: _schemas.Schema, row: Any) -> Example:
  """Reads one row."""
  if isinstance(row, str) != (not schema.fields):
    raise errors.SchemaError('this row and the first differ in form')
  if not isinstance(row, str | Mapping):
    raise errors.SchemaError('expected a row with named fields')
  prompt, response = schema.read(row)
  return Example(prompt, response, _metadata(row, schema.fields))


def _metadata(row: Any, used: Iterable[str]) -> dict[str, Scalar]:
  """Returns the scalar columns of a row apart from the used ones."""
  metadata: dict[str, Scalar] = {}
  if isinstance(row, str):
    return metadata
  for name, value in row.items():
    if isinstance(value, datetime.date | datetime.time):
      value = value.isoformat()
    if name in used or not isinstance(value, Scalar):
      continue
    if isinstance(value, float) and math.isnan(value):
      continue
    metadata[name] = value
  flagged = _schemas.response_flagged(row)
  if flagged is not None:
    metadata.setdefault('response_flagged', flagged)
  return metadata


def _lacking(example: Example, need_response: bool) -> str:
  """Returns which text an example lacks, or ''."""
  if not example.prompt.strip():
    return 'prompt'
  if need_response and not example.response.strip():
    return 'response'
  return ''


def _report_empty(
  empty: Sequence[tuple[str, str]], total: int, source: str, skip_empty: bool
) -> None:
  """Raises for rows that lack text, or warns when they may be skipped."""
  if not empty:
    return
  place, lacking = empty[0]
  what = f'{len(empty)} of {total} rows in {source} lack text'
  if not skip_empty:
    raise errors.EmptyTextError(
      f'{what}: the first, {place}, has an empty {lacking}; fill or delete '
      'them, or drop them with skip_empty=True'
    )
  _logger.warning('%s and were skipped (first: %s)', what, place)


def _same(value: Scalar | None, wanted: Scalar) -> bool:
  """Returns whether two scalars are equal, or spelled alike if one is text."""
  if value is None:
    return False
  if isinstance(value, str) != isinstance(wanted, str):
    return str(value).lower() == str(wanted).lower()
  return value == wanted


def _client_entries(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns {client_id: file or subdirectory} of a directory of clients."""
  entries: dict[str, pathlib.Path] = {}
  for entry in sorted(root.iterdir()):
    if entry.name.startswith('.'):
      continue
    if not entry.is_dir() and not _files.is_data(entry):
      continue
    name = entry.name if entry.is_dir() else _files.stem(entry)
    if name in entries:
      raise errors.SchemaError(
        f'client {name!r} appears twice in {root}: {entries[name].name} and '
        f'{entry.name}; keep one'
      )
    entries[name] = entry
  if not entries:
    raise errors.MissingDataError(
      f'the directory {root} holds no client files; known types: '
      f'{_files.known_suffixes()}'
    )
  return entries


def _one_file(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the only file at a path."""
  files = list(itertools.islice(_files.find(path), 2))
  if len(files) > 1:
    raise errors.SchemaError(
      f'{path} matches several files; give one JSON file of clients or a '
      'directory with one file per client'
    )
  return files
