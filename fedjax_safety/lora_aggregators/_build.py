"""What a round needs to aggregate adapters in one of the ways it can.

A round hands an adapter to the clients and gets one back, of the same rank.
Within that contract these are exact in what they say:

  factors         the rule on the factors' deltas, as they come.
  ffa             `a` is frozen; the rule on the deltas of `b`.
  rolora          `b` and `a` are trained in turn; the rule on that one.
  ffa_product     as ffa, the rule's distances between products.
  rolora_product  as rolora, the rule's distances between products.
  product_svd     both are trained; the rule on products, the result cut to
                  the server's rank.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, aggregators, tree, types
from fedjax_safety.aggregators import _chain, _rule
from fedjax_safety.lora_aggregators import _rules, _schemes

# (adapter, round_index) -> tree of bool scalars.
Trainable = Callable[[types.Adapter, jax.Array], types.PyTree]


class Scheme(NamedTuple):
  """How the adapters of a round are trained and aggregated.

  Attributes:
    aggregator: the rule; on products, its update takes the server's adapter
      as `adapter` besides.
    trainable: which factors clients may change in a round; None for all.
  """

  aggregator: aggregators.Aggregator
  trainable: Trainable | None


_TRAINABLE = {
  'factors': None,
  'ffa': _schemes.ffa_trainable,
  'rolora': _schemes.rolora_trainable,
  'ffa_product': _schemes.ffa_trainable,
  'rolora_product': _schemes.rolora_trainable,
  'product_svd': None,
}
# A server that takes another step than the delta itself would move a frozen
# factor by momentum, or scale factors where it means to scale a product.
_PLAIN_SERVER = ('rolora', 'rolora_product', 'product_svd')


def names() -> tuple[str, ...]:
  """Returns the schemes that `build` knows, sorted."""
  return tuple(sorted(_TRAINABLE))


def check_server(name: str, *, optimizer: str, learning_rate: float) -> None:
  """Raises unless a server's optimizer leaves the scheme what it is.

  Args:
    name: one of `names()`.
    optimizer: name of the server's optimizer.
    learning_rate: of the server.
  """
  if name in _PLAIN_SERVER and optimizer != 'fedavg':
    raise ValueError(
      f'lora_aggregation={name!r} needs the server optimizer fedavg, as any '
      f'other moves factors by what they were; got {optimizer!r}'
    )
  if name == 'product_svd' and learning_rate != 1:
    raise ValueError(
      f"lora_aggregation='product_svd' needs the server's learning rate 1, as "
      f'a share of a change of factors is none of the product; got '
      f'{learning_rate}'
    )


def build(
  name: str,
  rule: str,
  *,
  cohort_size: int,
  scale: float = 1.0,
  rule_kwargs: Mapping[str, Any] | None = None,
) -> Scheme:
  """Returns a scheme with its rule, checked against the size of the cohort.

  Args:
    name: one of `names()`.
    rule: one of `aggregators.names()`.
    cohort_size: C, the clients of a round.
    scale: factor of the product.
    rule_kwargs: what else `aggregators.build` takes.

  Raises:
    ValueError: if a name or an argument is unknown, there are too few rows,
      or the rule cannot work on products.
  """
  _validate.one_of(names(), lora_aggregation=name)
  kwargs = dict(rule_kwargs or {})
  built = aggregators.build(rule, cohort_size=cohort_size, **kwargs)
  if 'product' in name:
    steps = aggregators.steps(rule, **kwargs)
    coordinatewise = _rule.of(steps[-1]).kind == 'coordinatewise'
    if name == 'product_svd' and coordinatewise:
      built = _aggregator(_entries(steps))
    else:
      _chain.check_affine(steps)
      built = _aggregator(_weighted(steps, scale, name == 'product_svd'))
  return Scheme(built, _TRAINABLE[name])


def _aggregator(combine: Callable) -> aggregators.Aggregator:
  """Wraps `combine(adapter, deltas, weights, key) -> (delta, shares)`."""

  def update(deltas, state, *, weights, key, adapter):
    delta, shares = combine(adapter, deltas, weights, key)
    bad = ~tree.finite_rows(deltas)
    metrics = {'num_nonfinite': jnp.sum(bad, dtype=jnp.int32)}
    return aggregators.AggregatorOutput(delta, state, shares, metrics)

  return aggregators.Aggregator(lambda adapter: (), update)


def _weighted(
  steps: Sequence[_chain.Step], scale: float, cut: bool
) -> Callable:
  """Combines clients by coefficients: products cut to rank, or factors."""

  def combine(adapter, deltas, weights, key):
    found = _rules.coefficients(
      steps, adapter, deltas, scale=scale, weights=weights, key=key
    )
    shares = _chain.shares_of(found)
    if not cut:
      # With one factor shared, the product is linear in the other.
      return tree.mix(found, deltas), shares
    new = _rules.product_svd(adapter, deltas, found)
    return jax.tree.map(jnp.subtract, new, adapter), shares

  return combine


def _entries(steps: Sequence[_chain.Step]) -> Callable:
  """Combines clients entry by entry of their products, cut to rank."""
  rule = _rules.product_coordinatewise(*steps)

  def combine(adapter, deltas, weights, key):
    del weights
    new = rule(adapter, deltas, key=key)
    return jax.tree.map(jnp.subtract, new, adapter), None

  return combine
