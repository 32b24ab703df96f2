# What of llama.cpp is not built: the half that serves images and sound (mtmd) and the helpers of its command line
# programs (common). Nothing here uses them, and without them the wait is less than half as long. CMake reads this
# file right after the project's own project() line; plain variables win over the options that follow.
set(LLAVA_BUILD OFF)
set(LLAMA_BUILD_COMMON OFF)
