"""One file for each command of personalize.py: its flags and what it does."""
