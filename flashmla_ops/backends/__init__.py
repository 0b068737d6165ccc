"""Which backend serves a call, and why not: the reason is a sentence a user can act on.

A backend is a module with one function per op and what follows. The functions do not check. Outputs are passed in, but
for those of fwd_kvcache_mla, which it allocates: it is called most, and a compiled library allocates sooner.

    refusal(op, *tensors, **facts) -> str | None     None if it serves this call here, else why not and what would
    status() -> str                                  'ready', or why not on this machine, for the report
"""

import os
from types import ModuleType

from torch import Tensor

from . import cpu, sm90, triton

# in order of preference; triton serves CPU tensors under its interpreter, which is for tests: not before cpu does
ALL: dict[str, ModuleType] = {"sm90": sm90, "cpu": cpu, "triton": triton}

in_use = tuple(ALL.values())
_forced = False


def use_backend(name: str | None) -> None:
    """Makes every later call run on the named backend, or (None) on the first one that serves it.

    The environment variable FLASHMLA_BACKEND, read at import, does the same. A forced backend that cannot serve a call
    raises with the reason. The choice never changes shapes, plans or fakes, so compiled code stays valid.

    Raises:
        RuntimeError: there is no backend of this name.
    """
    global in_use, _forced
    if name is not None and name not in ALL:
        raise RuntimeError(f"backend: expected one of {', '.join(ALL)} or None, got {name!r}")
    _forced = name is not None
    in_use = (ALL[name],) if _forced else tuple(ALL.values())


def choose(op: str, tensor: Tensor, **facts) -> ModuleType:
    """The backend that serves `op` for a call whose first tensor is `tensor`; `facts` are other things it depends on.

    Raises:
        NotImplementedError: none does; the message has each one's reason.
    """
    for backend in in_use:
        if backend.refusal(op, tensor, **facts) is None:
            return backend
    reasons = "; ".join(f"{name}: {b.refusal(op, tensor, **facts)}" for name, b in ALL.items() if b in in_use)
    which = "the forced backend does not serve" if _forced else "no backend serves"
    raise NotImplementedError(f"flashmla::{op}: {which} this call. {reasons}")


use_backend(os.environ.get("FLASHMLA_BACKEND") or None)
