"""Networks: a new one is a subclass of `Backbone` in a file of its own, and a line in `BACKBONES` of `build.py`."""
