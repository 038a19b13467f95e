"""A rule that selects clients layer by layer: LASA."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety import _tiles, _validate, tree, types
from fedjax_safety.aggregators import _base, _rule, _scale, _top

# Shares of signs closer than this, and norms relative to their median,
# differ by rounding alone.
_RESOLUTION = 1e-6


def _check_lasa(
  cohort_size: int,
  *,
  sparsity: float,
  max_norm_score: float,
  max_sign_score: float,
  stacked_layers: bool,
) -> None:
  del stacked_layers
  _validate.in_range(3, float('inf'), cohort_size=cohort_size)
  _validate.in_range(0, 0.999, sparsity=sparsity)
  scores = {'max_norm_score': max_norm_score, 'max_sign_score': max_sign_score}
  for name, value in scores.items():
    if isinstance(value, (int, float)):
      _validate.positive(**{name: value})


@_rule.whole(
  check=_check_lasa,
  paper='Xu et al., WACV 2025',
  guarantee='none as (f, κ); no layer is longer than the median row',
  cost='C P, about 35 reads',
  needs='n ≥ 3, layers as leaves or an axis',
  acts_on='factors',
)
def lasa(
  deltas: types.Deltas,
  *,
  sparsity: float = 0.3,
  max_norm_score: float = 1.0,
  max_sign_score: float = 1.0,
  stacked_layers: bool = False,
) -> _base.RuleOutput:
  """Returns, for every layer, the mean of the rows that look alike in it.

  Rows are clipped to the median norm and lose their smallest coordinates.
  Of what is left, every layer of a row has a norm and a purity of sign,
  `(1 + (1 - sparsity) * sum(sign) / sum(|sign|)) / 2`. A row counts in a
  layer if both lie closer to their medians over the rows than a number of
  standard deviations; if none does, all finite rows count. The mean is over
  the sparse rows, as in the authors' program.

  Coordinates that tie for the last place all stay. A row with a NaN or an
  infinity counts nowhere. A client's share is its mean share over the
  coordinates, after selection and before clipping.

  Args:
    deltas: stacked tree, leaves [C, ...], C at least 3.
    sparsity: share of a row's coordinates, the smallest, that are zeroed;
      static.
    max_norm_score: distance from the median norm, in standard deviations.
    max_sign_score: distance from the median purity, in standard deviations.
    stacked_layers: whether leaves are [C, layers, ...] and each index of the
      second axis is a layer; otherwise each leaf is one. Static.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is below 3, a number is out of its range or a leaf has
      no axis of layers.

  Reference: Xu, Zhang, Hu. Achieving Byzantine-Resilient Federated Learning
  via Layer-Adaptive Sparsified Model Aggregation. WACV 2025.
  """
  leaves, structure = jax.tree.flatten(deltas)
  if stacked_layers and min(leaf.ndim for leaf in leaves) < 2:
    raise ValueError(
      'stacked_layers=True needs leaves [C, layers, ...]; got a leaf [C]'
    )
  finite, norms = tree.finite_rows(deltas), tree.row_norms(deltas)
  factors = _scale.clip_factors(norms, _scale.median(norms, finite))
  whole = sum(leaf[0].size for leaf in leaves)
  cutoff = _top.cutoffs(leaves, max(int((1 - sparsity) * whole), 1))
  scored = functools.partial(
    _counting,
    finite=finite,
    keep_share=1 - sparsity,
    limits=(max_norm_score, max_sign_score),
  )
  combined, total_shares = [], jnp.zeros(finite.size)
  for leaf in leaves:
    # An axis of layers of length 1 where the leaf is one layer.
    layered = leaf if stacked_layers else leaf[:, None]
    shares = scored(_sums_of_layers(layered, cutoff, factors))
    coefficients = shares * factors[:, None]
    sparse = _sparse(layered, cutoff)
    combined.append(_mix_layers(coefficients, sparse, leaf))
    total_shares += jnp.mean(shares, axis=1) * (leaf[0].size / whole)
  delta = jax.tree.unflatten(structure, combined)
  return _base.RuleOutput(delta, _base.normalized(total_shares), finite)


class _Sums(NamedTuple):
  """Sums [C, layers] over what is left of the layers of clipped rows."""

  squares: jax.Array
  signs: jax.Array
  num_signs: jax.Array


def _sparse(layered: jax.Array, cutoff: jax.Array) -> jax.Array:
  """Replaces by 0 what is small or not finite, in rows [C, layers, ...]."""
  large = _top.magnitudes(layered) >= _top.spread(cutoff, layered)
  return jnp.where(large, tree.finite_part(layered), 0.0)


def _sums_of_layers(layered: jax.Array, cutoff, factors) -> _Sums:
  """Returns what layers are judged by, of sparse rows times factors."""

  def summands(layered):
    sparse = _sparse(layered, cutoff) * _top.spread(factors, layered)
    signs = jnp.sign(sparse)
    return _Sums(jnp.square(sparse), signs, jnp.abs(signs))

  return _tiles.row_sums(summands, layered, num_column_axes=layered.ndim - 2)


def _counting(sums: _Sums, *, finite, keep_share, limits) -> jax.Array:
  """Returns the rows' shares [C, layers] in a leaf [C, layers, ...]."""
  norms = tree.safe_sqrt(sums.squares)
  purity = 0.5 * (1 + keep_share * sums.signs / jnp.maximum(sums.num_signs, 1))

  def shares_of_layer(norms, purity):
    resolution = _RESOLUTION * _scale.median(norms, finite)
    common = _scale.median_scores(norms, finite, resolution) < limits[0]
    alike = _scale.median_scores(purity, finite, _RESOLUTION) < limits[1]
    both = finite & common & alike
    return _base.normalized(jnp.where(jnp.any(both), both, finite))

  return jax.vmap(shares_of_layer, in_axes=1, out_axes=1)(norms, purity)


def _mix_layers(
  coefficients: jax.Array, sparse: jax.Array, leaf: jax.Array
) -> jax.Array:
  """Combines rows [C, layers, ...] by coefficients [C, layers]."""
  terms = [
    _top.spread(coefficient, row) * row
    for coefficient, row in zip(coefficients, tree.rows(sparse), strict=True)
  ]
  return tree.total(terms).reshape(leaf.shape[1:]).astype(leaf.dtype)
