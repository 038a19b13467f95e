"""Federated instruction tuning under attack: simulate, defend, measure.

The names below are the pure floor: mathematics on stacked trees that needs
only JAX, Optax and Chex. They load on first use, so that importing the package
alone (as the report does, on a machine without JAX) loads nothing.
"""

import importlib

from fedjax_safety._version import __version__ as __version__

_PURE_FLOOR = (
  'aggregators',
  'attacks',
  'client_algorithms',
  'client_update',
  'detection',
  'lora',
  'lora_aggregators',
  'losses',
  'round',
  'server_update',
  'tree',
  'types',
)


def __getattr__(name: str):
  if name in _PURE_FLOOR:
    return importlib.import_module(f'{__name__}.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted([*globals(), *_PURE_FLOOR])
