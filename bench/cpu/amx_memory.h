// Included before every C++ source of ggml's CPU backend (CMakeLists.txt).
//
// GCC's AMX intrinsics up to 12 at least are assembly that reads memory without telling the compiler: it may drop or
// move the stores before them, and ggml's tile configuration then loads as garbage and faults. The same instructions
// here name what they read.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__AMX_TILE__)
#include <immintrin.h>

#undef _tile_loadd
#undef _tile_stream_loadd
#define _tile_loadconfig(config) \
    __asm__ volatile("ldtilecfg %0" ::"m"(*reinterpret_cast<const char(*)[64]>(config)) : "memory")
#define _tile_loadd(tile, base, stride) qmoe_tile_load("tileloadd", tile, base, stride)
#define _tile_stream_loadd(tile, base, stride) qmoe_tile_load("tileloaddt1", tile, base, stride)
#define qmoe_tile_load(name, tile, base, stride) qmoe_tile_load_(name, tile, base, stride)
#define qmoe_tile_load_(name, tile, base, stride)                                          \
    __asm__ volatile(name " (%0,%1,1), %%tmm" #tile ::"r"(static_cast<const void*>(base)), \
                     "r"(static_cast<long>(stride))                                        \
                     : "memory")
#endif
