"""TinyAlign: a small vision-language model that retrieves similar training examples for every image."""
