"""The processor: text and images to model inputs; travels with every checkpoint."""
