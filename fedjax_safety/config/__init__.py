"""One tree of settings: its defaults, its checking, its comparison.

A config file builds on `default()`, an `ml_collections.ConfigDict` with every
key there is. `resolve` turns it into the dataclasses of `settings`, and
nothing under it sees the ConfigDict.
"""

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from fedjax_safety import _validate, settings
from fedjax_safety import paper as paper_lib
from fedjax_safety.config import checks as config_checks

# Keys of a config beside those of one arm at one seed.
_RUN_KEYS = {
  'seeds': tuple[int, ...],
  'arms': tuple[Any, ...],
  'paper': paper_lib.Paper,
}


def is_group(hint: Any) -> bool:
  """Whether a type is a group of settings."""
  return dataclasses.is_dataclass(hint) and isinstance(hint, type)


def is_mapping(hint: Any) -> bool:
  """Whether a type is a mapping whose keys are the user's."""
  return typing.get_origin(hint) is Mapping


def is_sequence(hint: Any) -> bool:
  """Whether a type is a list of values."""
  return typing.get_origin(hint) is tuple


def hints_of(group: type | None = None) -> dict[str, Any]:
  """Returns the type of every key of a group, or of a whole config."""
  if group is not None:
    return typing.get_type_hints(group)
  hints = typing.get_type_hints(settings.ExperimentConfig)
  del hints['seed']
  return hints | _RUN_KEYS


def default() -> ml_collections.ConfigDict:
  """Returns every key with its default, plus `arms`, `seeds` and `paper`.

  `arms` lists overrides, each with a name (`{'name': 'krum', 'defense':
  {'aggregator': 'krum'}}`) and each a full run of the config so changed;
  `seeds` lists the seeds; `paper` is what was published for the arms.
  """
  tree = as_dict(settings.ExperimentConfig())
  tree.pop('seed')
  run = {'seeds': (0,), 'arms': (), 'paper': as_dict(paper_lib.Paper())}
  return ml_collections.ConfigDict({**tree, **run})


def unknown_key(prefix: str, key: str, known: Iterable[str]) -> ValueError:
  """Returns the error that names an unknown key and the known ones."""
  return ValueError(
    f'unknown config key {prefix}{key}{_validate.did_you_mean(key, known)}; '
    f'known: {", ".join(sorted(known))}'
  )


def convert(value: Any, hint: Any, path: str) -> Any:
  """Checks one value against its type and returns it in that type.

  Raises:
    ValueError: the type does not fit, or a nested key is unknown.
  """
  if is_group(hint):
    return _build(hint, value, path)
  args = typing.get_args(hint)
  if is_sequence(hint):
    if isinstance(value, str) or not hasattr(value, '__iter__'):
      raise ValueError(f'{path}={value!r} must be a list')
    return tuple(convert(v, args[0], f'{path}[]') for v in value)
  if is_mapping(hint):
    if not isinstance(value, Mapping):
      raise ValueError(f'{path}={value!r} must be a mapping')
    made = {k: convert(v, args[1], f'{path}.{k}') for k, v in value.items()}
    return types.MappingProxyType(made)
  if hint is Any:
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  kinds = args or (hint,)
  # To Python, True is a whole number.
  given = type(value) if isinstance(value, bool) else value
  if given not in kinds and not isinstance(given, kinds):
    names = ' or '.join(kind.__name__ for kind in kinds)
    raise ValueError(f'{path}={value!r} must be of type {names}')
  return value


def _build(cls: type, tree: Any, path: str) -> Any:
  """Returns a group from a mapping; unknown keys are refused by name."""
  if not isinstance(tree, Mapping):
    raise ValueError(f'{path}={tree!r} must be a group of settings')
  hints = hints_of(cls)
  prefix = f'{path}.' if path else ''
  for key in tree:
    if key not in hints:
      raise unknown_key(prefix, key, hints)
  made = {
    key: convert(value, hints[key], f'{prefix}{key}')
    for key, value in tree.items()
  }
  return cls(**made)


