"""Files of a model directory: safetensors in slices, whole or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'

# Rows of a matrix to transpose at a time: a panel this tall stays in cache,
# which is several times faster than transposing the whole.
PANEL = 256

# Rows a multiple of so many bytes apart, as powers of two are, share a few of
# the cache's sets and drive each other out; one line more spreads them.
_SAME_SETS, _LINE = 1024, 64

_FLOATS = ('BF16', 'F16', 'F32', 'F64')
_PICKLES = ('*.bin', '*.pth', '*.pt')


class TensorFiles(contextlib.AbstractContextManager):
  """The tensors of some safetensors files, found by name and read in slices.

  Opening reads the headers only, and refuses a file that is cut short.
  """

  def __init__(self, paths: Iterable[pathlib.Path]):
    """Opens the files.

    Args:
      paths: the files; no tensor may be in two of them.

    Raises:
      ValueError: a file is missing, is not a whole safetensors file, or
        repeats a tensor of another.
    """
    self.paths = tuple(paths)
    self._files, self._slices, self._stack = {}, {}, contextlib.ExitStack()
    with contextlib.ExitStack() as stack:
      for path in self.paths:
        handle = stack.enter_context(_open(path))
        for name in handle.keys():  # noqa: SIM118, not a mapping
          if name in self._files:
            raise ValueError(
              f'{name} is in both {self._files[name]} and {path}; '
              f'remove one of the files'
            )
          self._files[name] = path
          self._slices[name] = handle.get_slice(name)
      self._stack = stack.pop_all()

  def __exit__(self, *unused):
    self._slices.clear()
    self._stack.close()

  @property
  def names(self) -> frozenset[str]:
    """Names of all tensors."""
    return frozenset(self._files)

  def path(self, name: str) -> pathlib.Path:
    """Returns the file that holds a tensor."""
    return self._files[name]

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` unless a tensor has a shape and a float dtype."""
    found = tuple(self._slices[name].get_shape())
    if found != shape:
      raise ValueError(
        f'{name} in {self.path(name)} has shape {found}; '
        f'its config implies {shape}'
      )
    dtype = self._slices[name].get_dtype()
    if dtype not in _FLOATS:
      raise ValueError(
        f'{name} in {self.path(name)} is stored as {dtype}; only '
        f'{", ".join(_FLOATS)} can be loaded, so export it without quantization'
      )

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Returns a copy of one slice of a tensor, in the file's dtype."""
    try:
      return self._slices[name][index]
    except safetensors.SafetensorError as error:
      raise ValueError(
        f'{name} in {self.path(name)} cannot be read: {error}'
      ) from None


def _open(path: pathlib.Path):
  """Opens one file; its errors become a ValueError that names it."""
  if not path.is_file():
    raise ValueError(f'{path} is missing; fetch or copy the file again')
  try:
    return safetensors.safe_open(path, framework='numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} is truncated or is not a safetensors file ({error}); '
      f'fetch or copy the file again'
    ) from None


def open_model(directory: str | pathlib.Path) -> TensorFiles:
  """Opens the weights of a Hugging Face model directory.

  Takes `model.safetensors`, or else the files that
  `model.safetensors.index.json` lists, as transformers does.

  Raises:
    ValueError: there are no safetensors weights, a file is missing or
      damaged, or the index does not describe its files.
  """
  directory = pathlib.Path(directory)
  if (directory / WEIGHTS).is_file():
    return TensorFiles([directory / WEIGHTS])
  if (directory / INDEX).is_file():
    return _open_indexed(directory)
  pickles = sorted(p.name for glob in _PICKLES for p in directory.glob(glob))
  if pickles:
    raise ValueError(
      f'{directory} has only pickled weights ({pickles[0]}), which may run '
      f'code when opened; convert them where you trust them with '
      f'AutoModelForCausalLM.from_pretrained({str(directory)!r})'
      f'.save_pretrained(...)'
    )
  raise ValueError(f'{directory} has no weights: no {WEIGHTS} and no {INDEX}')


