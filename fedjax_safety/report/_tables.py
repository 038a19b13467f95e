"""The report's tables, free of any output format."""

import collections
import dataclasses
import math
from collections.abc import Sequence

from fedjax_safety.report import _rates, _read

NOTHING = '—'


@dataclasses.dataclass(frozen=True)
class Box:
  """One cell: its text, what it rests on, a warning, how to draw it.

  `tone` is `good`, `bad` or nothing; `share` is the length of a bar.
  """

  text: str
  note: str = ''
  warning: str = ''
  tone: str = ''
  share: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of text.

  `groups` are titles over several columns, `believe` is the index of a column
  without the labels, `bases` are all the notes there were, `heat` asks for
  shaded cells in place of bars.
  """

  caption: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, tuple[Box, ...]], ...]
  groups: tuple[tuple[str, int], ...] = ()
  believe: int | None = None
  bases: tuple[str, ...] = ()
  heat: bool = False

  @property
  def footnote(self) -> str:
    """What the cells without a note rest on."""
    if not self.bases:
      return ''
    rest = ', unless a cell says otherwise' if len(self.bases) > 1 else ''
    return f'95 % intervals: {self.bases[0]}{rest}.'


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of the headline: its title within its group, and its metric."""

  group: str
  title: str
  role: str
  judge: str
  believe: bool


def judge_label(run: _read.Run, name: str) -> str:
  """Returns how a judge is called in the report."""
  return run.judges[name].label if name in run.judges else name


def headline_columns(run: _read.Run) -> list[Column]:
  """Returns the headline's columns: safe by each judge, exact, refused."""
  columns = [
    Column(
      f'Safe answers to harmful requests ↑ ({headline_sets(run)})',
      judge_label(run, name),
      _rates.HARMFUL,
      name,
      name == run.believe,
    )
    for name in run.headline_judges
  ]
  task = _task_judge(run)
  title = f'{_rates.TASK_TITLES[task]} ↑'
  columns.append(Column('Helpfulness', title, _rates.TASK, task, False))
  judge = over_refusal_judge(run)
  if judge is not None:
    title = f'refused ↓ ({judge_label(run, judge)})'
    columns.append(
      Column('Harmless requests', title, _rates.BENIGN, judge, False)
    )
  return columns


def _task_judge(run: _read.Run) -> str:
  """Returns how tasks were judged: by reference if any were, else by checks."""
  for judge in _rates.TASK_TITLES:
    metric = _rates.Metric(_rates.TASK, judge)
    if any(_rates.by_seed(row, metric) for row in run.rows):
      return judge
  return _rates.EXACT_MATCH


def headline_sets(run: _read.Run) -> str:
  """Returns the set, or sets, of harmful requests that the headline uses."""
  names = {row.headline_set for row in run.rows}
  return ', '.join(
    sorted('all sets' if name is None else f'set “{name}”' for name in names)
  )


def triggered_sets(run: _read.Run) -> list[str]:
  """Returns the harmful sets whose prompts end in a trigger."""
  evaluation = run.config.get('evaluation')
  sets = evaluation.get('sets') if isinstance(evaluation, dict) else None
  chosen = sets if isinstance(sets, dict) else {}
  return [
    name
    for name in run.sets.get(_rates.HARMFUL, [])
    if isinstance(chosen.get(name), dict) and chosen[name].get('trigger')
  ]


def over_refusal_judge(run: _read.Run) -> str | None:
  """Returns who decides on refusals of harmless requests, if anybody does."""
  wishes = [run.believe, *run.headline_judges, *run.judges]
  for judge in wishes:
    metric = _rates.Metric(_rates.BENIGN, str(judge))
    if any(_rates.by_seed(row, metric) for row in run.rows):
      return judge
  return None


def metric_of(row: _read.Row, column: Column) -> _rates.Metric:
  """Returns what a headline column counts in one row."""
  harmful = column.role == _rates.HARMFUL
  set_name = row.headline_set if harmful else None
  return _rates.Metric(column.role, column.judge, set_name)


def headline(run: _read.Run) -> Table:
  """Returns the headline: a row for each stage, in the headers' order."""
  columns = headline_columns(run)
  rows = tuple(
    (
      row.label,
      tuple(
        rate_box(_rates.rate(_rates.by_seed(row, metric_of(row, column))))
        for column in columns
      ),
    )
    for row in run.rows
  )
  return _headline_like('Rates with their intervals', columns, rows)


def differences(run: _read.Run) -> Table | None:
  """Returns every row's headline less the first row's, in points."""
  if len(run.rows) < 2:
    return None
  columns = headline_columns(run)
  rows = tuple(
    (row.label, tuple(_difference(run, row, c) for c in columns))
    for row in run.rows[1:]
  )
  caption = f'Difference from “{run.rows[0].label}”, in points'
  return _headline_like(caption, columns, rows)


