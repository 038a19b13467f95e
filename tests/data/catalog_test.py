"""Tests of the named data sets: each row of the table on an inert file."""

import csv
import gzip
import json
import pathlib

import datasets
import huggingface_hub
import pytest

from fedjax_safety.data import catalog, errors, filters, sources


def chat(prompt, response, *, turn=1, language='English', flagged=False):
  """Returns a row in the layout of LMSYS-Chat-1M and WildChat."""
  return {
    'conversation_id': f'{prompt}/{turn}',
    'conversation': [
      {'role': 'user', 'content': prompt},
      {'role': 'assistant', 'content': response},
    ]
    * turn,
    'turn': turn,
    'language': language,
    'openai_moderation': [
      {'categories': {'x': True}, 'flagged': True},
      {'categories': {'x': flagged}, 'flagged': flagged},
    ],
  }


CHATS = [
  chat('p', 'r'),
  chat('two turns', 'r', turn=2),
  chat('un', 'r', language='French'),
  chat('flagged', 'r', flagged=True),
]
ALPACA = [{'instruction': 'p', 'input': 'c', 'output': 'r'}]
JUDGED = [
  {'prompt': 'a', 'response': 'r1', 'category': {'x': True}, 'is_safe': False},
  {'prompt': 'b', 'response': 'r2', 'category': {'x': False}, 'is_safe': True},
  {'prompt': 'a', 'response': 'r3', 'category': {'x': True}, 'is_safe': False},
]
JBB = {'Index': 0, 'Goal': 'p', 'Target': 't', 'Behavior': 'b', 'Category': 'c'}

# Name to (rows as published, the (prompt, response) pairs read of them).
ROWS = {
  'lmsys_chat_1m': (CHATS, [('p', 'r')]),
  'wildchat': (CHATS, [('p', 'r')]),
  'beavertails_safe': (JUDGED, [('b', 'r2')]),
  'beavertails_unsafe': (JUDGED, [('a', 'r1')]),
  'alpaca': (ALPACA, [('p c', 'r')]),
  'alpaca_gpt4': ([{**ALPACA[0], 'text': 'all'}], [('p c', 'r')]),
  'dolly': (
    [
      {
        'instruction': 'p',
        'context': 'c',
        'response': 'r',
        'category': 'open_qa',
      }
    ],
    [('p c', 'r')],
  ),
  'dromedary': (ALPACA, [('p c', 'r')]),
  'codealpaca': (ALPACA, [('p c', 'r')]),
  'fedllm_bench': (
    {
      'ann': [{'instruction': 'p', 'response': 'r'}],
      'bob': [{'instruction': 'q', 'response': 's'}],
    },
    [('p', 'r'), ('q', 's')],
  ),
  'advbench': ([{'goal': 'p', 'target': 't'}], [('p', '')]),
  'harmbench': (
    [
      {'Behavior': 'p', 'ContextString': '', 'BehaviorID': 'i'},
      {'Behavior': 'p {x}', 'ContextString': '{prompt}', 'BehaviorID': 'j'},
    ],
    [('p', ''), ('{prompt}\n\n---\n\np {x}', '')],
  ),
  'jailbreakbench': ([JBB], [('p', '')]),
  'jailbreakbench_benign': ([JBB], [('p', '')]),
  'strongreject': (
    [{'category': 'c', 'source': 's', 'forbidden_prompt': 'p'}],
    [('p', '')],
  ),
  'xstest': (
    [{'id': 1, 'prompt': 'p', 'type': 't', 'label': 'safe', 'note': 'n'}],
    [('p', '')],
  ),
  'do_not_answer': (
    [{'id': 0, 'risk_area': 'a', 'question': 'p', 'GPT4_response': 'x'}],
    [('p', '')],
  ),
  'ifeval': (
    [
      {
        'key': 1,
        'prompt': 'p',
        'instruction_id_list': ['punctuation:no_comma'],
        'kwargs': [{}],
      }
    ],
    [('p', '')],
  ),
  'humaneval': (
    [
      {
        'task_id': 'HumanEval/0',
        'prompt': 'p',
        'canonical_solution': 's',
        'test': 't',
        'entry_point': 'e',
      }
    ],
    [('p', '')],
  ),
  'mt_bench': (
    [{'question_id': 81, 'category': 'writing', 'turns': ['p', 'p2']}],
    [('p', '')],
  ),
}


