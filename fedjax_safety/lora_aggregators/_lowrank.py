"""Products of factors that are never multiplied out: stacks, norms, SVD.

A pair is `{'a': [..., D_in, R], 'b': [..., R, D_out]}`; leading axes are
layers. A stacked pair has the C clients before them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, lora, tree, types

Pair = dict[str, jax.Array]
_HIGHEST = jax.lax.Precision.HIGHEST


def map_pairs(function: Callable[..., Any], *trees: types.PyTree) -> Any:
  """Applies a function to the pairs that lie at one place in all trees."""
  return jax.tree.map(function, *trees, is_leaf=lora.is_pair)


def pairs(adapter: types.Adapter) -> list[Pair]:
  """Returns the pairs of an adapter, in the order of its leaves."""
  return jax.tree.leaves(adapter, is_leaf=lora.is_pair)


def matmul(left: jax.Array, right: jax.Array) -> jax.Array:
  """Multiplies in float32 without an accelerator's reduced precision."""
  return jnp.matmul(
    left.astype(jnp.float32), right.astype(jnp.float32), precision=_HIGHEST
  )


def side_by_side(a: jax.Array) -> jax.Array:
  """Lays [C, ..., D_in, R] out as [..., D_in, C R], clients in order."""
  moved = jnp.moveaxis(a, 0, -2)
  return moved.reshape(*moved.shape[:-2], -1)


def on_top(b: jax.Array) -> jax.Array:
  """Lays [C, ..., R, D_out] out as [..., C R, D_out], clients in order."""
  moved = jnp.moveaxis(b, 0, -3)
  return moved.reshape(*moved.shape[:-3], -1, moved.shape[-1])


def scale_rows(coefficients: jax.Array, leaf: jax.Array) -> jax.Array:
  """Multiplies row c of [C, ...] by coefficient c in float32; 0 gives 0."""
  spread = coefficients.reshape(-1, *[1] * (leaf.ndim - 1))
  return jnp.where(spread == 0, 0.0, spread * leaf.astype(jnp.float32))


def used_rows(coefficients: jax.Array, leaf: jax.Array) -> jax.Array:
  """Returns [C, ...] in float32, rows of coefficient 0 replaced by 0."""
  spread = coefficients.reshape(-1, *[1] * (leaf.ndim - 1))
  return jnp.where(spread == 0, 0.0, leaf.astype(jnp.float32))


def like(pair: Pair, template: Pair) -> Pair:
  """Returns a pair with the dtypes of another."""
  return {name: pair[name].astype(template[name].dtype) for name in pair}


def fold_scales(adapters: types.PyTree, scales: jax.Array) -> types.PyTree:
  """Multiplies each client's `b` by its own scale, to leave a scale of 1.

  Clients of different rank have different scales where the scale is alpha
  over rank; what is aggregated must be `scale * a @ b`.

  Args:
    adapters: stacked adapters, leaves [C, ...].
    scales: [C], factor of each client's product.
  """

  def fold(pair):
    b = scale_rows(jnp.asarray(scales, jnp.float32), pair['b'])
    return {'a': pair['a'], 'b': b.astype(pair['b'].dtype)}

  return map_pairs(fold, adapters)


def product_norms(adapters: types.PyTree, *, scale: float = 1.0) -> jax.Array:
  """Returns the [C] Frobenius norms of the products, all pairs together.

  Costs `R ** 2 (D_in + D_out)` a pair; no product is formed.

  Args:
    adapters: stacked adapters, leaves [C, ...].
    scale: factor of the product.
  """

  def squares(pair):
    a, b = pair['a'], pair['b']
    left = matmul(jnp.swapaxes(a, -1, -2), a)
    right = matmul(b, jnp.swapaxes(b, -1, -2))
    return jnp.sum(left * right, axis=tuple(range(1, a.ndim)))

  total = tree.total([squares(pair) for pair in pairs(adapters)])
  return jnp.abs(scale) * jnp.sqrt(jnp.maximum(total, 0.0))


def refactor(adapter: types.Adapter, *, rank: int) -> types.Adapter:
  """Returns the pairs of a given rank whose products are nearest.

  The singular value decomposition of each product, taken through QR of its
  factors (`(D_in + D_out) K ** 2 + K ** 3` for inner width K). `a` has
  orthonormal columns, in the order of the singular values, which `b` holds;
  cutting columns off gives the best product of any smaller rank.

  Args:
    adapter: an adapter of any rank K, such as a stack of adapters.
    rank: inner width of the result; what a smaller product lacks is 0.

  Raises:
    ValueError: the rank is not positive.

  Reference: Bai, Chen, Qian, Yao, Li. Federated Fine-tuning of Large Language
  Models under Heterogeneous Tasks and Client Resources. NeurIPS 2024.
  """
  _validate.positive(rank=rank)

  def nearest(pair):
    left, left_core = jnp.linalg.qr(pair['a'].astype(jnp.float32))
    right, right_core = jnp.linalg.qr(
      jnp.swapaxes(pair['b'].astype(jnp.float32), -1, -2)
    )
    core = matmul(left_core, jnp.swapaxes(right_core, -1, -2))
    u, values, v = jnp.linalg.svd(core, full_matrices=False)
    cut = cut_svd(
      matmul(left, u), values, matmul(v, jnp.swapaxes(right, -1, -2)), rank
    )
    return like(cut, pair)

  return map_pairs(nearest, adapter)


def cut_svd(u: jax.Array, values: jax.Array, v: jax.Array, rank: int) -> Pair:
  """Returns the pair of the `rank` largest singular values, zero-padded."""
  a, b = u[..., :rank], values[..., :rank, None] * v[..., :rank, :]
  lacking = rank - a.shape[-1]
  if lacking <= 0:
    return {'a': a, 'b': b}
  whole = [(0, 0)] * (a.ndim - 2)
  return {
    'a': jnp.pad(a, [*whole, (0, 0), (0, lacking)]),
    'b': jnp.pad(b, [*whole, (0, lacking), (0, 0)]),
  }


def align(adapter: types.Adapter, target: types.Adapter) -> types.Adapter:
  """Rotates every pair so that its `a` comes nearest to that of a target.

  The product does not change. Of all factorings with orthonormal `a` it is
  the one that the signs and rotations an SVD leaves open cannot change.
  (Orthogonal Procrustes problem; Schönemann, 1966.)

  Args:
    adapter: an adapter.
    target: one of the same shapes.
  """

  def rotate(pair, wanted):
    overlap = matmul(jnp.swapaxes(pair['a'], -1, -2), wanted['a'])
    u, _, v = jnp.linalg.svd(overlap)
    turn = matmul(u, v)
    turned = {
      'a': matmul(pair['a'], turn),
      'b': matmul(jnp.swapaxes(turn, -1, -2), pair['b']),
    }
    return like(turned, pair)

  return map_pairs(rotate, adapter, target)
