"""Tests of the training loss against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import assembly, lora, losses
from fedjax_safety.models import config as config_lib
from fedjax_safety.models import decoder, softcap


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


def _chunked_inputs():
  rng = np.random.default_rng(1)
  _, tokens, mask = _inputs()
  x = jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32)
  # Logits far from zero, which plain exponentials would not stand.
  head = jnp.asarray(rng.normal(size=(3, 8)) * 40, jnp.float32)
  return x, head, tokens, mask


# Chunks that divide the columns and that do not, on one device and on two.
@pytest.mark.parametrize('chunk, shards', [(3, 1), (4, 2)])
@pytest.mark.parametrize('cap', [None, 30.0])
def test_chunks_give_the_same_loss_and_gradients(chunk, shards, cap):
  def to_logits(products):
    return products if cap is None else softcap.cap(products, cap)

  x, head, tokens, mask = _chunked_inputs()

  def plain(x, head):
    return losses.next_token_loss(to_logits(x @ head), tokens, mask)

  def chunked(x, head):
    return losses.chunked_next_token_loss(
      x, head, tokens, mask, chunk=chunk, shards=shards, to_logits=to_logits
    )

  expected, got = (
    jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(x, head)
    for fn in (plain, chunked)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    expected,
    got,
  )


@pytest.mark.parametrize('chunk', [3, 8])
@pytest.mark.parametrize('cap', [None, 30.0])
def test_divergence_is_that_of_whole_distributions(chunk, cap):
  def to_logits(products):
    return products if cap is None else softcap.cap(products, cap)

  x, head, _, mask = _chunked_inputs()
  reference = x + 0.1 * jnp.sin(7 * x)

  def plain(x):
    own, theirs = (
      jax.nn.log_softmax(to_logits(y @ head)) for y in (x, reference)
    )
    each = jnp.sum(jnp.exp(theirs) * (theirs - own), axis=-1)[:, :-1]
    return jnp.sum(each * mask[:, 1:]) / 3

  def chunked(x, reference):
    return losses.chunked_divergence(
      x, reference, head, mask, chunk=chunk, to_logits=to_logits
    )

  expected = jax.value_and_grad(plain)(x)
  got, (gradient, none) = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(
    x, reference
  )
  assert got > 0.01
  np.testing.assert_allclose(got, expected[0], rtol=1e-4)
  np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-4)
  assert not np.any(none)
  np.testing.assert_allclose(chunked(x, x), 0, atol=1e-5)


def test_hidden_states_are_held_where_a_target_follows():
  x, _, _, mask = _chunked_inputs()
  apart = np.zeros((2, 5, 3), np.float32)
  # Of three targets, the first two are off, by 1 and by 2 in one of D = 3.
  apart[0, 1, 0], apart[0, 2, 2] = 1.0, -2.0
  # Nobody asks what these states predict.
  apart[0, 0], apart[1, 4] = 9.0, 9.0
  found = losses.hidden_distance(x, x + apart, mask)
  np.testing.assert_allclose(found, (1 + 4) / 3 / 3, rtol=1e-5)
  assert losses.hidden_distance(x, x + 1, jnp.zeros_like(mask)) == 0


def test_a_step_of_a_model_never_holds_all_logits():
  """The head is whole, and nothing else has the vocabulary's size."""
  sizes = {'width': 16, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 2}
  config = config_lib.DecoderConfig(
    vocab_size=47, head_width=8, mlp_width=20, logit_cap=3.0, **sizes
  )
  model, tokens = decoder.Decoder(config), jnp.zeros((2, 5), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  adapter = lora.init(
    jax.random.key(0), params, rank=2, target_modules=('q_proj',)
  )

  def text(loss_chunk):
    step = jax.grad(assembly.make_loss(model, loss_chunk), argnums=1)
    shapes = (params, adapter, tokens, tokens, jax.random.key(0))
    return jax.jit(step).lower(*shapes).as_text()

  for size in ('4x47xf32', '5x47xf32', '4x10xf32'):
    # Few logits are made at once.
    assert (size in text(0)) == (size != '4x10xf32'), size
    assert (size in text(10)) == (size == '4x10xf32'), size


def test_only_many_logits_are_made_in_chunks():
  assert losses.chunk_of(400, 16 * 48) == 400
  assert losses.chunk_of(32_000, 4 * 512) < 32_000
