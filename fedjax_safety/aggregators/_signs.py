"""Rules that compare the signs of the clients' coordinates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety import _tiles, _validate, tree, types
from fedjax_safety.aggregators import (
  _base,
  _clusters,
  _rule,
  _scale,
  _top,
  _trust,
)

# Cosines and shares closer than this differ by rounding alone.
_RESOLUTION = 1e-6
_VARIANTS = ('movement', 'paper')


def _check_signguard(
  cohort_size: int,
  *,
  sample_fraction: float,
  min_norm: float,
  max_norm: float,
) -> None:
  del cohort_size
  _validate.positive(sample_fraction=sample_fraction)
  _validate.in_range(0, 1, sample_fraction=sample_fraction)
  if isinstance(min_norm, (int, float)):
    _validate.in_range(0, 0.99, min_norm=min_norm)
  if isinstance(max_norm, (int, float)):
    _validate.in_range(1.01, float('inf'), max_norm=max_norm)


@_rule.whole(
  check=_check_signguard,
  paper='Xu et al., ICDCS 2022',
  guarantee='none as (f, κ)',
  cost='C P, four reads',
  needs='n ≥ 2f + 1, a key',
  acts_on='factors',
)
def signguard(
  deltas: types.Deltas,
  *,
  key: types.PRNGKey,
  sample_fraction: float = 0.1,
  min_norm: float = 0.1,
  max_norm: float = 3.0,
) -> _base.RuleOutput:
  """Returns the clipped mean of rows with common norms and common signs.

  Kept are the rows whose norm lies strictly between `min_norm` and `max_norm`
  times the median norm and which are in the largest cluster by signs: the
  shares of positive, zero and negative values among a random run of
  neighboring coordinates (in the order of the flattened leaves), each
  relative to its largest. The rows kept are clipped to the median norm and
  averaged; if the two filters agree on nobody, the first one decides.

  Clusters are those of mean shift with a flat kernel, whose bandwidth is the
  mean distance to the nearest half of the rows, as in the authors' program;
  but it starts from every row instead of from bins. Of equally large
  clusters the denser one is kept, then the one of the lowest row. Rows with
  a NaN or an infinity are left out of all of it.

  Args:
    deltas: stacked tree, leaves [C, ...].
    key: places the run of coordinates; unused when it holds all P.
    sample_fraction: length of the run relative to P; static.
    min_norm: relative to the median norm, below 1.
    max_norm: relative to the median norm, above 1.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if a number is out of its range.

  Reference: Xu, Huang, Song, Lan. Byzantine-robust Federated Learning through
  Collaborative Malicious Gradient Filtering. ICDCS 2022.
  """
  finite, norms = tree.finite_rows(deltas), tree.row_norms(deltas)
  middle = _scale.median(norms, finite)
  common = finite & (norms > min_norm * middle) & (norms < max_norm * middle)
  features = _sign_shares(jax.tree.leaves(deltas), key, sample_fraction)
  largest = jnp.max(jnp.where(finite[:, None], features, 0.0), axis=0)
  alike = _clusters.largest_mode(features / (largest + 1e-8), finite)
  both = common & alike
  shares = _base.normalized(jnp.where(jnp.any(both), both, common))
  factors = _scale.clip_factors(norms, middle)
  return _base.RuleOutput(tree.mix(shares * factors, deltas), shares, finite)


def _sign_shares(
  leaves: list[jax.Array], key: types.PRNGKey, fraction: float
) -> jax.Array:
  """Returns the shares [C, 3] of positive, zero and negative values."""
  whole = sum(leaf[0].size for leaf in leaves)
  length = max(int(fraction * whole), 1)
  start = jax.random.randint(key, (), 0, whole - length + 1)

  def signs(place, leaf):
    inside = (place >= start) & (place < start + length)
    return [inside & (leaf > 0), inside & (leaf == 0), inside & (leaf < 0)]

  counts, offset = [], 0
  for leaf in leaves:
    place = offset + jnp.arange(leaf[0].size).reshape(leaf.shape[1:])
    found = _tiles.row_sums(signs, place, leaf, num_column_axes=leaf.ndim - 1)
    counts.append(jnp.stack(found, 1))
    offset += leaf[0].size
  return tree.total(counts).astype(jnp.float32) / length


def _check_alignins(
  cohort_size: int,
  *,
  top_fraction: float,
  max_angle_score: float,
  max_sign_score: float,
  variant: str,
) -> None:
  _validate.in_range(3, float('inf'), cohort_size=cohort_size)
  _validate.positive(top_fraction=top_fraction)
  _validate.in_range(0, 1, top_fraction=top_fraction)
  _validate.one_of(_VARIANTS, variant=variant)
  scores = {
    'max_angle_score': max_angle_score,
    'max_sign_score': max_sign_score,
  }
  for name, value in scores.items():
    if isinstance(value, (int, float)):
      _validate.positive(**{name: value})


@_rule.stateful(
  check=_check_alignins,
  paper='Xu et al., CVPR 2025',
  guarantee='none as (f, κ); no longer than the median of the rows kept',
  cost='C P, about 35 reads',
  needs='n ≥ 3',
  acts_on='factors',
)
def alignins(
  cohort_size: int,
  *,
  top_fraction: float = 0.3,
  max_angle_score: float = 1.0,
  max_sign_score: float = 1.0,
  variant: str = 'movement',
) -> _base.Aggregator:
  """Returns the clipped mean of rows that point and sign like the others.

  Two numbers are taken of every row: its cosine to the global model, and the
  share of its largest coordinates whose sign is that of the majority. A row
  is kept if both lie closer to their medians than a number of standard
  deviations. The rows kept are clipped to their median norm (of an even
  number the lower middle one) and averaged; if none is, the delta is 0.
  Coordinates that tie for the last of the largest count in part. A client's
  share is that of the rows kept; a row with a NaN or an infinity has none
  and is left out of medians, deviations and majorities.

  The global model is a state: deltas that the rule returned add up on what
  it starts from. That is exact where the server adds the delta as it is; a
  constant factor does not matter for `movement`. Called with deltas it runs
  the first round.

  Args:
    deltas: stacked tree, leaves [C, ...], C at least 3.
    top_fraction: largest coordinates of a row relative to P; static.
    max_angle_score: distance from the median cosine, in standard deviations.
    max_sign_score: distance from the median share, in standard deviations.
    variant: `movement` compares to how far the adapter has moved since the
      first round, in which every cosine is 0: a new adapter is random and
      says nothing. `paper` compares to the model itself, which starts as the
      adapter that `init` is given; use it with `build`.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is below 3, or a number or the variant is unknown.

  Reference: Xu, Zhang, Hu. Detecting Backdoor Attacks in Federated Learning
  via Direction Alignment Inspection. CVPR 2025.
  """
  resting = variant == 'movement'

  def init(adapter):
    return jax.tree.map(
      lambda x: (
        jnp.zeros_like(x, jnp.float32) if resting else x.astype(jnp.float32)
      ),
      adapter,
    )

  def update(deltas, model, **_):
    finite, norms = tree.finite_rows(deltas), tree.row_norms(deltas)
    finite &= jnp.isfinite(norms)
    angles = _trust.cosines_to(model, deltas, norms)
    signs = _majority_shares(jax.tree.leaves(deltas), finite, top_fraction)
    kept = finite
    for values, most in (angles, max_angle_score), (signs, max_sign_score):
      kept &= _scale.median_scores(values, finite, _RESOLUTION) < most
    factors = _scale.clip_factors(norms, _scale.lower_median(norms, kept))
    shares = _base.normalized(kept)
    delta = tree.mix(shares * factors, deltas)
    model = jax.tree.map(lambda x, d: x + d.astype(jnp.float32), model, delta)
    return _base.RuleOutput(delta, shares, finite), model

  return _base.stateful(init, update, cohort_size=cohort_size)


class _Agreement(NamedTuple):
  """Counts [C] of coordinates beyond and at the cut-off, and that agree."""

  beyond: jax.Array
  beyond_agreeing: jax.Array
  tied: jax.Array
  tied_agreeing: jax.Array


def _majority_shares(
  leaves: list[jax.Array], finite: types.RowMask, fraction: float
) -> jax.Array:
  """Returns the shares [C] of top coordinates with the majority's sign."""
  count = max(int(fraction * sum(leaf[0].size for leaf in leaves)), 1)
  cutoff = _top.cutoffs(leaves, count)

  def agreement(leaf):
    """Marks coordinates; on a CPU, of some columns of a leaf."""
    signs = jnp.sign(leaf.astype(jnp.float32))
    counted = jnp.where(_top.spread(finite, leaf), signs, 0.0)
    # Summed as an axis: in terms, the majority would be found for each row.
    agreeing = signs == jnp.sign(jnp.sum(counted, axis=0))
    size, bound = _top.magnitudes(leaf), _top.spread(cutoff, leaf)
    groups = (size > bound, (size > bound) & agreeing)
    groups += (size == bound, (size == bound) & agreeing)
    return _Agreement(*groups)

  parts = [
    _tiles.row_sums(agreement, leaf, num_column_axes=leaf.ndim - 1)
    for leaf in leaves
  ]
  whole = jax.tree.map(lambda *counts: tree.total(counts), *parts)
  # Tied coordinates share the places that are left.
  part = (count - whole.beyond) / jnp.maximum(whole.tied, 1)
  return (whole.beyond_agreeing + part * whole.tied_agreeing) / count
