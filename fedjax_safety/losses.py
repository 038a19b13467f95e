"""Training losses over padded token batches, and distances of two models."""

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


def _columns(head, first, size, shards):
  """Returns columns of a head, their indices, and which were not seen yet.

  Of each shard there are `size`, from `first` on; the last ones begin early,
  and what came before is not new.
  """
  width, per_shard = len(head), head.shape[1] // shards
  start = jnp.minimum(first, per_shard - size)
  # Every shard's own columns, so that a device finds its part in each chunk.
  split = head.reshape(width, shards, -1)
  part = jax.lax.dynamic_slice_in_dim(split, start, size, axis=2)
  at = start + jnp.arange(size)
  index = (jnp.arange(shards)[:, None] * per_shard + at).reshape(-1)
  return part.reshape(width, -1), index, jnp.tile(at >= first, shards)


def _grow(highest, total, logits):
  """Returns maximum and sum of exponentials below it with logits added."""
  # The maximum only keeps exponentials in range: no gradient is due to it.
  top = jax.lax.stop_gradient(jnp.maximum(highest, jnp.max(logits, axis=-1)))
  return top, total * jnp.exp(highest - top) + jnp.sum(
    jnp.exp(logits - top[..., None]), axis=-1
  )


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
    columns, index, fresh = _columns(head, first, chunk, shards)
    logits = jnp.where(fresh, to_logits(x @ columns), -jnp.inf)
    top, total = _grow(highest, total, logits)
    is_target = fresh & (index == targets[..., None])
    picked += jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return (top, total, picked), None

  zeros = jnp.zeros(targets.shape, jnp.float32)
  start = (zeros - jnp.inf, zeros, zeros)
  (top, total, picked), _ = jax.lax.scan(
    step, start, jnp.arange(0, per_shard, chunk)
  )
  return _masked_mean(top + jnp.log(total) - picked, loss_mask)


def chunked_divergence(
  x: jax.Array,
  reference: jax.Array,
  head: jax.Array,
  loss_mask: jax.Array,
  *,
  chunk: int,
  to_logits: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Returns the mean KL divergence of predictions from a reference's.

  KL(reference || predictions) at each masked target, over the vocabulary, a
  chunk of it at a time as in `chunked_next_token_loss`. An empty mask has
  divergence 0 and gradient 0.

  Args:
    x: `float[B, L, D]`, whose product with the head is the logits.
    reference: the same of the reference; no gradient flows into it.
    head: `float[D, V]`.
    loss_mask: as of `next_token_loss`.
    chunk: columns of logits made at once.
    to_logits: what makes float32 logits of products, such as a soft cap.

  Returns:
    A float32 scalar, in nats a token.
  """
  chex.assert_rank([x, reference, head, loss_mask], [3, 3, 2, 2])
  x, reference = x[:, :-1], jax.lax.stop_gradient(reference[:, :-1])
  chunk = min(chunk, head.shape[1])

  @jax.checkpoint
  def step(carry, first):
    own, (highest, total), apart = carry
    columns, _, fresh = _columns(head, first, chunk, 1)
    mine, theirs = to_logits(x @ columns), to_logits(reference @ columns)
    own = _grow(*own, jnp.where(fresh, mine, -jnp.inf))
    top, total = _grow(highest, total, jnp.where(fresh, theirs, -jnp.inf))
    share = jnp.where(fresh, jnp.exp(theirs - top[..., None]), 0)
    apart = apart * jnp.exp(highest - top)
    apart += jnp.sum(share * (theirs - mine), axis=-1)
    return (own, (top, total), apart), None

  zeros = jnp.zeros(x.shape[:2], jnp.float32)
  start = ((zeros - jnp.inf, zeros), (zeros - jnp.inf, zeros), zeros)
  (own, theirs, apart), _ = jax.lax.scan(
    step, start, jnp.arange(0, head.shape[1], chunk)
  )
  # Of both: maximum and sum of exponentials, which normalize the logits.
  log_own, log_theirs = (top + jnp.log(total) for top, total in (own, theirs))
  return _masked_mean(apart / theirs[1] + log_own - log_theirs, loss_mask)


def hidden_distance(
  x: jax.Array, reference: jax.Array, loss_mask: jax.Array
) -> jax.Array:
  """Returns the mean squared distance of hidden states from a reference's.

  Args:
    x: `float[B, L, D]`, the states that predict the next token.
    reference: the same of the reference; no gradient flows into it.
    loss_mask: as of `next_token_loss`; states that predict a masked target
      count.

  Returns:
    A float32 scalar, the mean over targets and D; 0 of an empty mask.
  """
  chex.assert_equal_shape([x, reference])
  apart = (x - jax.lax.stop_gradient(reference)).astype(jnp.float32)
  return _masked_mean(jnp.mean(apart[:, :-1] ** 2, axis=-1), loss_mask)
