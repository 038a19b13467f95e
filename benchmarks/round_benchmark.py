"""Tokens a second of a federated round, against a transformers + peft loop.

Both sides train the same cohort from the same weights: C clients, S local
AdamW steps each, LoRA on the same projections, the same masked loss, then the
mean of the deltas. Ours is one compiled program; the peer trains one client
after another, as published federated instruction-tuning code does. The two
alternate in one process on the same cores, so that a ratio means something on
a machine that does other work too. Prints one JSON document; its figures are
medians, `best` the fastest run.

Needs `torch`, `transformers` and `peft` for the peer; without them only our
figures are printed.

  python -m benchmarks.round_benchmark --batch=16 --batch=1
"""

import argparse
import functools
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from fedjax_safety import (
  aggregators,
  client_update,
  lora,
  losses,
  server_update,
)
from fedjax_safety import round as round_lib
from fedjax_safety.models import config as config_lib
from fedjax_safety.models import decoder

_TARGETS = ('q_proj', 'v_proj')
_LEARNING_RATE = 1e-3
_ALPHA = 16.0


def _parse_args() -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  flag = functools.partial(peers.add_number, parser)

  parser.add_argument(
    '--batch',
    type=int,
    action='append',
    help='examples of each client in a local step; repeatable (16 and 1)',
  )
  flag('--clients', 10, 'clients of a round')
  flag('--steps', 4, 'local steps of a client')
  flag('--length', 48, 'tokens of an example')
  flag('--rank', 32, 'LoRA rank')
  flag('--width', 128, 'width of the residual stream')
  flag('--layers', 4, 'blocks')
  flag('--heads', 4, 'query, key and value heads')
  flag('--mlp_width', 352, 'hidden width of the MLP')
  flag('--vocab', 300, 'rows of the embedding')
  flag('--repetitions', 7, 'timed runs of each side')
  flag('--chunk', 0, 'clients trained at once; 0 lets the round choose')
  peers.add_ours_only(parser)
  return parser.parse_args()


def _model_config(args) -> config_lib.DecoderConfig:
  """Returns the decoder's sizes."""
  return config_lib.DecoderConfig(
    vocab_size=args.vocab,
    width=args.width,
    num_layers=args.layers,
    num_heads=args.heads,
    num_kv_heads=args.heads,
    head_width=args.width // args.heads,
    mlp_width=args.mlp_width,
  )


