"""Who was caught and what it cost: the tables and the charts of both."""

import json

import pytest

from fedjax_safety.report import _caught, _charts, _costs, _read

ARMS = ('no_attack', 'mean', 'krum', 'median')


@pytest.fixture
def run(three_seeds):
  """A run of three seeds."""
  return _read.load(three_seeds)


def values(run, arm, name):
  """Returns a metric of every round of an arm."""
  records = [r for r in run.of_kind('round') if r['arm'] == arm]
  return [r[name] for r in records if name in r]


def average(numbers):
  """Returns their mean."""
  return sum(numbers) / len(numbers)


def row_of(table, label):
  """Returns the texts of a row."""
  return [box.text for box in dict(table.rows)[label]]


def test_the_table_holds_the_means_over_rounds(run):
  found = row_of(_caught.table(run), 'attacked, krum')
  names = (
    _caught.AUROC,
    _caught.DISTANCE_AUROC,
    _caught.WEIGHT,
    _caught.RECALL,
    _caught.FALSE_POSITIVES,
  )
  for text, name in zip(found, names, strict=False):
    assert text.startswith(f'{average(values(run, "krum", name)):.2f} [')
  assert found[5] == '18'


def test_a_rule_without_weights_and_an_arm_without_attack_tell_nothing(run):
  table = _caught.table(run)
  median = row_of(table, 'attacked, median')
  assert median[0] == median[2] == median[3] == median[4] == '—'
  assert median[1] != '—'
  clean = row_of(table, 'no attack')
  assert clean[:4] == ['—'] * 4
  assert clean[4].startswith('0.00')


def test_the_answer_names_the_best_and_leaves_out_the_unattacked(run):
  text = _caught.answer(run)
  assert 'Best AUROC' in text and 'no attack' not in text
  assert '(attacked, krum)' in text
  clean = [r for r in run.metrics if r.get('arm') == 'no_attack']
  run.metrics[:] = clean
  assert _caught.answer(run) == 'No round had a malicious client.'


@pytest.mark.parametrize(
  ('scores', 'malicious', 'points'),
  [
    ([3.0, 2.0, 1.0], [True, False, False], [(0, 0), (0, 1), (0.5, 1), (1, 1)]),
    ([1.0, 1.0, 1.0], [True, False, False], [(0, 0), (1, 1)]),
    ([1.0, 2.0], [True, False], [(0, 0), (1, 0), (1, 1)]),
    ([1.0, 2.0], [False, False], []),
    ([1.0, 2.0], [True, True], []),
  ],
)
def test_roc(scores, malicious, points):
  assert _caught.roc(scores, malicious) == points


@pytest.mark.parametrize('arm', ['mean', 'krum', 'median'])
def test_the_area_under_the_mean_roc_is_the_mean_auroc(run, arm):
  records = [r for r in run.of_kind('round') if r['arm'] == arm]
  caught = _caught.mean_roc(records)
  pairs = zip(caught, caught[1:], strict=False)
  area = sum((a + b) / 2 for a, b in pairs) / (len(caught) - 1)
  name = _caught.DISTANCE_AUROC if arm == 'median' else _caught.AUROC
  # Three honest clients: the steps at 1/3 and 2/3 fall between grid points of
  # a fiftieth, each off by at most half of one.
  assert area == pytest.approx(average(values(run, arm, name)), abs=0.02)


def test_a_client_that_is_not_finite_is_the_most_suspicious():
  record = {'defense/client_weights': [0.5, None, 0.25]}
  assert _caught.suspicion(record) == [-0.5, float('inf'), -0.25]
  own = record | {'defense/client_scores': [1, 2, 3]}
  assert _caught.suspicion(own) == [1, 2, 3]


def test_every_arm_has_its_curves(run):
  axes = _charts.detection(run).axes
  weights, aurocs, rocs = (
    [line for line in axis.lines if line.get_linewidth() > 1] for axis in axes
  )
  assert (len(weights), len(aurocs), len(rocs)) == (2, 3, 3)
  number, weight = weights[1].get_data()
  for at, mean in zip(number, weight, strict=True):
    own = [
      r[_caught.WEIGHT]
      for r in run.of_kind('round')
      if (r['arm'], r['round']) == ('krum', at)
    ]
    assert mean == pytest.approx(average(own))


def test_of_many_arms_the_first_are_drawn_and_the_rest_counted(run):
  (record,) = [r for r in run.of_kind('round') if r['arm'] == 'krum'][:1]
  run.metrics[:] = [record | {'arm': f'arm {i}'} for i in range(30)]
  figure = _charts.detection(run)
  drawn = [x for x in figure.axes[1].lines if x.get_linewidth() > 1]
  assert len(drawn) == 12
  texts = [text.get_text() for text in figure.legends[0].get_texts()]
  assert texts[-1] == '18 more only in the tables'


def test_the_losses_are_means_over_seeds(run):
  lines = _charts.training(run).axes[0].lines
  assert len(lines) == len(ARMS)
  for line, arm in zip(lines, ARMS, strict=True):
    number, loss = line.get_data()
    for at, mean in zip(number, loss, strict=True):
      own = [
        r['client/loss']
        for r in run.of_kind('round')
        if (r['arm'], r['round']) == (arm, at)
      ]
      assert len(own) == 3
      assert mean == pytest.approx(average(own))


def test_costs(three_seeds):
  arms = [{'name': n, 'defense': {'aggregator': n}} for n in ('mean', 'krum')]
  (three_seeds / 'config.json').write_text(json.dumps({'arms': arms}))
  run = _read.load(three_seeds)
  table = _costs.table(run)
  assert table.header == (
    'Arm',
    'median',
    'more than plain averaging',
    'rounds',
    'measuring',
    'in all',
    'by a client a round',
    'to a client a round',
    'in all rounds of a seed',
  )
  plain, krum = (
    row_of(table, f'attacked, {n}') for n in ('plain averaging', 'krum')
  )
  medians = [
    sorted(values(run, arm, 'time/round_s'))[9] for arm in ('mean', 'krum')
  ]
  assert plain[1] == '—'
  more = f'{medians[1] - medians[0]:+.2f} s'.replace('-', '−')
  assert krum[1].startswith(more)
  # Six rounds of five clients.
  assert krum[-3:] == ['4 kB', '6 kB', '300 kB']
  assert 'A client sends at most 4 kB a round.' in _costs.answer(run)


def test_the_bars_of_time_add_up(run):
  (axis,) = _charts.cost(run).axes
  ends = [bar.get_x() + bar.get_width() for bar in axis.containers[-1]]
  spent = [sum(kinds.values()) for kinds in _costs.stages(run).values()]
  assert [60 * end for end in ends] == pytest.approx(spent)


@pytest.mark.parametrize(
  ('num_bytes', 'words'),
  [
    (None, '—'),
    (0, '0 B'),
    (999, '999 B'),
    (278528, '279 kB'),
    (4e13, '40 TB'),
  ],
)
def test_sizes(num_bytes, words):
  assert _costs.size(num_bytes) == words
