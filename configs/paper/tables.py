"""Tables 1 to 8 in one sweep and one report.

    fedjax-safety sweep --config=configs/paper/tables.py --workdir=runs/tables
    fedjax-safety sweep --config=configs/paper/tables.py:demo --workdir=...

What several tables have in common is run once: table 3 repairs what table 1
attacked, and three tenths in table 7 are table 1's. Demo size: 57 federations
a seed, 25 to 60 seconds each on two CPU cores, and 27 repairs. What they
showed stands in the README.
"""

import json
import re

import _study
import table1
import table2
import table3
import table4
import table5
import table6
import table7
import table8

TABLES = (table1, table2, table3, table4, table5, table6, table7, table8)


def get_config(size=''):
  """Returns the config; `size` is 7b, the default, or demo."""
  tables = [module.get_config(size) for module in TABLES]
  config = tables[0]
  base = {**config.to_dict(), 'arms': (), 'paper': {}}
  arms, rows = {}, []
  for number, table in enumerate(tables, 1):
    names = {}
    for arm in table.arms:
      ours = arms.setdefault(_what_is_run(base, arm), _renamed(arm, number))
      levels = ours['defense']['repair']['levels']
      levels += [x for x in _levels(arm) if x not in levels]
      names[arm['name']] = ours['name']
    for row in table.paper.rows:
      place = {'setting': f'Table {number}, {row["setting"]}'}
      rows.append({**row, **place, 'arm': names[row['arm']]})
  config.arms = tuple(arms.values())
  config.paper = {
    'source': 'Ye et al., ICLR 2025, tables 1 to 8',
    'note': ' '.join(_sentences(t.paper.note for t in tables)),
    'rows': tuple(rows),
  }
  return config


def _sentences(notes):
  """Returns the sentences of some notes, each once."""
  found = (re.split(r'(?<=\.) ', note) for note in notes)
  return dict.fromkeys(sentence for note in found for sentence in note)


def _renamed(arm, number):
  """Returns an arm under a name that tells its table, with no repair yet."""
  return _study.merged(
    arm,
    {
      'name': f'table{number}_{arm["name"]}',
      'label': f'Table {number}, {arm["label"]}',
      'defense': {'repair': {'levels': []}},
    },
  )


def _levels(arm):
  """Returns the levels at which an arm is repaired."""
  return arm['defense']['repair']['levels']


def _what_is_run(base, arm):
  """Returns what decides an arm's rounds: all but its names and repairs."""
  whole = _study.merged(base, arm, {'name': '', 'label': ''})
  whole['defense']['repair']['levels'] = []
  if not whole['threat_model']['num_malicious']:
    # Where nobody attacks it does not matter how.
    whole['threat_model'] = base['threat_model']
  return json.dumps(whole, sort_keys=True)
