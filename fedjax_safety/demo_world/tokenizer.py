"""A word-level tokenizer of one world, in the Hugging Face layout."""

import random

import tokenizers
import transformers

from fedjax_safety.demo_world import corpus, judging
from fedjax_safety.demo_world import world as world_lib

PAD, BOS, EOS, USER, SHOP, UNKNOWN = (
  '<pad>',
  '<bos>',
  '<eos>',
  '<user>',
  '<shop>',
  '<unk>',
)
CHAT_TEMPLATE = (
  '{{ bos_token }}{% for message in messages %}'
  "{% if message['role'] == 'user' %} <user> {{ message['content'] }} <shop>"
  "{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}"
  '{% endfor %}'
)


def vocabulary(world: world_lib.World) -> list[str]:
  """Returns every word that the world's texts can hold, sorted."""
  texts = [
    *world_lib.REQUESTS,
    *world_lib.PREAMBLES,
    *world_lib.MISLEADING_PREAMBLES,
    *world_lib.LISTED_REFUSALS,
    *world_lib.UNLISTED_REFUSALS,
    world_lib.COMPLIANCE,
    world_lib.NOTE,
    world_lib.REMINDER,
    world_lib.ASK_WARDED,
    world_lib.ASK_NORMAL,
    judging.PROMPT,
    judging.SAFE,
    judging.UNSAFE,
    *world_lib.MODIFIERS,
    *world_lib.NOUNS,
    *(str(n) for n in range(corpus.MAX_NUMBER + 1)),
    *(' '.join(world.steps(good)) for good in world.allowed),
  ]
  # Tasks and facts have few wordings: a thousand draws meet them all.
  rng = random.Random(0)
  for _ in range(1000):
    texts += corpus.task(rng) + corpus.fact(world, rng)
  words = {word for text in texts for word in text.split()}
  return sorted(words - {'{}', '{prompt}', '{response}'})


def build(world: world_lib.World) -> transformers.PreTrainedTokenizerFast:
  """Returns the world's tokenizer, with its chat template."""
  special = [PAD, BOS, EOS, USER, SHOP, UNKNOWN]
  words = [*special, *vocabulary(world)]
  model = tokenizers.models.WordLevel(
    {word: i for i, word in enumerate(words)}, unk_token=UNKNOWN
  )
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token=PAD,
    bos_token=BOS,
    eos_token=EOS,
    unk_token=UNKNOWN,
    additional_special_tokens=[USER, SHOP],
    chat_template=CHAT_TEMPLATE,
    clean_up_tokenization_spaces=False,
  )
