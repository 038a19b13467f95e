"""Who was caught: what each arm's rule made of the malicious clients."""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence

from fedjax_safety import statistics
from fedjax_safety.report import _rates, _read, _tables

WEIGHT = 'defense/weight_on_malicious'
AUROC = 'defense/detection_auroc'
DISTANCE_AUROC = 'defense/distance_auroc'
RECALL = 'defense/detection_recall'
FALSE_POSITIVES = 'defense/false_positive_rate'
# Shares of honest clients at which curves of several rounds are averaged.
GRID = tuple(i / 50 for i in range(51))
NOTES = (
  'AUROC: how often a malicious client looks more suspicious than an honest '
  'one of its round, 0.5 by chance and 1 always. By the rule: its own scores, '
  'or the less weight the more suspicious. By distance: how far a client is '
  'from what the server made of all, which a rule need not look at.',
  'A client is left out where its weight is 0. A rule that works coordinate by '
  'coordinate gives no weights and leaves nobody out. Rounds without malicious '
  'clients count for honest ones alone.',
)

Point = tuple[float, float]


def label(run: _read.Run, arm: str) -> str:
  """Returns an arm's words: those of its row before any repair."""
  rows = [row for row in run.rows if row.arm == arm]
  rows.sort(key=lambda row: row.stage != 'federated')
  return rows[0].label if rows else arm


def rounds_by_arm(run: _read.Run) -> dict[str, list[_read.Record]]:
  """Returns the records of every arm's rounds, arms in the order of rows."""
  arms = {}
  for row in run.rows:
    arms.setdefault(row.arm, [])
  for record in run.of_kind('round'):
    arms.setdefault(str(record.get('arm')), []).append(record)
  return {arm: records for arm, records in arms.items() if records}


def attacked(records: Sequence[_read.Record]) -> list[_read.Record]:
  """Returns the rounds in which a malicious client took part."""
  return [record for record in records if _has_malicious(record)]


def _has_malicious(record: _read.Record) -> bool:
  """Returns whether a round had malicious clients; yes where nothing tells."""
  rows = record.get('client/is_malicious_by_row')
  if isinstance(rows, list):
    return any(rows)
  return 'defense/client_weights' not in record or RECALL in record


def table(run: _read.Run) -> _tables.Table | None:
  """Returns what became of malicious and honest clients in each arm."""
  arms = rounds_by_arm(run)
  if not arms:
    return None
  rows = tuple((label(run, arm), _boxes(arms[arm])) for arm in arms)
  header = (
    'Arm',
    'by the rule ↑',
    'by distance ↑',
    'of malicious clients ↓',
    'malicious ↑',
    'honest ↓',
    'rounds',
    'deltas not finite',
  )
  groups = (
    ('AUROC', 2),
    ('Weight', 1),
    ('Share left out', 2),
    ('All seeds', 2),
  )
  return _tables.quiet(
    _tables.Table('Malicious clients and the rule', header, rows, groups)
  )


def _boxes(records: Sequence[_read.Record]) -> tuple[_tables.Box, ...]:
  """Returns one arm's boxes."""
  bad = attacked(records)
  count = round(sum(_tables.numbers(records, 'defense/num_nonfinite')))
  return (
    box(bad, AUROC),
    box(bad, DISTANCE_AUROC),
    box(bad, WEIGHT, is_share=True),
    box(bad, RECALL, is_share=True),
    box(records, FALSE_POSITIVES, is_share=True),
    _tables.Box(str(len(records))),
    _tables.Box(str(count), tone='bad' if count else ''),
  )


def box(
  records: Sequence[_read.Record], name: str, *, is_share: bool = False
) -> _tables.Box:
  """Returns a metric's mean over rounds, and its interval over seeds."""
  found = mean(records, name)
  if found is None:
    return _tables.Box(_tables.NOTHING)
  interval, num_seeds = found
  text, basis = f'{interval.value:.2f}', 'mean over rounds'
  if num_seeds >= _rates.ENOUGH_SEEDS:
    low, high = max(0.0, interval.low), min(1.0, interval.high)
    text = f'{text} [{low:.2f}, {high:.2f}]'
    basis = f't over {num_seeds} seeds'
  share = min(interval.value, 1.0) if is_share else None
  return _tables.Box(text, basis, share=share)


