// How few_tokens.cuh divides a block's work and shared memory.
#include <algorithm>

#include "int/activations.cuh"
#include "int/few_tokens.h"

namespace qmoe::cuda {
namespace {

uint32_t ceil_of(uint32_t a, uint32_t b) noexcept {
    return (a + b - 1) / b;
}

// Divides one projection's work, of which a block's share is about `share` tiles, with `room` bytes for activations.
bool divide_one(FewTokens& call, Projection& p, uint32_t share, uint32_t choices, bool experts, uint32_t room,
                bool slabs) noexcept {
    const uint32_t most = std::min(call.most, choices);
    p.slabs = 1, p.slab = p.blocks;
    p.fit = std::min(choices, call.shared_partials ? most : 3 * most);  // what a share is of
    while (p.fit > most && p.fit * row_bytes(p.slab) > room) --p.fit;
    if (p.fit * row_bytes(p.slab) > room) {
        if (!slabs) return false;
        while (p.slab > 0 && most * row_bytes(p.slab) > room) --p.slab;
        if (p.slab == 0) return false;
        p.slab = ceil_of(p.blocks, ceil_of(p.blocks, p.slab));
        p.slabs = ceil_of(p.blocks, p.slab);
    }
    // As few blocks for the warp that has most of them; of these as few sums.
    uint32_t least = ~0u;
    for (uint32_t parts = 0; parts <= kWarpsLog; ++parts) {
        const uint32_t batch = (kWarps >> parts) * call.tiles, rest = share % batch;
        const uint32_t rounds = share / batch * call.tiles + ceil_of(rest, kWarps >> parts);
        // A batch takes as long as about two blocks besides.
        const uint32_t blocks = rounds * ceil_of(p.slab, 1u << parts) * p.slabs + 2 * ceil_of(share, batch);
        if (blocks < least) least = blocks, p.parts = parts;
    }
    p.batch = (kWarps >> p.parts) * call.tiles;
    // Where sums are, activations are no more: they would have to come again for a second batch.
    if (call.shared_partials && (experts || share > p.batch)) return false;
    p.lines = Divisor(ceil_of(p.slab * 16, kLanes));
    call.x_bytes = std::max(call.x_bytes, p.fit * row_bytes(p.slab));
    return true;
}

}  // namespace

bool divide(FewTokens& call, uint32_t bits, uint32_t stages, bool experts, const Device& device, bool slabs) noexcept {
    constexpr uint32_t kAlignment = 64;  // what rounding up may take
    const uint32_t choices = experts ? call.tokens * call.choices.top_k.by : call.tokens, shared = device.shared;
    call.columns = ceil_of(std::min(call.most, choices), 2);
    call.slot_scales = call.row_groups ? 0 : call.scale_bytes;
    call.slot_bytes = 2 * bits * 4 * kLanes + call.slot_scales;
    call.x_bytes = call.partial_bytes = 0;
    const uint32_t shares = shares_of(call, experts, device), ring = kWarps * stages * call.tiles * call.slot_bytes;
    const uint32_t fixed = Room(call, ring, experts).bytes + kAlignment;
    if (fixed > shared) return false;
    call.shares = Divisor(shares);
    const uint32_t left = shared - fixed, sums = kWarps * call.tiles * call.columns * 128;
    const auto fits = [&](uint32_t buffers) {
        if (left < buffers * sums) return false;
        call.x_bytes = 0, call.partial_bytes = buffers * sums;
        for (uint32_t i = 0; i < call.count; ++i) {
            Projection& p = call.projections[i];
            const uint32_t products = experts ? std::min(choices, call.choices.experts) : 1;
            p.buffers = buffers;
            if (!divide_one(call, p, ceil_of(products * p.count.by, shares), choices, experts,
                            call.shared_partials ? left : left - buffers * sums, slabs))
                return false;
        }
        return true;
    };
    return (!call.shared_partials && fits(2)) || fits(1);
}

}  // namespace qmoe::cuda
