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
_VARIABLES = {INK: '--ink', MUTED: '--muted', GRID: '--grid'} | {
  color: f'--series-{i}' for i, color in enumerate(SERIES)
}
STYLE = {
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
  with matplotlib.rc_context(STYLE):
    figure = matplotlib.figure.Figure(figsize=(10, height))
    widths = [1.7] + [1] * (len(groups) - 1)
    axes = figure.subplots(
      1, len(groups), sharey=True, squeeze=False, width_ratios=widths
    )[0]
    for axis, group in zip(axes, groups, strict=True):
      own = [column for column in columns if column.group == group]
      handles = _bars(axis, run, own, columns)
      _bar_titles(axis, handles, own, lines)
    axes[0].set_yticks(
      range(len(run.rows)), short_labels([row.label for row in run.rows])
    )
    axes[0].tick_params(axis='y', labelcolor=INK)
    axes[0].set_ylim(len(run.rows) - 0.4, -0.6)
    fit(figure, height)
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
  axis.xaxis.set_major_formatter(tick)
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
  group = cut(columns[0].group, 50 if len(columns) > 1 else 26)
  axis.set_title(group, pad=10 + 13 * lines)
  room = (24, 18, 13)[min(len(columns), 3) - 1]
  titles = [
    f'{cut(c.title, room - 4)} (believe)' if c.believe else cut(c.title, room)
    for c in columns
  ]
  legend = axis.legend(
    handles,
    [legend_label(title) for title in titles],
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


def alt_headline(run: _read.Run) -> str:
  """Returns the headline's figure in words."""
  rows = '; '.join(
    f'{label}: {", ".join(box.text for box in boxes)}'
    for label, boxes in _tables.headline(run).rows
  )
  titles = ', '.join(c.title for c in _tables.headline_columns(run))
  return f'Bars with 95 % intervals. Columns: {titles}. {rows}.'


def to_svg(figure: matplotlib.figure.Figure, name: str, alt: str) -> str:
  """Returns inline SVG whose colors follow the page's style sheet.

  Args:
    figure: the figure.
    name: a word unlike any other figure's of the page, for its identifiers.
    alt: the figure in words.
  """
  buffer = io.StringIO()
  nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  with matplotlib.rc_context(STYLE | {'svg.hashsalt': name}):
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
  with matplotlib.rc_context(STYLE):
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


def legend_label(text: str) -> str:
  """Returns a legend's text; matplotlib drops those with a leading dash."""
  return f' {text}' if text.startswith('_') else text


def short_labels(labels: Sequence[str]) -> list[str]:
  """Returns rows' labels, broken in two lines where they are long."""
  short = []
  for label in labels:
    words = cut(label, 52)
    middle = words.rfind(' ', 0, 27) if len(words) > 26 else -1
    short.append(
      words if middle < 1 else f'{words[:middle]}\n{words[middle + 1 :]}'
    )
  return short


def cut(text: str, length: int) -> str:
  """Returns one line of text, cut to a length."""
  text = ' '.join(text.split())
  return text if len(text) <= length else f'{text[: length - 1]}…'


def tick(value: float, unused_position: int) -> str:
  """Returns a tick of a share without needless zeros."""
  return f'{value:g}'


def fit(
  figure: matplotlib.figure.Figure, height: float, top: float = 0.0
) -> None:
  """Lays the panels out, leaving `top` inches for a legend."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='.*Glyph.*')
    figure.tight_layout(rect=(0, 0, 1, 1 - top / height), w_pad=2)
