// The product that tensor cores make for four warps, from compute capability 9.0 on (sm_90a): the first operand in
// registers, the second one in shared memory. tests/emulation has its own, which has no such thing.
//
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include "barriers.cuh"
#include "common.cuh"

namespace qmoe::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWarpgroups = true;
#else
inline constexpr bool kHasWarpgroups = false;
#endif
// Kernels for clusters are compiled where there are warpgroups, too.
inline constexpr bool kHasClusters = kHasWarpgroups;

// Describes an operand (n, 64) of 16-bit numbers, rows of 128 bytes, of which those of 16 bytes at i lie at i ^ row % 8;
// `bytes` are at a multiple of 1024, or 32 further for every 16 columns that are left out.
__device__ __forceinline__ uint64_t swizzled_operand(const uint8_t* bytes) {
    constexpr uint64_t kEightRows = 1024 / 16, kSwizzled128 = 1;
    return kSwizzled128 << 62 | kEightRows << 32 | uint64_t{1} << 16 | (shared_address(bytes) >> 4 & 0x3fff);
}

// Before the first product that reads registers or adds to sums that others have written.
__device__ __forceinline__ void begin_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// Makes a batch of the products since the last one.
__device__ __forceinline__ void commit_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits for all batches but the latest `kBut`.
template <int kBut>
__device__ __forceinline__ void wait_for_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kBut) : "memory");
#endif
}
// All warps of a warpgroup together change how many registers each of their threads may have.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

#define QMOE_SUMS_1(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define QMOE_SUMS_2(d, i) QMOE_SUMS_1(d, i), QMOE_SUMS_1(d, i + 1)
#define QMOE_SUMS_4(d, i) QMOE_SUMS_2(d, i), QMOE_SUMS_2(d, i + 2)
#define QMOE_SUMS_8(d, i) QMOE_SUMS_4(d, i), QMOE_SUMS_4(d, i + 4)
#define QMOE_SUMS_16(d, i) QMOE_SUMS_8(d, i), QMOE_SUMS_8(d, i + 8)
#define QMOE_SUMS_24(d, i) QMOE_SUMS_16(d, i), QMOE_SUMS_8(d, i + 16)
#define QMOE_SUMS_32(d, i) QMOE_SUMS_16(d, i), QMOE_SUMS_16(d, i + 16)
#define QMOE_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QMOE_NAMES_32 \
    QMOE_NAMES_16     \
    ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QMOE_NAMES_64 \
    QMOE_NAMES_32     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QMOE_NAMES_128                                                                 \
    QMOE_NAMES_64                                                                      \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QMOE_NAMES_192                                                                 \
    QMOE_NAMES_128                                                                     \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define QMOE_NAMES_256                                                                             \
    QMOE_NAMES_192                                                                                 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define QMOE_WARPGROUP_PRODUCT(n, sums, type, a0, a1, a2, a3, operand)                      \
    asm volatile(                                                                           \
        "{\n.reg .pred add;\n.reg .b32 one;\nmov.b32 one, 1;\nsetp.ne.b32 add, one, 0;\n"   \
        "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" QMOE_NAMES_##n \
        "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #operand ", add, 1, 1, 0;\n}\n"    \
        : QMOE_SUMS_##sums(d, 0)                                                            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define QMOE_WARPGROUP_PRODUCTS(n, sums, a0, a1, a2, a3, operand)             \
    if constexpr (kN == n) {                                                  \
        if constexpr (std::is_same_v<T, __half>)                              \
            QMOE_WARPGROUP_PRODUCT(n, sums, "f16", a0, a1, a2, a3, operand);  \
        else                                                                  \
            QMOE_WARPGROUP_PRODUCT(n, sums, "bf16", a0, a1, a2, a3, operand); \
    }

// d (64 x kN) += a (64 x 16) b (16 x kN), float32 sums of products of T: each warp has 16 rows of d and a, as fragments of
// mma.m16n8k16 for every eight columns; b is the first 16 columns of an operand (kN, 64). The sums must not be touched, nor
// a be changed, before wait_for_products().
template <typename T, int kN>
__device__ __forceinline__ void multiply(float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    QMOE_WARPGROUP_PRODUCTS(32, 4, 16, 17, 18, 19, 20)
    QMOE_WARPGROUP_PRODUCTS(64, 8, 32, 33, 34, 35, 36)
    QMOE_WARPGROUP_PRODUCTS(128, 16, 64, 65, 66, 67, 68)
    QMOE_WARPGROUP_PRODUCTS(192, 24, 96, 97, 98, 99, 100)
    QMOE_WARPGROUP_PRODUCTS(256, 32, 128, 129, 130, 131, 132)
#endif
}

}  // namespace qmoe::cuda
