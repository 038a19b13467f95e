"""Keeps the server's adapter within the directions in which alignment moved.

What alignment changed in a matrix, aligned minus base, spans a subspace of its
outputs. An adapter's product that lies mostly outside of it is projected onto
it after every round. (Safe LoRA: Hsu, Tsai, Lin, Chen, Yu, Huang, NeurIPS
2024.) That paper multiplies by V V^T / |V|, once and after training. Here it
is the orthogonal projection onto V's leading directions, for that can be done
every round and changes nothing the second time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_safety import assembly, types
from fedjax_safety import settings as settings_lib
from fedjax_safety.models import sharding


def project(
  adapter: types.Adapter, subspaces: types.PyTree, threshold: float
) -> tuple[types.Adapter, jax.Array]:
  """Projects the products that lie too much outside of their subspaces.

  Args:
    adapter: tree of pairs `{'a': [layers, D_in, R], 'b': [layers, R, D_out]}`.
    subspaces: the same tree with orthonormal `[layers, D_out, rank]` in place
      of pairs.
    threshold: least cosine of a product with its projection.

  Returns:
    The adapter, of which only `b` can differ, and how many matrices were
    projected. A product of zeros is left alone.
  """
  count = jnp.zeros((), jnp.int32)

  def walk(node, basis):
    nonlocal count
    if 'b' not in node:
      return {name: walk(child, basis[name]) for name, child in node.items()}
    inside = (node['b'] @ basis) @ jnp.swapaxes(basis, 1, 2)
    # The inner product of X and its projection is the latter's square.
    whole, kept = (_squares(node['a'], b) for b in (node['b'], inside))
    outside = kept < threshold**2 * whole
    count += jnp.sum(outside, dtype=jnp.int32)
    return node | {'b': jnp.where(outside[:, None, None], inside, node['b'])}

  return walk(adapter, subspaces), count


def _squares(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the squared lengths [layers] of products, never written out."""
  left, right = jnp.swapaxes(a, 1, 2) @ a, b @ jnp.swapaxes(b, 1, 2)
  return jnp.sum(left * right, axis=(1, 2))


def make(
  config: settings_lib.ExperimentConfig, mesh: jax.sharding.Mesh | None
) -> Callable[[types.Adapter], tuple[types.Adapter, dict[str, jax.Array]]]:
  """Returns `(adapter) -> (adapter, metrics)`, which may do nothing."""
  bases = subspaces(config)
  if bases is None:
    return lambda adapter: (adapter, {})

  @functools.partial(jax.jit, static_argnames='layout')
  def run(adapter, bases, layout):
    projected, count = project(
      adapter, bases, config.defense.safe_lora.threshold
    )
    if layout is not None:
      projected = jax.lax.with_sharding_constraint(
        projected, sharding.like_adapter(projected, projected, layout)
      )
    return projected, {'defense/num_projected': count}

  return lambda adapter: run(adapter, bases, layout=mesh)


def subspaces(config: settings_lib.ExperimentConfig) -> Any:
  """Returns the subspace of every adapted matrix, or None if none is wanted.

  Raises:
    ValueError: a model cannot be read, the two or the tuned one differ in
      their shapes, they have equal matrices, or the rank exceeds a width.
  """
  chosen = config.defense.safe_lora
  if not chosen.aligned_model:
    return None
  paths = chosen.aligned_model, chosen.base_model or config.model.path
  return _subspaces(
    *paths, config.model.template, config.lora.target_modules, chosen.rank
  )


@functools.lru_cache(maxsize=2)
def _subspaces(aligned_path, base_path, template, targets, rank) -> Any:
  """Returns the subspaces of two models' differences, found once."""
  aligned, base = (
    assembly.load_model(path, 'float32', template).base_params
    for path in (aligned_path, base_path)
  )
  where = f'defense.safe_lora: {aligned_path} minus {base_path}'

  def walk(left, right, path):
    if set(left) != set(right):
      raise ValueError(f'{where}: {path or "the models"} have other parts')
    out = {}
    for name in left:
      if name in targets and 'kernel' in left[name]:
        kernels = left[name]['kernel'], right[name]['kernel']
        out[name] = _directions(*kernels, rank, f'{where}: {path}{name}')
      elif isinstance(left[name], dict):
        below = walk(left[name], right[name], f'{path}{name}.')
        out |= {name: below} if below else {}
    return out

  return walk(aligned, base, '')


def _directions(aligned, base, rank: int, where: str) -> np.ndarray:
  """Returns the leading output directions [layers, D_out, rank]."""
  aligned, base = np.asarray(aligned), np.asarray(base)
  if aligned.shape != base.shape:
    raise ValueError(
      f'{where} is {aligned.shape} minus {base.shape}; give two models of one '
      f'shape'
    )
  if rank > aligned.shape[-1]:
    raise ValueError(
      f'{where} has {aligned.shape[-1]} outputs; set defense.safe_lora.rank='
      f'{rank} to that or less'
    )
  change = aligned - base
  if not change.any():
    raise ValueError(f'{where} is 0: the two models are the same there')
  # Ascending eigenvalues.
  _, vectors = np.linalg.eigh(np.swapaxes(change, 1, 2) @ change)
  return np.ascontiguousarray(vectors[..., ::-1][..., :rank])
