"""Attacks made of the mean and the spread of the honest deltas."""

import jax
import jax.numpy as jnp
from jax.scipy import special

from fedjax_safety import _validate, tree, types
from fedjax_safety.attacks import _honest

# Whom `mimic` copies.
TARGETS = ('fixed', 'farthest')


def ipm(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  scale: float = 0.1,
) -> types.Deltas:
  """Sends `-scale` times the honest mean: inner product manipulation.

  Small scales hide among the honest rows of robust rules. A plain mean turns
  around once `scale` exceeds the number of honest rows for each malicious
  one. Honest rows are bit-identical; honest rows that are not finite are
  ignored, and if all are, nothing changes.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from fedjax_safety import attacks
    >>> deltas = jnp.array([[1.0], [3.0], [7.0]])
    >>> mask = jnp.array([False, False, True])
    >>> print(attacks.ipm(deltas, mask, jax.random.key(0), scale=0.5)[:, 0])
    [ 1.  3. -1.]

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    scale: factor, at least 0.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Reference: Xie, Koyejo, Gupta. Fall of Empires: Breaking Byzantine-Tolerant
  SGD by Inner Product Manipulation. UAI 2019.
  """
  del key
  honest = _honest.measure(deltas, is_malicious)
  row = jax.tree.map(lambda mean: -scale * mean, honest.mean)
  return _honest.write(deltas, is_malicious, honest, row)


def alie(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  ddof: int = 0,
  std_factor: float | None = None,
) -> types.Deltas:
  """Sends the honest mean minus a few standard deviations, in each coordinate.

  A little is enough (ALIE): the shift is one that so many honest clients
  exceed that, with them, the malicious ones are the majority. Of n clients
  with f malicious, `s = n // 2 + 1 - f` supporters are needed and the shift is
  the normal quantile of `(n - f - s) / (n - f)`, which is negative for the
  smallest f: few attackers do best on the other side of the mean. A quantile
  of 0 or 1 is moved half a client inwards. Honest rows are bit-identical;
  honest rows that are not finite are ignored, and if all are, nothing changes.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    ddof: 0 divides by the number of honest rows, 1 by one less.
    std_factor: standard deviations below the mean; None computes them.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Raises:
    ValueError: if `ddof` is neither 0 nor 1.

  Reference: Baruch, Baruch, Goldberg. A Little Is Enough: Circumventing
  Defenses For Distributed Learning. NeurIPS 2019.
  """
  del key
  _validate.in_range(0, 1, ddof=ddof)
  honest = _honest.measure(deltas, is_malicious)
  if std_factor is None:
    std_factor = _supported_shift(is_malicious)
  row = below_mean(deltas, honest, ddof)(std_factor)
  return _honest.write(deltas, is_malicious, honest, row)


def below_mean(deltas, honest, ddof):
  """Returns the function of a factor that ALIE's row is."""
  spread = _honest.std(deltas, honest, ddof)
  return lambda factor: jax.tree.map(
    lambda mean, std: mean - factor * std, honest.mean, spread
  )


def _supported_shift(is_malicious: types.RowMask) -> jax.Array:
  """Returns ALIE's shift in standard deviations."""
  malicious = jnp.sum(is_malicious, dtype=jnp.float32)
  honest = jnp.maximum(is_malicious.size - malicious, 1.0)
  supporters = is_malicious.size // 2 + 1 - malicious
  rank = jnp.clip(honest - supporters, 0.5, honest - 0.5)
  return special.ndtri(rank / honest)


def reversal(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  scale: float = 1.0,
) -> types.Deltas:
  """Turns each malicious delta against the honest mean, keeping its norm.

  What training on flipped labels tends to, drawn to its limit: a row that no
  norm gives away. A malicious row that is not finite takes the norm of the
  honest mean. Honest rows are bit-identical; honest rows that are not finite
  are ignored, and if all are, nothing changes.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    scale: factor of the norm, at least 0.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Reference: Tolpegin, Truex, Gursoy, Liu. Data Poisoning Attacks Against
  Federated Learning Systems. ESORICS 2020 (label flipping).
  """
  del key
  honest = _honest.measure(deltas, is_malicious)
  norms = tree.row_norms(deltas)
  norms = jnp.where(jnp.isfinite(norms), norms, _honest.norm(honest.mean))
  rows = jax.tree.map(
    lambda leaf: -scale * jnp.multiply.outer(norms, leaf),
    _honest.unit(honest.mean),
  )
  return _honest.write_rows(deltas, is_malicious, honest, rows)


def mimic(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  target: str = 'fixed',
  index: int = 0,
) -> types.Deltas:
  """Copies one honest row, so that its client counts many times.

  No rule can tell the copies from an honest client; where clients differ,
  the others are under-represented. Honest rows are bit-identical; honest rows
  that are not finite are never copied, and if all are, nothing changes.

  Args:
    deltas: stacked tree, leaves [C, ...].
    is_malicious: [C] bool.
    key: unused.
    target: `fixed`, or `farthest`: the row with the largest projection,
      whatever its sign, on the direction in which honest rows deviate most
      from their mean; ties go to the lowest row.
    index: for `fixed`: which finite honest row, from 0 in the order of rows;
      the last one if there are fewer.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Raises:
    ValueError: if `target` is unknown or `index` is negative.

  Reference: Karimireddy, He, Jaggi. Byzantine-Robust Learning on Heterogeneous
  Datasets via Bucketing. ICLR 2022.
  """
  del key
  _validate.one_of(TARGETS, target=target)
  _validate.non_negative(index=index)
  honest = _honest.measure(deltas, is_malicious)
  if target == 'farthest':
    scores = jnp.where(honest.usable, _projections(deltas, honest), -jnp.inf)
    chosen = jnp.argmax(scores)
  else:
    wanted = jnp.minimum(index + 1, honest.count)
    chosen = jnp.argmax(jnp.cumsum(honest.usable) == wanted)
  one_hot = (jnp.arange(is_malicious.size) == chosen).astype(jnp.float32)
  row = tree.mix(one_hot, deltas)
  return _honest.write(deltas, is_malicious, honest, row)


def _projections(deltas: types.Deltas, honest: _honest.Honest) -> jax.Array:
  """Returns the rows' [C] projections on the top direction, without sign."""
  away = _honest.deviations(deltas, honest)
  products = tree.gram(away)
  # The direction is a combination of the deviations, by the top eigenvector
  # of their products; its own length does not change who is farthest.
  top = jnp.linalg.eigh(products)[1][:, -1]
  on_mean = jnp.dot(top, tree.row_dots(away, honest.mean))
  return jnp.abs(jnp.matmul(products, top, precision='highest') + on_mean)
