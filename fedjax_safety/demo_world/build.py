"""Rebuilds the embedded default from a seed: tokenizer, base, aligned, judge.

    python -m fedjax_safety.demo_world.build --seed=0 --output=DIR

Four trainings of a decoder of under a million parameters; about fifteen
minutes on two CPU cores. The same seed gives the same weights on the same
machine.
"""

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import app, flags

from fedjax_safety import losses
from fedjax_safety.data import sources, templates
from fedjax_safety.demo_world import corpus, judging, tokenizer
from fedjax_safety.demo_world import world as world_lib
from fedjax_safety.models import config as config_lib
from fedjax_safety.models import decoder, export

BATCH_SIZE = 64

_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the world and of its models.')
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Directory to write base/, aligned/ and judge/ into.'
)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One training: what is learned, for how long, how fast, how long a text."""

  draw: Callable[[world_lib.World, random.Random], corpus.Pair]
  steps: int
  learning_rate: float
  max_length: int = 32


PRETRAIN = Stage(corpus.pretraining, 900, 1e-2)
ALIGN = Stage(corpus.alignment, 150, 3e-3)
JUDGE = Stage(judging.example, 300, 5e-3, max_length=40)


def hf_config(vocab_size: int) -> dict:
  """Returns the `config.json` of the world's decoders."""
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': vocab_size,
    'hidden_size': 128,
    'intermediate_size': 352,
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'num_key_value_heads': 4,
    'head_dim': 32,
    'max_position_embeddings': 128,
    'rms_norm_eps': 1e-6,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
    'tie_word_embeddings': True,
    'attention_bias': False,
    'mlp_bias': False,
    'hidden_act': 'silu',
    'dtype': 'float16',
    'pad_token_id': 0,
    'bos_token_id': 1,
    'eos_token_id': 2,
  }


def _batch(stage, world, rng, template, words):
  """Returns one batch of freshly drawn texts, padded to the stage's length."""
  examples = [
    sources.Example(*stage.draw(world, rng)) for _ in range(BATCH_SIZE)
  ]
  encoded = templates.encode_all(
    examples, template, words, max_length=stage.max_length
  )
  room = ((0, 0), (0, stage.max_length - encoded.tokens.shape[1]))
  return np.pad(encoded.tokens, room), np.pad(encoded.loss_mask, room)


def _optimizer(stage: Stage) -> optax.GradientTransformation:
  """Returns Muon for the stacked kernels and AdamW for everything else."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, stage.learning_rate, stage.steps // 20, stage.steps, 0.0
  )

  def kernels(params):
    # [layers, in, out]: the leading axis is a batch of matrices.
    axes = optax.contrib.MuonDimensionNumbers(1, 2)
    return jax.tree.map(lambda p: axes if p.ndim == 3 else None, params)

  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(
      schedule,
      adam_b2=0.98,
      adam_learning_rate=lambda step: 0.3 * schedule(step),
      consistent_rms=0.2,
      muon_weight_dimension_numbers=kernels,
    ),
  )


def train(
  stage: Stage,
  world: world_lib.World,
  words,
  model: decoder.Decoder,
  params,
  *,
  seed: int,
  name: str,
):
  """Returns the parameters after a stage of full-parameter training."""
  template = templates.get('chat', words)
  rng = random.Random(f'{world.seed}/{name}/{seed}')
  optimizer = _optimizer(stage)

  @jax.jit
  def step(params, state, tokens, loss_mask):
    def loss_fn(params):
      logits = model.apply({'params': params}, tokens)
      return losses.next_token_loss(logits, tokens, loss_mask)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  state = optimizer.init(params)
  bar = tqdm.trange(stage.steps, desc=name, mininterval=1.0)
  for _ in bar:
    tokens, mask = _batch(stage, world, rng, template, words)
    params, state, loss = step(params, state, tokens, mask)
    bar.set_postfix(loss=f'{float(loss):.3f}', refresh=False)
  return params


def build(seed: int, output: str | pathlib.Path) -> None:
  """Trains and writes the base, the aligned model and the judge of a world."""
  output = pathlib.Path(output)
  world = world_lib.World(seed)
  words = tokenizer.build(world)
  raw = hf_config(len(words))
  model = decoder.Decoder(config_lib.from_hf(raw, jnp.float32))

  def fresh(offset):
    key = jax.random.key(1000 * seed + offset)
    return model.init(key, jnp.zeros((1, 2), jnp.int32))['params']

  def run(stage, params, offset, name):
    return train(stage, world, words, model, params, seed=offset, name=name)

  base = run(PRETRAIN, fresh(1), 1, 'base')
  # Another initialization and other draws: not a relative of the base.
  other = run(PRETRAIN, fresh(2), 2, 'aligned, pretraining')
  aligned = run(ALIGN, other, 2, 'aligned, alignment')
  judge = run(JUDGE, base, 3, 'judge')
  for name, params in (('base', base), ('aligned', aligned), ('judge', judge)):
    export.export_model(
      output / name, params, hf_config=raw, tokenizer=words, dtype=np.float16
    )
  (output / 'world.json').write_text(json.dumps({'seed': seed}) + '\n')


def main(argv):
  """Runs the script."""
  del argv
  build(_SEED.value, _OUTPUT.value)


if __name__ == '__main__':
  flags.mark_flag_as_required('output')
  app.run(main)
