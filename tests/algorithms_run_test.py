"""Runs with other algorithms: they finish, and resume bit for bit."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from fedjax_safety import (
  assembly,
  checkpoint,
  client_data,
  config,
  federation,
  interrupt,
  metrics,
  probe,
)
from fedjax_safety.config import file as config_file
from fedjax_safety.data import cohort

pytestmark = pytest.mark.usefixtures('quick_compiles')

_PRIVATE = {
  'server.optimizer': 'fedadam',
  'server.kwargs': '{"variant": "openfedllm"}',
  'server.learning_rate': '0.01',
  'defense.aggregator': 'dp_mean_adaptive',
  'defense.aggregator_kwargs': '{"noise_multiplier": 0.1}',
}
_SETTINGS = {
  'scaffold': {'client.algorithm': 'scaffold', 'client.optimizer': 'sgd'},
  'private': _PRIVATE,
  'private_fedprox': {
    **_PRIVATE,
    'client.algorithm': 'fedprox',
    'client.algorithm_kwargs': '{"mu": 0.5}',
  },
  'lisa': {
    'client.algorithm': 'lisa',
    'client.algorithm_kwargs': '{"alignment_steps": 1, "own_steps": 1}',
    'client.cohort_size': '5',
    'client.num_local_steps': '4',
    'threat_model.num_malicious': '2',
    'threat_model.data_attack': 'generated',
    'defense.probe.num_training_pairs': '5',
  },
}


def _resolved(path, name, num_rounds):
  """Returns the settings of a run with an algorithm."""
  tree = config_file.load(str(path))
  config_file.override(tree, 'defense.probe.source', tree['data']['normal'])
  config_file.override(tree, 'evaluation.sets', '{}')
  for key, text in _SETTINGS[name].items():
    config_file.override(tree, key, text)
  config_file.override(tree, 'client.num_rounds', str(num_rounds))
  (made,) = config.resolve(tree).values()
  return made


def _federate(settings, directory):
  """Runs or resumes a federation and returns its states by round."""
  model = assembly.tuned_model(settings)
  federation.federate(
    settings,
    model,
    client_data.encode_clients(settings, client_data.honest_clients(settings)),
    arm='run',
    directory=directory,
    writer=metrics.MetricsWriter(directory / 'metrics.jsonl'),
    stop=interrupt.StopRequest(),
  )
  _, like = federation.start(settings, model, None)
  checkpointer = checkpoint.Checkpointer(directory)
  states = {
    done: checkpointer.restore(like, done)[0] for done in checkpointer.rounds()
  }
  checkpointer.close()
  return states


@pytest.fixture(scope='module')
def finished(tiny_config, tmp_path_factory):
  """Returns `(name) -> (settings, directory, states)` of three rounds."""

  @functools.cache
  def run(name, num_rounds=3):
    settings = _resolved(tiny_config, name, num_rounds)
    directory = tmp_path_factory.mktemp(name)
    return settings, directory, _federate(settings, directory)

  return run


@pytest.mark.parametrize('name', ['scaffold', 'private_fedprox', 'lisa'])
def test_resumed_equals_uninterrupted(finished, tree_equal, tmp_path, name):
  settings, directory, whole = finished(name)
  assert sorted(whole) == [1, 2, 3]
  shutil.copytree(directory / '1', tmp_path / '1')
  resumed = _federate(settings, tmp_path)
  assert int(resumed[3].round_index) == 3
  assert tree_equal(resumed[3], whole[3])


def test_the_algorithm_is_heeded(finished, tree_equal):
  _, _, fedprox = finished('private_fedprox')
  _, _, fedavg = finished('private', num_rounds=1)
  assert not tree_equal(fedprox[1].adapter, fedavg[1].adapter)


def test_scaffold_keeps_a_variate_for_each_client(finished):
  settings, _, states = finished('scaffold')
  population, cohort_size = 5, settings.client.cohort_size
  seen = set()
  for done in (1, 2):
    seen |= set(
      cohort.sample_cohort(
        population, cohort_size, round_index=done - 1, seed=settings.seed
      )
    )
    leaves = jax.tree.leaves(states[done].client_state.clients)
    rows = [np.asarray(leaf).reshape(population, -1) for leaf in leaves]
    moved = np.concatenate(rows, axis=1).any(axis=1)
    assert set(np.flatnonzero(moved)) == seen


def test_honest_clients_take_turns_between_data(tiny_config):
  settings = _resolved(tiny_config, 'lisa', 1)
  model = assembly.tuned_model(settings)
  # Of clients, and of the server, with tokens of their own.
  clients = client_data.encode_clients(
    settings, client_data.honest_clients(settings)
  )
  sent = probe.sent(settings, model)
  sent = dataclasses.replace(sent, tokens=np.full_like(sent.tokens, 29))
  plain, made = (
    federation.make_cohort(settings, clients, 0, None, pairs)
    for pairs in (None, sent)
  )
  assert made.is_malicious.sum() == 2
  # Rows are clients, then local steps.
  is_sent = (made.tokens == 29).all(axis=(2, 3))
  expected = ~made.is_malicious[:, None] & np.array([True, False, True, False])
  np.testing.assert_array_equal(is_sent, expected)
  own = (each.tokens[~expected] for each in (plain, made))
  np.testing.assert_array_equal(*own)


def test_pairs_to_send_must_be_given(tiny_config):
  tree = config_file.load(str(tiny_config))
  config_file.override(tree, 'client.algorithm', 'lisa')
  words = "algorithm='lisa' sends clients pairs .*defense.probe.source"
  with pytest.raises(ValueError, match=words):
    config.resolve(tree)
