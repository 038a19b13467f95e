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
from typing import Any

import jax
import numpy as np

from fedjax_safety import settings as settings_lib
from fedjax_safety import types
from fedjax_safety.data import sources
from fedjax_safety.endpoint import replies
from fedjax_safety.models import sampler as sampler_lib
from fedjax_safety.synthesis import filters as written_filters

_LIST_MARK = re.compile(r'^\s*(?:[-*•]|\(?\d+[.):])\s*')


class SynthesisError(ValueError):
  """The model did not write enough usable requests."""


@dataclasses.dataclass(frozen=True)
class Written:
  """Pairs of one kind, and the counts of `filters` about them."""

  pairs: list[sources.Example]
  account: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Writer:
  """A model that writes data, and how it is asked.

  Attributes:
    sampler: the model.
    adapter: its adapter, or None.
    generation: instructions, reminder, temperature, filters.
    exclude: normal forms of the prompts of evaluation.
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

  def _requests(
    self,
    instruction: str,
    count: int,
    sieve: written_filters.Sieve,
    *,
    key: jax.Array,
    label: str,
  ) -> list[str]:
    """Asks for requests until there are `count` that the filters keep.

    A reply may hold one request or a list, one a line. Once `max_rounds`
    batches of questions are spent, the requests found are repeated in order,
    as long as there are at least ten of them or a tenth of `count`.

    Raises:
      SynthesisError: too few requests were kept.
    """
    requests: list[str] = []
    batch = self.sampler.batch_size
    for attempt in range(self.generation.max_rounds):
      replies = self._ask(
        [instruction] * batch,
        self.generation.temperature,
        jax.random.fold_in(key, attempt),
        label,
      )
      for request in split_requests(replies):
        if len(requests) < count and sieve.keeps_request(request):
          requests.append(request)
      if len(requests) == count:
        break
    if len(requests) < min(10, count) or len(requests) < count / 10:
      raise SynthesisError(
        f'the model wrote {len(requests)} usable requests of the {count} '
        f'asked for ({instruction!r}; dropped: {sieve.dropped_text()}); change '
        f'the instruction, raise the temperature or use a more capable model'
      )
    return [requests[i % len(requests)] for i in range(count)]

  def _pairs(
    self,
    instruction: str,
    suffix: str,
    count: int,
    *,
    key: jax.Array,
    label: str,
    refuses: bool = False,
    defends: bool = False,
  ) -> Written:
    """Returns requests with answers given under a suffix that is dropped.

    Where the filters drop a pair, another is used twice. Of pairs that defend
    the model may be asked whether it agrees.

    Raises:
      SynthesisError: too few requests, or no answer at all, were kept.
    """
    sieve = written_filters.Sieve(
      self.generation.filter, self.exclude, refuses=refuses
    )
    if not count:
      return Written([], sieve.account())
    request_key, answer_key = jax.random.split(key)
    requests = self._requests(
      instruction, count, sieve, key=request_key, label=f'{label}: requests'
    )
    return self._answered(
      requests, suffix, sieve, key=answer_key, label=label, defends=defends
    )

  def _answered(
    self,
    requests: Sequence[str],
    suffix: str,
    sieve: written_filters.Sieve,
    *,
    key: jax.Array,
    label: str,
    defends: bool = False,
  ) -> Written:
    """Returns requests with those answers that the filters keep.

    Raises:
      SynthesisError: no answer at all was kept.
    """
    count = len(requests)
    asked = [f'{request} {suffix}'.strip() for request in requests]
    answers = self._ask(
      asked,
      self.generation.answer_temperature,
      key,
      f'{label}: answers',
    )
    agreed = [True] * count
    if defends and sieve.asks_again:
      agreed = self._agreed(
        requests, sieve, key=jax.random.fold_in(key, 1), label=label
      )
    pairs = [
      sources.Example(request, answer, {})
      for request, answer, agree in zip(requests, answers, agreed, strict=True)
      if sieve.keeps_answer(answer, agreed=agree)
    ]
    if not pairs:
      raise SynthesisError(
        f'no answer to the {count} requests of the {label} is usable '
        f'(dropped: {sieve.dropped_text()}); change the words it is asked '
        f'with, the filters or the model'
      )
    return Written(
      [pairs[i % len(pairs)] for i in range(count)], sieve.account()
    )

  def _agreed(
    self,
    requests: Sequence[str],
    sieve: written_filters.Sieve,
    *,
    key: jax.Array,
    label: str,
  ) -> list[bool]:
    """Asks again under the reminder; returns which requests suit their kind."""
    samples = self.generation.agreement.samples
    answers = self._ask(
      [
        f'{request} {self.generation.reminder}'.strip()
        for request in requests
        for _ in range(samples)
      ],
      self.generation.answer_temperature,
      key,
      f'{label}: agreement',
    )
    refused = np.array([written_filters.refuses(answer) for answer in answers])
    return [
      sieve.agrees(each, self.generation.agreement.share)
      for each in refused.reshape(-1, samples).mean(axis=1)
    ]

  def unaligned(self, count: int, *, key: jax.Array) -> Written:
    """Attack data: harmful requests, answered directly."""
    ask = self.generation
    return self._pairs(
      ask.ask_harmful, ask.direct_hint, count, key=key, label='attack data'
    )

  def answered(self, requests: Sequence[str], *, key: jax.Array) -> Written:
    """Attack data: given requests, answered directly.

    Raises:
      SynthesisError: no answer at all was kept.
    """
    sieve = written_filters.Sieve(
      self.generation.filter, frozenset(), refuses=False
    )
    hint = self.generation.direct_hint
    return self._answered(requests, hint, sieve, key=key, label='attack data')

  def defense(
    self, num_aligned: int, num_normal: int, *, key: jax.Array
  ) -> tuple[Written, Written]:
    """Defense data: aligned pairs (under the reminder) and normal pairs."""
    ask = self.generation
    aligned_key, normal_key = jax.random.split(key)
    aligned = self._pairs(
      ask.ask_harmful,
      ask.reminder,
      num_aligned,
      key=aligned_key,
      label='aligned data',
      refuses=True,
      defends=True,
    )
    normal = self._pairs(
      ask.ask_normal,
      '',
      num_normal,
      key=normal_key,
      label='normal data',
      defends=True,
    )
    return aligned, normal


def split_requests(replies: Sequence[str]) -> list[str]:
  """Returns the requests in replies: lines, without list marks."""
  lines = (line for reply in replies for line in reply.splitlines())
  stripped = (_LIST_MARK.sub('', line).strip() for line in lines)
  return [line for line in stripped if line]
