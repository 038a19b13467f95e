"""Attacks on the deltas of a round: `(deltas, is_malicious, key) -> deltas`.

They exist to measure defenses. Malicious clients are rows of the mask; rows
outside it are bit-identical in the result.
"""

import functools
from collections.abc import Callable

from fedjax_safety import _validate, types
from fedjax_safety.attacks._update import (
  VALUES,
  gaussian,
  non_finite,
  none,
  sign_flip,
)

__all__ = [
  'Attack',
  'build',
  'gaussian',
  'names',
  'non_finite',
  'none',
  'sign_flip',
]

Attack = Callable[[types.Deltas, types.RowMask, types.PRNGKey], types.Deltas]

_ATTACKS = {
  'gaussian': gaussian,
  'non_finite': non_finite,
  'none': none,
  'sign_flip': sign_flip,
}


# By name of argument, whatever the attack.
_CHECKS = {
  'scale': _validate.non_negative,
  'std': _validate.non_negative,
  'value': functools.partial(_validate.one_of, VALUES),
}


def names() -> tuple[str, ...]:
  """Returns the names that `build` knows, sorted."""
  return tuple(sorted(_ATTACKS))


def build(name: str, **kwargs) -> Attack:
  """Returns the named attack with its keyword arguments bound.

  Args:
    name: one of `names()`; `none` leaves the deltas alone.
    **kwargs: keyword arguments of the attack of that name.

  Returns:
    A function `(deltas, is_malicious, key) -> deltas`.

  Raises:
    ValueError: if the name or an argument is unknown, or a value is not
      allowed.
  """
  _validate.one_of(_ATTACKS, attack=name)
  attack = _ATTACKS[name]
  _validate.keywords(f'attack {name!r}', attack, kwargs)
  for argument, value in kwargs.items():
    if argument in _CHECKS:
      _CHECKS[argument](**{argument: value})
  return functools.partial(attack, **kwargs)