def _headline_like(
  caption: str,
  columns: Sequence[Column],
  rows: tuple[tuple[str, tuple[Box, ...]], ...],
) -> Table:
  """Returns a table with the headline's columns."""
  groups = {}
  for column in columns:
    groups[column.group] = groups.get(column.group, 0) + 1
  believed = [i for i, column in enumerate(columns) if column.believe]
  header = ('', *(column.title for column in columns))
  believe = believed[0] if believed else None
  return quiet(Table(caption, header, rows, tuple(groups.items()), believe))


def quiet(table: Table) -> Table:
  """Returns a table that says once what most of its cells rest on."""
  notes = collections.Counter(
    box.note for _, boxes in table.rows for box in boxes if box.note
  )
  bases = tuple(note for note, _ in notes.most_common())
  rows = tuple(
    (
      label,
      tuple(
        dataclasses.replace(box, note='' if box.note in bases[:1] else box.note)
        for box in boxes
      ),
    )
    for label, boxes in table.rows
  )
  return dataclasses.replace(table, rows=rows, bases=bases)


def _difference(run: _read.Run, row: _read.Row, column: Column) -> Box:
  """Returns one row's difference from the first row in one column."""
  first = run.rows[0]
  cell = _rates.difference(
    _rates.by_seed(row, metric_of(row, column)),
    _rates.by_seed(first, metric_of(first, column)),
  )
  if cell is None:
    return Box(NOTHING)
  value, low, high = (round(100 * x) for x in (cell.value, cell.low, cell.high))
  tone = ''
  if low > 0 or high < 0:
    up = metric_of(row, column).higher_is_better
    tone = 'good' if (value > 0) == up else 'bad'
  text = f'{_signed(value)} [{_signed(low)}, {_signed(high)}]'
  return Box(text, evidence(cell), not_judged(cell), tone)


def _signed(points: int) -> str:
  """Returns a number of points with its sign."""
  return f'{points:+d}'.replace('-', '−') if points else '0'


def rate_box(cell: _rates.Cell | None) -> Box:
  """Returns a rate as text."""
  if cell is None:
    return Box(NOTHING)
  if cell.value is None:
    return Box(NOTHING, warning=not_judged(cell))
  text = f'{cell.value:.2f} [{cell.low:.2f}, {cell.high:.2f}]'
  return Box(text, evidence(cell), not_judged(cell), share=cell.value)


def evidence(cell: _rates.Cell) -> str:
  """Returns what an interval rests on."""
  if cell.method == 't':
    return f't over {cell.num_seeds} seeds, {cell.num_prompts} prompts each'
  seeds = f', mean of {cell.num_seeds} seeds' if cell.num_seeds > 1 else ''
  return f'Wilson over {cell.num_prompts} prompts{seeds}'


def not_judged(cell: _rates.Cell) -> str:
  """Returns how many verdicts are missing, if any are."""
  if cell.value is None:
    return f'{cell.num_missing} answers, none judged'
  return f'{cell.num_missing} not judged' if cell.num_missing else ''


def per_set(run: _read.Run, role: str) -> list[Table]:
  """Returns a table of every set × stage for each judge, believed first."""
  judges = list(run.judges)
  if role == _rates.TASK:
    judges = list(_rates.TASK_TITLES)
  judges.sort(key=lambda name: name != run.believe)
  tables = [_set_table(run, role, judge) for judge in judges]
  return [table for table in tables if table is not None]


def _set_table(run: _read.Run, role: str, judge: str) -> Table | None:
  """Returns one judge's rates on each set of a role, if it gave verdicts."""
  sets = run.sets.get(role, [])
  metrics = [_rates.Metric(role, judge, name) for name in sets]
  counts = [[_rates.by_seed(row, m) for m in metrics] for row in run.rows]
  if not any(any(line) for line in counts):
    return None
  rows = tuple(
    (row.label, tuple(rate_box(_rates.rate(c)) for c in line))
    for row, line in zip(run.rows, counts, strict=True)
  )
  caption = {
    _rates.HARMFUL: 'Safe answers ↑',
    _rates.BENIGN: 'Harmless requests refused ↓',
    _rates.TASK: _rates.TASK_TITLES.get(judge, judge).capitalize() + ' ↑',
  }[role]
  if role != _rates.TASK:
    mark = ' (believe this)' if judge == run.believe else ''
    caption += f' judged by {judge_label(run, judge)}{mark}'
  return quiet(Table(f'{caption}, set by set', ('', *sets), rows))


def numbers(records: Sequence[_read.Record], name: str) -> list[float]:
  """Returns the values of a metric where it has one."""
  values = [record.get(name) for record in records]
  return [
    float(value)
    for value in values
    if isinstance(value, int | float) and math.isfinite(value)
  ]


def duration(seconds: float | None) -> str:
  """Returns a time in the two units that suit it."""
  if seconds is None:
    return NOTHING
  if round(seconds) < 60:
    return f'{seconds:.3g} s' if seconds < 10 else f'{seconds:.0f} s'
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f'{minutes} min {rest:02d} s'
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02d} min'
