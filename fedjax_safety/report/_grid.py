"""Defenses by attackers: one table for each thing that was measured."""

from collections.abc import Callable

from fedjax_safety.report import _caught, _costs, _rates, _read, _sweep, _tables

_Place = dict[str, object]
_Fill = Callable[[_Place], _tables.Box]


def tables(run: _read.Run) -> list[_tables.Table]:
  """Returns the tables of a run whose settings share their rows; else none.

  Each table has a line for each row, such as a defense, and a column for each
  setting, such as an attacker: there are more of the former. Shares are shaded.
  """
  places = _places(run)
  settings = list(dict.fromkeys(setting for setting, _ in places))
  names = list(dict.fromkeys(row for _, row in places))
  # A published table has numbers to stand beside and is no grid.
  if _sweep.published(run) or min(len(settings), len(names), 2) < 2:
    return []
  blank = _tables.Box(_tables.NOTHING)
  made = []
  for caption, fill in _fills(run):
    boxes = {place: fill(row) for place, row in places.items()}
    if all(box.text == _tables.NOTHING for box in boxes.values()):
      continue
    rows = tuple(
      (name, tuple(boxes.get((setting, name), blank) for setting in settings))
      for name in names
    )
    table = _tables.Table(caption, ('', *settings), rows, heat=True)
    made.append(_tables.quiet(table))
  return made


def _places(run: _read.Run) -> dict[tuple[str, str], _Place]:
  """Returns every row of the config's table by setting and name."""
  rows = _sweep.table_rows(run)
  return {(str(row['setting']), str(row['row'])): row for row in rows}


def _fills(run: _read.Run) -> list[tuple[str, _Fill]]:
  """Returns the caption of each table, and what gives one of its cells."""
  made = []
  for column in _tables.headline_columns(run):
    if column.role != _rates.HARMFUL or column.believe:
      made.append((f'{column.group}: {column.title}', _rates_of(run, column)))
  by = _tables.judge_label(run, run.believe) if run.believe else ''
  for name in _tables.triggered_sets(run):
    made.append(
      (
        f'Safe answers ↑ where the trigger is said (set “{name}”): {by}',
        _rates_of_set(run, name),
      )
    )
  return [
    *made,
    ('AUROC of the rule’s weights or scores ↑', _aurocs(run, _caught.AUROC)),
    ('AUROC of distances ↑', _aurocs(run, _caught.DISTANCE_AUROC)),
    ('Median time of a round, then of the repair ↓', _times(run)),
  ]


def _row(run: _read.Run, place: _Place) -> _read.Row | None:
  """Returns the evaluated stage that a place is."""
  for row in run.rows:
    if (row.arm, row.stage) == (place['arm'], place['stage']):
      return row
  return None


def _rates_of(run: _read.Run, column: _tables.Column) -> _Fill:
  """Returns what gives a column of the headline."""

  def fill(place):
    row = _row(run, place)
    if row is None:
      return _tables.rate_box(None)
    counts = _rates.by_seed(row, _tables.metric_of(row, column))
    return _tables.rate_box(_rates.rate(counts))

  return fill


def _rates_of_set(run: _read.Run, name: str) -> _Fill:
  """Returns what gives the safe answers of one set, by the believed judge."""
  metric = _rates.Metric(_rates.HARMFUL, str(run.believe), name)

  def fill(place):
    row = _row(run, place)
    counts = _rates.by_seed(row, metric) if row else {}
    return _tables.rate_box(_rates.rate(counts))

  return fill


def _aurocs(run: _read.Run, metric: str) -> _Fill:
  """Returns what gives a rule's AUROC."""
  rounds = _caught.rounds_by_arm(run)

  def fill(place):
    records = _caught.attacked(rounds.get(str(place['arm']), []))
    return _caught.box(records, metric, is_share=True)

  return fill


def _times(run: _read.Run) -> _Fill:
  """Returns what gives the time of a round, and of a repair after all."""
  rounds = _caught.rounds_by_arm(run)

  def fill(place):
    seconds = _costs.median_round(rounds.get(str(place['arm']), []))
    text = _tables.duration(seconds)
    if seconds is not None and str(place['stage']).startswith('repair'):
      spent = _costs.stage(run, str(place['arm']), str(place['stage']))
      text += f', then {_tables.duration(spent)}'
    return _tables.Box(text)

  return fill
