"""Training losses over padded token batches."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

# Logits of one client's batch up to which all of them are held at once, and
# how many columns a device makes at once of more.
_MOST_LOGITS = 2**25
_COLUMNS = 8192


def next_token_loss(
  logits: jax.Array, tokens: jax.Array, loss_mask: jax.Array
) -> jax.Array:
  """Returns the mean cross-entropy of the masked tokens.

  The logits at position t are scored on token t + 1. A batch whose mask is
  empty has loss 0 and gradient 0.

  Args:
    logits: `float[B, L, V]`.
    tokens: `int32[B, L]`.
    loss_mask: `[B, L]`, nonzero on the tokens to be predicted; position 0 is
      never predicted.

  Returns:
    A float32 scalar, in nats a token.
  """
  chex.assert_rank([logits, tokens, loss_mask], [3, 2, 2])
  per_token = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], tokens[:, 1:]
  )
  return _masked_mean(per_token, loss_mask)


def _masked_mean(per_token: jax.Array, loss_mask: jax.Array) -> jax.Array:
  """Returns the mean of `[B, L - 1]` over the masked targets."""
  weight = loss_mask[:, 1:].astype(per_token.dtype)
  return jnp.sum(per_token * weight) / jnp.maximum(jnp.sum(weight), 1)


def chunk_of(vocab_size: int, num_tokens: int) -> int:
  """Returns how many columns of logits to make at once, by their number.

  Args:
    vocab_size: V; returned where all logits are few.
    num_tokens: tokens of one client's batch.
  """
  few = num_tokens * vocab_size <= _MOST_LOGITS
  return vocab_size if few else _COLUMNS


def _columns(head, start, size, shards):
  """Returns `size` columns of each shard of a head from `start` on."""
  width = len(head)
  # Every shard's own columns, so that a device finds its part in each chunk.
  split = head.reshape(width, shards, -1)
  part = jax.lax.dynamic_slice_in_dim(split, start, size, axis=2)
  return part.reshape(width, shards * size)


def chunked_next_token_loss(
  x: jax.Array,
  head: jax.Array,
  tokens: jax.Array,
  loss_mask: jax.Array,
  *,
  chunk: int,
  shards: int = 1,
  to_logits: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Returns `next_token_loss` without ever holding all logits.

  The vocabulary is taken chunk by chunk, with a running maximum and sum of
  exponentials; the backward pass computes each chunk's logits again.

  Args:
    x: `float[B, L, D]`, whose product with the head is the logits.
    head: `float[D, V]`.
    tokens: `int32[B, L]`.
    loss_mask: as of `next_token_loss`.
    chunk: columns of logits made at once by each shard.
    shards: parts of equal size over which the columns are split on devices.
    to_logits: what makes float32 logits of products, such as a soft cap.

  Returns:
    A float32 scalar, in nats a token.
  """
  chex.assert_rank([x, head, tokens, loss_mask], [3, 2, 2, 2])
  x, targets = x[:, :-1], tokens[:, 1:]
  per_shard = head.shape[1] // shards
  chunk = min(chunk, per_shard)

  @jax.checkpoint
  def step(carry, first):
    highest, total, picked = carry
    # The last chunk begins early, and what came before is left out.
    start = jnp.minimum(first, per_shard - chunk)
    logits = to_logits(x @ _columns(head, start, chunk, shards))
    at = start + jnp.arange(chunk)
    column = (jnp.arange(shards)[:, None] * per_shard + at).reshape(-1)
    fresh = jnp.tile(at >= first, shards)
    logits = jnp.where(fresh, logits, -jnp.inf)
    # The maximum only keeps exponentials in range: no gradient is due to it.
    top = jax.lax.stop_gradient(jnp.maximum(highest, jnp.max(logits, axis=-1)))
    total = total * jnp.exp(highest - top) + jnp.sum(
      jnp.exp(logits - top[..., None]), axis=-1
    )
    is_target = fresh & (column == targets[..., None])
    picked += jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return (top, total, picked), None

  zeros = jnp.zeros(targets.shape, jnp.float32)
  start = (zeros - jnp.inf, zeros, zeros)
  (top, total, picked), _ = jax.lax.scan(
    step, start, jnp.arange(0, per_shard, chunk)
  )
  return _masked_mean(top + jnp.log(total) - picked, loss_mask)
