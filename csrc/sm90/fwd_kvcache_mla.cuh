// What the decode kernels and the combine kernel share: dimensions, and how the plan is read.
#pragma once

#include <cuda.h>

#include <climits>
#include <cuda/ptx>

#include "../check.h"
#include "../params.h"
#include "ptx.cuh"

namespace flashmla::sm90 {

constexpr int kDimQK = 576;
constexpr int kDimV = 512;
constexpr int kSlices = kDimQK / 64;  // 9
constexpr float kLn2 = 0.6931471805599453f;

// The columns of a part that kernels read, clamped to the batch.
struct alignas(16) Part {
    int first_row, first_tile, last_row, last_tile;

    __device__ bool empty() const { return last_row < first_row; }
    // whether row r was begun by an earlier part
    __device__ bool continues(int r) const { return r == first_row && first_tile > 0; }
};

__device__ __forceinline__ Part load_part(const FwdParams& params, int part) {
    static_assert(kFirstRow == 0 && kFirstTile == 1 && kLastRow == 2 && kLastTile == 3);
    const int4 columns = *reinterpret_cast<const int4*>(params.metadata + part * kColumns);
    Part result = {columns.x, max(columns.y, 0), columns.z, max(columns.w, 0)};
    if (result.first_row < 0) {
        result.first_row = 0;
        result.first_tile = 0;
    }
    result.first_row = min(result.first_row, params.b);
    result.last_row = min(result.last_row, params.b - 1);
    return result;
}

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t phase) {
    while (!cuda::ptx::mbarrier_try_wait_parity(barrier, phase)) {
    }
}

__device__ __forceinline__ int clamped_length(const FwdParams& params, int row) {
    return min(max(params.cache_seqlens[row], 0), params.max_len);
}

__device__ __forceinline__ int num_tiles(int length) { return length / kTile + (length % kTile != 0); }

// A query row of a key head, in the order (s_q, h_q / h_k). Most calls need no division.
struct QueryRow {
    int s, g;  // the query, and its head among the key head's

    __device__ QueryRow(const FwdParams& params, int row)
        : s(params.s_q == 1 ? 0 : row / params.group), g(row - s * params.group) {}
};

// The key head of a row tile, and the tile's index there.
struct HeadTile {
    int head, tile;

    __device__ HeadTile(const FwdParams& params, int row_tile) : head(0), tile(row_tile) {
        if (params.h_k == 1) return;
        const int tiles_per_head = params.row_tiles / params.h_k;
        head = row_tile / tiles_per_head;
        tile = row_tile - head * tiles_per_head;
    }
};

// Of uneven queries: a batch row's, among all.
struct RowQueries {
    int first, count;

    __device__ RowQueries(const FwdParams& params, int row) {
        const auto clamped = [&](int query) { return min(max(query, 0), params.total_q); };
        first = clamped(params.cu_seqlens_q[row]);
        count = min(max(clamped(params.cu_seqlens_q[row + 1]) - first, 0), params.s_q);
    }
};

// The query rows of a key head in a block of a row, and the row's last block, -1 without queries.
__device__ __forceinline__ int block_rows(const FwdParams& params, int tile_rows = kRowTile) {
    return params.row_tiles / params.h_k * tile_rows;
}
__device__ __forceinline__ int last_block(const FwdParams& params, const RowQueries& queries,
                                          int tile_rows = kRowTile) {
    const int size = block_rows(params, tile_rows);
    return (queries.count * params.group + size - 1) / size - 1;
}

// And where a part begins and ends, in blocks of its first and of its last row (flashmla_ops/plan.py).
struct Blocks {
    int first, last;

    __device__ Blocks(const FwdParams& params, int part) {
        static_assert(kFirstRowTile % 2 == 0 && kLastRowTile == kFirstRowTile + 1);
        const int2 columns = *reinterpret_cast<const int2*>(params.metadata + part * kColumns + kFirstRowTile);
        first = max(columns.x, 0);
        last = max(columns.y, 0);
    }
};

// What exponents are taken relative to: with no key seen so far exp2(-inf - 0) = 0, where -inf - -inf would be NaN.
__device__ __forceinline__ float base_of(float high) { return high == -INFINITY ? 0.f : high; }

// Places in the workspace: part p's shares of its first row, when an earlier part began it, and of its last, when a
// later one ends it.
__device__ __forceinline__ int first_place(int part) { return 2 * part; }
__device__ __forceinline__ int last_place(int part) { return 2 * part + 1; }

// A part's share of one batch row.
struct Segment {
    int row;
    int length;        // keys of the row
    int begin, end;    // tiles
    int place;         // in the workspace; -1 if the row is whole
    bool more;         // whether the part goes on with the next row
    bool ends = true;  // whether it is the part's last one of the row: but for units (units.cuh)
};

