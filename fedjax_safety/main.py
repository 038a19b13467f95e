"""fedjax-safety: federated instruction tuning, attacked, defended, repaired.

Simulates a federation that tunes one language model with LoRA, lets some
clients train on harmful answers, applies a defense, repairs the result, and
measures safety, helpfulness and over-refusal.

  fedjax-safety run --config=configs/demo.py --workdir=runs/demo
  fedjax-safety COMMAND --help
"""

import errno
import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import flags

from fedjax_safety import commands, distributed, interrupt
from fedjax_safety.config import file as config_file

USER_ERROR = 2


class Flag(NamedTuple):
  """A flag of a command: how absl defines it, its default, its help."""

  define: Callable
  default: object
  help: str


FLAGS = {
  'config': Flag(
    flags.DEFINE_string,
    None,
    'Config file, e.g. configs/demo.py. --config.client.num_rounds=5 and the '
    'like set single values of it.',
  ),
  'workdir': Flag(flags.DEFINE_string, None, "Directory of the run's files."),
  'allow_config_change': Flag(
    flags.DEFINE_boolean,
    False,
    'Continue the run in --workdir although its config is not the same; what '
    'is done of it stays as it is.',
  ),
  'adapter': Flag(
    flags.DEFINE_string, None, 'PEFT adapter directory to start from.'
  ),
  'level': Flag(
    flags.DEFINE_list,
    [],
    "Levels of repair: public, external, self; the config's by default.",
  ),
  'arm': Flag(
    flags.DEFINE_string, None, 'Arm of the run; its first by default.'
  ),
  'seed': Flag(
    flags.DEFINE_integer, None, 'Seed of the arm; the first by default.'
  ),
  'stage': Flag(
    flags.DEFINE_string,
    'federated',
    'Which adapter: federated, repair_public, repair_external, repair_self.',
  ),
  'round': Flag(
    flags.DEFINE_integer,
    None,
    'The checkpoint after this many rounds instead of a stage.',
  ),
  'output': Flag(
    flags.DEFINE_string, None, 'Directory to write; must not exist.'
  ),
  'merged': Flag(
    flags.DEFINE_boolean,
    False,
    'Write merged Hugging Face weights instead of an adapter.',
  ),
  'temperature': Flag(
    flags.DEFINE_float, 0.0, '0 takes the likeliest token every time.'
  ),
  'topology': Flag(
    flags.DEFINE_string,
    None,
    'TPU slice to plan for, such as v5e:4x4, v5p:2x2x2 or v6e:4x4; the '
    'devices at hand by default.',
  ),
  'shape': Flag(
    flags.DEFINE_string,
    None,
    'Sizes of a published model, such as llama2-7b, instead of model.path.',
  ),
  'fit': Flag(
    flags.DEFINE_boolean,
    False,
    'Propose mesh, clients_per_chunk and remat instead of taking them from '
    'the config; compiles several times.',
  ),
  'memory_gib': Flag(
    flags.DEFINE_float, None, "Memory of a device, instead of its kind's."
  ),
  'labels': Flag(
    flags.DEFINE_list,
    None,
    'Files of labeled answers: a prompt, a response and final_label (XSTest '
    'completions), is_safe, harmful, or label (refusal, compliance, safe, '
    'unsafe).',
  ),
  'rules': Flag(flags.DEFINE_list, [], 'Rule lists; all of them by default.'),
  'judge': Flag(
    flags.DEFINE_string,
    None,
    'Model directory of a judge, or endpoint:URL#MODEL.',
  ),
  'judge_format': Flag(
    flags.DEFINE_string,
    'question',
    'How the judge is asked: md_judge, llama_guard_3, wildguard or question.',
  ),
  'judge_key_variable': Flag(
    flags.DEFINE_string,
    '',
    "Environment variable that holds the key of the judge's endpoint.",
  ),
  'dtype': Flag(
    flags.DEFINE_string,
    'bfloat16',
    "Of the judge's weights: float32, bfloat16 or float16.",
  ),
  'batch_size': Flag(
    flags.DEFINE_integer, 16, 'Answers that a judge model reads at once.'
  ),
  'json': Flag(flags.DEFINE_boolean, False, 'Print JSON instead of a table.'),
  'port': Flag(
    flags.DEFINE_integer, 8000, 'Port on this machine; 0 takes a free one.'
  ),
  'coordinator': Flag(
    flags.DEFINE_string,
    None,
    'HOST:PORT of the first of several processes that run this together.',
  ),
  'num_processes': Flag(
    flags.DEFINE_integer, None, 'How many they are; detected if possible.'
  ),
  'process_id': Flag(
    flags.DEFINE_integer, None, 'Which one this is, from 0; the same.'
  ),
  'distributed': Flag(
    flags.DEFINE_boolean,
    None,
    'Join other processes; by default in a Slurm, Open MPI or GKE job of '
    'several. On several hosts of a Cloud TPU say --distributed.',
  ),
  'traceback': Flag(
    flags.DEFINE_boolean, False, 'Show where an error came from.'
  ),
}


class Command(NamedTuple):
  """A subcommand: what it does, the flags it needs, and further ones."""

  function: Callable
  required: tuple[str, ...]
  optional: tuple[str, ...] = ()

  @property
  def flags(self) -> tuple[str, ...]:
    """Every flag of the command, in the order of its help."""
    return (*self.required, *self.optional, 'traceback')


