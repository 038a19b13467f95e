"""How base parameters and adapters lie on a mesh of devices.

The mesh has the axes `clients`, `fsdp` and `tp`. Base parameters never use the
first: all adapters in one program share them. Projections into heads or into
the MLP are split by column over `tp`, those out of them by row, so a block
needs one reduction after each pair; the other side is split over `fsdp`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from fedjax_safety import _validate, distributed
from fedjax_safety.models import config as config_lib

P = jax.sharding.PartitionSpec

AXES = ('clients', 'fsdp', 'tp')

_COLUMNS = frozenset({'q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj'})
_ROWS = frozenset({'o_proj', 'down_proj'})
# One number an output channel of a kernel.
_CHANNELS = ('bias', 'kernel_scale')


def spec_of(path: Sequence[str]) -> P:
  """Returns the partition of the base parameter at a path.

  Args:
    path: keys that lead to the leaf, such as `('layers', 'q_proj', 'kernel')`.

  Raises:
    ValueError: no base parameter has such a path.
  """
  *_, module, leaf = ('', *path)
  if leaf == 'embed_tokens':
    # Splitting the width instead makes the token lookup gather the table.
    return P('tp', None)
  if leaf == 'lm_head':
    return P('fsdp', 'tp')
  if leaf == 'scale':
    return P()
  if module in _COLUMNS and leaf in ('kernel', *_CHANNELS):
    return P(None, 'fsdp', 'tp') if leaf == 'kernel' else P(None, 'tp')
  if module in _ROWS and leaf in ('kernel', *_CHANNELS):
    return P(None, 'tp', 'fsdp') if leaf == 'kernel' else P()
  raise ValueError(f'{"/".join(path)} is not a base parameter')


def _map_paths(fn, tree: Mapping[str, Any], path=()):
  """Rebuilds nested dicts with `fn(path)` in place of every leaf."""
  return {
    name: _map_paths(fn, child, (*path, name))
    if isinstance(child, Mapping)
    else fn((*path, name))
    for name, child in tree.items()
  }


def param_specs(base_params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the tree of partitions of the base parameters.

  Args:
    base_params: tree of base parameters, or of their shapes.

  Raises:
    ValueError: a leaf is not a base parameter.
  """
  return _map_paths(spec_of, base_params)


def adapter_specs(
  adapter: Mapping[str, Any], *, stacked: bool = False
) -> dict[str, Any]:
  """Returns the tree of partitions of an adapter.

  Each factor is split like the side of the kernel that it shares, and the
  rank is never split.

  Args:
    adapter: an adapter, or a stack of them, or their shapes.
    stacked: whether a leading axis counts adapters; it is then split over
      `clients`.

  Raises:
    ValueError: a leaf is not a factor of a projection's pair.
  """
  leading = ('clients', None) if stacked else (None,)

  def factor(path):
    *_, module, name = ('', *path)
    if module not in _COLUMNS | _ROWS or name not in ('a', 'b'):
      raise ValueError(f'{"/".join(path)} is not a factor of an adapter')
    d_in, d_out = ('fsdp', 'tp') if module in _COLUMNS else ('tp', 'fsdp')
    sides = (d_in, None) if name == 'a' else (None, d_out)
    return P(*leading, *sides)

  return _map_paths(factor, adapter)


def gather(
  leaf: jax.Array, path: Sequence[str], *, mesh: jax.sharding.Mesh | None
) -> jax.Array:
  """Returns a weight of one layer whole along `fsdp`, for a product with it.

  Without this a compiler may split the sum over the width instead, and then
  every device works on every example.

  Args:
    leaf: a parameter or a factor, without the axis of layers.
    path: keys that lead to it; the last one or two are looked at.
    mesh: devices it is split over; None returns it as it is.
  """
  if mesh is None:
    return leaf
  module, name = ('', *path)[-2:]
  if name in ('a', 'b'):
    spec = adapter_specs({module: {name: leaf}})[module][name]
  else:
    spec = spec_of(path)
  sides = [None if side == 'fsdp' else side for side in spec[-leaf.ndim :]]
  return jax.lax.with_sharding_constraint(
    leaf, jax.sharding.NamedSharding(mesh, P(*sides))
  )


