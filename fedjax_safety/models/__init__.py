"""The language model: decoder, weights in and out, generation."""
