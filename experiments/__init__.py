"""The paper's comparisons, on a small scale: adaptation with and without each idea, chunk-causal against its alternatives."""