def _make_problem(args, batch: int) -> dict:
  """Returns weights and data that both sides start from.

  The adapter's `b` is not zero, so that the check of the first loss sees the
  adapter too.
  """
  config = _model_config(args)
  model = decoder.Decoder(config, lora_scale=_ALPHA / args.rank)
  shape = (args.clients, args.steps, batch, args.length)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, args.vocab, shape, dtype=np.int32)
  answer_starts = rng.integers(args.length // 4, args.length // 2, shape[:3])
  loss_mask = np.arange(args.length) >= answer_starts[..., None]
  base = jax.jit(model.init)(jax.random.key(0), tokens[0, 0, :1])['params']
  adapter = lora.init(
    jax.random.key(1), base, rank=args.rank, target_modules=_TARGETS
  )
  adapter = jax.tree.map(
    lambda x: x + 0.02 * rng.standard_normal(x.shape, dtype=np.float32),
    adapter,
  )
  return dict(
    model=model,
    base=base,
    adapter=adapter,
    tokens=tokens,
    loss_mask=loss_mask.astype(np.float32),
  )


def _loss_fn(model: decoder.Decoder):
  """Returns the loss that the clients minimize."""

  def loss_fn(base, adapter, tokens, loss_mask, key):
    del key
    logits = model.apply({'params': base, 'lora': adapter}, tokens)
    return losses.next_token_loss(logits, tokens, loss_mask)

  return loss_fn


def _make_ours(problem: dict, chunk: int):
  """Returns a function that runs a round and returns mean losses `[C]`."""
  aggregator = aggregators.build('mean', cohort_size=len(problem['tokens']))
  optimizer = server_update.build('fedavg')
  round_fn = round_lib.make_round(
    local_update=functools.partial(
      client_update.local_update, loss_fn=_loss_fn(problem['model'])
    ),
    aggregator=aggregator,
    optimizer=optimizer,
    clients_per_chunk=chunk or None,
  )
  rows = np.arange(len(problem['tokens']), dtype=np.int32)
  cohort = round_lib.Cohort(
    problem['tokens'],
    problem['loss_mask'],
    client_id=rows,
    weight=np.ones(rows.shape, np.float32),
    is_malicious=np.zeros(rows.shape, bool),
  )
  state = round_lib.init_state(problem['adapter'], aggregator, optimizer)
  arguments = (problem['base'], state, cohort, jax.random.key(2))
  learning_rate = jnp.float32(_LEARNING_RATE)

  def run():
    out = round_fn(*arguments, learning_rate)
    _, metrics = jax.block_until_ready(out)
    return np.asarray(metrics['client/loss_by_row'])

  return run


def _first_losses(problem: dict) -> np.ndarray:
  """Returns our loss of every client's first batch, `[C]`."""
  loss_fn = _loss_fn(problem['model'])

  @jax.jit
  def all_losses(base, adapter, tokens, loss_mask):
    return jax.lax.map(
      lambda batch: loss_fn(base, adapter, *batch, None), (tokens, loss_mask)
    )

  return np.asarray(
    all_losses(
      problem['base'],
      problem['adapter'],
      problem['tokens'][:, 0],
      problem['loss_mask'][:, 0],
    )
  )


def _torch_state(base: dict, num_layers: int) -> dict:
  """Returns our base under transformers' names, `[out, in]` matrices."""
  layers = base['layers']
  state = {
    'model.embed_tokens.weight': base['embed_tokens'],
    'model.norm.weight': base['norm']['scale'],
    'lm_head.weight': base['lm_head'].T,
  }
  for i in range(num_layers):
    prefix = f'model.layers.{i}'
    for name, child in layers.items():
      if 'scale' in child:
        state[f'{prefix}.{name}.weight'] = child['scale'][i]
        continue
      room = 'self_attn' if name[0] in 'qkvo' else 'mlp'
      state[f'{prefix}.{room}.{name}.weight'] = child['kernel'][i].T
  return state


def _as_torch(array: jax.Array):
  """Returns a copy as a torch tensor."""
  import torch

  return torch.tensor(np.asarray(array))


def _make_peer_model(problem: dict):
  """Returns the peer's model with our base and adapter, and its factors."""
  import peft
  import transformers

  c = problem['model'].config
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=c.vocab_size,
      hidden_size=c.width,
      intermediate_size=c.mlp_width,
      num_hidden_layers=c.num_layers,
      num_attention_heads=c.num_heads,
      num_key_value_heads=c.num_kv_heads,
      rms_norm_eps=c.norm_eps,
      use_cache=False,
    )
  )
  state = _torch_state(problem['base'], c.num_layers)
  model.load_state_dict({k: _as_torch(v) for k, v in state.items()})
  rank = jax.tree.leaves(problem['adapter'])[0].shape[-1]
  model = peft.get_peft_model(
    model,
    peft.LoraConfig(
      r=rank,
      lora_alpha=problem['model'].lora_scale * rank,
      target_modules=list(_TARGETS),
      task_type='CAUSAL_LM',
    ),
  )
  factors = {}
  for name, parameter in model.named_parameters():
    if 'lora_' in name:
      *_, layer, _, module, factor, _, _ = name.split('.')
      pair = problem['adapter']['layers'][module]
      value = pair['a' if factor == 'lora_A' else 'b'][int(layer)].T
      factors[parameter] = _as_torch(value)
  return model.train(), factors