// Where a segment's tiles lie.
struct Pages {
    const FwdParams& params;
    const Segment& segment;
    int tiles_per_page;

    __device__ Pages(const FwdParams& params, const Segment& segment)
        : params(params), segment(segment), tiles_per_page(params.page_size / kTile) {}

    // Read from the table: -1 past the segment and for pages that do not exist, which is outside the tensor map and
    // reads as zeros.
    __device__ int page_of(int tile) const { return checked(entry_of(tile)); }
    // The two steps of that, for who need not wait for the table yet.
    __device__ int entry_of(int tile) const {
        return tile >= segment.end ? -1 : params.block_table[segment.row * params.table_stride + column_of(tile)];
    }
    __device__ int checked(int entry) const { return entry >= 0 && entry < params.num_pages ? entry : -1; }
    // The tile's first token in its page.
    __device__ int token_of(int tile) const { return (tile - column_of(tile) * tiles_per_page) * kTile; }

  private:
    __device__ int column_of(int tile) const { return tiles_per_page == 1 ? tile : tile / tiles_per_page; }
};

// How many row tiles read a key.
__device__ __forceinline__ int readers_of_keys(const FwdParams& params) { return params.row_tiles / params.h_k; }

// A box of the cache to shared memory, by one thread. Keys that no other row tile reads L2 is to give up before others:
// so they come up to 8 % faster (csrc/NOTES.md, section 12). Other blocks of uneven queries read them at other times.
__device__ __forceinline__ void copy_keys(int readers, void* shared_to, const CUtensorMap& map,
                                          const int32_t (&where)[5], uint64_t* landed) {
    if (readers == 1) {
        ptx::copy_box(shared_to, &map, where, landed, ptx::evict_first_policy());
    } else {  // with a policy at all they would come 2 % slower
        cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global, shared_to, &map, where,
                                        landed);
    }
}

// Whether parts a and b, one after the other, are the only ones with tiles of a row.
__device__ __forceinline__ bool is_pair(const Part& a, const Part& b, int row, int tiles) {
    const bool begins = a.last_row == row && !a.empty() && !a.continues(row) && 0 < a.last_tile && a.last_tile < tiles;
    const int b_end = b.last_row == row ? b.last_tile : tiles;
    return begins && !b.empty() && b.continues(row) && b.first_tile < tiles && b_end >= tiles;
}

// Of a row that two parts share, the later share is merged with the earlier by the part that has it: see
// fwd_kvcache_mla.cu. The part that begins the row, if that is so, else -1.
__device__ __forceinline__ int pair_of(const FwdParams& params, const Part (&parts)[kMaxParts],
                                       const Segment& segment) {
    if (params.arrivals == nullptr || segment.place < 0) return -1;
    const int begun_by = (segment.place - 1) >> 1;
    const bool both = begun_by >= 0 && begun_by + 1 < params.plan_parts;
    return both && is_pair(parts[begun_by], parts[begun_by + 1], segment.row, num_tiles(segment.length)) ? begun_by
                                                                                                         : -1;
}

// Starts to bring what the part's first segment needs next into L1: its length and its first page.
__device__ __forceinline__ void prefetch_first(const FwdParams& params, const Part& p) {
    const int pages = params.max_len / params.page_size, page = p.first_tile / (params.page_size / kTile);
    if (p.empty() || page >= pages) return;
    ptx::load_to_l1(params.cache_seqlens + p.first_row);
    ptx::load_to_l1(params.block_table + p.first_row * params.table_stride + page);
}

// Brings lengths and block table to L2, a line a thread of all CTAs' producers, as far as these go: the way from the
// plan to a row's length to its page would else be three reads of memory, one after the other.
template <bool kUneven = false>
__device__ __forceinline__ void prefetch_tables(const FwdParams& params, int thread, int threads) {
    constexpr int kLine = 128;
    const int cta = blockIdx.y * gridDim.x + blockIdx.x;
    const int64_t at = (int64_t{cta} * threads + thread) * kLine;
    if (params.max_len == 0) return;  // there may be no table
    const int64_t lengths_bytes = int64_t{params.b} * 4;
    const int64_t table_bytes = ((params.b - 1) * params.table_stride + params.max_len / params.page_size) * 4;
    if (at < table_bytes) ptx::prefetch_l2(reinterpret_cast<const char*>(params.block_table) + at);
    if (at < lengths_bytes) ptx::prefetch_l2(reinterpret_cast<const char*>(params.cache_seqlens) + at);
    if constexpr (kUneven) {
        if (at < lengths_bytes + 4) ptx::prefetch_l2(reinterpret_cast<const char*>(params.cu_seqlens_q) + at);
    }
}

