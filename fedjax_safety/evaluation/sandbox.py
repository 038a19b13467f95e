"""Runs a program that nobody vouches for, in a process of its own.

The process has a session of its own, an empty directory, no environment, no
network, little memory, and cannot start another; it is killed when its time is
over. As root it becomes the user nobody; any other user's files are as open to
it as to that user. It keeps accidents in, not somebody who means to get out.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

_NOBODY = 65534
# Network, processes and shared memory of its own; all end with the first one.
_APART = ('--net', '--pid', '--ipc', '--fork', '--kill-child')
# The program is read from standard input, and what it prints is thrown away.
# That it ended is told by a word that only the launcher knows, so that a
# program which leaves early has not.
_LAUNCHER = """
import bisect, collections, copy, datetime, decimal, fractions, functools
import hashlib, heapq, itertools, json, math, operator, os, random, re
import resource, statistics, string, sys, typing

def main():
  task = json.loads(sys.stdin.buffer.read())
  limits, word, program = task['limits'], task['word'], task['program']
  tell = os.dup(1)
  null = os.open(os.devnull, os.O_RDWR)
  for stream in (0, 1, 2):
    os.dup2(null, stream)
  if task['user'] is not None:
    os.setgroups([])
    os.setresgid(*[task['user']] * 3)
    os.setresuid(*[task['user']] * 3)
  for name, value in limits.items():
    resource.setrlimit(getattr(resource, name), (value, value))
  try:
    exec(compile(program, 'program', 'exec'), {'__name__': '__main__'})
  except BaseException:
    os._exit(1)
  os.write(tell, word.encode())
  os._exit(0)

main()
"""


class SandboxError(ValueError):
  """Code cannot be run as it should be on this machine."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a program may use.

  Attributes:
    cpu_seconds: of processor time.
    wall_seconds: until it is killed.
    memory_bytes: of address space.
    file_bytes: of the longest file that it may write.
  """

  cpu_seconds: int = 10
  wall_seconds: float = 30.0
  memory_bytes: int = 1 << 30
  file_bytes: int = 1 << 20

  def as_rlimits(self) -> dict[str, int]:
    """Returns them by the names of the module `resource`."""
    return {
      'RLIMIT_CORE': 0,
      'RLIMIT_NPROC': 0,
      'RLIMIT_NOFILE': 32,
      'RLIMIT_FSIZE': self.file_bytes,
      'RLIMIT_AS': self.memory_bytes,
      'RLIMIT_CPU': self.cpu_seconds,
    }


@functools.cache
def _apart() -> tuple[str, ...]:
  """Returns the command that takes the network away, none if it may not."""
  program = shutil.which('unshare')
  if not sys.platform.startswith('linux') or program is None:
    return ()
  user = () if os.geteuid() == 0 else ('--user',)
  command = (program, *user, *_APART)
  try:
    done = subprocess.run([*command, 'true'], capture_output=True, timeout=30)
  except (OSError, subprocess.TimeoutExpired):
    return ()
  return command if done.returncode == 0 else ()


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """Where programs run.

  Attributes:
    limits: of each program.
    with_network: whether to run them although the network cannot be taken
      away here.
    num_workers: programs that run at once.
  """

  limits: Limits = Limits()
  with_network: bool = False
  num_workers: int = 2

  def check(self) -> None:
    """Raises unless programs can be run as they should be.

    Raises:
      SandboxError: it is no Linux, or the network stays.
    """
    if not sys.platform.startswith('linux'):
      raise SandboxError(
        'evaluation.allow_code_execution needs Linux, whose limits it uses; '
        'leave the set out'
      )
    if not (_apart() or self.with_network):
      raise SandboxError(
        'evaluation.allow_code_execution: this machine does not let unshare '
        "take the network away from a model's code; permit user namespaces, "
        'or accept that with evaluation.allow_code_network=true'
      )

  def run(self, programs: Sequence[str]) -> list[bool]:
    """Returns whether each program ran to its end without an error."""
    self.check()
    with concurrent.futures.ThreadPoolExecutor(self.num_workers) as pool:
      return list(pool.map(self._run, programs))

  def _run(self, program: str) -> bool:
    """Runs one program."""
    word, root = secrets.token_hex(16), os.geteuid() == 0
    task = {
      'word': word,
      'program': program,
      'limits': self.limits.as_rlimits(),
      'user': _NOBODY if root else None,
    }
    with tempfile.TemporaryDirectory(prefix='program-') as folder:
      if root:
        os.chown(folder, _NOBODY, _NOBODY)
      process = subprocess.Popen(
        [*_apart(), sys.executable, '-I', '-S', '-c', _LAUNCHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={'PYTHONDONTWRITEBYTECODE': '1'},
        start_new_session=True,
      )
      try:
        told, _ = process.communicate(
          json.dumps(task).encode(), timeout=self.limits.wall_seconds
        )
      except subprocess.TimeoutExpired:
        told = b''
      finally:
        _end(process)
    return process.returncode == 0 and told == word.encode()


def _end(process: subprocess.Popen) -> None:
  """Kills what is left of a process's session and waits for it."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    pass
  process.wait()
  for stream in (process.stdin, process.stdout):
    stream.close()
