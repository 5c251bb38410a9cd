"""The pages of the recorded runs."""
