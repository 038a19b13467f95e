"""Tests of the rounds of an arm: the schedule, and many devices equal one."""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import assembly, client_data, config, federation, settings
from fedjax_safety.config import file as config_file

# Sizes of the mesh's axes; after the bar, clients trained at once.
MESHES = ('1,1,1', '8,1,1', '2,2,2', '1,4,2')
CHUNKED = '2,2,2/4'
RULES = ('mean', 'median', 'krum', 'scaffold')

# SGD on the clients, for Adam amplifies rounding.
_PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from fedjax_safety import (
  assembly, client_data, config, federation)
from fedjax_safety.config import file as config_file

path, output, rules, *meshes = sys.argv[1:]
out = {}
for rule in rules.split(','):
  for mesh in meshes:
    axes, _, chunk = mesh.partition('/')
    if chunk and rule != 'mean':
      continue
    tree = config_file.load(path)
    for key, text in {
      'client.population': '8', 'client.cohort_size': '8',
      'client.batch_size': '4', 'data.examples_per_client': '3',
      'server.optimizer': 'fedavgm', 'client.optimizer': 'sgd',
      'client.algorithm': 'scaffold' if rule == 'scaffold' else 'fedavg',
      'defense.aggregator': 'mean' if rule == 'scaffold' else rule,
      'defense.aggregator_kwargs':
        '{"num_byzantine": 2}' if rule == 'krum' else '{}',
      'performance.mesh': axes,
      'performance.clients_per_chunk': chunk or '0',
    }.items():
      config_file.override(tree, key, text)
    (settings,) = config.resolve(tree).values()
    model = assembly.tuned_model(settings)
    clients = client_data.encode_clients(
      settings, client_data.honest_clients(settings))
    device_mesh = assembly.mesh_of(settings.performance)
    round_fn, state = federation.start(settings, model, device_mesh)
    before = state.adapter
    for index in range(2):
      state, metrics = round_fn(
        model.base_params, state,
        federation.make_cohort(settings, clients, index, device_mesh),
        jax.random.key(5), jnp.float32(0.5))
    out[f'{rule} {mesh} compiled'] = round_fn._cache_size()
    for name, tree in (
      ('', state.adapter),
      ('change ', jax.tree.map(jnp.subtract, state.adapter, before)),
    ):
      for i, leaf in enumerate(jax.tree.leaves(tree)):
        out[f'{rule} {mesh} {name}{i}'] = jax.device_get(leaf)
