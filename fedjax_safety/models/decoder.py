"""One decoder in Flax Linen for all families; flags tell them from Llama.

Two collections: `params` is the frozen base, `lora` the trainable adapter.
`model.apply({'params': base}, tokens)` is exactly the frozen model;
`model.apply({'params': base, 'lora': adapter}, tokens)` adds the adapter, and
`jax.vmap` over the adapter alone leaves every base product unbatched.

Blocks are stacked on a leading layer axis and scanned, so compile time does
not grow with depth; the scan of a shallow model is unrolled. Shapes in
comments: B examples, L tokens, T cache slots, D width, H query heads, G
key-value heads, K head width, F MLP width, R rank.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_safety.models import (
  attention,
  fused_attention,
  quantization,
  rope,
  sharding,
  sights,
  softcap,
)
from fedjax_safety.models import config as config_lib

# One layer's keys and values, each [B, T, G, K]; stacked [layers, ...] outside.
KVCache = tuple[jax.Array, jax.Array]

_ACTIVATIONS = {
  'silu': nn.silu,
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
}

# Depth up to which the scan over blocks is unrolled. A loop writes all that
# the backward pass needs into one buffer a tensor: a quarter of a CPU step.
_MAX_UNROLLED_LAYERS = 8


class Dense(nn.Module):
  """A projection whose LoRA branch exists when the adapter has one for it.

  A kernel in 8 bits is loaded, never drawn: it starts as zeros.
  """

  features: int
  use_bias: bool
  lora_scale: float
  lora_dropout: float
  dtype: jnp.dtype
  quantization: str | None
  mesh: jax.sharding.Mesh | None = None

  def _gather(self, leaf: jax.Array, name: str) -> jax.Array:
    return sharding.gather(leaf, (self.name, name), mesh=self.mesh)

  def _base(self, x: jax.Array) -> jax.Array:
    """Returns the product with the frozen kernel."""
    shape = (x.shape[-1], self.features)
    if self.quantization is None:
      kernel = self.param('kernel', nn.initializers.normal(0.02), shape)
      return x @ self._gather(kernel.astype(self.dtype), 'kernel')
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    stored = quantization.MODES[self.quantization].dtype
    kernel = self._gather(self.param('kernel', zeros, shape, stored), 'kernel')
    scale = self.param('kernel_scale', ones, (self.features,))
    return quantization.matmul(x, kernel, scale, self.quantization)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = self._base(x)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)
    if self.has_variable('lora', 'a'):
      a = self.get_variable('lora', 'a').astype(self.dtype)
      b = self.get_variable('lora', 'b').astype(self.dtype)
      a, b = self._gather(a, 'a'), self._gather(b, 'b')
      dropout = nn.Dropout(
        self.lora_dropout, deterministic=not self.has_rng('dropout')
      )
      y = y + (dropout(x) @ a * self.lora_scale) @ b
    return y


class RMSNorm(nn.Module):
  """Root-mean-square normalization, computed in float32."""

  eps: float
  shifted: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    init = zeros if self.shifted else ones
    scale = self.param('scale', init, (x.shape[-1],))
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(mean_square + self.eps)
    if self.shifted:
      return (wide * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


class Block(nn.Module):
  """Attention and gated MLP, each behind its norm and residual."""

  config: config_lib.DecoderConfig
  lora_scale: float
  lora_dropout: float
  mesh: jax.sharding.Mesh | None = None
  kernel: str | None = None

  def _dense(self, features: int, name: str) -> Dense:
    return Dense(
      features,
      self.config.has_bias(name),
      self.lora_scale,
      self.lora_dropout,
      self.config.dtype,
      self.config.quantization,
      self.mesh,
      name=name,
    )

  def _norm(self, name: str) -> RMSNorm:
    return RMSNorm(self.config.norm_eps, self.config.shifted_norms, name=name)

  def _attention(self, x, sight, windowed, slots, cache):
    """Returns the attention output and this layer's updated cache."""
    c, (cos, sin, mask) = self.config, sights.choose(sight, windowed)

    def heads(y, count):
      return y.reshape(*y.shape[:-1], count, c.head_width)

    q = heads(self._dense(c.num_heads * c.head_width, 'q_proj')(x), c.num_heads)
    keys = c.num_kv_heads * c.head_width
    k = heads(self._dense(keys, 'k_proj')(x), c.num_kv_heads)
    v = heads(self._dense(keys, 'v_proj')(x), c.num_kv_heads)
    if c.qk_norm:
      q, k = self._norm('q_norm')(q), self._norm('k_norm')(k)
    q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
    if c.query_scalar not in (None, c.head_width):
      # What attends divides by sqrt(K).
      q = q * (c.head_width / c.query_scalar) ** 0.5
    if cache is not None:
      rows = jnp.arange(x.shape[0])[:, None]
      cache = tuple(
        old.at[rows, slots].set(new.astype(old.dtype), mode='drop')
        for old, new in zip(cache, (k, v), strict=True)
      )
      k, v = cache
    if self.kernel is not None:
      out = fused_attention.attend(
        q, k, v, windowed, config=c, backend=self.kernel, mesh=self.mesh
      )
    elif c.attention_cap is None:
      out = attention.attend(q, k, v, mask)
    else:
      out = softcap.attend(q, k, v, mask, c.attention_cap)
    out = out.reshape(*x.shape[:-1], -1)
    return self._dense(c.width, 'o_proj')(out), cache

  @nn.compact
  def __call__(self, x, cache, windowed, sight, slots):
    c = self.config
    normed = self._norm('input_layernorm')(x)
    out, cache = self._attention(normed, sight, windowed, slots, cache)
    before_mlp = 'post_attention_layernorm'
    if c.output_norms:
      out = self._norm('post_attention_layernorm')(out)
      before_mlp = 'pre_feedforward_layernorm'
    x = x + out
    normed = self._norm(before_mlp)(x)
    gate = self._dense(c.mlp_width, 'gate_proj')(normed)
    up = self._dense(c.mlp_width, 'up_proj')(normed)
    gated = _ACTIVATIONS[c.activation](gate) * up
    out = self._dense(c.width, 'down_proj')(gated)
    if c.output_norms:
      out = self._norm('post_feedforward_layernorm')(out)
    return sharding.by_example(x + out, self.mesh), cache


