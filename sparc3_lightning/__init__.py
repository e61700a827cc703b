"""Find the neurons of a language model that carry an unwanted behaviour, switch them off, and prove what changed."""
