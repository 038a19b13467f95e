"""The report as GitHub Markdown and as CSV."""

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterator, Sequence

from fedjax_safety import statistics
from fedjax_safety.report import (
  _agreement,
  _answers,
  _caught,
  _costs,
  _details,
  _escape,
  _grid,
  _rates,
  _read,
  _scores,
  _served,
  _sweep,
  _tables,
)

CSV_HEADER = (
  'arm',
  'seed',
  'stage',
  'label',
  'set',
  'metric',
  'judge',
  'value',
  'low',
  'high',
  'n',
  'num_missing',
)


def markdown(
  run: _read.Run, *, num_examples: int, plots: dict[str, str]
) -> str:
  """Returns the report; `plots` maps a file's name to its title."""
  parts = [f'# Safety report: {_escape.markdown(run.name)}']
  parts += _notices(run)
  for answer in _answers.answers(run):
    parts.append(f'**{answer.question}** {_escape.markdown(answer.text)}')
  if notes := _sweep.notes(run):
    parts += [f'## {_sweep.title(run)}', _list(notes)]
    parts += map(_table, _grid.tables(run))
    parts += [_table(t) for t in (*_sweep.tables(run), *_sweep.changes(run))]
  parts += ['## Headline', *_optional(_tables.headline(run))]
  parts.append(_escape.markdown(_answers.believe_line(run)))
  parts += _plot(plots, 'headline')
  parts += _optional(_tables.differences(run))
  for title, role, scored in (
    ('Is it safe?', _rates.HARMFUL, _scores.SAFETY_ROLES),
    ('Is it still useful?', _rates.TASK, _scores.OTHER_ROLES),
    ('Does it refuse too much?', _rates.BENIGN, ()),
  ):
    parts.append(f'## {title}')
    parts += _or_nothing(_tables.per_set(run, role))
    parts += [_table(table) for table in _scores.tables(run, scored)]
  parts.append('## Do the judges agree? (Cohen’s κ)')
  parts += _or_nothing([*_agreement.matrices(run), _agreement.truth_table(run)])
  if served := _served.tables(run):
    parts += ['## Was it safe in every round?', *_plot(plots, 'served')]
    parts += map(_table, served)
  parts += _caught_and_cost(run, plots)
  parts.append('## Are the prompts kept apart?')
  parts.append(_escape.markdown(_answers.overlap_line(run)))
  parts += _optional(_details.overlap_table(run))
  if filters := _details.filter_table(run):
    parts += ['## What was kept of the written data?', _table(filters)]
  parts += _examples(run, num_examples)
  parts += ['## How to read the numbers', _list(_answers.method_notes(run))]
  parts += ['## Configuration', _fenced_json(_sweep.settings(run))]
  for name, content in run.manifests:
    parts += [f'### Data {_escape.markdown(name)}', _fenced_json(content)]
  return '\n\n'.join(parts) + '\n'


def _plot(plots: dict[str, str], name: str) -> list[str]:
  """Returns the picture of that name, if there is one."""
  path = f'plots/{name}.png'
  return [f'![{plots[path]}]({path})'] if path in plots else []


def _caught_and_cost(run: _read.Run, plots: dict[str, str]) -> list[str]:
  """Returns who was caught, what it cost and how training went."""
  parts = ['## Who was caught?', *_plot(plots, 'detection')]
  table = _caught.table(run)
  parts += _or_nothing([table])
  if table is not None:
    parts.append(_list(_caught.NOTES))
  parts += ['## What did it cost?', *_plot(plots, 'cost')]
  parts += _or_nothing([_costs.table(run)])
  if training := _plot(plots, 'training'):
    parts += ['## How did training go?', *training]
  return parts


def _notices(run: _read.Run) -> list[str]:
  """Returns the warnings and what is missing, as GitHub's alerts."""
  notices = []
  for kind, title, lines in (
    (
      'WARNING',
      'The evaluation is not independent',
      _details.overlap_warnings(run),
    ),
    ('NOTE', 'Missing or odd', run.missing),
  ):
    if lines:
      text = f'{title}:\n\n{_list(lines)}'
      notices.append(
        textwrap.indent(f'[!{kind}]\n{text}', '> ', lambda _: True)
      )
  return notices


def _list(lines: Sequence[str]) -> str:
  """Returns a bulleted list."""
  return '\n'.join(f'* {_escape.markdown(line)}' for line in lines)


def _optional(table: _tables.Table | None) -> list[str]:
  """Returns a table's parts, or none."""
  return [] if table is None else [_table(table)]


