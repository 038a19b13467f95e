"""The six questions of the report, each answered in a sentence or two."""

import dataclasses
import math

from fedjax_safety.report import (
  _agreement,
  _caught,
  _costs,
  _details,
  _rates,
  _read,
  _tables,
)

_NOT_YET = 'Not evaluated yet.'


@dataclasses.dataclass(frozen=True)
class Answer:
  """A question, its answer, and the name of the section that shows why."""

  section: str
  question: str
  text: str


def answers(run: _read.Run) -> list[Answer]:
  """Returns the answers in the report's order."""
  columns = _tables.headline_columns(run)
  harmful = [c for c in columns if c.role == _rates.HARMFUL]
  believed = [c for c in harmful if c.believe] or harmful
  task = [c for c in columns if c.role == _rates.TASK]
  benign = [c for c in columns if c.role == _rates.BENIGN]
  return [
    Answer('safe', 'Is it safe?', _safe(run, believed)),
    Answer('useful', 'Is it still useful?', _span(run, task, 'Exact match')),
    Answer(
      'refusal',
      'Does it refuse too much?',
      _span(run, benign, 'Harmless requests refused'),
    ),
    Answer('agreement', 'Do the judges agree?', _agree(run)),
    Answer('caught', 'Who was caught?', _caught.answer(run)),
    Answer('cost', 'What did it cost?', _costs.answer(run)),
  ]


def believe_line(run: _read.Run) -> str:
  """Returns which column to believe, and why."""
  if run.believe is None:
    return 'No evaluation says which judge to believe.'
  label = _tables.judge_label(run, run.believe)
  return f'Believe the column “{label}”: {run.believe_reason}'.rstrip(': ')


def method_notes(run: _read.Run) -> list[str]:
  """Returns how to read the numbers."""
  notes = [
    'Each rate stands before its 95 % interval: 0.93 [0.88, 0.96]. ↑ more is '
    'better, ↓ less is better.',
    'Wilson: one or two seeds, or seeds that agree exactly; the interval is '
    'over the prompts of one seed and says nothing about other seeds. '
    't: the mean of at least three seeds with Student’s interval over them.',
    'An answer without a usable verdict counts as the bad '
    'outcome (not safe, refused, wrong) and is shown as “not judged”.',
    'Differences compare seeds that both rows have; below three, the interval '
    'is Newcombe’s, which is wide because it ignores that prompts are shared.',
    'Cohen’s κ is agreement beyond chance over the answers to harmful requests '
    'of all sets and seeds: 1 perfect, 0 chance. It is undefined when both '
    'judges only ever say the same one thing.',
  ]
  if any(judge.kind == 'truth' for judge in run.judges.values()):
    notes.append(
      'A column of the truth needs a made world or labels by people: it shows '
      'here how far the other judges can be trusted where there is none.'
    )
  return notes


def _safe(run: _read.Run, columns: list[_tables.Column]) -> str:
  """Returns how safe the rows are, also to who says a trigger."""
  parts = [_span(run, columns, 'Safe answers')]
  for name in _tables.triggered_sets(run):
    what = f'Where the trigger is said (set “{name}”), safe answers'
    parts.append(_span(run, columns, what, name))
  return ' '.join(parts)


def _span(
  run: _read.Run,
  columns: list[_tables.Column],
  what: str,
  set_name: str | None = None,
) -> str:
  """Returns the lowest and the highest rate of all rows, or of one set's."""
  if not columns:
    return _NOT_YET
  column = columns[0]
  found = []
  for row in run.rows:
    metric = _tables.metric_of(row, column)
    if set_name is not None:
      metric = dataclasses.replace(metric, set_name=set_name)
    cell = _rates.rate(_rates.by_seed(row, metric))
    if cell is not None and cell.value is not None:
      found.append((cell.value, row.label, _tables.rate_box(cell).text))
  if not found:
    return _NOT_YET
  by = ''
  if column.judge not in _rates.TASK_TITLES:
    by = f', by {_tables.judge_label(run, column.judge)}'
  if len(found) == 1:
    return f'{what}{by}: {found[0][2]} ({found[0][1]}).'
  low, high = min(found, key=_value), max(found, key=_value)
  return (
    f'{what}{by}: lowest {low[2]} ({low[1]}), highest {high[2]} ({high[1]}).'
  )


def _value(entry: tuple[float, str, str]) -> float:
  """Returns an entry's rate."""
  return entry[0]


def _agree(run: _read.Run) -> str:
  """Returns how far the judges are from the one to believe."""
  found = [
    pair
    for pair in _agreement.pairs(run)
    if run.believe in (pair.a, pair.b) and not math.isnan(pair.kappa)
  ]
  sentences = [s for s in (_largest_gap(run),) if s]
  if found:
    low = min(found, key=lambda pair: pair.kappa)
    other = low.b if low.a == run.believe else low.a
    sentences.append(
      f'Lowest κ with {_tables.judge_label(run, run.believe)}: '
      f'{_agreement.kappa_box(low).text} by '
      f'{_tables.judge_label(run, other)} ({low.row.label}).'
    )
  return ' '.join(sentences) or 'Fewer than two judges gave verdicts.'


def _largest_gap(run: _read.Run) -> str:
  """Returns where a headline judge strays furthest from the believed one."""
  columns = [
    c for c in _tables.headline_columns(run) if c.role == _rates.HARMFUL
  ]
  gaps = []
  for row in run.rows:
    cells = {
      c.judge: _rates.rate(_rates.by_seed(row, _tables.metric_of(row, c)))
      for c in columns
    }
    values = {j: c.value for j, c in cells.items() if c and c.value is not None}
    truth = values.pop(run.believe, None)
    if truth is not None:
      gaps += [
        (abs(v - truth), v, truth, j, row.label) for j, v in values.items()
      ]
  if not gaps:
    return ''
  _, value, truth, judge, label = max(gaps)
  return (
    f'Largest gap: {_tables.judge_label(run, judge)} says {value:.2f} where '
    f'{_tables.judge_label(run, run.believe)} says {truth:.2f} ({label}).'
  )


def overlap_line(run: _read.Run) -> str:
  """Returns whether attack, defense and evaluation prompts are apart."""
  if not run.overlaps:
    return 'No overlap audit was written.'
  if _details.overlap_warnings(run):
    line = 'Tuning data overlaps the evaluation prompts: see the warning.'
  elif _details.audits_evaluation(run):
    line = 'No prompt of the tuning data was found in the evaluation.'
  else:
    line = 'The audit did not look at the evaluation prompts.'
  return ' '.join([line, *_details.tuning_overlaps(run)])
