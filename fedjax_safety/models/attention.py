"""How layers attend: by XLA's products, and which kernel could do it instead.

A model that generates attends by XLA. One that trains may use a kernel of its
device, see `fused_attention`, if that can do what the model asks.
"""

import jax
import jax.numpy as jnp

from fedjax_safety.models import config as config_lib

XLA, CUDNN, SPLASH = BACKENDS = ('xla', 'cudnn', 'splash')
AUTO = 'auto'

# Of shorter sequences a kernel has too few scores to save.
_SHORT = 128


def _heads_first(x: jax.Array, groups: int) -> jax.Array:
  """Moves `[B, L, H, K]` to `[B, G, S, K]`, where S is `H / G * L`."""
  b, l, h, width = x.shape
  x = x.reshape(b, l, groups, h // groups, width)
  return x.transpose(0, 2, 3, 1, 4).reshape(b, groups, -1, width)


def _heads_last(x: jax.Array, length: int) -> jax.Array:
  """Undoes `_heads_first`."""
  b, groups, _, width = x.shape
  x = x.reshape(b, groups, -1, length, width)
  return x.transpose(0, 3, 1, 2, 4).reshape(b, length, -1, width)


def _attend_forward(q, k, v, mask):
  """Returns the attention output and what its backward pass needs."""
  (_, length, heads, width), groups = q.shape, k.shape[2]
  # The queries of a group are rows of one product; a fifth axis would cost
  # copies between the products and the softmax.
  mask = jnp.tile(mask, (1, heads // groups, 1))[:, None]
  q = _heads_first(q * width**-0.5, groups)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  scores = jnp.einsum('bgsk,bgtk->bgst', q, k).astype(jnp.float32)
  scores = jnp.where(mask, scores, jnp.float32(-1e30))
  weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  out = jnp.einsum('bgst,bgtk->bgsk', weights, v)
  return _heads_last(out, length), (q, k, v, weights, out)


def _attend_backward(saved, d_out):
  """Returns the cotangents of q, k and v; a masked pair has weight zero."""
  q, k, v, weights, out = saved
  length, width = d_out.shape[1], d_out.shape[3]
  d_out = _heads_first(d_out, k.shape[1])
  d_v = jnp.einsum('bgst,bgsk->bgtk', weights, d_out)
  d_weights = jnp.einsum('bgsk,bgtk->bgst', d_out, v).astype(jnp.float32)
  # The mean of d_weights under the weights, without a pass over [S, T].
  mean = jnp.sum(
    out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True
  )
  d_scores = (weights * (d_weights - mean)).astype(q.dtype)
  d_q = jnp.einsum('bgst,bgtk->bgsk', d_scores, k) * width**-0.5
  d_k = jnp.einsum('bgst,bgsk->bgtk', d_scores, q)
  d_k, d_v = d_k.swapaxes(1, 2), d_v.swapaxes(1, 2)
  return _heads_last(d_q, length), d_k, d_v, None


@jax.custom_vjp
def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
  """Scaled dot-product attention with grouped queries, softmax in float32.

  Its backward pass keeps one `[B, H, L, T]` array, the weights in the dtype
  of `q`; automatic differentiation would keep several in float32.

  Args:
    q: queries `[B, L, H, K]`.
    k: keys `[B, T, G, K]`, with `H % G == 0`.
    v: values `[B, T, G, K]`.
    mask: `bool[B or 1, L, T]`, true where a query may look; every query may
      look somewhere.

  Returns:
    `[B, L, H, K]`.
  """
  return _attend_forward(q, k, v, mask)[0]


attend.defvjp(_attend_forward, _attend_backward)


def _cudnn_lacks(
  config: config_lib.DecoderConfig, device: jax.Device
) -> str | None:
  """Returns why cuDNN cannot serve a model on a device, if it cannot."""
  # AMD's say gfx.
  capability = str(getattr(device, 'compute_capability', 'none'))
  if not capability[0].isdigit() or float(capability) < 8:
    return (
      f'it needs an NVIDIA GPU of compute capability 8.0 or more, not '
      f'{device.device_kind}'
    )
  if jnp.dtype(config.dtype).itemsize != 2:
    return f'it takes bfloat16 and float16, not model.dtype={config.dtype}'
  if config.attention_cap is not None:
    return "it has no soft cap, as this model's scores have"
  most = 256 if float(capability) >= 9 else 128
  if config.head_width % 8 or config.head_width > most:
    return (
      f'it takes heads whose width is a multiple of 8 up to {most} on this '
      f'device, not head_dim={config.head_width}'
    )
  return None


def _splash_lacks(
  config: config_lib.DecoderConfig, device: jax.Device
) -> str | None:
  """Returns why splash attention cannot serve a model, if it cannot."""
  if device.platform != 'tpu':
    return f'it needs a TPU, not {device.device_kind}'
  if config.dtype == jnp.float16:
    return 'it takes bfloat16 and float32, not model.dtype=float16'
  return None


_LACKS = {CUDNN: _cudnn_lacks, SPLASH: _splash_lacks}


def choose(
  name: str,
  config: config_lib.DecoderConfig,
  device: jax.Device,
  *,
  tp: int,
  length: int,
) -> str:
  """Returns which backend attends while a model trains.

  `auto` is the kernel of the device, or XLA's attention where that kernel
  cannot do what the model asks, or where sequences are short.

  Args:
    name: `auto` or one of `BACKENDS`.
    config: the decoder's config.
    device: one of those the model is on.
    tp: devices over which heads are split.
    length: tokens of the longest sequence.

  Raises:
    ValueError: the backend cannot serve the model; the message says why.
  """
  fitting = CUDNN if device.platform == 'gpu' else SPLASH
  wanted = fitting if name == AUTO else name
  if wanted == XLA:
    return XLA
  lacks = _LACKS[wanted](config, device)
  if lacks is None and config.num_kv_heads % tp:
    lacks = (
      f'every device needs whole heads, and performance.mesh splits '
      f'{config.num_kv_heads} key-value heads over tp={tp}'
    )
  if name == AUTO:
    return XLA if lacks or length < _SHORT else wanted
  if lacks:
    raise ValueError(
      f'performance.attention={name!r} cannot serve this run: {lacks}; choose '
      f'auto or xla'
    )
  return wanted