_CHOICE = ('arm', 'seed', 'stage', 'round')
_RUN = (
  'allow_config_change',
  'distributed',
  'coordinator',
  'num_processes',
  'process_id',
)
COMMANDS = {
  'run': Command(commands.run, ('config', 'workdir'), _RUN),
  'sweep': Command(commands.sweep, ('config', 'workdir'), _RUN),
  'evaluate': Command(
    commands.evaluate,
    ('config', 'workdir'),
    ('adapter', *_RUN),
  ),
  'repair': Command(
    commands.repair,
    ('config', 'workdir', 'adapter'),
    ('level', *_RUN),
  ),
  'report': Command(commands.write_report, ('workdir',)),
  'export': Command(
    commands.export, ('workdir', 'output'), (*_CHOICE, 'merged')
  ),
  'chat': Command(commands.chat, ('workdir',), (*_CHOICE, 'temperature')),
  'serve': Command(commands.serve, ('workdir',), ('arm', 'seed', 'port')),
  'config': Command(commands.show_config, ('config',)),
  'plan': Command(
    commands.plan,
    ('config',),
    ('topology', 'shape', 'fit', 'arm', 'memory_gib', 'json'),
  ),
  'calibrate': Command(
    commands.calibrate,
    ('labels',),
    (
      'rules',
      'judge',
      'judge_format',
      'judge_key_variable',
      'dtype',
      'batch_size',
      'json',
    ),
  ),
  'datasets': Command(commands.show_datasets, ()),
}


def _usage() -> str:
  """Returns the help of the program."""
  rows = (f'  {n:10}{c.function.__doc__}' for n, c in COMMANDS.items())
  return f'{__doc__.strip()}\n\nCommands:\n' + '\n'.join(rows)


def _command_help(name: str) -> str:
  """Returns the help of one command: its purpose and its own flags."""
  command = COMMANDS[name]
  lines = [f'fedjax-safety {name}: {command.function.__doc__.strip()}', '']
  for key in command.flags:
    note = ' (required)' if key in command.required else ''
    lines.append(f'  --{key}{note}\n      {FLAGS[key].help}')
  return '\n'.join(lines)


def _parse(name: str, arguments: Sequence[str]) -> flags.FlagValues:
  """Parses a command's flags and loads its config into `config`.

  Raises:
    ValueError: a flag is unknown, missing or malformed, or the config is.
  """
  command, values = COMMANDS[name], flags.FlagValues()
  for key in command.flags:
    flag = FLAGS[key]
    flag.define(key, flag.default, flag.help, flag_values=values)
  overrides, others = [], arguments
  if 'config' in command.required:
    overrides, others = config_file.split(arguments)
  try:
    rest = values([name, *others])[1:]
  except flags.Error as error:
    raise ValueError(str(error)) from error
  if rest:
    raise ValueError(f'unexpected argument {rest[0]!r}')
  missing = [f'--{n}' for n in command.required if not values[n].value]
  if missing:
    raise ValueError(f'{name} needs {" and ".join(missing)}')
  if 'config' in command.required:
    tree = config_file.load(values.config)
    for key, text in overrides:
      config_file.override(tree, key, text)
    values['config'].value = tree
  return values


def _sentence(error: Exception) -> str:
  """Returns what an error says, on one line, with what to do."""
  if isinstance(error, OSError) and error.strerror:
    where = f'{error.filename}: ' if error.filename else ''
    remedy = ''
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      remedy = (
        '. What was saved before is intact: free space, then run again to '
        'resume'
      )
    return f'{where}{error.strerror}{remedy}'
  return ' '.join(str(error).split())


def run(arguments: Sequence[str]) -> int:
  """Runs a command and returns the exit code.

  0 is success, 2 an error that the user can mend, told in one sentence, 3 a
  plan that does not fit, and 143 a run that was asked to stop and can be
  resumed.
  """
  if not arguments or arguments[0] in ('-h', '--help', 'help'):
    print(_usage())
    return 0 if arguments else USER_ERROR
  name, *rest = arguments
  try:
    if name not in COMMANDS:
      known = ', '.join(COMMANDS)
      raise ValueError(f'unknown command {name!r}; known: {known}')
    if {'-h', '--help', '--helpfull'} & set(rest):
      print(_command_help(name))
      return 0
    return COMMANDS[name].function(_parse(name, rest)) or 0
  except interrupt.Interrupted:
    print(
      f'\nStopped as asked; what is done is saved. Resume with:\n'
      f'  fedjax-safety {shlex.join(arguments)}',
      file=sys.stderr,
    )
    return interrupt.EXIT_CODE
  except KeyboardInterrupt:
    return interrupt.KEYBOARD_EXIT_CODE
  except (ValueError, OSError) as error:
    if '--traceback' in rest:
      traceback.print_exc()
    print(f'fedjax-safety: error: {_sentence(error)}', file=sys.stderr)
    return USER_ERROR


def run_main() -> None:
  """The console script."""
  # Orbax logs the tracebacks of its threads; `run` tells the error itself.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  exit_code = run(sys.argv[1:])
  distributed.leave(exit_code)
  sys.exit(exit_code)


if __name__ == '__main__':
  run_main()
