"""Rules that fit and reweight: residual-based reweighting."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_safety import _tiles, _validate, tree, types
from fedjax_safety.aggregators import _base, _rule


def _check_residual_reweighting(
  cohort_size: int, *, confidence: float, threshold: float
) -> None:
  _validate.positive(confidence=confidence)
  _validate.in_range(0.0, 1.0, threshold=threshold)
  if cohort_size < 3:
    raise ValueError(
      f'cohort_size={cohort_size} must be at least 3 (residual_reweighting): '
      'a line fits two clients exactly'
    )


@_rule.whole(
  check=_check_residual_reweighting,
  paper='Fu et al., 2019',
  guarantee='none proven',
  cost='C² P',
  needs='n ≥ 3',
  acts_on='factors',
)
def residual_reweighting(
  deltas: types.Deltas, *, confidence: float = 2.0, threshold: float = 0.1
) -> _base.RuleOutput:
  """Returns the mean of deltas reweighted by their residuals from a line.

  In every coordinate a repeated-median line is fitted to the sorted values
  over their ranks. A value far from the line gets a small confidence, and one
  below `threshold` is replaced by the line. A client's weight is its summed
  confidence, each coordinate's scaled by how much confidences differ there,
  relative to the largest client and squared.

  A value that is NaN or infinite counts as one beyond all others, and its
  client has weight 0. Where no client stands out, as for equal rows, all
  count alike. Results do not depend on the unit of the deltas.

  Args:
    deltas: stacked tree, leaves [C, ...], C at least 3.
    confidence: width of the interval of full confidence, in robust standard
      deviations up to a factor sqrt(2 / C).
    threshold: confidence in [0, 1] below which the line stands in; the
      experiments of Ye et al., ICLR 2025, use 0.05.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is below 3.

  Reference: Fu, Xie, Li, Chen. Attack-Resistant Federated Learning with
  Residual-based Reweighting. arXiv 1912.11464, 2019.
  """
  finite = tree.finite_rows(deltas)
  leaves, structure = jax.tree.flatten(deltas)
  lines = [_in_tiles(_line, leaf, like=leaf) for leaf in leaves]
  judged = functools.partial(
    _judged, confidence=confidence, threshold=threshold
  )
  trust = tree.total(
    [
      _tiles.row_sums(
        lambda leaf, line: judged(leaf, line)[0],
        leaf,
        line,
        num_column_axes=leaf.ndim - 1,
      )
      for leaf, line in zip(leaves, lines, strict=True)
    ]
  )
  trust = jnp.where(finite, trust, 0.0)
  trust = jnp.where(jnp.max(trust) > 0, trust, finite.astype(jnp.float32))
  largest = jnp.max(trust)
  shares = _base.normalized(
    jnp.square(trust / jnp.where(largest > 0, largest, 1.0))
  )

  def mixed(leaf, line):
    return tree.mix(shares, judged(leaf, line)[1])

  delta = [
    _in_tiles(mixed, leaf, line, like=leaf)
    for leaf, line in zip(leaves, lines, strict=True)
  ]
  return _base.RuleOutput(jax.tree.unflatten(structure, delta), shares, finite)


def _in_tiles(function, *arrays: jax.Array, like: jax.Array) -> jax.Array:
  """Calls a function on some columns of a leaf at a time."""
  return _tiles.columns(function, *arrays, num_column_axes=like.ndim - 1)


def _line(leaf: jax.Array) -> jax.Array:
  """Returns slope and intercept of each coordinate's line, and deviation."""
  values = tree.nonfinite_last(leaf.astype(jnp.float32))
  size = values.shape[0]
  rank = _ranks(values)
  slope, intercept = _repeated_median(_ordered(values, rank))
  residuals = _map_rows(
    lambda c, place, value: jnp.abs(value - (intercept + slope * place)),
    rank,
    values,
  )
  deviation = 1.4826 * (1 + 5 / (size - 1)) * _upper_median(residuals)
  return jnp.stack([slope, intercept, deviation])


