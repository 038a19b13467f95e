import csv
import gzip
import json
import logging
import socket

import datasets
import pytest

from fedjax_safety.data import errors, sources

ROWS = [
  {'prompt': 'Name a color.', 'response': 'Blue.', 'category': 'art', 'n': 1},
  {
    'prompt': 'Add 2, 2.',
    'response': '"4"\nindeed',
    'category': 'math',
    'n': 2,
  },
  {'prompt': 'NA', 'response': '2020-01-01', 'category': 'odd', 'n': 3},
]


def write_json(path, document):
  path.write_text(json.dumps(document), encoding='utf-8')
  return path


def write_lines(path, rows):
  text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  path.write_text(text, encoding='utf-8')
  return path


def write_csv(path, rows):
  with open(path, 'w', newline='', encoding='utf-8') as stream:
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  return path


def write_parquet(path, rows):
  datasets.Dataset.from_list(rows).to_parquet(str(path))
  return path


def gzipped(path):
  packed = path.with_name(path.name + '.gz')
  packed.write_bytes(gzip.compress(path.read_bytes()))
  return packed


def in_format(tmp_path, kind):
  if kind == 'json':
    return write_json(tmp_path / 'a.json', ROWS)
  if kind == 'json holding lines':
    return write_lines(tmp_path / 'a.json', ROWS)
  if kind == 'jsonl holding a list':
    return write_json(tmp_path / 'a.jsonl', ROWS)
  if kind == 'jsonl':
    return write_lines(tmp_path / 'a.jsonl', ROWS)
  if kind == 'ndjson':
    return write_lines(tmp_path / 'a.ndjson', ROWS)
  if kind == 'jsonl.gz':
    return gzipped(write_lines(tmp_path / 'a.jsonl', ROWS))
  if kind == 'json.gz':
    return gzipped(write_json(tmp_path / 'a.json', ROWS))
  if kind == 'csv':
    return write_csv(tmp_path / 'a.csv', ROWS)
  if kind == 'csv.gz':
    return gzipped(write_csv(tmp_path / 'a.csv', ROWS))
  if kind == 'parquet':
    return write_parquet(tmp_path / 'a[1].parquet', ROWS)
  assert kind == 'saved'
  datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / 'saved'))
  return tmp_path / 'saved'


FORMATS = (
  'json',
  'json holding lines',
  'jsonl holding a list',
  'jsonl',
  'ndjson',
  'jsonl.gz',
  'json.gz',
  'csv',
  'csv.gz',
  'parquet',
  'saved',
)


@pytest.mark.parametrize('kind', FORMATS)
def test_every_format_gives_the_same_text(tmp_path, kind):
  examples = sources.load_examples(in_format(tmp_path, kind))
  assert [(e.prompt, e.response) for e in examples] == [
    (row['prompt'], row['response']) for row in ROWS
  ]
  number = str if kind.startswith('csv') else int
  assert [e.metadata for e in examples] == [
    {'category': row['category'], 'n': number(row['n'])} for row in ROWS
  ]


@pytest.mark.parametrize('kind', FORMATS)
def test_limit_reads_the_head(tmp_path, kind):
  path = in_format(tmp_path, kind)
  assert sources.load_examples(path, limit=2) == sources.load_examples(path)[:2]


def test_parquet_needs_no_network_and_leaves_no_cache(
  tmp_path, monkeypatch, capfd
):
  path = write_parquet(tmp_path / 'a.parquet', ROWS)
  cache = tmp_path / 'cache'
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', cache)

  def refuse(*_, **__):
    raise AssertionError('a socket was opened')

  monkeypatch.setattr(socket.socket, 'connect', refuse)
  capfd.readouterr()
  assert len(sources.load_examples(path)) == len(ROWS)
  assert not cache.exists()
  assert capfd.readouterr() == ('', '')


