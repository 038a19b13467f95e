"""SIGTERM and Ctrl-C as a request: finish the round in flight, save, say how.

Cloud machines send SIGTERM before they are taken away.
"""

import signal
from types import FrameType

# The shell's convention for a process that a signal ended.
EXIT_CODE = 128 + signal.SIGTERM
KEYBOARD_EXIT_CODE = 128 + signal.SIGINT


class Interrupted(Exception):
  """The run was asked to stop and has saved what it had."""


class StopRequest:
  """Notes the signals that ask a process to stop, while in its context."""

  def __init__(self):
    self.requested = False
    self._previous = {}

  def _note(self, signum: int, frame: FrameType | None) -> None:
    del frame
    if self.requested and signum == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = True

  def __enter__(self) -> 'StopRequest':
    for signum in (signal.SIGTERM, signal.SIGINT):
      self._previous[signum] = signal.signal(signum, self._note)
    return self

  def __exit__(self, *exc_info) -> None:
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)

  def check(self) -> None:
    """Raises Interrupted if a signal has come."""
    if self.requested:
      raise Interrupted
