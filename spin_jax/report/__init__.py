"""The report of a run as one HTML page, its charts, and the model cards of exported models."""
