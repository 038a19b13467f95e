"""A config file and the overrides of a command line, read into one tree."""

import ast
import pathlib
import runpy
import sys
import traceback
import typing
from collections.abc import Sequence
from typing import Any

from fedjax_safety import _validate
from fedjax_safety import config as config_lib

PREFIX = '--config.'


def load(path: str) -> dict[str, Any]:
  """Returns the config that a file's `get_config` makes, as plain types.

  Args:
    path: of a Python file; what follows a colon is passed to `get_config`.

  Raises:
    ValueError: the file is not there, has no `get_config`, or fails.
  """
  name, colon, argument = path.partition(':')
  file = pathlib.Path(name)
  if not file.is_file():
    near = _validate.did_you_mean(name, map(str, file.parent.glob('*.py')))
    raise ValueError(f'there is no config file {name}{near}')
  # A config may build on its neighbors, as a script may import its own.
  sys.path.insert(0, str(file.parent.absolute()))
  try:
    get_config = runpy.run_path(name)['get_config']
    made = get_config(argument) if colon else get_config()
  except KeyError as error:
    if error.args == ('get_config',):
      raise ValueError(f'{name} has no function get_config()') from None
    raise _failed(name, error) from error
  except Exception as error:
    raise _failed(name, error) from error
  finally:
    del sys.path[0]
  return config_lib.to_json(made)


def _failed(name: str, error: Exception) -> ValueError:
  """Returns the error that tells where in a config file another one arose."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == name]
  line = getattr(error, 'lineno', None) or (lines[-1] if lines else None)
  where = f'{name}, line {line}' if line else name
  said = ' '.join(str(error).split()) or type(error).__name__
  return ValueError(f'{where}: {said}')


def split(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
  """Returns (key, text) of every `--config.KEY=TEXT`, and what remains.

  Raises:
    ValueError: a key has no value.
  """
  overrides, rest = [], []
  for argument in arguments:
    if not argument.startswith(PREFIX):
      rest.append(argument)
      continue
    key, equals, text = argument.removeprefix(PREFIX).partition('=')
    if not equals:
      raise ValueError(f'{PREFIX}{key} needs a value: {PREFIX}{key}=...')
    overrides.append((key, text))
  return overrides, rest


def override(tree: dict[str, Any], key: str, text: str) -> None:
  """Sets one value of a config in place, from text, by its dotted key.

  Lists are written `a,b` or `('a', 'b')`, mappings `{'a': 1}`; a key of a
  free-form mapping, such as `defense.aggregator_kwargs`, need not exist yet.

  Raises:
    ValueError: the key is unknown, or the text is no value of its type.
  """
  parts = key.split('.')
  if parts[0] == 'arms':
    raise ValueError('arms are set in a config file, not on a command line')
  hint = _hint(parts)
  for part in parts[:-1]:
    tree = tree.setdefault(part, {})
  tree[parts[-1]] = _value(text, hint, key)


def _hint(parts: Sequence[str]) -> Any:
  """Returns the type of the value at a path.

  Raises:
    ValueError: a part is unknown, or names one value and not a group.
  """
  hint = None
  for depth, part in enumerate(parts):
    path = '.'.join(parts[:depth])
    if hint is None or config_lib.is_group(hint):
      known = config_lib.hints_of(hint)
      if part not in known:
        raise config_lib.unknown_key(f'{path}.' if path else '', part, known)
      hint = known[part]
    elif config_lib.is_mapping(hint):
      hint = typing.get_args(hint)[1]
    else:
      raise ValueError(
        f'unknown config key {".".join(parts)}: {path} is a value, not a group'
      )
  return hint


def _value(text: str, hint: Any, key: str) -> Any:
  """Returns the value of a type that a text stands for."""
  if config_lib.is_group(hint):
    known = ', '.join(sorted(config_lib.hints_of(hint)))
    raise ValueError(f'{key} is a group; set one of its keys: {known}')
  if hint is str:
    return text
  if text.lower() in ('true', 'false'):
    text = text.capitalize()
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if config_lib.is_sequence(hint) and not isinstance(value, tuple | list):
    parts = [part.strip() for part in text.split(',') if part.strip()]
    value = parts if isinstance(value, str) else [value]
  config_lib.convert(value, hint, key)
  return list(value) if isinstance(value, tuple) else value
