"""Reads a run's files, whole or not, into plain data; the only file reader."""

import collections
import dataclasses
import functools
import json
import pathlib
from typing import Any

from fedjax_safety import metrics
from fedjax_safety.report import _escape

Record = dict[str, Any]
_JSON_NAMES = {dict: 'object', list: 'list'}


@dataclasses.dataclass(frozen=True)
class Judge:
  """Who gives a verdict: `kind` is `rule`, `learned` or `truth`."""

  name: str
  label: str
  kind: str


@dataclasses.dataclass(frozen=True)
class Row:
  """One stage of one arm; `records` holds the answers of each seed."""

  arm: str
  stage: str
  label: str
  order: float
  headline_set: str | None
  records: dict[int, list[Record]]

  @functools.cached_property
  def _by_role(self) -> dict[tuple[int, str], list[Record]]:
    """The answers of each seed and role."""
    groups = {}
    for seed, records in self.records.items():
      for record in records:
        key = (seed, str(record.get('role')))
        groups.setdefault(key, []).append(record)
    return groups

  def of_role(self, seed: int, role: str) -> list[Record]:
    """Returns one seed's answers to the requests of a role."""
    return self._by_role.get((seed, role), [])


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything a report is made from.

  `sets` holds the names of each role's sets, `scorers` the labels of what
  gives numbers; `missing` says what was not there or not as it should be.
  """

  name: str
  config: Record
  rows: list[Row]
  sets: dict[str, list[str]]
  judges: dict[str, Judge]
  scorers: dict[str, str]
  headline_judges: list[str]
  believe: str | None
  believe_reason: str
  metrics: list[Record]
  overlaps: list[Record]
  manifests: list[tuple[str, Record]]
  missing: list[str]

  def of_kind(self, kind: str) -> list[Record]:
    """Returns the metric records of one kind."""
    return [record for record in self.metrics if record.get('kind') == kind]


def load(workdir: str | pathlib.Path) -> Run:
  """Reads a run.

  Raises:
    ValueError: if the folder holds nothing of a run.
  """
  workdir = pathlib.Path(workdir)
  parts = ('config.json', 'metrics.jsonl', 'runs')
  if not any((workdir / part).exists() for part in parts):
    raise ValueError(
      f'workdir={str(workdir)!r} must hold a run: config.json, metrics.jsonl '
      f'or runs/<arm>/seed_<n>/; found none. Start an experiment there, or '
      f'name the folder of one.'
    )
  missing = []
  config = _json(workdir / 'config.json', 'config.json', dict, missing)
  records = _metrics(workdir, missing)
  seeds = _seed_folders(workdir)
  headers, rows = _evaluations(workdir, seeds, missing)
  missing += _absent(seeds, rows, records) + _diverged(records)
  overlaps = _overlaps(workdir, seeds, missing)
  believe, reason = _believe(headers, missing)
  return Run(
    name=_escape.visible(workdir.resolve().name),
    config=config or {},
    rows=rows,
    sets=_sets(rows),
    judges=_judges(headers),
    scorers=_scorers(headers),
    headline_judges=_union(h.get('headline_judges', []) for h in headers),
    believe=believe,
    believe_reason=reason,
    metrics=records,
    overlaps=overlaps,
    manifests=_manifests(workdir, seeds, missing),
    missing=missing,
  )


def _json(path: pathlib.Path, name: str, kind: type, missing: list[str]) -> Any:
  """Returns a JSON file's content, or None and a line in `missing`."""
  try:
    value = json.loads(path.read_bytes())
  except FileNotFoundError:
    missing.append(f'{name} is not there')
    return None
  except (ValueError, RecursionError):
    missing.append(f'{name} is not valid JSON')
    return None
  if not isinstance(value, kind):
    missing.append(f'{name} does not hold a JSON {_JSON_NAMES[kind]}')
    return None
  return _escape.visible(value)


