"""The commands of stickers.py: one module each."""
