"""The latent attention layer, its backend and its implementation."""
