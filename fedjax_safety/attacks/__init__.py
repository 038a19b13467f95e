"""Attacks on the deltas of a round: `(deltas, is_malicious, key) -> deltas`.

They exist to measure defenses. Malicious clients are rows of the mask; rows
outside it are bit-identical in the result, and without malicious rows nothing
changes. All can be jitted and vmapped, with the mask traced. Attacks that ask
for more than that take it as a keyword argument: see `inputs`.
"""

import functools
import inspect
from collections.abc import Callable

from fedjax_safety import _validate, types
from fedjax_safety.attacks._adaptive import (
  optimal_alie,
  optimal_ipm,
  optimal_poison,
)
from fedjax_safety.attacks._directed import (
  TARGETS,
  alie,
  ipm,
  mimic,
  reversal,
)
from fedjax_safety.attacks._distance import PERTURBATIONS, min_max, min_sum
from fedjax_safety.attacks._factors import gap
from fedjax_safety.attacks._tailored import fang_krum, fang_trimmed_mean
from fedjax_safety.attacks._update import (
  COORDINATES,
  VALUES,
  gaussian,
  non_finite,
  none,
  scaling,
  sign_flip,
)

__all__ = [
  'Attack',
  'alie',
  'build',
  'fang_krum',
  'fang_trimmed_mean',
  'gap',
  'gaussian',
  'inputs',
  'ipm',
  'mimic',
  'min_max',
  'min_sum',
  'names',
  'non_finite',
  'none',
  'optimal_alie',
  'optimal_ipm',
  'optimal_poison',
  'reversal',
  'scaling',
  'sign_flip',
]

# (deltas, is_malicious, key, **extra) -> deltas.
Attack = Callable[..., types.Deltas]

_ATTACKS = {
  'alie': alie,
  'fang_krum': fang_krum,
  'fang_trimmed_mean': fang_trimmed_mean,
  'gap': gap,
  'gaussian': gaussian,
  'ipm': ipm,
  'mimic': mimic,
  'min_max': min_max,
  'min_sum': min_sum,
  'non_finite': non_finite,
  'none': none,
  'optimal_alie': optimal_alie,
  'optimal_ipm': optimal_ipm,
  'optimal_poison': optimal_poison,
  'reversal': reversal,
  'scaling': scaling,
  'sign_flip': sign_flip,
}

# What an attack may ask for that belongs to the round and not to the config:
# the server's rule, `(deltas) -> delta`, and its adapter.
_RUNTIME = frozenset({'adapter', 'aggregate'})


def _whole(low: int, **kwargs: int) -> None:
  """Raises unless every value is a whole number and at least `low`."""
  for name, value in kwargs.items():
    if not isinstance(value, int) or value < low:
      raise ValueError(
        f'{name}={value!r} must be a whole number of at least {low}'
      )


# By name of argument, whatever the attack.
_CHECKS = {
  'coordinates': functools.partial(_validate.one_of, COORDINATES),
  'ddof': functools.partial(_validate.in_range, 0, 1),
  'factor': _validate.positive,
  'first_step': _validate.positive,
  'index': functools.partial(_whole, 0),
  'num_byzantine': functools.partial(_whole, 0),
  'num_evaluations': functools.partial(_whole, 1),
  'num_halvings': functools.partial(_whole, 0),
  'perturbation': functools.partial(_validate.one_of, PERTURBATIONS),
  'scale': _validate.non_negative,
  'spread': functools.partial(_validate.in_range, 1, float('inf')),
  'std': _validate.non_negative,
  'target': functools.partial(_validate.one_of, TARGETS),
  'value': functools.partial(_validate.one_of, VALUES),
}


def names() -> tuple[str, ...]:
  """Returns the names that `build` knows, sorted."""
  return tuple(sorted(_ATTACKS))


def inputs(name: str) -> frozenset[str]:
  """Returns what of the round an attack asks for besides deltas and key.

  Args:
    name: one of `names()`.

  Returns:
    Some of `aggregate`, the server's rule as a function `(deltas) -> delta`,
    and `adapter`, the server's adapter.

  Raises:
    ValueError: if the name is unknown.
  """
  _validate.one_of(_ATTACKS, attack=name)
  return _RUNTIME & set(inspect.signature(_ATTACKS[name]).parameters)


def build(name: str, **kwargs) -> Attack:
  """Returns the named attack with its keyword arguments bound.

  Args:
    name: one of `names()`; `none` leaves the deltas alone.
    **kwargs: keyword arguments of the attack of that name, without what
      `inputs(name)` lists; None stands for a default that is computed.

  Returns:
    A function `(deltas, is_malicious, key) -> deltas`; it takes what
    `inputs(name)` lists as further keyword arguments.

  Raises:
    ValueError: if the name or an argument is unknown, or a value is not
      allowed.
  """
  _validate.one_of(_ATTACKS, attack=name)
  attack = _ATTACKS[name]
  _validate.keywords(f'attack {name!r}', attack, kwargs, _RUNTIME)
  computed = {
    argument
    for argument, parameter in inspect.signature(attack).parameters.items()
    if parameter.default is None
  }
  for argument, value in kwargs.items():
    if argument in _CHECKS and not (value is None and argument in computed):
      _CHECKS[argument](**{argument: value})
  return functools.partial(attack, **kwargs)
