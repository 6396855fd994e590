// The part of cooperative groups that kernels use, emulated.
#pragma once

namespace cooperative_groups {

struct EmulatedGrid {
    void sync() const { emulation::Grid::current().wait(emulation::State::kAtGridBarrier); }
};
inline EmulatedGrid this_grid() {
    return {};
}

}  // namespace cooperative_groups
