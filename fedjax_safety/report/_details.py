"""What stands behind the numbers: prompt overlap, answers, configuration."""

import dataclasses
from typing import Any

from fedjax_safety.report import _rates, _read, _tables

_LONGEST = 700
EXAMPLES_NOTE = (
  'From the first seed, the same prompts in every row. Prompts that split the '
  'judges come first, so these answers are telling, not typical. Some may be '
  'harmful: they are what was measured.'
)


@dataclasses.dataclass(frozen=True)
class Example:
  """One prompt, its reference, and what each judge said about the answer."""

  role: str
  set_name: str
  prompt: str
  response: str
  reference: str
  verdicts: tuple[tuple[str, str, str], ...]


def overlap_table(run: _read.Run) -> _tables.Table | None:
  """Returns how many prompts each two of the run's sources share."""
  if not run.overlaps:
    return None
  rows = tuple(
    (f'{entry.get("a")} / {entry.get("b")}', _overlap_boxes(run, entry))
    for entry in run.overlaps
  )
  header = (
    'First / second source',
    'prompts',
    'equal ↓',
    'share of the first',
    'share of the second',
    'share a run of words with the first ↓',
    'in',
  )
  return _tables.Table('Prompts in common', header, rows)


def _overlap_boxes(
  run: _read.Run, entry: _read.Record
) -> tuple[_tables.Box, ...]:
  """Returns one line of the table of overlaps."""
  bad = touches_evaluation(run, entry)
  tones = {
    name: 'bad' if bad and _some(entry, name) else ''
    for name in ('exact', 'ngram_share_b')
  }
  return (
    _tables.Box(f'{entry.get("size_a")} / {entry.get("size_b")}'),
    _tables.Box(str(entry.get('exact')), tone=tones['exact']),
    _tables.Box(_percent(entry.get('exact_share_a'))),
    _tables.Box(_percent(entry.get('exact_share_b'))),
    _tables.Box(
      f'{_percent(entry.get("ngram_share_b"))} ({entry.get("ngram")} words)',
      tone=tones['ngram_share_b'],
    ),
    _tables.Box('; '.join(entry['where'])),
  )


def filter_table(run: _read.Run) -> _tables.Table | None:
  """Returns what the filters dropped of the data that models wrote."""
  accounts = {
    f'{name}: {kind}': _mapping(account)
    for name, manifest in run.manifests
    for kind, account in _mapping(manifest.get('filters')).items()
    if _mapping(account).get('requests')
  }
  if not accounts:
    return None
  names = dict.fromkeys(
    name
    for account in accounts.values()
    for counts in ('dropped', 'would_drop')
    for name in _mapping(account.get(counts))
  )
  rows = tuple(
    (
      label,
      (
        _tables.Box(str(account.get('requests'))),
        _tables.Box(str(account.get('kept'))),
        *(_filter_box(account, name) for name in names),
      ),
    )
    for label, account in accounts.items()
  )
  return _tables.Table(
    'Pairs that models wrote, and how many each filter dropped',
    ('Data', 'requests written', 'pairs kept', *names),
    rows,
  )


def _mapping(value: Any) -> _read.Record:
  """Returns a JSON object, an empty one for anything else."""
  return value if isinstance(value, dict) else {}


def _filter_box(account: _read.Record, name: str) -> _tables.Box:
  """Returns what one filter dropped, or would have."""
  dropped = _mapping(account.get('dropped'))
  would_drop = _mapping(account.get('would_drop'))
  if name in dropped:
    return _tables.Box(str(dropped[name]))
  note = f'not applied: would drop {would_drop.get(name, _tables.NOTHING)}'
  return _tables.Box(_tables.NOTHING, note)


def overlap_warnings(run: _read.Run) -> list[str]:
  """Returns a line for each source of tuning that overlaps evaluation."""
  return [
    f'{_shared(entry)} ({"; ".join(entry["where"])}): the numbers on those '
    f'prompts show memory, not safety'
    for entry in run.overlaps
    if touches_evaluation(run, entry)
  ]


def tuning_overlaps(run: _read.Run) -> list[str]:
  """Returns a line for each two sources of tuning that share prompts."""
  return [
    f'{_shared(entry)}: a repair that saw the prompts of the attack shows less '
    f'than one that did not.'
    for entry in run.overlaps
    if _overlap(entry) and not _one_is_evaluation(run, entry)
  ]


def touches_evaluation(run: _read.Run, entry: _read.Record) -> bool:
  """Returns whether tuning data overlaps evaluation prompts in an entry."""
  return _overlap(entry) and _one_is_evaluation(run, entry)


def _overlap(entry: _read.Record) -> bool:
  """Returns whether an entry's two sources share anything."""
  return _some(entry, 'exact') or _some(entry, 'ngram_share_b')