class Decoder(nn.Module):
  """The whole model: tokens to logits, with or without a cache.

  Attributes:
    config: sizes and numerics.
    lora_scale: factor of the adapter's product, alpha / rank.
    lora_dropout: dropout rate on the adapter's input while a `dropout` key is
      given to `apply`.
    remat: whether blocks are recomputed in the backward pass to save memory.
    mesh: devices over which weights and examples are split: each gathers the
      weights of one block at a time and keeps to its own examples.
    attention: what attends over tokens at the positions 0, 1, ... without a
      cache, one of `attention.BACKENDS`; all else is XLA's.
  """

  config: config_lib.DecoderConfig
  lora_scale: float = 1.0
  lora_dropout: float = 0.0
  remat: bool = False
  mesh: jax.sharding.Mesh | None = None
  attention: str = attention.XLA

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    cache: KVCache | None = None,
    last_only: jax.Array | None = None,
    head_apart: bool = False,
  ) -> jax.Array | tuple[jax.Array, KVCache] | tuple[jax.Array, jax.Array]:
    """Returns next-token logits, and the updated cache when one is given.

    Without a cache, attention is causal over `tokens`; padding belongs on the
    right, where no real token can see it. With a cache, token j of row i is
    written to slot `positions[i, j]` and sees every slot up to it.

    Args:
      tokens: `int32[B, L]`.
      positions: `int32[B, L]`; 0, 1, ... by default. A position beyond the
        cache is dropped.
      cache: `(keys, values)`, each `[layers, B, T, G, K]`; see `empty_cache`.
      last_only: `int32[B]`; if given, logits of that token of each row only.
      head_apart: return what `to_logits` takes products of, instead of logits.

    Returns:
      `float32[B, L, V]` (or `[B, V]` with `last_only`), then the cache. With
      `head_apart` the factors `[B, L, D]` and `[D, V]` of the logits.
    """
    c = self.config
    length = tokens.shape[1]
    slots = jnp.arange(length)[None] if positions is None else positions
    reach = length if cache is None else cache[0].shape[2]
    sight, windowed = sights.make(c, slots, reach)
    embedding = self.param(
      'embed_tokens', nn.initializers.normal(0.02), (c.vocab_size, c.width)
    )
    x = sharding.by_example(embedding[tokens].astype(c.dtype), self.mesh)
    if c.scaled_embedding:
      x = x * jnp.asarray(c.width**0.5, c.dtype)
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    own = positions is None and cache is None
    kernel = self.attention if own and self.attention != attention.XLA else None
    # Without the loop, recomputation would be merged with the first pass.
    unrolled = c.num_layers <= _MAX_UNROLLED_LAYERS and not self.remat
    stack = nn.scan(
      block,
      variable_axes={'params': 0, 'lora': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(0, 0, nn.broadcast, nn.broadcast),
      length=c.num_layers,
      unroll=c.num_layers if unrolled else 1,
      metadata_params={nn.PARTITION_NAME: None},
    )(c, self.lora_scale, self.lora_dropout, self.mesh, kernel, name='layers')
    x, cache = stack(x, cache, windowed, sight, slots)
    if last_only is not None:
      x = jnp.take_along_axis(x, last_only[:, None, None], axis=1)[:, 0]
    x = RMSNorm(c.norm_eps, c.shifted_norms, name='norm')(x)
    if c.tied_head:
      head = embedding.T
    else:
      shape = (c.width, c.vocab_size)
      head = self.param('lm_head', nn.initializers.normal(0.02), shape)
      head = sharding.gather(head, ('lm_head',), mesh=self.mesh)
    if head_apart:
      return x, head.astype(c.dtype)
    logits = to_logits(c, x @ head.astype(c.dtype))
    return logits if cache is None else (logits, cache)


def to_logits(config: config_lib.DecoderConfig, x: jax.Array) -> jax.Array:
  """Returns float32 logits of products with the head, capped if need be."""
  logits = x.astype(jnp.float32)
  if config.logit_cap is not None:
    logits = softcap.cap(logits, config.logit_cap)
  return logits


def empty_cache(
  config: config_lib.DecoderConfig, batch: int, slots: int
) -> KVCache:
  """Returns a zeroed cache, `[layers, batch, slots, G, K]` twice."""
  shape = (
    config.num_layers,
    batch,
    slots,
    config.num_kv_heads,
    config.head_width,
  )
  return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
