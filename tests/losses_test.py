"""Tests of the training loss against its definition."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_safety import losses


def _inputs():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(2, 5, 7)), jnp.float32)
  tokens = rng.integers(0, 7, (2, 5), np.int32)
  mask = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], bool)
  return logits, tokens, mask


def test_is_the_mean_over_masked_targets():
  logits, tokens, mask = _inputs()
  log_probs = np.asarray(logits) - np.log(
    np.exp(np.asarray(logits)).sum(-1, keepdims=True)
  )
  # Position 0 has nothing before it, so its mask counts for nothing.
  terms = [
    -log_probs[row, at - 1, tokens[row, at]]
    for row in range(2)
    for at in range(1, 5)
    if mask[row, at]
  ]
  assert len(terms) == 3
  found = losses.next_token_loss(logits, tokens, mask)
  np.testing.assert_allclose(found, np.mean(terms), rtol=1e-6)


def test_padding_does_not_matter():
  logits, tokens, mask = _inputs()
  other = jnp.where(mask, tokens, 0)
  found = losses.next_token_loss(logits, other, mask)
  assert found == losses.next_token_loss(logits, tokens, mask)


def test_an_empty_mask_gives_no_loss_and_no_gradient():
  logits, tokens, mask = _inputs()
  loss, grads = jax.value_and_grad(losses.next_token_loss)(
    logits, tokens, jnp.zeros_like(mask)
  )
  assert loss == 0 and not np.any(grads)
