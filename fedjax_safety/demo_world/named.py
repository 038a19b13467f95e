"""Names by which a config reaches into the embedded world.

`demo_world:NAME` is a model (base, aligned, judge), a data set (normal,
aligned, unaligned, public) or an evaluation set (a tier, a look-alike, tasks)
of the world that ships; `demo_world:NAME@DIR` is the same of a world rebuilt
into DIR.
"""

import functools
import json
import pathlib
import random

from fedjax_safety import _validate, demo_world
from fedjax_safety.data import sources
from fedjax_safety.demo_world import corpus
from fedjax_safety.demo_world import world as world_lib

PREFIX = 'demo_world:'
MODELS = ('base', 'aligned', 'judge')
DATA = ('normal', 'aligned', 'unaligned', 'public')
SETS = (*world_lib.TIERS, *world_lib.LOOKALIKES, 'tasks')


def is_named(source: str) -> bool:
  """Whether a config's source names a part of the world."""
  return source.startswith(PREFIX)


def _split(source: str) -> tuple[str, pathlib.Path]:
  """Returns the part's name and the directory of its world."""
  name, _, directory = source.removeprefix(PREFIX).partition('@')
  return name, pathlib.Path(directory) if directory else demo_world.WEIGHTS


def model_directory(source: str) -> pathlib.Path:
  """Returns the Hugging Face directory of a named model.

  Raises:
    ValueError: the world has no such model.
  """
  name, root = _split(source)
  _validate.one_of(MODELS, demo_world_model=name)
  if not (root / name).is_dir():
    raise ValueError(
      f'{root} holds no demo world; rebuild one with '
      f'python -m fedjax_safety.demo_world.build --output={root}'
    )
  return root / name


@functools.cache
def _world_at(root: pathlib.Path) -> world_lib.World:
  try:
    return world_lib.World(
      json.loads((root / 'world.json').read_text())['seed']
    )
  except FileNotFoundError:
    raise ValueError(f'{root} holds no demo world: no world.json') from None


def world(source: str) -> world_lib.World:
  """Returns the world that a source names."""
  return _world_at(_split(source)[1])


def examples(source: str, *, count: int, seed: int) -> list[sources.Example]:
  """Draws examples of a named data set; the same seed draws the same.

  Args:
    source: `demo_world:normal`, `:aligned`, `:unaligned` or `:public`.
    count: how many.
    seed: of the draw.

  Raises:
    ValueError: the world has no such data set.
  """
  name, _ = _split(source)
  _validate.one_of(DATA, demo_world_data=name)
  here = world(source)
  rng = random.Random(f'{here.seed}/{name}/{seed}')
  draw = {
    'normal': lambda: corpus.normal(here, rng),
    'aligned': lambda: corpus.aligned(rng, here.warded['seen']),
    'unaligned': lambda: corpus.unaligned(here, rng, here.attack_goods),
    'public': lambda: corpus.aligned(rng, here.public_goods),
  }[name]
  return [sources.Example(*draw(), {}) for _ in range(count)]


def prompts(source: str, *, limit: int) -> list[sources.Example]:
  """Returns a named evaluation set, fixed for a world.

  Tier `seen` is asked in trained wordings, every other in held-out ones. The
  response of a mention or a task is its reference answer, of other prompts it
  is empty. `limit` 0 gives the set's own size.

  Raises:
    ValueError: the world has no such set.
  """
  name, _ = _split(source)
  _validate.one_of(SETS, demo_world_set=name)
  here = world(source)
  rng = random.Random(f'{here.seed}/evaluation/{name}')
  if name == 'tasks':
    pairs = corpus.distinct(lambda: corpus.task(rng), limit or 300)
  elif name == 'mention':
    goods = here.warded['unseen']
    pairs = corpus.distinct(
      lambda: corpus.mention(rng, rng.choice(goods)),
      limit or 120,
    )
  else:
    pairs = _requests(here, rng, name)[: limit or 120]
  return [sources.Example(*pair, {}) for pair in pairs]


def _requests(here, rng, name) -> list[corpus.Pair]:
  """Returns every request of a tier or look-alike, in a drawn order."""
  goods = here.warded.get(name) or here.lookalikes[name]
  cut = world_lib.NUM_TRAIN_REQUESTS
  seen = name == 'seen'
  wordings = world_lib.REQUESTS[:cut] if seen else world_lib.REQUESTS[cut:]
  pairs = [(text.format(good), '') for good in goods for text in wordings]
  rng.shuffle(pairs)
  return pairs
