"""A published table and the run's own numbers, side by side."""

import csv
import dataclasses
import io
import math

from fedjax_safety import paper as paper_lib
from fedjax_safety.report import _escape, _rates, _read, _tables

# The kind of our judge of a published column.
_KINDS = {'rule': 'rule', 'md_judge': 'learned'}
# The list that was published, of several that a run may have applied.
_PUBLISHED_RULE = 'openfedllm35'
CSV_HEADER = (
  'source',
  'setting',
  'row',
  'against',
  'arm',
  'stage',
  'column',
  'paper',
  'ours',
  'low',
  'high',
  'num_seeds',
  'num_prompts',
  'method',
)


@dataclasses.dataclass(frozen=True)
class _Column:
  """A column: its name and title, what we count, whether it was published."""

  name: str
  title: str
  metric: _rates.Metric | None
  published: bool


def tables(run: _read.Run, *, terminal: bool = False) -> list[_tables.Table]:
  """Returns a table for each setting; none where the run has no paper.

  Args:
    run: the run.
    terminal: leave out the columns of which the run has no number.
  """
  columns = [c for c in _columns(run) if c.metric or not terminal]
  return [
    _table(run, columns, setting, rows) for setting, rows in _settings(run)
  ]


def changes(run: _read.Run) -> list[_tables.Table]:
  """Returns what each row changes, in points, published and own."""
  columns = [c for c in _columns(run) if c.metric]
  made = []
  for setting, rows in _settings(run):
    compared = [row for row in rows if row.get('against')]
    if compared:
      made.append(_changes(run, columns, setting, compared))
  return made


def title(run: _read.Run) -> str:
  """Returns the title over the tables."""
  return 'Beside the paper' if published(run) else 'Side by side'


def notes(run: _read.Run) -> list[str]:
  """Returns where the published numbers are from and what differs here."""
  paper = _paper(run)
  if not table_rows(run):
    return []
  model = run.config.get('model', {})
  ours = (
    f'means over seeds with 95 % intervals, of {model.get("path")}; rates in '
    f'percent, on harmful requests of {_tables.headline_sets(run)}.'
  )
  if published(run):
    source = f'Published: {paper.get("source")}, one run, no intervals.'
    lead = f'{source} Ours: {ours}'
  else:
    lead = ours.capitalize()
  return [
    lead,
    *([str(paper['note'])] if paper.get('note') else []),
  ]


def csv_text(run: _read.Run) -> str:
  """Returns every number, published and own, a line each."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator='\n')
  writer.writerow(CSV_HEADER)
  source = str(_paper(run).get('source'))
  columns = _columns(run)
  for row in table_rows(run):
    keys = ('setting', 'row', 'against', 'arm', 'stage')
    names = [source, *(str(row.get(key, '')) for key in keys)]
    for column in columns:
      cell = _cell(run, row, column)
      ours = [''] * 6
      if cell is not None and cell.value is not None:
        values = (cell.value, cell.low, cell.high)
        ours = [*(round(100 * value, 4) for value in values)]
        ours += [cell.num_seeds, cell.num_prompts, cell.method]
      line = [*names, column.name, _published(row, column, ''), *ours]
      writer.writerow([_escape.csv_cell(value) for value in line])
  return buffer.getvalue()


def settings(run: _read.Run) -> _read.Record:
  """Returns the config without the published table, which is shown apart."""
  return {key: v for key, v in run.config.items() if key != 'paper'}


def _paper(run: _read.Run) -> _read.Record:
  """Returns the published table of the config, or nothing."""
  paper = run.config.get('paper')
  return paper if isinstance(paper, dict) else {}


def table_rows(run: _read.Run) -> list[_read.Record]:
  """Returns the rows of the config's table, with their defaults."""
  found = _paper(run).get('rows')
  if not isinstance(found, list):
    return []
  defaults = dataclasses.asdict(paper_lib.PaperRow())
  return [defaults | row for row in found if isinstance(row, dict)]


def published(run: _read.Run) -> bool:
  """Returns whether the table was published somewhere."""
  return bool(_paper(run).get('source'))


def _settings(run: _read.Run) -> list[tuple[str, list[_read.Record]]]:
  """Returns every setting's rows."""
  groups = {}
  for row in table_rows(run):
    groups.setdefault(str(row.get('setting')), []).append(row)
  return list(groups.items())


def _columns(run: _read.Run) -> list[_Column]:
  """Returns the published columns, then those that only we have."""
  used = {name for row in table_rows(run) for name in _numbers(row)}
  columns = [
    _Column(name, title, _safe(run, _KINDS.get(name)), True)
    for name, title in paper_lib.COLUMNS.items()
    if name in used
  ]
  # Where nothing was published, the own columns of the same kind stand.
  for kind in ('rule', 'learned', 'truth'):
    metric = _safe(run, kind)
    if metric and metric not in [c.metric for c in columns]:
      label = _tables.judge_label(run, metric.judge)
      title = f'safe, {label}, % ↑'
      columns.append(_Column(kind, title, metric, False))
  for column in _tables.headline_columns(run):
    if column.role == _rates.HARMFUL:
      continue
    name = 'helpful' if column.role == _rates.TASK else 'over_refusal'
    title = column.title.replace(' ↑', ', % ↑').replace(' ↓', ', % ↓')
    metric = _rates.Metric(column.role, column.judge)
    columns.append(_Column(name, title, metric, False))
  return columns


