"""The weighted mean: the baseline, and no defense."""

import jax.numpy as jnp
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
  # All rows at first; bad ones are looked for only if the result is bad.
  cohort_size = tree.cohort_size(deltas)
  if weights is None:
    weights = jnp.ones(cohort_size)
  weights = weights.astype(jnp.float32)
  usable = jnp.isfinite(weights) & (weights > 0)
  weights = jnp.where(usable, weights, 0.0)
  everyone = _base.normalized(weights)
  mixed = tree.mix(everyone, deltas)

  def accept():
    return mixed, everyone, jnp.ones(cohort_size, bool)

  def drop_bad_rows():
    finite = tree.finite_rows(deltas)
    shares = _base.normalized(jnp.where(finite, weights, 0.0))
    return tree.mix(shares, deltas), shares, finite

  # A bad row of positive weight shows in the mixture, whose check reads C
  # times fewer numbers than a check of the rows.
  clean = tree.all_finite(mixed) & jnp.all(usable)
  return _base.RuleOutput(*lax.cond(clean, accept, drop_bad_rows))
