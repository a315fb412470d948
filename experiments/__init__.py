"""The paper's comparisons, on a small scale: arms of the adaptation, and of seeing time."""
