// The product that tensor cores make for a warp. tests/emulation has its own.
#pragma once

#include "barriers.cuh"
#include "common.cuh"

namespace qmoe::cuda {

// d (16 x 8) += a (16 x 16) b (16 x 8), float32 sums of products of T; fragments as PTX's mma.m16n8k16 has them.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices (8, 8) of 16-bit numbers from shared memory, as mma() wants second operands: lane l gives where row l % 8 of
// matrix l / 8 is, and gets of row l / 4 of each the columns 2 (l % 4) and the next one.
__device__ __forceinline__ uint4 load_matrices(const uint8_t* row) {
    uint4 out;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "r"(shared_address(row))
                 : "memory");
    return out;
}

}  // namespace qmoe::cuda
