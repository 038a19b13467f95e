"""Writes what is known of every rule as a table, from the registry.

    cd fedjax_safety/aggregators
    python -m fedjax_safety.aggregators.describe README.md

replaces the tables of a file between their marks; a test compares.
"""

import pathlib
import re
import sys

# Importing the package fills the registry.
from fedjax_safety import aggregators
from fedjax_safety.aggregators import _rule

_HEADER = ('rule', 'paper', 'guarantee', 'cost', 'needs', 'acts on')


def table(names: tuple[str, ...]) -> str:
  """Returns a Markdown table of the named rules, in their order."""
  lines = [_line(_HEADER), _line(['---'] * len(_HEADER))]
  for name in names:
    rule = _rule.REGISTRY[name]
    lines.append(
      _line(
        [
          f'`{name}`',
          rule.paper,
          rule.guarantee,
          rule.cost,
          rule.needs,
          rule.acts_on,
        ]
      )
    )
  return '\n'.join(lines)


def updated(text: str) -> str:
  """Returns a document with its marked tables written anew.

  Raises:
    ValueError: a mark is missing.
  """
  tables = {
    'aggregators': aggregators.names(),
    'preaggregators': aggregators.preaggregator_names(),
  }
  for mark, names in tables.items():
    pattern = rf'(<!-- {mark} -->\n)(?:(?!<!--).)*(<!-- end -->)'
    body = table(names) + '\n'
    text, count = re.subn(
      pattern, lambda m, b=body: m[1] + b + m[2], text, flags=re.DOTALL
    )
    if count != 1:
      raise ValueError(f'the document needs one table marked {mark!r}')
  return text


def _line(cells) -> str:
  return '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |'


if __name__ == '__main__':
  document = pathlib.Path(sys.argv[1])
  document.write_text(updated(document.read_text()))
