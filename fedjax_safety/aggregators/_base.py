"""The protocol that every aggregator follows, in Optax's manner."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety import tree, types


class AggregatorOutput(NamedTuple):
  """What one round of aggregation returns.

  Attributes:
    delta: the aggregate, leaves [...] with the dtypes of the deltas.
    state: passed to the next round's update.
    client_weights: [C] float32, each client's share in the aggregate; sums to
      1, or is all 0 when no client was usable. None for rules that mix
      clients differently in every coordinate.
    metrics: name -> scalar array; always holds `num_nonfinite`, the rows that
      were not finite. A rule that scores its clients adds `client_scores`
      [C], higher meaning more suspicious.
  """

  delta: types.Adapter
  state: types.AggregatorState
  client_weights: types.Weights | None
  metrics: types.Metrics


class Aggregator(NamedTuple):
  """A pair of pure functions that turns the deltas of a round into one delta.

  Attributes:
    init: `init(adapter) -> state`, from an unstacked adapter as template.
    update: `update(deltas, state, *, weights, key, **extra) ->
      AggregatorOutput`.
      `weights` [C] says how much each client counts; None counts all alike.
      Clients choose what they report, so that only `mean` heeds it; the
      robust rules count all alike. `key` is used by random rules alone.
      `extra` holds what `inputs(name)` lists besides: `root_delta`, the
      server's own delta; `loss_fn`, delta -> loss on the server's data;
      `adapter`, the server's adapter; `probe`, adapter -> loss on the pairs
      that the server holds; `references`, () -> (deltas, is_unsafe) made of
      the server's own data. Where a rule asks for them they are parameters of
      `update`.
  """

  init: Callable[[types.Adapter], types.AggregatorState]
  update: Callable[..., AggregatorOutput]


class RuleOutput(NamedTuple):
  """What a rule tells its Aggregator: the delta, shares [C], finite rows.

  `metrics` are more of those of `AggregatorOutput`, such as `client_scores`.
  """

  delta: types.Adapter
  client_weights: types.Weights | None
  finite: types.RowMask
  metrics: types.Metrics | None = None


# (deltas, *, weights, key, **extra) -> RuleOutput.
Rule = Callable[..., RuleOutput]


def stateless(rule: Rule, *, cohort_size: int) -> Aggregator:
  """Wraps a rule that carries nothing from one round to the next."""

  def init(adapter):
    del adapter
    return ()

  def update(deltas, state, **runtime):
    return rule(deltas, **runtime), state

  return stateful(init, update, cohort_size=cohort_size)


def stateful(
  init: Callable[[types.Adapter], types.AggregatorState],
  rule: Callable[..., tuple[RuleOutput, types.AggregatorState]],
  *,
  cohort_size: int,
) -> Aggregator:
  """Wraps `rule(deltas, state, *, weights, key, **extra) -> output, state`."""

  def update(deltas, state, *, weights, key, **extra):
    got = tree.cohort_size(deltas)
    if got != cohort_size:
      raise ValueError(
        f'cohort_size={cohort_size} differs from the {got} rows of deltas; '
        'build the aggregator with the cohort size of the round'
      )
    output, state = rule(deltas, state, weights=weights, key=key, **extra)
    bad = jnp.sum(~output.finite, dtype=jnp.int32)
    metrics = {'num_nonfinite': bad} | (output.metrics or {})
    return AggregatorOutput(output.delta, state, output.client_weights, metrics)

  return Aggregator(init, update)


def normalized(weights: types.Weights) -> types.Weights:
  """Scales [C] nonnegative weights to sum to 1; all 0 stay 0."""
  weights = weights.astype(jnp.float32)
  whole = jnp.sum(weights)
  return weights / jnp.where(whole > 0, whole, 1.0)


def shares(weights: types.Weights | None, finite: types.RowMask) -> jax.Array:
  """Returns weights [C] that sum to 1, and 0 for rows that cannot be used.

  Args:
    weights: [C]; those that are not positive and finite do not count. None
      counts all alike.
    finite: [C] bool.
  """
  if weights is None:
    return normalized(finite)
  weights = weights.astype(jnp.float32)
  usable = finite & jnp.isfinite(weights) & (weights > 0)
  return normalized(jnp.where(usable, weights, 0.0))


def keep_lowest(
  scores: jax.Array, finite: types.RowMask, count: int
) -> types.RowMask:
  """Marks the `count` rows of lowest score [C]; ties go to the lowest row.

  Rows that are not finite rank last and are never marked, so that each of
  them takes the place of a row that would have been left out.
  """
  scores = jnp.where(finite, jnp.minimum(scores, _HUGE), jnp.inf)
  row = jnp.arange(scores.size)
  before = scores[None, :] < scores[:, None]
  tied = (scores[None, :] == scores[:, None]) & (row[None, :] < row[:, None])
  rank = jnp.sum(before | tied, axis=1)
  return finite & (rank < count)


# Finite, so that a finite row never ties with one that is not.
_HUGE = float(jnp.finfo(jnp.float32).max)
