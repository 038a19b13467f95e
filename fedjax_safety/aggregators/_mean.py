"""The weighted mean: the baseline, and no defense."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_safety import tree, types
from fedjax_safety.aggregators import _base, _rule


@_rule.whole(
  paper='McMahan et al., AISTATS 2017',
  guarantee='none',
  cost='C P, one read',
  acts_on='factors or product',
)
def mean(
  deltas: types.Deltas, *, weights: types.Weights | None = None
) -> _base.RuleOutput:
  """Returns the weighted mean of the clients' deltas.

  A row with a NaN or an infinity has weight 0, and so has a row whose weight
  is negative or not finite. If nothing is left the delta is 0. A single
  finite row can move the mean arbitrarily far.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = {'w': jnp.array([[0.0], [3.0]])}
    >>> print(aggregators.mean(deltas, weights=jnp.array([2.0, 1.0]))['w'])
    [1.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    weights: [C], at least 0, for example numbers of examples; None counts all
      clients alike.

  Returns:
    The delta, leaves [...].

  Reference: McMahan, Moore, Ramage, Hampson, Aguera y Arcas. Communication-
  Efficient Learning of Deep Networks from Decentralized Data. AISTATS 2017.
  """
  cohort_size = tree.cohort_size(deltas)
  if weights is None:
    weights = jnp.ones(cohort_size)
  return _base.RuleOutput(*_usable_mean(deltas, weights.astype(jnp.float32)))


@jax.custom_jvp
def _usable_mean(deltas, weights):
  """Returns the mean of the rows that can be used, their shares, finiteness."""

  def mean_of(finite):
    shares = _base.shares(weights, finite)
    return tree.mix(shares, deltas), shares, finite

  # A bad row of positive weight shows in the mixture of all rows, whose check
  # reads C times fewer numbers than a check of the rows. A loop that seldom
  # runs hands the mixture on as it is; `lax.cond` would copy it.
  everyone = mean_of(jnp.ones(weights.shape, bool))
  clean = tree.all_finite(everyone[0]) & jnp.all(everyone[1] > 0)
  _, output = lax.while_loop(
    lambda carry: ~carry[0],
    lambda carry: (jnp.ones_like(clean), mean_of(tree.finite_rows(deltas))),
    (clean, everyone),
  )
  return output


@_usable_mean.defjvp
def _usable_mean_jvp(primals, tangents):
  """Differentiates with the set of usable rows fixed; a loop has no vjp."""
  output = _usable_mean(*primals)

  def mean_of(deltas, weights):
    shares = _base.shares(weights, output[2])
    return tree.mix(shares, deltas), shares

  _, (delta, shares) = jax.jvp(mean_of, primals, tangents)
  fixed = np.zeros(output[2].shape, jax.dtypes.float0)
  return output, (delta, shares, fixed)
