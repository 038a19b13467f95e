"""Rules that keep one cluster of angles: FLAME and clipped clustering."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import (
  _base,
  _clusters,
  _geometry,
  _noise,
  _rule,
  _scale,
)


def _check_flame(cohort_size: int, *, noise_multiplier: float) -> None:
  del cohort_size
  if isinstance(noise_multiplier, (int, float)):
    _validate.non_negative(noise_multiplier=noise_multiplier)


@_rule.whole(
  check=_check_flame,
  paper='Nguyen et al., USENIX Security 2022',
  guarantee='none as (f, κ); noise for backdoors',
  cost='C² P, three reads',
  needs='n ≥ 2f + 1, a key',
  acts_on='factors',
)
def flame(
  deltas: types.Deltas,
  *,
  key: types.PRNGKey,
  noise_multiplier: float = 0.001,
) -> _base.RuleOutput:
  """Returns the clipped mean of the tightest majority by angle, plus noise.

  Rows are clustered by the cosine distances of their deltas, with a least
  cluster of `floor(C / 2) + 1` rows. With that size HDBSCAN (`min_samples`
  1, one cluster allowed) has a closed form, which is computed exactly: its
  cluster is the first of that size which single linkage makes, with whatever
  joins at the same distance. The rows in it are clipped to the median norm
  of all finite rows, kept or not, and averaged.

  Gaussian noise of standard deviation `noise_multiplier` times that median
  norm is added to every coordinate. The paper measures angles between whole
  models; here they are between deltas, which do not share the model before
  the round and so tell clients apart. A client's share is that of the rows
  kept.

  Args:
    deltas: stacked tree, leaves [C, ...].
    key: draws the noise.
    noise_multiplier: noise in units of the median norm, the paper's lambda,
      `sqrt(2 log(1.25 / delta)) / epsilon`; 0 adds none.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if `noise_multiplier` is negative.

  Reference: Nguyen, Rieger, Chen et al. FLAME: Taming Backdoors in Federated
  Learning. USENIX Security 2022.
  """
  geometry = _geometry.measure(deltas)
  finite = geometry.finite
  kept = _clusters.smallest_of_size(
    _clusters.cosine_dists(geometry), finite, finite.size // 2 + 1
  )
  norms = _geometry.norms(geometry)
  bound = _scale.median(norms, finite)
  shares = _base.normalized(kept)
  delta = tree.mix(shares * _scale.clip_factors(norms, bound), deltas)
  if not isinstance(noise_multiplier, (int, float)) or noise_multiplier > 0:
    delta = _noise.add(delta, noise_multiplier * bound, key)
  return _base.RuleOutput(delta, shares, finite)


class NormHistory(NamedTuple):
  """What clipped clustering carries from round to round.

  Attributes:
    norms: [rounds, C] float32 norms of past rows, the oldest replaced first;
      +inf where none is recorded.
    num_rounds: `int32[]`, rounds so far.
  """

  norms: jax.Array
  num_rounds: jax.Array


def _check_clipped_clustering(cohort_size: int, *, num_rounds: int) -> None:
  _validate.in_range(3, float('inf'), cohort_size=cohort_size)
  _validate.positive(num_rounds=num_rounds)


@_rule.stateful(
  check=_check_clipped_clustering,
  paper='Li, Ngai, Voigt, IEEE TBD 2023',
  guarantee='none proven',
  cost='C² P, three reads',
  needs='n ≥ 2f + 1 and n ≥ 3',
  acts_on='factors',
)
def clipped_clustering(
  cohort_size: int, *, num_rounds: int = 64
) -> _base.Aggregator:
  """Returns the mean of the larger of two clusters by angle, clipped.

  Rows are clipped to the median of the norms seen so far, this round's
  included, and split in two by average linkage on their cosine distances;
  the larger cluster is averaged. Of equal ones it is the cluster with the
  lowest row, and equal distances merge the lowest rows first. A client's
  share is that of the rows kept.

  The norms of the last `num_rounds` rounds are remembered, where the paper
  remembers all. A row with a NaN or an infinity is in no cluster and leaves
  no norm behind. Called with deltas it runs the first round.

  Args:
    deltas: stacked tree, leaves [C, ...], C at least 3.
    num_rounds: rounds whose norms are remembered; static.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is below 3.

  Reference: Li, Ngai, Voigt. An Experimental Study of Byzantine-Robust
  Aggregation Schemes in Federated Learning. IEEE Transactions on Big Data
  2023.
  """

  def init(adapter):
    del adapter
    empty = jnp.full((num_rounds, cohort_size), jnp.inf)
    return NormHistory(empty, jnp.zeros((), jnp.int32))

  def update(deltas, state, **_):
    geometry = _geometry.measure(deltas)
    finite, norms = geometry.finite, _geometry.norms(geometry)
    seen = state.norms.at[state.num_rounds % num_rounds].set(norms)
    known = jnp.ravel(seen)
    bound = _scale.median(known, jnp.isfinite(known))
    kept = _clusters.larger_of_two(_clusters.cosine_dists(geometry), finite)
    shares = _base.normalized(kept)
    delta = tree.mix(shares * _scale.clip_factors(norms, bound), deltas)
    output = _base.RuleOutput(delta, shares, finite)
    return output, NormHistory(seen, state.num_rounds + 1)

  return _base.stateful(init, update, cohort_size=cohort_size)
