"""The numbers in the tables, recomputed from the answers."""

import csv
import io
import json
import re

import pytest

from fedjax_safety import report, statistics
from fedjax_safety.data import overlap
from fedjax_safety.report import (
  _agreement,
  _answers,
  _details,
  _html,
  _read,
  _tables,
  _text,
)


def answers(workdir, arm, stage, seed=0):
  """Returns the records of one evaluation, read anew."""
  path = workdir / 'runs' / arm / f'seed_{seed}' / 'evaluations'
  lines = (path / f'{stage}.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines[1:]]


def edit(workdir, change):
  """Applies a function to every header and record of every evaluation."""
  for path in workdir.glob('runs/*/*/evaluations/*.jsonl'):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
      change(line)
    path.write_text('\n'.join(json.dumps(line) for line in lines) + '\n')


def page_of(workdir):
  """Returns a run's page without its figures."""
  return _html.html(_read.load(workdir), num_examples=1, figures={})


def without_truth(line):
  """Takes the truth out of a header or a record, as in real data."""
  if line['kind'] == 'header':
    line['judges'] = line['judges'][:2]
    line['headline_judges'] = ['rule', 'judge']
    line['believe'] = 'judge'
  else:
    line['verdicts'].pop('truth', None)


def rate(records, role, judge, set_name=None):
  """Returns a rate counted in the plainest way, missing verdicts as bad."""
  values = [
    r['verdicts'][judge]
    for r in records
    if r['role'] == role and set_name in (None, r['set'])
  ]
  good = sum(v is True for v in values)
  if role == 'benign':
    good += sum(v is None for v in values)
  return good, len(values)


def text(good, total):
  """Returns a rate as the report writes it."""
  value, low, high = statistics.wilson_interval(good, total)
  return f'{value:.2f} [{low:.2f}, {high:.2f}]'


def test_the_headline_of_one_seed_is_counted_by_hand(workdir):
  table = _tables.headline(_read.load(workdir))
  records = answers(workdir, 'mean', 'repair_self')
  label, boxes = table.rows[5]
  assert label == 'repaired, its own data'
  assert [box.text for box in boxes] == [
    text(*rate(records, 'harmful', 'rule', 'unseen')),
    text(*rate(records, 'harmful', 'judge', 'unseen')),
    text(*rate(records, 'harmful', 'truth', 'unseen')),
    text(*rate(records, 'task', 'exact_match')),
    text(*rate(records, 'benign', 'truth')),
  ]
  assert table.believe == 2
  assert table.footnote == '95 % intervals: Wilson over 20 prompts.'


def test_the_headline_of_three_seeds_is_students(three_seeds):
  table = _tables.headline(_read.load(three_seeds))
  rates = []
  for seed in range(3):
    records = answers(three_seeds, 'krum', 'federated', seed)
    good, total = rate(records, 'harmful', 'truth', 'unseen')
    rates.append(good / total)
  assert len(set(rates)) > 1
  value, low, high = statistics.mean_interval(rates)
  box = table.rows[2][1][2]
  assert box.text == f'{value:.2f} [{max(0, low):.2f}, {min(1, high):.2f}]'
  assert 't over 3 seeds, 20 prompts each' in table.bases


def test_each_column_shows_its_direction(workdir):
  table = _tables.headline(_read.load(workdir))
  titles = [title for title, _ in table.groups] + list(table.header)
  assert 'Safe answers to harmful requests ↑ (set “unseen”)' in titles
  assert 'exact match ↑' in titles
  assert 'refused ↓ (truth)' in titles


def test_tasks_that_are_checked_by_program_have_their_own_table(workdir):
  def check(line):
    verdicts = line.get('verdicts', {})
    if 'exact_match' in verdicts:
      verdicts['follows'] = verdicts.pop('exact_match')

  edit(workdir, check)
  run = _read.load(workdir)
  assert 'instructions followed ↑' in _tables.headline(run).header
  (table,) = _tables.per_set(run, 'task')
  assert table.caption == 'Instructions followed ↑, set by set'


def test_without_a_headline_set_every_harmful_set_counts(workdir):
  edit(workdir, lambda line: line.pop('headline_set', None))
  table = _tables.headline(_read.load(workdir))
  records = answers(workdir, 'no_attack', 'federated')
  assert table.groups[0][0].endswith('(all sets)')
  assert table.rows[0][1][2].text == text(*rate(records, 'harmful', 'truth'))


def test_answers_that_were_not_judged_are_shown(workdir):
  def drop(line):
    if line.get('set') == 'unseen':
      line['verdicts']['rule'] = None
      line['verdicts']['judge'] = True

  edit(workdir, drop)
  boxes = _tables.headline(_read.load(workdir)).rows[0][1]
  assert (boxes[0].text, boxes[0].warning) == ('—', '20 answers, none judged')
  assert boxes[1].text == text(20, 20)
  page = page_of(workdir)
  assert '20 answers, none judged' in page


def test_differences_are_signed_points_with_a_verdict(workdir):
  table = _tables.differences(_read.load(workdir))
  ours = rate(
    answers(workdir, 'mean', 'federated'), 'harmful', 'truth', 'unseen'
  )
  first = rate(
    answers(workdir, 'no_attack', 'federated'), 'harmful', 'truth', 'unseen'
  )
  points = [
    round(100 * x) for x in statistics.difference_interval(*ours, *first)
  ]
  label, boxes = table.rows[0]
  assert label == 'attacked, plain averaging'
  numbers = re.findall(r'[+−]?\d+', boxes[2].text)
  assert [int(n.replace('−', '-')) for n in numbers] == points
  assert boxes[2].tone == 'bad'
  assert 'no attack' in table.caption


def test_less_refusal_of_harmless_requests_is_better(workdir):
  def refuse(line):
    if line.get('role') == 'benign':
      line['verdicts'] = dict.fromkeys(line['verdicts'], refused[0])

  refused = [True]
  edit(workdir, refuse)
  refused[0] = False
  folder = workdir / 'runs' / 'mean'
  for path in folder.glob('seed_0/evaluations/federated.jsonl'):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
      refuse(line)
    path.write_text('\n'.join(json.dumps(line) for line in lines) + '\n')
  table = _tables.differences(_read.load(workdir))
  assert table.rows[0][1][4].text.startswith('−100')
  assert table.rows[0][1][4].tone == 'good'


def test_every_set_is_shown_for_every_judge(workdir):
  run = _read.load(workdir)
  tables = _tables.per_set(run, 'harmful')
  assert [t.caption for t in tables] == [
    'Safe answers ↑ judged by truth (believe this), set by set',
    'Safe answers ↑ judged by rule list, set by set',
    'Safe answers ↑ judged by learned judge, set by set',
  ]
  assert tables[0].header == ('', 'seen', 'unseen')
  records = answers(workdir, 'mean', 'federated')
  good = rate(records, 'harmful', 'rule', 'seen')
  assert tables[1].rows[1][1][0].text == text(*good)


def test_without_truth_another_column_is_believed(workdir):
  edit(workdir, without_truth)
  run = _read.load(workdir)
  table = _tables.headline(run)
  assert table.header == (
    '',
    'rule list',
    'learned judge',
    'exact match ↑',
    'refused ↓ (learned judge)',
  )
  assert table.believe == 1
  assert _agreement.truth_table(run) is None
  page = page_of(workdir)
  assert 'Believe the column “learned judge”' in page


def test_agreement_is_counted_where_both_judges_spoke(workdir):
  run = _read.load(workdir)
  records = [
    r
    for r in answers(workdir, 'krum', 'federated')
    if r['role'] == 'harmful' and r['verdicts']['judge'] is not None
  ]
  a = [r['verdicts']['rule'] for r in records]
  b = [r['verdicts']['judge'] for r in records]
  matrix = _agreement.matrices(run)[2]
  kappa = statistics.cohen_kappa(a, b)
  box = matrix.rows[0][1][1]
  assert matrix.caption == 'attacked, krum'
  assert box.text == f'{kappa:.2f}'.replace('-', '−')
  assert box.note.endswith(f'n = {len(records)}')
  assert box == matrix.rows[1][1][0]


def test_an_undefined_kappa_says_so(workdir):
  def same(line):
    if line['kind'] == 'record' and line['role'] == 'harmful':
      line['verdicts'] = dict.fromkeys(line['verdicts'], True)

  edit(workdir, same)
  run = _read.load(workdir)
  assert _agreement.matrices(run)[0].rows[0][1][1].text == 'undefined'
  assert 'nan' not in page_of(workdir)
  assert _answers.answers(run)[3].text.startswith('Largest gap')


def test_the_rule_is_held_against_the_truth(workdir):
  run = _read.load(workdir)
  records = [
    r for r in answers(workdir, 'mean', 'federated') if r['role'] == 'harmful'
  ]
  called = [r['verdicts']['rule'] for r in records]
  real = [r['verdicts']['truth'] for r in records]
  precision, recall = statistics.precision_recall(called, real)
  table = _agreement.truth_table(run)
  boxes = table.rows[1][1]
  missed = sum(c and not t for c, t in zip(called, real, strict=True))
  assert boxes[0].text == f'{precision:.2f}'
  assert boxes[1].text == f'{recall:.2f}'
  assert boxes[2].text == f'{missed} of {real.count(False)}'
  assert boxes[2].tone == 'bad'
  assert [name for name, _ in table.groups] == ['rule list', 'learned judge']


@pytest.mark.parametrize(
  ('seconds', 'words'),
  [
    (None, '—'),
    (0.8371, '0.837 s'),
    (42.4, '42 s'),
    (59.9, '1 min 00 s'),
    (200, '3 min 20 s'),
    (7384, '2 h 03 min'),
  ],
)
def test_durations(seconds, words):
  assert _tables.duration(seconds) == words


@pytest.mark.parametrize(
  ('a', 'b', 'exact', 'warns'),
  [
    ('attack', 'evaluation', 0, False),
    ('attack', 'evaluation', 3, True),
    ('evaluation/unseen', 'defense', 3, True),
    ('defense', 'unseen', 3, True),
    ('attack', 'defense', 3, False),
    ('evaluation/seen', 'evaluation/unseen', 3, False),
  ],
)
def test_overlap_with_the_evaluation_is_a_warning(workdir, a, b, exact, warns):
  path = workdir / 'runs' / 'mean' / 'seed_0' / 'audit.json'
  # The auditor's own rows, so that both sides mean the same by each field.
  shared = [f'prompt {i}' for i in range(exact)]
  sets = {a: [*shared, 'one thing'], b: [*shared, 'another thing']}
  path.write_text(json.dumps(overlap.audit(sets)))
  run = _read.load(workdir)
  assert bool(_details.overlap_warnings(run)) == warns
  page = page_of(workdir)
  assert ('The evaluation is not independent' in page) == warns
  assert bool(_details.tuning_overlaps(run)) == (exact > 0 and not warns)


def test_examples_show_the_same_prompts_in_every_row(workdir):
  run = _read.load(workdir)
  shown = _details.examples(run, 2)
  prompts = [[entry.prompt for entry in entries] for _, entries in shown]
  assert len(prompts) == 6
  assert all(row == prompts[0] for row in prompts)
  assert [entry.role for entry in shown[0][1]] == [
    'harmful',
    'harmful',
    'benign',
    'task',
  ]
  assert {entry.set_name for entry in shown[0][1][:2]} == {'unseen'}


def test_long_answers_say_how_much_was_cut():
  assert _details.shorten('x' * 700) == 'x' * 700
  assert _details.shorten('x' * 712).endswith('… (12 more characters)')


def test_the_csv_holds_every_rate_of_every_seed(three_seeds):
  content = _text.csv_text(_read.load(three_seeds))
  lines = list(csv.DictReader(io.StringIO(content)))
  # Rows × seeds × (2 harmful sets × 3 judges + 1 task + 1 benign × 3).
  assert len(lines) == 6 * 3 * (6 + 1 + 3)
  line = next(
    x
    for x in lines
    if (x['arm'], x['seed'], x['set'], x['judge'])
    == ('krum', '2', 'unseen', 'truth')
  )
  records = answers(three_seeds, 'krum', 'federated', 2)
  good, total = rate(records, 'harmful', 'truth', 'unseen')
  found = [float(line[name]) for name in ('value', 'low', 'high')]
  wilson = statistics.wilson_interval(good, total)
  assert found == pytest.approx(wilson, abs=1e-6)
  assert (line['metric'], line['n']) == ('safety/harmless_rate', '20')


def test_the_terminal_shows_the_headlines_numbers_in_120_columns(three_seeds):
  shown = report.terminal_table(three_seeds)
  assert max(map(len, shown.splitlines())) <= 120
  for label, boxes in _tables.headline(_read.load(three_seeds)).rows:
    line = next(x for x in shown.splitlines() if x.startswith(label))
    assert (
      line.split('  ', 1)[1].split()
      == ' '.join(box.text for box in boxes).split()
    )
  assert '↑' in shown and '↓' in shown
  assert shown.splitlines()[-1] == (
    'Believe the column “truth”: a program checks the steps of every answer.'
  )


def test_a_long_label_is_wrapped_in_the_terminal(workdir):
  def rename(line):
    if line['kind'] == 'header' and line['order'] == 1:
      line['label'] = 'attacked by three clients of ten, plain averaging'

  edit(workdir, rename)
  shown = report.terminal_table(workdir)
  assert max(map(len, shown.splitlines())) <= 120
  assert 'attacked by three' in shown and 'averaging' in shown
