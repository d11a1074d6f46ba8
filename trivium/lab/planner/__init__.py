"""What stages would cost on any machine: FLOPs, memory by part, time, money, and the layout that fits."""
