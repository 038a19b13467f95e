"""How a rule is declared: its mathematics, its bound, and what is known of it.

A rule is one decorated function. The decorator says what the function sees:

  affine           the geometry of the rows; returns coefficients [C], and the
                   delta is their combination of the rows.
  matrix           the geometry of the rows; returns a matrix [M, C] that makes
                   M rows of C: a preaggregator.
  coordinatewise   the rows of one leaf, C float32 arrays of one shape, NaN and
                   infinities replaced by +inf; returns one array.
  whole            the stacked tree, which it reads as it needs; returns a
                   RuleOutput.
  stateful         the size of the cohort; returns an Aggregator, whose state
                   goes from round to round. Called with deltas, it runs one
                   round from a fresh state.

All of them are called by users with the stacked tree in the first place, and
without it return themselves with their arguments bound, for `chain`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from fedjax_safety import _validate


class Rule(NamedTuple):
  """One entry of the registry.

  Attributes:
    name: in configs and in Python.
    kind: affine, matrix, coordinatewise, whole or stateful.
    body: the decorated function.
    check: `check(cohort_size, **kwargs)` raises on what cannot work.
    paper: authors, venue and year.
    guarantee: what is proven, in a few words.
    cost: of C rows of P numbers, as a formula.
    needs: what must hold or be given besides the deltas.
    acts_on: factors of an adapter, or their product too.
    num_rows: `num_rows(cohort_size, **kwargs)`, what a preaggregator makes.
    public: what users call.
  """

  name: str
  kind: str
  body: Callable
  check: Callable
  paper: str
  guarantee: str
  cost: str
  needs: str
  acts_on: str
  num_rows: Callable
  public: Callable | None


REGISTRY: dict[str, Rule] = {}


def _no_check(cohort_size: int, **kwargs) -> None:
  """Accepts everything."""
  del cohort_size, kwargs


def at_least(rule: str, factor: int, offset: int) -> Callable[..., None]:
  """Returns the check of a rule that needs `factor * f + offset` rows."""

  def check(cohort_size: int, *, num_byzantine: int) -> None:
    _validate.byzantine_bound(rule, num_byzantine, cohort_size, factor, offset)

  return check


def _all_rows(cohort_size: int, **kwargs) -> int:
  """Says that a step makes as many rows as it gets."""
  del kwargs
  return cohort_size


def _declare(
  kind: str,
  *,
  paper: str,
  guarantee: str,
  cost: str,
  needs: str = 'nothing',
  acts_on: str,
  check: Callable = _no_check,
  num_rows: Callable = _all_rows,
) -> Callable[[Callable], Callable]:
  """Returns the decorator that registers a body and makes it callable."""

  def decorate(body):
    rule = Rule(
      body.__name__,
      kind,
      body,
      check,
      paper,
      guarantee,
      cost,
      needs,
      acts_on,
      num_rows,
      None,
    )
    public = _public(rule)
    REGISTRY[rule.name] = rule._replace(public=public)
    return public

  return decorate


affine = functools.partial(
  _declare, 'affine', cost='C² P, three reads', acts_on='factors or product'
)
matrix = functools.partial(
  _declare, 'matrix', cost='C² P, three reads', acts_on='factors or product'
)
coordinatewise = functools.partial(
  _declare,
  'coordinatewise',
  cost='C log² C P, one read',
  acts_on='factors or product',
)
whole = functools.partial(_declare, 'whole')
stateful = functools.partial(_declare, 'stateful')


def _public(rule: Rule) -> Callable:
  """Makes the function that users call: `rule(deltas, *, ...)`."""

  @functools.wraps(rule.body)
  def call(*deltas: Any, **kwargs: Any):
    from fedjax_safety.aggregators import _chain

    runtime = {k: v for k, v in kwargs.items() if k in RUNTIME and deltas}
    step = functools.partial(
      call, **{k: v for k, v in kwargs.items() if k not in runtime}
    )
    if not deltas:
      return step
    for name in set(runtime) - {'key'} - inputs(rule):
      raise ValueError(f'{rule.name} has no use for {name!r}; leave it out')
    if rule.kind == 'matrix':
      return _chain.preaggregate(step, *deltas, **runtime)
    return _chain.apply([step], *deltas, **runtime)

  parameters = list(inspect.signature(rule.body).parameters.values())
  first = inspect.Parameter('deltas', inspect.Parameter.POSITIONAL_OR_KEYWORD)
  keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
  call.__signature__ = inspect.Signature([first, *keywords])
  call.rule_name = rule.name
  return call


def of(step: Callable) -> Rule:
  """Returns the registered rule behind a step."""
  name = getattr(getattr(step, 'func', step), 'rule_name', None)
  _validate.one_of(REGISTRY, rule=str(name))
  return REGISTRY[name]


def arguments(step: Callable) -> dict[str, Any]:
  """Returns the arguments that are bound to a step."""
  return dict(getattr(step, 'keywords', {}))


def settle(rule: Rule, cohort_size: int, given: dict[str, Any]) -> None:
  """Raises unless the rule can run with these arguments on so many rows."""
  _validate.positive(cohort_size=cohort_size)
  settings = set(given) - inputs(rule)
  _validate.keywords(repr(rule.name), rule.body, settings, RUNTIME)
  rule.check(cohort_size, **static(rule, given))


def inputs(rule: Rule) -> frozenset[str]:
  """Returns what the body asks for that belongs to the round."""
  return RUNTIME & set(inspect.signature(rule.body).parameters)


def static(rule: Rule, given: dict[str, Any]) -> dict[str, Any]:
  """Returns all arguments of a rule that a config may set, defaults too."""
  defaults = {
    name: parameter.default
    for name, parameter in inspect.signature(rule.body).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  }
  known = {**defaults, **given}
  return {k: v for k, v in known.items() if k not in RUNTIME}


# What a body may ask for that belongs to the round and not to the config:
# a key, the clients' weights, the server's own delta (FLTrust), a function
# `delta -> loss` on the server's own data (Zeno), the server's adapter, a
# function `adapter -> loss` on the server's own data (the safety probe), and
# one `() -> (deltas, is_unsafe)` that makes deltas of the server's own data.
RUNTIME = frozenset(
  {
    'key',
    'weights',
    'root_delta',
    'loss_fn',
    'adapter',
    'probe',
    'references',
  }
)
