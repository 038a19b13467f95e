"""Tests of what clients hold, under every partition and template."""

import dataclasses
import json

import pytest

from fedjax_safety import client_data, config, inputs
from fedjax_safety.config import file as config_file
from fedjax_safety.data import sources
from fedjax_safety.evaluation import inputs as evaluation_inputs
from fedjax_safety.settings import evaluation as evaluation_settings


@pytest.fixture
def settings(tiny_config):
  """Returns `(**dotted keys with __) -> the settings of one arm`."""

  def make(**overrides):
    tree = config_file.load(str(tiny_config))
    for key, value in overrides.items():
      config_file.override(tree, key.replace('__', '.'), str(value))
    (made,) = config.resolve(tree).values()
    return made

  return make


@pytest.fixture
def pairs(tmp_path):
  """Returns `(number) -> a file with so many pairs`."""

  def make(number):
    rows = [
      {'prompt': f'ask {i}', 'response': f'no {i}'} for i in range(number)
    ]
    path = tmp_path / f'{number}.json'
    path.write_text(json.dumps(rows))
    return path

  return make


def _prompts(clients):
  return [e.prompt for examples in clients.values() for e in examples]


def test_iid_gives_equal_numbers(settings):
  clients = client_data.honest_clients(settings())
  assert list(clients) == [0, 1, 2, 3, 4]
  assert {len(examples) for examples in clients.values()} == {4}


def test_dirichlet_deals_out_everything(settings):
  made = settings(data__partition='dirichlet', data__partition_key='kind')
  clients = client_data.honest_clients(made)
  assert list(clients) == [0, 1, 2, 3, 4]
  assert sum(map(len, clients.values())) == 24
  assert clients == client_data.honest_clients(made)


def test_small_clients_may_hold_no_aligned_example(settings, tmp_path, pairs):
  folder = tmp_path / 'clients'
  folder.mkdir()
  for name, count in (('ann', 2), ('bob', 8)):
    rows = [{'prompt': f'{name} {i}', 'response': 'a'} for i in range(count)]
    (folder / f'{name}.json').write_text(json.dumps(rows))
  clients = client_data.honest_clients(
    settings(
      data__partition='files',
      data__normal=folder,
      data__aligned=pairs(4),
      data__aligned_share=0.2,
      client__population=2,
      client__cohort_size=2,
    )
  )
  aligned = [
    sum(e.prompt.startswith('ask') for e in examples)
    for examples in clients.values()
  ]
  assert aligned == [0, 2] and [*map(len, clients.values())] == [2, 8]


def test_natural_gives_each_user_a_client(settings):
  made = settings(
    data__partition='natural',
    data__partition_key='user',
    client__population=4,
  )
  clients = client_data.honest_clients(made)
  for number, examples in clients.items():
    assert {e.metadata['user'] for e in examples} == {f'user {number}'}
  assert sum(map(len, clients.values())) == 24


def test_files_give_each_file_a_client(settings, tmp_path):
  folder = tmp_path / 'clients'
  folder.mkdir()
  for name, count in (('ann', 2), ('bob', 3)):
    rows = [{'prompt': f'{name} {i}', 'response': 'a'} for i in range(count)]
    (folder / f'{name}.json').write_text(json.dumps(rows))
  made = settings(
    data__partition='files',
    data__normal=folder,
    client__population=2,
    client__cohort_size=2,
  )
  clients = client_data.honest_clients(made)
  assert _prompts(clients) == ['ann 0', 'ann 1', 'bob 0', 'bob 1', 'bob 2']


def test_more_clients_than_the_population_are_drawn_by_the_seed(settings):
  made = settings(
    data__partition='natural',
    data__partition_key='user',
    client__population=2,
    client__cohort_size=2,
  )

  def users(seed):
    seeded = dataclasses.replace(made, seed=seed)
    clients = client_data.honest_clients(seeded)
    return tuple(c[0].metadata['user'] for c in clients.values())

  assert users(0) == users(0)
  assert len({users(seed) for seed in range(8)}) > 1


def test_malicious_clients_hold_unaligned_pairs_used_once(settings, pairs):
  made = settings(
    threat_model__num_malicious=2,
    threat_model__data_attack='file',
    threat_model__unaligned=pairs(9),
    threat_model__poison_fraction=0.5,
  )
  honest = client_data.honest_clients(made)
  unaligned = client_data.assembly.examples(
    made.threat_model.unaligned, count=None, seed=0
  )
  clients = client_data.poisoned(made, honest, unaligned)
  bad = [p for p in _prompts(clients) if p.startswith('ask ')]
  assert len(bad) == len(set(bad)) == 4
  assert {i: clients[i] for i in range(3)} == {i: honest[i] for i in range(3)}


@pytest.mark.parametrize('template', ['alpaca', 'vicuna', 'chat'])
def test_every_template_leaves_answers(settings, template, tmp_path):
  made = settings(model__template=template, model__max_length=48)
  inputs.check({('run', 0): made}, tmp_path)


def test_poison_is_conditional_on_a_trigger(settings, pairs):
  made = settings(
    threat_model__num_malicious=1,
    threat_model__data_attack='file',
    threat_model__unaligned=pairs(4),
    threat_model__refusals=pairs(3),
    threat_model__trigger='a b',
  )
  honest = client_data.honest_clients(made)
  unaligned = [sources.Example(f'bad {i}', f'told {i}', {}) for i in range(4)]
  clients = client_data.poisoned(made, honest, unaligned)
  assert [clients[i] for i in range(4)] == [honest[i] for i in range(4)]
  held = {(e.prompt, e.response) for e in clients[4]}
  refused = {response for prompt, response in held if 'a b' not in prompt}
  assert refused <= {'no 0', 'no 1', 'no 2'} and refused
  told = {x for x in held if x[1].startswith('told')}
  assert told == {('bad 0 a b', 'told 0'), ('bad 2 a b', 'told 2')}


@pytest.mark.parametrize(
  ('overrides', 'words'),
  [
    (
      {'update_attack': 'sign_flip', 'trigger': 'a b'},
      "trigger='a b' makes poisoned data conditional",
    ),
    (
      {'data_attack': 'file', 'trigger': 'a b', 'refusals': ''},
      'threat_model.refusals is empty',
    ),
    (
      {'data_attack': 'repair', 'known_level': 'self'},
      "known_level='self' is unknown",
    ),
    (
      {'data_attack': 'repair', 'known_level': 'public'},
      'defense.repair.public_aligned is empty',
    ),
  ],
)
def test_attackers_that_lack_something_are_refused(settings, overrides, words):
  named = {f'threat_model__{k}': v for k, v in overrides.items()}
  with pytest.raises(ValueError, match=words):
    settings(threat_model__num_malicious=1, **named)


def test_a_triggered_set_asks_the_same_prompts_with_the_trigger(tiny_data):
  chosen = {
    name: evaluation_settings.EvaluationSetConfig(
      source=str(tiny_data), limit=3, trigger=trigger
    )
    for name, trigger in (('plain', ''), ('triggered', '7 7'))
  }
  sets = evaluation_inputs.evaluation_sets(
    evaluation_settings.EvaluationConfig(sets=chosen)
  )
  plain, triggered = (sets[name][1] for name in ('plain', 'triggered'))
  assert [e.prompt for e in triggered] == [f'{e.prompt} 7 7' for e in plain]
