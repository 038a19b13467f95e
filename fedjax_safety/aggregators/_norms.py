"""Rules that judge a row by one length: its norm, or its distance from a
trusted row."""

import jax

from fedjax_safety import _validate
from fedjax_safety.aggregators import _base, _geometry, _rule, _scale


def _check_norm_bounded_mean(cohort_size: int, *, max_norm: float) -> None:
  del cohort_size
  if isinstance(max_norm, (int, float)):
    _validate.positive(max_norm=max_norm)


@_rule.affine(
  check=_check_norm_bounded_mean,
  paper='Sun et al., 2019',
  guarantee='a row moves the delta by max_norm/n at most',
  needs='the scale of honest norms',
)
def norm_bounded_mean(
  geometry: _geometry.Geometry, *, max_norm: float
) -> jax.Array:
  """Returns the mean of the rows, the long ones scaled down to a norm.

  No row moves the result by more than `max_norm / C`, but rows that agree add
  up. A row with a NaN or an infinity is left out of the mean.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [-1e9], [2.0], [3.0]])
    >>> print(aggregators.norm_bounded_mean(deltas, max_norm=2.0))
    [0.75]

  Args:
    deltas: stacked tree, leaves [C, ...].
    max_norm: largest Euclidean norm of a row over all leaves, in the unit of
      the deltas.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if `max_norm` is not positive.

  Reference: Sun, Kairouz, Suresh, McMahan. Can You Really Backdoor Federated
  Learning? arXiv 1911.07963, 2019.
  """
  factors = _scale.clip_factors(_geometry.norms(geometry), max_norm)
  return factors * _base.normalized(geometry.finite)


@_rule.affine(
  check=_rule.at_least('cge', 2, 1),
  paper='Gupta, Liu, Vaidya, 2021',
  guarantee='under bounded spread and small f/n',
  needs='n ≥ 2f + 1',
)
def cge(geometry: _geometry.Geometry, *, num_byzantine: int) -> jax.Array:
  """Returns the mean of the rows of least norm: gradient elimination.

  The `num_byzantine` longest rows are left out. What is kept may point
  anywhere, but is no longer than the longest honest row. Equal norms keep
  the lowest row. A row with a NaN or an infinity counts as longest.

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows to leave out; below C / 2.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is below 2 f + 1.

  Reference: Gupta, Liu, Vaidya. Byzantine Fault-Tolerant Distributed Machine
  Learning with Norm-Based Comparative Gradient Elimination. DSN-W 2021.
  """
  finite = geometry.finite
  kept = _base.keep_lowest(
    _geometry.norms(geometry), finite, finite.size - num_byzantine
  )
  return _base.normalized(kept)


def _check_monna(
  cohort_size: int, *, num_byzantine: int, trusted_row: int
) -> None:
  _validate.byzantine_bound('monna', num_byzantine, cohort_size, 2, 1)
  _validate.in_range(0, cohort_size - 1, trusted_row=trusted_row)


@_rule.affine(
  check=_check_monna,
  paper='Farhadkhani et al., ICML 2023',
  guarantee='error² ≤ 4f/(n−f) · mean sq. distance to the trusted row',
  needs='n ≥ 2f + 1, a trusted row',
)
def monna(
  geometry: _geometry.Geometry, *, num_byzantine: int, trusted_row: int = 0
) -> jax.Array:
  """Returns the mean of the C - f rows nearest to a trusted one.

  The trusted row is one of them; it must be honest, as the row of a client
  that aggregates for itself is. Equal distances keep the lowest row. A row
  with a NaN or an infinity is never kept; if the trusted row is one, nothing
  can be trusted and the delta is 0.

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows that may be arbitrary; below C / 2.
    trusted_row: place of the trusted row, in [0, C); static.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is below 2 f + 1 or there is no such row.

  Reference: Farhadkhani, Guerraoui, Gupta, Hoang, Pinot, Stephan. Robust
  Collaborative Learning with Linear Gradient Overhead. ICML 2023.
  """
  finite = geometry.finite
  # The trusted row comes first even where others are equal to it.
  scores = geometry.sq_dists[trusted_row].at[trusted_row].set(-1.0)
  kept = _base.keep_lowest(scores, finite, finite.size - num_byzantine)
  return _base.normalized(kept & finite[trusted_row])