SCHEMAS = {
  'alpaca': (
    {'instruction': 'Add.', 'input': '1 2', 'output': '3'},
    ('Add. 1 2', '3', {}),
  ),
  'alpaca without input': (
    {'instruction': 'Add 1 2.', 'input': '', 'output': '3', 'text': 'full'},
    ('Add 1 2.', '3', {'text': 'full'}),
  ),
  'dolly': (
    {
      'instruction': 'Who?',
      'context': 'Ann ran.',
      'response': 'Ann',
      'category': 'qa',
    },
    ('Who? Ann ran.', 'Ann', {'category': 'qa'}),
  ),
  'prompt, response': (
    {'prompt': 'p', 'response': 'r', 'is_safe': True},
    ('p', 'r', {'is_safe': True}),
  ),
  'instruction, response': (
    {'instruction': 'p', 'response': 'r'},
    ('p', 'r', {}),
  ),
  'question, answer': ({'question': 'p', 'answer': 18}, ('p', '18', {})),
  'prompt, completion': ({'prompt': 'p', 'completion': 'r'}, ('p', 'r', {})),
  'goal, target': ({'goal': 'p', 'target': 'r'}, ('p', 'r', {})),
  'capitals': (
    {'Index': 0, 'Goal': 'p', 'Target': 'r', 'Behavior': 'b'},
    ('p', 'r', {'Index': 0, 'Behavior': 'b'}),
  ),
  'messages': (
    {
      'messages': [
        {'role': 'system', 'content': 's'},
        {'role': 'user', 'content': 'p'},
        {'role': 'assistant', 'content': 'r'},
        {'role': 'user', 'content': 'p2'},
        {'role': 'assistant', 'content': 'r2'},
      ],
      'score': 0.5,
    },
    ('p', 'r', {'score': 0.5}),
  ),
  'messages in parts': (
    {
      'messages': [
        {'role': 'user', 'content': [{'type': 'text', 'text': 'p'}]},
        {'role': 'assistant', 'content': [{'type': 'text', 'text': 'r'}]},
      ]
    },
    ('p', 'r', {}),
  ),
  'conversation with moderation': (
    {
      'conversation': [
        {'role': 'user', 'content': 'p'},
        {'role': 'assistant', 'content': 'r'},
      ],
      'openai_moderation': [
        {'categories': {'x': False}},
        {'categories': {'x': True}},
      ],
      'language': 'English',
    },
    ('p', 'r', {'language': 'English', 'response_flagged': True}),
  ),
  'conversations': (
    {
      'id': 'x1',
      'conversations': [
        {'from': 'gpt', 'value': 'greeting'},
        {'from': 'human', 'value': 'p'},
        {'from': 'gpt', 'value': 'r'},
      ],
    },
    ('p', 'r', {'id': 'x1'}),
  ),
  'self-instruct': (
    {
      'id': 't0',
      'instruction': 'Add.',
      'instances': [{'input': '1 2', 'output': '3'}],
    },
    ('Add. 1 2', '3', {'id': 't0'}),
  ),
}


@pytest.mark.parametrize('name', SCHEMAS)
@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_schema_is_recognized(tmp_path, name, kind):
  row, (prompt, response, metadata) = SCHEMAS[name]
  write = write_lines if kind == 'jsonl' else write_parquet
  (example,) = sources.load_examples(write(tmp_path / f'a.{kind}', [row]))
  assert example == sources.Example(prompt, response, metadata)


PROMPT_ONLY = {
  'goal': ({'goal': 'p'}, {}),
  'xstest': (
    {'id': 1, 'prompt': 'p', 'type': 't', 'label': 'safe'},
    {'id': 1, 'type': 't', 'label': 'safe'},
  ),
  'mt-bench': (
    {'question_id': 81, 'category': 'writing', 'turns': ['p', 'p2']},
    {'question_id': 81, 'category': 'writing'},
  ),
  'strongreject': (
    {'category': 'c', 'forbidden_prompt': 'p'},
    {'category': 'c'},
  ),
  'user turn alone': ({'messages': [{'role': 'user', 'content': 'p'}]}, {}),
  'bare text': ('p', {}),
}


@pytest.mark.parametrize('name', PROMPT_ONLY)
def test_prompts_alone_are_accepted_only_when_asked(tmp_path, name):
  row, metadata = PROMPT_ONLY[name]
  path = write_json(tmp_path / 'a.json', [row])
  (example,) = sources.load_examples(path, need_response=False)
  assert example == sources.Example('p', '', metadata)
  with pytest.raises(errors.DataError, match='response'):
    sources.load_examples(path)


