"""Aggregation of LoRA adapters that knows what their factors stand for.

Published schemes (`fedit`, `ffa`, `rolora`, `fedsa`, `flora`, `flexlora`,
`fedex`, `hetlora`) take the clients' stacked adapters. `product_rule` and
`product_coordinatewise` turn any rule of `aggregators` that can be into one on
the clients' products, which takes the server's adapter and stacked deltas.
`build` makes of either what a round runs. All are pure and can be jitted and
vmapped; arithmetic is float32 and results have the dtypes of the adapters.

An adapter is any tree of pairs `{'a': [..., D_in, R], 'b': [..., R, D_out]}`,
as `lora.init` makes it, and stands for `scale * a @ b`.
"""

from fedjax_safety.lora_aggregators._build import (
  Scheme,
  build,
  check_server,
  names,
)
from fedjax_safety.lora_aggregators._geometry import (
  product_basis,
  product_gram,
)
from fedjax_safety.lora_aggregators._lowrank import (
  align,
  fold_scales,
  product_norms,
  refactor,
)
from fedjax_safety.lora_aggregators._rules import (
  product_change,
  product_coordinatewise,
  product_residual,
  product_rule,
  product_svd,
)
from fedjax_safety.lora_aggregators._schemes import (
  at_ranks,
  fedex,
  fedit,
  fedsa,
  ffa,
  ffa_trainable,
  flexlora,
  flora,
  hetlora,
  residual,
  rolora,
  rolora_trainable,
  stack_ranks,
)

__all__ = [
  'Scheme',
  'align',
  'at_ranks',
  'build',
  'check_server',
  'fedex',
  'fedit',
  'fedsa',
  'ffa',
  'ffa_trainable',
  'flexlora',
  'flora',
  'fold_scales',
  'hetlora',
  'names',
  'product_basis',
  'product_change',
  'product_coordinatewise',
  'product_gram',
  'product_norms',
  'product_residual',
  'product_rule',
  'product_svd',
  'refactor',
  'residual',
  'rolora',
  'rolora_trainable',
  'stack_ranks',
]