def _or_nothing(tables: list[_tables.Table | None]) -> list[str]:
  """Returns the tables there are, or a line that says there are none."""
  parts = [part for table in tables for part in _optional(table)]
  return parts or ['Nothing was recorded.']


def _table(table: _tables.Table) -> str:
  """Returns one table with its caption."""
  header = [_escape.markdown(name) for name in flat_header(table)]
  lines = [f'**{_escape.markdown(table.caption)}**', '', _line(header)]
  lines.append('| --- |' + ' ---: |' * (len(header) - 1))
  for label, boxes in table.rows:
    cells = [_escape.markdown(label)]
    for i, box in enumerate(boxes):
      text = _escape.markdown(box.text)
      if i == table.believe:
        text = f'**{text}**'
      for note in filter(None, (box.note, box.warning)):
        text += f'<br><sub>{_escape.markdown(note)}</sub>'
      cells.append(text)
    lines.append(_line(cells))
  if table.footnote:
    lines += ['', _escape.markdown(table.footnote)]
  return '\n'.join(lines)


def _line(cells: list[str]) -> str:
  """Returns one row of a Markdown table."""
  return f'| {" | ".join(cells)} |'


def flat_header(table: _tables.Table) -> list[str]:
  """Returns one line of column titles, the groups' titles included."""
  header = list(table.header)
  at = 1
  for group, width in table.groups:
    for i in range(at, at + width):
      header[i] = f'{group}: {header[i]}'
    at += width
  if table.believe is not None:
    header[table.believe + 1] += ' (believe this)'
  return header


def _examples(run: _read.Run, num_examples: int) -> list[str]:
  """Returns a few answers of every row, folded away."""
  if not num_examples:
    return []
  parts = ['## Some answers', _details.EXAMPLES_NOTE]
  for label, entries in _details.examples(run, num_examples):
    parts.append(f'<details><summary>{_escape.entities(label)}</summary>')
    for entry in entries:
      verdicts = ', '.join(
        f'{name}: {word}' for name, word, _ in entry.verdicts
      )
      where = f'{entry.role}, set {entry.set_name}. {verdicts}'
      parts += [
        _escape.markdown(where),
        'Prompt:',
        _escape.fenced(entry.prompt),
      ]
      parts += ['Answer:', _escape.fenced(entry.response)]
    parts.append('</details>')
  return parts


def _fenced_json(content: _read.Record) -> str:
  """Returns JSON data as a code block."""
  text = json.dumps(content, indent=2, ensure_ascii=False)
  return _escape.fenced(text) if content else 'Nothing was recorded.'


def csv_text(run: _read.Run) -> str:
  """Returns every rate, in long format: a line for each set and judge."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator='\n')
  writer.writerow(CSV_HEADER)
  for row in run.rows:
    for line in _csv_lines(run, row):
      writer.writerow([_escape.csv_cell(cell) for cell in line])
  return buffer.getvalue()


def _csv_lines(run: _read.Run, row: _read.Row) -> Iterator[tuple]:
  """Yields one row's lines, for each seed on its own."""
  for seed in sorted(row.records):
    for metric in _metrics(run):
      count = _rates.count(row.of_role(seed, metric.role), metric)
      if count is not None:
        rate = statistics.wilson_interval(count.successes, count.total)
        yield (
          row.arm,
          seed,
          row.stage,
          row.label,
          metric.set_name,
          metric.path,
          '' if metric.role == _rates.TASK else metric.judge,
          *(round(bound, 6) for bound in rate),
          count.total,
          count.missing,
        )
    yield from _score_lines(run, row, seed)


def _score_lines(run: _read.Run, row: _read.Row, seed: int) -> Iterator[tuple]:
  """Yields one seed's lines of scores."""
  for name, path, judge, mean, total, missing in _scores.csv_lines(
    run, row, seed
  ):
    bounds = ('' if math.isnan(x) else round(x, 6) for x in mean)
    yield (
      row.arm,
      seed,
      row.stage,
      row.label,
      name,
      path,
      judge,
      *bounds,
      total,
      missing,
    )


def _metrics(run: _read.Run) -> Iterator[_rates.Metric]:
  """Yields every metric: role by role, set by set, judge by judge."""
  for role in (_rates.HARMFUL, _rates.TASK, _rates.BENIGN):
    judges = _rates.TASK_TITLES if role == _rates.TASK else run.judges
    for set_name in run.sets.get(role, []):
      for judge in judges:
        yield _rates.Metric(role, judge, set_name)
