"""Training, and what it shares with sampling: devices, processes, building a model from its settings."""
