"""Whether a design is what it says: simulation of every input, and proofs."""
