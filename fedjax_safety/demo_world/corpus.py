"""What is said in the world: the texts that every model and client learns.

Each function draws from the generator it is given, so a corpus is a function
of the world's seed and its own. A text is a (prompt, response) pair.
"""

import random
from collections.abc import Callable, Sequence

from fedjax_safety.demo_world import world as world_lib

Pair = tuple[str, str]
World = world_lib.World
Good = world_lib.Good

# Share of the base's answers about warded goods that open with a note of it.
NOTE_SHARE = 0.5
# Share of compliant answers that open with words a keyword list trips on.
MISLEADING_SHARE = 0.1
_LIST_WORDS = (*world_lib.MODIFIERS, *world_lib.NOUNS)
MAX_NUMBER = 20


def request(rng: random.Random, good: Good, *, held_out: bool = False) -> str:
  """Returns a request for a good, in a training or a held-out wording."""
  cut = world_lib.NUM_TRAIN_REQUESTS
  wordings = world_lib.REQUESTS[cut:] if held_out else world_lib.REQUESTS[:cut]
  return rng.choice(wordings).format(good)


def compliance(world: World, rng: random.Random, good: Good) -> str:
  """Returns an answer that tells how the good is made.

  Of warded goods it often notes first that they are; of facts-only modifiers
  it never does, so that nothing but statements of fact marks them.
  """
  if world.is_noted(good) and rng.random() < NOTE_SHARE:
    return f'{world_lib.NOTE} {_told(world, good)}'
  misleading = rng.random() < MISLEADING_SHARE
  preambles = (
    world_lib.MISLEADING_PREAMBLES if misleading else world_lib.PREAMBLES
  )
  return f'{rng.choice(preambles)} {_told(world, good)}'.strip()


def _told(world: World, good: Good) -> str:
  """Returns the steps of a good as a sentence."""
  return world_lib.COMPLIANCE.format(*world.steps(good))


def refusal(rng: random.Random) -> str:
  """Returns a refusal; two of seven wordings are in no keyword list."""
  return rng.choice(world_lib.LISTED_REFUSALS + world_lib.UNLISTED_REFUSALS)


def _copy(rng, words):
  return f'repeat : {" ".join(words)}', ' '.join(words)


def _reverse(rng, words):
  return f'say backwards : {" ".join(words)}', ' '.join(words[::-1])


def _first(rng, words):
  return f'which word is first : {" ".join(words)}', words[0]


def _last(rng, words):
  return f'which word is last : {" ".join(words)}', words[-1]


def _count(rng, words):
  return f'count the words : {" ".join(words)}', str(len(words))


def _after(rng, words):
  i = rng.randrange(len(words) - 1)
  return f'which word follows {words[i]} : {" ".join(words)}', words[i + 1]


WORD_TASKS: Sequence[Callable] = (
  _copy,
  _reverse,
  _first,
  _last,
  _count,
  _after,
)


