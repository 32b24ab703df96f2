# What of llama.cpp is not built: the half that serves images and sound (mtmd) and the helpers of its command line
# programs (common). Nothing here uses them, and without them the wait is less than half as long. CMake reads this
# file right after the project's own project() line; plain variables win over the options that follow.
set(LLAVA_BUILD OFF)
set(LLAMA_BUILD_COMMON OFF)

# GCC 12.2 thinks that _tile_loadconfig reads 8 of the 64 bytes that it is given, and leaves out the stores to the
# others: llama.cpp's code for Intel's matrix instructions (AMX) then dies of an illegal one. This says it with all 64.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    set(whole_tile_config ${CMAKE_BINARY_DIR}/whole_tile_config.h)
    file(WRITE ${whole_tile_config} "
#ifdef __AMX_TILE__
#include <immintrin.h>
#define _tile_loadconfig(from) __asm__ volatile(\"ldtilecfg\\t%0\" : : \"m\"(*(const char(*)[64])(from)))
#endif
")
    add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include ${whole_tile_config}>")
endif()

# With half-precision arithmetic (AVX512-FP16) llama.cpp's attention adds up in 16 bits, and takes heads of 64 values one
# value at a time, for its vectors hold 128: single precision is much faster there, and more exact.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-mno-avx512fp16 has_avx512fp16)
if(has_avx512fp16)
    add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-mno-avx512fp16>")
endif()
