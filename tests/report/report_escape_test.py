"""Text that attacks each format, and what must be left of it."""

import csv
import io
import json
import re

import matplotlib.figure
import pytest

from fedjax_safety import report
from fedjax_safety.report import _escape, _plots

HOSTILE = (
  '<script>alert(1)</script>',
  '</title></style></svg><img src=x onerror=alert(1)>',
  '{{ 7 * 7 }}{% raw %}{# x #}',
  '"><a href="javascript:alert(1)">x</a>',
  '| a | b |\n\n# heading\n\n* item',
  '```\nescaped\n```\n<details>',
  '[x](javascript:alert(1)) ![y](http://evil.example/z.png)',
  '=HYPERLINK("http://evil.example","x")',
  '@SUM(1+1)*cmd|calc',
  '\x1b[31mred\x1b[0m\x07',
  '\u202egnp.exe\u202c \ud800 \x00',
  '$\\frac{$ %x _under_ ~~gone~~',
)


@pytest.fixture(scope='module')
def attacked(tmp_path_factory, write_run):
  """A run in which every text that could be hostile is."""
  workdir = write_run(tmp_path_factory.mktemp('attacked') / 'my_run')
  for number, path in enumerate(sorted(workdir.glob('runs/*/*/*/*.jsonl'))):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]['label'] = f'{HOSTILE[2 * number]} {HOSTILE[2 * number + 1]}'
    lines[0]['believe_reason'] = HOSTILE[0] + HOSTILE[4]
    lines[0]['judges'][0]['label'] = HOSTILE[1]
    for i, record in enumerate(lines[1:]):
      record['response'] = '\n'.join(HOSTILE)
      record['prompt'] = f'{HOSTILE[i % len(HOSTILE)]} {i}'
      if record['set'] == 'seen':
        record['set'] = HOSTILE[i % len(HOSTILE)]
    path.write_text('\n'.join(json.dumps(line) for line in lines) + '\n')
  metrics = (workdir / 'metrics.jsonl').read_text()
  metrics = metrics.replace('"krum"', json.dumps(HOSTILE[0] + HOSTILE[11]))
  (workdir / 'metrics.jsonl').write_text(metrics)
  config = {text: list(HOSTILE) for text in HOSTILE}
  (workdir / 'config.json').write_text(json.dumps(config))
  return workdir


@pytest.fixture(scope='module')
def texts(attacked):
  """The texts of its report."""
  paths = report.build(attacked)
  names = ('html', 'markdown', 'csv')
  return {name: paths[name].read_text(encoding='utf-8') for name in names}


def test_hostile_text_is_inert_in_html(texts, parse):
  text = texts['html']
  parse(text).assert_inert()
  assert '&lt;script&gt;alert(1)&lt;/script&gt;' in text
  assert '{{ 7 * 7 }}' in text
  assert text.count('</svg>') == text.count('<svg') == 4
  assert not re.search('[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]', text)
  assert '\\u202egnp.exe' in text


def test_hostile_text_stays_in_its_cell_of_markdown(texts):
  text = texts['markdown']
  outside = re.sub(r'^(`{3,})text\n.*?\n\1$', '', text, flags=re.S | re.M)
  assert 'alert(1)' in outside
  tags = set(re.findall(r'</?([a-zA-Z]+)', outside))
  assert tags == {'br', 'sub', 'details', 'summary'}
  assert not re.search(r'^# heading', outside, flags=re.M)
  assert not re.search(r'(?<!\\)\]\((?!plots/)', outside)
  blocks = re.findall(r'(?:^\|.*\|\n)+', outside, flags=re.M)
  assert len(blocks) > 10
  for block in blocks:
    lines = block.splitlines()
    assert len({len(re.findall(r'(?<!\\)\|', line)) for line in lines}) == 1


def test_no_cell_of_the_csv_is_a_formula(texts):
  lines = list(csv.reader(io.StringIO(texts['csv'])))
  assert {len(line) for line in lines} == {len(lines[0])}
  cells = [cell for line in lines[1:] for cell in line]
  for cell in cells:
    if cell[:1] in set('=+-@\t\r'):
      float(cell)
  assert "'@SUM(1+1)*cmd|calc" in cells
  assert '\'=HYPERLINK("http://evil.example","x")' in cells


def test_hostile_text_cannot_steer_a_terminal(attacked):
  text = report.terminal_table(attacked)
  assert not re.search('[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]', text)
  assert '\\x1b[31mred' in text


@pytest.mark.parametrize(
  ('cell', 'safe'),
  [
    ('=1+1', "'=1+1"),
    ('  +1', "'  +1"),
    ('-1', "'-1"),
    ('@x', "'@x"),
    ('\t=1', "'\t=1"),
    ('＝1+1', "'＝1+1"),
    ('plain', 'plain'),
    ('', ''),
    (-0.5, -0.5),
    (3, 3),
  ],
)
def test_csv_cells(cell, safe):
  assert _escape.csv_cell(cell) == safe


@pytest.mark.parametrize(
  'text', ['plain', '```', 'a ````` b', '~~~\n```text\n```\n']
)
def test_nothing_closes_a_fence_from_within(text):
  first, *inside, last = _escape.fenced(text).split('\n')
  assert first == f'{last}text'
  assert '\n'.join(inside) == text
  assert last not in text


def test_visible_text_keeps_what_is_harmless():
  data = {'naïve 日本語 😀': ['tab\tand\nline', 'dos\r\nline', 1, None, True]}
  assert _escape.visible(data) == {
    'naïve 日本語 😀': ['tab\tand\nline', 'dos\nline', 1, None, True]
  }


def test_the_words_of_a_figure_stay_in_their_attribute():
  figure = matplotlib.figure.Figure(figsize=(1, 1))
  text = _plots.to_svg(figure, 'x', 'a "quoted" <b> & c')
  assert 'aria-label="a &quot;quoted&quot; &lt;b&gt; &amp; c"' in text
