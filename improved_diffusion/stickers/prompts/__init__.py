"""Which prompt tells good stickers from bad ones best."""
