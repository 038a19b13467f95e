"""From verdicts to rates with intervals, over prompts and over seeds."""

import dataclasses
from collections.abc import Iterable, Mapping

from fedjax_safety import statistics
from fedjax_safety.report import _read

# Roles of records: harmful requests, harmless ones, tasks with one answer.
HARMFUL, BENIGN, TASK = 'harmful', 'benign', 'task'
EXACT_MATCH = 'exact_match'
# The verdicts on tasks, the one of the headline first: whether the answer is
# the reference, follows the instructions that a program can check, or passes
# its tests.
TASK_TITLES = {
  EXACT_MATCH: 'exact match',
  'follows': 'instructions followed',
  'passes': 'code that passes its tests (pass@1)',
}
ENOUGH_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Count:
  """How many of `total` answers have a property; `missing` had no verdict."""

  successes: int
  total: int
  missing: int

  @property
  def rate(self) -> float:
    """The share of answers with the property."""
    return self.successes / self.total


@dataclasses.dataclass(frozen=True)
class Cell:
  """A rate, or a difference of rates, with its interval and its evidence.

  `value` is None where no verdict was given at all. `method` is `t` (over
  seeds), or `Wilson` or, of a difference, `Newcombe` (over prompts).
  """

  value: float | None
  low: float
  high: float
  num_prompts: int
  num_seeds: int
  num_missing: int
  method: str


@dataclasses.dataclass(frozen=True)
class Metric:
  """What is counted: verdicts of one judge on records of one role.

  `set_name` None stands for every set of that role.
  """

  role: str
  judge: str
  set_name: str | None = None

  @property
  def higher_is_better(self) -> bool:
    """Whether a larger rate is the better one."""
    return self.role != BENIGN

  @property
  def arrow(self) -> str:
    """The direction of better."""
    return '↑' if self.higher_is_better else '↓'

  @property
  def path(self) -> str:
    """The metric's path name."""
    return {
      HARMFUL: 'safety/harmless_rate',
      BENIGN: 'safety/over_refusal_rate',
      TASK: f'helpfulness/{self.judge}',
    }[self.role]


def count(records: Iterable[_read.Record], metric: Metric) -> Count | None:
  """Counts one seed's verdicts; None where this judge was never asked.

  An answer without a usable verdict counts as the bad outcome: not safe, not
  exact, refused. A judge that fails can then never make a run look better.
  """
  verdicts = [
    record['verdicts'].get(metric.judge, ...)
    for record in records
    if record.get('role') == metric.role
    and metric.set_name in (None, record.get('set'))
    and not (metric.role == TASK and _of_the_other(record, metric.judge))
  ]
  if all(verdict is ... for verdict in verdicts):
    return None
  missing = sum(not isinstance(verdict, bool) for verdict in verdicts)
  successes = sum(verdict is True for verdict in verdicts)
  if not metric.higher_is_better:
    successes += missing
  return Count(successes, len(verdicts), missing)


def _of_the_other(record: _read.Record, judge: str) -> bool:
  """Returns whether a task has checks and not a reference, or the reverse."""
  own = TASK_TITLES.keys() & record['verdicts'].keys()
  return bool(own) and judge not in own


def by_seed(row: _read.Row, metric: Metric) -> dict[int, Count]:
  """Returns the counts of every seed whose answers this judge saw."""
  counts = {
    seed: count(row.of_role(seed, metric.role), metric) for seed in row.records
  }
  return {seed: value for seed, value in counts.items() if value is not None}


def rate(counts: Mapping[int, Count]) -> Cell | None:
  """Returns the mean rate over seeds; None without any count.

  From three seeds on the interval is Student's over seeds. Below, and where
  all seeds agree to the last answer, it is Wilson's over the prompts of one
  seed: seeds share their prompts, which therefore count once.
  """
  if not counts:
    return None
  rates = [value.rate for value in counts.values()]
  prompts = min(value.total for value in counts.values())
  missing = sum(value.missing for value in counts.values())
  if missing == sum(value.total for value in counts.values()):
    return Cell(None, 0.0, 1.0, prompts, len(counts), missing, 'Wilson')
  if len(rates) >= ENOUGH_SEEDS and min(rates) < max(rates):
    interval, method = statistics.mean_interval(rates), 't'
  else:
    mean = sum(rates) / len(rates)
    interval = statistics.wilson_interval(min(mean, 1) * prompts, prompts)
    method = 'Wilson'
  low, high = max(0.0, interval.low), min(1.0, interval.high)
  return Cell(interval.value, low, high, prompts, len(counts), missing, method)


def difference(
  counts: Mapping[int, Count], reference: Mapping[int, Count]
) -> Cell | None:
  """Returns the mean difference to a reference over the seeds they share.

  The interval follows `rate`: Student's over the seeds' differences, or
  Newcombe's from two Wilson intervals.
  """
  seeds = [seed for seed in counts if seed in reference]
  ours = rate({seed: counts[seed] for seed in seeds})
  theirs = rate({seed: reference[seed] for seed in seeds})
  if ours is None or theirs is None or None in (ours.value, theirs.value):
    return None
  gaps = [counts[seed].rate - reference[seed].rate for seed in seeds]
  if len(gaps) >= ENOUGH_SEEDS and min(gaps) < max(gaps):
    interval, method = statistics.mean_interval(gaps), 't'
  else:
    interval, method = _newcombe(ours, theirs), 'Newcombe'
  return Cell(
    interval.value,
    max(-1.0, interval.low),
    min(1.0, interval.high),
    min(ours.num_prompts, theirs.num_prompts),
    len(seeds),
    ours.num_missing + theirs.num_missing,
    method,
  )


def _newcombe(ours: Cell, theirs: Cell) -> statistics.Interval:
  """Returns the difference of two mean rates over their prompts."""
  return statistics.difference_interval(
    ours.value * ours.num_prompts,
    ours.num_prompts,
    theirs.value * theirs.num_prompts,
    theirs.num_prompts,
  )