def by_example(x: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
  """Splits activations `[B, ...]` by example over `fsdp`, and by nothing else.

  Args:
    x: activations, all of whose axes but the first are whole.
    mesh: devices to split over; None returns them as they are.
  """
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(
    x, jax.sharding.NamedSharding(mesh, P('fsdp'))
  )


def _fitting(size: int, axes: Sequence[str], mesh) -> tuple[str, ...] | None:
  """Returns those axes, taken in turn, that divide a size."""
  chosen, count = [], 1
  for axis in axes:
    if size % (count * mesh.shape[axis]) == 0:
      chosen.append(axis)
      count *= mesh.shape[axis]
  return tuple(chosen) or None


def by_row(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """Splits caches `[B, G, T, K]` by row over `clients` and `fsdp`.

  The heads are split over `tp`. An axis that does not divide a size leaves it
  whole.

  Args:
    tree: arrays.
    mesh: devices to split over; None returns them as they are.
  """
  if mesh is None:
    return tree

  def split(x):
    rows = _fitting(x.shape[0], ('clients', 'fsdp'), mesh)
    spec = P(rows, _fitting(x.shape[1], ('tp',), mesh))
    return jax.lax.with_sharding_constraint(
      x, jax.sharding.NamedSharding(mesh, spec)
    )

  return jax.tree.map(split, tree)


def like_weights(
  x: jax.Array, axis: str, mesh: jax.sharding.Mesh | None
) -> jax.Array:
  """Splits activations `[B, 1, D]` as the kernel they meet next is split.

  The few tokens of a step then go to the weights, which stay where they are.

  Args:
    x: activations.
    axis: that of the kernel's inputs, `fsdp` or `tp`.
    mesh: devices to split over; None returns them as they are.
  """
  if mesh is None:
    return x
  rows = _fitting(x.shape[0], ('clients',), mesh)
  spec = P(rows, None, _fitting(x.shape[2], (axis,), mesh))
  return jax.lax.with_sharding_constraint(
    x, jax.sharding.NamedSharding(mesh, spec)
  )


def mesh_of(tree: Any) -> jax.sharding.Mesh | None:
  """Returns the mesh over which a tree of arrays lies, None for one device."""
  (layout, *_) = (leaf.sharding for leaf in jax.tree.leaves(tree))
  return layout.mesh if layout.num_devices > 1 else None


def like_adapter(
  tree: Any, adapter: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> Any:
  """Returns the layout of a tree in which parts have the form of an adapter.

  Such parts, as an optimizer's moments, are split as the adapter is, whatever
  axes they have before; all else is copied to every device.

  Args:
    tree: arrays, or their shapes.
    adapter: the adapter that parts of the tree resemble, or its shapes.
    mesh: the mesh.

  Returns:
    A tree of shardings of the structure of `tree`.
  """
  structure = jax.tree.structure(adapter)
  shapes = [leaf.shape for leaf in jax.tree.leaves(adapter)]

  def resembles(node):
    return jax.tree.structure(node) == structure and all(
      leaf.shape[-len(shape) :] == shape
      for leaf, shape in zip(jax.tree.leaves(node), shapes, strict=True)
    )

  def layout(node):
    if not resembles(node):
      return jax.sharding.NamedSharding(mesh, P())
    return jax.tree.map(
      lambda leaf, spec: jax.sharding.NamedSharding(
        mesh, P(*[None] * (leaf.ndim - len(spec)), *spec)
      ),
      node,
      adapter_specs(adapter),
    )

  return jax.tree.map(layout, tree, is_leaf=resembles)


def make_mesh(
  clients: int = -1,
  fsdp: int = 1,
  tp: int = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """Returns a mesh whose axes are `clients`, `fsdp` and `tp`.

  Args:
    clients: devices along which adapters are spread.
    fsdp: devices along which base parameters and examples are split.
    tp: devices along which heads, MLP columns and vocabulary are split. At
      most one of the three may be -1, for all the devices that remain.
    devices: the devices to use; all of them by default.

  Raises:
    ValueError: the sizes do not use exactly the devices there are.
  """
  count = len(jax.devices() if devices is None else devices)
  sizes = dict(zip(AXES, (clients, fsdp, tp), strict=True))
  shown = ', '.join(f'{name}={size}' for name, size in sizes.items())
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise ValueError(f'{shown}: at most one size may be -1')
  _validate.positive(**{n: s for n, s in sizes.items() if n not in free})
  product = math.prod(size for size in sizes.values() if size != -1)
  if free:
    if count % product:
      raise ValueError(
        f'{shown}: the product of the given sizes, {product}, must divide the '
        f'{count} devices'
      )
    sizes[free[0]] = count // product
  elif product != count:
    raise ValueError(
      f'{shown}: the product, {product}, must equal the {count} devices; set '
      f'one size to -1 to use all of them'
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def check_divisible(
  config: config_lib.DecoderConfig, mesh: jax.sharding.Mesh
) -> None:
  """Raises unless every dimension that the mesh splits divides evenly.

  Raises:
    ValueError: a dimension is not a multiple of its axis; the message names
      the fields of `config.json`, the axis and both sizes.
  """
  head = config.head_width
  splits = {
    'hidden_size': (config.width, 'fsdp'),
    'vocab_size': (config.vocab_size, 'tp'),
    'intermediate_size': (config.mlp_width, 'tp'),
    'num_attention_heads * head_dim': (config.num_heads * head, 'tp'),
    'num_key_value_heads * head_dim': (config.num_kv_heads * head, 'tp'),
  }
  for name, (size, axis) in splits.items():
    if size % mesh.shape[axis]:
      raise ValueError(
        f'{name}={size} must be a multiple of {axis}={mesh.shape[axis]}; '
        f'choose a smaller {axis}'
      )


def place(tree: Any, mesh: jax.sharding.Mesh, specs: Any) -> Any:
  """Returns the tree with every leaf laid out on the mesh.

  Args:
    tree: arrays.
    mesh: the mesh.
    specs: tree of partitions, of the same structure.
  """
  shardings = jax.tree.map(
    lambda spec: jax.sharding.NamedSharding(mesh, spec),
    specs,
    is_leaf=lambda node: isinstance(node, P),
  )
  return distributed.place(tree, shardings)
