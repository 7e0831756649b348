"""What a run would take, before it runs: simulated memory, hours, what fits on a card."""
