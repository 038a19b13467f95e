"""What a decoder remembers of the tokens it has read, written in place.

All rows write a step's token to one slot, whatever its position in its row,
and note the position: a step is then one slice of the cache, which a donated
buffer takes without a copy, and rows may start at any time. Each layer has
arrays of its own, heads before slots, so that a product reads them as they
lie. Shapes in comments: B rows, G key-value heads, T slots, K head width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety.models import config as config_lib
from fedjax_safety.models import softcap

# The keys and values of one layer, each `[B, G, T, K]`.
Layer = tuple[jax.Array, jax.Array]

# Later than every position: no token sees such a slot.
NOTHING = 2**30


class Cache(NamedTuple):
  """Keys and values of tokens, and where each token was.

  Attributes:
    layers: the keys and values of every layer.
    held: `int32[B, T]`, the position of the token in each slot, or `NOTHING`.
  """

  layers: tuple[Layer, ...]
  held: jax.Array


def empty(config: config_lib.DecoderConfig, rows: int, slots: int) -> Cache:
  """Returns a cache that holds nothing."""
  shape = (rows, config.num_kv_heads, slots, config.head_width)
  return Cache(
    tuple(
      (jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
      for _ in range(config.num_layers)
    ),
    jnp.full((rows, slots), NOTHING, jnp.int32),
  )


def replace_rows(
  cache: Cache, rows: jax.Array, kept: Sequence[jax.Array], lengths: jax.Array
) -> Cache:
  """Gives rows the tokens of prompts, and nothing else, from slot 0 on.

  Args:
    cache: the cache.
    rows: `int32[P]`, the rows to give; one beyond the cache is dropped.
    kept: keys and values that the decoder kept, `[layers, P, L, G, K]` each.
    lengths: `int32[P]`, tokens of each prompt.
  """
  length = kept[0].shape[2]
  layers = tuple(
    tuple(
      old.at[rows, :, :length].set(
        new[layer].swapaxes(1, 2).astype(old.dtype), mode='drop'
      )
      for old, new in zip(layers, kept, strict=True)
    )
    for layer, layers in enumerate(cache.layers)
  )
  slots = jnp.arange(cache.held.shape[1])
  held = jnp.where(slots < lengths[:, None], slots, NOTHING)
  return Cache(layers, cache.held.at[rows].set(held, mode='drop'))


def note(held: jax.Array, positions: jax.Array, slot: jax.Array) -> jax.Array:
  """Returns `held` with a token of every row in one slot."""
  return jax.lax.dynamic_update_slice(held, positions[:, None], (0, slot))


def write(layer: Layer, new: Sequence[jax.Array], slot: jax.Array) -> Layer:
  """Returns a layer with keys and values `[B, 1, G, K]` in one slot."""
  return tuple(
    jax.lax.dynamic_update_slice(
      old, x.swapaxes(1, 2).astype(old.dtype), (0, 0, slot, 0)
    )
    for old, x in zip(layer, new, strict=True)
  )


def attend(
  q: jax.Array, layer: Layer, mask: jax.Array, limit: float | None
) -> jax.Array:
  """Scaled dot-product attention of one token a row, softmax in float32.

  Args:
    q: queries `[B, 1, H, K]`, with `H % G == 0`.
    layer: keys and values.
    mask: `bool[B, 1, T]`, true where a query may look.
    limit: soft cap of the scores, None for no cap.

  Returns:
    `[B, 1, H, K]`.
  """
  keys, values = layer
  batch, _, heads, width = q.shape
  q = (q * width**-0.5).reshape(batch, keys.shape[1], -1, width)
  scores = jnp.einsum('bgsk,bgtk->bgst', q, keys).astype(jnp.float32)
  if limit is not None:
    scores = softcap.cap(scores, limit)
  scores = jnp.where(mask[:, None], scores, jnp.float32(-1e30))
  weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  out = jnp.einsum('bgst,bgtk->bgsk', weights, values)
  return out.reshape(batch, 1, heads, width)
