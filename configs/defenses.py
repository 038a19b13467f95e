"""Defenses in the rounds, measured after every few of them.

    fedjax-safety run --config=configs/defenses.py --workdir=runs/probe

Three and five of ten clients are malicious. The server holds 24 pairs that no
evaluation set asks, and looks at the first token of their answers, with which
the demo world's models decide whether they refuse. It is not told how many
attack. What the probe's arms showed stands in the README, measured every four
rounds on fewer prompts.
"""

import demo

# Of the demo's 25 rounds.
EVERY_ROUNDS = 4


def defended(name, label, num_malicious, **defense):
  """Returns an arm with so many malicious clients and a defense."""
  threat = {**demo.ATTACK, 'num_malicious': num_malicious}
  return {
    'name': f'{name}_{num_malicious}',
    'label': f'{num_malicious} of 10 attack, {label}',
    'threat_model': threat,
    'defense': defense,
  }


def get_config(world=''):
  """Returns the config; `world` is a directory with a rebuilt world."""
  config = demo.get_config(world)
  at = f'@{world}' if world else ''
  probe = config.defense.probe
  probe.source = f'demo_world:public{at}'
  probe.num_pairs = 24
  probe.num_tokens = 1
  config.evaluation.every_rounds = EVERY_ROUNDS
  median = {'aggregator_kwargs': {'then': 'median'}}
  config.arms = (
    {'name': 'no_attack', 'label': 'no attack'},
    *(
      defended(name, label, num_malicious, **defense)
      for num_malicious in (3, 5)
      for name, label, defense in (
        ('mean', 'plain averaging', {}),
        ('probe', 'safety probe', {'aggregator': 'safety_probe'}),
        (
          'probe_median',
          'safety probe, then median',
          {'aggregator': 'safety_probe', **median},
        ),
      )
    ),
  )
  return config
