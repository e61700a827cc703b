"""From a text to a number in [0, 1]: Detoxify, other classifiers, guards, repetition, functions of packages."""
