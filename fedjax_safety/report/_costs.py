"""What each arm cost: time by stage, time of a round, bytes sent."""

import json
import math
from collections.abc import Sequence

from fedjax_safety.report import _caught, _read, _tables

# Kinds of stages, in the order of the chart; the first that a name starts with.
KINDS = (
  ('federated', 'rounds'),
  ('repair', 'repair, on the server'),
  ('evaluat', 'measuring'),
)
OTHER = 'other'


def stages(run: _read.Run) -> dict[str, dict[str, float]]:
  """Returns the seconds of each kind of stage in each arm, mean over seeds."""
  spent = {}
  for record in run.of_kind('stage'):
    for value in _tables.numbers([record], 'time/seconds'):
      seeds = spent.setdefault(str(record.get('arm')), {})
      kinds = seeds.setdefault(record.get('seed'), {})
      kind = _kind(str(record.get('stage')))
      kinds[kind] = kinds.get(kind, 0.0) + value
  return {arm: _means(list(seeds.values())) for arm, seeds in spent.items()}


def stage(run: _read.Run, arm: str, name: str) -> float | None:
  """Returns the seconds of one stage of an arm, mean over seeds."""
  records = [
    record
    for record in run.of_kind('stage')
    if (record.get('arm'), record.get('stage')) == (arm, name)
  ]
  seconds = _tables.numbers(records, 'time/seconds')
  return math.fsum(seconds) / len(seconds) if seconds else None


def _kind(stage: str) -> str:
  """Returns what kind a stage is of."""
  return next((kind for head, kind in KINDS if stage.startswith(head)), OTHER)


def _means(seeds: list[dict[str, float]]) -> dict[str, float]:
  """Returns the mean of each kind over the seeds that have it."""
  found = {}
  for name in [kind for _, kind in KINDS] + [OTHER]:
    values = [kinds[name] for kinds in seeds if name in kinds]
    if values:
      found[name] = math.fsum(values) / len(values)
  return found


def table(run: _read.Run) -> _tables.Table | None:
  """Returns times and bytes by arm."""
  spent, rounds = stages(run), _caught.rounds_by_arm(run)
  if not spent and not rounds:
    return None
  used = {kind for kinds in spent.values() for kind in kinds}
  kinds = [k for k in [*(kind for _, kind in KINDS), OTHER] if k in used]
  plain = _plain_arm(run)
  arms = [*rounds, *(arm for arm in spent if arm not in rounds)]
  rows = tuple(
    (
      _caught.label(run, arm),
      (
        *_round_boxes(rounds.get(arm, []), rounds.get(plain, []), arm == plain),
        *(_duration_box(spent.get(arm, {}).get(kind)) for kind in kinds),
        _duration_box(sum(spent[arm].values()) if arm in spent else None),
        *_traffic_boxes(rounds.get(arm, [])),
      ),
    )
    for arm in arms
  )
  groups = (
    ('One round', 2),
    ('A whole run, mean over seeds', len(kinds) + 1),
    ('Sent', 3),
  )
  header = (
    'Arm',
    'median',
    'more than plain averaging',
    *kinds,
    'in all',
    'by a client a round',
    'to a client a round',
    'in all rounds of a seed',
  )
  return _tables.Table('Time and traffic', header, rows, groups)


def _duration_box(seconds: float | None) -> _tables.Box:
  """Returns a time."""
  return _tables.Box(_tables.duration(seconds))


def _plain_arm(run: _read.Run) -> str | None:
  """Returns the first arm that takes a plain mean of what clients sent."""
  arms = run.config.get('arms')
  whole = {k: run.config.get(k, {}) for k in ('defense', 'threat_model')}
  for arm in arms if isinstance(arms, list) and arms else [{'name': 'run'}]:
    if not isinstance(arm, dict):
      continue
    chosen = {k: {**_mapping(whole[k]), **_mapping(arm.get(k))} for k in whole}
    rule = chosen['defense'].get('aggregator')
    scheme = chosen['defense'].get('lora_aggregation', 'factors')
    update = chosen['threat_model'].get('update_attack', 'none')
    if (rule, scheme, update) == ('mean', 'factors', 'none'):
      return str(arm.get('name'))
  return None


def _mapping(value: object) -> dict:
  """Returns a mapping, or an empty one in place of anything else."""
  return value if isinstance(value, dict) else {}


def median_round(records: Sequence[_read.Record]) -> float | None:
  """Returns the median time of a round, over the seeds."""
  seconds = sorted(_tables.numbers(records, 'time/round_s'))
  return seconds[len(seconds) // 2] if seconds else None


def _round_boxes(
  records: Sequence[_read.Record],
  plain: Sequence[_read.Record],
  is_plain: bool,
) -> tuple[_tables.Box, ...]:
  """Returns a round's time, and how much more it is than plain averaging's."""
  own, other = median_round(records), median_round(plain)
  more = _tables.Box(_tables.NOTHING)
  if own is not None and other and not is_plain:
    text = f'{own - other:+.2f} s ({own / other - 1:+.0%})'
    more = _tables.Box(text.replace('-', '−'))
  return _duration_box(own), more


def _traffic_boxes(records: Sequence[_read.Record]) -> tuple[_tables.Box, ...]:
  """Returns the bytes of a client in a round, and of all in all rounds."""
  up, down, seeds = [], [], {}
  for record in records:
    sent = _tables.numbers([record], 'communication/upload_bytes')
    got = _tables.numbers([record], 'communication/download_bytes')
    up, down = up + sent, down + got
    rows = record.get('client/id_by_row')
    if sent and got and isinstance(rows, list):
      seed = json.dumps(record.get('seed'))
      total = len(rows) * (sent[0] + got[0])
      seeds[seed] = seeds.get(seed, 0.0) + total
  means = [
    math.fsum(values) / len(values) if values else None
    for values in (up, down, list(seeds.values()))
  ]
  return tuple(_tables.Box(size(value)) for value in means)


def size(num_bytes: float | None) -> str:
  """Returns a number of bytes in the unit that suits it."""
  if num_bytes is None:
    return _tables.NOTHING
  for unit in ('B', 'kB', 'MB', 'GB'):
    if num_bytes < 1000:
      return f'{num_bytes:.3g} {unit}'
    num_bytes /= 1000
  return f'{num_bytes:.3g} TB'


def answer(run: _read.Run) -> str:
  """Returns the time of the whole run, of its rounds, and what was sent."""
  seconds = _tables.numbers(run.of_kind('stage'), 'time/seconds')
  if not seconds:
    return 'No times were recorded.'
  text = (
    f'{_tables.duration(math.fsum(seconds))} for all stages, arms and seeds '
    f'together.'
  )
  arms = _caught.rounds_by_arm(run)
  medians = {arm: median_round(records) for arm, records in arms.items()}
  medians = {arm: value for arm, value in medians.items() if value is not None}
  if medians:
    low = min(medians, key=medians.get)
    high = max(medians, key=medians.get)
    text += f' A round: {_tables.duration(medians[low])}'
    if low != high:
      text += (
        f' ({_caught.label(run, low)}) to {_tables.duration(medians[high])} '
        f'({_caught.label(run, high)})'
      )
    text += '.'
  sent = _tables.numbers(run.of_kind('round'), 'communication/upload_bytes')
  if sent:
    text += f' A client sends at most {size(max(sent))} a round.'
  return text
