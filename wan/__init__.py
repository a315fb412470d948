"""The released Wan models: autoencoders, encoders, and what puts whole models together."""
