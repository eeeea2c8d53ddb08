"""One loop for LoRA, DreamBooth and textual inversion: the budget, a step, the watching of a run."""
