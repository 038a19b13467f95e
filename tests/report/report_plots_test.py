"""The figures show the tables' numbers, whatever the names."""

import dataclasses
import re
import warnings

import matplotlib
import matplotlib.container
import pytest

from fedjax_safety.report import _charts, _plots, _rates, _read, _tables

CHARTS = (_charts.detection, _charts.cost, _charts.training)


@pytest.fixture
def run(three_seeds):
  """A run of three seeds."""
  return _read.load(three_seeds)


def test_the_bars_are_the_headline(run):
  axes = _plots.headline(run).axes
  drawn = [
    [patch.get_width() for patch in bars.patches]
    for axis in axes
    for bars in axis.containers
    if isinstance(bars, matplotlib.container.BarContainer)
  ]
  columns = _tables.headline_columns(run)
  assert len(drawn) == len(columns) == 5
  for widths, column in zip(drawn, columns, strict=True):
    cells = [
      _rates.rate(_rates.by_seed(row, _tables.metric_of(row, column)))
      for row in run.rows
    ]
    assert widths == pytest.approx([cell.value for cell in cells])


def test_the_error_bars_are_the_intervals(run):
  bars = next(
    bars
    for bars in _plots.headline(run).axes[0].containers
    if isinstance(bars, matplotlib.container.BarContainer)
  )
  lines = bars.errorbar.lines[2][0].get_segments()
  column = _tables.headline_columns(run)[0]
  for segment, row in zip(lines, run.rows, strict=True):
    cell = _rates.rate(_rates.by_seed(row, _tables.metric_of(row, column)))
    assert segment[:, 0] == pytest.approx([cell.low, cell.high])


def test_there_is_no_figure_of_nothing(run):
  empty = dataclasses.replace(run, rows=[], metrics=[])
  assert _plots.headline(empty) is None
  for draw in CHARTS:
    assert draw(empty) is None


def test_no_judge_and_one_row_are_enough_for_a_figure(run):
  bare = dataclasses.replace(run, rows=run.rows[:1], headline_judges=[])
  assert len(_plots.headline(bare).axes) == 2


def test_any_name_can_be_drawn(run):
  names = ['$\\frac{$', '_under', '日本語' * 20, 'a\nb\nc', '', '%s {x}']
  rows = [dataclasses.replace(run.rows[0], label=name) for name in names]
  some = [*run.of_kind('round')[-1:], *run.of_kind('stage')[:1]]
  records = [r | {'arm': f'_{name}'} for name in names for r in some]
  odd = dataclasses.replace(run, rows=rows, metrics=records)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    for draw in (_plots.headline, *CHARTS):
      figure = draw(odd)
      assert _plots.to_png(figure)
      assert '<svg' in _plots.to_svg(figure, 'odd', 'words')


def test_figures_share_no_identifier(run):
  texts = [
    _plots.to_svg(_plots.headline(run), 'headline', ''),
    _plots.to_svg(_charts.detection(run), 'detection', ''),
  ]
  first, second = (set(re.findall(r' id="([^"]*)"', text)) for text in texts)
  assert first and second
  assert not first & second


def test_every_color_follows_the_page(run):
  text = _plots.to_svg(_plots.headline(run), 'headline', '')
  loose = re.sub(r'var\([^)]*\)', '', text)
  assert not re.search(r'(fill|stroke): #', loose)


def test_drawing_changes_no_setting(run):
  before = dict(matplotlib.rcParams)
  _plots.to_png(_charts.training(run))
  assert dict(matplotlib.rcParams) == before