def _json_lines(
  path: pathlib.Path, name: str, missing: list[str]
) -> list[Record]:
  """Returns a file's JSON objects; unreadable lines are counted out loud."""
  data = path.read_bytes()
  records, unreadable = metrics.parse_lines(data)
  whole = [line for line in data.split(b'\n') if line.strip()]
  torn = len(whole) - len(records) - len(unreadable)
  if unreadable:
    missing.append(f'{name}: {len(unreadable)} unreadable lines left out')
  if torn:
    missing.append(f'{name}: the last line was torn and is left out')
  return [_escape.visible(record) for record in records]


def _metrics(workdir: pathlib.Path, missing: list[str]) -> list[Record]:
  """Returns the run's metric records, each once."""
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    missing.append('metrics.jsonl is not there: no training curves, no costs')
    return []
  return metrics.latest(_json_lines(path, path.name, missing))


def _diverged(records: list[Record]) -> list[str]:
  """Returns which metrics of which arms were nan or infinite, how often."""
  counts = collections.Counter(
    (name, record.get('arm'))
    for record in records
    if isinstance(record.get(metrics.NONFINITE), dict)
    for name in record[metrics.NONFINITE]
  )
  return [
    f'{name} of arm {arm} was not finite in {count} records'
    for (name, arm), count in counts.items()
  ]


def _seed_folders(
  workdir: pathlib.Path,
) -> dict[tuple[str, int], pathlib.Path]:
  """Returns the folder of each (arm, seed), in order of name and number."""
  folders = {}
  for path in workdir.glob('runs/*/seed_*'):
    seed = path.name.removeprefix('seed_')
    if path.is_dir() and seed.isdecimal():
      folders[_escape.visible(path.parent.name), int(seed)] = path
  return dict(sorted(folders.items()))


def _evaluations(
  workdir: pathlib.Path,
  seeds: dict[tuple[str, int], pathlib.Path],
  missing: list[str],
) -> tuple[list[Record], list[Row]]:
  """Returns the headers and the rows of every evaluation, in their order."""
  headers, rows = [], {}
  for (arm, seed), folder in seeds.items():
    for path in sorted(folder.glob('evaluations/*.jsonl')):
      name = _escape.visible(str(path.relative_to(workdir / 'runs')))
      header, *records = _json_lines(path, name, missing) or [{}]
      if header.get('kind') != 'header':
        missing.append(f'{name}: no header line; the file is left out')
        continue
      records = [r for r in records if isinstance(r.get('verdicts'), dict)]
      if not records:
        missing.append(f'{name}: no answers')
      headers.append(header)
      key = (arm, _escape.visible(path.stem))
      rows.setdefault(key, _row(key, header)).records[seed] = records
  ordered = sorted(rows.values(), key=lambda row: (row.order, row.arm))
  headers.sort(key=_order)
  return headers, _distinct(ordered)


def _sets(rows: list[Row]) -> dict[str, list[str]]:
  """Returns each role's sets, in the order of the records."""
  sets = {}
  for row in rows:
    for records in row.records.values():
      for record in records:
        names = sets.setdefault(str(record.get('role')), {})
        names[str(record.get('set'))] = None
  return {role: list(names) for role, names in sets.items()}


def _row(key: tuple[str, str], header: Record) -> Row:
  """Returns a row without answers yet."""
  return Row(
    arm=key[0],
    stage=key[1],
    label=str(header.get('label') or f'{key[0]}, {key[1]}'),
    order=_order(header),
    headline_set=header.get('headline_set'),
    records={},
  )


def _order(header: Record) -> float:
  """Returns where a header wants its row; without a wish, last."""
  order = header.get('order')
  return order if isinstance(order, int | float) else float('inf')


def _distinct(rows: list[Row]) -> list[Row]:
  """Returns the rows with arm and stage added to labels that repeat."""
  counts = collections.Counter(row.label for row in rows)
  return [
    dataclasses.replace(row, label=f'{row.label} ({row.arm}, {row.stage})')
    if counts[row.label] > 1
    else row
    for row in rows
  ]