def _judged(
  leaf: jax.Array, line: jax.Array, *, confidence, threshold
) -> tuple[jax.Array, jax.Array]:
  """Returns what trust each value earns, and the values with lines put in."""
  slope, intercept, deviation = line
  values = tree.nonfinite_last(leaf.astype(jnp.float32))
  size = values.shape[0]

  def trust_of_row(c, place, value):
    del c
    fitted = intercept + slope * place
    residual = jnp.abs(value - fitted)
    spread = (size * size - 1) * size / 12
    leverage = 1 / size + jnp.square(place - (size - 1) / 2) / spread
    reach = confidence * math.sqrt(2 / size) * deviation
    reach = reach * jnp.sqrt(1 - leverage)
    is_far = residual > reach
    # No quotient of zeros on the other side, which has no derivative.
    trust = jnp.where(is_far, reach / jnp.where(is_far, residual, 1.0), 1.0)
    repaired = jnp.where(trust < threshold, fitted, value)
    # With half of the values or more not finite there is no line.
    return trust, jnp.where(jnp.isfinite(repaired), repaired, 0.0)

  trust, repaired = _map_rows(trust_of_row, _ranks(values), values)
  middle = tree.total(tree.rows(trust)) / size
  variance = tree.total(tree.rows(jnp.square(trust - middle))) / (size - 1)
  return trust * tree.safe_sqrt(variance), repaired.astype(leaf.dtype)


def _map_rows(function, *stacked: jax.Array):
  """Stacks `function(c, x[c], ...)`, one row after the other.

  Unrolled, the work of all pairs of clients would be one huge kernel, and a
  result that all rows share would be computed again for each.
  """
  row = jnp.arange(stacked[0].shape[0], dtype=jnp.float32)
  return lax.map(lambda x: function(*x), (row, *stacked))


def _ranks(values: jax.Array) -> jax.Array:
  """Returns each value's rank among the rows; ties rank by row."""

  def rank(c, value):
    return tree.total(
      [
        ((other < value) | ((other == value) & (j < c))).astype(jnp.float32)
        for j, other in enumerate(tree.rows(values))
      ]
    )

  return _map_rows(rank, values)


def _ordered(values: jax.Array, rank: jax.Array) -> jax.Array:
  """Returns the values [C, ...] in the order of their ranks."""

  def value_of_rank(c, first):
    del first
    found = jnp.zeros(values.shape[1:])
    for value, place in zip(tree.rows(values), tree.rows(rank), strict=True):
      found = jnp.where(place == c, value, found)
    return found

  return _map_rows(value_of_rank, values)


def _repeated_median(ordered: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns slope and intercept [...] of Siegel's line over the ranks."""
  size = ordered.shape[0]

  def median_slope(c, value):
    steps = jnp.arange(size) - c
    inverse = 1.0 / jnp.where(steps == 0, 1.0, steps)
    slopes = []
    for j, other in enumerate(tree.rows(ordered)):
      slope = (other - value) * inverse[j]
      # To the end, so that the first C - 1 are the slopes to the others: NaN
      # between two infinities, and the point itself.
      unknown = jnp.isnan(slope) | (steps[j] == 0)
      slopes.append(jnp.where(unknown, jnp.inf, slope))
    low, high = tree.order_statistics(
      slopes, ((size - 2) // 2, (size - 1) // 2)
    )
    return 0.5 * low + 0.5 * high

  slope = tree.median(tree.rows(_map_rows(median_slope, ordered)))
  middle = 0.5 * ordered[(size - 1) // 2] + 0.5 * ordered[size // 2]
  return slope, middle - slope * ((size - 1) / 2)


def _upper_median(residuals: jax.Array) -> jax.Array:
  """Returns the median of all residuals but the smallest."""
  size = residuals.shape[0]
  low, high = tree.order_statistics(
    tree.rows(residuals), (size // 2, (size + 1) // 2)
  )
  return 0.5 * low + 0.5 * high
