"""What is right: formats, tables, the true functions, and what every function gives in every mode, bit by bit."""
