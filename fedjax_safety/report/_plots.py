"""The report's figures: no window, no global state, light and dark."""

import io
import math
import re
import warnings
from collections.abc import Sequence

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker

from fedjax_safety.report import _rates, _read, _tables

INK, MUTED, GRID = '#1d2127', '#5b6470', '#d9dde3'
# Told apart by color-blind readers; each has a lighter twin in the style
# sheet for dark pages.
SERIES = (
  '#0072b2',
  '#d55e00',
  '#009e73',
  '#b5528f',
  '#b87a00',
  '#3d8fc4',
  '#6b6b2f',
  '#70757c',
)
_DASHES = ('-', '--', ':', '-.')
_VARIABLES = {INK: '--ink', MUTED: '--muted', GRID: '--grid'} | {
  color: f'--series-{i}' for i, color in enumerate(SERIES)
}
_STYLE = {
  'axes.edgecolor': GRID,
  'axes.labelcolor': MUTED,
  'axes.labelsize': 9,
  'axes.prop_cycle': matplotlib.cycler(color=SERIES),
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlecolor': INK,
  'axes.titlesize': 10,
  'axes.titlelocation': 'left',
  'axes.axisbelow': True,
  'font.family': ['sans-serif'],
  'font.sans-serif': ['DejaVu Sans'],
  'grid.color': GRID,
  'grid.linewidth': 0.8,
  'savefig.bbox': None,
  'svg.fonttype': 'none',
  'text.color': INK,
  'text.parse_math': False,
  'text.usetex': False,
  'xtick.color': MUTED,
  'xtick.labelsize': 9,
  'ytick.color': MUTED,
  'ytick.labelsize': 9,
}


def headline(run: _read.Run) -> matplotlib.figure.Figure | None:
  """Returns the headline's bars with their intervals; None without rows."""
  columns = _tables.headline_columns(run)
  groups = list(dict.fromkeys(column.group for column in columns))
  if not run.rows:
    return None
  bars = max(sum(c.group == group for c in columns) for group in groups)
  lines = math.ceil(bars / 3)
  height = 0.9 + 0.19 * lines + len(run.rows) * (0.24 + 0.15 * bars)
  with matplotlib.rc_context(_STYLE):
    figure = matplotlib.figure.Figure(figsize=(10, height))
    widths = [1.7] + [1] * (len(groups) - 1)
    axes = figure.subplots(
      1, len(groups), sharey=True, squeeze=False, width_ratios=widths
    )[0]
    for axis, group in zip(axes, groups, strict=True):
      own = [column for column in columns if column.group == group]
      handles = _bars(axis, run, own, columns)
      _bar_titles(axis, handles, own, lines)
    axes[0].set_yticks(range(len(run.rows)), _short_labels(run))
    axes[0].tick_params(axis='y', labelcolor=INK)
    axes[0].set_ylim(len(run.rows) - 0.4, -0.6)
    _fit(figure, height)
  return figure


def _bars(
  axis: matplotlib.axes.Axes,
  run: _read.Run,
  columns: Sequence[_tables.Column],
  every: Sequence[_tables.Column],
) -> list:
  """Draws one group of columns as bars, a cluster a row; returns handles."""
  step = 0.8 / len(columns)
  handles = []
  for i, column in enumerate(columns):
    color = SERIES[every.index(column) % len(SERIES)]
    at, cells = [], []
    for place, row in enumerate(run.rows):
      counts = _rates.by_seed(row, _tables.metric_of(row, column))
      cell = _rates.rate(counts)
      if cell is not None and cell.value is not None:
        at.append(place + (i - (len(columns) - 1) / 2) * step)
        cells.append(cell)
    handles.append(
      axis.barh(
        at,
        [cell.value for cell in cells],
        height=min(0.86 * step, 0.42),
        color=color,
        xerr=[
          [cell.value - cell.low for cell in cells],
          [cell.high - cell.value for cell in cells],
        ],
        error_kw={'ecolor': INK, 'elinewidth': 1, 'capsize': 1.5},
      )
    )
  axis.set_xlim(0, 1.02)
  axis.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(0.25))
  axis.xaxis.set_major_formatter(_tick)
  axis.grid(axis='x')
  axis.tick_params(axis='both', length=0)
  return handles


