"""Runs with other algorithms: they finish, and resume bit for bit."""

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
  config_file,
  federation,
  interrupt,
  metrics,
)
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
}


def _resolved(path, name, num_rounds):
  """Returns the settings of a run with an algorithm."""
  tree = config_file.load(str(path))
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


@pytest.mark.parametrize('name', ['scaffold', 'private_fedprox'])
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
