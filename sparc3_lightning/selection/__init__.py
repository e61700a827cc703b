"""From scores to an order of components, and to the list of those to take out."""
