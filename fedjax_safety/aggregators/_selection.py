"""Rules that select whole rows by their distances: Krum and multi-Krum.

Published programs disagree about the neighbors that a score counts, and each
reading has a name here, `variant`:

  paper       f + 2 clients are left out of a row's n - f - 2 neighbors;
              squared distances; needs n >= 2f + 3 (Blanchard et al., 2017).
  byzfl       n - f - 1 neighbors, squared distances; needs n >= 2f + 1 (the
              ByzFL library).
  openfedllm  the row itself and its n - f - 1 nearest neighbors, distances
              not squared; multi-Krum then averages the neighborhood of the
              best row rather than the best rows. No bound is checked beyond
              n > f, as the experiments of Ye et al., ICLR 2025, run 3 clients
              with 1 Byzantine.
"""

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base

_VARIANTS = ('paper', 'byzfl', 'openfedllm')


def krum(
  deltas: types.Deltas, *, num_byzantine: int, variant: str = 'paper'
) -> types.Adapter:
  """Returns the row that lies closest to its nearest neighbors.

  The result is one of the rows, bit by bit. Equal scores go to the lowest
  row. A row with a NaN or an infinity is infinitely far from all others and
  is never returned; if all are, the delta is 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators
    >>> deltas = jnp.array([[1.0], [1.5], [1e6], [1.75], [3.0]])
    >>> print(aggregators.krum(deltas, num_byzantine=1))
    [1.5]

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows that may be arbitrary.
    variant: `paper` or `byzfl`, see the head of this module.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is too small for `num_byzantine`.

  Reference: Blanchard, El Mhamdi, Guerraoui, Stainer. Machine Learning with
  Adversaries: Byzantine Tolerant Gradient Descent. NeurIPS 2017.
  """
  _check_krum(tree.cohort_size(deltas), num_byzantine, variant)
  return _select(deltas, num_byzantine, 1, variant).delta


def multi_krum(
  deltas: types.Deltas,
  *,
  num_byzantine: int,
  num_selected: int | None = None,
  variant: str = 'paper',
) -> types.Adapter:
  """Returns the mean of the rows that lie closest to their neighbors.

  Equal scores go to the lowest row. A row with a NaN or an infinity is
  infinitely far from all others and is never selected.

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows that may be arbitrary.
    num_selected: rows to average, from 1 (which is Krum) to C - f; None means
      C - f - 2 for `paper` and C - f for the other variants. `openfedllm`
      has no other value.
    variant: `paper`, `byzfl` or `openfedllm`, see the head of this module.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is too small for `num_byzantine`, or `num_selected` is
      out of range.

  Reference: Blanchard, El Mhamdi, Guerraoui, Stainer. Machine Learning with
  Adversaries: Byzantine Tolerant Gradient Descent. NeurIPS 2017.
  """
  count = _check_multi_krum(
    tree.cohort_size(deltas), num_byzantine, num_selected, variant
  )
  return _select(deltas, num_byzantine, count, variant).delta


def build_krum(
  cohort_size: int, *, num_byzantine: int, variant: str = 'paper'
) -> _base.Aggregator:
  """Builds Krum."""
  _check_krum(cohort_size, num_byzantine, variant)
  return _base.stateless(
    lambda deltas, weights, key: _select(deltas, num_byzantine, 1, variant),
    cohort_size=cohort_size,
  )


def build_multi_krum(
  cohort_size: int,
  *,
  num_byzantine: int,
  num_selected: int | None = None,
  variant: str = 'paper',
) -> _base.Aggregator:
  """Builds multi-Krum."""
  count = _check_multi_krum(cohort_size, num_byzantine, num_selected, variant)
  return _base.stateless(
    lambda deltas, weights, key: _select(deltas, num_byzantine, count, variant),
    cohort_size=cohort_size,
  )


def _check_bound(cohort_size: int, num_byzantine: int, variant: str) -> None:
  """Raises unless the cohort is large enough for the variant."""
  factor, offset = {'paper': (2, 3), 'byzfl': (2, 1), 'openfedllm': (1, 1)}[
    variant
  ]
  _validate.byzantine_bound(
    f'krum, variant {variant}', num_byzantine, cohort_size, factor, offset
  )


def _check_krum(cohort_size: int, num_byzantine: int, variant: str) -> None:
  _validate.one_of(_VARIANTS[:2], variant=variant)
  _check_bound(cohort_size, num_byzantine, variant)


def _check_multi_krum(
  cohort_size: int,
  num_byzantine: int,
  num_selected: int | None,
  variant: str,
) -> int:
  """Returns the number of rows to average, checked."""
  _validate.one_of(_VARIANTS, variant=variant)
  _check_bound(cohort_size, num_byzantine, variant)
  most = cohort_size - num_byzantine
  if num_selected is None:
    return most - 2 if variant == 'paper' else most
  _validate.in_range(1, most, num_selected=num_selected)
  if variant == 'openfedllm' and num_selected != most:
    raise ValueError(
      f'num_selected={num_selected} must be cohort_size - num_byzantine = '
      f'{most} (multi_krum, variant openfedllm); leave it out'
    )
  return num_selected


def _select(
  deltas: types.Deltas, num_byzantine: int, count: int, variant: str
) -> _base.RuleOutput:
  """Selects `count` rows by the variant's score and averages them."""
  sq_dists = tree.pairwise_sq_dists(deltas)
  finite = jnp.isfinite(jnp.diagonal(sq_dists))
  if variant == 'openfedllm':
    kept = _best_neighborhood(sq_dists, finite, count)
  else:
    neighbors = sq_dists.shape[0] - num_byzantine
    neighbors -= 2 if variant == 'paper' else 1
    # The nearest of all is the row itself, at distance 0.
    nearest = jnp.sort(sq_dists, axis=1)[:, 1 : neighbors + 1]
    kept = _base.keep_lowest(jnp.sum(nearest, axis=1), finite, count)
  shares = _base.normalized(kept)
  return _base.RuleOutput(tree.mix(shares, deltas), shares, finite)


def _best_neighborhood(
  sq_dists: jax.Array, finite: types.RowMask, count: int
) -> types.RowMask:
  """Marks the row with the closest `count` - 1 neighbors, and those."""
  dists = jnp.sqrt(sq_dists)
  scores = jnp.sum(jnp.sort(dists, axis=1)[:, :count], axis=1)
  best = jnp.argmax(_base.keep_lowest(scores, finite, 1))
  return _base.keep_lowest(dists[best], finite, count)
