"""Rules that select whole rows by their distances: Krum and multi-Krum.

Published programs disagree about the neighbors that a score counts, and each
reading has a name here, `variant`:

  paper       f + 2 clients are left out of a row's n - f - 2 neighbors;
              squared distances; needs n >= 2f + 3 (Blanchard et al., 2017).
  byzfl       n - f - 1 neighbors, squared distances; needs n >= 2f + 1 (the
              ByzFL library). The bound of Allouah et al., AISTATS 2023,
              κ = 6(1 + f/(n−2f)), needs as many neighbors; with one less the
              same argument gives 6(1 + (f+1)/(n−2f−1)).
  openfedllm  the row itself and its n - f - 1 nearest neighbors, distances
              not squared; multi-Krum then averages the neighborhood of the
              best row rather than the best rows. No bound is checked beyond
              n > f, as the experiments of Ye et al., ICLR 2025, run 3 clients
              with 1 Byzantine.
"""

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, types
from fedjax_safety.aggregators import _base, _geometry, _rule

_VARIANTS = ('paper', 'byzfl', 'openfedllm')


def _check_bound(cohort_size: int, num_byzantine: int, variant: str) -> None:
  """Raises unless the cohort is large enough for the variant."""
  factor, offset = {'paper': (2, 3), 'byzfl': (2, 1), 'openfedllm': (1, 1)}[
    variant
  ]
  _validate.byzantine_bound(
    f'krum, variant {variant}', num_byzantine, cohort_size, factor, offset
  )


def _check_krum(cohort_size: int, *, num_byzantine: int, variant: str) -> None:
  _validate.one_of(_VARIANTS[:2], variant=variant)
  _check_bound(cohort_size, num_byzantine, variant)


def _check_multi_krum(
  cohort_size: int,
  *,
  num_byzantine: int,
  num_selected: int | None,
  variant: str,
) -> None:
  _validate.one_of(_VARIANTS, variant=variant)
  _check_bound(cohort_size, num_byzantine, variant)
  most = cohort_size - num_byzantine
  if num_selected is None:
    return
  _validate.in_range(1, most, num_selected=num_selected)
  if variant == 'openfedllm' and num_selected != most:
    raise ValueError(
      f'num_selected={num_selected} must be cohort_size - num_byzantine = '
      f'{most} (multi_krum, variant openfedllm); leave it out'
    )


@_rule.affine(
  check=_check_krum,
  paper='Blanchard et al., NeurIPS 2017',
  guarantee='(f, κ), κ = 6(1 + (f+1)/(n−2f−1)), own proof',
  needs='n ≥ 2f + 3',
)
def krum(
  geometry: _geometry.Geometry,
  *,
  num_byzantine: int,
  variant: str = 'paper',
) -> jax.Array:
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
  return _select(geometry, num_byzantine, 1, variant)


@_rule.affine(
  check=_check_multi_krum,
  paper='Blanchard et al., NeurIPS 2017',
  guarantee='(f, κ), κ = 6(1 + (f+1)/(n−2f−1)), own proof',
  needs='n ≥ 2f + 3',
)
def multi_krum(
  geometry: _geometry.Geometry,
  *,
  num_byzantine: int,
  num_selected: int | None = None,
  variant: str = 'paper',
) -> jax.Array:
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
  return _select(geometry, num_byzantine, num_selected, variant)


def _select(
  geometry: _geometry.Geometry,
  num_byzantine: int,
  num_selected: int | None,
  variant: str,
) -> jax.Array:
  """Returns equal shares [C] of the rows with the lowest scores."""
  sq_dists, finite = geometry.sq_dists, geometry.finite
  neighbors = finite.size - num_byzantine
  if variant == 'openfedllm':
    return _base.normalized(_best_neighborhood(sq_dists, finite, neighbors))
  neighbors -= 2 if variant == 'paper' else 1
  if num_selected is None:
    num_selected = finite.size - num_byzantine
    num_selected -= 2 if variant == 'paper' else 0
  # The nearest of all is the row itself, at distance 0.
  nearest = jnp.sort(sq_dists, axis=1)[:, 1 : neighbors + 1]
  scores = jnp.sum(nearest, axis=1)
  return _base.normalized(_base.keep_lowest(scores, finite, num_selected))


def _best_neighborhood(
  sq_dists: jax.Array, finite: types.RowMask, count: int
) -> types.RowMask:
  """Marks the row with the closest `count` - 1 neighbors, and those."""
  dists = jnp.sqrt(sq_dists)
  scores = jnp.sum(jnp.sort(dists, axis=1)[:, :count], axis=1)
  best = jnp.argmax(_base.keep_lowest(scores, finite, 1))
  return _base.keep_lowest(dists[best], finite, count)
