"""What the benchmarks of models share: shapes, weights, the machine's facts."""

import argparse
import collections
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_safety import _validate
from fedjax_safety.models import config as config_lib
from fedjax_safety.models import tensor_files, weights

# Width, MLP width, layers, query heads, key-value heads, vocabulary.
SHAPES = {
  'tiny': (32, 64, 2, 4, 2, 64),
  'small': (256, 704, 4, 8, 4, 2048),
  'gigabyte': (2048, 5632, 8, 16, 4, 32000),
  'four-layers-of-7b': (4096, 11008, 4, 32, 32, 32000),
  'llama2-7b': (4096, 11008, 32, 32, 32, 32000),
}


def add_number(
  parser: argparse.ArgumentParser, name: str, default: int, text: str
) -> None:
  """Adds a flag for a whole number."""
  parser.add_argument(
    name, type=int, default=default, help=f'{text} (default {default})'
  )


def add_ours_only(parser: argparse.ArgumentParser) -> None:
  """Adds the flag that leaves the peer out."""
  parser.add_argument(
    '--ours_only', action='store_true', help='do not run the peer'
  )


def add_shape(parser: argparse.ArgumentParser, *, default: str) -> None:
  """Adds the flag for the shape of the model."""
  parser.add_argument(
    '--shape',
    choices=SHAPES,
    default=default,
    help=f'of the Llama with random weights (default {default})',
  )


def llama_config(shape: str, *, dtype: str) -> dict[str, Any]:
  """Returns the `config.json` of a Llama of a shape."""
  _validate.one_of(SHAPES, shape=shape)
  width, hidden, layers, heads, kv_heads, vocab = SHAPES[shape]
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': vocab,
    'hidden_size': width,
    'intermediate_size': hidden,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    'max_position_embeddings': 4096,
    'tie_word_embeddings': False,
    'dtype': dtype,
  }


def shapes_of(config: config_lib.DecoderConfig) -> dict[str, Any]:
  """Returns the shapes of a decoder's base parameters."""
  tree = {}
  for weight in weights.table(config):
    leaf = jax.ShapeDtypeStruct(weight.shape, config.dtype)
    weights.put(tree, weight.path, leaf)
  return tree


def _drawn(rng: np.random.Generator, weight, dtype) -> np.ndarray:
  """Returns one tensor of a file; norms are ones, as they start."""
  shape = weight.file_shape
  if weight.path[-1] == 'scale':
    return np.ones(shape, dtype)
  drawn = rng.standard_normal(shape, np.float32)
  drawn *= shape[-1] ** -0.5
  return drawn.astype(dtype)


def write_weights(directory: pathlib.Path, raw: dict[str, Any]) -> int:
  """Writes a directory of random weights, a file a layer; returns its bytes."""
  config = config_lib.from_hf(raw)
  rng = np.random.default_rng(0)
  directory.mkdir(parents=True)
  parts = collections.defaultdict(dict)
  for weight in weights.table(config):
    for number, name in enumerate(weight.names):
      parts[number + 1 if weight.stacked else 0][name] = weight
  index, size = {}, 0
  for number, part in sorted(parts.items()):
    tensors = {
      name: _drawn(rng, weight, config.dtype) for name, weight in part.items()
    }
    file = f'model-{number:05d}.safetensors'
    tensor_files.write(directory / file, tensors)
    index |= dict.fromkeys(tensors, file)
    size += sum(x.nbytes for x in tensors.values())
  listing = {'metadata': {'total_size': size}, 'weight_map': index}
  (directory / tensor_files.INDEX).write_text(json.dumps(listing))
  (directory / 'config.json').write_text(json.dumps(raw))
  return size


def copy_bandwidth(num_bytes: int = 2**28) -> float:
  """Returns the bytes a second of a copy, read and written ones counted."""
  x = jnp.zeros(num_bytes // 4, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  jax.block_until_ready(copy(x))
  best = float('inf')
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(copy(x))
    best = min(best, time.perf_counter() - start)
  return 2 * num_bytes / best


def timed(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
  """Runs once; returns the result, and wall and CPU seconds."""
  wall, cpu = time.perf_counter(), time.process_time()
  result = run()
  return result, {
    'wall_s': time.perf_counter() - wall,
    'cpu_s': time.process_time() - cpu,
  }


def ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
  """Returns how many times as long the peer took, by either clock.

  They are medians run by run, so that a slow spell of the machine hits both.
  """
  return {
    f'ratio_{clock}': statistics.median(
      theirs[f'{clock}_s'] / ours[f'{clock}_s']
      for ours, theirs in zip(runs['ours'], runs['peer'], strict=True)
    )
    for clock in ('wall', 'cpu')
  }


def version(package: str) -> str | None:
  """Returns a package's version, None if it is not installed."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def missing() -> list[str]:
  """Returns which packages of the peer are not installed."""
  return [p for p in ('torch', 'transformers', 'peft') if not version(p)]


def machine() -> dict[str, Any]:
  """Returns what the figures depend on besides the code."""
  try:
    with open('/proc/cpuinfo') as f:
      names = [x.split(':')[1].strip() for x in f if 'model name' in x]
  except OSError:
    names = []
  packages = ('jax', 'flax', 'optax', 'torch', 'transformers', 'peft')
  return {
    'cpu': names[0] if names else platform.processor(),
    # Those that this process may use.
    'cores': len(os.sched_getaffinity(0)),
    'device': str(jax.devices()[0]),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'versions': {'python': platform.python_version()}
    | {package: version(package) for package in packages},
  }