def _bar_titles(
  axis: matplotlib.axes.Axes,
  handles: list,
  columns: Sequence[_tables.Column],
  lines: int,
) -> None:
  """Puts a title and a legend of so many lines above a group of bars.

  The legend stays out of the layout: long names are cut and the bars keep
  their place.
  """
  group = _cut(columns[0].group, 50 if len(columns) > 1 else 26)
  axis.set_title(group, pad=10 + 13 * lines)
  room = (24, 18, 13)[min(len(columns), 3) - 1]
  titles = [
    f'{_cut(c.title, room - 4)} (believe)' if c.believe else _cut(c.title, room)
    for c in columns
  ]
  legend = axis.legend(
    handles,
    [_label(title) for title in titles],
    loc='lower left',
    bbox_to_anchor=(-0.02, 0.995),
    ncols=min(len(titles), 3),
    frameon=False,
    fontsize=8.5,
    handlelength=1,
    handleheight=0.8,
    columnspacing=1.2,
    borderpad=0.2,
  )
  legend.set_in_layout(False)


def training(run: _read.Run) -> matplotlib.figure.Figure | None:
  """Returns the curves over rounds, and of the repairs if there were any."""
  loss = _curves(run, 'round', 'round', 'client/loss')
  weight = _curves(run, 'round', 'round', 'defense/weight_on_malicious')
  repair = _curves(run, 'repair', 'step', 'repair/loss')
  panels = [
    panel
    for panel in (
      ('Loss of the clients ↓', 'round', loss, False),
      ('Weight on malicious clients ↓', 'round', weight, True),
      ('Loss of the repair ↓', 'step', repair, False),
    )
    if panel[2]
  ]
  if not panels:
    return None
  names = list(dict.fromkeys(name for panel in panels for name in panel[2]))
  lines = math.ceil(len(names) / 3)
  height = 3.0 + 0.19 * lines
  with matplotlib.rc_context(_STYLE):
    figure = matplotlib.figure.Figure(figsize=(10, height))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles = {}
    for axis, (title, unit, curves, is_share) in zip(axes, panels, strict=True):
      handles |= _panel(axis, title, unit, curves, names, is_share)
    figure.legend(
      [handles[name] for name in names],
      [_label(_cut(name, 40)) for name in names],
      loc='upper left',
      bbox_to_anchor=(0.01, 1.0),
      ncols=3,
      frameon=False,
      fontsize=9,
    )
    _fit(figure, height, top=0.12 + 0.19 * lines)
  return figure


