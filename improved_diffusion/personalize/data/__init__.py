"""Captioned images, and what a training step draws from them."""
