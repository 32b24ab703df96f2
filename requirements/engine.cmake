# What of llama.cpp is not built: the half that serves images and sound (mtmd) and the helpers of its command line
# programs (common). Nothing here uses them, and without them the wait is less than half as long. CMake reads this
# file right after the project's own project() line; plain variables win over the options that follow.
set(LLAVA_BUILD OFF)
set(LLAMA_BUILD_COMMON OFF)

# Nor is a second way to multiply matrices, which takes over where several tokens meet 16-bit values (in attention)
# and rounds otherwise than the usual way does for one token. Without it what a token says does not depend on how many
# are computed with it: a prompt cut anywhere, a stream resumed anywhere and a guess checked at once come out bit for
# bit alike.
set(GGML_LLAMAFILE OFF)
