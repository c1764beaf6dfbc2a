"""What one lane computes: a datapath for each form of table, and one for a function as a truth table."""
