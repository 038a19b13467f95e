"""The report as one HTML file that needs nothing else and runs nothing."""

import json
import pathlib

import jinja2
import markupsafe

from fedjax_safety.report import (
  _agreement,
  _answers,
  _caught,
  _costs,
  _details,
  _grid,
  _plots,
  _rates,
  _read,
  _scores,
  _served,
  _sweep,
  _tables,
)

_FOLDER = pathlib.Path(__file__).parent


def html(run: _read.Run, *, num_examples: int, figures: dict[str, str]) -> str:
  """Returns the page; `figures` maps their names to SVG."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  template = environment.get_template('template.html.j2')
  return template.render(_view(run, num_examples, figures)).lstrip()


def _view(
  run: _read.Run, num_examples: int, figures: dict[str, str]
) -> dict[str, object]:
  """Returns what the template shows; every string is escaped there."""
  return {
    'name': run.name,
    'summary': _summary(run),
    'missing': run.missing,
    'answers': _answers.answers(run),
    'paper_notes': _sweep.notes(run),
    'paper_title': _sweep.title(run),
    'grid': _grid.tables(run),
    'paper': [*_sweep.tables(run), *_sweep.changes(run)],
    'believe_line': _answers.believe_line(run),
    'headline': _tables.headline(run),
    'differences': _tables.differences(run),
    'figures': {k: markupsafe.Markup(v) for k, v in figures.items()},
    'safe': _tables.per_set(run, _rates.HARMFUL),
    'useful': _tables.per_set(run, _rates.TASK),
    'safe_scores': _scores.tables(run, _scores.SAFETY_ROLES),
    'useful_scores': _scores.tables(run, _scores.OTHER_ROLES),
    'refusal': _tables.per_set(run, _rates.BENIGN),
    'matrices': _agreement.matrices(run),
    'truth': _agreement.truth_table(run),
    'served': _served.tables(run),
    'caught': _caught.table(run),
    'caught_notes': _caught.NOTES,
    'cost': _costs.table(run),
    'overlap': _details.overlap_table(run),
    'filters': _details.filter_table(run),
    'overlap_line': _answers.overlap_line(run),
    'overlap_warnings': _details.overlap_warnings(run),
    'examples': _details.examples(run, num_examples) if num_examples else [],
    'examples_note': _details.EXAMPLES_NOTE,
    'notes': _answers.method_notes(run),
    'config': _details.flat_config(_sweep.settings(run)),
    'manifests': [(name, _indented(value)) for name, value in run.manifests],
    'series': list(enumerate(_plots.SERIES)),
  }


def _summary(run: _read.Run) -> str:
  """Returns the extent of the run in a line."""
  arms = {row.arm for row in run.rows}
  seeds = {seed for row in run.rows for seed in row.records}
  answers = sum(len(r) for row in run.rows for r in row.records.values())
  return (
    f'{_many(len(arms), "arm")}, {_many(len(seeds), "seed")}, '
    f'{_many(len(run.rows), "evaluated stage")}, {_many(answers, "answer")}'
  )


def _many(number: int, noun: str) -> str:
  """Returns a number with its noun."""
  return f'{number:,} {noun}{"" if number == 1 else "s"}'


def _indented(value: _read.Record) -> str:
  """Returns JSON data for reading."""
  return json.dumps(value, indent=2, ensure_ascii=False)