def _panel(
  axis: matplotlib.axes.Axes,
  title: str,
  unit: str,
  curves: dict[str, dict[float, list[float]]],
  names: Sequence[str],
  is_share: bool,
) -> dict[str, object]:
  """Draws mean curves with the range over seeds; returns a line by name."""
  handles = {}
  for name, points in curves.items():
    i = names.index(name)
    style = {
      'color': SERIES[i % len(SERIES)],
      'linestyle': _DASHES[i // len(SERIES) % len(_DASHES)],
    }
    at = sorted(points)
    means = [sum(points[x]) / len(points[x]) for x in at]
    marker = 'o' if len(at) == 1 else ''
    (handles[name],) = axis.plot(
      at, means, linewidth=1.8, marker=marker, **style
    )
    axis.fill_between(
      at,
      [min(points[x]) for x in at],
      [max(points[x]) for x in at],
      color=style['color'],
      alpha=0.15,
      linewidth=0,
    )
  if is_share:
    axis.set_ylim(-0.02, 1.02)
    axis.yaxis.set_major_formatter(_tick)
  else:
    axis.set_ylim(bottom=0)
  axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
  axis.grid()
  axis.tick_params(length=0)
  axis.set_title(title)
  axis.set_xlabel(unit)
  return handles


def _curves(
  run: _read.Run, kind: str, unit: str, name: str
) -> dict[str, dict[float, list[float]]]:
  """Returns a metric's values over seeds at each round or step, by arm."""
  curves = {}
  for record in run.of_kind(kind):
    at, value = record.get(unit), _tables.numbers([record], name)
    if isinstance(at, int | float) and value:
      label = str(record.get('arm'))
      if kind == 'repair':
        label = f'{label}, {record.get("stage")}'
      curves.setdefault(label, {}).setdefault(at, []).extend(value)
  return curves


def alt_headline(run: _read.Run) -> str:
  """Returns the headline's figure in words."""
  rows = '; '.join(
    f'{label}: {", ".join(box.text for box in boxes)}'
    for label, boxes in _tables.headline(run).rows
  )
  titles = ', '.join(c.title for c in _tables.headline_columns(run))
  return f'Bars with 95 % intervals. Columns: {titles}. {rows}.'


def alt_training(run: _read.Run) -> str:
  """Returns the figure of curves in words: where each curve ends."""
  ends = []
  for name in ('client/loss', 'defense/weight_on_malicious'):
    for arm, points in _curves(run, 'round', 'round', name).items():
      last = points[max(points)]
      ends.append(f'{name} of {arm} ends at {sum(last) / len(last):.3f}')
  return f'Curves over rounds. {"; ".join(ends)}.'


def to_svg(figure: matplotlib.figure.Figure, name: str, alt: str) -> str:
  """Returns inline SVG whose colors follow the page's style sheet.

  Args:
    figure: the figure.
    name: a word unlike any other figure's of the page, for its identifiers.
    alt: the figure in words.
  """
  buffer = io.StringIO()
  nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  with matplotlib.rc_context(_STYLE | {'svg.hashsalt': name}):
    _save(figure, buffer, format='svg', metadata=nothing, transparent=True)
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<defs>\s*<style.*?</style>\s*</defs>', '', text, flags=re.S)
  text = re.sub(r'<g id="[^"]*"', '<g', text)
  text = re.sub(r' style="[^"]*"', _with_variables, text)
  size = re.compile(r' width="[\d.]+pt" height="[\d.]+pt"')
  label = f' role="img" aria-label="{_attribute(alt)}"'
  return size.sub(lambda _: label, text, count=1)


def to_png(figure: matplotlib.figure.Figure) -> bytes:
  """Returns the figure on white, for places without style sheets."""
  buffer = io.BytesIO()
  with matplotlib.rc_context(_STYLE):
    _save(
      figure,
      buffer,
      format='png',
      dpi=160,
      facecolor='white',
      metadata={'Software': None},
    )
  return buffer.getvalue()


def _save(
  figure: matplotlib.figure.Figure, buffer: io.IOBase, **kwargs
) -> None:
  """Saves a figure; a glyph that a font lacks is no reason to warn."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='.*Glyph.*')
    figure.savefig(buffer, **kwargs)


def _with_variables(match: re.Match) -> str:
  """Returns a style attribute with the page's font and color variables."""
  text = re.sub(r'font-family: [^;"]*;? ?', '', match.group())
  text = re.sub(r'font: ([\d.]+px)[^;"]*', r'font-size: \1', text)
  for color, variable in _VARIABLES.items():
    text = text.replace(color, f'var({variable}, {color})')
  return text


def _attribute(text: str) -> str:
  """Returns text for a quoted attribute."""
  marks = {'&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;'}
  return ''.join(marks.get(character, character) for character in text)


def _label(text: str) -> str:
  """Returns a legend's text; matplotlib drops those with a leading dash."""
  return f' {text}' if text.startswith('_') else text


def _short_labels(run: _read.Run) -> list[str]:
  """Returns the rows' labels, broken in two lines where they are long."""
  labels = []
  for row in run.rows:
    words = _cut(row.label, 52)
    middle = words.rfind(' ', 0, 27) if len(words) > 26 else -1
    labels.append(
      words if middle < 1 else f'{words[:middle]}\n{words[middle + 1 :]}'
    )
  return labels


def _cut(text: str, length: int) -> str:
  """Returns one line of text, cut to a length."""
  text = ' '.join(text.split())
  return text if len(text) <= length else f'{text[: length - 1]}…'


def _tick(value: float, unused_position: int) -> str:
  """Returns a tick of a share without needless zeros."""
  return f'{value:g}'


def _fit(
  figure: matplotlib.figure.Figure, height: float, top: float = 0.0
) -> None:
  """Lays the panels out, leaving `top` inches for a legend."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='.*Glyph.*')
    figure.tight_layout(rect=(0, 0, 1, 1 - top / height), w_pad=2)
