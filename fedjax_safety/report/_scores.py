"""Means of the numbers that answers were given, with intervals."""

import math
from collections.abc import Collection, Iterator

from fedjax_safety import statistics
from fedjax_safety.report import _rates, _read, _tables

# Which scores stand beside safety, and which beside helpfulness.
SAFETY_ROLES = (_rates.HARMFUL,)
OTHER_ROLES = (_rates.TASK, 'open', _rates.BENIGN)
_ENOUGH_SEEDS = 3


def values(
  row: _read.Row, seed: int, role: str, name: str, set_name: str
) -> tuple[list[float], int]:
  """Returns one seed's scores on a set, and how many answers have none."""
  given = [
    record['scores'][name]
    for record in row.of_role(seed, role)
    if record.get('set') == set_name
    and isinstance(record.get('scores'), dict)
    and name in record['scores']
  ]
  found = [_number(value) for value in given]
  return [v for v in found if v is not None], found.count(None)


def _number(value: object) -> float | None:
  """Returns a finite number, None for anything else."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  return float(value) if math.isfinite(value) else None


def tables(run: _read.Run, roles: Collection[str]) -> list[_tables.Table]:
  """Returns a table for each scorer: every stage on every set of the roles."""
  return [
    table
    for name in run.scorers
    if (table := _table(run, name, roles)) is not None
  ]


def _table(
  run: _read.Run, name: str, roles: Collection[str]
) -> _tables.Table | None:
  """Returns one scorer's means, if it scored anything."""
  columns = [
    (role, set_name) for role in roles for set_name in run.sets.get(role, [])
  ]
  boxes = [[_box(row, name, *column) for column in columns] for row in run.rows]
  used = [
    i for i in range(len(columns)) if any(line[i] is not None for line in boxes)
  ]
  if not used:
    return None
  rows = tuple(
    (row.label, tuple(line[i] or _tables.Box(_tables.NOTHING) for i in used))
    for row, line in zip(run.rows, boxes, strict=True)
  )
  header = ('', *(columns[i][1] for i in used))
  caption = f'Mean {run.scorers[name]}, set by set'
  return _tables.quiet(_tables.Table(caption, header, rows))


def _box(
  row: _read.Row, name: str, role: str, set_name: str
) -> _tables.Box | None:
  """Returns the mean over seeds and answers; None if there was no score.

  From three seeds on the interval is Student's over seeds, below over the
  answers of all of them.
  """
  by_seed = [values(row, seed, role, name, set_name) for seed in row.records]
  missing = sum(count for _, count in by_seed)
  scores = [found for found, _ in by_seed if found]
  if not scores:
    warning = f'{missing} answers, none scored'
    return _tables.Box(_tables.NOTHING, '', warning) if missing else None
  means = [math.fsum(found) / len(found) for found in scores]
  if len(means) >= _ENOUGH_SEEDS:
    interval = statistics.mean_interval(means)
    note = f't over {len(means)} seeds, {len(scores[0])} answers each'
  else:
    pooled = [value for found in scores for value in found]
    interval = statistics.mean_interval(pooled)
    note = f't over {len(pooled)} answers'
  text = f'{interval.value:.2f}'
  if not math.isnan(interval.low):
    text += f' [{interval.low:.2f}, {interval.high:.2f}]'
  warning = f'{missing} without a score, left out' if missing else ''
  return _tables.Box(text, note, warning)


def csv_lines(
  run: _read.Run, row: _read.Row, seed: int
) -> Iterator[tuple[str, str, str, statistics.Interval, int, int]]:
  """Yields (set, metric, scorer, mean, scores, missing) of one seed."""
  for name in run.scorers:
    for role, sets in run.sets.items():
      for set_name in sets:
        found, missing = values(row, seed, role, name, set_name)
        if found:
          mean = statistics.mean_interval(found)
          total = len(found) + missing
          yield set_name, f'score/{name}', '', mean, total, missing
