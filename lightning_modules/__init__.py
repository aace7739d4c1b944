"""Lightning training for tensorized networks."""
