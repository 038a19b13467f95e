"""What the layers of a decoder see: positions, and how they are rotated."""

import jax
import jax.numpy as jnp

from fedjax_safety.models import config as config_lib
from fedjax_safety.models import rope

# Cosines and sines `float32[B, L, K / 2]`, and the mask `bool[B, L, T]`; B is
# one where all rows are at the same positions.
Sight = tuple[jax.Array, jax.Array, jax.Array]


def make(
  config: config_lib.DecoderConfig, positions: jax.Array, held: jax.Array
) -> tuple[Sight | tuple[Sight, Sight], jax.Array | None]:
  """Returns what layers see from some positions.

  Args:
    config: the decoder's config.
    positions: `int32[B or 1, L]` position of each token.
    held: `int32[B or 1, T]` position of each token that could be seen; a
      window of T or more spans them all.

  Returns:
    What every layer sees, and None. Or, where layers differ, what those
    without and with a window see, and which have one, `bool[layers]`.
  """
  held, reach = held[:, None], held.shape[1]
  mask = held <= positions[..., None]
  full = (*rope.cos_sin(config, positions), mask)
  # A window that spans everything is no window.
  narrow = any(config.windowed) and config.window < reach
  if not any(config.windowed) or not (narrow or config.local_rope):
    return full, None
  if narrow:
    first = positions[..., None] - config.window + 1
    mask &= held >= first
  windowed = (*rope.cos_sin(config, positions, windowed=True), mask)
  if all(config.windowed):
    return windowed, None
  return (full, windowed), jnp.array(config.windowed)


def choose(
  sight: Sight | tuple[Sight, Sight], windowed: jax.Array | None
) -> Sight:
  """Returns what one layer sees.

  Args:
    sight: from `make`.
    windowed: the layer's entry of what `make` returns beside it.
  """
  if windowed is None:
    return sight
  full, narrow = sight
  return jax.tree.map(lambda f, n: jnp.where(windowed, n, f), full, narrow)
