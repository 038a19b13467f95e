"""Batches requests through one model, in a thread of its own.

Requests run together, whichever adapters they name, and one that ends makes
room for the next. Every few tokens each is told what is new, and one that
nobody waits for any more is dropped. Answers do not depend on what they are
batched with, up to rounding.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np

from fedjax_safety import lora, types
from fedjax_safety.models import batcher, decoder, stepper

# Tokens between two looks at what has ended.
STEPS_PER_CALL = 8
# Alternatives computed for each token; a request may ask for fewer.
NUM_TOP = 5
# Adapters in one batch: the work of each is done for every row.
MAX_ADAPTERS = 8
# How long the first of a batch waits for others to join it.
_GATHER_SECONDS = 0.005
_SMALLEST_WIDTH = 32


@dataclasses.dataclass(frozen=True)
class Token:
  """A token, its log probability, and the likeliest in its place."""

  id: int
  logprob: float | None
  top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(eq=False)
class Job:
  """One row: a prompt, how to go on, and whom to tell.

  Attributes:
    model: the name of an adapter.
    prompt: token ids, at least one.
    max_tokens: most tokens to add; 0 adds none.
    temperature: 0 is greedy.
    top_p: nucleus.
    seed: of the draws.
    score_prompt: whether the prompt's own tokens are scored.
    on_prompt: called with the prompt's tokens, if they are scored.
    on_token: called with each new token; returns whether to go on.
    on_end: called once, with the exception that ended it early, if any.
  """

  model: str
  prompt: Sequence[int]
  max_tokens: int
  temperature: float
  top_p: float
  seed: int
  score_prompt: bool
  on_prompt: Callable[[list[Token]], None]
  on_token: Callable[[Token], bool]
  on_end: Callable[[Exception | None], None]
  cancelled: bool = False
  ended: bool = False

  def end(self, failure: Exception | None = None) -> None:
    """Tells whoever waits, once."""
    if not self.ended:
      self.ended = True
      self.on_end(failure)


def _power(size: int) -> int:
  """Returns the smallest power of two that is at least a size."""
  return 1 << max(size - 1, 0).bit_length()


class _Adapters:
  """The adapters that rows can choose from; others wait for a place."""

  def __init__(self, load: Mapping[str, Callable[[], types.Adapter | None]]):
    self._load, self._loaded = load, {}
    self._names = [''] * min(MAX_ADAPTERS, len(load))
    self.tree: types.Adapter = {}

  def alone(self, name: str) -> types.Adapter:
    """Returns an adapter, loaded when it is first asked for."""
    if name not in self._loaded:
      adapter = self._load[name]()
      self._loaded[name] = {} if adapter is None else adapter
    return self._loaded[name]

  def place(self, name: str, used: Collection[str]) -> int | None:
    """Returns an adapter's place, -1 for the base, None if all are used."""
    if not self.alone(name):
      return -1
    if name not in self._names:
      free = [i for i, other in enumerate(self._names) if other not in used]
      if not free:
        return None
      names = list(self._names)
      names[free[0]] = name
      self.tree = lora.side_by_side([self._loaded.get(n, {}) for n in names])
      self._names = names
    return self._names.index(name)


