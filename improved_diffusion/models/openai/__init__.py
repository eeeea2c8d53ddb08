"""Import of checkpoints in the format of openai/improved-diffusion, the published ones above all."""

from improved_diffusion.models.openai.conversion import load_checkpoint

__all__ = ["load_checkpoint"]