// A part's first place under a batch-invariant plan; of part kMaxParts, which the plan has too, the places it uses.
__device__ __forceinline__ int flagged_place(const FwdParams& params, int part) {
    return static_cast<int>(static_cast<uint32_t>(params.metadata[part * kColumns + kFlags]) >> 1);
}

// Fills `parts` with the plan, which the CTA's first threads read, one a part. If the plan uses a part that has no
// places in the workspace, or a batch-invariant one more places than there are, each row becomes whole: the part's that
// has its first tile. (Of uneven queries each block: last_tile then says so, and who goes through the blocks leaves out
// the first one.) Ends in a barrier.
template <bool kUneven = false, bool kInvariant = false>
__device__ __forceinline__ void read_plan(const FwdParams& params, Part (&parts)[kMaxParts]) {
    const int part = threadIdx.x;
    const bool reads = part < params.plan_parts;
    bool without_places = false;
    if (reads) {
        const Part p = load_part(params, part);
        if (part == blockIdx.y) prefetch_first(params, p);
        if constexpr (kUneven) {
            if (part == blockIdx.y && !p.empty()) ptx::load_to_l1(params.cu_seqlens_q + p.first_row);
        }
        parts[part] = p;
        without_places =
            kInvariant ? flagged_place(params, kMaxParts) > params.places : part >= params.split_parts && !p.empty();
    }
    if (!__syncthreads_or(without_places)) return;
    if (reads) {
        if constexpr (!kUneven) {
            parts[part].first_row += parts[part].first_tile > 0;
            parts[part].first_tile = 0;
        }
        parts[part].last_tile = INT_MAX;
    }
    __syncthreads();
}

// Calls body(segment) for the CTA's parts, every gridDim.y-th, in order.
template <typename Body>
__device__ __forceinline__ void for_each_segment(const FwdParams& params, const Part (&parts)[kMaxParts], Body&& body) {
    for (int index = blockIdx.y; index < params.plan_parts; index += gridDim.y) {
        const Part& p = parts[index];  // read anew for each row: registers are short while it is worked on
        for (int row = p.first_row; row <= p.last_row; ++row) {
            const int length = clamped_length(params, row);
            const int tiles = num_tiles(length);
            const bool continued = p.continues(row);
            const bool cut = row == p.last_row && p.last_tile < tiles;
            Segment segment;
            segment.row = row;
            segment.length = length;
            segment.end = cut ? p.last_tile : tiles;
            segment.begin = continued ? min(p.first_tile, segment.end) : 0;
            segment.place = continued ? first_place(index) : cut ? last_place(index) : -1;
            segment.more = row < p.last_row;
            body(segment);
        }
    }
}

// Lists, for the combine kernel, the row that each of the CTA's parts begins and others continue, if any. One warp.
// Of uneven queries: the row of the block.
template <bool kUneven = false>
__device__ __forceinline__ void list_split_rows(const FwdParams& params, const Part (&parts)[kMaxParts]) {
    const auto begins_at = [&](int part, int block) { return !kUneven || Blocks(params, part).first == block; };
    const auto ends_at = [&](int part, int block) { return !kUneven || Blocks(params, part).last == block; };
    for (int part = blockIdx.y; part < params.split_parts; part += gridDim.y) {
        const Part p = parts[part];
        const int row = p.last_row, tiles = p.empty() ? 0 : num_tiles(clamped_length(params, row));
        int block = 0;
        bool exists = true;  // whatever the plan says: the combine kernel asks no more
        if constexpr (kUneven) {
            block = Blocks(params, part).last;
            exists = !p.empty() && block <= last_block(params, RowQueries(params, row));
        }
        const bool begins = p.last_tile < tiles && !(p.continues(row) && begins_at(part, block)) && exists;
        int passing = 0;  // parts that take the row over and pass it on
        for (bool all = begins; all; passing += 32) {
            const int next = part + 1 + passing + ptx::lane();
            const bool passes = next < params.split_parts && parts[next].last_row == row &&
                                parts[next].continues(row) && parts[next].last_tile < tiles && begins_at(next, block) &&
                                ends_at(next, block);
            const uint32_t others = ~__ballot_sync(~0u, passes);
            all = others == 0;
            if (!all) passing += __ffs(others) - 1 - 32;
        }
        const bool pair =
            params.arrivals != nullptr && part + 1 < params.plan_parts && is_pair(p, parts[part + 1], row, tiles);
        // and the part that ends it
        const int shares = begins && !pair ? min(2 + passing, params.split_parts - part) : 0;
        if (ptx::lane() == 0) params.split_rows[part] = make_int2(row, shares);
    }
}

}  // namespace flashmla::sm90
