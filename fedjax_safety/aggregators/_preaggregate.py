"""Preaggregators: steps that make better rows of the rows, before a rule."""

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, types
from fedjax_safety.aggregators import _base, _geometry, _rule, _scale


@_rule.matrix(
  check=_rule.at_least('nearest_neighbor_mixing', 2, 1),
  paper='Allouah et al., AISTATS 2023',
  guarantee='makes an (f, κ) rule (f, 8f/(n−f)·(κ+1)) robust',
  needs='n ≥ 2f + 1',
)
def nearest_neighbor_mixing(
  geometry: _geometry.Geometry, *, num_byzantine: int
) -> jax.Array:
  """Replaces every row by the mean of the C - f rows nearest to it.

  The row itself is one of them. Equal distances go to the lowest row. A row
  that is not finite stays so, and is nobody's neighbor.

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows that may be arbitrary.

  Returns:
    The mixed rows, when called with deltas; a step of a chain without.

  Raises:
    ValueError: if C is below 2 f + 1.

  Reference: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan. Fixing by
  Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity. AISTATS 2023.
  """
  finite, size = geometry.finite, geometry.finite.size

  def neighbors(row):
    index, dists = row
    own = jnp.arange(size) == index
    # The row itself comes first even where others are equal to it.
    scores = jnp.where(own, -1.0, dists)
    kept = _base.keep_lowest(scores, finite, size - num_byzantine)
    return jnp.where(finite[index], _base.normalized(kept), own)

  return jax.vmap(neighbors)((jnp.arange(size), geometry.sq_dists))


def _check_static_clipping(cohort_size: int, *, max_norm: float) -> None:
  del cohort_size
  if isinstance(max_norm, (int, float)):
    _validate.positive(max_norm=max_norm)


@_rule.matrix(
  check=_check_static_clipping,
  paper='Sun et al., 2019',
  guarantee='no row is longer than max_norm',
  needs='the scale of honest norms',
)
def static_clipping(
  geometry: _geometry.Geometry, *, max_norm: float
) -> jax.Array:
  """Scales rows that are longer than a norm down to it.

  Other rows stay as they are, bit by bit, and so does a row with a NaN or an
  infinity.

  Args:
    deltas: stacked tree, leaves [C, ...].
    max_norm: largest Euclidean norm of a row over all leaves, in the unit of
      the deltas.

  Returns:
    The clipped rows, when called with deltas; a step of a chain without.

  Raises:
    ValueError: if `max_norm` is not positive.

  Reference: Sun, Kairouz, Suresh, McMahan. Can You Really Backdoor Federated
  Learning? arXiv 1911.07963, 2019.
  """
  return _clipping(geometry, max_norm)


@_rule.matrix(
  check=_rule.at_least('adaptive_clipping', 2, 1),
  paper='Allouah et al., ICLR 2025',
  guarantee='makes an (f, κ) rule (f, 3κ) robust',
  needs='n ≥ 2f + 1',
)
def adaptive_clipping(
  geometry: _geometry.Geometry, *, num_byzantine: int
) -> jax.Array:
  """Scales the longest rows down to the norm of the next one: ARC.

  The `floor(2 f (C - f) / C)` longest rows are clipped to the norm of the
  longest row that is not among them, so that no bound has to be chosen. Other
  rows stay as they are, bit by bit. A row with a NaN or an infinity stays as
  it is and counts as longest; with more of them than are clipped, no row is.

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows that may be arbitrary; below C / 2.

  Returns:
    The clipped rows, when called with deltas; a step of a chain without.

  Raises:
    ValueError: if C is below 2 f + 1.

  Reference: Allouah, Guerraoui, Gupta, Jellouli, Rizk, Stephan. Adaptive
  Gradient Clipping for Robust Federated Learning. ICLR 2025.
  """
  size = geometry.finite.size
  num_clipped = 2 * num_byzantine * (size - num_byzantine) // size
  ordered = jnp.sort(_geometry.norms(geometry))
  return _clipping(geometry, ordered[size - 1 - num_clipped])


def _clipping(geometry: _geometry.Geometry, bound: jax.Array) -> jax.Array:
  """Returns the matrix that clips finite rows to a norm."""
  factors = _scale.clip_factors(_geometry.norms(geometry), bound)
  return jnp.diag(jnp.where(geometry.finite, factors, 1.0))


def _check_bucketing(cohort_size: int, *, bucket_size: int) -> None:
  _validate.in_range(1, cohort_size, bucket_size=bucket_size)


def _num_buckets(cohort_size: int, *, bucket_size: int) -> int:
  """Returns how many buckets there are, a short last one included."""
  return -(-cohort_size // bucket_size)


@_rule.matrix(
  check=_check_bucketing,
  num_rows=_num_buckets,
  paper='Karimireddy et al., ICLR 2022',
  guarantee='honest rows s times closer, f of ⌈n/s⌉ rows Byzantine',
  needs='a key, s ≤ ⌊n/(2f)⌋',
)
def bucketing(
  geometry: _geometry.Geometry, *, bucket_size: int, key: types.PRNGKey
) -> jax.Array:
  """Replaces the rows by the means of random buckets of them.

  Every row is in one bucket of `bucket_size` rows, but for the last bucket,
  which may be shorter. The rule after it gets `ceil(C / bucket_size)` rows
  and must bear as many Byzantine ones as before: one spoils its bucket. So
  does a row with a NaN or an infinity.

  Args:
    deltas: stacked tree, leaves [C, ...].
    bucket_size: rows in a bucket, in [1, C]; static.
    key: draws the buckets.

  Returns:
    The means, when called with deltas; a step of a chain without.

  Raises:
    ValueError: if `bucket_size` is out of range.

  Reference: Karimireddy, He, Jaggi. Byzantine-Robust Learning on
  Heterogeneous Datasets via Bucketing. ICLR 2022.
  """
  size = geometry.finite.size
  bucket = jax.random.permutation(key, size) // bucket_size
  buckets = jnp.arange(_num_buckets(size, bucket_size=bucket_size))
  return jax.vmap(_base.normalized)(bucket[None, :] == buckets[:, None])
