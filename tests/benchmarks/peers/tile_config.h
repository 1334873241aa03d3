// Included before every C++ file of llama.cpp (environments.py). GCC up to 12 declares that _tile_loadconfig reads 8 bytes
// of the 64 that it reads, leaves out the writing of the others as useless, and llama.cpp's AMX kernels fault at once.
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
