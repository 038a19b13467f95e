"""A rule that removes rows along the direction of largest spread: DnC."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _base, _rule


def _check_dnc(
  cohort_size: int,
  *,
  num_byzantine: int,
  num_iterations: int,
  filter_fraction: float,
  num_coordinates: int,
) -> None:
  _validate.byzantine_bound('dnc', num_byzantine, cohort_size, 2, 1)
  _validate.positive(
    num_iterations=num_iterations, num_coordinates=num_coordinates
  )
  _validate.non_negative(filter_fraction=filter_fraction)
  num_removed = math.floor(filter_fraction * num_byzantine)
  if num_removed >= cohort_size:
    raise ValueError(
      f'filter_fraction={filter_fraction} removes {num_removed} rows of '
      f'cohort_size={cohort_size} (dnc); at least one must be left'
    )


@_rule.whole(
  check=_check_dnc,
  paper='Shejwalkar, Houmansadr, NDSS 2021',
  guarantee='under bounded spread',
  cost='C² b + C P, two reads',
  needs='n ≥ 2f + 1, a key',
  acts_on='factors',
)
def dnc(
  deltas: types.Deltas,
  *,
  num_byzantine: int,
  key: types.PRNGKey,
  num_iterations: int = 1,
  filter_fraction: float = 1.0,
  num_coordinates: int = 10_000,
) -> _base.RuleOutput:
  """Returns the mean of the rows that no iteration calls outliers.

  Each iteration samples coordinates, projects the rows on the direction in
  which they spread most and calls the `floor(filter_fraction * f)` rows with
  the largest squared projections outliers. If no row passes every iteration,
  those that pass most are kept. Equal projections keep the lowest row. A row
  with a NaN or an infinity is an outlier in every iteration.

  Coordinates are drawn without replacement, one from each of
  `num_coordinates` runs of neighbors of equal length, in the order of the
  flattened leaves.

  Args:
    deltas: stacked tree, leaves [C, ...].
    num_byzantine: rows that may be arbitrary; below C / 2.
    key: picks the coordinates; unused when all P of them are taken.
    num_iterations: independent samples of coordinates.
    filter_fraction: outliers removed in an iteration, relative to
      `num_byzantine`; static.
    num_coordinates: coordinates in a sample; at least P takes all.

  Returns:
    The delta, leaves [...].

  Raises:
    ValueError: if C is too small for `num_byzantine` or the fraction.

  Reference: Shejwalkar, Houmansadr. Manipulating the Byzantine: Optimizing
  Model Poisoning Attacks and Defenses for Federated Learning. NDSS 2021.
  """
  finite = tree.finite_rows(deltas)
  count = finite.size - math.floor(filter_fraction * num_byzantine)
  leaves = jax.tree.leaves(deltas)

  def passes(sample):
    kept = _base.keep_lowest(_spread(sample, finite), finite, count)
    return kept.astype(jnp.int32)

  def sample_passes(subkey):
    return passes(_sample_coordinates(leaves, subkey, num_coordinates))

  if num_coordinates >= sum(leaf[0].size for leaf in leaves):
    passed = passes(leaves)  # every iteration would be the same
  else:
    subkeys = jax.random.split(key, num_iterations)
    passed = jnp.sum(jax.vmap(sample_passes)(subkeys), axis=0)
  kept = finite & (passed > 0) & (passed == jnp.max(passed))
  shares = _base.normalized(kept)
  return _base.RuleOutput(tree.mix(shares, deltas), shares, finite)


def _sample_coordinates(
  leaves: list[jax.Array], key: types.PRNGKey, count: int
) -> list[jax.Array]:
  """Samples one coordinate from each of `count` strata of the leaves.

  A stratum that reaches across the end of a leaf appears in both leaves, as
  zeros in the one that its coordinate does not fall into.
  """
  sizes = [leaf[0].size for leaf in leaves]
  bounds = np.arange(count + 1, dtype=np.int64) * sum(sizes) // count
  steps = jax.random.randint(key, (count,), 0, np.diff(bounds).astype(np.int32))
  samples, offset = [], 0
  for leaf, size in zip(leaves, sizes, strict=True):
    first = np.searchsorted(bounds, offset, side='right') - 1
    last = np.searchsorted(bounds[:-1], offset + size, side='left')
    local = (bounds[first:last] - offset).astype(np.int32) + steps[first:last]
    inside = (local >= 0) & (local < size)
    place = jnp.unravel_index(jnp.clip(local, 0, size - 1), leaf.shape[1:])
    samples.append(jnp.where(inside, leaf[(slice(None), *place)], 0.0))
    offset += size
  return samples


def _spread(sample: list[jax.Array], finite: types.RowMask) -> jax.Array:
  """Returns the squared projections [C] on the top singular direction.

  They are proportional to the squared entries of the top eigenvector of the
  centered rows' inner products, and only their order matters.
  """
  num_finite = jnp.maximum(jnp.sum(finite), 1).astype(jnp.float32)
  sample = [jnp.stack(_clean_rows(leaf, finite)) for leaf in sample]
  # Rows of any size must not overflow when squared.
  largest = jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in sample]).max()
  scale = jnp.where(largest > 0, largest, 1.0)

  def center(leaf):
    middle = tree.total(tree.rows(leaf)) / num_finite
    mask = jnp.reshape(finite, (-1,) + (1,) * (leaf.ndim - 1))
    return jnp.where(mask, leaf - middle, 0.0)

  products = tree.gram([center(leaf / scale) for leaf in sample])
  _, directions = jnp.linalg.eigh(products)
  return jnp.square(directions[:, -1])


def _clean_rows(leaf: jax.Array, finite: types.RowMask) -> list[jax.Array]:
  """Returns the float32 rows of a leaf, zeros for rows that are not finite."""
  return [
    jnp.where(finite[c], row, 0.0) for c, row in enumerate(tree.rows(leaf))
  ]
