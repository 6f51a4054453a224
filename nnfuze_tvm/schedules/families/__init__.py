"""One schedule rule per operator family."""

from nnfuze_tvm.schedules.families import (
    conv2d,
    dense,
    depthwise,
    elementwise,
    fallback,
    pooling,
    reduction,
    winograd,
)

# In the order in which they are asked; the last one takes every kernel.
RULES = (
    winograd.RULE,
    conv2d.RULE,
    depthwise.RULE,
    dense.RULE,
    pooling.RULE,
    reduction.RULE,
    elementwise.RULE,
    fallback.RULE,
)