class Engine:
  """Runs jobs in batches until it is closed."""

  def __init__(
    self,
    model: decoder.Decoder,
    base_params: types.BaseParams,
    load_adapter: Mapping[str, Callable[[], types.Adapter | None]],
    *,
    batch_size: int,
    end_ids: tuple[int, ...],
  ):
    """Starts the thread.

    Args:
      model: the decoder.
      base_params: its frozen parameters.
      load_adapter: what loads an adapter, by name; called once, when first
        asked for. None is the bare base.
      batch_size: most rows run together.
      end_ids: tokens that end an answer.
    """
    self._model, self._base_params = model, base_params
    self._adapters = _Adapters(load_adapter)
    self._batch_size, self._end_ids = batch_size, end_ids
    self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    self._held: list[Job] = []
    self._jobs: dict[batcher.Request, Job] = {}
    self._table: batcher.Batcher | None = None
    self._closed = False
    self.batches = 0
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def submit(self, job: Job) -> None:
    """Queues a job; its callbacks are called from the engine's thread."""
    self._waiting.put(job)

  def close(self) -> None:
    """Ends the thread once what runs is done."""
    self._closed = True
    self._waiting.put(None)
    self._thread.join()

  def _gather(self) -> list[Job]:
    """Returns jobs that have come; if nothing runs, waits for some."""
    found, wait = [], None if not (self._jobs or self._held) else 0.0
    try:
      while len(found) < self._batch_size:
        found.append(self._waiting.get(block=wait != 0, timeout=wait))
        if wait is None:
          deadline = time.monotonic() + _GATHER_SECONDS
        if wait != 0:
          wait = max(deadline - time.monotonic(), 0)
    except queue.Empty:
      pass
    return [job for job in found if job is not None and not job.cancelled]

  def _run(self) -> None:
    """Runs what there is; a failure ends what ran, and no more."""
    while self._jobs or not self._closed:
      try:
        self._held += self._score(self._gather())
        self._admit()
        if self._jobs:
          self._extend()
      except Exception as error:
        for job in (*self._jobs.values(), *self._held):
          job.end(error)
        self._table = None
        self._jobs, self._held = {}, []

  def _score(self, jobs: Sequence[Job]) -> list[Job]:
    """Scores prompts, one adapter at a time; returns the jobs that go on."""
    asked = [job for job in jobs if job.score_prompt]
    for name in dict.fromkeys(job.model for job in asked):
      same = [job for job in asked if job.model == name]
      try:
        scores = stepper.score(
          self._model,
          self._base_params,
          self._adapters.alone(name),
          _padded([job.prompt for job in same]),
          num_top=NUM_TOP,
        )
        rows = zip(*map(np.asarray, scores), strict=True)
      except Exception as error:
        for job in same:
          job.end(error)
        continue
      for job, row in zip(same, rows, strict=False):
        first = Token(int(job.prompt[0]), None, ())
        job.on_prompt([first, *_tokens(row)][: len(job.prompt)])
    for job in jobs:
      if not job.max_tokens:
        job.end()
    return [job for job in jobs if not job.ended]

  def _admit(self) -> None:
    """Moves jobs into the table in the order in which they came."""
    self._make_room()
    requests = []
    while self._held and self._table.num_idle > len(requests):
      job = self._held[0]
      if job.cancelled:
        self._held.pop(0).end()
        continue
      used = {other.model for other in self._jobs.values()}
      try:
        choice = self._adapters.place(job.model, used)
      except Exception as error:
        self._held.pop(0).end(error)
        continue
      request = _request(job, choice)
      if choice is None or not self._table.fits(request):
        break
      self._jobs[request] = self._held.pop(0)
      requests.append(request)
    if requests:
      self.batches += 1
      width = _width(requests)
      shape = (_power(len(requests)), min(width, self._table.prompt_slots))
      self._tell(self._table.admit(self._adapters.tree, requests, shape=shape))

  def _make_room(self) -> None:
    """Gives an idle table the size of what waits, and a busy one rows."""
    wanted = min(_power(len(self._jobs) + len(self._held)), self._batch_size)
    if self._jobs:
      if wanted > self._table.rows:
        self._table.grow(wanted)
      return
    if not self._held:
      return
    size = {
      'rows': wanted,
      'prompt_slots': _width(self._held),
      'new_slots': _power(max(job.max_tokens for job in self._held)),
    }
    if self._table is None or size != self._table.size:
      self._table = batcher.Batcher(
        self._model,
        self._base_params,
        **size,
        stop_ids=self._end_ids,
        num_top=NUM_TOP,
      )

  def _extend(self) -> None:
    """Adds a few tokens to what runs, or fewer where a job waits for a row."""
    dropped = [r for r, job in self._jobs.items() if job.cancelled or job.ended]
    for request in dropped:
      self._jobs.pop(request).end()
    rows = self._table.rows
    waits = self._held and self._table.num_idle + len(dropped) < rows
    news = self._table.extend(
      self._adapters.tree,
      num_steps=STEPS_PER_CALL,
      enough=self._table.num_idle + len(dropped) + 1 if waits else rows,
      dropped=dropped,
    )
    self._tell(news)

  def _tell(self, news: Sequence[batcher.News]) -> None:
    """Hands new tokens to the jobs that asked for them."""
    for told in news:
      job = self._jobs[told.request]
      goes_on = all(
        not job.cancelled and job.on_token(token) for token in _tokens(told.new)
      )
      if told.ended:
        del self._jobs[told.request]
      # A job that wants no more is dropped from the table before it goes on.
      if told.ended or not goes_on:
        job.end()


def _request(job: Job, choice: int | None) -> batcher.Request:
  """Returns what a job asks of the table."""
  return batcher.Request(
    job.prompt,
    np.asarray(jax.random.key_data(jax.random.key(job.seed % 2**32))),
    job.max_tokens,
    job.temperature,
    job.top_p,
    -1 if choice is None else choice,
  )


def _width(asked: Sequence[Job | batcher.Request]) -> int:
  """Returns a width for prompts, one of few."""
  return max(_power(max(len(x.prompt) for x in asked)), _SMALLEST_WIDTH)


def _padded(prompts: Sequence[Sequence[int]]) -> np.ndarray:
  """Returns prompts as `[B, L]`, in one of few shapes."""
  width = max(_power(max(map(len, prompts))), _SMALLEST_WIDTH)
  tokens = np.zeros((_power(len(prompts)), width), np.int32)
  for row, prompt in zip(tokens, prompts, strict=False):
    row[: len(prompt)] = prompt
  return tokens


def _tokens(scores: Sequence[np.ndarray]) -> list[Token]:
  """Returns a row of scores as tokens."""
  return [
    Token(
      int(token),
      float(logprob),
      tuple(zip(ids.tolist(), values.tolist(), strict=True)),
    )
    for token, logprob, ids, values in zip(*scores, strict=True)
  ]
