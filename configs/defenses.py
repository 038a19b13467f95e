"""Defenses in the rounds, measured after every few of them.

    fedjax-safety run --config=configs/defenses.py --workdir=runs/probe

Three and five of ten clients are malicious, and no defense is told how many.
The server holds pairs that no evaluation set asks. The safety probe looks at
24 of them, at the first token of their answers, with which the demo world's
models decide whether they refuse; the update probe makes deltas of 200 of
each kind. What they showed stands in the README.
"""

import demo

# Of the demo's 25 rounds.
EVERY_ROUNDS = 4
DEFENSES = {
  'mean': 'plain averaging',
  'safety_probe': 'safety probe',
  'update_probe': 'update probe',
}


def hold_pairs(config, world=''):
  """Gives a config's server the pairs with which it tests and makes deltas."""
  at = f'@{world}' if world else ''
  probe = config.defense.probe
  probe.source = f'demo_world:public{at}'
  probe.num_pairs = 24
  probe.num_tokens = 1
  probe.normal = f'demo_world:normal{at}'
  probe.unaligned = f'demo_world:unaligned{at}'


def get_config(world=''):
  """Returns the config; `world` is a directory with a rebuilt world."""
  config = demo.get_config(world)
  hold_pairs(config, world)
  config.evaluation.every_rounds = EVERY_ROUNDS
  config.seeds = (0, 1, 2)
  config.arms = (
    {'name': 'no_attack', 'label': 'no attack'},
    *(
      {
        'name': f'{aggregator}_{num_malicious}',
        'label': f'{num_malicious} of 10 attack, {label}',
        'threat_model': {**demo.ATTACK, 'num_malicious': num_malicious},
        'defense': {'aggregator': aggregator},
      }
      for num_malicious in (3, 5)
      for aggregator, label in DEFENSES.items()
    ),
  )
  return config
