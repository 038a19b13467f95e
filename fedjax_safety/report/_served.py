"""What the adapters that the rounds served were worth."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import matplotlib.figure

from fedjax_safety.report import _caught, _charts, _read, _tables

# Rounds that a table has columns for; the figure has all of them.
_MOST_COLUMNS = 8

# A metric of one arm by seed, by the number of rounds done.
_Rounds = dict[int, dict[object, float]]


def figure(run: _read.Run) -> matplotlib.figure.Figure | None:
  """Returns what the rounds' adapters were worth; None if none was measured."""
  return _charts.draw(
    [
      _charts.Panel(title, 'rounds done', _curves(run, name), True)
      for title, name in _names(run)
    ],
    height=3.0,
  )


def tables(run: _read.Run) -> list[_tables.Table]:
  """Returns a table of arms by rounds for safety, and one for the tasks.

  The first column is by how much an arm was most below the first one, of all
  rounds that were measured, in the mean of the seeds that both have.
  """
  return [
    table
    for title, name in _names(run)
    if (table := _table(title, _measured(run, name))) is not None
  ]


def _curves(run: _read.Run, name: str) -> dict[str, dict[float, list[float]]]:
  """Returns a metric's values over seeds by arm and number of rounds done."""
  return {
    arm: {at: list(by_seed.values()) for at, by_seed in rounds.items()}
    for arm, rounds in _measured(run, name).items()
  }


def _measured(run: _read.Run, name: str) -> dict[str, _Rounds]:
  """Returns a metric of the arms that have it, by their words."""
  arms = {}
  for arm, records in _caught.rounds_by_arm(run).items():
    rounds: _Rounds = {}
    for record in records:
      at, value = record.get('round'), _tables.numbers([record], name)
      if isinstance(at, int) and value:
        rounds.setdefault(at + 1, {})[record.get('seed')] = value[0]
    if rounds:
      arms[_caught.label(run, arm)] = rounds
  return arms


def _table(title: str, arms: Mapping[str, _Rounds]) -> _tables.Table | None:
  """Returns one metric's table; None if no round was measured."""
  every = sorted({at for rounds in arms.values() for at in rounds})
  if not every:
    return None
  shown, first = _evenly(every), next(iter(arms))
  rows = tuple(
    (
      label,
      (
        _tables.Box(_tables.NOTHING)
        if label == first
        else _most_below(rounds, arms[first]),
        *(_cell(rounds.get(at, {})) for at in shown),
      ),
    )
    for label, rounds in arms.items()
  )
  after = (f'after round {at}' for at in shown)
  header = ('', f'most below “{first}”', *after)
  return _tables.quiet(_tables.Table(title, header, rows, heat=True))


def _evenly(rounds: Sequence[int]) -> list[int]:
  """Returns all rounds, or as many as fit: the last one, and even steps."""
  step = math.ceil(len(rounds) / _MOST_COLUMNS)
  return list(rounds[::-1][::step][::-1])


def _cell(by_seed: Mapping[object, float]) -> _tables.Box:
  """Returns the mean over seeds in one round."""
  records = [{'seed': seed, 'value': x} for seed, x in by_seed.items()]
  box = _caught.box(records, 'value', is_share=True)
  return box if '[' in box.text else dataclasses.replace(box, note='')


def _most_below(ours: _Rounds, reference: _Rounds) -> _tables.Box:
  """Returns by how many points, and in which round, one arm was most below."""
  gaps = {}
  for at in sorted(ours.keys() & reference.keys()):
    here, there = ours[at], reference[at]
    if seeds := here.keys() & there.keys():
      lost = math.fsum(there[seed] - here[seed] for seed in seeds)
      gaps[at] = lost / len(seeds)
  if not gaps:
    return _tables.Box(_tables.NOTHING)
  at = max(gaps, key=gaps.get)
  points = round(100 * gaps[at])
  if points <= 0:
    return _tables.Box('never')
  unit = 'point' if points == 1 else 'points'
  return _tables.Box(f'{points} {unit}, round {at}')


def _names(run: _read.Run) -> list[tuple[str, str]]:
  """Returns the titles and names of what is measured of rounds' adapters."""
  names = dict.fromkeys(name for r in run.of_kind('round') for name in r)
  safety = [name for name in names if name.startswith('safety/')]
  believed = f'safety/{run.believe}'
  helpful = [name for name in names if name.startswith('helpfulness/')]
  chosen = [believed] if believed in safety else safety[:1]
  return [
    *(('Safe answers to harmful requests ↑', name) for name in chosen),
    *(('Tasks done ↑', name) for name in helpful),
  ]


def alt(run: _read.Run) -> str:
  """Returns the figure of the rounds' adapters in words: the worst round."""
  worst = []
  for title, name in _names(run):
    for arm, points in _curves(run, name).items():
      least = min(points, key=lambda at: min(points[at]))
      worst.append(
        f'{title} {arm}: {min(points[least]):.3f} at the least, after round '
        f'{least}'
      )
  return f'Curves over rounds. {"; ".join(worst)}.'
