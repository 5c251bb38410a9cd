"""What support vectors say about a classifier, and how sure that is."""