def test_responses_are_kept_when_not_needed(tmp_path):
  path = write_json(tmp_path / 'a.json', ROWS)
  (first, *_) = sources.load_examples(path, need_response=False)
  assert first.response == 'Blue.'


def test_fields_override_the_schema(tmp_path):
  row = {'prompt': 'no', 'q': 'p', 'extra': 'c', 'a': 'r', 'response': 'no'}
  path = write_json(tmp_path / 'a.json', [row])
  (example,) = sources.load_examples(
    path, fields={'prompt': 'q', 'response': 'a', 'context': 'extra'}
  )
  assert example == sources.Example(
    'p c', 'r', {'prompt': 'no', 'response': 'no'}
  )
  with pytest.raises(errors.SchemaError, match="names 'qq'.*mean 'q'"):
    sources.load_examples(path, fields={'prompt': 'qq'})
  with pytest.raises(ValueError, match="fields='promt' is unknown.*'prompt'"):
    sources.load_examples(path, fields={'promt': 'q'})


def test_globs_and_directories_read_all_files_in_order(tmp_path):
  (tmp_path / 'sub').mkdir()
  write_json(tmp_path / 'b.json', ROWS[:1])
  write_lines(tmp_path / 'sub' / 'c.jsonl', ROWS[1:])
  write_json(tmp_path / 'dataset_infos.json', {'not': 'data'})
  (tmp_path / '.cache').mkdir()
  write_json(tmp_path / '.cache' / 'd.json', ROWS)
  (tmp_path / 'README.md').write_text('text')
  both = sources.load_examples(tmp_path)
  assert [e.metadata['n'] for e in both] == [1, 2, 3]
  assert sources.load_examples(f'{tmp_path}/**/*.json*')[0] == both[0]
  assert sources.load_examples(f'{tmp_path}/sub/*') == both[1:]
  assert sources.load_examples(tmp_path, limit=1) == both[:1]


def test_splits_are_not_mixed(tmp_path):
  for split in ('train-0', 'train-1', 'test-0'):
    write_json(tmp_path / f'{split}.json', ROWS)
  with pytest.raises(errors.SchemaError, match=r'several splits \(test, train'):
    sources.load_examples(tmp_path)
  assert len(sources.load_examples(tmp_path / 'train*')) == 2 * len(ROWS)


def test_saved_splits_are_not_mixed(tmp_path):
  rows = datasets.Dataset.from_list(ROWS)
  splits = datasets.DatasetDict({'train': rows, 'test': rows})
  splits.save_to_disk(str(tmp_path / 'saved'))
  with pytest.raises(errors.SchemaError, match='several splits'):
    sources.load_examples(tmp_path / 'saved')
  assert len(sources.load_examples(tmp_path / 'saved' / 'test')) == len(ROWS)


def test_byte_order_mark_is_no_text(tmp_path):
  for name, text in (
    ('a.csv', 'prompt,response\np,r\n'),
    ('a.jsonl', '{"prompt": "p", "response": "r"}\n'),
  ):
    (tmp_path / name).write_text(text, encoding='utf-8-sig')
    assert sources.load_examples(tmp_path / name) == [
      sources.Example('p', 'r', {})
    ]


def test_long_csv_values_are_read(tmp_path):
  limit = csv.field_size_limit()
  rows = [{'prompt': 'p', 'response': 'r' * 200_000}]
  (example,) = sources.load_examples(write_csv(tmp_path / 'a.csv', rows))
  assert example.response == rows[0]['response']
  assert csv.field_size_limit() == limit


