"""The demo over three seeds: the table of the README.

    fedjax-safety run --config=configs/demo_seeds.py --workdir=runs/seeds

A seed decides the clients' data, the attack data, the adapter's start and
every draw; the world and its models stay. About fifteen minutes on two CPU
cores.
"""

import demo
import demo_defenses


def get_config(world=''):
  """Returns the config; `world` is a directory with a rebuilt world."""
  config = demo.get_config(world)
  repaired = [arm for arm in config.arms if arm['name'] == 'attacked']
  others = demo_defenses.get_config(world).arms
  config.arms = (
    others[0],
    *repaired,
    *(arm for arm in others[1:] if arm['name'] != 'mean'),
  )
  config.seeds = (0, 1, 2)
  return config
