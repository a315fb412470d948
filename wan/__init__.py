"""The released Wan models: their autoencoders, text and image encoders, and the table that puts whole models together."""
