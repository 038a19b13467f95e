"""What the rounds served: the tables of the report."""

import json

import pytest

from fedjax_safety import report
from fedjax_safety.report import _read, _served

MEASURED = (1, 3, 5)
# Safe answers of each arm, round by round that was measured.
SAFE = {'no_attack': (0.25, 0.5, 0.75), 'mean': (0.25, 0.375, 0.125)}


@pytest.fixture
def served(three_seeds):
  """A run whose rounds were measured for two of its arms."""
  path = three_seeds / 'metrics.jsonl'
  records = [json.loads(line) for line in path.read_text().splitlines()]
  for record in records:
    if record.get('round') in MEASURED and record['arm'] in SAFE:
      at = MEASURED.index(record['round'])
      # The seeds differ, but not in how far the arms are apart.
      safe = SAFE[record['arm']][at] + 0.125 * (record['seed'] - 1)
      record |= {'safety/truth': safe, 'helpfulness/exact_match': 0.5}
  path.write_text(''.join(json.dumps(r) + '\n' for r in records))
  return three_seeds


def row_of(table, label):
  """Returns the texts of a row."""
  return [box.text for box in dict(table.rows)[label]]


def test_arms_by_rounds_and_the_most_that_was_lost(served):
  safe, useful = _served.tables(_read.load(served))
  assert safe.header[2:] == (
    'after round 2',
    'after round 4',
    'after round 6',
  )
  assert 'no attack' in safe.header[1]
  clean = row_of(safe, 'no attack')
  assert [text.split()[0] for text in clean] == ['—', '0.25', '0.50', '0.75']
  # Student's t of 3 seeds: .125 / sqrt(3) * 4.303 on either side.
  assert clean[2] == '0.50 [0.19, 0.81]'
  assert row_of(safe, 'attacked, plain averaging')[0] == '62 points, round 6'
  assert row_of(useful, 'attacked, plain averaging')[0] == 'never'


def test_arms_that_were_not_measured_are_left_out(served):
  safe, _ = _served.tables(_read.load(served))
  assert [label for label, _ in safe.rows] == [
    'no attack',
    'attacked, plain averaging',
  ]


def test_many_rounds_leave_the_last_and_even_steps(served, monkeypatch):
  monkeypatch.setattr(_served, '_MOST_COLUMNS', 2)
  safe, _ = _served.tables(_read.load(served))
  assert safe.header[2:] == ('after round 2', 'after round 6')


def test_no_measured_round_gives_no_table(three_seeds):
  assert _served.tables(_read.load(three_seeds)) == []


def test_both_formats_show_them(served):
  paths = report.build(served)
  for name in ('html', 'markdown'):
    text = paths[name].read_text()
    assert 'Was it safe in every round?' in text
    assert '62 points, round 6' in text
  assert '(plots/served.png)' in paths['markdown'].read_text()
