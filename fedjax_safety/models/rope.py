"""Rotary position embedding in every variant that checkpoints use."""

import math

import jax
import jax.numpy as jnp

from fedjax_safety.models import config as config_lib
from fedjax_safety.models import rope_config


def _inverse_frequencies(theta, width: int) -> jax.Array:
  """Returns `theta ** (-2i / width)` for i in [0, width / 2)."""
  exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
  return 1.0 / (theta**exponents)


def _llama3(rope: rope_config.RopeConfig, inv_freq: jax.Array) -> jax.Array:
  """Stretches long wavelengths, keeps short ones, blends in between."""
  original = rope.get('original_max_position_embeddings')
  low, high = rope.get('low_freq_factor'), rope.get('high_freq_factor')
  wavelength = 2 * math.pi / inv_freq
  blend = jnp.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
  return (1 - blend) * inv_freq / rope.get('factor') + blend * inv_freq


def _yarn(
  rope: rope_config.RopeConfig, width: int, max_positions: int
) -> tuple[jax.Array, float]:
  """NTK-by-parts interpolation and its attention temperature."""
  original = rope.get('original_max_position_embeddings')
  factor = rope.get('factor') or max_positions / original

  def temperature(scale, mscale=1.0):
    return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0

  attention_factor = rope.get('attention_factor')
  if attention_factor is None:
    mscale, all_dim = rope.get('mscale'), rope.get('mscale_all_dim')
    attention_factor = temperature(factor)
    if mscale and all_dim:
      attention_factor = temperature(factor, mscale)
      attention_factor /= temperature(factor, all_dim)

  def dimension_of(rotations):
    ratio = original / (rotations * 2 * math.pi)
    return width * math.log(ratio) / (2 * math.log(rope.theta))

  low = dimension_of(rope.get('beta_fast') or 32)
  high = dimension_of(rope.get('beta_slow') or 1)
  if rope.get('truncate', True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  span = high - low or 0.001
  ramp = (jnp.arange(width // 2, dtype=jnp.float32) - low) / span
  interpolated = jnp.clip(ramp, 0.0, 1.0)
  inv_freq = _inverse_frequencies(rope.theta, width)
  mixed = inv_freq * (1 - interpolated) + inv_freq / factor * interpolated
  return mixed, attention_factor


def _longrope(
  rope: rope_config.RopeConfig,
  width: int,
  max_positions: int,
  length: jax.Array,
) -> tuple[jax.Array, float]:
  """Per-dimension stretch, one set within the original length, one beyond."""
  original = rope.get('original_max_position_embeddings')
  factor = rope.get('factor') or max_positions / original
  attention_factor = rope.get('attention_factor')
  if attention_factor is None:
    attention_factor = 1.0
    if factor > 1.0:
      attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
  stretch = jnp.where(
    length > original,
    jnp.asarray(rope.get('long_factor'), jnp.float32),
    jnp.asarray(rope.get('short_factor'), jnp.float32),
  )
  return _inverse_frequencies(rope.theta, width) / stretch, attention_factor


def _dynamic(
  rope: rope_config.RopeConfig,
  width: int,
  max_positions: int,
  length: jax.Array,
) -> jax.Array:
  """Grows the base with the sequence once it exceeds the trained length."""
  factor = rope.get('factor')
  length = jnp.maximum(length, max_positions)
  growth = factor * length / max_positions - (factor - 1)
  theta = rope.theta * growth ** (width / (width - 2))
  return _inverse_frequencies(theta, width)


def cos_sin(
  config: config_lib.DecoderConfig,
  positions: jax.Array,
  *,
  windowed: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Returns the rotation of every position.

  Args:
    config: the decoder's config.
    positions: `int32[B, L]` position of each token.
    windowed: whether for the layers with a window.

  Returns:
    Cosines and sines, each `float32[B, L, K / 2]`, scaled by the variant's
    attention factor.
  """
  rope, width = config.rope, config.head_width
  if windowed and config.local_rope is not None:
    rope = config.local_rope
  # Of each row by itself: what it shares a batch with must not matter.
  length = positions.max(axis=1)[:, None, None] + 1
  scale = 1.0
  if rope.kind == 'yarn':
    inv_freq, scale = _yarn(rope, width, config.max_positions)
  elif rope.kind == 'longrope':
    inv_freq, scale = _longrope(rope, width, config.max_positions, length)
  elif rope.kind == 'dynamic':
    inv_freq = _dynamic(rope, width, config.max_positions, length)
  else:
    inv_freq = _inverse_frequencies(rope.theta, width)
    if rope.kind == 'linear':
      inv_freq = inv_freq / rope.get('factor')
    elif rope.kind == 'llama3':
      inv_freq = _llama3(rope, inv_freq)
  angles = positions[..., None].astype(jnp.float32) * inv_freq
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates pairs (i, i + K/2) of `[B, L, H, K]` heads, Llama's layout."""
  first, second = jnp.split(x, 2, axis=-1)
  cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
