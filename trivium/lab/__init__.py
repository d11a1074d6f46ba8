"""Look at what happened: compare, behaviour distance, planner, report."""
