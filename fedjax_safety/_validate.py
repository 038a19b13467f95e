"""Checks of concrete Python values, made before any array exists.

Every function raises `ValueError` with the name, the value and the rule that
was broken. Traced values are never inspected.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def positive(**kwargs: float) -> None:
  """Raises unless every value is greater than zero."""
  for name, value in kwargs.items():
    if not value > 0:
      raise ValueError(f'{name}={value} must be greater than 0')


def non_negative(**kwargs: float) -> None:
  """Raises unless every value is at least zero."""
  for name, value in kwargs.items():
    if not value >= 0:
      raise ValueError(f'{name}={value} must be at least 0')


def in_range(low: float, high: float, **kwargs: float) -> None:
  """Raises unless every value lies in the closed interval [low, high]."""
  for name, value in kwargs.items():
    if not low <= value <= high:
      raise ValueError(f'{name}={value} must lie in [{low}, {high}]')


def did_you_mean(value: Any, known: Iterable[str]) -> str:
  """Returns ` (did you mean ...?)` for a near miss, else an empty string."""
  close = difflib.get_close_matches(str(value), list(known), n=1)
  return f' (did you mean {close[0]!r}?)' if close else ''


def one_of(known: Iterable[str], **kwargs: str) -> None:
  """Raises unless every value is one of the known names."""
  known = sorted(known)
  for name, value in kwargs.items():
    if value not in known:
      raise ValueError(
        f'{name}={value!r} is unknown{did_you_mean(value, known)}; '
        f'known: {", ".join(known)}'
      )


def byzantine_bound(
  rule: str, num_byzantine: int, cohort_size: int, factor: int, offset: int
) -> None:
  """Raises unless `cohort_size >= factor * num_byzantine + offset`.

  Args:
    rule: name of the aggregation rule, for the message.
    num_byzantine: number of Byzantine clients that the server assumes.
    cohort_size: number of clients in a round.
    factor: the rule's multiple of `num_byzantine`.
    offset: the rule's additive constant.
  """
  non_negative(num_byzantine=num_byzantine)
  needed = factor * num_byzantine + offset
  if cohort_size < needed:
    raise ValueError(
      f'num_byzantine={num_byzantine} needs cohort_size >= '
      f'{factor}*f+{offset} = {needed} ({rule}); got {cohort_size}. '
      f'Sample more clients a round or assume fewer Byzantine ones.'
    )


def keywords(
  owner: str,
  function: Callable,
  given: Iterable[str],
  hidden: Iterable[str] = (),
) -> None:
  """Raises unless `given` fits the function's keyword-only arguments.

  Args:
    owner: what is being built, for the message.
    function: the function that will receive the arguments.
    given: names of the arguments that were passed.
    hidden: arguments of the function that are neither accepted nor missed.
  """
  parameters = {
    name: parameter
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in hidden
  }
  accepted = f'accepted: {", ".join(parameters) or "none"}'
  given = set(given)
  for name in sorted(given - set(parameters)):
    raise ValueError(
      f'{name!r} is no argument of {owner}'
      f'{did_you_mean(name, parameters)}; {accepted}'
    )
  for name, parameter in parameters.items():
    if name not in given and parameter.default is parameter.empty:
      raise ValueError(f'{owner} needs the argument {name!r}; {accepted}')
