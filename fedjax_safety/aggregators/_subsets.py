"""Rules that try every set of C - f rows and keep the tightest: MDA, SMEA."""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_safety import _validate, types
from fedjax_safety.aggregators import _base, _geometry, _rule

# What a round can try: a maximum over C² numbers each, or an eigenproblem.
_MOST_DIAMETERS = 200_000
_MOST_EIGENPROBLEMS = 10_000
# Numbers that are in memory at a time.
_BATCH = 2**20


def _check_subsets(
  rule: str, cohort_size: int, num_byzantine: int, most: int
) -> None:
  """Raises unless there is a majority and few enough sets to try."""
  _validate.byzantine_bound(rule, num_byzantine, cohort_size, 2, 1)
  count = math.comb(cohort_size, num_byzantine)
  if count > most:
    raise ValueError(
      f'num_byzantine={num_byzantine} of cohort_size={cohort_size} leaves '
      f'{count} sets of rows to try ({rule}), more than {most}; use caf, '
      'which needs no enumeration, or assume fewer Byzantine clients'
    )


def _check_mda(cohort_size: int, *, num_byzantine: int) -> None:
  _check_subsets('mda', cohort_size, num_byzantine, _MOST_DIAMETERS)


def _check_smea(cohort_size: int, *, num_byzantine: int) -> None:
  _check_subsets('smea', cohort_size, num_byzantine, _MOST_EIGENPROBLEMS)


@_rule.affine(
  check=_check_mda,
  paper='El Mhamdi et al., PODC 2020',
  guarantee='error ≤ 2f/(n−f) · honest diameter',
  needs='n ≥ 2f + 1, few sets',
)
def mda(geometry: _geometry.Geometry, *, num_byzantine: int) -> jax.Array:
  """Returns the mean of the C - f rows of least diameter.

  The diameter is the largest distance between two rows of a set. Of equal
  ones the set that comes first in the order of its rows is kept. A row with
  a NaN or an infinity is far from all others; with more of them than
  `num_byzantine` the mean of all others is returned.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [2.0], [-7.0], [3.0], [99.0]])
    >>> print(aggregators.mda(deltas, num_byzantine=2))
    [2.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows to leave out; below C / 2, and so small that there
      are no more than 200,000 sets.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is below 2 f + 1 or there are too many sets.

  Reference: El Mhamdi, Guerraoui, Guirguis, Hoang, Rouault. Genuinely
  Distributed Byzantine Machine Learning. PODC 2020.
  """
  sq_dists = geometry.sq_dists

  def sq_diameter(kept):
    pairs = kept[:, None] & kept[None, :]
    return jnp.max(jnp.where(pairs, sq_dists, 0.0))

  return _mean_of_best(sq_diameter, geometry.finite, num_byzantine)


@_rule.affine(
  check=_check_smea,
  paper='Allouah et al., ICML 2023',
  guarantee='(f, κ) in the top eigenvalue, κ = 4f/(n−f)·(1 + f/(n−2f))²',
  needs='n ≥ 2f + 1, few sets',
)
def smea(geometry: _geometry.Geometry, *, num_byzantine: int) -> jax.Array:
  """Returns the mean of the C - f rows that spread least in any direction.

  The spread of a set is the largest eigenvalue of its covariance, computed
  from its inner products and not by power iteration, so that the result is
  the same every time. Of equal ones the set that comes first in the order of
  its rows is kept. A row with a NaN or an infinity spoils every set that it
  is in; with more of them than `num_byzantine` the mean of all others is
  returned.

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows to leave out; below C / 2, and so small that there
      are no more than 10,000 sets.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is below 2 f + 1 or there are too many sets.

  Reference: Allouah, Guerraoui, Gupta, Pinot, Stephan. On the Privacy-
  Robustness-Utility Trilemma in Distributed Learning. ICML 2023.
  """
  sq_dists = geometry.sq_dists
  count = geometry.finite.size - num_byzantine

  def top_eigenvalue(kept):
    pairs = kept[:, None] & kept[None, :]
    inside = jnp.where(pairs, sq_dists, 0.0)
    largest = jnp.max(inside)
    usable = jnp.isfinite(largest)
    # Of size 1, so that neither tiny nor huge rows trouble the eigenvalues.
    scale = jnp.where(usable & (largest > 0), largest, 1.0)
    inside = jnp.where(usable, inside / scale, 0.0)
    # Inner products about the mean, from distances: double centering.
    means = jnp.sum(inside, axis=1) / count
    inside = inside - means[:, None] - means[None, :] + jnp.sum(means) / count
    products = jnp.where(pairs, -0.5 * inside, 0.0)
    top = jnp.linalg.eigvalsh(products)[-1] / count
    return jnp.where(usable, top * scale, jnp.inf)

  return _mean_of_best(top_eigenvalue, geometry.finite, num_byzantine)


def _mean_of_best(
  cost: Callable[[types.RowMask], jax.Array],
  finite: types.RowMask,
  num_byzantine: int,
) -> jax.Array:
  """Returns equal shares [C] of the first set of least finite cost."""
  removed = jnp.asarray(_removed_rows(finite.size, num_byzantine))

  def kept(rows):
    return jnp.ones(finite.size, bool).at[rows].set(False)

  batch = max(_BATCH // finite.size**2, 1)
  costs = lax.map(lambda rows: cost(kept(rows)), removed, batch_size=batch)
  best = jnp.argmin(costs)
  # With too many bad rows every set holds one.
  chosen = jnp.where(jnp.isfinite(costs[best]), kept(removed[best]), True)
  return _base.normalized(chosen & finite)


@functools.lru_cache(maxsize=8)
def _removed_rows(size: int, count: int) -> np.ndarray:
  """Returns [sets, count] rows to leave out, in the order of those kept."""
  sets = list(itertools.combinations(range(size), count))
  # The first rows kept are the last rows removed.
  return np.array(sets[::-1], np.int32).reshape(len(sets), count)