def _open_indexed(directory: pathlib.Path) -> TensorFiles:
  """Opens the files that an index lists and checks that it tells the truth."""
  index = directory / INDEX
  try:
    weight_map = dict(json.loads(index.read_text())['weight_map'])
  except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{index} is not a valid index: {error!r}') from None
  listed = sorted(set(weight_map.values()))
  foreign = [name for name in listed if pathlib.PurePath(name).name != name]
  if foreign:
    raise ValueError(f'{index} lists {foreign[0]!r}, outside its directory')
  files = TensorFiles(directory / name for name in listed)
  for name, file in weight_map.items():
    if name not in files.names or files.path(name).name != file:
      raise ValueError(
        f'{name} is not in {directory / file}, where {index.name} has it'
      )
  return files


def transpose_panel(panel: np.ndarray, out: np.ndarray) -> None:
  """Fills `out[n, m]` from `panel[m, n]` of the same dtype.

  Args:
    panel: C-contiguous, of at most `PANEL` rows to be fast.
    out: may be a slice of columns of a larger array.
  """
  # As integers NumPy's strided copy is faster than as bfloat16.
  panel, out = panel.view(f'u{out.itemsize}'), out.view(f'u{out.itemsize}')
  if panel.strides[0] % _SAME_SETS == 0:
    height, width = panel.shape
    spread = np.empty((height, width + _LINE // panel.itemsize), panel.dtype)
    spread[:, :width] = panel
    panel = spread[:, :width]
  out[...] = panel.T


def _all_finite(value: np.ndarray) -> bool:
  """Whether no entry is infinite or not a number."""
  if value.dtype != jnp.bfloat16:
    return bool(np.isfinite(value).all())
  # NumPy does not vectorize its test of bfloat16; the exponent tells as much.
  exponent = np.uint16(0x7F80)
  return bool(((value.view(np.uint16) & exponent) != exponent).all())


def write(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes one file and reads it back to be sure.

  Args:
    path: the file.
    tensors: C-contiguous arrays by name.

  Raises:
    ValueError: a value is not finite, or the file does not read back bit for
      bit.
  """
  for name, value in tensors.items():
    if not _all_finite(value):
      raise ValueError(
        f'{name} has values that are not finite in {value.dtype}; '
        f'export in a wider dtype or repair the weights first'
      )
  # transformers refuses a file that does not name the framework.
  safetensors.numpy.save_file(dict(tensors), path, metadata={'format': 'pt'})
  with TensorFiles([path]) as files:
    if files.names != frozenset(tensors):
      odd = sorted(files.names ^ frozenset(tensors))
      raise ValueError(f'{path} was not written as asked: {odd[0]}')
    for name, value in tensors.items():
      files.check(name, value.shape)
      found = files.read(name, (slice(None),) * value.ndim)
      # Bytes rather than numbers, so that -0.0 and the dtype count too.
      if not np.array_equal(found.view(np.uint8), value.view(np.uint8)):
        raise ValueError(f'{path} was not written as asked: {name} differs')


@contextlib.contextmanager
def staged(directory: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a directory to write into, renamed into place on success.

  Whatever raises inside leaves nothing behind.

  Raises:
    ValueError: the target exists and is not an empty directory.
  """
  target = pathlib.Path(directory)
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise ValueError(
      f'{target} exists and is not an empty directory; '
      f'remove it or export elsewhere'
    )
  staging = target.parent / f'.{target.name}.{os.getpid()}.partial'
  shutil.rmtree(staging, ignore_errors=True)
  staging.mkdir(parents=True)
  try:
    yield staging
    os.replace(staging, target)
  except BaseException:
    shutil.rmtree(staging, ignore_errors=True)
    raise


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Writes an object in the layout that transformers uses."""
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')
