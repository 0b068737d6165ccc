"""The ops by hand: one decode step of one attention layer on a paged latent cache, checked against plain PyTorch.

python examples/direct_ops.py
"""

import sys

import torch

import flashmla_ops

torch.manual_seed(0)
h_q, d_v, d_rope, page_size, softmax_scale = 16, 512, 64, 64, 192**-0.5
lengths = [5, 64, 200]  # tokens that each sequence has cached; the third lies in four pages

# a cache of one layer for three sequences, filled with their tokens so far
cache = flashmla_ops.PagedKVCache(1, 8, 3, 4, head_dim=d_v + d_rope, page_size=page_size, dtype=torch.float32)
for n in lengths:
    cache.allocate(n)
kv_cache = cache.layers[0].normal_()  # [num_pages, page_size, 1, d_v + d_rope]

# each sequence gets a token: append it first, then attend
cache.extend(1)
kv_c, k_pe = torch.randn(3, d_v), torch.randn(3, d_rope)  # its compressed latent and its rotated key part
flashmla_ops.concat_and_cache_mla(kv_cache, kv_c, k_pe, cache.slot_mapping)
plan = flashmla_ops.get_mla_metadata(cache.cache_seqlens, h_q, 1)  # once a step, for all layers
q = torch.randn(3, 1, h_q, d_v + d_rope)  # absorbed queries
out, lse = flashmla_ops.fwd_kvcache_mla(
    q, kv_cache, cache.block_table, cache.cache_seqlens, d_v, softmax_scale, True, *plan
)

# the same by matmul, softmax, matmul on each sequence's own keys
error = 0.0
for row, n in enumerate(cache.cache_seqlens.tolist()):
    keys = kv_cache[cache.pages_of(row)].flatten(0, 2)[:n].double()  # [n, d_v + d_rope]; the first d_v are the values
    assert torch.equal(keys[-1].float(), torch.cat([kv_c[row], k_pe[row]]))  # the token just appended
    scores = q[row, 0].double() @ keys.T * softmax_scale  # [h_q, n]
    error = max(error, (out[row, 0] - scores.softmax(-1) @ keys[:, :d_v]).abs().max().item())
    error = max(error, (lse[row, :, 0] - scores.logsumexp(-1)).abs().max().item())

print(f"out {list(out.shape)}, lse {list(lse.shape)}")
print(f"largest difference from float64: {error:.1e}: {'right' if error < 1e-4 else 'WRONG'}")
sys.exit(error >= 1e-4)
