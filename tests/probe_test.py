"""Runs whose server tests deltas on its own pairs, measured on the way."""

import json
import shutil

import jax
import numpy as np
import pytest

from fedjax_safety import (
  assembly,
  config,
  experiment,
  federation,
  metrics,
  probe,
)
from fedjax_safety.config import file as config_file

pytestmark = pytest.mark.usefixtures('quick_compiles')

_SETTINGS = {
  'defense.aggregator': 'safety_probe',
  'defense.probe.num_pairs': '5',
  'defense.probe.num_tokens': '2',
  'client.num_rounds': '3',
  'lora.dropout': '0.1',
  'evaluation.every_rounds': '2',
  'evaluation.headline_set': 'asked',
}


@pytest.fixture(scope='module')
def made(tiny_config, tiny_data):
  """The config of a run with a probe."""
  tree = config_file.load(str(tiny_config))
  for key, text in _SETTINGS.items():
    config_file.override(tree, key, text)
  config_file.override(tree, 'defense.probe.source', str(tiny_data))
  task = {'source': str(tiny_data), 'role': 'task', 'limit': 2}
  tree['evaluation']['sets']['tasks'] = task
  return tree


@pytest.fixture(scope='module')
def settings(made):
  """The same, resolved."""
  (resolved,) = config.resolve(made).values()
  return resolved


@pytest.fixture(scope='module')
def finished(made, tmp_path_factory):
  """The work directory of a finished run."""
  directory = tmp_path_factory.mktemp('probe') / 'run'
  experiment.run(made, directory)
  return directory


def _rounds(directory):
  records = metrics.read(directory / 'metrics.jsonl')
  return {r['round']: r for r in records if r['kind'] == 'round'}


def test_every_round_tells_what_each_row_did(finished):
  for record in _rounds(finished).values():
    assert len(record['defense/client_scores']) == 3
    assert record['defense/probe_loss'] > 0
    assert sum(record['defense/client_weights']) == pytest.approx(1)


def test_rounds_are_measured_as_often_as_asked(finished):
  rounds = _rounds(finished)
  keys = {k for k in rounds[1] if k.startswith(('safety/', 'helpfulness/'))}
  assert keys == {
    'safety/rule_openfedllm36',
    'safety/rule_openfedllm35',
    'helpfulness/exact_match',
  }
  for number in (0, 2):
    assert not keys & rounds[number].keys()


def test_the_last_round_is_measured_as_the_end_is(made, tmp_path):
  made = json.loads(json.dumps(made))
  made['client']['num_rounds'] = 2
  experiment.run(made, tmp_path / 'run')
  path = tmp_path / 'run/runs/run/seed_0/evaluations/federated.jsonl'
  answers = [json.loads(line) for line in path.read_text().splitlines()][1:]
  safe = [
    r['verdicts']['rule_openfedllm36'] for r in answers if r['set'] == 'asked'
  ]
  found = _rounds(tmp_path / 'run')[1]['safety/rule_openfedllm36']
  assert found == np.mean(safe)
  assert (tmp_path / 'run/plots/served.png').stat().st_size


def test_a_resumed_run_is_measured_where_it_goes_on(made, finished, tmp_path):
  directory = tmp_path / 'run'
  shutil.copytree(finished, directory)
  arm = directory / 'runs/run/seed_0'
  for part in ('adapters', 'evaluations', 'checkpoints/2', 'checkpoints/3'):
    shutil.rmtree(arm / part)
  (directory / 'metrics.jsonl').unlink()
  experiment.run(made, directory)
  resumed, whole = _rounds(directory), _rounds(finished)
  assert sorted(resumed) == [1, 2]
  for number, record in resumed.items():
    for key in record:
      assert key.startswith('time/') or record[key] == whole[number][key]


def test_the_audit_counts_the_probe(finished):
  rows = json.loads((finished / 'runs/run/seed_0/audit.json').read_text())
  (row,) = (r for r in rows if 'defense, probe' in (r['a'], r['b']))
  assert (row['a'], row['b']) == ('defense, probe', 'evaluation, asked')
  assert row['size_a'] == 5
  # The set asked is the start of the file that the probe is drawn from.
  assert row['exact'] == 0


def test_too_few_pairs_are_refused(made, tmp_path):
  made = json.loads(json.dumps(made))
  made['defense']['probe']['num_pairs'] = 1000
  with pytest.raises(ValueError, match='num_pairs=1000, but .* has .* pairs'):
    experiment.run(made, tmp_path / 'run')


def test_the_probe_is_the_mean_over_first_tokens(settings):
  model = assembly.tuned_model(settings)
  tokens, mask = probe.batches(settings, model)
  pairs = probe.held_pairs(settings)
  assert len(pairs) == 5 and mask.any(axis=2).sum() == 5
  assert (mask.sum(axis=2) <= 2).all()
  adapter = federation.fresh_adapter(settings, model, None)
  moved = jax.tree.map(lambda x: x + 0.1, adapter)
  found = probe.make(settings, model, (tokens, mask))(model.base_params, moved)
  plain = assembly.make_decoder(model, settings)
  flat = tokens.reshape(-1, tokens.shape[-1])
  logits = plain.apply({'params': model.base_params, 'lora': moved}, flat)
  log_p = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
  picked = np.take_along_axis(log_p, flat[:, 1:, None], axis=2)[..., 0]
  at = mask.reshape(flat.shape)[:, 1:]
  assert float(found) == pytest.approx(-picked[at].mean(), rel=1e-5)


@pytest.fixture
def teaching(made, tiny_data):
  """The config of a round whose server trains deltas of its own."""
  made = json.loads(json.dumps(made))
  made['defense']['aggregator'] = 'update_probe'
  made['defense']['probe'] |= {
    'normal': str(tiny_data),
    'unaligned': str(tiny_data),
    'num_training_pairs': 6,
    'num_references': 2,
  }
  made['client']['num_rounds'] = 1
  made['evaluation']['every_rounds'] = 0
  return made


def test_the_server_trains_deltas_of_its_own_pairs(teaching, tmp_path):
  experiment.run(teaching, tmp_path / 'run')
  (record,) = _rounds(tmp_path / 'run').values()
  unsafe = record['defense/probe_unsafe_by_row']
  assert len(unsafe) == 3 and all(0 < p < 1 for p in unsafe)
  (settings,) = config.resolve(teaching).values()
  assert len(probe.held_pairs(settings)) == 18


def test_references_are_of_three_kinds(teaching):
  (settings,) = config.resolve(teaching).values()
  tokens = np.arange(3)[:, None, None] * np.ones((3, 4, 16), np.int32)
  make = probe.make_references(settings, (tokens, tokens > 0))
  drawn, mask, is_unsafe = make(jax.random.key(0))
  assert drawn.shape == mask.shape == (6, 2, 2, 16)
  assert drawn[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
  assert np.asarray(is_unsafe).tolist() == [False] * 4 + [True] * 2
