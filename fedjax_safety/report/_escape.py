"""Makes any text inert in the format that it is written into.

Generated answers and names are hostile until shown otherwise. HTML is escaped
by the template engine; this module does the rest.
"""

import html
import re
import unicodedata
from typing import Any

# Terminal control sequences, characters that reorder text, lone surrogates.
_INVISIBLE = re.compile(
  '[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e'
  '\u2060-\u2069\ufeff\ud800-\udfff]'
)
# A bracket matters only where it can end the text of a link.
_MARKDOWN = re.compile(r'([\\`*_|~#$@]|\](?=\())')
_FORMULA = ('=', '+', '-', '@', '\t', '\r')


def visible(value: Any) -> Any:
  """Returns JSON data with every control character spelled out, keys too."""
  if isinstance(value, str):
    return _INVISIBLE.sub(_spelled, value.replace('\r\n', '\n'))
  if isinstance(value, dict):
    return {visible(k): visible(v) for k, v in value.items()}
  if isinstance(value, list):
    return [visible(item) for item in value]
  return value


def markdown(text: str) -> str:
  """Returns text for one line or table cell of GitHub Markdown."""
  escaped = _MARKDOWN.sub(r'\\\1', html.escape(text, quote=False))
  return ' '.join(escaped.split())


def entities(text: str) -> str:
  """Returns text for a line of HTML within Markdown: inert in both."""
  marks = re.compile(r'[^\w\s.,:;-]', flags=re.ASCII)
  line = ' '.join(text.split())
  return marks.sub(lambda match: f'&#{ord(match.group())};', line)


def fenced(text: str) -> str:
  """Returns text as a code block that nothing in the text can close."""
  runs = re.findall(r'`{3,}', text)
  fence = '`' * max([3] + [len(run) + 1 for run in runs])
  return f'{fence}text\n{text}\n{fence}'


def csv_cell(value: Any) -> Any:
  """Returns a cell that no spreadsheet takes for a formula; numbers stay."""
  if not isinstance(value, str):
    return value
  start = unicodedata.normalize('NFKC', value.lstrip(' ')[:1])
  return f"'{value}" if start.startswith(_FORMULA) else value


def _spelled(match: re.Match) -> str:
  """Returns one character as its escape sequence."""
  return match.group().encode('unicode_escape').decode()
