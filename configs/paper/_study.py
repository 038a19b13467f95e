"""What the tables of the paper have in common, at 7B and at demo size.

The paper: Ye et al., *Emerging Safety Attack and Defense in Federated
Instruction Tuning of Large Language Models*, ICLR 2025, arXiv 2406.10630.

At 7B the settings are those of its section 6.1, the data sets are read from
the hub's local cache (`fedjax-safety datasets` says how to get each), and
models and other files are looked for under `models/` and `data/`; `MODEL`,
`JUDGE` and the rest below name them, and `--config.model.path=...` and the
like set them. The runs sample three of ten clients by the seed;
`--config.client.schedule=paper` repeats the cohorts of the paper's runs.

At demo size, `configs/paper/table1.py:demo`, everything is the embedded
world's: its base model, its data, its judge. What stands in for what is in
each table's note. Its numbers are of another model on other prompts: compare
which rows differ, not how high they are.
"""

import pathlib
import re
import runpy

from fedjax_safety import config as config_lib

_CONFIGS = pathlib.Path(__file__).parents[1]
_PAPER = 'Ye et al., ICLR 2025'

MODEL = 'models/Llama-2-7b-hf'
MISTRAL = 'models/Mistral-7B-v0.1'
# Writes the defense data of level 2.
EXTERNAL = 'models/Mistral-7B-Instruct-v0.2'
JUDGE = 'models/MD-Judge-v0.1'
# Pairs that an instruction-tuned model wrote for the attack. None ship; the
# paper's authors published theirs.
GENERATED = 'data/malicious_gen/{}.json'

SEEDS = (0, 1, 2)
SAFETY = ('rule', 'md_judge', 'rm', 'mt_1')
# The paper's rules, as its code runs them: Krum averages the n - f rows that
# it trusts, at least one value is trimmed at either end, and f follows from
# the true share of malicious clients.
RULES = {
  'FedAvg': ('mean', None),
  'Median': ('median', None),
  'Trimmed mean': ('trimmed_mean', 1),
  'Krum': ('multi_krum', 0),
  'DnC': ('dnc', 0),
  'FoolsGold': ('foolsgold', None),
  'Residual': ('residual_reweighting', None),
}
_KWARGS = {
  'multi_krum': {'variant': 'openfedllm'},
  'foolsgold': {'variant': 'openfedllm'},
  'residual_reweighting': {'threshold': 0.05},
}
LEVELS = {'L1': 'public', 'L2': 'external', 'L3': 'self'}
CLEAN = 'FedAvg (no attack)'
# Both sizes share this; the seven rows of attack and defense of tables 1, 2.
ROWS = (CLEAN, *RULES, *(f'FedAvg + {level}' for level in LEVELS))

# The two data sets. The demo world has one source of normal data, so that
# there they differ in who holds safety data: all clients, or three of ten.
_DATA = {
  'LMSYS': ('lmsys_chat_1m:hub', {'aligned_share': 0.15, 'aligned_clients': 0}),
  'WildChat': ('wildchat:hub', {}),
}
DEMO_DATA = (
  'Demo size: LMSYS stands for safety data spread over all honest clients, '
  'WildChat for safety data held by three of them.'
)
DEMO_ATTACK = (
  'BeaverTails stands for pairs from a file of the world, MaliciousGen for '
  'pairs that its base model writes.'
)


def is_demo(size):
  """Returns whether a config's argument asks for the demo size.

  Raises:
    ValueError: it asks for neither size.
  """
  if size not in ('', '7b', 'demo'):
    raise ValueError(f'size {size!r} is unknown; known: 7b, demo')
  return size == 'demo'


def data(name, size):
  """Returns the settings of one of the two data sets."""
  source, demo = _DATA[name]
  if is_demo(size):
    return {'data': demo}
  return {
    'data': {'normal': source},
    'defense': {'repair': {'public_normal': source}},
  }


def attack(name, size, *, num_malicious=3):
  """Returns the settings of an attack by its data: file or generated."""
  if name == 'BeaverTails':
    sources = ('beavertails_unsafe:hub', 'demo_world:unaligned')
    chosen = {'data_attack': 'file', 'unaligned': sources[is_demo(size)]}
  elif is_demo(size):
    chosen = {'data_attack': 'generated', 'generator': 'demo_world:base'}
  else:
    unaligned = GENERATED.format('mistral')
    chosen = {'data_attack': 'file', 'unaligned': unaligned}
  return {'threat_model': {'num_malicious': num_malicious, **chosen}}


def merged(*trees):
  """Returns nested settings as one; later ones win."""
  made = {}
  for tree in trees:
    for key, value in tree.items():
      both = isinstance(value, dict) and isinstance(made.get(key), dict)
      made[key] = merged(made[key], value) if both else value
  return made


