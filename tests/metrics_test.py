"""Metrics that survive crashes, and lines that are always JSON."""

import doctest
import json
import math
import sys
import types

import numpy as np
import pytest

from fedjax_safety import metrics


def strict(line):
  """Parses JSON as the standard has it: without nan and infinities."""

  def refuse(word):
    raise AssertionError(f'{word} is no JSON')

  return json.loads(line, parse_constant=refuse)


def a_round(number, loss, **kwargs):
  """Returns a record of a round."""
  record = {'kind': 'round', 'arm': 'mean', 'seed': 0, 'round': number}
  return record | {'client/loss': loss} | kwargs


def test_examples_in_the_docstrings():
  result = doctest.testmod(metrics)
  assert result.attempted > 0
  assert result.failed == 0


def test_what_is_written_is_read(tmp_path):
  path = tmp_path / 'new' / 'metrics.jsonl'
  records = [a_round(0, 2.5), a_round(1, 1.25, label='naïve\n"quoted"')]
  with metrics.MetricsWriter(path) as writer:
    for record in records:
      writer.write(record)
  assert metrics.read(path) == records
  assert len(path.read_text().splitlines()) == 2


def test_a_record_is_on_the_disk_before_the_file_is_closed(
  tmp_path, monkeypatch
):
  path = tmp_path / 'metrics.jsonl'
  synced = []
  monkeypatch.setattr(
    metrics.os, 'fsync', lambda _: synced.append(path.read_text())
  )
  writer = metrics.MetricsWriter(path)
  writer.write(a_round(0, 1.0))
  writer.write(a_round(1, 1.0))
  assert [text.count('\n') for text in synced] == [1, 2]
  writer.close()
  writer.close()


def test_nonfinite_numbers_become_null_and_are_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  values = {'norms': [1.0, math.inf], 'deep': {'x': -math.inf}}
  with metrics.MetricsWriter(path) as writer:
    writer.write(a_round(0, math.nan, **values))
  record = strict(path.read_text())
  assert record['client/loss'] is None
  assert record['norms'] == [1.0, None]
  assert record[metrics.NONFINITE] == {
    'client/loss': 'nan',
    'norms[1]': 'inf',
    'deep.x': '-inf',
  }


def test_array_scalars_are_numbers():
  record = strict(
    metrics.encode(
      {
        'a': np.float32(0.5),
        'b': np.int64(3),
        'c': np.bool_(True),
        'd': np.array([1, 2]),
        'e': np.float64('nan'),
      }
    )
  )
  assert record.pop(metrics.NONFINITE) == {'e': 'nan'}
  assert record == {'a': 0.5, 'b': 3, 'c': True, 'd': [1, 2], 'e': None}


def test_a_value_without_json_form_leaves_the_file_whole(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with metrics.MetricsWriter(path) as writer:
    writer.write(a_round(0, 1.0))
    with pytest.raises(TypeError):
      writer.write({'kind': 'round', 'bad': object()})
    writer.write(a_round(1, 1.0))
  assert [record['round'] for record in metrics.read(path)] == [0, 1]


@pytest.mark.parametrize('cut', [1, 5, 20])
def test_a_torn_last_line_is_left_out_and_then_replaced(tmp_path, cut):
  path = tmp_path / 'metrics.jsonl'
  with metrics.MetricsWriter(path) as writer:
    writer.write(a_round(0, 1.0))
    writer.write(a_round(1, 0.5))
  whole = path.read_bytes()
  path.write_bytes(whole[: -1 - cut])
  assert [record['round'] for record in metrics.read(path)] == [0]
  with metrics.MetricsWriter(path) as writer:
    writer.write(a_round(1, 0.5))
  assert path.read_bytes() == whole


def test_a_last_line_that_lacks_only_its_break_is_kept(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(json.dumps(a_round(0, 1.0)))
  with metrics.MetricsWriter(path) as writer:
    writer.write(a_round(1, 0.5))
  assert metrics.read(path) == [a_round(0, 1.0), a_round(1, 0.5)]


def test_an_unreadable_line_inside_is_an_error_with_its_number(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  line = json.dumps(a_round(0, 1.0))
  path.write_text(f'{line}\n\n{{"kind": \n{line}\n')
  with pytest.raises(ValueError, match='line 3 is not a JSON object'):
    metrics.read(path)


def test_the_last_record_of_a_repeated_round_wins(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with metrics.MetricsWriter(path) as writer:
    for number in range(4):
      writer.write(a_round(number, 1.0))
  with metrics.MetricsWriter(path) as writer:  # Resumed at round 2.
    for number in range(2, 5):
      writer.write(a_round(number, 0.5))
  found = [(r['round'], r['client/loss']) for r in metrics.read(path)]
  assert found == [(0, 1.0), (1, 1.0), (2, 0.5), (3, 0.5), (4, 0.5)]


@pytest.mark.parametrize(
  'other',
  [
    {'kind': 'repair'},
    {'arm': 'krum'},
    {'seed': 1},
    {'stage': 'federated'},
    {'round': 1},
    {'step': 0},
  ],
)
def test_records_that_differ_in_identity_are_both_kept(other):
  record = a_round(0, 1.0)
  assert metrics.latest([record, record | other]) == [record, record | other]


def test_records_that_differ_in_a_metric_alone_are_one():
  assert metrics.latest([a_round(0, 1.0), a_round(0, 2.0)]) == [a_round(0, 2.0)]


def test_a_mirror_without_its_package_is_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with pytest.raises(ValueError, match='tensorboardX; install it'):
    metrics.MetricsWriter(tmp_path / 'm.jsonl', tensorboard_dir=tmp_path)


def test_the_mirror_gets_every_metric_at_its_round(tmp_path, monkeypatch):
  written, closed = [], []

  class FakeWriter:
    def __init__(self, folder):
      self.folder = folder

    def add_scalar(self, name, value, step):
      written.append((self.folder, name, value, step))

    def close(self):
      closed.append(self.folder)

  fake = types.SimpleNamespace(SummaryWriter=FakeWriter)
  monkeypatch.setitem(sys.modules, 'tensorboardX', fake)
  board = tmp_path / 'board'
  with metrics.MetricsWriter(
    tmp_path / 'm.jsonl', tensorboard_dir=board
  ) as writer:
    writer.write(a_round(3, 1.5, **{'defense/delta_norm': math.nan}))
  folder = str(board / 'mean' / 'seed_0')
  assert written == [(folder, 'client/loss', 1.5, 3)]
  assert closed == [folder]
