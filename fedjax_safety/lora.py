"""Adapters as plain trees: a pair of factors beside each adapted kernel.

An adapter mirrors the tree of base parameters, with `{'a', 'b'}` where the
base has `{'kernel'}`: `a` is `[layers, D_in, R]`, `b` is `[layers, R, D_out]`,
and the kernel in force is `kernel + scale * a @ b`. (Hu et al., ICLR 2022.)
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_safety import _validate

Tree = dict[str, Any]


def _walk(tree: Mapping[str, Any], targets: Sequence[str], make, path=()):
  """Builds the subtree of the targeted kernels, `make(path, kernel)` each."""
  out = {}
  for name, child in tree.items():
    if not isinstance(child, Mapping):
      continue
    if name in targets and 'kernel' in child:
      out[name] = make((*path, name), child['kernel'])
    elif branch := _walk(child, targets, make, (*path, name)):
      out[name] = branch
  return out


def init(
  key: jax.Array,
  base_params: Mapping[str, Any],
  *,
  rank: int,
  target_modules: Sequence[str],
) -> Tree:
  """Returns a fresh float32 adapter whose product is exactly zero.

  `a` is uniform in ±1/sqrt(D_in), as PEFT initializes it, and `b` is zero.

  Args:
    key: a PRNG key.
    base_params: tree of base parameters, or of their shapes.
    rank: R, inner width of every pair.
    target_modules: names of the projections to adapt.

  Raises:
    ValueError: the rank is not positive or a target is not in the tree.
  """
  _validate.positive(rank=rank)
  found = set()

  def make(path, kernel):
    found.add(path[-1])
    layers, d_in, d_out = kernel.shape
    # crc32 is stable across processes, unlike hash().
    a_key = jax.random.fold_in(key, _stable_id(path))
    bound = d_in**-0.5
    shape = (layers, d_in, rank)
    return {
      'a': jax.random.uniform(a_key, shape, jnp.float32, -bound, bound),
      'b': jnp.zeros((layers, rank, d_out), jnp.float32),
    }

  adapter = _walk(base_params, target_modules, make)
  missing = sorted(set(target_modules) - found)
  if missing:
    raise ValueError(
      f'target_modules={tuple(target_modules)}: the model has no '
      f'{", ".join(missing)}'
    )
  return adapter


def _stable_id(path: Sequence[str]) -> int:
  """Returns a 32-bit number that identifies a path in every process."""
  return zlib.crc32('/'.join(path).encode())


def effective_delta(adapter: Tree, scale: float) -> Tree:
  """Returns `scale * a @ b` for every pair, `[layers, D_in, D_out]` each."""
  return jax.tree.map(
    lambda pair: _product(pair, scale), adapter, is_leaf=is_pair
  )


def is_pair(node: Any) -> bool:
  """Whether a node of an adapter is one projection's pair of factors."""
  return isinstance(node, Mapping) and set(node) == {'a', 'b'}


def _product(pair: Mapping[str, jax.Array], scale: float) -> jax.Array:
  """Returns `scale * a @ b`, without an accelerator's reduced precision."""
  highest = jax.lax.Precision.HIGHEST
  return scale * jnp.matmul(pair['a'], pair['b'], precision=highest)


def merge(base_params: Tree, adapter: Tree, scale: float) -> Tree:
  """Returns base parameters with the adapter's products added in float32.

  Raises:
    ValueError: the adapter has a branch that the base parameters lack, or
      that adapts a kernel in 8 bits.
  """
  unknown = sorted(set(adapter) - set(base_params))
  if unknown:
    raise ValueError(
      f'the adapter adapts {unknown[0]}; the base has {sorted(base_params)}'
    )
  out = {}
  for name, child in base_params.items():
    if name not in adapter:
      out[name] = child
    elif is_pair(adapter[name]):
      pair, kernel = adapter[name], child['kernel']
      if 'kernel_scale' in child:
        raise ValueError(
          f'the kernel of {name} is quantized and cannot take up an adapter; '
          f'load the base without quantization'
        )
      total = kernel.astype(jnp.float32) + _product(pair, scale)
      out[name] = {**child, 'kernel': total.astype(kernel.dtype)}
    else:
      out[name] = merge(child, adapter[name], scale)
  return out


def pad_rank(adapter: Tree, rank: int) -> Tree:
  """Zero-pads every pair to a larger rank; the product does not change.

  Raises:
    ValueError: a pair already has more than `rank` columns.
  """

  def pad(pair):
    extra = rank - pair['a'].shape[-1]
    if extra < 0:
      raise ValueError(f'rank={rank} is below rank {pair["a"].shape[-1]}')
    return {
      'a': jnp.pad(pair['a'], ((0, 0), (0, 0), (0, extra))),
      'b': jnp.pad(pair['b'], ((0, 0), (0, extra), (0, 0))),
    }

  return jax.tree.map(pad, adapter, is_leaf=is_pair)


def side_by_side(adapters: Sequence[Tree]) -> Tree:
  """Returns adapters as one tree, `[layers, M, ...]`, to choose from by row.

  Ranks are padded and pairs that an adapter lacks are zero, so that every
  product stays what it was; an empty tree is no adapter.

  Args:
    adapters: M adapters of one decoder.

  Raises:
    ValueError: one holds a number that is not finite, which would reach the
      rows of the others.
  """
  for number, adapter in enumerate(adapters):
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(adapter)):
      raise ValueError(
        f'adapter {number} holds numbers that are not finite; it cannot share '
        f'a batch with others'
      )
  return _side_by_side(list(adapters))


def _side_by_side(nodes: Sequence[Tree]) -> Tree:
  """Joins the same node of every adapter; at least one is not empty."""
  names = dict.fromkeys(name for node in nodes for name in node)
  if set(names) != {'a', 'b'}:
    return {n: _side_by_side([x.get(n, {}) for x in nodes]) for n in names}
  pairs = [node for node in nodes if node]
  rank = max(pair['a'].shape[-1] for pair in pairs)
  zero = jax.tree.map(jnp.zeros_like, pairs[0])
  padded = [pad_rank(node or zero, rank) for node in nodes]
  return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *padded)
