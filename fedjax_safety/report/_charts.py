"""The report's charts over rounds, of who was caught, and of time."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker

from fedjax_safety.report import _caught, _costs, _plots, _read, _tables

_DASHES = ('-', '--', ':', '-.')
# Curves that can still be told apart; the rest are in the tables.
_MOST = 12
# Curve: where to what was measured there, by each seed.
_Curve = dict[float, list[float]]


class Panel(NamedTuple):
  """One set of curves with its axes.

  `chance` draws what guessing would give: a level, or the diagonal as 'x'.
  """

  title: str
  unit: str
  curves: dict[str, _Curve]
  is_share: bool = False
  chance: float | str | None = None


def training(run: _read.Run) -> matplotlib.figure.Figure | None:
  """Returns the losses over rounds, and of the repairs if there were any."""
  panels = (
    Panel('Loss of the clients ↓', 'round', by_round(run, 'client/loss')),
    Panel('Loss of the repair ↓', 'step', _repairs(run)),
  )
  return draw([panel for panel in panels if panel.curves], height=3.0)


def detection(run: _read.Run) -> matplotlib.figure.Figure | None:
  """Returns weights and AUROC over rounds, and the mean ROC, of each arm."""
  auroc = _aurocs(run)
  if not auroc:
    return None
  panels = (
    Panel(
      'Weight on malicious clients ↓',
      'round',
      by_round(run, _caught.WEIGHT, attacked=True),
      True,
    ),
    Panel('AUROC of each round ↑', 'round', auroc, True, 0.5),
    Panel(
      'ROC, mean of all rounds: malicious\nleft out, by share of honest ones',
      'honest clients left out ↓',
      _rocs(run),
      True,
      'x',
    ),
  )
  return draw([panel for panel in panels if panel.curves], height=3.6)


def cost(run: _read.Run) -> matplotlib.figure.Figure | None:
  """Returns the time of each arm as a bar of its kinds of stages."""
  spent = _costs.stages(run)
  if not spent:
    return None
  order = [arm for arm in _caught.rounds_by_arm(run) if arm in spent]
  arms = [*order, *(arm for arm in spent if arm not in order)]
  kinds = list(dict.fromkeys(k for _, k in _costs.KINDS)) + [_costs.OTHER]
  kinds = [k for k in kinds if any(k in spent[arm] for arm in arms)]
  height = 0.95 + 0.36 * len(arms)
  with matplotlib.rc_context(_plots.STYLE):
    figure = matplotlib.figure.Figure(figsize=(10, height))
    axis = figure.subplots()
    left, handles = [0.0] * len(arms), []
    for kind, color in zip(kinds, _plots.SERIES, strict=False):
      widths = [spent[arm].get(kind, 0.0) / 60 for arm in arms]
      handles.append(
        axis.barh(range(len(arms)), widths, 0.62, left=left, color=color)
      )
      left = [a + b for a, b in zip(left, widths, strict=True)]
    labels = [_caught.label(run, arm) for arm in arms]
    axis.set_yticks(range(len(arms)), _plots.short_labels(labels))
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.tick_params(axis='both', length=0)
    axis.tick_params(axis='y', labelcolor=_plots.INK)
    axis.grid(axis='x')
    axis.set_xlabel('minutes, mean over seeds')
    _legend(figure, dict(zip(kinds, handles, strict=True)))
    _plots.fit(figure, height, top=0.3)
  return figure


def alt_training(run: _read.Run) -> str:
  """Returns the figure of losses in words: where each curve ends."""
  return f'Losses over rounds. {_ends(by_round(run, "client/loss"))}.'


def alt_detection(run: _read.Run) -> str:
  """Returns the figure of who was caught in words."""
  weight = _ends(by_round(run, _caught.WEIGHT, attacked=True))
  return (
    f'Curves over rounds. Weight on malicious clients: {weight or "unknown"}. '
    f'AUROC: {_ends(_aurocs(run))}.'
  )


def alt_cost(run: _read.Run) -> str:
  """Returns the figure of times in words."""
  times = '; '.join(
    f'{_caught.label(run, arm)}: {_tables.duration(sum(kinds.values()))}'
    for arm, kinds in _costs.stages(run).items()
  )
  return f'Bars of the time of each arm, by kind of stage. {times}.'


def _ends(curves: dict[str, _Curve]) -> str:
  """Returns where each curve ends."""
  return '; '.join(
    f'{name} ends at {math.fsum(last) / len(last):.3f}'
    for name, points in curves.items()
    for last in (points[max(points)],)
  )


def by_round(
  run: _read.Run, metric: str, *, attacked: bool = False
) -> dict[str, _Curve]:
  """Returns a metric's values over seeds at each round, by arm."""
  curves = {}
  for arm, records in _caught.rounds_by_arm(run).items():
    found = _caught.attacked(records) if attacked else records
    points = _points(found, 'round', metric)
    if points:
      curves[_caught.label(run, arm)] = points
  return curves


def _points(records: Sequence[_read.Record], unit: str, metric: str) -> _Curve:
  """Returns a metric's values at each round or step."""
  points = {}
  for record in records:
    at, value = record.get(unit), _tables.numbers([record], metric)
    if isinstance(at, int | float) and value:
      points.setdefault(at, []).extend(value)
  return points


