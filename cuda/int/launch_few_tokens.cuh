// How few_tokens.cuh's kernel is launched: what has room in shared memory, and which of its forms a call gets.
#pragma once

#include <algorithm>

#include "int/few_tokens.cuh"

namespace qmoe::cuda {

// Blocks of activations that are brought to all blocks of threads, whether these need them or not: more would take longer
// than it saves.
inline constexpr uint32_t kMostAtOnce = 8 * kWarps;

// Slots of a ring and their blocks: 6 to 9 KiB a ring. Twice as many bytes took up to a seventh longer, although nothing else
// waits for the room. Few large slots cost fewer instructions, which layers of experts gain from, and matrices lose more by.
template <int kBits, bool kExperts>
inline constexpr uint32_t kMostSlots = kExperts     ? 2
                                       : kBits == 4 ? 4
                                                    : 3;
template <int kBits, bool kExperts>
inline constexpr uint32_t kChunk = (kBits == 2   ? 4
                                    : kBits == 8 ? 1
                                                 : 2) *
                                   (kExperts ? 2 : 1);

// Divides shared memory between rings and activations, the rest being fixed. Of a layer of experts there is room for the
// rows of three products, where it is there, since that is what a share is of. True where none of it has to come in slabs.
template <int kBits, int kN, bool kExperts>
bool divide(FewTokens& call, const Device& device, uint32_t slots) noexcept {
    const uint32_t choices = kExperts ? call.tokens * call.choices.top_k.by : call.tokens;
    call.slots = slots, call.chunk = kChunk<kBits, kExperts>, call.x_bytes = 0;
    const uint32_t fixed = Room<kBits, kN>(call, kExperts).bytes,
                   room = device.shared > fixed ? device.shared - fixed : 0;
    const uint32_t most = std::min(call.most.by, choices);
    bool whole = true;
    for (uint32_t i = 0; i < call.count; ++i) {
        Projection& p = call.projections[i];
        p.slab = p.blocks;
        p.row_bytes = x_bytes_of_row(p.slab.by, p.groups);
        const uint32_t all = call.tokens * p.row_bytes;
        p.by_token = kExperts && p.is_first && call.tokens * p.blocks.by <= kMostAtOnce && all <= room;
        if (p.by_token) {
            p.fit = choices;
            call.x_bytes = std::max(call.x_bytes, all);
            continue;
        }
        // Where multiprocessors have almost equally many tiles, and bringing all rows to each of them takes little.
        const uint32_t count = p.count.by, rounds = static_cast<uint32_t>(ceil_div(count, device.multiprocessors));
        p.all_experts = kExperts && i == 1 && call.tokens <= 8 * kN && choices * p.row_bytes <= room &&
                        choices * p.blocks.by <= 2 * kMostAtOnce && rounds * device.multiprocessors * 16 <= count * 17;
        p.fit = p.all_experts ? choices : std::min(std::min(choices, 3 * most), room / p.row_bytes);
        if (p.fit < most) {
            whole = false, p.fit = 0;
            constexpr uint32_t kBeside = kRowGap + kRowMultiple;
            const uint32_t blocks = room / most > kBeside ? (room / most - kBeside) / x_bytes_of_block(p.groups) : 0;
            p.slab = Divisor(blocks == 0 ? 0 : ceil_div(p.blocks.by, ceil_div(p.blocks.by, blocks)));
            p.row_bytes = x_bytes_of_row(p.slab.by, p.groups);
        }
        call.x_bytes = std::max(call.x_bytes, (p.fit == 0 ? most : p.fit) * p.row_bytes);
    }
    while (call.slots < kMostSlots<kBits, kExperts> && Room<kBits, kN>(call, kExperts).bytes <= device.shared)
        ++call.slots;
    if (Room<kBits, kN>(call, kExperts).bytes > device.shared) --call.slots;
    return whole;
}

template <typename T, int kBits, int kN, bool kExperts>
Status launch_as(FewTokens& call, const Device& device, cudaStream_t stream) noexcept {
    for (uint32_t i = 0; i < call.count; ++i)
        if (call.projections[i].slab.by == 0)
            return Status::error(Code::kNoKernel, "cuda: shared memory of a block is too small");
    const auto kernel = call.projections[0].groups == 1 ? few_tokens<T, kBits, kN, kExperts, true>
                                                        : few_tokens<T, kBits, kN, kExperts, false>;
    QMOE_TRY(runtime_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared))));
    const uint32_t most = device.multiprocessors, count = call.projections[0].count.by;
    const uint32_t grid = !kExperts && count < most ? count : most;
    call.grid = Divisor(grid);
    // One slot, or two where a warp has many and activations are few (measured on an H100).
    const Projection& p = call.projections[0];
    constexpr uint32_t kFewActivations = 64 << 10;
    const uint64_t shared_slots = ceil_div(uint64_t{p.count.by}, uint64_t{grid}) * p.blocks.by / (kWarps * call.chunk);
    call.ahead =
        !kExperts && shared_slots >= 4 && call.tokens * p.blocks.by * kTileColumns * 2 <= kFewActivations ? 2 : 1;
    return launch(kernel, grid, kWarps * kLanes, Room<kBits, kN>(call, kExperts).bytes, call.count == 2, device, stream,
                  call);
}

// Chooses the kernel, by the tokens that a product has most often and by room: kN = 2 reads weights once for up to 16.
template <typename T, int kBits, bool kExperts>
Status launch_few_tokens(FewTokens call, const Device& device, cudaStream_t stream) noexcept {
    const uint32_t choices = kExperts ? call.tokens * call.choices.top_k.by : 0;
    const auto launch = [&]<int kN>() {
        call.most = Divisor(std::min(call.tokens, 8u * kN));
        if (kExperts || !divide<kBits, kN, kExperts>(call, device, 3)) divide<kBits, kN, kExperts>(call, device, 2);
        return launch_as<T, kBits, kN, kExperts>(call, device, stream);
    };
    return call.tokens <= 8 || (kExperts && choices <= 4 * call.choices.experts) ? launch.template operator()<1>()
                                                                                 : launch.template operator()<2>();
}

// What few_tokens_<bits>.cu compile.
#define QMOE_FEW_TOKENS(what, bits)                                                                               \
    what template Status launch_few_tokens<__half, bits, false>(FewTokens, const Device&, cudaStream_t) noexcept; \
    what template Status launch_few_tokens<__half, bits, true>(FewTokens, const Device&, cudaStream_t) noexcept;  \
    what template Status launch_few_tokens<__nv_bfloat16, bits, false>(FewTokens, const Device&,                  \
                                                                       cudaStream_t) noexcept;                    \
    what template Status launch_few_tokens<__nv_bfloat16, bits, true>(FewTokens, const Device&, cudaStream_t) noexcept;

}  // namespace qmoe::cuda
