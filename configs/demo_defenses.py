"""The paper's existing defenses on the embedded world, one arm each.

    fedjax-safety run --config=configs/demo_defenses.py --workdir=runs/defenses

Every rule is told the true number of malicious clients, three of ten, which
no server knows. About five minutes on two CPU cores.
"""

import demo


def get_config(world=''):
  """Returns the config; `world` is a directory with a rebuilt world."""
  config = demo.get_config(world)
  config.arms = (
    *(arm for arm in config.arms if arm['name'] == 'no_attack'),
    {
      'name': 'mean',
      'label': 'attacked, plain averaging',
      'threat_model': demo.ATTACK,
    },
    demo.defended('median'),
    demo.defended('trimmed_mean', num_byzantine=3),
    demo.defended('krum', num_byzantine=3),
    demo.defended('multi_krum', num_byzantine=3, num_selected=5),
    demo.defended('dnc', num_byzantine=3),
    demo.defended('foolsgold', variant='openfedllm'),
    demo.defended('residual_reweighting', threshold=0.05),
  )
  return config
