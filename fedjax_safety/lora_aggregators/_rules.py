"""Robust rules on the clients' products instead of on their factors.

A rule that selects or weighs clients gets its distances from the factors
(`product_basis`) and returns coefficients; the combination of the products is
then a stack of factors, exactly, and is used as such, cut to the server's rank
or added to the base in part. A coordinate-wise rule has to see the entries of
the products, and gets them some rows at a time.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fedjax_safety import _validate, tree, types
from fedjax_safety.aggregators import _chain, _rule
from fedjax_safety.lora_aggregators import _geometry, _lowrank, _schemes

# Columns beyond the rank, and passes, of the subspace iteration.
_OVERSAMPLE, _PASSES = 8, 6


def product_change(
  adapter: types.Adapter, deltas: types.Deltas, coefficients: jax.Array
) -> types.Adapter:
  """Returns the combined change of the products, exactly, as an adapter.

  Its product is `sum_c coefficients[c] (a_c @ b_c - a @ b)`; `lora.merge` adds
  it to the base, beside the server's adapter of before.

  Args:
    adapter: the server's adapter, of rank R.
    deltas: stacked deltas, leaves [C, ...].
    coefficients: [C], of any sum; a row of 0 may hold anything.

  Returns:
    A float32 adapter of rank (C + 1) R.
  """
  return _stack(adapter, deltas, coefficients, keep=0.0)


def product_svd(
  adapter: types.Adapter,
  deltas: types.Deltas,
  coefficients: jax.Array,
  *,
  rank: int | None = None,
) -> types.Adapter:
  """Returns the server's product and the combined change, at a rank.

  The nearest adapter to the exact sum, as in FlexLoRA; `a` has orthonormal
  columns, rotated to lie nearest to the server's where the rank is the same.

  Args:
    adapter: the server's adapter, of rank R.
    deltas: stacked deltas, leaves [C, ...].
    coefficients: [C], of any sum; a row of 0 may hold anything.
    rank: of the result; None keeps R.

  Returns:
    An adapter with the dtypes of the server's.
  """
  stack = _stack(adapter, deltas, coefficients, keep=1.0)
  if rank is not None:
    nearest = _lowrank.refactor(stack, rank=rank)
  else:
    ranks = {pair['a'].shape[-1] for pair in _lowrank.pairs(adapter)}
    nearest = _lowrank.refactor(stack, rank=max(ranks))
    nearest = _lowrank.align(nearest, adapter)
  return _lowrank.map_pairs(_lowrank.like, nearest, adapter)


def product_residual(
  adapter: types.Adapter, deltas: types.Deltas, coefficients: jax.Array
) -> tuple[types.Adapter, types.Adapter]:
  """Returns the combined factors, and what their product lacks.

  As in FedEx-LoRA: the server's next adapter, and the residual to merge into
  the base.

  Args:
    adapter: the server's adapter, of rank R.
    deltas: stacked deltas, leaves [C, ...].
    coefficients: [C], of any sum; a row of 0 may hold anything.

  Returns:
    An adapter with the dtypes of the server's, and a float32 adapter of rank
    C R.
  """
  delta = tree.mix(coefficients, deltas)
  combined = jax.tree.map(
    lambda own, change: (own + change).astype(own.dtype), adapter, delta
  )
  return combined, _schemes.residual(deltas, coefficients)


_COMBINE = {
  'stack': product_change,
  'svd': product_svd,
  'residual': product_residual,
}


def product_rule(*steps: _chain.Step, combine: str = 'svd') -> Callable:
  """Makes a rule on products from any that needs only inner products.

  The result does not depend on how a client factors its product. Products are
  never formed.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import aggregators, lora_aggregators
    >>> rule = lora_aggregators.product_rule(
    ...   aggregators.nearest_neighbor_mixing(num_byzantine=1),
    ...   aggregators.krum(num_byzantine=1),
    ... )
    >>> server = {'q_proj': {'a': jnp.ones((4, 2)), 'b': jnp.zeros((2, 3))}}
    >>> rows = jnp.arange(5.0)[:, None, None]
    >>> deltas = {
    ...   'q_proj': {'a': rows * jnp.ones((4, 2)), 'b': jnp.ones((5, 2, 3))}
    ... }
    >>> new = rule(server, deltas)
    >>> print((new['q_proj']['a'] @ new['q_proj']['b']).round(3)[0])
    [5. 5. 5.]

  Args:
    *steps: preaggregators, then an affine rule or the mean, with their
      arguments bound.
    combine: `svd` returns the next adapter (`product_svd`), `stack` the
      change as a wider adapter (`product_change`), `residual` the next
      adapter and what to merge into the base (`product_residual`).

  Returns:
    `rule(adapter, deltas, *, scale=1.0, weights=None, key=None)`.

  Raises:
    ValueError: if a step needs more than inner products, or the way to
      combine is unknown.
  """
  _validate.one_of(_COMBINE, combine=combine)
  _chain.check_affine(steps)

  def rule(adapter, deltas, *, scale=1.0, weights=None, key=None):
    found = coefficients(
      steps, adapter, deltas, scale=scale, weights=weights, key=key
    )
    return _COMBINE[combine](adapter, deltas, found)

  return rule


def coefficients(
  steps: Sequence[_chain.Step],
  adapter: types.Adapter,
  deltas: types.Deltas,
  *,
  scale: float,
  weights: types.Weights | None,
  key: types.PRNGKey | None,
) -> jax.Array:
  """Returns the coefficients [C] of a rule in product space."""
  basis = _geometry.product_basis(adapter, deltas, scale=scale)
  return _chain.coefficients(*steps, products=basis, weights=weights, key=key)


def product_coordinatewise(
  *steps: _chain.Step, rank: int | None = None, tile: int = 256
) -> Callable:
  """Makes a rule on the entries of products from a coordinate-wise one.

  The rule is applied to the C changes `a_c @ b_c - a @ b`, `tile` rows of one
  layer at a time; the server's product and the result are then cut to a rank
  by SVD. Memory is one layer's product and C tiles of it. The SVD is exact
  where a product has at most `rank + 8` rows or columns, else by subspace
  iteration.

  Args:
    *steps: preaggregators, then a coordinate-wise rule.
    rank: of the result; None keeps the server's.
    tile: rows of a product that are looked at together.

  Returns:
    `rule(adapter, deltas, *, key=None) -> adapter`. The scale of the product
    is without effect on these rules. The key draws the start of the
    iteration and what random preaggregators need; None starts from a fixed
    draw.

  Raises:
    ValueError: if the last step is not coordinate-wise or the tile is empty.
  """
  _validate.positive(tile=tile)
  check_coordinatewise(steps)

  def rule(adapter, deltas, *, key=None):
    _chain.check(steps, tree.cohort_size(deltas))
    matrix = None
    if len(steps) > 1:
      basis = _geometry.product_basis(adapter, deltas)
      matrix = _chain.mixing(steps[:-1], basis, key)
    start = jax.random.key(0) if key is None else jax.random.fold_in(key, 1)
    combine = functools.partial(_combine_rows, steps[-1], matrix)
    made = _lowrank.map_pairs(
      lambda pair, delta: _layerwise(combine, pair, delta, rank, tile, start),
      adapter,
      deltas,
    )
    aligned = made if rank is not None else _lowrank.align(made, adapter)
    return _lowrank.map_pairs(_lowrank.like, aligned, adapter)

  return rule


def check_coordinatewise(steps: Sequence[_chain.Step]) -> None:
  """Raises unless the last step treats every coordinate on its own."""
  last = _rule.of(steps[-1])
  if last.kind != 'coordinatewise':
    known = sorted(
      rule.name
      for rule in _rule.REGISTRY.values()
      if rule.kind == 'coordinatewise'
    )
    raise ValueError(
      f'{last.name} does not treat coordinates on their own; known: '
      f'{", ".join(known)}'
    )


def _stack(adapter, deltas, coefficients, *, keep: float) -> types.Adapter:
  """Stacks the factors of `keep` server products and the combined change.

  a_c b_c - a b = (a_c - a) b_c + a (b_c - b), so that no block is larger than
  a client's delta but the server's own.
  """

  def stack(pair, delta):
    own = {name: pair[name].astype(jnp.float32) for name in pair}
    used = _lowrank.used_rows(coefficients, delta['b'])
    total = tree.total(tree.rows(_lowrank.scale_rows(coefficients, used)))
    tops = _lowrank.scale_rows(coefficients, own['b'] + used)
    lefts = _lowrank.used_rows(coefficients, delta['a'])
    return {
      'a': jnp.concatenate([_lowrank.side_by_side(lefts), own['a']], -1),
      'b': jnp.concatenate(
        [_lowrank.on_top(tops), keep * own['b'] + total], -2
      ),
    }

  return _lowrank.map_pairs(stack, adapter, deltas)


def _combine_rows(step, matrix, rows: jax.Array) -> jax.Array:
  """Applies the matrix, if any, and a coordinate-wise rule to [C, ...]."""
  if matrix is not None:
    rows = tree.mix_rows(matrix, rows, fused=True)
  return _chain.combine_leaf(step, rows)


def _layerwise(combine, pair, delta, rank, tile, key) -> _lowrank.Pair:
  """Returns one pair at a rank, its layers taken one by one."""
  count, pick = _geometry.layers(pair, delta)
  rank = pair['a'].shape[-1] if rank is None else rank

  def one(i):
    a, b, delta_a, delta_b = pick(i)
    change = _tiled_change(combine, a, b, delta_a, delta_b, tile)
    return _truncate(_lowrank.matmul(a, b) + change, rank, key)

  made = jax.lax.map(one, jnp.arange(count))
  leading = pair['a'].shape[:-2]
  return {n: made[n].reshape(*leading, *made[n].shape[1:]) for n in made}


def _tiled_change(combine, a, b, delta_a, delta_b, tile) -> jax.Array:
  """Returns the combined change [D_in, D_out] of one layer's product."""
  size = a.shape[0]
  tile = min(tile, size)
  new_b = b + delta_b
  # The last tile ends with the product; what it shares with the one before is
  # computed twice.
  starts = [*range(0, size - tile, tile), size - tile]

  def some_rows(start):
    own = jax.lax.dynamic_slice_in_dim(a, start, tile, 0)
    change = jax.lax.dynamic_slice_in_dim(delta_a, start, tile, 1)
    return combine(
      _lowrank.matmul(change, new_b) + _lowrank.matmul(own, delta_b)
    )

  def write(i, out):
    start = jnp.asarray(starts)[i]
    return jax.lax.dynamic_update_slice_in_dim(out, some_rows(start), start, 0)

  out = jnp.zeros((size, b.shape[-1]), jnp.float32)
  return jax.lax.fori_loop(0, len(starts), write, out)


def _truncate(product: jax.Array, rank: int, key) -> _lowrank.Pair:
  """Returns the pair of a rank nearest to a product [D_in, D_out]."""
  width = rank + _OVERSAMPLE
  if width >= min(product.shape):
    svd = jnp.linalg.svd(product, full_matrices=False)
    return _lowrank.cut_svd(*svd, rank)
  # Subspace iteration: Halko, Martinsson, Tropp, SIAM Review 2011.
  turned = product.T
  sketch = jax.random.normal(key, (product.shape[1], width))
  basis = jnp.linalg.qr(_lowrank.matmul(product, sketch))[0]
  for _ in range(_PASSES):
    other = jnp.linalg.qr(_lowrank.matmul(turned, basis))[0]
    basis = jnp.linalg.qr(_lowrank.matmul(product, other))[0]
  u, values, v = jnp.linalg.svd(
    _lowrank.matmul(basis.T, product), full_matrices=False
  )
  return _lowrank.cut_svd(_lowrank.matmul(basis, u), values, v, rank)
