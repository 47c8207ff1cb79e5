"""fifa-ray: keep the few preference pairs that matter, then align a diffusion model with them."""

__version__ = "0.1.0"
