"""From samples, or none, to one score for each component of a model."""
