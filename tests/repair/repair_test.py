"""Repair: order of examples, learning rates, and that it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import repair
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import templates

_EVEN = np.arange(8) % 2 == 0


def _encoded(count, *, without_answer=()):
  tokens = np.arange(count, dtype=np.int32)[:, None].repeat(4, axis=1)
  mask = np.ones((count, 4), bool)
  mask[list(without_answer)] = False
  lengths = np.full(count, 4)
  return templates.EncodedExamples(tokens, mask, lengths, 0, 0, 0)


def test_every_epoch_holds_each_example_once():
  found = repair.batches(
    _encoded(6), _EVEN[:6], num_steps=4, batch_size=3, seed=0
  )
  seen = found.tokens[:, :, 0].reshape(2, 6)
  np.testing.assert_array_equal(np.sort(seen, axis=1), [range(6)] * 2)
  assert (seen[0] != seen[1]).any()
  # Tokens are the numbers of the examples.
  np.testing.assert_array_equal(found.is_normal, _EVEN[found.tokens[:, :, 0]])


def test_examples_without_an_answer_are_left_out():
  encoded = _encoded(5, without_answer=(1, 3))
  found = repair.batches(encoded, _EVEN[:5], num_steps=6, batch_size=2, seed=0)
  assert set(found.tokens.ravel()) == {0, 2, 4} and found.loss_mask.all()
  without = _encoded(2, without_answer=(0, 1))
  with pytest.raises(ValueError, match='max_length'):
    repair.batches(without, _EVEN[:2], num_steps=1, batch_size=1, seed=0)


def test_learning_rate_falls_as_a_cosine():
  config = settings_lib.RepairConfig(
    num_steps=101, learning_rate=1.0, final_learning_rate=0.1
  )
  rates = repair.learning_rates(config)
  assert rates[0] == pytest.approx(1.0)
  assert rates[50] == pytest.approx(0.55, abs=0.02)
  assert rates[-1] == pytest.approx(0.1, abs=0.01)
  assert (np.diff(rates) < 0).all()


def test_it_walks_to_the_minimum_and_counts_its_steps():
  target = jnp.array([0.5, -0.25])

  def loss_fn(frozen, adapter, batch, key):
    del frozen, batch, key
    return jnp.sum((adapter['x'] - target) ** 2), {}

  config = settings_lib.RepairConfig(
    num_steps=125, batch_size=2, learning_rate=0.05, final_learning_rate=1e-3
  )
  done, adapters, losses = [], [], []
  for step, adapter, metrics in repair.repair(
    {},
    {'x': jnp.zeros(2)},
    _encoded(4),
    _EVEN[:4],
    config,
    loss_fn=loss_fn,
    seed=0,
  ):
    done.append(step)
    adapters.append(adapter)
    losses.append(metrics['repair/loss'])
  assert done[-1] == 125 and done == sorted(done)
  assert losses[-1] < 0.01 * losses[0]
  np.testing.assert_allclose(adapters[-1]['x'], target, atol=0.02)
  assert jax.tree.all(jax.tree.map(jnp.isfinite, adapters[-1]['x'].sum()))