def numbers(columns, rows, values):
  """Returns {row: {column: number}} of a block of a table.

  Raises:
    ValueError: the block has not one line for each row.
  """
  lines = [line.split() for line in values.strip().splitlines()]
  if {len(line) for line in lines} != {len(columns)} or len(lines) != len(rows):
    raise ValueError(f'need {len(rows)} lines of {len(columns)} numbers')
  return {
    row: dict(zip(columns, map(float, line), strict=True))
    for row, line in zip(rows, lines, strict=True)
  }


def table(size, *, source, settings, published, note=''):
  """Returns the config of a table.

  Args:
    size: '' or '7b', or 'demo'.
    source: the table's name in the paper.
    settings: {setting: overrides of the config}; one federation a setting and
      rule.
    published: {setting: {row: numbers}}; a row is a name of `RULES`, with
      ' (no attack)' or with ' + ' and a level after it.
    note: how the run differs from what was published.
  """
  config = _demo() if is_demo(size) else _full()
  config.seeds = SEEDS
  tree = config_lib.to_json(config)
  arms, rows = {}, []
  for setting, overrides in settings.items():
    for row, found in published[setting].items():
      rule, _, level = row.partition(' + ')
      name = _name(setting, rule)
      if name not in arms:
        arms[name] = _arm(tree, name, setting, rule, overrides)
      stage = 'federated'
      if level:
        arms[name]['defense']['repair']['levels'].append(LEVELS[level])
        stage = f'repair_{LEVELS[level]}'
      against = _against(row, published[setting])
      place = {'setting': setting, 'row': row, 'arm': name, 'stage': stage}
      rows.append({**place, 'against': against, 'numbers': found})
  config.arms = tuple(arms.values())
  config.paper = {
    'source': f'{_PAPER}, {source}',
    'note': note if is_demo(size) else '',
    'rows': tuple(rows),
  }
  return config


def regroup(config, place):
  """Moves the rows of a table, each to where and as what it should stand.

  Args:
    config: what `table` returned.
    place: `(setting, row) -> (setting, row, what it is compared with)`.
  """
  for row in config.paper.rows:
    keys = ('setting', 'row', 'against')
    moved = place(row['setting'], row['row'])
    row.update(zip(keys, moved, strict=True))
  return config


def _against(row, rows):
  """Returns the row that one is compared with: what it adds something to."""
  rule, plus, _ = row.partition(' + ')
  wish = rule if plus else CLEAN if row == 'FedAvg' else 'FedAvg'
  return wish if wish in rows and wish != row and row != CLEAN else ''


def _arm(tree, name, setting, rule, overrides):
  """Returns the arm of one rule in one setting."""
  clean = rule.endswith(' (no attack)')
  if clean:
    overrides = merged(overrides, {'threat_model': {'num_malicious': 0}})
  changed = merged(tree, overrides)
  client, threat = changed['client'], changed['threat_model']
  share = threat['num_malicious'] / client['population']
  aggregator, least = RULES[rule.removesuffix(' (no attack)')]
  kwargs = dict(_KWARGS.get(aggregator, {}))
  if least is not None:
    # As the paper's code rounds it: to even at a half.
    kwargs['num_byzantine'] = max(least, round(client['cohort_size'] * share))
  defense = {
    'aggregator': aggregator,
    'aggregator_kwargs': kwargs,
    'repair': {'levels': []},
  }
  arm = {'name': name, 'label': f'{setting}: {rule}'}
  return merged(overrides, {'defense': defense}, arm)


def _name(setting, rule):
  """Returns an arm's name, fit for a directory."""
  words = f'{setting} {rule}'.lower().replace('%', ' percent')
  return '_'.join(re.findall(r'[a-z0-9]+', words))


def _demo():
  """Returns the demo's config."""
  return runpy.run_path(str(_CONFIGS / 'demo.py'))['get_config']()


def _full():
  """Returns the paper's settings at 7B, with an independent judge."""
  config = runpy.run_path(str(_CONFIGS / 'local.py'))['get_config']()
  config.model.path = MODEL
  config.model.quantization = 'int8'
  config.performance.remat = True
  config.performance.generation_batch_size = 32
  config.defense.repair.external_model = EXTERNAL
  config.threat_model.generator = EXTERNAL

  evaluation = config.evaluation
  evaluation.sets = {
    'advbench': {'source': 'advbench:data/llm-attacks', 'role': 'harmful'},
    'xstest_safe': {
      'source': 'xstest:data/xstest',
      'role': 'benign',
      'where': {'label': 'safe'},
    },
    'ifeval': {'source': 'ifeval:hub', 'role': 'task'},
  }
  evaluation.headline_set = 'advbench'
  evaluation.rules = ('openfedllm35', 'openfedllm36')
  evaluation.judge = JUDGE
  evaluation.judge_format = 'md_judge'
  evaluation.max_new_tokens = 1024
  return config
