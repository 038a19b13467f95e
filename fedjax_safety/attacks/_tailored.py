"""Attacks cut to one family of rules, with full knowledge of the round."""

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.attacks import _honest, _update


def fang_trimmed_mean(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  spread: float = 2.0,
) -> types.Deltas:
  """Sends values just beyond the honest ones, against the honest mean.

  Cut to the trimmed mean and the median. Where the mean of a coordinate is
  negative, values are uniform between the largest honest value and `spread`
  times it, or a `spread`-th of it if it is negative: above all honest ones.
  Elsewhere they lie below all honest ones in the same way. Honest rows are
  bit-identical; honest rows that are not finite are ignored, and if all are,
  nothing changes. A row's draws do not depend on the number of rows.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: draws the values.
    spread: factor, at least 1.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Reference: Fang, Cao, Jia, Gong. Local Model Poisoning Attacks to
  Byzantine-Robust Federated Learning. USENIX Security 2020.
  """
  honest = _honest.measure(deltas, is_malicious)
  lowest, highest = _honest.bounds(deltas, honest)
  draws = _update.draw_rows(key, deltas, jax.random.uniform)

  def place(draw, mean, low, high):
    above = jnp.where(high > 0, spread * high, high / spread)
    below = jnp.where(low > 0, low / spread, spread * low)
    near = jnp.where(mean < 0, high, low)
    far = jnp.where(mean < 0, above, below)
    return near + draw * (far - near)

  rows = jax.tree.map(place, draws, honest.mean, lowest, highest)
  return _honest.write_rows(deltas, is_malicious, honest, rows)


def fang_krum(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  num_byzantine: int | None = None,
  num_halvings: int = 20,
) -> types.Deltas:
  """Sends the largest step against the honest mean's signs that Krum selects.

  All malicious rows are `-step * sign(mean)`. The step starts at the paper's
  upper bound and is halved until Krum would select one of them, or
  `num_halvings` times: then Krum selects none, and the shortest is sent.
  Honest rows are bit-identical; honest rows that are not finite are ignored,
  and if all are, nothing changes.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    num_byzantine: what the server's Krum assumes; None for the truth.
    num_halvings: how often the step may be halved.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Raises:
    ValueError: if `num_byzantine` or `num_halvings` is negative.

  Reference: Fang, Cao, Jia, Gong. Local Model Poisoning Attacks to
  Byzantine-Robust Federated Learning. USENIX Security 2020.
  """
  del key
  _validate.non_negative(num_halvings=num_halvings)
  honest = _honest.measure(deltas, is_malicious)
  num_malicious = jnp.sum(is_malicious)
  if num_byzantine is None:
    num_byzantine = num_malicious
  else:
    _validate.non_negative(num_byzantine=num_byzantine)
  neighbors = jnp.maximum(is_malicious.size - num_byzantine - 2, 1)
  signs = jax.tree.map(jnp.sign, honest.mean)
  products = _products(deltas, honest, signs)

  def halve(_, step):
    sq_dists = _sq_dists(products, step, is_malicious, honest.usable)
    selected = jnp.argmin(_krum_scores(sq_dists, neighbors))
    return jnp.where(is_malicious[selected], step, 0.5 * step)

  num_parameters = sum(leaf.size for leaf in jax.tree.leaves(signs))
  start = _upper_bound(products, honest, num_malicious, num_parameters)
  step = jax.lax.fori_loop(0, num_halvings, halve, start)
  row = jax.tree.map(lambda sign: -step * sign, signs)
  return _honest.write(deltas, is_malicious, honest, row)


def _products(deltas, honest, signs) -> jax.Array:
  """Returns inner products of the deviations [C], the mean and the signs."""

  def append(away, mean, sign):
    return jnp.concatenate([away, mean[None], sign[None]])

  away = _honest.deviations(deltas, honest)
  return tree.gram(jax.tree.map(append, away, honest.mean, signs))


def _sq_dists(products, step, is_malicious, usable) -> jax.Array:
  """Returns [C, C] squared distances once the attack has this step.

  Rows at no known distance, and every row and itself, are at +inf.
  """
  size = is_malicious.size
  mean, signs = products[size], products[size + 1]
  squares = jnp.diagonal(products)[:size]
  among = squares[:, None] + squares[None, :] - 2 * products[:size, :size]
  # Of the deviation, the mean and the step along the signs, added up.
  across = squares + mean[size] + jnp.square(step) * signs[size + 1]
  across += 2 * (mean[:size] + step * (signs[:size] + signs[size]))
  across = jnp.where(usable, jnp.maximum(across, 0.0), jnp.inf)
  dists = jnp.where(is_malicious[None, :], across[:, None], across[None, :])
  dists = jnp.where(_pairs(usable), jnp.maximum(among, 0.0), dists)
  dists = jnp.where(_pairs(is_malicious), 0.0, dists)
  known = _pairs(usable | is_malicious) & ~jnp.eye(size, dtype=bool)
  return jnp.where(known, dists, jnp.inf)


def _pairs(mask: types.RowMask) -> jax.Array:
  """Returns [C, C] bool: both rows are in the mask."""
  return mask[:, None] & mask[None, :]


def _krum_scores(sq_dists: jax.Array, neighbors: jax.Array) -> jax.Array:
  """Returns each row's sum of its smallest squared distances."""
  nearest = jnp.arange(len(sq_dists)) < neighbors
  return jnp.sum(jnp.where(nearest, jnp.sort(sq_dists, axis=1), 0.0), axis=1)


def _upper_bound(products, honest, num_malicious, num_parameters) -> jax.Array:
  """Returns the step above which, by the paper, Krum selects none."""
  size = honest.usable.size
  nobody = jnp.zeros(size, bool)
  sq_dists = _sq_dists(products, 0.0, nobody, honest.usable)
  scores = _krum_scores(sq_dists, honest.count - 2)
  lowest = jnp.min(jnp.where(honest.usable, scores, jnp.inf))
  spare = jnp.maximum(honest.count - num_malicious - 1, 1.0)
  squares = jnp.diagonal(products)[:size] + products[size, size]
  squares = jnp.where(honest.usable, squares + 2 * products[size, :size], 0.0)
  farthest = jnp.maximum(jnp.max(squares), 0.0)
  return jnp.sqrt(lowest / (spare * num_parameters)) + jnp.sqrt(
    farthest / num_parameters
  )
