"""Settings that contradict each other are named before any work."""

import pytest

from fedjax_safety import config


def _resolve(aggregator, cohort_size=8, population=8, **kwargs):
  tree = config.to_json(config.default())
  tree['defense']['aggregator'] = aggregator
  tree['defense']['aggregator_kwargs'] = kwargs
  tree['client']['cohort_size'] = cohort_size
  tree['client']['population'] = population
  return config.resolve(tree)


def test_rules_that_need_more_than_a_round_has_are_refused():
  with pytest.raises(ValueError) as error:
    _resolve('fltrust')
  words = str(error.value)
  assert words.startswith("defense.aggregator='fltrust' needs root_delta from")
  assert 'choose another rule' in words


@pytest.mark.parametrize(
  ('name', 'kwargs'),
  [('safety_probe', {}), ('update_probe', {}), ('zeno', {'num_byzantine': 2})],
)
def test_rules_that_test_deltas_need_pairs_to_test_on(name, kwargs):
  with pytest.raises(ValueError, match=r'defense\.probe\.source=\.\.\.'):
    _resolve(name, **kwargs)


@pytest.mark.parametrize(
  ('kwargs', 'words'),
  [
    ({'limit': 0}, 'limit=0 must be greater than 0'),
    ({'num_dropped': 8}, r'num_dropped=8 must lie in \[0, 7\]'),
    ({'then': 'zeno'}, "then='zeno' is unknown"),
    ({'then': 'krum', 'then_kwargs': {'num_byzantine': 5}}, 'cohort_size >='),
    ({'then': 'krum'}, "needs the argument 'num_byzantine'"),
  ],
)
def test_a_probe_that_cannot_work_is_refused(kwargs, words):
  with pytest.raises(ValueError, match=words):
    _resolve('safety_probe', **kwargs)


@pytest.mark.parametrize('name', ['fldetector', 'foolsgold_history'])
def test_rules_that_remember_rows_need_the_same_clients(name):
  with pytest.raises(ValueError, match=r'client\.cohort_size=8 to .*=20'):
    _resolve(name, population=20)


@pytest.mark.parametrize('chunk', [3, 2])
def test_chunks_that_do_not_fill_a_mesh_are_refused(chunk):
  tree = config.to_json(config.default())
  tree['client'] |= {'cohort_size': 8, 'population': 8}
  tree['performance'] |= {'mesh': [4, 1, 1], 'clients_per_chunk': chunk}
  with pytest.raises(ValueError, match=r'mesh\[0\]=4: 4, 8'):
    config.resolve(tree)
