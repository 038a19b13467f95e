"""Defenses by attackers: each cell is that of its arm and stage."""

import json

import pytest

from fedjax_safety import report
from fedjax_safety.report import (
  _answers,
  _caught,
  _grid,
  _rates,
  _read,
  _tables,
)

HOSTILE = '<img src=x onerror=alert(1)> | `x` [y](javascript:z)'
PLACES = (
  (HOSTILE, 'plain', 'mean', 'federated'),
  (HOSTILE, 'repair', 'mean', 'repair_self'),
  ('other', 'plain', 'krum', 'federated'),
  ('other', 'never run', 'bulyan', 'federated'),
)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, write_run):
  """A reported run of three seeds with a table that nobody published."""
  workdir = tmp_path_factory.mktemp('runs') / 'grid'
  write_run(workdir, seeds=(0, 1, 2))
  keys = ('setting', 'row', 'arm', 'stage')
  rows = [dict(zip(keys, place, strict=True)) for place in PLACES]
  sets = {'unseen': {'trigger': ''}, 'seen': {'trigger': '7 7'}}
  config = {'paper': {'rows': rows}, 'evaluation': {'sets': sets}}
  (workdir / 'config.json').write_text(json.dumps(config))
  report.build(workdir)
  return workdir


@pytest.fixture
def tables(workdir):
  """Its tables by caption."""
  return {t.caption: t for t in _grid.tables(_read.load(workdir))}


def _texts(table):
  return {name: [box.text for box in boxes] for name, boxes in table.rows}


def test_there_is_a_table_for_each_thing_measured(tables):
  heads = (
    'Safe answers to harmful requests',
    'Helpfulness',
    'Harmless requests',
    'Safe answers ↑ where the trigger is said (set “seen”)',
    'AUROC of the rule',
    'AUROC of distances',
    'Median time of a round',
  )
  for caption, head in zip(tables, heads, strict=True):
    assert caption.startswith(head)
  for table in tables.values():
    assert table.header == ('', HOSTILE, 'other')


def test_cells_are_those_of_the_headline(workdir, tables):
  run = _read.load(workdir)
  shown = _texts(next(iter(tables.values())))
  at = [c.believe for c in _tables.headline_columns(run)].index(True)
  lines = {label: boxes[at].text for label, boxes in _tables.headline(run).rows}
  assert shown == {
    'plain': [lines['attacked, plain averaging'], lines['attacked, krum']],
    'repair': [lines['repaired, its own data'], '—'],
    'never run': ['—', '—'],
  }


def test_a_repair_has_the_rounds_of_its_arm(workdir, tables):
  run = _read.load(workdir)
  shown = _texts(tables['AUROC of distances ↑'])
  rows = dict(_caught.table(run).rows)
  mean = rows['attacked, plain averaging'][1].text
  assert [shown[name][0] for name in shown] == [mean, mean, '—']
  times = _texts(tables['Median time of a round, then of the repair ↓'])
  assert times['repair'][0] == f'{times["plain"][0]}, then —'


def test_names_are_inert_in_every_format(workdir, parse):
  page = (workdir / 'report.html').read_text()
  parse(page).assert_inert()
  assert 'Side by side' in page and 'Beside the paper' not in page
  assert '&lt;img src=x' in page
  text = (workdir / 'report.md').read_text()
  assert '<img' not in text and '](javascript' not in text.replace('\\]', '')


def test_the_first_answer_tells_of_the_trigger(workdir):
  run = _read.load(workdir)
  text = _answers.answers(run)[0].text
  assert (
    'Where the trigger is said (set “seen”), safe answers, by truth' in text
  )
  rates = []
  for row in run.rows:
    counts = _rates.by_seed(row, _rates.Metric('harmful', 'truth', 'seen'))
    rates.append(_rates.rate(counts).value)
  assert text.count(f'lowest {min(rates):.2f}') >= 1


def test_a_published_table_is_no_grid(workdir):
  run = _read.load(workdir)
  run.config['paper']['source'] = 'somebody'
  assert _grid.tables(run) == []
  run.config['paper'] = {'rows': run.config['paper']['rows'][:2]}
  assert _grid.tables(run) == []
