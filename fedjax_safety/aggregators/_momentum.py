"""A momentum for every client, kept by the server before it aggregates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base


class MomentumState(NamedTuple):
  """What goes from round to round.

  Attributes:
    momentum: stacked tree, leaves [C, ...], float32.
    inner: the state of the aggregator.
  """

  momentum: types.Deltas
  inner: types.AggregatorState


def client_momentum(
  aggregator: _base.Aggregator, *, cohort_size: int, beta: float = 0.9
) -> _base.Aggregator:
  """Gives an aggregator every client's momentum instead of its delta.

  The momentum of a row is `beta` times the last one plus `1 - beta` times the
  delta, from 0 in the first round. It averages the noise of honest clients
  away, so that a robust rule tells them from Byzantine ones more easily.

  Row c must be the same client in every round: all clients take part, or the
  cohort is fixed. With a cohort drawn anew, momenta of different clients
  would be mixed up.

  A row with a NaN or an infinity reaches the aggregator as it is, to be
  counted, and leaves its client's momentum as it was.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> median = aggregators.build('median', cohort_size=3)
    >>> aggregator = aggregators.client_momentum(
    ...   median, cohort_size=3, beta=0.5
    ... )
    >>> state = aggregator.init(jnp.zeros(1))
    >>> for _ in range(2):
    ...   output = aggregator.update(
    ...     jnp.array([[1.0], [2.0], [4.0]]), state, weights=None, key=None
    ...   )
    ...   state = output.state
    >>> print(output.delta)
    [1.5]

  Args:
    aggregator: what `build` returned for this cohort, chains included.
    cohort_size: C, the clients of a round.
    beta: share of the past, in [0, 1); 0 changes nothing.

  Returns:
    An `Aggregator` whose state also holds a momentum for each client.

  Raises:
    ValueError: if `beta` is out of range.

  Reference: Farhadkhani, Guerraoui, Gupta, Pinot, Stephan. Byzantine Machine
  Learning Made Easy by Resilient Averaging of Momentums. ICML 2022.
  """
  _validate.positive(cohort_size=cohort_size)
  if isinstance(beta, (int, float)) and not 0 <= beta < 1:
    raise ValueError(f'beta={beta} must lie in [0, 1) (client_momentum)')

  def init(adapter):
    momentum = jax.tree.map(
      lambda x: jnp.zeros((cohort_size, *jnp.shape(x)), jnp.float32), adapter
    )
    return MomentumState(momentum, aggregator.init(adapter))

  def update(deltas, state, **runtime):
    got = tree.cohort_size(deltas)
    if got != cohort_size:
      raise ValueError(
        f'cohort_size={cohort_size} differs from the {got} rows of deltas; '
        'client momentum needs the same clients in every round'
      )
    finite = tree.finite_rows(deltas)
    moved = jax.tree.map(
      lambda m, x: beta * m + (1.0 - beta) * x.astype(jnp.float32),
      state.momentum,
      deltas,
    )
    output = aggregator.update(
      tree.where_rows(finite, moved, deltas), state.inner, **runtime
    )
    momentum = tree.where_rows(finite, moved, state.momentum)
    return output._replace(state=MomentumState(momentum, output.state))

  return _base.Aggregator(init, update)