def _merge(tree: dict[str, Any], overrides: Mapping[str, Any]) -> None:
  """Sets the leaves of nested overrides in a nested dict, in place."""
  for key, value in overrides.items():
    if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
      _merge(tree[key], value)
    else:
      tree[key] = value


def resolve(
  config: Mapping[str, Any],
) -> dict[tuple[str, int], settings.ExperimentConfig]:
  """Returns every (arm, seed) of a config as checked, frozen settings.

  Args:
    config: a ConfigDict made from `default()`, or the parsed `config.json` of
      a run.

  Raises:
    ValueError: a key is unknown, a value has the wrong type, or two settings
      contradict each other; the message names them.
  """
  tree = to_json(config)
  if 'seed' in tree:
    raise unknown_key('', 'seed', hints_of())
  run = {
    k: convert(tree.pop(k, {} if is_group(h) else ()), h, k)
    for k, h in _RUN_KEYS.items()
  }
  arms = run['arms'] or ({'name': 'run'},)
  names = [_name_of(arm) for arm in arms]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f'arms: two have the name {name!r}; rename one')
  paper_lib.check(run['paper'], names)
  if not run['seeds']:
    raise ValueError('seeds=() leaves nothing to run; give at least one seed')
  return {
    (name, seed): _resolve_arm(tree, name, arm, seed)
    for seed in dict.fromkeys(run['seeds'])
    for name, arm in zip(names, arms, strict=True)
  }


def _resolve_arm(
  tree: Mapping[str, Any], name: str, arm: Mapping[str, Any], seed: int
) -> settings.ExperimentConfig:
  """Returns one arm at one seed; an error in it names the arm."""
  changed = json.loads(json.dumps(tree))
  _merge(changed, {k: v for k, v in arm.items() if k != 'name'})
  try:
    made = _build(settings.ExperimentConfig, {**changed, 'seed': seed}, '')
    config_checks.check(made)
  except ValueError as error:
    where = f'arm {name!r}: ' if len(arm) > 1 else ''
    raise ValueError(f'{where}{error}') from error
  return made


def _name_of(arm: Mapping[str, Any]) -> str:
  """Returns an arm's name.

  Raises:
    ValueError: it has none, or one that cannot be a directory's.
  """
  name = arm.get('name') if isinstance(arm, Mapping) else None
  if not isinstance(name, str) or not re.fullmatch(r'[\w-]+', name):
    raise ValueError(
      f'arms: {arm!r} needs a name of letters, digits, "_" and "-"'
    )
  return name


def _dotted(tree: Mapping[str, Any], prefix: str = ''):
  """Yields (dotted key, value) of every leaf of nested mappings."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _dotted(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def to_json(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config as plain JSON types.

  Raises:
    ValueError: a value has no JSON form.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  try:
    return json.loads(json.dumps(config))
  except TypeError as error:
    raise ValueError(
      f'the config holds a value that is no number, text, list or mapping: '
      f'{error}'
    ) from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Returns `key: old -> new` for every key in which two configs differ."""
  flat_old, flat_new = dict(_dotted(old)), dict(_dotted(new))
  absent = '(absent)'
  return [
    f'{key}: {flat_old.get(key, absent)!r} -> {flat_new.get(key, absent)!r}'
    for key in sorted(flat_old.keys() | flat_new.keys())
    if flat_old.get(key, absent) != flat_new.get(key, absent)
  ]


def digest(value: Any) -> str:
  """Returns a short hash of JSON-like settings, the same in every process."""
  if dataclasses.is_dataclass(value):
    value = as_dict(value)
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_dict(group: Any) -> Any:
  """Returns a resolved group as plain dicts and lists."""
  if dataclasses.is_dataclass(group):
    return {
      field.name: as_dict(getattr(group, field.name))
      for field in dataclasses.fields(group)
    }
  if isinstance(group, Mapping):
    return {key: as_dict(value) for key, value in group.items()}
  if isinstance(group, tuple):
    return tuple(as_dict(item) for item in group)
  return group
