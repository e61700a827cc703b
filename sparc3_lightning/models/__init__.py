"""What a model is made of: find its parts, load it, shard it, edit it, write it."""
