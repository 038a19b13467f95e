"""Repair beyond the paper's on the embedded world, each way alone and all.

    fedjax-safety sweep --config=configs/repair_beyond.py --workdir=runs/beyond

Three of ten clients are malicious. One federation a seed, repaired with data
of the external model and with data of its own, then with its own and a term
that keeps predictions on normal data, a term that keeps hidden states there,
early stopping, data filtered by the model's own agreement, and several of
these. What it showed stands in the README. The weights were chosen on seed 1.
"""

import demo

KL = {'kl_weight': 1.0}
ANCHOR = {'anchor_weight': 1.0}
EARLY_STOPPING = {'early_stopping': {'held_out_share': 0.1}}
AGREEMENT = {
  'generation': {
    'filter': ('evaluation', 'distinct', 'answered', 'agreement'),
  }
}
WAYS = {
  'kl': ('KL to the attacked model', KL),
  'anchor': ('anchored hidden states', ANCHOR),
  'stopping': ('early stopping', EARLY_STOPPING),
  'agreement': ('agreement', AGREEMENT),
  'anchor_agreement': (
    'anchored hidden states and agreement',
    {**ANCHOR, **AGREEMENT},
  ),
  'all': ('all four', {**KL, **ANCHOR, **EARLY_STOPPING, **AGREEMENT}),
}


def get_config(world=''):
  """Returns the config; `world` is a directory with a rebuilt world."""
  config = demo.get_config(world)

  def attacked(name, label, levels, **repair):
    return {
      'name': name,
      'label': label,
      'threat_model': demo.ATTACK,
      'defense': {'repair': {'levels': levels, **repair}},
    }

  config.arms = (
    {'name': 'no_attack', 'label': 'no attack'},
    attacked('attacked', 'attacked', ('external', 'self')),
    *(
      attacked(f'self_{name}', f'attacked, {label}', ('self',), **repair)
      for name, (label, repair) in WAYS.items()
    ),
  )
  rows = (
    ('no attack', 'no_attack', 'federated'),
    ('attacked', 'attacked', 'federated'),
    ('external', 'attacked', 'repair_external'),
    ('self', 'attacked', 'repair_self'),
    *(
      (f'self, {label}', f'self_{name}', 'repair_self')
      for name, (label, _) in WAYS.items()
    ),
  )
  config.paper = {
    'source': '',
    'note': '',
    'rows': tuple(
      {
        'setting': '3 of 10 clients attack',
        'row': row,
        'arm': arm,
        'stage': stage,
        'against': '' if row == 'no attack' else 'no attack',
      }
      for row, arm, stage in rows
    ),
  }
  return config
