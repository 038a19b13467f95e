"""Finds the data files at a path and tells their types by their names."""

import difflib
import glob
import os
import pathlib
import re

from fedjax_safety.data import errors

PathLike = str | os.PathLike[str]

SUFFIXES = (
  '.json',
  '.json.gz',
  '.jsonl',
  '.jsonl.gz',
  '.ndjson',
  '.csv',
  '.csv.gz',
  '.parquet',
)
_SPLITS = {
  'train': 'train',
  'test': 'test',
  'validation': 'validation',
  'valid': 'validation',
  'val': 'validation',
  'dev': 'validation',
}
_SPLIT_IN_NAME = re.compile(rf'(?<![a-z])({"|".join(_SPLITS)})(?![a-z])')
# What the Hub and `datasets` write beside data.
_NOT_DATA = frozenset(
  {'dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'state.json'}
)


def find(path: PathLike) -> list[pathlib.Path]:
  """Returns the data files at a file, glob or directory, sorted by name."""
  root = pathlib.Path(path).expanduser()
  if root.is_dir():
    return _find_in_directory(root)
  if root.exists():
    suffix_of(root)
    return [root]
  matches = sorted(glob.glob(str(root), recursive=True))
  if not matches:
    raise errors.MissingDataError(
      f'no file, glob match or directory at {root}{_nearby(root)}; '
      'check the path'
    )
  files = [file for file in map(pathlib.Path, matches) if is_data(file)]
  if not files:
    raise errors.MissingDataError(
      f'{root} matches no file of a known type ({known_suffixes()})'
    )
  return files


def is_data(path: pathlib.Path) -> bool:
  """Returns whether `path` is a visible file of a known type."""
  return (
    path.is_file()
    and not path.name.startswith('.')
    and path.name not in _NOT_DATA
    and type_of(path) is not None
  )


def is_saved(path: pathlib.Path) -> bool:
  """Returns whether `datasets.Dataset.save_to_disk` wrote this directory."""
  return (path / 'state.json').is_file()


def known_suffixes() -> str:
  """Returns the known file types as a list for messages."""
  return ', '.join(SUFFIXES)


def stem(path: pathlib.Path) -> str:
  """Returns the file name without its data suffixes: `a.jsonl.gz` is `a`."""
  suffix = type_of(path) or ''
  return path.name[: len(path.name) - len(suffix)]


def type_of(path: pathlib.Path) -> str | None:
  """Returns the known suffix that the name ends in, or None."""
  name = path.name.lower()
  endings = [suffix for suffix in SUFFIXES if name.endswith(suffix)]
  return max(endings, key=len, default=None)


def suffix_of(file: pathlib.Path) -> str:
  """Returns the known suffix of a file or raises."""
  suffix = type_of(file)
  if suffix is None:
    raise errors.SchemaError(
      f'{file} has an unknown file type; known: {known_suffixes()}'
    )
  return suffix


def _find_in_directory(root: pathlib.Path) -> list[pathlib.Path]:
  """Returns the saved data sets in `root`, else the data files below it."""
  if is_saved(root):
    return [root]
  files = [entry for entry in sorted(root.iterdir()) if is_saved(entry)] or [
    file
    for file in sorted(root.rglob('*'))
    if is_data(file)
    and not any(p.startswith('.') for p in file.relative_to(root).parts)
  ]
  if not files:
    raise errors.MissingDataError(
      f'the directory {root} holds no data file; known types: '
      f'{known_suffixes()}'
    )
  splits = {
    _SPLITS[name]
    for file in files
    for name in _SPLIT_IN_NAME.findall(str(file.relative_to(root)).lower())
  }
  if len(splits) > 1:
    raise errors.SchemaError(
      f'the directory {root} holds several splits '
      f'({", ".join(sorted(splits))}), which must not be mixed; name one '
      'file or directory, or a glob that matches one split'
    )
  return files


def _nearby(path: pathlib.Path) -> str:
  """Returns ` (did you mean ...?)` when the directory has a similar name."""
  if not path.parent.is_dir():
    return f' (there is no directory {path.parent})'
  names = [entry.name for entry in path.parent.iterdir()]
  close = difflib.get_close_matches(path.name, names, n=1)
  return f' (did you mean {path.parent / close[0]}?)' if close else ''
