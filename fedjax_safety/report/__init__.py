"""Turns a run's files into a report; needs neither the run's program nor jax.

The report answers, in this order: is it safe, is it still useful, does it
refuse too much, do the judges agree, who was caught, what did it cost.
"""

import os
import pathlib

from fedjax_safety import _validate
from fedjax_safety.report import (
  _charts,
  _html,
  _plots,
  _read,
  _served,
  _sweep,
  _terminal,
  _text,
)

_TITLES = {
  'headline': 'The headline with 95 % intervals',
  'detection': 'Who was caught, over rounds and over all of them',
  'cost': 'Time of each arm',
  'training': 'Losses over rounds',
  'served': 'Safety by round',
}

__all__ = ['build', 'terminal_table']


def build(
  workdir: str | os.PathLike, *, num_examples: int = 3
) -> dict[str, pathlib.Path]:
  """Writes a run's report into its folder, as HTML, Markdown, CSV and plots.

  The same files give the same report, byte for byte. Whatever a model
  answered is inert in every format. A run that has not finished gives a
  report that says what is missing. Each file is replaced whole or not at all.

  Args:
    workdir: the folder of a run: `config.json`, `metrics.jsonl`, `runs/`.
    num_examples: answers to harmful requests to show for each row, next to
      one of each other kind; with 0 the report shows no answers.

  Returns:
    The paths written: `html`, `markdown` and `csv`; `paper_csv` where the
    config has published numbers; `headline_plot`, `detection_plot`,
    `cost_plot`, `training_plot` and `served_plot` where there was something
    to draw.

  Raises:
    ValueError: if the folder holds nothing of a run.

  Example:
    paths = report.build('/tmp/my_run')
    print(paths['html'])
  """
  _validate.non_negative(num_examples=num_examples)
  run = _read.load(workdir)
  folder = pathlib.Path(workdir)
  figures, plots, paths = {}, {}, {}
  for name, figure, alt in _figures(run):
    path = folder / 'plots' / f'{name}.png'
    figures[name] = _plots.to_svg(figure, name, alt)
    plots[f'plots/{name}.png'] = _TITLES[name]
    paths[f'{name}_plot'] = _replace(path, _plots.to_png(figure))
  texts = {
    'html': _html.html(run, num_examples=num_examples, figures=figures),
    'markdown': _text.markdown(run, num_examples=num_examples, plots=plots),
    'csv': _text.csv_text(run),
  }
  files = {'html': 'report.html', 'markdown': 'report.md', 'csv': 'report.csv'}
  if _sweep.notes(run):
    texts['paper_csv'] = _sweep.csv_text(run)
    files['paper_csv'] = 'paper.csv'
  for name, text in texts.items():
    paths[name] = _replace(folder / files[name], text.encode())
  return paths


def terminal_table(workdir: str | os.PathLike) -> str:
  """Returns the headline as plain text, with the column to believe and why.

  Where the config has published numbers, they stand beside the run's. Fits
  120 columns up to five columns of rates.

  Args:
    workdir: the folder of a run.

  Returns:
    Lines of text without control sequences.

  Raises:
    ValueError: if the folder holds nothing of a run.
  """
  return _terminal.terminal_table(_read.load(workdir))


def _figures(run: _read.Run) -> list[tuple]:
  """Returns the name, figure and words of everything there is to draw."""
  drawn = (
    ('headline', _plots.headline, _plots.alt_headline),
    ('detection', _charts.detection, _charts.alt_detection),
    ('cost', _charts.cost, _charts.alt_cost),
    ('training', _charts.training, _charts.alt_training),
    ('served', _served.figure, _served.alt),
  )
  found = []
  for name, draw, words in drawn:
    figure = draw(run)
    if figure is not None:
      found.append((name, figure, words(run)))
  return found


def _replace(path: pathlib.Path, data: bytes) -> pathlib.Path:
  """Writes a file so that a reader sees the old one or all of the new one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    with part.open('wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)
  return path
