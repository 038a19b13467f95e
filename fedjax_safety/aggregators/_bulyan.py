"""A rule that selects rows and then values: Bulyan."""

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_safety import tree, types
from fedjax_safety.aggregators import _base, _geometry, _rule


@_rule.whole(
  check=_rule.at_least('bulyan', 4, 3),
  paper='El Mhamdi et al., ICML 2018',
  guarantee='no value leaves the honest range by more than its width',
  cost='C² P + C log² C P, three reads',
  needs='n ≥ 4f + 3',
  acts_on='factors',
)
def bulyan(deltas: types.Deltas, *, num_byzantine: int) -> _base.RuleOutput:
  """Returns, in every coordinate, the mean of selected rows near the median.

  Krum selects a row, again and again, of those that are left, until there are
  C - 2 f; scores always count the neighbors that are left. Of the selected
  rows the C - 4 f values nearest to their median are averaged in every
  coordinate. Equal scores select, and equal distances keep, the lowest row.

  A row with a NaN or an infinity is infinitely far from all others and is
  never selected. A client's share is that of the rows selected. With
  `num_byzantine` 0 it is the mean.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [2.0], [3.0], [1e9], [1.5], [2.5], [2.0]])
    >>> print(aggregators.bulyan(deltas, num_byzantine=1))
    [2.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows that may be arbitrary.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is below 4 f + 3.

  Reference: El Mhamdi, Guerraoui, Rouault. The Hidden Vulnerability of
  Distributed Learning in Byzantium. ICML 2018.
  """
  geometry = _geometry.measure(deltas)
  selected = _select(geometry, num_byzantine)
  num_selected = selected.size - 2 * num_byzantine
  num_kept = num_selected - 2 * num_byzantine

  def combine(leaf):
    values = [
      jnp.where(selected[c], row, jnp.inf)
      for c, row in enumerate(tree.rows(leaf))
    ]
    near = _mean_near_median(values, num_selected, num_kept)
    return near.astype(leaf.dtype)

  shares = _base.normalized(selected)
  return _base.RuleOutput(
    jax.tree.map(combine, deltas), shares, geometry.finite
  )


def _select(geometry: _geometry.Geometry, num_byzantine: int) -> types.RowMask:
  """Marks the C - 2 f rows that Krum selects one after the other."""
  finite, size = geometry.finite, geometry.finite.size
  # Sorted once: a pick only takes rows out.
  order = jnp.argsort(geometry.sq_dists, axis=1)
  sorted_dists = jnp.take_along_axis(geometry.sq_dists, order, axis=1)
  is_other = order != jnp.arange(size)[:, None]

  def pick(num_picked, selected):
    left = finite & ~selected
    others = left[order] & is_other
    neighbors = jnp.maximum(size - num_picked - num_byzantine - 2, 1)
    nearest = others & (jnp.cumsum(others, axis=1) <= neighbors)
    scores = jnp.sum(jnp.where(nearest, sorted_dists, 0.0), axis=1)
    return selected | _base.keep_lowest(scores, left, 1)

  nobody = jnp.zeros(size, bool)
  return lax.fori_loop(0, size - 2 * num_byzantine, pick, nobody)


def _mean_near_median(
  values: list[jax.Array], count: int, num_kept: int
) -> jax.Array:
  """Returns the mean of the values nearest to the median of the selected.

  Args:
    values: C arrays of one shape; +inf for rows that are not selected.
    count: how many rows are selected.
    num_kept: how many of their values are averaged.
  """
  low, high = tree.order_statistics(values, ((count - 1) // 2, count // 2))
  # Fused into what follows, the network would run for each of the rows.
  middle = lax.optimization_barrier(0.5 * low + 0.5 * high)
  middle = jnp.where(jnp.isfinite(middle), middle, 0.0)
  distances = [jnp.abs(value - middle) for value in values]
  (farthest,) = tree.order_statistics(distances, (num_kept - 1,))
  farthest = lax.optimization_barrier(farthest)
  nearer = [(dist < farthest).astype(jnp.float32) for dist in distances]
  room = num_kept - tree.total(nearer)
  excess, kept = jnp.zeros_like(middle), jnp.zeros_like(middle)
  for value, dist in zip(values, distances, strict=True):
    tied = (dist == farthest) & (room > 0)
    room = room - tied
    taken = (tied | (dist < farthest)) & jnp.isfinite(value)
    excess = excess + jnp.where(taken, value - middle, 0.0)
    kept = kept + taken
  return middle + excess / jnp.maximum(kept, 1.0)
