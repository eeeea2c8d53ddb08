"""Pixel-space diffusion, from the mathematics to a measured image: see README.md for the map of the code."""
