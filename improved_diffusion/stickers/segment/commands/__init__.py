"""The command lines of `stickers.py segment`."""