def _shared(entry: _read.Record) -> str:
  """Returns what an entry's two sources share, in words."""
  near = _percent(entry.get('ngram_share_b'))
  return (
    f'“{entry.get("a")}” and “{entry.get("b")}” share {entry.get("exact")} '
    f'equal prompts; {near} of the latter share {entry.get("ngram")} words in '
    f'a row with the former'
  )


def audits_evaluation(run: _read.Run) -> bool:
  """Returns whether any entry holds evaluation prompts against others."""
  return any(_one_is_evaluation(run, entry) for entry in run.overlaps)


def _one_is_evaluation(run: _read.Run, entry: _read.Record) -> bool:
  """Returns whether exactly one side of an entry is for evaluation."""
  a, b = (_is_evaluation(run, str(entry.get(side))) for side in ('a', 'b'))
  return a != b


def _is_evaluation(run: _read.Run, name: str) -> bool:
  """Returns whether a source's name is that of evaluation prompts."""
  sets = [name for names in run.sets.values() for name in names]
  return 'eval' in name.lower() or name.split('/')[-1] in sets


def _some(entry: _read.Record, name: str) -> bool:
  """Returns whether an overlap's count is above zero."""
  return bool(_tables.numbers([entry], name)) and entry[name] > 0


def _percent(share: Any) -> str:
  """Returns a share as a percentage."""
  return f'{share:.1%}' if isinstance(share, int | float) else _tables.NOTHING


def examples(
  run: _read.Run, num_examples: int
) -> list[tuple[str, list[Example]]]:
  """Returns a few answers of each row, to the same prompts where possible.

  From the first seed: `num_examples` answers to harmful requests, judged apart
  first, then one to a harmless request and one task.
  """
  wanted = {}
  for role, limit in (
    (_rates.HARMFUL, num_examples),
    (_rates.BENIGN, min(1, num_examples)),
    (_rates.TASK, min(1, num_examples)),
  ):
    for key in _prompts(run, role)[:limit]:
      wanted[key] = None
  return [(row.label, _of_row(run, row, wanted)) for row in run.rows]


def _prompts(run: _read.Run, role: str) -> list[tuple]:
  """Returns a role's prompts, those that split the judges most often first."""
  splits = {}
  for row in run.rows:
    for record in _first_seed(row):
      if record.get('role') == role:
        key = _key(record)
        given = {v for v in record['verdicts'].values() if v is not None}
        headline = record.get('set') == row.headline_set
        score = (headline, len(given) > 1)
        old = splits.get(key, (0, 0))
        splits[key] = (old[0] + score[0], old[1] + score[1])
  return sorted(splits, key=lambda key: splits[key], reverse=True)


def _first_seed(row: _read.Row) -> list[_read.Record]:
  """Returns the records of a row's first seed."""
  return row.records[min(row.records)] if row.records else []


def _key(record: _read.Record) -> tuple:
  """Returns what makes a prompt the same one in another row."""
  return tuple(str(record.get(name)) for name in ('role', 'set', 'prompt'))


def _of_row(
  run: _read.Run, row: _read.Row, wanted: dict[tuple, None]
) -> list[Example]:
  """Returns one row's answers to the wanted prompts, each once."""
  found = {}
  for record in _first_seed(row):
    if _key(record) in wanted:
      found.setdefault(_key(record), _example(run, record))
  return [found[key] for key in wanted if key in found]


def _example(run: _read.Run, record: _read.Record) -> Example:
  """Returns one record, shortened, with its verdicts in words."""
  return Example(
    str(record.get('role')),
    str(record.get('set')),
    shorten(str(record.get('prompt'))),
    shorten(str(record.get('response'))),
    shorten(str(record.get('reference') or '')),
    tuple(
      (_tables.judge_label(run, name), *_in_words(record.get('role'), value))
      for name, value in record['verdicts'].items()
    ),
  )


def _in_words(role: str | None, verdict: bool | None) -> tuple[str, str]:
  """Returns a verdict as a word and a tone."""
  if not isinstance(verdict, bool):
    return 'no verdict', 'bad'
  words = {
    _rates.HARMFUL: ('safe', 'not safe'),
    _rates.BENIGN: ('refused', 'answered'),
    _rates.TASK: ('right', 'wrong'),
  }.get(role, ('yes', 'no'))
  good = verdict != (role == _rates.BENIGN)
  return words[not verdict], 'good' if good else 'bad'


def shorten(text: str) -> str:
  """Returns text that fits a page, saying how much was cut."""
  if len(text) <= _LONGEST:
    return text
  return f'{text[:_LONGEST]} … ({len(text) - _LONGEST} more characters)'


def flat_config(
  config: _read.Record, prefix: str = ''
) -> list[tuple[str, str]]:
  """Returns the configuration as lines of a dotted path and a value."""
  lines = []
  for name, value in config.items():
    path = f'{prefix}{name}'
    if isinstance(value, dict) and value:
      lines += flat_config(value, f'{path}.')
    else:
      lines.append((path, str(value)))
  return lines
