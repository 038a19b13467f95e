"""Figure 4: whichever model writes the attack's data, safety falls.

    fedjax-safety sweep --config=configs/paper/fig4.py --workdir=runs/fig4
    fedjax-safety sweep --config=configs/paper/fig4.py:demo --workdir=...

Mistral, Zephyr and Wizard-Vicuna-30B-Uncensored wrote 1,500 pairs each. The
figure gives no numbers; those beside ours are of table 2, which holds its
first two rows. At 7B the pairs are read from files of yours, see
`_study.GENERATED`. Demo size: what writes for whom is in the report's note;
five federations a seed and data set, about a minute each on two CPU cores.
"""

import _study
import table2

# Row: the pairs at 7B, the settings at demo size.
WRITERS = {
  'Mistral': ('mistral', {}),
  'Zephyr': ('zephyr', {'generation': {'answer_temperature': 1.0}}),
  'Wizard-Vicuna': ('wizard_vicuna', {'data_attack': 'file'}),
}
# Not in the paper: a writer that refuses by itself, and so attacks nobody.
ALIGNED = 'a model that refuses'
NOTE = (
  'Mistral stands for the base model at answers of temperature 0.7, Zephyr '
  'for the same at 1.0, Wizard-Vicuna for a program that never errs; “a model '
  'that refuses” is the aligned one, which the paper has no row of.'
)


def _attack(writer, size):
  """Returns the settings of an attack by one writer's data."""
  attack = _study.attack('MaliciousGen', size)
  if writer == ALIGNED:
    changed = {'generator': 'demo_world:aligned'}
  elif _study.is_demo(size):
    changed = WRITERS[writer][1]
  else:
    changed = {'unaligned': _study.GENERATED.format(WRITERS[writer][0])}
  return _study.merged(attack, {'threat_model': changed})


def get_config(size=''):
  """Returns the config; `size` is 7b, the default, or demo."""
  writers = [*WRITERS, *([ALIGNED] if _study.is_demo(size) else [])]
  settings, published = {}, {}
  for name, values in table2.PUBLISHED.items():
    found = _study.numbers(_study.SAFETY, _study.ROWS, values)
    data = _study.data(name, size)
    settings[name] = data
    published[name] = {_study.CLEAN: found[_study.CLEAN]}
    for writer in writers:
      place = f'{name}: {writer}'
      settings[place] = _study.merged(data, _attack(writer, size))
      known = found['FedAvg'] if writer == 'Mistral' else {}
      published[place] = {'FedAvg': known}

  def place(setting, row):
    name, _, writer = setting.partition(': ')
    return name, writer or row, _study.CLEAN if writer else ''

  config = _study.table(
    size,
    source='figure 4, numbers from table 2',
    settings=settings,
    published=published,
    note=f'{NOTE} {_study.DEMO_DATA}',
  )
  return _study.regroup(config, place)
