"""The network whose features are measured: its layers, its weights, and what its input was."""
