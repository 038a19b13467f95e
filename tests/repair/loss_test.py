"""The loss of the repair: its terms hold normal data, and by default none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import assembly, lora, losses, repair
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import templates
from fedjax_safety.models import config as model_config
from fedjax_safety.models import decoder
from fedjax_safety.repair import loss as repair_loss

pytestmark = pytest.mark.usefixtures('quick_compiles')

_CONFIG = model_config.DecoderConfig(
  vocab_size=11,
  width=8,
  num_layers=1,
  num_heads=2,
  num_kv_heads=2,
  head_width=4,
  mlp_width=8,
)
_IS_NORMAL = np.array([True, False, True, False])


@pytest.fixture(scope='module')
def model():
  """A decoder, its parameters, and two adapters that differ."""
  made = decoder.Decoder(_CONFIG)
  init = jax.jit(made.init)
  params = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
  params = jax.tree.map(lambda x: x * 5, params)

  def adapter(seed):
    key = jax.random.key(seed)
    fresh = lora.init(key, params, rank=2, target_modules=('q_proj', 'v_proj'))
    return jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), fresh)

  return made, params, adapter(1), adapter(2)


def _batch():
  rng = np.random.default_rng(3)
  mask = np.zeros((4, 6), bool)
  mask[:, 3:] = True
  tokens = rng.integers(0, 11, (4, 6), np.int32)
  return repair_loss.Batch(tokens, mask, _IS_NORMAL)


def test_without_weights_it_is_the_loss_of_training(model, tree_equal):
  made, params, adapter, attacked = model
  batch, key = _batch(), jax.random.key(4)
  # The program of the paper's repair, as it is without any term to add.
  expected = jax.jit(jax.value_and_grad(assembly.make_loss(made), argnums=1))(
    params, adapter, batch.tokens, batch.loss_mask, key
  )
  frozen = repair_loss.Frozen(params, attacked)
  (loss, parts), grads = jax.jit(
    jax.value_and_grad(repair_loss.make(made), argnums=1, has_aux=True)
  )(frozen, adapter, batch, key)
  assert parts == {} and tree_equal((loss, grads), expected)
  assert repair_loss.make(made) is repair_loss.make(made)
  assert settings_lib.RepairConfig().kl_weight == 0
  assert settings_lib.RepairConfig().anchor_weight == 0


def test_terms_count_normal_pairs_alone(model):
  made, params, adapter, attacked = model
  batch, frozen = _batch(), repair_loss.Frozen(params, attacked)
  loss_fn = jax.jit(repair_loss.make(made, kl_weight=2.0, anchor_weight=3.0))
  loss, parts = loss_fn(frozen, adapter, batch, jax.random.key(0))
  np.testing.assert_allclose(
    loss, parts['answers'] + 2 * parts['kl'] + 3 * parts['anchor'], rtol=1e-6
  )

  @jax.jit
  def logits(adapter):
    return made.apply({'params': params, 'lora': adapter}, batch.tokens)

  own, before = (jax.nn.log_softmax(logits(a)) for a in (adapter, attacked))
  each = jnp.sum(jnp.exp(before) * (before - own), axis=-1)
  expected = np.mean(np.asarray(each)[_IS_NORMAL, 2:5])
  assert expected > 1e-3
  np.testing.assert_allclose(parts['kl'], expected, rtol=1e-4)
  plain = losses.next_token_loss(logits(adapter), batch.tokens, batch.loss_mask)
  np.testing.assert_allclose(parts['answers'], plain, rtol=1e-5)

  # What aligned pairs say moves neither term.
  other = np.where(_IS_NORMAL[:, None], batch.tokens, 0)
  _, again = loss_fn(
    frozen, adapter, batch._replace(tokens=other), jax.random.key(0)
  )
  for name in ('kl', 'anchor'):
    np.testing.assert_allclose(again[name], parts[name], rtol=1e-5)
  _, same = loss_fn(frozen, attacked, batch, jax.random.key(0))
  assert abs(same['kl']) < 1e-6 and same['anchor'] == 0


@pytest.mark.parametrize('term', ['kl', 'anchor'])
def test_a_term_keeps_the_repaired_model_nearer(model, term):
  made, params, _, attacked = model
  batch = _batch()
  encoded = templates.EncodedExamples(
    batch.tokens, batch.loss_mask, np.full(4, 6), 0, 0, 0
  )
  config = settings_lib.RepairConfig(
    num_steps=40, batch_size=4, learning_rate=0.02
  )

  def moved(weight):
    chosen = dataclasses.replace(config, **{f'{term}_weight': weight})
    weights = {n: getattr(chosen, n) for n in ('kl_weight', 'anchor_weight')}
    *_, (_, adapter, values) = repair.repair(
      params,
      attacked,
      encoded,
      _IS_NORMAL,
      chosen,
      loss_fn=repair_loss.make(made, **weights),
      seed=0,
    )
    measure = jax.jit(repair_loss.make(made, kl_weight=1.0, anchor_weight=1.0))
    frozen = repair_loss.Frozen(params, attacked)
    return measure(frozen, adapter, batch, jax.random.key(0))[1][term], values

  (free, _), (held, values) = moved(0.0), moved(30.0)
  assert held < 0.5 * free
  assert set(values) == {
    'repair/loss',
    'repair/answers',
    f'repair/{term}',
    'repair/learning_rate',
  }
