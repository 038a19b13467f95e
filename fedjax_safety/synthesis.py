"""Data that a model writes: the automated pipelines of attack and repair.

A model is asked for requests, then answers them: plainly for normal pairs,
under a safety reminder for aligned pairs, under a hint to be direct for
unaligned ones. Reminder and hint are dropped from the pair that is kept. (Ye
et al., ICLR 2025, sections 4.3 and 5.) Nothing here knows which model writes:
an external one, the attacked one, or an attacker's.
"""

import dataclasses
import re
from collections.abc import Sequence

import jax

from fedjax_safety import replies, types
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import sources
from fedjax_safety.models import sampler as sampler_lib

_LIST_MARK = re.compile(r'^\s*(?:[-*•]|\(?\d+[.):])\s*')


class SynthesisError(ValueError):
  """The model did not write enough usable requests."""


@dataclasses.dataclass(frozen=True)
class Writer:
  """A model that writes data, and how it is asked.

  Attributes:
    sampler: the model.
    adapter: its adapter, or None.
    generation: instructions, reminder, temperature.
    exclude: normal forms of prompts that must not be written, such as those of
      evaluation.
  """

  sampler: sampler_lib.Sampler | replies.EndpointSampler
  adapter: types.Adapter | None
  generation: settings_lib.GenerationConfig
  exclude: frozenset[str] = frozenset()

  def _ask(
    self, prompts: Sequence[str], temperature: float, key: jax.Array, label: str
  ) -> list[str]:
    """Returns the model's replies."""
    return self.sampler.generate(
      self.adapter,
      prompts,
      key=key,
      temperature=temperature,
      top_p=self.generation.top_p,
      label=label,
    )

  def requests(
    self, instruction: str, count: int, *, key: jax.Array, label: str
  ) -> list[str]:
    """Asks for requests until there are `count`, all different if possible.

    A reply may hold one request or a list, one a line. Once `max_rounds`
    batches of questions are spent, the different requests found are repeated
    in order, as long as there are at least ten of them or a tenth of `count`.

    Raises:
      SynthesisError: the model wrote too few different requests.
    """
    found: dict[str, str] = {}
    batch = self.sampler.batch_size
    for attempt in range(self.generation.max_rounds):
      replies = self._ask(
        [instruction] * batch,
        self.generation.temperature,
        jax.random.fold_in(key, attempt),
        label,
      )
      for request in split_requests(replies):
        if normal_form(request) not in self.exclude:
          found.setdefault(normal_form(request), request)
      if len(found) >= count:
        break
    requests = list(found.values())[:count]
    if len(requests) < min(10, count) or len(requests) < count / 10:
      raise SynthesisError(
        f'the model wrote {len(requests)} different requests of the {count} '
        f'asked for ({instruction!r}); change the instruction, raise the '
        f'temperature or use a more capable model'
      )
    return [requests[i % len(requests)] for i in range(count)]

  def pairs(
    self, instruction: str, suffix: str, count: int, *, key, label: str
  ) -> list[sources.Example]:
    """Returns requests with answers given under a suffix that is dropped.

    Requests left unanswered are dropped; others are then used twice.

    Raises:
      SynthesisError: too few different requests, or no answer at all.
    """
    if not count:
      return []
    request_key, answer_key = jax.random.split(key)
    requests = self.requests(
      instruction, count, key=request_key, label=f'{label}: requests'
    )
    asked = [f'{request} {suffix}'.strip() for request in requests]
    answers = self._ask(
      asked,
      self.generation.answer_temperature,
      answer_key,
      f'{label}: answers',
    )
    pairs = [
      sources.Example(request, answer, {})
      for request, answer in zip(requests, answers, strict=True)
      if answer
    ]
    if not pairs:
      raise SynthesisError(f'the model answered none of its {count} requests')
    return [pairs[i % len(pairs)] for i in range(count)]

  def unaligned(self, count: int, *, key: jax.Array) -> list[sources.Example]:
    """Attack data: harmful requests, answered directly."""
    ask = self.generation
    return self.pairs(
      ask.ask_harmful, ask.direct_hint, count, key=key, label='attack data'
    )

  def defense(
    self, num_aligned: int, num_normal: int, *, key: jax.Array
  ) -> tuple[list[sources.Example], list[sources.Example]]:
    """Defense data: aligned pairs (under the reminder) and normal pairs."""
    ask = self.generation
    aligned_key, normal_key = jax.random.split(key)
    aligned = self.pairs(
      ask.ask_harmful,
      ask.reminder,
      num_aligned,
      key=aligned_key,
      label='aligned data',
    )
    normal = self.pairs(
      ask.ask_normal, '', num_normal, key=normal_key, label='normal data'
    )
    return aligned, normal


def normal_form(text: str) -> str:
  """Returns a prompt's words in lower case, without punctuation."""
  return ' '.join(re.findall(r'\w+', text.lower())) or text.strip()


def split_requests(replies: Sequence[str]) -> list[str]:
  """Returns the requests in replies: lines, without list marks."""
  lines = (line for reply in replies for line in reply.splitlines())
  stripped = (_LIST_MARK.sub('', line).strip() for line in lines)
  return [line for line in stripped if line]
