"""Early stopping of the repair: what is held out, and which adapter is kept."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import arm as arm_lib
from fedjax_safety import assembly, config, interrupt, losses, metrics, stages
from fedjax_safety import settings as settings_lib
from fedjax_safety.config import file as config_file
from fedjax_safety.data import sources
from fedjax_safety.repair import early_stopping
from fedjax_safety.settings import repair as repair_settings

pytestmark = pytest.mark.usefixtures('quick_compiles')


def _pairs(kind, prompts):
  return [sources.Example(p, f'to {p}', {'kind': kind}) for p in prompts]


def _settings(num_steps=100, **kwargs):
  chosen = repair_settings.EarlyStoppingConfig(held_out_share=0.2, **kwargs)
  return settings_lib.RepairConfig(num_steps=num_steps, early_stopping=chosen)


def test_requests_of_aligned_pairs_are_held_out_whole():
  # Where a model wrote too few, requests come more than once.
  pairs = _pairs('aligned', [f'Ask {i % 10}!' for i in range(25)])
  pairs += _pairs('aligned', ['ask 3', 'ASK  4'])
  pairs += _pairs('normal', [f'do {i}' for i in range(30)])
  trained, held = early_stopping.split(pairs, 0.2, seed=0)
  assert sorted(trained + held, key=str) == sorted(pairs, key=str)

  def asked(part):
    return {' '.join(e.prompt.lower().strip('!').split()) for e in part}

  assert {pair.metadata['kind'] for pair in held} == {'aligned'}
  assert len(asked(held)) == 2 and not asked(held) & asked(trained)
  assert (trained, held) == early_stopping.split(pairs, 0.2, seed=0)
  assert (trained, held) != early_stopping.split(pairs, 0.2, seed=1)
  assert early_stopping.split(pairs, 0.0, seed=0) == (pairs, [])
  normal = _pairs('normal', [f'do {i}' for i in range(10)])
  assert len(early_stopping.split(normal, 0.2, seed=0)[1]) == 2
  with pytest.raises(ValueError, match='leaves none of 1 pairs'):
    early_stopping.split(normal[:1], 0.1, seed=0)


def _progress(count, taken):
  for step in range(10, 10 * count + 1, 10):
    taken.append(step)
    yield step, {'x': step}, {'repair/loss': 0.0}


@pytest.mark.parametrize(
  ('every', 'patience', 'last', 'kept'),
  # Losses fall to 30, rise to 50, and are least at 80.
  [(10, 2, 50, 30), (10, 9, 100, 80), (20, 2, 100, 80), (30, 1, 60, 30)],
)
def test_the_best_adapter_is_kept_and_the_rest_never_run(
  every, patience, last, kept
):
  found = [5.0, 4.0, 3.0, 3.5, 4.5, 3.2, 3.1, 1.0, 3.0, 3.0]
  taken, measured = [], []

  def measure(adapter):
    measured.append(adapter['x'])
    return found[adapter['x'] // 10 - 1]

  steps = list(
    early_stopping.best(
      _progress(10, taken),
      measure,
      _settings(every_steps=every, patience=patience),
    )
  )
  assert taken[-1] == steps[-1][0] == last
  assert steps[-1][1] == {'x': kept}
  assert steps[-1][2]['repair/best_step'] == kept
  assert measured == [s for s in taken if s % every == 0 or s == 100]
  assert ('repair/held_out_loss' in steps[0][2]) == (every == 10)


def test_a_loss_that_is_no_number_is_never_the_best():
  steps = early_stopping.best(
    _progress(4, []), lambda adapter: float('nan'), _settings(patience=2)
  )
  assert [done for done, _, _ in steps] == [10, 20]


def test_the_loss_held_out_is_that_of_all_pairs_at_once(tiny_config):
  tree = config_file.load(str(tiny_config))
  config_file.override(tree, 'lora.dropout', '0.5')
  (settings,) = config.resolve(tree).values()
  model = assembly.tuned_model(settings)
  pairs = _pairs('normal', ['a b c', 'd e', 'tell me how', 'make f', 'h'])
  # Two examples at a time, so that the last batch is not full.
  assert settings.defense.repair.batch_size == 2
  measure = early_stopping.held_out_loss(pairs, model, settings)
  encoded = assembly.encode(pairs, model, settings)
  logits = jax.jit(assembly.make_decoder(model, settings).apply)(
    {'params': model.base_params}, encoded.tokens
  )
  expected = losses.next_token_loss(
    logits, jnp.asarray(encoded.tokens), encoded.loss_mask
  )
  np.testing.assert_allclose(measure({}), expected, rtol=1e-5)


def test_a_repair_with_all_of_it_is_the_same_again(
  tiny_config, tiny_data, tree_equal, tmp_path
):
  tree = config_file.load(str(tiny_config))
  for key, value in {
    'public_aligned': str(tiny_data),
    'kl_weight': '0.5',
    'anchor_weight': '0.5',
    'learning_rate': '0.01',
    'early_stopping.held_out_share': '0.25',
  }.items():
    config_file.override(tree, f'defense.repair.{key}', value)
  (settings,) = config.resolve(tree).values()
  adapter = stages.given_adapter(
    dataclasses.replace(settings, given_adapter=settings_lib.NO_ADAPTER)
  )

  def repaired(name):
    path = tmp_path / name / 'metrics.jsonl'
    with metrics.MetricsWriter(path) as writer, interrupt.StopRequest() as stop:
      arm = arm_lib.Arm('run', 0, settings, tmp_path / name, writer, stop)
      made = stages.repair(arm, 'public', adapter)
    lines = path.read_text().splitlines()
    return made, [json.loads(line) for line in lines]

  (first, told), (again, _) = repaired('first'), repaired('again')
  assert tree_equal(first, again) and not tree_equal(first, adapter)
  assert [record['step'] for record in told] == [10, 20]
  for record in told:
    assert record['repair/held_out_loss'] > 0 and record['repair/kl'] >= 0
    assert record['repair/anchor'] > 0 and record['repair/best_step'] in (
      10,
      20,
    )


@pytest.mark.parametrize(
  ('key', 'value', 'words'),
  [
    ('every_steps', 15, 'every_steps=15 must be a multiple of 10'),
    ('every_steps', 0, 'must be a multiple of 10'),
    ('patience', 0, 'patience=0'),
    ('held_out_share', 1.0, 'held_out_share=1.0'),
  ],
)
def test_what_cannot_be_is_refused(key, value, words):
  tree = config.to_json(config.default())
  tree['defense']['repair']['early_stopping'][key] = value
  with pytest.raises(ValueError, match=words):
    config.resolve(tree)
