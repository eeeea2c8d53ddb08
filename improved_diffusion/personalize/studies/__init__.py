"""Comparisons: sweeps over settings, evaluation of a folder of images, a survey among people."""
