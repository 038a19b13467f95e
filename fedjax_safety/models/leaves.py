"""Leaves of a model, read from its files straight to where they will lie."""

import functools
import math
import os
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_safety.models import quantization as quantization_lib
from fedjax_safety.models import sharding, tensor_files, weights

# A stacked leaf above this size is loaded one layer at a time, so that the
# host never holds all its layers; below, that would only cost programs.
WHOLE_BYTES = 2**26

# Each holds a panel of a tensor, so more of them would hold a layer.
_MOST_THREADS = min(os.cpu_count() or 1, 16)


def load(
  files: tensor_files.TensorFiles,
  weight: weights.Weight,
  dtype: Any,
  mesh: jax.sharding.Mesh | None,
) -> jax.Array:
  """Returns one leaf, read slice by slice where a mesh splits it.

  Args:
    files: the open files of a model.
    weight: the leaf's entry in their table.
    dtype: what to hold it in.
    mesh: devices to split it over; None takes the default device.
  """
  dtype = np.dtype(dtype)
  place = None
  if mesh is not None:
    place = jax.sharding.NamedSharding(mesh, sharding.spec_of(weight.path))
  size = math.prod(weight.shape) * dtype.itemsize
  if not weight.stacked or size <= WHOLE_BYTES:
    return _load_part(files, weight, slice(0, weight.shape[0]), dtype, place)
  leaf = _zeros(weight.shape, dtype, place)
  for layer in range(weight.shape[0]):
    part = _load_part(files, weight, slice(layer, layer + 1), dtype, place)
    leaf = _put_layer(leaf, part, layer, place)
    # The next layer's memory is then this one's.
    jax.block_until_ready(leaf)
  return leaf


@functools.partial(jax.jit, static_argnames=('shape', 'dtype', 'place'))
def _zeros(shape, dtype, place) -> jax.Array:
  """Returns a leaf to fill, on the devices that will hold it."""
  leaf = jnp.zeros(shape, dtype)
  return (
    leaf if place is None else jax.lax.with_sharding_constraint(leaf, place)
  )


@functools.partial(jax.jit, static_argnames='place', donate_argnames='leaf')
def _put_layer(leaf, part, layer, place) -> jax.Array:
  """Writes one layer into a leaf, in place."""
  leaf = jax.lax.dynamic_update_slice_in_dim(leaf, part, layer, 0)
  return (
    leaf if place is None else jax.lax.with_sharding_constraint(leaf, place)
  )


def _load_part(
  files: tensor_files.TensorFiles,
  weight: weights.Weight,
  part: slice,
  dtype: np.dtype,
  place: jax.sharding.NamedSharding | None,
) -> jax.Array:
  """Loads what a leaf has between two of its first indices."""
  shape = (part.stop - part.start, *weight.shape[1:])

  def read(bounds):
    (low, high), *others = bounds
    low, high = low + part.start, high + part.start
    slices = (slice(low, high), *(slice(*pair) for pair in others))
    return _read(files, weight, slices, dtype)

  if place is None:
    # Without a device the array is not tied to one and can join any mesh.
    return jax.device_put(read([(0, size) for size in shape]))
  shards = {}

  def shard(index):
    # Devices along `clients` hold the same slice: read it once for them all.
    bounds = tuple(
      within.indices(size)[:2]
      for within, size in zip(index, shape, strict=True)
    )
    if bounds not in shards:
      shards[bounds] = read(bounds)
    return shards[bounds]

  return jax.make_array_from_callback(shape, place, shard, dtype=dtype)


def quantized(
  kernel: jax.Array,
  mode: str,
  path: tuple[str, ...],
  mesh: jax.sharding.Mesh | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns a stacked kernel in 8 bits, layer by layer, and its scales.

  Args:
    kernel: `[layers, D_in, D_out]`.
    mode: one of `quantization.MODES`.
    path: keys that lead to the kernel.
    mesh: devices that it is split over, if any.
  """
  places = None
  if mesh is not None:
    places = tuple(
      jax.sharding.NamedSharding(mesh, sharding.spec_of((*path[:-1], leaf)))
      for leaf in ('kernel', 'kernel_scale')
    )

  @functools.partial(jax.jit, out_shardings=places)
  def quantize(kernel):
    return jax.lax.map(lambda x: quantization_lib.quantize(x, mode), kernel)

  return quantize(kernel)


def _read(
  files: tensor_files.TensorFiles,
  weight: weights.Weight,
  index: tuple[slice, ...],
  dtype: np.dtype,
) -> np.ndarray:
  """Reads one slice of a leaf: stacked, transposed and cast."""
  out = np.empty([part.stop - part.start for part in index], dtype)
  layers, inner = index[:1], index[1:]
  if not weight.stacked:
    layers, inner = (slice(0, 1),), index
  numbers = range(layers[0].start, layers[0].stop)
  for number, target in zip(
    numbers, out if weight.stacked else [out], strict=True
  ):
    name = weight.names[number]
    if weight.transposed:
      _read_transposed(files, name, inner, target)
    else:
      target[...] = files.read(name, inner)
  return out


def _read_transposed(
  files: tensor_files.TensorFiles,
  name: str,
  index: tuple[slice, slice],
  out: np.ndarray,
) -> None:
  """Fills `out[D_in, D_out]` from a tensor stored as `[D_out, D_in]`."""
  inputs, outputs = index

  def fill(low):
    high = min(low + tensor_files.PANEL, outputs.stop)
    panel = files.read(name, (slice(low, high), inputs))
    tensor_files.transpose_panel(
      np.ascontiguousarray(panel, out.dtype),
      out[:, low - outputs.start : high - outputs.start],
    )

  # NumPy copies without the interpreter's lock.
  lows = range(outputs.start, outputs.stop, tensor_files.PANEL)
  with futures.ThreadPoolExecutor(_MOST_THREADS) as pool:
    for _ in pool.map(fill, lows):
      pass
