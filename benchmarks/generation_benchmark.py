"""Tokens a second of greedy generation, against transformers `generate`.

Both sides read the same directory of random Llama weights and continue the
same prompts by as many tokens; the run fails if they differ. With `--adapters`
every row of ours names one of several LoRA adapters and all run in one batch;
the peer, with peft, takes one adapter after another. The two sides alternate
in one process. The floor of a step reads the weights and the cache once, at
the bandwidth of a copy. Prints one JSON document; figures are medians.

Needs `torch`, `transformers` and `peft` for the peer; without the first or
with `--ours_only` only our figures are printed. On a GPU of 80 GB:

  python -m benchmarks.generation_benchmark --shape=llama2-7b --batch=256 \\
      --prompt=64 --new=64 --rank=32 --dtype=bfloat16 --ours_only
"""

import argparse
import functools
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks import peers
from fedjax_safety import lora
from fedjax_safety.models import batcher, decoder, export, load

_TARGETS = ('q_proj', 'v_proj')
_SCALE = 2.0


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  flag = functools.partial(peers.add_number, parser)
  peers.add_shape(parser, default='small')
  flag('--batch', 64, 'rows that run together')
  flag('--prompt', 32, 'tokens of a prompt')
  flag('--new', 64, 'tokens added to each')
  flag('--adapters', 4, 'LoRA adapters in one batch; 0 leaves that part out')
  flag('--rank', 8, 'their rank')
  flag('--repetitions', 3, 'timed runs of each side')
  parser.add_argument('--dtype', default='float32', help='of the weights')
  peers.add_ours_only(parser)
  return parser.parse_args(arguments)


def _draw_adapters(config, args, count: int) -> list[dict]:
  """Returns adapters whose products change the answers."""
  shapes = peers.shapes_of(config)
  made = []
  for key in jax.random.split(jax.random.key(1), count):
    fresh = lora.init(key, shapes, rank=args.rank, target_modules=_TARGETS)
    made.append(
      jax.tree.map(
        lambda x, k=key: x + 0.1 * jax.random.normal(k, x.shape), fresh
      )
    )
  return made


def _make_ours(model, params, adapter, prompts, choice, args):
  """Returns a function that generates and says how long the steps took."""
  key = np.zeros(2, np.uint32)
  asked = [
    batcher.Request(row, key, args.new, choice=int(c))
    for row, c in zip(prompts, choice, strict=True)
  ]

  def run():
    table = batcher.Batcher(
      model,
      params,
      rows=args.batch,
      prompt_slots=args.prompt,
      new_slots=args.new,
      stop_ids=(),
    )
    news = table.admit(adapter, asked, shape=prompts.shape)
    start = time.perf_counter()
    more = table.extend(adapter, num_steps=args.new, enough=args.batch)
    steps = time.perf_counter() - start
    tokens = np.stack(
      [[*a.new, *b.new] for a, b in zip(news, more, strict=True)]
    )
    return tokens, {'steps_s': steps}

  return run


def _make_peer(directory, adapter_paths, prompts, choice, args):
  """Returns the peer's function; adapters take turns."""
  import peft
  import torch
  import transformers

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=getattr(torch, args.dtype)
  ).to(device)
  for number, path in enumerate(adapter_paths):
    if number:
      model.load_adapter(path, str(number))
    else:
      model = peft.PeftModel.from_pretrained(model, path, '0')
  model.eval()

  def generate(rows):
    ids = torch.tensor(rows, dtype=torch.long, device=device)
    out = model.generate(
      input_ids=ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=args.new,
      min_new_tokens=args.new,
      eos_token_id=None,
      pad_token_id=0,
    )
    return out[:, rows.shape[1] :].cpu().numpy()

  def run():
    tokens = np.zeros((len(prompts), args.new), np.int64)
    for number in sorted(set(choice)):
      if adapter_paths:
        model.set_adapter(str(number))
      tokens[choice == number] = generate(prompts[choice == number])
    return tokens, {}

  return run


