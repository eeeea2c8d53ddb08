"""Images from a model."""
