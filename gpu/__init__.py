"""For speed and memory: tiles, fused kernels, choices, streamed blocks, 8-bit products."""
