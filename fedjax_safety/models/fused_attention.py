"""Attention in one kernel that never holds the scores of all pairs.

cuDNN's flash attention on NVIDIA GPUs, splash attention on TPUs: both causal
over tokens at the positions 0, 1, ..., with the window of a layer that has
one, and with XLA's numbers up to rounding. cuDNN's has been lowered here and
never run.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_safety.models import attention
from fedjax_safety.models import config as config_lib

# Splash attention works on so many columns of scores, and rows at most, at
# once; a wider head leaves room for fewer.
_LANES, _MOST_ROWS = 128, 512


def _lengthened(x: jax.Array, multiple: int) -> jax.Array:
  """Returns `[B, L, ...]` with zeros up to a multiple of a length.

  Attention is causal, so no token sees what stands after the last one.
  """
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


def _cudnn(q, k, v, *, window: int | None) -> jax.Array:
  """Attends in cuDNN's flash attention, which has no soft caps."""
  out = jax.nn.dot_product_attention(
    # Its backward pass takes even lengths.
    *(_lengthened(x, 2) for x in (q, k, v)),
    is_causal=True,
    local_window_size=window and (window - 1, 0),
    implementation='cudnn',
  )
  return out[:, : q.shape[1]]


def _block_sizes(length: int, width: int):
  """Returns how splash attention cuts scores into blocks."""
  from jax.experimental.pallas.ops.tpu import splash_attention

  most = _MOST_ROWS * _LANES // max(width, _LANES)
  size = max(n for n in range(_LANES, most + 1, _LANES) if length % n == 0)
  sizes = {
    name: size
    for name in ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv')
  }
  if size == length:
    return splash_attention.BlockSizes(**sizes, use_fused_bwd_kernel=True)
  # Fused, every block of keys would write gradients of all queries.
  return splash_attention.BlockSizes(**sizes, block_q_dq=size, block_kv_dq=size)


def _splash(q, k, v, *, window: int | None, cap: float | None) -> jax.Array:
  """Attends in splash attention, the length rounded up to whole lanes."""
  from jax.experimental.pallas.ops.tpu import splash_attention

  (_, length, heads, width), spare = q.shape, -q.shape[1] % _LANES
  q, k, v = (
    _lengthened(x, _LANES).swapaxes(1, 2) for x in (q * width**-0.5, k, v)
  )
  sides = (length + spare,) * 2
  mask = (
    splash_attention.CausalMask(sides)
    if window is None
    else splash_attention.LocalMask(sides, (window - 1, 0), offset=0)
  )
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([mask] * heads),
    block_sizes=_block_sizes(length + spare, width),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=cap,
  )
  return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :length]


def _folded(function: Callable) -> Callable:
  """Returns a function of batches whose mapped axis joins the batch.

  The rules by which cuDNN's calls are mapped fail where some operands have
  the mapped axis and others do not (jax up to 0.11).
  """

  @jax.custom_batching.custom_vmap
  def folded(*args):
    return function(*args)

  @folded.def_vmap
  def _(size, mapped, *args):
    args = [
      x if has else jnp.broadcast_to(x, (size, *x.shape))
      for x, has in zip(args, mapped, strict=True)
    ]
    out = folded(*(x.reshape(-1, *x.shape[2:]) for x in args))
    out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
    return out, jax.tree.map(lambda _: True, out)

  return folded


def _foldable(function: Callable) -> Callable:
  """Returns attention whose mapped axes join the batch, gradients too.

  The backward pass computes the forward pass again: its residuals are not
  part of what the function returns.
  """

  def gradients(q, k, v, d_out):
    return jax.vjp(function, q, k, v)[1](d_out)

  forward, backward = _folded(function), _folded(gradients)
  made = jax.custom_vjp(lambda q, k, v: forward(q, k, v))
  made.defvjp(
    lambda q, k, v: (forward(q, k, v), (q, k, v)),
    lambda saved, d_out: backward(*saved, d_out),
  )
  return made


def _kernel(
  backend: str, *, window: int | None, cap: float | None
) -> Callable[..., jax.Array]:
  """Returns `(q, k, v) -> out` of a backend."""
  if backend == attention.CUDNN:
    return _foldable(functools.partial(_cudnn, window=window))
  # Pallas maps a kernel over an axis by itself.
  return functools.partial(_splash, window=window, cap=cap)


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  windowed: jax.Array | None,
  *,
  config: config_lib.DecoderConfig,
  backend: str,
  mesh: jax.sharding.Mesh | None,
) -> jax.Array:
  """Causal attention of one layer over its own tokens, in one kernel.

  On a mesh every device attends for its own examples and heads.

  Args:
    q: queries `[B, L, H, K]`, at positions 0 to L - 1.
    k: keys `[B, L, G, K]`.
    v: values `[B, L, G, K]`.
    windowed: whether this layer has the window, `bool[]`, where layers
      differ in it; see `sights.make`.
    config: the decoder's config.
    backend: `cudnn` or `splash`.
    mesh: devices over which examples and heads are split.

  Returns:
    `[B, L, H, K]`.
  """
  make = functools.partial(_kernel, backend, cap=config.attention_cap)
  # A window that spans everything is no window.
  narrow = any(config.windowed) and config.window < q.shape[1]
  if not narrow or all(config.windowed):
    one_layer, flag = make(window=config.window if narrow else None), ()
  else:
    kernels = make(window=config.window), make(window=None)

    def one_layer(q, k, v, windowed):
      return jax.lax.cond(windowed, *kernels, q, k, v)

    flag = (windowed,)
  if mesh is not None:
    split = jax.P('fsdp', None, 'tp', None)
    one_layer = jax.shard_map(
      one_layer,
      mesh=mesh,
      in_specs=(split,) * 3 + (jax.P(),) * len(flag),
      out_specs=split,
      # A kernel does not say along which axes its results differ.
      check_vma=False,
    )
  return one_layer(q, k, v, *flag)
