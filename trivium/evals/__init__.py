"""Tasks with known truth, and the statistics that compare two models on them."""
