"""Tests of counting operations, against arithmetic on the model's sizes."""

import jax
import jax.numpy as jnp
import pytest

from fedjax_safety import lora, losses
from fedjax_safety.models import config as model_config
from fedjax_safety.models import decoder, sharding
from fedjax_safety.plan import flops

BATCH, LENGTH, RANK = 2, 12, 3
MODEL = model_config.DecoderConfig(
  vocab_size=40,
  width=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_width=6,
  mlp_width=20,
)


def _gradient(**kwargs):
  """Returns the traced gradient of one batch's loss."""
  tokens = jnp.zeros((BATCH, LENGTH), jnp.int32)
  model = decoder.Decoder(MODEL, **kwargs)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  adapter = lora.init(
    jax.random.key(0), params, rank=RANK, target_modules=('q_proj', 'up_proj')
  )

  def loss(adapter, params, tokens):
    logits = model.apply({'params': params, 'lora': adapter}, tokens)
    return losses.next_token_loss(logits, tokens, jnp.ones_like(tokens))

  return jax.jit(jax.grad(loss)).trace(adapter, params, tokens)


def _attention(products, length):
  """Operations of attention in a layer, by the products over all pairs."""
  heads = MODEL.num_heads * MODEL.head_width
  return products * 2 * BATCH * length**2 * heads


def _expected():
  """Operations by hand: 4 a frozen weight and token, 6 a trained one."""
  heads = MODEL.num_heads * MODEL.head_width
  keys = MODEL.num_kv_heads * MODEL.head_width
  kernels = MODEL.width * (2 * heads + 2 * keys + 3 * MODEL.mlp_width)
  factors = RANK * (MODEL.width + heads + MODEL.width + MODEL.mlp_width)
  layer = BATCH * LENGTH * (4 * kernels + 6 * factors)
  # Two products forward and four backward.
  layer += _attention(6, LENGTH)
  head = 4 * MODEL.width * MODEL.vocab_size
  return MODEL.num_layers * layer + BATCH * LENGTH * head


def test_a_step_has_the_operations_of_arithmetic():
  assert flops.of(_gradient()) == _expected()


def test_a_kernel_counts_on_every_device_that_runs_it():
  # One product more, of scores that were not kept; lengths in whole lanes. And
  # the outputs times their gradients are written as one.
  layer = _attention(7, 128) + _attention(1, 128) // 128
  layer -= _attention(6, LENGTH)
  expected = _expected() + MODEL.num_layers * layer
  assert flops.of(_gradient(attention='splash')) == expected
  mesh = sharding.make_mesh(1, 2, 1, devices=jax.devices('cpu') * 2)
  assert flops.of(_gradient(attention='splash', mesh=mesh)) == expected


def test_recomputation_adds_a_forward_pass_of_the_blocks():
  ratio = flops.of(_gradient(remat=True)) / _expected()
  assert 1.3 < ratio < 1.5


@pytest.mark.parametrize('length', [1, 7])
def test_a_loop_counts_as_often_as_it_runs(length):
  def body(carry, _):
    return carry @ carry, None

  def looped(x):
    return jax.lax.scan(body, x, None, length=length)[0]

  traced = jax.jit(looped).trace(jnp.ones((4, 4)))
  assert flops.of(traced) == length * 2 * 4**3


def test_a_condition_counts_its_dearest_branch():
  def chosen(which, x):
    return jax.lax.cond(which, lambda x: x @ x, lambda x: x @ x @ x, x)

  assert flops.of(jax.jit(chosen).trace(True, jnp.ones((4, 4)))) == 4 * 4**3


def test_a_convolution_counts_its_window():
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1,), 'VALID')

  traced = jax.jit(convolve).trace(jnp.ones((2, 3, 9)), jnp.ones((5, 3, 4)))
  assert flops.of(traced) == 2 * (2 * 5 * 6) * (3 * 4)