np.savez(output, **out)
"""


@pytest.fixture(scope='module')
def eight(quick_jax, tiny_config, tmp_path_factory):
  """What eight devices give by rule and mesh, and what was said."""
  folder = tmp_path_factory.mktemp('eight')
  (folder / 'program.py').write_text(_PROGRAM)
  root = pathlib.Path(__file__).parents[1]
  path = os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')])
  done = subprocess.run(
    [
      sys.executable,
      str(folder / 'program.py'),
      str(tiny_config),
      str(folder / 'out.npz'),
      ','.join(RULES),
      *MESHES,
      CHUNKED,
    ],
    env={
      **os.environ,
      **quick_jax,
      'PYTHONPATH': path,
      'JAX_NUM_CPU_DEVICES': '8',
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return dict(np.load(folder / 'out.npz')), done.stderr


@pytest.mark.parametrize(
  ('rule', 'mesh'),
  [*itertools.product(RULES, MESHES[1:]), ('mean', CHUNKED)],
)
def test_eight_devices_give_what_one_gives(eight, rule, mesh):
  """Only sums in another order differ: by few units in the last place.

  Entries are below 1, where float32 numbers lie 6e-8 apart, and are rounded
  four times in each of two rounds: twice on the client, in its delta and on
  the server.
  """
  found, _ = eight
  for part in range(4):
    one, many = (found[f'{rule} {m} {part}'] for m in ('1,1,1', mesh))
    change = found[f'{rule} 1,1,1 change {part}']
    assert np.abs(change).max() > 1e-3 and np.abs(one).max() < 1
    np.testing.assert_allclose(many, one, rtol=0, atol=8 * 6e-8)


@pytest.mark.parametrize('mesh', MESHES)
def test_each_run_compiles_its_round_once(eight, mesh):
  assert all(eight[0][f'{rule} {mesh} compiled'] == 1 for rule in RULES)


def test_no_layout_forces_a_full_copy(eight):
  assert 'Involuntary full rematerialization' not in eight[1]


def test_a_whole_run_on_a_mesh(quick_jax, tiny_config, tmp_path):
  root = pathlib.Path(__file__).parents[1]
  path = os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')])
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'fedjax_safety.main',
      'run',
      f'--config={tiny_config}',
      f'--workdir={tmp_path}/run',
      '--config.performance.mesh=3,1,2',
      '--config.client.num_rounds=2',
      '--config.defense.repair.levels=public',
    ],
    env={
      **os.environ,
      **quick_jax,
      'PYTHONPATH': path,
      'JAX_NUM_CPU_DEVICES': '8',
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 'Involuntary full rematerialization' not in done.stderr
  stages = tmp_path / 'run' / 'runs' / 'run' / 'seed_0' / 'evaluations'
  rows = (stages / 'repair_public.jsonl').read_text().splitlines()
  assert len([r for r in rows if json.loads(r)['kind'] == 'record']) == 4


def test_learning_rate_is_a_cosine_over_rounds():
  config = settings.ClientConfig(
    num_rounds=5, learning_rate=3.0, final_learning_rate=1.0
  )
  rates = [federation.learning_rate(config, i) for i in range(5)]
  expected = [3, 2 + 0.5**0.5, 2, 2 - 0.5**0.5, 1]
  np.testing.assert_allclose(rates, expected, rtol=1e-12)
  one = settings.ClientConfig(num_rounds=1, learning_rate=3.0)
  assert federation.learning_rate(one, 0) == 3.0


@pytest.fixture(scope='module')
def one_round(tiny_config, tmp_path_factory, quick_compiles):
  """Returns `(update_attack, kwargs) -> metrics` of a round on poisoned data.

  Two of three clients are honest; the last one holds nothing but unaligned
  pairs.
  """
  pairs = [{'prompt': f'ask {i}', 'response': f'no {i}'} for i in range(9)]
  path = tmp_path_factory.mktemp('pairs') / 'pairs.json'
  path.write_text(json.dumps(pairs))

  @functools.cache
  def run(update_attack, **kwargs):
    tree = config_file.load(str(tiny_config))
    for key, text in {
      'client.population': '3',
      'threat_model.num_malicious': '1',
      'threat_model.data_attack': 'file',
      'threat_model.unaligned': str(path),
      'threat_model.update_attack': update_attack,
      'threat_model.update_attack_kwargs': json.dumps(kwargs),
    }.items():
      config_file.override(tree, key, text)
    (made,) = config.resolve(tree).values()
    unaligned = assembly.examples(
      made.threat_model.unaligned, count=None, seed=0
    )
    clients = client_data.encode_clients(
      made,
      client_data.poisoned(made, client_data.honest_clients(made), unaligned),
    )
    model = assembly.tuned_model(made)
    round_fn, state = federation.start(made, model, None)
    cohort = federation.make_cohort(made, clients, 0, None)
    _, metrics = round_fn(
      model.base_params, state, cohort, jax.random.key(5), jnp.float32(0.01)
    )
    return cohort.is_malicious, metrics

  return run


@pytest.mark.parametrize(
  ('update_attack', 'kwargs', 'factor'),
  [('scaling', {'factor': 4.0}, 4.0), ('optimal_ipm', {}, None)],
)
def test_update_attacks_work_on_poisoned_clients(
  one_round, update_attack, kwargs, factor
):
  """The delta that is scaled is the one trained on the unaligned pairs."""
  is_malicious, plain = one_round('none')
  _, attacked = one_round(update_attack, **kwargs)
  assert is_malicious.sum() == 1
  # The data decide the losses, and the attack on the deltas comes after.
  np.testing.assert_array_equal(
    attacked['client/loss_by_row'], plain['client/loss_by_row']
  )
  norms, before = (
    np.asarray(metrics['client/delta_norm_by_row'])
    for metrics in (attacked, plain)
  )
  np.testing.assert_array_equal(norms[~is_malicious], before[~is_malicious])
  if factor:
    np.testing.assert_allclose(
      norms[is_malicious], factor * before[is_malicious], rtol=1e-6
    )
  else:
    # Against a plain mean the search ends only with its evaluations.
    assert norms[is_malicious] > 100 * before[~is_malicious].max()


def test_factors_that_look_honest_come_from_poisoned_clients(one_round):
  is_malicious, plain = one_round('none')
  _, attacked = one_round('gap')
  norms = np.asarray(attacked['client/delta_norm_by_row'])
  before = np.asarray(plain['client/delta_norm_by_row'])
  np.testing.assert_array_equal(norms[~is_malicious], before[~is_malicious])
  # Every factor has a mean norm, so that all together are below the largest.
  assert 0 < norms[is_malicious] <= 1.0001 * norms[~is_malicious].max()
  assert norms[is_malicious] != before[is_malicious]


@pytest.mark.parametrize(
  ('scheme', 'algorithm', 'sent', 'got'),
  [
    ('factors', 'fedavg', (20 + 30, 20 + 30), 50),
    ('ffa', 'fedavg', (30, 30), 50),
    ('rolora', 'fedavg', (30, 20), 50),
    ('factors', 'scaffold', (50, 50), 100),
  ],
)
def test_traffic_is_what_a_round_trains_and_sends(
  tiny_config, scheme, algorithm, sent, got
):
  tree = config_file.load(str(tiny_config))
  for key, text in {
    'defense.lora_aggregation': scheme,
    'client.algorithm': algorithm,
    'client.optimizer': 'sgd',
  }.items():
    config_file.override(tree, key, text)
  (made,) = config.resolve(tree).values()
  parts = federation.choose_parts(made)
  adapter = {'q': {'a': jnp.zeros((1, 10, 2)), 'b': jnp.zeros((1, 2, 15))}}
  state = parts.init_state(adapter)
  for round_index, number in enumerate(sent):
    assert federation.traffic(parts, state, round_index) == {
      'communication/upload_bytes': 4 * number,
      'communication/download_bytes': 4 * got,
    }


@pytest.mark.parametrize('malicious', [True, False])
def test_a_rate_of_nobody_is_not_recorded(malicious):
  found = {'defense/detection_recall': np.float32(0.5 if malicious else np.nan)}
  found |= {'client/loss': np.float32(np.nan)}
  record = federation._record(settings.ExperimentConfig(), 'arm', 0, found, 1.0)
  assert ('defense/detection_recall' in record) == malicious
  assert np.isnan(record['client/loss'])
