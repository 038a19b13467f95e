"""One arm at one seed, with what every stage of it needs."""

import dataclasses
import pathlib

import jax

from fedjax_safety import interrupt, workdir
from fedjax_safety import metrics as metrics_lib
from fedjax_safety import settings as settings_lib


@dataclasses.dataclass(frozen=True)
class Arm:
  """One arm at one seed, with what every stage of it needs.

  Attributes:
    name: the arm's name.
    order: its place in the report.
    config: its settings.
    root: the work directory of the run.
    writer: of metrics.jsonl.
    stop: looked at between steps.
  """

  name: str
  order: int
  config: settings_lib.ExperimentConfig
  root: pathlib.Path
  writer: metrics_lib.MetricsWriter
  stop: interrupt.StopRequest

  @property
  def directory(self) -> pathlib.Path:
    """Where this arm's files are."""
    return workdir.arm_directory(self.root, self.name, self.config.seed)

  @property
  def replies(self) -> pathlib.Path:
    """Where the replies of endpoints are kept, for all arms."""
    return self.root / 'replies'

  def key(self, purpose: int) -> jax.Array:
    """Returns the key of one purpose."""
    return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

  def timed(self, stage: str, seconds: float) -> None:
    """Writes how long a stage took."""
    self.writer.write(
      {
        'kind': 'stage',
        'arm': self.name,
        'seed': self.config.seed,
        'stage': stage,
        'time/seconds': round(seconds, 3),
      }
    )

  def defense_data(self, level: str) -> pathlib.Path:
    """Where the defense data of a level are."""
    return workdir.defense_data(self.directory, level)
