"""Answers of an endpoint, asked for together and kept as they come.

Every reply is a line in a file of the run before the next thing happens, so
that a run that was stopped, or met an endpoint that failed, asks again only
for what is missing.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tqdm

from fedjax_safety import config as config_lib
from fedjax_safety import distributed, endpoint, metrics

# Questions handed out at once, for each that may be in flight.
_AHEAD = 8


def _seed(drawn: int | None, index: int) -> int | None:
  """Returns the seed of one prompt: a positive int32, which servers take."""
  if drawn is None:
    return None
  return int(config_lib.digest([drawn, index])[:8], 16) >> 1


@dataclasses.dataclass(frozen=True)
class _Question:
  """What is sent, and by what its reply is found again."""

  body: Mapping[str, Any]
  id: str


@dataclasses.dataclass(frozen=True, eq=False)
class EndpointSampler:
  """Answers as `models.sampler.Sampler` does, without an adapter.

  Attributes:
    endpoint: who is asked.
    directory: where its replies are kept, None to keep them in memory alone.
    max_new_tokens: longest answer, in tokens.
    batch_size: requests that a writer of data asks for at once.
    between: called every now and then, to stop what takes long.
  """

  endpoint: endpoint.Endpoint
  directory: pathlib.Path | None
  max_new_tokens: int
  batch_size: int = 64
  between: Callable[[], None] = lambda: None

  @property
  def path(self) -> pathlib.Path | None:
    """The file of the replies of this endpoint."""
    if self.directory is None:
      return None
    name = config_lib.digest([self.endpoint.url, self.endpoint.model])
    return self.directory / f'{name}.jsonl'

  @functools.cached_property
  def _known(self) -> dict[str, endpoint.Reply]:
    """The replies there are, by question."""
    if self.path is None or not self.path.exists():
      return {}
    records, _ = metrics.parse_lines(self.path.read_bytes())
    return {
      record['id']: endpoint.Reply(record['text'], record['finish_reason'])
      for record in records
      if record.get('kind') == 'reply'
    }

  def _question(
    self, prompt: str, temperature: float, top_p: float, seed: int | None
  ) -> _Question:
    """Returns one question; equal ones of different seeds are different."""
    body = {
      'messages': [{'role': 'user', 'content': prompt}],
      'max_tokens': self.max_new_tokens,
      'temperature': temperature,
      'top_p': top_p,
    }
    if seed is not None:
      body['seed'] = seed
    asked = [body, dict(self.endpoint.config.parameters)]
    return _Question(body, config_lib.digest(asked))

  def generate(
    self,
    adapter: None,
    prompts: Sequence[str],
    *,
    key: jax.Array,
    temperature: float = 0.0,
    top_p: float = 1.0,
    label: str = 'asking',
  ) -> list[str]:
    """Returns an answer to every prompt, '' where the model gave none.

    Prompt i is asked with a seed of its own, drawn from `key` and i, where
    the temperature is not 0. How far a server keeps to it is up to that.

    Args:
      adapter: None; an endpoint is asked for the model that it serves.
      prompts: requests, without template.
      key: a PRNG key; unused at temperature 0.
      temperature: 0 takes the likeliest token every time.
      top_p: nucleus of the draw, in (0, 1].
      label: words beside the progress bar.

    Raises:
      EndpointError: it cannot be asked, or all its answers are empty; replies
        that came before are kept.
    """
    assert adapter is None, 'an endpoint serves its own model'
    drawn = int(jax.random.bits(key)) if temperature else None
    questions = [
      self._question(prompt, temperature, top_p, _seed(drawn, i))
      for i, prompt in enumerate(prompts)
    ]
    texts: list[str] = []
    step = _AHEAD * self.endpoint.config.concurrency
    with tqdm.tqdm(
      total=len(questions), desc=label, leave=False, disable=None
    ) as bar:
      for start in range(0, len(questions), step):
        part = questions[start : start + step]
        texts += distributed.on_first(self._answers, part)
        bar.update(len(part))
        self.between()
    if texts and not any(texts):
      raise endpoint.EndpointError(
        f'{self.endpoint.url} answered all of {len(texts)} questions with '
        f'empty text; check the model {self.endpoint.model!r}, or raise its '
        f'max_new_tokens={self.max_new_tokens} if it thinks first'
      )
    return texts

  def _answers(self, questions: Sequence[_Question]) -> list[str]:
    """Returns the texts of replies, asking for those that are missing."""
    missing = {q.id: q for q in questions if q.id not in self._known}
    if missing:
      self._ask(list(missing.values()))
    return [self._known[question.id].text for question in questions]

  def _ask(self, questions: Sequence[_Question]) -> None:
    """Asks questions, a few at a time, and keeps every reply at once.

    Raises:
      EndpointError: for one of them; the others in flight are waited for.
    """
    failed = threading.Event()
    failure: BaseException | None = None

    def ask(question):
      return None if failed.is_set() else self.endpoint.ask(question.body)

    with (
      metrics.MetricsWriter(self.path)
      if self.path
      else metrics.NoMetrics() as log,
      concurrent.futures.ThreadPoolExecutor(
        self.endpoint.config.concurrency
      ) as pool,
    ):
      futures = {pool.submit(ask, question): question for question in questions}
      try:
        for future in concurrent.futures.as_completed(futures):
          if future.exception() is not None:
            failed.set()
            failure = failure or future.exception()
          elif (reply := future.result()) is not None:
            self._keep(log, futures[future], reply)
      finally:
        # Whatever ended the loop, what is still waiting is not asked.
        failed.set()
    if isinstance(failure, endpoint.EndpointError) and self.path:
      raise endpoint.EndpointError(
        f'{failure}; its {len(self._known)} replies so far are kept, and the '
        f'same command will not ask for them again'
      ) from None
    if failure is not None:
      raise failure

  def _keep(
    self,
    log: metrics.MetricsWriter,
    question: _Question,
    reply: endpoint.Reply,
  ) -> None:
    """Writes one reply down, unless it is empty: another try may do better."""
    if reply.text:
      log.write(
        {
          'kind': 'reply',
          'id': question.id,
          'model': self.endpoint.model,
          'body': question.body,
          **dataclasses.asdict(reply),
        }
      )
    self._known[question.id] = reply
