"""Measure a model as it is and with components off, and say what is an effect."""
