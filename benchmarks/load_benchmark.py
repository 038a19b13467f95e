"""Bytes a second of loading a directory, against the disk and transformers.

Writes random weights in the layout of Hugging Face, a file a layer, and has
them loaded by this package, by transformers `from_pretrained`, and read from
start to end and thrown away, which is the disk's speed. All take turns, each
in a process of its own with its imports done, and in two states: `cold`, after
the kernel was asked to forget the files, and `warm`, right after they were
read; `bytes_from_disk` tells what it really had to fetch. Over several devices
weights go straight to shards, split over `fsdp`.

The host's memory is what the process held at its peak beyond what it held
before. On a CPU the loaded model is part of that and is taken off, so that
what remains is what loading needs besides, told in layers of the model. Prints
one JSON document; rates are of the quickest repetition.

  python -m benchmarks.load_benchmark --shape=four-layers-of-7b
  JAX_NUM_CPU_DEVICES=2 python -m benchmarks.load_benchmark --ours_only
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import resource
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import peers
from fedjax_safety.models import config as config_lib
from fedjax_safety.models import load, sharding

_BLOCK = 2**24


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  peers.add_shape(parser, default='gigabyte')
  parser.add_argument('--dtype', default='bfloat16', help='of the weights')
  peers.add_number(parser, '--repetitions', 3, 'timed runs of each side')
  parser.add_argument(
    '--directory', help='where to write the weights (default: temporary files)'
  )
  peers.add_ours_only(parser)
  return parser.parse_args(arguments)


def _anonymous_bytes() -> int:
  """Returns the memory this process holds that is no file's."""
  with open('/proc/self/status') as f:
    (line,) = [x for x in f if x.startswith('RssAnon:')]
  return 1024 * int(line.split()[1])


class _Watch:
  """Notes the most memory held, every few milliseconds, in a thread."""

  def __init__(self):
    self._before = self._most = _anonymous_bytes()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run)
    self._thread.start()

  def _run(self) -> None:
    while not self._ended.wait(0.002):
      self._most = max(self._most, _anonymous_bytes())

  def stop(self) -> int:
    """Returns the bytes at the peak beyond the first."""
    self._ended.set()
    self._thread.join()
    return max(self._most, _anonymous_bytes()) - self._before


def _load_ours(directory: pathlib.Path, dtype: str) -> Any:
  """Loads with this package."""
  del dtype
  mesh = sharding.make_mesh(1, -1, 1) if jax.device_count() > 1 else None
  _, params = load.load(directory, mesh=mesh, progress=False)
  return jax.block_until_ready(params)


def _load_peer(directory: pathlib.Path, dtype: str) -> Any:
  """Loads with transformers; every page is touched, as it maps the files."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=getattr(torch, dtype)
  )
  return model, sum(float(p.view(-1)[::1024].sum()) for p in model.parameters())


def _read_files(directory: pathlib.Path, dtype: str) -> None:
  """Reads the files of weights, one after another."""
  del dtype
  buffer = bytearray(_BLOCK)
  for path in sorted(directory.glob('*.safetensors')):
    with open(path, 'rb', buffering=0) as f:
      while f.readinto(buffer):
        pass


_SIDES: dict[str, Callable[[pathlib.Path, str], Any]] = {
  'disk': _read_files,
  'ours': _load_ours,
  'peer': _load_peer,
}


def _forget(directory: pathlib.Path) -> None:
  """Asks the kernel to drop what it remembers of the files."""
  for path in directory.iterdir():
    with open(path, 'rb') as f:
      os.fsync(f.fileno())
      os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _host_bytes(held: Any) -> int:
  """Returns what arrays take of the host's memory: nothing on a GPU."""
  if jax.default_backend() != 'cpu':
    return 0
  arrays = (x for x in jax.tree.leaves(held) if isinstance(x, jax.Array))
  return sum(s.data.nbytes for x in arrays for s in x.addressable_shards)


def _fetched_bytes() -> int:
  """Returns what this process has had read from a disk."""
  return 512 * resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def _timed(name: str, directory: pathlib.Path, dtype: str) -> dict[str, Any]:
  """Loads once in this process, all imports done; returns time and memory."""
  if name == 'peer':
    import transformers.models.llama.modeling_llama  # noqa: F401
  jax.block_until_ready(jax.numpy.zeros(1))
  watch, fetched = _Watch(), _fetched_bytes()
  held, clocks = peers.timed(lambda: _SIDES[name](directory, dtype))
  return clocks | {
    'peak_bytes': watch.stop(),
    'model_bytes': _host_bytes(held),
    'bytes_from_disk': _fetched_bytes() - fetched,
  }


def _layer_bytes(config: config_lib.DecoderConfig) -> int:
  """Returns the bytes of one layer."""
  leaves = jax.tree.leaves(peers.shapes_of(config)['layers'])
  return sum(x.size * x.dtype.itemsize for x in leaves) // config.num_layers


def _summary(runs: dict[str, list[dict]], size: int, layer: int) -> dict:
  """Returns each side's rate, ours against the others', and our memory."""
  found = {}
  for name, timed in runs.items():
    seconds = min(t['wall_s'] for t in timed)
    found[name] = {'gb_per_s': size / seconds / 1e9, 'runs': timed}
  rate = found['ours']['gb_per_s']
  found['share_of_disk'] = rate / found['disk']['gb_per_s']
  if 'peer' in runs:
    found['ratio'] = rate / found['peer']['gb_per_s']
  beside = max(t['peak_bytes'] - t['model_bytes'] for t in runs['ours'])
  found['layers_beside_the_model'] = beside / layer
  return found


def measure(
  args: argparse.Namespace, directory: pathlib.Path
) -> dict[str, Any]:
  """Loads with every side in turn; returns the report."""
  raw = peers.llama_config(args.shape, dtype=args.dtype)
  size = peers.write_weights(directory, raw)
  layer = _layer_bytes(config_lib.from_hf(raw))
  names = ['disk', 'ours']
  if not args.ours_only and not peers.missing():
    names.append('peer')
  runs = {state: {name: [] for name in names} for state in ('cold', 'warm')}
  for _ in range(args.repetitions):
    for state, sides in runs.items():
      for name, timed in sides.items():
        if state == 'cold':
          _forget(directory)
        # A fresh process: memory that was held before would be used again.
        with multiprocessing.get_context('spawn').Pool(1) as pool:
          timed.append(pool.apply(_timed, (name, directory, args.dtype)))
  return {
    'model_bytes': size,
    'layer_bytes': layer,
    **{state: _summary(sides, size, layer) for state, sides in runs.items()},
  }


def main():
  args = parse_args()
  with tempfile.TemporaryDirectory(dir=args.directory) as directory:
    results = measure(args, pathlib.Path(directory) / 'model')
  # Only now: a process that looks at a GPU takes most of its memory.
  report = {'machine': peers.machine(), 'shapes': vars(args)}
  print(json.dumps(report | {'results': results}, indent=2))


if __name__ == '__main__':
  main()
