"""The commands of serve.py: one module each."""
