"""The base model: opening it, its tokens, what is added to it, and writing that for other programs."""