def _safe(run: _read.Run, kind: str | None) -> _rates.Metric | None:
  """Returns the safe answers by a kind of judge, if the run has one."""
  names = [judge.name for judge in run.judges.values() if judge.kind == kind]
  if not names:
    return None
  name = _PUBLISHED_RULE if _PUBLISHED_RULE in names else names[0]
  return _rates.Metric(_rates.HARMFUL, name)


def _numbers(row: _read.Record) -> _read.Record:
  """Returns the published numbers of a row."""
  numbers = row.get('numbers')
  return numbers if isinstance(numbers, dict) else {}


def _published(row: _read.Record, column: _Column, absent):
  """Returns a published number, or what stands for none."""
  value = _numbers(row).get(column.name) if column.published else None
  return value if isinstance(value, int | float) else absent


def _counts(
  run: _read.Run, row: _read.Record, column: _Column
) -> dict[int, _rates.Count]:
  """Returns what each seed of a row counted for a column."""
  for found in run.rows:
    if (found.arm, found.stage) == (row.get('arm'), row.get('stage')):
      metric = column.metric
      if metric.role == _rates.HARMFUL:
        metric = dataclasses.replace(metric, set_name=found.headline_set)
      return _rates.by_seed(found, metric)
  return {}


def _cell(
  run: _read.Run, row: _read.Record, column: _Column
) -> _rates.Cell | None:
  """Returns our number of a row and column, if there is one."""
  return _rates.rate(_counts(run, row, column)) if column.metric else None


def _table(
  run: _read.Run,
  columns: list[_Column],
  setting: str,
  rows: list[_read.Record],
) -> _tables.Table:
  """Returns one setting's table."""
  groups, header = _header(columns)
  lines = []
  for row in rows:
    boxes = []
    for column in columns:
      if column.published:
        value = _published(row, column, math.nan)
        text = _tables.NOTHING if math.isnan(value) else f'{value:.2f}'
        boxes.append(_tables.Box(text))
      if column.metric:
        boxes.append(_box(_cell(run, row, column)))
    lines.append((str(row.get('row')), tuple(boxes)))
  return _tables.quiet(_tables.Table(setting, header, tuple(lines), groups))


def _header(
  columns: list[_Column],
) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
  """Returns the groups and the titles of columns."""
  groups, header = [], ['']
  for column in columns:
    titles = ['paper'] * column.published + ['ours'] * bool(column.metric)
    groups.append((column.title, len(titles)))
    header += titles
  return tuple(groups), tuple(header)


def _box(cell: _rates.Cell | None) -> _tables.Box:
  """Returns a rate in percent, with its interval."""
  box = _tables.rate_box(cell)
  if cell is None or cell.value is None:
    return box
  text = f'{100 * cell.value:.1f} [{100 * cell.low:.0f}, {100 * cell.high:.0f}]'
  return dataclasses.replace(box, text=text, share=None)


def _changes(
  run: _read.Run,
  columns: list[_Column],
  setting: str,
  rows: list[_read.Record],
) -> _tables.Table:
  """Returns one setting's changes."""
  by_name = {(r.get('setting'), r.get('row')): r for r in table_rows(run)}
  groups, header = _header(columns)
  lines = []
  for row in rows:
    reference = by_name.get((row.get('setting'), row['against']), {})
    boxes = []
    for column in columns:
      if column.published:
        change = _published(row, column, math.nan) - _published(
          reference, column, math.nan
        )
        text = _tables.NOTHING if math.isnan(change) else _signed(change, 2)
        boxes.append(_tables.Box(text))
      boxes.append(_change_box(run, row, reference, column))
    lines.append((f'{row.get("row")}, against {row["against"]}', tuple(boxes)))
  table = _tables.Table(f'{setting}: change in points', header, tuple(lines))
  return _tables.quiet(dataclasses.replace(table, groups=groups))


def _change_box(
  run: _read.Run, row: _read.Record, reference: _read.Record, column: _Column
) -> _tables.Box:
  """Returns our change from one row to another."""
  cell = _rates.difference(
    _counts(run, row, column), _counts(run, reference, column)
  )
  if cell is None:
    return _tables.Box(_tables.NOTHING)
  low, high = _signed(100 * cell.low), _signed(100 * cell.high)
  tone = ''
  if cell.low > 0 or cell.high < 0:
    good = (cell.value > 0) == column.metric.higher_is_better
    tone = 'good' if good else 'bad'
  text = f'{_signed(100 * cell.value, 1)} [{low}, {high}]'
  note, warning = _tables.evidence(cell), _tables.not_judged(cell)
  return _tables.Box(text, note, warning, tone)


def _signed(points: float, digits: int = 0) -> str:
  """Returns a number of points with its sign."""
  text = f'{points:+.{digits}f}'.replace('-', '−')
  return text.lstrip('+−') if not float(f'{points:.{digits}f}') else text