def write(path, rows):
  """Writes rows in the format that a file's name promises."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == '.parquet':
    datasets.Dataset.from_list(rows).to_parquet(str(path))
  elif path.suffix == '.csv':
    with path.open('w', newline='') as stream:
      writer = csv.DictWriter(stream, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)
  elif path.suffix == '.json':
    path.write_text(json.dumps(rows))
  else:
    text = ''.join(json.dumps(row) + '\n' for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == '.gz' else text)
  return path


def published(root, name):
  """Writes a data set's rows as its repository holds them."""
  file = catalog.DATA_SETS[name].file.replace('.jsonl*', '.jsonl.gz')
  file = file.replace('-*.', '-00000-of-00001.') or 'clients.json'
  return write(root / file, ROWS[name][0])


def pairs(examples):
  return [(example.prompt, example.response) for example in examples]


def test_every_data_set_is_proved():
  assert set(ROWS) == set(catalog.DATA_SETS)


@pytest.mark.parametrize('name', ROWS)
def test_a_file_and_a_whole_repository_are_read(tmp_path, name):
  file = published(tmp_path, name)
  needs = {'need_response': bool(ROWS[name][1][0][1])}
  for place in (file, tmp_path):
    examples = sources.load_examples(f'{name}:{place}', **needs)
    assert pairs(examples) == ROWS[name][1]


@pytest.mark.parametrize('name', ROWS)
def test_an_absent_copy_says_what_to_fetch(tmp_path, name):
  chosen = catalog.DATA_SETS[name]
  for place in (tmp_path / 'no', tmp_path, catalog.HUB):
    with pytest.raises(errors.MissingDataError) as caught:
      sources.load_examples(f'{name}:{place}')
    words = str(caught.value)
    assert chosen.fetch in words and chosen.license in words
    assert f'{name}:DIRECTORY' in words
    assert ('accept its terms' in words) == chosen.gated


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'ds')
  monkeypatch.setattr(
    huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub')
  )


def prepare(cache, name, rows):
  """Leaves what `datasets.load_dataset` leaves of a hub data set."""
  chosen = catalog.DATA_SETS[name]
  owner, repository = chosen.fetch.split('/')
  stem = datasets.naming.camelcase_to_snakecase(repository)
  config = chosen.config or 'default'
  made = datasets.Dataset.from_list(rows)
  directory = cache / f'{owner}___{stem}' / config / '0.0.0' / ('a' * 40)
  made.save_to_disk(str(directory))
  (arrow,) = directory.glob('*.arrow')
  arrow.rename(directory / f'{stem}-{chosen.split}.arrow')
  splits = {
    chosen.split: {
      'name': chosen.split,
      'num_bytes': 1,
      'num_examples': len(rows),
      'dataset_name': stem,
    }
  }
  info = json.loads((directory / 'dataset_info.json').read_text())
  info |= {
    'config_name': config,
    'dataset_name': stem,
    'builder_name': 'parquet',
    'version': {'version_str': '0.0.0', 'major': 0, 'minor': 0, 'patch': 0},
    'splits': splits,
  }
  (directory / 'dataset_info.json').write_text(json.dumps(info))