def _floor(params: Any, config, args, bandwidth: float) -> float:
  """Returns the seconds that reading weights and cache once takes."""
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  if not config.tied_head:
    # Of the embedding a step reads a row a token.
    weights -= params['embed_tokens'].nbytes
  heads = config.num_layers * config.num_kv_heads * config.head_width
  slots = args.batch * (args.prompt + args.new)
  return (weights + 2 * slots * heads * config.dtype.itemsize) / bandwidth


def _median(runs: list[dict[str, float]], name: str) -> float:
  """Returns the median of one figure of the runs."""
  return statistics.median(run[name] for run in runs)


def _compare(sides: dict, args, floor: float) -> dict[str, Any]:
  """Times the sides in turn, after checking that their tokens are equal.

  Raises:
    RuntimeError: the tokens differ in float32, where rounding cannot be why.
  """
  tokens, first = {}, {}
  for name, run in sides.items():
    (tokens[name], _), first[name] = peers.timed(run)
  result = {'first_run_s': first['ours']['wall_s']}
  if 'peer' in sides:
    equal = float(np.mean(tokens['ours'] == tokens['peer']))
    if equal < 1 and args.dtype == 'float32':
      raise RuntimeError(f"only {equal:.1%} of the tokens equal the peer's")
    result['equal_tokens'] = equal
  runs = {name: [] for name in sides}
  for _ in range(args.repetitions):
    for name, run in sides.items():
      (_, steps), clocks = peers.timed(run)
      runs[name].append(clocks | steps)
  for name, timed in runs.items():
    rate = args.batch * args.new / _median(timed, 'wall_s')
    result[name] = {'tokens_per_s': rate, 'runs': timed}
  step = _median(runs['ours'], 'steps_s') / (args.new - 1)
  result |= {'step_ms': 1e3 * step, 'share_of_floor': floor / step}
  if 'peer' in sides:
    result |= peers.ratios(runs)
  return result


def _export(directory: pathlib.Path, config, adapters) -> list[pathlib.Path]:
  """Writes adapters where the peer can load them; returns where."""
  paths = [directory / f'adapter_{i}' for i in range(len(adapters))]
  for path, adapter in zip(paths, adapters, strict=True):
    export.export_adapter(
      path, adapter, config=config, scale=_SCALE, base_model_name='model'
    )
  return paths


def measure(
  args: argparse.Namespace, directory: pathlib.Path
) -> dict[str, Any]:
  """Generates plainly, then with several adapters; returns the report."""
  raw = peers.llama_config(args.shape, dtype=args.dtype)
  peers.write_weights(directory / 'model', raw)
  config, params = load.load(directory / 'model')
  model = decoder.Decoder(config, lora_scale=_SCALE)
  prompts = np.random.default_rng(0).integers(
    0, config.vocab_size, (args.batch, args.prompt), np.int32
  )
  bandwidth = peers.copy_bandwidth()
  floor = _floor(params, config, args, bandwidth)
  report = {'copy_bytes_per_s': bandwidth, 'floor_ms': 1e3 * floor}
  with_peer = not (args.ours_only or peers.missing())
  for count in (0, args.adapters) if args.adapters else (0,):
    adapters = _draw_adapters(config, args, count)
    choice = np.arange(args.batch) % max(count, 1)
    tree = lora.side_by_side(adapters) if count else {}
    sides = {'ours': _make_ours(model, params, tree, prompts, choice, args)}
    if with_peer:
      paths = _export(directory, config, adapters)
      sides['peer'] = _make_peer(
        directory / 'model', paths, prompts, choice, args
      )
    name = 'adapters' if count else 'plain'
    report[name] = _compare(sides, args, floor)
  return report


def main():
  args = parse_args()
  report = {'machine': peers.machine(), 'shapes': vars(args)}
  with tempfile.TemporaryDirectory() as directory:
    report['results'] = measure(args, pathlib.Path(directory))
  print(json.dumps(report, indent=2))


if __name__ == '__main__':
  main()
