// Markers that let the headers of core/ compile as C++ and as CUDA.
// Everything in core/ has internal linkage: a CPU kernel file is compiled once per instruction set, and a weak
// symbol built for AVX-512 that the linker keeps for everybody would be an illegal instruction on an older machine.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ATTNFAST_HD __host__ __device__ static inline
#else
#define ATTNFAST_HD static inline
#endif
