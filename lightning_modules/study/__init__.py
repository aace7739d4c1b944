"""The truncation study: which cuts of which layers a trained network can do without, and what retraining brings back."""