def _absent(
  seeds: dict[tuple[str, int], pathlib.Path],
  rows: list[Row],
  records: list[Record],
) -> list[str]:
  """Returns which evaluations other arms, seeds or metrics let expect."""
  started = set(seeds)
  for record in records:
    if record.get('arm') is not None and isinstance(record.get('seed'), int):
      started.add((str(record['arm']), record['seed']))
  lines = []
  for arm, seed in sorted(started):
    stages = [row for row in rows if row.arm == arm]
    if not any(seed in row.records for row in stages):
      lines.append(f'arm {arm}, seed {seed}: not evaluated yet')
      continue
    lines += [
      f'arm {arm}, seed {seed}: stage {row.stage} not evaluated yet'
      for row in stages
      if seed not in row.records
    ]
  return lines


def _judges(headers: list[Record]) -> dict[str, Judge]:
  """Returns every judge that a header names."""
  judges = {}
  for header in headers:
    for entry in header.get('judges', []):
      name = str(entry['name'])
      label = str(entry.get('label') or name)
      judges.setdefault(name, Judge(name, label, str(entry.get('kind', ''))))
  return judges


def _scorers(headers: list[Record]) -> dict[str, str]:
  """Returns the label of everything that a header says gives numbers."""
  return {
    str(entry['name']): str(entry.get('label') or entry['name'])
    for header in reversed(headers)
    for entry in header.get('scorers', [])
  }


def _union(lists: Any) -> list[str]:
  """Returns the names of several lists, each once, in order."""
  return list(dict.fromkeys(str(name) for names in lists for name in names))


def _believe(
  headers: list[Record], missing: list[str]
) -> tuple[str | None, str]:
  """Returns the judge to believe and why; says so if the headers differ."""
  wishes = [
    (str(header['believe']), str(header.get('believe_reason') or ''))
    for header in headers
    if header.get('believe')
  ]
  if not wishes:
    return None, ''
  names = collections.Counter(name for name, _ in wishes)
  name = names.most_common(1)[0][0]
  if len(names) > 1:
    missing.append(
      f'one judge to believe: the evaluations name {", ".join(names)}; this '
      f'report follows {name}'
    )
  return name, next(reason for judge, reason in wishes if judge == name)


def _overlaps(
  workdir: pathlib.Path,
  seeds: dict[tuple[str, int], pathlib.Path],
  missing: list[str],
) -> list[Record]:
  """Returns the audit's entries, equal ones merged with where they hold."""
  merged = {}
  for (arm, seed), folder in seeds.items():
    path = folder / 'audit.json'
    if not path.exists():
      missing.append(f'arm {arm}, seed {seed}: no overlap audit')
      continue
    name = f'audit.json of arm {arm}, seed {seed}'
    for entry in _json(path, name, list, missing) or []:
      key = json.dumps(entry, sort_keys=True)
      merged.setdefault(key, {**entry, 'where': []})
      merged[key]['where'].append(f'{arm}, seed {seed}')
  return list(merged.values())


def _manifests(
  workdir: pathlib.Path,
  seeds: dict[tuple[str, int], pathlib.Path],
  missing: list[str],
) -> list[tuple[str, Record]]:
  """Returns what is said of the data of attacks and of repairs."""
  files = {
    path.name.removesuffix('.manifest.json'): path
    for path in sorted(workdir.glob('synthesis/*.manifest.json'))
  }
  for folder in seeds.values():
    for path in sorted(folder.glob('repair/*/manifest.json')):
      files[str(path.parent.relative_to(workdir / 'runs'))] = path
  found = []
  for name, path in files.items():
    content = _json(path, _escape.visible(f'{name}: manifest'), dict, missing)
    if content is not None:
      found.append((_escape.visible(name), content))
  return found
