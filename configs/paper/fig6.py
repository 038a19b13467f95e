"""Figure 6: how many steps the repair by the model's own data takes.

    fedjax-safety sweep --config=configs/paper/fig6.py --workdir=runs/fig6
    fedjax-safety sweep --config=configs/paper/fig6.py:demo --workdir=...

Level 3 after 100 to 500 steps, each a run of its own whose learning rate ends
with it. The figure gives no numbers; those beside ours are of tables 1 and 2,
which hold the attacked model and 500 steps. Every count of steps helped; the
least that the paper names is 41.73 by MD-Judge (WildChat, BeaverTails). Demo
size: 30 to 150 steps on four federations a seed, which the counts share.
"""

import _study
import table1
import table2

STEPS = {'7b': (100, 200, 300, 400, 500), 'demo': (30, 60, 90, 120, 150)}
TABLES = {
  'BeaverTails': table1.PUBLISHED,
  'MaliciousGen': table2.PUBLISHED,
}
REPAIRED = 'FedAvg + L3'


def get_config(size=''):
  """Returns the config; `size` is 7b, the default, or demo."""
  steps = STEPS['demo' if _study.is_demo(size) else '7b']
  settings, published = {}, {}
  for attack, table in TABLES.items():
    for name, values in table.items():
      found = _study.numbers(_study.SAFETY, _study.ROWS, values)
      chosen = _study.merged(
        _study.data(name, size), _study.attack(attack, size)
      )
      for number in steps:
        repair = {'defense': {'repair': {'num_steps': number}}}
        place = f'{name}, {attack}: {number} steps'
        settings[place] = _study.merged(chosen, repair)
        known = found[REPAIRED] if number == steps[-1] else {}
        published[place] = {REPAIRED: known}
        if number == steps[0]:
          published[place] = {'FedAvg': found['FedAvg'], REPAIRED: known}

  def place(setting, row):
    group, _, number = setting.partition(': ')
    if row == 'FedAvg':
      return group, row, ''
    return group, f'{row}, {number}', 'FedAvg'

  config = _study.table(
    size,
    source='figure 6, numbers from tables 1 and 2',
    settings=settings,
    published=published,
    note=(
      f'The last count of steps stands beside the paper’s 500. '
      f'{_study.DEMO_DATA} {_study.DEMO_ATTACK}'
    ),
  )
  return _study.regroup(config, place)
