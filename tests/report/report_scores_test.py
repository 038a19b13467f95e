"""Tests of the means of scores in a report."""

import json

from fedjax_safety import report
from fedjax_safety.report import _read, _scores


def _score(workdir, seeds):
  """Adds an open set, graded 2, 4 and not at all, to every evaluation."""
  for path in workdir.glob('runs/*/seed_*/evaluations/*.jsonl'):
    seed = int(path.parts[-3].removeprefix('seed_'))
    header, *records = path.read_text().splitlines()
    header = json.loads(header)
    header['scorers'] = [{'name': 'rubric', 'label': 'grade | by rubric'}]
    for grade in (2 + seed, 4 + seed, None, 'ten'):
      records.append(
        json.dumps(
          {
            'kind': 'record',
            'set': 'chat',
            'role': 'open',
            'prompt': 'p',
            'response': 'r',
            'verdicts': {},
            'scores': {'rubric': grade},
          }
        )
      )
    path.write_text('\n'.join([json.dumps(header), *records]) + '\n')


def test_the_mean_of_what_was_scored_and_how_many_were_not(workdir):
  _score(workdir, 1)
  run = _read.load(workdir)
  (table,) = _scores.tables(run, _scores.OTHER_ROLES)
  assert _scores.tables(run, _scores.SAFETY_ROLES) == []
  assert table.header == ('', 'chat') and len(table.rows) == len(run.rows)
  ((_, (box,)), *_) = table.rows
  # Student's t for one degree of freedom is 12.706, the standard error 1.
  assert box.text == '3.00 [-9.71, 15.71]'
  assert box.warning == '2 without a score, left out'
  paths = report.build(workdir)
  for name in ('html', 'markdown'):
    assert 'Mean grade' in paths[name].read_text()
  lines = paths['csv'].read_text().splitlines()
  (line, *_) = (line for line in lines if 'score/rubric' in line)
  assert ',chat,score/rubric,,3.0,' in line and line.endswith(',4,2')


def test_from_three_seeds_on_the_interval_is_over_them(three_seeds):
  _score(three_seeds, 3)
  (table,) = _scores.tables(_read.load(three_seeds), _scores.OTHER_ROLES)
  ((_, (box,)), *_) = table.rows
  # Means 3, 4 and 5: t of two degrees is 4.303, over the root of 3.
  assert box.text == '4.00 [1.52, 6.48]'
  assert table.bases == ('t over 3 seeds, 2 answers each',)
