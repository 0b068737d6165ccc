"""Which backend serves a call, and why not: the reason is a sentence a user can act on.

A backend is a module with one function per op (outputs passed in: kernels neither check nor allocate) and

    refusal(op, *tensors, **facts) -> str | None     None if it serves this call here, else why not and what would
    status() -> str                                  'ready', or why not on this machine, for the report
"""

import os
from types import ModuleType

from torch import Tensor

from . import cpu

ALL: dict[str, ModuleType] = {"cpu": cpu}  # in order of preference

_forced: str | None = None


def use_backend(name: str | None) -> None:
    """Makes every later call run on the named backend, or (None) on the first one that serves it.

    The environment variable FLASHMLA_BACKEND, read at import, does the same. A forced backend that cannot serve a call
    raises with the reason. The choice never changes shapes, plans or fakes, so compiled code need not be compiled again.

    Raises:
        RuntimeError: there is no backend of this name.
    """
    global _forced
    if name is not None and name not in ALL:
        raise RuntimeError(f"backend: expected one of {', '.join(ALL)} or None, got {name!r}")
    _forced = name


def choose(op: str, tensor: Tensor, **facts) -> ModuleType:
    """The backend that serves `op` for a call whose first tensor is `tensor`; `facts` are the sizes it may depend on."""
    names = ALL if _forced is None else (_forced,)
    for name in names:
        if ALL[name].refusal(op, tensor, **facts) is None:
            return ALL[name]
    reasons = "; ".join(f"{name}: {ALL[name].refusal(op, tensor, **facts)}" for name in names)
    forced = " (forced by use_backend or FLASHMLA_BACKEND)" if _forced else ""
    raise NotImplementedError(f"flashmla::{op}: no backend{forced} serves this call. {reasons}")


use_backend(os.environ.get("FLASHMLA_BACKEND") or None)
