"""Small, honest proofs of the promises on the user's own machine: real processes, real signals, real files."""