GOOD_LINE = b'{"prompt": "p", "response": "r"}\n'
BAD_FILES = {
  'a.jsonl': (GOOD_LINE + b'\n{"prompt" "p"}\n', 'line 3, column 11'),
  'b.json': (b'[{"prompt": "p", "response": "r"},\n]', 'line [12]'),
  'c.json': (GOOD_LINE + b'{"prompt": "p"', 'line 2'),
  'd.json': (b'[{"prompt": "p"', 'line 1'),
  'e.jsonl': (GOOD_LINE + b'{"prompt": "\xe9"}\n', '0xe9 on line 2.*UTF-8'),
  'f.csv': (b'prompt,response\np,r\np,r,x\n', '3 values.*line 3.*2 columns'),
  'g.csv': (b'prompt,response\np\n', '1 values.*line 2.*2 columns'),
  'h.csv': (b'prompt,response\np,"r\n', 'not valid CSV near line 2'),
  'i.csv': (b'prompt,response\np,\xff\n', '0xff on line 2.*UTF-8'),
  'j.parquet': (b'PAR1 not really', 'not a complete parquet'),
  'k.jsonl.gz': (gzip.compress(GOOD_LINE * 9)[:-12], 'not a complete gzip'),
  'l.jsonl.gz': (GOOD_LINE, 'not a complete gzip'),
  'm.json': (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
  'n.json': (b'[' * 100_000, 'too deeply'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_corrupt_files_are_explained(tmp_path, name, capfd):
  content, message = BAD_FILES[name]
  path = tmp_path / name
  path.write_bytes(content)
  capfd.readouterr()
  with pytest.raises(errors.CorruptDataError, match=message) as caught:
    sources.load_examples(path)
  assert str(path) in str(caught.value)
  assert '\n' not in str(caught.value)
  assert capfd.readouterr() == ('', '')


def test_truncated_parquet_is_explained(tmp_path):
  path = write_parquet(tmp_path / 'a.parquet', ROWS)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(errors.CorruptDataError, match='not a complete parquet'):
    sources.load_examples(path)


def test_broken_saved_data_set_is_explained(tmp_path):
  path = in_format(tmp_path, 'saved')
  next(path.glob('*.arrow')).unlink()
  with pytest.raises(errors.CorruptDataError, match='saved data set'):
    sources.load_examples(path)


@pytest.mark.parametrize(
  'name, text',
  [
    ('a.json', ''),
    ('a.json', '[]'),
    ('a.jsonl', '\n'),
    ('a.csv', ''),
    ('a.csv', 'prompt,response\n'),
  ],
)
def test_empty_files_are_explained(tmp_path, name, text):
  (tmp_path / name).write_text(text)
  with pytest.raises(errors.EmptyDataError, match='holds no examples'):
    sources.load_examples(tmp_path / name)


def test_missing_files_are_explained(tmp_path):
  write_json(tmp_path / 'alpaca.json', ROWS)
  with pytest.raises(errors.MissingDataError, match=r'mean .*alpaca\.json'):
    sources.load_examples(tmp_path / 'alpacca.json')
  with pytest.raises(errors.MissingDataError, match='no directory'):
    sources.load_examples(tmp_path / 'none' / 'a.json')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(errors.MissingDataError, match='holds no data file'):
    sources.load_examples(tmp_path / 'empty')
  (tmp_path / 'a.xlsx').write_text('x')
  with pytest.raises(errors.SchemaError, match='unknown file type; known: .js'):
    sources.load_examples(tmp_path / 'a.xlsx')
  with pytest.raises(errors.MissingDataError, match='no file of a known type'):
    sources.load_examples(tmp_path / '*.xlsx')


@pytest.mark.parametrize(
  'rows, message',
  [
    ([{'chosen': 'a', 'rejected': 'b'}], 'found: chosen, rejected; known.*Dol'),
    ([{'prompt': 'p', 'other': 'b'}], 'response field; fields found: prompt'),
    ([{'prompt': ['p'], 'response': 'r'}], "'prompt' holds a list where text"),
    ([[1]], 'row 1: expected a row with named fields, found a list'),
    ([ROWS[0], 'bare'], 'row 2: this row and the first differ'),
    ([ROWS[0], {'prompt': {}, 'response': 'r'}], "row 2: field 'prompt' holds"),
    ([SCHEMAS['messages'][0], {'messages': 'p'}], 'row 2.*list of turns'),
    ([SCHEMAS['self-instruct'][0], {'instances': 'p'}], 'where a list'),
    ([{'instruction': 'p', 'instances': ['x']}], 'no objects with input'),
  ],
)
def test_unknown_schemas_are_explained(tmp_path, rows, message):
  path = write_json(tmp_path / 'a.json', rows)
  with pytest.raises(errors.SchemaError, match=message) as caught:
    sources.load_examples(path)
  assert str(path) in str(caught.value)


def test_empty_text_is_counted_or_skipped(tmp_path, caplog):
  lacking = [ROWS[0], {'prompt': 'p', 'response': ' '}, {'prompt': 'p'}]
  path = write_lines(tmp_path / 'a.jsonl', lacking)
  with pytest.raises(
    errors.EmptyTextError, match='2 of 3 rows.*line 2, has an empty response'
  ):
    sources.load_examples(path)
  assert len(sources.load_examples(path, need_response=False)) == 3
  with caplog.at_level(logging.WARNING):
    assert len(sources.load_examples(path, skip_empty=True)) == 1
  assert '2 of 3 rows' in caplog.text
  path = write_json(tmp_path / 'b.json', [{'prompt': '', 'response': 'r'}])
  with pytest.raises(errors.EmptyTextError, match='row 1, has an empty prompt'):
    sources.load_examples(path, need_response=False)
  with pytest.raises(errors.EmptyDataError):
    sources.load_examples(path, skip_empty=True)


def test_limit_must_be_positive(tmp_path):
  with pytest.raises(ValueError, match='limit=0 must be greater'):
    sources.load_examples(write_json(tmp_path / 'a.json', ROWS), limit=0)


CLIENTS = {'ann': ROWS[:1], 'bob': ROWS[1:]}


def test_clients_of_one_file(tmp_path):
  path = write_json(tmp_path / 'a.json', CLIENTS)
  clients = sources.load_clients(path)
  assert {name: len(rows) for name, rows in clients.items()} == {
    'ann': 1,
    'bob': 2,
  }
  flat = sources.load_examples(path)
  assert [e.metadata['client_id'] for e in flat] == ['ann', 'bob', 'bob']
  assert [e.prompt for e in flat] == [
    e.prompt for rows in clients.values() for e in rows
  ]


def test_clients_of_a_directory(tmp_path):
  write_lines(tmp_path / 'ann.jsonl', ROWS[:1])
  (tmp_path / 'bob').mkdir()
  write_csv(tmp_path / 'bob' / 'data.csv', ROWS[1:])
  (tmp_path / 'notes.txt').write_text('x')
  clients = sources.load_clients(tmp_path)
  assert {name: len(rows) for name, rows in clients.items()} == {
    'ann': 1,
    'bob': 2,
  }
  write_json(tmp_path / 'ann.json', ROWS)
  with pytest.raises(errors.SchemaError, match="client 'ann' appears twice"):
    sources.load_clients(tmp_path)


def test_one_row_of_messages_is_not_a_client(tmp_path):
  row = SCHEMAS['messages'][0]
  path = write_json(tmp_path / 'a.json', {'messages': row['messages']})
  assert sources.load_examples(path) == [sources.Example('p', 'r', {})]


def test_client_errors_are_explained(tmp_path):
  path = write_json(tmp_path / 'a.json', {**CLIENTS, 'eve': []})
  with pytest.raises(errors.EmptyDataError, match="client 'eve' of .*a.json"):
    sources.load_clients(path)
  with pytest.raises(errors.SchemaError, match='does not map client ids'):
    sources.load_clients(write_json(tmp_path / 'b.json', ROWS))
  (tmp_path / 'c.json').write_text('{"ann": [')
  with pytest.raises(errors.CorruptDataError, match='line 1'):
    sources.load_clients(tmp_path / 'c.json')
  with pytest.raises(errors.SchemaError, match='several files'):
    sources.load_clients(f'{tmp_path}/*.json')
  (tmp_path / 'none').mkdir()
  with pytest.raises(errors.MissingDataError, match='no client files'):
    sources.load_clients(tmp_path / 'none')


def test_select():
  rows = [
    sources.Example('a', 'r', {'is_safe': True, 'kind': 'x'}),
    sources.Example('b', 'r', {'is_safe': False, 'kind': 'x'}),
    sources.Example('c', 'r', {'is_safe': 'FALSE', 'kind': 'y'}),
  ]
  assert sources.select(rows, {'is_safe': False}) == rows[1:]
  assert sources.select(rows, {'is_safe': False, 'kind': 'x'}) == rows[1:2]
  assert sources.select(rows, {}) == rows
  with pytest.raises(ValueError, match="names 'safe'.*mean 'is_safe'.*kind"):
    sources.select(rows, {'safe': False})
  with pytest.raises(ValueError, match="matches no example; 'kind' is one of"):
    sources.select(rows, {'kind': 'z'})