def _make_peer(problem: dict):
  """Returns the peer's round, which returns losses `[C, S]`."""
  import torch

  torch.set_num_threads(os.cpu_count())
  model, factors = _make_peer_model(problem)
  tokens = torch.tensor(problem['tokens'], dtype=torch.long)
  labels = tokens.masked_fill(torch.tensor(problem['loss_mask']) == 0, -100)

  def run_client(row):
    with torch.no_grad():
      for parameter, value in factors.items():
        parameter.copy_(value)
    optimizer = torch.optim.AdamW(
      list(factors), lr=_LEARNING_RATE, weight_decay=0.0
    )
    step_losses = []
    for step in range(tokens.shape[1]):
      optimizer.zero_grad()
      # No attention mask: rows are full, and SDPA then takes its causal path.
      loss = model(input_ids=tokens[row, step], labels=labels[row, step]).loss
      loss.backward()
      optimizer.step()
      step_losses.append(loss.item())
    delta = [p.detach() - value for p, value in factors.items()]
    return step_losses, delta

  def run():
    by_client, deltas = zip(*map(run_client, range(len(tokens))), strict=True)
    for parts in zip(*deltas, strict=True):
      torch.stack(parts).mean(0)
    return np.array(by_client)

  return run


def _loss_gap(problem: dict, ours: np.ndarray, peer: np.ndarray) -> dict:
  """Compares the losses of both sides: first step, and mean over the steps.

  Args:
    problem: what both sides start from.
    ours: mean loss of every client, `[C]`.
    peer: loss of every client and step, `[C, S]`.

  Raises:
    RuntimeError: the first losses differ, so the comparison means nothing.
  """
  first = float(np.abs(_first_losses(problem) - peer[:, 0]).max())
  if not first < 1e-4:
    raise RuntimeError(
      f'the first losses differ by {first:.2e}: the two sides do not compute '
      'the same function'
    )
  mean = float(np.abs(ours - peer.mean(1)).max())
  return {'first_step': first, 'mean_of_steps': mean}


def _measure(args, batch: int, with_peer: bool) -> dict:
  """Times one batch size; sides alternate, and the first run is a warm-up."""
  problem = _make_problem(args, batch)
  sides = {'ours': _make_ours(problem, args.chunk)}
  start = time.perf_counter()
  our_losses = sides['ours']()
  result = {'batch': batch, 'first_run_s': time.perf_counter() - start}
  if with_peer:
    sides['peer'] = _make_peer(problem)
    result['loss_gap'] = _loss_gap(problem, our_losses, sides['peer']())
  runs = {name: [] for name in sides}
  for _ in range(args.repetitions):
    for name, run in sides.items():
      runs[name].append(peers.timed(run)[1])
  return result | _summary(runs, problem['tokens'].size)


def _summary(runs: dict[str, list[dict]], num_tokens: int) -> dict:
  """Returns tokens a second of each side and the ratios between the sides."""
  out = {}
  for name, timings in runs.items():
    wall = [t['wall_s'] for t in timings]
    out[name] = {
      'tokens_per_s': num_tokens / statistics.median(wall),
      'best_tokens_per_s': num_tokens / min(wall),
      'runs': timings,
    }
  if 'peer' not in runs:
    return out
  out['ratio_best'] = (
    out['ours']['best_tokens_per_s'] / out['peer']['best_tokens_per_s']
  )
  return out | peers.ratios(runs)


def main():
  args = _parse_args()
  args.batch = args.batch or [16, 1]
  missing = peers.missing()
  report = {'machine': peers.machine(), 'shapes': vars(args)}
  if missing:
    report['note'] = f'no peer: {", ".join(missing)} not installed'
  with_peer = not (missing or args.ours_only)
  report['results'] = [_measure(args, b, with_peer) for b in args.batch]
  print(json.dumps(report, indent=2))


if __name__ == '__main__':
  main()
