"""What a device can do for speed and memory: tiles, fused kernels, the choice among them, streamed blocks, 8-bit products."""
