"""One decoder in Flax Linen for all families; flags tell them from Llama.

Two collections: `params` is the frozen base, `lora` the trainable adapter.
`model.apply({'params': base}, tokens)` is exactly the frozen model;
`model.apply({'params': base, 'lora': adapter}, tokens)` adds the adapter, and
`jax.vmap` over the adapter alone leaves every base product unbatched.

Blocks are stacked on a leading layer axis and scanned, so compile time does
not grow with depth; the scan of a shallow model is unrolled, and so are steps
with a cache, whose layers a loop would copy. Shapes in comments: B examples, L
tokens, T cache slots, D width, H query heads, G key-value heads, K head width,
F MLP width, R rank, M adapters.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_safety.models import (
  attention,
  fused_attention,
  kv_cache,
  quantization,
  rope,
  sharding,
  sights,
  softcap,
)
from fedjax_safety.models import config as config_lib

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

  def _of_rows(self, x: jax.Array, a, b, choice: jax.Array) -> jax.Array:
    """Returns every row's product with its own of M adapters, `[M, ...]`."""
    # All adapters' inner products are one product and are few; a gathered
    # pair for each row would be read once a row.
    inner = jnp.einsum('bld,mdr->blmr', x, a) * self.lora_scale
    own = choice[:, None, None, None] == jnp.arange(len(a))[:, None]
    return jnp.einsum('blmr,mro->blo', jnp.where(own, inner, 0), b)

  @nn.compact
  def __call__(self, x: jax.Array, choice: jax.Array | None) -> jax.Array:
    y = self._base(x)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)
    if self.has_variable('lora', 'a'):
      a = self.get_variable('lora', 'a').astype(self.dtype)
      b = self.get_variable('lora', 'b').astype(self.dtype)
      if choice is not None:
        return y + self._of_rows(x, a, b, choice)
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
  """Attention and gated MLP, each behind its norm and residual.

  It hands on the updated cache if it was given one, or else its keys and
  values if it is to keep them. In a step, one token a row, the weights stay
  where they are on a mesh; otherwise each device gathers them for its examples.
  """

  config: config_lib.DecoderConfig
  lora_scale: float
  lora_dropout: float
  mesh: jax.sharding.Mesh | None = None
  kernel: str | None = None
  keep: bool = False
  step: bool = False

  def _dense(self, features: int, name: str, choice):
    """Returns a projection that knows each row's adapter."""
    dense = Dense(
      features,
      self.config.has_bias(name),
      self.lora_scale,
      self.lora_dropout,
      self.config.dtype,
      self.config.quantization,
      None if self.step else self.mesh,
      name=name,
    )
    return functools.partial(dense, choice=choice)

  def _norm(self, name: str) -> RMSNorm:
    return RMSNorm(self.config.norm_eps, self.config.shifted_norms, name=name)

  def _attention(self, x, sight, windowed, slot, choice, cache):
    """Returns the attention output and what the block hands on."""
    c, (cos, sin, mask) = self.config, sights.choose(sight, windowed)

    def heads(name, count):
      y = self._dense(count * c.head_width, name, choice)(x)
      return y.reshape(*y.shape[:-1], count, c.head_width)

    q = heads('q_proj', c.num_heads)
    k, v = heads('k_proj', c.num_kv_heads), heads('v_proj', c.num_kv_heads)
    if c.qk_norm:
      q, k = self._norm('q_norm')(q), self._norm('k_norm')(k)
    q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
    if c.query_scalar not in (None, c.head_width):
      # What attends divides by sqrt(K).
      q = q * (c.head_width / c.query_scalar) ** 0.5
    if cache is not None:
      kept = kv_cache.write(cache, (k, v), slot)
      out = kv_cache.attend(q, kept, mask, c.attention_cap)
    else:
      kept = (k, v) if self.keep else None
      if self.kernel is not None:
        out = fused_attention.attend(
          q, k, v, windowed, config=c, backend=self.kernel, mesh=self.mesh
        )
      elif c.attention_cap is None:
        out = attention.attend(q, k, v, mask)
      else:
        out = softcap.attend(q, k, v, mask, c.attention_cap)
    out = out.reshape(*x.shape[:-1], -1)
    if self.step:
      out = sharding.like_weights(out, 'tp', self.mesh)
    return self._dense(c.width, 'o_proj', choice)(out), kept

  @nn.compact
  def __call__(self, x, cache, windowed, sight, slot, choice):
    c = self.config
    normed = self._norm('input_layernorm')(x)
    out, kept = self._attention(normed, sight, windowed, slot, choice, cache)
    before_mlp = 'post_attention_layernorm'
    if c.output_norms:
      out = self._norm('post_attention_layernorm')(out)
      before_mlp = 'pre_feedforward_layernorm'
    x = x + out
    normed = self._norm(before_mlp)(x)
    gate = self._dense(c.mlp_width, 'gate_proj', choice)(normed)
    up = self._dense(c.mlp_width, 'up_proj', choice)(normed)
    gated = _ACTIVATIONS[c.activation](gate) * up
    out = self._dense(c.width, 'down_proj', choice)(gated)
    if c.output_norms:
      out = self._norm('post_feedforward_layernorm')(out)
    if self.step:
      return sharding.like_weights(x + out, 'fsdp', self.mesh), kept
    return sharding.by_example(x + out, self.mesh), kept


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

  def _scanned(self, x, sight, windowed, choice, kernel, keep):
    """Runs the blocks as a scan over their stacked parameters."""
    c = self.config
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    # Without the loop, recomputation would be merged with the first pass.
    unrolled = c.num_layers <= _MAX_UNROLLED_LAYERS and not self.remat
    stack = nn.scan(
      block,
      variable_axes={'params': 0, 'lora': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=(nn.broadcast, 0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=c.num_layers,
      unroll=c.num_layers if unrolled else 1,
      metadata_params={nn.PARTITION_NAME: None},
    )(
      c,
      self.lora_scale,
      self.lora_dropout,
      self.mesh,
      kernel,
      keep,
      name='layers',
    )
    return stack(x, None, windowed, sight, None, choice)

  def _step(self, x, sight, windowed, choice, cache, slot):
    """Runs the blocks one by one, each with its layer of the cache."""
    c = self.config
    block = Block(
      c, self.lora_scale, self.lora_dropout, self.mesh, step=True, parent=None
    )
    layers = []
    for number, layer in enumerate(cache.layers):
      own = {
        kind: jax.tree.map(lambda leaf, i=number: leaf[i], held['layers'])
        for kind, held in self.variables.items()
        if 'layers' in held
      }
      narrow = None if windowed is None else windowed[number]
      x, layer = block.apply(own, x, layer, narrow, sight, slot, choice)
      layers.append(layer)
    return x, cache._replace(layers=tuple(layers))

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    *,
    cache: kv_cache.Cache | None = None,
    slot: jax.Array | None = None,
    choice: jax.Array | None = None,
    last_only: jax.Array | None = None,
    keep: bool = False,
    head_apart: bool = False,
  ) -> jax.Array | tuple[jax.Array, Any]:
    """Returns next-token logits, and what is remembered if that is asked for.

    Without a cache, attention is causal over `tokens`; padding belongs on the
    right, where no real token can see it. With a cache, every row reads one
    token, which goes into the same slot of all of them.

    Args:
      tokens: `int32[B, L]`; L is 1 with a cache.
      positions: `int32[B, L]`; 0, 1, ... by default; padding may repeat one.
      cache: what was read before.
      slot: `int32[]`, where the cache takes the tokens.
      choice: `int32[B]`, which of the adapters each row has, -1 for none; the
        leaves of the adapter are then `[layers, M, ...]`.
      last_only: `int32[B]`; if given, logits of that token of each row only.
      keep: whether to return keys and values, where no cache is given.
      head_apart: return what `to_logits` takes products of, instead of logits.

    Returns:
      `float32[B, L, V]` (or `[B, V]` with `last_only`), or with `head_apart`
      the factors `[B, L, D]` and `[D, V]`; then the cache or, with `keep`, keys
      and values `[layers, B, L, G, K]` each.
    """
    c = self.config
    length = tokens.shape[1]
    own = positions is None and cache is None
    kernel = self.attention if own and self.attention != attention.XLA else None
    if positions is None:
      positions = jnp.arange(length)[None]
    held = jnp.arange(length)[None]
    if cache is not None:
      held = kv_cache.note(cache.held, positions[:, 0], slot)
      cache = cache._replace(held=held)
    sight, windowed = sights.make(c, positions, held)
    embedding = self.param(
      'embed_tokens', nn.initializers.normal(0.02), (c.vocab_size, c.width)
    )
    x = embedding[tokens].astype(c.dtype)
    if cache is None:
      x = sharding.by_example(x, self.mesh)
    else:
      x = sharding.like_weights(x, 'fsdp', self.mesh)
    if c.scaled_embedding:
      x = x * jnp.asarray(c.width**0.5, c.dtype)
    if cache is None:
      x, kept = self._scanned(x, sight, windowed, choice, kernel, keep)
    else:
      x, kept = self._step(x, sight, windowed, choice, cache, slot)
    if last_only is not None:
      x = jnp.take_along_axis(x, last_only[:, None, None], axis=1)[:, 0]
    logits = self._logits(x, embedding, head_apart, gather=cache is None)
    return logits if kept is None else (logits, kept)

  def _logits(self, x, embedding, head_apart, *, gather: bool):
    """Returns the logits after some activations, or their factors."""
    c = self.config
    x = RMSNorm(c.norm_eps, c.shifted_norms, name='norm')(x)
    if c.tied_head:
      head = embedding.T
    else:
      shape = (c.width, c.vocab_size)
      head = self.param('lm_head', nn.initializers.normal(0.02), shape)
      if gather:
        head = sharding.gather(head, ('lm_head',), mesh=self.mesh)
    if head_apart:
      return x, head.astype(c.dtype)
    return to_logits(c, x @ head.astype(c.dtype))


def to_logits(config: config_lib.DecoderConfig, x: jax.Array) -> jax.Array:
  """Returns float32 logits of products with the head, capped if need be."""
  logits = x.astype(jnp.float32)
  if config.logit_cap is not None:
    logits = softcap.cap(logits, config.logit_cap)
  return logits