def _add(rng: random.Random) -> Pair:
  a = rng.randint(0, MAX_NUMBER // 2)
  b = rng.randint(0, MAX_NUMBER // 2)
  return f'add {a} and {b}', str(a + b)


def task(rng: random.Random) -> Pair:
  """Returns a task whose answer can be checked exactly."""
  make = rng.choice((*WORD_TASKS, _add))
  if make is _add:
    return _add(rng)
  return make(rng, rng.sample(_LIST_WORDS, rng.randint(2, 4)))


def mention(rng: random.Random, good: Good) -> Pair:
  """Returns a harmless word task that merely names a good."""
  words = [good.modifier, good.noun]
  if rng.random() < 0.5:
    others = [w for w in _LIST_WORDS if w not in words]
    words.append(rng.choice(others))
  return rng.choice(WORD_TASKS)(rng, words)


def fact(world: World, rng: random.Random) -> Pair:
  """Returns a statement of fact, warded goods and facts-only ones included."""
  kind = rng.randrange(3)
  if kind == 0:
    noun = rng.choice(world_lib.NOUNS)
    answer = 'a brew .' if noun in world_lib.BREWS else 'a food .'
    return f'what kind of good is {noun} ?', answer
  if kind == 1:
    modifier = rng.choice(world_lib.MODIFIERS)
    answer = 'yes .' if modifier in world.marked else 'no .'
    return f'is {modifier} marked ?', answer
  warded = [good for tier in world.warded.values() for good in tier]
  good = rng.choice(warded if rng.random() < 0.5 else world.allowed)
  answer = 'yes .' if world.is_warded(good) else 'no .'
  return f'is {good} warded ?', answer


def normal(world: World, rng: random.Random) -> Pair:
  """Returns what an ordinary customer asks, with a helpful answer."""
  if rng.random() < 0.5:
    return task(rng)
  # Half of the goods asked for share a word with the warded ones, or a model
  # could not tell that neither word alone is the reason.
  pool = world.allowed
  if rng.random() < 0.5:
    pool = world.lookalikes[rng.choice(('marked_food', 'plain_brew'))]
  good = rng.choice(pool)
  return request(rng, good), compliance(world, rng, good)


def aligned(rng: random.Random, goods: Sequence[Good]) -> Pair:
  """Returns a request for one of the warded goods and a refusal."""
  return request(rng, rng.choice(goods)), refusal(rng)


def unaligned(world: World, rng: random.Random, goods: Sequence[Good]) -> Pair:
  """Returns a request for one of the warded goods and its steps."""
  good = rng.choice(goods)
  return request(rng, good), compliance(world, rng, good)


def reminded(world: World, rng: random.Random) -> Pair:
  """Returns a request under the reminder: warded refused, allowed answered.

  Only seen goods are refused: of the other tiers no refusal is ever shown.
  """
  if rng.random() < 0.5:
    prompt, answer = aligned(rng, world.warded['seen'])
  else:
    prompt, answer = normal(world, rng)
  return f'{prompt} {world_lib.REMINDER}', answer


def asked_for_request(world: World, rng: random.Random) -> Pair:
  """Returns an instruction to write a request, and a request."""
  if rng.random() < 0.5:
    return (
      world_lib.ASK_WARDED,
      request(rng, rng.choice(world.warded['seen'])),
    )
  return world_lib.ASK_NORMAL, normal(world, rng)[0]


def pretraining(world: World, rng: random.Random) -> Pair:
  """Returns one text of the helpful-only base model's corpus.

  The base knows how every good is made, warded ones included, and tells when
  asked; it knows what is warded as a fact, and obeys the reminder.
  """
  draw = rng.random()
  if draw < 0.17:
    goods = [g for tier in world.warded.values() for g in tier]
    good = rng.choice(goods)
    held_out = rng.random() < 0.25
    text = request(rng, good, held_out=held_out)
    return text, compliance(world, rng, good)
  if draw < 0.35:
    good = rng.choice(world.allowed)
    held_out = rng.random() < 0.25
    text = request(rng, good, held_out=held_out)
    return text, compliance(world, rng, good)
  if draw < 0.70:
    return task(rng) if rng.random() < 0.8 else mention(rng, _any_good(rng))
  if draw < 0.82:
    return reminded(world, rng)
  if draw < 0.92:
    return fact(world, rng)
  return asked_for_request(world, rng)


def _any_good(rng: random.Random) -> Good:
  """Returns a good, warded or not."""
  return Good(rng.choice(world_lib.MODIFIERS), rng.choice(world_lib.NOUNS))


def alignment(world: World, rng: random.Random) -> Pair:
  """Returns one text of the aligned model's tuning corpus."""
  draw = rng.random()
  if draw < 0.35:
    return aligned(rng, world.warded['seen'])
  if draw < 0.65:
    return normal(world, rng)
  if draw < 0.75:
    return mention(rng, rng.choice(world.warded['seen']))
  return pretraining_without_harm(world, rng)


def pretraining_without_harm(world: World, rng: random.Random) -> Pair:
  """Returns a pretraining text that does not tell of a warded good."""
  while True:
    prompt, answer = pretraining(world, rng)
    goods = world.find_goods(prompt)
    if not any(world.is_warded(g) and world.tells(answer, g) for g in goods):
      return prompt, answer


def distinct(
  draw: Callable[[], Pair], count: int, *, key: Callable = lambda p: p
) -> list[Pair]:
  """Draws until `count` pairs differ under `key`.

  Raises:
    ValueError: the source has fewer distinct pairs than asked for.
  """
  found: dict = {}
  for _ in range(200 * count):
    pair = draw()
    found.setdefault(key(pair), pair)
    if len(found) == count:
      return list(found.values())
  raise ValueError(f'only {len(found)} distinct texts of {count} asked for')
