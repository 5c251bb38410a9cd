"""What recorded runs say: results, verdicts on the claims, and pages of figures."""
