"""Adapting Stable Diffusion and SDXL to a subject or a style from a few images."""
