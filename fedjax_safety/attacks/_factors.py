"""Attacks on adapters: each factor looks honest, their product does not."""

import jax
import jax.numpy as jnp

from fedjax_safety import lora, types
from fedjax_safety.attacks import _honest

_HIGHEST = jax.lax.Precision.HIGHEST
_MATRIX = (-2, -1)


def gap(
  deltas: types.Deltas,
  is_malicious: types.RowMask,
  key: types.PRNGKey,
  *,
  adapter: types.Adapter,
) -> types.Deltas:
  """Hides what a client trained on in the product of honest-looking factors.

  In every layer, each factor of a malicious delta gets the mean norm of the
  honest ones and the lowest cosine with their mean that an honest one has, so
  that no look at norms and directions of a or b alone tells it apart. What is
  left free, the direction across the honest mean, is the one in which the
  product `(a + da) @ (b + db)` comes closest to the product that the client
  trained: first of b under the server's a, then of a under the new b.

  Honest rows are bit-identical; honest rows that are not finite are ignored,
  and if all are, nothing changes. A malicious row that is not finite becomes
  the honest mean's direction alone. No product is formed: the cost is that of
  some products of a factor with [R, R] matrices for each client and layer.

  Args:
    deltas: stacked adapter, pairs of a [C, layers, D_in, R] and
      b [C, layers, R, D_out].
    is_malicious: [C] bool.
    key: unused.
    adapter: the server's adapter, the same without the axis C.

  Returns:
    The attacked deltas, same shapes and dtypes.

  Raises:
    ValueError: if the deltas are not pairs of factors.

  Reference: the idea of Gradient Assembly Poisoning, arXiv 2601.00566; the
  construction is this project's own.
  """
  del key
  honest = _honest.measure(deltas, is_malicious)

  def hide(rows, mean, start):
    if not lora.is_pair(rows):
      raise ValueError(
        "update_attack='gap' needs an adapter, a tree of pairs {'a', 'b'}; "
        'choose another attack for other parameters'
      )
    a, b = (_wide(start[name])[None] for name in 'ab')
    da, db = (_wide(rows[name]) for name in 'ab')
    # a' @ (product that was trained - a @ b), and the same from the right.
    wanted = _times(_gram(a, a + da), b + db) - _times(_gram(a, a), b)
    new_b = _disguised(db, mean['b'], wanted, honest.usable)
    right = b + new_b
    wanted = _times(a + da, _across(b + db, right))
    wanted -= _times(a, _across(b, right))
    return {'a': _disguised(da, mean['a'], wanted, honest.usable), 'b': new_b}

  rows = jax.tree.map(hide, deltas, honest.mean, adapter, is_leaf=lora.is_pair)
  return _honest.write_rows(deltas, is_malicious, honest, rows)


def _wide(leaf: jax.Array) -> jax.Array:
  """Returns a leaf in float32."""
  return leaf.astype(jnp.float32)


def _times(left: jax.Array, right: jax.Array) -> jax.Array:
  """Returns the products of the last two axes."""
  return jnp.matmul(left, right, precision=_HIGHEST)


def _gram(left: jax.Array, right: jax.Array) -> jax.Array:
  """Returns the inner products [..., R, R] of two factors' columns."""
  return _times(jnp.swapaxes(left, -1, -2), right)


def _across(left: jax.Array, right: jax.Array) -> jax.Array:
  """Returns the inner products [..., R, R] of two factors' rows."""
  return _times(left, jnp.swapaxes(right, -1, -2))


def _norm(matrix: jax.Array) -> jax.Array:
  """Returns the norms of matrices, the last two axes kept."""
  # Scaled first: squares of large entries would not be finite.
  size = jnp.max(jnp.abs(matrix), axis=_MATRIX, keepdims=True)
  size = jnp.where(size > 0, size, 1.0)
  squares = jnp.sum(jnp.square(matrix / size), axis=_MATRIX, keepdims=True)
  return size * jnp.sqrt(squares)


def _unit(matrix: jax.Array) -> jax.Array:
  """Scales matrices to norm 1; those of zeros and NaN become zeros."""
  norm = _norm(matrix)
  usable = jnp.isfinite(norm) & (norm > 0)
  return jnp.where(usable, matrix / jnp.where(usable, norm, 1.0), 0.0)


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
  """Returns inner products of matrices, the last two axes kept."""
  return jnp.sum(left * right, axis=_MATRIX, keepdims=True)


def _disguised(
  deltas: jax.Array,
  mean: jax.Array,
  wanted: jax.Array,
  usable: types.RowMask,
) -> jax.Array:
  """Returns rows of honest norm and cosine that lean towards `wanted`.

  Args:
    deltas: one factor's deltas, [C, layers, ...].
    mean: the honest mean, [layers, ...].
    wanted: a direction for each row, [C, layers, ...].
    usable: [C] bool, the honest rows.
  """
  along = _unit(mean[None])
  rows = usable.reshape(-1, *(1,) * (deltas.ndim - 1))
  norms = jnp.where(rows, _norm(deltas), 0.0)
  count = jnp.maximum(jnp.sum(usable), 1)
  norm = jnp.sum(norms, axis=0, keepdims=True) / count
  cosines = jnp.where(rows, _dot(_unit(deltas), along), 1.0)
  lowest = jnp.clip(jnp.min(cosines, axis=0, keepdims=True), -1.0, 1.0)
  across = _unit(wanted)
  across = _unit(across - _dot(across, along) * along)
  # Without a direction of its own a row is the honest one.
  cosine = jnp.where(jnp.any(across != 0, _MATRIX, keepdims=True), lowest, 1.0)
  sine = jnp.sqrt(jnp.maximum(1 - jnp.square(cosine), 0.0))
  return norm * (cosine * along + sine * across)