def _repairs(run: _read.Run) -> dict[str, _Curve]:
  """Returns the loss of every repair at each step."""
  groups = {}
  for record in run.of_kind('repair'):
    name = f'{_caught.label(run, str(record.get("arm")))}; '
    name += str(record.get('stage')).replace('_', ', ')
    groups.setdefault(name, []).append(record)
  found = {n: _points(r, 'step', 'repair/loss') for n, r in groups.items()}
  return {name: points for name, points in found.items() if points}


def _aurocs(run: _read.Run) -> dict[str, _Curve]:
  """Returns each arm's AUROC by round: of its rule, or else of distances."""
  curves = {}
  for arm, records in _caught.rounds_by_arm(run).items():
    bad = _caught.attacked(records)
    distance = _caught.by_distance(bad)
    metric = _caught.DISTANCE_AUROC if distance else _caught.AUROC
    points = _points(bad, 'round', metric)
    if points:
      curves[_suspected(run, arm, distance)] = points
  return curves


def _rocs(run: _read.Run) -> dict[str, _Curve]:
  """Returns each arm's mean ROC."""
  curves = {}
  for arm, records in _caught.rounds_by_arm(run).items():
    bad = _caught.attacked(records)
    caught = _caught.mean_roc(bad)
    if caught:
      name = _suspected(run, arm, _caught.by_distance(bad))
      points = zip(_caught.GRID, caught, strict=True)
      curves[name] = {x: [y] for x, y in points}
  return curves


def _suspected(run: _read.Run, arm: str, distance: bool) -> str:
  """Returns an arm's words, and whether only distances tell of suspicion."""
  words = _caught.label(run, arm)
  return f'{words} (by distance)' if distance else words


def draw(
  panels: Sequence[Panel], *, height: float
) -> matplotlib.figure.Figure | None:
  """Draws panels side by side under one legend; None without any."""
  if not panels:
    return None
  every = list(dict.fromkeys(name for p in panels for name in p.curves))
  names = every[:_MOST]
  lines = math.ceil((len(names) + (len(every) > _MOST)) / 3)
  height += 0.19 * lines
  with matplotlib.rc_context(_plots.STYLE):
    figure = matplotlib.figure.Figure(figsize=(10, height))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles = {}
    for axis, panel in zip(axes, panels, strict=True):
      handles |= _draw_panel(axis, panel, names)
    shown = {name: handles[name] for name in names}
    if len(every) > _MOST:
      # An entry without a line.
      rest = f'{len(every) - _MOST} more only in the tables'
      shown[rest] = matplotlib.lines.Line2D([], [], linestyle='')
    _legend(figure, shown)
    _plots.fit(figure, height, top=0.12 + 0.19 * lines)
  return figure


def _legend(
  figure: matplotlib.figure.Figure, handles: dict[str, object]
) -> None:
  """Puts a legend above all panels."""
  figure.legend(
    list(handles.values()),
    [_plots.legend_label(_plots.cut(name, 44)) for name in handles],
    loc='upper left',
    bbox_to_anchor=(0.01, 1.0),
    ncols=3,
    frameon=False,
    fontsize=9,
  )


def _draw_panel(
  axis: matplotlib.axes.Axes, panel: Panel, names: Sequence[str]
) -> dict[str, object]:
  """Draws mean curves with the range over seeds; returns a line by name."""
  handles = {}
  if panel.chance is not None:
    ends = (0, 1) if panel.chance == 'x' else (panel.chance, panel.chance)
    where = {} if panel.chance == 'x' else {'transform': _across(axis)}
    axis.plot((0, 1), ends, color=_plots.MUTED, linewidth=0.8, **where)
  for i, name in enumerate(names):
    if name not in panel.curves:
      continue
    points = panel.curves[name]
    style = {
      'color': _plots.SERIES[i % len(_plots.SERIES)],
      'linestyle': _DASHES[i // len(_plots.SERIES) % len(_DASHES)],
    }
    at = sorted(points)
    means = [sum(points[x]) / len(points[x]) for x in at]
    marker = 'o' if len(at) == 1 else ''
    (handles[name],) = axis.plot(
      at, means, linewidth=1.8, marker=marker, **style
    )
    if any(len(values) > 1 for values in points.values()):
      low, high = ([f(points[x]) for x in at] for f in (min, max))
      axis.fill_between(
        at, low, high, color=style['color'], alpha=0.15, linewidth=0
      )
  _finish(axis, panel)
  return handles


def _across(axis: matplotlib.axes.Axes):
  """Returns the coordinates of a line from edge to edge at a height."""
  return axis.get_yaxis_transform()


def _finish(axis: matplotlib.axes.Axes, panel: Panel) -> None:
  """Sets a panel's limits, ticks and titles."""
  if panel.is_share:
    axis.set_ylim(-0.02, 1.02)
    axis.yaxis.set_major_formatter(_plots.tick)
  else:
    axis.set_ylim(bottom=0)
  if panel.chance == 'x':
    axis.set_xlim(-0.02, 1.02)
    axis.xaxis.set_major_formatter(_plots.tick)
  else:
    whole = matplotlib.ticker.MaxNLocator(6, integer=True)
    axis.xaxis.set_major_locator(whole)
  axis.grid()
  axis.tick_params(length=0)
  axis.set_title(panel.title)
  axis.set_xlabel(panel.unit)
