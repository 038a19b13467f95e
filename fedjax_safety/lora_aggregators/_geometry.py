"""Inner products of the clients' products, from the factors alone.

Clients of a round start from the server's factors a, b and end with others;
what counts is how far `scale * a @ b` moved. Distances between factors say
nothing about that: `(a q, q^-1 b)` is the same adapter for every invertible q.

A difference of two products is a product too, of twice the rank, and in the
form used here none of its terms is larger than the difference of the factors:

  a_k b_k - m n = (a_k - m) (n + (b_k - n)) + m (b_k - n).
"""

import jax
import jax.numpy as jnp

from fedjax_safety import tree, types
from fedjax_safety.lora_aggregators import _lowrank

_HIGHEST = jax.lax.Precision.HIGHEST


def product_basis(
  adapter: types.Adapter, deltas: types.Deltas, *, scale: float = 1.0
) -> jax.Array:
  """Returns inner products of the clients' products, relative to a center.

  The center is the product of the coordinate-wise medians of the factors: a
  minority of clients cannot move it out of the range of the others', and
  relative to it nothing large cancels in the distances among those. A row
  that holds a NaN or an infinity spoils its own row and column only.

  Costs `C ** 2 R ** 2 (D_in + D_out)` a pair and layer, and memory of
  `(C + 2) ** 2 R ** 2` numbers; no product is formed. Layers are taken one by
  one.

  Args:
    adapter: the server's adapter.
    deltas: stacked deltas, leaves [C, ...].
    scale: factor of the product.

  Returns:
    [C + 1, C + 1] float32: the clients relative to the center, and last the
    server. What `aggregators.coefficients` takes.
  """
  own, rows = _lowrank.pairs(adapter), _lowrank.pairs(deltas)
  return jnp.square(scale) * tree.total(
    [_sum_layers(pair, delta) for pair, delta in zip(own, rows, strict=True)]
  )


def product_gram(
  adapter: types.Adapter, deltas: types.Deltas, *, scale: float = 1.0
) -> jax.Array:
  """Returns the [C, C] inner products of the changes of the products.

  Entry (k, l) is the inner product of `scale * (a_k @ b_k - a @ b)` and the
  same of client l, over all pairs and layers.

  Args:
    adapter: the server's adapter; zeros give the products themselves.
    deltas: stacked deltas, leaves [C, ...].
    scale: factor of the product.
  """
  basis = product_basis(adapter, deltas, scale=scale)
  clients, server = basis[:-1, :-1], basis[:-1, -1]
  return clients - server[:, None] - server[None, :] + basis[-1, -1]


def layers(pair: _lowrank.Pair, delta: _lowrank.Pair):
  """Returns how many layers a pair has, and a function that picks one.

  The function returns the factors `[D_in, R]`, `[R, D_out]` and their deltas
  `[C, ...]`, all float32, of layer i, which may be traced.
  """
  own = [pair[n].reshape(-1, *pair[n].shape[-2:]) for n in 'ab']
  rows = [
    delta[n].reshape(delta[n].shape[0], -1, *delta[n].shape[-2:]) for n in 'ab'
  ]

  def pick(i):
    taken = [jax.lax.dynamic_index_in_dim(x, i, 0, False) for x in own]
    taken += [jax.lax.dynamic_index_in_dim(x, i, 1, False) for x in rows]
    return [x.astype(jnp.float32) for x in taken]

  return own[0].shape[0], pick


def _sum_layers(pair: _lowrank.Pair, delta: _lowrank.Pair) -> jax.Array:
  """Returns the basis of one pair, all layers together."""
  count, pick = layers(pair, delta)
  size = delta['a'].shape[0] + 1
  return jax.lax.fori_loop(
    0,
    count,
    lambda i, total: total + _layer_basis(*pick(i)),
    jnp.zeros((size, size), jnp.float32),
  )


def _layer_basis(a, b, delta_a, delta_b) -> jax.Array:
  """Returns the basis [C + 1, C + 1] of one layer of one pair.

  With p_k = a_k - m, v_k = b_k - n and the center m, n, row k is
  `p_k (n + v_k) + m v_k`; the server is the row whose deltas are 0.
  """
  left = _around_median(a, delta_a)
  right = _around_median(b, delta_b)
  lefts = jnp.einsum('kdi,ldj->kilj', left, left, precision=_HIGHEST)
  rights = jnp.einsum('kid,ljd->kilj', right, right, precision=_HIGHEST)
  # Blocks: of rows with rows, of rows with the center, of the center.
  pp, vv = lefts[:-1, :, :-1], rights[:-1, :, :-1]
  pm, vn = lefts[:-1, :, -1:], rights[:-1, :, -1:]
  mp, nv = lefts[-1:, :, :-1], rights[-1:, :, :-1]
  mm, nn = lefts[-1:, :, -1:], rights[-1:, :, -1:]
  products = vv * (pp + pm + mp + mm) + vn * (pp + mp) + nv * (pp + pm)
  products = jnp.sum(products + nn * pp, axis=(1, 3))
  return 0.5 * (products + products.T)


def _around_median(factor: jax.Array, deltas: jax.Array) -> jax.Array:
  """Returns [C + 2, ...]: rows and server minus center, then the center."""
  middle = tree.median([tree.nonfinite_last(row) for row in tree.rows(deltas)])
  # 0 where too many values are not finite. Fused into the products, it would
  # be computed for each row.
  middle = jax.lax.optimization_barrier(
    jnp.where(jnp.isfinite(middle), middle, 0.0)
  )
  return jnp.concatenate(
    [deltas - middle, -middle[None], (factor + middle)[None]]
  )