@pytest.mark.parametrize(
  'name', ['wildchat', 'beavertails_unsafe', 'jailbreakbench']
)
def test_what_load_dataset_cached_is_read(tmp_path, name, capfd):
  prepare(tmp_path / 'ds', name, ROWS[name][0])
  capfd.readouterr()
  examples = sources.load_examples(f'{name}:hub', need_response=False)
  assert pairs(examples) == ROWS[name][1]
  assert capfd.readouterr() == ('', '')


def test_what_hf_download_cached_is_read(tmp_path):
  fetch = catalog.DATA_SETS['dolly'].fetch
  root = tmp_path / 'hub' / f'datasets--{fetch.replace("/", "--")}'
  published(root / 'snapshots' / ('b' * 40), 'dolly')
  (root / 'refs').mkdir()
  (root / 'refs' / 'main').write_text('b' * 40)
  assert pairs(sources.load_examples('dolly:hub')) == ROWS['dolly'][1]


def test_clients_of_a_named_data_set(tmp_path):
  file = published(tmp_path, 'fedllm_bench')
  clients = sources.load_clients(f'fedllm_bench:{file}')
  assert {c: pairs(e) for c, e in clients.items()} == {
    'ann': [('p', 'r')],
    'bob': [('q', 's')],
  }
  for client, rows in (('a', CHATS), ('b', CHATS[1:])):
    write(tmp_path / 'clients' / f'{client}.jsonl', rows)
  clients = sources.load_clients(f'wildchat:{tmp_path}/clients')
  assert {c: pairs(e) for c, e in clients.items()} == {'a': [('p', 'r')]}
  with pytest.raises(errors.MissingDataError, match='github.com/rui-ye'):
    sources.load_clients(f'fedllm_bench:{tmp_path}/none')


def test_the_file_alone_is_read_as_it_is(tmp_path):
  file = published(tmp_path, 'wildchat')
  assert len(sources.load_examples(file)) == len(CHATS)


@pytest.mark.parametrize(
  ('source', 'words'),
  [
    ('wildchatt:/x', "data_set='wildchatt' is unknown.*mean 'wildchat'"),
    ('wildchat', 'wildchat names no place.*hf download'),
  ],
)
def test_wrong_names_are_explained(source, words):
  with pytest.raises(ValueError, match=words):
    sources.load_examples(source)


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write(pathlib.Path('odd:name.json'), ALPACA)
  assert pairs(sources.load_examples('odd:name.json')) == [('p c', 'r')]


def test_another_file_is_refused_by_its_columns(tmp_path):
  file = write(tmp_path / 'a.json', [{'question': 'p', 'answer': 'r'}])
  with pytest.raises(errors.SchemaError, match="names 'output', which is"):
    sources.load_examples(f'alpaca:{file}')
  examples = sources.load_examples(
    f'alpaca:{write(tmp_path / "b.json", [{"i": "p", "input": "", "o": "r"}])}',
    fields={'prompt': 'i', 'response': 'o'},
  )
  assert pairs(examples) == [('p', 'r')]


def test_filters_need_their_columns_and_leave_something(tmp_path):
  bare = [{'conversation': CHATS[0]['conversation'], 'turn': 1}]
  file = write(tmp_path / 'a.jsonl', bare)
  with pytest.raises(errors.SchemaError, match='language or response_flagged'):
    sources.load_examples(f'wildchat:{file}')
  file = write(tmp_path / 'b.jsonl', CHATS[1:])
  with pytest.raises(
    errors.EmptyDataError,
    match='single_turn dropped 1, english dropped 1, unflagged_response d.* 1',
  ):
    sources.load_examples(f'wildchat:{file}')


def test_a_row_that_nothing_vouches_for_is_dropped(tmp_path):
  file = write(
    tmp_path / 'a.jsonl', [CHATS[0], {**CHATS[0], 'openai_moderation': []}]
  )
  assert len(sources.load_examples(f'wildchat:{file}')) == 1


def test_filters_are_known_by_name():
  with pytest.raises(ValueError, match="filter='englsh' is unknown.*english"):
    filters.Filters(('englsh',), {})
