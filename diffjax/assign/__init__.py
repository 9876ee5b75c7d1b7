"""Noise for images: assignment of a batch of noise to a batch of images (immiscible diffusion)."""
