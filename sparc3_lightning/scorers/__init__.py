"""From a text to a number in [0, 1]: Detoxify's models, other classifiers, repetition, functions of packages."""
