"""The files of a run: where they lie, and how they are written.

config.json                                    the config of the whole run
metrics.jsonl                                  every round, step and stage
synthesis/<what>-<digest>.jsonl                data written by a model
synthesis/<what>-<digest>.manifest.json        how they were written
replies/<digest>.jsonl                         every reply of an endpoint
runs/<arm>/seed_<n>/checkpoints/<round>/       Orbax
runs/<arm>/seed_<n>/adapters/<stage>/          PEFT
runs/<arm>/seed_<n>/evaluations/<stage>.jsonl  one line an answer
runs/<arm>/seed_<n>/repair/<level>/            defense data, manifest
runs/<arm>/seed_<n>/audit.json                 overlap of prompt sets
locks/<digest>                                 what a process of a sweep runs
report.html report.md report.csv
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedjax_safety import config as config_lib
from fedjax_safety.data import sources

CONFIG = 'config.json'
_MOST_DIFFERENCES = 12


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file so that it is there whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  # Two processes of a sweep may write the same.
  part = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    with open(part, 'w', encoding='utf-8') as stream:
      stream.write(text)
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(workdir: pathlib.Path, name: str) -> Iterator[bool]:
  """Takes a lock among all processes on a work directory, if it is free.

  Yields whether it was. The system gives it back when a process ends, however
  that happens. A file system without locks has them all free, so that one
  process runs there as ever.
  """
  path = workdir / 'locks' / name
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      is_free = True
    except BlockingIOError:
      is_free = False
    except OSError:
      is_free = True
    yield is_free


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a value as indented JSON, whole or not at all."""
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
  """Returns rows as JSON lines."""
  return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


def write_lines(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes rows as JSON lines, whole or not at all."""
  write_text(path, _lines(rows))


def write_examples(
  path: pathlib.Path,
  examples: Iterable[sources.Example],
  manifest_path: pathlib.Path,
  manifest: Mapping[str, Any],
) -> None:
  """Writes (instruction, response) pairs as JSON lines, and their manifest.

  What else is known of a pair, its metadata, stands in its line. The manifest,
  with the SHA-256 of the pairs, is there whenever they are.
  """
  text = _lines(
    {'instruction': e.prompt, 'response': e.response, **e.metadata}
    for e in examples
  )
  checksum = hashlib.sha256(text.encode()).hexdigest()
  write_json(manifest_path, {**manifest, 'sha256': checksum})
  write_text(path, text)


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the config of the run in a work directory.

  Raises:
    ValueError: the directory holds no run, or its config is damaged.
  """
  path = workdir / CONFIG
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise ValueError(
      f'{workdir} holds no run: there is no {CONFIG} in it'
    ) from None
  except ValueError as error:
    raise ValueError(f'{path} is not valid JSON: {error}') from None


def check(
  workdir: pathlib.Path,
  config: Mapping[str, Any],
  *,
  allow_config_change: bool = False,
) -> None:
  """Raises unless a run of this config can start or go on in a directory.

  Args:
    workdir: the directory; need not exist.
    config: the run's config.
    allow_config_change: whether it may hold a run of another config.

  Raises:
    ValueError: it is a file, cannot be written to, holds other files, or a
      run of another config; the message lists the keys that differ.
  """
  _check_writable(workdir)
  if (workdir / CONFIG).exists():
    changed = config_lib.differences(
      read_config(workdir), config_lib.to_json(config)
    )
    if changed and not allow_config_change:
      shown = '; '.join(changed[:_MOST_DIFFERENCES])
      more = len(changed) - _MOST_DIFFERENCES
      raise ValueError(
        f'{workdir} holds a run of another config ({shown}'
        f'{f"; and {more} more" if more > 0 else ""}). Use another --workdir, '
        f'or --allow_config_change to continue it with the new settings.'
      )
  # A file that begins with a dot may be another process's, not yet whole.
  elif workdir.is_dir() and any(
    not path.name.startswith('.') for path in workdir.iterdir()
  ):
    raise ValueError(
      f'{workdir} is not empty and holds no run; choose another --workdir'
    )


def _check_writable(workdir: pathlib.Path) -> None:
  """Raises unless files can be made in a directory, once it is made."""
  existing = workdir
  while not existing.exists() and existing != existing.parent:
    existing = existing.parent
  if not existing.is_dir():
    raise ValueError(
      f'{existing} is a file, so --workdir={workdir} cannot be a directory; '
      f'choose another'
    )
  if not os.access(existing, os.W_OK | os.X_OK):
    raise ValueError(
      f'{existing} is not writable, which --workdir={workdir} needs; change '
      f'its permissions or choose another'
    )


def claim(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Makes a work directory this run's; see `check`."""
  new = config_lib.to_json(config)
  path = workdir / CONFIG
  if not path.exists() or read_config(workdir) != new:
    write_json(path, new)


def defense_data(directory: pathlib.Path, level: str) -> pathlib.Path:
  """Returns where the defense data of a level are, below an arm's directory."""
  return directory / 'repair' / level / 'defense_data.jsonl'


def evaluation(directory: pathlib.Path, stage: str) -> pathlib.Path:
  """Returns where a stage's answers are, below an arm's directory."""
  return directory / 'evaluations' / f'{stage}.jsonl'


def arm_directory(workdir: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
  """Returns the directory of one arm at one seed."""
  return workdir / 'runs' / arm / f'seed_{seed}'