def mean(
  records: Sequence[_read.Record], name: str
) -> tuple[statistics.Interval, int] | None:
  """Returns the mean over rounds with Student's interval over seeds."""
  seeds = {}
  for record in records:
    seeds.setdefault(record.get('seed'), []).extend(
      _tables.numbers([record], name)
    )
  means = [math.fsum(v) / len(v) for v in seeds.values() if v]
  if not means:
    return None
  if len(means) >= _rates.ENOUGH_SEEDS:
    return statistics.mean_interval(means), len(means)
  value = math.fsum(means) / len(means)
  return statistics.Interval(value, value, value), len(means)


def answer(run: _read.Run) -> str:
  """Returns who told malicious clients best, and whom it cost."""
  arms = rounds_by_arm(run)
  if not any(attacked(records) for records in arms.values()):
    return 'No round had a malicious client.' if arms else 'No round was run.'

  def extreme(name: str, choose: Callable, select: Callable) -> str:
    values = {a: mean(select(records), name) for a, records in arms.items()}
    values = {a: found[0].value for a, found in values.items() if found}
    if not values:
      return ''
    arm = choose(values, key=values.get)
    return f'{values[arm]:.2f} ({label(run, arm)})'

  every = list
  parts = [
    ('Best AUROC by a rule’s own weights or scores', AUROC, max, attacked),
    ('Least weight on malicious clients', WEIGHT, min, attacked),
    ('Most honest clients left out', FALSE_POSITIVES, max, every),
  ]
  said = [(words, extreme(*rest)) for words, *rest in parts]
  return ' '.join(f'{words}: {found}.' for words, found in said if found) or (
    'No rule of this run says whom it kept.'
  )


def suspicion(record: _read.Record) -> list[float] | None:
  """Returns how suspicious each client of a round was to the rule.

  Where the rule says nothing, how far the client was from the aggregate.
  """
  scores = record.get('defense/client_scores')
  if not isinstance(scores, list):
    weights = record.get('defense/client_weights')
    if isinstance(weights, list):
      scores = [-w if isinstance(w, int | float) else w for w in weights]
    else:
      scores = record.get('defense/distance_by_row')
  if not isinstance(scores, list):
    return None
  # What is not finite is null in the file: the most suspicious of all.
  return [
    x if isinstance(x, int | float) and math.isfinite(x) else math.inf
    for x in scores
  ]


def by_distance(records: Sequence[_read.Record]) -> bool:
  """Returns whether nothing but distances tells whom a rule suspects."""
  return not any(
    isinstance(record.get(name), list)
    for record in records
    for name in ('defense/client_scores', 'defense/client_weights')
  )


def mean_roc(records: Sequence[_read.Record]) -> list[float]:
  """Returns the mean over rounds of the share caught at each of `GRID`.

  Each round's curve is looked up where the rule would leave out that share of
  its honest clients, so that rounds of different scales count alike and the
  area under the mean is the mean AUROC.
  """
  curves = []
  for record in records:
    scores = suspicion(record)
    malicious = record.get('client/is_malicious_by_row')
    if scores and isinstance(malicious, list) and len(malicious) == len(scores):
      points = roc(scores, malicious)
      if points:
        curves.append([_caught_at(points, share) for share in GRID])
  return [math.fsum(v) / len(v) for v in zip(*curves, strict=True)]


def roc(scores: Sequence[float], malicious: Sequence[bool]) -> list[Point]:
  """Returns (honest, malicious) shares left out from no to all clients.

  Clients of one score are left out together. Empty where either kind is.
  """
  total = sum(map(bool, malicious))
  if total in (0, len(scores)):
    return []
  order = sorted(zip(scores, malicious, strict=True), key=lambda x: -x[0])
  points, caught, wrong = [(0.0, 0.0)], 0, 0
  for _, group in itertools.groupby(order, key=lambda x: x[0]):
    kinds = [bool(kind) for _, kind in group]
    caught += sum(kinds)
    wrong += len(kinds) - sum(kinds)
    points.append((wrong / (len(scores) - total), caught / total))
  return points


def _caught_at(points: Sequence[Point], share: float) -> float:
  """Returns the largest share caught at a share of honest ones left out."""
  at = bisect.bisect_right(points, (share, math.inf)) - 1
  x, y = points[at]
  if x == share or at + 1 == len(points):
    return y
  right, top = points[at + 1]
  return y + (top - y) * (share - x) / (right - x)
