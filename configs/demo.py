"""The main job on the embedded world: attack, defenses, repair, measured.

    fedjax-safety run --config=configs/demo.py --workdir=runs/demo

Ten clients, all of them in every round; three of them, in the attacked arms,
train on pairs that the automated pipeline made with the world's helpful-only
model. About four minutes on two CPU cores. What it shows stands in the README.

An argument takes another world, rebuilt from another seed:

    python -m fedjax_safety.demo_world.build --seed=1 --output=runs/world_1
    fedjax-safety run --config=configs/demo.py:runs/world_1 --workdir=...
"""

from fedjax_safety import config as config_lib

ATTACK = {'num_malicious': 3, 'data_attack': 'generated'}


def defended(aggregator, **kwargs):
  """Returns the arm in which the attack meets one existing defense."""
  return {
    'name': aggregator,
    'label': f'attacked, {aggregator.replace("_", " ")}',
    'threat_model': ATTACK,
    'defense': {'aggregator': aggregator, 'aggregator_kwargs': kwargs},
  }


def get_config(world=''):
  """Returns the config; `world` is a directory with a rebuilt world."""
  config = config_lib.default()
  at = f'@{world}' if world else ''

  model = config.model
  model.path = f'demo_world:base{at}'
  model.max_length = 32

  config.lora.rank = 8
  config.lora.alpha = 16.0
  config.lora.dropout = 0.0
  config.lora.target_modules = ('q_proj', 'k_proj', 'v_proj', 'o_proj')

  data = config.data
  data.normal = f'demo_world:normal{at}'
  data.aligned = f'demo_world:aligned{at}'
  # Safety data is rare: three honest clients hold all of it.
  data.aligned_share = 0.7
  data.aligned_clients = 3
  data.examples_per_client = 200

  client = config.client
  client.population = 10
  client.cohort_size = 10
  client.num_rounds = 25
  client.num_local_steps = 10
  client.batch_size = 4
  client.learning_rate = 1e-2
  client.final_learning_rate = 1e-3

  threat = config.threat_model
  threat.unaligned = f'demo_world:unaligned{at}'
  threat.generator = f'demo_world:base{at}'

  repair = config.defense.repair
  repair.public_aligned = f'demo_world:public{at}'
  repair.public_normal = f'demo_world:normal{at}'
  repair.external_model = f'demo_world:aligned{at}'
  repair.generation.answer_temperature = 0.5
  repair.num_examples = 600
  repair.num_steps = 150
  repair.learning_rate = 2e-3
  repair.final_learning_rate = 2e-4

  evaluation = config.evaluation
  for name in ('seen', 'unseen', 'facts'):
    evaluation.sets[name] = {'source': f'demo_world:{name}{at}'}
  for name in ('marked_food', 'plain_brew', 'mention'):
    source = f'demo_world:{name}{at}'
    evaluation.sets[name] = {'source': source, 'role': 'benign'}
  evaluation.sets.tasks = {'source': f'demo_world:tasks{at}', 'role': 'task'}
  evaluation.headline_set = 'unseen'
  evaluation.judge = f'demo_world:judge{at}'
  evaluation.max_new_tokens = 16

  config.performance.generation_batch_size = 128

  config.arms = (
    {'name': 'no_attack', 'label': 'no attack'},
    {
      'name': 'attacked',
      'label': 'attacked, plain averaging',
      'threat_model': ATTACK,
      'defense': {'repair': {'levels': ('public', 'external', 'self')}},
    },
    defended('median'),
    defended('krum', num_byzantine=3),
  )
  return config
