"""Training losses over padded token batches."""

import chex
import jax
import jax.numpy as jnp
import optax


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
  weight = loss_mask[:, 1:].astype(per_token.dtype)
  return jnp.sum(per_token * weight) / jnp.maximum(jnp.sum(weight), 1)
