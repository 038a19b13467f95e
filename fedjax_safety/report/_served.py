"""What the adapters that the rounds served were worth."""

import matplotlib.figure

from fedjax_safety.report import _charts, _read


def figure(run: _read.Run) -> matplotlib.figure.Figure | None:
  """Returns what the rounds' adapters were worth; None if none was measured."""
  return _charts.draw(
    [
      _charts.Panel(title, 'round', _charts.by_round(run, name), True)
      for title, name in _names(run)
    ],
    height=3.0,
  )


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
    for arm, points in _charts.by_round(run, name).items():
      least = min(points, key=lambda at: min(points[at]))
      worst.append(
        f'{title} {arm}: {min(points[least]):.3f} at the least, in round '
        f'{least}'
      )
  return f'Curves over rounds. {"; ".join(worst)}.'
