"""What training needs: autoencoder training, the shared loop, clips, captions, caches of latents, bases, metrics."""
