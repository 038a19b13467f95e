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

# A stacked leaf above this size goes to an accelerator one layer at a time, so
# that the host never holds all its layers; below, that only costs programs.
WHOLE_BYTES = 2**26

# A CPU device takes memory over that starts at a multiple of so many bytes.
_ALIGNMENT = 64

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
  if not weight.stacked or size <= WHOLE_BYTES or _in_host_memory(mesh):
    return _load_part(files, weight, slice(0, weight.shape[0]), dtype, place)
  leaf = _zeros(weight.shape, dtype, place)
  for layer in range(weight.shape[0]):
    part = _load_part(files, weight, slice(layer, layer + 1), dtype, place)
    leaf = _put_layer(leaf, part, layer, place)
    # The next layer's memory is then this one's.
    jax.block_until_ready(leaf)
  return leaf


def _in_host_memory(mesh: jax.sharding.Mesh | None) -> bool:
  """Whether what is read stays where it was read to: all devices are CPUs."""
  if mesh is None:
    return jax.default_backend() == 'cpu'
  return all(device.platform == 'cpu' for device in mesh.devices.flat)


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
  out = _empty([part.stop - part.start for part in index], dtype)
  layers, inner = index[:1], index[1:]
  if not weight.stacked:
    layers, inner = (slice(0, 1),), index
  numbers = range(layers[0].start, layers[0].stop)
  for number, target in zip(
    numbers, out if weight.stacked else [out], strict=True
  ):
    _read_tensor(files, weight, weight.names[number], inner, target)
  return out


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
  """Returns an array to fill, which a CPU device then need not copy."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + size].view(dtype).reshape(shape)


def _read_tensor(
  files: tensor_files.TensorFiles,
  weight: weights.Weight,
  name: str,
  index: tuple[slice, ...],
  out: np.ndarray,
) -> None:
  """Fills `out` with a slice of a tensor, in threads, some rows in each."""
  # A tensor that is transposed is stored as `[D_out, D_in]`.
  rows, *columns = index[::-1] if weight.transposed else index

  def fill(low):
    part = slice(low, min(low + tensor_files.PANEL, rows.stop))
    panel = files.read(name, (part, *columns))
    place = slice(part.start - rows.start, part.stop - rows.start)
    if weight.transposed:
      panel = np.ascontiguousarray(panel, out.dtype)
      tensor_files.transpose_panel(panel, out[:, place])
    else:
      out[place] = panel

  # NumPy copies without the interpreter's lock.
  lows = range(rows.start, rows.stop, tensor_files.PANEL)
  with futures.ThreadPoolExecutor(_MOST_THREADS) as pool:
    for _ in pool.map(fill, lows):
      pass
