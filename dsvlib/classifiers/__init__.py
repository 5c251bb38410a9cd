"""Classifiers Φ(x; θ): architectures, training, files, and networks from elsewhere."""
