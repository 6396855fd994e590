// The warps that bring codes and activations to shared memory: see gemm.cuh.
#pragma once

#include "gemm/call.cuh"

namespace qmoe::cuda {

// Warp 0: brings codes.
template <class Tile>
__device__ __forceinline__ void bring_codes(const GemmProjection& p, const GemmWork<Tile>& work,
                                            const GemmProducts<Tile::kExperts>& products, uint32_t first_expert,
                                            GemmRing& ring) {
    GemmPiece piece;
    for (typename GemmWork<Tile>::Pieces pieces(work); pieces.next(piece);) {
        // The last tile in place of those that are not there: shared memory is never read where nothing was written.
        const uint32_t first = min(piece.panel * Tile::kTiles, p.count.by - 1);
        const uint32_t there = min(Tile::kTiles, p.count.by - first);
        const uint64_t expert = products.at(piece.product).expert - first_expert;
        const uint8_t* from =
            p.tiles + expert * p.expert_bytes + first * p.tile_bytes + uint64_t{piece.begin} * p.block_bytes;
        for (uint32_t block = piece.begin; block < piece.end; ++block, from += p.block_bytes) {
            ring.wait_empty();
            copy_pieces(ring.full[ring.index], ring.stage(), from, p.tile_bytes, p.block_bytes, Tile::kTiles, there);
            ring.advance();
        }
    }
}

// Warps 1 to 3: bring activations, rows of 128 bytes of which those of 16 bytes at i lie at i ^ row % 8.
template <typename T, class Tile>
class GemmActivations {
  public:
    static constexpr uint32_t kArrivals = Tile::kXWarps * kLanes;  // when a stage is full

    __device__ __forceinline__ GemmActivations(const Gemm& call, const GemmRing& ring) : call_(call), ring_(ring) {}

    __device__ __forceinline__ void bring(const GemmProjection& p, const GemmWork<Tile>& work,
                                          const GemmProducts<Tile::kExperts>& products) {
        if (p.has_boxes)
            bring_boxes(p, work, products);
        else
            bring_rows(p, work, products);
    }

  private:
    static constexpr uint32_t kPieceColumns = 8, kRowLanes = Tile::kStageColumns / kPieceColumns;
    static constexpr uint32_t kRowsAtOnce = kArrivals / kRowLanes;
    static constexpr uint32_t kMostRows = (Tile::kMostTokens + kRowsAtOnce - 1) / kRowsAtOnce;

    // The copy engine does it, asked by one of the warps; for all of a cluster, each block of threads asking for a part.
    __device__ __forceinline__ void bring_boxes(const GemmProjection& p, const GemmWork<Tile>& work,
                                                const GemmProducts<Tile::kExperts>& products) {
        const uint32_t box_rows = p.x_boxes.box_rows;
        const uint32_t own = threadIdx.x % kLanes * Tile::kCluster + GemmWork<Tile>::own_rank();
        const bool is_first = threadIdx.x < 2 * kLanes;
        GemmPiece piece;
        for (typename GemmWork<Tile>::Pieces pieces(work); pieces.next(piece);) {
            const GemmProduct product = products.at(piece.product);
            const uint32_t boxes = (product.rows + box_rows - 1) / box_rows;
            uint32_t col = piece.begin * kTileColumns;
            for (uint32_t left = 2 * (piece.end - piece.begin); left > 0; --left, col += Tile::kStageColumns) {
                if (is_first) {
                    ring_.wait_empty();
                    Barrier& full = ring_.full[ring_.index];
                    if (threadIdx.x % kLanes == 0) full.arrive_expecting(kArrivals, boxes * box_rows * 128);
                    __syncwarp();
                    if (own < boxes)
                        copy_box<Tile::kCluster>(full, ring_.stage() + own * box_rows * 128, p.x_boxes, col,
                                                 product.row + own * box_rows);
                }
                ring_.advance();
            }
        }
    }

    __device__ __forceinline__ void bring_rows(const GemmProjection& p, const GemmWork<Tile>& work,
                                               const GemmProducts<Tile::kExperts>& products) {
        const bool aligned = p.cols % kPieceColumns == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
        const uint32_t row = (threadIdx.x - kLanes) / kRowLanes, piece_of_row = threadIdx.x % kRowLanes;
        static_assert(kRowsAtOnce % 8 == 4);  // every other row of a thread's is swizzled alike
        const uint32_t even = row * 128 + (piece_of_row ^ row % 8) * 16, odd = even ^ 64;
        GemmPiece piece;
        for (typename GemmWork<Tile>::Pieces pieces(work); pieces.next(piece);) {
            const GemmProduct product = products.at(piece.product);
            const T* const x = static_cast<const T*>(p.x) + (p.by_choice ? 0 : uint64_t{product.row} * p.cols);
            uint32_t offsets[kMostRows];  // of rows
#pragma unroll
            for (uint32_t i = 0; i < kMostRows; ++i) {
                const uint32_t own = min(row + i * kRowsAtOnce, product.rows - 1);
                offsets[i] =
                    (p.by_choice ? call_.choices.top_k.divide(call_.schedule.choice(product.row + own)) : own) * p.cols;
            }
            const uint32_t count = row < product.rows ? (product.rows - row + kRowsAtOnce - 1) / kRowsAtOnce : 0;
            uint32_t col = piece.begin * kTileColumns + piece_of_row * kPieceColumns;
            for (uint32_t left = 2 * (piece.end - piece.begin); left > 0; --left, col += Tile::kStageColumns) {
                ring_.wait_empty();
                Barrier& full = ring_.full[ring_.index];
                if (aligned) {
                    copy_rows(x + col, offsets, count, col < p.cols, ring_.stage() + even, ring_.stage() + odd);
                    arrive_with_copies(full);
                } else {
                    write_rows(x, offsets, count, col, p.cols, ring_.stage() + even, ring_.stage() + odd);
                    full.arrive();
                }
                ring_.advance();
            }
        }
    }

    // Few instructions, and no branch: these warps are in the way of the tensor cores else.
    static __device__ __forceinline__ void copy_rows(const T* from, const uint32_t (&offsets)[kMostRows],
                                                     uint32_t count, bool there, uint8_t* even, uint8_t* odd) {
#pragma unroll
        for (uint32_t i = 0; i < kMostRows; ++i)
            copy_16_if(i < count, (i % 2 == 0 ? even : odd) + i * (kRowsAtOnce * 128), from + offsets[i], there);
    }
    // Where rows begin anywhere.
    static __device__ __forceinline__ void write_rows(const T* x, const uint32_t (&offsets)[kMostRows], uint32_t count,
                                                      uint32_t col, uint32_t cols, uint8_t* even, uint8_t* odd) {
#pragma unroll
        for (uint32_t i = 0; i < kMostRows; ++i)
            if (i < count)
                *reinterpret_cast<uint4*>((i % 2 == 0 ? even : odd) + i * (kRowsAtOnce * 128)) =
                    by_number(x + offsets[i], col, cols);
    }
    static __device__ __forceinline__ uint4 by_number(const T* row, uint32_t col, uint32_t cols) {
        uint32_t words[4] = {};
#pragma unroll
        for (uint32_t i = 0; i < kPieceColumns; ++i)
            if (col + i < cols)
                words[i / 2] |= uint32_t{*reinterpret_cast<const uint16_t*>(row + col + i)} << (16 * (i % 2));
        return {words[0], words[1], words[2], words[3]};
    }

    const Gemm& call_;
    GemmRing ring_;
};

}  // namespace qmoe::cuda
