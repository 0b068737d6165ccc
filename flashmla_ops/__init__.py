"""MLA attention for PyTorch that compiles: importing this package registers torch.ops.flashmla.*."""

from . import ops as _ops  # noqa: F401  registers the ops
from .backends import use_backend
from .functional import (
    FlashMLASchedMeta,
    concat_and_cache_mla,
    flash_mla_with_kvcache,
    fwd_kvcache_mla,
    get_mla_metadata,
    get_mla_metadata_,
    merge_attn_states,
)
from .kv_cache import PagedKVCache, mark_kv_cache

__version__ = "0.1.0"

__all__ = [
    "FlashMLASchedMeta",
    "PagedKVCache",
    "concat_and_cache_mla",
    "flash_mla_with_kvcache",
    "fwd_kvcache_mla",
    "get_mla_metadata",
    "get_mla_metadata_",
    "mark_kv_cache",
    "merge_attn_states",
    "use_backend",
]
