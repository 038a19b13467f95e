"""Tests of the tree of settings."""

import json

import pytest

from fedjax_safety import config, settings

_SCAFFOLD = {'algorithm': 'scaffold', 'optimizer': 'sgd'}


def _default(**changes):
  tree = config.to_json(config.default())
  for key, value in changes.items():
    tree[key] = value
  return tree


def test_the_default_resolves_to_the_defaults():
  resolved = config.resolve(config.default())
  assert resolved == {('run', 0): settings.ExperimentConfig()}


def test_arms_override_leaves_and_keep_the_rest():
  arms = [
    {'name': 'a'},
    {'name': 'b', 'label': 'B', 'client': {'num_rounds': 3}},
  ]
  made = config.resolve(_default(arms=arms, seeds=[4, 5]))
  assert list(made) == [('a', 4), ('b', 4), ('a', 5), ('b', 5)]
  assert made['b', 5].client.num_rounds == 3
  assert made['b', 5].client.batch_size == settings.ClientConfig().batch_size
  assert made['a', 5].client.num_rounds == settings.ClientConfig().num_rounds
  assert (made['a', 4].seed, made['b', 5].label) == (4, 'B')


def test_what_is_resolved_cannot_be_changed():
  (made,) = config.resolve(config.default()).values()
  with pytest.raises(AttributeError):
    made.client.num_rounds = 3
  with pytest.raises(TypeError):
    made.defense.aggregator_kwargs['x'] = 1


def test_json_of_a_config_resolves_to_the_same():
  tree = config.default()
  tree.evaluation.sets.x = {'source': 'f.csv', 'where': {'label': 'safe'}}
  again = json.loads(json.dumps(config.to_json(tree)))
  assert config.resolve(again) == config.resolve(tree)
  (made,) = config.resolve(again).values()
  assert made.evaluation.sets['x'].where == {'label': 'safe'}


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'cliemt': {}}, "cliemt (did you mean 'client'?)"),
    ({'client': {'num_round': 1}}, "(did you mean 'num_rounds'?)"),
    ({'client': 3}, 'client=3 must be a group'),
    ({'client': {'num_rounds': True}}, 'must be of type int'),
    ({'client': {'num_rounds': 1.5}}, 'must be of type int'),
    ({'evaluation': {'rules': 'openfedllm35'}}, 'must be a list'),
    ({'evaluation': {'rules': []}}, 'both empty'),
    ({'evaluation': {'sets': {'x': {'rle': ''}}}}, 'evaluation.sets.x.rle'),
    ({'defense': {'aggregator_kwargs': 1}}, 'must be a mapping'),
    ({'client': {'algorithm': 'fedporx'}}, "(did you mean 'fedprox'?)"),
    ({'client': {'optimizer': 'sdg'}}, "(did you mean 'sgd'?)"),
    ({'client': {'algorithm': 'scaffold'}}, "needs client.optimizer='sgd'"),
    ({'client': _SCAFFOLD | {'final_learning_rate': 0.0}}, 'above 0'),
    (
      {'client': _SCAFFOLD, 'defense': {'lora_aggregation': 'rolora'}},
      'one of factors, ffa, ffa_product',
    ),
    (
      {'client': {'algorithm': 'fedprox', 'algorithm_kwargs': {'mu': 'x'}}},
      'has the wrong type',
    ),
    (
      {'server': {'optimizer': 'fedadam', 'kwargs': {'variant': 'adam'}}},
      "variant='adam' is unknown",
    ),
    ({'seeds': []}, 'seeds=()'),
    ({'seeds': [-1]}, 'seeds=-1 must be at least 0'),
    ({'seeds': 1}, 'seeds=1 must be a list'),
    ({'arms': [{}]}, 'needs a name'),
    ({'arms': ['x']}, 'needs a name'),
  ],
)
def test_mistakes_are_named(changes, words):
  with pytest.raises(ValueError) as error:
    config.resolve(_default(**changes))
  assert words in str(error.value)


def test_differences_name_the_keys():
  new = _default(label='x')
  new['client']['num_rounds'] = 3
  new['defense']['aggregator_kwargs'] = {'num_byzantine': 1}
  assert config.differences(_default(), new) == [
    'client.num_rounds: 100 -> 3',
    "defense.aggregator_kwargs.num_byzantine: '(absent)' -> 1",
    "label: '' -> 'x'",
  ]


def test_a_digest_tells_settings_apart_and_not_orders():
  one = settings.ExperimentConfig()
  assert config.digest(one) == config.digest(settings.ExperimentConfig())
  assert config.digest(one) != config.digest(settings.ExperimentConfig(seed=1))
  assert config.digest({'a': 1, 'b': 2}) == config.digest({'b': 2, 'a': 1})
